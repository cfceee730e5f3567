"""Entities of Wikidata where they lie: dumps of JSON lines, packed or not, or a SPARQL result.

    file -> lines -> Entity: labels, descriptions and the claims that are asked for

Formats: https://doc.wikimedia.org/Wikibase/master/php/docs_topics_json.html and
https://www.w3.org/TR/sparql11-results-json/.
"""

import bz2
import gzip
import json
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from marco_train.errors import InputError

INSTANCE_OF, SUBCLASS_OF, LOCATED_IN, OCCUPATION = "P31", "P279", "P131", "P106"
COUNTRIES = ("P17", "P495", "P27")  # country, country of origin, country of citizenship
HUMAN = "Q5"
ITEM = re.compile(r"Q[1-9]\d*")
# What stands for a language where it has no label of its own. `mul` is of all languages, as most
# names of people have it: https://www.wikidata.org/wiki/Help:Default_values_for_labels_and_aliases
VARIANTS = {
    "zh": ("zh-hans", "zh-cn", "zh", "zh-hant"),
    "pt": ("pt", "pt-br"),
    "en": ("en", "en-gb", "en-ca"),
}
ANY_LANGUAGE = "mul"
# Sites that end in "wiki" and hold no articles.
NO_ARTICLES = {"commonswiki", "specieswiki", "metawiki", "mediawikiwiki", "sourceswiki"}
# Values that name a thing elsewhere and say nothing of it.
NOT_SAID = {"external-id", "url", "commonsMedia", "globe-coordinate", "math", "tabular-data"}
BEGIN = re.compile(rb'\{"type": ?"\w+", ?"id": ?"([A-Z]\d+)"')
ENTITY_URL = "http://www.wikidata.org/entity/"
YEAR, MONTH, DAY = 9, 10, 11  # precisions of a time
MAX_VALUES = 8  # of one property
SAMPLED = 2**23  # bytes by which the lines of a file are estimated


@dataclass
class Entity:
    """A thing, in the languages and with the properties that were asked for."""

    id: str
    """As Q42."""
    num_articles: int
    """Wikipedias that have an article on it: how popular it is."""
    labels: dict[str, str]
    """By language; a variant stands for a language without its own."""
    descriptions: dict[str, str]
    claims: dict[str, list[str]]
    """Values by property: items as Q42, times as 1952-03-11, 1952-03 or 1952, quantities as 4.5 or
    `4.5 Q11573` with a unit, else texts. The preferred ones where there are any, no deprecated."""
    names: dict[str, dict[str, str]] = field(default_factory=dict)
    """Labels of the items among the values, by item and language, where the input gives them."""


@dataclass(frozen=True)
class Wanted:
    """What of an entity is kept."""

    languages: tuple[str, ...]
    properties: frozenset[str]
    min_articles: int
    """Of an entity to be written about; classes and places are read with fewer."""


class LineError(ValueError):
    """A line that gives no entity; the message is the reason that is counted."""


def is_sparql(file: Path) -> bool:
    """Whether a file is the JSON of a SPARQL result."""
    try:
        with _opened(file) as content:
            begins = content.read(4096)
    except (OSError, EOFError, zlib.error):
        return False
    return begins.lstrip()[:1] == b"{" and b'"head"' in begins and b'"vars"' in begins


def read_lines(file: Path) -> Iterator[bytes | None]:
    """Read the lines of a dump that may be packed with bz2 or gzip; memory holds one.

    None stands for the rest of a file that is cut short or damaged.

    Raises:
        InputError: The file cannot be opened.
    """
    try:
        content = _opened(file)
    except OSError as error:
        raise InputError(f"{str(file)!r} cannot be read: {error}") from error
    with content:
        try:
            for whole in content:
                line = whole.strip().rstrip(b",")
                if len(line) > 1:  # the brackets of the array stand on lines of their own
                    yield line
        except (EOFError, OSError, zlib.error):
            yield None


