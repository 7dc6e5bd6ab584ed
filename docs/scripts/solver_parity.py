"""Every solver that diffusers has, against diffusers' own loop: the tables of docs/solvers.md.

    python docs/scripts/solver_parity.py --page=docs/solvers.md

Both are given one analytic denoiser, of a mixture of two Gaussians an element, through a network that predicts
epsilon, v or x0, the same starting noise and, where a solver is stochastic, the same noise at every step. diffusers
runs as it is (float32 sigmas and states), ours in float32. What is compared is the final sample.

The points are those that diffusers' scheduler chooses: its times, and its sigmas. Where it places times between the
integers it interpolates sigma linearly and we log sigma; there it is given the latter.
"""

import argparse
import functools
import itertools
import sys
import warnings
from typing import NamedTuple

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import page
import torch

import jax_diffusion as jd
from jax_diffusion.solvers import noise
from jax_diffusion.solvers.table import Grid

LINEAR = jd.schedules.make("linear")
STEPS = (5, 10, 25, 50)
PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction", "x0": "sample"}
SPACINGS = ("leading", "trailing", "linspace")
KEY, BATCH, SHAPE = jax.random.key(7), 16, (8,)
MU, S2 = 0.5, 0.15  # each element of x_0 is N(+-MU, S2)
X = np.asarray(noise.normal(jd.solvers.sample_keys(KEY, jnp.arange(BATCH)), 0, SHAPE), np.float64)
TOLERANCE = 1e-4
MEMORY = 8  # of every table, so that those of as many rows share a program


class Case(NamedTuple):
    """A solver, and diffusers' name for it."""

    solver: str
    options: dict
    peer: type
    peer_options: dict
    noise: str = ""  # "row": a draw every evaluation; "step": one every second
    known: str = ""  # what is known to be wrong there: difference expected


