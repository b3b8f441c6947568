"""Chat records -> conversations: every common format becomes a list of messages as in OpenAI's API.

| record                                                      | read as                                                |
| ----------------------------------------------------------- | ------------------------------------------------------ |
| {"messages": [{"role", "content"}, ...]}                    | unchanged                                              |
| {"conversations": [{"from", "value"}, ...], "system": text} | ShareGPT; `role`/`content` under this name too         |
| {"prompt": [messages], "completion": [messages]}            | TRL; only the completion is trained on                 |
| content: [{"type": "text", "text"}, ...]                    | the concatenated texts                                 |
| content: null, tool_calls: null or []                       | no such key, as transformers reads it                  |
| function_call, or "from": "function_call"                   | tool_calls; `arguments` in JSON are decoded            |
| reasoning_content, thinking, reasoning                      | synonyms: templates get it under each of these names   |
"""

import json
import reprlib
from collections.abc import Iterator
from typing import Any, NamedTuple

from jaxstages.data.sources import Record

Messages = list[dict[str, Any]]
Tools = list[dict[str, Any]] | None

ROLES = ("system", "developer", "user", "assistant", "tool")

ALIASES = {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant"}
ALIASES |= {"function_call": "assistant", "observation": "tool", "function": "tool", "tool_response": "tool"}
"""Other names of roles, from ShareGPT and earlier APIs."""

INSTRUCTING = ("system", "developer")

REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names of an assistant's reasoning; transformers prefers them in this order."""

READ_KEYS = (
    "role",
    "content",
    "from",
    "value",
    "weight",
    "train",
    "name",
    "tool_calls",
    "tool_call_id",
    "function_call",
)
"""Keys of a message that this module reads."""


class Conversation(NamedTuple):
    """A chat record.

    messages: all messages up to the last answer that is trained on.
    trained: whether each assistant message is trained on.
    keys: keys of the record's messages other than `READ_KEYS`.
    """

    messages: Messages
    tools: Tools
    trained: list[bool]
    keys: frozenset[str]


def read_conversation(record: Record, answers: str = "all") -> Conversation:
    """Read the conversation of a record.

    Args:
        answers: "all" trains on each assistant message that does not opt out, "last" on the last one of them.

    Raises:
        ValueError: the record has no messages, an unknown role, a message without text, or no answer to train on.
    """
    turns, prompt_turns = _turns(record)
    keys = frozenset(key for turn in turns for key in turn if key not in READ_KEYS)
    messages, flags = [], []
    for number, (turn, message) in enumerate(zip(turns, _messages(turns), strict=True), start=1):
        if message.get("role") in INSTRUCTING and message.get("content") is None:
            continue  # a system prompt that is null
        _check(message, number)
        messages.append(message)
        flags.append(message["role"] == "assistant" and number > prompt_turns and is_trained_on(turn))

    system = record.get("system")
    if system is not None and not isinstance(system, str):
        raise ValueError(f'"system" is no text: {reprlib.repr(system)}')
    if system and system.strip():
        instructions = [message["content"] for message in messages if message["role"] in INSTRUCTING]
        if any(instruction != system for instruction in instructions):
            raise ValueError('it has "system" and a system message; keep one of them')
        if not instructions:
            messages, flags = [{"role": "system", "content": system}, *messages], [False, *flags]

    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError("there is no assistant message to learn from")
    if not any(flags):
        raise ValueError('no assistant message is trained on: each has "weight": 0; leave the record out')

    last = max(index for index, flag in enumerate(flags) if flag)
    if answers == "last":
        flags = [index == last for index in range(len(flags))]
    trained = [flags[index] for index in range(last + 1) if messages[index]["role"] == "assistant"]
    return Conversation(messages[: last + 1], _tools(record), trained, keys)


def read_prompt(turns: list[Any], tools: Any = None) -> tuple[Messages, Tools]:
    """Read the messages that an assistant has to answer, in any format of a record's messages, and the tools.

    Raises:
        ValueError: there is no message, an unknown role, a message without text, or nothing to answer.
    """
    turns, _ = _turns({"messages": turns})
    messages = []
    for number, message in enumerate(_messages(turns), start=1):
        _check(message, number)
        messages.append(message)
    if messages[-1]["role"] == "assistant":
        raise ValueError("the last message is the assistant's; end with the message that it has to answer")
    return messages, _tools({"tools": tools})


def is_trained_on(message: dict[str, Any]) -> bool:
    """Return whether to train on an assistant's message; not with `"weight": 0` (OpenAI's format) or `"train": false`.

    Raises:
        ValueError: the weight is neither 0 nor 1, or the message has both keys.
    """
    flags = [message[key] for key in ("weight", "train") if message.get(key) is not None]
    if len(flags) > 1:
        raise ValueError('a message has both "weight" and "train"; keep one of them')
    if flags and flags[0] not in (0, 1):
        raise ValueError(f'a message\'s "weight" or "train" is {reprlib.repr(flags[0])}; it must be 0 or 1')
    return bool(flags[0]) if flags else True


def unread_keys(conversation: Conversation, template: str) -> list[str]:
    """List keys of messages that neither jaxstages nor the tokenizer's chat template reads."""
    readable = frozenset(REASONING) if any(name in template for name in REASONING[:2]) else frozenset()
    return sorted(key for key in conversation.keys - readable if key not in template)


def _turns(record: Record) -> tuple[list[dict[str, Any]], int]:
    """Return the turns of a record, and how many of the first ones are its prompt."""
    names = [name for name in ("messages", "conversations", "conversation") if record.get(name) is not None]
    if names:
        turns, prompt_turns = record[names[0]], 0
    else:
        prompt, completion = record.get("prompt"), record.get("completion")
        turns, prompt_turns = [], 0
        if isinstance(prompt, list) and isinstance(completion, list):
            turns, prompt_turns = [*prompt, *completion], len(prompt)
    if not isinstance(turns, list) or not turns:
        raise ValueError('no "messages", a list of {"role", "content"}')
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, dict):
            raise ValueError(f'message {number} is no {{"role", "content"}}: {reprlib.repr(turn)}')
    return turns, prompt_turns


