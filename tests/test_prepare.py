"""Sources, the prepared cache and batches by step."""

import gzip
import json
import re
import shutil
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxstages.config import DataConfig, TokenizerConfig
from jaxstages.data import prepare as preparing
from jaxstages.data import shards, sources
from jaxstages.data.batches import batches_by_step, batches_once
from jaxstages.data.prefetch import prefetch
from jaxstages.data.prepare import Prepared, prepare
from jaxstages.data.sources import open_source
from jaxstages.data.tasks import Encoded, Task
from jaxstages.data.tokenizer import Tokenizer
from jaxstages.data.train_tokenizer import make_tokenizer
from jaxstages.types import Batch

RECORDS = [{"text": f"number {i} and {i * i}"} for i in range(60)]


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return make_tokenizer(
        TokenizerConfig(vocab_size=300), (r["text"] for r in RECORDS), tmp_path / "tokenizer" / "tokenizer.json"
    )


def write_jsonl(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def write_array_record(path: Path, records: list[dict]) -> None:
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(json.dumps(record).encode())
    writer.close()


def prepared(tmp_path: Path, tokenizer: Tokenizer, records: list[dict] = RECORDS, part: str = "train", **data: object):
    source = open_source(str(write_jsonl(tmp_path / "data.jsonl", records)), tmp_path)
    return prepare(source, part, DataConfig(task="lm", **data), tokenizer, 32, tmp_path / "cache")


def all_rows(source: Prepared) -> list[Batch]:
    return list(batches_once(source, batch_size=4))


def test_every_format_gives_the_same_records(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    lines = [json.dumps(record).encode() for record in RECORDS]
    write_jsonl(tmp_path / "a.jsonl", RECORDS)
    with gzip.open(tmp_path / "a.jsonl.gz", "wb") as file:
        file.write(b"\n".join(lines))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(RECORDS), tmp_path / "a.parquet")
    write_array_record(tmp_path / "a.array_record", RECORDS)
    for name in ("a.jsonl", "a.jsonl.gz", "a.parquet", "a.array_record"):
        source = open_source(str(tmp_path / name), tmp_path)
        assert [item.record for item in source.read()] == RECORDS, name
        assert source.records == len(RECORDS), name
        assert [item.record for item in source.read()] == RECORDS, "it can be read again"


@pytest.fixture
def often_switched() -> Iterator[None]:
    """Python goes from thread to thread much more often than it would."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


class InOrder:
    """A reader of ArrayRecord that is only asked for the next record: by number each takes time by the file's size."""

    def __init__(self, path: str, *options: str) -> None:
        from array_record.python.array_record_module import ArrayRecordReader

        self._reader = ArrayRecordReader(path, *options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reader, name)

    def read(self) -> bytes:
        return self._reader.read()


def test_no_record_is_asked_for_by_number(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_array_record(tmp_path / "a.array_record", RECORDS)
    monkeypatch.setattr(sources, "ArrayRecordReader", InOrder)
    monkeypatch.setattr(shards, "ArrayRecordReader", InOrder)
    assert [item.record for item in open_source(str(tmp_path / "a.array_record"), tmp_path).read()] == RECORDS
    assert all_rows(prepared(tmp_path, tokenizer, RECORDS))


def test_several_threads_read_each_their_own_row(tmp_path: Path, tokenizer: Tokenizer, often_switched: None) -> None:
    rows = prepared(tmp_path, tokenizer, [{"text": f"{i} {i * i}"} for i in range(2000)])
    batch = batches_by_step([rows], batch_size=1, seed=0).batch
    alone = [batch(k).tokens_BL.tobytes() for k in range(rows.index["rows"])]
    with ThreadPoolExecutor(8) as pool:
        assert [entry.tokens_BL.tobytes() for entry in pool.map(batch, range(len(alone)))] == alone


def test_rows_are_found_among_shards_of_which_some_are_empty(tmp_path: Path) -> None:
    source = Prepared(tmp_path, {"rows_of_shards": [0, 2, 0, 0, 1, 0]})
    assert [source.locate(row) for row in range(3)] == [(1, 0), (1, 1), (4, 0)]


def test_patterns_take_files_in_order_and_text_files_are_whole(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("second\n\nfile")
    (tmp_path / "a.txt").write_text("first")
    source = open_source(str(tmp_path / "*.txt"), tmp_path)
    assert [item.record for item in source.read()] == [{"text": "first"}, {"text": "second\n\nfile"}]
    assert source.texts == 2


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("missing/*.jsonl", "no file matches"),
        ("empty.txt", "is empty"),
        ("strange.docx", "unknown kind of file"),
        ("world:text", "no split"),
        ("world:chess:train", "chess"),
        ("world:text:test", "test"),
        ("tfds:no_such_dataset_here:train", "TFDS"),
        ("hf:nothing:train", "not installed"),
    ],
)
def test_sources_that_are_not_there_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, complaint: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)  # as where the extra is not installed
    Path("empty.txt").touch()
    Path("strange.docx").write_text("x")
    with pytest.raises(ValueError, match=complaint):
        open_source(name, tmp_path)


