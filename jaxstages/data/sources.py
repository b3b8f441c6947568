"""Where records come from: files, TFDS, Hugging Face datasets and the embedded small world, behind one function.

| source                 | records                                                                        |
| ---------------------- | ------------------------------------------------------------------------------ |
| `notes/*.txt`          | {"text": the whole file}                                                       |
| `pairs/*.jsonl`        | a JSON object a line; `.jsonl.gz` too                                          |
| `pairs/*.parquet`      | a row each                                                                     |
| `pairs/*.array_record` | a JSON object each                                                             |
| `tfds:NAME:SPLIT`      | any TFDS builder (`NAME/CONFIG` too), or the folder of a prepared one          |
| `hf:NAME:SPLIT`        | a Hugging Face dataset (`pip install jaxstages[hf]`)                            |
| `world:NAME:SPLIT`     | the small world: text, pairs or chats; train or validation                     |
"""

import functools
import glob
import gzip
import hashlib
import importlib
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from array_record.python.array_record_module import ArrayRecordReader

Record = dict[str, Any]

MOST_BYTES = 2**24
"""Of a record in a file; a longer one is malformed, and never held in memory whole."""

PIECE = 2**22
"""Characters of a text file that make one record; a larger file is several."""

RANGE = 100_000
"""Records that one worker reads, of a source whose records are read at random places."""

KINDS = {".txt": "text", ".jsonl": "JSONL", ".gz": "gzip", ".parquet": "Parquet", ".array_record": "ArrayRecord"}

FAULTS = (OSError, EOFError, zlib.error, RuntimeError, ValueError, LookupError, ArithmeticError, MemoryError)
"""What the decoders raise for damaged files; an OSError with a number is the disk's all the same."""


class Item(NamedTuple):
    """One record and where it stands (`file:line`), or, with `record=None`, what is wrong with it, or why it was
    removed (see `data/clean.py`)."""

    where: str
    record: Record | None
    fault: str = ""
    removed: str = ""


Part = Callable[[], Iterator[Item]]
"""Reads some of a source's items, from their beginning each time. It can be pickled, and called on another machine."""


class Source(NamedTuple):
    """name: as in the recipe. parts: in order, each a file or a range of records. fingerprint: SHA-256 of the bytes
    that are read. records: how many there are, for the progress line. texts: of how many text files it is made, 0 if of
    anything else too."""

    name: str
    parts: tuple[Part, ...]
    fingerprint: str
    records: int
    texts: int = 0

    def read(self) -> Iterator[Item]:
        """All items, from the beginning each time."""
        for part in self.parts:
            yield from part()


def open_source(name: str, data_dir: Path) -> Source:
    """Find a source; nothing is read yet but for its fingerprint.

    Args:
        name: see the table above; a path may be a pattern.
        data_dir: where TFDS builders keep what they prepare.

    Raises:
        ValueError: no such file, builder or split, or a kind of file that is not known.
    """
    kind, _, rest = name.partition(":")
    match kind:
        case "world" | "tfds" | "hf" if rest.count(":"):
            dataset, _, split = rest.rpartition(":")
            if kind == "world":
                return _open_world(name, dataset, split, data_dir)
            return _open_tfds(name, dataset, split, data_dir) if kind == "tfds" else _open_hf(name, dataset, split)
        case "world" | "tfds" | "hf":
            raise ValueError(f"source {name!r} has no split; write it as {kind}:NAME:SPLIT")
        case _:
            return _open_files(name)


def _open_files(name: str) -> Source:
    files = _matching(name)
    for file in files:
        if re.search(r"[\t\n\r\ud800-\udfff]", str(file)):
            raise ValueError(f"{str(file)!r}: a tab, a new line or what is not UTF-8 in a file's name; rename it")
        if file.suffix not in KINDS or (file.suffix == ".gz" and not file.name.endswith(".jsonl.gz")):
            raise ValueError(f"{file}: unknown kind of file; known: .txt .jsonl .jsonl.gz .parquet .array_record")
        if not file.stat().st_size:
            raise ValueError(f"{file} is empty; remove it from {name!r} or fill it")
    parts = tuple(functools.partial(_read_file, file) for file in files)
    texts = len(files) if all(file.suffix == ".txt" for file in files) else 0
    return Source(name, parts, _fingerprint(files), sum(map(_count, files)), texts)


