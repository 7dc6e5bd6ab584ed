"""`sample`: which randomness a sample has, what is compiled, and what goes wrong in one line."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_diffusion import schedules
from jax_diffusion.errors import UserError
from jax_diffusion.solvers import add_noise_to, grids, make, sample, sample_keys

from .toys import draws

KEY = jax.random.key(11)
LINEAR = schedules.make("linear")
TABLES = {"ddpm": {}, "ddim": {"eta": 1.0}, "dpmpp_2m": {}}


def denoise(x, t):
    return jnp.tanh(x + 0.01 * jnp.sin(t))


@jax.jit
def run(key, table, indices):
    return sample(key, denoise, table, (3, 2), indices=indices)


@pytest.mark.parametrize("solver", sorted(TABLES))
def test_a_sample_is_the_same_in_any_batch(solver):
    table = make(solver, LINEAR, 6, **TABLES[solver])
    whole = np.asarray(run(KEY, table, jnp.arange(64)))
    # Its noise is bitwise the same; the arithmetic is vectorised differently, hence a float32 rounding or two.
    np.testing.assert_allclose(run(KEY, table, jnp.array([5])), whole[5:6], atol=1e-6)
    some = jnp.array([63, 5, 0, 17, 31, 2, 5])
    np.testing.assert_allclose(run(KEY, table, some), whole[np.asarray(some)], atol=1e-6)
    assert len(np.unique(whole.reshape(64, -1)[:, 0])) == 64


@pytest.mark.parametrize("n", [1, 7])
def test_the_noise_of_a_sample_is_bitwise_its_own(n):
    many = draws(KEY, jnp.arange(64), 4, (5,))
    np.testing.assert_array_equal(draws(KEY, jnp.arange(n), 4, (5,)), many[:, :n])
    flat = np.asarray(many).reshape(-1, 5)
    assert len(np.unique(flat[:, 0])) == len(flat)  # no noise is drawn twice
    # Standard normal: 1280 draws, five standard errors.
    assert abs(flat.mean()) < 5 / flat.size**0.5 and abs(flat.std() - 1) < 5 / (2 * flat.size) ** 0.5


def test_seeds_differ():
    table = make("ddpm", LINEAR, 6)
    a, b = (run(jax.random.key(k), table, jnp.arange(8)) for k in (0, 1))
    assert jnp.all(jnp.any(a != b, axis=(1, 2)))
    np.testing.assert_array_equal(run(jax.random.key(0), table, jnp.arange(8)), a)


def test_tables_of_equal_rows_are_one_program():
    traces = []

    @jax.jit
    def counted(table, indices):
        def traced(x, t):
            traces.append(x.shape)
            return denoise(x, t)

        return sample(KEY, traced, table, (3,), indices=indices)

    cosine = schedules.make("cosine")
    tables = [
        make("ddim", LINEAR, 12),
        make("ddim", LINEAR, 12, eta=0.7),
        make("euler", LINEAR, 12, "linspace"),
        make("ddpm", cosine, 12, variance="fixed_large"),
        make("unipc", LINEAR, 12, order=3),
        make("deis", LINEAR, 12, "karras"),
    ]
    results = [np.asarray(counted(table, jnp.arange(2))) for table in tables]
    assert counted._cache_size() == 1
    assert len(traces) == 1  # the network is traced once: one scan, not one call a row
    for i, a in enumerate(results):
        for b in results[:i]:
            assert not np.allclose(a, b, atol=1e-3)  # they are different solvers ...
    counted(make("ddim", LINEAR, 11), jnp.arange(2))
    assert counted._cache_size() == 2  # ... and another length is another program


@pytest.mark.parametrize("solver", ["ddim", "heun"])
def test_deterministic_rows_use_no_randomness(solver):
    table = make(solver, LINEAR, 5)
    x = jax.random.normal(jax.random.key(3), (4, 3, 2))
    run = jax.jit(lambda key: sample(key, denoise, table, (3, 2), x=x))
    a, b = (run(jax.random.key(k)) for k in (0, 1))
    np.testing.assert_array_equal(a, b)


def test_noise_is_drawn_in_a_branch_that_deterministic_rows_skip():
    table = make("ddim", LINEAR, 5)
    jaxpr = jax.make_jaxpr(lambda t: sample(KEY, denoise, t, (2,), x=jnp.zeros((1, 2))))(table)
    scan = next(e for e in jaxpr.eqns if e.primitive.name == "scan")
    body = scan.params["jaxpr"].jaxpr
    names = [e.primitive.name for e in body.eqns]
    assert "cond" in names  # a real branch ...
    outside = " ".join(str(e) for e in body.eqns if e.primitive.name != "cond")
    assert "erf_inv" not in outside and "random_bits" not in outside  # ... with all the drawing inside
    inside = [str(e) for e in body.eqns if e.primitive.name == "cond"]
    assert any("erf_inv" in text or "random_bits" in text for text in inside)


@pytest.mark.parametrize("solver", ["ddpm", "dpmpp_2m"])
def test_trajectory_is_every_prediction(solver):
    table = make(solver, LINEAR, 6)
    alone = sample(KEY, denoise, table, (3, 2), indices=jnp.arange(4))
    x, trajectory = sample(KEY, denoise, table, (3, 2), indices=jnp.arange(4), trajectory=True)
    assert trajectory.shape == (6, 4, 3, 2)
    np.testing.assert_allclose(x, alone, atol=1e-6)  # another program, float32
    np.testing.assert_allclose(trajectory[-1], x, atol=1e-6)  # the last row lands on its prediction
    first = denoise(draws_initial(table, 4), table.t[0])
    np.testing.assert_allclose(trajectory[0], first, atol=1e-6)  # float32


def draws_initial(table, n):
    """What `sample` starts from: a table's first x, seen by the denoiser."""
    return sample(KEY, lambda x, t: x, table, (3, 2), indices=jnp.arange(n), trajectory=True)[1][0]


