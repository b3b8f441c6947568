"""Requests of OpenAI's API: JSON -> checked values. Each error names the field and says what it may be.

Formats: https://platform.openai.com/docs/api-reference. `top_k`, `min_p` and `repetition_penalty` are additions, by the
names that other servers use.
"""

import difflib
import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxstages.data.conversation import read_prompt
from jaxstages.data.tokenizer import Tokenizer
from jaxstages.generation.sampling import Sampling, check_sampling
from jaxstages.generation.serving.decode import MAX_ALTERNATIVES
from jaxstages.generation.serving.engine import MAX_STOPS
from jaxstages.generation.serving.served_model import ServedModel

COMPLETION_TOKENS = 16
"""Default `max_tokens` of a completion; a chat answer may fill the context."""

MAX_MESSAGES = 256
"""Messages of a chat. A template is rendered up to three times for each answer among them."""

MAX_CHOICES = 16
"""Most answers to one request: `n` times the number of prompts."""

MAX_STOP_STRINGS = 4

SAMPLING_FIELDS = (
    "model",
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "n",
    "stop",
    "seed",
    "stream",
    "stream_options",
    "logprobs",
)

IGNORED_FIELDS = ("user", "metadata", "store", "safety_identifier", "service_tier", "parallel_tool_calls")
"""Fields that do not change an answer here."""

DEFAULTS_ONLY: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "response_format": ({"type": "text"},),
    "tool_choice": ("auto", "none"),
    "modalities": (["text"],),
}
"""Fields that are accepted with the values that switch them off."""

COMPLETION_FIELDS = {*SAMPLING_FIELDS, *IGNORED_FIELDS, *DEFAULTS_ONLY, "prompt"} - {"tool_choice", "response_format"}
CHAT_FIELDS = {*SAMPLING_FIELDS, *IGNORED_FIELDS, *DEFAULTS_ONLY, "messages", "tools"} | {
    "top_logprobs",
    "max_completion_tokens",
}
CHAT_FIELDS -= {"best_of", "echo", "suffix"}


