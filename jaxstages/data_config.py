"""The recipe's part on what is done to records before they are tokenized; all of it is off by default."""

from dataclasses import dataclass


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
    """Near-duplicates within a source, by MinHash (Broder 1997): see `data/duplicates.py`."""

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
