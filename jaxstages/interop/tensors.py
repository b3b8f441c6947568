"""Safetensors by pieces: what a folder has, its values a few MB at a time, and folders of shards written the same way.

The library's reader maps whole files into memory (which counts as the process's own) and has no bfloat16 for numpy;
here at most `PIECE` bytes of a tensor are held at once. The format: 8 bytes, little-endian, of the header's length; the
header, a JSON object {name: {"dtype", "shape", "data_offsets"}}; the values.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from jaxstages.runtime.files import put, read_json, sync, write_json

PIECE = 2**24
"""Bytes that are read or written at once."""

DTYPES = {"F32": np.dtype(np.float32), "BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16)}
LONGEST_HEADER = 100_000_000
"""Bytes; the library's own limit."""

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


class Stored(NamedTuple):
    """Where a tensor lies. start: in the file, bytes."""

    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int


def open_folder(folder: Path) -> dict[str, Stored]:
    """Every tensor of a folder, by name; only headers are read. `model.safetensors` comes before an index beside it, as
    it does for transformers.

    Raises:
        ValueError: no safetensors there, or files that are not whole.
    """
    index = folder / INDEX
    if index.is_file() and not (folder / SINGLE).is_file():
        content = read_json(index, {"weight_map": (dict,)})["weight_map"]
        names = sorted({str(name) for name in content.values()})
        if bad := [name for name in names if Path(name).name != name]:
            raise ValueError(f"{index} names {bad[0]!r}, which is no file beside it")
    else:
        content, names = None, [SINGLE]
    found: dict[str, Stored] = {}
    for name in names:
        file = folder / name
        if not file.is_file():
            raise ValueError(f"{folder} has no {name}; {_instead(folder)}")
        found |= header_of(file)
    if content is not None and (odd := sorted(content.keys() ^ found)):
        raise ValueError(f"{index} and its files differ in {', '.join(odd[:5])}; fetch the folder anew")
    return found


def unread_of(folder: Path) -> list[str]:
    """Other weights that lie in a folder beside those that `open_folder` reads."""
    index = [INDEX] if (folder / SINGLE).is_file() and (folder / INDEX).is_file() else []
    others = ("consolidated*.safetensors", "pytorch_model*.bin")
    return index + [path.name for kind in others for path in sorted(folder.glob(kind))]


def _instead(folder: Path) -> str:
    pickles = [path.name for kind in ("*.bin", "*.pt", "*.pth") for path in sorted(folder.glob(kind))]
    if pickles:
        return (
            f"{pickles[0]} is a pickle, which runs code of whoever made it when it is read, and is never opened here: "
            "take the safetensors of that model, or let someone who trusts it convert it"
        )
    return "name a folder with config.json and safetensors"


def header_of(file: Path) -> dict[str, Stored]:
    """The tensors of one file. Raises ValueError where it is not whole."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if not 2 <= length <= min(LONGEST_HEADER, size - 8):
            raise ValueError(f"{file} is no safetensors file, or cut short")
        try:
            listed = json.loads(opened.read(length))
            return {
                name: _stored(file, entry, 8 + length, size) for name, entry in listed.items() if name != "__metadata__"
            }
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{file} has a header that can't be read: {error}") from error


def _stored(file: Path, entry: dict[str, Any], first: int, size: int) -> Stored:
    kind, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    if kind not in DTYPES:
        return Stored(file, np.dtype(np.void), shape, 0)  # it may be one that nobody asks for
    if not all(type(number) is int and number >= 0 for number in (*shape, start, stop)):
        raise ValueError("sizes that are no numbers")
    if stop - start != math.prod(shape) * DTYPES[kind].itemsize or first + stop > size:
        raise ValueError("offsets that do not fit its shapes, or reach beyond its end")
    return Stored(file, DTYPES[kind], shape, first + start)


def read_rows(stored: Stored, start: int, stop: int) -> Iterator[tuple[int, np.ndarray]]:
    """Rows (of the first dim) from `start` to `stop`, in pieces as float32: where each begins, and the rows."""
    if stored.dtype == np.void:
        raise ValueError(f"{stored.file} holds a tensor that is none of {', '.join(DTYPES)}; supported are these")
    width = math.prod(stored.shape[1:])
    bytes_a_row = width * stored.dtype.itemsize
    rows = max(PIECE // max(bytes_a_row, 1), 1)
    with stored.file.open("rb", buffering=0) as file:
        for first in range(start, stop, rows):
            last = min(first + rows, stop)
            buffer = bytearray((last - first) * bytes_a_row)
            file.seek(stored.start + first * bytes_a_row)
            view, got = memoryview(buffer), 0
            while got < len(buffer):
                more = file.readinto(view[got:])
                if not more:
                    raise ValueError(f"{stored.file} is cut short")
                got += more
            yield first, np.frombuffer(buffer, stored.dtype).reshape(last - first, *stored.shape[1:]).astype(np.float32)


class Entry(NamedTuple):
    """A tensor to write. pieces: makes its values one after the other, float32, when it is its turn."""

    name: str
    shape: tuple[int, ...]
    pieces: Callable[[], Iterable[np.ndarray]]


def write_shards(
    folder: Path, entries: list[Entry], dtype: str, most_bytes: int, progress: Callable[[int], None]
) -> list[str]:
    """`model.safetensors`, or shards of at most `most_bytes` (a larger tensor has one of its own) with their index; the
    names of the files. Each gets its name when it is whole.

    Args:
        dtype: "F32" or "BF16".
        progress: told of the bytes written.
    """
    size = DTYPES[dtype].itemsize
    shards: list[list[Entry]] = [[]]
    held = 0
    for entry in entries:
        needs = math.prod(entry.shape) * size
        if shards[-1] and held + needs > most_bytes:
            shards.append([])
            held = 0
        shards[-1].append(entry)
        held += needs
    names = [SINGLE]
    if len(shards) > 1:
        names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    done = 0
    for name, shard in zip(names, shards, strict=True):
        done = write_file(folder / name, shard, dtype, done, progress)
    if len(shards) > 1:
        where = {entry.name: name for name, shard in zip(names, shards, strict=True) for entry in shard}
        write_json(folder / INDEX, {"metadata": {"total_size": done}, "weight_map": where})
    sync(folder)
    return names


def write_file(path: Path, shard: list[Entry], dtype: str, done: int, progress: Callable[[int], None]) -> int:
    """One file, which gets its name when it is whole. `done` bytes were written before it; how many are after."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in shard:
        stop = offset + math.prod(entry.shape) * DTYPES[dtype].itemsize
        header[entry.name] = {"dtype": dtype, "shape": list(entry.shape), "data_offsets": [offset, stop]}
        offset = stop
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    fresh = path.with_name(f"{path.name}.tmp")
    with fresh.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for entry in shard:
            before = file.tell()
            for values in entry.pieces():
                file.write(np.ascontiguousarray(values.astype(DTYPES[dtype], copy=False)).view(np.uint8).data)
                progress(done + file.tell() - 8 - len(text))
            assert file.tell() - before == math.prod(entry.shape) * DTYPES[dtype].itemsize, entry.name
    put(fresh, path)
    return done + offset
