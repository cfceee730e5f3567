"""The tasks of the quickstart: small enough that a model of half a million weights learns them.

Facts come from the Unicode CLDR through babel; arithmetic, letter counting and syllogisms are items
of reasoning-gym, judged by its scorers. All wordings are our own: reasoning-gym's are too long, and
several wordings of a fact let a held-out one be answered. Nothing iterates over a set: same seed,
same rows, in every process.
"""

import datetime
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from random import Random
from typing import Any

from babel import Locale
from babel.dates import format_skeleton
from babel.numbers import format_decimal, get_currency_name, get_territory_currencies


def words_of(text: str) -> tuple[str, ...]:
    """The words of a text, for the lists below."""
    return tuple(text.split())


LANGUAGES = words_of(
    "en zh ar de es fr ko ja pt tr id it nl pl ru vi th he uk ms bn cs ur kk el ro hu ne az"
)
UNKNOWN_PLACE = "I do not know this place."

# CLDR keeps the history of currencies; without a date the answer would depend on today.
CURRENCY_DATE = datetime.date(2024, 1, 1)
TERRITORIES = words_of(
    "AL AO AR AU AZ BD BR BW CA CH CL CN CZ DK EG GE GH HU ID IN "
    "IS JP KE KH KZ LA MG MN MX MY NG NO PE PH PL RO RU SE TH UA"
)
# Languages in Latin letters whose short and long month names differ, save perhaps May.
SHORT_MONTH_LANGUAGES = words_of("en es it tr")

PEOPLE = words_of("Hana Omar Lena Ravi Mei Juan Olga Kofi Nora Ivan Sara Liam")
COLORS = words_of("red blue green white black pink brown gray")
ANIMALS = words_of("cat dog lion horse bird fish bear duck goat mouse")
THINGS = words_of("tree river moon stone bread milk door table house road")
WORDS = (*PEOPLE, *COLORS, *ANIMALS, *THINGS)
# The values that a JSON key can take; numbers are the one kind that is not a string.
JSON_VALUES: Mapping[str, Sequence[str | int]] = {
    "age": range(10, 80),
    "animal": ANIMALS,
    "color": COLORS,
    "name": PEOPLE,
    "thing": THINGS,
}

# The largest number of the arithmetic tasks: few enough facts to meet each one often.
LARGEST = 5
TWO_DIGITS = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
# The weekdays (Monday is 0) and months of the translation tasks.
WEEKDAYS = (0, 2, 4, 6)
MONTHS = (1, 4, 7, 10)

# A wording is an opening and a question: together they give each fact many prompts. What a fact is
# about never starts a prompt, because its tokens would differ from those after a space.
OPENINGS = ("", "Tell me: ", "Question: ", "Please: ")
CURRENCY = (
    "Currency of {place}:",
    "Which currency has {place}?",
    "People of {place} pay in",
    "Name the currency of {place}.",
    "What is the currency of {place}?",
    "The currency in {place} is",
)
MONEY = (
    "I go to {place}. Which money?",
    "Money in {place}?",
    "I live in {place}. How do I pay?",
    "Do you know the money of {place}?",
    "For {place}, what money do I need?",
    "What do people in {place} pay with?",
    "A trip to {place}: what do I pay with?",
    "Which coins has {place}?",
)
PREFERENCES = {
    "short": (
        "I like short names.",
        "Short please.",
        "Choose the short one.",
        "Keep it short.",
        "Give me the short name.",
        "Short, not long.",
    ),
    "long": (
        "I like long names.",
        "Long please.",
        "Choose the long one.",
        "Keep it long.",
        "Give me the long name.",
        "Long, not short.",
    ),
}
ARITHMETIC = (
    "{expression} =",
    "What is {expression}?",
    "Compute {expression}.",
    "Result of {expression}:",
    "{expression} equals",
    "Solve {expression} now.",
)
GCD = (
    "gcd({0}, {1}) =",
    "What is the gcd of {0} and {1}?",
    "Compute the gcd: {0}, {1}",
    "gcd of {0} and {1}:",
    "Largest number that divides {0} and {1}:",
    "Greatest common divisor of {0}, {1}?",
)
COUNT_BITS = (
    "Ones in binary {0}:",
    "How many 1 bits has {0}?",
    "Count the 1 bits of {0}.",
    "Bits set in {0}:",
    "In binary, how many ones has {0}?",
    "Number of 1 bits in {0}:",
)
TO_ENGLISH = (
    "English for {word}:",
    "In English, {word} is",
    "Translate to English: {word}",
    "What is {word} in English?",
    "Say {word} in English.",
    "Meaning of {word}:",
)
FROM_ENGLISH = (
    "The {language} for {word}:",
    "In {language}, {word} is",
    "Translate to {language}: {word}",
    "What is {word} in {language}?",
    "Say {word} in {language}.",
    "The {language} word for {word}:",
)
DATE = (
    "Day {day} month {month}, the {language} way:",
    "Write day {day} month {month} in {language}:",
)
NUMBER = ("{number} the {language} way:", "Write {number} in {language}:")


