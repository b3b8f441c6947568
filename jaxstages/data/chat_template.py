"""Render Hugging Face chat templates: Jinja in a sandbox, with bounded work and a fixed date.

Templates come with external tokenizers and are not trusted. They see the conversation and nothing else. One that loops
forever, or writes without end, raises a ValueError of one line.
"""

import datetime
import json
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jinja2
from jinja2 import ext, nodes, sandbox

DATE = datetime.datetime(2024, 7, 26)
"""Default date of `strftime_now`, which Llama 3's templates fall back to. With a fixed date, rows that are prepared on
two days are the same rows."""

MARKS = ("\U0010fffe", "\U0010ffff")
"""Mark in the output where `{% generation %}` begins and ends. They are noncharacters of Unicode, so no text has
them."""

BUDGET = " budget"
"""Name of the budget in a template's context. It is no identifier, so that a template can't reach it."""

MAX_STEPS = 10**6
"""Loop iterations and macro calls in one rendering."""

MAX_CHARACTERS = 2**26
"""Characters that one rendering writes or concatenates."""

MAX_SOURCE_CHARACTERS = 2**20
MAX_INDENT = 16

REMOVED_FILTERS = ("center", "format", "lipsum", "urlize", "wordwrap", "xmlattr")
"""Jinja filters and functions that make long text from short text. No published chat template needs them."""

REFUSED_METHODS = ("center", "expandtabs", "format", "format_map", "ljust", "rjust", "translate", "zfill")
"""Methods of str that do the same."""


class Rendered(NamedTuple):
    """The text of a conversation.

    marks: spans (start, stop) that the template marks as generated.
    starts: where the template's loop over messages reached each of them; None for messages that it did not visit.
    """

    text: str
    marks: list[tuple[int, int]]
    starts: list[int | None]


Render = Callable[[list[dict[str, Any]], list[dict[str, Any]] | None, bool], Rendered]
"""`render(messages, tools, add_generation_prompt)`."""


class _Budget:
    """The state of one rendering: its remaining work, and the position in the text at each item of a loop.

    written: characters written so far.
    starts: id of a loop's item -> characters written when the loop reached it.
    """

    def __init__(self) -> None:
        self.steps, self.characters = MAX_STEPS, MAX_CHARACTERS
        self.written = 0
        self.starts: dict[int, int] = {}

    def step(self, item: Any) -> str:
        if isinstance(item, dict):
            self.starts[id(item)] = self.written
        self.steps -= 1
        if self.steps < 0:
            raise ValueError(f"it takes more than {MAX_STEPS:,} rounds of loops; does it end?")
        return ""

    def spend(self, characters: int) -> None:
        self.characters -= characters
        if self.characters < 0:
            raise ValueError(f"it puts more than {MAX_CHARACTERS:,} characters together; does it end?")


class _Generation(ext.Extension):
    """Put `MARKS` around the output of `{% generation %}...{% endgeneration %}`."""

    tags = {"generation"}

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Callable[[], str]) -> str:
        return f"{MARKS[0]}{caller()}{MARKS[1]}"


class _Sandbox(sandbox.ImmutableSandboxedEnvironment):
    """A sandbox that counts the work of operators that can make long text from short text."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "+" and {type(left), type(right)} == {str}:  # by far the most frequent
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
        return not (isinstance(obj, str) and attr in REFUSED_METHODS) and super().is_safe_attribute(obj, attr, value)


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
    """The `tojson` filter as chat templates expect it: nothing is escaped for HTML."""
    if indent is not None and not (isinstance(indent, int) and indent <= MAX_INDENT):
        raise ValueError(f"tojson(indent={str(indent)[:20]}) is more than {MAX_INDENT}")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _with_counting(tree: nodes.Template) -> nodes.Template:
    """Add a step at the head of each loop's and macro's body, and count the characters that `~` concatenates.

    The steps of outer loops, whose output is not buffered, also record their item.
    """

    def filtered(name: str, node: nodes.Expr, *arguments: nodes.Expr) -> nodes.Filter:
        return nodes.Filter(node, name, list(arguments), [], None, None)

    buffering = (nodes.For, nodes.Macro, nodes.CallBlock, nodes.FilterBlock, nodes.AssignBlock)
    inner = {id(node) for outer in tree.find_all(buffering) for node in outer.find_all(nodes.For) if node is not outer}

    for node in list(tree.find_all((nodes.For, nodes.Macro))):
        target = node.target if isinstance(node, nodes.For) and id(node) not in inner else None
        item = [nodes.Name(target.name, "load")] if isinstance(target, nodes.Name) else []
        node.body.insert(0, nodes.Output([filtered("step", nodes.Const(""), *item)]))

    for node in list(tree.find_all(nodes.Concat)):
        node.nodes = [filtered("sized", part) for part in node.nodes]
    return tree


def constants(source: str) -> frozenset[str]:
    """Strings that a template compares with or writes, except plain words, which are names of roles and keys."""
    tree = _environment().parse(source)
    texts = (node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str))
    return frozenset(text for text in texts if re.search(r"\W", text.strip()))


def _environment() -> "_Sandbox":
    return _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation])


def make_render(
    source: str, bos: str, eos: str, extra: Mapping[str, Any] | None = None, now: datetime.datetime = DATE
) -> Render:
    """Compile a template to a function that renders conversations.

    Args:
        extra: further variables of the template, such as {"enable_thinking": False}.
        now: date of `strftime_now`.

    Raises:
        ValueError: the source is no template. `render` raises it where the template refuses a conversation, fails, or
            does not end.
    """
    environment = _environment()
    for name in REMOVED_FILTERS:
        environment.filters.pop(name, None)
        environment.globals.pop(name, None)
    environment.filters |= {
        "tojson": _to_json,
        "step": jinja2.pass_context(_step),
        "sized": jinja2.pass_context(_sized),
    }
    environment.globals |= {"raise_exception": _refuse, "strftime_now": now.strftime}

    if len(source) > MAX_SOURCE_CHARACTERS:
        raise ValueError(f"the chat template has {len(source):,} characters, more than {MAX_SOURCE_CHARACTERS:,}")
    try:
        template = environment.from_string(_with_counting(environment.parse(source)))
    except Exception as error:
        raise ValueError(f"the chat template is no Jinja: {_one_line(error)}") from error

    def render(messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, answer: bool) -> Rendered:
        budget = _Budget()
        variables = {"messages": messages, "tools": tools, "documents": None, "add_generation_prompt": answer}
        variables |= {"bos_token": bos, "eos_token": eos, BUDGET: budget} | dict(extra or {})

        pieces = []
        try:
            for piece in template.generate(variables):
                budget.spend(len(piece))
                budget.written += len(piece) - sum(map(piece.count, MARKS))
                pieces.append(piece)
        except Exception as error:  # a template may raise anything
            raise ValueError(f"the chat template refuses this conversation: {_one_line(error)}") from error

        text, marks = _remove_marks("".join(pieces))
        return Rendered(text, marks, [budget.starts.get(id(message)) for message in messages])

    return render


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _remove_marks(text: str) -> tuple[str, list[tuple[int, int]]]:
    """Return the text without marks, and the marked spans. Nested marks count as one."""
    parts, spans, open_starts, length = [], [], [], 0
    for part in re.split(f"([{''.join(MARKS)}])", text):
        if part == MARKS[0]:
            open_starts.append(length)
        elif part == MARKS[1] and open_starts:
            start = open_starts.pop()
            if not open_starts:
                spans.append((start, length))
        elif part not in MARKS:
            parts.append(part)
            length += len(part)
    return "".join(parts), spans
