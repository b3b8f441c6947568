"""Checkpoints, through Orbax: params/, average/ if there is one, train/ (optimizer, step, early stopping); meta (JSON);
and proof of them.

Orbax notices neither a flipped bit in an array file nor a wrong dtype, takes an empty folder for a checkpoint, and
tells of a failed save at the next one. So a checkpoint is sealed before it gets its name (`manifest.py`); what is read
is compared with its manifest, then in shapes and dtypes, then by fingerprints of all leaves; and the loop asks at each
step how the save is doing.
"""

import contextlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Sharding
from orbax.checkpoint import checkpoint_managers

from jaxstages import hosts, manifest
from jaxstages.arrays import PIECE, read, read_in_parts, to_save
from jaxstages.console import say
from jaxstages.disk import make_folder, sync, write_json
from jaxstages.early_stopping import EarlyStoppingState
from jaxstages.fingerprint import (
    Fingerprint,
    begin_fingerprint,
    fingerprint,
    kind_of,
    named_leaves,
    tree_of,
)
from jaxstages.manifest import Damaged, quarantine
from jaxstages.process import step_aside
from jaxstages.record import FORMAT, read_meta, saved_kind, steps_of, stored_shapes
from jaxstages.sharding import shardings_of
from jaxstages.types import Diverged, Params, TrainState
from jaxstages.workdir import checkpoint_folder, checkpoints_folder, quarantine_folder

HANDED_ON = ("params/", "average/")
"""What the next stage may start from, by the first part of its paths."""

TRASH = "trash"

COPIED = 2**28
"""Bytes of a state that is copied to be saved, so that the loop goes on while Orbax takes it over, which takes some
50 ms whatever the size: longer than a small model's step. Not with several processes, where Orbax asks the others."""


class Restored(NamedTuple):
    """best_lost: the best step so far is not there any more; `stopping` has forgotten it."""

    state: TrainState
    stopping: EarlyStoppingState
    meta: dict[str, Any]
    best_lost: bool = False


class _KeepBest:
    """Orbax's preservation policy: the best step stays. Which one it is, early stopping says: Orbax's own `best_fn`
    deletes the true best on a NaN."""

    def __init__(self) -> None:
        self.step = -1

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        return [checkpoint.step == self.step for checkpoint in checkpoints]


class _Manager(ocp.CheckpointManager):
    def reached_preemption(self, step: int) -> bool:
        """Orbax asks JAX at each save, by the number of its step. JAX takes the last number it was asked with for how
        far a process is, and `hosts.asked_together` counts otherwise: the processes would stop at different places,
        and wait for each other for ever."""
        del step
        return False


