"""Config of the data: sources, tasks, cleaning, near-duplicates, and the tokenizer."""

from collections.abc import Callable
from dataclasses import dataclass, field

from jaxstages.config.parts import TaskSpec
from jaxstages.config.setting import setting

TASKS = ("lm", "seq2seq", "classify", "chat", "own")


@dataclass(kw_only=True, slots=True)
class CleanConfig:
    """Cleaning of each record, in this order: control characters, Unicode normalization, length limits."""

    control_characters: str = setting("keep", choices=("keep", "remove"))
    """ "keep", or "remove": drop the byte order mark and all of Unicode's Cc but tab, newline and carriage return."""
    unicode: str = setting("none", choices=("none", "nfc", "nfkc"))
    """Normalization form: "none", "nfc" (compose accented letters) or "nfkc" (also ligatures and full-width forms)."""
    min_characters: int = setting(0, at_least=0)
    """Drop records with fewer characters in all their texts together."""
    max_characters: int = setting(0, at_least=0)
    """Drop records with more characters in all their texts together; 0 means no limit."""


@dataclass(kw_only=True, slots=True)
class DuplicatesConfig:
    """Removal of near-duplicates within a source by MinHash (Broder 1997); see `data/dedup.py`."""

    threshold: float = setting(0.0, at_least=0, at_most=1)
    """Drop a record whose estimated Jaccard similarity with an earlier one reaches this; 0 is off, 0.8 is usual."""
    shingle: str = setting("words", choices=("words", "characters"))
    """Unit of a shingle: "words", or "characters" for languages written without spaces."""
    shingle_size: int = setting(5, at_least=1, at_most=2**12)
    """Words, or characters, per shingle."""
    permutations: int = setting(120, at_least=1, at_most=2**12)
    """Hash functions per signature. The standard error of the estimate is `sqrt(s * (1 - s) / permutations)`."""
    bands: int = setting(20, at_least=1, at_most=2**8)
    """Bands of the signature. Two records of similarity s are compared if one band agrees, which has the probability
    `1 - (1 - s**(permutations / bands))**bands`."""


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """A data set and its task. Sources are strings (docs/data.md): a path or pattern (`data/*.jsonl`),
    `tfds:NAME[/CONFIG]:SPLIT`, `tfds:DIRECTORY:SPLIT`, `hf:NAME:SPLIT` or `world:NAME:SPLIT` (the embedded example
    world)."""

    task: str = setting("lm", choices=TASKS)
    """ "lm" (raw text), "seq2seq" (pairs of texts), "classify" (a text and its label), "chat" or "own"."""
    own: TaskSpec | None = setting(None, only_for={"task": ("own",)})
    """own: an object with `texts(record)`, the texts of a record, and `make(tokenizer, context)`, which returns
    `encode(record) -> data.tasks.Encoded`."""
    train: tuple[str | Callable, ...] = ()
    """Training sources. A function is one too: `source()` yields records, which are dicts."""
    weights: tuple[float, ...] = setting((), at_least=0)
    """Share of rows from each training source; by default proportional to their number of rows."""
    validation: tuple[str | Callable, ...] = ()
    """Held-out sources."""
    holdout: float = setting(0.0, at_least=0, at_most=1)
    """Without validation sources: the share of `train` to hold out. Text files lose their tail; records are chosen by a
    hash of the prompt, so a repeated question never falls on both sides."""
    text: str = setting("{text}", syntax="format", only_for={"task": ("lm",)})
    """lm: format string over a record's fields."""
    prompt: str = setting("{prompt}", syntax="format", only_for={"task": ("seq2seq", "classify")})
    """seq2seq, classify: format string of the input."""
    target: str = setting("{target}", syntax="format", only_for={"task": ("seq2seq", "classify")})
    """seq2seq, classify: format string of the expected output, or of the label."""
    answers: str = setting("all", choices=("all", "last"), only_for={"task": ("chat",)})
    """chat: train on "all" answers of a conversation, or only on the "last"."""
    max_bad_share: float = setting(0.01, at_least=0, at_most=1)
    """Stop if more than this share of a source's records is malformed."""
    clean: CleanConfig = field(default_factory=CleanConfig)
    duplicates: DuplicatesConfig = field(default_factory=DuplicatesConfig)


@dataclass(kw_only=True, slots=True)
class TokenizerConfig:
    kind: str = setting("bpe", choices=("bpe", "characters", "file"))
    """ "bpe" (byte-level BPE, trained on the data), "characters" (one token per character of the data) or "file"."""
    vocab_size: int = setting(1024, at_least=1, at_most=2**20)
    path: str = setting("", only_for={"kind": ("file",)})
    """file: a `tokenizer.json`, or a SentencePiece `.model`."""
    sources: tuple[str, ...] = ()
    """bpe, characters: sources to train on; by default the training sources of all stages."""
    max_bytes: int = setting(20_000_000, at_least=1, at_most=2**40)
    """Read at most this much text for training, an equal share from each source."""
