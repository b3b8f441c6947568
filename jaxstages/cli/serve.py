"""`serve`: OpenAI's API and a page to talk to the stages of a run."""

import asyncio
import os
import signal
import socket
import time
from dataclasses import dataclass, replace
from pathlib import Path

from jaxstages import config as recipes
from jaxstages.cli.loaded_model import load_model
from jaxstages.cli.sampling_flags import SamplingFlags
from jaxstages.config import Recipe, builtin_model
from jaxstages.data.chat import make_chat
from jaxstages.generation.serving.engine import Engine
from jaxstages.generation.serving.scheduler import Scheduler
from jaxstages.generation.serving.served_model import ServedModel
from jaxstages.models.transformer import make_model
from jaxstages.runtime.console import say, warn
from jaxstages.runtime.signals import python_signals
from jaxstages.runtime.workdir import result_file

KEY = "JAXSTAGES_API_KEY"
"""Environment variable with the key that clients have to send; command lines are seen by every user of a machine."""

DTYPES = ("float32", "bfloat16")

LOOPBACK = ("127.0.0.1", "localhost")

CONNECTIONS = 512
"""Most connections; more are answered by 503."""

DRAIN_SECONDS = 30
"""Longest time that a server waits for answers under way when it is asked to end."""


@dataclass(frozen=True)
class ServeOptions:
    """Flags of the command.

    slots: answers at a time, for each model.
    queue: answers that may wait for a slot.
    drafts: see `Engine`.
    dtype: type of weights and activations; None is the recipe's.
    timeout: seconds for a request, waiting included.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    slots: int = 8
    queue: int = 64
    drafts: int = 8
    dtype: str | None = None
    timeout: float = 300.0


def serve(recipe: Recipe, workdir: Path, stage: str | None, step: int | None, options: ServeOptions) -> None:
    """Serve one stage, or all finished ones, until SIGTERM or Ctrl-C; then finish the answers under way.

    Raises:
        ValueError: there is no such checkpoint, the port is in use, or a package is missing.
    """
    try:
        import uvicorn

        from jaxstages.generation.serving.app import Limits, make_app
    except ImportError as error:
        raise ValueError(f"serve needs {error.name}: pip install '.[serve]'") from error

    if options.dtype not in (None, *DTYPES):
        raise ValueError(f"--dtype={options.dtype}: known: {', '.join(DTYPES)}")
    listener = _listen(options)
    models = {name: load_served_model(recipe, workdir, name, step, options) for name in _stages(recipe, workdir, stage)}
    scheduler = Scheduler({name: model.engine for name, model in models.items()}, options.queue)
    key = os.environ.get(KEY, "")
    if options.host not in LOOPBACK and not key:
        warn(f"--host={options.host} is open to the network without a key; set {KEY}")

    hosts = [*LOOPBACK] if options.host in LOOPBACK else None
    app = make_app(models, scheduler, key=key, hosts=hosts, limits=Limits(answer_seconds=options.timeout))
    config = uvicorn.Config(
        app,
        log_level="warning",
        lifespan="off",
        server_header=False,
        limit_concurrency=CONNECTIONS,
        timeout_graceful_shutdown=DRAIN_SECONDS,
    )
    address = f"http://{options.host}:{listener.getsockname()[1]}"
    server = uvicorn.Server(config)
    scheduler.start()
    say(f"{address} has a page to talk to {', '.join(models)}; {address}/v1 is OpenAI's API; Ctrl-C ends", "bold")

    # uvicorn handles these signals, and raises them again when it has drained. Then they are ignored.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        signal.signal(signal.SIGHUP, server.handle_exit)
    with python_signals():
        asyncio.run(server.serve(sockets=[listener]))
    scheduler.close()


def _listen(options: ServeOptions) -> socket.socket:
    """Listen before the models are loaded, so that a port in use is found at once."""
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    try:
        return socket.create_server((options.host, options.port), family=family, backlog=CONNECTIONS)
    except OSError as error:
        raise ValueError(
            f"--host={options.host} --port={options.port}: {error.strerror or error}; give another --port"
        ) from error


def _stages(recipe: Recipe, workdir: Path, stage: str | None) -> list[str]:
    names = [recipes.IMPORT, *recipes.stages(recipe)]
    finished = [name for name in names if result_file(workdir / name).exists()]
    if stage is not None or not finished:
        return [stage or names[-1]]
    trained = [name for name in finished if name != recipes.IMPORT]
    return trained or finished


def load_served_model(recipe: Recipe, workdir: Path, name: str, step: int | None, options: ServeOptions) -> ServedModel:
    """Load the checkpoint of a stage, and compile its engine."""
    loaded = load_model(recipe, workdir, name, SamplingFlags(), step)
    setup, started = loaded.setup, time.monotonic()
    model = setup.program.model
    if options.dtype is not None:
        config = replace(builtin_model(recipe, f"serve with --dtype={options.dtype}"), dtype=options.dtype)
        model = make_model(config, setup.data.tokenizer.vocab_size)
    engine = Engine(
        model,
        loaded.params,
        context=recipe.model.context,
        num_slots=options.slots,
        num_drafts=options.drafts,
    )
    engine.warm_up()
    say(f"{name}: {options.slots} slots, compiled in {time.monotonic() - started:.1f} s", "cyan")

    tokenizer, task = setup.data.tokenizer, setup.config.data.task
    is_chat = task == "chat" or bool(tokenizer.template)
    return ServedModel(
        name=name,
        engine=engine,
        tokenizer=tokenizer,
        task=task,
        chat=make_chat(tokenizer) if is_chat else None,
        created=int(time.time()),
        fingerprint=loaded.params_sha256[:12],
        facts={
            "task": task,
            "chat": is_chat,
            "context": recipe.model.context,
            "max_new_tokens": loaded.sampling.max_new_tokens,
            "params_sha256": loaded.params_sha256,
        },
    )
