"""Parsing of the command line: flags, and the recipe that --config names and --config.FIELD changes."""

import dataclasses
import difflib
import re
import traceback
import typing
from typing import Any, NamedTuple

from absl import flags
from ml_collections import config_flags

from jaxstages.cli.flags import FLAGS, define_flags
from jaxstages.cli.recipe_files import recipe_path
from jaxstages.cli.resolve import kept_recipe
from jaxstages.config import ModelConfig, Recipe, differences
from jaxstages.config.parts import ModelSpec
from jaxstages.runtime.console import warn
from jaxstages.runtime.files import parse_path

CONFIG = ("--config", "-config")
WORKDIR = ("--workdir", "-workdir")


class CommandLine(NamedTuple):
    """recipe: the one that --config or --config.FIELD gives, else None. words: arguments that are not flags, which
    `checkpoints`, `compare` and `report` take."""

    flags: flags.FlagValues
    recipe: Recipe | None
    words: list[str]


def parse(command: str, argv: list[str]) -> CommandLine:
    """Parse the arguments of a command.

    Raises:
        ValueError, flags.Error: a flag, a field or a recipe is wrong.
    """
    argv = _with_recipe_paths(argv)
    config_word = next((word for word in argv if word.split("=")[0] in CONFIG), "")
    changes = [word for word in argv[2:] if word.startswith("--config.")]
    for word in changes:
        _check_field(word.removeprefix("--config.").partition("=")[0])
    base = _recipe_of_workdir(argv, changes[0]) if changes and not config_word else None

    values = flags.FlagValues()
    try:
        define_flags(values)
        holder = _define_config(values, argv, base)
        words = values([argv[0], *argv[2:]])[1:]
    except Exception as error:
        raise _explained(error, config_word, argv) from None

    if words and command not in ("checkpoints", "compare", "report"):
        raise ValueError(f"{words[0]!r} is not a flag; write --flag=value")
    for flag in FLAGS:
        if values[flag.name].present and command not in flag.commands:
            raise ValueError(f"--{flag.name} does not apply to {command}")

    recipe = holder.value if config_word or changes else None
    if recipe is not None and not isinstance(recipe, Recipe):
        raise ValueError(f"{config_word}: its get_config() must return a Recipe, not {type(recipe).__name__}")
    if base is not None and recipe is not None:
        for line in differences(base, recipe):
            warn(f"the workdir's recipe with {line}")
    return CommandLine(values, recipe, words)


def _with_recipe_paths(argv: list[str]) -> list[str]:
    """Replace the name of a shipped recipe by its path."""
    words = list(argv)
    for index, word in enumerate(argv):
        flag, equals, value = word.partition("=")
        if flag in CONFIG and equals:
            words[index] = f"{flag}={recipe_path(value)}"
        elif flag in CONFIG and index + 1 < len(words):
            words[index + 1] = recipe_path(words[index + 1])
    return words


def _define_config(values: flags.FlagValues, argv: list[str], base: Recipe | None) -> Any:
    """Define --config and --config.FIELD; the recipe's file is loaded when `argv` is parsed.

    Args:
        base: the recipe whose fields are changed if --config names none.
    """
    if base is not None:
        return config_flags.DEFINE_config_dataclass("config", base, "the recipe", flag_values=values, sys_argv=argv)
    return config_flags.DEFINE_config_file(
        "config", None, "the recipe", lock_config=True, sys_argv=argv, flag_values=values
    )


def _recipe_of_workdir(argv: list[str], change: str) -> Recipe:
    """Read the workdir's recipe, whose field a word changes. Raises ValueError if there is none."""
    following = [*argv[1:], ""]
    values = [word.partition("=")[2] for word in argv if word.partition("=")[0] in WORKDIR and "=" in word]
    values += [value for word, value in zip(argv, following, strict=True) if word in WORKDIR]
    recipe = kept_recipe(parse_path(values[-1], "--workdir")) if values else None
    if recipe is None:
        raise ValueError(f"{change} changes a recipe's field; name the recipe too, with --config=RECIPE")
    return recipe


