"""`checkpoints list | verify | diff`: what a run has kept, whether it can be trusted, and how two of them differ."""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from jaxstages.checkpoint.metadata import finished, read_meta, saved_kind
from jaxstages.runtime import manifest
from jaxstages.runtime.console import say
from jaxstages.runtime.workdir import begun_stages, checkpoint_folder, quarantine_folder, result_file, steps_of


def checkpoints(workdir: Path, stage: str | None, words: Sequence[str]) -> None:
    """Args: words: an action and, for "diff", two of STAGE/STEP.

    Raises:
        ValueError: an unknown action or checkpoint; after "verify", damage.
    """
    folders = [workdir / name for name in ([stage] if stage else begun_stages(workdir)) if steps_of(workdir / name)]
    match list(words):
        case ["diff", one, other]:
            _diff(workdir, one, other)
        case ["list" | "verify"] if not folders:
            raise ValueError(f"{workdir} has no checkpoint{f' of {stage}' if stage else ''}; is it a run's --workdir?")
        case ["list"]:
            _list(folders)
        case ["verify"]:
            _verify(folders)
        case _:
            raise ValueError(f"checkpoints {' '.join(words)}: write list, verify, or diff STAGE/STEP STAGE/STEP")


def _list(folders: list[Path]) -> None:
    table = Table(title="checkpoints", title_justify="left")
    for heading in ("stage", "step", "kept as", "tokens", "MB", "files", "best metrics so far"):
        table.add_column(heading, justify="right" if heading in ("step", "tokens", "MB", "files") else "left")
    for folder in folders:
        steps = steps_of(folder)
        best, mark = _best_of(folder, steps)
        for step in steps:
            try:
                meta = read_meta(checkpoint_folder(folder, step))
            except manifest.Damaged as error:
                table.add_row(folder.name, str(step), "damaged", "", "", "", str(error))
                continue
            files = [path for path in checkpoint_folder(folder, step).rglob("*") if path.is_file()]
            marks = [mark] * (step == best) + ["latest"] * (step == steps[-1])
            named = {name: value for name, value in meta["carried"]["best"].items() if not name.endswith("_se")}
            scores = ", ".join(f"{name} {value:.4g}" for name, value in named.items() if value)
            size = sum(path.stat().st_size for path in files) / 1e6
            cells = (f"{meta['carried']['tokens']:,}", f"{size:.2f}", str(len(files)), scores)
            table.add_row(folder.name, str(step), ", ".join(marks) or "recent", *cells)
    Console(width=None if Console().is_terminal else 140).print(table)
    for folder in folders:
        for reason in sorted(quarantine_folder(folder).glob("*.reason")):
            say(f"in quarantine: {reason.with_suffix('')}: {reason.read_text(encoding='utf-8').strip()}", "yellow")


def _best_of(folder: Path, steps: Sequence[int]) -> tuple[int, str]:
    """The best step, as the stage's result or its newest readable checkpoint says, and what it is kept as."""
    if result_file(folder).exists():
        return finished(folder)["best_step"], "best, handed on"
    for step in reversed(steps):
        with contextlib.suppress(manifest.Damaged):  # the table says so
            return read_meta(checkpoint_folder(folder, step))["best_step"], "best"
    return -1, ""


def _verify(folders: list[Path]) -> None:
    every, bad = 0, 0
    for folder in folders:
        for step in steps_of(folder):
            every += 1
            try:
                manifest.check(checkpoint_folder(folder, step))
                read_meta(checkpoint_folder(folder, step))
                say(f"{folder.name}/{step}: every file is as it was written", "green")
            except manifest.Damaged as error:
                bad += 1
                say(f"{folder.name}/{step}: {error}", "red")
    if bad:
        raise ValueError(f"{bad} of {every} checkpoints are damaged; the next start of the stage moves them aside")


def _diff(workdir: Path, one: str, other: str) -> None:
    import jax.numpy as jnp  # listing and verifying need no arrays

    metas = [_meta_of(workdir, name) for name in (one, other)]
    prints = [meta["fingerprint"] for meta in metas]
    params = [_params_of(workdir, name, meta) for name, meta in zip((one, other), metas, strict=True)]
    table = Table(title=f"{one} -> {other}", title_justify="left")
    table.add_column("leaf")
    table.add_column("change", justify="right")
    for path in sorted(prints[0].keys() | prints[1]):
        old, new = (each.get(path) for each in prints)
        name = path.removeprefix("params/")
        if old is None or new is None:
            change = "new" if old is None else "gone"
        elif old == new:
            change = "same"
        elif saved_kind(old) != saved_kind(new):
            change = f"{saved_kind(old)} -> {saved_kind(new)}"
        elif path.startswith("params/"):
            before, after = params[0][name].astype(jnp.float32), params[1][name].astype(jnp.float32)
            change = f"{float(jnp.linalg.norm(after - before) / jnp.maximum(jnp.linalg.norm(before), 1e-30)):.3%}"
        else:
            change = "differs"
        table.add_row(path, change)
    Console(width=None if Console().is_terminal else 140).print(table)
    say("a parameter's change is the norm of the difference as a share of its norm before")


def _meta_of(workdir: Path, name: str) -> dict[str, Any]:
    stage, _, step = name.partition("/")
    if stage not in begun_stages(workdir) or not step.isdecimal() or int(step) not in steps_of(workdir / stage):
        known = [f"{stage}/{step}" for stage in begun_stages(workdir) for step in steps_of(workdir / stage)]
        raise ValueError(f"no checkpoint {name!r} in {workdir}; there are {', '.join(known) or 'none'}")
    return read_meta(checkpoint_folder(workdir / stage, int(step)))


def _params_of(workdir: Path, name: str, meta: dict[str, Any]) -> dict[str, Any]:
    """Path -> parameter, all on one device."""
    import jax
    from jax.sharding import SingleDeviceSharding

    from jaxstages.checkpoint.fingerprint import named_leaves
    from jaxstages.checkpoint.manager import read_params, stored_params

    stage, _, step = name.partition("/")
    target = stored_params(meta, SingleDeviceSharding(jax.devices()[0]))
    return named_leaves(read_params(workdir / stage, int(step), target))
