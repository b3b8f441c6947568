"""Save, restore and verify checkpoints: named items (nested dicts of arrays) and JSON metadata, through Orbax.

Orbax notices neither a flipped bit in an array file nor a wrong dtype, takes an empty folder for a checkpoint, and
reports a failed save at the next one. So a checkpoint gets a manifest before its final name (`manifest.py`). Restoring
compares files with the manifest, then shapes and dtypes, then fingerprints of all leaves. The loop polls the save at
each step.

On disk, a checkpoint is renamed when it is complete. In a bucket, Orbax writes under the final name and adds a marker
object last; this module deletes old checkpoints itself, marker first. `staging.py` handles buckets that Orbax can't
write to.
"""

import contextlib
import os
import threading
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

from jaxstages.checkpoint.arrays import WRITE_CHUNK_BYTES, read, read_in_parts, to_save
from jaxstages.checkpoint.fingerprint import (
    Fingerprint,
    begin_fingerprint,
    fingerprint,
    kind_of,
    named_leaves,
    tree_of,
)
from jaxstages.checkpoint.metadata import FORMAT, read_meta, saved_kind, stored_shapes
from jaxstages.checkpoint.staging import is_staged, orbax_folder, publish, readable
from jaxstages.runtime import bucket, manifest, multihost
from jaxstages.runtime.bucket import is_bucket
from jaxstages.runtime.console import say
from jaxstages.runtime.cpu import lower_thread_priority
from jaxstages.runtime.files import make_folder, remove_tree, sync, write_json
from jaxstages.runtime.manifest import COMMITTED, Damaged, quarantine
from jaxstages.runtime.workdir import checkpoint_folder, checkpoints_folder, quarantine_folder, steps_of
from jaxstages.types import Diverged, Params

HANDED_ON = ("params/", "average/")
"""Path prefixes of the items that the next stage may start from."""

TRASH = "trash"

MAX_COPY_BYTES = 2**28
"""States up to this size are copied before they are saved, so that the loop continues while Orbax takes them over.
That takes about 50 ms for any size, longer than a small model's step. Not done with several processes, because Orbax
communicates."""

Items = dict[str, Any]
"""Name of an item -> nested dict of arrays."""

TRAINING = "train"
"""The item that is read only when a stage resumes. Other items are parameters, which are read in parts."""


class Restored(NamedTuple):
    """A restored checkpoint. best_lost: whether the best step so far no longer exists, or is damaged."""

    items: Items
    meta: dict[str, Any]
    best_lost: bool = False


class _KeepBest:
    """Orbax preservation policy that keeps the best step, which early stopping decides: Orbax's own `best_fn` deletes
    the true best on a NaN. In a bucket it keeps all: Orbax deletes objects in any order, and a kill would leave a part
    of a checkpoint that looks complete."""

    def __init__(self, all_steps: bool) -> None:
        self.step, self._all_steps = -1, all_steps

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        return [self._all_steps or checkpoint.step == self.step for checkpoint in checkpoints]


class _Manager(ocp.CheckpointManager):
    def reached_preemption(self, step: int) -> bool:
        """Return False instead of polling JAX at each save.

        Orbax polls with the number of its step, but JAX takes the number of the last poll for a process's progress, and
        `multihost.preemption_poll` counts differently: the processes would stop at different steps and wait for each
        other forever.
        """
        del step
        return False


SAVE_IN_FLIGHT = threading.Lock()
"""Locked from the start of a save to its end. Orbax counts the operations of saves by process, not by manager: two
stages that save at the same time would wait for each other forever."""


