"""Sources of records: files, TFDS, Hugging Face datasets and the embedded small world, behind one function.

| source                 | records                                                                        |
| ---------------------- | ------------------------------------------------------------------------------ |
| `notes/*.txt`          | {"text": the whole file}                                                       |
| `pairs/*.jsonl`        | one JSON object per line; `.jsonl.gz` too                                      |
| `pairs/*.json`         | the objects of an array, or one per line                                       |
| `pairs/*.csv`          | one record per row, with the names of the first row; `.tsv` too                |
| `pairs/*.parquet`      | one record per row; null values are missing fields                             |
| `pairs/*.array_record` | one JSON object per record                                                     |
| `gs://BUCKET/*.jsonl`  | files in a bucket; `s3://`, `https://HOST/FILE`, `hf://datasets/OWNER/NAME/*`   |
| `tfds:NAME:SPLIT`      | any TFDS builder (`NAME/CONFIG` too), or the folder of a prepared one          |
| `hf:NAME:SPLIT`        | a Hugging Face dataset (`hf:OWNER/NAME/CONFIG:SPLIT` too; needs jaxstages[hf])  |
| `world:NAME:SPLIT`     | the small world: text, pairs or chats; train or validation                     |

A split may be a slice, as TFDS and Hugging Face write it: `tfds:mnist:train[:50%]`.
"""

import codecs
import csv
import functools
import glob
import gzip
import hashlib
import importlib
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from array_record.python.array_record_module import ArrayRecordReader

from jaxstages.config.parts import describe
from jaxstages.data import remote
from jaxstages.runtime.bucket import local_copy
from jaxstages.runtime.files import acquire_lock

Record = dict[str, Any]

MAX_RECORD_BYTES = 2**24
"""Length of the longest record in a file. A longer one is malformed, and never read into memory as a whole."""

TEXT_RECORD_BYTES = 2**22
"""Length of a record of a text file; a larger file is several records."""

RECORDS_PER_PART = 100_000
"""Records of a part of a source with random access."""

FILE_KINDS = {".txt": "text", ".jsonl": "JSONL", ".gz": "gzip", ".json": "JSON", ".csv": "CSV", ".tsv": "TSV"}
FILE_KINDS |= {".parquet": "Parquet", ".array_record": "ArrayRecord"}

SPLIT = re.compile(r"[\w.-]+(\[[^\]]*\])?(\+[\w.-]+(\[[^\]]*\])?)*")
"""`train`, `train[:50%]`, `train+test`."""

DECODER_ERRORS = (OSError, EOFError, zlib.error, RuntimeError, ValueError, LookupError, ArithmeticError, MemoryError)
"""Errors that decoders raise for damaged files. An OSError with an errno is a fault of the disk all the same."""


class Item(NamedTuple):
    """A record and its location.

    where: `file:line`.
    record: None if it is malformed or removed.
    fault: why the record is malformed.
    removed: why the record is removed, see `data/clean.py`.
    """

    where: str
    record: Record | None
    fault: str = ""
    removed: str = ""


Part = Callable[[], Iterator[Item]]
"""Reads some of a source's items, from their beginning each time. It can be pickled, and called on another machine."""


class Source(NamedTuple):
    """A source of records.

    name: name in the recipe.
    parts: files or ranges of records, in order.
    fingerprint: SHA-256 of the bytes that are read.
    records: number of records, for the progress line.
    texts: number of text files; 0 if there are other files.
    """

    name: str
    parts: tuple[Part, ...]
    fingerprint: str
    records: int
    texts: int = 0
    files: frozenset[bytes] = frozenset()

    def read(self) -> Iterator[Item]:
        """Read all items, from the beginning each time."""
        for part in self.parts:
            yield from part()


def open_source(name: str | Callable, data_dir: Path) -> Source:
    """Open a source. Nothing is read yet, except for its fingerprint.

    Args:
        name: see the table above; a path may be a pattern. Or a function that yields records.
        data_dir: folder in which TFDS builders prepare data sets.

    Raises:
        ValueError: there is no such file, builder or split, or the kind of file is unknown.
    """
    if not isinstance(name, str):
        return _open_function(name)
    kind, _, address = name.partition(":")
    data_dir = local_copy(data_dir)
    match kind:
        case "world" | "tfds" | "hf" if not remote.is_remote(name):
            dataset, split = _dataset_and_split(kind, address)
            if kind == "world":
                return _open_world(name, dataset, split, data_dir)
            return _open_tfds(name, dataset, split, data_dir) if kind == "tfds" else _open_hf(name, dataset, split)
        case _:
            return _open_files(name)


