"""The door: flags in, one command, an exit code out. What can be said is in `command_line.py`."""

import contextlib
import difflib
import os
import sys
import traceback
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # before jax: the compiler's notes are not for our users

import jax
from absl import flags, logging

from jaxstages import hosts
from jaxstages.cluster import ENVIRONMENT, Place, find_place
from jaxstages.command_line import FLAGS_OF, USAGE, parse
from jaxstages.commands.answering import Manner
from jaxstages.commands.chat import chat
from jaxstages.commands.checkpoints import checkpoints
from jaxstages.commands.evaluate import evaluate
from jaxstages.commands.generate import Request, generate
from jaxstages.commands.inspect import inspect
from jaxstages.commands.plan import plan
from jaxstages.commands.prepare import prepare_all
from jaxstages.commands.recipe import resolve_recipe
from jaxstages.commands.train import train, train_all
from jaxstages.commands.transfer import export_model, import_model
from jaxstages.types import Diverged, Interrupted


def main(argv: list[str]) -> int:
    """Run one command; the exit code."""
    if len(argv) < 2 or {"--help", "-h", "-help", "help"} & set(argv[1:]):
        print(USAGE)
        return 0 if len(argv) > 1 else 2
    try:
        _dispatch(argv)
    except (ValueError, flags.Error) as error:
        return _fail(2, str(error))
    except Diverged as error:
        return _fail(70, str(error))
    except Interrupted as error:
        return _fail(75, str(error))
    except FloatingPointError as error:
        return _fail(70, f"--debug_nans: {str(error).splitlines()[0]} {_place_of(error)}")
    except OSError as error:
        return _fail(74, f"{error}; nothing that was saved before is lost")
    except Exception as error:
        traceback.print_exc()
        hosts.tell_end(1, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
        return 1
    return 0


def _place_of(error: BaseException) -> str:
    """Where in our code, or a user's, an error comes from: the innermost frame that is no library's. An operation of a
    gradient has no line of its own: JAX names the one that it is the gradient of in the error's cause."""
    traces = [traceback.extract_tb(one.__traceback__) for one in (error.__cause__, error) if one is not None]
    frames = next(ours for trace in traces if (ours := [f for f in trace if "site-packages" not in f.filename]))
    return f"at {frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line}"


def _fail(code: int, text: str) -> int:
    with contextlib.suppress(OSError):  # of a log on a full disk: the code tells it
        print(f"jaxstages: {' '.join(text.split())}", file=sys.stderr, flush=True)
    hosts.tell_end(code, text)
    return code


def _check_workdir(workdir: Path) -> None:
    """Raises ValueError unless it is a folder, or can become one."""
    try:
        there = next(path for path in (workdir, *workdir.absolute().parents) if path.exists())
    except OSError as error:  # a name that is too long, for one
        raise ValueError(f"--workdir={str(workdir)[:100]}: {error.strerror}; name another folder") from error
    if not there.is_dir():
        raise ValueError(f"--workdir={workdir}: {there} is no folder; name another")


def _dispatch(argv: list[str]) -> None:
    command = argv[1]
    if command not in FLAGS_OF:
        near = difflib.get_close_matches(command, FLAGS_OF, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ValueError(f"unknown command {command!r}; {hint}known: {', '.join(FLAGS_OF)}")
    values, given, words = parse(command, argv)
    if command == "plan":
        if given is None:
            raise ValueError("plan needs --config=FILE, the recipe to plan for, such as configs/scale.py:1b_v5e16")
        plan(given, values.stage, values.topology)
        return
    if values.workdir is None:
        raise ValueError(f"{command} needs --workdir=DIR, where the run lives")
    workdir = Path(values.workdir)
    _check_workdir(workdir)
    logging.set_verbosity(logging.FATAL)  # what fails in a library, we say in one line
    if command == "checkpoints":
        checkpoints(workdir, values.stage, words)
        return
    jax.config.update("jax_debug_nans", values.debug_nans)
    if command == "import":
        import_model(given, workdir, values["from"].value)
        return
    recipe = resolve_recipe(given, workdir, lengthen=command if values.lengthen else "")
    match command:
        case "run":
            train_all(recipe, workdir, _place(values))
        case "prepare":
            prepare_all(recipe, workdir, values.beam_options)
        case "inspect":
            inspect(recipe, workdir, values.stage)
        case "evaluate":
            evaluate(recipe, workdir, values.stage)
        case "generate":
            generate(recipe, workdir, values.stage, Request(values.prompt, values.prompts, values.out, _manner(values)))
        case "chat":
            chat(recipe, workdir, values.stage, _manner(values))
        case "export":
            export_model(recipe, workdir, values.stage, values.to, values.dtype, values.adapter)
        case stage:
            train(recipe, workdir, stage, _place(values), values.lengthen)


def _manner(values: flags.FlagValues) -> Manner:
    return Manner(*(getattr(values, name) for name in Manner._fields))


def _place(values: flags.FlagValues) -> Place | None:
    return find_place({name: values[name].value for name in ENVIRONMENT})
