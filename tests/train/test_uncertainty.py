"""A learned log-variance is the log of the expected loss, and forced weight normalisation is the original's."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jax_diffusion import experiment, models, schedules
from jax_diffusion import process as processes
from jax_diffusion.errors import UserError
from jax_diffusion.models import magnitude
from jax_diffusion.models.network import Network
from jax_diffusion.train import state, step
from jax_diffusion.train.state import TrainState


@dataclasses.dataclass
class Toy:
    """A process whose loss at noise level s is drawn from an exponential distribution of known mean."""

    schedule = schedules.make("edm")

    def q_sample(self, key, x0, t):
        return self.mean(t)[:, None] * jax.random.exponential(key, (len(t), 1)), 0.0

    def network_inputs(self, x_t, t):
        return x_t, jnp.log(t) / 4

    def loss(self, prediction, target, x_t, t):
        return prediction[:, 0]

    @staticmethod
    def mean(t):
        return 2 * t**1.5 / (1 + t**2)  # over two decades


class Times:
    def init(self, schedule):
        return ()

    def sample(self, state, key, n, schedule):
        return jnp.exp(3 * jax.random.uniform(key, (n,), minval=-1, maxval=1)), jnp.ones((n,))

    def update(self, state, t, loss, schedule):
        return state


@pytest.fixture(scope="module")
def learned():
    """u after 1500 steps on the toy."""
    plain = Network(lambda key: {"w": jnp.ones(())}, lambda params, x, c, cond, key=None: params["w"] * x)
    network = models.with_uncertainty(plain, 64)
    # The network has nothing to learn: its one weight stands still.
    optimizer = optax.chain(optax.adam(optax.cosine_decay_schedule(0.05, 1500), b2=0.99), optax.masked(
        optax.set_to_zero(), lambda params: {k: k == "w" for k in params}))  # fmt: skip
    process, times = Toy(), Times()
    one = step.make_train_step(network, process, times, optimizer, seed=0)
    start = state.make_init(network, optimizer, times, process)(jax.random.key(0))
    batch = {"image": jnp.zeros((512, 1))}
    end, metrics = jax.jit(lambda s: jax.lax.scan(lambda s, _: one(s, batch), s, None, 1500))(start)
    t = jnp.exp(jnp.linspace(-3, 3, 25))
    u = network.log_variance(end.params, step.noise_level(process, t))
    return SimpleNamespace(u=np.asarray(u), t=t, start=start, end=end, metrics=metrics, network=network)


def test_u_is_the_log_of_the_expected_loss(learned):
    wanted = np.log(Toy.mean(learned.t))
    assert np.ptp(wanted) > 3
    # Untaught it is something else; what is left is the noise of exponential draws and the features' smoothness.
    before = learned.network.log_variance(learned.start.params, jnp.log(learned.t) / 4)
    assert np.abs(before - wanted).max() > 1
    np.testing.assert_allclose(learned.u, wanted, atol=0.2)


def test_every_noise_level_weighs_the_same(learned):
    """E[L] / exp(u) is one everywhere, where E[L] spans a factor of thirty."""
    weighted = np.asarray(Toy.mean(learned.t)) / np.exp(learned.u)
    assert np.abs(weighted - 1).max() < 0.2
    assert abs(weighted.mean() - 1) < 0.05


def test_the_loss_that_is_reported_is_the_plain_one(learned):
    s = np.exp(np.random.default_rng(0).uniform(-3, 3, 100_000))
    assert float(jnp.mean(learned.metrics["loss"][-500:])) == pytest.approx(np.mean(Toy.mean(s)), rel=0.02)
    # At the optimum the objective is the mean of 1 + u.
    assert float(jnp.mean(learned.metrics["objective"][-200:])) == pytest.approx(
        1 + np.mean(np.log(Toy.mean(s))), abs=0.05
    )


def test_it_is_a_head_beside_any_network():
    """The network is the one it would be without, and is not shown the head's parameters."""
    plain, headed = (models.make("mlp", (2,), width=8, depth=1, uncertainty=n) for n in (0, 16))
    params, more = (n.init(jax.random.key(0)) for n in (plain, headed))
    assert set(more) == {*params, "uncertainty"} and plain.log_variance is None
    jax.tree.map(np.testing.assert_array_equal, params, {k: v for k, v in more.items() if k != "uncertainty"})
    x, c = jnp.ones((3, 2)), jnp.arange(3.0)
    np.testing.assert_array_equal(plain.apply(params, x, c, {}), headed.apply(more, x, c, {}))
    assert headed.log_variance(more, c).shape == (3,)
    with pytest.raises(UserError, match=r"has no option 'widht': did you mean 'width'?.*uncertainty"):
        models.make("mlp", (2,), widht=8)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "flow", "edm"])
