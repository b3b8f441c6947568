"""A power cut loses nothing that the run relies on: by strace, each file is on disk before its name says it is whole.

Left out, since nothing is read from them: LOCK files and TensorBoard's curves. Orbax's two marker files at the top of a
checkpoint are written after the seal; they have to be on disk, but not before the rename.
"""

import re
import shutil
from collections import Counter
from pathlib import Path

import pytest

from jaxstages.runtime.manifest import UNLISTED
from tests.reliability.harness import Home, print_table

STRACE = shutil.which("strace")
TRACED = "fsync,fdatasync,write,writev,pwrite64,pwritev,rename,renameat,renameat2,openat,mkdir,unlink,unlinkat,rmdir"
CALL = re.compile(r"^(?:\d+ +)?(\w+)\((.*)$")
UNFINISHED = " <unfinished ...>"
RESUMED = re.compile(r"^\d+ +<\.\.\. \w+ resumed>")
OPENED = re.compile(r"^\d+<([^>]*)>")
QUOTED = re.compile(r'"((?:[^"\\]|\\.)*)"')


class Disk:
    """What has been written and not synced, as the calls go by."""

    def __init__(self, root: Path) -> None:
        self.root = str(root)
        self.dirty: set[str] = set()
        self.unnamed: dict[str, str] = {}
        """Folder -> a name in it that was made or changed since its last fsync."""
        self.violations: list[str] = []
        self.calls = Counter()
        self._begun: dict[str, str] = {}
        """Thread -> the first half of a call that another thread's line has cut in two."""

    def relevant(self, path: str) -> bool:
        return (
            path.startswith(self.root)
            and not re.search("/(tensorboard|compiled)", path)
            and not path.endswith((".lock", "/LOCK", ".log"))
        )

    def see(self, line: str) -> None:
        thread = line.partition(" ")[0]
        if line.endswith(UNFINISHED):
            self._begun[thread] = line.removesuffix(UNFINISHED)
            return
        if resumed := RESUMED.match(line):
            line = self._begun.pop(thread) + line[resumed.end() :]
        match = CALL.match(line)
        if match is None or re.search(r"= -1 E", line):
            return
        name, rest = match.groups()
        self.calls[name] += 1
        opened = OPENED.match(rest)
        paths = [opened[1]] if opened and name != "openat" and not name.startswith(("rename", "unlink")) else None
        paths = paths or QUOTED.findall(rest)
        if not paths or not any(map(self.relevant, paths)):
            return
        path = paths[-1] if name in ("openat", "unlinkat") else paths[0]
        if name in ("write", "writev", "pwrite64", "pwritev"):
            self.dirty.add(path)
        elif name in ("fsync", "fdatasync"):
            self.dirty.discard(path)
            self.unnamed.pop(path, None)
        elif name == "openat":
            if "O_CREAT" in rest:
                self.unnamed[str(Path(path).parent)] = path
            if "O_TRUNC" in rest:
                self.dirty.add(path)
        elif name == "mkdir":
            self.unnamed[str(Path(path).parent)] = path
        elif name.startswith("rename"):
            self.rename(*paths[-2:])
        elif name in ("unlink", "unlinkat", "rmdir"):
            self.forget(path)

    def rename(self, old: str, new: str) -> None:
        inside = [path for path in self.dirty if path == old or path.startswith(f"{old}/")]
        for path in inside:
            top = re.search(r"/checkpoints/\d+[^/]*/([^/]+)$", path)
            final = "/checkpoints/" not in new or re.search(r"/checkpoints/\d+$", new)
            if final and not (top and top[1] in UNLISTED):
                self.violations.append(f"{path} was not synced before it became {new}")
        unnamed = [path for path in self.unnamed if path == old or path.startswith(f"{old}/")]
        for path in inside:
            self.dirty.discard(path)
            self.dirty.add(new + path.removeprefix(old))
        for path in unnamed:
            self.unnamed[new + path.removeprefix(old)] = self.unnamed.pop(path)
        self.unnamed[str(Path(new).parent)] = new

    def forget(self, path: str) -> None:
        self.dirty = {other for other in self.dirty if other != path and not other.startswith(f"{path}/")}
        self.unnamed = {k: v for k, v in self.unnamed.items() if k != path and not k.startswith(f"{path}/")}

    def end(self) -> list[str]:
        """All violations; what was deleted in the meantime does not count."""
        left = [f"{path} was not synced" for path in sorted(self.dirty) if Path(path).exists()]
        left += [f"{k} was not synced after {v}" for k, v in sorted(self.unnamed.items()) if Path(v).exists()]
        return self.violations + left


@pytest.mark.skipif(STRACE is None, reason="strace is not installed")
def test_everything_is_synced_before_it_is_relied_on(tmp_path: Path) -> None:
    """Prepare, saves, deletions, and the hand-off to a second stage."""
    home = Home(tmp_path / "home", more=("--config.instruct=None",), command=("run",))
    trace = tmp_path / "trace"
    prefix = ("strace", "-f", "-y", "-qq", "-s", "400", "--seccomp-bpf", "-e", f"trace={TRACED}", "-o", str(trace))
    for command in ("prepare", "pretrain", "finetune"):
        home.command, home.more = (command,), ()
        child = home.start(home.folder / "work", prefix)
        assert child.wait() == 0, child.log()
        disk = Disk(home.folder)
        for line in trace.read_text(errors="replace").splitlines():
            disk.see(line)
        print_table(f"durability of {command}: {len(disk.end())} violations", dict(disk.calls))
        assert disk.end() == []
        assert disk.calls["fsync"] > 20, "the trace must mean something"


def test_a_call_that_fails_after_another_thread_has_cut_in_makes_no_name(tmp_path: Path) -> None:
    disk = Disk(tmp_path)
    disk.see(f'12 mkdir("{tmp_path}", 0777 <unfinished ...>')
    disk.see(f'13 openat(AT_FDCWD, "{tmp_path}/a", O_WRONLY|O_CREAT) = 5<{tmp_path}/a>')
    disk.see("12 <... mkdir resumed>) = -1 EEXIST (File exists)")
    assert set(disk.unnamed) == {str(tmp_path)}
