"""Short tasks with one right answer each, the content of the chats: about words, numbers, lists, sentences.

Each function draws one exercise of its kind. `known` and `new` say to which split it may go: what is held out is the
combination that it asks about, so an exercise of validation cannot be answered by having seen it.
"""

import random
from collections.abc import Iterable
from typing import NamedTuple

from jaxstages.world import knowledge
from jaxstages.world.knowledge import CATEGORIES, NUMBERS, OPPOSITES, PLURALS, noun_phrase
from jaxstages.world.people import CITIES, FOODS, MEN, PETS, WOMEN, with_article
from jaxstages.world.split import held_out

ONE_IN = knowledge.ONE_IN

OPPOSITE_REQUESTS = (
    "What is the opposite of {word}?",
    "The opposite of {word}, please.",
    "Say the opposite of {word}.",
    "Which word is the opposite of {word}?",
    "What is the opposite of the word {word}?",
    "Answer with the opposite: {word}",
    "Find the opposite of {word}.",
    "{word}: what is the opposite?",
)
PLURAL_REQUESTS = (
    "What is the plural of {word}?",
    "The plural of {word}, please.",
    "Say the plural of {word}.",
    "One {word}, two what?",
    "Find the plural of {word}.",
    "{word}: what is the plural?",
)
CATEGORY_REQUESTS = ("Is {word} {first} or {second}?", "Which is right: is {word} {first} or {second}?")
PICK_REQUESTS = (
    "What is the {which} word of this list: {words}?",
    "Which word is the {which} in this list: {words}?",
    "Say the {which} word: {words}",
)
REVERSE_REQUESTS = (
    "Say this list in reverse: {words}",
    "Reverse this list: {words}",
    "What is the reverse of this list: {words}?",
)
ODD_REQUESTS = (
    "Which word does not go with the other words: {words}?",
    "Find the word that is not like the other words: {words}",
    "One word is not like the other words. Which one: {words}?",
)
COUNT_REQUESTS = (
    "How many words are in this list: {words}?",
    "Count the words: {words}",
    "How many words are there: {words}?",
)
SUM_REQUESTS = ("What is {first} plus {second}?", "How many are {first} and {second}?", "Find {first} plus {second}.")
AFTER_REQUESTS = ("What comes after {word}?", "Which number comes after {word}?", "Say the number after {word}.")
BEFORE_REQUESTS = ("What comes before {word}?", "Which number comes before {word}?", "Say the number before {word}.")
REPEAT_REQUESTS = ("Say {word} {times} times.", "Repeat {word} {times} times.", "Write {word} {times} times, please.")

REMEMBERED: dict[str, tuple[str, str, str]] = {
    "name": ("My name is {value}.", "What is my name?", "Your name is {value}."),
    "city": ("I live in {value}.", "Where do I live?", "You live in {value}."),
    "colour": ("My favourite colour is {value}.", "What is my favourite colour?", "Your favourite colour is {value}."),
    "pet": ("My pet is {value}.", "What is my pet?", "Your pet is {value}."),
    "food": ("My favourite food is {value}.", "What is my favourite food?", "Your favourite food is {value}."),
}
"""What a user may tell: (telling, asking, answer)."""

ACKNOWLEDGED = "Thank you. I will remember."


class Exercise(NamedTuple):
    """turns: what user and assistant say, in turns, the user first.  known: fit for training.  new: for validation.

    system: what a system message says before the first turn, or None.
    """

    turns: tuple[str, ...]
    known: bool
    new: bool
    system: str | None = None


def assigned(turns: Iterable[str], unseen: bool, system: str | None = None) -> Exercise:
    """An exercise that belongs to validation if `unseen`, and else to training."""
    return Exercise(tuple(turns), known=not unseen, new=unseen, system=system)


def opposite(rng: random.Random) -> Exercise:
    """`What is the opposite of big?`: small. Held out: a word with a wording."""
    word, request = rng.choice(rng.choice(OPPOSITES)), rng.choice(OPPOSITE_REQUESTS)
    unseen = held_out(ONE_IN, "opposite", word, request)
    return assigned((request.format(word=word), f"The opposite of {word} is {knowledge.opposite(word)}."), unseen)


def plural(rng: random.Random) -> Exercise:
    """`What is the plural of mouse?`: mice. Held out: a word with a wording."""
    word, request = rng.choice(tuple(PLURALS)), rng.choice(PLURAL_REQUESTS)
    unseen = held_out(ONE_IN, "plural", word, request)
    return assigned((request.format(word=word), f"The plural of {word} is {PLURALS[word]}."), unseen)


