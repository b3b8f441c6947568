"""The words of the bilingual grammar: nouns, adjectives and verbs, each in all the forms that English and French need.

Tables only. What a word may be combined with (who reads what, which things are red) stands beside the word.
"""

from typing import NamedTuple


class Noun(NamedTuple):
    """english and french: (singular, plural).  gender: "m" or "f".  sort: person, animal, food, thing or place."""

    english: tuple[str, str]
    french: tuple[str, str]
    gender: str
    sort: str


class Adjective(NamedTuple):
    """masculine and feminine: (singular, plural).  before_vowel: masculine singular before a vowel (`bel oiseau`).

    first: whether French puts it before the noun.  fits: sorts of nouns, or single nouns, that it may describe.
    """

    masculine: tuple[str, str]
    feminine: tuple[str, str]
    before_vowel: str
    first: bool
    fits: frozenset[str]


class Verb(NamedTuple):
    """english: (third person singular, past).  present: French for je, il, nous, vous, ils.

    auxiliary: "avoir" or "être".  subjects: sorts or nouns that may do it.  objects: sorts or nouns it is done to,
    or places one goes to; empty for a verb without object.  link: the preposition before the object as (English,
    French), None for a direct object.
    """

    english: tuple[str, str]
    infinitive: str
    present: tuple[str, str, str, str, str]
    participle: str
    auxiliary: str
    subjects: frozenset[str]
    objects: frozenset[str]
    link: tuple[str, str] | None


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


def _noun(english: str, french: str, gender: str, sort: str) -> Noun:
    """`english` and `french` are "singular plural", or a singular whose plural adds an s."""
    pairs = [tuple(forms.split()) if " " in forms else (forms, forms + "s") for forms in (english, french)]
    return Noun((pairs[0][0], pairs[0][1]), (pairs[1][0], pairs[1][1]), gender, sort)


NOUNS: dict[str, Noun] = {
    noun.english[0]: noun
    for noun in (
        _noun("man men", "homme", "m", "person"),
        _noun("woman women", "femme", "f", "person"),
        _noun("boy", "garçon", "m", "person"),
        _noun("girl", "fille", "f", "person"),
        _noun("child children", "enfant", "m", "person"),
        _noun("teacher", "professeur", "m", "person"),
        _noun("doctor", "médecin", "m", "person"),
        _noun("queen", "reine", "f", "person"),
        _noun("cat", "chat", "m", "animal"),
        _noun("dog", "chien", "m", "animal"),
        _noun("bird", "oiseau oiseaux", "m", "animal"),
        _noun("horse", "cheval chevaux", "m", "animal"),
        _noun("mouse mice", "souris souris", "f", "animal"),
        _noun("goat", "chèvre", "f", "animal"),
        _noun("hen", "poule", "f", "animal"),
        _noun("turtle", "tortue", "f", "animal"),
        _noun("apple", "pomme", "f", "food"),
        _noun("orange", "orange", "f", "food"),
        _noun("pear", "poire", "f", "food"),
        _noun("cake", "gâteau gâteaux", "m", "food"),
        _noun("egg", "œuf", "m", "food"),
        _noun("cheese", "fromage", "m", "food"),
        _noun("book", "livre", "m", "thing"),
        _noun("letter", "lettre", "f", "thing"),
        _noun("house", "maison", "f", "thing"),
        _noun("car", "voiture", "f", "thing"),
        _noun("table", "table", "f", "thing"),
        _noun("flower", "fleur", "f", "thing"),
        _noun("tree", "arbre", "m", "thing"),
        _noun("hat", "chapeau chapeaux", "m", "thing"),
        _noun("bag", "sac", "m", "thing"),
        _noun("star", "étoile", "f", "thing"),
        _noun("door", "porte", "f", "thing"),
        _noun("picture", "image", "f", "thing"),
        _noun("garden", "jardin", "m", "place"),
        _noun("kitchen", "cuisine", "f", "place"),
        _noun("park", "parc", "m", "place"),
        _noun("market", "marché", "m", "place"),
        _noun("school", "école", "f", "place"),
        _noun("station", "gare", "f", "place"),
    )
}


def _adjective(masculine: str, feminine: str, first: bool, fits: str, before_vowel: str = "") -> Adjective:
    """`masculine` is "singular plural", or a singular whose plural adds an s; the feminine plural always adds one."""
    singular, plural = masculine.split() if " " in masculine else (masculine, masculine + "s")
    return Adjective((singular, plural), (feminine, feminine + "s"), before_vowel or singular, first, _set(fits))


ADJECTIVES: dict[str, Adjective] = {
    "big": _adjective("grand", "grande", True, "animal thing place cake cheese"),
    "small": _adjective("petit", "petite", True, "person animal food thing place"),
    "beautiful": _adjective("beau beaux", "belle", True, "person animal thing place", "bel"),
    "old": _adjective("vieux vieux", "vieille", True, "man woman teacher doctor queen animal thing place", "vieil"),
    "young": _adjective("jeune", "jeune", True, "person animal tree"),
    "new": _adjective("nouveau nouveaux", "nouvelle", True, "thing place teacher doctor queen", "nouvel"),
    "good": _adjective("bon", "bonne", True, "food person book school market"),
    "red": _adjective("rouge", "rouge", False, "thing apple"),
    "blue": _adjective("bleu", "bleue", False, "thing bird"),
    "green": _adjective("vert", "verte", False, "thing apple pear turtle garden park"),
    "white": _adjective("blanc", "blanche", False, "thing animal egg cheese"),
    "black": _adjective("noir", "noire", False, "thing animal"),
    "happy": _adjective("heureux heureux", "heureuse", False, "person animal"),
    "sad": _adjective("triste", "triste", False, "person animal"),
    "tired": _adjective("fatigué", "fatiguée", False, "person animal"),
    "clean": _adjective("propre", "propre", False, "house car table hat bag door kitchen market station dog"),
}