def _open_function(function: Callable[[], Iterable[Record]]) -> Source:
    """Open a recipe's own source. Its records are read once for the fingerprint: what they say may not change."""
    name, digest, count = describe(function).part, hashlib.sha256(), 0
    for record in function():
        digest.update(json.dumps(record, sort_keys=True, ensure_ascii=False).encode() + b"\n")
        count += 1
    return Source(name, (functools.partial(_read_function, function, name),), digest.hexdigest(), count)


def _read_function(function: Callable[[], Iterable[Record]], name: str) -> Iterator[Item]:
    for number, record in enumerate(function(), start=1):
        yield Item(f"{name}:{number}", record)


def _dataset_and_split(kind: str, address: str) -> tuple[str, str]:
    """Divide `NAME:SPLIT` at the last colon after which there is a whole split: a split may have a colon in its
    slice."""
    for colon in reversed([match.start() for match in re.finditer(":", address)]):
        if colon and SPLIT.fullmatch(address, colon + 1):
            return address[:colon], address[colon + 1 :]
    raise ValueError(f"source {f'{kind}:{address}'!r} has no split; write it as {kind}:NAME:SPLIT, such as train[:50%]")


def _open_files(name: str) -> Source:
    if not remote.is_remote(name):
        files = _matching(name)
        return _source_of_files(name, files, tuple(functools.partial(_read_file, file) for file in files))
    fetched = remote.fetch(name)
    with remote.errors_name_addresses(fetched):
        parts = tuple(functools.partial(_read_remote_file, file) for file in fetched)
        return _source_of_files(name, [file.copy for file in fetched], parts)


def _source_of_files(name: str, files: Sequence[Path], parts: tuple[Part, ...]) -> Source:
    for file in files:
        if re.search(r"[\t\n\r\ud800-\udfff]", str(file)):
            raise ValueError(f"{str(file)!r}: a tab, a new line or what is not UTF-8 in a file's name; rename it")
        if file.suffix not in FILE_KINDS or (file.suffix == ".gz" and not file.name.endswith(".jsonl.gz")):
            kinds = " ".join([".jsonl.gz", *(kind for kind in FILE_KINDS if kind != ".gz")])
            raise ValueError(f"{file}: unknown kind of file; known: {kinds}")
        if not file.stat().st_size:
            raise ValueError(f"{file} is empty; remove it from {name!r} or fill it")

    texts = len(files) if all(file.suffix == ".txt" for file in files) else 0
    digests = frozenset(_digest(file, *_stamp(file)) for file in files)
    return Source(name, parts, _fingerprint(files), sum(map(_count_records, files)), texts, digests)


def _read_remote_file(file: remote.RemoteFile) -> Iterator[Item]:
    """Read the copy, and name the address, which is the same on all machines."""
    with remote.errors_name_addresses([file]):
        for item in _read_file(file.fetch()):
            yield item._replace(where=item.where.replace(str(file.copy), file.address, 1))


def _read_file(file: Path) -> Iterator[Item]:
    readers = {".txt": _read_text, ".jsonl": _read_jsonl, ".gz": _read_jsonl, ".json": _read_json, ".csv": _read_csv}
    readers |= {".tsv": _read_csv, ".parquet": _read_parquet, ".array_record": _read_array_record}
    with _decoder_errors_as_value_error(file):
        yield from readers[file.suffix](file)


