"""Prompts as token ids, in the format of a task."""

from jaxstages.data.chat import make_chat
from jaxstages.data.tasks import pair_prompt
from jaxstages.data.tokenizer import Tokenizer


def encode_prompts(task: str, tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    """Tokenize texts as prompts of a task: text to continue, the source of a pair, or a user's message."""
    if task == "chat":
        chat = make_chat(tokenizer)
        return [chat.prompt([{"role": "user", "content": text}], None) for text in texts]
    encoded = tokenizer.encode_batch(texts)
    if task == "lm":
        return [[*tokenizer.begin, *ids.tolist()] for ids in encoded]
    return [pair_prompt(ids, tokenizer) for ids in encoded]
