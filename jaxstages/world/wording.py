"""How the facts about people are said: statements, questions, answers, in several wordings for each attribute.

Raw text and chats share this file, so that a question in a chat is worded as somebody worded it in the raw text.
"""

import random

from jaxstages.world.people import CITIES, FOODS, JOBS, PETS, Person, value_of, with_article

VALUES: dict[str, list[str]] = {"city": CITIES, "job": JOBS, "pet": PETS, "food": FOODS}
"""What an attribute may be; a friend may be anybody."""

NAMED: dict[str, tuple[str, ...]] = {
    "city": (
        "{name} lives in {value}.",
        "{name}'s home is in {value}.",
        "The home of {name} is in {value}.",
        "{value} is the home of {name}.",
        "{value} is the city where {name} lives.",
        "In {value} lives {name}.",
        "The city of {name} is {value}.",
    ),
    "job": (
        "{name} is {article}.",
        "{name} works as {article}.",
        "{name}'s job is {value}.",
        "{name} has a job as {article}.",
        "There is {article} called {name}.",
        "One {value} is called {name}.",
    ),
    "pet": (
        "{name} has {article}.",
        "{name}'s pet is {article}.",
        "The pet of {name} is {article}.",
        "There is {article} in the house of {name}.",
        "One {value} is the pet of {name}.",
        "The animal of {name} is {article}.",
    ),
    "food": (
        "{name} likes {value}.",
        "{name}'s favourite food is {value}.",
        "The favourite food of {name} is {value}.",
        "The food that {name} likes is {value}.",
        "There is {value} in the kitchen of {name} every day.",
        "The {value} is for {name}.",
        "{name} likes to eat {value}.",
    ),
    "friend": (
        "{name}'s friend is {value}.",
        "The friend of {name} is {value}.",
        "{value} is the friend of {name}.",
        "{name} has a friend called {value}.",
        "{name} and {value} are friends.",
        "{value} is {name}'s friend.",
    ),
}
"""Statements with the person's name. `{article}` is the value with "a" or "an" before it."""

PRONOUN: dict[str, tuple[str, ...]] = {
    "city": ("{She} lives in {value}.", "{Her} home is in {value}.", "{value} is the city where {she} lives."),
    "job": ("{She} is {article}.", "{She} works as {article}.", "{Her} job is {value}."),
    "pet": ("{She} has {article}.", "{Her} pet is {article}.", "There is {article} in {her} house."),
    "food": ("{She} likes {value}.", "{Her} favourite food is {value}.", "The food that {she} likes is {value}."),
    "friend": ("{Her} friend is {value}.", "{She} has a friend called {value}.", "{value} is {her} friend."),
}
"""Statements with a pronoun, for a person named just before."""

QUESTIONS: dict[str, tuple[str, ...]] = {
    "city": (
        "Where does {name} live?",
        "In which city does {name} live?",
        "Where is the home of {name}?",
        "Where is {name}'s home?",
    ),
    "job": (
        "What is {name}'s job?",
        "What is the job of {name}?",
        "What does {name} work as?",
        "Which job does {name} have?",
    ),
    "pet": (
        "What pet does {name} have?",
        "Which animal does {name} have?",
        "What is {name}'s pet?",
        "What is the pet of {name}?",
    ),
    "food": (
        "What food does {name} like?",
        "What does {name} like to eat?",
        "What is {name}'s favourite food?",
        "What is the favourite food of {name}?",
    ),
    "friend": (
        "Who is {name}'s friend?",
        "Who is the friend of {name}?",
        "Which friend does {name} have?",
        "What is {name}'s friend called?",
    ),
}

FOLLOW_UPS: dict[str, tuple[str, ...]] = {
    "city": ("And where does {she} live?", "And where is {her} home?"),
    "job": ("And what is {her} job?", "And what does {she} work as?"),
    "pet": ("And what pet does {she} have?", "And what is {her} pet?"),
    "food": ("And what food does {she} like?", "And what is {her} favourite food?"),
    "friend": ("And who is {her} friend?", "And which friend does {she} have?"),
}
"""Questions about the person of the question before."""

ANSWERS: dict[str, str] = {
    "city": "{name} lives in {value}.",
    "job": "{name} is {article}.",
    "pet": "{name} has {article}.",
    "food": "{name} likes {value}.",
    "friend": "{name}'s friend is {value}.",
}
"""The one answer to each question, which also is the first of NAMED."""

CHECKS: dict[str, tuple[str, ...]] = {
    "city": ("Does {name} live in {value}?", "Is {name}'s home in {value}?", "Is the home of {name} in {value}?"),
    "job": ("Is {name} {article}?", "Does {name} work as {article}?", "Does {name} have a job as {article}?"),
    "pet": ("Does {name} have {article}?", "Is {name}'s pet {article}?", "Is the pet of {name} {article}?"),
    "food": ("Does {name} like {value}?", "Does {name} like to eat {value}?", "Is {name}'s favourite food {value}?"),
    "friend": ("Is {value} {name}'s friend?", "Is {value} the friend of {name}?", "Is {name}'s friend {value}?"),
}
"""Questions that "yes" or "no" answers."""


def fill(template: str, person: Person, attribute: str, value: str | None = None) -> str:
    """The template about `person`, with their own value of `attribute` or, for a question, another `value`."""
    value = value or value_of(person, attribute)
    return template.format(
        name=person.name,
        value=value,
        article=with_article(value),
        she=person.pronoun,
        She=person.pronoun.capitalize(),
        her=person.possessive,
        Her=person.possessive.capitalize(),
    )


def answer(person: Person, attribute: str) -> str:
    """The full answer to any question for this attribute: `Anna lives in Porto.`"""
    return fill(ANSWERS[attribute], person, attribute)


def checked(person: Person, attribute: str, value: str) -> str:
    """The answer to a yes-or-no question about `value`: `No, Anna lives in Porto.`"""
    return ("Yes, " if value == value_of(person, attribute) else "No, ") + answer(person, attribute)


def other_value(rng: random.Random, person: Person, attribute: str, names: list[str]) -> str:
    """A random value of the attribute that is not the person's own; `names`: everybody, as friends to choose from."""
    wrong = [value for value in VALUES.get(attribute, names) if value not in (value_of(person, attribute), person.name)]
    return rng.choice(wrong)
