"""Checkpoints, through Orbax: params/, train/ (optimizer, step, early stopping) and meta (JSON), and proof of them.

Orbax notices neither a wrong dtype nor a flipped bit in an array file, and its error for a tree that does not fit says
nothing. So shapes and dtypes are compared before anything is read, and fingerprints of all leaves afterwards.
"""

import hashlib
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from jaxstages.early_stopping import EarlyStoppingState
from jaxstages.types import Params, TrainState
from jaxstages.workdir import checkpoints_folder, read_json

TRASH = "trash"


class Restored(NamedTuple):
    state: TrainState
    stopping: EarlyStoppingState
    meta: dict[str, Any]


class _KeepBest:
    """Orbax's preservation policy: the best step stays. Which one it is, early stopping says: Orbax's own `best_fn`
    deletes the true best on a NaN."""

    def __init__(self) -> None:
        self.step = -1

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        return [checkpoint.step == self.step for checkpoint in checkpoints]


class Checkpoints:
    """The checkpoints of one stage: the latest `keep`, and the best."""

    def __init__(self, stage_dir: Path, keep: int) -> None:
        self._best = _KeepBest()
        self._folder = checkpoints_folder(stage_dir).absolute()
        policy = checkpoint_managers.AnyPreservationPolicy([checkpoint_managers.LatestN(keep), self._best])
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policy,
            cleanup_tmp_directories=True,
            todelete_subdir=TRASH,  # a kill in the middle of a deletion leaves no half checkpoint in the list
            async_options=ocp.AsyncOptions(timeout_secs=600),
        )
        self._manager = ocp.CheckpointManager(self._folder, options=options)

    def steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def save(
        self, step: int, state: TrainState, stopping: EarlyStoppingState, meta: dict[str, Any], best_step: int
    ) -> None:
        """Write in the background; an error of the save before is raised here as an OSError."""
        self.wait()
        self._best.step = best_step
        train = {"opt_state": state.opt_state, "step": state.step, "early_stopping": _arrays(stopping)}
        meta = meta | {"step": step, "best_step": best_step, "fingerprint": fingerprint([state, stopping])}
        items = ocp.args.Composite(
            params=ocp.args.StandardSave(state.params),
            train=ocp.args.StandardSave(train),
            meta=ocp.args.JsonSave(meta),
        )
        with self._as_storage_errors():
            if not self._manager.save(step, args=items, force=True):
                raise OSError(f"checkpoint {step} was not taken")

    def restore(self, step: int, target: TrainState, stopping: EarlyStoppingState) -> Restored:
        """Everything at `step`, placed as `target` (shapes with shardings) says.

        Raises:
            ValueError: the checkpoint does not fit, or what is read is not what was saved.
        """
        _compare(self._folder / str(step) / "params", target.params)
        train = {"opt_state": target.opt_state, "step": target.step, "early_stopping": _arrays(stopping)}
        found: Any = self._manager.restore(  # Orbax's union also has a Mapping, which has no attributes
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardRestore(target.params),
                train=ocp.args.StandardRestore(train),
                meta=ocp.args.JsonRestore(),
            ),
        )
        state = TrainState(found.train["step"], found.params, found.train["opt_state"])
        saved = found.train["early_stopping"]
        scalars: list[Any] = [np.asarray(saved[name])[()] for name in EarlyStoppingState._fields]
        restored = EarlyStoppingState(*scalars)
        if fingerprint([state, restored]) != found.meta["fingerprint"]:
            raise ValueError(
                f"{self._folder / str(step)} is damaged: its values are not those that were saved; move that folder "
                "away to go on from the checkpoint before it"
            )
        self._best.step = found.meta["best_step"]
        return Restored(state, restored, found.meta)

    def wait(self) -> None:
        """Until the save in flight is on disk; its error, if it has one, is raised here as an OSError."""
        with self._as_storage_errors():
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
        # Orbax moves what it deletes here, and leaves it.
        shutil.rmtree(self._folder / TRASH, ignore_errors=True)

    @contextmanager
    def _as_storage_errors(self) -> Iterator[None]:
        """Orbax tells of a full disk by whatever TensorStore raised, a ValueError for one."""
        try:
            yield
        except Exception as error:
            raise OSError(f"{self._folder}: saving failed: {str(error)[:300]}") from error

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            self.wait()
        self._manager.close()


