"""A `tokenizer.json` as the metadata of a GGUF file. Two kinds of tokenizers have a counterpart in llama.cpp.

| kind              | model   | its tokens                            | splits text into words by     |
| byte-level BPE    | "gpt2"  | bytes as printable characters, merges | a regular expression, by name |
| SentencePiece BPE | "llama" | U+2581 for a space, <0x0A> for a byte | nothing; tokens have scores   |

A tokenizer that would split some text differently there is refused. Source: `src/llama-vocab.cpp` of llama.cpp.
"""

import json
from collections.abc import Iterable
from typing import Any, NamedTuple

from jaxstages.data.sentencepiece import ONE_BYTE, SPACE
from jaxstages.runtime.console import say

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Values of `tokenizer.ggml.token_type`."""

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""The regular expression of `ByteLevel(use_regex=True)`, which the tokenizers of models trained here have too."""

DIGIT = r"\p{N}"
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
SIGNS_AND_SPACES = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = f"{WORDS}|{DIGIT}|{SIGNS_AND_SPACES}"
LLAMA3 = f"{WORDS}|{DIGIT}{{1,3}}|{SIGNS_AND_SPACES}"


class PreTokenizer(NamedTuple):
    """A pre-tokenizer of llama.cpp.

    name: in `tokenizer.ggml.pre`.
    patterns: regular expressions that split a text, one after the other.
    ignore_merges: a word that is a token is not merged.
    """

    name: str
    patterns: tuple[str, ...]
    ignore_merges: bool = False


PRE_TOKENIZERS = (
    PreTokenizer("gpt-2", (GPT2,)),
    PreTokenizer("smollm", (DIGIT, GPT2)),
    PreTokenizer("qwen2", (QWEN2,)),
    PreTokenizer("llama-bpe", (LLAMA3,), ignore_merges=True),
    PreTokenizer("dbrx", (LLAMA3,)),
)
"""Those whose regular expressions are the same there. Others, such as Tekken's and GPT-4o's, are approximations."""

OPTIONS = ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
"""Options of BPE that llama.cpp does not have."""


def vocabulary(content: dict[str, Any], rows: int, where: str) -> dict[str, Any]:
    """Return the metadata of a tokenizer.

    Args:
        content: the tokenizer.json.
        rows: rows of the embedding, at least as many as tokens.
        where: location, for messages.

    Raises:
        ValueError: llama.cpp has no such tokenizer; the message names the part that it lacks.
    """
    model = content["model"]
    if model.get("type", "BPE") != "BPE":
        raise ValueError(f"{where} is of type {model['type']}; GGUF files can have BPE: take another tokenizer")
    if options := [name for name in OPTIONS if model.get(name)]:
        raise ValueError(f"{where} has {options[0]}={model[options[0]]!r}, which llama.cpp does not know")

    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    if not merges:
        raise ValueError(f"{where} has no merges; llama.cpp needs a BPE with at least one")
    tokens, types = _tokens(content, rows, where)
    if "ByteLevel" in json.dumps(content["pre_tokenizer"]):
        kind = _byte_level(content, merges, where)
    else:
        kind = _sentencepiece(content, merges, tokens, types, where)
    keys = {"tokens": tokens, "token_type": types} | kind
    return {f"tokenizer.ggml.{key}": value for key, value in keys.items()}


def _tokens(content: dict[str, Any], rows: int, where: str) -> tuple[list[str], list[int]]:
    """Return a token per row with its type. Rows without a token get a name that no text is encoded to."""
    last = max([*content["model"]["vocab"].values(), *(added["id"] for added in content["added_tokens"])])
    if last >= rows:
        raise ValueError(
            f"{where} has {last + 1} tokens, and the embedding {rows} rows; llama.cpp needs a row for each"
        )

    tokens, types = [f"[PAD{i}]" for i in range(rows)], [UNUSED] * rows
    for token, i in content["model"]["vocab"].items():
        tokens[i], types[i] = token, NORMAL
    for added in content["added_tokens"]:
        if stripped := [
            name for name in ("lstrip", "rstrip", "single_word") if added.get(name) and not added["special"]
        ]:
            raise ValueError(f"{where}: {added['content']!r} has {stripped[0]}, which llama.cpp does not know")
        tokens[added["id"]] = added["content"]
        types[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    return tokens, types


# Byte-level BPE ---------------------------------------------------------------------------------------------------


def _byte_level(content: dict[str, Any], merges: list[list[str]], where: str) -> dict[str, Any]:
    if (content["normalizer"] or {}).get("type") not in (None, "NFC"):
        raise ValueError(f"{where} has a normalizer ({content['normalizer']['type']}), which llama.cpp does not apply")
    patterns = tuple(_patterns(content["pre_tokenizer"], where))
    ignore_merges = bool(content["model"].get("ignore_merges"))
    for pre in PRE_TOKENIZERS:
        if pre.patterns == patterns and pre.ignore_merges == ignore_merges:
            return {"model": "gpt2", "pre": pre.name, "merges": [" ".join(merge) for merge in merges]}
    known = ", ".join(pre.name for pre in PRE_TOKENIZERS)
    raise ValueError(
        f"{where} splits words by {' and '.join(map(repr, patterns))}{', ignoring merges' * ignore_merges}, which is "
        f"no pre-tokenizer of llama.cpp (compared: {known}); take a tokenizer with one of these"
    )


def _patterns(step: dict[str, Any], where: str) -> Iterable[str]:
    """Yield the regular expressions by which a pre-tokenizer splits a text."""
    match step:
        case {"type": "Sequence", "pretokenizers": steps}:
            for inner in steps:
                yield from _patterns(inner, where)
        case {"type": "ByteLevel", "add_prefix_space": False}:
            if step.get("use_regex", True):
                yield GPT2
        case {"type": "Digits", "individual_digits": True}:
            yield DIGIT
        case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}:
            yield pattern
        case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Removed", "invert": True}:
            yield pattern  # all that these patterns do not match is nothing
        case _:
            raise ValueError(f"{where} has the pre-tokenizer {json.dumps(step)[:120]}, which llama.cpp does not have")