def test_a_prepared_tfds_folder_is_a_source(tmp_path: Path) -> None:
    world = open_source("world:pairs:validation", tmp_path)
    folder = next(tmp_path.rglob("dataset_info.json")).parent
    direct = open_source(f"tfds:{folder}:validation", tmp_path)
    assert [item.record for item in direct.read()] == [item.record for item in world.read()]
    assert direct.records == world.records == 400
    assert open_source(f"tfds:{folder}:train", tmp_path).fingerprint != direct.fingerprint, "splits are not one cache"


def test_malformed_records_are_counted_and_named(tmp_path: Path, tokenizer: Tokenizer, capsys) -> None:
    file = write_jsonl(tmp_path / "data.jsonl", RECORDS)
    file.write_bytes(file.read_bytes() + b'{"text": "cut\n[1, 2]\n{"other": 1}\n\xff\xfe\n')
    source = open_source(str(file), tmp_path)
    config = DataConfig(task="lm", max_bad_share=0.1)
    index = prepare(source, "train", config, tokenizer, 32, tmp_path / "cache").index
    assert (index["records"], index["bad"]) == (64, 4)
    assert [named.split(": ")[0].split(":")[-1] for named in index["bad_named"]] == ["61", "62", "63", "64"]
    assert "skipped 4 malformed of 64" in capsys.readouterr().out
    config.max_bad_share = 0.05
    with pytest.raises(ValueError, match=r"4 of 64 records are malformed, more than max_bad_share=0.05.*data.jsonl:61"):
        prepare(source, "train", config, tokenizer, 32, tmp_path / "cache")


@pytest.mark.parametrize("text", [b'{"text": "half a pair \\ud83d"}', b'{"text": 3.5e999}', b"[" * 100_000])
def test_what_is_no_text_is_a_malformed_record(tmp_path: Path, tokenizer: Tokenizer, text: bytes) -> None:
    file = write_jsonl(tmp_path / "data.jsonl", RECORDS)
    file.write_bytes(file.read_bytes() + text + b"\n")
    config = DataConfig(task="lm", max_bad_share=0.1)
    index = prepare(open_source(str(file), tmp_path), "train", config, tokenizer, 32, tmp_path / "cache").index
    assert (index["bad"], index["records"]) == (int(b"e999" not in text), 61)


def test_malformed_records_count_once_not_against_the_held_out_share(tmp_path: Path, tokenizer: Tokenizer) -> None:
    file = write_jsonl(tmp_path / "data.jsonl", RECORDS * 4)
    file.write_bytes(file.read_bytes() + b"broken\n")
    source, config = open_source(str(file), tmp_path), DataConfig(task="lm", holdout=0.1)
    assert prepare(source, "train", config, tokenizer, 32, tmp_path / "cache").index["bad"] == 1
    assert prepare(source, "validation", config, tokenizer, 32, tmp_path / "cache").index["bad"] == 0


