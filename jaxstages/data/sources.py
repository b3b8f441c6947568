"""Where records come from: files, TFDS, Hugging Face datasets and the embedded small world, behind one function.

| source                 | records                                                                        |
| ---------------------- | ------------------------------------------------------------------------------ |
| `notes/*.txt`          | {"text": the whole file}                                                       |
| `pairs/*.jsonl`        | a JSON object a line; `.jsonl.gz` too                                          |
| `pairs/*.json`         | the objects of an array, or one a line                                         |
| `pairs/*.csv`          | a row each, by the names in the first one; `.tsv` too                          |
| `pairs/*.parquet`      | a row each; what is null there is missing                                      |
| `pairs/*.array_record` | a JSON object each                                                             |
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
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from array_record.python.array_record_module import ArrayRecordReader

from jaxstages.runtime.files import hold

Record = dict[str, Any]

MOST_BYTES = 2**24
"""Of a record in a file; a longer one is malformed, and never held in memory whole."""

PIECE = 2**22
"""Bytes of a text file that make one record; a larger file is several."""

RANGE = 100_000
"""Records that one worker reads, of a source whose records are read at random places."""

KINDS = {".txt": "text", ".jsonl": "JSONL", ".gz": "gzip", ".json": "JSON", ".csv": "CSV", ".tsv": "TSV"}
KINDS |= {".parquet": "Parquet", ".array_record": "ArrayRecord"}

SPLIT = re.compile(r"[\w.-]+(\[[^\]]*\])?(\+[\w.-]+(\[[^\]]*\])?)*")
"""`train`, `train[:50%]`, `train+test`."""

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
        case "world" | "tfds" | "hf":
            dataset, split = _dataset_and_split(kind, rest)
            if kind == "world":
                return _open_world(name, dataset, split, data_dir)
            return _open_tfds(name, dataset, split, data_dir) if kind == "tfds" else _open_hf(name, dataset, split)
        case _:
            return _open_files(name)


def _dataset_and_split(kind: str, rest: str) -> tuple[str, str]:
    """`NAME:SPLIT`; the split, which may have a colon in its slice, begins after the last colon that lets it be one."""
    for colon in reversed([match.start() for match in re.finditer(":", rest)]):
        if colon and SPLIT.fullmatch(rest, colon + 1):
            return rest[:colon], rest[colon + 1 :]
    raise ValueError(f"source {f'{kind}:{rest}'!r} has no split; write it as {kind}:NAME:SPLIT, such as train[:50%]")


def _open_files(name: str) -> Source:
    files = _matching(name)
    for file in files:
        if re.search(r"[\t\n\r\ud800-\udfff]", str(file)):
            raise ValueError(f"{str(file)!r}: a tab, a new line or what is not UTF-8 in a file's name; rename it")
        if file.suffix not in KINDS or (file.suffix == ".gz" and not file.name.endswith(".jsonl.gz")):
            known = " ".join([".jsonl.gz", *(kind for kind in KINDS if kind != ".gz")])
            raise ValueError(f"{file}: unknown kind of file; known: {known}")
        if not file.stat().st_size:
            raise ValueError(f"{file} is empty; remove it from {name!r} or fill it")
    parts = tuple(functools.partial(_read_file, file) for file in files)
    texts = len(files) if all(file.suffix == ".txt" for file in files) else 0
    return Source(name, parts, _fingerprint(files), sum(map(_count, files)), texts)


def _read_file(file: Path) -> Iterator[Item]:
    readers = {".txt": _read_text, ".jsonl": _read_jsonl, ".gz": _read_jsonl, ".json": _read_json, ".csv": _read_csv}
    readers |= {".tsv": _read_csv, ".parquet": _read_parquet, ".array_record": _read_array_record}
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
    with file.open("rb") as content:
        content.seek(len(codecs.BOM_UTF8) if content.read(3) == codecs.BOM_UTF8 else 0)
        for piece in iter(lambda: _whole_letters(content), b""):
            for good, part in _split_at_faults(piece):
                where = f"{file}:{line}" if line > 1 or not good else str(file)
                text = part.decode("utf-8", "strict" if good else "replace")
                fault = f"not UTF-8, and left out; save the file as UTF-8: {text[:60]!r}"
                record = {"text": text.replace("\r\n", "\n").replace("\r", "\n")} if good else None
                yield Item(where, record, "" if good else fault)
                line += part.count(b"\n")


def _whole_letters(content: Any) -> bytes:
    """The next piece of a text file, up to the end of a letter and of a line's end."""
    piece = content.read(PIECE)
    while piece and (following := content.peek(1)[:1]) and (following[0] & 0xC0 == 0x80 or piece[-1:] == b"\r"):
        piece += content.read(1)
    return piece


