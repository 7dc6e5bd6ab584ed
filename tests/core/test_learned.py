"""Learned tables: what is learned, what stays, and that files bring it back."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_diffusion import guidance, schedules
from jax_diffusion.errors import UserError
from jax_diffusion.solvers import SOLVERS, compare, load, make, sample
from jax_diffusion.solvers import learned as learning
from jax_diffusion.solvers.learned import endpoints, optimize

from .toys import gaussian_denoiser

NOISE = np.asarray(jax.random.normal(jax.random.key(4), (64, 3)))
MODES = jnp.array([-1.0, 0.4, 1.2])


def mixture(name, width=0.02):
    """E[x_0 | x_t] of three narrow Gaussians, elementwise: far from linear in x_t, as images are."""
    alpha_sigma = schedules.make(name).alpha_sigma

    def denoise(x, t):
        a, s = alpha_sigma(jnp.asarray(t, jnp.float32))
        var = a**2 * width + s**2
        off = x[..., None] - a * MODES[None, None]
        each = MODES[None, None] + a * width / var * off
        return jnp.sum(jax.nn.softmax(-(off**2) / (2 * var)) * each, -1)

    return denoise


DENOISERS = {name: (lambda d: lambda params, cond: d)(mixture(name)) for name in ("linear", "edm", "flow", "vp")}


def rms(a, b):
    return float(np.sqrt(np.mean((a - b) ** 2)))


@pytest.mark.parametrize(("name", "solver"), [("linear", "dpmpp_2m"), ("edm", "ddim"), ("flow", "heun")])
def test_it_comes_nearer_to_many_steps_on_noise_it_has_not_seen(name, solver):
    schedule, denoiser = schedules.make(name), DENOISERS[name]
    table = make(solver, schedule, 4)
    x = float(table.scale) * NOISE
    target = endpoints(make("dpmpp_2m", schedule, 200, "log_snr" if name == "linear" else None), denoiser, x)
    learned = optimize(
        table, denoiser, x[:32], target[:32], schedule, iterations=150, batch_size=32, learning_rate=0.03
    )
    before, after = (rms(endpoints(t, denoiser, x[32:]), target[32:]) for t in (table, learned))
    assert after < before / 2, (before, after)
    # What must stay: the number of rows, the landing, the start, and times in order within the schedule.
    assert learned.B.shape == table.B.shape and learned.t.dtype == np.float64
    assert learned.A[-1] == 0 and learned.t[0] == table.t[0] and learned.scale == table.scale
    np.testing.assert_array_equal(np.sign(np.diff(learned.t)), np.sign(np.diff(table.t)))
    assert schedule.t_min <= learned.t.min() and learned.t.max() <= schedule.t_max
    assert np.abs(learned.t - table.t).max() > 0 and np.abs(learned.B - table.B).max() > 1e-3
    np.testing.assert_array_equal(learned.C, 0)


@pytest.mark.parametrize("name", ["linear", "edm", "flow", "vp"])
def test_nothing_learned_is_the_table_itself(name):
    schedule = schedules.make(name)
    for solver in ("ddim", "unipc", "heun"):
        table = make(solver, schedule, 4)
        same = optimize(table, DENOISERS[name], NOISE, NOISE, schedule, iterations=0)
        for field in ("t", "A", "B", "C", "R", "scale"):
            np.testing.assert_array_equal(getattr(same, field), getattr(table, field))
        assert same.name == table.name


def test_more_memory_is_more_to_learn():
    schedule, denoiser = schedules.make("vp"), DENOISERS["vp"]
    table = make("ddim", schedule, 4)
    target = endpoints(make("dpmpp_2m", schedule, 200), denoiser, NOISE)
    options = {"iterations": 150, "batch_size": 64}
    one, three = (
        optimize(t, denoiser, NOISE, target, schedule, **options) for t in (table.with_memory(1), table.with_memory(3))
    )
    assert three.memory == 3 and np.abs(three.B[2:, 2]).max() > 1e-3
    assert rms(endpoints(three, denoiser, NOISE), target) < rms(endpoints(one, denoiser, NOISE), target)


def test_the_gradient_is_that_of_sampling():
    """What is differentiated is the loop that samples: same end points, gradient against finite differences."""
    schedule, denoiser = schedules.make("vp"), DENOISERS["vp"]
    table = jax.tree.map(lambda c: jnp.asarray(c, jnp.float32), make("dpmpp_2m", schedule, 5))
    x = jnp.asarray(NOISE)
    run = lambda table: learning._run(table, denoiser(None, None), x)  # noqa: E731
    np.testing.assert_allclose(
        jax.jit(run)(table), sample(jax.random.key(0), denoiser(None, None), table, (3,), x=x), atol=1e-5
    )

    @jax.jit
    def loss(deltas):
        return jnp.mean(jnp.square(run(learning._moved(table, deltas, schedule)) - 0.3))

    zero = learning._zeros(table)
    gradient = jax.jit(jax.grad(loss))(zero)
    for field, index in (("A", 1), ("B", (2, 1)), ("time", 2)):

        def bumped(h, field=field, index=index):
            return loss(zero._replace(**{field: getattr(zero, field).at[index].add(h)}))

        h = 1e-2
        difference = (bumped(h) - bumped(-h)) / (2 * h)
        np.testing.assert_allclose(getattr(gradient, field)[index], difference, rtol=5e-2, atol=1e-3)
    assert gradient.A[-1] == 0


def test_equal_shapes_are_one_program_and_conditions_are_rows():
    schedule = schedules.make("vp")
    traces = []

    def denoiser(params, cond):
        traces.append(1)
        return guidance.clip(lambda x, t: params * gaussian_denoiser("vp", cond["mean"], 0.1)(x, t), 2.0)

    cond = {"mean": np.linspace(-1, 1, 64, dtype=np.float32)[:, None]}
    params = jnp.float32(1.0)
    for solver, seed, scale in (("dpmpp_2m", 0, 1.0), ("unipc", 1, 0.9)):
        table = make(solver, schedule, 4).with_memory(3)
        optimize(
            table, denoiser, NOISE, NOISE, schedule, params=scale * params, cond=cond, seed=seed, iterations=3,
            learning_rate=0.01 * (seed + 1),
        )  # fmt: skip
    count = len(traces)
    assert count <= 4  # once a row where rows are unrolled: not once an iteration, not once a call
    out = endpoints(make("ddim", schedule, 50), denoiser, NOISE, params=params, cond=cond, batch_size=48)
    near = np.corrcoef(out.mean(1), cond["mean"][:, 0])[0, 1]
    assert out.shape == NOISE.shape and near > 0.9  # each noise met its own condition


def test_progress_counts_and_tells_the_loss():
    seen = []
    schedule = schedules.make("vp")
    table = make("ddim", schedule, 3)
    optimize(table, DENOISERS["vp"], NOISE, NOISE, schedule, iterations=5, progress=lambda *a: seen.append(a))
    assert [i for i, _ in seen] == [1, 2, 3, 4, 5] and all(loss > 0 for _, loss in seen)


def test_tables_with_noise_and_shapes_that_differ_are_refused():
    schedule = schedules.make("vp")
    with pytest.raises(UserError, match="adds noise"):
        optimize(make("ddim", schedule, 4, eta=1.0), DENOISERS["vp"], NOISE, NOISE, schedule)
    with pytest.raises(UserError, match="must agree"):
        optimize(make("ddim", schedule, 4), DENOISERS["vp"], NOISE, NOISE[:3], schedule)


@pytest.mark.parametrize("name", ["cosine", "edm", "flow"])
def test_published_solvers_are_one_program_of_equal_rows(name):
    schedule = schedules.make(name)
    tables = compare.published(schedule, 5)
    assert {(len(t), t.memory) for t in tables} == {(5, tables[0].memory)}
    names = " ".join(t.name for t in tables)
    assert all(s in names for s in ("ddim", "dpmpp_2m", "unipc", "heun") if s in SOLVERS)
    assert "ddpm" not in names and not any(np.any(t.C) for t in tables)


def test_rows_before_a_shorter_solver_change_nothing():
    schedule = schedules.make("vp")
    heun = make("heun", schedule, 2)
    assert len(heun) == 3
    padded = compare._padded(heun, 6)
    run = lambda table: endpoints(table, DENOISERS["vp"], NOISE)  # noqa: E731
    np.testing.assert_allclose(run(padded), run(heun), atol=1e-6)


def test_distance():
    a, b = np.zeros((2, 4)), np.array([[1.0] * 4, [3.0] * 4])
    d = compare.Distance.of(a, b)
    assert d.rms == pytest.approx(5**0.5) and d.mean == pytest.approx(2)


def test_a_file_brings_a_table_back_bit_for_bit(tmp_path):
    table = dataclasses.replace(make("unipc", schedules.make("edm"), 5), C_start=np.float64(0.1))
    path = tmp_path / "tables" / "five.npz"
    table.save(path)
    again = load(path)
    for field in dataclasses.fields(table):
        np.testing.assert_array_equal(getattr(again, field.name), getattr(table, field.name))
    assert isinstance(again.name, str) and str(again) == str(table)
    assert again.t.dtype == np.float64


def test_files_that_hold_no_table(tmp_path):
    (tmp_path / "text").write_text("hello")
    np.savez(tmp_path / "other.npz", a=1)
    np.save(tmp_path / "array.npy", np.zeros(3))
    (tmp_path / "empty").write_bytes(b"")
    for name in ("text", "other.npz", "array.npy", "empty", "nowhere.npz", "."):
        with pytest.raises(UserError) as e:
            load(tmp_path / name)
        assert "optimize" in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("solver", ["dpmpp_2m", "ddpm"])
def test_a_plot_says_what_it_shows(solver, tmp_path):
    pytest.importorskip("matplotlib")
    table = make(solver, schedules.make("cosine"), 6)
    figure = table.plot()
    figure.savefig(tmp_path / "table.png")
    assert (tmp_path / "table.png").stat().st_size > 10_000
    texts = " ".join(text for axes in figure.axes for text in (axes.get_xlabel(), axes.get_ylabel(), axes.get_title()))
    assert "noise level" in texts and "weights" in texts and "evaluation" in texts
    assert ("C: noise added" in texts) == (solver == "ddpm")


def test_a_plot_without_matplotlib_says_what_to_install(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match=r"jax_diffusion\[plot\]"):
        make("ddim", schedules.make("cosine"), 3).plot()
