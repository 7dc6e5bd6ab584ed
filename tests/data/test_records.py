"""ArrayRecord, TFRecord and Hugging Face shards of real JPEGs, against the same files in a folder."""

import hashlib
import json
import pathlib
import pickle
import struct
import tarfile

import numpy as np
import pytest

from jax_diffusion.data import ArraySource, load, shards, tf_example, tfrecord
from jax_diffusion.data.encoded import LazySource
from jax_diffusion.errors import UserError

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
array_record = pytest.importorskip("array_record.python.array_record_module")
pytest.importorskip("google_crc32c")

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
KINDS = ("array_record", "tfrecord", "parquet", "arrow")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """What is remembered between two loads goes elsewhere than into the user's cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "jax_diffusion" / "data"


@pytest.fixture(scope="session")
def jpegs():
    """{"train": [(JPEG bytes, label)] * 60, "test": ... * 20} of CIFAR-10; made up where that is not at hand."""
    path = pathlib.Path(__file__).parents[3] / "shared" / "data" / "cifar10-test.tar.gz"
    found = []
    if path.is_file():
        with tarfile.open(path) as archive:
            for member in archive:
                if member.isfile() and int(hashlib.md5(member.name.encode()).hexdigest(), 16) % 100 == 0:
                    label = next(i for i, c in enumerate(CLASSES) if f"/{c}/" in f"/{member.name}")
                    found.append((archive.extractfile(member).read(), label))
    else:
        import io

        from PIL import Image

        for i in range(80):
            file = io.BytesIO()
            Image.fromarray(np.random.default_rng(i).integers(0, 256, (32, 32, 3), np.uint8)).save(file, "JPEG")
            found.append((file.getvalue(), i % 10))
    order = np.random.default_rng(0).permutation(len(found))[:80]
    return {"train": [found[i] for i in order[:60]], "test": [found[i] for i in order[60:]]}


def varint(n):
    n &= (1 << 64) - 1  # negative numbers are ten bytes of two's complement
    out = b""
    while n > 127:
        out, n = out + bytes([n & 127 | 128]), n >> 7
    return out + bytes([n])


def field(number, content):
    return varint(number << 3 | 2) + varint(len(content)) + content


def example(image, label, keys=("image", "label"), packed=True):
    """A serialised tf.train.Example, by the wire format alone; an independent second writing of it."""
    number = field(1, varint(label)) if packed else varint(1 << 3) + varint(label)
    values = {keys[0]: field(1, field(1, image)), keys[1]: field(3, number), "other": field(2, field(1, b"\0" * 8))}
    entries = [field(1, field(1, key.encode()) + field(2, value)) for key, value in values.items()]
    return field(1, b"".join(entries))


CRC_TABLE = []
for byte in range(256):
    for _ in range(8):
        byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
    CRC_TABLE.append(byte)


def crc32c(data):
    crc = 0xFFFFFFFF
    for b in data:
        crc = crc >> 8 ^ CRC_TABLE[(crc ^ b) & 255]
    return crc ^ 0xFFFFFFFF


def framed(data):
    def masked(x):
        crc = crc32c(x)
        return struct.pack("<I", ((crc >> 15 | crc << 17 & 0xFFFFFFFF) + 0xA282EAD8) & 0xFFFFFFFF)

    length = struct.pack("<Q", len(data))
    return length + masked(length) + data + masked(data)


def write_tfrecord(path, rows, **options):
    path.write_bytes(b"".join(framed(example(*row, **options)) for row in rows))


def write_array_record(path, rows, **options):
    writer = array_record.ArrayRecordWriter(str(path), "group_size:1,uncompressed")
    for row in rows:
        writer.write(example(*row, **options))
    writer.close()


def table(rows, names=CLASSES):
    images = pa.array([{"bytes": image, "path": None} for image, _ in rows])
    features = {"image": {"_type": "Image"}, "label": {"names": list(names), "_type": "ClassLabel"}}
    schema = pa.schema(
        [("image", images.type), ("label", pa.int64()), ("number", pa.int64())],
        metadata={"huggingface": json.dumps({"info": {"features": features}})},
    )
    return pa.table([images, [label for _, label in rows], range(len(rows))], schema=schema)


def write_parquet(path, rows):
    pq.write_table(table(rows), path, row_group_size=7)


def write_arrow(path, rows):
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table(rows).schema) as writer:
        writer.write_table(table(rows), max_chunksize=6)


WRITE = {"array_record": write_array_record, "tfrecord": write_tfrecord, "parquet": write_parquet, "arrow": write_arrow}


@pytest.fixture
def made(jpegs, tmp_path):
    """made("parquet", "train", "test") -> a folder of three shards a split."""

    def make(kind, *parts, folder="set"):
        root = tmp_path / folder
        root.mkdir()
        for part in parts:
            for s in range(3):
                ending = f".{kind}" if kind != "tfrecord" else ".tfrecord"
                WRITE[kind](root / f"{part}-{s:05d}-of-00003{ending}", jpegs[part][s::3])
        if kind in ("array_record", "tfrecord"):
            (root / "classes.txt").write_text("\n".join(CLASSES) + "\n")
        return root

    return make


@pytest.fixture
def wanted(jpegs, tree, cfg):
    """The same images from a folder: {split: {image: label}}."""
    files = {}
    for part, rows in jpegs.items():
        for i, (image, label) in enumerate(rows):
            files[f"{part}/{label}-{CLASSES[label]}/{i:03d}.jpg"] = image
        files |= {f"{part}/{i}-{c}/x.txt": b"" for i, c in enumerate(CLASSES)}
    path = tree(files, "wanted")
    out = {}
    for split in ("train", "eval"):
        source = load(cfg(path=path), split)
        names = [int(n.split("-")[0]) for n in source.class_names]
        out[split] = {x.tobytes(): names[y] for x, y in pairs(source)}
    return out


def pairs(source, indices=None):
    batch = source.batch(np.arange(len(source)) if indices is None else indices)
    return list(zip(batch["image"], batch["label"], strict=True))


def options(kind, path):
    return {"source": "parquet" if kind == "arrow" else kind, "path": path}


@pytest.mark.parametrize("max_bytes", [1 << 30, 0])
@pytest.mark.parametrize("kind", KINDS)
def test_shards_are_the_folder(kind, max_bytes, made, wanted, cfg):
    path = made(kind, "train", "test")
    for split, count in (("train", 60), ("eval", 20)):
        source = load(cfg(**options(kind, path), max_bytes=max_bytes), split)
        assert isinstance(source, ArraySource if max_bytes else LazySource)
        assert (len(source), source.shape, source.class_names) == (count, (32, 32, 3), CLASSES)
        assert {x.tobytes(): y for x, y in pairs(source)} == wanted[split]
        back = np.arange(count)[::-1]
        np.testing.assert_array_equal(source.batch(back)["image"], source.batch(np.arange(count))["image"][::-1])


@pytest.mark.parametrize("kind", KINDS)
def test_an_opened_set_can_be_sent_to_a_process(kind, made, cfg):
    source = load(cfg(**options(kind, made(kind, "train")), max_bytes=0), "train")
    source.batch(np.arange(9))
    again = pickle.loads(pickle.dumps(source.reader))
    for key, leaf in again.gather(np.arange(60)).items():
        np.testing.assert_array_equal(leaf, source.batch(np.arange(60))[key])


@pytest.mark.parametrize("kind", KINDS)
def test_the_holdout_and_eval_path(kind, made, wanted, cfg):
    path = made(kind, "train")
    parts = [load(cfg(**options(kind, path), holdout=0.2), s) for s in ("train", "eval")]
    found = [{x.tobytes() for x, _ in pairs(p)} for p in parts]
    assert [len(p) for p in parts] == [48, 12] and found[0] | found[1] == set(wanted["train"])
    other = made(kind, "test", folder="elsewhere")
    source = load(cfg(**options(kind, path), eval_path=other), "eval")
    assert {x.tobytes(): y for x, y in pairs(source)} == wanted["eval"]


def flip(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 0x10
    path.write_bytes(content)


@pytest.mark.parametrize("kind", ["array_record", "tfrecord"])
def test_a_flipped_byte_is_a_corrupt_image(kind, made, cfg, jpegs):
    """Also one that a decoder would not notice."""
    path = made(kind, "train")
    shard = path / f"train-00001-of-00003.{kind}"
    at = shard.read_bytes().index(jpegs["train"][31][0]) + len(jpegs["train"][31][0]) - 9
    flip(shard, at)
    for max_bytes in (1 << 30, 0):
        source = load(cfg(**options(kind, path), max_bytes=max_bytes), "train")
        pairs(source)
        assert len(source.skipped) == 1, "image 10 of shard 1, and no other"
        assert len(source) == (59 if max_bytes else 60)


def test_damaged_shards_are_named(made, cfg, tmp_path):
    for kind, cut in (("tfrecord", -30), ("array_record", -70_000), ("parquet", -30)):
        path = made(kind, "train", folder=kind)
        shard = path / f"train-00001-of-00003.{kind}"
        shard.write_bytes(shard.read_bytes()[:cut])
        with pytest.raises(UserError, match=shard.name):
            load(cfg(**options(kind, path)), "train")
    shard = tmp_path / "tfrecord" / "train-00001-of-00003.tfrecord"
    for content, message in ((b"\x1f\x8b" + b"x" * 50, "compressed"), (b"x" * 50, "no TFRecord")):
        shard.write_bytes(content)
        with pytest.raises(UserError, match=f"{shard.name}.*{message}"):
            load(cfg(**options("tfrecord", tmp_path / "tfrecord")), "train")


@pytest.mark.parametrize("kind", ["array_record", "tfrecord"])
def test_labels_without_a_list_of_classes(kind, jpegs, cfg, tmp_path, cache):
    """As ImageNet's: other keys, labels from 1; they are counted once, and again when a file has changed."""
    rows = [(image, label + 1) for image, label in jpegs["train"]]
    file = tmp_path / f"a.{kind}"
    WRITE[kind](file, rows, keys=("image/encoded", "image/class/label"))
    source = load(cfg(**options(kind, file)), "train")
    assert source.class_names == tuple(map(str, range(11)))
    assert [y for _, y in pairs(source)] == [y for _, y in rows]
    [counted] = cache.glob("labels-*")
    assert json.loads(counted.read_text()) == 10
    counted.write_text("12")
    assert load(cfg(**options(kind, file)), "train").num_classes == 13, "read from there"
    WRITE[kind](file, rows[:5], keys=("image", "label"), packed=False)
    source = load(cfg(**options(kind, file)), "train")
    assert source.num_classes == max(y for _, y in rows[:5]) + 1 and len(source) == 5