class Checkpoints:
    """The checkpoints of one stage: the latest `keep`, and the best. The run's lock must be held."""

    def __init__(self, stage_dir: Path, keep: int) -> None:
        self._stage_dir, self._keep, self._best = stage_dir, keep, _KeepBest()
        self._folder = checkpoints_folder(stage_dir).absolute()
        self._saving = -1
        self._thread = ThreadPoolExecutor(1, "save", step_aside)
        self._done: Future[None] | None = None
        self._meta: dict[str, Any] = {}
        self._prints: Callable[[], Fingerprint]
        self._manager: _Manager | None = None
        self._proved = False
        self._shapes: dict[str, Any] = {}
        self._digests: dict[str, str] = {}
        if hosts.leads():
            make_folder(self._folder)
            self._sweep()
        hosts.meet("checkpoints are swept")

    def restore_newest(self, target: TrainState, stopping: EarlyStoppingState) -> Restored | None:
        """The newest checkpoint that can be trusted, placed as `target` (shapes with shardings) says; None if the
        stage has none yet. Damaged ones are moved to the stage's `quarantine/`. Where its best step is damaged, or was
        removed, it is said, and the next evaluation is the best so far: a healthy checkpoint is not lost for another.

        Args:
            stopping: as it is at the start of a stage.

        Raises:
            ValueError: there are checkpoints, but none can be trusted, or one does not fit the recipe.
        """
        while (step := hosts.from_leader(self._newest_whole() if hosts.leads() else 0)) >= 0:
            try:
                found = _restore(self._folder / str(step), target, stopping)
            except Damaged as error:
                self._distrust(step, error)
            else:
                self._proved = True
                lost = bool(hosts.from_leader(int(self._best_lost(found.meta)) if hosts.leads() else 0))
                self._best.step = -1 if lost else found.meta["best_step"]
                return found._replace(stopping=stopping, best_lost=True) if lost else found
        quarantined = quarantine_folder(self._stage_dir)
        if any(quarantined.glob("*.reason")):
            raise ValueError(
                f"{self._stage_dir} has no checkpoint that can be trusted, see the reasons in {quarantined}; put a "
                f"good copy into {self._folder}, or remove {self._stage_dir} to train that stage anew"
            )
        return None

    def _newest_whole(self) -> int:
        """The newest step whose files are as they were written; -1 if there is none."""
        for step in reversed(steps_of(self._stage_dir)):
            try:
                manifest.check(self._folder / str(step))
                read_meta(self._folder / str(step))
                return step
            except Damaged as error:
                self._distrust(step, error)
        return -1

    def _best_lost(self, meta: dict[str, Any]) -> bool:
        """Is the best step that a checkpoint names no longer one that could be handed on? Then it is said."""
        best, step = meta["best_step"], meta["step"]
        if best in (-1, step):
            return False
        if best in steps_of(self._stage_dir):
            try:
                manifest.check(self._folder / str(best))
                return False
            except Damaged as error:
                self._distrust(best, error)
        say(
            f"{self._stage_dir.name}: its best step so far, {best}, is lost: {self._folder / str(best)} is not there, "
            f"or not as it was saved. It goes on from step {step}, which is whole, and the best is chosen anew from "
            "there on",
            "yellow",
        )
        return True

    def _distrust(self, step: int, error: Damaged) -> None:
        if hosts.leads():
            kept = quarantine(self._folder / str(step), quarantine_folder(self._stage_dir), str(error))
            say(f"checkpoint {step} can't be trusted: {error}; moved to {kept}", "yellow")

    def save(
        self, step: int, state: TrainState, stopping: EarlyStoppingState, meta: dict[str, Any], best_step: int
    ) -> None:
        """Write in the background; how it went, `poll` and `wait` say.

        Raises:
            OSError: this save could not begin, or the one before has failed.
            Diverged: the one before had a parameter that is not finite, and was not taken.
        """
        self.wait()
        self._best.step = best_step
        small = jax.process_count() == 1 and sum(leaf.nbytes for leaf in jax.tree.leaves(state)) <= COPIED
        if small:
            state = jax.device_put(state, shardings_of(state), may_alias=False)
        self._meta = meta | {"format": FORMAT, "step": step, "best_step": best_step}
        leaves = _items(state, stopping)
        self._shapes = {} if self._proved else jax.tree.map(_shape_of, leaves)
        self._prints = (lambda: fingerprint(leaves)) if small else begin_fingerprint(leaves)  # copies may wait
        items = ocp.args.Composite(**{name: to_save(tree) for name, tree in leaves.items()})
        self._saving = step
        with self._as_storage_errors():
            if not small:
                self._take(items)
            self._done = self._thread.submit(self._finish, items if small else None)

    def _take(self, items: ocp.args.Composite) -> None:
        if not self._open().save(self._saving, args=items, force=True):
            raise OSError(f"checkpoint {self._saving} was not taken")

    def _finish(self, items: ocp.args.Composite | None) -> None:
        """The rest of a save, in its thread; with items, all of it."""
        if items is not None:
            self._take(items)
        manager = self._open()
        manager.wait_until_finished()
        manager.check_for_errors()
        if hosts.leads():
            # What Orbax wrote after the seal, and the name of the folder.
            for path in (*self._folder.glob(f"{self._saving}/*"), self._folder / str(self._saving), self._folder):
                sync(path)
            # Orbax moves what it deletes here, and leaves it.
            shutil.rmtree(self._folder / TRASH, ignore_errors=True)
        if not self._proved and jax.process_count() == 1:  # of several, Orbax would ask the others
            self._read_back()
        self._proved = True

    def _read_back(self) -> None:
        """Restore what was just saved, once in a run, and compare it: that files are as they were written says nothing
        of whether anything can be made of them. Of a large state only its smaller arrays.

        Raises:
            Damaged: it can't be read, or is something else.
        """
        folder = self._folder / str(self._saving)
        for name, tree in self._shapes.items():
            leaves = named_leaves(tree)
            sizes = {path: leaf.size * leaf.dtype.itemsize for path, leaf in leaves.items()}
            if name == "train" and sum(sizes.values()) > COPIED:
                continue
            few = {path: leaf for path, leaf in leaves.items() if sizes[path] <= PIECE}
            part = read(folder / name, tree) if name == "train" else read_in_parts(folder / name, tree_of(few))
            for path, digest in fingerprint({name: part}).digests.items():
                if digest != self._digests[path]:
                    raise Damaged(f"{folder}: {path} is not read back as it was saved")

    def poll(self) -> None:
        """Raises OSError if a save in the background has failed. Costs nothing otherwise."""
        if self._done is not None and self._done.done():
            self.wait()

    def wait(self) -> None:
        """Until the save in flight is on disk, under its name; raises OSError if it has failed."""
        done, self._done = self._done, None
        if done is not None:
            with self._as_storage_errors():
                done.result()

    def check_last(self, step: int) -> None:
        """Read the files of the last save back; raises OSError if it is not there as it was written."""
        self.wait()
        with self._as_storage_errors():
            if hosts.leads():
                manifest.check(self._folder / str(step))
        hosts.meet("the last save is checked")

    def _open(self) -> _Manager:
        """Orbax's manager, made at the first save: it takes what it finds in the folder for checkpoints."""
        if self._manager is None:
            options = ocp.CheckpointManagerOptions(
                preservation_policy=checkpoint_managers.AnyPreservationPolicy(
                    [checkpoint_managers.LatestN(self._keep), self._best]
                ),
                todelete_subdir=TRASH,  # a kill in the middle of a deletion leaves no half checkpoint in the list
                async_options=ocp.AsyncOptions(timeout_secs=600, post_finalization_callback=self._seal),
            )
            self._manager = _Manager(self._folder, options=options)
        return self._manager

    def _seal(self) -> None:
        """Orbax calls this, in a thread, before the rename: an error here leaves no checkpoint."""
        (fresh,) = self._folder.glob(f"{self._saving}.orbax-checkpoint-tmp*")
        prints = self._prints()
        if bad := [path for path in prints.not_finite if path.startswith(HANDED_ON)]:
            raise Diverged(
                f"step {self._saving} is not saved: {', '.join(bad)} is not finite; the one before it stands"
            )
        self._digests = prints.digests
        write_json(fresh / "meta" / "metadata", self._meta | {"fingerprint": prints.digests})
        manifest.seal(fresh)

    def _sweep(self) -> None:
        """Remove what a kill, or a failed save, left: unfinished checkpoints and deleted ones, no more than that."""
        for left in (*self._folder.glob("*.orbax-checkpoint-tmp*"), self._folder / TRASH):
            shutil.rmtree(left, ignore_errors=True)

    @contextlib.contextmanager
    def _as_storage_errors(self) -> Iterator[None]:
        """Orbax tells of a full disk by whatever TensorStore raised, a ValueError for one."""
        try:
            yield
        except Diverged:
            raise
        except Exception as error:
            raise OSError(f"{self._folder}: saving step {self._saving} failed: {str(error)[:300]}") from error

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if error is None:
                self.wait()
        finally:
            self._thread.shutdown()
            if self._manager is not None:
                with contextlib.suppress(Exception):  # it is told already: by wait, or by the error under way
                    self._manager.close()
            if hosts.leads():
                self._sweep()


