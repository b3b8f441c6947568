"""The commands and the flags of the command line, each declared once.

The absl definitions and the help texts are both made from these tables. `--config` and `--config.FIELD` are not among
them: ml_collections defines those from the recipe (`cli/parse.py`).
"""

from typing import Any, NamedTuple

from absl import flags

from jaxstages.config import STAGES

TOGETHER = "_together"
"""Internal command of `sweep --together`, for the process that trains the trials."""


class Command(NamedTuple):
    """A command, for the help.

    usage: arguments that it needs, beside flags.
    details: what the summary leaves out.
    docs: the page that explains it.
    """

    summary: str
    usage: str
    details: str
    example: str
    docs: str


class Flag(NamedTuple):
    """A flag.

    value: placeholder for the value in the help, "" for a switch.
    commands: the commands that accept it.
    kind: type of the value; a flag of kind `list` can be given several times.
    at_least: smallest number.
    """

    name: str
    value: str
    help: str
    commands: tuple[str, ...]
    kind: type = str
    default: Any = None
    at_least: int | None = None


WORKDIR = "--workdir=DIR"
PROMPT = f"{WORKDIR} (--prompt=TEXT | --prompts=FILE.jsonl)"

COMMANDS = {
    "run": Command(
        "Train all stages of a recipe, one after the other, then print the stage matrix.",
        WORKDIR,
        "Finished stages are skipped and an interrupted stage resumes, so the same command also continues a run.",
        "jaxstages run --config=demo --workdir=runs/demo",
        "docs/stages.md",
    ),
    "pretrain": Command(
        "Train the first stage, on raw text.",
        WORKDIR,
        "If restarted, it resumes from the latest checkpoint.",
        "jaxstages pretrain --config=demo --workdir=runs/demo --config.pretrain.optim.schedule.peak_lr=3e-3",
        "docs/stages.md",
    ),
    "finetune": Command(
        "Train the second stage, on labelled pairs.",
        WORKDIR,
        "It starts from the best checkpoint of pretraining, or from what config.finetune.init_from names.",
        "jaxstages finetune --config=demo:control --workdir=runs/control",
        "docs/stages.md",
    ),
    "instruct": Command(
        "Train the third stage, on conversations.",
        WORKDIR,
        "It starts from the best checkpoint of the stage before, or from what config.instruct.init_from names.",
        "jaxstages instruct --workdir=runs/demo --lengthen --config.instruct.loop.steps=4000",
        "docs/stages.md",
    ),
    "train": Command(
        "Train one stage, such as an extra stage of the recipe.",
        f"{WORKDIR} --stage=NAME",
        "If restarted, it resumes from the latest checkpoint.",
        "jaxstages train --stage=finetune --workdir=runs/demo",
        "docs/stages.md",
    ),
    "prepare": Command(
        "Train the tokenizer and pack the rows of all stages ahead of training.",
        WORKDIR,
        "Prints a table of the prepared data. Training prepares what is missing, so this command is optional.",
        "jaxstages prepare --config=demo --workdir=runs/demo",
        "docs/data.md",
    ),
    "inspect": Command(
        "Show a batch as text, its trained-on tokens in colour, and statistics of the data.",
        WORKDIR,
        "Shows the first stage unless --stage names another.",
        "jaxstages inspect --workdir=runs/demo --stage=instruct",
        "docs/data.md",
    ),
    "evaluate": Command(
        "Measure a checkpoint on held-out data; without --stage, print the stage matrix.",
        WORKDIR,
        "The metrics of a stage are printed as one JSON object.",
        "jaxstages evaluate --workdir=runs/demo --stage=finetune",
        "docs/stages.md",
    ),
    "report": Command(
        "Write the report of a run, or of several: stage matrix, curves, samples, cost.",
        f"({WORKDIR} | DIR DIR ... [--to=FILE.html])",
        "Writes DIR/report.html, a single file without scripts that needs no network. `jaxstages run` does so at its "
        "end; this command also reports a run that is not finished. DIR DIR ... puts the curves of several runs "
        "together, with the table of `jaxstages compare`, into ./report.html.",
        "jaxstages report --workdir=runs/demo",
        "docs/report.md",
    ),
    "checkpoints": Command(
        "List, verify or compare the checkpoints of a run.",
        f"(list | verify | diff STAGE/STEP STAGE/STEP) {WORKDIR}",
        "verify reads every file again and compares sizes and hashes.",
        "jaxstages checkpoints list --workdir=runs/demo",
        "docs/reliability.md",
    ),
    "generate": Command(
        "Answer prompts, and write the answers as JSON lines.",
        PROMPT,
        'Each line is {"prompt", "text", "tokens"}, where tokens is the number of generated tokens. With --out, '
        "finished answers are kept in OUT.part, and the same command continues there when started again. The last "
        "finished stage answers unless --stage names another.",
        'jaxstages generate --workdir=runs/demo --prompt="Where does Anna live?" --temperature=0.8 --top_p=0.95',
        "README.md",
    ),
    "chat": Command(
        "Talk with a trained model in the terminal.",
        WORKDIR,
        "Type /help there for its commands. The last finished stage answers unless --stage names another.",
        "jaxstages chat --workdir=runs/demo",
        "README.md",
    ),
    "serve": Command(
        "Serve the stages of a run: OpenAI's API, and a page to talk to them.",
        WORKDIR,
        "Serves all finished stages side by side, each as the `model` of its name, unless --stage names one. Clients "
        "send the key in JAXSTAGES_API_KEY, if it is set. Ctrl-C or SIGTERM ends it after the answers under way.",
        "jaxstages serve --workdir=runs/demo --port=8000",
        "docs/serving.md",
    ),
    "import": Command(
        "Import a Hugging Face checkpoint folder as the starting point of a run.",
        f"{WORKDIR} --from=DIR",
        "The weights become WORKDIR/import, which every stage and command accepts as a parent.",
        "jaxstages import --workdir=runs/mine --from=models/Qwen3-0.6B",
        "docs/interop.md",
    ),
    "export": Command(
        "Export a checkpoint as a Hugging Face folder or GGUF file, or its adapters for PEFT.",
        f"{WORKDIR} --to=DIR|FILE.gguf",
        "Exports the last finished stage unless --stage names another.",
        "jaxstages export --workdir=runs/demo --to=exported --dtype=bfloat16",
        "docs/interop.md",
    ),
    "check": Command(
        "Check that the model, tasks, losses and steps of a recipe are sound.",
        WORKDIR,
        "Causality, no leak between packed documents, accumulation, decoding, loss masks and more; takes seconds.",
        "jaxstages check --config=demo --workdir=runs/check",
        "docs/extending.md",
    ),
    "sweep": Command(
        "Train a recipe with several values of some fields, and compare the runs.",
        f"{WORKDIR} --config=RECIPE --sweep.FIELD=V1,V2",
        "All combinations are trained; a recipe can also list them in its function sweep(). A trial is an ordinary run "
        "in DIR/NAME. Stages before the swept ones are trained once. If restarted, the sweep continues.",
        "jaxstages sweep --config=demo --workdir=runs/sizes --sweep.model.layers=1,2 --sweep.seed=0,1,2",
        "docs/experiments.md",
    ),
    "compare": Command(
        "Compare runs: the fields that differ, what they reached, over seeds, with p-values.",
        "DIR DIR ...",
        "A folder of a sweep stands for its runs. Compares the last stage that all of them have begun.",
        "jaxstages compare runs/rates --to=rates.md --plot=rates.svg",
        "docs/experiments.md",
    ),
    "plan": Command(
        "Compile a stage for a machine you do not have: does it fit, and how fast is it?",
        "--config=RECIPE",
        "Nothing is run. Plans the first stage unless --stage names another.",
        "jaxstages plan --config=scale:8b_v5p128 --topology=v5p:4x4x4",
        "docs/plan.md",
    ),
}

