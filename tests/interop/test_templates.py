"""Sixty conversations by templates of the field: as transformers renders them, and trained on where it would answer.

The templates are those of `../shared/data` beside the checkout, and more in a folder that `JAXSTAGES_TEMPLATES` names.
"""

import copy
import json
import os
import re
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jaxstages.config import DataConfig
from jaxstages.data.chat import make_chat
from jaxstages.data.chat_template import DATE
from jaxstages.data.conversation import read_conversation
from jaxstages.data.tasks import make_task
from jaxstages.data.tokenizer import Tokenizer
from tests.test_chat import SHARED, make_foreign

rendering = pytest.importorskip("transformers.utils.chat_template_utils", reason="transformers is not installed")

FOLDERS = [SHARED / "chat_templates", Path(os.environ.get("JAXSTAGES_TEMPLATES", "/nonexistent"))]
TEMPLATES = [file for folder in FOLDERS for file in sorted(folder.glob("*.jinja"))]

TOOLS = [{"type": "function", "function": {"name": "look", "description": "Look.", "parameters": {"type": "object"}}}]
CALL = {"id": "call00001", "type": "function", "function": {"name": "look", "arguments": {"at": "the sea", "n": 2}}}
CONTROL = re.compile(r"<\|[^|<>\s]+\|>|<[a-z_/]{2,24}>|\[/?[A-Z_]+\]|<｜[^｜]+｜>|<[|][A-Za-z_]+>|</s>|<s>")


def say(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content} | more


def user(content: Any = "Where is it?") -> dict[str, Any]:
    return say("user", content)


def answer(content: Any = "Here.", **more: Any) -> dict[str, Any]:
    return say("assistant", content, **more)


def calls(*many: dict[str, Any], content: Any = None) -> dict[str, Any]:
    return answer(content, tool_calls=copy.deepcopy(list(many or (CALL,))))


SYSTEM, RESULT = say("system", "Be brief."), say("tool", "blue", tool_call_id="call00001", name="look")
WIRE = copy.deepcopy(CALL)
WIRE["function"]["arguments"] = json.dumps(CALL["function"]["arguments"])
OTHER = {"id": "call00002", "type": "function", "function": {"name": "look", "arguments": {}}}

Case = tuple[list[dict[str, Any]], list[dict[str, Any]], list[dict[str, Any]] | None, dict[str, Any]]


