"""Write `docs/recipe.md`, the reference of all recipe fields, from the config dataclasses.

    python docs/make_recipe.py

Defaults and accepted values come from the fields, explanations from the docstrings below them. A test compares the page
with the code.
"""

import ast
import dataclasses
import inspect
import textwrap
import typing
from pathlib import Path
from typing import Any

from jaxstages.config import Recipe
from jaxstages.config.setting import Rules, rules_of

PAGE = Path(__file__).with_name("recipe.md")

HEADER = """# The recipe, field by field

<!-- Written by docs/make_recipe.py. Edit the docstrings in jaxstages/config/, and run it again. -->

A recipe is a Python file with `get_config(variant="")`, which returns a `Recipe`. All classes of this page are in
`jaxstages.config`, the frequent ones also in `jaxstages`. Each field can also be set by a flag, such as
`--config.pretrain.optim.schedule.peak_lr=3e-4`. Tuples are written as in Python:
`--config.finetune.replay="(('pretrain', 0.1),)"`. A field that does not exist, a value of the wrong type or out of its
bounds, and a field that has no effect beside its neighbours are refused in one line that names the nearest valid one.

`STAGE` stands for `pretrain`, `finetune`, `instruct` or `extra_stages.NAME`. "only for" means that the field must stay
at its default otherwise.
"""


def sections(config: type, path: str) -> dict[type, list[str]]:
    """Return each dataclass below a config, depth first, with the paths at which it occurs."""
    every = {config: [path]}
    for field in dataclasses.fields(config):
        inner = _dataclass_of(config, field)
        if inner is None:
            continue
        name = "STAGE" if field.name in ("pretrain", "finetune", "instruct", "extra_stages") else field.name
        name += ".NAME" if field.name == "mixture" else ""
        for each, paths in sections(inner, f"{path}.{name}".lstrip(".")).items():
            earlier = every.setdefault(each, [])
            earlier += [new for new in paths if new not in earlier]
    return every


def _dataclass_of(config: type, field: dataclasses.Field[Any]) -> type | None:
    """Return the dataclass with the fields of a field: its type, or its default's where any own part may stand."""
    factory = field.default_factory
    if isinstance(factory, type) and dataclasses.is_dataclass(factory):
        return factory
    return _dataclass_in(typing.get_type_hints(config)[field.name])


def _dataclass_in(kind: Any) -> type | None:
    """Return the config dataclass that a type hint contains, such as `StageConfig | None`."""
    if isinstance(kind, type) and dataclasses.is_dataclass(kind) and kind.__module__ != "jaxstages.config.parts":
        return kind
    return next((inner for option in typing.get_args(kind) if (inner := _dataclass_in(option))), None)


def docstrings(config: type) -> dict[str, str]:
    """Return the docstring below each field of a dataclass, as one line."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(config))).body[0]
    assert isinstance(tree, ast.ClassDef)
    texts = {}
    for statement, following in zip(tree.body, [*tree.body[1:], None], strict=True):
        if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
            continue
        text = ""
        if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
            text = " ".join(str(following.value.value).split())
        texts[statement.target.id] = text
    return texts


def types(config: type) -> dict[str, str]:
    """Return the type of each field as the source has it."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(config))).body[0]
    assert isinstance(tree, ast.ClassDef)
    annotated = [node for node in tree.body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)]
    return {typing.cast(ast.Name, node.target).id: ast.unparse(node.annotation) for node in annotated}


def accepted(rules: Rules) -> str:
    """Describe the values that a field accepts."""
    parts = []
    if rules.choices is not None:
        parts.append(", ".join(f"`{choice}`" for choice in rules.choices))
    bounds = {"at least": rules.at_least, "above": rules.above, "at most": rules.at_most, "below": rules.below}
    parts += [f"{words} {value:,}" for words, value in bounds.items() if value is not None]
    if rules.special is not None:
        parts.append(f"or {rules.special}")
    if rules.syntax is not None:
        parts.append({"regex": "regular expressions", "format": "format string"}[rules.syntax])
    for neighbour, values in rules.only_for.items():
        parts.append(f"only for `{neighbour}` {', '.join(f'`{value}`' for value in values)}")
    return "; ".join(parts)


def default(field: dataclasses.Field[Any]) -> str:
    """Return a field's default as code, or "" if the section of its own dataclass has it."""
    if field.default is not dataclasses.MISSING:
        return f"`{field.default!r}`"
    if field.default_factory is dict:
        return "`{}`"
    return "" if field.default_factory is not dataclasses.MISSING else "required"


def section(config: type, paths: list[str]) -> str:
    """Return the heading, the docstring and the table of a dataclass."""
    where = ", ".join(f"`{path}`" for path in paths if path)
    lines = [f"## {config.__name__}", ""]
    if where:
        lines += [f"At {where}.", ""]
    if config.__doc__ and not config.__doc__.startswith(f"{config.__name__}("):
        lines += [" ".join(config.__doc__.split()), ""]
    lines += ["| field | type | default | accepts | meaning |", "| --- | --- | --- | --- | --- |"]

    texts, kinds = docstrings(config), types(config)
    for field in dataclasses.fields(config):
        inner = _dataclass_of(config, field)
        kind = f"`{kinds[field.name]}`"
        if inner is not None:
            kind = f"[{kind}](#{inner.__name__.lower()})"
        cells = [f"`{field.name}`", kind, default(field), accepted(rules_of(field)), texts[field.name]]
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines) + "\n"


def page() -> str:
    """Return the whole page."""
    return "\n".join([HEADER, *(section(config, paths) for config, paths in sections(Recipe, "").items())])


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
