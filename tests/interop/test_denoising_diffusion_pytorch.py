"""Checkpoints of denoising_diffusion_pytorch, saved by the package itself: read, sampled from like it, written back."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from peers import stand_ins

from jax_diffusion import config as configs
from jax_diffusion import experiment, interop, process, schedules, solvers
from jax_diffusion.errors import UserError
from jax_diffusion.guidance import model as guiding
from jax_diffusion.interop import denoising_diffusion_pytorch as ddp
from jax_diffusion.interop import linear_attention_unet, tensors

torch = pytest.importorskip("torch")
ema_pytorch = pytest.importorskip("ema_pytorch")
peer = stand_ins.import_peer("denoising_diffusion_pytorch")
guided = stand_ins.import_peer("denoising_diffusion_pytorch.classifier_free_guidance")

SIZE, T = (4, 8), 12
FORMAT = "denoising_diffusion_pytorch"
NET = {"dim": 8, "dim_mults": (2,), "channels": 1, "attn_heads": 2, "attn_dim_head": 4}
TWO_LEVELS = {**NET, "dim_mults": (1, 2)}


def shaken(module, seed=0):
    """All parameters off their initial values."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p += 0.1 * torch.randn_like(p)
    return module


def diffusion(kind=peer.GaussianDiffusion, net=None, **options):
    net = shaken(peer.Unet(**NET)) if net is None else net
    return kind(net, image_size=SIZE, **{"timesteps": T, **options})


def read(state, **options):
    found = tensors.Tensors("state", {k: tuple(v.shape) for k, v in state.items()}, lambda k: state[k].numpy())
    assert ddp.matches(found)
    return ddp.read(found, **{"image_size": SIZE, **options})


def same(a, b):
    return jax.tree.all(jax.tree.map(np.array_equal, a, b))


@functools.cache
def milestone(folder):
    """What Trainer.save writes after two steps, and the model it is of."""
    model = diffusion()
    average = ema_pytorch.EMA(model, beta=0.9, update_every=1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, betas=(0.9, 0.99))
    for _ in range(2):
        model(torch.rand(2, 1, *SIZE)).backward()
        optimizer.step()
        average.update()
    shaken(average.ema_model, seed=1)
    path = folder / "model-1.pt"
    torch.save(
        {"step": 2, "model": model.state_dict(), "opt": optimizer.state_dict(), "ema": average.state_dict(),
         "scaler": None, "version": "2.3.4"},
        path,
    )  # fmt: skip
    return path, model, average


def test_a_milestone_is_read_with_its_average(tmp_path_factory):
    path, model, average = milestone(tmp_path_factory.getbasetemp())
    got = interop.open_model(path, FORMAT, image_size=SIZE)
    assert got.shape == (*SIZE, 1) and not got.class_names
    assert same(got.params, read(model.state_dict()).params)
    assert same(got.ema, read(average.ema_model.state_dict()).params) and not same(got.ema, got.params)


def test_every_part_of_a_milestone_is_read_alone(tmp_path_factory, tmp_path):
    path, model, average = milestone(tmp_path_factory.getbasetemp())
    whole = interop.open_model(path, FORMAT, image_size=SIZE)
    alone = read(average.state_dict())
    assert same(alone.params, whole.params) and same(alone.ema, whole.ema)
    tensors.save(tmp_path / "model.safetensors", {k: v.numpy() for k, v in model.state_dict().items()})
    lone = interop.open_model(tmp_path / "model.safetensors", image_size=SIZE)
    assert lone.ema is None and same(lone.params, whole.params) and lone.config == whole.config
    net = read(model.model.state_dict(), objective="pred_v", beta_schedule="sigmoid", timesteps=T)
    assert same(net.params, whole.params) and net.config.process.schedule == whole.config.process.schedule


@pytest.mark.parametrize("steps", [12, 1000])
@pytest.mark.parametrize("name", ["linear", "cosine", "sigmoid"])
def test_its_schedules_are_recognised(name, steps):
    state = diffusion(beta_schedule=name, timesteps=1000 if name == "linear" else steps).state_dict()
    got = read(state).config.process.schedule
    assert got.name == {"sigmoid": "sigmoid_alpha_bar"}.get(name, name)
    ours = schedules.make(got.name, **configs.options(got))
    # Its buffers are float32; of sigmoid's ends so are two constants.
    rtol = 1e-3 if name == "sigmoid" else 2e-6
    np.testing.assert_allclose(ours.betas, state["betas"], rtol=rtol)
    np.testing.assert_allclose(ours.alpha_bar, state["alphas_cumprod"], rtol=rtol)


