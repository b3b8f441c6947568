"""`main`: parse the arguments, run one command, and return the exit code.

Commands import jax, and whatever else they need, only when they run. Help and mistakes must be fast.
"""

import contextlib
import dataclasses
import os
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # must be set before jax is imported; hides the compiler's notes

from absl import flags, logging

from jaxstages.cli.flags import TOGETHER
from jaxstages.cli.help import check_command, help_text
from jaxstages.cli.parse import parse
from jaxstages.cli.resolve import check_stage, resolve_recipe
from jaxstages.cli.sampling_flags import SamplingFlags
from jaxstages.config import STAGES, Recipe
from jaxstages.runtime import bucket
from jaxstages.runtime.cluster import ENVIRONMENT, ProcessInfo, detect_process
from jaxstages.runtime.files import local_path, parse_path
from jaxstages.runtime.workdir import check_workdir

if TYPE_CHECKING:
    from jaxstages.training.stage import RunOptions

HELP = {"--help", "-help", "-h"}


def main(argv: list[str], before_jax: Callable[[], None] = lambda: None) -> int:
    """Run one command and return the exit code.

    Args:
        argv: the program's name, the command, and its arguments.
        before_jax: called before jax is imported, by commands that need it.
    """
    try:
        help_shown, code = _help(argv), 0
        if help_shown is None:
            code = _dispatch(argv, before_jax)
    except Exception as error:
        return _failed(error)

    if help_shown is None:
        return code
    print(help_shown)
    return 0 if len(argv) > 1 else 2


def _help(argv: list[str]) -> str | None:
    """Return the help that the arguments ask for, if they do. Raises ValueError for an unknown command."""
    if len(argv) < 2 or argv[1] in HELP | {"help"}:
        return help_text(*argv[2:3])
    return help_text(argv[1]) if HELP & set(argv[2:]) else None