def test_a_gzip_file_that_was_cut_short_is_named(tmp_path: Path) -> None:
    whole = gzip.compress(b'{"text": "a"}\n' * 1000)
    (tmp_path / "a.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"a.jsonl.gz is no whole gzip file"):
        open_source(str(tmp_path / "a.jsonl.gz"), tmp_path)


def test_all_masked_and_nothing_masked_data_are_refused(tmp_path: Path, tokenizer: Tokenizer, monkeypatch) -> None:
    pairs = write_jsonl(tmp_path / "pairs.jsonl", [{"prompt": "a", "target": "b"}])
    source, config = open_source(str(pairs), tmp_path), DataConfig(task="seq2seq")
    make_task = preparing.make_task
    for name, weight, complaint in (("none", 0.0, "every token is masked"), ("all", 1.0, "no token is masked")):

        def masked(*args: Any, weight: float = weight) -> Task:
            task = make_task(*args)

            def finish(drafts: Any) -> list[Encoded]:
                return [
                    entry._replace(
                        examples=[e._replace(weights=np.full_like(e.weights, weight)) for e in entry.examples]
                    )
                    for entry in task.finish(drafts)
                ]

            return task._replace(finish=finish)

        monkeypatch.setattr(preparing, "make_task", masked)
        with pytest.raises(ValueError, match=complaint):
            prepare(source, "train", config, tokenizer, 32, tmp_path / name)


def test_hold_out_by_hash_splits_without_overlap(tmp_path: Path, tokenizer: Tokenizer) -> None:
    records = RECORDS + RECORDS[:20]  # repeated questions stay on one side
    train = prepared(tmp_path, tokenizer, records, holdout=0.3)
    held_rows = prepared(tmp_path, tokenizer, records, part="validation", holdout=0.3)
    assert train.index["records"] + held_rows.index["records"] == len(records)
    sides = [
        {bytes(row) for batch in all_rows(source) for row in batch.tokens_BL if row.any()}
        for source in (train, held_rows)
    ]
    assert all(sides) and not sides[0] & sides[1]
    numbers = [_numbers(source, tokenizer) for source in (train, held_rows)]
    assert sorted(numbers[0] + numbers[1]) == sorted([*range(60), *range(20)])
    assert not set(numbers[0]) & set(numbers[1]) and len(numbers[1]) > 8


def _numbers(source: Prepared, tokenizer: Tokenizer) -> list[int]:
    """Which of RECORDS are in the rows: each says "number i and i*i"."""
    text = "".join(tokenizer.decode(row[row > 0]) for batch in all_rows(source) for row in batch.targets_BL)
    return [int(number) for number in re.findall(r"number (\d+) and", text)]


def test_hold_out_of_a_text_file_is_its_tail(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "book.txt").write_text("a" * 900 + "b" * 100)
    source, config = open_source(str(tmp_path / "book.txt"), tmp_path), DataConfig(task="lm", holdout=0.1)
    for part, letter, count in (("train", "a", 900), ("validation", "b", 100)):
        rows = all_rows(prepare(source, part, config, tokenizer, 32, tmp_path / "cache"))
        targets = np.concatenate([b.targets_BL[b.weights_BL > 0] for b in rows])
        text = tokenizer.decode(targets)
        assert set(text) == {letter} and len(text) == count


def test_of_many_text_files_whole_ones_are_held_out(tmp_path: Path, tokenizer: Tokenizer) -> None:
    for n, record in enumerate(RECORDS):
        (tmp_path / f"{n:02}.txt").write_text(record["text"])
    source, config = open_source(str(tmp_path / "*.txt"), tmp_path), DataConfig(task="lm", holdout=0.3)
    sides = [prepare(source, part, config, tokenizer, 32, tmp_path / "cache") for part in ("train", "validation")]
    numbers = [_numbers(side, tokenizer) for side in sides]
    assert sorted(numbers[0] + numbers[1]) == [*range(60)] and len(numbers[1]) > 8


@pytest.mark.parametrize(("files", "share"), [(1, 0.01), (3, 0.001)])
def test_a_share_that_holds_out_nothing_says_so(tmp_path: Path, tokenizer: Tokenizer, files: int, share: float) -> None:
    for n in range(files):
        (tmp_path / f"{n}.txt").write_text(f"a short text, number {n}")
    source, config = open_source(str(tmp_path / "*.txt"), tmp_path), DataConfig(task="lm", holdout=share)
    assert prepare(source, "train", config, tokenizer, 32, tmp_path / "cache").index["records"] == files
    with pytest.raises(ValueError, match=f"no example is left of 0 records; change data.holdout={share}, or name"):
        prepare(source, "validation", config, tokenizer, 32, tmp_path / "cache")


def test_the_cache_is_used_and_its_key_is_all_that_matters(tmp_path: Path, tokenizer: Tokenizer) -> None:
    first = prepared(tmp_path, tokenizer)
    stamp = (first.folder / "index.json").stat().st_mtime_ns
    assert prepared(tmp_path, tokenizer).folder == first.folder
    assert (first.folder / "index.json").stat().st_mtime_ns == stamp
    assert prepared(tmp_path, tokenizer, RECORDS[:-1]).folder != first.folder
    assert prepared(tmp_path, tokenizer, text="{text}!").folder != first.folder


def test_a_cache_that_was_cut_short_is_never_taken_for_whole(tmp_path: Path, tokenizer: Tokenizer, monkeypatch) -> None:
    monkeypatch.setattr(preparing, "BLOCK_RECORDS", 20)
    whole = prepared(tmp_path, tokenizer)
    assert whole.index["shards"] == 3
    expected = [batch.tokens_BL.tolist() for batch in all_rows(whole)]
    assert whole.max_segments() == max(int(batch.segments_BL.max()) for batch in all_rows(whole)) > 1
    kept = whole.folder / "shard-00000.json"
    stamp = kept.stat().st_mtime_ns
    for name in ("MANIFEST.json", "index.json", "shard-00001.json", "rows-00002.array_record", "shard-00002.json"):
        (whole.folder / name).unlink()
    (whole.folder / "rows-00001.array_record").write_bytes(b"half")
    again = prepared(tmp_path, tokenizer)
    assert [batch.tokens_BL.tolist() for batch in all_rows(again)] == expected
    assert kept.stat().st_mtime_ns == stamp, "the whole shard was not made again"


def test_shards_that_are_made_side_by_side_are_those_made_one_by_one(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch
) -> None:
    monkeypatch.setattr(preparing, "BLOCK_RECORDS", 7)
    monkeypatch.setattr(preparing, "MAX_WORKERS", 1)
    expected = prepared(tmp_path, tokenizer)
    kept = {path.name: path.read_bytes() for path in expected.folder.iterdir()}
    shutil.rmtree(expected.folder)
    monkeypatch.setattr(preparing, "MAX_WORKERS", 4)
    monkeypatch.setattr(preparing.os, "cpu_count", lambda: 4)
    together, write = threading.Barrier(4, timeout=60), preparing.write_shard

    def wait_for_the_others(folder: Path, shard: int, *rest) -> None:
        if shard < 4:
            together.wait()
        write(folder, shard, *rest)

    monkeypatch.setattr(preparing, "write_shard", wait_for_the_others)
    actual = prepared(tmp_path, tokenizer)
    assert {path.name: path.read_bytes() for path in actual.folder.iterdir()} == kept
    assert actual.index["shards"] == 9


def test_an_error_in_a_shard_ends_the_others_and_the_next_run_goes_on(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch
) -> None:
    monkeypatch.setattr(preparing, "BLOCK_RECORDS", 7)
    made, write = [], preparing.write_shard

    def fail_once(folder: Path, shard: int, *rest) -> None:
        made.append(shard)
        if shard == 2 and made.count(2) == 1:
            raise OSError(28, "No space left on device")
        write(folder, shard, *rest)

    monkeypatch.setattr(preparing, "write_shard", fail_once)
    with pytest.raises(OSError, match="No space left"):
        prepared(tmp_path, tokenizer)
    before = list(made)
    assert prepared(tmp_path, tokenizer).index["records"] == len(RECORDS)
    assert len(before) < 9 and sorted(made) == sorted([*range(9), 2])


def test_batch_k_is_a_function_of_k_and_hosts_share_it(tmp_path: Path, tokenizer: Tokenizer) -> None:
    source = prepared(tmp_path, tokenizer)
    options = {"batch_size": 4, "seed": 3}
    batch = batches_by_step([source], **options).batch
    forward = [batch(k) for k in range(10)]
    again = batches_by_step([source], **options).batch
    for k in (7, 0, 3):
        np.testing.assert_array_equal(again(k).tokens_BL, forward[k].tokens_BL)
    halves = [batches_by_step([source], local_rows=here, **options).batch for here in (range(2), range(2, 4))]
    np.testing.assert_array_equal(np.concatenate([half(5).tokens_BL for half in halves]), forward[5].tokens_BL)
    other = batches_by_step([source], batch_size=4, seed=4).batch
    assert any(not np.array_equal(other(k).tokens_BL, forward[k].tokens_BL) for k in range(3))


def test_each_pass_has_each_row_once_and_is_shuffled_anew(tmp_path: Path, tokenizer: Tokenizer) -> None:
    source = prepared(tmp_path, tokenizer)
    rows = source.index["rows"]
    batch = batches_by_step([source], batch_size=1, seed=0).batch
    passes = [[batch(k).tokens_BL.tobytes() for k in range(p * rows, (p + 1) * rows)] for p in range(2)]
    assert sorted(passes[0]) == sorted(passes[1]) and len(set(passes[0])) == rows
    assert passes[0] != passes[1]


def test_mixtures_by_weight(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "x").mkdir()
    left = prepared(tmp_path, tokenizer)
    right = prepared(tmp_path / "x", tokenizer, [{"text": "zzz " * 6}] * 40)
    mark = int(tokenizer.encode("zzz")[0])
    batch = batches_by_step([left, right], batch_size=8, seed=0, weights=(3.0, 1.0)).batch
    share = np.mean([np.any(row == mark) for k in range(50) for row in batch(k).tokens_BL])
    assert share == pytest.approx(0.25, abs=0.02)


def test_held_out_rows_count_once_whatever_the_batch(tmp_path: Path, tokenizer: Tokenizer) -> None:
    source = prepared(tmp_path, tokenizer)
    for size in (1, 3, 4, 64):
        batches = list(batches_once(source, batch_size=size))
        assert all(batch.tokens_BL.shape == (size, 32) for batch in batches)
        assert sum(float(batch.weights_BL.sum()) for batch in batches) == source.index["scored"]


@pytest.mark.parametrize(("size", "hosts"), [(2, 2), (4, 2), (4, 4), (6, 3), (64, 4)])
def test_held_out_rows_count_once_on_any_number_of_hosts(
    tmp_path: Path, tokenizer: Tokenizer, size: int, hosts: int
) -> None:
    """Also where the last batch has less rows than there are hosts: all of them have as many batches."""
    source = prepared(tmp_path, tokenizer)
    alone = [batch.tokens_BL for batch in batches_once(source, batch_size=size)]
    each = [
        list(batches_once(source, batch_size=size, local_rows=range(p * size // hosts, (p + 1) * size // hosts)))
        for p in range(hosts)
    ]
    assert {len(batches) for batches in each} == {len(alone)}
    assert sum(float(batch.weights_BL.sum()) for batches in each for batch in batches) == source.index["scored"]
    for number, whole in enumerate(alone):
        np.testing.assert_array_equal(np.concatenate([batches[number].tokens_BL for batches in each]), whole)


def test_prefetch_keeps_the_order_and_passes_errors_on() -> None:
    assert list(prefetch(lambda k: k * k, range(3, 9))) == [k * k for k in range(3, 9)]

    def broken(k: int) -> int:
        if k == 2:
            raise ValueError("bad batch")
        return k

    with pytest.raises(ValueError, match="bad batch"):
        list(prefetch(broken, range(5)))


@pytest.mark.parametrize(("group", "begun"), [(1, [3, 4, 5, 6, 7, 8]), (4, [4, 4, 8, 8, 8, 8])])
def test_prefetch_begins_the_next_ones_in_groups(group: int, begun: list[int]) -> None:
    loaded: list[int] = []

    def items() -> Iterator[int]:
        for k in range(8):
            loaded.append(k)
            yield k

    made = prefetch(lambda k: -k, items(), group=group)
    assert [(next(made), len(loaded)) for _ in range(6)] == [(-k, count) for k, count in enumerate(begun)]
    assert list(made) == [-6, -7]


def test_questions_are_kept_in_order(tmp_path: Path, tokenizer: Tokenizer) -> None:
    pairs = write_jsonl(tmp_path / "p.jsonl", [{"prompt": f"q{i}", "target": f"a{i}", "kind": "k"} for i in range(10)])
    source = prepare(
        open_source(str(pairs), tmp_path), "train", DataConfig(task="seq2seq"), tokenizer, 32, tmp_path / "c"
    )
    assert [q.reference for q in source.questions()] == [f"a{i}" for i in range(10)]
    assert preparing.subsample_evenly(range(10), 5) == [0, 2, 4, 6, 8]
    assert preparing.subsample_evenly("abc", 0) == preparing.subsample_evenly("abc", 3) == "abc"
    shutil.rmtree(source.folder)