def _matching(name: str) -> list[Path]:
    """Return the files of a path or pattern, in order."""
    name = str(Path(name).expanduser()) if name.startswith("~") else name
    # An existing file with this name is meant itself, even if the name is also a pattern.
    paths = map(Path, [name] if Path(name).is_file() else glob.iglob(name, recursive=True))

    files: dict[Path, Path] = {}
    for path in paths:
        if path.is_file():
            # A link to a folder above makes `**` walk in circles, and read a file many times: stop at the first.
            first = files.setdefault(path.resolve(), path)
            if first != path:
                raise ValueError(f"{name!r} matches one file twice, as {first} and {path}; remove the link to it")
    if not files:
        raise ValueError(
            f"no file matches {name!r} (looked from {Path.cwd()}); name a file or a pattern that does, or leave its "
            "stage out: --config.STAGE=None"
        )
    return sorted(files.values(), key=str)


@contextmanager
def _decoder_errors_as_value_error(file: Path) -> Iterator[None]:
    """Raise errors of the decoders as ValueError: the user's data is damaged, not the disk."""
    try:
        yield
    except PermissionError as error:
        raise ValueError(f"{file} can't be read: {error.strerror}; change its permissions") from error
    except DECODER_ERRORS as error:
        if isinstance(error, OSError) and error.errno:
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{file} is no whole {FILE_KINDS[file.suffix]} file: {reason}") from error


def _count_records(file: Path) -> int:
    """Count the records of a file: for JSONL the lines with blank ones, for a large text an estimate."""
    return _count_records_of(file, *_stamp(file))


@functools.cache
def _count_records_of(file: Path, *_: int) -> int:
    with _decoder_errors_as_value_error(file):
        match file.suffix:
            case ".txt":
                return 1 + file.stat().st_size // TEXT_RECORD_BYTES
            case ".parquet":
                return _open_parquet(file).metadata.num_rows
            case ".array_record":
                return ArrayRecordReader(str(file)).num_records()
            case ".csv" | ".tsv" | ".json":
                return sum(1 for _ in _read_file(file))
            case _:
                return sum(1 for _ in _lines(file))


