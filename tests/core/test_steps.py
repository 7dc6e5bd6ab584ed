"""solvers/steps.py: symbolic updates against tables derived by hand, and what it refuses."""

import numpy as np
import pytest

from jax_diffusion import schedules
from jax_diffusion.solvers import grids
from jax_diffusion.solvers.steps import Steps
from jax_diffusion.solvers.table import Grid

from .toys import moments

EDM = schedules.make("edm")


def grid(*sigmas) -> Grid:
    return grids.make(EDM, spacing=[*sigmas, 0.0], grid_unit="sigma")


def test_one_row():
    steps = Steps(grid(2.0))
    x = steps.x
    D = steps.denoise(x, 2.0)
    table = steps.table(0.25 * x + D / 4 - (-D) * 0.5, "a")
    assert (table.t, table.A, table.B, table.C, table.R) == ([2], [0.25], [[0.75]], [0], [0])
    assert (table.scale, table.C_start, table.name) == (2, 0, "a")


def test_heun_by_hand():
    """x_g = x + h (x - D_0)/a, x' = x + h ((x - D_0)/a + (x_g - D_1)/b)/2, and x from x_g and D_0."""
    a, b = 3.0, 1.0
    h = b - a
    steps = Steps(grid(a, b))
    x = steps.x
    d = (x - steps.denoise(x, a)) / a
    guess = x + h * d
    d2 = (guess - steps.denoise(guess, b)) / b
    table = steps.table(x + h * (d + d2) / 2, "heun")
    # Row 0 leaves x; x = (x_g + h/a D_0) / (1 + h/a) and (x - D_0)/a = (x_g - D_0) / (a + h).
    np.testing.assert_allclose(table.A, [1 + h / a, (1 + h / (2 * a)) / (1 + h / a) + h / (2 * b)])
    x_from = 1 / (1 + h / a)
    B10, B11 = -h / (2 * b), (1 + h / (2 * a)) * x_from * h / a - h / (2 * a)
    np.testing.assert_allclose(table.B, [[-h / a, 0], [B10, B11]], atol=1e-15)
    assert not np.any(table.C) and not np.any(table.R)


def test_an_ancestral_step_by_hand():
    """Noise goes into a row's C; two independent draws add in squares."""
    steps = Steps(grid(3.0, 1.0))
    x = steps.x
    D = steps.denoise(x, 3.0)
    x = 0.2 * x + 0.8 * D + 0.3 * steps.noise() + 0.4 * steps.noise()
    D = steps.denoise(x, 1.0)
    table = steps.table(D, "ancestral")
    np.testing.assert_allclose(table.C, [0.5, 0])
    np.testing.assert_allclose(table.A, [0.2, 0])
    np.testing.assert_allclose(table.B[:, 0], [0.8, 1])


def test_noise_before_the_first_evaluation_goes_into_the_start():
    steps = Steps(grid(3.0))
    x = steps.x + 4.0 * steps.noise()
    table = steps.table(steps.denoise(x, 5.0), "churn")
    assert (table.C_start, table.scale) == (4, 5)


def test_a_state_with_noise_is_still_one_expression_later():
    """x of the row before, noise included, is said through the present state: the noise is not drawn twice."""
    steps = Steps(grid(3.0, 2.0, 1.0))
    x = steps.x
    D = steps.denoise(x, 3.0)
    noisy = 0.5 * x + 0.5 * D + 0.3 * steps.noise()
    D1 = steps.denoise(2.0 * noisy, 2.0)
    table = steps.table(noisy + D1, "later")  # noisy = x_1 / 2
    np.testing.assert_allclose(table.A, [1.0, 0.5])
    np.testing.assert_allclose(table.C, [0.6, 0.0])
    np.testing.assert_allclose(table.B[:, 0], [1.0, 1.0])


def test_old_predictions_make_the_memory():
    steps = Steps(grid(3.0, 2.0, 1.0))
    x = steps.x
    Ds = []
    for t in (3.0, 2.0, 1.0):
        Ds.append(steps.denoise(x, t))
        x = x + 0.1 * Ds[-1]
    table = steps.table(x + Ds[0], "old")
    assert table.memory == 3
    np.testing.assert_allclose(table.B[-1], [0.1, 0, 1])