def _check_field(path: str, model: Any = ModelSpec) -> None:
    """Raise ValueError for a field that recipes do not have, with the nearest one.

    Args:
        model: class of `recipe.model`. ModelSpec means that it is not known yet: an own model can have any field.
    """
    kind, parent = Recipe, "config"
    for name in path.split("."):
        kind = model if kind is ModelSpec else kind
        if kind is ModelSpec:
            return
        if typing.get_origin(kind) is dict:  # any key is valid here; a missing one is reported when it is set
            kind, parent = typing.get_args(kind)[1], f"{parent}.{name}"
            continue
        if not dataclasses.is_dataclass(kind):
            raise ValueError(f"--{parent} has no fields, and so no {name!r}")

        hints = typing.get_type_hints(kind)
        if name not in hints:
            near = difflib.get_close_matches(name, hints, n=1)
            hint = f"did you mean --{parent}.{near[0]}? " if near else ""
            raise ValueError(f"unknown field --{parent}.{name}; {hint}known: {', '.join(hints)}")
        kind, parent = _without_none(hints[name]), f"{parent}.{name}"


def _without_none(hint: Any) -> Any:
    """`StageConfig | None` -> `StageConfig`; other types as they are."""
    if typing.get_origin(hint) is dict:
        return hint
    dataclass = [option for option in typing.get_args(hint) if dataclasses.is_dataclass(option)]
    return dataclass[0] if dataclass else hint


# Errors of ml_collections -----------------------------------------------------------------------------------------

_ABSENT = "sets a field of an absent stage: the recipe has no {}, or leaves it out"


def _explained(error: BaseException, config_word: str, argv: list[str]) -> BaseException:
    """Return an error in the user's terms for one that absl, ml_collections or the recipe's file raised."""
    while "Error whilst parsing config file" in str(error) and error.__context__ is not None:
        error = error.__context__  # ml_collections copies a traceback into the text of a new error
    if isinstance(error, flags.Error):
        return error

    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.name in ("get_config", "<module>")]
    location = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    if (word := _word_of_absent_stage(error, argv)) is not None:
        return ValueError(f"{word} {_ABSENT.format(word.split('.')[1])}")
    if isinstance(error, ValueError):
        return ValueError(f"{config_word or 'recipe.json'}: {error}{location}")
    if frames or not isinstance(error, KeyError | AttributeError | TypeError):
        kind = type(error).__name__
        return ValueError(f"{config_word}: the recipe's file can't be loaded: {kind}: {error}{location}")

    message = _message(error)
    if isinstance(error, KeyError):
        for word in argv:
            if word.startswith("--config.model.") and (unknown := _unknown_model_field(word, message)) is not None:
                return unknown
            if f".mixture.{message}." in word:
                return ValueError(f"{word}: the mixture has no data set {message!r}; add it in the recipe's file")
            if f".extra_stages.{message}." in word:
                return ValueError(f"{word}: the recipe has no extra stage {message!r}; add it in the recipe's file")
    return ValueError(f"--config can't be set so: {message}")


def _unknown_model_field(word: str, message: str) -> ValueError | None:
    """Return the error for a field that the model's config does not have, if that is what the message says."""
    flag = word.partition("=")[0]
    missing = re.match(
        r"Field \w+ not found on dataclass <class '(.+)'>|Attribute <class '(.+)'>\.\w+ does not", message
    )
    if missing is None:
        return None

    owner = missing.group(1) or missing.group(2)
    if not owner.startswith("jaxstages."):
        return ValueError(f"unknown field {flag}; the recipe's model is {owner.rpartition('.')[2]}, which lacks it")
    try:
        _check_field(flag.removeprefix("--config."), ModelConfig)
    except ValueError as error:
        return error
    return None


def _word_of_absent_stage(error: BaseException, argv: list[str]) -> str | None:
    """Return the argument that sets a field of a stage that is None in the recipe."""
    message = _message(error)
    for word in argv:
        flag = word.partition("=")[0]
        if "can not be applied because field" in str(error) and f"Flag {flag[9:]} " in str(error):
            return word
        set_on_none = isinstance(error, KeyError | AttributeError | TypeError) and "'NoneType'" in message
        if set_on_none and flag == f"--config.{message.rpartition(' ')[2]}":
            return word
    return None


def _message(error: BaseException) -> str:
    return str(error.args[0] if error.args else error)