def _arrays(stopping: EarlyStoppingState) -> dict[str, np.ndarray]:
    return {name: np.asarray(value) for name, value in stopping._asdict().items()}


def read_meta(stage_dir: Path, step: int) -> dict[str, Any]:
    """Raises ValueError if that checkpoint, or its metadata, is not there."""
    return read_json(checkpoints_folder(stage_dir) / str(step) / "meta" / "metadata")


def read_params(stage_dir: Path, step: int, target: Params) -> Params:
    """Only the parameters at `step`, placed as `target` (shapes with shardings) says.

    Raises:
        ValueError: there is no such checkpoint, or its parameters have other shapes or dtypes.
    """
    folder = (checkpoints_folder(stage_dir) / str(step) / "params").absolute()
    if not folder.is_dir():
        raise ValueError(f"{folder.parent} has no parameters; is {stage_dir} a stage that was trained?")
    _compare(folder, target)
    with ocp.StandardCheckpointer() as checkpointer:
        try:
            return checkpointer.restore(folder, target)
        except Exception as error:  # Orbax has no type of its own for what can't be read
            raise ValueError(f"{folder.parent} is damaged, Orbax can't read it: {str(error)[:200]}") from error


def stored_shapes(folder: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Path -> (shape, dtype) of each parameter in a checkpoint's params folder; no array is read."""
    with ocp.StandardCheckpointer() as checkpointer:
        metadata = checkpointer.metadata(folder).item_metadata
    if metadata is None:
        raise ValueError(f"{folder.parent} is damaged, its metadata can't be read; train that stage again")
    tree = metadata.tree
    return {path: (tuple(leaf.shape), np.dtype(leaf.dtype).name) for path, leaf in _named(tree)}


def _named(tree: Any) -> list[tuple[str, Any]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return sorted((jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in leaves)


def _compare(folder: Path, target: Params) -> None:
    stored = stored_shapes(folder)
    wanted = {path: (tuple(leaf.shape), np.dtype(leaf.dtype).name) for path, leaf in _named(target)}
    lines = [
        f"{path}: checkpoint {stored[path]}, recipe {wanted[path]}"
        for path in sorted(stored.keys() & wanted)
        if stored[path] != wanted[path]
    ]
    lines += [f"{path}: only in the checkpoint" for path in sorted(stored.keys() - wanted)]
    lines += [f"{path}: only in the recipe" for path in sorted(wanted.keys() - stored)]
    if lines:
        raise ValueError(
            f"{folder.parent} does not fit the recipe's model ({'; '.join(lines)}); give config.model the values that "
            "it was trained with, or train from scratch in another --workdir"
        )


def params_sha256(params: Params) -> str:
    """SHA-256 over the parameters' bytes, in sorted order of their paths."""
    digest = hashlib.sha256()
    for path, leaf in _named(params):
        digest.update(path.encode())
        digest.update(np.ascontiguousarray(jax.device_get(leaf)).tobytes())
    return digest.hexdigest()


@jax.jit
def _leaf_print(x: jax.Array) -> jax.Array:
    """Two 32-bit sums over a leaf's bits and places. Integer sums do not depend on their order, so the value is the
    same on any mesh, and nothing is gathered."""
    word = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(x, word).astype(jnp.uint32)
    place, stride = jnp.zeros(bits.shape, jnp.uint32), 1
    for dim in reversed(range(bits.ndim)):
        place += jax.lax.broadcasted_iota(jnp.uint32, bits.shape, dim) * jnp.uint32(stride % 2**32)
        stride *= bits.shape[dim]
    odd = jnp.sum(bits * (jnp.uint32(2) * place + jnp.uint32(1)), dtype=jnp.uint32)
    mixed = place * jnp.uint32(0x85EBCA6B) | jnp.uint32(1)
    return jnp.stack([odd, jnp.sum((bits + place * jnp.uint32(0x9E3779B1)) * mixed, dtype=jnp.uint32)])


def fingerprint(tree: Any) -> str:
    """A digest of all leaves of a tree (paths, shapes, dtypes, values), the same on any mesh."""
    digest = hashlib.sha256()
    for path, leaf in _named(tree):
        words = np.asarray(_leaf_print(leaf) if isinstance(leaf, jax.Array) else leaf)
        digest.update(f"{path}:{leaf.dtype}:{leaf.shape}".encode() + words.tobytes())
    return digest.hexdigest()