def test_other_betas_are_kept_as_they_are():
    state = diffusion(beta_schedule="cosine", schedule_fn_kwargs={"s": 0.02}).state_dict()
    got = configs.from_json(configs.to_json(read(state).config)).process.schedule
    assert got.name == "betas" and isinstance(got["values"], tuple)
    assert np.array_equal(np.float32(schedules.make(got.name, **configs.options(got)).betas), state["betas"].numpy())


@pytest.mark.parametrize("gamma", [None, 5, 0.5])
@pytest.mark.parametrize("objective", ["pred_noise", "pred_x0", "pred_v"])
def test_objective_and_weighting_follow_from_the_loss_weights(objective, gamma):
    options = {} if gamma is None else {"min_snr_loss_weight": True, "min_snr_gamma": gamma}
    name = {None: "linear", 5: "cosine", 0.5: "sigmoid"}[gamma]
    steps = 1000 if name == "linear" else T
    model = diffusion(objective=objective, beta_schedule=name, timesteps=steps, **options)
    p = read(model.state_dict()).config.process
    assert p.prediction == ddp.OBJECTIVES[objective]
    assert gamma is None or p.weighting.gamma == pytest.approx(gamma)
    # The weight of the error in prediction space, as the trainer uses it.
    schedule = schedules.make(p.schedule.name, **configs.options(p.schedule))
    ours = process.make(schedule, p.prediction, p.weighting.name, **configs.options(p.weighting))
    weight = ours.loss_weight(jnp.arange(steps, dtype=jnp.float32))
    np.testing.assert_allclose(weight, model.loss_weight, rtol=2e-3)


def test_what_is_given_overrides_what_is_inferred_and_is_noted():
    got = read(diffusion(objective="pred_x0").state_dict(), objective="pred_noise")
    assert got.config.process.prediction == "epsilon"
    assert any("objective=pred_noise as given: loss_weight says pred_x0" in note for note in got.notes)


def test_the_options_of_the_network_are_read_from_its_shapes():
    options = {"dim_mults": (1, 3, 2), "init_dim": 12, "channels": 2, "full_attn": (True, False, True),
               "attn_heads": (2, 1, 3), "attn_dim_head": (8, 16, 4), "learned_variance": True}  # fmt: skip
    got = read(diffusion(peer.LearnedGaussianDiffusion, peer.Unet(8, **options), objective="pred_noise").state_dict())
    assert got.shape == (*SIZE, 2) and got.config.process.learn_variance
    m = got.config.model
    assert (m.channels, m.stem_channels, m.multipliers, m.full_attention_levels) == (8, 12, (1, 3, 2), (0, 2))
    assert (m.heads, m.head_channels, m.memory) == ((2, 1, 3, 3), (8, 16, 4, 4), 4)
    assert (
        experiment.default_table(got.config, experiment.build(got.config, got.shape, 0).process).name == "ddpm(learned)"
    )
    got = read(diffusion(net=peer.Unet(8, dim_mults=(1, 2), self_condition=True)).state_dict())
    assert got.config.model.cond_channels == 3 and got.shape == (*SIZE, 3)
    assert any("self-conditioning" in note for note in got.notes)


def class_conditional():
    net = shaken(guided.Unet(8, num_classes=3, dim_mults=(1, 2), channels=1))
    return guided.GaussianDiffusion(net, image_size=SIZE[0], timesteps=T, beta_schedule="cosine")


@pytest.mark.parametrize(
    "make",
    [
        lambda: diffusion(net=shaken(peer.Unet(**TWO_LEVELS))),
        class_conditional,
        lambda: diffusion(objective="pred_x0", min_snr_loss_weight=True, beta_schedule="linear", timesteps=1000),
        lambda: diffusion(net=shaken(peer.Unet(8, dim_mults=(1,), self_condition=True, full_attn=(False,)))),
        lambda: diffusion(beta_schedule="cosine", schedule_fn_kwargs={"s": 0.02}),
    ],
)
def test_written_back_it_is_what_was_read(make):
    model = make()
    state = model.state_dict()
    got = ddp.write(read(state))
    assert sorted(got) == sorted(state)
    for name, tensor in state.items():
        if name.startswith("model."):
            assert np.array_equal(got[name], tensor.numpy()), name
        else:
            np.testing.assert_allclose(got[name], tensor, rtol=2e-3, atol=1e-6, err_msg=name)
    model.load_state_dict({name: torch.tensor(array) for name, array in got.items()}, strict=True)


