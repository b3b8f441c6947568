"""Save, restore and verify checkpoints: named items (nested dicts of arrays) and JSON metadata, through Orbax.

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

from jaxstages.checkpoint.arrays import PIECE, read, read_in_parts, to_save
from jaxstages.checkpoint.fingerprint import (
    Fingerprint,
    begin_fingerprint,
    fingerprint,
    kind_of,
    named_leaves,
    tree_of,
)
from jaxstages.checkpoint.metadata import FORMAT, read_meta, saved_kind, stored_shapes
from jaxstages.runtime import manifest, multihost
from jaxstages.runtime.console import say
from jaxstages.runtime.cpu_tuning import lower_thread_priority
from jaxstages.runtime.files import make_folder, sync, write_json
from jaxstages.runtime.manifest import Damaged, quarantine
from jaxstages.runtime.workdir import checkpoint_folder, checkpoints_folder, quarantine_folder, steps_of
from jaxstages.types import Diverged, Params

HANDED_ON = ("params/", "average/")
"""Items that the next stage may start from, as the first part of their paths."""

TRASH = "trash"

COPIED = 2**28
"""Bytes of a state that is copied to be saved, so that the loop goes on while Orbax takes it over, which takes some
50 ms whatever the size: longer than a small model's step. Not with several processes, where Orbax asks the others."""


Items = dict[str, Any]
"""Name of an item -> nested dict of arrays."""

TRAINING = "train"
"""The item that only resuming reads. Others are parameters, which are read in parts."""


class Restored(NamedTuple):
    """best_lost: the best step so far no longer exists, or is damaged."""

    items: Items
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
        far a process is, and `multihost.preemption_poll` counts otherwise: the processes would stop at different
        places, and wait for each other for ever."""
        del step
        return False


class Checkpoints:
    """The checkpoints of one stage: the latest `keep`, and the best. The run's lock must be held."""

    def __init__(self, stage_dir: Path, keep: int) -> None:
        self._stage_dir, self._keep, self._best = stage_dir, keep, _KeepBest()
        self._folder = checkpoints_folder(stage_dir).absolute()
        self._saving = -1
        self._thread = ThreadPoolExecutor(1, "save", lower_thread_priority)
        self._done: Future[None] | None = None
        self._meta: dict[str, Any] = {}
        self._prints: Callable[[], Fingerprint]
        self._manager: _Manager | None = None
        self._proved = False
        self._shapes: dict[str, Any] = {}
        self._digests: dict[str, str] = {}
        if multihost.is_process_zero():
            make_folder(self._folder)
            self._sweep()
        multihost.barrier("checkpoints are swept")

    def restore_newest(self, target: Items) -> Restored | None:
        """Restore the newest undamaged checkpoint; None if the stage has none yet.

        Damaged checkpoints are moved to the stage's `quarantine/`. A damaged or missing best step is reported, and does
        not condemn the newest one.

        Args:
            target: the items as abstract arrays (shape, dtype, sharding).

        Raises:
            ValueError: there are checkpoints, but none can be trusted, or one does not fit the recipe.
        """
        while (step := multihost.broadcast_from_zero(self._newest_whole() if multihost.is_process_zero() else 0)) >= 0:
            try:
                restored = _restore(self._folder / str(step), target)
            except Damaged as error:
                self._distrust(step, error)
            else:
                self._proved = True
                lost = bool(
                    multihost.broadcast_from_zero(
                        int(self._best_lost(restored.meta)) if multihost.is_process_zero() else 0
                    )
                )
                self._best.step = -1 if lost else restored.meta["best_step"]
                return restored._replace(best_lost=lost)
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
        if multihost.is_process_zero():
            kept = quarantine(self._folder / str(step), quarantine_folder(self._stage_dir), str(error))
            say(f"checkpoint {step} can't be trusted: {error}; moved to {kept}", "yellow")

    def compile_for(self, items: Items) -> None:
        """Compile the fingerprint of such items, which the first save would do in the middle of training."""
        fingerprint(items)

    def save(self, step: int, items: Items, meta: dict[str, Any], best_step: int) -> None:
        """Write a checkpoint in the background; `poll` and `wait` report how it went.

        Raises:
            OSError: this save could not begin, or the one before has failed.
            Diverged: the one before had a parameter that is not finite, and was not taken.
        """
        self.wait()
        self._best.step = best_step
        small = jax.process_count() == 1 and sum(leaf.nbytes for leaf in jax.tree.leaves(items)) <= COPIED
        if small:
            items = jax.tree.map(_copy, items)
        self._meta = meta | {"format": FORMAT, "step": step, "best_step": best_step}
        self._shapes = {} if self._proved else jax.tree.map(_shape_of, items)
        self._prints = (lambda: fingerprint(items)) if small else begin_fingerprint(items)  # copies may wait
        arguments = ocp.args.Composite(**{name: to_save(tree) for name, tree in items.items()})
        self._saving = step
        with self._as_storage_errors():
            if not small:
                self._take(arguments)
            self._done = self._thread.submit(self._finish, arguments if small else None)

    def _take(self, arguments: ocp.args.Composite) -> None:
        if not self._open().save(self._saving, args=arguments, force=True):
            raise OSError(f"checkpoint {self._saving} was not taken")

    def _finish(self, arguments: ocp.args.Composite | None) -> None:
        """Complete a save, in its thread; with `arguments` all of it."""
        if arguments is not None:
            self._take(arguments)
        manager = self._open()
        manager.wait_until_finished()
        manager.check_for_errors()
        if multihost.is_process_zero():
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
            if name == TRAINING and sum(sizes.values()) > COPIED:
                continue
            few = {path: leaf for path, leaf in leaves.items() if sizes[path] <= PIECE}
            part = read(folder / name, tree) if name == TRAINING else read_in_parts(folder / name, tree_of(few))
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
            if multihost.is_process_zero():
                manifest.check(self._folder / str(step))
        multihost.barrier("the last save is checked")

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
        manifest.write_manifest(fresh)

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
            if multihost.is_process_zero():
                self._sweep()


