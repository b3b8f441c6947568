"""`prepare` on many machines: an engine that writes the same bytes with two Apache Beam pipelines.

Near-duplicates, if the recipe removes them (see `data/dedup.py`):

    parts > read > sign > group by signature > first of each > group by band > pairs > join both signatures > dropped

Rows (see `data/shards.py`):

    parts > read, clean > items > number of the shard > group by it, in order > tokenize, pack, write
                        > sizes > first record of each shard

One worker computes where shards begin, from 4 bytes a record; everything else is distributed. Any worker may get a
part, signature or shard, and more than once, so each attempt writes a shard to a folder of its own and moves it when it
is complete.

All machines have to see the sources and the cache under the same path: on a shared disk or, which is simpler, in a
bucket.
"""

import array
import bisect
import functools
import re
import shlex
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import apache_beam as beam  # pyright: ignore[reportMissingImports]  # an extra
import numpy as np
from apache_beam.options.pipeline_options import PipelineOptions  # pyright: ignore[reportMissingImports]
from apache_beam.runners.portability.fn_api_runner import FnApiRunner  # pyright: ignore[reportMissingImports]
from apache_beam.runners.runner import PipelineState  # pyright: ignore[reportMissingImports]

from jaxstages.config import DataConfig
from jaxstages.config.data import DuplicatesConfig
from jaxstages.data import dedup, prepare
from jaxstages.data.clean import memory_bytes
from jaxstages.data.prepare import Engine
from jaxstages.data.shards import (
    PART_BITS,
    RowSpec,
    ShardLimits,
    assign_shards,
    cuts_texts,
    documents_of,
    dropped_file,
    files_of,
    items_of_part,
    read_dropped,
    shard_file,
    write_dropped,
    write_shard,
)
from jaxstages.data.sources import Part, Source
from jaxstages.data.tasks import make_task
from jaxstages.runtime import bucket
from jaxstages.runtime.bucket import is_bucket, local_copy
from jaxstages.runtime.console import say
from jaxstages.runtime.files import copy_file, make_folder, read_json, remove_tree, rename_durably, write_json

DROPPED, SIZES = "dropped", "sizes"
"""Names of additional outputs."""

BEGINS, WRITTEN = "begins.json", "written.json"
"""Files in the scratch folder: the orders of the shards' first items; the parts with near-duplicates."""

STORAGE_ERRORS = r"\[Errno|\b(gcsfs|botocore|aiohttp|requests|google)\.[\w.]+: "
"""Pattern of disk and bucket errors in the error message of a runner."""

ITEM_CODER = beam.coders.PickleCoder()
"""A malformed item may have half a surrogate pair, which Beam's coder of text refuses."""

AnyPath = Any
"""A Path or BucketPath. Annotated as Any, because Beam checks arguments against annotations and BucketPath is no
Path."""

Signed = tuple[int, bytes, bytes]
"""Order, signature and band keys of a document."""


def make_engine(options: str) -> Engine:
    """Make an engine that runs Beam with options such as "--runner=DirectRunner --direct_num_workers=4"."""
    try:
        parsed = PipelineOptions(shlex.split(options))
        parsed.get_all_options()  # parses them, which happens late
    except (ValueError, SystemExit) as error:  # argparse exits on errors
        raise ValueError(
            f"--beam_options={options!r} can't be read; see its lines above, or close the quotes"
        ) from error
    return Engine(functools.partial(find_near_duplicates, parsed), functools.partial(write_shards, parsed))


def _scratch(folder: Path) -> Path:
    return folder.with_suffix(".beam")