def test_an_old_state_is_solved_for():
    """x_0 after three rows, each of which left it behind: exact on a path where every D is known."""
    steps = Steps(grid(3.0, 2.0, 1.0))
    x = first = steps.x
    for t in (3.0, 2.0, 1.0):
        x = 0.7 * x + 0.2 * steps.denoise(x, t)
    table = steps.table(first, "back")
    value, history = 1.3, [0.0] * table.memory
    for n, D in enumerate([0.5, -0.4, 2.0]):
        history = [D, *history][: table.memory]
        value = table.A[n] * value + table.B[n] @ history
    assert value == pytest.approx(1.3, rel=1e-12)  # float64


def test_the_unclipped_prediction_is_a_column():
    steps = Steps(grid(2.0))
    x = steps.x
    D = steps.denoise(x, 2.0)
    table = steps.table(D + 0.5 * (x - steps.raw(D)), "raw")
    # 0.5 x + D - 0.5 raw = 0.5 x + 0.5 D - 0.5 (raw - D)
    assert (table.A, table.B, table.R) == ([0.5], [[0.5]], [-0.5])


def test_what_a_table_cannot_hold_is_refused():
    steps = Steps(grid(3.0, 1.0))
    x = steps.x
    D = steps.denoise(x, 3.0)
    xi = steps.noise()
    x = x + D + xi
    steps.denoise(x, 1.0)
    with pytest.raises(AssertionError, match="noise is needed again"):
        steps.table(x + 2 * D + xi - x, "noise")

    steps = Steps(grid(3.0, 1.0))
    x = steps.x
    D = steps.denoise(x, 3.0)
    steps.denoise(x + D, 1.0)
    with pytest.raises(AssertionError, match="not remembered"):
        steps.table(steps.raw(D), "raw")

    steps = Steps(grid(3.0, 1.0))
    x = steps.x
    D = steps.denoise(x, 3.0)
    steps.denoise(1.0 * D, 1.0)
    with pytest.raises(AssertionError, match="A = 0"):
        steps.table(1.0 * x, "left")

    steps = Steps(grid(3.0))
    with pytest.raises(AssertionError, match="rescales"):
        steps.table(steps.denoise(2.0 * steps.x, 3.0), "scaled")


def test_moments_of_a_table_are_those_of_its_samples():
    """The helper of other tests, against the update written out for one noisy step and the last."""
    mu, s2, a, b = 0.4, 0.3, 3.0, 1.0
    steps = Steps(grid(a, b))
    x = steps.x + 0.5 * steps.noise()
    D = steps.denoise(x, a)
    x = 0.5 * x + 0.5 * D + 0.2 * steps.noise()
    x = steps.denoise(x, b) + 0.1 * D
    m, v = moments(steps.table(x, "two"), grid(a, b), mu, s2)
    k, l = s2 / (s2 + a * a), s2 / (s2 + b * b)  # E[x_0 | x_t] = mu + k (x_t - mu)
    first = 0.5 + 0.5 * k  # of x, for x - mu
    total = l * first + 0.1 * k
    assert m == pytest.approx(mu + 0.1 * mu)
    assert v == pytest.approx(total**2 * (s2 + a * a + 0.25) + (l * 0.2) ** 2)


def test_what_is_remembered_may_hold_a_share_of_the_state():
    """remember: h = D + P x is stored, and D and x are still what they were in the row itself."""
    steps = Steps(grid(3.0, 2.0))
    x = steps.x
    D = steps.denoise(x, 3.0)
    h = steps.remember(D, -0.5)
    x = 0.6 * x + 0.4 * D
    D1 = steps.denoise(x, 2.0)
    table = steps.table(D1 + 0.2 * h, "kept")
    x_n, D_n = 1.7, [0.3, -0.8]
    expected = D_n[1] + 0.2 * (D_n[0] - 0.5 * x_n)
    history = [0.0] * table.memory
    for n in range(2):
        history = [D_n[n] + table.P[n] * x_n, *history][: table.memory]
        x_n = table.A[n] * x_n + table.B[n] @ history
    assert x_n == pytest.approx(expected, rel=1e-12)  # float64
