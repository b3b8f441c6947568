"""Whatever a user gives, recipes, words of the command line, tokenizers or data, is taken or refused in one line.

A traceback, a hang, a crash of the interpreter or memory without bound fails. `--fuzz` says how many random cases of
each kind there are, `--seed` which.
"""

import copy
import gzip
import json
import os
import random
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from jaxstages import config as recipes
from jaxstages.cli import main
from jaxstages.cli import prepare as preparing
from jaxstages.cli.generate import _read_prompts
from jaxstages.cli.resolve import resolve_recipe
from jaxstages.config import DataConfig, Recipe, StageConfig, TokenizerConfig
from jaxstages.config.checks import validate
from jaxstages.data import tokenizer as tokenizing
from jaxstages.data import train_tokenizer
from jaxstages.data.prepare import Prepared, prepare
from jaxstages.data.run_tokenizer import open_tokenizer
from jaxstages.data.sentencepiece import BPE, UNIGRAM
from jaxstages.data.sources import open_source
from jaxstages.data.tokenizer import Tokenizer
from jaxstages.data.train_tokenizer import make_tokenizer
from jaxstages.runtime import files
from tests.reliability.harness import print_table
from tests.tiny import recipe as tiny_recipe
from tests.tiny import sentencepiece_model, write_data

ROOT = Path(__file__).parents[2]

TEXTS = (
    "a red house",
    "",
    " ",
    "\0",
    "\ud83d",
    "\ufeff",
    "é\U0001f600",
    "x" * 300,
    "<|end|>",
    "a\r\nb",
    "{text}",
    "nan",
)
VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 7, 10**9, 2**31, 2**32, 2**64, 10**30, -(10**30), 0.5, 1e308, -1e308, 1e-320),
    *(
        float("nan"),
        float("inf"),
        [],
        {},
        [[]],
        [None],
        [float("nan")],
        ["a"],
        {"a": 1},
        [1, "a"],
        "(",
        "[",
        "none",
        *TEXTS,
    ),
)
WORDS = (
    *("", "1", "-1", "nan", "inf", "1e308", "1e400", "9" * 40, "9" * 5000, "True", "None", "[]", "()", "{}", "(1,2)"),
    *("('a',)", "('a','b'", "[[1],[2]]", "a,b", '"', "'", "\0", "\udcff", "é\n", "(None,)", "(nan,)", "1j", "(" * 200),
)
STRANGE = (
    *(
        "--config=",
        "--config",
        "--config.",
        "--config.=1",
        "--config=data",
        "--config=data/text.jsonl",
        "-config.seed=2",
    ),
    *(
        "--config=nowhere.py",
        "--config=raises.py",
        "--config=tiny.py:x:y",
        "--workdir",
        "--workdir=\0",
        "--workdir=tiny.py",
    ),
    *("-", "--", "---x", "--nodebug_nans", "--flagfile=none", "--undefok=x", "--stage=x", "--seed=x", "run", "\0", ""),
)