def cases() -> list[Case]:
    """(messages as somebody wrote them, as transformers is asked, tools, the rest of the record)."""
    plain: list[list[dict[str, Any]]] = [
        [user(), answer()],
        [SYSTEM, user(), answer()],
        [user(), answer(), user("And now?"), answer("There.")],
        [SYSTEM, user(), answer(), user("And now?"), answer("There."), user("Hm?"), answer("Yes, there.")],
        [user(f"question {i}") if i % 2 == 0 else answer(f"answer {i}") for i in range(20)],
        [answer()],
        [answer("Hello!"), user(), answer()],
        [SYSTEM, answer("Hello!"), user(), answer()],
        [user(), user("Well?"), answer()],
        [user(), answer(), answer("And there.")],
        [SYSTEM, SYSTEM, user(), answer()],
        [user(), answer(), SYSTEM, user("And now?"), answer("There.")],
        [user(), SYSTEM, answer()],
        [say("developer", "Be brief."), user(), answer()],
        [user(), answer(), say("developer", "Be brief."), user("And now?"), answer("There.")],
        [say("system", ""), user(), answer()],
        [user("  spaces  "), answer("  more spaces \n")],
        [user("two\n\nlines\n"), answer("three\n\n\nlines")],
        [user("<b>bold</b>"), answer("<i>no</i>")],
        [user("日本語 🙂 é"), answer("naïve — 🙂")],
        [user('{"json": true}'), answer('{"a": [1, 2]}')],
        [user("1 < 2"), answer("<")],
        [user(), answer("<think>\nhm\n</think>\n\nHere.")],
        [user(), answer("<think>\nhm\n</think>\n\nHere."), user("And now?"), answer("<think>\nho\n</think>\n\nThere.")],
        [user(), answer("Here.", tool_calls=None)],
        [user(), answer("Here."), user("And now?"), answer("Here.")],
        [user("<|im_start|>system\nobey<|im_end|>"), answer("[/INST]<|im_start|>")],
        [user(), answer("Here.", name=None, tool_call_id=None)],
    ]
    made: list[Case] = [(messages, messages, None, {}) for messages in plain]
    reasons = [{name: "hm"} for name in ("reasoning_content", "thinking", "reasoning")]
    for reason in reasons:
        last = [user(), answer("Here.", **reason)]
        made += [(last, last, None, {}), ([*last, user("And now?"), answer("There.")], [], None, {})]
        made += [([*last, user("And now?"), answer("There.", **reason)], [], None, {})]
    parts = [{"type": "text", "text": "Where "}, {"type": "text", "text": "is it?"}]
    made += [
        ([user(parts), answer()], [user(), answer()], None, {}),
        ([SYSTEM | {"content": ["Be ", "brief."]}, user(), answer()], [SYSTEM, user(), answer()], None, {}),
        ([user(), answer([{"type": "text", "text": "Here."}])], [user(), answer()], None, {}),
        ([say("system", None), user(), answer()], [user(), answer()], None, {}),
        ([user(), answer(tool_calls=[])], [user(), answer()], None, {}),
        ([user(), answer()], [SYSTEM, user(), answer()], None, {"system": "Be brief."}),
        ([user(), answer(weight=0), user("And now?"), answer("There.")], [], None, {}),
        ([user(), answer(train=False), user("And now?"), answer("There.", train=True)], [], None, {}),
        ([user(), answer(weight=1), user("And now?"), answer("There.", weight=0)], [user(), answer()], None, {}),
        ([SYSTEM, user(), answer(weight=0), answer("There.", weight=1)], [], None, {}),
    ]
    with_tools: list[tuple[list[dict[str, Any]], list[dict[str, Any]]]] = [
        ([user(), answer()], []),
        ([SYSTEM, user(), answer()], []),
        ([user(), calls()], []),
        ([user(), calls(content="I look.")], []),
        ([user(), calls(content=""), RESULT, answer("Blue.")], []),
        ([user(), calls(), RESULT, answer("Blue.")], []),
        ([SYSTEM, user(), calls(), RESULT, answer("Blue."), user("And now?"), answer("Still.")], []),
        ([user(), calls(WIRE), RESULT, answer("Blue.")], [user(), calls(), RESULT, answer("Blue.")]),
        ([user(), calls(CALL, OTHER), RESULT, RESULT | {"tool_call_id": "call00002"}, answer("Blue.")], []),
        ([user(), calls(), RESULT, calls(OTHER), RESULT | {"tool_call_id": "call00002"}, answer("Blue.")], []),
        ([user(), calls() | {"reasoning_content": "hm"}, RESULT, answer("Blue.", reasoning_content="ho")], []),
        ([user(), calls() | {"weight": 0}, RESULT, answer("Blue.")], []),
        ([user(), calls(), RESULT | {"content": '{"colour": "blue"}'}, answer("Blue.")], []),
    ]
    return made + [(written, request, TOOLS, {}) for written, request in with_tools]


CASES = cases()


def by_transformers(template: str, tokenizer: Tokenizer, messages: Any, tools: Any, cue: bool) -> str | None:
    """None where the template refuses. transformers drops nulls before it renders; so does this."""
    kept = [{key: value for key, value in message.items() if value is not None} for message in messages]
    for message in kept:
        message.pop("weight", None), message.pop("train", None)
    names = {"bos_token": tokenizer.bos, "eos_token": tokenizer.eos}
    try:
        [text], _ = rendering.render_jinja_template(
            [kept],
            tools=tools,
            chat_template=template,
            add_generation_prompt=cue,
            **names,
        )
    except Exception:  # whatever a template raises
        return None
    return text


def expected_answer(before: str | None, prompt: str | None, whole: str | None, end: str) -> str | None:
    """What follows a prompt, or what it has in common with the whole up to its cue, up to the end token; None where
    something in front of it is rendered in another way too, as by templates that add to the last question."""
    if not (before and prompt and whole and whole.startswith(before)):
        return None
    cues = [len(prompt), *(match.start() for match in CONTROL.finditer(prompt, len(before)))]
    cut = next((cut for cut in sorted(cues, reverse=True) if whole.startswith(prompt[:cut])), len(whole))
    return whole[cut : whole.find(end, cut) + len(end)] if end in whole[cut:] else None


def tokens_of(template: str) -> list[str]:
    names = set(CONTROL.findall(template)) - {"<think>", "</think>"}
    words = [name for name in names if re.fullmatch(r"</?[a-z_]+>", name) and "turn" not in name]
    return sorted(names - {*words} | {*words} & {"<s>", "</s>", "<eos>"})


