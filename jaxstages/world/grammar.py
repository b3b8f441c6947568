"""One meaning, said in English and in French: `english(clause)` and `french(clause)`.

French is done as it is written, with agreement, elision (`l'`, `j'`, `n'`, `qu'`), contraction (`du`, `aux`), `de` for
an indefinite object under negation and for `des` before an adjective. Three conventions keep it a function of the
English: "you" is always `vous`, "they" is always `ils`, and `?` follows its word without a space, as in English.
Which clauses make sense is not decided here but in `clauses.py`, which draws them.
"""

from dataclasses import dataclass
from typing import NamedTuple

from jaxstages.world.lexicon import ADJECTIVES, AUXILIARIES, NOUNS, PLACES, TIMES, VERBS

PRONOUNS: dict[str, tuple[str, int]] = {
    "I": ("je", 0),
    "he": ("il", 1),
    "she": ("elle", 1),
    "we": ("nous", 2),
    "you": ("vous", 3),
    "they": ("ils", 4),
    "this": ("ce", 1),
    "these": ("ce", 4),
}
"""English subject pronoun to the French one and to its column in a French present tense."""

POSSESSIVES: dict[str, tuple[str, str, str]] = {
    "my": ("mon", "ma", "mes"),
    "her": ("son", "sa", "ses"),
    "our": ("notre", "notre", "nos"),
    "your": ("votre", "votre", "vos"),
}
"""English possessive to the French for masculine, feminine and plural."""

NUMERALS: dict[str, str] = {"two": "deux", "three": "trois"}

DETERMINERS = ("the", "a", "this", *POSSESSIVES, *NUMERALS)
"""In the plural, "a" is said `some` (French `des`) and "this" is said `these`; the numerals are always plural."""

ELIDED = frozenset(("le", "la", "je", "de", "ne", "que", "ce"))
CONTRACTED = {("à", "le"): "au", ("à", "les"): "aux", ("de", "le"): "du", ("de", "les"): "des"}
VOWELS = "aeiouâàéèêîôûœh"
"""Initials that a French word is elided before. Every h of this lexicon is a silent one."""


@dataclass(frozen=True)
class Phrase:
    """A noun phrase: determiner (one of DETERMINERS), noun and adjective (keys of the lexicon), and its number."""

    determiner: str
    noun: str
    adjective: str | None = None
    plural: bool = False


class Place(NamedTuple):
    """Where it happens: "in", "at" or "near" a noun phrase."""

    preposition: str
    phrase: Phrase


@dataclass(frozen=True)
class Clause:
    """What a sentence means, in no language.

    subject: a noun phrase or a key of PRONOUNS.  verb: a key of VERBS, or "be" with an `adjective`, or "be" with an
    `object` when the subject is "this" or "these".  tense: "present", "past" or "future" ("be": present or future).
    form: "statement", "negative" or "question".  time: a key of `TIMES[tense]`.
    """

    subject: Phrase | str
    verb: str
    object: Phrase | None = None
    adjective: str | None = None
    place: Place | None = None
    time: str | None = None
    tense: str = "present"
    form: str = "statement"


def english(clause: Clause) -> str:
    """The clause as an English sentence, with its capital and its full stop or question mark."""
    negative, question = clause.form == "negative", clause.form == "question"
    subject = [clause.subject] if isinstance(clause.subject, str) else english_phrase(clause.subject).split()
    third = _column(clause.subject) == 1
    head, *rest = clause.verb.split()
    link = None if clause.verb == "be" else VERBS[clause.verb].link
    rest = rest if link is None else [link[0]]
    if clause.tense == "future":
        helper, verb = _english_be(clause.subject), ["going", "to", head]
    elif head == "be":
        helper, verb = _english_be(clause.subject), []
    elif negative or question:
        helper, verb = ("did" if clause.tense == "past" else "does" if third else "do"), [head]
    else:
        forms = VERBS[clause.verb].english
        helper, verb = "", [forms[1] if clause.tense == "past" else forms[0] if third else head]
    words = [helper, *subject] if question else [*subject, helper]
    words += ["not"] * negative + verb + rest
    if clause.object is not None:
        words.append(english_phrase(clause.object, negative))
    words += [clause.adjective or ""]
    if clause.place is not None:
        words += [clause.place.preposition, english_phrase(clause.place.phrase)]
    words.append(clause.time or "")
    return _sentence([word for word in words if word], question)


def french(clause: Clause) -> str:
    """The clause as a French sentence, with its capital and its full stop or question mark."""
    negative, question = clause.form == "negative", clause.form == "question"
    column = _column(clause.subject)
    subject = [PRONOUNS[clause.subject][0]] if isinstance(clause.subject, str) else _french_words(clause.subject)
    finite, rest = _french_verb(clause, column)
    words = ["est-ce", "que"] * question + subject
    words += ["ne", finite, "pas", *rest] if negative else [finite, *rest]
    if clause.object is not None:
        words += _french_object(clause, clause.object)
    if clause.adjective is not None:
        words.append(_agree(clause.adjective, *_gender_and_number(clause.subject)))
    if clause.place is not None:
        words += _french_place(clause.place)
    words += TIMES[clause.tense][clause.time].split() if clause.time else []
    return _sentence(_joined(words).split(), question)


def english_phrase(phrase: Phrase, negative: bool = False) -> str:
    """The noun phrase in English, no capital; `negative`: it is an object under negation, so `any` replaces `some`."""
    determiner = phrase.determiner
    noun = NOUNS[phrase.noun].english[phrase.plural]
    if phrase.plural:
        determiner = {"a": "any" if negative else "some", "this": "these"}.get(determiner, determiner)
    elif determiner == "a" and (phrase.adjective or noun)[0] in "aeiou":
        determiner = "an"
    return " ".join(word for word in (determiner, phrase.adjective, noun) if word)