@pytest.fixture(autouse=True)
def _no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands of small files need not outlast a power cut."""
    monkeypatch.setattr(files, "sync", lambda _: None)


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    texts = iter([f"a red house {i}" for i in range(50)])
    return make_tokenizer(TokenizerConfig(vocab_size=280), texts, tmp_path / "made.json")


def outcome(case: str, run: Callable[[], object]) -> str:
    """ "taken" or "refused": a ValueError of one line. Anything else goes on, with what led to it."""
    start = time.monotonic()
    try:
        run()
        actual = "taken"
    except ValueError as error:
        assert "\n" not in str(error).strip("\n"), f"{case}: {error}"
        actual = "refused"
    except BaseException as error:
        error.add_note(case)
        raise
    assert time.monotonic() - start < 60, case
    return actual


def report(name: str, counts: Counter[str], start: float, capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        print_table(name, {"seconds": round(time.monotonic() - start, 1), **sorted_counts(counts)})


def sorted_counts(counts: Counter[str]) -> dict[str, int]:
    return dict(sorted(counts.items()))


def changed(rng: random.Random, value: Any) -> Any:
    """A copy of plain JSON in which one thing, at any depth, is another, missing or new."""
    if isinstance(value, dict) and value and rng.random() < 0.93:
        key = rng.choice(list(value))
        if rng.random() < 0.05:
            return {k: v for k, v in value.items() if k != key}
        if rng.random() < 0.05:
            return value | {rng.choice(TEXTS): rng.choice(VALUES)}
        return value | {key: changed(rng, value[key])}
    if isinstance(value, list) and value and rng.random() < 0.8:
        place = rng.randrange(len(value))
        return [*value[:place], changed(rng, value[place]), *value[place + 1 :]]
    return rng.choice(VALUES)


def fields_of(value: dict[str, Any], path: str = "config") -> list[str]:
    below = [name for key, item in value.items() if isinstance(item, dict) for name in fields_of(item, f"{path}.{key}")]
    return [*(f"{path}.{key}" for key in value), *below]


# Recipes ----------------------------------------------------------------------------------------------------------


def test_random_recipes(
    tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    start, counts = time.monotonic(), Counter()
    plain = recipes.to_dict(tiny_recipe(tmp_path))
    for case in range(request.config.getoption("--fuzz")):
        seed = f"{request.config.getoption('--seed')}/{case}"
        rng = random.Random(seed)
        value: Any = copy.deepcopy(plain)
        for _ in range(rng.choice((1, 1, 2, 3))):
            value = changed(rng, value)
        counts[outcome(f"{seed}: {value}", lambda value=value: validate(recipes.from_dict(value)))] += 1
    report("recipes", counts, start, capsys)


def test_random_words(
    tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    start, counts = time.monotonic(), Counter()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(preparing, "prepare_all", lambda *_: None)
    write_data(Path("data"))
    load = "from pathlib import Path\nfrom tests.tiny import recipe\ndef get_config(variant=''):\n    "
    Path("tiny.py").write_text(f"{load}return recipe(Path('data'))\n")
    Path("raises.py").write_text(f"{load}return 1 / 0\n")
    fields = fields_of(recipes.to_dict(tiny_recipe(tmp_path)))
    assert call(["jaxstages", "prepare", "--workdir=new", "--config=tiny.py"], capfd) == 0
    for case in range(request.config.getoption("--fuzz")):
        rng = random.Random(f"{request.config.getoption('--seed')}/{case}")
        words = ["jaxstages", "prepare", "--workdir=new", "--config=tiny.py"]
        for _ in range(rng.choice((1, 1, 2, 3))):
            match rng.randrange(6):
                case 0:
                    words.insert(rng.randrange(1, len(words) + 1), rng.choice(STRANGE))
                case 1:
                    words.append(f"--{rng.choice(fields)}{rng.choice(('.x', '', '[0]', '.', '..y'))}")
                case _:
                    words.append(f"--{rng.choice(fields)}={rng.choice(WORDS)}")
        code = call(words, capfd)
        assert code in (0, 2), f"case {case} ended in {code}: {words}"
        counts[f"exit code {code}"] += 1
    report("words", counts, start, capfd)


def call(words: list[str], capfd: pytest.CaptureFixture[str]) -> int:
    try:
        code = main.main(words)
    except BaseException as error:
        error.add_note(repr(words))
        raise
    err = capfd.readouterr().err
    assert err.count("\n") == (code != 0), (words, err)
    return code


@pytest.mark.parametrize(
    ("path", "value", "complaint"),
    [
        ("model.layers", 10**9, "layers=1000000000 must be at most 16384"),
        ("model.context", 10**9, "at most 1048576"),
        ("pretrain.loop.batch_size", 10**9, "at most 1048576"),
        ("seed", 2**64, "at most 2147483647"),
        ("seed", -1, "must not be negative"),  # Grain's shuffle refused it, in the middle of a run
        ("pretrain.optim.schedule.peak_lr", 1e308, "at most 3e"),
        ("pretrain.loop.hang_seconds", 1e30, "at most 1000000000"),
        ("mesh.data", -5, "config.mesh.data=-5 must be at least 1"),
        ("pretrain.optim.beta1", 1.0, "must be less than 1"),
        ("pretrain.data.weights", [float("nan")], "weights=nan must be a finite number"),
        ("pretrain.data.train", "x.jsonl", "must be a tuple"),  # was read as seven sources of a letter
        ("pretrain.data.train", 3, "must be a tuple"),
        ("pretrain.optim.freeze", ["("], "unterminated subpattern"),
        ("pretrain.data.text", "{text", "expected '}'"),
        ("name", "\ud800", "must be text"),
        ("cache", "a\0b", "must be text"),
        ("finetune.data.text", "{a}", "data.text='{a}' does not apply to task='seq2seq'"),
        ("pretrain.data.prompt", "{a}", "does not apply to task='lm'"),
        ("tokenizer.path", "t.json", "does not apply to kind='bpe'"),
        ("pretrain.optim.muon_lr_factor", 2.0, "does not apply to name='adamw'"),
        ("pretrain.optim.schedule.decay_share", 0.3, "does not apply to name='cosine'"),
        ("pretrain.optim.schedule.plateau_window", 3, "does not apply to name='cosine'"),
        ("pretrain", [1], "must be an object with the fields of StageConfig"),
        ("model.attention", None, "must be an object"),
    ],
)
def test_recipes_that_were_taken_or_crashed(tmp_path: Path, path: str, value: object, complaint: str) -> None:
    plain = recipes.to_dict(tiny_recipe(tmp_path))
    *owners, field = path.split(".")
    owner = plain
    for name in owners:
        owner = owner[name]
    owner[field] = value
    with pytest.raises(ValueError, match=complaint):
        validate(recipes.from_dict(plain))


@pytest.mark.parametrize(
    "content", [b"", b"\xff", b"[]", b"3", b"{}", b'{"recipe": 1}', b'{"recipe": {}}', b"[" * 2000]
)
def test_a_damaged_recipe_json_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "recipe.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"recipe.json"):
        resolve_recipe(None, tmp_path)


def test_a_recipe_json_that_was_edited_is_validated(tmp_path: Path) -> None:
    recipe = recipes.to_dict(tiny_recipe(tmp_path))
    recipe["model"]["layers"] = -3
    files.write_json(tmp_path / "recipe.json", {"recipe": recipe})
    with pytest.raises(ValueError, match=r"recipe.json: config.model.layers=-3 must be at least 1"):
        resolve_recipe(None, tmp_path)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b'{"prompt": "caf\xe9"}', "p.jsonl:1: not JSON"),
        (b'{"prompt": "a"}\n[1]', "p.jsonl:2: a JSON object is wanted"),
        (b'{"prompt": ["a"]}', "p.jsonl:1: wanted is"),
        (b"\0\0\0\0", "begins like UTF-16"),
        (b"[" * 100_000, "p.jsonl:1: not JSON"),
        (b"\n\n", "has no line"),
    ],
)
def test_prompts_that_are_none(tmp_path: Path, content: bytes, complaint: str) -> None:
    (tmp_path / "p.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=complaint):
        _read_prompts(tmp_path / "p.jsonl")


def test_a_prompt_may_have_any_letter(tmp_path: Path) -> None:
    """A line separator within a string was taken for the end of the line."""
    (tmp_path / "p.jsonl").write_text('\ufeff{"prompt": "a\u2028b"}\r\n\n', encoding="utf-8")
    assert _read_prompts(tmp_path / "p.jsonl") == ["a\u2028b"]


# Tokenizers -------------------------------------------------------------------------------------------------------


def foreign(tmp_path: Path, content: bytes, name: str = "foreign.json") -> Tokenizer:
    (tmp_path / name).write_bytes(content)
    config = TokenizerConfig(kind="file", path=str(tmp_path / name))
    actual = make_tokenizer(config, iter(()), tmp_path / "taken.json")
    assert actual.decode(actual.encode("a red house 1")) is not None and len(actual.token_bytes()) == actual.vocab_size
    return actual


def unigram() -> dict[str, Any]:
    model = tokenizers.models.Unigram([("<unk>", 0.0), ("a", -1.0), ("\u2581a", -1.2)], 0)
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    backend.decoder = tokenizers.decoders.Metaspace()
    return json.loads(backend.to_str()) | {"normalizer": {"type": "Lowercase"}}


def word_level() -> dict[str, Any]:
    return json.loads(tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "[UNK]": 1}, "[UNK]")).to_str())


def test_random_tokenizers(
    tmp_path: Path, tokenizer: Tokenizer, request: pytest.FixtureRequest, capfd: pytest.CaptureFixture[str]
) -> None:
    start, counts = time.monotonic(), Counter()
    own = (tmp_path / "made.json").read_bytes()
    plain = [json.loads(own), unigram(), word_level()]
    for entry in plain:
        foreign(tmp_path, json.dumps(entry).encode())
    for case in range(request.config.getoption("--fuzz")):
        seed = f"{request.config.getoption('--seed')}/{case}"
        rng = random.Random(seed)
        value = changed(rng, rng.choice(plain))
        content = damaged(rng, own) if rng.random() < 0.2 else json.dumps(value).encode()
        counts[outcome(seed, lambda content=content: foreign(tmp_path, content))] += 1
    report("tokenizers", counts, start, capfd)


def test_random_models_of_sentencepiece(
    tmp_path: Path, request: pytest.FixtureRequest, capfd: pytest.CaptureFixture[str]
) -> None:
    start, counts = time.monotonic(), Counter()
    plain = [sentencepiece_model(kind, {35: 1}) for kind in (UNIGRAM, BPE)]
    for entry in plain:
        foreign(tmp_path, entry, "foreign.model")
    for case in range(request.config.getoption("--fuzz")):
        seed = f"{request.config.getoption('--seed')}/{case}"
        rng = random.Random(seed)
        content = damaged(rng, rng.choice(plain))
        counts[outcome(seed, lambda content=content: foreign(tmp_path, content, "foreign.model"))] += 1
    report("models of SentencePiece", counts, start, capfd)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "BAAAAAECAwRh"}}, "can't encode the data"),
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "x"}}, "can't be read as a tokenizer.json"),
        ({"model": {"type": "WordLevel", "vocab": {"a": 2**31}, "unk_token": "a"}}, "they must be 0 to"),
        ({"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "none"}}, "can't encode the data"),
        ({"model": None}, "can't be read as a tokenizer.json"),
    ],
)
def test_tokenizers_that_crashed(tmp_path: Path, change: dict[str, Any], complaint: str) -> None:
    """The first two are panics of the library's Rust code, which are no Exceptions; the third took half a minute."""
    with pytest.raises(ValueError, match=complaint):
        foreign(tmp_path, json.dumps(word_level() | change).encode())


