"""What anybody says to a chat model first: greetings, thanks, "who are you?", and questions from outside the world.

A question from outside is made of a wording and a topic; validation asks about topics that no training chat names, so a
right answer, "I do not know that", is no memory of the topic.
"""

import random

from jaxstages.world.exercises import Exercise, assigned
from jaxstages.world.people import MEN, WOMEN, listed
from jaxstages.world.split import held_out

ONE_IN = 6

HELP = "How can I help you?"
GREETINGS = ("Hello", "Hi", "Good morning", "Good evening", "Good day", "Hey", "Hello there", "Hi there")
INTRODUCTIONS = ("{greeting}, I am {name}.", "{greeting}, my name is {name}.", "{greeting}! I am {name}.")
GREETINGS_ALONE = ("{greeting}!", "{greeting}.", "{greeting}", "{greeting}, how are you?", "{greeting}! How are you?")

THANKS = ("Thank you", "Thanks", "Thank you very much", "Many thanks", "Thanks a lot", "That is good, thank you")
FAREWELLS = ("Goodbye", "Bye", "Bye bye", "See you tomorrow", "Good night", "I have to go now")
WELCOME, FAREWELL = "You are welcome.", "Goodbye!"
ENDS = (".", "!", "")

IDENTITY: dict[str, tuple[str, ...]] = {
    "I am a small language model.": (
        "who are you",
        "what are you",
        "what is your name",
        "are you a person",
        "are you a robot",
        "are you a computer",
        "what kind of model are you",
        "who am I talking to",
    ),
    "I can translate into French, and talk about people, words and numbers.": (
        "what can you do",
        "how can you help me",
        "what do you know",
        "what can I ask you",
        "help",
        "can you help me",
        "what are you good at",
    ),
    "I learned in three stages: text, translations and chats.": (
        "how did you learn",
        "who made you",
        "where do you come from",
        "how were you trained",
        "what did you learn from",
    ),
}
"""Answer -> questions, in lower case and without a question mark."""

LEADS = ("", "Please tell me: ", "Tell me, ", "One question: ", "So, ", "And ")

UNKNOWN = "I do not know that. I only know a small world."
ABOUT_TOPIC = (
    "What can you say about {topic}?",
    "Tell me about {topic}.",
    "What do you know about {topic}?",
    "Can you explain {topic}?",
    "Explain {topic} to me.",
    "Why do people talk about {topic}?",
    "Write a poem about {topic}.",
    "Write a story about {topic}.",
    "Who knows most about {topic}?",
    "Do you like {topic}?",
    "Where can I learn about {topic}?",
    "What is the best book about {topic}?",
    "How much should I pay for {topic}?",
    "Should I be afraid of {topic}?",
    "I want to know more about {topic}.",
    "tell me about {topic}",
    "what about {topic}",
)
TOPICS = tuple(
    listed(
        "football physics music chess gravity electricity history politics religion mathematics biology chemistry "
        "democracy evolution photosynthesis inflation hockey tennis cricket guitar piano violin opera ballet "
        "cinema television radio internet software python java linux bitcoin money banking insurance tax law "
        "medicine surgery cancer malaria vaccines vitamins protein coffee tea wine beer sugar salt pepper garlic "
        "ginger oil gas coal steel gold silver copper diamonds plastic glass paper cotton wool silk rockets "
        "satellites planets Mars Jupiter Saturn Venus comets volcanoes earthquakes hurricanes tornadoes tsunamis "
        "glaciers deserts oceans rivers forests dinosaurs sharks whales elephants tigers lions wolves bears "
        "penguins eagles spiders snakes bees ants bacteria viruses Shakespeare Mozart Beethoven Picasso Einstein "
        "Newton Darwin Napoleon Caesar Cleopatra Germany Spain China India Brazil Canada Mexico Russia Japan Kenya "
        "Norway Poland Turkey Texas California Europe Africa Asia cars trains bicycles airplanes ships submarines "
        "bridges castles pyramids museums hospitals universities"
    )
)
OF_PLACE = (
    "What is the capital of {place}?",
    "How many people live in {place}?",
    "Who is the president of {place}?",
    "How far is {place}?",
    "What language do they speak in {place}?",
    "What is the weather like in {place}?",
)
PLACES = tuple(
    listed(
        "France Italy Germany Spain Portugal Greece Sweden Norway Finland Denmark Poland Hungary Austria Belgium "
        "Switzerland Ireland Scotland Iceland Russia Ukraine Turkey Egypt Morocco Nigeria Kenya Ghana China Japan "
        "Korea Vietnam India Nepal Iran Iraq Israel Canada Mexico Cuba Brazil Chile Peru Argentina Australia Texas "
        "Florida California Chicago Sydney Moscow Beijing Mumbai Toronto Berkeley Naples Munich Geneva Zurich "
        "Warsaw"
    )
)
OPEN = (
    "What time is it?",
    "What day is it today?",
    "Tell me a joke.",
    "What is the meaning of life?",
    "What is the weather like?",
    "Who won the game yesterday?",
    "What should I eat for dinner?",
    "Sing a song.",
    "How do I fix my computer?",
    "What is in the news?",
    "Do you love me?",
    "How old are you?",
    "Can you write code?",
    "What is your favourite film?",
    "How do I become rich?",
)
STRANGERS = ("Where does {name} live?", "What is {name}'s job?", "Who is {name}?", "What does {name} like to eat?")
UNKNOWN_NAMES = tuple(
    listed(
        "Zoltan Priya Kofi Ingrid Mateo Yuki Fatima Dmitri Saoirse Bjorn Chiara Hassan Leila Pedro Sven Wanda "
        "Agnes Boris Carmen Diego Edith Farid Greta Hiroshi Igor Jamal Keiko Lorenzo Marta Nikolai Otto Paloma "
        "Quentin Rashid"
    )
)


