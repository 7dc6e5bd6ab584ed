"""Rounds in turn, and the statistics."""

import numpy as np
import pytest

from jax_diffusion.bench import measure, report


def test_the_order_turns_with_every_round():
    seen = []

    def run(name):
        seen.append(name)
        return float(len(seen))

    times = measure.interleave(["a", "b", "c"], 3, run)
    assert "".join(seen) == "abccbaabc"
    assert times == {"a": [1, 6, 7], "b": [2, 5, 8], "c": [3, 4, 9]}


def test_what_was_done_is_told_before_the_next_one_fails():
    told = []

    def run(name):
        if len(told) == 3:
            raise ValueError
        return 1.0

    with pytest.raises(ValueError):
        measure.interleave(["a", "b"], 5, run, lambda name, seconds: told.append(name))
    assert told == ["a", "b", "b"]


@pytest.mark.parametrize("values", [[3.0, 1.0, 2.0, 5.0, 4.0], [1.0, 2.0], [7.0], [2.0, 8.0, 4.0, 6.0]])
def test_quartiles_are_numpys(values):
    q = measure.quartiles(values)
    np.testing.assert_allclose([q.q1, q.median, q.q3], np.quantile(values, [0.25, 0.5, 0.75]))


@pytest.mark.parametrize(
    "step_s, wanted, seconds, per_call, steps",
    [
        ([0.01, 0.02], 50, 100.0, [1, 1], 50),
        ([0.01, 0.5], 50, 4.0, [1, 1], 8),  # the slower one decides
        ([9.0, 1.0], 50, 4.0, [1, 1], 1),
        ([0.01, 0.01], 50, 100.0, [1, 10], 50),
        ([0.01, 0.1], 50, 2.5, [10, 1], 20),  # whole calls
        ([5.0], 50, 1.0, [10], 10),
    ],
)
def test_steps_of_a_round(step_s, wanted, seconds, per_call, steps):
    assert measure.steps_a_round(step_s, wanted, seconds, per_call) == steps


def phase(theirs, ours_s, theirs_s, **more):
    entries = {
        "default": {"framework": "jax", "step_s": ours_s, "peak_memory": 10, "compile_s": 2.0, "flops": 6e9},
        theirs: {"framework": "torch", "step_s": theirs_s, "peak_memory": 20, "compile_s": 3.0},
    }
    return {"case": "unet", "mode": "train", "batch": 8, "steps": 4, "theirs": theirs, "entries": entries} | more


def test_a_ratio_is_of_neighbours_and_ours_stands_beside_the_best():
    """The machine halves its speed between two rounds: the ratio does not see it."""
    slow = phase("slow", [1.0, 2.0, 1.0], [3.0, 6.0, 3.0])
    fast = phase("fast", [2.0, 1.0, 4.0], [3.0, 1.5, 6.0])
    failed = {"case": "unet", "mode": "train", "batch": 8,
              "failed": {"framework": "torch", "variant": "odd", "why": "no compiler"}}  # fmt: skip
    result = {"phases": [slow, fast, failed], "ceilings": {"jax": 1e10, "torch": 2e10}, "failures": [],
              "settings": {"dtype": "float32"}}  # fmt: skip
    rows = report.rows(result)
    found = {row["variant"]: row for row in rows}
    assert found["slow"]["ratio"]["median"] == 3 and found["fast"]["ratio"]["median"] == 1.5
    assert found["default"]["ratio"] == {"median": 1.5, "q1": 1.5, "q3": 1.5}
    assert [name for name, row in found.items() if row.get("best_of_torch")] == ["fast"]
    ours = found["default"]
    assert ours["rounds"] == 6 and ours["step_s"]["median"] == 1.5 and ours["images_per_s"] == 8 / 1.5
    # The same FLOPs count for both, and the larger of the two ceilings.
    assert found["fast"]["flops_per_s"] == 2e9 and found["fast"]["share_of_ceiling"] == 0.1
    assert ours["share_of_ceiling"] == 0.2
    assert found["odd"]["why"] == "no compiler"
    text = report.table({**result, "rows": rows})
    assert "torch fast *" in text and "odd: failed: no compiler" in text and "1.50x" in text and "20 %" in text


def test_the_picture(tmp_path):
    pytest.importorskip("matplotlib")
    from jax_diffusion.bench import plot

    phases = [phase("eager", [1.0, 2.0], [3.0, 4.0], batch=batch) for batch in (1, 4)]
    result = {"phases": phases, "ceilings": {}, "failures": [], "settings": {}, "machine": {}}
    plot.draw(tmp_path / "bench.png", {**result, "rows": report.rows(result)})
    assert (tmp_path / "bench.png").stat().st_size > 10_000
