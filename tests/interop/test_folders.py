"""Folders of diffusers, opened here; runs of ours, opened there. The same weights, configs and images."""

import json
import pathlib
from types import SimpleNamespace

import diffusers
import jax
import numpy as np
import pytest
import torch

import jax_diffusion as jd
from jax_diffusion import interop
from jax_diffusion.cli import convert
from jax_diffusion.cli.main import main
from jax_diffusion.errors import UserError

torch.set_num_threads(1)
UNET = {
    "sample_size": 8, "in_channels": 3, "out_channels": 3, "block_out_channels": (8, 16), "layers_per_block": 1,
    "norm_num_groups": 4, "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"), "attention_head_dim": 8,
}  # fmt: skip


def randomised(module):
    torch.manual_seed(1)
    with torch.no_grad():
        for p in module.parameters():
            p += 0.2 * torch.randn_like(p)
    return module.eval()


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_pipeline(scheduler=None, cls=diffusers.DDIMPipeline, **options):
    return quiet(cls(randomised(diffusers.UNet2DModel(**UNET, **options)), scheduler or diffusers.DDIMScheduler()))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pipeline saved by diffusers."""
    path = tmp_path_factory.mktemp("theirs")
    make_pipeline().save_pretrained(path)
    return path


def noise_of(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def theirs_of(pipe, n=3, steps=10):
    """Images of their pipeline, [n, H, W, C] in [0, 1]; its noise is noise_of(0). The pipeline's own loop, which hands
    some schedulers a generator that they do not take."""
    if isinstance(pipe.scheduler, diffusers.DDIMScheduler):
        generator = torch.Generator().manual_seed(0)
        return pipe(batch_size=n, num_inference_steps=steps, generator=generator, output_type="np").images
    x = noise_of((n, pipe.unet.config.in_channels, *np.broadcast_to(pipe.unet.config.sample_size, 2)))
    pipe.scheduler.set_timesteps(steps)
    with torch.no_grad():
        for t in pipe.scheduler.timesteps:
            x = pipe.scheduler.step(pipe.unet(x, t).sample, t, x).prev_sample
    return (x / 2 + 0.5).clamp(0, 1).numpy().transpose(0, 2, 3, 1)


def ours_of(model, steps=10, n=3, **options):
    x = noise_of((n, model.shape[2], *model.shape[:2])).numpy().transpose(0, 2, 3, 1)
    s = model.config.sampling
    options = {**s.options, **options}
    table = jd.solvers.make(s.solver, model.process.schedule, steps, s.grid or None, **options)
    return (model.sample(jax.random.key(0), table, n, start=x) / 2 + 0.5).clip(0, 1)


SCHEDULERS = {
    "ddim": (diffusers.DDIMScheduler, {}),
    "ddim, v": (diffusers.DDIMScheduler, {"prediction_type": "v_prediction", "beta_schedule": "squaredcos_cap_v2"}),
    "ddim, to alpha_bar_0": (diffusers.DDIMScheduler, {"set_alpha_to_one": False, "steps_offset": 1}),
    "ddim, thresholding": (diffusers.DDIMScheduler, {"thresholding": True, "sample_max_value": 1e6}),
    "dpmpp_2m": (diffusers.DPMSolverMultistepScheduler, {}),
    "dpmpp_2m, leading": (diffusers.DPMSolverMultistepScheduler, {"timestep_spacing": "leading"}),
    "dpmpp_2m, heun": (diffusers.DPMSolverMultistepScheduler, {"solver_type": "heun"}),
    "unipc": (diffusers.UniPCMultistepScheduler, {}),
    "dpm_solver_2m": (diffusers.DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver",
                                                              "final_sigmas_type": "sigma_min"}),
    "deis": (diffusers.DEISMultistepScheduler, {}),
    "pndm": (diffusers.PNDMScheduler, {"skip_prk_steps": True, "set_alpha_to_one": True}),
}  # fmt: skip


@pytest.fixture(scope="module")
def network():
    """One network for all schedulers: one compiled program."""
    return randomised(diffusers.UNet2DModel(**UNET))


@pytest.mark.parametrize("name", SCHEDULERS)
def test_same_images_with_the_scheduler_of_the_folder(name, network, tmp_path):
    """From the same noise, 1e-3 on pixels in [0, 1]: half a step of 8 bits is 2e-3; float32 gives 1e-5 to 1e-4."""
    scheduler, options = SCHEDULERS[name]
    pipe = quiet(diffusers.DDPMPipeline(network, scheduler(**options)))
    pipe.save_pretrained(tmp_path)
    model = jd.load(tmp_path)
    difference = np.abs(ours_of(model) - theirs_of(pipe)).max()
    assert difference < 1e-3, difference


def test_ddpm_pipeline_by_its_mean(folder, network, tmp_path):
    """Stochastic: one step of a full-variance schedule has no noise, and is the posterior mean."""
    pipe = quiet(diffusers.DDPMPipeline(network, diffusers.DDPMScheduler(num_train_timesteps=1, beta_start=0.5)))
    pipe.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="at least two"):
        jd.load(tmp_path)
    pipe = quiet(diffusers.DDPMPipeline(network, diffusers.DDPMScheduler()))
    pipe.save_pretrained(tmp_path)
    model = jd.load(tmp_path)
    assert model.config.sampling.solver == "ddpm" and len(model.default_table()) == 1000
    assert np.abs(ours_of(model, steps=1) - theirs_of(pipe, steps=1)).max() < 1e-3


def test_round_trip_is_bit_identical(folder, tmp_path):
    model = jd.load(folder)
    jd.save_diffusers(model, tmp_path / "back")
    theirs = diffusers.DDIMPipeline.from_pretrained(folder)
    again = quiet(diffusers.DDIMPipeline.from_pretrained(tmp_path / "back"))
    before, after = theirs.unet.state_dict(), again.unet.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)
    skip = {"_name_or_path", "_diffusers_version", "_use_default_values"}
    skip |= {"attn_norm_num_groups"}  # None is norm_num_groups
    for part in ("unet", "scheduler"):
        a, b = dict(getattr(theirs, part).config), dict(getattr(again, part).config)
        differing = {k: (a[k], b.get(k)) for k in a.keys() - skip if _plain(a[k]) != _plain(b.get(k))}
        assert not differing, differing
    assert np.abs(theirs_of(quiet(theirs)) - theirs_of(again)).max() == 0
    assert np.abs(ours_of(model) - theirs_of(again)).max() < 1e-3


def _plain(value):
    return list(value) if isinstance(value, list | tuple) else value


@pytest.mark.parametrize(
    "options",
    [{"max_shard_size": "20KB"}, {"safe_serialization": False}, {"variant": "fp16"}, {"max_shard_size": "20KB",
     "variant": "fp16"}],
    ids=["sharded", "pickled", "fp16", "sharded fp16"],
)  # fmt: skip
def test_files_of_every_kind(folder, options, tmp_path):
    unet = diffusers.UNet2DModel.from_pretrained(folder, subfolder="unet")
    pipe = diffusers.DDIMPipeline(unet, diffusers.DDIMScheduler())
    pipe.save_pretrained(tmp_path, **{k: v for k, v in options.items() if k != "max_shard_size"})
    if "max_shard_size" in options:
        for file in (tmp_path / "unet").glob("diffusion_pytorch_model*"):
            file.unlink()
        unet.save_pretrained(tmp_path / "unet", **options)
        assert len(list((tmp_path / "unet").glob("*-of-*"))) > 1
    jax.tree.map(np.testing.assert_array_equal, jd.load(tmp_path).params, jd.load(folder).params)
    jax.tree.map(np.testing.assert_array_equal, jd.load(tmp_path / "unet").params, jd.load(folder).params)


def test_missing_weights_and_variants_are_said(folder, tmp_path):
    unet = diffusers.UNet2DModel.from_pretrained(folder, subfolder="unet")
    for variant in ("fp16", "ema"):
        unet.save_pretrained(tmp_path, variant=variant)
    with pytest.raises(UserError, match=r"fp16\.safetensors.*variant="):
        jd.load(tmp_path)
    assert jd.load(tmp_path, variant="ema").params.keys() == jd.load(folder).params.keys()
    with pytest.raises(UserError, match="holds no weights"):
        jd.load(tmp_path, variant="bf16")


def test_dit_pipeline(tmp_path):
    """Labels from id2label, guidance, learned variance: the latents that DiTPipeline would decode."""
    torch.manual_seed(0)
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
        patch_size=2, num_embeds_ada_norm=1000,
    )  # fmt: skip
    randomised(transformer)
    first = transformer.transformer_blocks[0].norm1.emb.state_dict()
    for block in transformer.transformer_blocks:  # as in the published ones
        block.norm1.emb.load_state_dict(first)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(4,), norm_num_groups=1, down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
    )  # fmt: skip
    names = {i: f"animal {i}, beast {i}" for i in range(1000)}
    pipe = quiet(diffusers.DiTPipeline(transformer, vae, diffusers.DDIMScheduler(clip_sample=False), id2label=names))
    pipe.save_pretrained(tmp_path / "dit")
    index = json.loads((tmp_path / "dit" / "model_index.json").read_text())
    (tmp_path / "dit" / "model_index.json").write_text(json.dumps({**index, "id2label": names}))

    model = jd.load(tmp_path / "dit")
    assert model.class_names[7] == "animal 7" and model.shape == (8, 8, 4) and not model.config.sampling.clip
    latents = []
    image = SimpleNamespace(sample=torch.zeros(2, 3, 8, 8))
    pipe.vae.decode = lambda z: latents.append(z * pipe.vae.config.scaling_factor) or image
    pipe(class_labels=[7, 900], guidance_scale=4.0, num_inference_steps=5, generator=torch.Generator().manual_seed(0))
    x = noise_of((2, 4, 8, 8)).numpy().transpose(0, 2, 3, 1)
    s = model.config.sampling
    table = jd.solvers.make(s.solver, model.process.schedule, 5, s.grid, **s.options)
    ours = model.sample(jax.random.key(0), table, 2, labels=[7, 900], guidance=4.0, start=x)
    theirs = latents[0].numpy().transpose(0, 2, 3, 1)
    assert np.abs(ours - theirs).max() < 1e-3 * np.abs(theirs).max()

    jd.save_diffusers(model, tmp_path / "back")
    again = diffusers.DiTTransformer2DModel.from_pretrained(tmp_path / "back", subfolder="transformer")
    before, after = transformer.state_dict(), again.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)


def test_commands(folder, tmp_path, capsys):
    """convert, sample, train, and back."""
    run, images = tmp_path / "run", np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), np.uint8)
    np.save(tmp_path / "images.npy", images)
    data = ["data.source=numpy", f"data.path={tmp_path}/images.npy", "train.steps=2", "train.batch_size=8",
            "train.eval_every=0", "train.sample_every=0", "sampling.steps=3"]  # fmt: skip
    assert main(["convert", str(folder), f"--workdir={run}", *(f"--config.{d}" for d in data)]) == 0
    assert "now: jax-diffusion sample" in capsys.readouterr().out
    assert main(["sample", f"--workdir={run}", "--num=2"]) == 0
    assert (run / "samples.png").stat().st_size > 0
    assert main(["train", f"--workdir={run}"]) == 0
    assert main(["convert", f"--workdir={run}", "--to=diffusers", f"--out={tmp_path}/back"]) == 0
    back = diffusers.DDIMPipeline.from_pretrained(tmp_path / "back").unet.state_dict()
    first = diffusers.DDIMPipeline.from_pretrained(folder).unet.state_dict()
    moved = max(float((back[k] - first[k]).abs().max()) for k in first)
    assert 0 < moved < 1e-3  # fine-tuned: two steps of a small rate from where it was


@pytest.mark.parametrize(("command", "says"), [
    (["{folder}", "--workdir={run}"], "holds a run already"),
    (["--workdir={tmp}/x"], "SOURCE is missing"),
    (["{tmp}/nowhere", "--workdir={tmp}/x"], "does not exist"),
    (["{run}", "--workdir={tmp}/x"], "neither model_index.json"),
    (["{folder}", "--workdir={tmp}/x", "--format=ddpm"], "format='ddpm' is unknown"),
    (["{folder}", "--workdir={tmp}/x", "--set", "variants=fp16"], "did you mean 'variant'"),
    (["{folder}", "--workdir={tmp}/x", "--label=3"], "--label=3 goes with --to=diffusers"),
    (["--workdir={run}", "--to=diffusers"], "--out is missing"),
    (["--workdir={run}", "--to=diffusers", "--out={folder}"], "is not empty"),
    (["--workdir={run}", "--to=diffusers", "--out={tmp}/x", "--label=12"], "'12' is no class"),
    (["--workdir={tmp}/x", "--to=diffusers", "--out={tmp}/y"], "holds no training run"),
])  # fmt: skip
def test_mistakes_are_one_line(command, says, folder, run, tmp_path, capsys):
    words = [a.format(folder=folder, run=run.workdir, tmp=tmp_path) for a in command]
    assert main(["convert", *words]) == 2
    err = capsys.readouterr().err
    assert says in err and err.count("\n") == 1, err
    assert not (tmp_path / "x").exists() and not (tmp_path / "y").exists()


@pytest.mark.parametrize("label", ("3", "none", None))
def test_a_run_on_digits_opens_in_ddpm_pipeline(run, label, tmp_path, capsys):
    """Ours with a label, theirs without: the label is in the time embedding's bias."""
    words = [] if label is None else [f"--label={label}"]
    assert main(["convert", f"--workdir={run.workdir}", "--to=diffusers", f"--out={tmp_path}/out", *words]) == 0
    said = capsys.readouterr().out
    assert ("DDIMPipeline.from_pretrained" if label else "UNet2DModel.from_pretrained") in said
    unet = diffusers.UNet2DModel.from_pretrained(tmp_path / "out" / "unet")
    model = jd.load(run.workdir)
    x, t = noise_of((3, 1, 8, 8)), torch.tensor([5.0, 500.0, 999.0])
    labels = np.full(3, 10 if label == "none" else 3)
    with torch.no_grad():
        theirs = unet(x, t, class_labels=torch.tensor(labels) if label is None else None).sample
    ours = jax.jit(model.network.apply)(
        model.params, x.numpy().transpose(0, 2, 3, 1), t.numpy(), {"label": labels.astype(np.int32)}
    )
    theirs = theirs.numpy().transpose(0, 2, 3, 1)
    assert np.abs(ours - theirs).max() < 2e-5 * max(np.abs(theirs).max(), 1)
    if label is not None:
        pipe = quiet(diffusers.DDPMPipeline.from_pretrained(tmp_path / "out"))
        assert theirs_of(pipe, n=2, steps=4).shape == (2, 8, 8, 1)


