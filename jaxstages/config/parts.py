"""Custom parts of a recipe: models, losses, metrics, tasks, sources, optimizers and schedules from the user's own file.

A part is a Python value: a function, a `functools.partial` of a function, or an object with a method `make`.
`recipe.json` records its name, its fields, and the SHA-256 of its source. Nothing is ever imported from there: code
comes only from the recipe that `--config` names.
"""

import ast
import dataclasses
import functools
import hashlib
import inspect
from collections.abc import Callable
from pathlib import Path
from types import FunctionType
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class ModelSpec(Protocol):
    """Interface of `Recipe.model`: a `ModelConfig`, or an object that also has `make(vocab_size) -> Model`."""

    context: int


@runtime_checkable
class Makes(Protocol):
    """A custom part with fields. `make` returns the function or object that the recipe's field describes."""

    @property
    def make(self) -> Callable[..., Any]: ...


@runtime_checkable
class TaskSpec(Makes, Protocol):
    """A custom data task.

    texts: `texts(record)` returns the texts of a record, which train the tokenizer and identify near-duplicates. The
        first text decides whether the record is held out.
    make: `make(tokenizer, context)` returns `encode(record) -> Encoded`, whose examples have at most context + 1 ids.
    """

    @property
    def texts(self) -> Callable[[Any], list[str]]: ...


@dataclasses.dataclass(frozen=True, slots=True)
class Part:
    """A custom part as `recipe.json` records it.

    part: `file:name`, such as "mine:Mamba".
    fields: fields of the object, or keyword arguments of the partial.
    sha256: digest of the definition and of everything in the same file that the definition uses.
    """

    part: str
    fields: dict[str, Any]
    sha256: str

    def __str__(self) -> str:
        fields = ", ".join(f"{name}={value!r}" for name, value in self.fields.items())
        return f"{self.part}({fields}), source {self.sha256[:12]}…"


def is_part(value: Any) -> bool:
    """Return whether a value in a recipe is a custom part."""
    if isinstance(value, Part):
        return True
    ours = type(value).__module__.startswith("jaxstages.")
    return isinstance(value, functools.partial) or callable(value) or (not ours and hasattr(value, "make"))


def describe(value: Any, to_plain: Callable[[Any], Any] = lambda field: field) -> Part:
    """Return the description of a part for `recipe.json`.

    Args:
        to_plain: converts a field of the part to a JSON value.

    Raises:
        ValueError: the part is not defined at the top level of a file.
    """
    if isinstance(value, Part):
        return value
    if isinstance(value, functools.partial):
        if value.args:
            raise ValueError(f"{value}: pass the arguments of a functools.partial by keyword")
        fields, definition = dict(value.keywords), value.func
    elif dataclasses.is_dataclass(value):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        definition = type(value)
    else:
        fields, definition = {}, value if isinstance(inspect.unwrap(value), FunctionType) else type(value)
    name, file = _location(definition)
    plain = {key: to_plain(field) for key, field in fields.items()}
    return Part(f"{file.stem}:{name}", plain, source_sha256(file, name))


def tracker_name(tracker: Any) -> str:
    """Return the name of an item of `Recipe.trackers`: a built-in name, or that of the custom part."""
    return tracker if isinstance(tracker, str) else describe(tracker).part.partition(":")[2]


def _location(definition: Any) -> tuple[str, Path]:
    """Return the name and the file of a function or class."""
    function = inspect.unwrap(definition) if not inspect.isclass(definition) else getattr(definition, "make", None)
    if not isinstance(function, FunctionType):
        raise ValueError(f"{definition!r} is no function and has no `make`; see docs/extending.md")
    name = definition.__qualname__.split(".")[0] if inspect.isclass(definition) else function.__qualname__
    if "<" in name:  # <lambda>, <locals>
        raise ValueError(f"{name} can't be recorded in recipe.json; define it at the top level of the recipe's file")
    return name.split(".")[0], Path(function.__code__.co_filename)


def source_sha256(file: Path, name: str) -> str:
    """Return the SHA-256 of a definition and of everything in the same file that it uses, directly or indirectly.

    Comments, formatting and unused definitions, such as `get_config`, do not change it.

    Raises:
        ValueError: the file has no such definition at its top level.
    """
    definitions = _definitions(file)
    if name not in definitions:
        raise ValueError(f"{file} defines no {name} at its top level, where recipe.json could record it")
    closure, queue = set(), [name]
    while queue:
        current = queue.pop()
        if current in closure:
            continue
        closure.add(current)
        for statement in definitions[current]:
            queue += [node.id for node in ast.walk(statement) if isinstance(node, ast.Name) and node.id in definitions]
    text = "\n".join(ast.unparse(statement) for key in sorted(closure) for statement in definitions[key])
    return hashlib.sha256(text.encode()).hexdigest()


def _definitions(file: Path) -> dict[str, list[ast.stmt]]:
    """Return the statements at the top level of a file that bind each name. A compound statement, such as `if` or
    `try`, binds all names in it."""
    definitions: dict[str, list[ast.stmt]] = {}
    for statement in ast.parse(file.read_text(encoding="utf-8")).body:
        match statement:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                names = [name]
            case ast.Import(names=aliases) | ast.ImportFrom(names=aliases):
                names = [alias.asname or alias.name.split(".")[0] for alias in aliases]
            case ast.Assign() | ast.AnnAssign() | ast.AugAssign():
                nodes = [node for node in ast.walk(statement) if isinstance(node, ast.Name)]
                names = [node.id for node in nodes if isinstance(node.ctx, ast.Store)]
            case _:
                nodes = list(ast.walk(statement))
                names = [node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]
                names += [node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)]
        for name in names:
            definitions.setdefault(name, []).append(statement)
    return definitions


@dataclasses.dataclass(frozen=True, slots=True)
class Metric:
    """A custom metric of generated answers. A plain function is a metric that is better when it is higher.

    score: `score(predictions, references) -> float`.
    better: "max" if higher is better, "min" if lower is.
    """

    score: Callable[..., float] | Part
    better: str = "max"

    @property
    def name(self) -> str:
        if isinstance(self.score, Part):
            return self.score.part.partition(":")[2]
        function = self.score.func if isinstance(self.score, functools.partial) else self.score
        return inspect.unwrap(function).__name__


def metric_name(metric: Any) -> str:
    """Return the name of an item of `evaluation.metrics`: a built-in name, a function or a `Metric`."""
    return metric if isinstance(metric, str) else as_metric(metric).name


def as_metric(metric: Any) -> Metric:
    """Return a custom metric as a `Metric`."""
    return metric if isinstance(metric, Metric) else Metric(metric)
