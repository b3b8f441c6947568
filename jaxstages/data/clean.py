"""Records -> cleaned records, or the reason why one is removed; and the text that near-duplicates are found by.

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

MOST_BYTES = 2**25
"""A record that takes more is malformed."""

REMOVED = {"too_short": "too short", "too_long": "too long", "near_duplicate": "near-duplicates"}
"""Reasons, as an index counts them, and as they are said."""

_FORMS: dict[str, Literal["NFC", "NFKC"]] = {"nfc": "NFC", "nfkc": "NFKC"}
_CONTROL = re.compile("[\0-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufeff]")


def cleans(config: DataConfig) -> bool:
    """Whether any of it is on."""
    return (config.clean, config.duplicates) != (CleanConfig(), DuplicatesConfig())


def key_of(config: DataConfig) -> list[str]:
    """What the rows depend on here, for the fingerprint. Unicode's tables, which come with Python, are of it."""
    return [repr(config.clean), repr(config.duplicates), unicodedata.unidata_version] if cleans(config) else []


def size_of(record: Record | None) -> int:
    """About how much memory a record takes: UTF-8 bytes of all its text, and 64 for each value, however deep."""
    total, waiting = 0, [record] if record else []
    while waiting:
        value: Any = waiting.pop()
        total += 64
        if isinstance(value, str):
            total += len(value.encode("utf-8", "surrogatepass"))
        elif isinstance(value, dict):
            waiting += [*value, *value.values()]
        elif isinstance(value, list):
            waiting += value
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
    """The item with all text in its record cleaned, and with `removed` set where it is too short or too long."""
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
            return item  # counted and named when it is tokenized
        if length < clean.min_characters:
            return item._replace(removed="too_short")
        if clean.max_characters and length > clean.max_characters:
            return item._replace(removed="too_long")
    return item


def compared(item: Item, config: DataConfig) -> str | None:
    """The text by which a cleaned item is compared with others; None if it is not: removed already, or malformed."""
    if item.record is None or item.removed or size_of(item.record) > MOST_BYTES:
        return None
    try:
        return "\n".join(texts(item.record, config))
    except ValueError:
        return None
