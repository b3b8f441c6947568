"""`prepare` beyond one machine: an engine that makes the same bytes as two Apache Beam pipelines.

Near-duplicates, where the recipe removes them (see `data/dedup.py`):

    parts > read > sign > group by signature > the first of each > group by band > pairs > fetch both signatures > gone

Rows (see `data/shards.py`):

    parts > read, clean > items > number of the shard > group by it, in order > tokenize, pack, write
                        > sizes > where each shard begins

Only the places where shards begin are found by one worker, from 4 bytes a record; all else is spread. Parts, signatures
and shards go to whoever is free, so nothing may depend on which worker has them, or how often: a shard is written to a
folder of the attempt's own, and moved when it is whole.

All machines have to see the sources and the cache under the same path.
"""

import array
import bisect
import functools
import shlex
import shutil
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
from jaxstages.data.clean import size_of
from jaxstages.data.prepare import Engine
from jaxstages.data.shards import (
    PART_BITS,
    Block,
    Form,
    cuts_texts,
    documents_of,
    dropped_file,
    files_of,
    items_of_part,
    read_dropped,
    shard_file,
    shards_of,
    write_dropped,
    write_shard,
)
from jaxstages.data.sources import Part, Source
from jaxstages.data.tasks import make_task
from jaxstages.runtime.console import say
from jaxstages.runtime.files import make_folder, put, read_json, write_json

GONE, SIZES = "gone", "sizes"
"""Outputs beside the main one."""

BEGINS = "begins.json"
"""In the scratch folder: the places in the order at which shards begin."""

PICKLED = beam.coders.PickleCoder()
"""Of items: a malformed one may hold half a surrogate pair, which Beam's coder of text refuses."""


def make_engine(options: str) -> Engine:
    """The engine that runs Beam with these options, such as "--runner=DirectRunner --direct_num_workers=4"."""
    try:
        parsed = PipelineOptions(shlex.split(options))
        parsed.get_all_options()  # it reads them late
    except (ValueError, SystemExit) as error:  # argparse's way to refuse
        raise ValueError(
            f"--beam_options={options!r} can't be read; see its lines above, or close the quotes"
        ) from error
    return Engine(functools.partial(find_near_duplicates, parsed), functools.partial(write_shards, parsed))


def _scratch(folder: Path) -> Path:
    return folder.with_suffix(".beam")


@contextmanager
def _pipeline(options: Any, folder: Path, what: str) -> Iterator[Any]:
    """A pipeline that writes into a folder; it runs at the end of the block. A fault of its own is a ValueError."""
    name = options.get_all_options()["runner"] or "DirectRunner"
    say(f"{what}: an Apache Beam pipeline on {name}")
    shutil.rmtree(_scratch(folder), ignore_errors=True)  # of a run that was killed
    # What Beam's DirectRunner is in the end; it first tries to download another, which has no --direct_num_workers.
    pipeline = beam.Pipeline(FnApiRunner() if name == "DirectRunner" else None, options=options)
    yield pipeline
    try:
        state = pipeline.run().wait_until_finish()
    except Exception as error:  # the runners have no common type; what a worker raised comes as text
        said = next((line.strip() for line in reversed(str(error).splitlines()) if ": " in line), type(error).__name__)
        kind = OSError if "[Errno" in said else ValueError
        raise kind(f"{what}: the Beam pipeline failed: {said}") from error
    if state not in (None, PipelineState.DONE):
        raise ValueError(f"{what}: the Beam pipeline ended as {state}; see its runner's log, and start it again")


def _write(folder: Path, write: Callable[[Path], None], files: Callable[[Path], list[Path]]) -> None:
    """Write to a folder of this attempt's own, and then move the files in their order: the runner may try the same work
    twice at once."""
    own = _scratch(folder) / uuid.uuid4().hex
    make_folder(own)
    write(own)
    for fresh, path in zip(files(own), files(folder), strict=True):
        put(fresh, path)


def _parts(pipeline: Any, source: Source) -> Any:
    """The parts of a source with their numbers, each for whoever is free."""
    return pipeline | beam.Create([*enumerate(source.parts)]) | beam.Reshuffle()


