"""Chat records of every common shape, and what becomes of them under templates of the field."""

import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tensorflow_datasets as tfds

from jaxstages.config import DataConfig
from jaxstages.data.conversation import read_conversation
from jaxstages.data.sources import open_source
from jaxstages.data.tasks import make_task
from tests.test_chat import CUE, make_foreign, ours, small_template

CALL = {"name": "look", "arguments": {"at": "the sea"}}
USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}


def read(*messages: dict[str, Any], **record: Any) -> list[tuple[str, Any]]:
    conversation = read_conversation({"messages": list(messages)} | record)
    return [(message["role"], message.get("content")) for message in conversation.messages]


HI_YO = [("user", "hi"), ("assistant", "yo")]


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"messages": [USER, ANSWER]}, HI_YO),
        ({"messages": [USER, ANSWER], "system": "be brief"}, [("system", "be brief"), *HI_YO]),
        ({"messages": [{"role": "system", "content": None}, USER, ANSWER]}, HI_YO),
        ({"messages": [{"role": "system", "content": ""}, USER, ANSWER]}, [("system", ""), *HI_YO]),
        ({"messages": [ANSWER, USER, ANSWER]}, [HI_YO[1], *HI_YO]),
        ({"messages": [USER, USER, ANSWER, ANSWER]}, [HI_YO[0], *HI_YO, HI_YO[1]]),
        ({"messages": [USER, ANSWER, {"role": "developer", "content": "now!"}, ANSWER, USER]}, None),
        ({"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]}, HI_YO),
        ({"conversations": [{"from": "user", "value": "hi"}, {"from": "assistant", "value": "yo"}]}, HI_YO),
        ({"conversations": [USER, ANSWER], "system": "  "}, HI_YO),
        ({"messages": None, "conversations": [USER, ANSWER]}, HI_YO),
        ({"prompt": [USER], "completion": [ANSWER]}, HI_YO),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "h"}, "i"]}, ANSWER]}, HI_YO),
    ],
)
def test_common_shapes(record: dict[str, Any], expected: list[tuple[str, str]] | None) -> None:
    expected = expected or [*HI_YO, ("developer", "now!"), HI_YO[1]]
    messages = read_conversation(record).messages
    assert [(message["role"], message["content"]) for message in messages] == expected
    assert all(set(message) == {"role", "content"} for message in messages)


def test_only_a_completion_is_trained_on() -> None:
    record = {"prompt": [USER, ANSWER, USER], "completion": [ANSWER, USER, ANSWER]}
    assert read_conversation(record).trained == [False, True, True]
    assert read_conversation(record, "last").trained == [False, False, True]


@pytest.mark.parametrize("arguments", [CALL["arguments"], json.dumps(CALL["arguments"])])
def test_calls_in_each_common_form(arguments: Any) -> None:
    function = {"name": "look", "arguments": arguments}
    plain = {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "function": function}]}
    legacy = {"role": "assistant", "content": None, "function_call": function}
    results = [{"role": "tool", "content": "blue", "tool_call_id": "1"}, {"role": "function", "content": "blue"}]
    for call, result in ((plain, results[0]), (legacy, results[1])):
        messages = read_conversation({"messages": [USER, call, result, ANSWER]}).messages
        assert messages[1]["tool_calls"][0]["function"] == CALL and "content" not in messages[1]
        assert messages[2]["role"] == "tool"
        assert messages[2]["tool_call_id"] == messages[1]["tool_calls"][0]["id"]
    two = [{"from": "human", "value": "hi"}, {"from": "function_call", "value": json.dumps([function, function])}]
    two += [{"from": "observation", "value": "blue"}] * 2 + [{"from": "gpt", "value": "yo"}]
    messages = read_conversation({"conversations": two}).messages
    assert [call["id"] for call in messages[1]["tool_calls"]] == [m["tool_call_id"] for m in messages[2:4]]


@pytest.mark.parametrize("empty", [None, []])
def test_no_calls_are_no_key(empty: Any) -> None:
    messages = read_conversation({"messages": [USER, ANSWER | {"tool_calls": empty, "name": None}]}).messages
    assert messages[1] == ANSWER


@pytest.mark.parametrize("name", ["reasoning_content", "thinking", "reasoning"])
def test_reasoning_has_many_names(name: str) -> None:
    conversation = read_conversation({"messages": [USER, ANSWER | {name: "hm"}]})
    message = conversation.messages[1]
    assert (message["reasoning_content"], message["thinking"]) == ("hm", "hm")
    assert conversation.keys == {name}


