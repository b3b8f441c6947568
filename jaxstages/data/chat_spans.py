"""Render a conversation by a Jinja chat template, and find the assistant's answers in the text.

An answer is the text that the template writes after a prompt:

| prompt of "hi"                   | <user>hi<end><assistant>        |
| the same, answered with "yo"     | <user>hi<end><assistant>yo<end> |
| the answer, up to its end token  |                         yo<end> |

The prompt of a reasoning model may end in a cue (`<think>`) that is part of no answer: the answer then follows the
common prefix of both texts. Marks of the template (`{% generation %}`) can only make an answer begin later.

One rendering of the whole conversation gives the beginning of each message. The header in front of an answer depends on
the kind of message, so each kind is rendered once by itself. Two sorts of templates need an example for each answer,
with its own prompt: those that render earlier turns differently once more follow (Qwen3 leaves out reasoning), and
those that end answers with no control token. For the latter the end of text is added, so that the model learns to stop.

Control tokens that users wrote are hidden during rendering, see `control_tokens.py`.
"""

import itertools
import json
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jaxstages.data.chat_template import Render, Rendered, constants, make_render
from jaxstages.data.control_tokens import AliasedTokenizer, any_of, make_alias_text, make_hide
from jaxstages.data.conversation import INSTRUCTING, Messages, Tools
from jaxstages.data.tokenizer import Tokenizer

Span = tuple[int, int]
"""(start, stop)."""

PROBE: Messages = [{"role": "user", "content": "a question"}]
"""Stands before an answer that is rendered without its own question."""


class ExampleTexts(NamedTuple):
    """The training examples of a conversation, as text with aliased control tokens.

    answers: spans of the answers in each text.
    prompt: the prompt of the last answer with the spans of earlier answers; None if it is a prefix of the last text.
    """

    texts: list[str]
    answers: list[list[Span]]
    prompt: tuple[str, list[Span]] | None


class TemplateWriter(NamedTuple):
    """How a chat template writes conversations.

    examples: the training examples, with aliased control tokens.
    prompt: a prompt with aliased control tokens, and the spans of the answers in it.
    render: text for people.
    """

    examples: Callable[[Messages, Tools], ExampleTexts]
    prompt: Callable[[Messages, Tools], tuple[str, list[Span]]]
    render: Callable[[Messages, Tools, bool], str]


class _Answer(NamedTuple):
    """An answer, the header in front of it, and the header of a prompt for it."""

    header: str
    text: str
    prompt_header: str


class _Examples(NamedTuple):
    """Texts with the spans of their answers, and the prompt of the last answer."""

    texts: list[tuple[str, list[Span]]]
    prompt: str


