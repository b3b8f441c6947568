"""A conversation by a template of the field -> texts, and where in them stand the answers that are trained on.

Control tokens that somebody wrote are hidden while the template is at work, each behind a letter that nobody uses; in
what it then wrote, control tokens are its own, and get their secret names (`tokenizer.Sealed`); at last what was
hidden is put back, as plain text. An answer is what the template writes after a prompt:

| prompt of "hi"                   | <user>hi<end><assistant>        |
| the same, answered with "yo"     | <user>hi<end><assistant>yo<end> |
| the answer, up to its end token  |                         yo<end> |

The prompt of a model that thinks may end in a cue (`<think>`) that stands in no answer: the answer then follows what
both have in common. Marks of the template (`{% generation %}`) can only make an answer begin later.

One rendering says where each message begins. What stands there before an answer, its header, depends on what kind of
message it is, so each kind is rendered once by itself. A template that writes earlier turns in another way once more
follow (Qwen3 leaves out what was thought) is seen by that, and gives an example for each answer: its prompt and that
answer, which is how the model is used. Likewise one that ends answers with no control token: there the end of text is
put after each, so that the model learns to stop.
"""

import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from jaxstages.data.chat_template import MARKS, Render, Rendered, constants, make_render
from jaxstages.data.conversation import INSTRUCTING, Messages, Tools
from jaxstages.data.tokenizer import Sealed, Tokenizer

Span = tuple[int, int]

LETTERS = range(0xF0000, 0x10FFFE)
"""Of Unicode's private use: from these are taken the ones that stand for what is hidden."""

ANY_LETTER = f"[{chr(LETTERS[0])}-{chr(LETTERS[-1])}]"

PROBE: Messages = [{"role": "user", "content": "a question"}]


class Answered(NamedTuple):
    """The examples of a conversation, sealed.

    answers: spans (start, stop) of the answers in each text.
    prompt: what asks for the last answer, with the answers in it, where that is not what stands before it.
    """

    texts: list[str]
    answers: list[list[Span]]
    prompt: tuple[str, list[Span]] | None


class Writer(NamedTuple):
    """examples: sealed. prompt: sealed, with the answers that stand in it. render: as people may read it."""

    examples: Callable[[Messages, Tools], Answered]
    prompt: Callable[[Messages, Tools], tuple[str, list[Span]]]
    render: Callable[[Messages, Tools, bool], str]


class _Turn(NamedTuple):
    """An answer. header: what stands in front of it. asked: the same where it is still to be given."""

    header: str
    answer: str
    asked: str


class _Found(NamedTuple):
    """texts: each with its answers. asked: the prompt of the last answer."""

    texts: list[tuple[str, list[Span]]]
    asked: str