def test_an_interrupt_is_no_fault_of_a_tokenizer() -> None:
    with pytest.raises(KeyboardInterrupt), tokenizing.errors_as_value_error("never"):
        raise KeyboardInterrupt


def test_long_texts_are_encoded_and_learned_from_in_pieces(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(0)
    text = "".join(
        rng.choice(("red", "house", " ", "  ", "\n", "\t", "!", "1", "é", " \n ", "'s", "\x1c")) for _ in range(9000)
    )
    texts = [text, "", "a red", "x" * 400]
    whole = [ids.tolist() for ids in tokenizer.encode_batch(texts)]
    config = TokenizerConfig(vocab_size=300)
    learned = [make_tokenizer(config, iter([text]), tmp_path / "1.json").sha256]
    monkeypatch.setattr(tokenizing, "ENCODE_CHARACTERS", 500)
    monkeypatch.setattr(train_tokenizer, "MAX_WORD_CHARACTERS", 20_000 - len(text))
    assert [ids.tolist() for ids in tokenizer.encode_batch(texts)] == whole
    learned.append(make_tokenizer(config, iter([text]), tmp_path / "2.json").sha256)
    monkeypatch.setattr(train_tokenizer, "MAX_WORD_CHARACTERS", 10**9)
    learned.append(make_tokenizer(config, iter([text]), tmp_path / "3.json").sha256)
    assert len(set(learned)) == 1


# Data -------------------------------------------------------------------------------------------------------------

RECORDS: dict[str, list[dict[str, Any]]] = {
    "lm": [{"text": f"a red house {i}", "n": i} for i in range(12)],
    "seq2seq": [{"prompt": f"red {i}", "target": f"house {i}", "kind": "k"} for i in range(12)],
    "chat": [
        {"messages": [{"role": "user", "content": f"red {i}"}, {"role": "assistant", "content": "house"}], "kind": "k"}
        for i in range(12)
    ],
}
FORMATS = ("jsonl", "jsonl.gz", "txt", "parquet", "array_record")


def damaged(rng: random.Random, content: bytes) -> bytes:
    place, size = rng.randrange(len(content)), rng.randrange(1, 60)
    match rng.randrange(6):
        case 0:
            return content[:place]
        case 1:
            return content[:place] + rng.randbytes(size) + content[place + size :]
        case 2:
            return content[:place] + bytes(size) + content[place + size :]
        case 3:
            return content[:place] + content[place + size :]
        case 4:
            return content[:place] + content[rng.randrange(len(content)) :]
        case _:
            marks = (
                b"\xef\xbb\xbf",
                b"\xff\xfe",
                b"\0",
                b"\r\n",
                b"NaN",
                b'"',
                b"{",
                b"[" * 3000,
                b"\\ud83d",
                b"\xed\xa0\x80",
            )
            place = rng.choice((0, place))
            return content[:place] + rng.choice(marks) + content[place:]


def write_array_record(file: Path, lines: list[bytes]) -> None:
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(file), "group_size:1")
    for line in lines:
        writer.write(line)
    writer.close()