def greeting(rng: random.Random) -> Exercise:
    """`Hello, I am Anna.`: Hello, Anna! Held out: a greeting with a name, or with a wording."""
    word = rng.choice(GREETINGS)
    if rng.random() < 0.5:
        name = rng.choice(WOMEN + MEN)
        request = rng.choice(INTRODUCTIONS).format(greeting=word, name=name)
        return assigned((request, f"{word}, {name}! {HELP}"), held_out(ONE_IN, "greeting", word, name))
    wording = rng.choice(GREETINGS_ALONE)
    answer = f"{word}! I am well, thank you." if "how are you" in wording.lower() else f"{word}! {HELP}"
    request = _cased(rng, wording.format(greeting=word))
    return assigned((request, answer), held_out(ONE_IN, "greeting", request))


def thanks(rng: random.Random) -> Exercise:
    """`Thank you.`: You are welcome. And `Bye!`: Goodbye! Held out: a wording with its ending."""
    words, answer = (THANKS, WELCOME) if rng.random() < 0.6 else (FAREWELLS, FAREWELL)
    request = _cased(rng, rng.choice(words) + rng.choice(ENDS))
    return assigned((request, answer), held_out(ONE_IN, "thanks", request))


def identity(rng: random.Random) -> Exercise:
    """`Who are you?`. Held out: a question with what stands before it."""
    answer = rng.choice(tuple(IDENTITY))
    question, lead = rng.choice(IDENTITY[answer]), rng.choice(LEADS)
    request = f"{lead}{question}?"
    request = request[0].upper() + request[1:] if rng.random() < 0.8 else request.lower().rstrip("?")
    return assigned((request, answer), held_out(ONE_IN, "identity", lead, question))


def unknown(rng: random.Random) -> Exercise:
    """A question whose answer is in no text of the world. Held out: its topic, place or name."""
    kind = rng.random()
    if kind < 0.12:
        request = rng.choice(OPEN)
        return assigned((_cased(rng, request), UNKNOWN), held_out(ONE_IN, "open", request))
    wordings, slot, words = (
        (ABOUT_TOPIC, "topic", TOPICS)
        if kind < 0.6
        else (OF_PLACE, "place", PLACES)
        if kind < 0.82
        else (STRANGERS, "name", UNKNOWN_NAMES)
    )
    word = rng.choice(words)
    request = rng.choice(wordings).format(**{slot: word})
    return assigned((request, UNKNOWN), held_out(ONE_IN, slot, word))


def _cased(rng: random.Random, text: str) -> str:
    """As many people type: one time in four in lower case."""
    return text.lower() if rng.random() < 0.25 else text