def _messages(turns: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield each turn as a message. Calls without ids, such as ShareGPT's, get ids, and tool results get the ids of
    their calls in order."""
    open_calls: list[str] = []
    for number, turn in enumerate(turns, start=1):
        message = {key: value for key, value in turn.items() if value is not None and key not in ("weight", "train")}
        openai_role, sharegpt_role = message.pop("role", None), message.pop("from", None)
        role = openai_role if openai_role is not None else sharegpt_role
        value = message.pop("value", None)
        content = message.pop("content", value)
        message = {"role": ALIASES.get(role, role) if isinstance(role, str) else role} | message
        if role == "function_call":
            message["tool_calls"], content = _decoded(content, f"the call in message {number}"), None

        legacy = message.pop("function_call", None)
        if legacy is not None:
            message.setdefault("tool_calls", [legacy])
        if "tool_calls" in message:
            calls = _calls(message.pop("tool_calls"), number)
            if calls:
                if role == "function_call" or legacy is not None:
                    calls = [{"id": f"call{number:03}{index:02}"} | call for index, call in enumerate(calls)]
                    open_calls = [call["id"] for call in calls]
                message["tool_calls"] = calls
        if message["role"] == "tool" and "tool_call_id" not in message and open_calls:
            message["tool_call_id"] = open_calls.pop(0)

        text = _text(content, number)
        if text is not None or message["role"] == "tool":
            message["content"] = text or ""
        reasoning = next((message[name] for name in REASONING if name in message), None)
        if reasoning is not None:
            message = {"thinking": reasoning} | message | {"reasoning_content": reasoning}
        yield message


def _check(message: dict[str, Any], number: int) -> None:
    """Raises ValueError for a message without a known role, or without what its role needs."""
    role = message["role"]
    if role not in ROLES:
        known = ", ".join([*ROLES, *ALIASES])
        raise ValueError(f"message {number} has role {reprlib.repr(role)}; known: {known}")
    content = message.get("content")
    has_calls = bool(message.get("tool_calls")) and role == "assistant"
    if content is None and not has_calls:
        raise ValueError(f'message {number} ({role}) has no "content"')
    if role in ("user", "assistant") and not has_calls and content is not None and not content.strip():
        raise ValueError(f"message {number} ({role}) is empty")


def _text(content: Any, number: int) -> str | None:
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ValueError(f"message {number}'s content is no text: {reprlib.repr(content)}")
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, dict) else part
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise ValueError(f"message {number} has a part of type {kind!r}; only text is read")
        texts.append(text)
    return "".join(texts)


def _decoded(value: Any, what: str) -> Any:
    """Decode JSON text. Returns None for blank text, and other values unchanged."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except ValueError as error:
        raise ValueError(f"{what} is no JSON: {error}") from error


def _calls(value: Any, number: int) -> list[dict[str, Any]]:
    """Return tool calls with their arguments as objects, whether they were written as such or as JSON."""
    calls, what = [], f"the call in message {number}"
    for call in [value] if isinstance(value, dict) else _decoded(value, what) or []:
        wrapped = isinstance(call, dict) and "function" in call
        function = call["function"] if wrapped else call
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError(f'message {number} has a call without a function\'s "name": {reprlib.repr(call)}')
        arguments = _decoded(function.get("arguments"), what)
        function = function | {"arguments": {} if arguments is None else arguments}
        calls.append((call if wrapped else {"type": "function"}) | {"function": function})
    return calls


def _tools(record: Record) -> Tools:
    """Read the tools of a record: a list of functions, or its JSON.

    Raises:
        ValueError: "tools" is something else, or a tool has no name.
    """
    tools = _decoded(record.get("tools"), '"tools"')
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise ValueError(f'"tools" is no list of functions: {reprlib.repr(tools)}')
    for tool in tools or []:
        function = tool.get("function", tool)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError(f'"tools" has one without a name: {reprlib.repr(tool)}')
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools or []] or None
