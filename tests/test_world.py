"""The embedded world: right French, clean splits, facts that only raw text tells, and builders that read back."""

import hashlib
import itertools
import json
import os
import pickle
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from jaxstages.world import chats as chats_module
from jaxstages.world import smalltalk
from jaxstages.world.chats import COUNTS, FACT_KINDS, LONGEST_ANSWER, chats
from jaxstages.world.clauses import clauses, combinations, is_held_out, pairs, phrase_combinations, phrases
from jaxstages.world.grammar import Clause, Phrase, Place, english, english_phrase, french, french_phrase
from jaxstages.world.lexicon import ADJECTIVES, NOUNS, VERBS
from jaxstages.world.people import ATTRIBUTES, people, question_is_held_out, value_of
from jaxstages.world.split import SPLITS, held_out, unique
from jaxstages.world.text import PEOPLE_ONE_IN, documents
from jaxstages.world.wording import ANSWERS, CHECKS, NAMED, QUESTIONS, VALUES, answer, fill

ROOT = Path(__file__).resolve().parent.parent


def P(words: str) -> Phrase:
    """`the small cats` as a phrase: determiner, adjective if any, noun; a plural noun ends in `+`."""
    determiner, *adjective, noun = words.split()
    return Phrase(determiner, noun.rstrip("+"), adjective[0] if adjective else None, noun.endswith("+"))


