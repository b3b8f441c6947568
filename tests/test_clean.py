"""Cleaning of records, and near-duplicates by MinHash; the same through Beam is in test_beam.py."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from jaxstages.config import DataConfig, TokenizerConfig
from jaxstages.config.data import CleanConfig, DuplicatesConfig
from jaxstages.data import dedup
from jaxstages.data import prepare as preparing
from jaxstages.data.clean import clean_item, clean_text, dedup_text
from jaxstages.data.prepare import Prepared, find_near_duplicates, prepare
from jaxstages.data.shards import items_of
from jaxstages.data.sources import Item, open_source
from jaxstages.data.tokenizer import Tokenizer
from jaxstages.data.train_tokenizer import make_tokenizer

ON = DuplicatesConfig(threshold=0.8)


def words(seed: int, count: int) -> list[str]:
    return [f"w{number}" for number in np.random.default_rng(seed).integers(0, 30_000, count)]


def changed(text: list[str], every: int) -> list[str]:
    """Each so-many-th word is another."""
    return [f"x{word}" if place % every == 0 else word for place, word in enumerate(text)]


def jaccard(left: str, other: str, size: int) -> float:
    sets = [
        {tuple(found[i : i + size]) for i in range(len(found) - size + 1)} for found in (left.split(), other.split())
    ]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def found(texts: list[str], tmp_path: Path, config: DuplicatesConfig = ON) -> list[int]:
    scratch = tmp_path / "scratch"
    scratch.mkdir(exist_ok=True)
    batches = dedup.batches(enumerate(texts))
    signed = ((orders, dedup.signatures(some, config)) for orders, some in batches)
    return dedup.find_near_duplicates(signed, config, scratch)


@pytest.mark.parametrize(
    ("config", "text", "cleaned"),
    [
        (CleanConfig(), "a\0b\ufeff", "a\0b\ufeff"),
        (CleanConfig(control_characters="remove"), "a\0b\tc\x85d\ufeff\r\n", "ab\tcd\r\n"),
        (CleanConfig(unicode="nfc"), "e\u0301 \ufb01ve", "\u00e9 \ufb01ve"),
        (CleanConfig(unicode="nfkc"), "e\u0301 \ufb01ve", "\u00e9 five"),
        # Composed only when what stands between is gone.
        (CleanConfig(control_characters="remove", unicode="nfc"), "e\0\u0301", "\u00e9"),
    ],
)
def test_text_is_cleaned(config: CleanConfig, text: str, cleaned: str) -> None:
    assert clean_text(text, config) == cleaned


def test_all_text_of_a_record_is_cleaned_and_the_rest_stays() -> None:
    record = {
        "messages": [{"role": "user", "content": "a\0"}, {"role": "assistant", "content": "b\0"}],
        "n": 1,
        "x": None,
    }
    config = DataConfig(task="chat", clean=CleanConfig(control_characters="remove"))
    cleaned = clean_item(Item("here", record), config).record
    assert json.dumps(cleaned) == json.dumps(record).replace("\\u0000", "")
    assert clean_item(Item("here", record), DataConfig(task="chat")).record is record
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    assert "too deeply" in clean_item(Item("here", {"messages": deep}), config).fault


def test_lengths_count_what_is_left_of_all_texts() -> None:
    clean = CleanConfig(control_characters="remove", min_characters=4, max_characters=6)
    config = DataConfig(task="seq2seq", clean=clean)

    def removed(prompt: str, target: str) -> str:
        return clean_item(Item("here", {"prompt": prompt, "target": target}), config).removed

    assert [removed("ab", "c\0\0\0"), removed("ab", "cd"), removed("abc", "def"), removed("abcd", "efg")] == [
        *("too_short", "", ""),
        "too_long",
    ]
    malformed = clean_item(Item("here", {"prompt": "a"}), config)
    assert (malformed.removed, dedup_text(malformed, config)) == ("", None)
    assert dedup_text(Item("here", {"prompt": "a", "target": "b"}, removed="too_short"), config) is None


@pytest.mark.parametrize("shingle", ["words", "characters"])
def test_signatures_are_of_the_set_of_shingles(shingle: str) -> None:
    config = DuplicatesConfig(threshold=0.8, shingle=shingle, shingle_size=3)
    texts = ["One two  three\tfour", "one TWO three four", "", "two", "one two three four one two three four"]
    hashes, begins = dedup.shingles(texts, config)
    ours = ["one two three four"] * 2 + ["\0", "two", texts[-1]]
    runs = [
        [tuple(units[i : i + 3]) for i in range(max(1, len(units) - 2))]
        for units in (text.split(" ") if shingle == "words" else list(text) for text in ours)
    ]
    assert np.diff([*begins, len(hashes)]).tolist() == list(map(len, runs))
    by_run: dict = {}
    for run, value in zip(itertools.chain(*runs), hashes.tolist(), strict=True):
        assert by_run.setdefault(run, value) == value, "a shingle has one hash"
    assert len(set(by_run.values())) == len(by_run), "and no two have the same"
    signed = dedup.signatures(texts, config)
    assert signed.shape == (5, 120) and signed.dtype == np.uint32
    np.testing.assert_array_equal(signed, np.concatenate([dedup.signatures([text], config) for text in texts]))
    assert (signed[0] == signed[1]).all() and not (signed[0] == signed[2]).any()


def test_signatures_are_the_same_on_every_machine() -> None:
    entry = dedup.signatures(["the same numbers everywhere, or caches would not be shared"], ON)
    assert entry[0, :3].tolist() == GOLDEN


GOLDEN = [1060635335, 1395141784, 2178902403]


def test_a_signature_estimates_jaccard() -> None:
    text = words(0, 400)
    for every in (100, 40, 15):
        left, right = " ".join(text), " ".join(changed(text, every))
        signed = dedup.signatures([left, right], DuplicatesConfig(threshold=0.8, permutations=2000, bands=20))
        s = jaccard(left, right, 5)
        assert (signed[0] == signed[1]).mean() == pytest.approx(s, abs=4 * np.sqrt(s * (1 - s) / 2000))


def test_pairs_meet_in_a_band_as_often_as_the_s_curve_says() -> None:
    # Sets that share s of their members, as texts of one-word shingles.
    config = DuplicatesConfig(threshold=0.5, shingle_size=1)
    for shared, each in ((80, 10), (70, 15), (60, 20)):
        s, texts = shared / (shared + 2 * each), []
        for pair in range(400):
            common = [f"{pair}c{i}" for i in range(shared)]
            texts += [" ".join([*common, *(f"{pair}{side}{i}" for i in range(each))]) for side in "ab"]
        keys = dedup.keys(dedup.signatures(texts, config), config.bands)[:, 1:]
        met = (keys[::2] == keys[1::2]).any(axis=1).mean()
        curve = 1 - (1 - s ** (config.permutations / config.bands)) ** config.bands
        assert met == pytest.approx(curve, abs=4 * np.sqrt(curve * (1 - curve) / 400) + 0.01), s


def test_exact_duplicates_go_whatever_else_and_the_first_stays(tmp_path: Path) -> None:
    for seed in range(5):
        draw = np.random.default_rng(seed)
        texts = [" ".join(words(int(kind), 30)) for kind in draw.integers(0, 40, 200)]
        firsts = {texts.index(text) for text in texts}
        assert found(texts, tmp_path) == [place for place in range(200) if place not in firsts]
    assert found(["Some text", "some\n TEXT ", "other text"], tmp_path) == [1]
    assert found([], tmp_path) == []


def test_unrelated_texts_stay_and_near_ones_go_by_the_threshold(tmp_path: Path) -> None:
    base = [words(seed, 200) for seed in range(100)]
    texts = [" ".join(text) for text in base]
    assert found(texts, tmp_path) == []
    near = [" ".join(changed(text, 100)) for text in base]  # similar by 0.91
    far = [" ".join(changed(text, 20)) for text in base]  # by 0.6
    assert jaccard(texts[0], near[0], 5) > 0.9 > 0.65 > jaccard(texts[0], far[0], 5)
    assert found([*texts, *near], tmp_path) == list(range(100, 200))
    assert found([*near, *texts], tmp_path) == list(range(100, 200)), "the first stays, whichever it is"
    assert found([*texts, *far], tmp_path) == []
    lower = DuplicatesConfig(threshold=0.4, bands=40)  # of which at 0.6 one always agrees
    assert found([*texts, *far], tmp_path, lower) == list(range(100, 200))


def drifting(seed: int) -> list[str]:
    """Each is similar to the one before, by 0.88, and from the third on not to the first."""
    text, found = words(seed, 100), []
    for place in range(0, 60, 10):
        found.append(" ".join(text))
        text = [*text[:place], f"y{place}", f"z{place}", *text[place + 2 :]]
    return found


def test_the_answer_does_not_depend_on_the_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [text for kinds in zip(*map(drifting, range(20)), strict=True) for text in kinds]
    expected = found(texts, tmp_path)
    assert len(expected) > 80
    monkeypatch.setattr(dedup, "BATCH_CHARACTERS", 1000)
    monkeypatch.setattr(dedup, "PAIR_BLOCK", 3)
    assert found(texts, tmp_path) == expected
    # By the definition: an earlier text of the same band is similar.
    signed = dedup.signatures(texts, ON)
    bands = dedup.keys(signed, ON.bands)
    slow = [
        later
        for later in range(len(texts))
        if any((bands[later] == bands[e]).any() and (signed[later] == signed[e]).mean() >= 0.8 for e in range(later))
    ]
    assert expected == slow


def test_a_band_with_everything_in_it_is_no_square(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, sizes, similar = words(0, 200), [], dedup.similar
    texts = [" ".join([*base[:100], f"n{number}", *base[100:]]) for number in range(300)]
    monkeypatch.setattr(dedup, "similar", lambda *some: (sizes.append(len(some[0])), similar(*some))[1])
    assert len(found(texts, tmp_path, DuplicatesConfig(threshold=1.0))) < 10
    assert sum(sizes) <= 20 * 300 * 32 < 20 * 300 * 299 / 2 / 4


RECORDS = [{"text": " ".join(words(i, 30))} for i in range(40)]
MESSY = [
    *RECORDS,
    {"text": "tiny"},
    *({"text": r["text"].upper() + "\0"} for r in RECORDS[:10]),
    {"text": "x y " * 400},
]
CLEANED = {
    "clean": CleanConfig(control_characters="remove", min_characters=10, max_characters=1000),
    "duplicates": DuplicatesConfig(threshold=0.8),
}


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return make_tokenizer(
        TokenizerConfig(vocab_size=300), (r["text"] for r in MESSY), tmp_path / "t" / "tokenizer.json"
    )


def write(path: Path, records: list[dict]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def rows_of(prepared: Prepared) -> list[bytes]:
    return [path.read_bytes() for path in sorted(prepared.folder.glob("rows-*"))]


def test_what_is_removed_is_counted_and_said(tmp_path: Path, tokenizer: Tokenizer, capsys) -> None:
    source, config = open_source(write(tmp_path / "a.jsonl", MESSY), tmp_path), DataConfig(**CLEANED)
    messy = prepare(source, "train", config, tokenizer, 32, tmp_path / "c")
    assert messy.index["removed"] == {"too_short": 1, "too_long": 1, "near_duplicate": 10}
    assert (messy.index["records"], messy.index["bad"]) == (52, 0)
    said = "removed 12 of 52 records: 1 too short, 1 too long, 10 near-duplicates"
    assert said in capsys.readouterr().out
    assert prepare(source, "train", config, tokenizer, 32, tmp_path / "c").folder == messy.folder
    assert said in capsys.readouterr().out, "also of rows that lay there"
    tidy = prepare(
        open_source(write(tmp_path / "b.jsonl", RECORDS), tmp_path),
        "train",
        DataConfig(),
        tokenizer,
        32,
        tmp_path / "c",
    )
    assert "removed" not in tidy.index
    assert rows_of(messy) == rows_of(tidy), "no trace of them is left"
    assert not list((tmp_path / "c").glob("*.scratch"))


def test_the_recipe_is_in_the_fingerprint_only_where_it_is_on(tmp_path: Path, tokenizer: Tokenizer) -> None:
    source = open_source(write(tmp_path / "a.jsonl", RECORDS), tmp_path)

    def folder(**data: object) -> str:
        return prepare(source, "train", DataConfig(**data), tokenizer, 32, tmp_path / "c").folder.name

    configs = (
        {},
        {"clean": CleanConfig(unicode="nfc")},
        {"clean": CleanConfig(min_characters=1)},
        {"duplicates": DuplicatesConfig(threshold=0.8)},
        {"duplicates": DuplicatesConfig(threshold=0.9)},
        {"duplicates": DuplicatesConfig(threshold=0.8, shingle="characters")},
    )
    assert len({folder(**config) for config in configs}) == len(configs)
    assert folder(clean=CleanConfig(), duplicates=DuplicatesConfig()) == folder()


def test_near_duplicates_never_fall_on_two_sides(tmp_path: Path, tokenizer: Tokenizer) -> None:
    records = [record for r in RECORDS for record in (r, {"text": f"{r['text']} and more"})]
    source = open_source(write(tmp_path / "a.jsonl", records), tmp_path)
    config = DataConfig(holdout=0.3, duplicates=DuplicatesConfig(threshold=0.8))
    gone, parts = find_near_duplicates(source, config, tmp_path / "c"), ("train", "validation")
    sides = [[item.record["text"] for item in items_of(source, part, config, gone) if item.record] for part in parts]
    assert sorted(sides[0] + sides[1]) == sorted(r["text"] for r in RECORDS) and all(sides)
    index = [prepare(source, part, config, tokenizer, 32, tmp_path / "c").index for part in parts]
    assert sum(entry["removed"]["near_duplicate"] for entry in index) == 40


def test_near_duplicates_are_looked_for_once_and_across_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(3):
        write(tmp_path / f"{number}.jsonl", RECORDS[::-1] if number == 2 else RECORDS[:5])
    source, config = open_source(str(tmp_path / "*.jsonl"), tmp_path), DataConfig(duplicates=ON)
    gone = find_near_duplicates(source, config, tmp_path / "c")
    assert gone is not None
    assert json.loads((gone / "index.json").read_text())["near_duplicates"] == 10
    assert len([item for item in items_of(source, "train", config, gone) if item.record]) == len(RECORDS)
    monkeypatch.setattr(preparing.dedup, "find_near_duplicates", None)
    assert find_near_duplicates(source, config, tmp_path / "c") == gone
    assert find_near_duplicates(source, DataConfig(), tmp_path / "c") is None
