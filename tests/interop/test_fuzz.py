"""Damaged folders and files: never a crash without a message, never a wrong load without an error.

What a reader gives for a damaged source is one of

    1. a UserError of one line that names the file or folder,
    2. the undamaged model: parameters bit for bit, the same config,
    3. where nothing in the files could tell: bytes of *foreign* safetensors' data (no CRC) give other finite numbers,
       no more of them than bytes; another valid value in a JSON file gives the config of that value. Tensors that we
       have written, and torch's zips, carry CRCs: there 3 is not allowed.

FUZZ_CASES=5000 runs more cases than CI does; a case is reproduced by its number, FUZZ_FIRST=1234 FUZZ_CASES=1.
"""

import json
import os
import shutil
import warnings

import diffusers
import jax
import numpy as np
import pytest
import torch
from peers import stand_ins

from jax_diffusion import config as configs
from jax_diffusion import interop, models
from jax_diffusion.errors import UserError
from jax_diffusion.interop import runs, tensors, weights

ddp = stand_ins.import_peer("denoising_diffusion_pytorch")

FIRST, CASES = int(os.environ.get("FUZZ_FIRST", 0)), int(os.environ.get("FUZZ_CASES", 420))
UNET = {
    "sample_size": 4, "block_out_channels": (4, 8), "layers_per_block": 1, "norm_num_groups": 4,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": 4,
}  # fmt: skip
SCHEDULERS = {
    "ddim": (diffusers.DDIMScheduler, {"set_alpha_to_one": False, "steps_offset": 1}),
    "pndm": (diffusers.PNDMScheduler, {}),
    "dpm": (diffusers.DPMSolverMultistepScheduler, {"use_karras_sigmas": True}),
    "unipc": (diffusers.UniPCMultistepScheduler, {"trained_betas": [0.01, 0.1, 0.2, 0.3]}),
    "edm": (diffusers.EDMEulerScheduler, {}),
    "flow": (diffusers.FlowMatchEulerDiscreteScheduler, {}),
    "score_sde": (diffusers.ScoreSdeVeScheduler, {"num_train_timesteps": 10}),
}
OPTIONS = {"milestone": {"image_size": 4}, "exported_milestone": {"image_size": 4}}
SOURCES = ("theirs", "ours", "component", "pickled", "sharded", "milestone", "exported_milestone", *SCHEDULERS)


def shaken(module):
    torch.manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            p += 0.1 * torch.randn_like(p)
    return module


@pytest.fixture(scope="module")
def sources(tmp_path_factory, cached_networks):
    """name -> (the undamaged folder, what is opened in it, the model that it holds)."""
    root = tmp_path_factory.mktemp("sources")
    unet = shaken(diffusers.UNet2DModel(**UNET))
    pipe = diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2"))
    pipe.save_pretrained(root / "theirs")
    pipe.save_pretrained(root / "pickled", safe_serialization=False)
    unet.save_pretrained(root / "component")
    unet.save_pretrained(root / "sharded", max_shard_size="16KB")
    for name, (scheduler, options) in SCHEDULERS.items():
        diffusers.DDPMPipeline(unet, scheduler(**options)).save_pretrained(root / name)
    interop.save_diffusers(runs.to_model(interop.open_model(root / "theirs")), root / "ours")
    (root / "milestone").mkdir()
    (root / "exported_milestone").mkdir()
    model = shaken(ddp.GaussianDiffusion(ddp.Unet(4, dim_mults=(1, 2), attn_heads=1, attn_dim_head=4), image_size=4))
    torch.save({"step": 1, "model": model.state_dict(), "version": "2.3.4"}, root / "milestone" / "model-1.pt")
    tensors.save(
        root / "exported_milestone" / "model.safetensors", {k: v.numpy() for k, v in model.state_dict().items()}
    )
    opened = {name: root / name for name in SOURCES}
    opened["milestone"] /= "model-1.pt"
    opened["exported_milestone"] /= "model.safetensors"
    return {name: (root / name, path.name, read(name, path)) for name, path in opened.items()}


def read(source, path):
    return interop.open_model(path, **OPTIONS.get(source, {}))