# fmt: off
GOLD = [
    # Determiners, number, and the present of the three groups of verbs.
    (Clause(P("the cat"), "sleep", time="every day"), "The cat sleeps every day.", "Le chat dort tous les jours."),
    (Clause(P("the mouse+"), "sleep"), "The mice sleep.", "Les souris dorment."),
    (Clause(P("my child+"), "read", P("a book")), "My children read a book.", "Mes enfants lisent un livre."),
    (Clause(P("two horse+"), "see", P("the goat")), "Two horses see the goat.", "Deux chevaux voient la chèvre."),
    (Clause("we", "eat", P("the orange+")), "We eat the oranges.", "Nous mangeons les oranges."),
    (Clause("you", "sell", P("three hat+")), "You sell three hats.", "Vous vendez trois chapeaux."),
    (Clause("they", "buy", P("a cake+")), "They buy some cakes.",
     "Ils achètent des gâteaux."),
    # Elision: l', j', n', d', qu', c'.
    (Clause(P("the man"), "open", P("the letter")), "The man opens the letter.", "L'homme ouvre la lettre."),
    (Clause(P("the child"), "find", P("the egg")), "The child finds the egg.", "L'enfant trouve l'œuf."),
    (Clause("I", "love", P("the star")), "I love the star.", "J'aime l'étoile."),
    (Clause("I", "write", P("a letter"), form="negative"), "I do not write a letter.", "Je n'écris pas de lettre."),
    (Clause("she", "love", P("the dog"), form="negative"), "She does not love the dog.", "Elle n'aime pas le chien."),
    (Clause("he", "sleep", form="question"), "Does he sleep?", "Est-ce qu'il dort?"),
    (Clause(P("a bird"), "sing", form="question"), "Does a bird sing?", "Est-ce qu'un oiseau chante?"),
    (Clause(P("the bird+"), "sing", form="question"), "Do the birds sing?", "Est-ce que les oiseaux chantent?"),
    (Clause("this", "be", P("my house")), "This is my house.", "C'est ma maison."),
    (Clause("these", "be", P("our dog+")), "These are our dogs.", "Ce sont nos chiens."),
    (Clause("this", "be", P("a cat"), form="negative"), "This is not a cat.", "Ce n'est pas un chat."),
    (Clause("these", "be", P("her hen+"), form="negative"), "These are not her hens.", "Ce ne sont pas ses poules."),
    (Clause("this", "be", P("the door"), form="question"), "Is this the door?",
     "Est-ce que c'est la porte?"),
    # Forms that depend on the vowel that follows.
    (Clause(P("this tree"), "be", adjective="old"), "This tree is old.", "Cet arbre est vieux."),
    (Clause(P("this old tree"), "be", adjective="green"), "This old tree is green.", "Ce vieil arbre est vert."),
    (Clause(P("this picture"), "be", adjective="beautiful"), "This picture is beautiful.", "Cette image est belle."),
    (Clause(P("this bird+"), "be", adjective="white"), "These birds are white.", "Ces oiseaux sont blancs."),
    (Clause("he", "draw", P("a beautiful bird")), "He draws a beautiful bird.", "Il dessine un bel oiseau."),
    (Clause("he", "draw", P("a beautiful bird+")), "He draws some beautiful birds.", "Il dessine de beaux oiseaux."),
    (Clause("she", "find", P("my star")), "She finds my star.", "Elle trouve mon étoile."),
    (Clause("she", "eat", P("my good orange")), "She eats my good orange.", "Elle mange ma bonne orange."),
    (Clause("she", "eat", P("her orange")), "She eats her orange.", "Elle mange son orange."),
    (Clause("we", "see", P("a new tree")), "We see a new tree.", "Nous voyons un nouvel arbre."),
    # Agreement and position of adjectives.
    (Clause(P("a old woman"), "wash", P("the white car+")), "An old woman washes the white cars.",
     "Une vieille femme lave les voitures blanches."),
    (Clause(P("the happy girl+"), "play"), "The happy girls play.", "Les filles heureuses jouent."),
    (Clause("they", "read", P("the new letter+")), "They read the new letters.", "Ils lisent les nouvelles lettres."),
    (Clause("you", "see", P("a red flower+")), "You see some red flowers.", "Vous voyez des fleurs rouges."),
    (Clause("she", "be", adjective="happy", form="negative"), "She is not happy.", "Elle n'est pas heureuse."),
    (Clause("he", "be", adjective="tired", tense="future", time="tomorrow"), "He is going to be tired tomorrow.",
     "Il va être fatigué demain."),
    (Clause(P("your table+"), "be", adjective="clean", form="question"), "Are your tables clean?",
     "Est-ce que vos tables sont propres?"),
    # Contraction: au, aux, du, des, and none before an elided article.
    (Clause(P("the boy"), "go", P("the market")), "The boy goes to the market.", "Le garçon va au marché."),
    (Clause("I", "go", P("the school")), "I go to the school.", "Je vais à l'école."),
    (Clause("we", "go", P("the station"), form="negative"), "We do not go to the station.",
     "Nous n'allons pas à la gare."),
    (Clause("they", "come", P("the park")), "They come from the park.", "Ils viennent du parc."),
    (Clause("she", "come", P("the school"), form="question"), "Does she come from the school?",
     "Est-ce qu'elle vient de l'école?"),
    (Clause("I", "talk to", P("the girl+")), "I talk to the girls.", "Je parle aux filles."),
    (Clause("I", "talk to", P("the man")), "I talk to the man.", "Je parle à l'homme."),
    (Clause("he", "talk about", P("the horse+")), "He talks about the horses.", "Il parle des chevaux."),
    (Clause("he", "talk about", P("a cat+")), "He talks about some cats.", "Il parle de chats."),
    (Clause("he", "talk about", P("a apple")), "He talks about an apple.", "Il parle d'une pomme."),
    (Clause(P("my dog"), "sleep", place=Place("near", P("the tree"))), "My dog sleeps near the tree.",
     "Mon chien dort près de l'arbre."),
    (Clause("you", "work", place=Place("near", P("the old park"))), "You work near the old park.",
     "Vous travaillez près du vieux parc."),
    (Clause("I", "work", place=Place("at", P("the market"))), "I work at the market.", "Je travaille au marché."),
    (Clause("I", "work", place=Place("in", P("your garden"))), "I work in your garden.",
     "Je travaille dans votre jardin."),
    # Negation: de or d' for an indefinite direct object only.
    (Clause(P("the goat"), "eat", P("a apple+"), form="negative"), "The goat does not eat any apples.",
     "La chèvre ne mange pas de pommes."),
    (Clause("they", "see", P("a bird"), tense="past", form="negative"), "They did not see a bird.",
     "Ils n'ont pas vu d'oiseau."),
    (Clause("we", "buy", P("two cake+"), form="negative"), "We do not buy two cakes.",
     "Nous n'achetons pas deux gâteaux."),
    (Clause("he", "talk to", P("a child"), form="negative"), "He does not talk to a child.",
     "Il ne parle pas à un enfant."),
    (Clause("I", "find", P("a small egg+"), tense="future", form="negative"), "I am not going to find any small eggs.",
     "Je ne vais pas trouver de petits œufs."),
    # Past with avoir, past with être and its agreement, near future.
    (Clause("I", "eat", P("your cake"), tense="past", time="yesterday"), "I ate your cake yesterday.",
     "J'ai mangé votre gâteau hier."),
    (Clause("we", "open", P("this door"), tense="past"), "We opened this door.", "Nous avons ouvert cette porte."),
    (Clause(P("the queen"), "come", P("the garden"), tense="past"), "The queen came from the garden.",
     "La reine est venue du jardin."),
    (Clause(P("our hen+"), "go", P("the park"), tense="past"), "Our hens went to the park.",
     "Nos poules sont allées au parc."),
    (Clause(P("three man+"), "arrive", P("the new school"), tense="past", form="negative"),
     "Three men did not arrive at the new school.", "Trois hommes ne sont pas arrivés à la nouvelle école."),
    (Clause("she", "arrive", P("the station"), tense="past", form="question"), "Did she arrive at the station?",
     "Est-ce qu'elle est arrivée à la gare?"),
    (Clause("you", "look for", P("her bag"), tense="future"), "You are going to look for her bag.",
     "Vous allez chercher son sac."),
    (Clause(P("the doctor"), "go", P("the station"), tense="future", time="today", form="question"),
     "Is the doctor going to go to the station today?", "Est-ce que le médecin va aller à la gare aujourd'hui?"),
]
# fmt: on