def test_wrong_labels_count_as_corrupt(jpegs, cfg, tmp_path):
    rows = jpegs["train"][:9]
    wrong = [(rows[0][0], -1), (rows[1][0], 10), (rows[2][0], 1 << 62), *rows[3:]]
    write_tfrecord(tmp_path / "a.tfrecord", wrong)
    (tmp_path / "labels.txt").write_text("\n".join(CLASSES))
    source = load(cfg(source="tfrecord", path=tmp_path), "train")
    assert len(source) == 6 and source.skipped == ("a.tfrecord[0]", "a.tfrecord[1]", "a.tfrecord[2]")
    assert len(load(cfg(source="tfrecord", path=tmp_path, labels=False), "train")) == 9


def test_an_index_is_made_once(made, cfg, cache, monkeypatch):
    path = made("tfrecord", "train")
    load(cfg(source="tfrecord", path=path), "train")
    assert len(list(cache.glob("tfrecord-*"))) == 3
    monkeypatch.setattr(tfrecord, "offsets", None)
    assert len(load(cfg(source="tfrecord", path=path), "train")) == 60
    for file in cache.iterdir():
        file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(TypeError):  # damaged ones are made again
        load(cfg(source="tfrecord", path=path), "train")


def test_an_unwritable_cache_is_no_error(made, cfg, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert len(load(cfg(source="tfrecord", path=made("tfrecord", "train")), "train")) == 60


def test_files_written_by_others():
    """Records that TensorFlow and ArrayRecord's own tools wrote, which lie in grain's wheel."""
    grain = pytest.importorskip("grain")
    [root] = [p for p in (pathlib.Path(grain.__file__).parent / "_src/python").glob("testdata") if p.is_dir()]
    path = root / "morris_sequence_first_5.tfrecord"
    index = tfrecord.offsets(path)
    content = path.read_bytes()
    records = [content[a + 12 : b - 4] for a, b in zip(index[:-1].tolist(), index[1:].tolist(), strict=True)]
    assert records == [b"1", b"1 1", b"2 1", b"1 2 1 1", b"1 1 1 2 2 1"]
    for a, b, record in zip(index[:-1].tolist(), index[1:].tolist(), records, strict=True):
        assert (
            content[a:b] == framed(record) and tfrecord.masked_crc(record) == struct.unpack("<I", content[b - 4 : b])[0]
        )


def test_examples_round_trip_and_refuse_what_is_none():
    for label in (None, 0, 7, 1 << 40):
        assert tf_example.parse(tf_example.serialised(b"image", label)) == (b"image", label)
    assert tf_example.parse(example(b"image", 300)) == (b"image", 300)
    for record in (b"junk" * 9, b"", field(1, field(1, field(1, b"image")))):
        with pytest.raises(ValueError, match=r"no tf.train.Example|no encoded image"):
            tf_example.parse(record)


def test_a_column_that_is_not_the_usual(jpegs, cfg, tmp_path):
    """Plain bytes, names of one's own, no metadata; and a row group is read only where it is asked for."""
    rows = jpegs["train"]
    plain = pa.table({"id": range(60), "photo": [image for image, _ in rows], "fine_label": [y for _, y in rows]})
    (tmp_path / "data").mkdir()
    pq.write_table(plain, tmp_path / "data" / "train-0.parquet", row_group_size=10)
    source = load(cfg(source="parquet", path=tmp_path, max_bytes=0), "train")
    assert source.num_classes == max(y for _, y in rows) + 1
    items = pickle.loads(pickle.dumps(source.reader.items.items))  # below the subset
    assert [items.read(i) for i in (25, 59, 21)] == [rows[i] for i in (25, 59, 21)]
    assert set(items._cache) == {2, 5}
    pq.write_table(plain.select(["id"]), tmp_path / "data" / "train-0.parquet")
    with pytest.raises(UserError, match=r"train-0.parquet has no column of encoded images, only id"):
        load(cfg(source="parquet", path=tmp_path), "train")


def test_the_cache_of_row_groups_is_bounded(made, cfg, monkeypatch):
    from jax_diffusion.data import parquet

    monkeypatch.setattr(parquet, "CACHE_BYTES", 20_000)
    source = load(cfg(source="parquet", path=made("parquet", "train"), max_bytes=0), "train")
    items = source.reader.items.items
    for i in range(60):
        items.read(i)
        assert len(items._cache) == 1 or sum(t.nbytes for t in items._cache.values()) <= 20_000


@pytest.mark.parametrize(
    ("names", "train", "test"),
    [
        (["train-0.p", "test-0.p", "validation-0.p"], 1, ["test-0.p"]),
        (["train/0.p", "train/1.p", "validation/0.p"], 2, ["validation/0.p"]),
        (["d/x-train.p-00000-of-00001", "d/x-val.p-00000-of-00001"], 1, ["d/x-val.p-00000-of-00001"]),
        (["a-0.p", "a-1.p"], 2, []),
        (["contest-0.p", "trainer-0.p"], 2, []),
        (["train-0.p", "other.p"], 1, []),
    ],
)
def test_splits_by_name(names, train, test, tmp_path):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    found = shards.splits(shards.find(str(tmp_path), r".*\.p(-.*)?", "x"))
    assert len(found[0]) == train and [f.relative_to(tmp_path).as_posix() for f in found[1]] == test


def test_unusable_paths(cfg, tmp_path):
    for kind in ("array_record", "tfrecord", "parquet"):
        for path in ("", tmp_path, tmp_path / "absent"):
            with pytest.raises(UserError, match="holds no"):
                load(cfg(source=kind, path=path), "train")
    (tmp_path / "test-0.parquet").write_text("")
    with pytest.raises(UserError, match="all of the test set"):
        load(cfg(source="parquet", path=tmp_path), "train")


def test_ten_shards_in_their_order(tmp_path):
    for i in range(12):
        (tmp_path / f"x_{i}.npy").write_text("")
    assert [p.stem for p in shards.find(str(tmp_path), r".*\.npy", "x")] == [f"x_{i}" for i in range(12)]
