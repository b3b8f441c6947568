"""What a compiled step sends between devices: read from the compiler's text, and from the model's sizes.

Bytes are those of the whole array that a device takes part with: what a gather gives, what a reduction starts from. Of
them a ring sends (n - 1) / n, an all-reduce twice that.

Legend: B batch, L length, D width, V vocab, H query heads, G key/value heads, K head dim, F feed-forward, N layers.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from jax.sharding import Mesh

from jaxstages.config import ModelConfig
from jaxstages.models.ops import ACTIVATIONS

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

SMALL = "vectors and numbers"
"""All arrays of at most one dim together: gradients of norms, sums."""

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_LINE = re.compile(r"^(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_CALLED = re.compile(r"(?:calls|to_apply|called_computations|branch_computations)=\{?%?([\w.\-, %]+)\}?")


class Collective(NamedTuple):
    """times: how often a step does it. source: the operation of ours that it comes from."""

    kind: str
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    times: int
    source: str

    @property
    def bytes(self) -> int:
        return self.times * sum(_BYTES[dtype] * math.prod(dims) for dtype, dims in self.shapes)


def collectives_of(text: str) -> list[Collective]:
    """The collectives of a compiled program, `compiled.as_text()`; those in a loop count as often as it turns."""
    program = _computations(text)
    entry = next(name for name, (is_entry, _) in program.items() if is_entry)
    found = list(_within(program, entry, 1))
    if any("async_collective_fusion" in name for name in program):
        found = list(dict.fromkeys(found))  # a TPU's program has one that is begun early in each of its parts
    return [one for _, one in found]


def total(found: list[Collective]) -> dict[str, int]:
    """Bytes of each kind; what has at most one dim is under `SMALL`."""
    sums: Counter[str] = Counter()
    for one in found:
        for dtype, dims in one.shapes:
            sums[one.kind if len(dims) > 1 else SMALL] += one.times * _BYTES[dtype] * math.prod(dims)
    return dict(sums)


_Program = dict[str, tuple[bool, list[str]]]


def _computations(text: str) -> _Program:
    found: _Program = {}
    lines: list[str] = []
    for line in text.splitlines():
        if not line.startswith(" ") and (head := _HEAD.match(line)):
            lines = []
            found[head.group(2)] = (bool(head.group(1)), lines)
        elif line.startswith("  "):
            lines.append(line.strip())
    return found


def _within(program: _Program, name: str, times: int) -> Iterator[tuple[str, Collective]]:
    """Each with its channel, or its own name where it has none."""
    types = {}
    for line in program[name][1]:
        if not (match := _LINE.match(line)):
            continue
        result, kind, operation, rest = match.groups()
        types[result] = kind
        plain = operation.removesuffix("-start")
        if plain in KINDS and not re.search(r"replica_groups=\{\{\d+\}|replica_groups=\[\d+,1\]", rest):
            channel = re.search(r"channel_id=\d+", rest)
            yield (
                channel.group() if channel else result,
                _collective(name, plain, operation != plain, kind, rest, types, times, line),
            )
        if operation == "while":
            body, condition = (re.search(rf"{word}=%?([\w.\-]+)", rest) for word in ("body", "condition"))
            assert body and condition, line
            yield from _within(program, body.group(1), times * _turns(program, condition.group(1), line))
        elif operation in ("fusion", "call", "conditional", "async-start"):
            for called in _CALLED.findall(rest):
                for inner in re.split(r", *%?", called):
                    if inner in program:
                        yield from _within(program, inner, times)


def _collective(
    where: str, kind: str, starts: bool, result: str, rest: str, types: dict[str, str], times: int, line: str
) -> Collective:
    operands = re.findall(r"%?([\w.\-]+)", rest.split(")")[0])
    given = "".join(types.get(operand, "") for operand in operands)
    if "all-reduce-scatter" in where:  # how a TPU's program has it
        kind = "reduce-scatter"
    shown = result if kind in ("all-gather", "all-to-all") else given or result
    arrays = [(dtype, _dims(dims)) for dtype, dims in _ARRAY.findall(shown) if dtype in _BYTES]
    if starts and kind == "all-gather":  # its result has the operands first
        arrays = arrays[len(arrays) // 2 :]
    source = re.search(r'op_name="([^"]*)"', line)
    return Collective(kind, tuple(arrays), times, source.group(1) if source else "")


def _dims(text: str) -> tuple[int, ...]:
    return tuple(int(dim) for dim in text.split(",") if dim)


def _turns(program: _Program, condition: str, line: str) -> int:
    """How often a loop turns: as the compiler says, or else the number that its condition compares with."""
    if known := re.search(r"known_trip_count[^\d]*(\d+)", line):
        return int(known.group(1))
    limits = [int(n) for inner in program[condition][1] for n in re.findall(r"constant\((\d+)\)", inner)]
    return max(limits, default=1)


def expected(
    config: ModelConfig, vocab: int, mesh: Mesh, batch: int, *, merges: bool, recomputes: bool = False
) -> list[tuple[str, str, int]]:
    """What a train step sends by theory, under the default rules: (what, kind, bytes).

    | fsdp    | kernels are gathered for the forward and again for the backward pass, gradients scattered (Rajbhandari
    |         | et al. 2020, ZeRO 3)
    | data    | gradients are summed
    | tensor  | activations are summed twice a layer and direction (Shoeybi et al. 2019)
    | context | keys and values are gathered, their gradients scattered
    | expert  | tokens are gathered, and what experts give is scattered, in both directions: without capacity no
    |         | all-to-all would be of a fixed size

    Args:
        merges: the compiler sums what several projections give back to one input once, and not each by itself.
        recomputes: activations are computed again for the backward pass: kernels are gathered for that as well.
    """
    data, fsdp, expert, context, tensor = (mesh.shape[a] for a in ("data", "fsdp", "expert", "context", "tensor"))
    part, wide, layers = config.attention, 2 if config.dtype == "bfloat16" else 4, config.layers
    others, rows = data * expert * context, batch // (data * fsdp * expert)
    hidden = rows * (config.context // context) * config.width * wide
    gates = ACTIVATIONS[config.activation].gated
    heads = part.heads + 2 * part.kv_heads
    mix = config.experts.count
    dense = (heads + part.heads) * part.head_dim * config.width
    if not mix:
        dense += (3 if gates else 2) * config.width * config.ff_width
    kernels = layers * dense * wide // tensor
    table = vocab * config.width // tensor
    heads_out = 1 if merges else 3
    # A mixture's kernels of one device's experts, and its router, which is float32.
    mixed = layers * 3 * mix * config.width * config.ff_width * wide // (expert * tensor)
    router = layers * config.width * mix * 4
    again = 3 if recomputes else 2
    found = [
        ("experts", "all-gather", again * mixed if fsdp > 1 else 0),
        ("router", "all-gather", again * router if fsdp * expert > 1 else 0),
        ("gradients of experts", "reduce-scatter", mixed if fsdp > 1 else 0),
        ("gradients of experts", "all-reduce", mixed // fsdp if data * context > 1 else 0),
        ("gradient of router", "reduce-scatter", router if fsdp * expert > 1 else 0),
        ("gradient of router", "all-reduce", router // (fsdp * expert) if data * context > 1 else 0),
    ]
    if mix and expert > 1:
        found += [
            ("tokens, to their experts", "all-gather", again * layers * hidden * expert),
            ("what experts give, and gradients", "reduce-scatter", again * layers * hidden * expert),
        ]
    if fsdp > 1:
        # What is added to the residual stream last is not computed again: nothing of the backward pass needs it.
        last = 0 if mix else layers * config.ff_width * config.width * wide // tensor
        found += [
            ("kernels", "all-gather", 3 * kernels - last if recomputes else 2 * kernels),
            ("head", "all-gather", table * wide),
            ("gradients of kernels", "reduce-scatter", kernels),
            ("tokens, to look up", "all-gather", rows * fsdp * (config.context // context) * 4),
            ("looked up embeddings, and back", "all-to-all", 2 * hidden),
        ]
    if others > 1:
        found += [
            ("gradients of kernels", "all-reduce", kernels // fsdp),
            ("gradient of embedding", "all-reduce", table // fsdp * wide),
        ]
    sums = [size for size in ((data * expert, context) if fsdp == 1 else (fsdp,)) if size > 1]
    found += [("gradient of head", "all-reduce", table * 4) for _ in sums]
    if fsdp > 1 and others > 1:
        found.append(("gradient of head, of each part", "all-reduce", table // fsdp * 4))
    if tensor > 1:
        passes = 2 * (2 if recomputes else 1)
        back = heads_out + (1 if mix or merges or not gates else 2)
        found += [
            ("outputs of attention and feed-forward", "all-reduce", passes * layers * hidden),
            ("gradients of their inputs", "all-reduce", back * layers * hidden),
            ("embeddings, and gradient of the last", "all-reduce", 2 * hidden),
            ("softmax over the split vocabulary", "all-reduce", 4 * rows * (config.context // context) * 4),
        ]
    if context > 1:
        keys = 2 * rows * config.context * part.kv_heads // tensor * part.head_dim * wide
        found += [
            ("keys and values", "all-gather", layers * keys),
            ("segments", "all-gather", rows * config.context * 4),
            ("gradients of keys and values", "reduce-scatter", layers * keys),
        ]
    return [one for one in found if one[2]]