def test_every_process_has_a_noise_level(schedule):
    process = processes.make(schedules.make(schedule), "x0")
    t = jnp.linspace(process.schedule.t_min, process.schedule.t_max, 50)
    level = np.asarray(step.noise_level(process, t))
    assert np.isfinite(level).all() and (np.diff(level) > 0).mean() > 0.9 and np.abs(level).max() <= 5
    if schedule == "edm":
        np.testing.assert_allclose(level, process.network_inputs(jnp.zeros((50, 1)), t)[1], rtol=1e-6)


def test_a_config_switches_it_on(tiny):
    config = tiny("toy2d", "model.uncertainty=16")
    network = experiment.build(config, (2,), 2).network
    assert network.log_variance is not None and "uncertainty" in jax.eval_shape(network.init, jax.random.key(0))


# Forced weight normalisation, on the whole network.


class Plain:
    """|network(x, t) - x|^2 at fixed times: nothing is drawn, so that PyTorch can do the same."""

    schedule = schedules.make("edm")

    def q_sample(self, key, x0, t):
        return x0, jnp.flip(x0, 1)

    def network_inputs(self, x_t, t):
        return x_t, jnp.log(t) / 4

    def loss(self, prediction, target, x_t, t):
        return jnp.mean(jnp.square(prediction - target), (1, 2, 3))


class Fixed(Times):
    def sample(self, state, key, n, schedule):
        return jnp.array([0.1, 1.0, 10.0]), jnp.ones((n,))


NET = {"channels": 8, "multipliers": (1, 2), "blocks": 1, "attention_levels": (1,), "head_channels": 16}
STEPS, RATE = 3, 3.0


@pytest.fixture(scope="module")
def trained():
    """A tiny EDM2 after STEPS steps of gradient descent, the original's transcription beside it."""
    torch = pytest.importorskip("torch")
    from peers import edm2 as peer

    from jax_diffusion.interop import Tensors, edm2, weights

    torch.manual_seed(0)
    net = peer.UNet(8, 1, 0, model_channels=8, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(4,),
                    channels_per_head=16)  # fmt: skip
    with torch.no_grad():  # gains off 0, or there are no gradients; the initial magnitudes stay as they are drawn
        for p in net.parameters():
            p.copy_(torch.tensor(0.7) if p.ndim == 0 else p)
    theirs = {f"unet.{k}": v.detach().numpy().copy() for k, v in net.state_dict().items()}
    file = Tensors("random", {k: v.shape for k, v in theirs.items()}, theirs.__getitem__)
    entries = edm2.entries(edm2.architecture(file, head_channels=16))

    network = models.make("edm2", (8, 8, 1), **NET)
    shapes = jax.eval_shape(network.init, jax.random.key(0))
    params = network.project(weights.load(entries, file, shapes))  # what init does
    optimizer = optax.sgd(RATE)
    one = step.make_train_step(network, Plain(), Fixed(), optimizer, seed=0, ema_decay=0.5, ema_warmup=False)
    x = np.random.default_rng(0).standard_normal((STEPS, 3, 8, 8, 1)).astype(np.float32)
    start = TrainState(jnp.int32(0), params, optimizer.init(params), params, ())
    end, _ = jax.jit(lambda s, x: jax.lax.scan(one, s, {"image": x}))(start, x)

    descent, average, c_noise = torch.optim.SGD(net.parameters(), lr=RATE), None, torch.tensor([0.1, 1, 10]).log() / 4
    net.train()
    for images in x:
        images = torch.tensor(images.transpose(0, 3, 1, 2))
        descent.zero_grad()
        (net(images, c_noise, None) - images.flip(2)).square().mean().backward()
        if average is None:  # the first forward pass has normalised the weights
            average = {k: v.detach().clone() for k, v in net.state_dict().items()}
        descent.step()
        for k, v in net.state_dict().items():
            average[k] += 0.5 * (v - average[k])
    theirs, average = ({f"unet.{k}": v.numpy() for k, v in d.items()} for d in (net.state_dict(), average))
    return SimpleNamespace(
        network=network, start=params, end=end, theirs=theirs, average=average,
        save=lambda tree: weights.save(entries, tree),
    )  # fmt: skip


