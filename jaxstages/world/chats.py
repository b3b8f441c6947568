"""The chats for instruction tuning: twenty-one kinds of request, each with one right and short answer.

About facts, training asks only what `question_is_held_out` leaves; validation asks only the rest, so it measures what
was learnt from raw text. In the other kinds validation asks about combinations that training never asked about.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import replace

from jaxstages.world import exercises, smalltalk
from jaxstages.world.clauses import ONE_IN, clauses, combinations, phrase_combinations, phrases
from jaxstages.world.exercises import Exercise, assigned
from jaxstages.world.grammar import Clause, Phrase, english, english_phrase, french, french_phrase
from jaxstages.world.people import ATTRIBUTES, Person, people, question_is_held_out, value_of
from jaxstages.world.split import check_split, held_out, unique
from jaxstages.world.wording import CHECKS, FOLLOW_UPS, QUESTIONS, answer, checked, fill, other_value

Message = dict[str, str]
Chat = dict[str, str | list[Message]]
Drawer = Callable[[random.Random], Exercise]

COUNTS: dict[str, dict[str, int]] = {
    "train": {
        "fact": 850,
        "fact_yes_no": 2000,
        "two_turn_fact": 2000,
        "translate": 1500,
        "translate_phrase": 500,
        "rewrite": 1400,
        "opposite": 160,
        "plural": 190,
        "category": 400,
        "pick": 1000,
        "reverse": 1000,
        "odd": 900,
        "count": 400,
        "number": 500,
        "repeat": 400,
        "remember": 1200,
        "greeting": 240,
        "thanks": 50,
        "identity": 120,
        "unknown": 400,
        "conversation": 600,
    },
    "validation": {
        "fact": 60,
        "fact_yes_no": 60,
        "two_turn_fact": 60,
        "translate": 60,
        "translate_phrase": 40,
        "rewrite": 32,
        "opposite": 25,
        "plural": 28,
        "category": 28,
        "pick": 32,
        "reverse": 28,
        "odd": 32,
        "count": 25,
        "number": 30,
        "repeat": 25,
        "remember": 40,
        "greeting": 25,
        "thanks": 8,
        "identity": 16,
        "unknown": 40,
        "conversation": 40,
    },
}
"""Chats of each kind in each split."""

KINDS = tuple(COUNTS["train"])
FACT_KINDS = ("fact", "fact_yes_no", "two_turn_fact")

TRANSLATE_REQUESTS = (
    "Translate into French: {text}",
    "Say this in French: {text}",
    "What is this in French? {text}",
    "Write this sentence in French: {text}",
)
TRANSLATOR = "You translate English into French."
PHRASE_REQUESTS = ("What is {text} in French?", "Say in French: {text}", "Translate into French: {text}")
REWRITE_REQUESTS: dict[str, tuple[str, ...]] = {
    "negative": ("Make this sentence negative: {text}", "Say that this is not so: {text}"),
    "question": ("Make this sentence a question: {text}", "Ask this as a question: {text}"),
}
LONGEST_SENTENCE = 9
"""English words of a sentence in a chat, so that every answer stays short."""
LONGEST_ANSWER = 14


def chats(split: str, seed: int = 0) -> Iterator[Chat]:
    """All different chats of a split, `{"messages": [{"role", "content"}, ...], "kind"}`, the kinds mixed.

    Raises ValueError for an unknown split.
    """
    check_split(split)
    mixed = [kind for kind, number in COUNTS[split].items() for _ in range(number)]
    random.Random(f"chats order {split} {seed}").shuffle(mixed)
    drawn = {kind: _of_kind(kind, split, seed) for kind in KINDS}
    for kind in mixed:
        yield next(drawn[kind])


def _of_kind(kind: str, split: str, seed: int) -> Iterator[Chat]:
    """As many different chats of one kind as COUNTS says."""
    rng = random.Random(f"chats {kind} {split} {seed}")
    draw = _drawers(split, seed)[kind]

    def endless() -> Iterator[Chat]:
        while True:
            exercise = draw(rng)
            if exercise.new if split == "validation" else exercise.known:
                yield {"messages": _messages(exercise), "kind": kind}

    return unique(endless(), COUNTS[split][kind], key=lambda chat: repr(chat["messages"]))


def _messages(exercise: Exercise) -> list[Message]:
    before = [] if exercise.system is None else [{"role": "system", "content": exercise.system}]
    roles = ("user", "assistant")
    return before + [{"role": roles[index % 2], "content": text} for index, text in enumerate(exercise.turns)]


def _drawers(split: str, seed: int) -> dict[str, Drawer]:
    """How to draw an exercise of each kind. Sentences come from the grammar, already of the right split."""
    everybody = people()
    # A seed of its own for each use, so that the chats do not walk through the pairs in their order.
    sentences = (clause for clause in clauses(split, 200_000, seed + 1000) if _is_short(clause))
    statements = (
        clause for clause in clauses(split, 200_000, seed + 2000) if _is_short(clause) and clause.form == "statement"
    )
    nouns = phrases(split, COUNTS[split]["translate_phrase"], seed + 1000)
    drawers: dict[str, Drawer] = {
        "fact": lambda rng: _fact(rng, everybody),
        "fact_yes_no": lambda rng: _fact_yes_no(rng, everybody),
        "two_turn_fact": lambda rng: _two_turn_fact(rng, everybody),
        "translate": lambda rng: _translate(rng, next(sentences)),
        "translate_phrase": lambda rng: _translate_phrase(rng, next(nouns)),
        "rewrite": lambda rng: _rewrite(rng, next(statements)),
        "opposite": exercises.opposite,
        "plural": exercises.plural,
        "category": exercises.category,
        "pick": exercises.pick,
        "reverse": exercises.reverse,
        "odd": exercises.odd,
        "count": exercises.count,
        "number": exercises.number,
        "repeat": exercises.repeat,
        "remember": exercises.remember,
        "greeting": smalltalk.greeting,
        "thanks": smalltalk.thanks,
        "identity": smalltalk.identity,
        "unknown": smalltalk.unknown,
    }
    # Any of them but those that have turns of their own, or a system message.
    parts = [drawers[kind] for kind in KINDS if kind in drawers and kind not in ("two_turn_fact", "remember")]
    return drawers | {"conversation": lambda rng: _conversation(rng, parts)}


def _fact(rng: random.Random, everybody: tuple[Person, ...]) -> Exercise:
    """`Where does Anna live?`"""
    person, attribute = rng.choice(everybody), rng.choice(ATTRIBUTES)
    question = fill(rng.choice(QUESTIONS[attribute]), person, attribute)
    return assigned((question, answer(person, attribute)), question_is_held_out(person, attribute))


def _fact_yes_no(rng: random.Random, everybody: tuple[Person, ...]) -> Exercise:
    """`Does Anna live in Rome?`: half of the time she does."""
    person, attribute = rng.choice(everybody), rng.choice(ATTRIBUTES)
    value = value_of(person, attribute)
    if rng.random() < 0.5:
        value = other_value(rng, person, attribute, [other.name for other in everybody])
    question = fill(rng.choice(CHECKS[attribute]), person, attribute, value)
    return assigned((question, checked(person, attribute, value)), question_is_held_out(person, attribute))


def _two_turn_fact(rng: random.Random, everybody: tuple[Person, ...]) -> Exercise:
    """A question by name, then one by pronoun: known when neither is held out, new when both are."""
    person = rng.choice(everybody)
    first, second = rng.sample(ATTRIBUTES, 2)
    turns = (
        fill(rng.choice(QUESTIONS[first]), person, first),
        answer(person, first),
        fill(rng.choice(FOLLOW_UPS[second]), person, second),
        answer(person, second),
    )
    unseen = [question_is_held_out(person, attribute) for attribute in (first, second)]
    return Exercise(turns, known=not any(unseen), new=all(unseen))


def _translate(rng: random.Random, clause: Clause) -> Exercise:
    """A sentence into French, asked for in the request or, one time in four, by a system message."""
    unseen = any(held_out(ONE_IN, *combination) for combination in combinations(clause))
    if rng.random() < 0.25:
        return assigned((english(clause), french(clause)), unseen, TRANSLATOR)
    return assigned((rng.choice(TRANSLATE_REQUESTS).format(text=english(clause)), french(clause)), unseen)


def _translate_phrase(rng: random.Random, phrase: Phrase) -> Exercise:
    """A noun phrase into French."""
    unseen = any(held_out(ONE_IN, *combination) for combination in phrase_combinations(phrase))
    return assigned((rng.choice(PHRASE_REQUESTS).format(text=english_phrase(phrase)), french_phrase(phrase)), unseen)


def _rewrite(rng: random.Random, clause: Clause) -> Exercise:
    """A statement made negative or made a question."""
    unseen = any(held_out(ONE_IN, *combination) for combination in combinations(clause))
    form = rng.choice(tuple(REWRITE_REQUESTS))
    request = rng.choice(REWRITE_REQUESTS[form]).format(text=english(clause))
    return assigned((request, english(replace(clause, form=form))), unseen)


def _conversation(rng: random.Random, parts: list[Drawer]) -> Exercise:
    """Three to six requests that have nothing to do with each other: only the last one counts for its answer.

    Validation asks something new last; before it may stand what training asks.
    """
    drawn: list[Exercise] = []
    length = rng.randint(3, 6)
    while len(drawn) < length:
        exercise = rng.choice(parts)(rng)
        if exercise.system is None and len(exercise.turns) == 2:
            drawn.append(exercise)
    turns = tuple(text for exercise in drawn for text in exercise.turns)
    return Exercise(turns, known=all(exercise.known for exercise in drawn), new=drawn[-1].new)


def _is_short(clause: Clause) -> bool:
    """Whether the sentence and each rewriting of it stay within LONGEST_ANSWER words."""
    return len(english(clause).split()) <= LONGEST_SENTENCE and len(french(clause).split()) <= LONGEST_ANSWER - 2
