"""The raw text for pretraining: 10,000 short documents that tell every fact and use every word of the world.

A validation document says nothing that training did not say, but it puts together what never stood together there:
people who never shared a document, an adjective with a new noun, a new list, a new sum.
"""

import itertools
import random
from collections.abc import Callable, Iterator

from jaxstages.world import lessons, stories
from jaxstages.world.clauses import clauses
from jaxstages.world.grammar import Clause, english, french
from jaxstages.world.people import Person, people
from jaxstages.world.split import belongs, check_split, unique

COUNTS: dict[str, int] = {"train": 10_000, "validation": 320}
"""Documents in each split."""

SHARES: dict[str, float] = {
    "biography": 0.24,
    "roll": 0.05,
    "interview": 0.12,
    "quiz": 0.16,
    "classroom": 0.03,
    "words": 0.05,
    "numbers": 0.04,
    "lists": 0.04,
    "glossary": 0.09,
    "conjugation": 0.04,
    "english": 0.06,
    "french": 0.08,
}
"""How much of the documents is of each kind; together 1."""

STORIES: dict[str, Callable[[random.Random, list[Person]], str]] = {
    "biography": stories.biography,
    "roll": stories.roll,
    "interview": stories.interview,
    "classroom": stories.classroom,
}
LESSONS: dict[str, Callable[[random.Random], lessons.Draft]] = {
    "words": lessons.words,
    "numbers": lessons.numbers,
    "lists": lessons.lists,
    "glossary": lessons.glossary,
    "conjugation": lessons.conjugation,
}
SPEAKERS: dict[str, Callable[[Clause], str]] = {"english": english, "french": french}
MOST_SENTENCES = 1_000_000
"""More sentences than any number of documents needs: they are drawn one by one."""

PEOPLE_ONE_IN = 20
"""One pair of people in twenty never shares a training document."""


def documents(split: str, count: int | None = None, seed: int = 0) -> Iterator[dict[str, str]]:
    """`count` different documents `{"text": ...}` of a split, the kinds mixed; `count=None`: all, see COUNTS.

    Raises ValueError for an unknown split.
    """
    check_split(split)
    for text in unique(_endless(split, seed), COUNTS[split] if count is None else count, key=str):
        yield {"text": text}


def _endless(split: str, seed: int) -> Iterator[str]:
    rng = random.Random(f"text {split} {seed}")
    # The facts have their own seed, and it is not this one: every data set tells of the same 64 people.
    everybody = people()
    # There is no new combination in a conjugation, so it has no place in validation.
    kinds = [kind for kind in SHARES if split == "train" or kind != "conjugation"]
    drawn = {kind: clauses(split, MOST_SENTENCES, seed + index) for index, kind in enumerate(SPEAKERS, start=1)}
    while True:
        kind = rng.choices(kinds, weights=[SHARES[name] for name in kinds])[0]
        if kind in SPEAKERS:
            yield " ".join(SPEAKERS[kind](next(drawn[kind])) for _ in range(rng.randint(8, 11)))
        elif kind in LESSONS:
            yield _lesson(kind, split, rng)
        else:
            yield _story(kind, split, rng, everybody)


def _lesson(kind: str, split: str, rng: random.Random) -> str:
    while True:
        draft = LESSONS[kind](rng)
        if draft.unseen == (split == "validation"):
            return draft.text


def _story(kind: str, split: str, rng: random.Random, everybody: tuple[Person, ...]) -> str:
    lengths = {"biography": (2, 3), "roll": (7, 9), "interview": (4, 5), "quiz": (5, 7), "classroom": (2, 2)}
    while True:
        chain = rng.sample(everybody, rng.randint(*lengths[kind]))
        if belongs(split, _neighbours(chain), PEOPLE_ONE_IN):
            break
    if kind == "quiz":
        return stories.quiz(rng, chain, [person.name for person in everybody])
    return STORIES[kind](rng, chain)


def _neighbours(chain: list[Person]) -> Iterator[tuple[str, str, str]]:
    """People who follow each other in a document, in either order."""
    for first, second in itertools.pairwise(chain):
        low, high = sorted((first.name, second.name))
        yield ("people", low, high)
