"""What `docs/security.md` promises: no code out of data, no secret in a file, no port, nothing unknown installed."""

import ast
import importlib.metadata
import json
import os
import pickle
import re
import secrets
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import jaxstages
from jaxstages.checkpoint.manager import Checkpoints
from jaxstages.cli.main import main
from jaxstages.cli.resolve import resolve_recipe
from jaxstages.data.prepare import Prepared
from jaxstages.runtime.files import read_json, write_json
from jaxstages.runtime.manifest import write_manifest
from jaxstages.runtime.workdir import checkpoints_folder, steps_of
from jaxstages.training.early_stopping import early_stopping
from jaxstages.training.saved_items import from_items, to_items
from jaxstages.training.setup import setup_stage
from tests.reliability.test_golden import DATA, GOLDEN, RUN

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the golden run, as if it came from someone else; its folder is the current one."""
    shutil.copytree(GOLDEN, tmp_path / "golden")
    monkeypatch.chdir(tmp_path / "golden")
    return RUN


# Secrets and ports.

SECRETS = ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "MY_PASSWORD", "WANDB_API_KEY", "GITHUB_TOKEN")


def listening(pid: int) -> set[str]:
    """Addresses that a process waits for connections at, as Linux writes them."""
    inodes = set()
    for descriptor in Path(f"/proc/{pid}/fd").glob("*"):
        try:
            inodes.add(str(descriptor.readlink()))
        except OSError:
            continue  # closed since
    actual = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in inodes:
                actual.add(fields[1])
    return actual


def test_a_run_writes_no_secret_and_opens_no_port(tmp_path: Path) -> None:
    """From data to a result, in a run that has all the files of a stage."""
    shutil.copytree(GOLDEN / DATA, tmp_path / DATA)
    (tmp_path / RUN).mkdir()
    shutil.copy(GOLDEN / RUN / "recipe.json", tmp_path / RUN)
    canaries = {name: f"canary-{secrets.token_hex(12)}" for name in SECRETS}
    env = os.environ | canaries | {"XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-m", "jaxstages", "pretrain", f"--workdir={RUN}"]
    ports: set[str] = set()
    with (tmp_path / "output").open("wb") as output:
        process = subprocess.Popen(words, cwd=tmp_path, env=env, stdout=output, stderr=subprocess.STDOUT)
        while process.poll() is None:
            ports |= listening(process.pid)
            time.sleep(0.05)
    assert process.returncode == 0, (tmp_path / "output").read_text()[-3000:]
    assert not ports
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 50 and (tmp_path / RUN / "pretrain" / "result.json") in files
    for name, canary in canaries.items():
        results = [path for path in files if canary.encode() in path.read_bytes() or canary in str(path)]
        assert not results, f"{name} is in {results}"


def test_a_port_would_be_seen() -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        assert any(name.endswith(f":{server.getsockname()[1]:04X}") for name in listening(os.getpid()))


# The gate over our own source.

MODULES = ("pickle", "cPickle", "_pickle", "dill", "joblib", "cloudpickle", "shelve", "marshal", "jsonpickle", "yaml")
MODULES += ("tarfile", "zipfile", "ruamel", "runpy", "code", "pty", "telnetlib")
BUILTINS = ("eval", "exec", "compile", "__import__")
METHODS = ("system", "popen", "unpack_archive", "extractall", "run_path", "run_module")
KEYWORDS = ("allow_pickle", "trust_remote_code", "shell", "weights_only")
SCRIPT = r"\beval\b|0\.0\.0\.0|\bcurl\b|\bwget\b|pickle|trust.remote.code|python -c [\"']?.*\$"


def unsafe(source: str) -> list[str]:
    """What a file of ours must not have in it, each with its line."""
    results = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import():
                names = [alias.name for alias in node.names]
            case ast.ImportFrom():
                names = [node.module or ""]
            case ast.Call(func=ast.Attribute(attr="import_module"), args=[ast.Constant(value=str() as name)]):
                names = [name]
            case ast.Call(func=ast.Attribute(attr="import_module")):
                names = []
                results.append(f"{node.lineno}: imports what a variable names")
            case _:
                names = []
        results += [f"{node.lineno}: import {name}" for name in names if name.split(".")[0] in MODULES]
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            last = called.rsplit(".", 1)[-1]
            bad = called in BUILTINS or (last in METHODS and last != called) or called == "torch.load"
            results += [f"{node.lineno}: {called}()"] if bad else []
            results += [f"{node.lineno}: {word.arg}=" for word in node.keywords if word.arg in KEYWORDS]
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and "0.0.0.0" in node.value:
            results.append(f"{node.lineno}: 0.0.0.0")
    return results


def test_no_source_of_ours_runs_what_it_reads() -> None:
    files = [path for folder in ("jaxstages", "configs") for path in (ROOT / folder).rglob("*.py")]
    assert len(files) > 50
    findings = {str(path.relative_to(ROOT)): bad for path in files if (bad := unsafe(path.read_text()))}
    # The public API is imported on first use, from a table of our own modules.
    (lazy,) = findings.pop("jaxstages/__init__.py")
    assert lazy.endswith("imports what a variable names")
    assert all(name.startswith("jaxstages.") for name in jaxstages._HOMES)
    assert findings == {}
    for path in (ROOT / "launch").iterdir():
        assert not re.search(SCRIPT, path.read_text()), path


@pytest.mark.parametrize(
    "source",
    [
        *("import pickle", "from joblib import load", "def f():\n    import dill", "import yaml", "import tarfile"),
        *("import zipfile as z", "torch.load(path)", "np.load(path, allow_pickle=True)", "eval(text)", "exec(text)"),
        *("os.system(text)", "os.popen(text)", "subprocess.run(text, shell=True)", "load(x, trust_remote_code=True)"),
        *("server(('0.0.0.0', 80))", "shutil.unpack_archive(path)", "importlib.import_module(name)"),
        *("importlib.import_module('cloudpickle')", "__import__(name)", "archive.extractall(path)"),
    ],
)
def test_the_gate_is_shut(source: str) -> None:
    assert unsafe(source)


def test_the_gate_lets_plain_code_pass() -> None:
    assert not unsafe(
        "import re, json\nnp.load(path)\nre.compile(word)\nmodel.eval()\nimportlib.import_module('datasets')"
    )


# Code that hides in data.


class Marker:
    """Unpickled, it makes a file."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self._file,)