def _read_file(file: Path) -> Iterator[Item]:
    readers = {".txt": _read_text, ".jsonl": _read_jsonl, ".gz": _read_jsonl}
    readers |= {".parquet": _read_parquet, ".array_record": _read_array_record}
    with _named(file):
        yield from readers[file.suffix](file)


def _matching(name: str) -> list[Path]:
    """The files of a path or pattern, in order."""
    found: dict[Path, Path] = {}
    name = str(Path(name).expanduser()) if name.startswith("~") else name
    # A file that has this very name is meant itself, whatever pattern the name makes.
    for path in map(Path, [name] if Path(name).is_file() else glob.iglob(name, recursive=True)):
        if path.is_file():
            # Links to a folder above make `**` walk in circles, and read a file many times: stop at the first.
            known = found.setdefault(path.resolve(), path)
            if known != path:
                raise ValueError(f"{name!r} matches one file twice, as {known} and {path}; remove the link to it")
    if not found:
        raise ValueError(
            f"no file matches {name!r} (looked from {Path.cwd()}); name a file or a pattern that does, or leave its "
            "stage out: --config.STAGE=None"
        )
    return sorted(found.values(), key=str)


@contextmanager
def _named(file: Path) -> Iterator[None]:
    """What the decoders make of a damaged file, as ValueError: it is the user's data, and no disk that fails."""
    try:
        yield
    except PermissionError as error:
        raise ValueError(f"{file} can't be read: {error.strerror}; change its permissions") from error
    except FAULTS as error:
        if isinstance(error, OSError) and error.errno:
            raise
        said = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{file} is no whole {KINDS[file.suffix]} file: {said}") from error


def _count(file: Path) -> int:
    """Records of a file; lines for JSONL, blank ones included; about how many for a large text."""
    return _counted(file, *_stamp(file))


@functools.cache
def _counted(file: Path, *_: int) -> int:
    with _named(file):
        match file.suffix:
            case ".txt":
                return 1 + file.stat().st_size // PIECE
            case ".parquet":
                return _open_parquet(file).metadata.num_rows
            case ".array_record":
                return ArrayRecordReader(str(file)).num_records()
            case _:
                return sum(1 for _ in _lines(file))


