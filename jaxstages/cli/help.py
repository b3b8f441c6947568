"""Help texts, made from the tables of commands and flags."""

import difflib
import textwrap

from jaxstages.cli.flags import COMMANDS, Flag, flags_of
from jaxstages.cli.recipe_files import shipped_recipes

WIDTH = 100

CONFIG_FLAGS = (
    (
        "--config=RECIPE[:VARIANT]",
        "Recipe: a Python file, or the name of a shipped one, such as demo. Not needed if DIR has a recipe.json.",
    ),
    (
        "--config.FIELD=VALUE",
        "Change a field of that recipe, or of DIR's: --config.pretrain.loop.steps=500. None leaves out a stage: "
        "--config.instruct=None.",
    ),
)

EXIT_CODES = """\
  0   done
  2   change something and try again
  70  the loss diverged; the last good checkpoint stays
  74  a disk or another storage failed
  75  interrupted after a complete save, or a host was lost; start it again
  1   anything else"""


def help_text(command: str | None = None) -> str:
    """Return the overview, or the help of one command.

    Raises:
        ValueError: there is no such command.
    """
    return overview() if command is None else command_help(command)


def check_command(command: str) -> None:
    """Raise ValueError for an unknown command, with the nearest one."""
    if command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ValueError(f"unknown command {command!r}; {hint}known: {', '.join(COMMANDS)}")


def overview() -> str:
    commands = "\n".join(f"  {name:<12} {command.summary}" for name, command in COMMANDS.items())
    return f"""\
Train a language model in three stages: pretrain, fine-tune, instruct.

usage: jaxstages COMMAND --workdir=DIR [--config=RECIPE[:VARIANT]] [--config.FIELD=VALUE] [FLAGS]

commands:
{commands}

`jaxstages COMMAND --help` explains one command, its flags, and shows an example.
RECIPE is a Python file, or a shipped recipe: {", ".join(shipped_recipes())}.
To begin: jaxstages run --config=demo --workdir=runs/demo

exit codes:
{EXIT_CODES}"""


def command_help(name: str) -> str:
    check_command(name)
    command = COMMANDS[name]
    described = [(_placeholder(flag), _described(flag)) for flag in flags_of(name)]
    position = 1 if name != "plan" else 0  # --workdir comes first
    lines = [*described[:position], *CONFIG_FLAGS, *described[position:]]
    flags = "\n".join(_entry(flag, text) for flag, text in lines)
    details = textwrap.fill(command.details, WIDTH)
    return f"""\
{command.summary}
{details}

usage: jaxstages {name} {command.usage} [FLAGS]

flags:
{flags}

example:
  {command.example}

documentation: {command.docs}"""


def _placeholder(flag: Flag) -> str:
    return f"--{flag.name}={flag.value}" if flag.value else f"--{flag.name}"


def _described(flag: Flag) -> str:
    """Return the help of a flag, with its default if it has one."""
    if flag.default is None or flag.kind in (bool, list):
        return flag.help
    return f"{flag.help} Default: {flag.default}."


def _entry(flag: str, text: str) -> str:
    indent = " " * 28
    first = f"  {flag:<26}" if len(flag) < 26 else f"  {flag}\n{indent}"
    return first + textwrap.fill(text, WIDTH - len(indent)).replace("\n", f"\n{indent}")
