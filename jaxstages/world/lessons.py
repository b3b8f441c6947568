"""Raw text about words: school lessons on categories, opposites, plurals, numbers and lists, and French glossaries.

Each function draws one document as (text, combinations); `text.py` keeps those whose combinations suit the split.
"""

import itertools
import random
from typing import NamedTuple

from jaxstages.world import knowledge
from jaxstages.world.clauses import ONE_IN, draw_phrase, phrase_combinations
from jaxstages.world.grammar import Clause, Phrase, Place, english, english_phrase, french, french_phrase, french_place
from jaxstages.world.knowledge import CATEGORIES, NUMBERS, OPPOSITES, PLURALS, noun_phrase
from jaxstages.world.lexicon import NOUNS, PLACES, VERBS
from jaxstages.world.people import with_article
from jaxstages.world.split import held_out

SPEAKERS = ("I", "you", "he", "she", "we", "they")
CONJUGATED = ("{english} is {french} in French.", "In French, {english} is {french}.", "{english}: {french}.")


class Draft(NamedTuple):
    """A document that is not assigned to a split yet.

    unseen: whether one of its combinations is held out from training.
    """

    text: str
    unseen: bool


def words(rng: random.Random) -> Draft:
    """Categories, opposites and plurals of several words; its combinations are the words that follow each other."""
    drawn, parts = [], []
    topics = rng.sample(("category", "opposite", "plural"), 2)
    for _ in range(rng.randint(7, 9)):
        topic = rng.choice(topics)
        word, text = {"category": _category, "opposite": _opposite, "plural": _plural}[topic](rng)
        drawn.append(word)
        parts.append(text)
    neighbours = itertools.pairwise(drawn)
    return Draft(" ".join(parts), any(held_out(5 * ONE_IN, "neighbours", *pair) for pair in neighbours))


def numbers(rng: random.Random) -> Draft:
    """Counting up, what comes before and after, and sums."""
    start, length = rng.randint(1, 14), rng.randint(4, 6)
    parts = [", ".join(NUMBERS[start - 1 : start - 1 + length]) + "."]
    unseen = False
    for _ in range(rng.randint(5, 7)):
        if rng.random() < 0.35:
            low = rng.randint(1, 19)
            before, after = NUMBERS[low - 1], NUMBERS[low]
            parts.append(rng.choice((f"After {before} comes {after}.", f"Before {after} comes {before}.")))
            continue
        total = rng.randint(2, 20)
        first = rng.randint(1, total - 1)
        a, b, c = NUMBERS[first - 1], NUMBERS[total - first - 1], NUMBERS[total - 1]
        unseen |= any(
            held_out(knowledge.ONE_IN, *combination) for combination in knowledge.sum_combinations(first, total - first)
        )
        parts.append(rng.choice((f"What is {a} plus {b}? It is {c}.", f"{a} plus {b} is {c}.")))
    return Draft(" ".join(parts), unseen)


def lists(rng: random.Random) -> Draft:
    """Lists in order: the first word, the last word, how many, the list from the end."""
    parts, unseen = [], False
    for _ in range(4):
        items = knowledge.draw_list(rng, 3, 4)
        unseen |= any(held_out(knowledge.ONE_IN, *combination) for combination in knowledge.list_combinations(items))
        place = rng.randrange(len(items))
        statements = [
            f"The {knowledge.ORDINALS[place]} word is {items[place]}.",
            f"The last word is {items[-1]}.",
            f"There are {NUMBERS[len(items) - 1]} words.",
            f"In reverse it is: {', '.join(reversed(items))}.",
        ]
        parts.append(f"This is a list: {', '.join(items)}. " + " ".join(rng.sample(statements, 2)))
    return Draft(" ".join(parts), unseen)