SHA256 = {
    "text": "8e11947ae37d3712a6ba74fd389fa328b7447fc1b58b4a2a581c1c35815551d4",
    "pairs": "8a0f5e9ccde137b06f2e1b26bd94762eb2ea77694be891384f8b51b0a3a464eb",
    "chats": "f59fb1dbd2d9b559352ad9b4f7a3cfbcdeaf6acc3c58271900cb5256fda31ecd",
}
SOURCES = {"text": documents, "pairs": lambda split: pairs(split, 12_000 if split == "train" else 400), "chats": chats}


def digest(name: str) -> str:
    """sha256 of the first 50 records of both splits."""
    firsts = [record for split in SPLITS for record in itertools.islice(SOURCES[name](split), 50)]
    return hashlib.sha256(json.dumps(firsts, ensure_ascii=False).encode()).hexdigest()


def words_of(texts) -> set[str]:
    return {word for text in texts for word in re.findall(r"[\w-]+'?", text)}


def contents(chat) -> list[str]:
    return [message["content"] for message in chat["messages"]]


def everything(split: str) -> tuple[list[Clause], dict[str, list]]:
    """The clauses of which `pairs` makes its records, and every record of every data set, of a split."""
    drawn = list(clauses(split, 12_000 if split == "train" else 400))
    records = {name: list(SOURCES[name](split)) for name in ("text", "chats")}
    return drawn, records | {"pairs": [{"prompt": english(clause), "target": french(clause)} for clause in drawn]}


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """What `everything` gives of each split. Training data, which is large, comes from another process: here types are
    checked at each call and lines are counted, with which it takes ten times as long. Its first are made here too."""
    file = tmp_path_factory.mktemp("world") / "train.pickle"
    code = (
        "import pickle, pathlib, sys; from tests.test_world import everything; "
        "pathlib.Path(sys.argv[1]).write_bytes(pickle.dumps(everything('train')))"
    )
    subprocess.run([sys.executable, "-c", code, str(file)], env={**os.environ, "PYTHONPATH": "."}, cwd=ROOT, check=True)
    train = pickle.loads(file.read_bytes())  # noqa: S301
    for name in SOURCES:
        assert list(itertools.islice(SOURCES[name]("train"), 200)) == train[1][name][:200]
    return {"train": train, "validation": everything("validation")}


