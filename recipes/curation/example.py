"""Write small inputs to try the pipelines of culture and science on: nothing in them is true.

    python recipes/curation/example.py DIR

DIR/entities.json.bz2 has some 300 entities as Wikidata's dump has them, of five languages and a
little of a sixth; DIR/prompts.jsonl has 40 questions as Nemotron-Cascade-2's `science` has them.
"""

import bz2
import json
import sys
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

Entity = dict[str, Any]

CLASSES = {
    "Q23413": "castle",
    "Q746549": "dish",
    "Q132241": "festival",
    "Q4022": "river",
    "Q33506": "museum",
}
CLASS_LABELS = {
    "de": ("Burg", "Gericht", "Fest", "Fluss", "Museum"),
    "fr": ("château", "plat", "fête", "rivière", "musée"),
    "ar": ("قلعة", "طبق", "مهرجان", "نهر", "متحف"),
    "ja": ("城", "料理", "祭り", "川", "博物館"),
    "th": ("ปราสาท", "อาหาร", "เทศกาล", "แม่น้ำ", "พิพิธภัณฑ์"),
    "en": tuple(CLASSES.values()),
}
COUNTRIES = {
    "de": ("Q183", "Deutschland", "Lindenau"),
    "fr": ("Q142", "France", "Clairval"),
    "ar": ("Q79", "مصر", "وادي النخيل"),
    "ja": ("Q17", "日本", "松原市"),
    "th": ("Q869", "ประเทศไทย", "บ้านดอนตาล"),
    "cs": ("Q213", "Česko", "Lipová"),
}
PREFIXES = {
    "de": "Eichen Linden Falken Hirsch Rosen Silber Winter Adler Birken Krähen",
    "fr": "Montclair Beauval Hautbois Clairefont Grisolle Sauveterre Roquebelle Valnoir Aubepin "
    "Fontrive",
    "ar": "النخيل الياسمين الغزلان الفيروز الرمان الزيتون الصقور الريحان اللؤلؤ السرو",
    "ja": "松風 青葉 白鷺 若竹 朝霧 夕凪 雪見 花園 鶴岡 月見",
    "th": "ดอกแก้ว ทองกวาว ใบบัว สนทราย น้ำใส ไผ่เขียว จันทร์งาม ศรีสุข พุทธรักษา ดาวเรือง",
}
NAMES = {
    "de": "{}burg {}klöße {}fest {}ach {}museum",
    "fr": "château_de_{} tourte_de_{} fête_de_{} ruisseau_de_{} musée_de_{}",
    "ar": "قلعة_{} طبق_{} مهرجان_{} نهر_{} متحف_{}",
    "ja": "{}城 {}鍋 {}祭 {}川 {}博物館",
    "th": "ปราสาท{} แกง{} เทศกาล{} แม่น้ำ{} พิพิธภัณฑ์{}",
}
TOWN_CLASS = "Q486972"
METRE = "Q11573"


def claim(value: Any, kind: str, datatype: str = "wikibase-item") -> Entity:
    """A statement as the dump has it."""
    data = {"value": value, "type": kind}
    return {
        "mainsnak": {"snaktype": "value", "datatype": datatype, "datavalue": data},
        "type": "statement",
        "rank": "normal",
    }


def item(id_: str) -> Entity:
    """A statement that names an item."""
    return claim({"entity-type": "item", "id": id_}, "wikibase-entityid")


def texts(by_language: dict[str, str]) -> Entity:
    """Labels or descriptions."""
    return {code: {"language": code, "value": text} for code, text in by_language.items()}


def entity(
    id_: str, labels: dict[str, str], claims: dict[str, list[Entity]], num_articles: int
) -> Entity:
    """An entity with articles in so many Wikipedias."""
    sites = [f"x{n}wiki" for n in range(num_articles)]
    return {
        "type": "item",
        "id": id_,
        "labels": texts(labels),
        "descriptions": {},
        "aliases": {},
        "claims": claims,
        "sitelinks": {site: {"site": site, "title": id_} for site in sites},
    }