TRAIN_ONE = (*STAGES, "train")
TRAINING = ("run", *TRAIN_ONE)
SAMPLING = ("generate", "chat")
CHECKPOINT = ("evaluate", *SAMPLING, "serve", "export")

FLAGS = (
    Flag(
        "workdir",
        "DIR",
        "Folder of the run, or gs://BUCKET/FOLDER or s3://BUCKET/FOLDER; for sweep a local folder.",
        tuple(name for name in COMMANDS if name not in ("plan", "compare")),
    ),
    Flag(
        "stage",
        "NAME",
        "Stage to use: pretrain, finetune, instruct, an extra stage of the recipe, or import for imported weights.",
        ("train", "inspect", "checkpoints", "plan", "compare", "report", *CHECKPOINT),
    ),
    Flag(
        "step",
        "N",
        "Step of the checkpoint (see `jaxstages checkpoints list`); default: the best one.",
        CHECKPOINT,
        kind=int,
        at_least=0,
    ),
    # Data
    Flag("batch", "K", "Batch to show; batch K is trained on at step K + 1.", ("inspect",), int, 0, at_least=0),
    Flag(
        "data",
        "SOURCE",
        "Held-out data to measure on instead of the recipe's; can be repeated.",
        ("evaluate",),
        kind=list,
        default=[],
    ),
    Flag(
        "beam_options",
        "OPTIONS",
        "Prepare with an Apache Beam pipeline, on Dataflow, Flink, Spark or this machine: "
        "'--runner=DirectRunner --direct_num_workers=4'. The rows are the same, to the bit.",
        ("prepare",),
    ),
    # Experiments
    Flag("parallel", "N", "Trials at a time; with several GPUs, each has its own.", ("sweep",), int, 1, at_least=1),
    Flag(
        "together",
        "",
        "Train the swept stage of all trials with one compiled step, if they differ only in the seed and in "
        "numbers of the optimizer, such as peak_lr, weight_decay and the betas.",
        ("sweep",),
        kind=bool,
        default=False,
    ),
    Flag(
        "index",
        "I",
        "Run only this trial, counted from 0, for arrays of a cluster: --index=$SLURM_ARRAY_TASK_ID.",
        ("sweep",),
        kind=int,
        at_least=0,
    ),
    Flag(
        "halving",
        "FACTOR",
        "Successive halving: at each rung, the best 1/FACTOR of the trials go on (ASHA, Li et al., 2020). 0 is off.",
        ("sweep",),
        kind=int,
        default=0,
        at_least=0,
    ),
    Flag(
        "first_rung",
        "STEPS",
        "Steps of the swept stage up to the first rung, a multiple of its eval_every.",
        ("sweep",),
        int,
        0,
        at_least=0,
    ),
    Flag(
        "hours",
        "H",
        "Start no trial after H hours; those that run save and end. 0 is no limit.",
        ("sweep",),
        float,
        0.0,
        at_least=0,
    ),
    Flag("metric", "NAME", "Metric to compare; default: that of early stopping.", ("compare", "report")),
    Flag("plot", "FILE.svg", "Draw the metric over the steps: .svg, .png or .pdf.", ("compare",)),
    # Generation
    Flag("prompt", "TEXT", "Prompt to answer.", ("generate",)),
    Flag("prompts", "FILE.jsonl", 'File of prompts, one {"prompt": TEXT} per line.', ("generate",)),
    Flag("out", "FILE.jsonl", "File to write answers to; default: standard output.", ("generate",)),
    Flag("max_new_tokens", "N", "Most tokens to generate per answer; default: the recipe's.", SAMPLING, kind=int),
    Flag(
        "temperature",
        "T",
        "Sampling temperature; 0 is greedy decoding.",
        SAMPLING,
        kind=float,
        default=0.0,
    ),
    Flag("top_k", "K", "Sample from the K most likely tokens; 0 is off.", SAMPLING, kind=int, default=0),
    Flag(
        "top_p",
        "P",
        "Nucleus sampling: sample from the smallest set of tokens whose total probability is at least P.",
        SAMPLING,
        kind=float,
        default=1.0,
    ),
    Flag(
        "min_p",
        "P",
        "Sample from tokens at least P times as probable as the most likely one.",
        SAMPLING,
        kind=float,
        default=0.0,
    ),
    Flag(
        "repetition_penalty",
        "R",
        "Values above 1 make tokens of the prompt and of the answer less likely.",
        SAMPLING,
        kind=float,
        default=1.0,
    ),
    Flag(
        "stop",
        "TEXT",
        "Stop string: it ends an answer and is not part of it. Can be repeated, or be a JSON list: "
        """'["\\n\\n", "User:"]'.""",
        SAMPLING,
        kind=list,
        default=[],
    ),
    Flag("seed", "S", "Seed of sampling; the same seed gives the same answers.", SAMPLING, kind=int, default=0),
    # Serving
    Flag(
        "host",
        "ADDRESS",
        "Address to listen on; any but this one may be open to the network.",
        ("serve",),
        default="127.0.0.1",
    ),
    Flag("port", "N", "Port to listen on; 0 takes a free one.", ("serve",), int, 8000, at_least=0),
    Flag("slots", "N", "Answers at a time, for each stage.", ("serve",), int, 8, at_least=1),
    Flag("queue", "N", "Answers that may wait for a slot; more are refused with status 429.", ("serve",), int, 64, 0),
    Flag(
        "drafts",
        "N",
        "Tokens to draft for a single answer by looking up its last ones in its text; 0 is off. It changes no answer.",
        ("serve",),
        int,
        8,
        at_least=0,
    ),
    Flag("timeout", "SECONDS", "Longest time of a request, waiting included.", ("serve",), float, 300.0),
    # Import, export and planning
    Flag("from", "DIR", "Hugging Face checkpoint folder to import.", ("import",)),
    Flag(
        "to",
        "PATH",
        "Folder or .gguf file to export to; for compare, the file of the table: .md, .csv, .tex or .html; for a report "
        "of several runs, its file: .html.",
        ("export", "compare", "report"),
    ),
    Flag(
        "dtype",
        "NAME",
        "Type of the weights, float32 or bfloat16; for a .gguf file also float16 or q8_0. Default: float32 to export, "
        "config.model.dtype to serve.",
        ("export", "serve"),
    ),
    Flag("adapter", "", "Export only the LoRA adapters, for PEFT.", ("export",), kind=bool, default=False),
    Flag(
        "topology",
        "KIND:GRID",
        "Machine to plan for: v5e:4x4, v5p:4x4x4, v6e:16x16, h100:8, h200:1, cpu:8, or local.",
        ("plan",),
        default="local",
    ),
    # Training
    Flag(
        "lengthen",
        "",
        "Train a finished stage further, up to its new config.STAGE.loop.steps (or epochs, tokens), under the schedule "
        "of the new length.",
        TRAIN_ONE,
        kind=bool,
        default=False,
    ),
    Flag(
        "finish",
        "",
        "End an unfinished stage at its latest checkpoint, and hand on its best one.",
        TRAIN_ONE,
        kind=bool,
        default=False,
    ),
    Flag(
        "profile",
        "FIRST:LAST",
        "Record a profiler trace of these steps in DIR/STAGE/tensorboard, for TensorBoard's profile plugin or xprof.",
        TRAINING,
    ),
    Flag(
        "debug_nans",
        "",
        "End at the first operation that produces a NaN, and name it (slow).",
        TRAINING,
        kind=bool,
        default=False,
    ),
    Flag(
        "coordinator",
        "HOST:PORT",
        "Address of process 0 in a run of several processes; default: JAX_COORDINATOR_ADDRESS, or the address that "
        "SLURM, a TPU pod, Kubernetes or Open MPI provides.",
        TRAINING,
    ),
    Flag(
        "process_count",
        "N",
        "Number of processes; default: JAX_NUM_PROCESSES, or the cluster's; 1 ignores the cluster.",
        TRAINING,
        kind=int,
        at_least=1,
    ),
    Flag(
        "process_id",
        "I",
        "Index of this process; default: JAX_PROCESS_ID, or the cluster's.",
        TRAINING,
        kind=int,
        at_least=0,
    ),
)


def flags_of(command: str) -> list[Flag]:
    return [flag for flag in FLAGS if command in flag.commands]


def define_flags(values: flags.FlagValues) -> None:
    """Define all flags but --config with absl."""
    for flag in FLAGS:
        if flag.kind is int:
            flags.DEFINE_integer(flag.name, flag.default, flag.help, flag_values=values, lower_bound=flag.at_least)
        elif flag.kind is float:
            flags.DEFINE_float(flag.name, flag.default, flag.help, flag_values=values)
        elif flag.kind is bool:
            flags.DEFINE_bool(flag.name, flag.default, flag.help, flag_values=values)
        elif flag.kind is list:
            flags.DEFINE_multi_string(flag.name, flag.default, flag.help, flag_values=values)
        else:
            flags.DEFINE_string(flag.name, flag.default, flag.help, flag_values=values)
