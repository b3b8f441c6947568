"""`chat`: talk with a stage's best checkpoint in the terminal, or through a pipe."""

import json
import sys
from pathlib import Path
from typing import Any

from jaxstages.cli.loaded_model import LoadedModel, load_model
from jaxstages.cli.sampling_flags import SamplingFlags
from jaxstages.config import Recipe
from jaxstages.data.chat import make_chat
from jaxstages.generate.session import Session
from jaxstages.generate.text_stream import TextStream
from jaxstages.runtime.console import say
from jaxstages.runtime.files import write_text
from jaxstages.runtime.signals import stop_signals

HELP = """\
/reset        forget the conversation
/system TEXT  what the model is told before it; forgets the conversation
/save FILE    the conversation as a line of JSON that `instruct` can train on, added to the file
/quit         end; so does Ctrl-D. Ctrl-C ends an answer"""

Messages = list[dict[str, str]]


def chat(recipe: Recipe, workdir: Path, stage: str | None, manner: SamplingFlags, step: int | None = None) -> None:
    """A conversation until the end of the input.

    Raises:
        ValueError: the stage has nothing to answer with, or was not trained on chats; a flag's value.
    """
    answering = load_model(recipe, workdir, stage, manner, step)
    setup = answering.setup
    if setup.config.data.task != "chat" and not setup.data.tokenizer.template:
        raise ValueError(f"{setup.name} was not trained on chats; use generate, or --stage of one that was")
    session = Session(
        setup.program.model, answering.params, answering.sampling, context=recipe.model.context, seed=manner.seed
    )
    talk = _Talk(answering, session)
    with stop_signals(on_interrupt=talk.interrupt):
        say(f"{setup.name} of {workdir}; /help says what can be done, Ctrl-D ends", "cyan")
        while (line := talk.read()) is not None:
            if not talk.take(line.strip()):
                break


class _Talk:
    """messages: the conversation so far, the system's first if there is one."""

    def __init__(self, answering: LoadedModel, session: Session) -> None:
        self._session, self._stops = session, answering.stops
        self._decode = answering.setup.data.tokenizer.decode
        self._chat = make_chat(answering.setup.data.tokenizer)
        self._room = answering.setup.recipe.model.context - answering.sampling.max_new_tokens
        self._reading = self._stopped = False
        self._turn = 0
        self.messages: Messages = []

    def interrupt(self, _number: int, _frame: Any) -> None:
        """Ctrl-C: a line that is being typed is given up, an answer is ended after the tokens that are being made."""
        self._stopped = True
        if self._reading:
            raise KeyboardInterrupt

    def read(self) -> str | None:
        """A line, None at the end of the input."""
        self._reading = True
        try:
            while True:
                try:
                    return _ask()
                except KeyboardInterrupt:
                    print("\n(Ctrl-D ends)")
        except EOFError:
            return None
        finally:
            self._reading = False

    def take(self, line: str) -> bool:
        """Do what the line says; False ends the conversation."""
        word, _, rest = line.partition(" ")
        match word:
            case "/quit":
                return False
            case "/help":
                say(HELP)
            case "/reset":
                self.messages = [message for message in self.messages if message["role"] == "system"]
                say("the conversation is forgotten", "cyan")
            case "/system":
                self.messages = [{"role": "system", "content": rest.strip()}] if rest.strip() else []
                say("the model is told that; the conversation is forgotten", "cyan")
            case "/save":
                self._save(rest.strip())
            case _ if word.startswith("/"):
                say(f"unknown: {word}; /help says what is known", "yellow")
            case "":
                pass
            case _:
                self._answer(line)
        return True

    def _save(self, name: str) -> None:
        if not name or not any(message["role"] == "assistant" for message in self.messages):
            say("/save needs a FILE" if not name else "there is no answer to save yet", "yellow")
            return
        file = Path(name).expanduser()
        try:
            before = file.read_text(encoding="utf-8") if file.exists() else ""
            write_text(file, before + json.dumps({"messages": self.messages}, ensure_ascii=False) + "\n")
        except (OSError, UnicodeDecodeError) as error:
            say(f"not saved: {error}", "yellow")
            return
        say(f"saved, {len(self.messages)} messages, to {file}", "cyan")

    def _answer(self, text: str) -> None:
        try:
            text.encode()
        except UnicodeEncodeError:
            say("that is no text", "yellow")
            return
        messages = [*self.messages, {"role": "user", "content": text}]
        try:
            kept, prompt = self._fit(messages)
        except ValueError as error:  # the template may not take such a message here
            say(f"not said: {error}", "yellow")
            return
        if prompt is None:
            say(f"too long: it leaves no room for an answer in the context; at most {self._room} tokens", "yellow")
            return
        if dropped := len(messages) - len(kept):
            say(f"the context is full: the first {dropped} messages are forgotten", "yellow")
        answer = self._show(prompt)
        if answer.strip():
            self.messages = [*kept, {"role": "assistant", "content": answer}]
        else:
            say("no answer; the message is forgotten", "yellow")

    def _fit(self, messages: Messages) -> tuple[Messages, list[int] | None]:
        """What the context has room for: without the oldest turns, a user's message with its answer; the system's
        message stays. None if the last message alone is too long."""
        first = int(messages[0]["role"] == "system")
        for start in range(first, len(messages), 2):
            kept = [*messages[:first], *messages[start:]]
            if len(prompt := self._chat.prompt(kept, None)) <= self._room:
                return kept, prompt
        return messages, None

    def _show(self, prompt: list[int]) -> str:
        """Print an answer as it is made; the whole of it, as far as it came."""
        spoken, self._stopped = TextStream(self._decode, self._stops), False
        for tokens in self._session.stream(prompt, self._turn):
            print(spoken.feed(tokens), end="", flush=True)
            if spoken.ended or self._stopped:
                break
        print(spoken.feed([], last=True), flush=True)
        self._turn += 1
        if self._stopped:
            say("(stopped)", "cyan")
        return spoken.text


def _ask() -> str:
    """Raises EOFError at the end of the input."""
    if sys.stdin.isatty():
        import readline  # noqa: F401  with it, `input` has history and editing

        return input("> ")
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line