class Checkpoints:
    """The checkpoints of one stage: the latest `keep`, and the best. The caller must have the run's lock."""

    def __init__(self, stage_dir: Path, keep: int) -> None:
        self._stage_dir, self._keep = stage_dir, keep
        self._folder = checkpoints_folder(stage_dir).absolute()
        self._orbax_folder = orbax_folder(self._folder)
        self._best = _KeepBest(is_bucket(self._orbax_folder))
        self._manager: _Manager | None = None
        self._thread = ThreadPoolExecutor(1, "save", lower_thread_priority)
        self.saved_step = -1
        """Newest step that is on disk, as far as `poll` and `wait` have noticed; -1 if there is none."""

        # The save in flight.
        self._step = -1
        self._future: Future[None] | None = None
        self._meta: dict[str, Any] = {}
        self._fetch_fingerprint: Callable[[], Fingerprint]
        self._digests: dict[str, str] = {}

        # Whether a checkpoint was read back in this run; until then, the abstract arrays of the one to read.
        self._is_proven = False
        self._abstract_items: dict[str, Any] = {}

        if multihost.is_process_zero():
            make_folder(self._folder)
            self._remove_leftovers()
        multihost.barrier("checkpoints are swept")

    def restore_newest(self, target: Items) -> Restored | None:
        """Restore the newest undamaged checkpoint; None if the stage has none yet.

        Damaged checkpoints are moved to the stage's `quarantine/`. A damaged or missing best step is reported, but the
        newest one is restored all the same.

        Args:
            target: the items as abstract arrays (shape, dtype, sharding).

        Raises:
            ValueError: there are checkpoints, but none can be trusted, or one does not fit the recipe.
        """
        while True:
            step = multihost.broadcast_from_zero(self._newest_intact_step() if multihost.is_process_zero() else 0)
            if step < 0:
                break
            try:
                with readable(self._folder / str(step)) as folder:
                    restored = _restore(folder, target)
            except Damaged as error:
                self._quarantine(step, error)
                continue
            self._is_proven = True
            lost_on_zero = self._is_best_lost(restored.meta) if multihost.is_process_zero() else False
            best_lost = bool(multihost.broadcast_from_zero(int(lost_on_zero)))
            self._best.step = -1 if best_lost else restored.meta["best_step"]
            self.saved_step = step
            return restored._replace(best_lost=best_lost)

        quarantined = quarantine_folder(self._stage_dir)
        if any(quarantined.glob("*.reason")):
            raise ValueError(
                f"{self._stage_dir} has no checkpoint that can be trusted, see the reasons in {quarantined}; put a "
                f"good copy into {self._folder}, or remove {self._stage_dir} to train that stage anew"
            )
        return None

    def _newest_intact_step(self) -> int:
        """Return the newest step whose files are as they were written; -1 if there is none."""
        for step in reversed(steps_of(self._stage_dir)):
            try:
                manifest.check(self._folder / str(step))
                read_meta(self._folder / str(step))
                return step
            except Damaged as error:
                self._quarantine(step, error)
        return -1

    def _is_best_lost(self, meta: dict[str, Any]) -> bool:
        """Return, and report, whether the best step that a checkpoint names is missing or damaged."""
        best, step = meta["best_step"], meta["step"]
        if best in (-1, step):
            return False
        if best in steps_of(self._stage_dir):
            try:
                manifest.check(self._folder / str(best))
                return False
            except Damaged as error:
                self._quarantine(best, error)
        say(
            f"{self._stage_dir.name}: its best step so far, {best}, is lost: {self._folder / str(best)} is missing or "
            f"damaged. Training resumes from step {step}, which is intact; the best step is chosen again from there",
            "yellow",
        )
        return True

    def _quarantine(self, step: int, error: Damaged) -> None:
        if multihost.is_process_zero():
            target = quarantine(self._folder / str(step), quarantine_folder(self._stage_dir), str(error))
            say(f"checkpoint {step} can't be trusted: {error}; moved to {target}", "yellow")

    def compile_for(self, items: Items) -> None:
        """Compile the fingerprint of such items, which the first save would do in the middle of training."""
        fingerprint(items)

    def save(self, step: int, items: Items, meta: dict[str, Any], best_step: int) -> None:
        """Write a checkpoint in the background; `poll` and `wait` report its success.

        Raises:
            OSError: this save could not begin, or the one before has failed.
            Diverged: the one before had a parameter that is not finite, and was not saved.
        """
        self.wait()
        self._step, self._best.step = step, best_step
        self._meta = meta | {"format": FORMAT, "step": step, "best_step": best_step}

        is_small = jax.process_count() == 1 and sum(leaf.nbytes for leaf in jax.tree.leaves(items)) <= MAX_COPY_BYTES
        if is_small:
            items = jax.tree.map(_copy, items)
            self._fetch_fingerprint = lambda: fingerprint(items)  # later: the loop does not change copies
        else:
            self._fetch_fingerprint = begin_fingerprint(items)
        self._abstract_items = {} if self._is_proven else jax.tree.map(_abstract, items)

        arguments = ocp.args.Composite(**{name: to_save(tree) for name, tree in items.items()})
        with self._errors_as_os_error():
            if is_small:
                self._future = self._thread.submit(self._start_and_finish, arguments)
            else:
                self._start(arguments)
                self._future = self._thread.submit(self._finish)

    def _start(self, arguments: ocp.args.Composite) -> None:
        """Start a save, which `_finish` has to end."""
        SAVE_IN_FLIGHT.acquire()
        try:
            if not self._open_manager().save(self._step, args=arguments, force=True):
                raise OSError(f"checkpoint {self._step} was not taken")
        except BaseException:
            SAVE_IN_FLIGHT.release()
            raise

    def _start_and_finish(self, arguments: ocp.args.Composite) -> None:
        self._start(arguments)
        self._finish()

    def _finish(self) -> None:
        """Complete a save in its thread."""
        try:
            self._wait_for_orbax()
        finally:
            SAVE_IN_FLIGHT.release()

    def _wait_for_orbax(self) -> None:
        """Wait until the checkpoint is complete, durable and, once in a run, read back. Then delete older ones."""
        manager = self._open_manager()
        manager.wait_until_finished()
        manager.check_for_errors()

        folder = self._orbax_folder / str(self._step)
        if multihost.is_process_zero() and not is_bucket(folder):
            # Files that Orbax wrote after the manifest, and the name of the folder.
            for path in (*folder.iterdir(), folder, self._orbax_folder):
                sync(path)
            # Orbax moves deleted checkpoints here, and leaves them.
            remove_tree(self._orbax_folder / TRASH)

        if not self._is_proven and jax.process_count() == 1:  # with several processes, Orbax would communicate
            self._read_back()
        self._is_proven = True

        if is_staged(self._folder):
            publish(folder, self._folder / str(self._step))
        if multihost.is_process_zero() and is_bucket(self._folder):
            for step in steps_of(self._stage_dir)[: -self._keep]:
                if step != self._best.step:
                    bucket.remove(self._folder / str(step), first=(COMMITTED,))

    def _read_back(self) -> None:
        """Restore the checkpoint that was just saved and compare it, once in a run: intact files do not prove that a
        state can be restored from them. Of a large state only the smaller arrays are read.

        Raises:
            Damaged: it can't be read, or differs.
        """
        folder = self._orbax_folder / str(self._step)
        for name, tree in self._abstract_items.items():
            leaves = named_leaves(tree)
            sizes = {path: leaf.size * leaf.dtype.itemsize for path, leaf in leaves.items()}
            if name == TRAINING and sum(sizes.values()) > MAX_COPY_BYTES:
                continue
            small = {path: leaf for path, leaf in leaves.items() if sizes[path] <= WRITE_CHUNK_BYTES}
            part = read(folder / name, tree) if name == TRAINING else read_in_parts(folder / name, tree_of(small))
            for path, digest in fingerprint({name: part}).digests.items():
                if digest != self._digests[path]:
                    raise Damaged(f"{folder}: {path} is not read back as it was saved")

    def poll(self) -> None:
        """Raises OSError if a save in the background has failed. Costs nothing otherwise."""
        if self._future is not None and self._future.done():
            self.wait()

    def wait(self) -> None:
        """Wait until the save in flight is on disk under its final name. Raises OSError if it has failed."""
        future, self._future = self._future, None
        if future is not None:
            with self._errors_as_os_error():
                future.result()
            self.saved_step = self._step

    def check_last(self, step: int) -> None:
        """Compare the files of the last save with their manifest. Raises OSError if they differ."""
        self.wait()
        with self._errors_as_os_error():
            if multihost.is_process_zero():
                manifest.check(self._folder / str(step))
        multihost.barrier("the last save is checked")

    def _open_manager(self) -> _Manager:
        """Return Orbax's manager. It is made at the first save, since it takes everything in the folder for
        checkpoints."""
        if self._manager is None:
            options = ocp.CheckpointManagerOptions(
                preservation_policy=checkpoint_managers.AnyPreservationPolicy(
                    [checkpoint_managers.LatestN(self._keep), self._best]
                ),
                # A kill during a deletion leaves no half checkpoint in the list.
                todelete_subdir=None if is_bucket(self._orbax_folder) else TRASH,
                async_options=ocp.AsyncOptions(timeout_secs=600, post_finalization_callback=self._finalize),
            )
            self._manager = _Manager(os.fspath(self._orbax_folder), options=options)
        return self._manager

    def _finalize(self) -> None:
        """Write metadata and manifest. Orbax calls this in a thread before the rename, or the last object: after an
        error there is no checkpoint."""
        folder = self._orbax_folder / str(self._step)
        if not is_bucket(folder):
            (folder,) = self._orbax_folder.glob(f"{self._step}.orbax-checkpoint-tmp*")
        computed = self._fetch_fingerprint()
        if bad := [path for path in computed.not_finite if path.startswith(HANDED_ON)]:
            raise Diverged(f"step {self._step} is not saved: {', '.join(bad)} is not finite; the one before it stands")
        self._digests = computed.digests
        write_json(folder / "meta" / "metadata", self._meta | {"fingerprint": computed.digests})
        manifest.write_manifest(folder)

    def _remove_leftovers(self) -> None:
        """Remove what a kill, or a failed save, left: unfinished and deleted checkpoints, and local copies of published
        ones; nothing else."""
        leftovers = [*self._folder.glob("*.orbax-checkpoint-tmp*"), self._folder / TRASH]
        if is_staged(self._folder):
            remove_tree(self._orbax_folder)
        if is_bucket(self._folder):
            complete = {str(step) for step in steps_of(self._stage_dir)}
            leftovers = [path for path in self._folder.glob("*") if path.name.isdecimal() and path.name not in complete]
        for leftover in leftovers:
            remove_tree(leftover)

    @contextlib.contextmanager
    def _errors_as_os_error(self) -> Iterator[None]:
        """Raise errors of a save as OSError: for a full disk, Orbax raises whatever TensorStore did, such as
        ValueError."""
        try:
            yield
        except Diverged:
            raise
        except Exception as error:
            raise OSError(f"{self._folder}: saving step {self._step} failed: {str(error)[:300]}") from error

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if error is None:
                self.wait()
        finally:
            self._thread.shutdown()
            if self._manager is not None:
                with contextlib.suppress(Exception):  # `wait`, or the error being raised, has reported it
                    self._manager.close()
            if multihost.is_process_zero():
                # After an error, that error is raised; the next start removes what is left.
                with contextlib.suppress(Exception) if error else contextlib.nullcontext():
                    self._remove_leftovers()