# SentencePiece ----------------------------------------------------------------------------------------------------


def _sentencepiece(
    content: dict[str, Any], merges: list[list[str]], tokens: list[str], types: list[int], where: str
) -> dict[str, Any]:
    """llama.cpp merges the two neighbours whose concatenation has the highest score; here, the lowest merge goes first.

    These are the same if all merges into one token stand together, and none of them is missing.
    """
    add_space = _adds_space(content, where)
    model = content["model"]
    for i, token in enumerate(tokens):
        if types[i] == NORMAL and ONE_BYTE.fullmatch(token):
            types[i] = BYTE
    if not model.get("byte_fallback"):
        raise ValueError(f"{where} has byte_fallback=False; llama.cpp encodes unknown characters as bytes")
    if (count := types.count(BYTE)) != 256:
        raise ValueError(f"{where} has {count} of the tokens <0x00> to <0xFF>; llama.cpp needs them all")
    unknown = model["vocab"].get(model.get("unk_token"))
    if unknown is not None:
        types[unknown] = UNKNOWN

    order: dict[str, int] = {}
    for left, right in merges:
        rank = order.setdefault(left + right, len(order))
        if rank != len(order) - 1:
            raise ValueError(f"{where} merges into {left + right!r} at two ranks; in llama.cpp, a token has one score")
    vocab, counts = model["vocab"], dict.fromkeys(order, 0)
    for left, right in merges:
        counts[left + right] += 1

    def is_symbol(text: str) -> bool:
        return len(text) == 1 or text in vocab  # it also merges characters that are no tokens

    spelled = []
    for token, kind in zip(tokens, types, strict=True):
        cuts = sum(is_symbol(token[:n]) and is_symbol(token[n:]) for n in range(1, len(token)))
        if kind == NORMAL and cuts != counts.get(token, 0):
            raise ValueError(
                f"{where} has {counts.get(token, 0)} merges into {token!r}, and llama.cpp would have {cuts}; take "
                "another tokenizer"
            )
        if kind in (CONTROL, BYTE, UNKNOWN) and cuts:
            spelled.append(token)
    if spelled:
        say(f"export: in llama.cpp, text that spells {', '.join(spelled[:5])} can become that token", "yellow")

    # A token that no merge makes never competes; any score will do.
    scores = [-float(order.get(token, len(order))) for token in tokens]
    keys = {"model": "llama", "pre": "default", "scores": scores, "add_space_prefix": add_space}
    return keys | ({} if unknown is None else {"unknown_token_id": unknown})


def _adds_space(content: dict[str, Any], where: str) -> bool:
    """Return whether a text gets a space in front.

    Raises:
        ValueError: anything else happens to a text before it is tokenized, beside the escape of spaces.
    """
    adds = escapes = False
    for step in _steps(content["normalizer"], "normalizers") + _steps(content["pre_tokenizer"], "pretokenizers"):
        match step:
            case {"type": "Prepend", "prepend": "\u2581" | " "}:
                adds = True
            case {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}:
                escapes = True
            case {"type": "Metaspace", "replacement": "\u2581", "split": False}:
                adds, escapes = adds or step.get("prepend_scheme", "always") != "never", True
            case {"type": "Split", "pattern": {"String": " "}} if escapes:
                pass  # no spaces are left
            case _:
                raise ValueError(f"{where} has {json.dumps(step)[:120]}, which llama.cpp does not apply to a text")
    if not escapes:
        raise ValueError(f"{where} does not write spaces as {SPACE!r}, as SentencePiece and llama.cpp do")
    return adds


def _steps(part: dict[str, Any] | None, name: str) -> list[dict[str, Any]]:
    if part is None:
        return []
    return [inner for step in part[name] for inner in _steps(step, name)] if part["type"] == "Sequence" else [part]