@pytest.mark.parametrize(
    ("record", "complaint"),
    [
        ({"messages": [USER, ANSWER], "system": 3}, '"system" is no text'),
        ({"messages": [{"role": "system", "content": "a"}, USER, ANSWER], "system": "b"}, "keep one of them"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, 'has no "content"'),
        ({"messages": [USER, {"role": "assistant", "tool_calls": [{"id": "1"}]}]}, 'without a function\'s "name"'),
        ({"messages": [USER, {"role": "assistant", "function_call": {"name": "f", "arguments": "{"}}]}, "no JSON"),
        ({"messages": [USER, ANSWER], "tools": "{"}, '"tools" is no JSON'),
        ({"messages": [USER, ANSWER], "tools": 3}, '"tools" is no list'),
        ({"messages": [USER, "yo"]}, "message 2 is no"),
        ({"prompt": "hi", "completion": "yo"}, 'no "messages"'),
    ],
)
def test_what_is_refused(record: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        read_conversation(record)


# What has to stand in the rendering.


@pytest.mark.parametrize(
    ("template", "record", "complaint"),
    [
        ("{% if m.role != 'system' %}", {"system": "be brief"}, r"leaves out message 1 \(system\)"),
        ("{% if true %}", {"tools": [{"name": "look"}]}, "leaves out the tool 'look'"),
        ("{% if true %}", {"messages": [USER, {"role": "assistant", "tool_calls": [CALL]}]}, "message 2"),
        ("{% if true %}", {"messages": [USER, {"role": "assistant", "reasoning": "x"}]}, 'no "content"'),
    ],
)
def test_nothing_is_left_out_in_silence(tmp_path: Path, template: str, record: dict[str, Any], complaint: str) -> None:
    source = "{% for m in messages %}" + template + "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}"
    source += "{% endfor %}{% if add_generation_prompt %}" + CUE.replace("\\n", "\n") + "{% endif %}"
    task = make_task(DataConfig(task="chat"), make_foreign(tmp_path, source), 99)
    with pytest.raises(ValueError, match=complaint):
        task.draft({"messages": [USER, ANSWER]} | record)


def test_our_template_refuses_tools(tmp_path: Path) -> None:
    task = make_task(DataConfig(task="chat"), ours(tmp_path), 99)
    for more in ({"tools": [{"name": "look"}]}, {"messages": [USER, {"role": "assistant", "tool_calls": [CALL]}]}):
        with pytest.raises(ValueError, match="built-in chat template has no tools"):
            task.draft({"messages": [USER, ANSWER]} | more)
    task.draft({"messages": [USER, ANSWER], "tools": []})


def test_a_thinking_cue_stands_in_no_answer(tmp_path: Path) -> None:
    """As in R1-Distill and QwQ: the prompt ends in <think>, the answer comes without what was thought."""
    source = small_template("plain").replace(CUE, CUE + "<think>\\n")
    tokenizer = make_foreign(tmp_path, source)
    task = make_task(DataConfig(task="chat"), tokenizer, 99)
    for answer in ("yo", "<b>yo"):
        record = {"messages": [USER, ANSWER, USER, {"role": "assistant", "content": answer}]}
        [encoded] = task.finish([task.draft(record)])
        [example] = encoded.examples
        trained = tokenizer.show(example.ids[example.weights > 0])
        assert trained == f"yo<|im_end|>{answer}<|im_end|>"
        assert encoded.question is not None and encoded.question.reference == answer
        assert tokenizer.show(encoded.question.prompt).endswith("<|im_start|>assistant\n<think>\n")


def test_marks_around_a_header_do_not_train_it(tmp_path: Path) -> None:
    body = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    source = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}" + body + "{% endgeneration %}"
        "{% else %}" + body + "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = make_foreign(tmp_path, source)
    task = make_task(DataConfig(task="chat"), tokenizer, 99)
    [encoded] = task.finish([task.draft({"messages": [USER, ANSWER, USER, ANSWER]})])
    [example] = encoded.examples
    assert tokenizer.show(example.ids[example.weights > 0]) == "yo<|im_end|>yo<|im_end|>"
    assert encoded.question is not None
    assert tokenizer.show(encoded.question.prompt).endswith("<|im_start|>assistant\n")