def test_what_the_package_has_not_is_not_written():
    got = read(diffusion().state_dict())
    got.config.process.prediction = "flow"
    with pytest.raises(UserError, match="prediction=flow"):
        ddp.write(got)


class Toy(torch.nn.Module):
    """A network that is one line, here and in JAX, so that nothing but the process is compiled."""

    channels, self_condition = 1, False

    def __init__(self, learned):
        super().__init__()
        self.out_dim = 2 if learned else 1

    def forward(self, x, t, x_self_cond=None):
        t = t.float()[:, None, None, None]
        return torch.cat([torch.sin(2 * x + 0.3 * t), torch.cos(x - 0.2 * t)][: self.out_dim], 1)


def toy(params, x, t, cond, key=None):
    t = t[:, None, None, None]
    return jnp.concatenate([jnp.sin(2 * x + 0.3 * t), jnp.cos(x - 0.2 * t)][:params], -1)


@pytest.mark.parametrize(
    ("kind", "options", "steps", "name"),
    [
        (peer.GaussianDiffusion, {"objective": "pred_v"}, 5, "ddim(eta=0)"),
        (peer.GaussianDiffusion, {"objective": "pred_noise"}, 6, "ddim(eta=0)"),
        (peer.GaussianDiffusion, {"objective": "pred_x0", "beta_schedule": "cosine"}, None, "ddpm(fixed_small)"),
        (peer.GaussianDiffusion, {"objective": "pred_v"}, None, "ddpm(fixed_small)"),
        (peer.LearnedGaussianDiffusion, {"objective": "pred_noise"}, None, "ddpm(learned)"),
    ],
)
def test_sampling_follows_its_trajectory(monkeypatch, kind, options, steps, name):
    learned = kind is peer.LearnedGaussianDiffusion
    real = "v" in options["objective"] and steps is not None  # one with the network itself
    net = shaken(peer.Unet(**NET, learned_variance=learned))
    state = diffusion(kind, net, sampling_timesteps=steps, **options).state_dict()
    model = diffusion(kind, net if real else Toy(learned), sampling_timesteps=steps, **options)
    rng, drawn = np.random.default_rng(3), []

    def draw(*args, **kwargs):
        drawn.append(rng.standard_normal((2, *SIZE, 1)).astype(np.float32))
        return torch.tensor(drawn[-1].transpose(0, 3, 1, 2))

    with monkeypatch.context() as m:
        m.setattr(torch, "randn", draw)
        m.setattr(torch, "randn_like", draw)
        states = model.sample(2, return_all_timesteps=True) * 2 - 1  # [B, N+1, C, H, W]

    got = read(state, sampling_timesteps=steps)
    parts = experiment.build(got.config, got.shape, 0)
    table = experiment.default_table(got.config, parts.process)
    assert table.name == name and len(table) == states.shape[1] - 1

    noises = jnp.asarray(np.stack([*drawn, drawn[0]]))  # the last row adds none
    monkeypatch.setattr(solvers.noise, "normal", lambda keys, n, shape: noises[n])

    @jax.jit
    def run(params, table, x):
        apply, params = (parts.network.apply, params) if real else (toy, 1 + learned)
        denoise = guiding.denoiser(apply, parts.process, params, {"cond": {}}, {}, clipped=True)
        return table.run(jax.random.split(jax.random.key(0), 2), denoise, x, trajectory=True)

    x, x0_hats = run(got.params, table, drawn[0])
    assert relative(x, states[:, -1]) < 1e-4
    for n, t in enumerate(table.t.astype(int)):
        with torch.no_grad():
            theirs = model.p_mean_variance(x=states[:, n], t=torch.full((2,), t), clip_denoised=True)[3]
        assert relative(x0_hats[n], theirs) < 1e-4


def relative(ours, theirs):
    theirs = theirs.numpy().transpose(0, 2, 3, 1)
    return np.abs(ours - theirs).max() / np.abs(theirs).max()


