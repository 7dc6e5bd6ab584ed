"""The two frameworks' sides in one process, on networks of a few thousand parameters."""

import json

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from peers import stand_ins  # noqa: E402

from jax_diffusion import experiment  # noqa: E402
from jax_diffusion.bench import cases, jax_side, torch_side, torch_train  # noqa: E402
from jax_diffusion.errors import UserError  # noqa: E402

TINY = {
    "unet_half": ["channels=8", "multipliers=(1,2)", "blocks=1", "norm_groups=4"],
    "dit_s2": ["width=16", "depth=2", "heads=2", "patch=8"],
    "adm64": ["channels=8", "multipliers=(1,2)", "blocks=1", "attention_levels=(1,)", "norm_groups=4",
              "head_channels=8"],
    "ddpm_pytorch": ["channels=8", "multipliers=(1,2)", "heads=(2,)", "head_channels=(8,)"],
}  # fmt: skip


@pytest.fixture(autouse=True)
def small_images(monkeypatch):
    """A quarter of the pixels."""
    for name, case in cases.CASES.items():
        monkeypatch.setitem(cases.CASES, name, case._replace(shape=(16, 16, case.shape[-1])))


def sides(case, mode, folder, *, batch=2, steps=3, dtype="float32"):
    """Both, with the network loaded."""
    if case == "ddpm_pytorch":
        stand_ins.import_peer("denoising_diffusion_pytorch")
    overrides = [f"--config.model.{field}" for field in TINY[case]]
    work = cases.Work(case, mode, batch, dtype, steps, overrides)._asdict()
    ours, theirs = jax_side.Side(1, folder), torch_side.Side(1, folder)
    ours.start()
    theirs.start("cpu")
    size = ours.load(**work)
    ours.export()
    assert theirs.load(**work)["parameters"] == size["parameters"]
    return ours, theirs


def apart(a, b):
    with np.load(a) as a, np.load(b) as b:
        return {name: cases.distance(b[name], a[name]) for name in a.files if name in b.files}


@pytest.mark.parametrize("case", TINY)
def test_outputs_and_losses_are_the_same(case, tmp_path):
    """Learned variances (DiT, ADM): the loss of one t is the decoder's, of the other the bound's."""
    ours, theirs = sides(case, "train", tmp_path)
    found = apart(ours.check(2), theirs.check(2))
    assert set(found) == {"output", "loss"} and max(found.values()) < 2e-5, found
    with np.load(tmp_path / "jax_check.npz") as arrays:
        assert arrays["output"].std() > 0.01  # not the zeros that such networks begin with
    with torch.no_grad():  # one weight of many
        next(p for p in theirs.network.parameters() if p.ndim == 4).view(-1)[0] += 1
    found = apart(tmp_path / "jax_check.npz", theirs.check(2))
    assert min(found.values()) > cases.tolerance("float32", "cpu", "train"), found


@pytest.mark.parametrize("case", ["unet_half", "dit_s2", "ddpm_pytorch"])
def test_samples_are_the_same_from_the_same_noise(case, tmp_path):
    """Of every loop; those that are compiled differ from them by torch.compile alone."""
    ours, theirs = sides(case, "sample", tmp_path)
    ready = ours.prepare("default", "sample", "default", 2, 1)
    assert ready["flops"] > 0 and ready["compile_s"] > 0
    assert ours.run("default", 1) > 0
    begin = ours.output("default")
    for variant in [v for v in theirs.variants("sample") if "compile" not in v]:
        theirs.prepare(variant, "sample", variant, 2, 1)
        found = apart(begin, theirs.output(variant, begin=begin))
        assert found["output"] < 1e-4, (variant, found)
        assert theirs.run(variant, 1) > 0
        theirs.drop(variant)


def test_a_step_of_jax_is_the_trainers(tmp_path):
    ours = sides("dit_s2", "train", tmp_path)[0]
    weights = jax.tree.map(np.copy, ours.params)
    ready = ours.prepare("default", "train", "default", 2, 1)
    forward = ours._count(ours._program(2), 2)[1]
    assert 2.5 < ready["flops"] / forward < 3.5
    assert ours.run("default", 2) > 0
    assert jax.tree.all(jax.tree.map(np.array_equal, weights, ours.params))  # the step has written to copies


def test_lucidrains_own_step_and_ours_on_its_network(tmp_path):
    theirs = sides("ddpm_pytorch", "train", tmp_path)[1]
    assert theirs.variants("train")[:3] == ["package", "eager", "eager_channels_last"]
    for variant in theirs.variants("train")[:3]:
        theirs.prepare(variant, "train", variant, 2, 1)
        assert theirs.run(variant, 2) > 0
        theirs.drop(variant)


def test_pytorchs_step_is_adamw_with_an_average(tmp_path):
    theirs = sides("unet_half", "train", tmp_path)[1]
    variant = torch_side.Variant(channels_last=False)
    net = theirs._net(variant, training=True)
    loss = torch_train.Loss(net, theirs.spec, torch.float32)
    step = torch_train.Step(loss, theirs.spec, loss, marks=False, graph=False)
    before = [p.detach().clone() for p in step.params]
    given = theirs._tensors(2, torch.contiguous_format)
    step(given["x0"], given["label"])
    rate = theirs.spec["optim"]["learning_rate"]
    for old, new, ema in zip(before, step.params, step.ema, strict=True):
        moved = (new.detach() - old).abs()
        assert moved.max() <= 1.01 * rate  # Adam's first step is the rate times the gradient's sign
        torch.testing.assert_close(ema, old + 0.9 * (new.detach() - old))  # the first decay is 1 / 10
    assert sum(float((n.detach() - o).abs().sum()) for o, n in zip(before, step.params, strict=True)) > 0


def test_the_forward_pass_is_compared_as_it_is_timed(tmp_path):
    ours, theirs = sides("dit_s2", "forward", tmp_path, dtype="bfloat16")
    ours.prepare("default", "forward", "default", 2, 1)
    theirs.prepare("eager", "forward", "eager", 2, 1)
    found = apart(ours.output("default"), theirs.output("eager"))["output"]
    assert 1e-6 < found < cases.tolerance("bfloat16", "cpu", "forward")
    assert ours.peak() > 0 and theirs.peak() > 0


def test_what_has_no_counterpart_is_refused(tmp_path):
    work = cases.Work("unet_half", "train", 2, "float32", 3, ["--config.process.prediction=v",
                      *(f"--config.model.{f}" for f in TINY["unet_half"])])  # fmt: skip
    ours = jax_side.Side(1, tmp_path)
    ours.load(**work._asdict())
    with pytest.raises(UserError, match=r"process\.prediction=v.*--only=jax"):
        ours.export()


SIZES = {"unet": 35.746, "unet_half": 8.952, "dit_s2": 32.865, "dit_xl2": 674.835, "ddpm_pytorch": 35.711}


@pytest.mark.parametrize("name", SIZES)
def test_the_cases_are_the_published_networks(name):
    case = cases.CASES[name]
    config = cases.make_config(cases.Work(name, "train", 2, "float32", 50))
    count = experiment.build(config, (32, 32, case.shape[-1]), case.classes).network.parameter_count()
    assert round(count / 1e6, 3) == SIZES[name]
    json.dumps(config.to_dict())
