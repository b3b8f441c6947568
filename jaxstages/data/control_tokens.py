"""Keep users' text from becoming control tokens while a chat template renders it.

There are two substitutions:

* `make_hide`, before rendering. Control tokens that somebody wrote into a message are replaced by placeholders, which
  are characters that nobody uses. The template cannot tell them from text.
* `make_alias_text`, after rendering. Control tokens are now the template's own. They are replaced by secret aliases,
  which only the vocabulary of `AliasedTokenizer` has, and the hidden text is put back as plain text.
"""

import json
import re
import secrets
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import tokenizers

from jaxstages.data.chat_template import MARKS
from jaxstages.data.conversation import Messages, Tools
from jaxstages.data.tokenizer import Tokenizer, errors_as_value_error, group_pieces, special_tokens

PRIVATE_USE = range(0xF0000, 0x10FFFE)
"""Code points of Unicode's private use; placeholders are taken from them."""

PLACEHOLDER = f"[{chr(PRIVATE_USE[0])}-{chr(PRIVATE_USE[-1])}]"


class AliasedTokenizer(NamedTuple):
    """A tokenizer whose control tokens go by secret aliases, so that nothing else in a text can be one.

    aliases: control token -> its alias.
    special: control tokens that no text may yield. The others, such as Qwen's <think>, are also an assistant's words.
    cut: a token that no other token crosses; it yields no id itself.
    seamless: whether a cut leaves the text after it as it is. SentencePiece would put a space there.
    """

    aliases: dict[str, str]
    special: frozenset[str]
    cut: str
    seamless: bool
    backend: tokenizers.Tokenizer

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """Encode texts to int32 [3, n] each: ids, and the first character and last + 1 that each id stands for."""
        cut_id, tables = self.backend.token_to_id(self.cut), []
        for batch in group_pieces(enumerate(texts)):
            with errors_as_value_error("this tokenizer can't encode the data; take another"):
                encodings = self.backend.encode_batch([text for _, text in batch], add_special_tokens=False)
            for encoding in encodings:
                table = np.concatenate([[encoding.ids], np.reshape(encoding.offsets, (-1, 2)).T]).astype(np.int32)
                tables.append(table[:, table[0] != cut_id])
        return tables


def alias_control_tokens(tokenizer: Tokenizer) -> AliasedTokenizer:
    """Rename the control tokens of a tokenizer: its special tokens, and other added tokens that its template writes."""
    secret = secrets.token_hex(16)
    special = frozenset(special_tokens(tokenizer.backend))
    added = tokenizer.backend.get_added_tokens_decoder()
    templates = tokenizer.template + tokenizer.tool_template
    aliases = {
        token.content: f"<|{secret}-{i}|>"
        for i, token in added.items()
        if token.content in special or (token.content.strip() and token.content in templates)
    }

    content = json.loads(tokenizer.backend.to_str())
    model, cut = content["model"], f"<|{secret}-cut|>"
    match model["vocab"]:
        case dict() as vocab:
            model["vocab"] = {aliases.get(token, token): i for token, i in vocab.items()}
        case pieces:
            model["vocab"] = [[aliases.get(token, token), score] for token, score in pieces]
    if model.get("unk_token") is not None:
        model["unk_token"] = aliases.get(model["unk_token"], model["unk_token"])
    for token in content["added_tokens"]:
        token["content"] = aliases.get(token["content"], token["content"])
    content["post_processor"] = None  # it would remove spaces from the offsets

    with errors_as_value_error("this tokenizer's control tokens can't be told from its text; take another"):
        backend = tokenizers.Tokenizer.from_str(json.dumps(content))
        changed = [
            token
            for token, alias in aliases.items()
            if backend.token_to_id(alias) != tokenizer.backend.token_to_id(token)
        ]
        if changed:
            raise ValueError(f"{changed[0]!r} has another id without its name")

    backend.add_special_tokens([cut])
    seamless = not any("\u2581" in token for token in backend.encode(f"{cut}a", add_special_tokens=False).tokens)
    return AliasedTokenizer(aliases, special, cut, seamless, backend)


