"""What can be said on the command line: commands, flags, and the recipe that --config names and changes."""

import dataclasses
import difflib
import traceback
import typing
from typing import Any

from absl import flags
from ml_collections import config_flags

from jaxstages.cli.resolve import kept_recipe
from jaxstages.cli.sampling_flags import SamplingFlags
from jaxstages.config import CHECKPOINTED_STAGES, STAGES, Recipe, differences
from jaxstages.runtime.cluster import ENVIRONMENT
from jaxstages.runtime.console import warn
from jaxstages.runtime.files import local_path

USAGE = """Train a language model in three stages: pretrain, fine-tune, instruct.

usage: jaxstages COMMAND --workdir=DIR [--config=FILE[:VARIANT]] [--config.FIELD=VALUE ...]

commands:
  run        all stages of the recipe that are not done yet, then the stage matrix
  pretrain, finetune, instruct
             one stage; started again, it resumes                         [--lengthen, --finish]
  prepare    tokenizer and packed rows, made ahead of training                       [--beam_options]
  inspect    a decoded batch with its trained-on tokens in colour, packing, shares   [--stage]
  evaluate   held-out scores of a stage's checkpoint, or the matrix of all     [--stage --step
             --data]
  checkpoints list | verify | diff STAGE/STEP STAGE/STEP
             what a run has kept, whether it can be trusted, and how two differ     [--stage]
  generate   answers as JSON lines: --prompt=TEXT or --prompts=FILE.jsonl     [--stage --step --out, sampling]
  chat       talk with a stage's checkpoint; /help there says what it can do   [--stage --step, sampling]
  import     a folder of Hugging Face's form (--from=DIR) becomes WORKDIR/import, which all stages and commands take
  plan       does a stage fit a machine that you have not, and how fast should it be: --topology=v5e:4x4   [--stage]
  export     a stage's checkpoint becomes such a folder (--to=DIR)              [--stage --step --dtype
             --adapter]

flags:
  --workdir=DIR            where the run lives
  --config=FILE[:VARIANT]  the recipe, such as configs/demo.py; not needed where DIR has a recipe.json
  --config.FIELD=VALUE     change a field of that file, or without --config of DIR's recipe.json:
                           --config.pretrain.optim.schedule.peak_lr=3e-4, or leave a stage out: --config.instruct=None
  --stage=NAME             import, pretrain, finetune or instruct; of one that is not finished, its best so far
  --step=N                 a step that the stage keeps (`checkpoints list` has them); by default its best one
  --data=SOURCE            evaluate on this held-out set instead of the recipe's; may be given again
  --prompt=TEXT, --prompts=FILE.jsonl ({"prompt": ...} a line), --out=FILE.jsonl
                           a line is {"prompt", "text", "tokens"}, tokens being how many were made; answers are
                           kept in OUT.part as they are done; started again, it goes on from there
sampling:
  --max_new_tokens=N       at most (default: the recipe's)
  --temperature=T          0, the default, takes the likeliest token; above, tokens are drawn
  --top_k=K                among the K likeliest
  --top_p=P                among the fewest likeliest that have probability P together
  --min_p=P                among those at least P times as probable as the likeliest
  --repetition_penalty=R   above 1, tokens of the prompt or the answer become less likely
  --stop=TEXT              ends an answer, before it; may be given again, or be a JSON list: '["\\n\\n", "User:"]'
  --seed=S                 the same seed gives the same answers

weights of others:
  --from=DIR, --to=DIR     where they lie; where ours are to be written
  --dtype=NAME             of the exported weights: float32 (the default) or bfloat16
  --adapter                export the adapters of a stage by themselves, for PEFT

  --topology=KIND:GRID     v5e:4x4, v5p:4x4x4, v6e:16x16, h100:8, h200:1, cpu:8, or local (the default)

  --lengthen               train a stage further, to the new --config.STAGE.loop.steps (or epochs, tokens); its
                           schedule is then the one of the new length
  --finish                 end a stage that is not finished at the step that it has saved, and hand its best one on

several processes, and faults:
  --coordinator=HOST:PORT, --process_count=N, --process_id=I
                           in training, one process of several: number 0 listens there for the others. Where they are
                           absent, JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID tell, or a cluster
                           does: SLURM, TPU pods, Kubernetes, Open MPI; --process_count=1 asks nobody
  --beam_options=OPTIONS   prepare as an Apache Beam pipeline, on Dataflow, Flink, Spark or here: such options as
                           '--runner=DirectRunner --direct_num_workers=4'; the same rows, to the bit (docs/data.md)
  --debug_nans             in training: end at the first operation that gives a NaN, and name it (slow)

exit codes: 0 done; 2 change something and try again; 70 diverged, the last good checkpoint stands; 74 disk or storage
failed; 75 interrupted after a complete save, or a host was lost, start it again; 1 anything else
"""