def write_parquet(file: Path, records: list[dict[str, Any]]) -> None:
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), file)


def encoded(kind: str, records: list[Any], file: Path) -> bytes:
    lines = [json.dumps(record).encode() for record in records]
    match kind:
        case "jsonl":
            return b"\n".join(lines) + b"\n"
        case "jsonl.gz":
            return gzip.compress(b"\n".join(lines), compresslevel=1)
        case "txt":
            return "\n".join(str(record) for record in records).encode("utf-8", "surrogatepass")
        case "array_record":
            write_array_record(file, lines)
        case _:
            write_parquet(file, records)
    return file.read_bytes()


def prepared(name: str, config: DataConfig, tokenizer: Tokenizer, folder: Path, part: str = "train") -> Prepared:
    return prepare(open_source(name, folder), part, config, tokenizer, 32, folder / "cache")


def test_random_data(
    tmp_path: Path, tokenizer: Tokenizer, request: pytest.FixtureRequest, capfd: pytest.CaptureFixture[str]
) -> None:
    start, counts = time.monotonic(), Counter()
    valid = {(kind, task): encoded(kind, RECORDS[task], tmp_path / f"v.{kind}") for kind in FORMATS for task in RECORDS}
    for case in range(request.config.getoption("--fuzz")):
        seed = f"{request.config.getoption('--seed')}/{case}"
        rng = random.Random(seed)
        kind, task = rng.choice(FORMATS), rng.choice(list(RECORDS))
        file = tmp_path / f"{case}.{kind}"
        content = valid[kind, task]
        if rng.random() < 0.6 and kind != "parquet":
            records: list[Any] = [changed(rng, entry) if rng.random() < 0.2 else entry for entry in RECORDS[task]]
            content = encoded(kind, records, tmp_path / f"v.{kind}")
        if rng.random() < 0.6:
            for _ in range(rng.choice((1, 1, 2, 5))):
                content = damaged(rng, content) if content else content
        file.write_bytes(content)
        config = DataConfig(task=task, max_bad_share=rng.choice((0.01, 0.6, 1.0)), holdout=rng.choice((0.0, 0.3)))
        part = rng.choice(("train", "validation"))
        actual = outcome(
            f"{seed}: {file}", lambda name=str(file), c=config, p=part: prepared(name, c, tokenizer, tmp_path, p)
        )
        counts[f"{kind} {actual}"] += 1
        file.unlink()
    report("data", counts, start, capfd)