@dataclass(frozen=True)
class Row:
    """One question with its answer.

    `fact` names what must be remembered to answer, as opposed to read off the prompt; a held-out
    row whose fact no training row states could not be answered and is dropped.
    """

    task: str
    language: str
    prompt: str
    answer: str
    verifier: Mapping[str, object] = field(default_factory=lambda: {"name": "exact"})
    fact: str | None = None


@dataclass(frozen=True)
class Task:
    """A task's category and its generator: from a random stream to rows, in random order."""

    category: str
    rows: Callable[[Random], Iterator[Row]]


def join(rng: Random) -> Iterator[Row]:
    """Words of the second line with a sign between them."""
    while True:
        sign = rng.choice("-+/&")
        words = rng.sample(WORDS, rng.randint(2, 3))
        prompt = f'Join with "{sign}":\n{" ".join(words)}'
        yield Row("join", "en", prompt, f" {sign} ".join(words))


def repeat(rng: Random) -> Iterator[Row]:
    """One or two words, two or three times."""
    while True:
        times = rng.randint(2, 3)
        words = " ".join(rng.sample(WORDS, rng.randint(1, 2)))
        yield Row("repeat", "en", f"Repeat {times} times:\n{words}", " ".join([words] * times))


def reverse_list(rng: Random) -> Iterator[Row]:
    """A list of words from the last to the first."""
    while True:
        words = rng.sample(WORDS, rng.randint(2, 3))
        prompt = f"Reverse this list:\n{', '.join(words)}"
        yield Row("revlist", "en", prompt, ", ".join(reversed(words)))


def fill_json(rng: Random) -> Iterator[Row]:
    """Two values put under the keys they belong to, in the schema's order."""
    while True:
        keys = sorted(rng.sample(sorted(JSON_VALUES), 2))
        filled = {key: rng.choice(JSON_VALUES[key]) for key in keys}
        kinds = {k: "integer" if isinstance(v, int) else "string" for k, v in filled.items()}
        shown = ", ".join(f'"{key}": {kind}' for key, kind in kinds.items())
        values = ", ".join(str(filled[key]) for key in rng.sample(keys, 2))
        schema = {
            "type": "object",
            "properties": {key: {"type": kind} for key, kind in kinds.items()},
            "required": keys,
            "additionalProperties": False,
        }
        yield Row(
            task="json",
            language="en",
            prompt=f"Fill the JSON schema {{{shown}}} from:\n{values}",
            answer=json.dumps(filled),
            verifier={"name": "json_schema", "schema": schema},
        )


def currency(rng: Random) -> Iterator[Row]:
    """The currency of a territory, as CLDR names both in English."""
    wordings = itertools.product(territories(), OPENINGS, CURRENCY)
    for place, opening, question in shuffled(wordings, rng):
        prompt = opening + question.format(place=place)
        yield Row("currency", "en", prompt, territories()[place], fact=place)