FLAGS_OF = {
    "prepare": ("beam_options",),
    "run": ("debug_nans", *ENVIRONMENT),
    **dict.fromkeys(STAGES, ("debug_nans", "lengthen", "finish", *ENVIRONMENT)),
    **dict.fromkeys(("inspect", "checkpoints"), ("stage",)),
    "evaluate": ("stage", "step", "data"),
    "generate": ("stage", "step", "prompt", "prompts", "out", *SamplingFlags._fields),
    "chat": ("stage", "step", *SamplingFlags._fields),
    "import": ("from",),
    "export": ("stage", "step", "to", "dtype", "adapter"),
    "plan": ("stage", "topology"),
}
"""Command -> the flags that it takes beside --config and --workdir."""


def define_flags(values: flags.FlagValues, argv: list[str], base: Recipe | None = None) -> Any:
    """All flags of the program; what --config names is loaded when `argv` is parsed.

    Args:
        base: the recipe whose fields are changed where --config names none.
    """
    flags.DEFINE_string("workdir", None, "where the run lives", flag_values=values)
    flags.DEFINE_enum("stage", None, CHECKPOINTED_STAGES, "which stage", flag_values=values)
    flags.DEFINE_integer("step", None, "which checkpoint of it", flag_values=values, lower_bound=0)
    flags.DEFINE_multi_string("data", [], "held-out sources", flag_values=values)
    flags.DEFINE_string("prompt", None, "text to answer", flag_values=values)
    flags.DEFINE_string("prompts", None, "JSON lines with a prompt each", flag_values=values)
    flags.DEFINE_integer("max_new_tokens", None, "at most (default: the recipe's)", flag_values=values)
    flags.DEFINE_float("temperature", 0.0, "0 takes the likeliest token", flag_values=values)
    flags.DEFINE_integer("top_k", 0, "draw among so many; 0 is all", flag_values=values)
    flags.DEFINE_float("top_p", 1.0, "draw among the likeliest with this probability", flag_values=values)
    flags.DEFINE_float("min_p", 0.0, "draw among those so many times as probable as the likeliest", flag_values=values)
    flags.DEFINE_float("repetition_penalty", 1.0, "of tokens that were there already", flag_values=values)
    flags.DEFINE_multi_string("stop", [], "text that ends an answer", flag_values=values)
    flags.DEFINE_integer("seed", 0, "of sampling", flag_values=values)
    flags.DEFINE_string("out", None, "where to write JSON lines", flag_values=values)
    flags.DEFINE_string("from", None, "folder to import", flag_values=values)
    flags.DEFINE_string("to", None, "folder to export to", flag_values=values)
    flags.DEFINE_string("topology", "local", "what to plan for", flag_values=values)
    flags.DEFINE_bool("adapter", False, "export adapters by themselves", flag_values=values)
    flags.DEFINE_string("dtype", "float32", "of exported weights", flag_values=values)
    flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0", flag_values=values)
    flags.DEFINE_integer("process_count", None, "how many there are", flag_values=values, lower_bound=1)
    flags.DEFINE_integer("process_id", None, "number of this one", flag_values=values, lower_bound=0)
    flags.DEFINE_string("beam_options", None, "of the pipeline that prepares", flag_values=values)
    flags.DEFINE_bool("lengthen", False, "train a stage further", flag_values=values)
    flags.DEFINE_bool("finish", False, "end a stage where it is", flag_values=values)
    flags.DEFINE_bool("debug_nans", False, "end at the first operation that gives a NaN", flag_values=values)
    if base is not None:
        return config_flags.DEFINE_config_dataclass("config", base, "the recipe", flag_values=values, sys_argv=argv)
    return config_flags.DEFINE_config_file(
        "config", None, "the recipe", lock_config=True, sys_argv=argv, flag_values=values
    )