def find_near_duplicates(options: Any, source: Source, config: DataConfig, folder: Path) -> None:
    """Write which documents have an earlier near-duplicate. See `Engine`."""
    part = config.duplicates
    with _pipeline(options, folder, f"near-duplicates of {source.name}") as pipeline:
        firsts = (
            _parts(pipeline, source)
            | "read" >> beam.FlatMap(read_documents, config)
            | "spread" >> beam.Reshuffle()
            | "sign" >> beam.FlatMap(sign, part)
            | "by signature" >> beam.GroupByKey()
            | "first" >> beam.FlatMap(split_firsts, part.threshold).with_outputs(GONE, main="kept")
        )
        signed = firsts.kept | "signature" >> beam.Map(lambda one: one[:2])
        gone = (
            firsts.kept
            | "band" >> beam.FlatMap(bands_of)
            | "by band" >> beam.GroupByKey()
            | "pair" >> beam.FlatMap(pairs_of)
            | beam.Distinct()
            | "of the earlier" >> _Join(signed, send)
            | "of the later" >> _Join(signed, ask, part.threshold)
        )
        _ = (
            (firsts[GONE], gone)
            | beam.Flatten()
            | "part" >> beam.Map(lambda order: (order >> PART_BITS, order))
            | "by part" >> beam.GroupByKey()
            | "write" >> beam.Map(keep_gone, folder)
        )
    shutil.rmtree(_scratch(folder), ignore_errors=True)


class _Join(beam.PTransform):
    """(order, value) -> what `meet(order, its signature, its values, ...)` gives."""

    def __init__(self, signed: Any, meet: Callable[..., Iterable[Any]], *rest: Any) -> None:
        super().__init__()
        self.signed, self.meet, self.rest = signed, meet, rest

    def expand(self, input_or_inputs: Any) -> Any:
        return (self.signed, input_or_inputs) | beam.CoGroupByKey() | beam.FlatMap(_meet, self.meet, self.rest)


def _meet(
    found: tuple[int, tuple[Iterable[bytes], Iterable[Any]]], meet: Callable[..., Iterable[Any]], rest: tuple[Any, ...]
) -> Iterable[Any]:
    order, ((signature,), values) = found
    return meet(order, signature, values, *rest)


def send(order: int, signature: bytes, later: Iterable[int]) -> Iterator[tuple[int, bytes]]:
    """A signature to all that are compared with it."""
    for other in later:
        yield other, signature


def ask(order: int, signature: bytes, earlier: Iterable[bytes], threshold: float) -> list[int]:
    """The place, if the signature is similar to an earlier one."""
    one = _signature(signature)
    return [order] if any(dedup.similar(one, _signature(other), threshold)[0] for other in earlier) else []


def read_documents(numbered: tuple[int, Part], config: DataConfig) -> Iterator[tuple[list[int], list[str]]]:
    number, read = numbered
    yield from dedup.batches(documents_of(read, number, config))


def sign(
    batch: tuple[list[int], list[str]], config: DuplicatesConfig
) -> Iterator[tuple[bytes, tuple[int, bytes, bytes]]]:
    """Documents -> key of the whole signature, and place, signature and keys of its bands."""
    orders, texts = batch
    signatures_nP = dedup.signatures(texts, config)
    keys = dedup.keys(signatures_nP, config.bands)
    for order, signature, key in zip(orders, signatures_nP, keys, strict=True):
        yield key[:1].tobytes(), (order, signature.tobytes(), key[1:].tobytes())


def _signature(content: bytes) -> np.ndarray:
    return np.frombuffer(content, np.uint32)[None]


def split_firsts(
    found: tuple[bytes, Iterable[tuple[int, bytes, bytes]]], threshold: float
) -> Iterator[tuple[int, bytes, bytes] | Any]:
    """Of those with the same signature the first; the places of the others go beside."""
    first = min(found[1], key=lambda one: one[0])
    for one in found[1]:
        if one[0] == first[0] or not dedup.similar(_signature(one[1]), _signature(first[1]), threshold)[0]:
            yield one
        else:
            yield beam.pvalue.TaggedOutput(GONE, one[0])