@contextmanager
def _pipeline(options: Any, folder: Path, title: str) -> Iterator[Any]:
    """Make a pipeline that writes into a folder, and run it at the end of the block.

    Raises:
        ValueError: the pipeline fails.
        OSError: a disk of its workers fails.
    """
    name = options.get_all_options()["runner"] or "DirectRunner"
    say(f"{title}: an Apache Beam pipeline on {name}")
    remove_tree(_scratch(folder))  # a killed run leaves one

    # Beam's DirectRunner first tries to download a runner without --direct_num_workers, and ends as this one.
    pipeline = beam.Pipeline(FnApiRunner() if name == "DirectRunner" else None, options=options)
    yield pipeline

    try:
        state = pipeline.run().wait_until_finish()
    except Exception as error:  # the runners have no common type, and workers' errors come as text
        lines = reversed(str(error).splitlines())
        reason = next((line.strip() for line in lines if ": " in line), type(error).__name__)
        if re.search(STORAGE_ERRORS, reason):
            remedy = "check the workers' disks, network and rights, and start again"
            raise OSError(f"{title}: the Beam pipeline failed: {reason}; {remedy}") from error
        raise ValueError(f"{title}: the Beam pipeline failed: {reason}") from error
    if state not in (None, PipelineState.DONE):
        raise ValueError(f"{title}: the Beam pipeline ended as {state}; see its runner's log, and start it again")


def _write(folder: Path, write: Callable[[Path], None], files: Callable[[Path], list[Path]]) -> None:
    """Write to a folder of this attempt's own, and then move the files in their order: the runner may try the same work
    twice at once. To a bucket they are uploaded, one by one, from the worker's disk."""
    if is_bucket(folder):
        with tempfile.TemporaryDirectory() as attempt:
            write(Path(attempt))
            for temporary, path in zip(files(Path(attempt)), files(folder), strict=True):
                copy_file(temporary, path)
        return
    attempt = _scratch(folder) / uuid.uuid4().hex
    make_folder(attempt)
    write(attempt)
    for temporary, path in zip(files(attempt), files(folder), strict=True):
        rename_durably(temporary, path)


def _gather(pipeline: Any, values: Any, empty: Any, title: str) -> Any:
    """Gather all elements of a collection, and `empty`, in a list in one worker. Without `empty` there would be no list
    of a collection without elements."""
    return (
        (values, pipeline | f"no {title}" >> beam.Create([empty]))
        | f"with none of {title}" >> beam.Flatten()
        | f"with one key for {title}" >> beam.Map(lambda value: (0, value))
        | f"gather {title}" >> beam.GroupByKey()
        | f"list {title}" >> beam.Map(lambda group: list(group[1]))
    )


def _write_result(folder: Path, name: str, value: list[int]) -> list[int]:
    """Write a result of the pipeline to the scratch folder, where `_read_result` expects it."""
    _write(_scratch(folder), lambda attempt: write_json(attempt / name, value), lambda parent: [parent / name])
    return value


def _read_result(folder: Path, name: str) -> list[int]:
    """Read what a worker has written. Raises ValueError if it has written it elsewhere."""
    file = _scratch(folder) / name
    if not file.exists():
        raise _wrote_elsewhere(file)
    return read_json(file)


def _wrote_elsewhere(file: Path) -> ValueError:
    return ValueError(
        f"{file} is missing, so the workers wrote elsewhere; set --workdir, or config.cache, to a path that all "
        "machines share, or to a bucket"
    )


def _finish(folder: Path) -> None:
    """Remove what the workers left, and download what they wrote to a bucket."""
    remove_tree(_scratch(folder))
    if is_bucket(folder):
        bucket.download(folder, local_copy(folder))


def _parts(pipeline: Any, source: Source) -> Any:
    """Distribute the parts of a source, with their numbers, to the workers."""
    return pipeline | beam.Create([*enumerate(source.parts)]) | beam.Reshuffle()


