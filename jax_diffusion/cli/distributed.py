"""Joining a run of several processes.

A process joins others where the environment says that there are others, and nowhere else: JAX_COORDINATOR_ADDRESS,
JAX_NUM_PROCESSES and JAX_PROCESS_ID (launch/local.sh sets them), or a cluster that JAX knows: TPU pods, Slurm,
Open MPI, Kubernetes jobs. docs/scaling.md lists all variables.
"""

import contextlib
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from typing import NamedTuple

from jax_diffusion import processes
from jax_diffusion.errors import UserError

_NAMES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
ALONE = "JAX_DIFFUSION_ALONE"
# Seconds: to wait for all processes, and without a sign of life before one counts as dead.
JOIN, HEARTBEAT = ("JAX_DIFFUSION_JOIN_TIMEOUT", 300), ("JAX_DIFFUSION_HEARTBEAT_TIMEOUT", 100)


class Place(NamedTuple):
    """This process among all of a run."""

    address: str  # where process 0 is found, host:port
    number: int
    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody wants of it


def _seconds(name: str, default: int) -> int:
    said = os.environ.get(name) or str(default)
    if not said.isdigit() or int(said) < 1:
        raise UserError(f"{name}={said}: give whole seconds, at least 1")
    return int(said)


def _said() -> Place | None:
    """The place that our three variables name. The index of a Kubernetes job's pod stands in for its own."""
    said = {name: os.environ.get(name, "") for name in _NAMES}
    if not said["JAX_PROCESS_ID"] and said["JAX_NUM_PROCESSES"]:
        said["JAX_PROCESS_ID"] = os.environ.get("JOB_COMPLETION_INDEX", "")
    if not said["JAX_NUM_PROCESSES"] and not said["JAX_PROCESS_ID"]:
        return None  # an address alone is where a cluster's processes meet
    missing = [name for name, value in said.items() if not value]
    if missing:
        raise UserError(f"{', '.join(missing)} must be set too: a run of several processes needs all of {_NAMES}")
    address, number, index = said.values()
    if not (number.isdigit() and index.isdigit() and int(index) < int(number)):
        raise UserError(f"JAX_PROCESS_ID={index} JAX_NUM_PROCESSES={number}: give 0 <= id < number")
    return Place(address, int(number), int(index))


def _cluster():
    """The cluster of JAX's own that this process runs in, or None."""
    # On TPUs of GKE their own variables tell.
    tpus = "TPU_WORKER_HOSTNAMES" in os.environ or "TPU_PROCESS_ADDRESSES" in os.environ
    if "KUBERNETES_SERVICE_HOST" in os.environ and "JOB_COMPLETION_INDEX" in os.environ and not tpus:
        try:
            import kubernetes  # noqa: F401
        except ImportError:
            raise UserError(
                'a pod of a Kubernetes job: pip install "jax[k8s]" to find the others, or set JAX_COORDINATOR_ADDRESS '
                f"and JAX_NUM_PROCESSES in its manifest ({ALONE}=1: run alone)"
            ) from None
    try:
        from jax._src.clusters import ClusterEnv

        known = ClusterEnv._cluster_types
    except (ImportError, AttributeError):  # another version of JAX
        return None
    for cluster in known:
        # In a pod that is of no indexed job there is nobody to find, and JAX would ask for its Kubernetes package.
        if cluster.__name__ == "K8sCluster" and "JOB_COMPLETION_INDEX" not in os.environ:
            continue
        if not cluster.opt_in_only_method and cluster.is_env_present():
            return cluster
    if int(os.environ.get("OMPI_COMM_WORLD_SIZE", 1)) > 1 and "OMPI_MCA_orte_hnp_uri" not in os.environ:
        raise UserError(
            "Open MPI 5 does not say where its processes meet: set JAX_COORDINATOR_ADDRESS=HOST:PORT, "
            "JAX_NUM_PROCESSES=$OMPI_COMM_WORLD_SIZE and JAX_PROCESS_ID=$OMPI_COMM_WORLD_RANK for each"
        )
    return None


def place() -> Place | None:
    """Where the environment puts this process; None where it runs alone."""
    if os.environ.get(ALONE, "0") not in ("", "0"):
        return None
    found = _said()
    if found is None and (cluster := _cluster()) is not None and (number := cluster.get_process_count()) > 1:
        address = os.environ.get("JAX_COORDINATOR_ADDRESS") or cluster.get_coordinator_address(
            timeout_secs=_seconds(*JOIN), override_coordinator_port=os.environ.get("JAX_COORDINATOR_PORT")
        )
        found = Place(address, number, cluster.get_process_id())
    return found if found is not None and found.number > 1 else None


