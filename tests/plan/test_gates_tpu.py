"""The gates of gates/checks.py for four v5e: what is compiled for TPU stays donated, sharded, quiet, small and fast."""

import pytest
from gates import checks

pytestmark = pytest.mark.skipif(bool(checks.missing()), reason=checks.missing())
TARGET = "v5e:2x2"


@pytest.fixture(scope="module", params=checks.NETWORKS)
def step(request):
    return request.param, checks.compile_step(TARGET, request.param)


def test_the_state_is_donated(step):
    checks.donated(step[1])


def test_the_state_is_sharded(step):
    # A bias of 64 numbers takes a whole tile, 4 KiB.
    checks.sharded(step[1], devices=4, padding=0.3)


def test_it_sends_no_more_than_theory_says(step):
    checks.talks_little(step[1])


def test_memory_and_cycles_are_those_of_the_baseline(step):
    network, facts = step
    why = checks.near_baseline(facts, TARGET, network, ("temp", "cycles"))
    if why:
        pytest.skip(why)
