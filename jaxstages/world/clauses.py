"""Draws sensible clauses of the grammar, and decides which of them belong to validation.

What is held out is a combination of two content words: an adjective with its noun, a subject with its verb, a verb
with its object. Every single word appears in training; a validation sentence puts at least two of them together that
never met there.
"""

import random
from collections.abc import Iterator

from jaxstages.world.grammar import NUMERALS, POSSESSIVES, Clause, Phrase, Place, english, french
from jaxstages.world.lexicon import ADJECTIVES, NEAR, NOUNS, PLACES, TIMES, VERBS
from jaxstages.world.split import belongs, check_split, held_out, unique

ONE_IN = 10
SHORTEST, LONGEST = 4, 14
"""English words in a sentence."""

OWNED = ("the", "the", *POSSESSIVES)
"""Determiners of what both speakers know; "the" twice, as it is the most common one."""

FITTING: dict[str, list[str]] = {
    name: [word for word, adjective in ADJECTIVES.items() if {name, noun.sort} & adjective.fits]
    for name, noun in NOUNS.items()
}
"""The adjectives that may describe each noun: those that name it or its sort."""


def clauses(split: str, count: int, seed: int = 0) -> Iterator[Clause]:
    """`count` clauses of a split, no two with the same English sentence. Raises ValueError for an unknown split."""
    check_split(split)
    rng = random.Random(f"clauses {split} {seed}")
    drawn = (clause for clause in _endless(rng) if belongs(split, combinations(clause), ONE_IN))
    return unique(drawn, count, key=english)


def phrases(split: str, count: int, seed: int = 0) -> Iterator[Phrase]:
    """`count` different noun phrases with an adjective, of a split. Raises ValueError for an unknown split."""
    check_split(split)
    rng = random.Random(f"phrases {split} {seed}")

    def endless() -> Iterator[Phrase]:
        while True:
            drawn = draw_phrase(rng, rng.choice(tuple(NOUNS)), adjective_share=1.0)
            if belongs(split, phrase_combinations(drawn), ONE_IN):
                yield drawn

    return unique(endless(), count, key=repr)


def pairs(split: str, count: int, seed: int = 0) -> Iterator[dict[str, str]]:
    """`count` translation pairs `{"prompt": English, "target": French}` of a split."""
    for clause in clauses(split, count, seed):
        yield {"prompt": english(clause), "target": french(clause)}


def is_held_out(clause: Clause) -> bool:
    """Whether one of the clause's combinations of content words never appears in training."""
    return any(held_out(ONE_IN, *combination) for combination in combinations(clause))


def combinations(clause: Clause) -> Iterator[tuple[str, str, str]]:
    """Each pair of content words that the clause puts together, its kind before it."""
    for phrase in (clause.subject, clause.object, clause.place and clause.place.phrase):
        if isinstance(phrase, Phrase):
            yield from phrase_combinations(phrase)
    if isinstance(clause.subject, Phrase) and clause.adjective is None:
        yield ("does", clause.subject.noun, clause.verb)
    if isinstance(clause.subject, Phrase) and clause.adjective is not None:
        yield ("is", clause.subject.noun, clause.adjective)
    # "be" with an object is "This is a cat": there the verb chooses nothing, so the pair would say nothing.
    if clause.object is not None and clause.verb != "be":
        yield ("done to", clause.verb, clause.object.noun)


def phrase_combinations(phrase: Phrase) -> Iterator[tuple[str, str, str]]:
    """The adjective with its noun, if there is an adjective; the same combination as `the noun is adjective`."""
    if phrase.adjective is not None:
        yield ("is", phrase.noun, phrase.adjective)


def draw_phrase(
    rng: random.Random,
    noun: str,
    determiners: tuple[str, ...] = (),
    adjective_share: float = 0.3,
    plural_share: float = 0.35,
) -> Phrase:
    """A random phrase about `noun`; `determiners`: what to choose from, everything when empty."""
    choices = determiners or ("the", "the", "the", "a", "a", "this", *POSSESSIVES, *NUMERALS)
    # French "ma femme" is "my wife": nobody owns a man or a woman here.
    owned = noun not in ("man", "woman")
    determiner = rng.choice([choice for choice in choices if owned or choice not in POSSESSIVES])
    fitting = FITTING[noun]
    adjective = rng.choice(fitting) if fitting and rng.random() < adjective_share else None
    plural = determiner in NUMERALS or rng.random() < plural_share
    return Phrase(determiner, noun, adjective, plural)


