"""The mapping between a family's tensors and our stacked parameters. Values are only copied, never computed.

Legend: N layers, E experts, I inputs, O outputs.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from jaxstages.interop.families import IGNORED, Family, Row
from jaxstages.interop.tensors import CHUNK_BYTES, Entry, StoredTensor, read_rows

WRAPPED = r"(^|\.)(?:(?:_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.)+"
"""Parts of tensor names that wrappers of torch modules add."""

TEXT_NAMES = {
    "model.language_model.": "model.",
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
    "language_model.": "model.",
}
"""Prefixes of the text part's names in multimodal models, and those in a text model. The first that fits applies."""

TOKEN_ROWS = ("embedding", "head")
"""Parameters with a row per token, which can have more rows than the folder's tensor."""


class TensorSlot(NamedTuple):
    """A tensor of a model, and where its values belong in our stacked parameters.

    row: its row in the family's table.
    stack_index: layer and expert, which index the leading dims of our parameters; () if they are not stacked.
    """

    name: str
    row: Row
    stack_index: tuple[int, ...]


def tensor_slots(family: Family, shapes: dict[str, tuple[int, ...]]) -> list[TensorSlot]:
    """Return the tensors of a model, in the order of the family's table, layer by layer.

    Args:
        shapes: shape of each parameter, by path.

    Raises:
        ValueError: the family has no tensor for a parameter.
    """
    rows = [row for row in family.rows if all(part in shapes for part in row.parts)]
    covered = {part for row in rows for part in row.parts}
    if missing := sorted(shapes.keys() - covered):
        raise ValueError(f"{family.model_type} has no tensor for {', '.join(missing)}; train the model without them")

    single = [TensorSlot(row.name, row, ()) for row in rows if "{n}" not in row.name]
    stacked = [row for row in rows if "{n}" in row.name]
    layers = shapes[stacked[0].parts[0]][0] if stacked else 0
    in_layers = []
    for n in range(layers):
        for row in stacked:
            if "{e}" in row.name:
                experts = shapes[row.parts[0]][1]
                in_layers += [TensorSlot(row.name.format(n=n, e=e), row, (n, e)) for e in range(experts)]
            else:
                in_layers.append(TensorSlot(row.name.format(n=n), row, (n,)))
    return [*single[:1], *in_layers, *single[1:]]


def _flat(slot: TensorSlot, part: str, shapes: dict[str, tuple[int, ...]]) -> tuple[int, int]:
    """Return the inputs and outputs of one parameter in a tensor; a vector has 1 input."""
    dims = shapes[part][len(slot.stack_index) :]
    return math.prod(dims[: slot.row.inputs]), math.prod(dims[slot.row.inputs :])


def parts_of(slot: TensorSlot, shapes: dict[str, tuple[int, ...]]) -> Iterator[tuple[str, int, int]]:
    """Yield the parameters in a tensor, with the inputs and outputs of each."""
    for part in slot.row.parts:
        yield part, *_flat(slot, part, shapes)


def shape_of(slot: TensorSlot, shapes: dict[str, tuple[int, ...]]) -> tuple[int, ...]:
    """Return the shape of a tensor."""
    sizes = [_flat(slot, part, shapes) for part in slot.row.parts]
    inputs, outputs = sizes[0][0], sum(out for _, out in sizes)
    if not slot.row.inputs:
        return (outputs,)
    return (outputs, inputs) if slot.row.transposed else (inputs, outputs)


# Names ------------------------------------------------------------------------------------------------------------


def by_plain_names(stored: dict[str, StoredTensor], where: str) -> dict[str, StoredTensor]:
    """Remove what wrappers add to the names of tensors: torch.compile, data parallelism, a multimodal model.

    Raises:
        ValueError: two tensors get the same name.
    """
    tensors: dict[str, StoredTensor] = {}
    for name, tensor in stored.items():
        plain = re.sub(WRAPPED, r"\1", name)
        for prefix, replacement in TEXT_NAMES.items():
            if plain.startswith(prefix):
                plain = f"{replacement}{plain.removeprefix(prefix)}"
                break
        if plain in tensors:
            raise ValueError(f"{where} has {plain} twice, once as {name}; remove one of them")
        tensors[plain] = tensor
    return tensors


