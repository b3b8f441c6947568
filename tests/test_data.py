"""Tokenizer, tasks, chat and packing: the tables of their docstrings, and properties over any text."""

import json
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from jaxstages.config import DataConfig, TokenizerConfig
from jaxstages.data.chat import make_chat
from jaxstages.data.control_tokens import PRIVATE_USE, _unused_characters
from jaxstages.data.conversation import read_conversation
from jaxstages.data.packing import best_fit, lay_out, pack
from jaxstages.data.tasks import Example, is_held_out, make_task, render
from jaxstages.data.tokenizer import SPECIAL_TOKENS, Tokenizer, load_tokenizer
from jaxstages.data.train_tokenizer import make_tokenizer
from tests.tiny import example

CORPUS = ["the cat sat on the mat. ", "où est-il ? l'été, ça va.\n", "hello world " * 20]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    return make_tokenizer(TokenizerConfig(kind="bpe", vocab_size=300), iter(CORPUS), path)


PIECES = st.one_of(st.characters(codec="utf-8"), st.sampled_from(SPECIAL_TOKENS))
ANY_TEXT = st.lists(PIECES, max_size=60).map("".join)


@hypothesis.given(text=ANY_TEXT)
def test_any_text_survives_and_never_becomes_control(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert not set(ids.tolist()) & set(tokenizer.specials)
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes()[ids].sum() == len(text.encode())


def test_control_tokens_have_no_bytes_and_are_left_out_of_text(tokenizer: Tokenizer) -> None:
    assert all(tokenizer.token_bytes()[i] == 0 for i in tokenizer.specials)
    ids = [tokenizer.specials.user, *tokenizer.encode("hello").tolist(), tokenizer.specials.end_of_turn]
    assert tokenizer.decode(ids) == "hello"


def test_texts_with_every_private_use_character_are_refused() -> None:
    """Control tokens in a text are written with unused ones meanwhile."""
    assert next(_unused_characters("a")) == chr(PRIVATE_USE[0])
    with pytest.raises(ValueError, match="every private-use character"):
        next(_unused_characters("".join(map(chr, PRIVATE_USE))))


def test_character_tokenizer(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(
        TokenizerConfig(kind="characters"), iter(["abé\n", "ba"]), tmp_path / "t" / "tokenizer.json"
    )
    assert tokenizer.vocab_size == len(SPECIAL_TOKENS) + 1 + 4
    assert tokenizer.decode(tokenizer.encode("bé\na")) == "bé\na"
    assert tokenizer.token_bytes()[tokenizer.encode("éa")].tolist() == [2, 1]
    assert tokenizer.encode("z").tolist() == [len(SPECIAL_TOKENS)]


def test_tokenizer_from_elsewhere_gets_our_control_tokens(tokenizer: Tokenizer, tmp_path: Path) -> None:
    content = json.loads(tokenizer.backend.to_str())
    content["added_tokens"] = []
    content["model"]["vocab"] = {t: i for t, i in content["model"]["vocab"].items() if t not in SPECIAL_TOKENS}
    content["model"]["vocab"] = {t: i for i, t in enumerate(content["model"]["vocab"])}
    (tmp_path / "theirs.json").write_text(json.dumps(content))
    config = TokenizerConfig(kind="file", path=str(tmp_path / "theirs.json"))
    size, everything = len(content["model"]["vocab"]), ["lm", "seq2seq", "chat"]
    for tasks, more in ((["lm"], 1), (["lm", "classify"], 2), (["chat"], 5), (everything, len(SPECIAL_TOKENS))):
        ours = make_tokenizer(config, iter(()), tmp_path / "run" / "tokenizer.json", tasks)
        assert ours.vocab_size == size + more, "only what the tasks need is added"
    assert ours.decode(ours.encode("the cat <|end|>")) == "the cat <|end|>"


@pytest.mark.parametrize("content", [b"", b"{}", b"\x80\x04not a tokenizer", b'{"model": 1}'])
def test_a_damaged_tokenizer_is_one_clear_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ValueError, match="tokenizer"):
        load_tokenizer(tmp_path / "tokenizer.json")


def test_render() -> None:
    assert render("{en} => {fr}", {"en": "dog", "fr": "chien"}) == "dog => chien"
    assert render("en", {"en": "dog"}) == "dog"
    for template, record in [("en", {"fr": "x"}), ("{a}", {"a": None}), ("{a}", {"a": ["x"]}), ("{a}", {"a": "  "})]:
        with pytest.raises(ValueError):
            render(template, record)
    with pytest.raises(ValueError, match="__class__"):
        render("{a.__class__}", {"a": "x"})


def encoded(tokenizer: Tokenizer, record: dict, config: DataConfig, context: int):
    task = make_task(config, tokenizer, context)
    return task.finish([task.draft(record)])[0]


@hypothesis.given(text=st.text(min_size=1, max_size=200).filter(str.strip), context=st.integers(2, 40))
def test_long_text_is_cut_so_that_each_token_is_predicted_once(tokenizer: Tokenizer, text: str, context: int) -> None:
    examples = encoded(tokenizer, {"text": text}, DataConfig(task="lm"), context).examples
    end = tokenizer.specials.end_of_text
    whole = [end, *tokenizer.encode(text).tolist(), end]
    assert sum((e.ids[1:].tolist() for e in examples), []) == whole[1:]
    assert all(len(e.ids) <= context + 1 and e.weights.sum() == len(e.ids) - 1 for e in examples)


def test_pairs_train_on_the_target_and_the_end_only(tokenizer: Tokenizer) -> None:
    config = DataConfig(task="seq2seq", prompt="{en}", target="{fr}")
    actual = encoded(tokenizer, {"en": "the cat", "fr": "le chat"}, config, 64)
    ids, weights = actual.examples[0]
    scored = [i for i, w in zip(ids.tolist(), weights, strict=True) if w]
    assert scored == [*tokenizer.encode("le chat").tolist(), tokenizer.specials.end_of_text]
    assert actual.question is not None and actual.question.reference == "le chat"
    assert actual.question.prompt == ids[: len(actual.question.prompt)].tolist()
    assert actual.question.prompt[-1] == tokenizer.specials.separator


def test_a_pair_that_does_not_fit_is_counted_not_cropped(tokenizer: Tokenizer) -> None:
    actual = encoded(tokenizer, {"prompt": "x" * 50, "target": "y"}, DataConfig(task="seq2seq"), 16)
    assert actual.examples == [] and actual.lost_tokens > 16


CHAT = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "hi <|end|>"},
    {"role": "assistant", "content": "yo"},
    {"role": "user", "content": "bye"},
    {"role": "assistant", "content": "ciao"},
]


