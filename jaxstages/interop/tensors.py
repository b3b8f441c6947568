"""Safetensors files in chunks: the tensors of a folder, their values a few MB at a time, and writing of shards.

The library's reader maps whole files into memory, which counts as memory of the process, and its writer needs the whole
file at once. Here at most `CHUNK_BYTES` of a tensor are in memory. The format: the length of the header (8 bytes,
little-endian); the header, a JSON object {name: {"dtype", "shape", "data_offsets"}}; the values.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from jaxstages.runtime.files import read_json, rename_durably, sync, write_json

CHUNK_BYTES = 2**24
"""Bytes read or written at a time."""

MAX_HEADER_BYTES = 100_000_000
"""Largest header, in bytes; the library's own limit."""

DTYPES = {"F32": np.dtype(np.float32), "BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16)}

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


# Reading ----------------------------------------------------------------------------------------------------------


class StoredTensor(NamedTuple):
    """A tensor in a file.

    dtype: void if it is not supported.
    start: offset of its first byte in the file.
    """

    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int


def open_folder(folder: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a folder by name. Only headers are read.

    `model.safetensors` takes precedence over an index beside it, as in transformers.

    Raises:
        ValueError: the folder has no safetensors, or files are damaged.
    """
    index = folder / INDEX
    if index.is_file() and not (folder / SINGLE).is_file():
        weight_map = read_json(index, {"weight_map": (dict,)})["weight_map"]
        files = sorted({str(name) for name in weight_map.values()})
        if outside := [name for name in files if Path(name).name != name]:
            raise ValueError(f"{index} names {outside[0]!r}, which is no file beside it")
    else:
        weight_map, files = None, [SINGLE]

    tensors: dict[str, StoredTensor] = {}
    for name in files:
        file = folder / name
        if not file.is_file():
            raise ValueError(f"{folder} has no {name}; {_remedy(folder)}")
        tensors |= header_of(file)
    if weight_map is not None and (differing := sorted(weight_map.keys() ^ tensors)):
        raise ValueError(f"{index} and its files differ in {', '.join(differing[:5])}; fetch the folder anew")
    return tensors


def unread_weights(folder: Path) -> list[str]:
    """Return the names of other weight files in a folder, which `open_folder` does not read."""
    index = [INDEX] if (folder / SINGLE).is_file() and (folder / INDEX).is_file() else []
    patterns = ("consolidated*.safetensors", "pytorch_model*.bin")
    return index + [path.name for pattern in patterns for path in sorted(folder.glob(pattern))]


def _remedy(folder: Path) -> str:
    """Say what to do about a folder without safetensors."""
    pickles = [path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in sorted(folder.glob(pattern))]
    if pickles:
        return (
            f"{pickles[0]} is a pickle, which runs code when it is read, and is never opened here: take the "
            "safetensors of that model, or let someone who trusts it convert it"
        )
    return "name a folder with config.json and safetensors"


def header_of(file: Path) -> dict[str, StoredTensor]:
    """Return the tensors of one file by name. Raises ValueError if the file is damaged."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
            raise ValueError(f"{file} is no safetensors file, or cut short")
        try:
            header = json.loads(opened.read(length))
            entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
            return {name: _stored_tensor(file, entry, 8 + length, size) for name, entry in entries.items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{file} has a header that can't be read: {error}") from error


def _stored_tensor(file: Path, entry: dict[str, Any], values_start: int, file_size: int) -> StoredTensor:
    dtype, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    if dtype not in DTYPES:
        return StoredTensor(file, np.dtype(np.void), shape, 0)  # an error only if somebody reads it
    if not all(type(number) is int and number >= 0 for number in (*shape, start, stop)):
        raise ValueError("sizes that are no numbers")
    if stop - start != math.prod(shape) * DTYPES[dtype].itemsize or values_start + stop > file_size:
        raise ValueError("offsets that do not fit its shapes, or reach beyond its end")
    return StoredTensor(file, DTYPES[dtype], shape, values_start + start)


def read_rows(tensor: StoredTensor, start: int, stop: int) -> Iterator[tuple[int, np.ndarray]]:
    """Yield rows (of the first dim) from `start` to `stop` as float32, in chunks with the index of their first row."""
    if tensor.dtype == np.void:
        raise ValueError(f"{tensor.file} holds a tensor that is none of {', '.join(DTYPES)}; supported are these")
    row_bytes = math.prod(tensor.shape[1:]) * tensor.dtype.itemsize
    chunk = max(CHUNK_BYTES // max(row_bytes, 1), 1)
    with tensor.file.open("rb", buffering=0) as file:
        for first in range(start, stop, chunk):
            last = min(first + chunk, stop)
            buffer = bytearray((last - first) * row_bytes)
            file.seek(tensor.start + first * row_bytes)
            view, count = memoryview(buffer), 0
            while count < len(buffer):
                read = file.readinto(view[count:])
                if not read:
                    raise ValueError(f"{tensor.file} is cut short")
                count += read
            rows = np.frombuffer(buffer, tensor.dtype).reshape(last - first, *tensor.shape[1:])
            yield first, rows.astype(np.float32)


# Writing ----------------------------------------------------------------------------------------------------------


class Entry(NamedTuple):
    """A tensor to write.

    pieces: returns its values in order, as float32 arrays; called when it is the tensor's turn.
    """

    name: str
    shape: tuple[int, ...]
    pieces: Callable[[], Iterable[np.ndarray]]


def write_shards(
    folder: Path, entries: list[Entry], dtype: str, max_bytes: int, progress: Callable[[int], None]
) -> list[str]:
    """Write `model.safetensors`, or several shards with their index, and return the names of the files.

    Each file gets its name when it is complete.

    Args:
        dtype: "F32" or "BF16".
        max_bytes: size of a shard; a larger tensor has a shard of its own.
        progress: called with the number of bytes written.
    """
    shards: list[list[Entry]] = [[]]
    shard_bytes = 0
    for entry in entries:
        entry_bytes = math.prod(entry.shape) * DTYPES[dtype].itemsize
        if shards[-1] and shard_bytes + entry_bytes > max_bytes:
            shards.append([])
            shard_bytes = 0
        shards[-1].append(entry)
        shard_bytes += entry_bytes

    names = [SINGLE]
    if len(shards) > 1:
        names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    done = 0
    for name, shard in zip(names, shards, strict=True):
        done = write_file(folder / name, shard, dtype, done, progress)
    if len(shards) > 1:
        weight_map = {entry.name: name for name, shard in zip(names, shards, strict=True) for entry in shard}
        write_json(folder / INDEX, {"metadata": {"total_size": done}, "weight_map": weight_map})
    sync(folder)
    return names


def write_file(path: Path, shard: list[Entry], dtype: str, done: int, progress: Callable[[int], None]) -> int:
    """Write one file, which gets its name when it is complete.

    Args:
        done: bytes that were written before, in other files.

    Returns the bytes written so far.
    """
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
    rename_durably(fresh, path)
    return done + offset
