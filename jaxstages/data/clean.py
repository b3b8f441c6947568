"""Records -> cleaned records, or the reason for removing one; and the text by which near-duplicates are found.

| config.data.clean                | text in       | text out    |
| -------------------------------- | ------------- | ----------- |
| control_characters="remove"      | a\\x00b\\tc\\ufeff | ab\\tc        |
| unicode="nfc"                    | e + \\u0301     | é           |
| unicode="nfkc"                   | ﬁve            | five        |
"""

import re
import unicodedata
from typing import Any, Literal

from jaxstages.config import DataConfig
from jaxstages.config.data import CleanConfig, DuplicatesConfig
from jaxstages.data.sources import Item, Record
from jaxstages.data.tasks import texts

MAX_RECORD_BYTES = 2**25
"""Memory of the largest record (`memory_bytes`); a larger one is malformed."""

REMOVAL_REASONS = {"too_short": "too short", "too_long": "too long", "near_duplicate": "near-duplicates"}
"""Name of a reason in the index -> its wording in messages."""

_FORMS: dict[str, Literal["NFC", "NFKC"]] = {"nfc": "NFC", "nfkc": "NFKC"}
_CONTROL = re.compile("[\0-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufeff]")


def is_cleaned(config: DataConfig) -> bool:
    """Return whether records are cleaned, or near-duplicates removed, at all."""
    return (config.clean, config.duplicates) != (CleanConfig(), DuplicatesConfig())


def fingerprint_parts(config: DataConfig) -> list[str]:
    """List what the rows depend on, for their fingerprint. Unicode's tables, which come with Python, belong to it."""
    return [repr(config.clean), repr(config.duplicates), unicodedata.unidata_version] if is_cleaned(config) else []


def memory_bytes(record: Record | None) -> int:
    """Estimate a record's memory: UTF-8 bytes of all its text, and 64 bytes for each value at any depth."""
    total, queue = 0, [record] if record else []
    while queue:
        value: Any = queue.pop()
        total += 64
        if isinstance(value, str):
            total += len(value.encode("utf-8", "surrogatepass"))
        elif isinstance(value, dict):
            queue += [*value, *value.values()]
        elif isinstance(value, list):
            queue += value
    return total


def clean_text(text: str, config: CleanConfig) -> str:
    if config.control_characters == "remove":
        text = _CONTROL.sub("", text)
    return text if config.unicode == "none" else unicodedata.normalize(_FORMS[config.unicode], text)


def _clean_value(value: Any, config: CleanConfig) -> Any:
    if isinstance(value, str):
        return clean_text(value, config)
    if isinstance(value, dict):
        return {key: _clean_value(item, config) for key, item in value.items()}
    return [_clean_value(item, config) for item in value] if isinstance(value, list) else value


def clean_item(item: Item, config: DataConfig) -> Item:
    """Clean all text of a record, and set `removed` where it is too short or too long."""
    clean, record = config.clean, item.record
    if record is None or clean == CleanConfig():
        return item

    if clean.control_characters != "keep" or clean.unicode != "none":
        try:
            record = _clean_value(record, clean)
            item = item._replace(record=record)
        except RecursionError:
            return Item(item.where, None, "nested too deeply to be cleaned")

    if clean.min_characters or clean.max_characters:
        try:
            length = sum(map(len, texts(record, config)))
        except ValueError:
            return item  # tokenization counts and reports it
        if length < clean.min_characters:
            return item._replace(removed="too_short")
        if clean.max_characters and length > clean.max_characters:
            return item._replace(removed="too_long")
    return item


def dedup_text(item: Item, config: DataConfig) -> str | None:
    """Return the text by which a cleaned item is compared with others; None if it is removed already, or malformed."""
    if item.record is None or item.removed or memory_bytes(item.record) > MAX_RECORD_BYTES:
        return None
    try:
        return "\n".join(texts(item.record, config))
    except ValueError:
        return None