def estimated_lines(file: Path) -> float:
    """Estimate the lines of a file, packed or not, by its beginning; exact of a short one.

    Of a SPARQL result they are those of its JSON, and there may be one.
    """
    lines = read = 0
    with file.open("rb") as packed:
        content = _unpacked(packed)
        try:
            while read < SAMPLED and (chunk := content.read(2**16)):
                lines += chunk.count(b"\n")
                read += len(chunk)
        except (EOFError, OSError, zlib.error):
            return float(lines)
        share = packed.tell() / max(1, file.stat().st_size)
    return lines / share if read >= SAMPLED else float(lines)


def _opened(file: Path) -> IO[bytes]:
    return _unpacked(file.open("rb"))


def _unpacked(content: IO[bytes]) -> IO[bytes]:
    begins = content.read(3)
    content.seek(0)
    if begins == b"BZh":
        return bz2.BZ2File(content)
    if begins[:2] == b"\x1f\x8b":
        return gzip.GzipFile(fileobj=content)  # type: ignore[return-value]
    return content


def may_matter(line: bytes, min_articles: int) -> bool:
    """Whether a line is worth reading, by what its bytes hold: most items have no article at all.

    Classes and places are, as others are told by them, and so is what is no line of a dump.
    """
    return (
        line.count(b'"site":') >= min_articles
        or b'"P279":' in line
        or b'"P131":' in line
        or not (line.startswith(b"{") and line.endswith(b"}"))
    )


def id_of(line: bytes) -> str | None:
    """The id of a line's entity, most often without reading the line; None: it has none."""
    begin = BEGIN.match(line)
    if begin:
        return begin[1].decode()
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    id_ = found.get("id") if isinstance(found, dict) else None
    return id_ if isinstance(id_, str) else None


def entity_of(line: bytes, wanted: Wanted) -> Entity:
    """Read a line of a dump.

    Raises:
        LineError: It holds no item.
    """
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise LineError("line is not JSON") from error
    if not isinstance(found, dict) or not isinstance(found.get("id"), str):
        raise LineError("line is no entity")
    if not ITEM.fullmatch(found["id"]):
        raise LineError("entity is no item")  # a property or a lexeme
    sites = _mapping(found.get("sitelinks"))
    return Entity(
        found["id"],
        sum(site.endswith("wiki") and site not in NO_ARTICLES for site in sites),
        _texts(found.get("labels"), wanted.languages),
        _texts(found.get("descriptions"), wanted.languages),
        _claims(_mapping(found.get("claims")), wanted.properties),
    )


def label_of(labels: Mapping[str, str], language: str) -> str | None:
    """A label in a language or, without one, in English."""
    return labels.get(language) or labels.get("en")


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}  # of nothing, PHP makes an empty list


def _texts(by_code: Any, languages: Sequence[str]) -> dict[str, str]:
    by_code = _mapping(by_code)
    found = {}
    for language in languages:
        for code in (*VARIANTS.get(language, (language,)), ANY_LANGUAGE):
            value = _mapping(by_code.get(code)).get("value")
            if isinstance(value, str) and value.strip():
                found[language] = " ".join(value.split())
                break
    return found


def _claims(claims: Mapping[str, Any], properties: frozenset[str]) -> dict[str, list[str]]:
    found = {}
    for name in sorted(properties & claims.keys()):
        statements = claims[name] if isinstance(claims[name], list) else []
        said = [s for s in statements if isinstance(s, dict) and s.get("rank") != "deprecated"]
        preferred = [s for s in said if s.get("rank") == "preferred"]
        values = [_value(_mapping(s.get("mainsnak"))) for s in preferred or said]
        kept = list(dict.fromkeys(value for value in values if value))[:MAX_VALUES]
        if kept:
            found[name] = kept
    return found


def _value(snak: Mapping[str, Any]) -> str | None:
    """What a statement says; None: nothing that a text could."""
    if snak.get("datatype") in NOT_SAID:
        return None
    data = _mapping(snak.get("datavalue"))
    value, kind = data.get("value"), data.get("type")
    match kind, value:
        case "wikibase-entityid", {"id": str(item)}:
            return item if ITEM.fullmatch(item) else None
        case "time", {"time": str(time), "precision": int(precision)}:
            return time_of(time, precision)
        case "quantity", {"amount": str(amount), **rest}:
            number = amount.lstrip("+")
            unit = str(rest.get("unit", "1")).rsplit("/", 1)[-1]
            return f"{number} {unit}" if ITEM.fullmatch(unit) else number
        case ("monolingualtext", {"text": str(text)}) | ("string", str(text)):
            return " ".join(text.split()) or None
    return None