def make_writer(tokenizer: Tokenizer, sealed: Sealed) -> Writer:
    """Raises ValueError for a template that is none; so do its functions for a conversation that it can't write."""
    write = _make_write(tokenizer)
    hide = _make_hide(sealed, tokenizer.template + tokenizer.tool_template)
    end_of = _make_end_of(tokenizer, sealed)
    compared = constants(tokenizer.template) | constants(tokenizer.tool_template)
    special = _any_of(sealed.special)
    after_mark, last_token = re.compile(rf"\s*(?:{special})"), re.compile(rf"(?:{special})\Z")
    names = re.compile(f"{_any_of(sealed.names)}|{ANY_LETTER}")
    header_end = re.compile(f"{_any_of(sealed.names)}|<[^<>\\s]+>")

    def divide(before: str, asked: str, whole: str) -> int | None:
        """Letters of `whole` up to its last answer.

        Args:
            before: what stands there without the answer.
            asked: the same, as a prompt.
        """
        if whole.startswith(asked):
            return len(asked)
        if not (whole.startswith(before) and asked.startswith(before)):
            return None
        cues = [cue.start() for cue in header_end.finditer(asked, len(before))]
        return next((start for start in reversed(cues) if start and whole.startswith(asked[:start])), None)

    def kind_of(window: Messages) -> tuple:
        """Key of windows that a template renders alike: roles, keys, and the template's constants in each message."""
        return tuple(
            (
                message["role"],
                frozenset(key for key, value in message.items() if value),
                frozenset(word for word in compared if word in str(message.get("content", ""))),
            )
            for message in window
        )

    def answer_in(window: Messages, tools: Tools) -> _Turn | None:
        """Render the answer that ends a window, its header and its prompt; None where they can't be told apart."""
        before, asked = (write(window[:-1], tools, cue).text for cue in (False, True))
        whole = write(window, tools, False).text
        begin = divide(before, asked, whole)
        length = 0 if begin is None else end_of(whole[begin:])
        if not length or not whole.startswith(before):
            return None
        return _Turn(whole[len(before) : begin], whole[begin:][:length], asked[len(before) :])

    def in_place(full: Rendered, messages: Messages, tools: Tools) -> tuple[list[Span], str] | None:
        """The answers in the whole, and the prompt of the last; None where each has to be rendered by itself."""
        ends = [*full.starts[1:], len(full.text)]
        instructions = [*itertools.takewhile(lambda message: message["role"] in INSTRUCTING, messages)]
        turns: dict[Any, _Turn | None] = {}
        spans: list[Span] = []
        asked = ""
        for place in _answers_of(messages):
            start, stop = full.starts[place], ends[place]
            if start is None or stop is None:
                return None
            window = messages[_question_before(messages, place) : place + 1]
            asks = window[0]["role"] == "user"
            window = [*instructions, *(window if asks else [*PROBE, messages[place]])]
            kind = (stop == len(full.text), kind_of(window))
            new = kind not in turns
            turn = turns[kind] = answer_in(window, tools) if new else turns[kind]
            if turn is None:
                return None
            begin = full.text.find(turn.header + (turn.answer if new else ""), start, stop)
            length = end_of(full.text[begin + len(turn.header) : stop])
            if not length or begin < 0 or (place and begin != start):
                return None
            spans.append((begin + len(turn.header), begin + len(turn.header) + length))
            asked = full.text[:begin] + turn.asked if asks else full.text[: spans[-1][0]]
        return spans, asked

    def by_itself(messages: Messages, place: int, tools: Tools) -> tuple[str, str, str]:
        """The prompt of one answer, what stands before the answer, and the answer."""
        asked = write(messages[:place], tools, True).text
        # Some put something into the last question only, and some write an answer that another follows in another way.
        for window in (messages[:place], messages[_question_before(messages, place) : place], PROBE):
            before, prompt = (write(window, tools, cue).text for cue in (False, True))
            whole = write([*window, messages[place]], tools, False).text
            start = divide(before, prompt, whole)
            if start is not None:
                answer = whole[start:]
                length = end_of(answer)
                shown = asked[: len(asked) - max(len(prompt) - start, 0)]
                return asked, shown, answer[:length] if length else answer.rstrip() + without_end(place)
        raise ValueError(
            f"the chat template writes what stands before message {place + 1} in another way once that is there, so "
            "the answer can't be told from it; put {% generation %} and {% endgeneration %} around answers in it"
        )

    def without_end(place: int) -> str:
        if tokenizer.specials.end_of_turn != tokenizer.specials.end_of_text:
            raise ValueError(
                f"the chat template writes no token that ends message {place + 1}, as it does for others, and the "
                "model would not learn to stop there; mend the template"
            )
        return tokenizer.eos

    def marked(full: Rendered, count: int) -> list[Span] | None:
        """What the template marks, each with its end token; None unless it marks so many answers."""
        spans, marks = [], _joined(full.marks)
        for start, stop in marks:
            length = end_of(full.text[start:stop])
            if not length:
                after = after_mark.match(full.text, stop)
                length = after.end() - start if after else 0
            spans += [(start, start + length)] if length else []
        return spans if len(spans) == count == len(marks) else None

    def find(messages: Messages, tools: Tools) -> _Found:
        full, places = write(messages, tools, False), _answers_of(messages)
        placed, marks = in_place(full, messages, tools), marked(full, len(places))
        if marks is not None:
            prompts = [full.text[:start] for start, _ in placed[0]] if placed else ask_each(messages, places, tools)
            begins = [len(prompt) if full.text.startswith(prompt) else 0 for prompt in prompts]
            spans = [(max(start, begin), stop) for (start, stop), begin in zip(marks, begins, strict=True)]
            placed = spans, placed[1] if placed else prompts[-1]
        if placed is not None:
            spans, asked = placed
            return _Found([(full.text[: spans[-1][1]], spans)], asked)
        alone = [by_itself(messages, place, tools) for place in places]
        texts = [(before + answer, [(len(before), len(before + answer))]) for _, before, answer in alone]
        if all(full.text.startswith(text) for text, _ in texts):
            texts = [(texts[-1][0], [span for _, [span] in texts])]
        return _Found(texts, alone[-1][0])

    def ask_each(messages: Messages, places: list[int], tools: Tools) -> list[str]:
        return [write(messages[:place], tools, True).text if place else "" for place in places]

    def seal(text: str, hidden: dict[str, str]) -> str:
        return names.sub(lambda match: (sealed.names | hidden).get(match.group(), match.group()), text)

    def sealed_text(text: str, spans: list[Span], hidden: dict[str, str]) -> tuple[str, list[Span]]:
        whole, before, moved = "", 0, []
        for start, stop in spans:
            asked = whole + seal(text[before:start], hidden)
            whole, before = asked + seal(text[start:stop], hidden), stop
            moved.append((len(asked), len(whole)))
        return whole + seal(text[before:], hidden), moved

    def examples(messages: Messages, tools: Tools) -> Answered:
        hidden, messages, tools = hide(messages, tools)
        texts, asked = find(messages, tools)
        for place, (text, (start, stop)) in zip(
            _answers_of(messages), ((text, span) for text, spans in texts for span in spans), strict=True
        ):
            if not last_token.sub("", text[start:stop]).strip():
                raise ValueError(f"the chat template writes nothing of message {place + 1}, an answer; take another")
        _check_written(messages, tools, texts[-1][0])
        sealed_texts = [sealed_text(text, spans, hidden) for text, spans in texts]
        text, spans = texts[-1]
        prompt = None if asked == text[: spans[-1][0]] else sealed_text(asked, spans[:-1], hidden)
        return Answered([text for text, _ in sealed_texts], [spans for _, spans in sealed_texts], prompt)

    def prompt(messages: Messages, tools: Tools) -> tuple[str, list[Span]]:
        hidden, messages, tools = hide(messages, tools)
        asked = write(messages, tools, True).text
        earlier = find(messages, tools).texts if _answers_of(messages) else []
        same = len(earlier) == 1 and asked.startswith(earlier[0][0])
        return sealed_text(asked, earlier[0][1] if same else [], hidden)

    def render(messages: Messages, tools: Tools, answer: bool) -> str:
        return write(messages, tools, answer).text

    return Writer(examples, prompt, render)