@pytest.fixture(scope="module")
def drawn(both):
    """The clauses of which `pairs` makes its records."""
    return {split: both[split][0] for split in SPLITS}


@pytest.fixture(scope="module")
def world(both):
    """Every record of every data set: world[name][split] is a list."""
    return {name: {split: both[split][1][name] for split in SPLITS} for name in SOURCES}


@pytest.mark.parametrize("clause, in_english, in_french", GOLD, ids=[gold[1] for gold in GOLD])
def test_grammar_gold(clause, in_english, in_french):
    assert (english(clause), french(clause)) == (in_english, in_french)


def test_gold_is_long_and_uses_every_verb():
    assert len(GOLD) >= 60
    assert {clause.verb for clause, _, _ in GOLD} == set(VERBS) | {"be"}


def test_phrases_gold():
    gold = {
        "the house": "la maison", "the egg": "l'œuf", "the flower+": "les fleurs", "a picture": "une image",
        "a old hat": "un vieux chapeau", "a old bird": "un vieil oiseau", "our new house+": "nos nouvelles maisons",
        "this man": "cet homme", "this good man": "ce bon homme", "her school": "son école",
        "her big school": "sa grande école", "my black dog+": "mes chiens noirs", "a young queen+": "de jeunes reines",
        "the white door": "la porte blanche", "your sad horse": "votre cheval triste",
        "two happy child+": "deux enfants heureux",
    }  # fmt: skip
    assert {words: french_phrase(P(words)) for words in gold} == gold


def test_no_word_is_left_unelided_or_uncontracted(world):
    """Over all targets, what the gold table shows for single ones."""
    wrong = re.compile(
        r"\b(?:je|ne|le|la|de|que|ce|me) [aeiouâàéèêîôûœh]|\b[aà] les? |\b(?:de|à) le |\bde les |\bma [aeiouéœh]", re.I
    )
    targets = [pair["target"] for split in SPLITS for pair in world["pairs"][split]]
    assert [target for target in targets if wrong.search(target)] == []


def test_english_has_one_french(world):
    french_of: dict[str, set[str]] = {}
    for split in SPLITS:
        for pair in world["pairs"][split]:
            french_of.setdefault(pair["prompt"], set()).add(pair["target"])
    assert all(len(targets) == 1 for targets in french_of.values())
    assert len(french_of) == 12_400
    assert all(4 <= len(prompt.split()) <= 14 for prompt in french_of)


def test_a_place_with_a_wrong_preposition_is_refused():
    with pytest.raises(ValueError, match="'market' takes 'at', not 'in'"):
        french(Clause("I", "work", place=Place("in", P("the market"))))


def test_lexicon_forms_are_complete():
    assert len(NOUNS) == 40 and len(ADJECTIVES) == 16 and len(VERBS) >= 20
    assert all(all(noun.english + noun.french) and noun.gender in "mf" for noun in NOUNS.values())
    assert {name for name, verb in VERBS.items() if verb.auxiliary == "être"} == {"go", "come", "arrive"}


@pytest.mark.parametrize("name", SOURCES)
def test_first_records_are_pinned(name):
    assert digest(name) == SHA256[name]


def test_records_do_not_depend_on_the_process():
    code = (
        "import sys; sys.path.insert(0, 'tests'); import test_world; "
        "print([test_world.digest(name) for name in test_world.SOURCES])"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "12345", "PYTHONPATH": "."}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=ROOT, check=True
    )
    assert done.stdout.strip() == str(list(SHA256.values()))


