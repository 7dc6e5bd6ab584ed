"""The gates of gates/checks.py for eight H100, and that cuDNN gets what it is fast at."""

import pytest
from gates import checks

pytestmark = pytest.mark.skipif(bool(checks.missing()), reason=checks.missing())
TARGET = "h100:8"
ATTENTIONS = {"unet": 4, "dit": 4}  # of DiT one a block: in training they are no loop


@pytest.fixture(scope="module", params=checks.NETWORKS)
def step(request):
    return request.param, checks.compile_step(TARGET, request.param)


def test_the_state_is_donated(step):
    facts = step[1]
    checks.donated(facts)
    # No tiles on a GPU: to the byte.
    assert facts["memory"]["alias"] == facts["state"]["shard"]
    assert facts["memory"]["argument"] == facts["state"]["shard"] + facts["batch"]


def test_the_state_is_sharded(step):
    checks.sharded(step[1], devices=8, padding=0.01)


def test_it_sends_no_more_than_theory_says(step):
    checks.talks_little(step[1])


def test_attention_is_cudnns_both_ways(step):
    network, facts = step
    assert facts["calls"].get("__cudnn$fmhaSoftmax") == ATTENTIONS[network], facts["calls"]
    assert facts["calls"].get("__cudnn$fmhaSoftmaxBackward") == ATTENTIONS[network], facts["calls"]


def test_convolutions_are_cudnns_with_channels_last(step):
    network, facts = step
    labels = facts["convolutions"]
    assert set(labels) == ({"b01f_o01i->b01f"} if network == "unet" else set())
    # Each of the 25 forward, and the gradients of its filter and (but for the first) of its input.
    assert sum(labels.values()) == (74 if network == "unet" else 0)


def test_memory_and_traffic_are_those_of_the_baseline(step):
    network, facts = step
    why = checks.near_baseline(facts, TARGET, network, ("temp", "traffic", "kernels"))
    if why:
        pytest.skip(why)