def glossary(rng: random.Random) -> Draft:
    """French for words, noun phrases, places and short verb forms, never for a whole sentence with an object."""
    form = rng.choice(("In French, {english} is {french}.", "{english}: {french}", "{english} is {french} in French."))
    entries, unseen = [], False
    for _ in range(rng.randint(8, 10)):
        kind = rng.random()
        if kind < 0.6:
            phrase = draw_phrase(rng, rng.choice(tuple(NOUNS)), adjective_share=0.7)
            unseen |= any(held_out(ONE_IN, *combination) for combination in phrase_combinations(phrase))
            pair = english_phrase(phrase), french_phrase(phrase)
        elif kind < 0.7:
            noun = rng.choice(tuple(PLACES))
            place = Place(PLACES[noun][0], Phrase("the", noun))
            pair = f"{place.preposition} {english_phrase(place.phrase)}", french_place(place)
        else:
            pair = _random_verb_form(rng)
        entries.append(form.format(english=pair[0], french=pair[1]))
    return Draft(("\n" if form.startswith("{english}:") else " ").join(entries), unseen)


def conjugation(rng: random.Random) -> Draft:
    """One verb with every pronoun, in one tense, said or denied. Nothing in it is ever held out."""
    verb = rng.choice(tuple(VERBS))
    tense = _tense(rng, verb)
    form = rng.choice(("statement", "statement", "negative"))
    between = rng.choice(CONJUGATED)
    pronouns = [pronoun for pronoun in SPEAKERS if _is_clear(verb, tense, pronoun)]
    rng.shuffle(pronouns)
    entries = [(f"to {_bare(verb)}", VERBS[verb].infinitive)]
    entries += [_verb_form(verb, pronoun, tense, form) for pronoun in pronouns]
    return Draft(" ".join(between.format(english=first, french=second) for first, second in entries), False)


def _random_verb_form(rng: random.Random) -> tuple[str, str]:
    """A pronoun with a verb and nothing after it, or the two infinitives."""
    verb = rng.choice(tuple(VERBS))
    if rng.random() < 0.2:
        return f"to {_bare(verb)}", VERBS[verb].infinitive
    tense = _tense(rng, verb)
    pronoun = rng.choice([pronoun for pronoun in SPEAKERS if _is_clear(verb, tense, pronoun)])
    return _verb_form(verb, pronoun, tense, rng.choice(("statement", "statement", "negative")))


def _verb_form(verb: str, pronoun: str, tense: str, form: str) -> tuple[str, str]:
    """("she eats", "elle mange"): no capital, no full stop, no preposition at the end."""
    clause = Clause(pronoun, verb, tense=tense, form=form)
    link = VERBS[verb].link
    text = english(clause)[:-1].removesuffix(f" {link[0]}" if link else "")
    return text if pronoun == "I" else text[0].lower() + text[1:], french(clause)[:-1].lower()


def _tense(rng: random.Random, verb: str) -> str:
    """A tense that the English form shows: "I read" is taken for the present."""
    return rng.choice(("present", "future") if verb == "read" else ("present", "present", "past", "future"))


def _is_clear(verb: str, tense: str, pronoun: str) -> bool:
    """Whether the English form has one French form: "I arrived" leaves open whether he or she speaks."""
    return tense != "past" or VERBS[verb].auxiliary != "être" or pronoun in ("he", "she", "they")


def _bare(verb: str) -> str:
    """The English infinitive without the preposition of its object: `talk` for "talk to", but `look for`."""
    return verb.split()[0] if VERBS[verb].link else verb


def _category(rng: random.Random) -> tuple[str, str]:
    word = rng.choice(CATEGORIES[rng.choice(tuple(CATEGORIES))])
    right = knowledge.category(word)
    wrong = rng.choice([name for name in CATEGORIES if name != right])
    first, second = rng.sample((right, wrong), 2)
    statement = knowledge.category_statement(word)
    question = f"Is {noun_phrase(word)} {with_article(first)} or {with_article(second)}?"
    return word, rng.choice((statement, statement, f"{question} {statement}"))


def _opposite(rng: random.Random) -> tuple[str, str]:
    word = rng.choice(rng.choice(OPPOSITES))
    other = knowledge.opposite(word)
    statement = f"The opposite of {word} is {other}."
    return word, rng.choice((statement, statement, f"What is the opposite of {word}? {statement}"))


def _plural(rng: random.Random) -> tuple[str, str]:
    word = rng.choice(tuple(PLURALS))
    many = PLURALS[word]
    statement = f"The plural of {word} is {many}."
    return word, rng.choice(
        (statement, f"One {word}, {rng.choice(NUMBERS[1:5])} {many}.", f"What is the plural of {word}? {statement}")
    )