@pytest.fixture(scope="module")
def cached_networks():
    """Networks are built once for each config: what is fuzzed is reading."""
    make, kept = models.make, {}

    def make_once(name, shape, constrain=None, **options):
        key = repr((name, shape, sorted(options.items())))
        if key not in kept:
            network = make(name, shape, **options)
            shapes = jax.eval_shape(network.init, jax.random.key(0))
            zeros = jax.tree.map(lambda a: np.broadcast_to(np.float32(0), a.shape), shapes)
            kept[key] = network._replace(init=lambda key: zeros)
        return kept[key]

    with pytest.MonkeyPatch.context() as m:
        m.setattr(models, "make", make_once)
        yield


# ------------------------------------------------------------------------------------------------- kinds of damage
# Each changes a copy of the folder and says (file, whether a byte of it was changed in place, how many).


def files_of(folder):
    return sorted(p for p in folder.rglob("*") if p.is_file())


def any_file(rng, folder):
    files = files_of(folder)
    return files[rng.integers(len(files))]


def flip(rng, folder):
    path = any_file(rng, folder)
    data, count = bytearray(path.read_bytes()), int(rng.choice([1, 1, 2, 8]))
    # Headers are small beside the data, and where the harm is.
    low = rng.random() < 0.5
    for place in rng.integers(0, min(len(data), 4000) if low else len(data), count):
        data[place] ^= 1 << rng.integers(8)
    path.write_bytes(data)
    return path, count


def overwrite(rng, folder):
    path = any_file(rng, folder)
    data = bytearray(path.read_bytes())
    start = int(rng.integers(len(data)))
    count = min(int(rng.integers(1, 100)), len(data) - start)
    data[start : start + count] = rng.choice([b"\0", b"\xff", b" ", b"1"]) * count
    path.write_bytes(data)
    return path, count


def truncate(rng, folder):
    path = any_file(rng, folder)
    path.write_bytes(path.read_bytes()[: rng.integers(path.stat().st_size)])
    return path, 0


def append(rng, folder):
    path = any_file(rng, folder)
    path.write_bytes(path.read_bytes() + rng.bytes(int(rng.integers(1, 64))))
    return path, 0


def empty(rng, folder):
    path = any_file(rng, folder)
    path.write_bytes(b"")
    return path, 0


def delete(rng, folder):
    path = any_file(rng, folder)
    path.unlink()
    return path, 0


def directory(rng, folder):
    path = any_file(rng, folder)
    path.unlink()
    path.mkdir()
    return path, 0


def duplicate(rng, folder):
    """A file again under a name that may be taken for another, whole or damaged."""
    path = any_file(rng, folder)
    names = [f"{path.stem}.fp16{path.suffix}", f"{path.stem}.non_ema{path.suffix}", f"{path.stem}.bin",
             f"{path.stem}.safetensors", f"{path.name}.tmp", f"{path.stem} (1){path.suffix}"]  # fmt: skip
    other = path.with_name(names[rng.integers(len(names))])
    if not other.exists():
        other.write_bytes(path.read_bytes() if rng.random() < 0.5 else b"damaged")
    return other, 0


def exchange(rng, folder):
    """One file over another."""
    path, other = any_file(rng, folder), any_file(rng, folder)
    other.write_bytes(path.read_bytes())
    return other, 0


def rename_tensor(rng, folder):
    path = weight_file(rng, folder)
    if path.suffix != ".safetensors":
        return delete(rng, folder)
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    head = json.loads(data[8 : 8 + size])
    names = [name for name in head if name != "__metadata__"]
    old = names[rng.integers(len(names))]
    new = str(rng.choice([old + "x", old[:-1], "module." + old, names[rng.integers(len(names))] + "_2"]))
    text = json.dumps({new if name == old else name: spec for name, spec in head.items()}).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])
    return path, 0


def weight_file(rng, folder):
    files = [p for p in files_of(folder) if p.suffix != ".json"]
    return files[rng.integers(len(files))]


def change_json(rng, folder, change):
    files = [p for p in files_of(folder) if p.suffix == ".json"]
    if not files:
        return truncate(rng, folder)
    path = files[rng.integers(len(files))]
    content = json.loads(path.read_text())
    node = content.get("weight_map", content)
    keys = list(node)
    change(node, keys[rng.integers(len(keys))])
    path.write_text(json.dumps(content))
    return path, 0


def rename_key(rng, folder):
    def change(node, key):
        node[str(rng.choice([key + "x", key[:-1], key.upper()]))] = node.pop(key)

    return change_json(rng, folder, change)


def remove_key(rng, folder):
    return change_json(rng, folder, lambda node, key: node.pop(key))


