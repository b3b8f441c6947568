"""Collectives of a compiled program, read from the compiler's text (HLO). jaxlib has no public API for them.

Bytes are those of the whole array that a device takes part with: the result of a gather, the operand of a reduction. A
ring sends (n - 1) / n of them, and twice that for an all-reduce.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

SMALL = "vectors and scalars"
"""All arrays of at most one dim together: gradients of norms, sums."""

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_LINE = re.compile(r"^(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_CALLED = re.compile(r"(?:calls|to_apply|called_computations|branch_computations)=\{?%?([\w.\-, %]+)\}?")
_ONE_DEVICE = re.compile(r"replica_groups=\{\{\d+\}|replica_groups=\[\d+,1\]")


class Collective(NamedTuple):
    """A collective operation of a step.

    shapes: dtype and dims of each array.
    times: executions per step.
    source: the JAX operation that it comes from.
    """

    kind: str
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    times: int
    source: str

    @property
    def bytes(self) -> int:
        return self.times * sum(_BYTES[dtype] * math.prod(dims) for dtype, dims in self.shapes)


def collectives_of(text: str) -> list[Collective]:
    """Return the collectives of a compiled program (`compiled.as_text()`), counting those in a loop once per turn."""
    program = _computations(text)
    entry = next(name for name, computation in program.items() if computation.is_entry)
    collectives = list(_within(program, entry, 1))
    if any("async_collective_fusion" in name for name in program):
        # A TPU's program repeats an asynchronous collective in each of its parts.
        collectives = list(dict.fromkeys(collectives))
    return [collective for _, collective in collectives]


def total(collectives: Iterable[Collective]) -> dict[str, int]:
    """Sum bytes by kind; arrays of at most one dim count as `SMALL`."""
    sums: Counter[str] = Counter()
    for collective in collectives:
        for dtype, dims in collective.shapes:
            kind = collective.kind if len(dims) > 1 else SMALL
            sums[kind] += collective.times * _BYTES[dtype] * math.prod(dims)
    return dict(sums)


class _Computation(NamedTuple):
    is_entry: bool
    lines: list[str]


_Program = dict[str, _Computation]


def _computations(text: str) -> _Program:
    """Split the text into its named computations."""
    program: _Program = {}
    lines: list[str] = []
    for line in text.splitlines():
        if not line.startswith(" ") and (head := _HEAD.match(line)):
            lines = []
            program[head.group(2)] = _Computation(bool(head.group(1)), lines)
        elif line.startswith("  "):
            lines.append(line.strip())
    return program


def _within(program: _Program, name: str, times: int) -> Iterator[tuple[str, Collective]]:
    """Yield the collectives of a computation and of those that it calls, each with its channel, or its own name if it
    has none."""
    types = {}
    for line in program[name].lines:
        if not (match := _LINE.match(line)):
            continue
        result, result_type, operation, arguments = match.groups()
        types[result] = result_type

        kind = operation.removesuffix("-start")
        if kind in KINDS and not _ONE_DEVICE.search(arguments):
            channel = re.search(r"channel_id=\d+", arguments)
            # TPU programs write a reduce-scatter as a fusion with this name.
            kind = "reduce-scatter" if "all-reduce-scatter" in name else kind
            arrays = _arrays(kind, operation.endswith("-start"), result_type, arguments, types)
            source = re.search(r'op_name="([^"]*)"', line)
            collective = Collective(kind, arrays, times, source.group(1) if source else "")
            yield channel.group() if channel else result, collective

        if operation == "while":
            body, condition = (re.search(rf"{word}=%?([\w.\-]+)", arguments) for word in ("body", "condition"))
            assert body and condition, line
            yield from _within(program, body.group(1), times * _trip_count(program, condition.group(1), line))
        elif operation in ("fusion", "call", "conditional", "async-start"):
            for called in _CALLED.findall(arguments):
                for inner in re.split(r", *%?", called):
                    if inner in program:
                        yield from _within(program, inner, times)


def _arrays(
    kind: str, starts: bool, result_type: str, arguments: str, types: dict[str, str]
) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Return dtype and dims of the arrays that a collective is counted by.

    Args:
        starts: the operation is the start of an asynchronous one.
        types: types of the results so far, which the operands are among.
    """
    operands = re.findall(r"%?([\w.\-]+)", arguments.split(")")[0])
    operand_types = "".join(types.get(operand, "") for operand in operands)
    counted = result_type if kind in ("all-gather", "all-to-all") else operand_types or result_type
    arrays = [(dtype, _dims(dims)) for dtype, dims in _ARRAY.findall(counted) if dtype in _BYTES]
    if starts and kind == "all-gather":  # the result is a tuple that begins with the operands
        arrays = arrays[len(arrays) // 2 :]
    return tuple(arrays)


def _dims(text: str) -> tuple[int, ...]:
    return tuple(int(dim) for dim in text.split(",") if dim)


def _trip_count(program: _Program, condition: str, line: str) -> int:
    """Return the turns of a loop: the compiler's count, or the constant that the loop's condition compares with."""
    if known := re.search(r"known_trip_count[^\d]*(\d+)", line):
        return int(known.group(1))
    limits = [int(n) for inner in program[condition].lines for n in re.findall(r"constant\((\d+)\)", inner)]
    return max(limits, default=1)
