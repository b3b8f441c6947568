"""Where a process stands: what flags, the environment and each kind of cluster say of it."""

import os
from collections.abc import Callable

import pytest
from jax._src.clusters import cloud_tpu_cluster

from jaxstages.runtime import cluster
from jaxstages.runtime.cluster import ProcessInfo, detect_process
from jaxstages.runtime.multihost import first_difference

NO_FLAGS = dict.fromkeys(cluster.ENVIRONMENT)

SLURM = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_NODELIST": "node[003-006]",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_TASKS_PER_NODE": "1(x4)",
}
OMPI = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "3",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "3",
}
VARIABLES = {"JAX_COORDINATOR_ADDRESS": "host-0.jobs:8476", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}

Told = Callable[[dict[str, str]], ProcessInfo | None]


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Told:
    """`told(variables)`: the place of a process that has no others of this kind."""

    def place(variables: dict[str, str]) -> ProcessInfo | None:
        for name in os.environ:
            if name.startswith(("SLURM_", "OMPI_", "JAX_NUM", "JAX_PROC", "JAX_COORD", "KUBERNETES", "JOB_", "CUDA_")):
                monkeypatch.delenv(name)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        return detect_process(NO_FLAGS)

    return place


def test_alone_where_nothing_says_otherwise(told: Told) -> None:
    assert told({}) is None
    assert detect_process(NO_FLAGS | {"process_count": 1}) is None
    assert told(VARIABLES | {"JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}) is None
    assert told(SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}) is None
    assert told({name: value for name, value in SLURM.items() if "STEP" not in name}) is None, "no step of srun"
    assert told({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}) is None, "a pod by itself"


def test_flags_come_before_the_environment_and_that_before_a_cluster(told: Told) -> None:
    assert told(SLURM | VARIABLES) == ProcessInfo("host-0.jobs:8476", 4, 3, source="the environment")
    flags = {"coordinator": "10.0.0.2:99", "process_count": 2, "process_id": 0}
    assert detect_process(flags) == ProcessInfo("10.0.0.2:99", 2, 0, source="the command line")
    assert detect_process(NO_FLAGS | {"process_count": 1}) is None, "alone, whatever the cluster says"
    assert str(told(VARIABLES)) == "process 3 of 4, as the environment says; process 0 is at host-0.jobs:8476"


def test_slurm(told: Told) -> None:
    assert told(SLURM) == ProcessInfo("node003:61517", 4, 2, source="slurm")
    assert told(SLURM | {"JAX_COORDINATOR_ADDRESS": "10.0.0.9:1"}) == ProcessInfo("10.0.0.9:1", 4, 2, source="slurm")
    # A task for each GPU of a node has that of its number, unless it sees no other.
    several = SLURM | {"SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_LOCALID": "1"}
    assert told(several) == ProcessInfo("node003:61517", 4, 2, (1,), "slurm")
    assert told(several | {"CUDA_VISIBLE_DEVICES": "5"}) == ProcessInfo("node003:61517", 4, 2, None, "slurm")


def test_open_mpi(told: Told) -> None:
    assert told(OMPI) == ProcessInfo("10.96.0.1:62624", 3, 1, (1,), "ompi")


def test_tpu_pods(told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    monkeypatch.setattr(cloud_tpu_cluster.BaseTpuCluster, "wait_for_coordinator", lambda *_: None)
    metadata = {
        "agent-worker-number": "1",
        "worker-network-endpoints": "a:0:10.0.0.2,b:1:10.0.0.3",
        "tpu-env": "ACCELERATOR_TYPE: 'v4-16'",
    }
    monkeypatch.setattr(cloud_tpu_cluster, "get_metadata", lambda key: (metadata[key], 200))
    monkeypatch.delenv("TPU_SKIP_MDS_QUERY", raising=False)
    assert told({}) == ProcessInfo("10.0.0.2:8482", 2, 1, source="gcetpu")
    metadata["worker-network-endpoints"] = "10.0.0.2"
    assert told({}) is None, "one host"
    gke = {"TPU_WORKER_HOSTNAMES": "job-0.sub,job-1.sub", "TPU_WORKER_ID": "0", "TPU_SKIP_MDS_QUERY": "1"}
    assert told(gke) == ProcessInfo("job-0.sub:8482", 2, 0, source="gketpu")


@pytest.mark.parametrize(
    ("variables", "complaint"),
    [
        ({"JAX_NUM_PROCESSES": "4"}, "JAX_COORDINATOR_ADDRESS is missing"),
        (VARIABLES | {"JAX_PROCESS_ID": "4"}, "JAX_PROCESS_ID=4 must be less than JAX_NUM_PROCESSES=4"),
        (VARIABLES | {"JAX_PROCESS_ID": "x"}, "must be numbers: .*'x'"),
        (VARIABLES | {"JAX_COORDINATOR_ADDRESS": "host"}, "'host' must be HOST:PORT"),
        (SLURM | {"SLURM_NTASKS": "two"}, "a process of slurm, but .*'two'; set JAX_COORDINATOR_ADDRESS"),
        (
            {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"},
            "process of Kubernetes, but .*`kubernetes` is not there .*--process_count=1 says that this is one process",
        ),
    ],
)
def test_what_is_told_by_halves_is_refused(told: Told, variables: dict[str, str], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        told(variables)


def test_the_first_difference_is_told_with_both_values() -> None:
    ours = {"jax": "0.10.2", "config.seed": "0", "rows": "a b"}
    assert first_difference(ours, [dict(ours), dict(ours)]) == ""
    assert (
        first_difference(ours, [dict(ours), ours | {"config.seed": "1"}])
        == "config.seed is 0 in process 0, 1 in process 2"
    )
    assert first_difference(ours, [{"jax": "0.11.0"}]) == "jax is 0.10.2 in process 0, 0.11.0 in process 1 (and 2 more)"
    assert first_difference(ours, [ours | {"new": "x"}]) == "new is nothing in process 0, x in process 1"
