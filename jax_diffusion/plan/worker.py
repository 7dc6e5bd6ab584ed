"""The process that compiles: started by launch.py in the environment of its topology.

One JSON request comes in on stdin; events go out as JSON lines: {"stage"}, {"train"}, {"sample"}, {"largest"}, {"row"},
{"error"}, {"done"}. It ends when stdin is closed, so that nothing goes on compiling for a command that is gone.
"""

import json
import os
import pathlib
import sys
import threading

from jax_diffusion.errors import UserError


def _die_with_parent() -> None:
    while sys.stdin.buffer.read(4096):
        pass
    os._exit(1)


def plan(request: dict, tell) -> None:
    """Answers a request (see launch.Request)."""
    from jax_diffusion import config as configs
    from jax_diffusion.plan import programs
    from jax_diffusion.plan.planner import Planner

    config = configs.from_json(request["config"])
    planner = Planner(
        request["topology"],
        config,
        tuple(request["shape"]),
        request["classes"],
        cache=pathlib.Path(request["cache"]) if request["cache"] else None,
        stage=lambda text, of=None: tell(stage=text, of=of),
    )
    tell(versions=programs.versions(), device=planner.devices[0].device_kind)
    sizes = dict(planner.mesh({k: config.mesh[k] for k in ("data", "fsdp", "tensor")}).shape)
    batch = config.train.batch_size
    if request["sweep"]:
        for setting, estimate in planner.sweep(batch):
            tell(row={**setting, "estimate": estimate.to_json()})
    else:
        tell(train=planner.train(sizes, batch).to_json(), mesh=sizes)
        if request["sampler"]:
            tell(sample=planner.sample(sizes, config.sampling.batch_size).to_json(), mesh=sizes)
        if request["search"] and planner.chip is not None:
            tell(largest=planner.largest(sizes, batch)._asdict())


def main() -> None:
    request = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=_die_with_parent, daemon=True).start()
    # Compilers write to stdout what is no event.
    events = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def tell(**event) -> None:
        events.write(json.dumps(event) + "\n")
        events.flush()

    try:
        plan(request, tell)
        tell(done=True)
    except UserError as e:
        tell(error=str(e))
    # The devices of a described TPU may hang when they are taken down.
    events.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
