"""Tensors of a family <-> our stacked parameters: copies only, nothing is computed.

Legend: N layers, E experts, I inputs, O outputs.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from jaxstages.interop.families import IGNORED, Family, Row
from jaxstages.interop.tensors import PIECE, Entry, Stored, read_rows

WRAPPED = r"(^|\.)(?:(?:_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.)+"
"""What wrappers of torch put into the names of tensors."""

TEXT_NAMES = {
    "model.language_model.": "model.",
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
    "language_model.": "model.",
}
"""How the names of a text part begin in models with more parts -> by itself. The first that fits counts."""

GROWS = ("embedding", "head")
"""Parameters with a row for each token, which may have more of them than the folder has."""


class Place(NamedTuple):
    """A tensor: what it is called, the row of the table, and where in our stacked parameters its values lie."""

    name: str
    row: Row
    at: tuple[int, ...]


def places_of(family: Family, shapes: dict[str, tuple[int, ...]]) -> list[Place]:
    """The tensors of a model whose parameters (by path) have these shapes, in the order of the table, layer by layer.

    Raises:
        ValueError: the family has no tensor for a parameter.
    """
    rows = [row for row in family.rows if all(part in shapes for part in row.parts)]
    covered = {part for row in rows for part in row.parts}
    if lost := sorted(shapes.keys() - covered):
        raise ValueError(f"{family.model_type} has no tensor for {', '.join(lost)}; train the model without them")
    once = [Place(row.name, row, ()) for row in rows if "{n}" not in row.name]
    stacked = [row for row in rows if "{n}" in row.name]
    layers = shapes[stacked[0].parts[0]][0] if stacked else 0
    found = []
    for n in range(layers):
        for row in stacked:
            if "{e}" in row.name:
                count = shapes[row.parts[0]][1]
                found += [Place(row.name.format(n=n, e=e), row, (n, e)) for e in range(count)]
            else:
                found.append(Place(row.name.format(n=n), row, (n,)))
    return [*once[:1], *found, *once[1:]]


def _flat(place: Place, part: str, shapes: dict[str, tuple[int, ...]]) -> tuple[int, int]:
    """Inputs and outputs of one part of a tensor; a vector has 1 input."""
    dims = shapes[part][len(place.at) :]
    return math.prod(dims[: place.row.inputs]), math.prod(dims[place.row.inputs :])


def parts_of(place: Place, shapes: dict[str, tuple[int, ...]]) -> Iterator[tuple[str, int, int]]:
    """Our parameters that lie in a tensor, with the inputs and outputs of each."""
    for part in place.row.parts:
        yield part, *_flat(place, part, shapes)


def shape_of(place: Place, shapes: dict[str, tuple[int, ...]]) -> tuple[int, ...]:
    """The tensor's shape."""
    sizes = [_flat(place, part, shapes) for part in place.row.parts]
    inputs, outputs = sizes[0][0], sum(out for _, out in sizes)
    if not place.row.inputs:
        return (outputs,)
    return (outputs, inputs) if place.row.transposed else (inputs, outputs)


def by_plain_names(stored: dict[str, Stored], where: str) -> dict[str, Stored]:
    """Tensors without what wrappers of a model put into their names (torch.compile, data parallelism, the text part of
    a model with more parts).

    Raises:
        ValueError: two tensors get one name.
    """
    found: dict[str, Stored] = {}
    for name, tensor in stored.items():
        plain = re.sub(WRAPPED, r"\1", name)
        for begin, instead in TEXT_NAMES.items():
            if plain.startswith(begin):
                plain = f"{instead}{plain.removeprefix(begin)}"
                break
        if plain in found:
            raise ValueError(f"{where} has {plain} twice, once as {name}; remove one of them")
        found[plain] = tensor
    return found


