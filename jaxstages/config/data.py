"""Config of the data: sources, tasks, cleaning, near-duplicates, and the tokenizer."""

from collections.abc import Callable
from dataclasses import dataclass, field

from jaxstages.config.parts import TaskSpec
from jaxstages.config.setting import setting

TASKS = ("lm", "seq2seq", "classify", "chat", "own")
"""Data tasks; "own" is a task from the recipe's file."""


@dataclass(kw_only=True, slots=True)
class CleanConfig:
    """Cleaning of each record, in this order: control characters, Unicode normalization, length limits."""

    control_characters: str = setting("keep", choices=("keep", "remove"))
    """ "keep", or "remove": delete the byte order mark and all control characters (Unicode category Cc) except tab,
    newline and carriage return."""
    unicode: str = setting("none", choices=("none", "nfc", "nfkc"))
    """Normalization form: "none", "nfc" (composes accented letters) or "nfkc" (also replaces ligatures and full-width
    forms)."""
    min_characters: int = setting(0, at_least=0)
    """Drop records whose texts have fewer characters in total."""
    max_characters: int = setting(0, at_least=0)
    """Drop records whose texts have more characters in total; 0 means no limit."""


@dataclass(kw_only=True, slots=True)
class DuplicatesConfig:
    """Removal of near-duplicates within a source by MinHash (Broder 1997); see `data/dedup.py`.

    `docs/data.md` shows how to list what was dropped.
    """

    threshold: float = setting(0.0, at_least=0, at_most=1)
    """Drop a record whose estimated Jaccard similarity to an earlier record reaches this; 0 is off, 0.8 is usual."""
    shingle: str = setting("words", choices=("words", "characters"))
    """Unit of a shingle: "words", or "characters" for languages written without spaces."""
    shingle_size: int = setting(5, at_least=1, at_most=2**12)
    """Words, or characters, per shingle."""
    permutations: int = setting(120, at_least=1, at_most=2**12)
    """Hash functions per signature. The standard error of the estimate is `sqrt(s * (1 - s) / permutations)`."""
    bands: int = setting(20, at_least=1, at_most=2**8)
    """Bands of the signature. Two records are compared if they agree in at least one band; with similarity s the
    probability is `1 - (1 - s**(permutations / bands))**bands`."""


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """A data set and its task. A source is a string (docs/data.md): a path or pattern (`data/*.jsonl`),
    `tfds:NAME[/CONFIG]:SPLIT`, `tfds:DIRECTORY:SPLIT`, `hf:NAME:SPLIT` or `world:NAME:SPLIT` (the embedded example
    world)."""

    task: str = setting("lm", choices=TASKS)
    """ "lm" (raw text), "seq2seq" (pairs of texts), "classify" (a text and its label), "chat" or "own"."""
    own: TaskSpec | None = setting(None, only_for={"task": ("own",)})
    """own: an object with `texts(record)`, which returns the texts of a record, and `make(tokenizer, context)`, which
    returns `encode(record) -> data.tasks.Encoded`."""
    train: tuple[str | Callable, ...] = ()
    """Training sources. A source can also be a function: `source()` yields records, which are dicts."""
    weights: tuple[float, ...] = setting((), at_least=0)
    """Share of rows from each training source; by default proportional to the number of its rows."""
    validation: tuple[str | Callable, ...] = ()
    """Held-out sources; alternatively set `holdout`."""
    holdout: float = setting(0.0, at_least=0, at_most=1)
    """Share of `train` to hold out if there are no validation sources: the end of each text file, or records chosen by
    a hash of the prompt, so that a repeated question is never on both sides."""
    text: str = setting("{text}", syntax="format", only_for={"task": ("lm",)})
    """lm: format string over a record's fields."""
    prompt: str = setting("{prompt}", syntax="format", only_for={"task": ("seq2seq", "classify")})
    """seq2seq, classify: format string for the input."""
    target: str = setting("{target}", syntax="format", only_for={"task": ("seq2seq", "classify")})
    """seq2seq, classify: format string for the expected output, or for the label."""
    answers: str = setting("all", choices=("all", "last"), only_for={"task": ("chat",)})
    """chat: train on "all" answers of a conversation, or only on the "last"."""
    max_bad_share: float = setting(0.01, at_least=0, at_most=1)
    """Largest share of malformed records in a source; beyond it, preparation stops with an error."""
    clean: CleanConfig = field(default_factory=CleanConfig)
    """Cleaning of each record."""
    duplicates: DuplicatesConfig = field(default_factory=DuplicatesConfig)
    """Removal of near-duplicates."""


@dataclass(kw_only=True, slots=True)
class TokenizerConfig:
    """Tokenizer of a run: trained on its data, or read from a file."""

    kind: str = setting("bpe", choices=("bpe", "characters", "file"))
    """ "bpe" (byte-level BPE, trained on the data), "characters" (one token per character of the data) or "file"."""
    vocab_size: int = setting(1024, at_least=1, at_most=2**20)
    """bpe: tokens in the vocabulary, control tokens included. The other kinds determine it from the data or the
    file."""
    path: str = setting("", only_for={"kind": ("file",)})
    """file: path of a `tokenizer.json` or of a SentencePiece `.model`."""
    sources: tuple[str, ...] = ()
    """bpe, characters: sources to train on; by default the training sources of all stages."""
    max_bytes: int = setting(20_000_000, at_least=1, at_most=2**40)
    """Bytes of text to train on at most, an equal share from each source."""