def kernels(tree):
    return {
        jax.tree_util.keystr(path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        if path[-1].key == "kernel"
    }


def magnitudes(w):
    return np.sqrt(np.mean(w**2, tuple(range(w.ndim - 1))))


def test_training_keeps_every_output_at_unit_magnitude(trained):
    moved = kernels(trained.end.params)
    assert len(moved) == sum(w.ndim > 1 for w in trained.theirs.values())
    for name, w in moved.items():
        np.testing.assert_allclose(magnitudes(w), 1, atol=3e-4, err_msg=name)  # EPS is 1e-4
        assert np.abs(w - kernels(trained.start)[name]).max() > 1e-3, name


def test_it_happens_where_the_original_does_it(trained):
    """The original normalises at the start of a forward pass, we at the end of a step: the weights its next forward
    pass would normalise are ours, and the averages, taken after the optimizer, are the same."""
    ours, average = trained.save(trained.end.params), trained.save(trained.end.ema)
    for k, theirs in trained.theirs.items():
        if theirs.ndim > 1:
            theirs = theirs / (1e-4 + np.sqrt(np.mean(theirs**2, tuple(range(1, theirs.ndim)), keepdims=True)))
        np.testing.assert_allclose(ours[k], theirs, atol=2e-4, err_msg=k)
        np.testing.assert_allclose(average[k], trained.average[k], atol=2e-4, err_msg=k)


def test_gradients_are_orthogonal_to_the_weights():
    """A weight counts by its direction alone, so nothing in the gradient changes its magnitude."""
    layer = magnitude.project({"kernel": jax.random.normal(jax.random.key(0), (3, 3, 5, 7))})["kernel"]
    x, y = jax.random.normal(jax.random.key(1), (2, 4, 6, 6, 7))

    def loss(w):
        out = jax.lax.conv_general_dilated(
            x[..., :5], magnitude.unit_kernel(w), (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return jnp.sum(out * y)

    g = jax.grad(loss)(layer)
    along = jnp.sum(g * layer, (0, 1, 2)) / jnp.sqrt(jnp.sum(g**2, (0, 1, 2)) * jnp.sum(layer**2, (0, 1, 2)))
    assert float(jnp.abs(along).max()) < 1e-3  # EPS leaves its share
    assert float(jnp.abs(g).max()) > 1


def test_only_what_is_normalised_is_projected(trained):
    p = trained.end.params
    again = trained.network.project(p)
    np.testing.assert_array_equal(again["fourier"]["frequencies"], p["fourier"]["frequencies"])
    np.testing.assert_array_equal(again["head_gain"], p["head_gain"])
    np.testing.assert_array_equal(trained.start["fourier"]["phases"], p["fourier"]["phases"])  # nor trained