def known_things() -> Iterator[Entity]:
    """Countries, towns, classes and a unit, which the others name."""
    for code, (country, name, town) in COUNTRIES.items():
        yield entity(country, {code: name, "en": f"country of {code}"}, {}, 0)
        inside = {"P31": [item(TOWN_CLASS)], "P17": [item(country)], "P131": [item(country)]}
        yield entity(town_of(code), {code: town, "en": f"town of {code}"}, inside, 1)
    for place, class_ in enumerate(CLASSES):
        labels = {code: names[place] for code, names in CLASS_LABELS.items()}
        yield entity(class_, labels, {"P279": [item("Q35120")]}, 3)
        # What most entities are: a class below the one that the taxonomy knows.
        below = {"P279": [item(class_)]}
        yield entity(f"Q900{place}", {c: f"{t} (2)" for c, t in labels.items()}, below, 2)
    metre = {
        "de": "Meter",
        "fr": "mètre",
        "ar": "متر",
        "ja": "メートル",
        "th": "เมตร",
        "en": "metre",
    }
    yield entity(METRE, metre, {}, 1)


def town_of(code: str) -> str:
    """The id of a language's town."""
    return f"Q80{list(COUNTRIES).index(code)}"


def things() -> Iterator[Entity]:
    """Castles, dishes, festivals, rivers and museums of five languages, and some faults."""
    numbers = count(100_000)
    for code, patterns in NAMES.items():
        for kind, pattern in enumerate(patterns.split()):
            for place, prefix in enumerate(PREFIXES[code].split()):
                label = pattern.format(prefix).replace("_", " ")
                yield thing(
                    next(numbers), {code: label, "en": f"Thing {kind}-{place}"}, kind, place, code
                )
    for place, name in enumerate(("Lipový hrad", "Javorový hrad", "Dubový hrad")):
        yield thing(next(numbers), {"cs": name}, 0, place, "cs")
    for place in range(10):
        yield thing(next(numbers), {}, 0, place, "de")  # without a label
        yield thing(next(numbers), {"en": f"Only English {place}"}, 1, place, "fr")
        rare = thing(next(numbers), {"de": f"Unbekannt {place}"}, 2, place, "de")
        yield rare | {"sitelinks": {}}
        other = {"P31": [item("Q16521")], "P17": [item("Q183")]}
        yield entity(f"Q{next(numbers)}", {"de": f"Käfer {place}"}, other, 9)  # of no topic


def thing(number: int, labels: dict[str, str], kind: int, place: int, code: str) -> Entity:
    """One that lies in its language's town; of every second one only the town tells the country."""
    year = f"+{1200 + 13 * place + 7 * kind}-00-00T00:00:00Z"
    begun = claim({"time": year, "precision": 9}, "time", "time")
    size = {"amount": f"+{40 + 3 * place}", "unit": f"http://www.wikidata.org/entity/{METRE}"}
    claims = {
        "P31": [item(f"Q900{kind}")],
        "P131": [item(town_of(code))],
        "P571": [begun],
        "P2048": [claim(size, "quantity", "quantity")],
        "P214": [claim(f"{number}", "string", "external-id")],
    }
    if place % 2:
        claims["P17"] = [item(COUNTRIES[code][0])]
    return entity(f"Q{number}", labels, claims, 30 - place)


def prompts() -> Iterator[Entity]:
    """Questions of which every fourth has no answer that can be compared."""
    for n in range(40):
        mass, speed = 2 + n, 3 + n % 7
        asked = (
            f"A body of {mass} kg moves at {speed} m/s. What is its kinetic energy in joules? "
            "Put the number into a box."
        )
        answer = f"<think>half of m v squared</think>It is $\\boxed{{{mass * speed**2 / 2:g}}}$."
        if n % 4 == 3:
            asked = f"Why does ice float on water? Explain it to a pupil of {8 + n} years."
            answer = "Ice is less dense than water, as its molecules form an open lattice."
        turns = [
            {"role": "system", "content": "You are a patient teacher of physics."},
            {"role": "user", "content": asked},
            {"role": "assistant", "content": answer},
        ]
        yield {"messages": turns, "domain": "science", "source": "example", "generator": "none"}


def main(directory: Path) -> None:
    """Write both files."""
    directory.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(each, ensure_ascii=False) for each in (*known_things(), *things())]
    lines[5:5] = ['{"type": "item", "id": "Q1", "labels": ', "[]"]  # a line that was cut
    array = "[\n" + ",\n".join(lines) + "\n]\n"
    (directory / "entities.json.bz2").write_bytes(bz2.compress(array.encode()))
    asked = "".join(json.dumps(row) + "\n" for row in prompts())
    (directory / "prompts.jsonl").write_text(asked, encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