def _fingerprint(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(_digest(file, *_stamp(file)))
    return digest.hexdigest()


def _stamp(file: Path) -> tuple[int, ...]:
    """What changes when a file is written: one that was read in this process need not be read again."""
    stat = file.stat()
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


@functools.cache
def _digest(file: Path, *_: int) -> bytes:
    with _named(file), file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").digest()


def _check_utf8(start: bytes) -> None:
    """Raises ValueError for the first bytes of a file in UTF-16 or UTF-32, which may be valid UTF-8 full of NULs."""
    if start.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in start[:4]:
        raise ValueError("it begins like UTF-16; save it as UTF-8")


def _read_text(file: Path) -> Iterator[Item]:
    with file.open("rb") as content:
        _check_utf8(content.read(4))
    line = 1
    with file.open(encoding="utf-8-sig") as content:
        try:
            while text := content.read(PIECE):
                yield Item(f"{file}:{line}" if line > 1 else str(file), {"text": text})
                line += text.count("\n")
        except UnicodeDecodeError as error:
            yield Item(str(file), None, f"not UTF-8: {error}")


def _once(pairs: list[tuple[str, Any]]) -> Record:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands twice in an object")
    return found


def _no_number(word: str) -> None:
    raise ValueError(f"{word} is no number")


def _parse(where: str, line: bytes) -> Item:
    if len(line) > MOST_BYTES:
        return Item(where, None, f"longer than {MOST_BYTES:,} bytes")
    try:
        record = json.loads(line.decode("utf-8-sig"), object_pairs_hook=_once, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        return Item(where, None, f"not JSON: {error}")
    if not isinstance(record, dict):
        return Item(where, None, f"a JSON object is wanted, not {type(record).__name__}")
    return Item(where, record)


def _read_jsonl(file: Path) -> Iterator[Item]:
    for number, line in enumerate(_lines(file), start=1):
        if number == 1:
            _check_utf8(line)
        if len(line) > MOST_BYTES or line.strip():
            yield _parse(f"{file}:{number}", line)


def _lines(file: Path) -> Iterator[bytes]:
    """Lines; of one that is too long only the beginning, which is more than `MOST_BYTES`."""
    with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as lines:
        while line := lines.readline(MOST_BYTES + 1):
            yield line
            while len(line) > MOST_BYTES and not line.endswith(b"\n"):
                line = lines.readline(MOST_BYTES + 1)


def _open_parquet(file: Path) -> Any:
    import pyarrow.parquet

    return pyarrow.parquet.ParquetFile(file, buffer_size=2**20)  # else it holds whole columns of a row group


def _read_parquet(file: Path) -> Iterator[Item]:
    batches = _open_parquet(file).iter_batches(batch_size=100)
    for number, record in enumerate((record for batch in batches for record in batch.to_pylist()), start=1):
        yield Item(f"{file}:{number}", record)


def _read_array_record(file: Path) -> Iterator[Item]:
    reader = ArrayRecordReader(str(file))
    for number in range(1, reader.num_records() + 1):
        yield _parse(f"{file}:{number}", reader.read())  # the next: by number it takes time by the size of the file
    reader.close()


def _ranges(read: Callable[[range], Iterator[Item]], records: int) -> tuple[Part, ...]:
    numbers = range(records)
    return tuple(functools.partial(read, numbers[start : start + RANGE]) for start in range(0, records, RANGE))


def _open_world(name: str, dataset: str, split: str, data_dir: Path) -> Source:
    from jaxstages.world.builders import open_world

    records = len(open_world(dataset, split, str(data_dir)))
    folders = sorted((data_dir / f"world_{dataset}").rglob(f"*-{split}.array_record*"))
    parts = _ranges(functools.partial(_read_world, name, dataset, split, str(data_dir)), records)
    return Source(name, parts, _fingerprint(folders), records)


def _read_world(name: str, dataset: str, split: str, data_dir: str, numbers: range) -> Iterator[Item]:
    from jaxstages.world.builders import open_world

    records = open_world(dataset, split, data_dir)
    for number in numbers:
        yield Item(f"{name}:{number + 1}", records[number])


def _plain(value: Any) -> Any:
    """What TFDS hands out (bytes, numpy, ragged sequences) as what JSON would have given."""
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _builder(dataset: str, data_dir: str, prepare: bool) -> Any:  # TFDS's decorators hide its methods' parameters
    import tensorflow_datasets as tfds

    if (Path(dataset) / "dataset_info.json").exists():
        return tfds.builder_from_directory(dataset)
    builder: Any = tfds.builder(dataset, data_dir=data_dir, file_format="array_record")
    if prepare:
        builder.download_and_prepare()
    return builder


def _open_tfds(name: str, dataset: str, split: str, data_dir: Path) -> Source:
    import tensorflow_datasets as tfds

    try:
        builder = _builder(dataset, str(data_dir), prepare=True)
        records = len(builder.as_data_source(split=split))
    except (tfds.core.DatasetNotFoundError, ValueError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"{name}: TFDS can't open it: {str(error).splitlines()[0]}") from error
    files = sorted(Path(str(builder.data_path)).glob("*.array_record*"))
    # A builder's files hold all its splits: which one is read has to be in the fingerprint.
    digest = hashlib.sha256(f"{_fingerprint(files)} {split}".encode()).hexdigest()
    parts = _ranges(functools.partial(_read_tfds, name, dataset, split, str(data_dir)), records)
    return Source(name, parts, digest, records)


def _read_tfds(name: str, dataset: str, split: str, data_dir: str, numbers: range) -> Iterator[Item]:
    records = _builder(dataset, data_dir, prepare=False).as_data_source(split=split)
    for number in numbers:
        where = f"{name}:{number + 1}"
        try:
            yield Item(where, _plain(records[number]))
        except UnicodeDecodeError as error:
            yield Item(where, None, f"not UTF-8: {error}")


def _load_hf(name: str, dataset: str, split: str) -> Any:
    try:
        datasets = importlib.import_module("datasets")  # an extra: type checkers need not find it
    except ImportError as error:
        raise ValueError(f"{name}: Hugging Face datasets is not installed; pip install jaxstages[hf]") from error
    return datasets.load_dataset(dataset, split=split)


def _open_hf(name: str, dataset: str, split: str) -> Source:
    records = _load_hf(name, dataset, split)
    parts = _ranges(functools.partial(_read_hf, name, dataset, split), len(records))
    return Source(name, parts, records._fingerprint, len(records))


def _read_hf(name: str, dataset: str, split: str, numbers: range) -> Iterator[Item]:
    records = _load_hf(name, dataset, split)
    for number in numbers:
        yield Item(f"{name}:{number + 1}", dict(records[number]))
