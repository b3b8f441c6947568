"""Programs that a launch script calls, as far as it can tell: gcloud with TPU workers, ssh hosts, SLURM, kubectl, sky.

Linked under each of their names into a folder on PATH. Machines are folders under `CLOUD`, each the home of one, on
which commands run as they would there; what outlives machines is under `STORAGE`. All calls are kept in
`STORAGE/calls`, as JSON lines.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

NAMES = ("gcloud", "ssh", "scp", "tmux", "make", "nvidia-smi", "srun", "scontrol", "kubectl", "sky")

JAXSTAGES = f"""#!{sys.executable}
import json, os, sys
from pathlib import Path

storage, me = Path(os.environ["STORAGE"]), os.environ["MACHINE"]
given = {{name: value for name, value in os.environ.items() if name.startswith(("JAX_", "SLURM_"))}}
with (storage / "runs").open("a") as file:
    file.write(json.dumps({{"machine": me, "words": sys.argv[1:], "environment": given}}) + "\\n")
lines = [json.loads(line) for line in (storage / "runs").read_text().splitlines()]
number = [line["machine"] for line in lines].count(me)
if number == 1 and os.environ.get("PREEMPTS"):
    Path(os.environ["CLOUD"], "node").write_text("PREEMPTED")
codes = os.environ["CODES"].split()
sys.exit(int(codes[min(number, len(codes)) - 1]))
"""
"""Ends with the codes of `CODES`, one a run on each machine; with `PREEMPTS` the TPU is taken away in its first run."""

CLOUD, STORAGE = Path(os.environ.get("CLOUD", "")), Path(os.environ.get("STORAGE", ""))


def install(folder: Path) -> Path:
    """Put the stand-ins into `folder/bin`, and the launch scripts with a program into `folder/project`."""
    (folder / "bin").mkdir(parents=True)
    for name in ("storage", "cloud"):
        (folder / name).mkdir()
    script = folder / "bin" / "stand_in"
    script.write_text(f"#!{sys.executable}\n" + Path(__file__).read_text())
    script.chmod(0o755)
    for name in NAMES:
        (folder / "bin" / name).symlink_to(script)
    shutil.copytree(Path(__file__).parents[1] / "launch", folder / "project" / "launch")
    make_venv(folder / "project")
    return folder / "project"


def make_venv(project: Path) -> None:
    programs = project / ".venv" / "bin"
    programs.mkdir(parents=True, exist_ok=True)
    for name, text in {"jaxstages": JAXSTAGES, "pip": "#!/bin/sh\n", "python": "#!/bin/sh\n"}.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)


def on(machine: str, command: list[str], cwd: Path | None = None, **environment: str) -> int:
    """The exit code of a command on a machine."""
    home = CLOUD / machine
    home.mkdir(exist_ok=True)
    env = os.environ | {"HOME": str(home), "MACHINE": machine} | environment
    return subprocess.run(command, cwd=cwd or home, env=env).returncode


def flag(words: list[str], name: str, default: str = "") -> str:
    return next((word.partition("=")[2] for word in words if word.startswith(f"--{name}=")), default)


def gcloud(words: list[str]) -> int:
    assert words[:2] == ["compute", "tpus"] and flag(words, "zone")
    kind, verb, name = words[2:5]
    there = {"queued-resources": CLOUD / "queued", "tpu-vm": CLOUD / "node"}
    target = words[5].partition(":")[0] if verb == "scp" else name
    workers = [f"{target}-{i}" for i in range(2)]
    match verb:
        case "create":
            if kind == "queued-resources":
                assert flag(words, "node-id") and flag(words, "runtime-version") and flag(words, "accelerator-type")
                there[kind].write_text("ACTIVE")
            there["tpu-vm"].write_text("READY")
            for worker in workers:
                (CLOUD / worker).mkdir()
        case "describe":
            if not there[kind].exists():
                print("ERROR: NOT_FOUND: Resource was not found", file=sys.stderr)
                return 1
            print(there[kind].read_text())
        case "delete":
            for worker in workers:
                if (session := CLOUD / worker / "session").exists():
                    os.killpg(int(session.read_text()), signal.SIGKILL)
                shutil.rmtree(CLOUD / worker)
            for file in there.values():
                file.unlink(missing_ok=True)
        case "ssh":
            chosen = workers if flag(words, "worker") == "all" else [workers[int(flag(words, "worker"))]]
            return max(on(worker, ["bash", "-c", flag(words, "command")]) for worker in chosen)
        case "scp":
            for worker in workers:
                shutil.copy(name, CLOUD / worker / words[5].partition(":")[2])
    return 0


def ssh(words: list[str]) -> int:
    machine, command = words[-2:]
    return on(machine, ["bash", "-c", command])


def scp(words: list[str]) -> int:
    machine, _, path = words[1].partition(":")
    (CLOUD / machine).mkdir(exist_ok=True)
    shutil.copy(words[0], CLOUD / machine / path)
    return 0


def tmux(words: list[str]) -> int:
    """Sessions outlive whoever starts them."""
    if words[0] == "new-session":
        assert words[1:4] == ["-d", "-s", "jaxstages"]
        child = subprocess.Popen(
            words[4:], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        Path(os.environ["HOME"], "session").write_text(str(child.pid))
    return 0


def make(words: list[str]) -> int:
    assert words == [".venv"]
    make_venv(Path.cwd())
    return 0


def srun(words: list[str]) -> int:
    """Two nodes, one task each; the highest code of both."""
    assert words.pop(0) == "--kill-on-bad-exit=0"
    return max(on(f"node{i}", words, Path.cwd(), SLURM_PROCID=str(i), SLURM_NTASKS="2") for i in range(2))


def scontrol(words: list[str]) -> int:
    assert words == ["requeue", os.environ["SLURM_JOB_ID"]]
    (STORAGE / "requeued").touch()
    return 0


def kubectl(words: list[str]) -> int:
    """A JobSet of an indexed job: all pods are made again where one fails, unless that is of no use."""
    import yaml

    assert words[:2] == ["apply", "-f"]
    jobset = yaml.safe_load(Path(words[2]).read_text())
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (part,) = jobset["spec"]["replicatedJobs"]
    job = part["template"]["spec"]
    assert job["completionMode"] == "Indexed" and job["parallelism"] == job["completions"] and part["replicas"] == 1
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["restartPolicy"] == "Never" and job["backoffLimit"] == 0
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob" and rule["onExitCodes"]["containerName"] == container["name"]
    (no_use,) = jobset["spec"]["failurePolicy"]["rules"]
    assert no_use["action"] == "FailJobSet" and no_use["onJobFailureReasons"] == ["PodFailurePolicy"]
    assert re.fullmatch(r"[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?", no_use["name"])
    for _ in range(jobset["spec"]["failurePolicy"]["maxRestarts"] + 1):
        codes = []
        for index in range(job["completions"]):
            host = f"{jobset['metadata']['name']}-{part['name']}-0-{index}.{jobset['metadata']['name']}"
            given = {entry["name"]: value_of(entry, index) for entry in container["env"]}
            codes.append(on(host, ["jaxstages", *container["args"]], **given))
        if not any(codes):
            return 0
        if set(codes) & set(rule["onExitCodes"]["values"]):
            return 1
    return 1


def value_of(entry: dict[str, Any], index: int) -> str:
    if "value" in entry:
        assert isinstance(entry["value"], str), "Kubernetes refuses numbers"
        return entry["value"]
    path = entry["valueFrom"]["fieldRef"]["fieldPath"]
    assert path == "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    return str(index)


def sky(words: list[str]) -> int:
    """A managed job: its nodes are made again where one ends with a code to recover on."""
    import yaml

    assert words[:2] == ["jobs", "launch"]
    task = yaml.safe_load(next(Path(word) for word in words if word.endswith(".yaml")).read_text())
    envs = [words[i + 1].partition("=") for i, word in enumerate(words) if word == "--env"]
    given = task["envs"] | {name: value for name, _, value in envs}
    assert all(isinstance(value, str) for value in given.values()) and task["workdir"] == "."
    count = task["num_nodes"]
    given |= {"SKYPILOT_NODE_IPS": "".join(f"10.0.0.{2 + i}\n" for i in range(count)), "SKYPILOT_NUM_NODES": str(count)}
    while True:
        codes = []
        for rank in range(count):
            script = f"{task['setup']}\n{task['run']}"
            codes.append(on(f"node{rank}", ["bash", "-c", script], SKYPILOT_NODE_RANK=str(rank), **given))
        if not any(codes) or not set(codes) & set(task["resources"]["job_recovery"]["recover_on_exit_codes"]):
            return max(codes)


def main() -> int:
    name, words = Path(sys.argv[0]).name, sys.argv[1:]
    with (STORAGE / "calls").open("a") as file:
        file.write(json.dumps([name, *words]) + "\n")
    if name == "nvidia-smi":
        return 0
    return globals()[name](words)


if __name__ == "__main__":
    sys.exit(main())
