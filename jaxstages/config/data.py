"""The recipe's description of data: sources, tasks, cleaning, near-duplicates, and the tokenizer."""

from dataclasses import dataclass, field

TASKS = ("lm", "seq2seq", "classify", "chat")


@dataclass(kw_only=True, slots=True)
class CleanConfig:
    """Applied to each record, in this order: control characters, normalization, lengths."""

    control_characters: str = "keep"
    """ "keep", or "remove": all but tab, new line and carriage return (Unicode's Cc), and the byte order mark."""
    unicode: str = "none"
    """Normalization of all text: "none", "nfc" (letters composed) or "nfkc" (also ligatures, full-width forms)."""
    min_characters: int = 0
    """A record whose texts have fewer, all together, is removed."""
    max_characters: int = 0
    """A record whose texts have more, all together, is removed; 0 is no limit."""


@dataclass(kw_only=True, slots=True)
class DuplicatesConfig:
    """Near-duplicates within a source, by MinHash (Broder 1997): see `data/dedup.py`."""

    threshold: float = 0.0
    """A record goes where an earlier one shares this part of its shingles (Jaccard, estimated); 0 is off. 0.8 is
    usual."""
    shingle: str = "words"
    """What texts are compared by: runs of "words", or of "characters" for languages without spaces."""
    shingle_size: int = 5
    """Words, or characters, in a run."""
    permutations: int = 120
    """Numbers in a signature: the estimate's standard error is `sqrt(s * (1 - s) / permutations)`."""
    bands: int = 20
    """Parts of a signature, of which one has to agree for two records to be compared: those that share s of their
    shingles are, with probability `1 - (1 - s**(permutations / bands))**bands`."""


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """Sources are strings, see docs/data.md: a path or pattern (`data/*.jsonl`), `tfds:NAME[/CONFIG]:SPLIT`,
    `tfds:DIRECTORY:SPLIT`, `hf:NAME:SPLIT` or `world:NAME:SPLIT` (the embedded small world)."""

    task: str = "lm"
    """ "lm", "seq2seq", "classify" or "chat"."""
    train: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    """Share of rows from each training source; by default in proportion to their rows."""
    validation: tuple[str, ...] = ()
    holdout: float = 0.0
    """Without validation sources: the share held out of `train` (the tail of a text file; records by hash of
    what they ask, so that no repeated question falls on both sides)."""
    text: str = "{text}"
    """lm: format string over a record's fields."""
    prompt: str = "{prompt}"
    """seq2seq, classify: format string of what is given."""
    target: str = "{target}"
    """seq2seq, classify: format string of what is to be answered, or of the label."""
    answers: str = "all"
    """chat: which of a conversation's answers are trained on, "all" or the "last"."""
    max_bad_share: float = 0.01
    """Stop when more than this share of a source's records are malformed."""
    clean: CleanConfig = field(default_factory=CleanConfig)
    duplicates: DuplicatesConfig = field(default_factory=DuplicatesConfig)


@dataclass(kw_only=True, slots=True)
class TokenizerConfig:
    """kind: "bpe" (byte-level, trained here), "characters" (one token a character, trained here) or "file"."""

    kind: str = "bpe"
    vocab_size: int = 1024
    path: str = ""
    """For kind "file": a `tokenizer.json`, or a `.model` of SentencePiece."""
    sources: tuple[str, ...] = ()
    """What "bpe" and "characters" are trained on; by default the training sources of every stage."""
    max_bytes: int = 20_000_000
    """Training reads at most this much text, an equal share from each source."""
