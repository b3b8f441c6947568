"""`checkpoints list | verify | diff`: list the checkpoints of a run, verify their files, or compare two of them."""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from jaxstages.checkpoint.metadata import finished, read_meta, saved_kind
from jaxstages.runtime import manifest
from jaxstages.runtime.console import say, table_console
from jaxstages.runtime.workdir import begun_stages, checkpoint_folder, quarantine_folder, result_file, steps_of


def checkpoints(workdir: Path, stage: str | None, words: Sequence[str]) -> None:
    """Run one of the three actions.

    Args:
        words: the action and, for "diff", two checkpoints as STAGE/STEP.

    Raises:
        ValueError: an unknown action or checkpoint; for "verify", a checkpoint is damaged.
    """
    folders = [workdir / name for name in ([stage] if stage else begun_stages(workdir)) if steps_of(workdir / name)]
    match list(words):
        case ["diff", first, second]:
            _diff(workdir, first, second)
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
            sizes = manifest.sizes(checkpoint_folder(folder, step)).values()
            marks = [mark] * (step == best) + ["latest"] * (step == steps[-1])
            metrics = {name: value for name, value in meta["carried"]["best"].items() if not name.endswith("_se")}
            scores = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items() if value)
            cells = (f"{meta['carried']['tokens']:,}", f"{sum(sizes) / 1e6:.2f}", str(len(sizes)), scores)
            table.add_row(folder.name, str(step), ", ".join(marks) or "recent", *cells)
    table_console(140).print(table)
    for folder in folders:
        for reason in sorted(quarantine_folder(folder).glob("*.reason")):
            say(f"in quarantine: {reason.with_suffix('')}: {reason.read_text(encoding='utf-8').strip()}", "yellow")


def _best_of(folder: Path, steps: Sequence[int]) -> tuple[int, str]:
    """Return the best step, according to the stage's result or its newest readable checkpoint, and its label."""
    if result_file(folder).exists():
        return finished(folder)["best_step"], "best, handed on"
    for step in reversed(steps):
        with contextlib.suppress(manifest.Damaged):  # the table reports it
            return read_meta(checkpoint_folder(folder, step))["best_step"], "best"
    return -1, ""


def _verify(folders: list[Path]) -> None:
    count, bad = 0, 0
    for folder in folders:
        for step in steps_of(folder):
            count += 1
            try:
                manifest.check(checkpoint_folder(folder, step))
                read_meta(checkpoint_folder(folder, step))
                say(f"{folder.name}/{step}: every file is as it was written", "green")
            except manifest.Damaged as error:
                bad += 1
                say(f"{folder.name}/{step}: {error}", "red")
    if bad:
        raise ValueError(
            f"{bad} of {count} checkpoints are damaged; the next start of an unfinished stage moves them aside. For a "
            "finished one, put a good copy back, or remove the stage's folder to train it again"
        )


def _diff(workdir: Path, first: str, second: str) -> None:
    metas = [_meta_of(workdir, name) for name in (first, second)]
    params = [_params_of(workdir, name, meta) for name, meta in zip((first, second), metas, strict=True)]
    digests = [meta["fingerprint"] for meta in metas]

    table = Table(title=f"{first} -> {second}", title_justify="left")
    table.add_column("leaf")
    table.add_column("change", justify="right")
    for path in sorted(digests[0].keys() | digests[1]):
        before, after = (leaves.get(path.removeprefix("params/")) for leaves in params)
        table.add_row(path, _change(path, digests[0].get(path), digests[1].get(path), before, after))
    table_console(140).print(table)
    say("a parameter's change is the norm of the difference, as a share of the norm before")


def _change(path: str, old: str | None, new: str | None, before: Any, after: Any) -> str:
    """Describe how a leaf changed.

    Args:
        old, new: digests; None if a checkpoint does not have the leaf.
        before, after: values, if the leaf is a parameter.
    """
    import jax.numpy as jnp  # listing and verifying need no arrays

    if old is None or new is None:
        return "new" if old is None else "gone"
    if old == new:
        return "same"
    if saved_kind(old) != saved_kind(new):
        return f"{saved_kind(old)} -> {saved_kind(new)}"
    if not path.startswith("params/"):
        return "differs"
    before, after = before.astype(jnp.float32), after.astype(jnp.float32)
    return f"{float(jnp.linalg.norm(after - before) / jnp.maximum(jnp.linalg.norm(before), 1e-30)):.3%}"


def _meta_of(workdir: Path, name: str) -> dict[str, Any]:
    stage, _, step = name.partition("/")
    if stage not in begun_stages(workdir) or not step.isdecimal() or int(step) not in steps_of(workdir / stage):
        known = [f"{stage}/{step}" for stage in begun_stages(workdir) for step in steps_of(workdir / stage)]
        raise ValueError(f"no checkpoint {name!r} in {workdir}; there are {', '.join(known) or 'none'}")
    return read_meta(checkpoint_folder(workdir / stage, int(step)))


def _params_of(workdir: Path, name: str, meta: dict[str, Any]) -> dict[str, Any]:
    """Return the parameters by path, on one device."""
    import jax
    from jax.sharding import SingleDeviceSharding

    from jaxstages.checkpoint.fingerprint import named_leaves
    from jaxstages.checkpoint.manager import read_params, stored_params

    stage, _, step = name.partition("/")
    target = stored_params(meta, SingleDeviceSharding(jax.devices()[0]))
    return named_leaves(read_params(workdir / stage, int(step), target))
