"""What the world's words mean: categories, opposites, plurals, numbers and lists. Shared by raw text and chats."""

import random
from collections.abc import Iterator

from jaxstages.world.lexicon import NOUNS
from jaxstages.world.people import CITIES, JOBS, PETS, listed, with_article

COLOURS = listed("red blue green white black yellow")
CATEGORIES: dict[str, list[str]] = {
    "animal": PETS,
    # "chicken" and "fish" would be animals too.
    "food": listed("bread cheese rice soup cake honey pasta salad pizza chocolate"),
    "colour": COLOURS,
    "job": JOBS,
    "city": CITIES,
}
"""Category to its members; every word is in one category only, so that questions have one answer."""

OPPOSITES: tuple[tuple[str, str], ...] = (
    ("big", "small"),
    ("old", "young"),
    ("good", "bad"),
    ("happy", "sad"),
    ("hot", "cold"),
    ("black", "white"),
    ("fast", "slow"),
    ("clean", "dirty"),
    ("long", "short"),
    ("rich", "poor"),
    ("day", "night"),
    ("left", "right"),
    ("up", "down"),
)

NUMBERS = listed(
    "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty"
)
"""`NUMBERS[n - 1]` is the word for n."""

ORDINALS = ("first", "second", "third", "fourth")

PLURALS: dict[str, str] = {
    **{noun.english[0]: noun.english[1] for noun in NOUNS.values()},
    **{word: word + "s" for word in ("duck", "rabbit")},
}

ONE_IN = 6
"""One list, sum or pair of neighbours in six belongs to validation."""


def opposite(word: str) -> str:
    """The word's opposite. Raises ValueError for a word that has none here."""
    for first, second in OPPOSITES:
        if word in (first, second):
            return second if word == first else first
    raise ValueError(f"{word!r} has no opposite in this world")


def category(word: str) -> str:
    """The word's category. Raises ValueError for a word of none."""
    for name, members in CATEGORIES.items():
        if word in members:
            return name
    raise ValueError(f"{word!r} is in no category of this world")


def noun_phrase(word: str) -> str:
    """The word as one says it of its category: `a cat`, but `bread`, `red` and `Porto`."""
    return with_article(word) if category(word) in ("animal", "job") else word


def category_statement(word: str) -> str:
    """`A cat is an animal.`, with its capital."""
    text = f"{noun_phrase(word)} is {with_article(category(word))}."
    return text[0].upper() + text[1:]


def draw_list(rng: random.Random, shortest: int, longest: int) -> tuple[str, ...]:
    """Different words of one category, in random order."""
    members = CATEGORIES[rng.choice(tuple(CATEGORIES))]
    return tuple(rng.sample(members, rng.randint(shortest, longest)))


def list_combinations(words: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """What is held out about a list: the whole list in its order."""
    yield ("list", *words)


def sum_combinations(first: int, second: int) -> Iterator[tuple[str, ...]]:
    """What is held out about a sum: its two numbers in their order."""
    yield ("sum", NUMBERS[first - 1], NUMBERS[second - 1])