@pytest.mark.parametrize(("name", "scale"), [("linear", 1.0), ("edm", 80.0)])
def test_starts_from_the_prior(name, scale):
    x = draws_initial(make("euler", schedules.make(name), 2), 2000)
    assert float(jnp.std(x)) == pytest.approx(scale, rel=5 / (2 * x.size) ** 0.5)  # five standard errors


def test_defaults_of_indices():
    table = make("ddpm", LINEAR, 4)
    one = sample(KEY, denoise, table, (3, 2))
    np.testing.assert_allclose(one, run(KEY, table, jnp.arange(1)), atol=1e-6)  # sample 0; another program
    x = jnp.zeros((3, 3, 2))
    states = sample(KEY, lambda x, t: x, table, (3, 2), x=x, trajectory=True)[1]
    assert len(np.unique(np.asarray(states[1]).reshape(3, -1)[:, 0])) == 3  # each given x has its own noise


@pytest.mark.parametrize("solver", ["ddpm", "ddim", "dpmpp_2m"])
def test_differentiable_through_the_table(solver):
    """Columns are data: a solver can be learned. Checked against a finite difference where it is smooth."""
    table = make(solver, LINEAR, 4)
    x = 0.5 * jax.random.normal(jax.random.key(2), (2, 3))

    @jax.jit
    def loss(table):
        return jnp.sum(sample(KEY, denoise, table, (3,), x=x) ** 2)

    table = jax.tree.map(lambda c: jnp.asarray(c, jnp.float32), table)
    grads = jax.jit(jax.grad(loss))(table)
    assert all(bool(jnp.all(jnp.isfinite(g))) for g in jax.tree.leaves(grads))

    def bumped(h):
        return loss(dataclasses.replace(table, B=table.B.at[1, 0].add(h)))

    h = 1e-2
    difference = (bumped(h) - bumped(-h)) / (2 * h)
    np.testing.assert_allclose(grads.B[1, 0], difference, rtol=2e-2, atol=1e-3)  # h^2 and float32 / h


def test_add_noise_to_is_the_forward_process_and_its_own_sample():
    x0 = jnp.full((64, 50), 0.5)
    x = add_noise_to(LINEAR, KEY, x0, 300.0, jnp.arange(64))
    alpha, sigma = LINEAR.alpha_sigma(np.float64(300))
    n = x.size
    assert float(jnp.mean(x)) == pytest.approx(alpha * 0.5, abs=5 * sigma / n**0.5)  # five standard errors
    assert float(jnp.std(x)) == pytest.approx(sigma, rel=5 / (2 * n) ** 0.5)
    np.testing.assert_allclose(add_noise_to(LINEAR, KEY, x0[:1], 300.0, jnp.array([9])), x[9:10], rtol=1e-6)


def test_keys_depend_on_the_index_alone():
    a, b = sample_keys(KEY, jnp.arange(10)), sample_keys(KEY, jnp.array([7, 3]))
    np.testing.assert_array_equal(jax.random.key_data(a)[jnp.array([7, 3])], jax.random.key_data(b))


def test_a_table_prints_its_rows():
    table = make("dpmpp_2m", LINEAR, 3)
    lines = str(table).splitlines()
    assert len(lines) == 2 + len(table) and "B1" in lines[1]
    assert float(lines[2].split()[1]) == table.t[0]


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: make("dimm", LINEAR, 5), "'ddim'"),
        (lambda: make("ddim", LINEAR, 5, etta=1.0), "'eta'"),
        (lambda: make("ddpm", LINEAR, 5, variance="fixed_smal"), "'fixed_small'"),
        (lambda: make("ddim", LINEAR, 5, "trailin"), "'trailing'"),
        (lambda: make("ddim", LINEAR, 5, final="zer"), "'zero'"),
        (lambda: make("ddim", LINEAR, 1001), "1000"),
        (lambda: make("ddim", LINEAR, 0), "at least 1"),
        (lambda: make("ddim", schedules.make("vp"), 5, "leading"), "discrete"),
        (lambda: make("ddim", LINEAR, 5, grids.make(LINEAR, 5), rho=3.0), "rho"),
        (lambda: grids.from_times(LINEAR, np.array([1.0, 2.0])), "decreasing"),
    ],
)
def test_mistakes_are_one_line_with_the_remedy(call, says):
    with pytest.raises(UserError) as e:
        call()
    assert says in str(e.value) and "\n" not in str(e.value)