def _split_at_faults(piece: bytes) -> Iterator[tuple[bool, bytes]]:
    """Parts of a piece in order, and whether each is UTF-8: a line that is not is a part of its own."""
    while piece:
        try:
            piece.decode()
        except UnicodeDecodeError as error:
            start, stop = piece.rfind(b"\n", 0, error.start) + 1, piece.find(b"\n", error.start) + 1 or len(piece)
            yield from [(True, piece[:start])] if start else []
            yield False, piece[start:stop]
            piece = piece[stop:]
        else:
            yield True, piece
            return


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


def _read_json(file: Path) -> Iterator[Item]:
    """The objects of an array; a file that does not begin as one is read as lines."""
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
    """Rows by the names in the first one; an empty field is an empty text."""
    csv.field_size_limit(MOST_BYTES)
    with file.open(encoding="utf-8-sig", newline="") as content:
        rows = csv.reader(content, delimiter="\t" if file.suffix == ".tsv" else ",", strict=True)
        names = next(rows)
        if len(set(names)) < len(names):
            raise ValueError(f"two columns have one name: {', '.join(names)}")
        for row in filter(None, rows):
            where = f"{file}:{rows.line_num}"
            fault = f"{len(row)} fields, where the first row names {len(names)}"
            matched = len(row) == len(names)
            yield Item(where, dict(zip(names, row, strict=True))) if matched else Item(where, None, fault)


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
        yield Item(f"{file}:{number}", _without_nulls(record))


def _without_nulls(value: Any) -> Any:
    """A row of a table without the fields that are null: tables have each field of each row, records do not."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


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

    def make() -> Any:
        return tfds.builder(dataset, data_dir=data_dir, file_format="array_record")

    if not prepare:
        return make()
    with hold(Path(data_dir) / f"{re.sub(r'[^a-zA-Z0-9]', '_', dataset)}.lock", wait=True):
        builder = make()  # here, for it looks at once for what another run may have prepared
        builder.download_and_prepare()
        return builder


def _open_tfds(name: str, dataset: str, split: str, data_dir: Path) -> Source:
    import tensorflow_datasets as tfds

    try:
        builder = _builder(dataset, str(data_dir), prepare=True)
        records = len(builder.as_data_source(split=split))
    except (tfds.core.DatasetNotFoundError, ValueError, LookupError, AssertionError, NotImplementedError) as error:
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
    owner_name, config = dataset, None
    if dataset.count("/") == 2 and not Path(dataset).exists():
        owner_name, _, config = dataset.rpartition("/")
    return datasets.load_dataset(owner_name, config, split=split)


def _open_hf(name: str, dataset: str, split: str) -> Source:
    records = _load_hf(name, dataset, split)
    parts = _ranges(functools.partial(_read_hf, name, dataset, split), len(records))
    return Source(name, parts, records._fingerprint, len(records))


def _read_hf(name: str, dataset: str, split: str, numbers: range) -> Iterator[Item]:
    records = _load_hf(name, dataset, split)
    for number in numbers:
        yield Item(f"{name}:{number + 1}", _without_nulls(dict(records[number])))