def match(
    slots: list[TensorSlot],
    shapes: dict[str, tuple[int, ...]],
    stored: dict[str, StoredTensor],
    tokens: int,
    where: str,
    parts: bool = False,
) -> dict[str, StoredTensor]:
    """Return the stored tensors by the names of the table; some folders leave out the prefix of all names.

    Args:
        tokens: rows of embedding and head in the folder.
        parts: the folder is that of a multimodal model, whose other tensors are ignored.

    Raises:
        ValueError: tensors are missing, unexpected, or of another shape; the message names them.
    """
    names = {slot.name for slot in slots}
    prefix = slots[0].name.split(".")[0] + "."
    if not any(name.startswith(prefix) for name in stored):
        stored = {f"{prefix}{name}" if f"{prefix}{name}" in names else name: value for name, value in stored.items()}

    unexpected = _unexpected(names, stored, parts)
    missing = sorted(names - stored.keys())
    if "lm_head.weight" in unexpected:
        head, embedding = stored["lm_head.weight"], stored.get(slots[0].name)
        if embedding is not None and _equal(head, embedding):  # a tied head that was saved nevertheless
            unexpected.remove("lm_head.weight")
    if missing and (before := _common_prefix(missing, stored.keys() - names)):
        raise ValueError(
            f"{where}: the names of its tensors begin with {before!r}, and would fit its config.json without it; save "
            "them without this prefix"
        )

    wrong = []
    for slot in slots:
        if slot.name in stored:
            shape = shape_of(slot, shapes)
            shape = (tokens, *shape[1:]) if slot.row.parts[0] in TOKEN_ROWS else shape
            if stored[slot.name].shape != shape:
                wrong.append(f"{slot.name} {list(stored[slot.name].shape)} instead of {list(shape)}")
    for fault, listed in (("lacks", missing), ("has unexpected", sorted(unexpected)), ("has", wrong)):
        if listed:
            more = f" and {len(listed) - 5} more" if len(listed) > 5 else ""
            raise ValueError(f"{where} does not fit its config.json: it {fault} {', '.join(listed[:5])}{more}")
    return stored


def _unexpected(names: set[str], stored: dict[str, StoredTensor], parts: bool) -> list[str]:
    """Return the names of stored tensors that the table does not have."""
    unexpected = [name for name in stored if name not in names and not any(re.search(p, name) for p in IGNORED)]
    if not parts:
        return unexpected
    text = {".".join(name.split(".")[:2]) for name in names}
    return [name for name in unexpected if ".".join(name.split(".")[:2]) in text or name.startswith("lm_head")]


def _common_prefix(missing: list[str], others: set[str]) -> str:
    """Return the prefix without which the other names would be all the missing ones; "" if there is none."""
    prefixes = {name.removesuffix(missing[0]) for name in others if name.endswith(missing[0])}
    return next((prefix for prefix in prefixes if all(f"{prefix}{name}" in others for name in missing)), "")


def _equal(first: StoredTensor, second: StoredTensor) -> bool:
    if first.shape != second.shape:
        return False
    chunks = zip(read_rows(first, 0, first.shape[0]), read_rows(second, 0, second.shape[0]), strict=False)
    return all(np.array_equal(rows, others) for (_, rows), (_, others) in chunks)


# Values -----------------------------------------------------------------------------------------------------------


def read_parameter(
    path: str,
    out: np.ndarray,
    slots: Iterable[TensorSlot],
    shapes: dict[str, tuple[int, ...]],
    stored: dict[str, StoredTensor],
    progress: Callable[[int], None],
) -> None:
    """Fill one parameter from its tensors, layer by layer. Rows that the folder lacks become the mean of its own.

    Args:
        progress: called with the number of values of each chunk.
    """
    for slot in slots:
        if path not in slot.row.parts:
            continue
        inputs, outputs = _flat(slot, path, shapes)
        before = slot.row.parts[: slot.row.parts.index(path)]
        first = sum(_flat(slot, part, shapes)[1] for part in before)
        source, target = stored[slot.name], out[slot.stack_index].reshape(inputs, outputs)
        assert np.shares_memory(target, out), path

        if slot.row.transposed:
            for start, rows_OI in read_rows(source, first, first + outputs):
                target[:, start - first : start - first + len(rows_OI)] = rows_OI.T
                progress(rows_OI.size)
        elif not slot.row.inputs:
            for start, values in read_rows(source, first, first + outputs):
                target[0, start - first : start - first + len(values)] = values
                progress(values.size)
        else:
            for start, rows_IO in read_rows(source, 0, min(source.shape[0], inputs)):
                target[start : start + len(rows_IO)] = rows_IO[:, first : first + outputs]
                progress(len(rows_IO) * outputs)
            if source.shape[0] < inputs:
                target[source.shape[0] :] = target[: source.shape[0]].mean(axis=0, dtype=np.float64)


def entries_of(slots: list[TensorSlot], leaves: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> list[Entry]:
    """Return the tensors to write.

    Args:
        leaves: parameters on the host, by path.
    """

    def pieces_of(slot: TensorSlot) -> Callable[[], Iterator[np.ndarray]]:
        def pieces() -> Iterator[np.ndarray]:
            parts = [leaves[part][slot.stack_index].reshape(_flat(slot, part, shapes)) for part in slot.row.parts]
            if not slot.row.inputs:
                yield np.concatenate([part[0] for part in parts])
            elif slot.row.transposed:
                for part_IO in parts:
                    step = max(CHUNK_BYTES // (4 * len(part_IO)), 1)
                    for start in range(0, part_IO.shape[1], step):
                        yield part_IO[:, start : start + step].T
            else:
                step = max(CHUNK_BYTES // (4 * sum(part.shape[1] for part in parts)), 1)
                for start in range(0, len(parts[0]), step):
                    yield np.concatenate([part[start : start + step] for part in parts], axis=1)

        return pieces

    return [Entry(slot.name, shape_of(slot, shapes), pieces_of(slot)) for slot in slots]
