"""What a training step could take at least on this machine: its matrix products and convolutions, each timed alone.

    python docs/scripts/step_floor.py --case=unet_half --batch=16
    python docs/scripts/step_floor.py --case=dit_s2 --batch=16
    python docs/scripts/step_floor.py --case=unet_half --batch=16 --onednn=off

Of one training step of `jax-diffusion bench`, in JAX (from its jaxpr) and in PyTorch (eager, its operations as they are
dispatched), every distinct product is run by itself, many times, with its operands laid out as in the step. Columns:

    GFLOP       of the products of that kind in one step
    at the ceiling   how long they would take at the rate of one large square product, the best that either reaches
    alone       their sum, each alone
    the rest    the step less that: norms, activations, copies, the optimizer. XLA computes some of it inside a product

Each framework is a process of its own, and the two take turns.
"""

import argparse
import collections
import functools
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

from jax_diffusion.bench import cases, machine

CEILING = 2048  # side of the square product


def clock(run, seconds=0.1, rounds=3):
    """Seconds of one call, the median of rounds."""
    run()
    started = time.perf_counter()
    run()
    calls = max(int(seconds / max(time.perf_counter() - started, 1e-6)), 1)
    took = []
    for _ in range(rounds):
        started = time.perf_counter()
        for _ in range(calls):
            run()
        took.append((time.perf_counter() - started) / calls)
    return statistics.median(took)


# ---- JAX


def equations(jaxpr, times=1):
    """(equation, how often) of every product in a jaxpr, loops unrolled in number."""
    from jax.extend.core import ClosedJaxpr

    from jax_diffusion.onednn import operations
    from jax_diffusion.train import flops

    for eqn in (jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr).eqns:
        if eqn.primitive.name in ("dot_general", "conv_general_dilated", *operations.FLOPS):
            yield eqn, times
        for body in flops.bodies(eqn.params):
            yield from equations(body, times * eqn.params.get("length", 1) if eqn.primitive.name == "scan" else times)


def kind_of(eqn):
    """Of a convolution: forward, or the gradient by its input or its kernel."""
    if eqn.primitive.name in ("dot_general", "onednn_product"):
        return "matrix products"
    of = eqn.params.get("of")  # oneDNN's; else as JAX writes them
    if of is None:
        lhs, rhs, _ = eqn.params["dimension_numbers"]
        of = "kernel" if lhs[0] != 0 else "input" if rhs[0] != 3 else "result"
    return {"result": "convolutions, forward"}.get(of, f"convolutions, gradient by the {of}")


def in_jax(folder, work, variant):
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jax_diffusion import lowering, onednn
    from jax_diffusion.bench import jax_side
    from jax_diffusion.train import flops

    side = jax_side.Side(2, folder)
    side.start()
    side.load(**work._asdict())
    side.export()
    said = side.prepare("step", "train", variant, work.batch, 2)
    step = clock(lambda: side.prepared["step"].run(1), seconds=4, rounds=3)
    seen, counts = {}, collections.Counter()
    with onednn.off(variant == "xla"):
        traced = side._program(work.batch).trace()
    for eqn, times in equations(traced.jaxpr):
        key = (eqn.primitive.name, str(eqn.params), str([v.aval for v in eqn.invars]))
        seen[key] = eqn
        counts[key] += times
    rows = collections.defaultdict(lambda: [0.0, 0.0])
    rng = np.random.default_rng(0)
    for key, eqn in seen.items():
        operands = [jnp.asarray(rng.standard_normal(v.aval.shape), v.aval.dtype) for v in eqn.invars]
        run = lowering.jit(functools.partial(eqn.primitive.bind, **eqn.params))
        seconds = clock(lambda run=run, operands=operands: jax.block_until_ready(run(*operands)))
        row = rows[kind_of(eqn)]
        row[0] += counts[key] * flops.of_equation(eqn)
        row[1] += counts[key] * seconds
    return {"step": step, "flops": said["flops"], "rows": rows, "ceiling": side.ceiling(CEILING, "float32", 1.0)}


# ---- PyTorch