def make_alias_text(aliased: AliasedTokenizer) -> Callable[[str, dict[str, str]], str]:
    """`alias_text(text, hidden)`: replace control tokens by their aliases, and placeholders by the hidden text."""
    replaced = re.compile(f"{any_of(aliased.aliases)}|{PLACEHOLDER}")

    def alias_text(text: str, hidden: dict[str, str]) -> str:
        replacements = aliased.aliases | hidden
        return replaced.sub(lambda match: replacements.get(match.group(), match.group()), text)

    return alias_text


def any_of(words: Iterable[str]) -> str:
    """Pattern of any of the words; longer ones first, since one may begin another."""
    return "|".join(map(re.escape, sorted(words, key=len, reverse=True)))


Substitute = Callable[[str, Callable[[str], str]], str]
"""`substitute(text, placeholder_of)`."""


def make_hide(
    aliased: AliasedTokenizer, template: str
) -> Callable[[Messages, Tools], tuple[dict[str, str], Messages, Tools]]:
    """`hide(messages, tools)`: placeholder -> hidden text, and both arguments without control tokens.

    A part of a control token at either end of a text is hidden too, since the template might complete it. An assistant
    may write the tokens that are not special (`<think>`): they are words of its own.
    """
    hide_all, hide_special = _make_substitute([*aliased.aliases]), _make_substitute([*aliased.special])

    def hide(messages: Messages, tools: Tools) -> tuple[dict[str, str], Messages, Tools]:
        hidden: dict[str, str] = {}
        unused = _unused_characters(messages, tools, template)

        def placeholder_of(text: str) -> str:
            earlier = [placeholder for placeholder, original in hidden.items() if original == text]
            placeholder = earlier[0] if earlier else next(unused)
            hidden[placeholder] = text
            return placeholder

        def walk(value: Any, substitute: Substitute) -> Any:
            match value:
                case str():
                    return substitute(value, placeholder_of)
                case dict():
                    return {walk(key, substitute): walk(item, substitute) for key, item in value.items()}
                case list():
                    return [walk(item, substitute) for item in value]
                case _:
                    return value

        safe_messages = [
            walk(message, hide_special if message["role"] == "assistant" else hide_all) | {"role": message["role"]}
            for message in messages
        ]
        return hidden, safe_messages, walk(tools, hide_all)

    return hide


def _make_substitute(words: list[str]) -> Substitute:
    """`substitute(text, placeholder_of)`: replace the words, and parts of them at the ends of the text."""
    whole, longest = re.compile(any_of([*words, *MARKS])), max(map(len, words))
    heads = {word[:n] for word in words for n in range(1, len(word))}
    tails = {word[n:] for word in words for n in range(1, len(word))}
    first_characters, last_characters = {word[0] for word in words}, {word[-1] for word in words}

    def substitute(text: str, placeholder_of: Callable[[str], str]) -> str:
        text = whole.sub(lambda match: placeholder_of(match.group()), text)
        start, stop = len(text) - len(text.lstrip()), len(text.rstrip())

        # The text ends with the head of a word.
        limit = min(longest, stop - start)
        for n in range(limit if first_characters & {*text[stop - limit : stop]} else 0, 0, -1):
            if text[stop - n : stop] in heads:
                text = text[: stop - n] + placeholder_of(text[stop - n : stop]) + text[stop:]
                stop = stop - n
                break

        # The text begins with the tail of a word.
        limit = min(longest, stop - start)
        for n in range(limit if last_characters & {*text[start : start + limit]} else 0, 0, -1):
            if text[start : start + n] in tails:
                return text[:start] + placeholder_of(text[start : start + n]) + text[start + n :]
        return text

    return substitute


def _unused_characters(*values: Any) -> Iterator[str]:
    """Private-use characters that occur nowhere in the values. The values are searched when the first one is needed."""
    text = json.dumps(values, ensure_ascii=False, default=str)
    used = {character for character in text if ord(character) in PRIVATE_USE}
    yield from (character for character in map(chr, PRIVATE_USE) if character not in used)
    raise ValueError("the texts use every private-use character of Unicode; leave some out")