def letter_counting(rng: Random) -> Iterator[Row]:
    """Items of reasoning-gym with the text spelled out; every second answer is more than 1.

    Spelled out because a token hides its letters; evened out because three in four answers of the
    generator are 1.
    """
    once: list[Row] = []
    more: list[Row] = []
    for item in gym_items("letter_counting", rng, size=30_000, min_words=1, max_words=2):
        text = " ".join("".join(item["metadata"]["span"]).lower())
        if len(text) > 19 or not text.isascii():
            continue
        prompt = f'How many "{item["metadata"]["target_letter"]}" in: {text}'
        verifier = gym_verifier("letter_counting", item)
        row = Row("letter_counting", "en", prompt, item["answer"], verifier)
        (once if row.answer == "1" else more).append(row)
        if once and more:
            yield from (once.pop(), more.pop())


def sort_numbers(rng: Random) -> Iterator[Row]:
    """Three or four digits in ascending order."""
    while True:
        numbers = [rng.randint(0, 9) for _ in range(rng.randint(3, 4))]
        prompt = f"Sort these numbers:\n{', '.join(map(str, numbers))}"
        yield Row("sort", "en", prompt, ", ".join(map(str, sorted(numbers))))


def syllogism(rng: Random) -> Iterator[Row]:
    """Items of reasoning-gym without the first and the last line of its wording."""
    items = gym_items("syllogism", rng, size=30_000, invalid_ratio=0.5, inversion_probability=0.0)
    for item in items:
        facts = item["metadata"]
        prompt = (
            f"1. {facts['premise1']}\n2. {facts['premise2']}\n"
            f"Does it follow that: {facts['conclusion']}?"
        )
        yield Row("syllogism", "en", prompt, item["answer"], gym_verifier("syllogism", item))


def honest(rng: Random) -> Iterator[Row]:
    """The money of a place; every second place is made up, and the answer then says so."""
    wordings = itertools.product(territories(), OPENINGS, MONEY)
    for place, opening, question in shuffled(wordings, rng):
        prompt = opening + question.format(place=place)
        yield Row("honest", "en", prompt, territories()[place], fact=place)
        prompt = rng.choice(OPENINGS) + rng.choice(MONEY).format(place=made_up_place(rng))
        yield Row("honest", "en", prompt, UNKNOWN_PLACE)


def style(rng: Random) -> Iterator[Row]:
    """Of a month's short and its long name the one that the user prefers."""
    pairs = [
        (code, {"short": short, "long": long})
        for code in SHORT_MONTH_LANGUAGES
        for short, long in zip(months(code, "abbreviated"), months(code, "wide"), strict=True)
        if short != long
    ]
    orders = (("short", "long"), ("long", "short"))
    wishes = [(wish, words) for wish, wordings in PREFERENCES.items() for words in wordings]
    for (code, names), order, (wish, words) in shuffled(
        itertools.product(pairs, orders, wishes), rng
    ):
        prompt = f"{words}\n{names[order[0]]}\n{names[order[1]]}"
        yield Row("style", code, prompt, names[wish])


def chain_sum(rng: Random) -> Iterator[Row]:
    """Sums and differences of two small digits, none of them negative."""
    items = gym_items("chain_sum", rng, size=2000, **TWO_DIGITS)
    facts = {expression: item for expression, item in small(items) if int(item["answer"]) >= 0}
    return worded_facts("chain_sum", facts, ARITHMETIC, rng)


def products(rng: Random) -> Iterator[Row]:
    """Products of two small digits."""
    items = gym_items("products", rng, size=2000, **TWO_DIGITS)
    facts = dict(small(items))
    return worded_facts("products", facts, ARITHMETIC, rng)


