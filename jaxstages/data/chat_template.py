"""A chat template of the field -> text: Jinja in a sandbox, bounded in work, the same on every day.

Templates come with a tokenizer from elsewhere and are not trusted: they see the conversation and nothing else, and one
that loops for ever, or writes without end, is a ValueError of one line.
"""

import datetime
import json
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jinja2
from jinja2 import ext, nodes, sandbox

DATE = datetime.datetime(2024, 7, 26)
"""What `strftime_now` tells unless it is told: the date that Llama 3's templates fall back to. Rows that were prepared
on two days are the same rows."""

MARKS = ("\U0010fffe", "\U0010ffff")
"""Stand in the output where `{% generation %}` begins and ends; Unicode has no such characters."""

BUDGET = " budget"
"""Name of the budget in a template's context: no identifier, so that a template can't reach it."""

MOST_STEPS, MOST_LETTERS = 10**6, 2**26
"""Rounds of loops and calls of macros in one rendering, and letters of what it writes and puts together."""

MOST_SOURCE, MOST_INDENT = 2**20, 16

WIDE = ("center", "format", "lipsum", "urlize", "wordwrap", "xmlattr")
"""Filters and functions of Jinja that make much of little; no template of the field needs them."""

NARROW = ("center", "expandtabs", "format", "format_map", "ljust", "rjust", "translate", "zfill")
"""Methods of text, likewise."""


class Rendered(NamedTuple):
    """The text of a conversation.

    marks: where in it, as (start, end), stands what the template marks as generated.
    starts: where the template's loop over messages reached each of them; None for one that it did not visit.
    """

    text: str
    marks: list[tuple[int, int]]
    starts: list[int | None]


Render = Callable[[list[dict[str, Any]], list[dict[str, Any]] | None, bool], Rendered]
"""`render(messages, tools, add_generation_prompt)`."""


class _Budget:
    """The state of one rendering: what it may still do, and how far its text had come at each item of a loop."""

    def __init__(self) -> None:
        self.steps, self.letters, self.written = MOST_STEPS, MOST_LETTERS, 0
        self.starts: dict[int, int] = {}

    def step(self, item: Any) -> str:
        if isinstance(item, dict):
            self.starts[id(item)] = self.written
        self.steps -= 1
        if self.steps < 0:
            raise ValueError(f"it takes more than {MOST_STEPS:,} rounds of loops; does it end?")
        return ""

    def spend(self, letters: int) -> None:
        self.letters -= letters
        if self.letters < 0:
            raise ValueError(f"it puts more than {MOST_LETTERS:,} letters together; does it end?")


class _Generation(ext.Extension):
    """`{% generation %}...{% endgeneration %}`: what stands between is put between `MARKS`."""

    tags = {"generation"}

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Callable[[], str]) -> str:
        return f"{MARKS[0]}{caller()}{MARKS[1]}"


