"""Small grammars that generate the demo's text with a seeded generator.

Each task is a function that draws one (input, output) pair. Inputs look like a person's messages, outputs like values
for a program. The model learns all tasks. ``TASKS`` have a soft prompt; ``EXTRA_TASKS`` have none, so users can train
one.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

Pair = tuple[str, str]


def _words(text: str) -> list[str]:
    return text.split()


GOOD = [
    "great",
    "superb",
    "excellent",
    "lovely",
    "fantastic",
    "brilliant",
    "wonderful",
    "perfect",
    "sturdy",
    "elegant",
    "delightful",
    "impressive",
]
BAD = _words(
    """
    terrible awful flimsy horrible poor disappointing dreadful useless shoddy ugly clumsy annoying
    """
)
PARTS = _words(
    """
    battery screen handle keyboard sound camera strap lid motor cable zipper stand
    """
)
PRODUCTS = _words(
    """
    phone kettle backpack lamp laptop blender headset watch tent bicycle drill printer
    """
)
SERVICE = ["delivery", "packaging", "support team", "manual", "warranty service", "setup"]

FIRST_NAMES = _words(
    """
    Mia Liam Noah Emma Olga Ivan Sofia Lucas Aisha Omar Yuki Kenji Priya Arjun Clara Hugo Elena Marco Nina Pavel
    Ruth Samir Tara Victor Wanda Zoe Abel Bianca Carl Dora Erik Fatima Georg Hana Igor Julia Karim Lena Milo
    Nadia
    """
)
LAST_NAMES = _words(
    """
    Chen Novak Silva Rossi Khan Tanaka Berg Costa Dubois Fischer Garcia Haas Ito Jansen Kovacs Lopez Meyer
    Nielsen Okafor Patel Quinn Reyes Sato Torres Ueda Vega Weber Young Zhang Adler Bauer Cruz Dahl Evans Ford
    Grant Hill King
    """
)
CITIES = _words(
    """
    Oslo Paris Lagos Lima Kyoto Cairo Turin Delhi Porto Sydney Quito Dublin Madrid Vienna Prague Warsaw Athens
    Hanoi Nairobi Boston Denver Austin Seattle Toronto Geneva Lyon Munich Zagreb Riga Tallinn Accra Tunis Seoul
    Manila
    """
)
MONTHS = _words(
    """
    January February March April May June July August September October November December
    """
)
WEEKDAYS = _words(
    """
    Monday Tuesday Wednesday Thursday Friday Saturday Sunday
    """
)
DISHES = _words(
    """
    sushi pizza ramen tacos curry pasta falafel paella
    """
)
GENRES = _words(
    """
    jazz rock techno folk opera blues reggae soul
    """
)
LANGUAGES = _words(
    """
    French German Spanish Italian Japanese Korean Polish Greek
    """
)
PHRASES = ["good morning", "thank you", "where is the station", "see you soon", "how much is it", "good night"]


def sentiment(rng: random.Random) -> Pair:
    """A product review with negation and contrast; its overall sentiment."""
    positive = rng.random() < 0.5

    def clause(good: bool) -> str:
        subject = f"the {rng.choice(PARTS + SERVICE)}"
        negated = rng.random() < 0.2
        word = rng.choice(GOOD if good != negated else BAD)
        verb = rng.choice(["is", "was", "feels", "seems"])
        adverb = rng.choice(["not", "never", "hardly"] if negated else ["", "really", "just"])
        return f"{subject} {verb} {adverb} {word}"

    opening = rng.choice(
        ["I bought this {p} last week.", "My new {p} arrived today.", "We use the {p} every day.", ""]
    )
    opening = opening.format(p=rng.choice(PRODUCTS))
    if rng.random() < 0.3:
        body = f"{clause(not positive)}, but {clause(positive)}"
    elif rng.random() < 0.5:
        body = f"{clause(positive)} and {clause(positive)}"
    else:
        body = clause(positive)
    text = f"{opening} {body[0].upper() + body[1:]}."
    return " ".join(text.split()), "positive" if positive else "negative"


def intent(rng: random.Random) -> Pair:
    """A request to an assistant; the service that it belongs to."""
    city, name, day = rng.choice(CITIES), rng.choice(FIRST_NAMES), rng.choice(WEEKDAYS)
    hour, number = rng.randrange(1, 13), rng.randrange(2, 10)
    forms = {
        "weather": [
            f"Will it rain in {city} on {day}?",
            f"How warm is it in {city} today?",
            f"Do I need a coat in {city} on {day}?",
        ],
        "alarm": [
            f"Wake me up at {hour} on {day}.",
            f"Set an alarm for {hour} tomorrow, please.",
            f"Get me out of bed at {hour} on {day}.",
        ],
        "music": [
            f"Play some {rng.choice(GENRES)} for {name}.",
            f"I want to hear {rng.choice(GENRES)} on {day}.",
            f"Put on the {rng.choice(GENRES)} album that {name} likes.",
        ],
        "restaurant": [
            f"Book a table for {number} on {day} at {hour}.",
            f"Where can we eat {rng.choice(DISHES)} in {city}?",
            f"Find a place with good {rng.choice(DISHES)} near {city}.",
        ],
        "travel": [
            f"I need a flight to {city} on {day}.",
            f"How do I get from {city} to {rng.choice(CITIES)}?",
            f"Find {number} train tickets to {city} for {day}.",
        ],
        "payment": [
            f"Send {number * 10} euros to {name}.",
            f"Transfer {number}00 dollars to {name} on {day}.",
            f"Did {name} pay me back on {day}?",
        ],
        "translate": [
            f"How do you say {rng.choice(PHRASES)} in {rng.choice(LANGUAGES)}?",
            f"What is the {rng.choice(LANGUAGES)} for {rng.choice(PHRASES)}?",
            f"Translate {rng.choice(PHRASES)} into {rng.choice(LANGUAGES)}.",
        ],
        "call": [
            f"Ring {name} in {city}.",
            f"Phone {name} at {hour} on {day}.",
            f"Get {name} {rng.choice(LAST_NAMES)} on the line.",
        ],
    }
    label = rng.choice(sorted(forms))
    text = rng.choice(forms[label])
    lead = rng.choice(["", "", "Hi,", "Hello,", "Hey,", "Please help:"])
    return f"{lead} {text}".strip(), label


def extract(rng: random.Random) -> Pair:
    """A line of an order mail; the name, city and order number in it."""
    name = f"{rng.choice(FIRST_NAMES)} {rng.choice(LAST_NAMES)}"
    city, order, product = rng.choice(CITIES), str(rng.randrange(1000, 10000)), rng.choice(PRODUCTS)
    form = rng.choice(
        [
            "Order {o} from {n}, ships to {c}.",
            "Hello, {n} in {c} asks about order {o}.",
            "Please send order {o} to {n}, {c}.",
            "The {p} for {n} goes to {c}, order {o}.",
            "Order {o}: one {p} to {c} for {n}.",
            "Today {n} wrote from {c} that order {o} is late.",
        ]
    )
    return form.format(o=order, n=name, c=city, p=product), f"name: {name}; city: {city}; order: {order}"


def dates(rng: random.Random) -> Pair:
    """A date in a common notation; the same date in ISO 8601."""
    year, month, day = rng.randrange(1990, 2030), rng.randrange(1, 13), rng.randrange(1, 29)
    name = MONTHS[month - 1]
    short = name[:3]
    ordinal = f"{day}{'th' if 10 <= day <= 20 else {1: 'st', 2: 'nd', 3: 'rd'}.get(day % 10, 'th')}"
    form = rng.choice(
        [
            f"the {ordinal} of {name} {year}",
            f"{name} {day}, {year}",
            f"{day} {name} {year}",
            f"{short} {ordinal}, {year}",
            f"{day} {short} {year}",
        ]
    )
    lead = rng.choice(["due on {d}", "born {d}", "signed on {d}", "meeting on {d}", "{d}", "it began on {d}"])
    text = lead.format(d=form)
    return f"{text[0].upper() + text[1:]}.", f"{year:04d}-{month:02d}-{day:02d}"


def _sentence(rng: random.Random) -> str:
    return rng.choice([sentiment, intent, extract])(rng)[0]


def last_word(rng: random.Random) -> Pair:
    """A sentence; its last word."""
    text = _sentence(rng)
    return text, text.rstrip(".?!").split()[-1]


def first_word(rng: random.Random) -> Pair:
    """A sentence; its first word."""
    text = _sentence(rng)
    return text, text.split()[0].strip(",:;")


def repeat(rng: random.Random) -> Pair:
    """A sentence, or an unpredictable list of names and numbers; the same line."""
    if rng.random() < 0.3:
        text = intent(rng)[0]
    else:
        items = [
            rng.choice(
                [rng.choice(FIRST_NAMES), rng.choice(LAST_NAMES), rng.choice(CITIES), str(rng.randrange(1000, 10000))]
            )
            for _ in range(rng.randrange(3, 7))
        ]
        text = f"List: {', '.join(items)}."
    return text, text


def product(rng: random.Random) -> Pair:
    """A review of one clause; the part or service that it is about."""
    subject = rng.choice(PARTS + SERVICE)
    return f"The {subject} {rng.choice(['is', 'was', 'feels'])} {rng.choice(GOOD + BAD)}.", subject


@dataclass(frozen=True)
class Task:
    """A task and its written instructions.

    Attributes:
        draw: Draws one (input, output) pair.
        instructions: The possible lines before the input.
        weight: Relative frequency of the task in the corpus.
    """

    draw: Callable[[random.Random], Pair]
    instructions: tuple[str, ...]
    weight: float = 1.0


TASKS = {
    "sentiment": Task(
        sentiment,
        (
            "Classify the sentiment of this review as positive or negative.",
            "Is this review positive or negative?",
            "Tell whether the customer is happy.",
            "Sentiment of the review:",
            "Say positive or negative.",
            "Does the writer like it?",
        ),
        2.5,
    ),
    "intent": Task(
        intent,
        (
            "Which intent does this request have?",
            "Route this request to a service.",
            "Name the intent:",
            "Choose weather, alarm, music, restaurant, travel, payment, translate or call.",
            "What does the user want?",
            "Intent of the message:",
        ),
    ),
    "extract": Task(
        extract,
        (
            "Extract the name, the city and the order number.",
            "Fields of this order:",
            "Who ordered, where does it go, and what is the number?",
            "List name, city and order.",
            "Turn this line into fields.",
            "Find the customer, the city and the order.",
        ),
        2.5,
    ),
    "dates": Task(
        dates,
        (
            "Write the date as year, month and day in digits.",
            "Normalise the date.",
            "The date in ISO format:",
            "Convert this date to digits.",
            "When is it? Use digits only.",
            "Give the date as a number.",
        ),
        1.5,
    ),
}

EXTRA_TASKS = {
    "last_word": Task(last_word, ("What is the last word?", "Give the final word.", "Last word:"), 0.5),
    "first_word": Task(first_word, ("What is the first word?", "Give the opening word.", "First word:"), 0.4),
    "repeat": Task(repeat, ("Repeat this.", "Say the same again.", "Copy the line:"), 1.5),
    "product": Task(product, ("What is the review about?", "Name the part.", "Topic of the review:"), 0.4),
}