def make_template_writer(tokenizer: Tokenizer, aliased: AliasedTokenizer) -> TemplateWriter:
    """Compile the tokenizer's chat template.

    Raises:
        ValueError: it is no template. The writer's functions raise it for conversations that the template can't write.
    """
    write = _make_write(tokenizer)
    hide = make_hide(aliased, tokenizer.template + tokenizer.tool_template)
    alias_text = make_alias_text(aliased)
    end_of_turn = _make_end_of_turn(tokenizer, aliased)

    template_constants = constants(tokenizer.template) | constants(tokenizer.tool_template)
    special = any_of(aliased.special)
    token_after_mark, last_token = re.compile(rf"\s*(?:{special})"), re.compile(rf"(?:{special})\Z")
    header_end = re.compile(f"{any_of(aliased.aliases)}|<[^<>\\s]+>")

    def answer_start(before: str, prompt: str, text: str) -> int | None:
        """Find where the last answer begins in `text`; None if it can't be told.

        Args:
            before: the conversation without the answer.
            prompt: the same, rendered as a prompt.
        """
        if text.startswith(prompt):
            return len(prompt)
        if not (text.startswith(before) and prompt.startswith(before)):
            return None
        cues = [match.start() for match in header_end.finditer(prompt, len(before))]
        return next((start for start in reversed(cues) if start and text.startswith(prompt[:start])), None)

    def kind_of(window: Messages) -> tuple:
        """Key of windows that the template renders alike: roles, keys, and template constants in each message."""
        return tuple(
            (
                message["role"],
                frozenset(key for key, value in message.items() if value),
                frozenset(word for word in template_constants if word in str(message.get("content", ""))),
            )
            for message in window
        )

    def last_answer(window: Messages, tools: Tools) -> _Answer | None:
        """Render the answer at the end of a window, its header and its prompt; None where they can't be told apart."""
        before, prompt = (write(window[:-1], tools, cue).text for cue in (False, True))
        text = write(window, tools, False).text
        start = answer_start(before, prompt, text)
        length = 0 if start is None else end_of_turn(text[start:])
        if not length or not text.startswith(before):
            return None
        return _Answer(text[len(before) : start], text[start:][:length], prompt[len(before) :])

    def spans_in_place(full: Rendered, messages: Messages, tools: Tools) -> tuple[list[Span], str] | None:
        """Find the answers in the rendering of the whole conversation, and the prompt of the last one.

        Returns None where each answer has to be rendered by itself.
        """
        ends = [*full.starts[1:], len(full.text)]
        instructions = [*itertools.takewhile(lambda message: message["role"] in INSTRUCTING, messages)]
        answers_by_kind: dict[Any, _Answer | None] = {}
        spans: list[Span] = []
        prompt = ""

        for index in _answer_indices(messages):
            start, stop = full.starts[index], ends[index]
            if start is None or stop is None:
                return None

            window = messages[_question_before(messages, index) : index + 1]
            has_question = window[0]["role"] == "user"
            window = [*instructions, *(window if has_question else [*PROBE, messages[index]])]

            kind = (stop == len(full.text), kind_of(window))
            is_new = kind not in answers_by_kind
            if is_new:
                answers_by_kind[kind] = last_answer(window, tools)
            answer = answers_by_kind[kind]
            if answer is None:
                return None

            # Only the first answer of a kind is known word by word.
            header_start = full.text.find(answer.header + (answer.text if is_new else ""), start, stop)
            length = end_of_turn(full.text[header_start + len(answer.header) : stop])
            if not length or header_start < 0 or (index and header_start != start):
                return None
            answer_at = header_start + len(answer.header)
            spans.append((answer_at, answer_at + length))
            prompt = full.text[:header_start] + answer.prompt_header if has_question else full.text[:answer_at]
        return spans, prompt

    def render_alone(messages: Messages, index: int, tools: Tools) -> tuple[str, str, str]:
        """Return the prompt of one answer, the text before the answer, and the answer."""
        full_prompt = write(messages[:index], tools, True).text
        # Some templates put something into the last question only; some render an answer differently after another.
        for window in (messages[:index], messages[_question_before(messages, index) : index], PROBE):
            before, prompt = (write(window, tools, cue).text for cue in (False, True))
            text = write([*window, messages[index]], tools, False).text
            start = answer_start(before, prompt, text)
            if start is not None:
                answer = text[start:]
                length = end_of_turn(answer)
                text_before = full_prompt[: len(full_prompt) - max(len(prompt) - start, 0)]
                return full_prompt, text_before, answer[:length] if length else answer.rstrip() + added_end(index)
        raise ValueError(
            f"the chat template writes what stands before message {index + 1} in another way once that is there, so "
            "the answer can't be told from it; put {% generation %} and {% endgeneration %} around answers in it"
        )

    def added_end(index: int) -> str:
        """Return the end of text, which ends an answer where the template never ends one."""
        if tokenizer.specials.end_of_turn != tokenizer.specials.end_of_text:
            raise ValueError(
                f"the chat template writes no token that ends message {index + 1}, as it does for others, and the "
                "model would not learn to stop there; mend the template"
            )
        return tokenizer.eos

    def marked_spans(full: Rendered, count: int) -> list[Span] | None:
        """Return the spans that the template marks as generated, with end tokens; None if they are not `count`."""
        spans, marks = [], _join_adjacent(full.marks)
        for start, stop in marks:
            length = end_of_turn(full.text[start:stop])
            if not length:
                following = token_after_mark.match(full.text, stop)
                length = following.end() - start if following else 0
            spans += [(start, start + length)] if length else []
        return spans if len(spans) == count == len(marks) else None

    def find_examples(messages: Messages, tools: Tools) -> _Examples:
        full, indices = write(messages, tools, False), _answer_indices(messages)
        in_place, marks = spans_in_place(full, messages, tools), marked_spans(full, len(indices))

        if marks is not None:
            if in_place:
                prompts = [full.text[:start] for start, _ in in_place[0]]
            else:
                prompts = [write(messages[:index], tools, True).text if index else "" for index in indices]
            earliest = [len(prompt) if full.text.startswith(prompt) else 0 for prompt in prompts]
            spans = [(max(start, least), stop) for (start, stop), least in zip(marks, earliest, strict=True)]
            in_place = spans, in_place[1] if in_place else prompts[-1]

        if in_place is not None:
            spans, prompt = in_place
            return _Examples([(full.text[: spans[-1][1]], spans)], prompt)

        alone = [render_alone(messages, index, tools) for index in indices]
        texts = [(before + answer, [(len(before), len(before + answer))]) for _, before, answer in alone]
        if all(full.text.startswith(text) for text, _ in texts):  # one example has them all
            texts = [(texts[-1][0], [span for _, [span] in texts])]
        return _Examples(texts, alone[-1][0])

    def alias_with_spans(text: str, spans: list[Span], hidden: dict[str, str]) -> tuple[str, list[Span]]:
        """Alias a text piece by piece, and move the spans along."""
        result, position, moved = "", 0, []
        for start, stop in spans:
            result += alias_text(text[position:start], hidden)
            new_start = len(result)
            result += alias_text(text[start:stop], hidden)
            moved.append((new_start, len(result)))
            position = stop
        return result + alias_text(text[position:], hidden), moved

    def examples(messages: Messages, tools: Tools) -> ExampleTexts:
        hidden, messages, tools = hide(messages, tools)
        texts, prompt = find_examples(messages, tools)

        answers = [text[start:stop] for text, spans in texts for start, stop in spans]
        for index, answer in zip(_answer_indices(messages), answers, strict=True):
            if not last_token.sub("", answer).strip():
                raise ValueError(f"the chat template writes nothing of message {index + 1}, an answer; take another")
        _check_nothing_left_out(messages, tools, texts[-1][0])

        aliased_texts = [alias_with_spans(text, spans, hidden) for text, spans in texts]
        last_text, last_spans = texts[-1]
        is_prefix = prompt == last_text[: last_spans[-1][0]]
        return ExampleTexts(
            [text for text, _ in aliased_texts],
            [spans for _, spans in aliased_texts],
            None if is_prefix else alias_with_spans(prompt, last_spans[:-1], hidden),
        )

    def prompt(messages: Messages, tools: Tools) -> tuple[str, list[Span]]:
        hidden, messages, tools = hide(messages, tools)
        text = write(messages, tools, True).text
        _check_nothing_left_out(messages, tools, text)
        earlier = find_examples(messages, tools).texts if _answer_indices(messages) else []
        is_continued = len(earlier) == 1 and text.startswith(earlier[0][0])
        return alias_with_spans(text, earlier[0][1] if is_continued else [], hidden)

    def render(messages: Messages, tools: Tools, answer: bool) -> str:
        return write(messages, tools, answer).text

    return TemplateWriter(examples, prompt, render)


