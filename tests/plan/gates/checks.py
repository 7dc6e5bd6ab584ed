"""What a compiled training step must be, whatever the accelerator: donated, sharded, sending what theory says.

`make gates` compiles for v5e:2x2 and 8 H100 and checks; `make gates-baseline` runs this file, which writes down what is
compiled now.
"""

import json
import os
import pathlib
import subprocess
import sys

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[2]
COMPILERS = pathlib.Path(os.environ.get("JAX_DIFFUSION_COMPILERS", ROOT / ".venv-aot")).absolute()
BASELINE = HERE / "baseline.json"
TARGETS, NETWORKS = ("v5e:2x2", "h100:8"), ("unet", "dit")
TOLERANCE = 0.10

# What a fully sharded step in bfloat16 must move at most, in bytes a parameter: its weights gathered for the forward
# and again for the backward pass, its gradient summed once (Rajbhandari et al. 2020, section 7), 2 bytes each time.
PER_PARAMETER = 6.0


def missing() -> str:
    """Why the gates cannot run here; "" where they can."""
    found = all((COMPILERS / name).is_dir() for name in ("libtpu", "jax_cuda13_plugin"))
    return "" if found else f"no compilers for TPU and NVIDIA in {COMPILERS}: `make gates` installs them"


def compile_step(target: str, network: str) -> dict:
    """The facts of compile_step.py."""
    from jax_diffusion.plan import targets

    # Without what the tests say to their own JAX: other flags make another program.
    base = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_", "TPU_", "LIBTPU_"))}
    environment = targets.environment(target, base)
    environment["PYTHONPATH"] = os.pathsep.join([str(COMPILERS), str(ROOT)])
    command = [sys.executable, str(HERE / "compile_step.py"), target, network]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def donated(facts: dict) -> None:
    """Every leaf of the state shares its memory with its successor; what is left is the batch and the metrics."""
    memory, state = facts["memory"], facts["state"]
    assert facts["aliased"] == state["leaves"]
    assert memory["alias"] >= state["shard"]
    padding = 16  # a TPU's tiles are at most so many times the bytes of an [8, 8, 3] uint8 image
    assert memory["argument"] - memory["alias"] <= padding * facts["batch"] + 4096
    assert memory["output"] - memory["alias"] <= 8192


def sharded(facts: dict, devices: int, padding: float) -> None:
    """Each device holds 1/N of the state, but for leaves that do not divide; padding: of small leaves, by tiles."""
    state = facts["state"]
    assert state["shard"] <= 1.01 * state["bytes"] / devices
    assert facts["memory"]["alias"] <= (1 + padding) * state["bytes"] / devices


def talks_little(facts: dict) -> None:
    sent = sum(facts["collectives"].values())
    assert sent <= PER_PARAMETER * facts["state"]["parameters"], facts["collectives"]
    # Less than one gather and one sum would be a step that is not sharded, or a count that misses some.
    assert sent >= 4.0 * facts["state"]["parameters"], facts["collectives"]


def near_baseline(facts: dict, target: str, network: str, figures: tuple[str, ...]) -> str:
    """Asserts that `figures` are within TOLERANCE; returns why nothing was compared, or ""."""
    stored = json.loads(BASELINE.read_text())
    if stored["versions"] != facts["versions"]:
        return f"the baseline is of {stored['versions']}, not {facts['versions']}: `make gates-baseline` after a look"
    for figure in figures:
        was, now = stored[target][network][figure], summary(facts)[figure]
        assert abs(now - was) <= TOLERANCE * was, f"{target} {network}: {figure} was {was:,}, is {now:,}"
    return ""


def summary(facts: dict) -> dict[str, float]:
    """What the baseline holds."""
    return {"temp": facts["memory"]["temp"]} | {k: facts[k] for k in ("cycles", "traffic", "kernels")}


def write_baseline() -> None:
    stored: dict = {}
    for target in TARGETS:
        for network in NETWORKS:
            facts = compile_step(target, network)
            stored["versions"] = facts["versions"]
            stored.setdefault(target, {})[network] = summary(facts)
            print(f"{target} {network}: {facts['seconds']} s, {summary(facts)}, {facts['collectives']}", flush=True)
    BASELINE.write_text(json.dumps(stored, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(missing() or write_baseline())