def _shape_of(leaf: Any) -> Any:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding) if isinstance(leaf, jax.Array) else leaf


def _items(state: TrainState, stopping: EarlyStoppingState) -> dict[str, Any]:
    average = {"average": state.average} if state.average else {}
    return {"params": state.params, "train": _train_item(state, stopping)} | average


def _train_item(state: TrainState, stopping: EarlyStoppingState) -> dict[str, Any]:
    return {
        "opt_state": state.opt_state,
        "step": state.step,
        "guard": state.guard,
        "early_stopping": {name: np.asarray(value) for name, value in stopping._asdict().items()},
    }


def _restore(folder: Path, target: TrainState, stopping: EarlyStoppingState) -> Restored:
    """A checkpoint whose files are whole. Raises Damaged where its values differ, ValueError where it does not fit."""
    meta = read_meta(folder)
    wanted = _items(target, stopping)
    _compare(folder, meta["fingerprint"], wanted)
    items = {name: read_in_parts(folder / name, tree) for name, tree in wanted.items() if name != "train"}
    train = read(folder / "train", wanted["train"])
    found = fingerprint(items | {"train": train}).digests
    if found != meta["fingerprint"]:
        wrong = [path for path in found if found[path] != meta["fingerprint"][path]]
        raise Damaged(f"{folder} is damaged: {', '.join(wrong)} is not what was saved")
    scalars: list[Any] = [np.asarray(train["early_stopping"][name])[()] for name in EarlyStoppingState._fields]
    state = TrainState(train["step"], items["params"], train["opt_state"], train["guard"], items.get("average", ()))
    return Restored(state, EarlyStoppingState(*scalars), meta)