LINE = b'{"text": "a red house"}\n'
DEEP = b"[" * 400 + b"]" * 400


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("bom.jsonl", b"\xef\xbb\xbf" + LINE * 9, "9 0"),
        ("bom.txt", b"\xef\xbb\xbfa red house", "1 0"),
        ("crlf.jsonl", LINE.replace(b"\n", b"\r\n") * 9 + b"\r\n\r\n", "9 0"),
        ("nul.jsonl", LINE * 9 + b"\0\n", "10 1"),
        ("nul.txt", b"a red \0 house", "1 0"),
        ("utf16.jsonl", LINE.decode().encode("utf-16"), "begins like UTF-16; save it as UTF-8"),
        ("utf16le.jsonl", LINE.decode().encode("utf-16-le"), "begins like UTF-16"),
        ("utf16.txt", "a red house".encode("utf-16"), "begins like UTF-16"),
        ("utf16le.txt", "a red house".encode("utf-16-le"), "begins like UTF-16"),
        ("latin1.txt", "é".encode("latin-1"), "not UTF-8"),
        ("latin1.jsonl", LINE * 9 + b'{"text": "caf\xe9"}', "10 1"),
        ("surrogate.jsonl", LINE * 9 + b'{"text": "\\ud83d"}', "10 1"),
        ("nan.jsonl", LINE * 9 + b'{"text": "a", "n": NaN}\n{"text": "a", "n": -Infinity}', "11 2"),
        ("twice.jsonl", LINE * 9 + b'{"text": "a", "text": "b"}', "10 1"),
        ("deep.jsonl", LINE * 9 + b"[" * 100_000, "10 1"),
        ("deep_value.jsonl", LINE * 9 + b'{"text": "a", "n": ' + DEEP + b"}", "10 0"),
        ("types.jsonl", LINE * 9 + b'{"text": 1}\n{"text": null}\n{"text": ["a"]}\n3', "13 3"),
        ("digits.jsonl", LINE * 9 + b'{"text": ' + b"9" * 5000 + b"}", "10 1"),
        ("csv.jsonl", b"text,n\na red house,1\n", "2 of 2 records are malformed.*csv.jsonl:1"),
        ("white.jsonl", b" \n\n \n", "no example is left of 0 records"),
        ("white.txt", b" \n\n \n", "1 of 1 records are malformed"),
        ("empty.jsonl", b"", "is empty"),
        ("empty.jsonl.gz", gzip.compress(b"", mtime=0), "no example is left of 0 records"),
        ("cut.jsonl.gz", gzip.compress(random.Random(0).randbytes(9999), mtime=0)[:-99], "no whole gzip file"),
        ("plain.jsonl.gz", LINE, "no whole gzip file"),
        ("none.parquet", b"PAR1 none PAR1", "no whole Parquet file"),
        ("none.array_record", LINE * 9, "no whole ArrayRecord file"),
        ("zeros.array_record", bytes(2**17), "no whole ArrayRecord file"),
        ("keys.jsonl", LINE * 9 + b'{"' + b"k" * 10_000 + b'": 1}', "10 1"),
    ],
)
def test_data_of_every_ill(tmp_path: Path, tokenizer: Tokenizer, name: str, content: bytes, expected: str) -> None:
    (tmp_path / name).write_bytes(content)
    config = DataConfig(max_bad_share=0.5)
    if expected[0].isdigit() and len(expected) < 6:
        index = prepared(str(tmp_path / name), config, tokenizer, tmp_path).index
        assert f"{index['records']} {index['bad']}" == expected
        assert all(name in fault and len(fault) < 300 + len(str(tmp_path / name)) + 20 for fault in index["bad_named"])
    else:
        with pytest.raises(ValueError, match=expected):
            prepared(str(tmp_path / name), config, tokenizer, tmp_path)