def parse(command: str, argv: list[str]) -> tuple[flags.FlagValues, Recipe | None, list[str]]:
    """The flags, the recipe that --config gives, and what stands beside the flags (only `checkpoints` takes that)."""
    values = flags.FlagValues()
    named = next((word for word in argv if word.split("=")[0] in ("--config", "-config")), "")
    changes = [word for word in argv[2:] if word.startswith("--config.")]
    for word in changes:
        _check_field(word.removeprefix("--config.").partition("=")[0])
    base = _base(argv, changes[0]) if changes and not named else None
    try:
        holder = define_flags(values, argv, base)
        rest = values([argv[0], *argv[2:]])
    except Exception as error:
        raise _explained(error, named, argv) from None
    if len(rest) > 1 and command != "checkpoints":
        raise ValueError(f"{rest[1]!r} is no flag; write --flag=value")
    for name in {name for names in FLAGS_OF.values() for name in names}:
        if values[name].present and name not in FLAGS_OF[command]:
            raise ValueError(f"--{name} does not apply to {command}")
    recipe = holder.value if named or changes else None
    if base is not None and recipe is not None:
        for line in differences(base, recipe):
            warn(f"the workdir's recipe with {line}")
    if recipe is not None and not isinstance(recipe, Recipe):
        raise ValueError(
            f"{named}: no such file, or its get_config() gives no Recipe; name one such as configs/demo.py"
        )
    return values, recipe, rest[1:]


def _base(argv: list[str], change: str) -> Recipe:
    """The recipe of the workdir, whose field a word changes. Raises ValueError where there is none."""
    words = (*argv, "")
    texts = [word.partition("=")[2] for word in argv if word.startswith(("--workdir=", "-workdir="))]
    texts += [words[place + 1] for place, word in enumerate(argv) if word in ("--workdir", "-workdir")]
    kept = kept_recipe(local_path(texts[-1], "--workdir")) if texts else None
    if kept is None:
        raise ValueError(f"{change} changes a recipe's field: name its file too, --config=FILE")
    return kept


_NOT_THERE = "changes what is not there: the recipe has no {}, or leaves it out"


def _explained(error: BaseException, named: str, argv: list[str]) -> BaseException:
    """What is wrong with the flags, or with the file that --config names, in a user's words."""
    while "Error whilst parsing config file" in str(error) and error.__context__ is not None:
        error = error.__context__  # ml_collections puts it, with a traceback, into the text of another
    if isinstance(error, flags.Error):
        return error
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.name in ("get_config", "<module>")]
    place = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    for word in argv:
        if "can not be applied because field" in str(error) and f"Flag {word[9:].partition('=')[0]} " in str(error):
            return ValueError(f"{word} {_NOT_THERE.format(word.split('.')[1])}")
    if isinstance(error, ValueError):
        return ValueError(f"{named or 'recipe.json'}: {error}{place}")
    if frames or not isinstance(error, KeyError | AttributeError | TypeError):
        return ValueError(f"{named}: the recipe's file can't be loaded: {type(error).__name__}: {error}{place}")
    said = str(error.args[0] if error.args else error)
    for word in argv:
        if isinstance(error, KeyError) and f".mixture.{said}." in word:
            return ValueError(f"{word}: the recipe's mixture has no data set {said!r}; add it in the recipe's file")
        if "'NoneType'" in said and word.split("=")[0] == f"--config.{said.rpartition(' ')[2]}":
            stage = word.split(".")[1]
            return ValueError(f"{word} {_NOT_THERE.format(stage)}")
    return ValueError(f"--config can't be set so: {said}")


def _check_field(path: str) -> None:
    """Raises ValueError for a recipe's field that does not exist, with the nearest that does."""
    kind, seen = Recipe, "config"
    for name in path.split("."):
        if typing.get_origin(kind) is dict:  # of any name: a wrong one is told when it is set
            kind, seen = typing.get_args(kind)[1], f"{seen}.{name}"
            continue
        if not dataclasses.is_dataclass(kind):
            raise ValueError(f"--{seen} has no fields, and so no {name!r}")
        hints = typing.get_type_hints(kind)
        if name not in hints:
            near = difflib.get_close_matches(name, hints, n=1)
            hint = f"did you mean --{seen}.{near[0]}? " if near else ""
            raise ValueError(f"unknown field --{seen}.{name}; {hint}known: {', '.join(hints)}")
        seen = f"{seen}.{name}"
        options = [option for option in typing.get_args(hints[name]) if dataclasses.is_dataclass(option)]
        kind = options[0] if options and typing.get_origin(hints[name]) is not dict else hints[name]