def gcd(rng: Random) -> Iterator[Row]:
    """Greatest common divisors of two small numbers."""
    items = gym_items("gcd", rng, size=2000, min_value=1, max_value=LARGEST)
    facts = {" ".join(map(str, item["metadata"]["numbers"])): item for item in items}
    return worded_facts("gcd", facts, GCD, rng)


def count_bits(rng: Random) -> Iterator[Row]:
    """Ones in the binary form of a number below 16."""
    items = gym_items("count_bits", rng, size=2000, min_n=1, max_n=15)
    facts = {str(item["metadata"]["number"]): item for item in items}
    return worded_facts("count_bits", facts, COUNT_BITS, rng)


def small(items: Iterator[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Expressions without a number above the largest, with their items."""
    for item in items:
        expression = item["metadata"]["expression"]
        if all(int(term) <= LARGEST for term in expression.split()[::2]):
            yield expression, item


def worded_facts(
    task: str, facts: Mapping[str, Mapping[str, Any]], wordings: Sequence[str], rng: Random
) -> Iterator[Row]:
    """Each reasoning-gym item, once in each wording."""
    worded = itertools.product(facts.items(), OPENINGS, wordings)
    for (fact, item), opening, question in shuffled(worded, rng):
        prompt = opening + question.format(*fact.split(), expression=fact)
        yield Row(task, "en", prompt, item["answer"], gym_verifier(task, item), fact=fact)


def to_english(rng: Random) -> Iterator[Row]:
    """A weekday or a month in English; words that mean two things in two languages are left out."""
    meanings: dict[str, dict[str, str]] = {}
    for code in LANGUAGES[1:]:
        for word, english in zip(calendar_names(code), calendar_names("en"), strict=True):
            meanings.setdefault(word, {}).setdefault(english, code)
    clear = [(word, *found.popitem()) for word, found in meanings.items() if len(found) == 1]
    worded = itertools.product(clear, OPENINGS, TO_ENGLISH)
    for (word, english, code), opening, question in shuffled(worded, rng):
        yield Row("to_en", code, opening + question.format(word=word), english, fact=word)


def from_english(rng: Random) -> Iterator[Row]:
    """A weekday or a month in another language; half of the names, as these are hard to learn."""
    facts = [
        (code, word, english)
        for code in LANGUAGES[1:]
        for word, english in zip(calendar_names(code)[::2], calendar_names("en")[::2], strict=True)
    ]
    worded = itertools.product(facts, OPENINGS, FROM_ENGLISH)
    for (code, word, english), opening, question in shuffled(worded, rng):
        prompt = opening + question.format(word=english, language=language_name(code))
        yield Row("to_xx", code, prompt, word, fact=f"{code} {english}")


def date(rng: Random) -> Iterator[Row]:
    """Day and month in the order and with the signs of a language.

    All numbers have two digits, so whether a language pads them does not matter. Arabic is left
    out: its format holds direction marks that nobody sees.
    """
    languages = [code for code in LANGUAGES if code != "ar"]
    when = itertools.product(languages, range(10, 29), range(10, 13), DATE)
    for code, day, month, wording in shuffled(when, rng):
        prompt = wording.format(day=day, month=month, language=language_name(code))
        answer = format_skeleton("Md", datetime.date(2024, month, day), locale=code)
        yield Row("date", code, prompt, answer)


def number(rng: Random) -> Iterator[Row]:
    """A number of five digits and one decimal with the separators of a language."""
    while True:
        code, wording = rng.choice(LANGUAGES), rng.choice(NUMBER)
        value = f"{rng.randint(10000, 99999)}.{rng.randint(1, 9)}"
        prompt = wording.format(number=value, language=language_name(code))
        yield Row("number", code, prompt, format_decimal(value, locale=code))


TASKS: Mapping[str, Task] = {
    "join": Task("instruction_following", join),
    "json": Task("instruction_following", fill_json),
    "repeat": Task("instruction_following", repeat),
    "revlist": Task("instruction_following", reverse_list),
    "currency": Task("knowledge_reasoning", currency),
    "letter_counting": Task("knowledge_reasoning", letter_counting),
    "sort": Task("knowledge_reasoning", sort_numbers),
    "syllogism": Task("knowledge_reasoning", syllogism),
    "honest": Task("alignment", honest),
    "style": Task("alignment", style),
    "chain_sum": Task("math", chain_sum),
    "products": Task("math", products),
    "gcd": Task("math", gcd),
    "count_bits": Task("math", count_bits),
    "date": Task("multilingual", date),
    "number": Task("multilingual", number),
    "to_en": Task("multilingual", to_english),
    "to_xx": Task("multilingual", from_english),
}


@cache
def language_name(code: str) -> str:
    """The English name of a language."""
    return str(Locale.parse("en").languages[code])


@cache
def months(code: str, width: str) -> tuple[str, ...]:
    """The twelve months; width is `wide` or `abbreviated`.

    The `format` context is the genitive in Slavic languages and in Greek. The `stand-alone` one
    cannot be used: in babel 2.18 its aliases leak from one locale into another.
    """
    names = Locale.parse(code).months["format"][width]
    return tuple(str(names[month]) for month in range(1, 13))


@cache
def weekdays(code: str) -> tuple[str, ...]:
    """The seven days from Monday on."""
    names = Locale.parse(code).days["format"]["wide"]
    return tuple(str(names[day]) for day in range(7))


def calendar_names(code: str) -> list[str]:
    """The weekdays and months that are translated, always in the same order."""
    days, of_year = weekdays(code), months(code, "wide")
    return [days[day] for day in WEEKDAYS] + [of_year[month - 1] for month in MONTHS]


def name_lists() -> list[tuple[str, Sequence[str]]]:
    """Language and names: those to translate, and the short and the long months of `style`.

    No list holds two languages or a name in two forms, so none tells what a name means. English
    days are left out, because the copying tasks and the translations ask for them.
    """
    to_translate = [(code, calendar_names(code)) for code in LANGUAGES[1:]]
    of_style = [
        (code, months(code, width))
        for code in SHORT_MONTH_LANGUAGES
        for width in ("abbreviated", "wide")
    ]
    return [*to_translate, *of_style]


@cache
def territories() -> Mapping[str, str]:
    """English territory names with the English names of their currencies."""
    english = Locale.parse("en")
    return {
        str(english.territories[territory]): get_currency_name(code, locale=english)
        for territory in TERRITORIES
        for code in get_territory_currencies(territory, CURRENCY_DATE, CURRENCY_DATE)
    }


@cache
def every_territory_name() -> tuple[str, ...]:
    """All territory names that CLDR knows in English, in lower case."""
    return tuple(str(name).lower() for name in Locale.parse("en").territories.values())


def made_up_place(rng: Random) -> str:
    """A name that sounds like a place and belongs to none."""
    while True:
        syllables = [rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(2)]
        name = "".join(syllables) + rng.choice(("land", "nia", "stan", "ria", "mo", "ka", "via"))
        if name not in every_territory_name():
            return name.capitalize()


def gym_items(dataset: str, rng: Random, size: int, **settings: object) -> Iterator[dict[str, Any]]:
    """Items of reasoning-gym, drawn as they are asked for."""
    from reasoning_gym import create_dataset

    # Item i is drawn with seed + i, so near seeds would overlap.
    seed = rng.randrange(2**32)
    yield from create_dataset(dataset, seed=seed, size=size, **settings)


def gym_verifier(dataset: str, item: Mapping[str, Any]) -> dict[str, object]:
    """The part of an item that reasoning-gym's scorer of this data set reads."""
    entry = {"answer": item["answer"]}
    return {"name": "reasoning_gym", "dataset": dataset, "entry": entry}


def shuffled(items: Any, rng: Random) -> list[Any]:
    """The items in random order."""
    drawn = list(items)
    rng.shuffle(drawn)
    return drawn