def test_another_seed_gives_other_records():
    assert next(documents("train", seed=1)) != next(documents("train", seed=0))
    assert next(chats("train", seed=1)) != next(chats("train", seed=0))
    assert next(pairs("train", 1, seed=1)) != next(pairs("train", 1, seed=0))
    assert people(seed=1) != people(seed=0) == people()


def test_people():
    everybody = people()
    by_name = {person.name: person for person in everybody}
    assert len(everybody) == len(by_name) == 64
    assert all(by_name[person.friend].friend == person.name != person.friend for person in everybody)
    for attribute, values in VALUES.items():
        shares = Counter(value_of(person, attribute) for person in everybody)
        assert set(shares) == set(values) and max(shares.values()) - min(shares.values()) <= 1
    unseen = [(person.name, attribute) for person in everybody for attribute in ATTRIBUTES
            if question_is_held_out(person, attribute)]  # fmt: skip
    assert 0.18 < len(unseen) / (64 * len(ATTRIBUTES)) < 0.32
    assert {attribute for _, attribute in unseen} == set(ATTRIBUTES)
    assert all(question_is_held_out(by_name[by_name[name].friend], "friend") for name, a in unseen if a == "friend")


def test_unknown_attribute_and_split_are_refused():
    with pytest.raises(ValueError, match="unknown attribute 'age'"):
        question_is_held_out(people()[0], "age")
    for source in (lambda: next(documents("test")), lambda: clauses("test", 1), lambda: next(chats("test"))):
        with pytest.raises(ValueError, match="unknown split 'test': known are train, validation"):
            source()


def test_too_small_a_source_is_refused():
    with pytest.raises(RuntimeError, match="only 3 of 4 different records could be drawn"):
        list(unique(itertools.cycle("abc"), 4, key=str))


def test_every_fact_is_told_often_and_in_many_ways(world):
    mentions = Counter(
        sentence for document in world["text"]["train"] for sentence in re.split(r"(?<=[.?]) |\n", document["text"])
    )
    for person in people():
        for attribute in ATTRIBUTES:
            counts = [mentions[fill(template, person, attribute)] for template in NAMED[attribute]]
            assert sum(counts) >= 20, (person.name, attribute, counts)
            assert sum(count > 0 for count in counts) >= 4, (person.name, attribute, counts)


def test_wordings_name_the_person_and_the_value():
    for person, attribute in itertools.product(people(), ATTRIBUTES):
        for template in (*NAMED[attribute], ANSWERS[attribute]):
            said = re.findall(r"\w+", fill(template, person, attribute))
            assert {person.name, getattr(person, attribute)} <= set(said)
        assert fill(NAMED[attribute][0], person, attribute) == answer(person, attribute)


def test_every_question_is_asked_in_raw_text(world):
    """Held-out ones too: a chat differs from raw text by its form, not by what can be known."""
    text = "\n".join(document["text"] for document in world["text"]["train"])
    answered = set(re.findall(r"Answer: (?:Yes, |No, )?(.*)", text))
    assert {answer(person, attribute) for person in people() for attribute in ATTRIBUTES} <= answered


def test_raw_text_never_says_a_wrong_fact(world):
    """No statement of raw text gives a person a value that is not theirs."""
    right = {fill(t, p, a) for p in people() for a in ATTRIBUTES for t in NAMED[a]}
    possible = {
        fill(template, person, attribute, value)
        for person in people()
        for attribute, values in VALUES.items()
        for value in values
        for template in NAMED[attribute]
    }
    sentences = {
        sentence
        for split in SPLITS
        for document in world["text"][split]
        for sentence in re.split(r"(?<=[.?]) |\n", document["text"])
    }
    assert sentences & possible <= right
    assert len(sentences & right) > 1000