def test_reading_back_what_was_written(run, tmp_path):
    """The null label survives diffusers, which has none; labels, weights, process and solver too."""
    model = jd.load(run.workdir)
    interop.save_diffusers(model, tmp_path / "out")
    again = jd.load(tmp_path / "out")
    jax.tree.map(np.testing.assert_array_equal, model.params, again.params)
    assert again.network.num_classes == 10 and again.shape == model.shape
    key = jax.random.key(0)
    table = model.default_table()
    np.testing.assert_allclose(
        again.sample(key, table, 2, labels=[3, 7], guidance=2.0),
        model.sample(key, table, 2, labels=[3, 7], guidance=2.0),
        atol=1e-6,
    )
    with pytest.raises(UserError, match="not empty"):
        interop.save_diffusers(model, tmp_path / "out")


def test_nothing_here_needs_torch(folder, tmp_path):
    """A process in which importing torch fails loads, samples and writes."""
    import subprocess
    import sys

    code = f"""
import sys
sys.modules["torch"] = sys.modules["diffusers"] = None
import jax, jax_diffusion as jd
model = jd.load({str(folder)!r})
print(jd.save_diffusers(model, {str(tmp_path / "back")!r}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert pathlib.Path(done.stdout.strip()).is_dir()


def test_the_help_names_every_format():
    assert convert.FORMATS.split(", ") == ["diffusers", *interop.FORMATS]
