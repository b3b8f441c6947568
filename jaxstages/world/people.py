"""The facts of the world: 64 people, each with a city, a job, a pet, a favourite food and a friend.

Every fact is told in the raw text. About a quarter of the (person, attribute) questions are never asked in a training
chat, so whoever answers them right in validation learnt the fact while pretraining.
"""

import random
from typing import NamedTuple

from jaxstages.world.split import held_out

ATTRIBUTES = ("city", "job", "pet", "food", "friend")


def listed(words: str) -> list[str]:
    """The words of a string, for tables that would be long otherwise."""
    return words.split()


WOMEN = listed(
    "Anna Emma Julia Sara Lucy Alice Mary Nina Clara Rosa Eva Laura Lily Grace Kate Jane "
    "Ella Mia Zoe Nora Iris Helen Ruth Amy Lena Maya Olga Tina Vera Ida Dora Ada"
)
MEN = listed(
    "Tom Paul John Peter Mark David Adam Max Leo Hugo Oscar Felix Simon Jack Sam Ben "
    "Dan Luke Noah Ivan Karl Omar Eric Victor Frank Henry Louis Robert Ali Bruno George Oliver"
)
CITIES = listed("Porto Rome Paris London Madrid Berlin Lisbon Vienna Oslo Dublin Prague Athens Cairo Tokyo Lima Boston")
JOBS = listed(
    "teacher doctor farmer baker singer painter pilot nurse cook driver writer dancer lawyer sailor engineer actor"
)
PETS = listed("cat dog bird horse rabbit mouse duck goat hen turtle")
FOODS = listed("bread cheese rice soup fish cake honey pasta salad chicken pizza chocolate")

QUESTION_ONE_IN = 4


class Person(NamedTuple):
    """One person and all that is true of them.

    pronoun: "she" or "he".  possessive: "her" or "his".  friend: the name of another person, whose friend is `name`.
    """

    name: str
    pronoun: str
    possessive: str
    city: str
    job: str
    pet: str
    food: str
    friend: str


def people(seed: int = 0) -> tuple[Person, ...]:
    """All 64 people, in a fixed order of names; their facts are drawn by `seed`.

    Values are dealt out like cards, each one about equally often, so that always naming the most common city is right
    for one person in sixteen only. Friendship is mutual: the 64 people are 32 pairs of friends.
    """
    rng = random.Random(f"people {seed}")
    names = WOMEN + MEN
    cities, jobs, pets, foods = (_dealt(values, len(names), rng) for values in (CITIES, JOBS, PETS, FOODS))
    shuffled = rng.sample(names, len(names))
    friends = dict(zip(shuffled[::2], shuffled[1::2], strict=True))
    friends |= {second: first for first, second in friends.items()}
    return tuple(
        Person(
            name=name,
            pronoun="she" if name in WOMEN else "he",
            possessive="her" if name in WOMEN else "his",
            city=cities[index],
            job=jobs[index],
            pet=pets[index],
            food=foods[index],
            friend=friends[name],
        )
        for index, name in enumerate(names)
    )


def value_of(person: Person, attribute: str) -> str:
    """The person's value of one of ATTRIBUTES. Raises ValueError for any other attribute."""
    if attribute not in ATTRIBUTES:
        raise ValueError(f"unknown attribute {attribute!r}: known are {', '.join(ATTRIBUTES)}")
    return str(getattr(person, attribute))


def question_is_held_out(person: Person, attribute: str) -> bool:
    """Whether this person is never asked for this attribute in a training chat: about one pair in four.

    A friendship is held out as a whole. Were only one side, then the answer to "Who is Tom's friend?" would give away
    the answer to "Who is Anna's friend?".
    """
    if attribute not in ATTRIBUTES:
        raise ValueError(f"unknown attribute {attribute!r}: known are {', '.join(ATTRIBUTES)}")
    if attribute == "friend":
        first, second = sorted((person.name, person.friend))
        return held_out(QUESTION_ONE_IN, attribute, first, second)
    return held_out(QUESTION_ONE_IN, attribute, person.name)


def with_article(noun: str) -> str:
    """The English noun with "a" or "an" before it: `an actor`. By spelling, which is right for this world's words."""
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def _dealt(values: list[str], count: int, rng: random.Random) -> list[str]:
    """`count` values in random order, each of them floor or ceil of count / len(values) times."""
    cards = [values[index % len(values)] for index in range(count)]
    rng.shuffle(cards)
    return cards