def test_no_training_chat_touches_a_held_out_fact(world):
    unseen = [(p, a) for p in people() for a in ATTRIBUTES if question_is_held_out(p, a)]
    names = [person.name for person in people()]
    secret = {answer(person, attribute) for person, attribute in unseen}
    questions = {fill(template, person, attribute) for person, attribute in unseen for template in QUESTIONS[attribute]}
    questions |= {
        fill(template, person, attribute, value)
        for person, attribute in unseen
        for template in CHECKS[attribute]
        for value in VALUES.get(attribute, names)
    }
    seen = {text.removeprefix("Yes, ").removeprefix("No, ") for c in world["chats"]["train"] for text in contents(c)}
    assert seen & secret == set()
    assert seen & questions == set()


def test_validation_fact_chats_ask_only_held_out_facts(world):
    secret = {answer(p, a) for p in people() for a in ATTRIBUTES if question_is_held_out(p, a)}
    fact_chats = [chat for chat in world["chats"]["validation"] if chat["kind"] in FACT_KINDS]
    assert len(fact_chats) >= 120
    for chat in fact_chats:
        answers = [m["content"] for m in chat["messages"] if m["role"] == "assistant"]
        assert {text.removeprefix("Yes, ").removeprefix("No, ") for text in answers} <= secret
    assert len({contents(chat)[-1] for chat in fact_chats}) >= 60


def test_validation_clauses_hold_a_new_combination_of_known_words(drawn):
    seen = {combination for clause in drawn["train"] for combination in combinations(clause)}
    for clause in drawn["validation"]:
        assert is_held_out(clause)
        assert not set(combinations(clause)) <= seen
    known = {combination for phrase in phrases("train", 900) for combination in phrase_combinations(phrase)}
    for phrase in phrases("validation", 40):
        assert not set(phrase_combinations(phrase)) & (seen | known), english_phrase(phrase)


def test_combinations_are_all_pairs_of_content_words():
    place = Place("near", P("the old tree"))
    clause = Clause(P("a happy girl"), "wash", P("two red car+"), place=place, form="negative")
    assert set(combinations(clause)) == {
        ("is", "girl", "happy"),
        ("is", "car", "red"),
        ("is", "tree", "old"),
        ("does", "girl", "wash"),
        ("done to", "wash", "car"),
    }
    assert list(combinations(Clause(P("my door+"), "be", adjective="red"))) == [("is", "door", "red")]


def test_no_validation_sentence_is_in_any_training_data(world):
    sentences = {pair[key] for pair in world["pairs"]["validation"] for key in ("prompt", "target")}
    sentences |= {
        contents(chat)[-1] for chat in world["chats"]["validation"] if chat["kind"] in ("translate", "rewrite")
    }
    trained = [document["text"] for document in world["text"]["train"]]
    trained += [pair[key] for pair in world["pairs"]["train"] for key in ("prompt", "target")]
    trained += [text for chat in world["chats"]["train"] for text in contents(chat)]
    # Requests put the sentence after a colon or a question mark.
    said = {part for text in trained for part in re.split(r"(?<=[.?:]) ", text)}
    assert sentences & said == set()


def test_validation_documents_put_together_new_neighbours(world):
    train, validation = ({d["text"] for d in world["text"][split]} for split in SPLITS)
    assert not train & validation
    names = {person.name for person in people()}
    meeting = re.compile(r"(\w+) (?:talks to|saw|looks for|talks about|and) (\w+)(?:\.| in the park| are (?:in|at) )")

    def met(texts):
        results = {frozenset(pair) for text in texts for pair in meeting.findall(text)}
        return {pair for pair in results if pair <= names}

    unseen = {pair for pair in met(train | validation) if held_out(PEOPLE_ONE_IN, "people", *sorted(pair))}
    assert len(met(train)) > 1000 and not met(train) & unseen
    assert len(met(validation) & unseen) >= 20


