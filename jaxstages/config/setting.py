"""Config fields that declare the values they accept.

`setting` stores the rules in the field's metadata, where `config.checks` reads them. (`typing.Literal` and `Annotated`
could express the same, but ml_collections' `config_flags` cannot override fields of these types.)
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")


class Rules(NamedTuple):
    """The values that a field accepts, or the items that a tuple accepts; see `setting`. None means no such rule."""

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    special: float | None = None
    choices: tuple[str, ...] | None = None
    syntax: str | None = None
    only_for: Mapping[str, tuple[Any, ...]] = {}


def setting(
    default: T,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    special: float | None = None,
    choices: tuple[str, ...] | None = None,
    syntax: str | None = None,
    only_for: Mapping[str, tuple[Any, ...]] | None = None,
) -> T:
    """Declare a dataclass field with a default and the values it accepts.

    Args:
        default: default value, which must be immutable and is always accepted.
        at_least: smallest number; `above` is the same with the bound excluded.
        at_most: largest number; `below` is the same with the bound excluded.
        special: a number outside the bounds that has a meaning of its own, such as -1 for "all that is left".
        choices: the strings that the field accepts.
        syntax: "regex" (a regular expression) or "format" (a format string, as for `str.format`).
        only_for: maps a field of the same dataclass to those of its values for which this field has an effect. For
            other values this field must keep its default.
    """
    rules = Rules(at_least, above, at_most, below, special, choices, syntax, only_for or {})
    return dataclasses.field(default=default, metadata={"rules": rules})


def rules_of(field: dataclasses.Field[Any]) -> Rules:
    """Return the rules that `setting` stored in a field."""
    return field.metadata.get("rules", Rules())