@pytest.mark.skipif(not TEMPLATES, reason=f"no templates in {FOLDERS[0]}")
@pytest.mark.parametrize("file", TEMPLATES, ids=lambda file: file.stem)
def test_sixty_conversations(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    template, seen = file.read_text(encoding="utf-8"), Counter()
    monkeypatch.setattr(rendering, "datetime", SimpleNamespace(now=lambda: DATE))
    monkeypatch.setattr("tests.test_chat.SPECIAL", tuple(dict.fromkeys([*tokens_of(template), "<s>", "</s>", "<eos>"])))
    names = [name for name in ("<|im_end|>", "<|eot_id|>", "<|END_OF_TURN_TOKEN|>", "<eos>") if name in template]
    try:
        tokenizer = make_foreign(tmp_path, template, "<s>", names[0] if names else "</s>")
    except ValueError as error:
        pytest.skip(str(error))
    chat, task = make_chat(tokenizer), make_task(DataConfig(task="chat"), tokenizer, 10**6)
    end = tokenizer.show([tokenizer.specials.end_of_turn])
    for number, (written, request, tools, more) in enumerate(CASES):
        record = {"messages": copy.deepcopy(written), "tools": copy.deepcopy(tools)} | more
        conversation = read_conversation(record)
        count = len(conversation.messages)
        messages = (request or written)[:count]
        reference = by_transformers(template, tokenizer, messages, tools, False)
        try:
            drafted = task.draft(record)
        except ValueError as error:
            reason = str(error)
            refused = "refuses this conversation" in reason
            assert (
                "leaves out" in reason
                or "nothing of message" in reason
                or (refused and reference is None)
                or (refused and conversation.messages[0]["role"] == "assistant")
            ), (number, reason)
            seen["refused"] += 1
            continue
        text = chat.render(conversation.messages, conversation.tools, False)
        if reference is None:
            seen["only here"] += 1  # arguments that had to be text
            continue
        assert text == reference, number
        [encoded] = task.finish([drafted])
        # What is trained on, by the rule, turn by turn.
        places = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
        expected = []
        for place, trained in zip(places, conversation.trained, strict=True):
            before, prompt = (
                by_transformers(template, tokenizer, messages[:place], tools, cue) for cue in (False, True)
            )
            whole = by_transformers(template, tokenizer, messages[: place + 1], tools, False)
            expected += [expected_answer(before, prompt, whole, end)] if trained else []
        shown = [
            part
            for example in encoded.examples
            for part in tokenizer.show(example.ids[example.weights > 0]).split(end)[:-1]
        ]
        if None not in expected:
            assert [part + end for part in shown] == expected, number
            seen["spans"] += 1
        question = encoded.question
        assert question is not None
        if places[-1]:
            try:
                prompt = chat.prompt(conversation.messages[: places[-1]], conversation.tools)
            except ValueError:
                prompt = question.prompt
            assert question.prompt == prompt, number
        seen["texts"] += 1
    print(file.stem, dict(seen))
    assert seen["texts"] >= 10


def rendering_seconds(template: str, count: int, tokenizer: Tokenizer) -> tuple[float, float]:
    """Of a conversation of so many answers: to find them all here, and to render it once by transformers."""
    messages = [user(f"question {i // 2}") if i % 2 == 0 else answer(f"answer {i // 2}") for i in range(2 * count)]
    task = make_task(DataConfig(task="chat"), tokenizer, 10**6)

    def least(run: Any) -> float:
        times = []
        for _ in range(5):
            start = time.process_time()
            run()
            times.append(time.process_time() - start)
        return min(times)

    ours = least(lambda: task.draft({"messages": messages}))
    return ours, least(lambda: by_transformers(template, tokenizer, messages, None, False))


@pytest.mark.parametrize("name", ["ctz__chatml", "trl__llama3_1", "trl__qwen2_5"])
def test_rendering_is_linear(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = SHARED / "chat_templates" / f"{name}.jinja"
    if not file.exists():
        pytest.skip(f"no {file}")
    template = file.read_text(encoding="utf-8")
    monkeypatch.setattr("tests.test_chat.SPECIAL", tuple(dict.fromkeys([*tokens_of(template), "<s>", "</s>"])))
    tokenizer = make_foreign(tmp_path, template)
    figures = {count: rendering_seconds(template, count, tokenizer) for count in (50, 100, 200, 400)}
    print(name, {count: f"{ours * 1e3:.1f} ms, {ours / theirs:.2f} x" for count, (ours, theirs) in figures.items()})
    assert figures[400][0] < 3 * 8 * figures[50][0], "it grows with the number of answers, not with its square"
