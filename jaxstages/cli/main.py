"""The door: flags in, one command, an exit code out. What can be said is in `command_line.py`.

What a command works with, jax first of all, is imported when it is known that the command can be run: help and mistakes
take no time.
"""

import contextlib
import difflib
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # before jax: the compiler's notes are not for our users

from absl import flags, logging

from jaxstages.cli.flags import FLAGS_OF, USAGE, parse
from jaxstages.cli.resolve import resolve_recipe
from jaxstages.cli.sampling_flags import SamplingFlags
from jaxstages.config import Recipe
from jaxstages.runtime.cluster import ENVIRONMENT, ProcessInfo, detect_process
from jaxstages.runtime.files import local_path
from jaxstages.runtime.workdir import check_workdir


def main(argv: list[str], before_jax: Callable[[], None] = lambda: None) -> int:
    """Run one command; the exit code.

    Args:
        before_jax: called once it is known that jax is needed.
    """
    if len(argv) < 2 or {"--help", "-h", "-help", "help"} & set(argv[1:]):
        print(USAGE)
        return 0 if len(argv) > 1 else 2
    try:
        _dispatch(argv, before_jax)
    except Exception as error:
        return _failed(error)
    return 0


def _failed(error: Exception) -> int:
    """Say in a line what has ended the command; the exit code for it."""
    match error:
        case ValueError() | flags.Error():
            return _end(2, str(error))
        case FloatingPointError():
            return _end(70, f"--debug_nans: {str(error).splitlines()[0]} {_place_of(error)}")
        case OSError():
            return _end(74, f"{error}; nothing that was saved before is lost")
    if (code := getattr(error, "exit_code", None)) is not None:  # Diverged, Interrupted
        return _end(code, str(error))
    traceback.print_exc()
    _tell_others(1, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
    return 1


def _place_of(error: BaseException) -> str:
    """Where in our code, or a user's, an error comes from: the innermost frame that is no library's. An operation of a
    gradient has no line of its own: JAX names the one that it is the gradient of in the error's cause."""
    traces = [traceback.extract_tb(one.__traceback__) for one in (error.__cause__, error) if one is not None]
    frames = next(ours for trace in traces if (ours := [f for f in trace if "site-packages" not in f.filename]))
    return f"at {frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line}"


def _end(code: int, text: str) -> int:
    with contextlib.suppress(OSError):  # of a log on a full disk: the code tells it
        print(f"jaxstages: {' '.join(text.split())}", file=sys.stderr, flush=True)
    _tell_others(code, text)
    return code


def _tell_others(code: int, text: str) -> None:
    """The other processes of the run; there are none where nothing of it was imported yet."""
    if (lost_host := sys.modules.get("jaxstages.runtime.lost_host")) is not None:
        lost_host.announce_exit(code, text)


def _dispatch(argv: list[str], before_jax: Callable[[], None]) -> None:
    command = argv[1]
    if command not in FLAGS_OF:
        near = difflib.get_close_matches(command, FLAGS_OF, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ValueError(f"unknown command {command!r}; {hint}known: {', '.join(FLAGS_OF)}")
    values, given, words = parse(command, argv)
    if command == "plan":
        if given is None:
            raise ValueError("plan needs --config=FILE, the recipe to plan for, such as configs/scale.py:1b_v5e16")
        before_jax()
        from jaxstages.cli.plan import plan

        plan(given, values.stage, values.topology)
        return
    if values.workdir is None:
        raise ValueError(f"{command} needs --workdir=DIR, where the run lives")
    workdir = local_path(values.workdir, "--workdir")
    check_workdir(workdir)
    logging.set_verbosity(logging.FATAL)  # what fails in a library, we say in one line
    if command == "checkpoints":
        from jaxstages.cli.checkpoints import checkpoints

        checkpoints(workdir, values.stage, words)
        return
    if command == "import":
        before_jax()
        from jaxstages.cli.transfer import import_model

        import_model(given, workdir, values["from"].value)
        return
    recipe = resolve_recipe(given, workdir, lengthen=command if values.lengthen else "")
    before_jax()
    _work(command, values, recipe, workdir)


def _work(command: str, values: flags.FlagValues, recipe: Recipe, workdir: Path) -> None:
    import jax

    jax.config.update("jax_debug_nans", values.debug_nans)
    match command:
        case "run":
            from jaxstages.cli.train import run_stages

            run_stages(recipe, workdir, _place(values))
        case "prepare":
            from jaxstages.cli.prepare import prepare_all

            prepare_all(recipe, workdir, values.beam_options)
        case "inspect":
            from jaxstages.cli.inspect import inspect

            inspect(recipe, workdir, values.stage)
        case "evaluate":
            from jaxstages.cli.evaluate import evaluate

            evaluate(recipe, workdir, values.stage, values.step, tuple(values.data))
        case "generate":
            from jaxstages.cli.generate import Request, generate

            request = Request(values.prompt, values.prompts, values.out, _manner(values), values.step)
            generate(recipe, workdir, values.stage, request)
        case "chat":
            from jaxstages.cli.chat import chat

            chat(recipe, workdir, values.stage, _manner(values), values.step)
        case "export":
            from jaxstages.cli.transfer import export_model

            export_model(recipe, workdir, values.stage, values.to, values.dtype, values.adapter, values.step)
        case stage:
            from jaxstages.cli.train import train

            train(recipe, workdir, stage, _place(values), values.lengthen, values.finish)


def _manner(values: flags.FlagValues) -> SamplingFlags:
    return SamplingFlags(*(getattr(values, name) for name in SamplingFlags._fields))


def _place(values: flags.FlagValues) -> ProcessInfo | None:
    return detect_process({name: values[name].value for name in ENVIRONMENT})