def test_validation_lists_and_requests_are_new(world):
    train, validation = world["chats"]["train"], world["chats"]["validation"]
    requests = {tuple(contents(chat)[:-1]) for chat in train}
    assert all(tuple(contents(chat)[:-1]) not in requests for chat in validation)
    pattern = re.compile(r"(?:[\w]+, )+[\w]+")

    def lists(chats_of_split):
        kinds = ("pick", "reverse", "odd", "count")
        actual = (pattern.findall(contents(chat)[0])[-1] for chat in chats_of_split if chat["kind"] in kinds)
        return set(actual)

    assert len(lists(validation)) > 80
    assert not lists(validation) & lists(train)
    raw = "\n".join(document["text"] for document in world["text"]["train"])
    assert not {words for words in lists(validation) if f"list: {words}." in raw}


FROM_OUTSIDE = ("unknown", "conversation")
"""Kinds of chats that name what is not in the world, on purpose."""

SMALL_TALK = ("greeting", "thanks", "identity")


def test_questions_from_outside_are_about_topics_that_no_training_chat_names(world):
    known = {word.lower() for chat in world["chats"]["train"] for word in words_of(contents(chat))}
    chats = [contents(chat) for chat in world["chats"]["validation"] if chat["kind"] == "unknown"]
    new = [texts for texts in chats if {word.lower() for word in words_of(texts[:1])} - known]
    assert len(new) > 0.7 * len(chats), "the rest has no topic, such as `Tell me a joke.`"
    assert {texts[1] for texts in chats} == {smalltalk.UNKNOWN}