def join(training: bool = False) -> None:
    """Joins the other processes of the run, if the environment names any. Raises UserError where they are not found.

    From then on the lines of all processes but the first begin with their rank, "[3/8] ".
    """
    at = place()
    if at is None or processes.several():
        return
    _prefix(at)
    limit = _seconds(*JOIN)
    _find(at, limit)
    import jax

    if (jax.config.jax_platforms or "") == "cpu":
        jax.config.update("jax_cpu_collectives_implementation", "gloo")

    def nobody():
        print(
            f"jax-diffusion: error: not all {at.number} processes came to {at.address} within {limit} s: check that "
            "each was started, with the same address and number and an index of its own",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        os._exit(2)

    before = signal.getsignal(signal.SIGTERM)
    with processes.aborting(nobody):
        try:
            jax.distributed.initialize(
                at.address,
                at.number,
                at.index,
                initialization_timeout=limit,
                heartbeat_timeout_seconds=_seconds(*HEARTBEAT),
            )
        except RuntimeError as e:
            raise UserError(f"process {at.index} cannot join at {at.address}: {str(e).splitlines()[0]}") from e
    # JAX keeps SIGTERM to itself from here on, and nothing would end on it; but training asks JAX (train/interrupt.py).
    if not training:
        signal.signal(signal.SIGTERM, before if before is not None else signal.SIG_DFL)
    here = jax.local_devices()
    if here[0].platform == "cpu" and len(here) > 1:
        raise UserError(
            f"{len(here)} CPU devices in each of {at.number} processes may wait for each other for ever: leave "
            "--xla_force_host_platform_device_count out of XLA_FLAGS, and start more processes"
        )
    print(f"process {at.index} of {at.number} on {socket.gethostname()}: {len(here)} of {jax.device_count()} "
          f"{here[0].device_kind} device(s)", flush=True)  # fmt: skip


@contextlib.contextmanager
def joined(workdir: str | None = None) -> Iterator[None]:
    """Joins, and watches the others until the end. workdir: of a training run."""
    join(training=workdir is not None)
    with processes.watched(workdir):
        yield


def _find(at: Place, limit: int) -> None:
    """Raises UserError unless process 0 can listen, or be reached, at the address: JAX itself would abort."""
    host, colon, port = at.address.rpartition(":")
    if not (colon and host and port.isdigit()):
        raise UserError(f"JAX_COORDINATOR_ADDRESS={at.address} is no HOST:PORT, for instance 10.0.0.2:1234")
    if at.index == 0:
        try:
            with contextlib.closing(socket.create_server(("", int(port)))):
                return
        except OSError as e:
            raise UserError(
                f"process 0 cannot listen on port {port} of {at.address}: {e.strerror or e}; choose another port, or "
                "end what uses it"
            ) from None
    end, why = time.monotonic() + limit, ""
    while time.monotonic() < end:
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=min(limit, 10)):
                return
        except OSError as e:
            why = e.strerror or str(e)
        time.sleep(0.2)
    raise UserError(
        f"process {at.index} of {at.number} does not reach process 0 at {at.address} after {limit} s ({why}): check "
        f"that process 0 runs, that the name and the port are right and that no firewall is between ({JOIN[0]}=SECONDS "
        "waits longer)"
    )


class _Prefixed:
    """A text stream whose lines begin with `prefix`."""

    def __init__(self, stream, prefix: str):
        self._stream, self._prefix, self._begins = stream, prefix, True

    def write(self, text: str) -> int:
        out = []
        for line in text.splitlines(keepends=True):
            out.append(self._prefix + line if self._begins else line)
            self._begins = line.endswith("\n")
        self._stream.write("".join(out))  # in one piece, as the line itself would be
        return len(text)

    def __getattr__(self, name):
        return getattr(self._stream, name)


def _prefix(at: Place) -> None:
    if at.index == 0:
        return
    sys.stdout, sys.stderr = (_Prefixed(s, f"[{at.index}/{at.number}] ") for s in (sys.stdout, sys.stderr))
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler):
            handler.setStream(sys.stderr)


def leave(status: int) -> int:
    """The exit status of a command. One that failed among several ends here: on its way out JAX would wait for the
    others, and they for it."""
    if status not in (0, processes.RESUME) and processes.several():
        sys.stdout.flush()
        sys.stderr.flush()
        here = place()
        if here is not None and here.index == 0:
            time.sleep(2)  # the others lose their service with it: let them say what is wrong themselves
        os._exit(status)
    return status