def french_phrase(phrase: Phrase) -> str:
    """The noun phrase in French, no capital: `la maison rouge`, `l'arbre`, `de belles fleurs`."""
    return _joined(_french_words(phrase))


def french_place(place: Place) -> str:
    """The place in French, no capital: `dans le jardin`, `au marché`, `près de l'école`."""
    return _joined(_french_place(place))


def _column(subject: Phrase | str) -> int:
    """The column of the subject in a French present tense; 1 is also where an English verb takes its s."""
    if isinstance(subject, str):
        return PRONOUNS[subject][1]
    return 4 if subject.plural else 1


def _gender_and_number(subject: Phrase | str) -> tuple[str, bool]:
    """Gender ("m" or "f") and whether plural. Pronouns of no known gender count as masculine."""
    if isinstance(subject, str):
        return ("f" if subject == "she" else "m"), _column(subject) in (2, 3, 4)
    return NOUNS[subject.noun].gender, subject.plural


def _english_be(subject: Phrase | str) -> str:
    return "am" if subject == "I" else "is" if _column(subject) == 1 else "are"


def _french_verb(clause: Clause, column: int) -> tuple[str, list[str]]:
    """The finite form and what follows it (infinitive or participle)."""
    infinitive = "être" if clause.verb == "be" else VERBS[clause.verb].infinitive
    if clause.tense == "future":
        return VERBS["go"].present[column], [infinitive]
    if clause.verb == "be":
        return AUXILIARIES["être"][column], []
    verb = VERBS[clause.verb]
    if clause.tense == "present":
        return verb.present[column], []
    participle = verb.participle
    if verb.auxiliary == "être":
        gender, plural = _gender_and_number(clause.subject)
        participle += "e" * (gender == "f") + "s" * plural
    return AUXILIARIES[verb.auxiliary][column], [participle]


def _french_object(clause: Clause, phrase: Phrase) -> list[str]:
    """The object with what links it to the verb. Only a direct object turns `un` and `des` into `de` after `pas`."""
    if clause.verb == "be":
        return _french_words(phrase)
    link = VERBS[clause.verb].link
    bare = phrase.determiner == "a" and (
        (link is None and clause.form == "negative") or (link is not None and link[1] == "de" and phrase.plural)
    )
    words = ["de", *_french_words(phrase)[1:]] if bare else _french_words(phrase)
    return words if link is None or (bare and link[1] == "de") else [link[1], *words]


def _french_place(place: Place) -> list[str]:
    """`dans` or `à` by the noun, or `près de`. Raises ValueError for a preposition the noun does not take."""
    words = _french_words(place.phrase)
    if place.preposition == "near":
        return ["près", "de", *words]
    english_preposition, preposition = PLACES[place.phrase.noun]
    if english_preposition != place.preposition:
        raise ValueError(f"{place.phrase.noun!r} takes {english_preposition!r}, not {place.preposition!r}")
    return [preposition, *words]


def _french_words(phrase: Phrase) -> list[str]:
    """Determiner, noun and adjective in French order, agreeing, not yet elided or contracted."""
    noun = NOUNS[phrase.noun]
    words = [noun.french[phrase.plural]]
    if phrase.adjective is not None:
        adjective = ADJECTIVES[phrase.adjective]
        form = _agree(phrase.adjective, noun.gender, phrase.plural)
        if adjective.first and not phrase.plural and noun.gender == "m" and words[0][0] in VOWELS:
            form = adjective.before_vowel
        words = [form, *words] if adjective.first else [*words, form]
    return [_french_determiner(phrase, noun.gender, words), *words]


def _french_determiner(phrase: Phrase, gender: str, words: list[str]) -> str:
    """The determiner before `words`: its form depends on gender, number and the first letter that follows."""
    feminine, before_vowel = gender == "f", words[0][0] in VOWELS
    if phrase.determiner in NUMERALS:
        return NUMERALS[phrase.determiner]
    if phrase.determiner in POSSESSIVES:
        masculine, feminine_form, plural = POSSESSIVES[phrase.determiner]
        return plural if phrase.plural else feminine_form if feminine and not before_vowel else masculine
    if phrase.plural:
        adjective_first = phrase.adjective is not None and ADJECTIVES[phrase.adjective].first
        return {"the": "les", "a": "de" if adjective_first else "des", "this": "ces"}[phrase.determiner]
    return {
        "the": "la" if feminine else "le",
        "a": "une" if feminine else "un",
        "this": "cette" if feminine else "cet" if before_vowel else "ce",
    }[phrase.determiner]


def _agree(adjective: str, gender: str, plural: bool) -> str:
    forms = ADJECTIVES[adjective]
    return (forms.feminine if gender == "f" else forms.masculine)[plural]


def _joined(words: list[str]) -> str:
    """French words as one string: elided first, because `de le arbre` is `de l'arbre` and not `du arbre`."""
    after = [*words[1:], " "]
    elided = [
        word[:-1] + "'" if word in ELIDED and following[0] in VOWELS else word
        for word, following in zip(words, after, strict=True)
    ]
    text: list[str] = []
    for word in elided:
        if text and (text[-1], word) in CONTRACTED:
            text[-1] = CONTRACTED[text[-1], word]
        else:
            text.append(word)
    return " ".join(text).replace("' ", "'")


def _sentence(words: list[str], question: bool) -> str:
    text = " ".join(words)
    return text[0].upper() + text[1:] + ("?" if question else ".")