def find_near_duplicates(options: Any, source: Source, config: DataConfig, folder: Path) -> None:
    """Write which documents have an earlier near-duplicate. See `Engine`."""
    duplicates = config.duplicates
    with _pipeline(options, folder, f"near-duplicates of {source.name}") as pipeline:
        firsts = (
            _parts(pipeline, source)
            | "read" >> beam.FlatMap(read_documents, config)
            | "spread" >> beam.Reshuffle()
            | "sign" >> beam.FlatMap(sign, duplicates)
            | "by signature" >> beam.GroupByKey()
            | "first" >> beam.FlatMap(split_firsts, duplicates.threshold).with_outputs(DROPPED, main="remaining")
        )
        signatures = firsts.remaining | "signature" >> beam.Map(lambda signed: signed[:2])
        dropped = (
            firsts.remaining
            | "band" >> beam.FlatMap(bands_of)
            | "by band" >> beam.GroupByKey()
            | "pair" >> beam.FlatMap(pairs_of)
            | beam.Distinct()
            | "of the earlier" >> _JoinSignature(signatures, send_signature)
            | "of the later" >> _JoinSignature(signatures, compare_signatures, duplicates.threshold)
        )
        written = (
            (firsts[DROPPED], dropped)
            | beam.Flatten()
            | "part" >> beam.Map(lambda order: (order >> PART_BITS, order))
            | "by part" >> beam.GroupByKey()
            | "write" >> beam.Map(write_dropped_of_part, folder)
        )
        _ = _gather(pipeline, written, -1, "parts") | beam.Map(
            lambda numbers: _write_result(folder, WRITTEN, sorted(number for number in numbers if number >= 0))
        )
    for number in _read_result(folder, WRITTEN):
        if not dropped_file(folder, number).exists():
            raise _wrote_elsewhere(dropped_file(folder, number))
    _finish(folder)


class _JoinSignature(beam.PTransform):
    """(order, value) pairs -> results of `combine(order, its signature, its values, *arguments)`."""

    def __init__(self, signatures: Any, combine: Callable[..., Iterable[Any]], *arguments: Any) -> None:
        super().__init__()
        self.signatures, self.combine, self.arguments = signatures, combine, arguments

    def expand(self, input_or_inputs: Any) -> Any:
        joined = (self.signatures, input_or_inputs) | beam.CoGroupByKey()
        return joined | beam.FlatMap(_combine, self.combine, self.arguments)


def _combine(
    group: tuple[int, tuple[Iterable[bytes], Iterable[Any]]],
    combine: Callable[..., Iterable[Any]],
    arguments: tuple[Any, ...],
) -> Iterable[Any]:
    order, ((signature,), values) = group
    return combine(order, signature, values, *arguments)


def send_signature(order: int, signature: bytes, later: Iterable[int]) -> Iterator[tuple[int, bytes]]:
    """Send a signature to the later documents that are compared with it."""
    for later_order in later:
        yield later_order, signature


def compare_signatures(order: int, signature: bytes, earlier: Iterable[bytes], threshold: float) -> list[int]:
    """Return the order if the signature is similar to an earlier one."""
    own = _to_array(signature)
    return [order] if any(dedup.similar(own, _to_array(other), threshold)[0] for other in earlier) else []


def read_documents(numbered: tuple[int, Part], config: DataConfig) -> Iterator[tuple[list[int], list[str]]]:
    number, read = numbered
    yield from dedup.batches(documents_of(read, number, config))


def sign(batch: tuple[list[int], list[str]], config: DuplicatesConfig) -> Iterator[tuple[bytes, Signed]]:
    """Compute the signatures of a batch, each under the key of the whole signature."""
    orders, texts = batch
    signatures_nP = dedup.signatures(texts, config)
    keys = dedup.keys(signatures_nP, config.bands)
    for order, signature, key in zip(orders, signatures_nP, keys, strict=True):
        yield key[:1].tobytes(), (order, signature.tobytes(), key[1:].tobytes())


def _to_array(signature: bytes) -> np.ndarray:
    return np.frombuffer(signature, np.uint32)[None]


def split_firsts(group: tuple[bytes, Iterable[Signed]], threshold: float) -> Iterator[Signed | Any]:
    """Yield the first of the documents with the same signature; the orders of the others go to `DROPPED`."""
    first = min(group[1], key=lambda signed: signed[0])
    for signed in group[1]:
        if signed[0] == first[0] or not dedup.similar(_to_array(signed[1]), _to_array(first[1]), threshold)[0]:
            yield signed
        else:
            yield beam.pvalue.TaggedOutput(DROPPED, signed[0])