def category(rng: random.Random) -> Exercise:
    """`Is a cat an animal or a food?`. Held out: a word with a wrong category."""
    word = rng.choice(CATEGORIES[rng.choice(tuple(CATEGORIES))])
    right = knowledge.category(word)
    wrong = rng.choice([name for name in CATEGORIES if name != right])
    first, second = (with_article(name) for name in rng.sample((right, wrong), 2))
    request = rng.choice(CATEGORY_REQUESTS).format(word=noun_phrase(word), first=first, second=second)
    return assigned((request, knowledge.category_statement(word)), held_out(ONE_IN, "category", word, wrong))


def pick(rng: random.Random) -> Exercise:
    """The first, second or last word of a list."""
    words = knowledge.draw_list(rng, 3, 4)
    which, place = rng.choice((("first", 0), ("second", 1), ("last", -1)))
    return _about_list(rng, PICK_REQUESTS, words, words[place], which)


def reverse(rng: random.Random) -> Exercise:
    """A list of three or four words from its end."""
    words = knowledge.draw_list(rng, 3, 4)
    return _about_list(rng, REVERSE_REQUESTS, words, ", ".join(reversed(words)))


def count(rng: random.Random) -> Exercise:
    """How many words a list has, two to six."""
    words = knowledge.draw_list(rng, 2, 6)
    return _about_list(rng, COUNT_REQUESTS, words, NUMBERS[len(words) - 1])


def odd(rng: random.Random) -> Exercise:
    """The one word of four that is of another category."""
    common, other = rng.sample(tuple(CATEGORIES), 2)
    stranger = rng.choice(CATEGORIES[other])
    words = [*rng.sample(CATEGORIES[common], 3), stranger]
    rng.shuffle(words)
    return _about_list(rng, ODD_REQUESTS, tuple(words), stranger)


def number(rng: random.Random) -> Exercise:
    """A sum up to twenty, or the number before or after another. Held out: two summands; a number with a wording."""
    if rng.random() < 0.5:
        total = rng.randint(2, 20)
        first = rng.randint(1, total - 1)
        unseen = any(held_out(ONE_IN, *combination) for combination in knowledge.sum_combinations(first, total - first))
        request = rng.choice(SUM_REQUESTS).format(first=NUMBERS[first - 1], second=NUMBERS[total - first - 1])
        return assigned((request, NUMBERS[total - 1]), unseen)
    low = rng.randint(1, 19)
    after = rng.random() < 0.5
    request = rng.choice(AFTER_REQUESTS if after else BEFORE_REQUESTS)
    word, answer = (NUMBERS[low - 1], NUMBERS[low]) if after else (NUMBERS[low], NUMBERS[low - 1])
    return assigned((request.format(word=word), answer), held_out(ONE_IN, "next", word, request))


def repeat(rng: random.Random) -> Exercise:
    """`Say cat three times.`: cat cat cat. Held out: a word with a number of times."""
    word, times = rng.choice(CATEGORIES[rng.choice(tuple(CATEGORIES))]), rng.randint(2, 4)
    request = rng.choice(REPEAT_REQUESTS).format(word=word, times=NUMBERS[times - 1])
    return assigned((request, " ".join([word] * times)), held_out(ONE_IN, "repeat", word, str(times)))


def remember(rng: random.Random) -> Exercise:
    """The user tells two or three things in turns and asks for one of them. Held out: the things told, together."""
    values = {
        "name": rng.choice(WOMEN + MEN),
        "city": rng.choice(CITIES),
        "colour": rng.choice(knowledge.COLOURS),
        "pet": with_article(rng.choice(PETS)),
        "food": rng.choice(FOODS),
    }
    topics = rng.sample(tuple(REMEMBERED), rng.randint(2, 3))
    turns: list[str] = []
    for topic in topics:
        turns += [REMEMBERED[topic][0].format(value=values[topic]), ACKNOWLEDGED]
    topic = rng.choice(topics)
    turns += [REMEMBERED[topic][1], REMEMBERED[topic][2].format(value=values[topic])]
    return assigned(turns, held_out(ONE_IN, "remember", *(values[topic] for topic in topics)))


def _about_list(
    rng: random.Random, requests: tuple[str, ...], words: tuple[str, ...], answer: str, which: str = ""
) -> Exercise:
    """A request about a list, which is held out as a whole, whatever is asked about it."""
    unseen = any(held_out(ONE_IN, *combination) for combination in knowledge.list_combinations(words))
    return assigned((rng.choice(requests).format(words=", ".join(words), which=which), answer), unseen)