def time_of(time: str, precision: int) -> str | None:
    """Write a time of Wikidata as far as it is known: +1952-03-11T00:00:00Z as 1952-03-11.

    None: not even its year is.
    """
    match = re.fullmatch(r"([+-])0*(\d+)-(\d\d)-(\d\d)T.*", time)
    if match is None or precision < YEAR:
        return None
    sign, year, month, day = match.groups()
    parts = [year, month, day][: max(1, precision - YEAR + 1)]
    return ("-" if sign == "-" else "") + "-".join(p for p in parts if p != "00")


def read_sparql(file: Path, wanted: Wanted) -> Iterator[Entity | None]:
    """Read the entities of a SPARQL result, which is held in memory; rows of one item are joined.

    None stands for a row without an item.

    Variables: `item`; `label`, `description` with their languages; `articles`; and properties by
    their names, as `P17`, with `P17Label` for the name of an item among the values.

    Raises:
        InputError: It is not such a result.
    """
    try:
        with _opened(file) as content:
            found = json.loads(content.read())
        variables, rows = found["head"]["vars"], found["results"]["bindings"]
    except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{str(file)!r} is no whole SPARQL result in JSON, with head.vars and "
            f"results.bindings: {error!r}; ask for it again"
        ) from error
    if "item" not in variables:
        raise InputError(
            f"{str(file)!r} has the variables {variables} and no `item`; select ?item ?label "
            "?description ?articles ?P31 ?P31Label ..."
        )
    entities: dict[str, Entity] = {}
    for row in rows:
        item = _item(_bound(row, "item"))
        if item is None:
            yield None
            continue
        entity = entities.setdefault(item, Entity(item, 0, {}, {}, {}))
        _add_row(entity, row, wanted)
    yield from entities.values()


def _add_row(entity: Entity, row: Mapping[str, Any], wanted: Wanted) -> None:
    articles = _bound(row, "articles")
    if articles.isdecimal():
        entity.num_articles = max(entity.num_articles, int(articles))
    for name, texts in (("label", entity.labels), ("description", entity.descriptions)):
        _add_text(texts, row.get(name), wanted.languages)
    for name in wanted.properties & row.keys():
        value = _sparql_value(_mapping(row[name]))
        values = entity.claims.setdefault(name, [])
        if value and value not in values and len(values) < MAX_VALUES:
            values.append(value)
        if value and ITEM.fullmatch(value):
            names = entity.names.setdefault(value, {})
            _add_text(names, row.get(f"{name}Label"), wanted.languages)


def _add_text(texts: dict[str, str], bound: Any, languages: Sequence[str]) -> None:
    text, code = _mapping(bound).get("value"), _mapping(bound).get("xml:lang", "")
    if not isinstance(text, str) or not text.strip() or ITEM.fullmatch(text):
        return  # the label service gives the item's id where there is no label
    for language in languages:
        if code in (*VARIANTS.get(language, (language,)), ANY_LANGUAGE):
            texts.setdefault(language, " ".join(text.split()))


def _bound(row: Any, name: str) -> str:
    return str(_mapping(_mapping(row).get(name)).get("value", ""))


def _item(value: str) -> str | None:
    item = value.rsplit("/", 1)[-1]
    return item if ITEM.fullmatch(item) else None


def _sparql_value(bound: Mapping[str, Any]) -> str | None:
    value = str(bound.get("value", ""))
    if bound.get("type") == "uri":
        return _item(value) if value.startswith(ENTITY_URL) else None
    if str(bound.get("datatype", "")).endswith("#dateTime"):
        sign = "" if value.startswith("-") else "+"
        date = time_of(f"{sign}{value}", DAY)
        # Of a year alone, the query service gives the first of January.
        return date.removesuffix("-01-01") if date else None
    return " ".join(value.split()) or None