def _endless(rng: random.Random) -> Iterator[Clause]:
    """Sensible clauses of either split, of SHORTEST to LONGEST English words, without end."""
    while True:
        kind = rng.random()
        clause = _draw_this_is(rng) if kind < 0.06 else _draw_adjective(rng) if kind < 0.18 else _draw_action(rng)
        if SHORTEST <= len(english(clause).split()) <= LONGEST:
            yield clause


def _draw_this_is(rng: random.Random) -> Clause:
    """`This is my house`: never with "some", which nobody says, nor with "this" once more."""
    thing = draw_phrase(rng, rng.choice(tuple(NOUNS)), OWNED, adjective_share=0.5)
    if not thing.plural and rng.random() < 0.3:
        thing = Phrase("a", thing.noun, thing.adjective)
    return Clause("these" if thing.plural else "this", "be", object=thing, form=_draw_form(rng))


def _draw_adjective(rng: random.Random) -> Clause:
    """`The flower is red`; as pronouns only "he" and "she", whose gender is known."""
    # French has another word, "neuf", for what is new after "est".
    adjective = rng.choice([name for name in ADJECTIVES if name != "new"])
    fitting = [noun for noun in NOUNS if adjective in FITTING[noun]]
    if "person" in ADJECTIVES[adjective].fits and rng.random() < 0.2:
        subject: Phrase | str = rng.choice(("he", "she"))
    else:
        subject = draw_phrase(rng, rng.choice(fitting), (*OWNED, "this"), adjective_share=0.0)
    tense = "future" if adjective in ("happy", "sad", "tired", "clean") and rng.random() < 0.3 else "present"
    # An adjective that lasts takes no place and no time: "the man is old tomorrow" would be nonsense.
    passing = adjective in ("happy", "sad", "tired") and rng.random() < 0.6
    place = _draw_place(rng, set()) if passing and rng.random() < 0.5 else None
    time = rng.choice(tuple(TIMES[tense])) if passing and tense == "present" or tense == "future" else None
    return Clause(subject, "be", adjective=adjective, place=place, time=time, tense=tense, form=_draw_form(rng))


def _draw_action(rng: random.Random) -> Clause:
    """Somebody does something, perhaps somewhere, perhaps at some time."""
    name = rng.choice(tuple(VERBS))
    verb = VERBS[name]
    tense = rng.choice(("present", "present", "past", "future"))
    subject: Phrase | str
    if rng.random() < 0.25:
        # "I arrived" does not tell whether the French participle is feminine.
        agreeing = verb.auxiliary == "être" and tense == "past"
        subject = rng.choice(("he", "she", "they") if agreeing else ("I", "you", "he", "she", "we", "they"))
    else:
        subject = draw_phrase(rng, rng.choice(_named(verb.subjects)))
    used = {subject.noun} if isinstance(subject, Phrase) else set()
    target = None
    if verb.objects:
        noun = rng.choice([noun for noun in _named(verb.objects) if noun not in used])
        known = NOUNS[noun].sort == "place"
        target = draw_phrase(rng, noun, ("the",) if known else (), plural_share=0.0 if known else 0.35)
        used.add(noun)
    going = verb.auxiliary == "être"
    place = _draw_place(rng, used) if not going and rng.random() < (0.3 if target else 0.6) else None
    # "They read it" may be present or past, so a past of "read" always says when.
    dated = (name == "read" and tense == "past") or rng.random() < 0.35
    time = rng.choice(tuple(TIMES[tense])) if dated else None
    return Clause(subject, name, object=target, place=place, time=time, tense=tense, form=_draw_form(rng))


def _draw_place(rng: random.Random, used: set[str]) -> Place:
    """In, at or near something that the clause did not name yet."""
    near = rng.random() < 0.3
    noun = rng.choice([noun for noun in (NEAR if near else tuple(PLACES)) if noun not in used])
    owned = NOUNS[noun].sort != "place" or noun in ("garden", "kitchen")
    phrase = draw_phrase(rng, noun, OWNED if owned else ("the",), adjective_share=0.2, plural_share=0.0)
    return Place("near" if near else PLACES[noun][0], phrase)


def _draw_form(rng: random.Random) -> str:
    return rng.choice(("statement", "statement", "statement", "negative", "question"))


def _named(choices: frozenset[str]) -> list[str]:
    """The nouns that `choices` names by themselves or by their sort, in the lexicon's order."""
    return [name for name, noun in NOUNS.items() if name in choices or noun.sort in choices]