def _er(stem: str, nous: str = "") -> tuple[str, str, str, str, str]:
    """The present of a regular verb in -er; `nous` where its first person plural is written another way."""
    return (stem + "e", stem + "e", nous or stem + "ons", stem + "ez", stem + "ent")


def _verb(
    english: str,
    infinitive: str,
    present: tuple[str, ...] | str,
    participle: str,
    subjects: str,
    objects: str = "",
    link: tuple[str, str] | None = None,
    auxiliary: str = "avoir",
) -> Verb:
    """`english` is "third past"; `present` is a tuple of five forms, or the five forms in one string."""
    third, past = english.split()
    first, third_form, we, you, they = present.split() if isinstance(present, str) else present
    return Verb(
        (third, past),
        infinitive,
        (first, third_form, we, you, they),
        participle,
        auxiliary,
        _set(subjects),
        _set(objects),
        link,
    )


# fmt: off
VERBS: dict[str, Verb] = {
    "eat": _verb("eats ate", "manger", _er("mang", "mangeons"), "mangé", "person animal", "food"),
    "buy": _verb("buys bought", "acheter", "achète achète achetons achetez achètent", "acheté", "person",
                 "food animal book house car table flower hat bag picture"),
    "see": _verb("sees saw", "voir", "vois voit voyons voyez voient", "vu", "person animal",
                 "person animal food thing"),
    "read": _verb("reads read", "lire", "lis lit lisons lisez lisent", "lu", "person", "book letter"),
    "write": _verb("writes wrote", "écrire", "écris écrit écrivons écrivez écrivent", "écrit", "person",
                   "book letter"),
    "find": _verb("finds found", "trouver", _er("trouv"), "trouvé", "person animal",
                  "animal food book letter flower hat bag picture"),
    "love": _verb("loves loved", "aimer", _er("aim"), "aimé", "person", "person animal book house flower garden"),
    "open": _verb("opens opened", "ouvrir", "ouvre ouvre ouvrons ouvrez ouvrent", "ouvert", "person",
                  "book letter bag door"),
    "wash": _verb("washes washed", "laver", _er("lav"), "lavé", "person", "car table door hat bag apple pear dog"),
    "draw": _verb("draws drew", "dessiner", _er("dessin"), "dessiné", "person",
                  "person animal house flower tree star apple pear"),
    "sell": _verb("sells sold", "vendre", "vends vend vendons vendez vendent", "vendu", "man woman boy girl",
                  "food animal book car table flower hat bag picture"),
    "look for": _verb("looks looked", "chercher", _er("cherch"), "cherché", "person animal",
                      "person animal book letter hat bag house"),
    "talk to": _verb("talks talked", "parler", _er("parl"), "parlé", "person", "person cat dog horse", ("to", "à")),
    "talk about": _verb("talks talked", "parler", _er("parl"), "parlé", "person", "person animal food thing",
                        ("about", "de")),
    "sleep": _verb("sleeps slept", "dormir", "dors dort dormons dormez dorment", "dormi", "person animal"),
    "sing": _verb("sings sang", "chanter", _er("chant"), "chanté", "person bird"),
    "work": _verb("works worked", "travailler", _er("travaill"), "travaillé", "man woman teacher doctor queen horse"),
    "play": _verb("plays played", "jouer", _er("jou"), "joué", "boy girl child cat dog mouse"),
    "go": _verb("goes went", "aller", "vais va allons allez vont", "allé", "person animal",
                "market school station park", ("to", "à"), "être"),
    "come": _verb("comes came", "venir", "viens vient venons venez viennent", "venu", "person animal",
                  "market school station garden park", ("from", "de"), "être"),
    "arrive": _verb("arrives arrived", "arriver", _er("arriv"), "arrivé", "person animal",
                    "market school station", ("at", "à"), "être"),
}
# fmt: on

AUXILIARIES: dict[str, tuple[str, str, str, str, str]] = {
    "avoir": ("ai", "a", "avons", "avez", "ont"),
    "être": ("suis", "est", "sommes", "êtes", "sont"),
}

PLACES: dict[str, tuple[str, str]] = {
    "garden": ("in", "dans"),
    "kitchen": ("in", "dans"),
    "park": ("in", "dans"),
    "market": ("at", "à"),
    "school": ("at", "à"),
    "station": ("at", "à"),
}

NEAR: tuple[str, ...] = ("house", "tree", "table", "door", "car", "park", "school", "station")
"""What somebody may be near; French says `près de`."""

TIMES: dict[str, dict[str, str]] = {
    "present": {"every day": "tous les jours", "in the morning": "le matin", "in the evening": "le soir"},
    "past": {"yesterday": "hier"},
    "future": {"tomorrow": "demain", "today": "aujourd'hui"},
}
