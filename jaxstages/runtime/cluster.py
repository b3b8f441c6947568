"""Where this process stands among others: told by flags, by the environment, or by the cluster that started it.

Clusters are found by JAX's own detection: Open MPI, SLURM, TPU pods of GKE and of Compute Engine, indexed jobs of
Kubernetes. JAX can't be asked for all of it at once (`jax.distributed.initialize()` without arguments): a job of one
process would listen and wait like one of many, and of a node with eight GPUs and one task it would use one GPU.
"""

import os
import re
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from jax._src.clusters import ClusterEnv

ENVIRONMENT = {
    "coordinator": "JAX_COORDINATOR_ADDRESS",
    "process_count": "JAX_NUM_PROCESSES",
    "process_id": "JAX_PROCESS_ID",
}
"""Flag -> the variable that says the same."""

FOUND_WITHIN = 300
"""Seconds that a TPU pod or Kubernetes has to name the host of process 0."""

ONE = "--process_count=1 says that this is one process by itself"


class Place(NamedTuple):
    """Which process this one is, of how many, and where (HOST:PORT) process 0 waits for the others.

    devices: those of the host's that are this process's own; None means all that it sees.
    """

    coordinator: str
    process_count: int
    process_id: int
    devices: tuple[int, ...] | None = None
    told_by: str = "the flags"

    def __str__(self) -> str:
        own = f", with device {', '.join(map(str, self.devices))} of its host" if self.devices else ""
        where = f"process 0 is at {self.coordinator}"
        return f"process {self.process_id} of {self.process_count}{own}, as {self.told_by} says; {where}"


def find_place(flags: Mapping[str, Any]) -> Place | None:
    """This process's place; None where it is one process by itself. `flags` has the values of those of ENVIRONMENT.

    Raises:
        ValueError: what is told is not whole, or is impossible.
    """
    given = {name: value for name, value in flags.items() if value is not None}
    if given == {"process_count": 1}:
        return None
    if given:
        names = {name: f"--{name}" for name in ENVIRONMENT}
        return _checked(given, names, "the command line")
    given = {name: os.environ[variable] for name, variable in ENVIRONMENT.items() if os.environ.get(variable)}
    if given.keys() - {"coordinator"}:
        return _checked(given, ENVIRONMENT, "the environment")
    return _of_cluster(given.get("coordinator"))  # JAX's own rule: the cluster may be told its coordinator


def _checked(given: Mapping[str, Any], names: Mapping[str, str], told_by: str) -> Place | None:
    for name, said in names.items():
        if name not in given:
            raise ValueError(f"{said} is missing; several processes need {', '.join(names.values())}; or {ONE}")
    try:
        count, number = int(given["process_count"]), int(given["process_id"])
    except ValueError as error:
        raise ValueError(f"{names['process_count']} and {names['process_id']} must be numbers: {error}") from error
    if not 0 <= number < count:
        raise ValueError(f"{names['process_id']}={number} must be less than {names['process_count']}={count}, from 0")
    if not re.fullmatch(r".+:\d{1,5}", given["coordinator"]):
        shown = f"{names['coordinator']}={given['coordinator']!r}"
        raise ValueError(f"{shown} must be HOST:PORT, such as 10.0.0.2:8476")
    return Place(given["coordinator"], count, number, told_by=told_by) if count > 1 else None


def _of_cluster(coordinator: str | None) -> Place | None:
    from jax._src.clusters import ClusterEnv  # the flags are read without jax

    name = "Kubernetes"
    try:
        # JAX would ask Kubernetes in each of its pods, and warn in those that can't.
        known = [kind for kind in ClusterEnv._cluster_types if not kind.opt_in_only_method and kind.name]
        found = next((kind for kind in known if kind.is_env_present()), None)
        if found is None and "JOB_COMPLETION_INDEX" in os.environ:
            found = next(kind for kind in ClusterEnv._cluster_types if kind.__name__ == "K8sCluster")
            with warnings.catch_warnings(action="ignore"):  # it is said below
                if not found.is_env_present():
                    raise ValueError("the Python package `kubernetes` is not there to ask it")
        if found is None:
            return None
        name = found.name or name
        count = found.get_process_count()
        if count == 1:
            return None
        number = found.get_process_id()
        port = os.environ.get("JAX_COORDINATOR_PORT")
        coordinator = coordinator or found.get_coordinator_address(FOUND_WITHIN, port)
    except Exception as error:  # of whatever asks a cluster: requests, Kubernetes, a variable that is no number
        variables = ", ".join(ENVIRONMENT.values())
        raise ValueError(
            f"this looks like a process of {name}, but its place can't be found: {type(error).__name__}: {error}; set "
            f"{variables}; or {ONE}"
        ) from error
    return Place(coordinator, count, number, _own_devices(found), name)


def _own_devices(found: "type[ClusterEnv]") -> tuple[int, ...] | None:
    """Of several tasks on a host each has the GPU of its number. One task has them all, and so it has where the cluster
    shows each task its own only."""
    number = found.get_local_process_id()
    if number is None:
        return None
    spread = os.environ.get("SLURM_STEP_TASKS_PER_NODE") or os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") or "2"
    alone = set(re.findall(r"(\d+)(?:\(x\d+\))?", spread)) == {"1"}
    shown = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1").split(",")
    return None if alone or len(shown) == 1 else (number,)
