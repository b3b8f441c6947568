"""Detect which process of how many this one is, from flags, the environment, or the cluster.

Clusters are detected by JAX: Open MPI, SLURM, TPU pods of GKE and of Compute Engine, indexed jobs of Kubernetes.
`jax.distributed.initialize()` without arguments does not do: a job of one process would listen and wait like one of
many, and on a node with eight GPUs and one task it would use one GPU.
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
"""Flag -> the environment variable with the same meaning."""

DETECTION_SECONDS = 300
"""Time for a TPU pod or Kubernetes to name the host of process 0."""

SINGLE_PROCESS_HINT = "--process_count=1 says that this is one process by itself"


class ProcessInfo(NamedTuple):
    """Which process this one is, of how many.

    coordinator: address (HOST:PORT) at which process 0 waits for the others.
    devices: this process's own devices among the host's; None means all visible ones.
    source: where this information comes from.
    """

    coordinator: str
    process_count: int
    process_id: int
    devices: tuple[int, ...] | None = None
    source: str = "the flags"

    def __str__(self) -> str:
        own = f", with device {', '.join(map(str, self.devices))} of its host" if self.devices else ""
        coordinator = f"process 0 is at {self.coordinator}"
        return f"process {self.process_id} of {self.process_count}{own}, as {self.source} says; {coordinator}"


def detect_process(flags: Mapping[str, Any]) -> ProcessInfo | None:
    """Detect which process this is; None if it is the only one.

    Args:
        flags: values of the flags in `ENVIRONMENT`.

    Raises:
        ValueError: the information is incomplete or impossible.
    """
    values = {name: value for name, value in flags.items() if value is not None}
    if values == {"process_count": 1}:
        return None
    if values:
        return _parse(values, {name: f"--{name}" for name in ENVIRONMENT}, "the command line")

    values = {name: os.environ[variable] for name, variable in ENVIRONMENT.items() if os.environ.get(variable)}
    if values.keys() - {"coordinator"}:
        return _parse(values, ENVIRONMENT, "the environment")
    return _detect_cluster(values.get("coordinator"))  # as in JAX, the address alone may be set for a cluster


def _parse(values: Mapping[str, Any], names: Mapping[str, str], source: str) -> ProcessInfo | None:
    for name, shown_name in names.items():
        if name not in values:
            needed = ", ".join(names.values())
            raise ValueError(f"{shown_name} is missing; several processes need {needed}; or {SINGLE_PROCESS_HINT}")
    try:
        count, number = int(values["process_count"]), int(values["process_id"])
    except ValueError as error:
        raise ValueError(f"{names['process_count']} and {names['process_id']} must be numbers: {error}") from error
    if not 0 <= number < count:
        raise ValueError(f"{names['process_id']}={number} must be less than {names['process_count']}={count}, from 0")
    if not re.fullmatch(r".+:\d{1,5}", values["coordinator"]):
        address = f"{names['coordinator']}={values['coordinator']!r}"
        raise ValueError(f"{address} must be HOST:PORT, such as 10.0.0.2:8476")
    return ProcessInfo(values["coordinator"], count, number, source=source) if count > 1 else None


def _detect_cluster(coordinator: str | None) -> ProcessInfo | None:
    from jax._src.clusters import ClusterEnv  # a late import: flags are parsed without jax

    name = "Kubernetes"
    try:
        # Kubernetes only if the job is indexed: JAX would query it in each pod, and warn where that fails.
        kinds = [kind for kind in ClusterEnv._cluster_types if not kind.opt_in_only_method and kind.name]
        cluster = next((kind for kind in kinds if kind.is_env_present()), None)
        if cluster is None and "JOB_COMPLETION_INDEX" in os.environ:
            cluster = next(kind for kind in ClusterEnv._cluster_types if kind.__name__ == "K8sCluster")
            with warnings.catch_warnings(action="ignore"):  # the error below says the same
                if not cluster.is_env_present():
                    raise ValueError("the Python package `kubernetes` is not there to ask it")
        if cluster is None:
            return None

        name = cluster.name or name
        count = cluster.get_process_count()
        if count == 1:
            return None
        number = cluster.get_process_id()
        port = os.environ.get("JAX_COORDINATOR_PORT")
        coordinator = coordinator or cluster.get_coordinator_address(DETECTION_SECONDS, port)
    except Exception as error:  # of any type: requests, Kubernetes, a variable that is no number
        variables = ", ".join(ENVIRONMENT.values())
        raise ValueError(
            f"this looks like a process of {name}, but its place can't be found: {type(error).__name__}: {error}; set "
            f"{variables}; or {SINGLE_PROCESS_HINT}"
        ) from error
    return ProcessInfo(coordinator, count, number, _local_devices(cluster), name)


def _local_devices(cluster: "type[ClusterEnv]") -> tuple[int, ...] | None:
    """Return the GPU of this task if there are several tasks on the host, and each sees all GPUs."""
    number = cluster.get_local_process_id()
    if number is None:
        return None
    tasks = os.environ.get("SLURM_STEP_TASKS_PER_NODE") or os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") or "2"
    one_task_per_host = set(re.findall(r"(\d+)(?:\(x\d+\))?", tasks)) == {"1"}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1").split(",")
    return None if one_task_per_host or len(visible) == 1 else (number,)