def _shape_of(leaf: Any) -> Any:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding) if isinstance(leaf, jax.Array) else leaf


def _copy(leaf: Any) -> Any:
    return jax.device_put(leaf, leaf.sharding, may_alias=False) if isinstance(leaf, jax.Array) else leaf


def _restore(folder: Path, target: Items) -> Restored:
    """Restore a checkpoint whose files are whole.

    Raises:
        Damaged: its values are not those that were saved.
        ValueError: it does not fit `target`.
    """
    meta = read_meta(folder)
    _compare(folder, meta["fingerprint"], target)
    items = {name: read_in_parts(folder / name, tree) for name, tree in target.items() if name != TRAINING}
    items |= {name: read(folder / name, tree) for name, tree in target.items() if name == TRAINING}
    digests = fingerprint(items).digests
    if digests != meta["fingerprint"]:
        wrong = [path for path in digests if digests[path] != meta["fingerprint"][path]]
        raise Damaged(f"{folder} is damaged: {', '.join(wrong)} is not what was saved")
    return Restored(items, meta)


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
    """Return a checkpoint's parameters as abstract arrays, the `target` of `read_params` where no recipe gives them."""
    leaves = {}
    for path, text in stored_shapes(meta).items():
        dtype, _, dims = text.removesuffix("]").partition("[")
        shape = tuple(int(dim) for dim in dims.split(", ") if dim)
        leaves[path] = jax.ShapeDtypeStruct(shape, np.dtype(dtype), sharding=sharding)
    return tree_of(leaves)


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
        raise ValueError(
            f"{folder} does not fit the recipe ({'; '.join(lines)}); give config.model, and the stage's lora and "
            "optim, the values that it was trained with, or train from scratch in another --workdir"
        )
