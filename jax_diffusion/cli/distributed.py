"""Joining a run of several processes."""

import os

from jax_diffusion.errors import UserError

_NAMES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def join() -> None:
    """Joins the processes named by the environment (launch/local.sh sets it); alone where it names none."""
    said = {name: os.environ.get(name) for name in _NAMES}
    if not any(said.values()):
        return
    missing = [name for name, value in said.items() if not value]
    if missing:
        raise UserError(f"{', '.join(missing)} must be set too: a run of several processes needs all of {_NAMES}")
    address, processes, index = said.values()
    if not (processes.isdigit() and index.isdigit() and int(index) < int(processes)):
        raise UserError(f"JAX_PROCESS_ID={index} JAX_NUM_PROCESSES={processes}: give 0 <= id < number")
    import jax

    jax.distributed.initialize(address, int(processes), int(index))