def bands_of(signed: Signed) -> Iterator[tuple[bytes, int]]:
    """Yield each band, by number and key, with the document's order."""
    order, _, keys = signed
    for band in range(len(keys) // 8):
        yield band.to_bytes(2, "big") + keys[8 * band : 8 * band + 8], order


def pairs_of(group: tuple[bytes, Iterable[int]]) -> Iterator[tuple[int, int]]:
    """Yield earlier and later orders to compare, of the documents that agree in a band; see `dedup.candidates`."""
    orders = sorted(group[1])
    for rank, later in enumerate(orders):
        for earlier in orders[: min(rank, dedup.MAX_COMPARED)]:
            yield earlier, later


def write_dropped_of_part(group: tuple[int, Iterable[int]], folder: AnyPath) -> int:
    """Write the near-duplicates of a part, and return its number."""
    number, orders = group
    _write(folder, lambda attempt: write_dropped(attempt, orders), lambda parent: [dropped_file(parent, number)])
    return number


def write_shards(options: Any, source: Source, dropped: Path | None, spec: RowSpec, folder: Path) -> int:
    """Write the shards that do not exist yet. See `Engine`."""
    limits = ShardLimits(prepare.BLOCK_BYTES, prepare.BLOCK_RECORDS)
    with _pipeline(options, folder, f"prepare {source.name} ({spec.part})") as pipeline:
        read = _parts(pipeline, source) | "read" >> beam.FlatMap(
            read_items, dropped, cuts_texts(source, spec.config), spec.part, spec.config
        ).with_outputs(SIZES, main="items")
        begins = _gather(pipeline, read[SIZES], (-1, b""), "sizes") | "begin" >> beam.Map(
            lambda sizes: _write_result(folder, BEGINS, shard_begins(sizes, limits))
        )
        _ = (
            read.items
            | "shard" >> beam.Map(shard_of, beam.pvalue.AsSingleton(begins))
            | "by shard" >> beam.GroupByKey()
            | "write" >> beam.ParDo(_WriteShard(spec, folder))
        )
    shards = len(_read_result(folder, BEGINS))
    _finish(folder)
    return shards


def read_items(
    numbered: tuple[int, Part], dropped: AnyPath | None, cut: bool, part: str, config: DataConfig
) -> Iterator[tuple[int, bytes] | Any]:
    """Yield order and item of everything in a part, and at the end all sizes to `SIZES`."""
    number, read = numbered
    sizes = array.array("i")
    for index, item in enumerate(items_of_part(read, read_dropped(dropped, number), cut, part, config)):
        sizes.append(memory_bytes(item.record))
        yield (number << PART_BITS) + index, ITEM_CODER.encode(item)
    yield beam.pvalue.TaggedOutput(SIZES, (number, sizes.tobytes()))


def shard_begins(sizes_of_parts: Iterable[tuple[int, bytes]], limits: ShardLimits) -> list[int]:
    """Return the order of each shard's first item, given the sizes of all parts."""
    parts = [(number, array.array("i", content)) for number, content in sorted(sizes_of_parts)]
    shards = assign_shards((size for _, sizes in parts for size in sizes), limits)
    orders = ((number << PART_BITS) + index for number, sizes in parts for index in range(len(sizes)))
    begins: list[int] = []
    for order, shard in zip(orders, shards, strict=True):
        if shard == len(begins):
            begins.append(order)
    return begins


def shard_of(ordered_item: tuple[int, bytes], begins: list[int]) -> tuple[int, tuple[int, bytes]]:
    return bisect.bisect_right(begins, ordered_item[0]) - 1, ordered_item


class _WriteShard(beam.DoFn):
    """(shard, its items in any order) -> its files."""

    def __init__(self, spec: RowSpec, folder: Path) -> None:
        super().__init__()
        self.spec, self.folder = spec, folder

    def setup(self) -> None:
        self.task = make_task(self.spec.config, self.spec.tokenizer, self.spec.context)

    def process(self, group: tuple[int, Iterable[tuple[int, bytes]]]) -> None:
        shard, ordered_items = group
        if shard_file(self.folder, shard).exists():
            return  # written before the pipeline was stopped
        items = [ITEM_CODER.decode(content) for _, content in sorted(ordered_items)]
        _write(
            self.folder,
            lambda attempt: write_shard(attempt, shard, items, self.task, self.spec),
            lambda parent: files_of(parent, shard),
        )