def test_a_turn_may_end_in_two_tokens(tmp_path: Path) -> None:
    """As in Command R: the second one stops."""
    source = small_template("plain").replace("'<|im_end|>\\n'", "'<|end|><|end_of_turn|>'")
    tokenizer = make_foreign(tmp_path, source, eos="<|end_of_turn|>")
    task = make_task(DataConfig(task="chat"), tokenizer, 99)
    [encoded] = task.finish([task.draft({"messages": [USER, ANSWER]})])
    [example] = encoded.examples
    assert tokenizer.show(example.ids[example.weights > 0]) == "yo<|end|><|end_of_turn|>"
    assert tokenizer.show([tokenizer.specials.end_of_turn]) == "<|end_of_turn|>"
    assert encoded.question is not None and encoded.question.reference == "yo"


def test_every_end_of_the_configs_stops(tmp_path: Path) -> None:
    plain = make_foreign(tmp_path / "a", small_template("plain"))
    more = plain.backend.token_to_id("<|eot_id|>")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "generation_config.json").write_text(json.dumps({"eos_token_id": [more]}))
    tokenizer = make_foreign(tmp_path / "b", small_template("plain"))
    ends = [tokenizer.backend.token_to_id(token) for token in ("</s>", "<|im_end|>", "<|eot_id|>")]
    assert list(plain.stops) == ends[:2] and list(tokenizer.stops) == ends


def test_tools_have_a_template_of_their_own(tmp_path: Path) -> None:
    folder = tmp_path / "additional_chat_templates"
    folder.mkdir()
    (folder / "tool_use.jinja").write_text("TOOLS {{ tools | tojson }}" + small_template("plain"))
    task = make_task(DataConfig(task="chat"), make_foreign(tmp_path, small_template("plain")), 99)
    texts = [task.draft({"messages": [USER, ANSWER], "tools": t}).draft.texts[0] for t in (None, [{"name": "look"}])]
    assert "TOOLS" not in texts[0] and "TOOLS" in texts[1]


def test_a_template_that_joins_arguments_to_text_gets_json(tmp_path: Path) -> None:
    source = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.tool_calls %}{{ c.function.name + ' ' + "
        "c.function.arguments }}{% endfor %}{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    task = make_task(DataConfig(task="chat"), make_foreign(tmp_path, source), 99)
    drafted = task.draft({"messages": [USER, {"role": "assistant", "tool_calls": [CALL]}]})
    assert 'look {"at": "the sea"}' in drafted.draft.texts[0]


def test_an_own_eos_ends_texts(tmp_path: Path) -> None:
    """A base model has no chat template; what it was trained to end texts with ends them here."""
    tokenizer = make_foreign(tmp_path, "", eos="<eos>")
    end = tokenizer.backend.token_to_id("<eos>")
    assert tokenizer.specials.end_of_text == end and tokenizer.begin == (end,)
    [encoded] = (task := make_task(DataConfig(task="lm"), tokenizer, 99)).finish([task.draft({"text": "hi"})])
    assert encoded.examples[0].ids.tolist() == [end, *tokenizer.encode("hi"), end]


# Files.


def test_json_csv_and_tables(tmp_path: Path) -> None:
    rows = [{"en": "dog, big", "fr": "chien"}, {"en": "cat", "fr": "chat"}]
    (tmp_path / "a.json").write_text("\n [" + ",\n".join(map(json.dumps, rows)) + "]")
    (tmp_path / "b.json").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "c.csv").write_text('\ufeffen,fr\n"dog, big",chien\n\ncat,chat\n')
    (tmp_path / "d.tsv").write_text("en\tfr\ndog, big\tchien\ncat\tchat\n")
    for name in ("a.json", "b.json", "c.csv", "d.tsv"):
        source = open_source(str(tmp_path / name), tmp_path)
        assert [item.record for item in source.read()] == rows and source.records >= 2, name
    (tmp_path / "e.csv").write_text("en,fr\ndog\n")
    assert [item.fault for item in open_source(str(tmp_path / "e.csv"), tmp_path).read()][0].startswith("1 fields")
    (tmp_path / "f.csv").write_text("en,en\na,b\n")
    with pytest.raises(ValueError, match="two columns have one name"):
        open_source(str(tmp_path / "f.csv"), tmp_path)


def test_what_is_null_in_a_table_is_missing(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    calls = [{"function": {"name": "f", "arguments": {"a": 1}}}, {"function": {"name": "g", "arguments": {"b": 2}}}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"calls": calls}, {"calls": None}]), tmp_path / "a.parquet")
    records = [item.record for item in open_source(str(tmp_path / "a.parquet"), tmp_path).read()]
    assert records == [{"calls": calls}, {}]