def _make_write(tokenizer: Tokenizer) -> Render:
    """The tokenizer's template; for conversations with tools the one that it has for them, as transformers does it.

    A template that joins a call's arguments to text (DeepSeek's) gets them as JSON.
    """
    plain = make_render(tokenizer.template, tokenizer.bos, tokenizer.eos)
    with_tools = make_render(tokenizer.tool_template or tokenizer.template, tokenizer.bos, tokenizer.eos)

    def calling(arguments: Any) -> Messages:
        call = {"id": "call00000", "type": "function", "function": {"name": "look", "arguments": arguments}}
        return [*PROBE, {"role": "assistant", "tool_calls": [call]}]

    def takes(arguments: Any) -> bool:
        try:
            return "around" in with_tools(calling(arguments), None, False).text
        except ValueError:
            return False

    as_text = not takes({"at": "around"}) and takes('{"at": "around"}')

    def write(messages: Messages, tools: Tools, answer: bool) -> Rendered:
        render = with_tools if tools else plain
        return render([_with_text(message) for message in messages] if as_text else messages, tools, answer)

    return write


def _with_text(message: dict[str, Any]) -> dict[str, Any]:
    """A message whose calls have their arguments as JSON."""
    calls = [
        call | {"function": call["function"] | {"arguments": json.dumps(call["function"]["arguments"])}}
        for call in message.get("tool_calls", [])
    ]
    return message | {"tool_calls": calls} if calls else message


def _make_end_of(tokenizer: Tokenizer, sealed: Sealed) -> Callable[[str], int]:
    """`end_of(text)`: letters up to the token that ends the turn, with it: among the last tokens the one that ends
    turns, else the first of them; 0 if there is none."""
    end = tokenizer.backend.id_to_token(tokenizer.specials.end_of_turn)
    special = re.compile(_any_of(sealed.special))
    tail = re.compile(rf"(?:(?:{special.pattern})\s*)+\Z")

    def end_of(text: str) -> int:
        last = tail.search(text)
        tokens = list(special.finditer(text, last.start())) if last else []
        chosen = [token for token in tokens if token.group() == end] or tokens
        return chosen[0].end() if chosen else 0

    return end_of


def _answers_of(messages: Messages) -> list[int]:
    return [place for place, message in enumerate(messages) if message["role"] == "assistant"]