def test_a_conversation_of_validation_asks_something_new_last_and_fits_the_demo(world):
    """And no training conversation has a question that is held out."""
    train = {tuple(contents(chat)[:2]) for chat in world["chats"]["train"] if chat["kind"] != "conversation"}
    last = [tuple(contents(c)[-2:]) for c in world["chats"]["validation"] if c["kind"] == "conversation"]
    assert last and not set(last) & train
    unseen = {tuple(contents(c)[:2]) for c in world["chats"]["validation"] if len(contents(c)) == 2}
    inside = [contents(c) for c in world["chats"]["train"] if c["kind"] == "conversation"]
    assert not {pair for texts in inside for pair in zip(texts[::2], texts[1::2], strict=True)} & unseen
    assert all(3 <= len(texts) // 2 <= 6 for texts in inside)


@pytest.mark.parametrize("name", SOURCES)
def test_every_word_of_validation_is_in_training(world, name):
    def texts(split):
        for record in world[name][split]:
            if record.get("kind") not in (*FROM_OUTSIDE, *SMALL_TALK):
                yield from contents(record) if name == "chats" else record.values()

    assert words_of(texts("validation")) - words_of(texts("train")) - names_with_s() == set()


def names_with_s() -> set[str]:
    """`Sam'` of `Sam's`: the words are "Sam" and "'s", both of them known."""
    return {person.name + "'" for person in people()}


def test_raw_text_knows_the_words_of_the_other_data(world):
    raw = {word.lower() for word in words_of(document["text"] for document in world["text"]["train"])}
    others = words_of(text for pair in world["pairs"]["train"] for text in pair.values())
    chats_inside = [chat for chat in world["chats"]["train"] if chat["kind"] not in (*FROM_OUTSIDE, *SMALL_TALK)]
    others |= words_of(text for chat in chats_inside for text in contents(chat))
    assert {word.lower() for word in others} - raw - {name.lower() for name in names_with_s()} == set()


def test_sizes(world):
    train, validation = ("\n".join(document["text"] for document in world["text"][split]) for split in SPLITS)
    assert 3_000_000 < len(train.encode()) < 4_000_000
    assert 100_000 < len(validation.encode()) < 140_000
    assert len({word.lower() for word in words_of([train])}) < 900
    lengths = sorted(len(document["text"].split()) for document in world["text"]["train"])
    assert lengths[len(lengths) // 20] >= 35 and lengths[-len(lengths) // 20] <= 110
    assert [len(world["pairs"][split]) for split in SPLITS] == [12_000, 400]


def test_chats_have_many_kinds_and_one_answer(world):
    for split in SPLITS:
        records = world["chats"][split]
        assert Counter(chat["kind"] for chat in records) == COUNTS[split]
        assert len({json.dumps(chat["messages"]) for chat in records}) == len(records)
        answers: dict[tuple[str, ...], set[str]] = {}
        for chat in records:
            answers.setdefault(tuple(contents(chat)[:-1]), set()).add(contents(chat)[-1])
            roles = [message["role"] for message in chat["messages"] if message["role"] != "system"]
            assert roles == ["user", "assistant"] * (len(roles) // 2)
            answered = [message["content"] for message in chat["messages"] if message["role"] == "assistant"]
            assert max(len(text.split()) for text in answered) <= LONGEST_ANSWER
        assert all(len(actual) == 1 for actual in answers.values())
    assert len(chats_module.KINDS) >= 10
    several = [chat for chat in world["chats"]["train"] if len(chat["messages"]) >= 4]
    assert {chat["kind"] for chat in several} == {"two_turn_fact", "remember", "conversation"} and len(several) > 1000
    assert any(chat["messages"][0]["role"] == "system" for chat in world["chats"]["validation"])


def test_builders_round_trip_in_two_processes_after_a_kill(world, tmp_path):
    """A build that dies half way, then two at once, then reading: all records, without TensorFlow."""
    dying = (
        "import os, sys\n"
        "from jaxstages.world import builders\n"
        "def broken(split):\n"
        "    yield {'text': 'half'}\n"
        "    os._exit(9)\n"
        "builders.documents = broken\n"
        "builders.open_world('text', 'train', sys.argv[1])\n"
    )
    assert subprocess.run([sys.executable, "-c", dying, str(tmp_path)], cwd=ROOT).returncode == 9
    assert list((tmp_path / "world_text").glob("incomplete*"))
    reading = (
        "import sys\n"
        "from jaxstages.world.builders import BUILDERS, open_world\n"
        "from jaxstages.world.split import SPLITS\n"
        "sizes = [len(open_world(name, split, sys.argv[1])) for name in BUILDERS for split in SPLITS]\n"
        "assert 'tensorflow' not in sys.modules\n"
        "print(*sizes)\n"
    )
    both = [
        subprocess.Popen(
            [sys.executable, "-c", reading, str(tmp_path)], cwd=ROOT, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for _ in range(2)
    ]  # fmt: skip
    sizes = [len(world[name][split]) for name in ("text", "pairs", "chats") for split in SPLITS]
    for process in both:
        out, noise = process.communicate(timeout=100)
        assert (process.returncode, out.split(), noise) == (0, [str(size) for size in sizes], "")

    from jaxstages.world.builders import open_world

    assert not list((tmp_path / "world_text").glob("incomplete*"))
    for name in SOURCES:
        source = open_world(name, "validation", str(tmp_path))
        read = [source[index] for index in range(len(source))]
        assert sorted(read, key=repr_of) == sorted(world[name]["validation"], key=repr_of)
        with pytest.raises(IndexError, match="no record"):
            source[len(source)]
        assert pickle.loads(pickle.dumps(source))[3] == read[3]  # noqa: S301
    assert "tensorflow" not in sys.modules


def repr_of(record) -> str:
    return json.dumps(record, sort_keys=True)


@pytest.mark.parametrize(
    "name, split, line",
    [
        ("books", "train", "unknown data set 'books': known are text, pairs, chats"),
        ("text", "test", "unknown split 'test': known are train, validation"),
    ],
)
def test_open_world_refuses_unknown_names(name, split, line, tmp_path):
    from jaxstages.world.builders import open_world

    with pytest.raises(ValueError, match=f"^{line}$"):
        open_world(name, split, str(tmp_path))