@pytest.mark.parametrize(
    ("task", "record"),
    [
        ("seq2seq", b'{"prompt": "a", "target": "b", "kind": "\\ud83d"}'),  # the whole of the data was refused
        ("seq2seq", b'{"prompt": "a", "target": "b", "kind": ' + DEEP + b"}"),  # RecursionError
        ("chat", b'{"messages": [{"role": ' + DEEP + b', "content": "a"}]}'),  # RecursionError
        ("chat", b'{"messages": [{"role": "\\ud83d", "content": "a"}]}'),
        ("chat", b'{"messages": [{"role": ["user"], "content": "a"}, 3]}'),
        ("chat", b'{"messages": {"role": "user"}}'),
        ("chat", b'{"messages": [{"role": "user", "content": "\\ud83d"}, {"role": "assistant", "content": "a"}]}'),
    ],
)
@pytest.mark.parametrize("holdout", [0.0, 0.3])
def test_a_bad_field_is_a_malformed_record(
    tmp_path: Path, tokenizer: Tokenizer, task: str, record: bytes, holdout: float
) -> None:
    lines = encoded("jsonl", RECORDS[task], tmp_path)
    (tmp_path / "a.jsonl").write_bytes(lines + record)
    config = DataConfig(task=task, max_bad_share=0.5, holdout=holdout)
    assert prepared(str(tmp_path / "a.jsonl"), config, tokenizer, tmp_path).index["bad"] == 1