D = diffusers
LAST_OF_PEERS = {"lower_order_final": False}  # they keep their order on the step that lands on sigma = 0
AS_DIFFUSERS = {"solver_type": "midpoint", "half_curvature": True}
STRIDE = "previous timestep taken as t - T // n: another point than the one visited next"
PNDM = f"{STRIDE}; and v prediction: multistep weights on v, where the method's transfer wants epsilon"
TO_ZERO = {"set_alpha_to_one": True}
CASES = [
    Case("ddpm", {}, D.DDPMScheduler, {}, "row", STRIDE),
    Case("ddpm", {"variance": "fixed_large"}, D.DDPMScheduler, {"variance_type": "fixed_large"}, "row",
         "the last step adds noise where it starts from a timestep above 0"),
    Case("ddim", {}, D.DDIMScheduler, {}, known=STRIDE),
    Case("ddim", {"eta": 0.7}, D.DDIMScheduler, {"eta": 0.7}, "row", STRIDE),
    Case("plms", LAST_OF_PEERS, D.PNDMScheduler, {"skip_prk_steps": True, **TO_ZERO}, known=PNDM),
    Case("pndm", LAST_OF_PEERS, D.PNDMScheduler, TO_ZERO, known=PNDM),
    Case("lms", LAST_OF_PEERS, D.LMSDiscreteScheduler, {}),
    Case("deis", {"order": 2}, D.DEISMultistepScheduler, {"solver_order": 2}),
    Case("deis", {"order": 3}, D.DEISMultistepScheduler, {"solver_order": 3}, "",
         "its weights are differences of float32 numbers that cancel; in float64 both agree to 1e-8"),
    Case("euler", {}, D.EulerDiscreteScheduler, {}),
    Case("euler_ancestral", {}, D.EulerAncestralDiscreteScheduler, {}, "row"),
    Case("heun", {}, D.HeunDiscreteScheduler, {}),
    Case("dpm2", {}, D.KDPM2DiscreteScheduler, {}),
    Case("dpm2_ancestral", {}, D.KDPM2AncestralDiscreteScheduler, {}, "step"),
    Case("dpm_solver_1", {}, D.DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver", "solver_order": 1}),
    Case("dpm_solver_2m", {}, D.DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver"}),
    Case("dpm_solver_3m", AS_DIFFUSERS, D.DPMSolverMultistepScheduler,
         {"algorithm_type": "dpmsolver", "solver_order": 3}),
    Case("dpmpp_2m", {}, D.DPMSolverMultistepScheduler, {}),
    Case("dpmpp_2m", {"solver_type": "heun"}, D.DPMSolverMultistepScheduler, {"solver_type": "heun"}),
    Case("dpmpp_3m", AS_DIFFUSERS, D.DPMSolverMultistepScheduler, {"solver_order": 3}),
    Case("sde_dpmpp_2m", {}, D.DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}, "row"),
    Case("sde_dpmpp_3m", AS_DIFFUSERS, D.DPMSolverMultistepScheduler,
         {"algorithm_type": "sde-dpmsolver++", "solver_order": 3}, "row",
         "the second difference's weight has the wrong sign: 1/2 subtracted where the integral adds it"),
    Case("dpmpp_2s", {"share_steps": True}, D.DPMSolverSinglestepScheduler, {"lower_order_final": True}),
    Case("unipc", {"order": 1}, D.UniPCMultistepScheduler, {"solver_order": 1}),
    Case("unipc", {"order": 2}, D.UniPCMultistepScheduler, {"solver_order": 2}),
    Case("unipc", {"order": 3}, D.UniPCMultistepScheduler, {"solver_order": 3}),
]  # fmt: skip


def predicts(prediction, x, alpha, sigma, xp):
    """The network: what it says of x_t, from the exact E[x_0 | x_t]."""
    var = alpha**2 * S2 + sigma**2
    x0 = MU * xp.tanh(alpha * MU * x / var) * (sigma**2 / var) + alpha * S2 * x / var
    eps = (x - alpha * x0) / sigma
    return {"x0": x0, "epsilon": eps, "v": alpha * eps - sigma * x0}[prediction]


@functools.cache
def program(prediction):
    process = jd.process.make(LINEAR, prediction)

    def apply(params, x, t, cond):
        alpha, sigma = LINEAR.alpha_sigma(t)
        return predicts(prediction, x, alpha[:, None], sigma[:, None], jnp)

    def run(table):
        denoise = jd.guidance.condition(jd.guidance.model_denoiser(process, apply, None), {})
        x = jnp.asarray(X, jnp.float32)
        return jd.sample(KEY, denoise, table, SHAPE, x=x, indices=jnp.arange(BATCH))

    return jax.jit(run)


@functools.cache
def noises(rows: int) -> np.ndarray:
    """What `sample` draws after every row."""
    keys = jd.solvers.sample_keys(KEY, jnp.arange(BATCH))
    return np.stack([noise.normal(keys, n + 1, SHAPE) for n in range(rows)])


def scheduler(case: Case, prediction: str, spacing: str, steps: int):
    options = {k: v for k, v in case.peer_options.items() if k != "eta"}
    if case.peer in (D.DDPMScheduler, D.DDIMScheduler):
        options["clip_sample"] = False
    if "MultistepScheduler" in case.peer.__name__ or "Singlestep" in case.peer.__name__:
        lands = case.peer is not D.DEISMultistepScheduler and options.get("algorithm_type") != "dpmsolver"
        if case.peer is not D.DEISMultistepScheduler:
            options["final_sigmas_type"] = "zero" if lands else "sigma_min"
    if case.peer is not D.DPMSolverSinglestepScheduler:
        options["timestep_spacing"] = spacing
    elif spacing != "linspace":
        raise NotImplementedError("it has one spacing")
    peer = case.peer(
        beta_schedule="linear", beta_start=1e-4, beta_end=0.02, prediction_type=PREDICTIONS[prediction], **options
    )
    peer.set_timesteps(steps)
    return peer


def grid_of(peer) -> Grid:
    """The points that a scheduler visits, each once."""
    t = np.asarray(peer.timesteps, np.float64)
    name = type(peer).__name__
    if "KDPM2" in name:
        t = t[::2]
    elif "Heun" in name:
        t = t[[0, *range(1, len(t), 2)]]
    elif name == "PNDMScheduler":
        t = np.array(sorted(set(peer._timesteps.tolist()), reverse=True), np.float64)
    lands = not hasattr(peer, "sigmas") or float(peer.sigmas[-1]) == 0
    grid = jd.solvers.grids.from_times(LINEAR, t)
    if not lands:
        s = float(peer.sigmas[-1])
        grid.alpha[-1], grid.sigma[-1] = 1 / np.hypot(1, s), s / np.hypot(1, s)
    return grid


def run_peer(case: Case, peer, prediction: str, rows: int) -> np.ndarray:
    grid = grid_of(peer)
    scaled = "Discrete" in type(peer).__name__  # the state is x / alpha
    if scaled and "KDPM2" not in type(peer).__name__:
        sigmas = np.exp(-LINEAR.log_snr(np.asarray(peer.timesteps, np.float64)) / 2)
        peer.sigmas[: len(sigmas)] = torch.from_numpy(sigmas).to(peer.sigmas.dtype)
    x = torch.from_numpy(X / grid.alpha[0] if scaled else X).float()
    draws = {"": [], "row": noises(rows), "step": noises(rows)[1::2]}[case.noise]
    feed = (torch.from_numpy(np.asarray(xi)) for xi in itertools.chain(draws, itertools.repeat(np.zeros(X.shape))))
    module = sys.modules[type(peer).__module__]
    before = getattr(module, "randn_tensor", None)
    module.randn_tensor = lambda *a, **k: next(feed).float()
    try:
        for t in peer.timesteps:
            state = peer.scale_model_input(x, t)
            alpha, sigma = map(float, LINEAR.alpha_sigma(np.float64(t)))
            out = predicts(prediction, state.double(), alpha, sigma, torch).float()
            step = {"eta": case.peer_options["eta"]} if "eta" in case.peer_options else {}
            x = peer.step(out, t if scaled else int(t), x, **step).prev_sample
    finally:
        module.randn_tensor = before
    return x.double().numpy() * (grid.alpha[-1] if scaled else 1)


def compare(case: Case, prediction: str, spacing: str, steps: int) -> float | None:
    """Largest difference of the final samples; None where diffusers does not offer the combination."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            peer = scheduler(case, prediction, spacing, steps)
            grid = grid_of(peer)
            table = jd.solvers.make(case.solver, LINEAR, grid=grid, **case.options)
            table = table.with_memory(MEMORY)
            theirs = run_peer(case, peer, prediction, len(table))
        except (NotImplementedError, ValueError):  # what the peers say to an unknown prediction type
            return None
    return float(np.max(np.abs(np.asarray(program(prediction)(table)) - theirs)))


def label(case: Case) -> str:
    options = ", ".join(f"{k}={v}" for k, v in case.options.items())
    return f"`{case.solver}`" + (f" ({options})" if options else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", help="Markdown page to put the table into, between its <!-- parity --> comments")
    parser.add_argument("--only", default="", help="solvers whose name contains this")
    args = parser.parse_args()
    head = ["solver", "diffusers", *(f"{p}, {s}" for p in PREDICTIONS for s in SPACINGS)]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    worst, notes = 0.0, {}
    for case in CASES:
        if args.only not in case.solver:
            continue
        cells = []
        for prediction, spacing in itertools.product(PREDICTIONS, SPACINGS):
            found = [compare(case, prediction, spacing, n) for n in STEPS]
            if None in found:
                cells.append("not offered")
                continue
            cells.append(f"{max(found):.0e}")
            if max(found) > TOLERANCE and case.known:
                mark = notes.setdefault(case.known, len(notes) + 1)
                cells[-1] += f" [{mark}]"
            else:
                worst = max(worst, max(found))
        lines.append(f"| {label(case)} | {case.peer.__name__.removesuffix('Scheduler')} | " + " | ".join(cells) + " |")
        print(lines[-1], flush=True)
    lines += ["", f"The largest difference without a number is {worst:.1e}.", ""]
    lines += [f"[{mark}] diffusers: {known}.  " for known, mark in notes.items()]
    print("\n".join(lines[-2 - len(notes) :]))
    if args.page:
        page.insert(args.page, "parity", "\n".join(lines))


if __name__ == "__main__":
    main()
