"""A model as the server sees it: its engine, and how text becomes tokens and back."""

import functools
from dataclasses import dataclass
from typing import Any

from jaxstages.data.chat import Chat
from jaxstages.data.prompts import encode_prompts
from jaxstages.data.tokenizer import Tokenizer
from jaxstages.generation.serving.engine import Engine


@dataclass(frozen=True)
class ServedModel:
    """A stage of a run.

    name: name of the stage, which requests give as `model`.
    task: task of the stage; prompts of completions are written in its format.
    chat: its chat template; None if it was not trained on chats.
    created: Unix time at which it was loaded.
    fingerprint: identifies its parameters.
    facts: fields of `/v1/models` beyond those of OpenAI's API.
    """

    name: str
    engine: Engine
    tokenizer: Tokenizer
    task: str
    chat: Chat | None
    created: int
    fingerprint: str
    facts: dict[str, Any]

    @property
    def context(self) -> int:
        return self.engine.context

    def encode_prompts(self, texts: list[str]) -> list[list[int]]:
        if self.task == "chat" and self.chat is not None:  # one that is already made
            return [self.chat.prompt([{"role": "user", "content": text}], None) for text in texts]
        return encode_prompts(self.task, self.tokenizer, texts)

    @functools.cached_property
    def _token_texts(self) -> list[bytes]:
        return self.tokenizer.token_texts()

    def token_text(self, token: int) -> tuple[str, bytes]:
        """Return the text of a token, the name of a control token, and its bytes. A part of a character is shown as
        `\\xNN`."""
        raw = self._token_texts[token] if token < len(self._token_texts) else b""
        raw = raw or (self.tokenizer.backend.id_to_token(token) or "").encode()
        return raw.decode(errors="backslashreplace"), raw