def _fingerprint(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(_digest(file, *_stamp(file)))
    return digest.hexdigest()


def _stamp(file: Path) -> tuple[int, ...]:
    """Return numbers that change when a file is written: an unchanged file need not be read again by this process."""
    stat = file.stat()
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


@functools.cache
def _digest(file: Path, *_: int) -> bytes:
    with _decoder_errors_as_value_error(file), file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").digest()


def _check_utf8(start: bytes) -> None:
    """Raises ValueError if a file begins like UTF-16 or UTF-32, which may be valid UTF-8 full of NULs."""
    if start.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in start[:4]:
        raise ValueError("it begins like UTF-16; save it as UTF-8")


def _read_text(file: Path) -> Iterator[Item]:
    with file.open("rb") as content:
        _check_utf8(content.read(4))
    line = 1
    with file.open("rb") as content:
        content.seek(len(codecs.BOM_UTF8) if content.read(3) == codecs.BOM_UTF8 else 0)
        for chunk in iter(lambda: _read_whole_characters(content), b""):
            for is_utf8, part in _split_at_bad_lines(chunk):
                where = f"{file}:{line}" if line > 1 or not is_utf8 else str(file)
                text = part.decode("utf-8", "strict" if is_utf8 else "replace")
                fault = f"not UTF-8, and left out; save the file as UTF-8: {text[:60]!r}"
                record = {"text": text.replace("\r\n", "\n").replace("\r", "\n")} if is_utf8 else None
                yield Item(where, record, "" if is_utf8 else fault)
                line += part.count(b"\n")


def _read_whole_characters(content: Any) -> bytes:
    """Read the next chunk of a text file, without dividing a character or a CRLF at its end."""
    chunk = content.read(TEXT_RECORD_BYTES)
    while chunk and (following := content.peek(1)[:1]) and (following[0] & 0xC0 == 0x80 or chunk[-1:] == b"\r"):
        chunk += content.read(1)
    return chunk


def _split_at_bad_lines(chunk: bytes) -> Iterator[tuple[bool, bytes]]:
    """Yield the parts of a chunk in order, and whether each is UTF-8: a line that is not is a part of its own."""
    while chunk:
        try:
            chunk.decode()
        except UnicodeDecodeError as error:
            start, stop = chunk.rfind(b"\n", 0, error.start) + 1, chunk.find(b"\n", error.start) + 1 or len(chunk)
            yield from [(True, chunk[:start])] if start else []
            yield False, chunk[start:stop]
            chunk = chunk[stop:]
        else:
            yield True, chunk
            return


def _unique_keys(pairs: list[tuple[str, Any]]) -> Record:
    record = dict(pairs)
    if len(record) < len(pairs):
        raise ValueError("a key stands twice in an object")
    return record


def _refuse_constant(word: str) -> None:
    raise ValueError(f"{word} is no number")


def _parse(where: str, line: bytes) -> Item:
    if len(line) > MAX_RECORD_BYTES:
        return Item(where, None, f"longer than {MAX_RECORD_BYTES:,} bytes")
    try:
        record = json.loads(line.decode("utf-8-sig"), object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        return Item(where, None, f"not JSON: {error}")
    if not isinstance(record, dict):
        return Item(where, None, f"a JSON object is wanted, not {type(record).__name__}")
    return Item(where, record)


def _read_jsonl(file: Path) -> Iterator[Item]:
    for number, line in enumerate(_lines(file), start=1):
        if number == 1:
            _check_utf8(line)
        if len(line) > MAX_RECORD_BYTES or line.strip():
            yield _parse(f"{file}:{number}", line)


def _read_json(file: Path) -> Iterator[Item]:
    """Read the objects of an array. A file that does not begin like one is read as JSON Lines."""
    with file.open(encoding="utf-8-sig") as content:
        start = content.read(1)
        while start.isspace():
            start = content.read(1)
        records = json.loads(start + content.read()) if start == "[" else None
    if records is None:
        yield from _read_jsonl(file)
    for number, record in enumerate(records or [], start=1):
        where = f"{file}:{number}"
        fault = f"a JSON object is wanted, not {type(record).__name__}"
        yield Item(where, record) if isinstance(record, dict) else Item(where, None, fault)


def _read_csv(file: Path) -> Iterator[Item]:
    """Read rows with the column names of the first one. An empty field is an empty text."""
    csv.field_size_limit(MAX_RECORD_BYTES)
    with file.open(encoding="utf-8-sig", newline="") as content:
        rows = csv.reader(content, delimiter="\t" if file.suffix == ".tsv" else ",", strict=True)
        names = next(rows)
        if len(set(names)) < len(names):
            raise ValueError(f"two columns have one name: {', '.join(names)}")
        for row in filter(None, rows):
            where = f"{file}:{rows.line_num}"
            if len(row) == len(names):
                yield Item(where, dict(zip(names, row, strict=True)))
            else:
                yield Item(where, None, f"{len(row)} fields, where the first row names {len(names)}")


def _lines(file: Path) -> Iterator[bytes]:
    """Yield lines. Only the beginning of a line that is too long is yielded, which is more than `MAX_RECORD_BYTES`."""
    with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as lines:
        while line := lines.readline(MAX_RECORD_BYTES + 1):
            yield line
            while len(line) > MAX_RECORD_BYTES and not line.endswith(b"\n"):
                line = lines.readline(MAX_RECORD_BYTES + 1)


def _open_parquet(file: Path) -> Any:
    import pyarrow.parquet

    return pyarrow.parquet.ParquetFile(file, buffer_size=2**20)  # without it whole columns of a row group are in memory


def _read_parquet(file: Path) -> Iterator[Item]:
    batches = _open_parquet(file).iter_batches(batch_size=100)
    for number, record in enumerate((record for batch in batches for record in batch.to_pylist()), start=1):
        yield Item(f"{file}:{number}", _without_nulls(record))


def _without_nulls(value: Any) -> Any:
    """Drop the fields of a table's row that are null: a table has every field in every row, records do not."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _read_array_record(file: Path) -> Iterator[Item]:
    reader = ArrayRecordReader(str(file))
    for number in range(1, reader.num_records() + 1):
        # Sequentially: reading by index takes time that grows with the file.
        yield _parse(f"{file}:{number}", reader.read())
    reader.close()


def _range_parts(read: Callable[[range], Iterator[Item]], records: int) -> tuple[Part, ...]:
    starts = range(0, records, RECORDS_PER_PART)
    return tuple(functools.partial(read, range(records)[start : start + RECORDS_PER_PART]) for start in starts)


def _open_world(name: str, dataset: str, split: str, data_dir: Path) -> Source:
    from jaxstages.world.builders import open_world

    records = len(open_world(dataset, split, str(data_dir)))
    folders = sorted((data_dir / f"world_{dataset}").rglob(f"*-{split}.array_record*"))
    parts = _range_parts(functools.partial(_read_world, name, dataset, split, str(data_dir)), records)
    return Source(name, parts, _fingerprint(folders), records)


def _read_world(name: str, dataset: str, split: str, data_dir: str, numbers: range) -> Iterator[Item]:
    from jaxstages.world.builders import open_world

    records = open_world(dataset, split, data_dir)
    for number in numbers:
        yield Item(f"{name}:{number + 1}", records[number])


def _to_json_types(value: Any) -> Any:
    """Convert values of TFDS (bytes, numpy, ragged sequences) to the types of JSON."""
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if isinstance(value, dict):
        return {key: _to_json_types(item) for key, item in value.items()}
    if hasattr(value, "tolist"):
        return _to_json_types(value.tolist())
    return [_to_json_types(item) for item in value] if isinstance(value, list | tuple) else value


def _tfds_builder(dataset: str, data_dir: str, prepare: bool) -> Any:
    """Returns Any, since TFDS's decorators hide its methods' parameters."""
    import tensorflow_datasets as tfds

    if (Path(dataset) / "dataset_info.json").exists():
        return tfds.builder_from_directory(dataset)

    make = functools.partial(tfds.builder, dataset, data_dir=data_dir, file_format="array_record")
    if not prepare:
        return make()
    with acquire_lock(Path(data_dir) / f"{re.sub(r'[^a-zA-Z0-9]', '_', dataset)}.lock", wait=True):
        builder = make()  # under the lock: it checks at once whether another run has prepared the data
        builder.download_and_prepare()
        return builder


def _open_tfds(name: str, dataset: str, split: str, data_dir: Path) -> Source:
    import tensorflow_datasets as tfds

    try:
        builder = _tfds_builder(dataset, str(data_dir), prepare=True)
        records = len(builder.as_data_source(split=split))
    except (tfds.core.DatasetNotFoundError, ValueError, LookupError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"{name}: TFDS can't open it: {str(error).splitlines()[0]}") from error
    files = sorted(Path(str(builder.data_path)).glob("*.array_record*"))
    # A builder's files have all its splits, so the fingerprint needs the name of the split.
    digest = hashlib.sha256(f"{_fingerprint(files)} {split}".encode()).hexdigest()
    parts = _range_parts(functools.partial(_read_tfds, name, dataset, split, str(data_dir)), records)
    return Source(name, parts, digest, records)


def _read_tfds(name: str, dataset: str, split: str, data_dir: str, numbers: range) -> Iterator[Item]:
    records = _tfds_builder(dataset, data_dir, prepare=False).as_data_source(split=split)
    for number in numbers:
        where = f"{name}:{number + 1}"
        try:
            yield Item(where, _to_json_types(records[number]))
        except UnicodeDecodeError as error:
            yield Item(where, None, f"not UTF-8: {error}")


def _load_hf(name: str, dataset: str, split: str) -> Any:
    try:
        datasets = importlib.import_module("datasets")  # an extra, which type checkers may not have
    except ImportError as error:
        raise ValueError(f"{name}: Hugging Face datasets is not installed; pip install '.[hf]'") from error
    owner_name, config = dataset, None
    if dataset.count("/") == 2 and not Path(dataset).exists():
        owner_name, _, config = dataset.rpartition("/")
    return datasets.load_dataset(owner_name, config, split=split)


def _open_hf(name: str, dataset: str, split: str) -> Source:
    records = _load_hf(name, dataset, split)
    parts = _range_parts(functools.partial(_read_hf, name, dataset, split), len(records))
    return Source(name, parts, records._fingerprint, len(records))


def _read_hf(name: str, dataset: str, split: str, numbers: range) -> Iterator[Item]:
    records = _load_hf(name, dataset, split)
    for number in numbers:
        yield Item(f"{name}:{number + 1}", _without_nulls(dict(records[number])))
