"""One choice of a response: new tokens -> text, log-probabilities and tool calls, in the format of OpenAI's API."""

import json
import re
import uuid
from typing import Any, NamedTuple

from jaxstages.generation.serving.engine import NewToken
from jaxstages.generation.serving.protocol import Request
from jaxstages.generation.serving.served_model import ServedModel
from jaxstages.generation.text_stream import TextStream

CALL_BEGIN = "<tool_call>"

TOOL_CALL = re.compile(CALL_BEGIN + r"\s*(\{.*?\})\s*</tool_call>", re.DOTALL)
"""Format of the calls of Hermes and Qwen."""


class Piece(NamedTuple):
    """New text of a choice, with the tokens that it was made from, and why the choice ended, or ""."""

    text: str
    tokens: list[NewToken]
    finish_reason: str


class Choice:
    """A choice while it is generated.

    text: all its text so far.
    tokens: its tokens so far, without those after a stop string.
    finish_reason: "stop", "length", "tool_calls", or "" while it goes on.
    """

    def __init__(self, request: Request, index: int, prompt_tokens: int) -> None:
        self.index, self.prompt_tokens = index, prompt_tokens
        self.finish_reason = ""
        self.tokens: list[NewToken] = []
        self.tool_calls: list[dict[str, Any]] = []
        self._request = request
        held_from = (CALL_BEGIN,) if request.has_tools else ()
        self._stream = TextStream(request.model.tokenizer.decode, request.stops, held_from)

    @property
    def text(self) -> str:
        return self._stream.text

    def feed(self, tokens: list[NewToken], reason: str) -> Piece:
        """Add tokens, up to a stop string."""
        parts: list[str] = []
        used: list[NewToken] = []
        # One by one only if a stop string ends the choice in the middle: each call decodes the whole text.
        ends = bool(self._request.stops) and self._stream.would_end([token.id for token in tokens])
        for group in [[token] for token in tokens] if ends else [tokens]:
            parts.append(self._stream.feed([token.id for token in group]))
            used += group
            if self._stream.ended:
                reason = "stop"
                break
        if reason:
            parts.append(self._stream.feed([], last=True))
        self.tokens += used
        self.finish_reason = reason
        if reason == "stop" and self._request.has_tools:
            self.tool_calls = _tool_calls(self.text)
            self.finish_reason = "tool_calls" if self.tool_calls else reason
        text = "".join(parts)
        return Piece(text.partition(CALL_BEGIN)[0] if self.tool_calls else text, used, self.finish_reason)


def _tool_calls(text: str) -> list[dict[str, Any]]:
    calls = []
    for match in TOOL_CALL.finditer(text):
        try:
            call = json.loads(match[1])
            function = {"name": call["name"], "arguments": json.dumps(call.get("arguments", {}), ensure_ascii=False)}
        except (ValueError, KeyError):
            continue  # the model wrote no valid call; it stays text
        calls.append({"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function})
    return calls


# Log-probabilities ------------------------------------------------------------------------------------------------


def chat_logprobs(model: ServedModel, tokens: list[NewToken]) -> dict[str, Any]:
    """Format log-probabilities for a chat."""

    def entry(token: int, log_prob: float) -> dict[str, Any]:
        text, raw = model.token_text(token)
        return {"token": text, "logprob": log_prob, "bytes": list(raw)}

    return {
        "content": [
            entry(token.id, token.log_prob) | {"top_logprobs": [entry(*pair) for pair in token.alternatives]}
            for token in tokens
        ],
        "refusal": None,
    }


def completion_logprobs(model: ServedModel, tokens: list[NewToken], offset: int) -> dict[str, Any]:
    """Format log-probabilities for a completion.

    Args:
        offset: number of characters before these tokens.
    """
    texts = [model.token_text(token.id)[0] for token in tokens]
    offsets = [offset + sum(map(len, texts[:number])) for number in range(len(texts))]
    top = [{model.token_text(i)[0]: log_prob for i, log_prob in token.alternatives} for token in tokens]
    return {
        "tokens": texts,
        "token_logprobs": [token.log_prob for token in tokens],
        "top_logprobs": top if any(top) else None,
        "text_offset": offsets,
    }