def _make_write(tokenizer: Tokenizer) -> Render:
    """Compile the tokenizer's template and, as transformers does, the one for conversations with tools.

    A template that joins a call's arguments to text (DeepSeek's) gets them as JSON.
    """
    plain = make_render(tokenizer.template, tokenizer.bos, tokenizer.eos)
    with_tools = make_render(tokenizer.tool_template or tokenizer.template, tokenizer.bos, tokenizer.eos)

    def accepts(arguments: Any) -> bool:
        call = {"id": "call00000", "type": "function", "function": {"name": "look", "arguments": arguments}}
        messages = [*PROBE, {"role": "assistant", "tool_calls": [call]}]
        try:
            return "around" in with_tools(messages, None, False).text
        except ValueError:
            return False

    needs_json = not accepts({"at": "around"}) and accepts('{"at": "around"}')

    def write(messages: Messages, tools: Tools, answer: bool) -> Rendered:
        if needs_json:
            messages = [_arguments_as_json(message) for message in messages]
        return (with_tools if tools else plain)(messages, tools, answer)

    return write


def _arguments_as_json(message: dict[str, Any]) -> dict[str, Any]:
    calls = [
        call | {"function": call["function"] | {"arguments": json.dumps(call["function"]["arguments"])}}
        for call in message.get("tool_calls", [])
    ]
    return message | {"tool_calls": calls} if calls else message


def _make_end_of_turn(tokenizer: Tokenizer, aliased: AliasedTokenizer) -> Callable[[str], int]:
    """`end_of_turn(text)`: number of characters up to and including the token that ends the turn; 0 if there is none.

    Of the control tokens at the end of the text, that is the one that ends turns, else the first of them.
    """
    end = tokenizer.backend.id_to_token(tokenizer.specials.end_of_turn)
    special = re.compile(any_of(aliased.special))
    tail = re.compile(rf"(?:(?:{special.pattern})\s*)+\Z")

    def end_of_turn(text: str) -> int:
        tokens_at_end = tail.search(text)
        tokens = list(special.finditer(text, tokens_at_end.start())) if tokens_at_end else []
        preferred = [token for token in tokens if token.group() == end] or tokens
        return preferred[0].end() if preferred else 0

    return end_of_turn


def _answer_indices(messages: Messages) -> list[int]:
    return [index for index, message in enumerate(messages) if message["role"] == "assistant"]


def _question_before(messages: Messages, index: int) -> int:
    """Index of the last user message before `index`; 0 if there is none."""
    return next((i for i in range(index - 1, -1, -1) if messages[i]["role"] == "user"), 0)


def _join_adjacent(spans: Sequence[Span]) -> list[Span]:
    """Join spans of which one ends where the next begins."""
    joined: list[Span] = []
    for start, stop in spans:
        if joined and joined[-1][1] == start:
            start = joined.pop()[0]
        joined.append((start, stop))
    return joined


def _check_nothing_left_out(messages: Messages, tools: Tools, text: str) -> None:
    """Raises ValueError where the template leaves out an instruction, a tool or a call of the conversation."""

    def is_written(part: str) -> bool:
        return part in text or json.dumps(part, ensure_ascii=False)[1:-1] in text or json.dumps(part)[1:-1] in text

    remedy = "take a template that writes it, or leave it out of the record"
    for number, message in enumerate(messages, start=1):
        content = (message.get("content") or "").strip()
        if message["role"] in INSTRUCTING and content and not is_written(content):
            raise ValueError(f"the chat template leaves out message {number} ({message['role']}); {remedy}")
        for call in message.get("tool_calls", []):
            if not is_written(call["function"]["name"]):
                raise ValueError(f"the chat template leaves out the call in message {number}; {remedy}")

    for tool in tools or []:
        name = tool.get("function", tool).get("name", "")
        if not is_written(name):
            raise ValueError(f"the chat template leaves out the tool {name!r}; {remedy}")
