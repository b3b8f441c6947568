"""Chats -> token ids and loss weights, by our template.

A turn is `<|role|> content <|end|>`. Control tokens are ids between encoded texts: nothing that a user writes can
become one. Trained on are the assistant's contents and the end token after each, so that it learns to stop.
"""

import reprlib
from typing import Any

import numpy as np

from jaxstages.data.sources import Record
from jaxstages.data.tokenizer import Specials

TEMPLATE = "<|endoftext|>(<|role|>content<|end|>)*"
"""Name of the template in a checkpoint's metadata; a stage refuses a parent with another."""

ROLES = ("system", "user", "assistant")


def check_messages(record: Record) -> list[dict[str, Any]]:
    """The messages of a record.

    Raises:
        ValueError: what is wrong: no messages, an unknown role, empty content, turns out of order, no answer.
    """
    messages = record.get("messages")
    if not isinstance(messages, list) or not messages:
        raise ValueError('no "messages", a list of {"role", "content"}')
    expected = "user"
    for place, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise ValueError(f'message {place + 1} is no {{"role", "content"}} with a text')
        role = message.get("role")
        if role not in ROLES:
            raise ValueError(f"message {place + 1} has role {reprlib.repr(role)}; known: {', '.join(ROLES)}")
        if not message["content"].strip():
            raise ValueError(f"message {place + 1} ({role}) is empty")
        if role == "system" and place == 0:
            continue
        if role != expected:
            raise ValueError(f"message {place + 1} is of {role}, where {expected} has the turn")
        expected = "assistant" if role == "user" else "user"
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError("there is no assistant message to learn from")
    return messages


def encode_chat(
    messages: list[dict[str, Any]], contents: list[np.ndarray], special: Specials
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Ids and loss weights, an array a turn, the first of them opened by the end-of-text token.

    Args:
        contents: token ids of each message's content.

    | user "hi", assistant "yo"  | <|endoftext|> <|user|> hi <|end|> | <|assistant|> yo <|end|> |
    | weights                    |      0           0     0     0    |      0         1     1    |
    """
    ids, weights = [], []
    for message, content in zip(messages, contents, strict=True):
        role = getattr(special, message["role"])
        start = [special.end_of_text, role] if not ids else [role]
        scored = np.float32(message["role"] == "assistant")
        ids.append(np.concatenate([start, content, [special.end_of_turn]]).astype(np.int32))
        weights.append(np.concatenate([np.zeros(len(start)), np.full(len(content) + 1, scored)]).astype(np.float32))
    return ids, weights


def chat_prompt(turns: list[np.ndarray], special: Specials) -> list[int]:
    """Ids of the conversation so far (turns as of `encode_chat`), up to where the assistant has to answer."""
    return np.concatenate([*turns, [special.assistant]]).tolist()