def bands_of(one: tuple[int, bytes, bytes]) -> Iterator[tuple[bytes, int]]:
    order, _, keys = one
    for band in range(len(keys) // 8):
        yield band.to_bytes(2, "big") + keys[8 * band : 8 * band + 8], order


def pairs_of(found: tuple[bytes, Iterable[int]]) -> Iterator[tuple[int, int]]:
    """Earlier and later places to compare, of those that agree in a band; as `dedup.candidates`."""
    orders = sorted(found[1])
    for place, later in enumerate(orders):
        for earlier in orders[: min(place, dedup.MOST_COMPARED)]:
            yield earlier, later


def keep_gone(found: tuple[int, Iterable[int]], folder: Path) -> None:
    number, orders = found
    _write(folder, lambda own: write_dropped(own, orders), lambda there: [dropped_file(there, number)])


def write_shards(options: Any, source: Source, gone: Path | None, form: Form, folder: Path) -> int:
    """Write the shards that are not there yet. See `Engine`."""
    block = Block(prepare.BLOCK_BYTES, prepare.BLOCK_RECORDS)
    with _pipeline(options, folder, f"prepare {source.name} ({form.part})") as pipeline:
        read = _parts(pipeline, source) | "read" >> beam.FlatMap(
            read_items, gone, cuts_texts(source, form.config), form.part, form.config
        ).with_outputs(SIZES, main="items")
        nothing = pipeline | "begin with nothing" >> beam.Create([(-1, b"")])  # where a source has no parts
        begins = (
            (read[SIZES], nothing)
            | beam.Flatten()
            | "together" >> beam.Map(lambda sizes: (0, sizes))
            | "all sizes" >> beam.GroupByKey()
            | "begin" >> beam.Map(lambda found: keep_begins(found[1], block, folder))
        )
        _ = (
            read.items
            | "shard" >> beam.Map(shard_of, beam.pvalue.AsSingleton(begins))
            | "by shard" >> beam.GroupByKey()
            | "write" >> beam.ParDo(_WriteShard(form, folder))
        )
    told = _scratch(folder) / BEGINS
    if not told.exists():
        raise ValueError(f"{told}: no worker wrote it; give --workdir, or config.cache, a path that all machines share")
    shards = len(read_json(told))
    shutil.rmtree(_scratch(folder))
    return shards


def read_items(
    numbered: tuple[int, Part], gone: Path | None, cut: bool, part: str, config: DataConfig
) -> Iterator[tuple[int, bytes] | Any]:
    """The items of a part with their places in the order; beside them, at the end, all their sizes."""
    number, read = numbered
    sizes = array.array("i")
    for place, item in enumerate(items_of_part(read, read_dropped(gone, number), cut, part, config)):
        sizes.append(size_of(item.record))
        yield (number << PART_BITS) + place, PICKLED.encode(item)
    yield beam.pvalue.TaggedOutput(SIZES, (number, sizes.tobytes()))


def begins_of(found: Iterable[tuple[int, bytes]], block: Block) -> list[int]:
    """The places at which shards begin, by the sizes of all parts."""
    parts = [(number, array.array("i", content)) for number, content in sorted(found)]
    shards = shards_of((size for _, sizes in parts for size in sizes), block)
    places = ((number << PART_BITS) + place for number, sizes in parts for place in range(len(sizes)))
    begins: list[int] = []
    for place, shard in zip(places, shards, strict=True):
        if shard == len(begins):
            begins.append(place)
    return begins


def keep_begins(found: Iterable[tuple[int, bytes]], block: Block, folder: Path) -> list[int]:
    begins, own = begins_of(found, block), _scratch(folder) / uuid.uuid4().hex
    write_json(own, begins)
    put(own, _scratch(folder) / BEGINS)
    return begins


def shard_of(placed: tuple[int, bytes], begins: list[int]) -> tuple[int, tuple[int, bytes]]:
    return bisect.bisect_right(begins, placed[0]) - 1, placed


class _WriteShard(beam.DoFn):
    """(shard, its items in any order) -> its files."""

    def __init__(self, form: Form, folder: Path) -> None:
        super().__init__()
        self.form, self.folder = form, folder

    def setup(self) -> None:
        self.task = make_task(self.form.config, self.form.tokenizer, self.form.context)

    def process(self, found: tuple[int, Iterable[tuple[int, bytes]]]) -> None:
        shard, placed = found
        if shard_file(self.folder, shard).exists():
            return  # made before the pipeline was stopped
        items = [PICKLED.decode(content) for _, content in sorted(placed)]
        _write(
            self.folder,
            lambda own: write_shard(own, shard, items, self.task, self.form),
            lambda there: files_of(there, shard),
        )