def plant(file: Path, marker: Path, kind: str) -> None:
    """Something in place of a numpy array that runs code where pickles are allowed."""
    if kind == "array of objects":
        np.save(file, np.array([Marker(marker)], dtype=object), allow_pickle=True)
    else:
        file.write_bytes(pickle.dumps(Marker(marker)))
    np.load(file, allow_pickle=True)
    marker.unlink()  # it works


def rows_of(run: Path) -> Prepared:
    return setup_stage(resolve_recipe(None, run), "pretrain", run).data.train[0]


@pytest.mark.parametrize("kind", ["array of objects", "pickle"])
def test_a_pickle_in_a_cache_is_not_run(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    rows, marker = rows_of(run), tmp_path / "marker"
    plant(rows.folder / "target_counts.npy", marker, kind)
    assert main(["jaxstages", "prepare", f"--workdir={run}"]) == 2
    assert "target_counts.npy is damaged" in capsys.readouterr().err
    write_manifest(rows.folder)  # now its maker says that it is as it should be
    with pytest.raises(ValueError, match="allow_pickle="):
        rows_of(run).target_counts()
    plant(rows.folder / "counts-00000.npy", marker, kind)
    (rows.folder / "MANIFEST.json").unlink()  # and now it was not finished yet
    assert main(["jaxstages", "prepare", f"--workdir={run}"]) == 2
    assert not marker.exists()


@pytest.mark.parametrize(
    "change",
    [
        {"module": "os"},
        {"py/object": "pathlib.Path"},
        {"__reduce__": ["pathlib.Path.touch", ["MARKER"]]},
        {"config": "recipe.py"},
        {"name": "{__import__('pathlib').Path('MARKER').touch()}"},
        {"name": "!!python/object/apply:pathlib.Path.touch [MARKER]"},
        {"prompts": ["{{ cycler.__init__.__globals__.os.system('touch MARKER') }}", "$(touch MARKER)"]},
    ],
    ids=str,
)
def test_a_recipe_json_is_data(run: Path, change: dict[str, Any]) -> None:
    """Neither what it names is run, nor a recipe of code that lies beside it."""
    (run / "recipe.py").write_text("open('MARKER', 'w')\n")
    kept = read_json(run / "recipe.json")
    write_json(run / "recipe.json", kept | {"recipe": kept["recipe"] | change})
    before = set(sys.modules)
    known = next(iter(change)) in kept["recipe"]
    assert main(["jaxstages", "prepare", f"--workdir={run}"]) == (0 if known else 2)
    assert not Path("MARKER").exists() and "recipe" not in sys.modules.keys() - before


@pytest.mark.parametrize("text", ["{text.__class__}", "{text.__init__.__globals__}", "{text[0]}", "{0.__class__}"])
def test_a_format_string_reaches_fields_only(run: Path, capsys: pytest.CaptureFixture[str], text: str) -> None:
    kept = read_json(run / "recipe.json")
    kept["recipe"]["pretrain"]["data"]["text"] = text
    write_json(run / "recipe.json", kept)
    assert main(["jaxstages", "prepare", f"--workdir={run}"]) == 2
    assert "is missing or no text" in capsys.readouterr().err


# Folders that only look like steps.


def test_strays_among_the_steps_are_never_restored(run: Path) -> None:
    recipe = resolve_recipe(None, run)
    setup = setup_stage(recipe, "instruct", run)
    folder = checkpoints_folder(setup.folder)
    for name in ("007", "٣", "1_000", "+5", " 6", "1e3", "12.orbax"):
        shutil.copytree(folder / "1", folder / name)
    (folder / "800").symlink_to("1")
    (folder / "900").mkdir()
    (folder / str(10**40)).mkdir()
    (folder / "950").write_text("a file")
    assert steps_of(setup.folder) == [1, 800, 900, 950, 10**40]
    with Checkpoints(setup.folder, 1) as checkpoints:
        restored = checkpoints.restore_newest(to_items(setup.program.abstract_state, early_stopping().init()))
    assert restored is not None
    assert restored.meta["step"] == int(from_items(restored.items)[0].step) == 1
    assert steps_of(setup.folder) == [1], "what looked like a step is in quarantine"
    assert (folder / "1").is_dir(), "where the link led to"


# What is installed.

ALLOWED = ("Apache-2.0", "MIT", "MIT-CMU", "BSD-2-Clause", "BSD-3-Clause", "0BSD", "PSF-2.0", "ISC", "MPL-2.0", "Zlib")
ALLOWED += ("CC0-1.0", "CNRI-Python", "MIT-0")
SPELLINGS = {
    "Apache Software License": "Apache-2.0",
    "Apache 2.0": "Apache-2.0",
    "Apache License": "Apache-2.0",
    "MIT License": "MIT",
    "BSD": "BSD-3-Clause",
    "BSD License": "BSD-3-Clause",
    "3-Clause BSD License": "BSD-3-Clause",
    "BSD 3-Clause License": "BSD-3-Clause",
    "Python Software Foundation License": "PSF-2.0",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
}
"""Of classifiers, and of the first line of a licence's text."""


def requirements() -> dict[str, str]:
    """Name -> all that `requirements.lock` says of it."""
    text = (ROOT / "requirements.lock").read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return {re.split(r"[=\s;]", line)[0]: line for line in lines}


def licence_of(metadata: Any) -> str:
    """An SPDX expression: its own, or made of what stands in the older fields."""
    if metadata["License-Expression"]:
        return metadata["License-Expression"]
    names = [line.split(" :: ")[-1] for line in metadata.get_all("Classifier", []) if line.startswith("License ::")]
    lines = [line.strip() for line in (metadata["License"] or "").splitlines() if line.strip()]
    return " AND ".join(SPELLINGS.get(name, name) for name in names or lines[:1])


def allowed(expression: str) -> bool:
    parts = re.sub(r"[()]", "", expression).split(" AND ")
    return all(any(name.strip() in ALLOWED for name in part.split(" OR ")) for part in parts)


def test_every_licence_is_allowed() -> None:
    results = {}
    for name in requirements():
        try:
            results[name] = licence_of(importlib.metadata.metadata(name))
        except importlib.metadata.PackageNotFoundError:
            continue  # for another platform
    assert len(results) > 80
    assert {name: licence for name, licence in results.items() if not allowed(licence)} == {}


@pytest.mark.parametrize("licence", ["", "GPL-3.0-only", "MIT AND LGPL-2.1-only", "Proprietary", "AGPL-3.0 OR GPL-2.0"])
def test_other_licences_are_named(licence: str) -> None:
    assert not allowed(licence) and allowed(f"MIT OR {licence}") == ("AND" not in licence)


def test_the_lock_pins_and_hashes_all_it_names() -> None:
    lines = requirements()
    assert len(lines) > 80
    for name, line in lines.items():
        assert re.match(rf"{re.escape(name)}==\S+ ", line), f"{name} is not pinned"
        assert re.search(r" --hash=sha256:[0-9a-f]{64}\b", line), f"{name} has no hash"
        assert not re.search(r"://|--(extra-)?index-url|--find-links|--trusted-host|git\+| @ ", line), line


def test_make_installs_what_the_hashes_say_and_nothing_beside_it() -> None:
    installs = [line for line in (ROOT / "Makefile").read_text().splitlines() if "pip install" in line]
    assert any("--require-hashes --no-deps -r requirements.lock" in line for line in installs)
    for line in installs:
        assert "--require-hashes" in line or ("--no-deps" in line and "--no-build-isolation" in line), line


def test_metadata_is_json() -> None:
    """Each file beside the arrays that Orbax writes is text, which nothing has to unpickle."""
    for path in GOLDEN.rglob("*"):
        if path.name in ("_METADATA", "_sharding", "metadata", "_CHECKPOINT_METADATA", "MANIFEST.json"):
            json.loads(path.read_text())
        assert not (path.is_file() and re.match(rb"\x80[\x02-\x05]", path.read_bytes()[:2])), f"{path} is a pickle"
