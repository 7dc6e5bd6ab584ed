"""A run is a function of its config and its step: repeated or resumed, it is the same run bit for bit."""

import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from jax_diffusion.errors import UserError
from jax_diffusion.train import loop

# What is cut short: the whole run and where it stops in between.
RUNS = {"toy2d": (50, 20), "digits": (16, 6)}
FIELDS = {
    "toy2d": ["process.timesteps=importance"],
    "digits": [
        "model.dropout=0.1",
        "model.multipliers=(1,)",
        "model.attention_levels=()",
        "data.flip=True",
        "train.steps=16",
        "train.eval_every=4",
        "train.sample_every=0",
    ],
}


@pytest.fixture(scope="module", params=RUNS)
def runs(request, tiny, tmp_path_factory):
    """The same run three times: at once, at once again, and stopped and resumed."""
    config = tiny(request.param, *FIELDS[request.param])
    end, stop = RUNS[request.param]

    def train(**options):
        workdir, lines = tmp_path_factory.mktemp("run"), []
        outcomes = [loop.train(config, workdir, log=lines.append, **options)]
        if not outcomes[0].finished:
            outcomes.append(loop.train(None, workdir, log=lines.append))
        return SimpleNamespace(workdir=workdir, lines=lines, outcomes=outcomes, state=outcomes[-1].state)

    return SimpleNamespace(one=train(), again=train(), resumed=train(stop_at=stop), config=config, end=end, stop=stop)


def identical(a, b):
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y, err_msg=jax.tree_util.keystr(path))


def validation(run):
    lines = (run.workdir / "metrics.jsonl").read_text().splitlines()
    return {r["step"]: r["val_loss"] for r in map(json.loads, lines) if "val_loss" in r}


def test_a_run_repeats_itself(runs):
    assert int(runs.one.state.step) == runs.end
    identical(runs.one.state, runs.again.state)


def test_a_stop_is_where_it_was_asked_for(runs):
    first, second = runs.resumed.outcomes
    assert (first.step, first.finished, second.step, second.finished) == (runs.stop, False, runs.end, True)
    assert f"saved at step {runs.stop}; resume: jax-diffusion train --workdir=" in " ".join(runs.resumed.lines)
    assert any(f"at step {runs.stop} of {runs.end}" in line for line in runs.resumed.lines)


def test_a_resumed_run_is_the_same_run(runs):
    """Parameters, moments, average, the time sampler's losses: every leaf and every bit."""
    identical(runs.resumed.state, runs.one.state)
    assert not np.array_equal(jax.tree.leaves(runs.one.state.params)[0], jax.tree.leaves(runs.one.state.ema)[0])


def test_the_validation_loss_does_not_notice(runs):
    assert len(validation(runs.one)) >= 2
    assert validation(runs.resumed) == validation(runs.one) == validation(runs.again)


def test_what_is_measured_is_a_function_of_the_step(runs):
    """Byte for byte; that a kill does not show either is shown by test_faults_kill.py."""
    one, again = ((run.workdir / "metrics.jsonl").read_bytes() for run in (runs.one, runs.again))
    assert one == again and len(one.splitlines()) >= 5


def test_a_finished_run_resumed_does_nothing(runs):
    again = loop.train(None, runs.one.workdir, log=lambda line: None)
    assert again.finished and again.step == runs.end
    identical(again.state, runs.one.state)


@pytest.mark.parametrize("field", ["seed=1", "optim.learning_rate=0.5", "train.batch_size=16", "process.prediction=x0"])
def test_another_config_is_not_resumed(runs, tiny, field):
    changed = tiny("toy2d" if runs.end == 50 else "digits", *FIELDS["toy2d" if runs.end == 50 else "digits"], field)
    with pytest.raises(UserError) as error:
        loop.train(changed, runs.one.workdir, log=lambda line: None)
    message, name = str(error.value), field.split("=")[0]
    assert "\n" not in message and f"{name}: " in message and "resume without --config" in message


def test_how_often_to_log_may_change(runs, tiny):
    name = "toy2d" if runs.end == 50 else "digits"
    changed = tiny(name, *FIELDS[name], "train.log_every=3", "train.keep=5")
    assert loop.train(changed, runs.again.workdir, log=lambda line: None).finished


def test_steps_per_dispatch_changes_the_speed_alone(tiny, tmp_path):
    """23 steps as 3 dispatches of 7 and one of 2: float rounding apart, the run of single steps."""
    fields = ["train.steps=23", "train.eval_every=0", "optim.eps=1e-3", "process.prediction=x0"]
    outcomes = [
        loop.train(tiny("toy2d", *fields, f"train.steps_per_dispatch={k}"), tmp_path / str(k), log=lambda line: None)
        for k in (1, 7)
    ]
    assert [o.step for o in outcomes] == [23, 23]
    one, seven = (o.state for o in outcomes)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), one, seven)


def test_nothing_to_resume_is_said(tmp_path):
    with pytest.raises(UserError, match="holds no run to resume: start one with --config"):
        loop.train(None, tmp_path)