WRONG = ("x", "", [1, 2], [], {}, {"a": 1}, -1, 0, 3, 2.5, 1e30, float("nan"), True, False, None, [None], ["x"], [[1]])


def wrong_value(rng, folder):
    return change_json(rng, folder, lambda node, key: node.__setitem__(key, WRONG[rng.integers(len(WRONG))]))


def wrong_element(rng, folder):
    """Inside a list, where there is one."""

    def change(node, key):
        key = next((k for k in (key, *node) if isinstance(node[k], list) and node[k]), key)
        value = WRONG[rng.integers(len(WRONG))]
        if isinstance(node[key], list) and node[key]:
            node[key][rng.integers(len(node[key]))] = value
        else:
            node[key] = value

    return change_json(rng, folder, change)


DAMAGES = (flip, flip, flip, overwrite, truncate, append, empty, delete, directory, duplicate, exchange, rename_tensor,
           rename_key, remove_key, wrong_value, wrong_value, wrong_value, wrong_element)  # fmt: skip


# -------------------------------------------------------------------------------------------------- the property


def flat_config(node, prefix=""):
    for k, v in node.items():
        if isinstance(v, dict):
            yield from flat_config(v, f"{prefix}{k}.")
        else:
            yield prefix + k, v


def verdict(source, sources, work, case):
    """What is wrong with how damage number `case` was met, or None."""
    rng = np.random.default_rng(case)
    whole, name, model = sources[source]
    folder = work / "damaged"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(whole, folder)
    damage = DAMAGES[rng.integers(len(DAMAGES))]
    path, count = damage(rng, folder)
    what = f"case {case}, {source}: {damage.__name__} {path.relative_to(folder)} ({count})"
    opened = folder if whole.name == name else folder / name
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            got = read(source, opened)
    except UserError as error:
        line = str(error)
        if "\n" in line or len(line) > 2000 or not line.isprintable():
            return f"{what}: not one line: {line!r}"
        if str(folder) not in line:
            return f"{what}: names no file: {line}"
        return None
    except BaseException as error:
        return f"{what}: {type(error).__name__}: {str(error)[:300]}"
    if (got.shape, got.class_names) != (model.shape, model.class_names):
        return f"{what}: silently another shape or classes: {got.shape}, {got.class_names}"
    a, b = weights.flat(got.params), weights.flat(model.params)
    if {k: v.shape for k, v in a.items()} != {k: v.shape for k, v in b.items()}:
        return f"{what}: silently other parameters"
    if not all(np.isfinite(v).all() for v in a.values()):
        return f"{what}: not finite"
    changed = sum(int((v.view(np.int32) != b[k].view(np.int32)).sum()) for k, v in a.items())
    foreign = source in ("theirs", "component", "sharded", *SCHEDULERS) and path.suffix == ".safetensors"
    if changed > (count if foreign else 0):
        return f"{what}: {changed} numbers silently changed"
    differ = configs.differences(model.config, got.config)
    if differ and path.suffix != ".json":
        return f"{what}: silently another config: {differ}"
    old, new = (dict(flat_config(c.to_dict())) for c in (model.config, got.config))
    odd = [k for k in old.keys() & new.keys() if type(old[k]) is not type(new[k])]
    odd += [k for k in old.keys() ^ new.keys() if not k.startswith(("process.schedule.", "sampling.options."))]
    return f"{what}: a config of other fields or types: {odd} of {differ}" if odd else None


@pytest.mark.parametrize("source", SOURCES)
def test_damage_is_said_or_does_no_harm(sources, tmp_path, source):
    count = -(-CASES // len(SOURCES))
    numbers = range(FIRST, FIRST + count) if CASES > 1 else [FIRST]
    faults = [fault for case in numbers if (fault := verdict(source, sources, tmp_path, case))]
    assert not faults, "\n".join([f"{len(faults)} of {count}", *faults[:40]])


def test_the_sources_are_what_is_meant(sources):
    """All of diffusers' are one model; ours is it again."""
    first = sources["theirs"][2]
    for name in ("ours", "component", "pickled", "sharded"):
        assert jax.tree.all(jax.tree.map(np.array_equal, sources[name][2].params, first.params)), name
    assert sources["ours"][2].config == first.config
    assert sum(p.suffix == ".safetensors" for p in files_of(sources["sharded"][0])) > 1
    assert jax.tree.all(
        jax.tree.map(np.array_equal, sources["milestone"][2].params, sources["exported_milestone"][2].params)
    )