def test_fields_within_fields_and_booleans(tmp_path: Path) -> None:
    task = make_task(DataConfig(task="seq2seq", prompt="translation.en", target="spam"), ours(tmp_path), 99)
    assert task.draft({"translation": {"en": "dog"}, "spam": True})[0] == ["dog", "true"]
    with pytest.raises(ValueError, match="field 'translation.en' is missing"):
        task.draft({"translation": "dog", "spam": True})


@pytest.mark.parametrize("pieces", [1, 3])
def test_one_wrong_byte_costs_its_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pieces: int) -> None:
    lines = [f"line {number} é\r\n".encode() for number in range(99)]
    content = b"".join([*lines[:50], b"wr\xffong\n", *lines[50:]])
    monkeypatch.setattr("jaxstages.data.sources.TEXT_RECORD_BYTES", len(content) // pieces + 1)
    (tmp_path / "a.txt").write_bytes(content)
    items = list(open_source(str(tmp_path / "a.txt"), tmp_path).read())
    assert "".join(item.record["text"] for item in items if item.record) == b"".join(lines).decode().replace("\r", "")
    [bad] = [item for item in items if item.record is None]
    assert bad.where.endswith("a.txt:51") and "not UTF-8" in bad.fault


def test_a_split_may_be_a_slice(tmp_path: Path) -> None:
    from jaxstages.data.sources import _dataset_and_split

    for dataset in ("mnist", "glue/mrpc", "/some/folder:with colon/1.0.0"):
        for split in ("train", "train[:50%]", "train[10:20]", "train[:50%]+test[5:]"):
            assert _dataset_and_split("tfds", f"{dataset}:{split}") == (dataset, split)
    with pytest.raises(ValueError, match="has no split"):
        open_source("tfds:mnist", tmp_path)


class Numbered(tfds.core.GeneratorBasedBuilder):
    """A builder as people write them, of which nothing comes with this project."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict(
            {"text": tfds.features.Text(), "parts": tfds.features.Sequence(tfds.features.Text())}
        )
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        del dl_manager
        return {"train": self._generate_examples(10), "test": self._generate_examples(4)}

    def _generate_examples(self, count: int) -> Any:
        time.sleep(0.2)
        return ((i, {"text": f"text {i}", "parts": ["é"] * (i % 2)}) for i in range(count))


def test_a_builder_of_tfds(tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as pool:  # two runs that prepare it at once
        sources = list(
            pool.map(lambda split: open_source(f"tfds:numbered:{split}", tmp_path), ["train", "train[:50%]"])
        )
    records = [[item.record for item in source.read()] for source in sources]
    assert {"text": "text 3", "parts": ["é"]} in records[0] and records[1] == records[0][:5]
    assert sources[0].fingerprint != sources[1].fingerprint
    rest = open_source(f"tfds:{tmp_path}/numbered/1.0.0:train[5:]+test", tmp_path)
    assert [item.record for item in rest.read()][:5] == records[0][5:] and rest.records == 9
    for wrong in ("tfds:numbered:trian", "tfds:numbered:train[:x]", "tfds:nonsuch:train"):
        with pytest.raises(ValueError, match=r"TFDS can't open it|has no split"):
            open_source(wrong, tmp_path)


def test_a_hugging_face_dataset_may_name_its_configuration(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    request: list[Any] = []

    class Rows(list):
        _fingerprint = "1"

    def load_dataset(*name: Any, split: str) -> Rows:
        request.append((*name, split))
        return Rows([{"question": "q", "nothing": None}])

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    for name in ("openai/gsm8k/main:train[:50%]", "imdb:train", "owner/name:test"):
        [item] = open_source(f"hf:{name}", tmp_path).read()
        assert item.record == {"question": "q"}
    expected = [("openai/gsm8k", "main", "train[:50%]"), ("imdb", None, "train"), ("owner/name", None, "test")]
    assert request == [call for call in expected for _ in range(2)]