class ApiError(Exception):
    """An error in the format of OpenAI's API."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def to_json(self) -> dict[str, Any]:
        kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = "server_error" if self.status >= 500 else kinds.get(self.status, "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True)
class Request:
    """A checked request.

    prompts: token ids; each is answered `n` times.
    stops: stop strings; those that are control tokens are in `sampling.stop`.
    num_alternatives: see `Answer`.
    has_tools: whether the answer may call a tool.
    """

    model: ServedModel
    is_chat: bool
    prompts: list[list[int]]
    sampling: Sampling
    stops: tuple[str, ...]
    n: int
    seed: int
    num_alternatives: int | None
    stream: bool
    include_usage: bool
    has_tools: bool


def parse_json(body: bytes) -> dict[str, Any]:
    """Parse the body of a request. Raises ApiError unless it is a JSON object of valid text."""
    try:
        content = json.loads(body)
        json.dumps(content, ensure_ascii=False).encode()  # fails for unpaired surrogates
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is no JSON: {str(error)[:200]}") from error
    if not isinstance(content, dict):
        raise ApiError(400, "the body must be a JSON object")
    return {name: value for name, value in content.items() if value is not None}


def parse_completion(content: dict[str, Any], models: Mapping[str, ServedModel]) -> Request:
    """Raises ApiError for a wrong request."""
    _check_fields(content, COMPLETION_FIELDS)
    model = _model(content, models)
    prompts = _prompts(content, model)
    alternatives = _integer(content, "logprobs", None, 0, MAX_ALTERNATIVES)
    return _request(content, model, prompts, alternatives, is_chat=False, default_tokens=COMPLETION_TOKENS)


def parse_chat(content: dict[str, Any], models: Mapping[str, ServedModel]) -> Request:
    """Raises ApiError for a wrong request."""
    _check_fields(content, CHAT_FIELDS)
    model = _model(content, models)
    if model.chat is None:
        raise ApiError(400, f"{model.name} was not trained on chats; use /v1/completions", "model")
    if "max_completion_tokens" in content:
        content = {**content, "max_tokens": content["max_completion_tokens"]}

    tools = content.get("tools") if content.get("tool_choice") != "none" else None
    try:
        messages, tools = read_prompt(content.get("messages", []), tools)
        if len(messages) > MAX_MESSAGES:
            raise ValueError(f"there are {len(messages)} messages; at most {MAX_MESSAGES} are answered")
        prompt = model.chat.prompt(messages, tools)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, str(error), "messages") from error

    alternatives = None
    if _boolean(content, "logprobs"):
        alternatives = _integer(content, "top_logprobs", 0, 0, MAX_ALTERNATIVES)
    elif "top_logprobs" in content:
        raise ApiError(400, "top_logprobs needs logprobs=true", "top_logprobs")
    return _request(content, model, [prompt], alternatives, is_chat=True, has_tools=tools is not None)


def _request(
    content: dict[str, Any],
    model: ServedModel,
    prompts: list[list[int]],
    alternatives: int | None,
    *,
    is_chat: bool,
    has_tools: bool = False,
    default_tokens: int | None = None,
) -> Request:
    longest = max(map(len, prompts))
    room = model.context - longest
    if room < 1:
        raise ApiError(
            400,
            f"the prompt has {longest} tokens; {model.name} has a context of {model.context}, and its "
            "answer needs one: shorten the prompt",
            "messages" if is_chat else "prompt",
            "context_length_exceeded",
        )
    max_tokens = _integer(content, "max_tokens", min(default_tokens or room, room), 1, None)
    if max_tokens > room:
        raise ApiError(
            400,
            f"max_tokens={max_tokens}: beside the prompt, of {longest} tokens, the context of {model.context} "
            f"has room for {room}",
            "max_tokens",
            "context_length_exceeded",
        )
    n = _integer(content, "n", 1, 1, MAX_CHOICES)
    if n * len(prompts) > MAX_CHOICES:
        raise ApiError(400, f"n={n} for {len(prompts)} prompts: at most {MAX_CHOICES} answers a request", "n")

    stops, stop_ids = _stops(content, model.tokenizer)
    stream, options = _boolean(content, "stream"), content.get("stream_options", {})
    if not isinstance(options, dict) or ("stream_options" in content and not stream):
        raise ApiError(400, "stream_options is an object, and needs stream=true", "stream_options")
    return Request(
        model=model,
        is_chat=is_chat,
        prompts=prompts,
        sampling=_sampling(content, max_tokens, (*model.tokenizer.stops, *stop_ids)),
        stops=stops,
        n=n,
        seed=_integer(content, "seed", random.getrandbits(32), -(2**63), 2**64 - 1) % 2**32,
        num_alternatives=alternatives,
        stream=stream,
        include_usage=_boolean(options, "include_usage"),
        has_tools=has_tools,
    )


def _check_fields(content: dict[str, Any], known: set[str]) -> None:
    for name, value in content.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise ApiError(
                400, f"unknown field {name[:50]!r}{f'; did you mean {near[0]!r}?' if near else ''}", name[:50]
            )
        allowed = DEFAULTS_ONLY.get(name)
        if allowed is not None and value not in allowed:
            values = " or ".join(json.dumps(each) for each in allowed)
            raise ApiError(400, f"{name} is not supported here; leave it out, or give {values}", name)


def _model(content: dict[str, Any], models: Mapping[str, ServedModel]) -> ServedModel:
    name = content.get("model")
    if name not in models if isinstance(name, str) else True:
        known = ", ".join(models)
        raise ApiError(404, f"there is no model {str(name)[:50]!r}; known: {known}", "model", "model_not_found")
    return models[str(name)]


def _prompts(content: dict[str, Any], model: ServedModel) -> list[list[int]]:
    """Return the ids of `prompt`: a text, a list of texts, token ids, or a list of lists of token ids."""
    prompt = content.get("prompt")
    prompts: list[Any] = prompt if isinstance(prompt, list) and not _are_ids(prompt) else [prompt]
    if not prompts or len(prompts) > MAX_CHOICES:
        raise ApiError(400, f"prompt has {len(prompts)} entries; it must have 1 to {MAX_CHOICES}", "prompt")

    if all(isinstance(each, str) for each in prompts):
        try:
            ids = model.encode_prompts(prompts)
        except ValueError as error:
            raise ApiError(400, str(error), "prompt") from error
    elif all(isinstance(each, list) and _are_ids(each) for each in prompts):
        ids = prompts
        if not all(0 <= token < model.tokenizer.vocab_size for each in ids for token in each):
            raise ApiError(400, f"prompt has an id that is not in 0 to {model.tokenizer.vocab_size - 1}", "prompt")
    else:
        raise ApiError(400, "prompt must be a text, a list of texts, or token ids", "prompt")
    if not all(ids):
        raise ApiError(400, "prompt is empty", "prompt")
    return ids


def _are_ids(value: Sequence[Any]) -> bool:
    return bool(value) and all(isinstance(token, int) and not isinstance(token, bool) for token in value)


def _sampling(content: dict[str, Any], max_tokens: int, stop: tuple[int, ...]) -> Sampling:
    temperature = _number(content, "temperature", 1.0)
    filters = {
        "top_k": _integer(content, "top_k", 0, 0, 2**31 - 1),
        "top_p": _number(content, "top_p", 1.0),
        "min_p": _number(content, "min_p", 0.0),
    }
    sampling = Sampling(
        max_new_tokens=max_tokens,
        temperature=temperature,
        stop=stop,
        repetition_penalty=_number(content, "repetition_penalty", 1.0),
        **(filters if temperature else {}),  # clients send top_p=1 or 0.95 with temperature 0, where it has no effect
    )
    try:
        check_sampling(sampling)
    except ValueError as error:
        raise ApiError(400, str(error), str(error).partition("=")[0]) from error
    return sampling


def _stops(content: dict[str, Any], tokenizer: Tokenizer) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Return the stop strings, and the ids of those that are control tokens: these are never decoded to text."""
    value = content.get("stop", [])
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) and text for text in texts):
        raise ApiError(400, "stop must be a text, or a list of texts, none of them empty", "stop")
    if len(texts) > MAX_STOP_STRINGS:
        raise ApiError(400, f"stop has {len(texts)} texts; at most {MAX_STOP_STRINGS}", "stop")
    control = [text for text in texts if text in tokenizer.control]
    ids = [tokenizer.backend.token_to_id(text) for text in control]
    assert len(tokenizer.stops) + len(ids) <= MAX_STOPS, tokenizer.stops
    return tuple(text for text in texts if text not in control), tuple(i for i in ids if i is not None)


def _boolean(content: dict[str, Any], name: str) -> bool:
    value = content.get(name, False)
    if not isinstance(value, bool):
        raise ApiError(400, f"{name} must be true or false", name)
    return value


def _number(content: dict[str, Any], name: str, default: float) -> float:
    value = content.get(name, default)
    try:
        is_number = not isinstance(value, bool) and isinstance(value, int | float) and math.isfinite(value)
    except OverflowError:  # an integer beyond the largest float
        is_number = False
    if not is_number:
        raise ApiError(400, f"{name} must be a number", name)
    return float(value)


def _integer(content: dict[str, Any], name: str, default: Any, low: int, high: int | None) -> Any:
    value = content.get(name, default)
    if value is default:
        return value
    if isinstance(value, bool) or not isinstance(value, int):
        raise ApiError(400, f"{name} must be an integer", name)
    if value < low or (high is not None and value > high):
        limits = f"at least {low}" if high is None else f"{low} to {high}"
        raise ApiError(400, f"{name}={str(value)[:30]} must be {limits}", name)
    return value