def in_torch(folder, work, _):
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_map_only
    from torch.utils.flop_counter import FlopCounterMode

    from jax_diffusion.bench import torch_side

    kinds = {
        "convolution": "convolutions, forward", "convolution_backward": "gradients", "mm": "matrix products",
        "addmm": "matrix products", "bmm": "matrix products", "baddbmm": "matrix products",
        "_scaled_dot_product_flash_attention_for_cpu": "matrix products",
        "_scaled_dot_product_flash_attention_for_cpu_backward": "matrix products",
    }  # fmt: skip
    seen, counts = {}, collections.Counter()

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.overloadpacket.__name__ in kinds:
                described = tree_map_only(torch.Tensor, lambda t: (tuple(t.shape), t.stride()), (args, kwargs))
                key = (str(function), str(described))
                if key not in seen:
                    seen[key] = (function, *tree_map_only(torch.Tensor, torch.clone, (args, kwargs or {})))
                counts[key] += 1
            return function(*args, **(kwargs or {}))

    side = torch_side.Side(2, folder)
    side.start("cpu")
    side.load(**work._asdict())
    took = {}
    for variant in ("eager", "eager_channels_last") if work.convolves else ("eager",):
        side.prepare(variant, "train", variant, work.batch, 2)
        took[variant] = clock(lambda v=variant: side.prepared[v](1), seconds=4, rounds=3)
    best = min(took, key=took.get)
    with Products():
        side.prepared[best](1)
    rows = collections.defaultdict(lambda: [0.0, 0.0])
    with torch.no_grad():
        for key, (function, args, kwargs) in seen.items():
            with FlopCounterMode(display=False) as counter:
                function(*args, **kwargs)
            row = rows[kinds[function.overloadpacket.__name__]]
            row[0] += counts[key] * counter.get_total_flops()
            row[1] += counts[key] * clock(functools.partial(function, *args, **kwargs))
    return {"step": took[best], "variant": best, "rows": rows, "ceiling": side.ceiling(CEILING, "float32", 1.0)}


# ---- both


def text(work, found):
    """A Markdown table of both, PyTorch's two gradients of a convolution being one operation."""
    ours, theirs = (collections.defaultdict(lambda: [0.0, 0.0]) for _ in range(2))
    for side, rows in ((ours, found["jax"]["rows"]), (theirs, found["torch"]["rows"])):
        for kind, (work_done, seconds) in rows.items():
            row = side["convolutions, gradients" if "gradient" in kind else kind]
            row[0] += work_done
            row[1] += seconds
    ceiling = max(f["ceiling"] for f in found.values())
    alone = [sum(seconds for _, seconds in side.values()) for side in (ours, theirs)]
    steps = [found[side]["step"] for side in ("jax", "torch")]
    work_done = sum(flop for flop, _ in ours.values())
    rows = [(kind, flop, seconds, theirs[kind][1]) for kind, (flop, seconds) in sorted(ours.items())]
    lines = [
        f"{work.about.about}, {work.batch} images, float32; a large product: JAX {ceiling / 1e9:.0f} GFLOP/s, "
        f"PyTorch ({found['torch']['variant']}) {found['torch']['ceiling'] / 1e9:.0f}",
        "",
        "| ms | GFLOP | at the ceiling | JAX, alone | PyTorch, alone |",
        "|---|---|---|---|---|",
    ]
    for kind, flop, *seconds in [*rows, ("all products", work_done, *alone)]:
        a, b = (f"{1e3 * s:,.0f}" for s in seconds)
        lines.append(f"| {kind} | {flop / 1e9:.0f} | {flop / ceiling * 1e3:,.0f} | {a} | {b} |")
    rest = [step - products for step, products in zip(steps, alone, strict=True)]
    for kind, seconds in (("the rest of the step", rest), ("the step", steps)):
        lines.append(f"| {kind} | | | {1e3 * seconds[0]:,.0f} | {1e3 * seconds[1]:,.0f} |")
    return "\n".join(lines)


def median_of(runs):
    """One result of several: the median of each number."""
    out = dict(runs[0], step=statistics.median(r["step"] for r in runs), ceiling=max(r["ceiling"] for r in runs))
    out["rows"] = {k: (v[0], statistics.median(r["rows"][k][1] for r in runs)) for k, v in runs[0]["rows"].items()}
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", default="unet_half", choices=sorted(set(cases.CASES) - {"ddpm_pytorch"}))
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3, help="processes of each framework, in turns")
    parser.add_argument("--onednn", choices=("auto", "off"), default="auto", help="off: JAX's by XLA")
    parser.add_argument("--side", choices=["jax", "torch"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    work = cases.Work(args.case, "train", args.batch, "float32", 50)
    if args.side:
        measure = {"jax": in_jax, "torch": in_torch}[args.side]
        print(json.dumps(measure(pathlib.Path(args.folder), work, "xla" if args.onednn == "off" else "default")))
        return
    runs = collections.defaultdict(list)
    environments = {"jax": os.environ, "torch": {**os.environ, **machine.torch_environment(machine.free_share(2))}}
    with tempfile.TemporaryDirectory() as folder:
        for i in range(args.rounds):
            for side, environment in environments.items():
                print(f"round {i + 1} of {args.rounds}: {side}", file=sys.stderr, flush=True)
                command = [sys.executable, __file__, *sys.argv[1:], f"--side={side}", f"--folder={folder}"]
                done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
                runs[side].append(json.loads(done.stdout.splitlines()[-1]))
    print(text(work, {side: median_of(them) for side, them in runs.items()}))


if __name__ == "__main__":
    main()