def _question_before(messages: Messages, place: int) -> int:
    """The place of the last user's message before another one; 0 if there is none."""
    return next((i for i in range(place - 1, -1, -1) if messages[i]["role"] == "user"), 0)


def _joined(marks: Sequence[Span]) -> list[Span]:
    """Marks of which one ends where the next begins, as one."""
    joined: list[Span] = []
    for start, stop in marks:
        begin = joined.pop()[0] if joined and joined[-1][1] == start else start
        joined.append((begin, stop))
    return joined


def _check_written(messages: Messages, tools: Tools, text: str) -> None:
    """Raises ValueError where the template leaves out an instruction, a tool or a call of the conversation."""

    def stands(part: str) -> bool:
        return part in text or json.dumps(part, ensure_ascii=False)[1:-1] in text or json.dumps(part)[1:-1] in text

    remedy = "take a template that writes it, or leave it out of the record"
    for number, message in enumerate(messages, start=1):
        content = (message.get("content") or "").strip()
        if message["role"] in INSTRUCTING and content and not stands(content):
            raise ValueError(f"the chat template leaves out message {number} ({message['role']}); {remedy}")
        for call in message.get("tool_calls", []):
            if not stands(call["function"]["name"]):
                raise ValueError(f"the chat template leaves out the call in message {number}; {remedy}")
    for tool in tools or []:
        name = tool.get("function", tool).get("name", "")
        if not stands(name):
            raise ValueError(f"the chat template leaves out the tool {name!r}; {remedy}")


def _any_of(words: Iterable[str]) -> str:
    """A pattern; longer words first, for one may begin another."""
    return "|".join(map(re.escape, sorted(words, key=len, reverse=True)))


def _make_hide(sealed: Sealed, template: str) -> Callable[[Messages, Tools], tuple[dict[str, str], Messages, Tools]]:
    """`hide(messages, tools)`: both without control tokens, and what the letters stand for that are there instead.

    Also a part of one at either end of a text is hidden, of which the template might make a whole. An assistant may
    write those tokens that are not special (`<think>`): they are words of its own.
    """

    def cover(words: list[str]) -> Callable[[str, Callable[[str], str]], str]:
        whole, longest = re.compile(_any_of([*words, *MARKS])), max(map(len, words))
        heads = {word[:n] for word in words for n in range(1, len(word))}
        tails = {word[n:] for word in words for n in range(1, len(word))}
        firsts, lasts = {word[0] for word in words}, {word[-1] for word in words}

        def covered(text: str, letter: Callable[[str], str]) -> str:
            text = whole.sub(lambda found: letter(found.group()), text)
            first, last = len(text) - len(text.lstrip()), len(text.rstrip())
            most = min(longest, last - first)
            for n in range(most if firsts & {*text[last - most : last]} else 0, 0, -1):
                if text[last - n : last] in heads:
                    text = text[: last - n] + letter(text[last - n : last]) + text[last:]
                    last = last - n
                    break
            most = min(longest, last - first)
            for n in range(most if lasts & {*text[first : first + most]} else 0, 0, -1):
                if text[first : first + n] in tails:
                    return text[:first] + letter(text[first : first + n]) + text[first + n :]
            return text

        return covered

    others, assistants = cover([*sealed.names]), cover([*sealed.special])

    def hide(messages: Messages, tools: Tools) -> tuple[dict[str, str], Messages, Tools]:
        hidden: dict[str, str] = {}
        free = _unused(messages, tools, template)

        def letter(wrote: str) -> str:
            known = [one for one, other in hidden.items() if other == wrote]
            one = known[0] if known else next(free)
            hidden[one] = wrote
            return one

        def walk(value: Any, covered: Callable[[str, Callable[[str], str]], str]) -> Any:
            match value:
                case str():
                    return covered(value, letter)
                case dict():
                    return {walk(name, covered): walk(one, covered) for name, one in value.items()}
                case list():
                    return [walk(one, covered) for one in value]
                case _:
                    return value

        shown = [
            walk(message, assistants if message["role"] == "assistant" else others) | {"role": message["role"]}
            for message in messages
        ]
        return hidden, shown, walk(tools, others)

    return hide


def _unused(*values: Any) -> Iterator[str]:
    """Letters that are nowhere in the values, which are looked at only when the first one is needed."""
    used = {letter for letter in json.dumps(values, ensure_ascii=False, default=str) if ord(letter) in LETTERS}
    yield from (letter for letter in map(chr, LETTERS) if letter not in used)
