"""Files of tensors: every kind is read exactly, every damage is one line that names the file."""

import hashlib
import json
import pickle
import struct
import sys

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch

from jax_diffusion.errors import UserError
from jax_diffusion.interop import tensors
from jax_diffusion.interop.tensors import Tensors, open_file

torch = pytest.importorskip("torch")

RNG = np.random.default_rng(0)
SOME = {
    "conv.weight": RNG.standard_normal((4, 3, 3, 3)).astype(np.float32),
    "conv.bias": RNG.standard_normal(4).astype(np.float32),
    "scalar": np.array(2.5, np.float32),
    "nothing": np.zeros((0, 3), np.float32),
}


def content(found):
    return {name: np.asarray(found[name]) for name in found}


def equal(a, b):
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and a[k].shape == b[k].shape and np.array_equal(a[k], b[k]) for k in a
    )


def refused(path, said=""):
    """The one line with which a file is refused, on opening or on reading."""
    with pytest.raises(UserError) as error:
        content(open_file(path))
    line = str(error.value)
    assert "\n" not in line and str(path) in line and said in line, line
    return line


def foreign(path, arrays=SOME, metadata=None):
    """As safetensors itself writes: no CRC."""
    safetensors.numpy.save_file(arrays, path, metadata)
    return path


def header(path):
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def with_header(path, text, data):
    text = text if isinstance(text, bytes) else json.dumps(text).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


# ----------------------------------------------------------------------------------------------- what is read


@pytest.mark.parametrize("write", [tensors.save, foreign], ids=["ours", "foreign"])
def test_safetensors_are_read_exactly(tmp_path, write):
    path = tmp_path / "a.safetensors"
    write(path, SOME)
    found = open_file(path)
    assert equal(content(found), SOME)
    assert dict(found.shapes) == {name: a.shape for name, a in SOME.items()}
    assert equal(safetensors.numpy.load_file(path), SOME)  # and by others


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("ending", ["safetensors", "pt"])
def test_other_precisions_keep_their_values(tmp_path, dtype, ending):
    tensor = torch.tensor([1.0, -3.140625, 1e-3, 65504.0]).to(dtype)
    path = tmp_path / f"a.{ending}"
    safetensors.torch.save_file({"x": tensor}, path) if ending == "safetensors" else torch.save({"x": tensor}, path)
    assert np.array_equal(np.asarray(open_file(path)["x"], np.float64), tensor.double().numpy())


@pytest.mark.parametrize("ending", tensors.PICKLES)
def test_pickles_of_nested_dicts_are_flattened(tmp_path, ending):
    path = tmp_path / f"a{ending}"
    weight = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3))
    torch.save({"model": {"net": {"w": weight}}, "step": 3, "version": "1", "opt": {0: {"m": torch.ones(2)}}}, path)
    found = open_file(path)
    assert sorted(found) == ["model.net.w", "opt.0.m"]
    assert np.array_equal(found["model.net.w"], weight.detach().numpy())