@pytest.mark.parametrize(("total", "steps"), [(1000, 250), (1000, 300), (1000, 999), (1000, 7), (12, 5), (4000, 33)])
def test_ddim_visits_the_times_of_the_package(total, steps):
    theirs = torch.linspace(-1, total - 1, steps=steps + 1).int().tolist()[::-1]
    assert ddp.ddim_times(total, steps) == theirs[:-1]


# ------------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"image_size": None}, "does not say the size of its images: give image_size"),
        ({"image_size": (4, 8, 1)}, r"image_size=\(4, 8, 1\)"),
        ({"image_size": (3, 8)}, "3x8 does not divide by 2"),
        ({"objective": "noise"}, "objective='noise' is unknown: did you mean 'pred_noise'"),
        ({"beta_schedule": "quadratic"}, "beta_schedule='quadratic'"),
        ({"beta_schedule": "cosine", "timesteps": "many"}, "timesteps='many'"),
        ({"sampling_timesteps": 13}, "sampling_timesteps=13: state was trained with 12"),
        ({"max_period": "long"}, "max_period='long'"),
    ],
)
def test_mistakes_are_named(options, said):
    with pytest.raises(UserError, match=said) as error:
        read(diffusion(net=peer.Unet(**TWO_LEVELS)).state_dict(), **options)
    assert "\n" not in str(error.value)


def changed(changes):
    state = diffusion(net=peer.Unet(**TWO_LEVELS)).state_dict()
    return {name: changes.get(name, tensor) for name, tensor in state.items() if changes.get(name, 0) is not None} | {
        name: tensor for name, tensor in changes.items() if tensor is not None
    }


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model.init_conv.weight": None}, "init_conv.weight is missing"),
        ({"model.downs.0.2.mem_kv": None}, "1 missing: downs.0.2.mem_kv"),
        ({"model.downs.0.0.extra": torch.zeros(1)}, "1 unknown: downs.0.0.extra"),
        ({"model.mid_block1.block1.proj.weight": torch.zeros(8, 8, 3, 3)}, "1 of another shape: mid_block1"),
        ({"model.final_conv.bias": torch.full((1,), torch.nan)}, "1 not finite: final_conv.bias"),
        ({"model.final_conv.weight": torch.zeros(5, 8, 1, 1)}, "from 1 to 5 channels"),
        ({"model.downs.0.3.1.weight": torch.zeros(9, 32, 1, 1)}, "9 channels, no multiple of the Unet's dim 8"),
        ({"model.downs.0.0.block1.norm.weight": torch.ones(8)}, "1 unknown"),  # GroupNorm of older versions
        ({"model.downs.9999.0.x": torch.ones(1)}, "10000 levels"),
        ({"betas": None}, "without the buffers of its GaussianDiffusion"),
        ({"betas": torch.full((T,), 0.5)}, "damaged: alphas_cumprod"),
        ({"betas": torch.full((T,), torch.nan)}, "damaged: alphas_cumprod"),
        ({"loss_weight": None}, "does not say what its network predicts"),
        ({"loss_weight": torch.full((T,), 0.7)}, "does not say what its network predicts"),
        ({"classifier.weight": torch.zeros(1)}, "unknown tensors beside the network: classifier.weight"),
        ({"model.time_mlp.0.weights": torch.zeros(4)}, "a network of continuous time"),
    ],
)
def test_what_does_not_fit_is_said(changes, said):
    with pytest.raises(UserError, match=said) as error:
        read(changed(changes))
    assert "\n" not in str(error.value)


def test_other_networks_are_left_to_others():
    for names in (["conv_in.weight"], ["input_blocks.0.0.weight"], ["init_conv.bias"]):
        found = tensors.Tensors("x", dict.fromkeys(names, (1,)), lambda name: np.zeros(1))
        assert not ddp.matches(found)
        with pytest.raises(UserError, match="holds no Unet of denoising_diffusion_pytorch"):
            ddp.read(found, image_size=4)


def test_a_network_of_ours_that_the_package_has_not_is_refused():
    architecture = interop.Architecture({"name": "linear_attention_unet", "memory": 0}, (4, 4, 1))
    with pytest.raises(UserError, match="memory=0"):
        linear_attention_unet.entries(architecture)