def test_a_text_without_its_bom(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfa")
    assert [item.record for item in open_source(str(tmp_path / "a.txt"), tmp_path).read()] == [{"text": "a"}]


def test_what_is_no_file_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").mkdir()
    (tmp_path / "b.jsonl").symlink_to(tmp_path / "b.jsonl")
    os.mkfifo(tmp_path / "c.jsonl")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "d.jsonl"))
    with pytest.raises(ValueError, match="no file matches"):
        open_source(str(tmp_path / "*.jsonl"), tmp_path)
    (tmp_path / "e.jsonl").write_bytes(LINE)
    assert open_source(str(tmp_path / "*.jsonl"), tmp_path).records == 1


def test_a_link_to_a_folder_above_does_not_multiply_the_data(tmp_path: Path) -> None:
    """The file was read forty times; with two such links the search never ended."""
    (tmp_path / "e.jsonl").write_bytes(LINE)
    for name in ("one", "two"):
        (tmp_path / name).symlink_to(tmp_path)
    with pytest.raises(ValueError, match="matches one file twice"):
        open_source(f"{tmp_path}/**/*.jsonl", tmp_path)


@pytest.mark.parametrize("name", ["a\tb.jsonl", "a\nb.jsonl", "a\udcff.jsonl"])
def test_names_that_no_list_of_files_can_hold(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(LINE)
    with pytest.raises(ValueError, match="rename it"):
        open_source(f"{tmp_path}/*.jsonl", tmp_path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.parquet", "a.array_record"])
def test_a_file_that_may_not_be_read_is_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    (tmp_path / name).write_bytes(LINE)

    def refused(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refused)  # root, who runs tests in a container, may read all
    with pytest.raises(ValueError, match=f"{name} can't be read: Permission denied; change its permissions"):
        open_source(str(tmp_path / name), tmp_path)


def test_a_large_text_file_is_several_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\nthree\n")
    monkeypatch.setattr("jaxstages.data.sources.TEXT_RECORD_BYTES", 8)
    items = list(open_source(str(tmp_path / "a.txt"), tmp_path).read())
    assert [item.record for item in items] == [{"text": "one\ntwo\n"}, {"text": "three\n"}]
    assert [item.where for item in items] == [str(tmp_path / "a.txt"), f"{tmp_path / 'a.txt'}:3"]


def test_the_tokenizer_learns_from_damaged_data_in_the_same_way(tmp_path: Path) -> None:
    """What is raised while the library asks for texts comes out as it is."""
    whole = gzip.compress(LINE * 5000)
    (tmp_path / "a.jsonl.gz").write_bytes(whole)
    recipe = Recipe(name="x", pretrain=StageConfig(data=DataConfig(train=(str(tmp_path / "a.jsonl.gz"),), holdout=0.1)))
    (tmp_path / "a.jsonl.gz").write_bytes(whole[:-20])
    with pytest.raises(ValueError, match="no whole gzip file"):
        open_tokenizer(recipe, tmp_path)


# Memory and time --------------------------------------------------------------------------------------------------


def write_heavy(kind: str, folder: Path) -> Path:
    rng = random.Random(0)
    good = b"".join(json.dumps({"text": f"a red house {rng.random()}"}).encode() + b"\n" for _ in range(300))
    name = {"text": "a.txt", "letters": "a.txt", "bomb": "a.jsonl.gz", "spaces": "a.jsonl.gz"}.get(kind, "a.jsonl")
    with (
        gzip.open(folder / name, "wb", compresslevel=1) if name.endswith(".gz") else (folder / name).open("wb") as file
    ):
        match kind:
            case "line":
                file.write(good + b'{"text": "' + b"word " * 20_000_000 + b'"}\n' + good)
            case "text":
                words = ["".join(rng.choices("abcdefghij", k=rng.randint(2, 8))) for _ in range(3000)]
                file.write((" ".join(rng.choices(words, k=170_000)) + "\n").encode() * 100)
            case "bomb" | "spaces":
                for _ in range(1000):
                    file.write((b"\0" if kind == "bomb" else b" ") * 1_000_000)
            case "letters":
                file.write("".join(rng.choices("ACGT", k=12_000_000)).encode())
            case _:
                file.write(good + b'{"text": "a", "n": [' + b"{}," * 5_000_000 + b"{}]}\n")
    return folder / name


def heavy(file: Path) -> None:
    """In a child: tokenizer and rows of `file`, then what came of it and the peak of memory in MB, as JSON."""
    data = DataConfig(train=(str(file),), holdout=0.1, max_bad_share=0.5)
    recipe = Recipe(name="heavy", tokenizer=TokenizerConfig(vocab_size=512), pretrain=StageConfig(data=data))
    try:
        made = open_tokenizer(recipe, file.parent / "work")
        actual = prepare(open_source(str(file), file.parent), "train", data, made, 1024, file.parent / "cache").index
        said = f"{actual['bad']} of {actual['records']}"
    except ValueError as error:
        said = str(error)
    # Not getrusage, which counts what the parent had before it became this program.
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    print(json.dumps({"said": said, "peak": int(peak.split()[1]) // 1024}))


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("line", "1 of 5"),
        ("text", "0 of 25"),
        ("bomb", "begins like UTF-16"),
        ("spaces", "longer than 16,777,216 bytes"),
        ("letters", "0 of 3"),
        ("values", "1 of 2"),
    ],
)
def test_memory_is_bounded(
    tmp_path: Path, kind: str, said: str, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    if kind in ("text", "letters") and request.config.getoption("--fuzz") < 1000:
        pytest.skip("half a minute each; --fuzz=1000 has them")
    file, start = write_heavy(kind, tmp_path), time.monotonic()
    command = f"from pathlib import Path; from tests.reliability.test_fuzz import heavy; heavy(Path({str(file)!r}))"
    done = subprocess.run([sys.executable, "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    actual = json.loads(done.stdout.splitlines()[-1])
    with capsys.disabled():
        print_table(f"memory, {kind}", {"seconds": round(time.monotonic() - start, 1), **actual})
    assert said in actual["said"] and actual["peak"] < 1500, actual