def test_views_and_old_pickles_are_read(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    state = {"t": base.T, "row": base[1], "again": base}
    for name, zipped in (("new.pt", True), ("old.pt", False)):
        torch.save(state, tmp_path / name, _use_new_zipfile_serialization=zipped)
        assert equal(content(open_file(tmp_path / name)), {k: v.numpy() for k, v in state.items()})


def shards(folder, ending=".safetensors"):
    names = [f"m-0000{i}-of-00002{ending}" for i in (1, 2)]
    parts = [dict(list(SOME.items())[:2]), dict(list(SOME.items())[2:])]
    for name, part in zip(names, parts, strict=True):
        if ending == ".safetensors":
            foreign(folder / name, part)
        else:
            torch.save({k: torch.tensor(v) for k, v in part.items()}, folder / name)
    weight_map = {k: name for name, part in zip(names, parts, strict=True) for k in part}
    return names, weight_map


def index(folder, weight_map, name="m.safetensors.index.json"):
    (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder / name


@pytest.mark.parametrize("ending", [".safetensors", ".bin"])
def test_shards_are_one_file(tmp_path, ending):
    _, weight_map = shards(tmp_path, ending)
    for name in (f"m{ending}.index.json", f"m{ending}.index.fp16.json"):
        assert equal(content(open_file(index(tmp_path, weight_map, name))), SOME)


def test_names_under_a_prefix_and_renamed(tmp_path):
    found = Tensors("x", {"a.w": (1,), "a.b": (2,), "c": (3,)}, lambda name: name)
    assert dict(found.under("a.")) == {"w": "a.w", "b": "a.b"}
    renamed = found.renamed(lambda name: name.replace("a.", "z."))
    assert renamed["z.w"] == "a.w" and renamed.shapes["c"] == (3,)
    with pytest.raises(UserError, match=r"holds w twice: as a\.w and as b\.w"):
        Tensors("x", {"a.w": (1,), "b.w": (1,)}, None).renamed(lambda name: name[2:])
    with pytest.raises(KeyError):
        found.under("a.")["c"]


# ------------------------------------------------------------------------------------------- what is never run


class Crafted:
    """A pickle that creates a file when it is loaded without care."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("zipped", [True, False])
def test_a_malicious_pickle_is_not_executed(tmp_path, zipped):
    target, path = tmp_path / "owned", tmp_path / "a.bin"
    torch.save({"w": torch.ones(1), "x": Crafted(target)}, path, _use_new_zipfile_serialization=zipped)
    refused(path, "never executed")
    path.write_bytes(pickle.dumps({"w": Crafted(target)}))
    refused(path, "never executed")
    assert not target.exists()
    pickle.loads(path.read_bytes())
    assert target.exists()  # it would have been


def test_an_index_does_not_lead_out_of_its_folder(tmp_path):
    inside = tmp_path / "inside"
    inside.mkdir()
    outside = foreign(tmp_path / "m.safetensors")
    foreign(inside / "m.safetensors", {"conv.bias": np.zeros(4, np.float32)})
    for file in ("../m.safetensors", str(outside), "./m.safetensors", "sub/m.safetensors", ".."):
        refused(index(inside, {"conv.bias": file}), "files beside it")


# ------------------------------------------------------------------------------------------------- what is damaged


def test_a_flipped_byte_in_a_file_of_ours_is_always_found(tmp_path):
    path = tmp_path / "a.safetensors"
    tensors.save(path, SOME, {"note": "kept"})
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    for place in rng.choice(len(whole), 300, replace=False):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        try:
            got = content(open_file(path))
        except UserError as error:
            assert str(path) in str(error) and "\n" not in str(error)
        else:  # in a part that says nothing of the tensors: "format", the name of the note
            same = {k: v.view(np.int32) for k, v in SOME.items()}
            assert {k: v.view(np.int32).tolist() for k, v in got.items()} == {k: v.tolist() for k, v in same.items()}


def test_a_flipped_byte_in_the_data_of_a_pickle_is_found(tmp_path):
    path = tmp_path / "a.pt"
    array = np.arange(500, dtype=np.float32)
    torch.save({"x": torch.tensor(array)}, path)
    data = bytearray(path.read_bytes())
    data[data.find(array[250:].tobytes())] ^= 1
    path.write_bytes(data)
    assert float(torch.load(path, weights_only=True)["x"][250]) != 250.0  # torch does not notice
    refused(path, "does not have the bytes that were saved")


@pytest.mark.parametrize("ending", [".safetensors", ".pt", ".bin", ".index.json"])
@pytest.mark.parametrize(
    "data",
    [b"", b"\0", b"garbage " * 20, b"\x80\x02.", b"PK\x03\x04", b"{}", b"null", b"[" * 100_000, bytes(range(256))],
)
def test_garbage_is_refused(tmp_path, data, ending):
    path = tmp_path / f"a{ending}"
    path.write_bytes(data)
    refused(path)


@pytest.mark.parametrize("ending", [".safetensors", ".pt"])
def test_a_truncated_file_is_refused(tmp_path, ending):
    path = tmp_path / f"a{ending}"
    state = {k: torch.tensor(v) for k, v in SOME.items()}
    foreign(path) if ending == ".safetensors" else torch.save(state, path)
    whole = path.read_bytes()
    for length in [*range(0, len(whole), max(len(whole) // 40, 1)), len(whole) - 1]:
        path.write_bytes(whole[:length])
        refused(path)


def test_a_header_that_lies_is_refused(tmp_path):
    path = foreign(tmp_path / "a.safetensors", {"a": np.ones(2, np.float32), "b": np.zeros(2, np.float32)})
    head, data = header(path)
    spec = head["a"]
    lies = [
        {**head, "a": {**spec, "shape": [3]}},
        {**head, "a": {**spec, "shape": [-2]}},
        {**head, "a": {**spec, "shape": [2**62, 2**62]}},
        {**head, "a": {**spec, "dtype": "F17"}},
        {**head, "a": {**spec, "data_offsets": [0, 1 << 40]}},
        {**head, "a": {**spec, "data_offsets": head["b"]["data_offsets"]}},
        {**head, "a": None},
        {k: v for k, v in head.items() if k != "a"},
        {**head, "__metadata__": {"crc32": 3}},
        {**head, "__metadata__": {"crc32": "3"}},
        {**head, "__metadata__": {"crc32": "[1"}},
        {**head, "__metadata__": {"crc32": '{"a": 1}'}},
        {**head, "__metadata__": {"crc32": '{"a": 1, "b": 1}'}},
        [],
    ]
    for lie in lies:
        refused(with_header(path, lie, data))
    for size in (2**63, 2**64 - 1, 10**9):  # a header that would not fit memory
        path.write_bytes(struct.pack("<Q", size) + b"{}" + data)
        refused(path)
    text = json.dumps(head).replace('"b"', '"a"').encode()  # a tensor twice
    refused(with_header(path, text, data))


def test_types_without_an_equivalent_are_named(tmp_path):
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file({"w": torch.ones(2).to(torch.float8_e4m3fn)}, path)
    refused(path, "w is of type F8_E4M3")
    torch.save({"w": torch.eye(3).to_sparse()}, tmp_path / "a.pt")
    refused(tmp_path / "a.pt", "w is sparse_coo float32")
    torch.save({"w": torch.ones(2).to(torch.float8_e4m3fn)}, tmp_path / "a.pt")
    refused(tmp_path / "a.pt", "w is strided float8_e4m3fn")


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ({"a": {"b": torch.ones(1)}, "a.b": torch.zeros(1)}, "holds a.b twice"),
        ({1: torch.ones(1), "1": torch.zeros(1)}, "holds 1 twice"),
        ({"step": 3, "names": ["x"]}, "holds no tensors"),
        ([torch.ones(1)], "holds no tensors"),
    ],
)
def test_pickles_whose_names_are_not_clear_are_refused(tmp_path, state, said):
    torch.save(state, tmp_path / "a.pt")
    refused(tmp_path / "a.pt", said)


def test_a_dict_that_holds_itself_is_refused(tmp_path):
    state = {"w": torch.ones(1)}
    state["self"] = state
    torch.save(state, tmp_path / "a.pt")
    refused(tmp_path / "a.pt", "RecursionError")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: {**m, "conv.bias": "m-00003-of-00002.safetensors"}, "m-00003-of-00002.safetensors is no file"),
        (lambda m: {**m, "more": m["scalar"]}, "lists tensors that m-00002-of-00002.safetensors lacks: more"),
        (lambda m: {**m, "scalar": m["conv.bias"]}, "lists tensors that m-00001-of-00002.safetensors lacks: scalar"),
        (lambda m: {k: v for k, v in m.items() if k != "scalar"}, "does not list tensors that m-00002"),
        (lambda m: {**m, "x": "m.safetensors.index.json"}, "files beside it, not m.safetensors.index.json"),
        (lambda m: {**m, "x": 7}, "damaged or no index"),
        (lambda m: {**m, "x": ["m-00001-of-00002.safetensors"]}, "damaged or no index"),
        (lambda m: {}, "files beside it, not none"),
        (lambda m: [], "damaged or no index"),
        (lambda m: None, "damaged or no index"),
    ],
)
def test_an_index_that_does_not_fit_its_shards_is_refused(tmp_path, change, said):
    _, weight_map = shards(tmp_path)
    path = index(tmp_path, change(weight_map))
    with pytest.raises(UserError) as error:
        content(open_file(path))
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    names, weight_map = shards(tmp_path)
    foreign(tmp_path / names[1], SOME)
    refused(index(tmp_path, weight_map), "does not list tensors that m-00002-of-00002.safetensors holds")


def test_a_damaged_shard_is_refused(tmp_path):
    names, weight_map = shards(tmp_path)
    (tmp_path / names[1]).write_bytes(b"")
    with pytest.raises(UserError, match=f"{names[1]} is damaged"):
        open_file(index(tmp_path, weight_map))


def test_a_blob_of_a_hubs_cache_is_checked_by_its_name(tmp_path):
    (tmp_path / "blobs").mkdir()
    plain = foreign(tmp_path / "plain.safetensors").read_bytes()
    blob = tmp_path / "blobs" / hashlib.sha256(plain).hexdigest()
    blob.write_bytes(plain)
    link = tmp_path / "a.safetensors"
    link.symlink_to(blob)
    assert equal(content(open_file(link)), SOME)
    damaged = bytearray(plain)
    damaged[-1] ^= 1
    blob.write_bytes(damaged)
    refused(link, "its SHA-256 is not its name in the cache")


def test_what_is_no_file_of_tensors_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    refused(tmp_path / "a.txt", "neither .safetensors nor one of .bin")
    refused(tmp_path, "is no file")
    refused(tmp_path / "absent.safetensors", "is no file")
    (tmp_path / "dangling.pt").symlink_to(tmp_path / "absent")
    refused(tmp_path / "dangling.pt", "is no file")


def test_without_torch_pickles_say_what_to_do(tmp_path, monkeypatch):
    torch.save({"w": torch.ones(1)}, tmp_path / "a.pt")
    monkeypatch.setitem(sys.modules, "torch", None)
    refused(tmp_path / "a.pt", "needs torch")


def test_saving_is_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    tensors.save(path, SOME)

    def interrupted(arrays, file, metadata):
        file.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("safetensors.numpy.save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tensors.save(path, {"other": np.ones(1)})
    assert equal(content(open_file(path)), SOME)