def test_chat_trains_on_the_assistant_and_its_end_tokens(tokenizer: Tokenizer) -> None:
    contents = tokenizer.encode_batch([m["content"] for m in CHAT])
    chat = make_chat(tokenizer)
    [written] = chat.encode(CHAT)
    ids, weights = written.ids, written.weights
    special = tokenizer.specials
    scored = ids[weights > 0].tolist()
    assert scored == [*contents[2].tolist(), special.end_of_turn, *contents[4].tolist(), special.end_of_turn]
    assert (ids == special.end_of_turn).sum() == 5, "the user's <|end|> is text"
    assert ids[:2].tolist() == [special.end_of_text, special.system]


def test_a_long_chat_is_cut_after_a_whole_answer(tokenizer: Tokenizer) -> None:
    whole = encoded(tokenizer, {"messages": CHAT}, DataConfig(task="chat"), 200).examples[0]
    actual = encoded(tokenizer, {"messages": CHAT}, DataConfig(task="chat"), len(whole.ids) - 2)
    assert len(actual.examples) == 1 and actual.lost_tokens > 0
    kept = actual.examples[0]
    assert kept.ids[-1] == tokenizer.specials.end_of_turn and kept.weights[-1] == 1
    assert kept.ids.tolist() == whole.ids[: len(kept.ids)].tolist()
    assert actual.question is not None and actual.question.reference == "ciao"


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        (None, 'no "messages"'),
        ([{"role": "robot", "content": "x"}], "role 'robot'"),
        ([{"role": "user", "content": "x"}], "no assistant"),
        ([{"role": "user", "content": " "}], "is empty"),
        ([{"role": "user", "content": 3}], "message 1"),
        ([{"role": "user", "content": None}], 'message 1 .user. has no "content"'),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "a part of type 'image_url'; only text is read"),
    ],
)
def test_malformed_chats_say_what_is_wrong(messages: object, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        read_conversation({"messages": messages})


def test_held_out_share_and_stability() -> None:
    chosen = [is_held_out(f"question {i}", 0.2) for i in range(5000)]
    assert 0.17 < np.mean(chosen) < 0.23
    assert is_held_out(" question 1 ", 0.2) == chosen[1]
    assert not any(is_held_out(f"{i}", 0.0) for i in range(100)) and all(is_held_out(f"{i}", 1.0) for i in range(100))


def test_best_fit_table() -> None:
    assert best_fit([5, 3, 2, 2], 7) == [[0, 2], [1, 3]]


@hypothesis.given(st.lists(st.integers(1, 32), max_size=200))
def test_best_fit_loses_nothing_and_never_overflows(lengths: list[int]) -> None:
    rows = best_fit(lengths, 32)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= 32 for row in rows)
    # At most one row can be half empty: what is in it would have fitted another.
    assert sum(sum(lengths[i] for i in row) * 2 <= 32 for row in rows) <= 1


def test_best_fit_limits_the_examples_of_a_row() -> None:
    assert best_fit([1] * 7, 10, max_examples=3) == [[0, 1, 2], [3, 4, 5], [6]]
    assert best_fit([1] * 7, 10) == [[*range(7)]]


def test_best_fit_is_near_full_on_many_short_examples() -> None:
    lengths = np.random.default_rng(0).lognormal(3.0, 0.6, 5000).astype(int).clip(1, 128).tolist()
    assert sum(lengths) / (128 * len(best_fit(lengths, 128))) > 0.98


def test_best_fit_refuses_what_is_too_long() -> None:
    with pytest.raises(ValueError, match="takes 9 slots; rows have 8"):
        best_fit([9], 8)


def test_lay_out_table() -> None:
    abc = Example(np.array([11, 12, 13], np.int32), np.array([0, 0, 1], np.float32))
    xy = Example(np.array([21, 22], np.int32), np.array([0, 1], np.float32))
    row = lay_out([abc, xy], 4)
    assert row[0].tolist() == [11, 12, 21, 0]
    assert row[1].tolist() == [12, 13, 22, 0]
    assert row[2].view(np.float32).tolist() == [0, 1, 1, 0]
    assert row[3].tolist() == [1, 1, 2, 0]
    assert row[4].tolist() == [0, 1, 0, 0]


def test_pack_keeps_every_scored_target() -> None:
    examples = [example(2 + i % 14, i) for i in range(50)]
    rows, groups = pack(examples, 16)
    assert sorted(i for group in groups for i in group) == list(range(50)) and len(groups) == len(rows)
    actual = sorted(int(t) for row in rows for t in row[1][row[2].view(np.float32) > 0])
    assert actual == sorted(int(t) for e in examples for t in e.ids[e.weights > 0])