class _Sandbox(sandbox.ImmutableSandboxedEnvironment):
    """Operators that can make a long text of short ones are counted."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "+" and {type(left), type(right)} == {str}:  # nearly all there are
            context[BUDGET].spend(len(left) + len(right))
            return left + right
        sizes = [len(value) for value in (left, right) if isinstance(value, str | list | tuple)]
        if sizes and operator == "%":
            raise ValueError("it formats text by %, which is refused here")
        if sizes and operator == "*":
            context[BUDGET].spend(sizes[0] * max(right if isinstance(right, int) else left, 0))
        if operator == "**" or (operator == "*" and not sizes and max(abs(left), abs(right)) > 2**64):
            raise ValueError(f"it computes {operator} of large numbers, which is refused here")
        if operator == "+":
            context[BUDGET].spend(sum(sizes))
        return super().call_binop(context, operator, left, right)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        return not (isinstance(obj, str) and attr in NARROW) and super().is_safe_attribute(obj, attr, value)


def _step(context: Any, value: str, item: Any = None) -> str:
    return context[BUDGET].step(item) + value


def _sized(context: Any, value: str) -> str:
    context[BUDGET].spend(len(value))
    return value


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As templates expect it: nothing is escaped for HTML."""
    if indent is not None and not (isinstance(indent, int) and indent <= MOST_INDENT):
        raise ValueError(f"tojson(indent={str(indent)[:20]}) is more than {MOST_INDENT}")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _counted(tree: nodes.Template) -> nodes.Template:
    """The template with a step at the head of each loop's and macro's body, and with `~` counted.

    The steps of outer loops, whose output is not buffered, also note their item.
    """

    def through(name: str, node: nodes.Expr, *arguments: nodes.Expr) -> nodes.Filter:
        return nodes.Filter(node, name, list(arguments), [], None, None)

    bodies = list(tree.find_all((nodes.For, nodes.Macro)))
    buffered = (nodes.For, nodes.Macro, nodes.CallBlock, nodes.FilterBlock, nodes.AssignBlock)
    inner = {id(node) for outer in tree.find_all(buffered) for node in outer.find_all(nodes.For) if node is not outer}
    for node in bodies:
        target = node.target if isinstance(node, nodes.For) and id(node) not in inner else None
        item = [nodes.Name(target.name, "load")] if isinstance(target, nodes.Name) else []
        node.body.insert(0, nodes.Output([through("step", nodes.Const(""), *item)]))
    for node in list(tree.find_all(nodes.Concat)):
        node.nodes = [through("sized", part) for part in node.nodes]
    return tree


def constants(source: str) -> frozenset[str]:
    """Texts that a template compares with, or writes, by expressions; no words, which are names of roles and keys."""
    tree = _environment().parse(source)
    texts = (node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str))
    return frozenset(text for text in texts if re.search(r"\W", text.strip()))


def _environment() -> "_Sandbox":
    return _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation])


def make_render(
    source: str, bos: str, eos: str, extra: Mapping[str, Any] | None = None, now: datetime.datetime = DATE
) -> Render:
    """Compile a template; `render` then writes conversations by it.

    Args:
        extra: more that the template may ask for by name, such as {"enable_thinking": False}.
        now: what `strftime_now` tells.

    Raises:
        ValueError: no template; and from `render`: what the template refuses, fails at, or does not end with.
    """
    environment = _environment()
    for name in WIDE:
        environment.filters.pop(name, None)
        environment.globals.pop(name, None)
    environment.filters |= {
        "tojson": _to_json,
        "step": jinja2.pass_context(_step),
        "sized": jinja2.pass_context(_sized),
    }
    environment.globals |= {"raise_exception": _refuse, "strftime_now": now.strftime}
    if len(source) > MOST_SOURCE:
        raise ValueError(f"the chat template has {len(source):,} letters, more than {MOST_SOURCE:,}")
    try:
        template = environment.from_string(_counted(environment.parse(source)))
    except Exception as error:
        raise ValueError(f"the chat template is no Jinja: {_line(error)}") from error

    def render(messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, answer: bool) -> Rendered:
        budget = _Budget()
        given = {"messages": messages, "tools": tools, "documents": None, "add_generation_prompt": answer}
        given |= {"bos_token": bos, "eos_token": eos, BUDGET: budget} | dict(extra or {})
        pieces = []
        try:
            for piece in template.generate(given):
                budget.spend(len(piece))
                budget.written += len(piece) - sum(map(piece.count, MARKS))
                pieces.append(piece)
        except Exception as error:  # whatever a template may do with a conversation, the conversation is refused
            raise ValueError(f"the chat template refuses this conversation: {_line(error)}") from error
        text, marks = _unmarked("".join(pieces))
        return Rendered(text, marks, [budget.starts.get(id(message)) for message in messages])

    return render


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _unmarked(text: str) -> tuple[str, list[tuple[int, int]]]:
    """Take the marks out; a mark within another says nothing new."""
    parts, marks, opened, length = [], [], [], 0
    for part in re.split(f"([{''.join(MARKS)}])", text):
        if part == MARKS[0]:
            opened.append(length)
        elif part == MARKS[1] and opened:
            start = opened.pop()
            marks += [] if opened else [(start, length)]
        elif part not in MARKS:
            parts.append(part)
            length += len(part)
    return "".join(parts), marks