def read_params(stage_dir: Path, step: int, target: Params, item: str = "params") -> Params:
    """Only the parameters of a stage at `step`, placed as `target` (shapes with shardings) says.

    Args:
        item: "params", or "average", their moving average.

    Raises:
        Damaged: there is no such checkpoint, or it is not as it was saved.
        ValueError: its parameters have other shapes or dtypes.
    """
    folder = checkpoint_folder(stage_dir, step).absolute()
    manifest.check(folder)
    saved = {path: text for path, text in read_meta(folder)["fingerprint"].items() if path.startswith(f"{item}/")}
    _compare(folder, saved, {item: target})
    params = read_in_parts(folder / item, target)
    if fingerprint({item: params}).digests != saved:
        what = "parameters" if item == "params" else f"{item} parameters"
        raise Damaged(f"{folder} is damaged: its {what} are not what was saved")
    return params


def stored_params(meta: dict[str, Any], sharding: Sharding) -> Params:
    """The parameters in a checkpoint as shapes: what `read_params` needs where no recipe gives them."""
    found = {}
    for path, text in stored_shapes(meta).items():
        dtype, _, dims = text.removesuffix("]").partition("[")
        shape = tuple(int(dim) for dim in dims.split(", ") if dim)
        found[path] = jax.ShapeDtypeStruct(shape, np.dtype(dtype), sharding=sharding)
    return tree_of(found)


def _compare(folder: Path, saved: dict[str, str], target: Any) -> None:
    """Raises ValueError where shapes and dtypes of a checkpoint are not those of the recipe; nothing is read."""
    stored = {path: saved_kind(text) for path, text in saved.items()}
    wanted = {path: kind_of(leaf) for path, leaf in named_leaves(target).items()}
    lines = [
        f"{path}: checkpoint {stored[path]}, recipe {wanted[path]}"
        for path in sorted(stored.keys() & wanted)
        if stored[path] != wanted[path]
    ]
    lines += [f"{path}: only in the checkpoint" for path in sorted(stored.keys() - wanted)]
    lines += [f"{path}: only in the recipe" for path in sorted(wanted.keys() - stored)]
    if lines:
        what, field = ("adapters", "the stage's lora") if "/lora_" in "".join(lines) else ("model", "config.model")
        raise ValueError(
            f"{folder} does not fit the recipe's {what} ({'; '.join(lines)}); give {field} the values that "
            "it was trained with, or train from scratch in another --workdir"
        )
