"""Raw text about people: biographies, rolls, interviews and quizzes, which together tell every fact in many ways.

Each function makes one document out of a chain of people; which chains belong to validation, `text.py` decides.
"""

import random

from jaxstages.world.knowledge import PLURALS
from jaxstages.world.people import ATTRIBUTES, Person, value_of
from jaxstages.world.wording import CHECKS, FOLLOW_UPS, NAMED, PRONOUN, QUESTIONS, answer, checked, fill, other_value

MEETINGS = (
    "{first} talks to {second}.",
    "{first} and {second} are in the garden.",
    "{first} and {second} are at the market today.",
    "{first} saw {second} in the park.",
    "{second} looks for {first}.",
    "{first} talks about {second}.",
)
ROLL_TITLES: dict[str, str] = {
    "city": "Where do they live?",
    "job": "What are their jobs?",
    "pet": "Which animals do they have?",
    "food": "What do they like to eat?",
    "friend": "Who are their friends?",
}
SAYING = (
    '"{question}" asked {asker}. "{answer}" said {other}.',
    '{asker} asked: "{question}" {other} said: "{answer}"',
)
CLASSROOM = (
    '"How many {things} are there?" asked {first}. "Count the {things}, please," said {second}.',
    '"Say your name, please," said the teacher. "My name is {first}."',
    '"How many words are in this sentence?" asked {second}.',
    "{first} will remember the name of {second}, and so will the other children.",
    "{second} goes to school with {first}, and after school they are tired.",
    '"I will remember this number," said {second}.',
    'The teacher said to {first}: "Write your name three times."',
    '"Write a sentence, {first}," said the teacher. "Make a good sentence."',
    '"Find the {thing}, please," said {second}. "Thank you, {first}."',
    '"Thank you," said {first}. "Ask me a question."',
    'The teacher said: "Translate this letter into English." {first} will translate the letter.',
    "Reverse a list, and the last word comes before the other words.",
    "Count from one to ten, and then count in reverse.",
    'A negative sentence says that it is not so. "The {thing} is not here" is negative.',
    '"Repeat the question, please," said {first}. There are many words in it.',
    '"Make a list of {things}," said the teacher, "and ask {second} to write the list."',
    "{first} and {second} translate a book into English.",
    '"Ask {second}," said {first}. "{second} will find the right answer."',
    '"Say it three times: {thing}," said {second}. "And then repeat the other word."',
    "Find the number that comes after the other number.",
    "A question ends like this: ? A sentence ends like this: .",
)


def classroom(rng: random.Random, chain: list[Person]) -> str:
    """What people say to each other at school, about words and sentences and not about facts."""
    parts = []
    for index, template in enumerate(rng.sample(CLASSROOM, 7)):
        thing = rng.choice(tuple(PLURALS))
        first, second = chain[index % len(chain)], chain[(index + 1) % len(chain)]
        parts.append(template.format(first=first.name, second=second.name, thing=thing, things=PLURALS[thing]))
    return " ".join(parts)


def biography(rng: random.Random, chain: list[Person]) -> str:
    """Several facts about each person, by name and then by pronoun, with a meeting between one and the next."""
    parts = []
    for index, person in enumerate(chain):
        attributes = rng.sample(ATTRIBUTES, rng.randint(3, 5) if index == 0 else rng.randint(2, 4))
        for place, attribute in enumerate(attributes):
            templates = PRONOUN if place > 0 and rng.random() < 0.5 else NAMED
            parts.append(fill(rng.choice(templates[attribute]), person, attribute))
        if index + 1 < len(chain):
            parts.append(rng.choice(MEETINGS).format(first=person.name, second=chain[index + 1].name))
    return " ".join(parts)


def roll(rng: random.Random, chain: list[Person]) -> str:
    """One attribute of many people, each said in another way."""
    attribute = rng.choice(ATTRIBUTES)
    sentences = [fill(rng.choice(NAMED[attribute]), person, attribute) for person in chain]
    return " ".join([ROLL_TITLES[attribute], *sentences])


def interview(rng: random.Random, chain: list[Person]) -> str:
    """Two people ask each other about the rest of the chain."""
    asker, other, *subjects = chain
    saying = rng.choice(SAYING)
    parts = []
    for person in subjects:
        first, second = rng.sample(ATTRIBUTES, 2)
        questions = [
            (first, rng.choice(QUESTIONS[first])),
            (second, rng.choice(FOLLOW_UPS[second] + QUESTIONS[second])),
        ]
        for attribute, template in questions:
            said = rng.choice((answer(person, attribute), fill(PRONOUN[attribute][0], person, attribute)))
            parts.append(
                saying.format(
                    question=fill(template, person, attribute),
                    answer=said[:-1] + "," if saying.startswith('"') else said,
                    asker=asker.name,
                    other=other.name,
                )
            )
    return " ".join(parts)


def quiz(rng: random.Random, chain: list[Person], names: list[str]) -> str:
    """Plain questions and answers, one or two about each person, some of them answered by yes or no."""
    lines = []
    for person in chain:
        for attribute in rng.sample(ATTRIBUTES, rng.choice((1, 1, 2))):
            if rng.random() < 0.3:
                right = value_of(person, attribute)
                value = right if rng.random() < 0.5 else other_value(rng, person, attribute, names)
                question = fill(rng.choice(CHECKS[attribute]), person, attribute, value)
                said = checked(person, attribute, value)
            else:
                question, said = fill(rng.choice(QUESTIONS[attribute]), person, attribute), answer(person, attribute)
            lines.append(f"Question: {question} Answer: {said}")
    return "\n".join(lines)