def match(
    places: list[Place],
    shapes: dict[str, tuple[int, ...]],
    stored: dict[str, Stored],
    tokens: int,
    where: str,
    parts: bool = False,
) -> dict[str, Stored]:
    """Tensors by the table's names; some folders leave out what all names begin with.

    Args:
        tokens: rows of embedding and head in the folder.
        parts: the folder has more than the text part, which is not expected here.

    Raises:
        ValueError: tensors are missing, unexpected, or of another shape; it names them.
    """
    names = {place.name for place in places}
    prefix = places[0].name.split(".")[0] + "."
    if not any(name.startswith(prefix) for name in stored):
        stored = {f"{prefix}{name}" if f"{prefix}{name}" in names else name: one for name, one in stored.items()}
    unexpected = [name for name in stored if name not in names and not any(re.search(p, name) for p in IGNORED)]
    if parts:
        ours = {".".join(name.split(".")[:2]) for name in names}
        unexpected = [
            name for name in unexpected if ".".join(name.split(".")[:2]) in ours or name.startswith("lm_head")
        ]
    missing = sorted(names - stored.keys())
    if "lm_head.weight" in unexpected:
        head, embedding = stored["lm_head.weight"], stored.get(places[0].name)
        if embedding is not None and _same(head, embedding):  # tied, and written out all the same
            unexpected.remove("lm_head.weight")
    if missing and (before := _common_prefix(missing, stored.keys() - names)):
        raise ValueError(
            f"{where}: the names of its tensors begin with {before!r}, which is all that keeps them from those of its "
            "config.json; save them without it"
        )
    wrong = []
    for place in places:
        if place.name in stored:
            wanted = shape_of(place, shapes)
            wanted = (tokens, *wanted[1:]) if place.row.parts[0] in GROWS else wanted
            if stored[place.name].shape != wanted:
                wrong.append(f"{place.name} {list(stored[place.name].shape)} instead of {list(wanted)}")
    for what, listed in (("lacks", missing), ("has unexpected", sorted(unexpected)), ("has", wrong)):
        if listed:
            more = f" and {len(listed) - 5} more" if len(listed) > 5 else ""
            raise ValueError(f"{where} does not fit its config.json: it {what} {', '.join(listed[:5])}{more}")
    return stored


def _common_prefix(missing: list[str], others: set[str]) -> str:
    """What must be taken from the other names to make them the missing; "" if that is not all."""
    before = {name.removesuffix(missing[0]) for name in others if name.endswith(missing[0])}
    return next((prefix for prefix in before if all(f"{prefix}{name}" in others for name in missing)), "")


def _same(one: Stored, other: Stored) -> bool:
    if one.shape != other.shape:
        return False
    pairs = zip(read_rows(one, 0, one.shape[0]), read_rows(other, 0, other.shape[0]), strict=False)
    return all(np.array_equal(mine[1], theirs[1]) for mine, theirs in pairs)


def read_parameter(
    path: str,
    out: np.ndarray,
    places: Iterable[Place],
    shapes: dict[str, tuple[int, ...]],
    stored: dict[str, Stored],
    progress: Callable[[int], None],
) -> None:
    """Fill one of our parameters, a layer (and an expert) after the other. Rows beyond those of the folder are the mean
    of its own.

    Args:
        progress: told of the values read, each time.
    """
    for place in places:
        if path not in place.row.parts:
            continue
        inputs, outputs = _flat(place, path, shapes)
        before = place.row.parts[: place.row.parts.index(path)]
        first = sum(_flat(place, part, shapes)[1] for part in before)
        source, target = stored[place.name], out[place.at].reshape(inputs, outputs)
        assert np.shares_memory(target, out), path
        if place.row.transposed:
            for start, rows_OI in read_rows(source, first, first + outputs):
                target[:, start - first : start - first + len(rows_OI)] = rows_OI.T
                progress(rows_OI.size)
        elif not place.row.inputs:
            for start, values in read_rows(source, first, first + outputs):
                target[0, start - first : start - first + len(values)] = values
                progress(values.size)
        else:
            for start, rows_IO in read_rows(source, 0, min(source.shape[0], inputs)):
                target[start : start + len(rows_IO)] = rows_IO[:, first : first + outputs]
                progress(len(rows_IO) * outputs)
            if source.shape[0] < inputs:
                target[source.shape[0] :] = target[: source.shape[0]].mean(axis=0, dtype=np.float64)


def entries_of(places: list[Place], leaves: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> list[Entry]:
    """The tensors as they are to be written. leaves: parameters on the host, by path."""

    def pieces_of(place: Place) -> Callable[[], Iterator[np.ndarray]]:
        def pieces() -> Iterator[np.ndarray]:
            parts = [leaves[part][place.at].reshape(_flat(place, part, shapes)) for part in place.row.parts]
            if not place.row.inputs:
                yield np.concatenate([part[0] for part in parts])
            elif place.row.transposed:
                for part_IO in parts:
                    step = max(PIECE // (4 * len(part_IO)), 1)
                    for start in range(0, part_IO.shape[1], step):
                        yield part_IO[:, start : start + step].T
            else:
                step = max(PIECE // (4 * sum(part.shape[1] for part in parts)), 1)
                for start in range(0, len(parts[0]), step):
                    yield np.concatenate([part[start : start + step] for part in parts], axis=1)

        return pieces

    return [Entry(place.name, shape_of(place, shapes), pieces_of(place)) for place in places]