def _abstract(leaf: Any) -> Any:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding) if isinstance(leaf, jax.Array) else leaf


def _copy(leaf: Any) -> Any:
    return jax.device_put(leaf, leaf.sharding, may_alias=False) if isinstance(leaf, jax.Array) else leaf


def _restore(folder: Path, target: Items) -> Restored:
    """Restore a checkpoint whose files are intact.

    Raises:
        Damaged: its values differ from those that were saved.
        ValueError: it does not fit `target`.
    """
    meta = read_meta(folder)
    _check_fits(folder, meta["fingerprint"], target)
    items = {name: read_in_parts(folder / name, tree) for name, tree in target.items() if name != TRAINING}
    items |= {name: read(folder / name, tree) for name, tree in target.items() if name == TRAINING}
    digests = fingerprint(items).digests
    if digests != meta["fingerprint"]:
        wrong = [path for path in digests if digests[path] != meta["fingerprint"][path]]
        raise Damaged(f"{folder} is damaged: {', '.join(wrong)} is not what was saved")
    return Restored(items, meta)


def read_params(stage_dir: Path, step: int, target: Params, item: str = "params") -> Params:
    """Read only the parameters of a stage at `step`.

    Args:
        target: the parameters as abstract arrays (shape, dtype, sharding).
        item: "params", or "average" for their moving average.

    Raises:
        Damaged: there is no such checkpoint, or it differs from the one that was saved.
        ValueError: its parameters have other shapes or dtypes.
    """
    folder = checkpoint_folder(stage_dir, step).absolute()
    manifest.check(folder)
    saved = {path: text for path, text in read_meta(folder)["fingerprint"].items() if path.startswith(f"{item}/")}
    _check_fits(folder, saved, {item: target})
    with readable(folder / item) as local:
        params = read_in_parts(local, target)
    if fingerprint({item: params}).digests != saved:
        name = "parameters" if item == "params" else f"{item} parameters"
        raise Damaged(f"{folder} is damaged: its {name} are not what was saved")
    return params


