"""`chat`: a conversation with a trained model, in the terminal or through a pipe."""

import json
import sys
from pathlib import Path
from typing import Any

from jaxstages.cli.loaded_model import LoadedModel, load_model
from jaxstages.cli.sampling_flags import SamplingFlags
from jaxstages.config import Recipe
from jaxstages.data.chat import make_chat
from jaxstages.generation.session import Session
from jaxstages.generation.text_stream import TextStream
from jaxstages.runtime.console import say
from jaxstages.runtime.files import write_text
from jaxstages.runtime.signals import stop_signals

HELP = """\
/reset        forget the conversation
/system TEXT  set the system message, and forget the conversation
/save FILE    append the conversation to FILE, as a line of JSON that `instruct` can train on
/quit         end; so does Ctrl-D. Ctrl-C ends an answer"""

Messages = list[dict[str, str]]


def chat(recipe: Recipe, workdir: Path, stage: str | None, flags: SamplingFlags, step: int | None = None) -> None:
    """Converse until the end of the input.

    Raises:
        ValueError: there is no such checkpoint, it was not trained on chats, or a flag has a wrong value.
    """
    loaded = load_model(recipe, workdir, stage, flags, step)
    setup = loaded.setup
    if setup.config.data.task != "chat" and not setup.data.tokenizer.template:
        raise ValueError(f"{setup.name} was not trained on chats; use generate, or --stage of one that was")

    session = Session(
        setup.program.model, loaded.params, loaded.sampling, context=recipe.model.context, seed=flags.seed
    )
    conversation = _Conversation(loaded, session)
    with stop_signals(on_interrupt=conversation.interrupt):
        say(f"{setup.name} of {workdir}; /help lists the commands, Ctrl-D ends", "cyan")
        while (line := conversation.read()) is not None:
            if not conversation.handle(line.strip()):
                break


class _Conversation:
    """messages: the conversation so far, beginning with the system message if there is one."""

    def __init__(self, loaded: LoadedModel, session: Session) -> None:
        self._session, self._stops = session, loaded.stops
        self._decode = loaded.setup.data.tokenizer.decode
        self._chat = make_chat(loaded.setup.data.tokenizer)
        self._max_prompt = loaded.setup.recipe.model.context - loaded.sampling.max_new_tokens
        self._reading = self._stopped = False
        self._turn = 0
        self.messages: Messages = []

    def interrupt(self, _number: int, _frame: Any) -> None:
        """Handle Ctrl-C: drop the line that is being typed, or end the answer after the tokens under way."""
        self._stopped = True
        if self._reading:
            raise KeyboardInterrupt

    def read(self) -> str | None:
        """Read a line; None at the end of the input."""
        self._reading = True
        try:
            while True:
                try:
                    return _read_line()
                except KeyboardInterrupt:
                    print("\n(Ctrl-D ends)")
        except EOFError:
            return None
        finally:
            self._reading = False

    def handle(self, line: str) -> bool:
        """Run a command or answer a message. False ends the conversation."""
        command, _, argument = line.partition(" ")
        match command:
            case "/quit":
                return False
            case "/help":
                say(HELP)
            case "/reset":
                self.messages = [message for message in self.messages if message["role"] == "system"]
                say("the conversation is forgotten", "cyan")
            case "/system":
                text = argument.strip()
                self.messages = [{"role": "system", "content": text}] if text else []
                say("the system message is set; the conversation is forgotten", "cyan")
            case "/save":
                self._save(argument.strip())
            case _ if command.startswith("/"):
                say(f"unknown: {command}; /help lists the commands", "yellow")
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
            say("this is not valid text", "yellow")
            return

        messages = [*self.messages, {"role": "user", "content": text}]
        try:
            messages_that_fit, prompt = self._fit(messages)
        except ValueError as error:  # the chat template may refuse such a message here
            say(f"not said: {error}", "yellow")
            return
        if prompt is None:
            say(
                f"too long: it leaves no room for an answer in the context; at most {self._max_prompt} tokens", "yellow"
            )
            return
        if dropped := len(messages) - len(messages_that_fit):
            say(f"the context is full: the first {dropped} messages are forgotten", "yellow")

        answer = self._stream(prompt)
        if answer.strip():
            self.messages = [*messages_that_fit, {"role": "assistant", "content": answer}]
        else:
            say("no answer; the message is forgotten", "yellow")

    def _fit(self, messages: Messages) -> tuple[Messages, list[int] | None]:
        """Drop the oldest turns, each a user's message with its answer, until the prompt fits the context.

        Returns the messages, and their prompt; None instead of a prompt if the last message alone is too long. The
        system message always stays.
        """
        first = int(messages[0]["role"] == "system")
        for start in range(first, len(messages), 2):
            candidate = [*messages[:first], *messages[start:]]
            if len(prompt := self._chat.prompt(candidate, None)) <= self._max_prompt:
                return candidate, prompt
        return messages, None

    def _stream(self, prompt: list[int]) -> str:
        """Print an answer as it is generated, and return it, even if it was interrupted."""
        answer, self._stopped = TextStream(self._decode, self._stops), False
        for tokens in self._session.stream(prompt, self._turn):
            print(answer.feed(tokens), end="", flush=True)
            if answer.ended or self._stopped:
                break
        print(answer.feed([], last=True), flush=True)
        self._turn += 1
        if self._stopped:
            say("(stopped)", "cyan")
        return answer.text


def _read_line() -> str:
    """Raise EOFError at the end of the input."""
    if sys.stdin.isatty():
        import readline  # noqa: F401  gives `input` a history and line editing

        return input("> ")
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line