def _failed(error: Exception) -> int:
    """Print one line about the error that ended the command, and return the exit code."""
    match error:
        case ValueError() | flags.Error():
            return _end(2, str(error))
        case FloatingPointError():
            return _end(70, f"--debug_nans: {str(error).splitlines()[0]} {_location(error)}")
        case _ if reason := bucket.explain(error):
            return _end(74, f"{reason}; nothing that was saved before is lost")
        case OSError():
            return _end(74, f"{error}; nothing that was saved before is lost")

    if (code := getattr(error, "exit_code", None)) is not None:  # Diverged, Interrupted
        return _end(code, str(error))
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):  # XLA has no type of its own for it
        return _end(
            2,
            f"out of memory: {str(error)[:200]}; set config.STAGE.loop.accumulate higher, "
            f"loop.remat='auto', or loop.batch_size or evaluation.batch_size lower {_location(error)}",
        )

    traceback.print_exc()
    _announce_to_other_processes(1, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
    return 1


def _location(error: BaseException) -> str:
    """Return the innermost line of our code, or of the user's, that the error comes from.

    An operation of a gradient has no line of its own. JAX names the line of the differentiated operation in the cause.
    """
    traces = [traceback.extract_tb(item.__traceback__) for item in (error.__cause__, error) if item is not None]
    for trace in traces:
        if frames := [frame for frame in trace if "site-packages" not in frame.filename]:
            return f"at {frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line}"
    return ""


def _end(code: int, text: str) -> int:
    with contextlib.suppress(OSError):  # standard error may be a file on a full disk; the exit code still tells
        print(f"jaxstages: {' '.join(text.split())}", file=sys.stderr, flush=True)
    _announce_to_other_processes(code, text)
    return code


def _announce_to_other_processes(code: int, text: str) -> None:
    """Announce the exit to the other processes of a run. There are none if the module was never imported."""
    if (lost_host := sys.modules.get("jaxstages.runtime.lost_host")) is not None:
        lost_host.announce_exit(code, text)


def _dispatch(argv: list[str], before_jax: Callable[[], None]) -> int:
    """Run a command. Returns the exit code of one that hands on another process's; errors are raised."""
    command = argv[1]
    if command == TOGETHER:
        from jaxstages.cli.together import train_trials

        before_jax()
        train_trials(Path(argv[2]), argv[3], argv[4:])
        return 0
    check_command(command)
    if command == "sweep":
        return _sweep(argv)
    _run(command, *parse(command, argv), before_jax)
    return 0


def _sweep(argv: list[str]) -> int:
    from jaxstages.cli.sweep import SweepOptions, sweep
    from jaxstages.cli.sweep_flags import parse_sweep

    line = parse_sweep(argv)
    folder = _workdir("sweep", line.values, local_path)
    options = SweepOptions(
        **{field.name: getattr(line.values, field.name) for field in dataclasses.fields(SweepOptions)}
    )
    return sweep(line, folder, options)


def _workdir(command: str, values: flags.FlagValues, parse: Callable[[str, str], Path] = parse_path) -> Path:
    if values.workdir is None:
        raise ValueError(f"{command} needs --workdir=DIR, the folder of the run")
    workdir = parse(values.workdir, "--workdir")
    check_workdir(workdir)
    return workdir


def _report_runs(values: flags.FlagValues, words: list[str]) -> None:
    if values.workdir is not None or not words:
        raise ValueError("report needs --workdir=DIR for a single run, or DIR DIR ... for one report of several runs")
    from jaxstages.cli.report import report_runs

    report_runs(words, values.stage, values.metric, values.to)


def _run(
    command: str,
    values: flags.FlagValues,
    config_recipe: Recipe | None,
    words: list[str],
    before_jax: Callable[[], None],
) -> None:
    if command == "compare":
        from jaxstages.cli.compare import compare_runs

        compare_runs(words, values.stage, values.metric, values.to, values.plot)
        return

    if command == "report" and (words or values.workdir is None):
        _report_runs(values, words)
        return

    if command == "plan":
        if config_recipe is None:
            raise ValueError("plan needs --config=RECIPE, such as --config=scale:1b_v5e16")
        before_jax()
        from jaxstages.cli.plan import plan

        plan(config_recipe, values.stage, values.topology)
        return

    workdir = _workdir(command, values)
    logging.set_verbosity(logging.FATAL)  # libraries log what we report in one line

    if command == "checkpoints":
        from jaxstages.cli.checkpoints import checkpoints

        checkpoints(workdir, values.stage, words)
        return

    if command == "report":
        if alone := [name for name in ("stage", "metric", "to") if values[name].present]:
            raise ValueError(f"--{alone[0]} applies to a report of several runs: jaxstages report DIR DIR ...")
        before_jax()
        from jaxstages.cli.report import report

        report(config_recipe, workdir)
        return

    if command == "import":
        before_jax()
        from jaxstages.cli.transfer import import_model

        import_model(config_recipe, workdir, values["from"].value)
        return

    stage = command if command in STAGES else values.stage
    if command == "train" and stage is None:
        raise ValueError("train needs --stage=NAME, the stage to train")
    recipe = resolve_recipe(config_recipe, workdir, lengthen=stage if values.lengthen else "")
    check_stage(stage, recipe, with_import=command != "train")
    before_jax()
    _run_with_recipe(command, values, recipe, workdir)


def _run_with_recipe(command: str, values: flags.FlagValues, recipe: Recipe, workdir: Path) -> None:
    import jax

    if values.debug_nans:  # else as JAX_DEBUG_NANS says
        jax.config.update("jax_debug_nans", True)
    match command:
        case "run":
            from jaxstages.cli.train import run_stages

            run_stages(recipe, workdir, _process_info(values), _run_options(values))
        case "prepare":
            from jaxstages.cli.prepare import prepare_all

            prepare_all(recipe, workdir, values.beam_options)
        case "inspect":
            from jaxstages.cli.inspect import inspect

            inspect(recipe, workdir, values.stage, values.batch)
        case "evaluate":
            from jaxstages.cli.evaluate import evaluate

            evaluate(recipe, workdir, values.stage, values.step, tuple(values.data))
        case "generate":
            from jaxstages.cli.generate import Request, generate

            request = Request(values.prompt, values.prompts, values.out, _sampling_flags(values), values.step)
            generate(recipe, workdir, values.stage, request)
        case "chat":
            from jaxstages.cli.chat import chat

            chat(recipe, workdir, values.stage, _sampling_flags(values), values.step)
        case "serve":
            from jaxstages.cli.serve import ServeOptions, serve

            options = ServeOptions(
                **{field.name: getattr(values, field.name) for field in dataclasses.fields(ServeOptions)}
            )
            serve(recipe, workdir, values.stage, values.step, options)
        case "export":
            from jaxstages.cli.transfer import export_model

            dtype = values.dtype or "float32"
            export_model(recipe, workdir, values.stage, values.to, dtype, values.adapter, values.step)
        case "check":
            from jaxstages.cli.check import check

            check(recipe, workdir)
        case _:
            from jaxstages.cli.train import train

            stage = values.stage if command == "train" else command
            train(recipe, workdir, stage, _process_info(values), values.lengthen, _run_options(values))


def _run_options(values: flags.FlagValues) -> "RunOptions":
    from jaxstages.training.stage import RunOptions

    return RunOptions(values.finish, _steps_to_profile(values.profile))


def _steps_to_profile(text: str | None) -> tuple[int, int] | None:
    """Parse FIRST:LAST."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if match is None or not 0 < int(match[1]) <= int(match[2]):
        raise ValueError(f"--profile={text}: write FIRST:LAST, such as --profile=10:12 for the steps 10 to 12")
    return int(match[1]), int(match[2])


def _sampling_flags(values: flags.FlagValues) -> SamplingFlags:
    return SamplingFlags(*(getattr(values, name) for name in SamplingFlags._fields))


def _process_info(values: flags.FlagValues) -> ProcessInfo | None:
    return detect_process({name: values[name].value for name in ENVIRONMENT})