def stored_params(meta: dict[str, Any], sharding: Sharding) -> Params:
    """Return a checkpoint's parameters as abstract arrays, the `target` of `read_params` without a recipe."""
    leaves = {}
    for path, text in stored_shapes(meta).items():
        dtype, _, dims = text.removesuffix("]").partition("[")
        shape = tuple(int(dim) for dim in dims.split(", ") if dim)
        leaves[path] = jax.ShapeDtypeStruct(shape, np.dtype(dtype), sharding=sharding)
    return tree_of(leaves)


def _check_fits(folder: Path, saved: dict[str, str], target: Any) -> None:
    """Raises ValueError if a checkpoint has other shapes and dtypes than the recipe. No array is read."""
    stored = {path: saved_kind(text) for path, text in saved.items()}
    expected = {path: kind_of(leaf) for path, leaf in named_leaves(target).items()}
    differences = [
        f"{path}: checkpoint {stored[path]}, recipe {expected[path]}"
        for path in sorted(stored.keys() & expected)
        if stored[path] != expected[path]
    ]
    differences += [f"{path}: only in the checkpoint" for path in sorted(stored.keys() - expected)]
    differences += [f"{path}: only in the recipe" for path in sorted(expected.keys() - stored)]
    if differences:
        raise ValueError(
            f"{folder} does not fit the recipe ({'; '.join(differences)}); give config.model, and the stage's lora and "
            "optim, the values that it was trained with, or train from scratch in another --workdir"
        )
