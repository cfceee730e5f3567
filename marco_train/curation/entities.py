"""Which entities a language gets questions on: of its countries, popular, and of all topics.

    Entities -> Classified: topic, language -> Popular -> Named: facts in words

An entity of several languages is a row of each.
"""

import json
import sqlite3
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from marco_train.content import look
from marco_train.curation.duplicates import at_once, open_store
from marco_train.curation.frame import (
    Cost,
    Dropped,
    Outcome,
    Row,
    Shard,
    Shards,
    Transform,
    language_of,
)
from marco_train.curation.taxonomy import (
    Edges,
    Places,
    number_of,
    numbers,
    read_countries,
    read_topics,
    starts_of,
    table,
)
from marco_train.curation.wikidata import (
    COUNTRIES,
    INSTANCE_OF,
    ITEM,
    LOCATED_IN,
    SUBCLASS_OF,
    Entity,
    LineError,
    Wanted,
    entity_of,
    estimated_lines,
    id_of,
    is_sparql,
    label_of,
    may_matter,
    read_lines,
    read_sparql,
)
from marco_train.errors import require
from marco_train.files import replaces

COUNTRY = COUNTRIES[0]
FEW_ARTICLES = "too few articles"
CUT = "the rest of a file that is cut short or damaged"
SUFFIXES = (".json", ".jsonl", ".ndjson", ".bz2", ".gz")
LINES_PER_SECOND = 10_000


@cache
def property_names() -> dict[str, str]:
    """What an LLM is told properties are."""
    names: dict[str, str] = table("properties")
    return names


@dataclass(frozen=True)
class Entities:
    """The entities of dumps and SPARQL results, one file after the other."""

    files: Sequence[Path]
    wanted: Wanted
    name: str = "entities"

    @classmethod
    def of(cls, path: Path, languages: Sequence[str], min_articles: int) -> "Entities":
        """Find the files of a directory, or take one file.

        Raises:
            InputError: There is none.
        """
        require(path.exists(), f"input: there is no file and no directory {str(path)!r}")
        below = sorted(path.rglob("*")) if path.is_dir() else [path]
        files = [file for file in below if file.is_file() and file.name.endswith(SUFFIXES)]
        require(
            bool(files),
            f"input {str(path)!r} has no file that ends in {', '.join(SUFFIXES)}: give a dump as "
            "https://dumps.wikimedia.org/wikidatawiki/entities/latest-all.json.bz2, lines of it, "
            "or the JSON of a SPARQL result",
        )
        every = tuple(dict.fromkeys((*languages, "en")))
        return cls(files, Wanted(every, frozenset(property_names()), min_articles))

    def identity(self) -> Any:
        """Names, sizes and times of the files, and what is kept."""
        wanted = self.wanted
        return [
            [look(file) for file in self.files],
            [wanted.languages, sorted(wanted.properties), wanted.min_articles],
        ]

    def plan(self) -> Cost:
        """Estimate the lines by the first ones of each file."""
        rows = sum(estimated_lines(file) for file in self.files)
        return Cost(rows, seconds=rows / LINES_PER_SECOND)

    def read(self, skip: int) -> Iterator[Row | Dropped]:
        """Read a row of each line; lines that are skipped are not taken apart."""
        for file in self.files:
            if is_sparql(file):
                entities = list(read_sparql(file, self.wanted))
                for entity in entities[skip:]:
                    yield Dropped({}, "line is no entity") if entity is None else asdict(entity)
                skip = max(0, skip - len(entities))
                continue
            for line in read_lines(file):
                if skip:
                    skip -= 1
                else:
                    yield self._row(line)

    def _row(self, line: bytes | None) -> Row | Dropped:
        if line is None:
            return Dropped({}, CUT)
        if not may_matter(line, self.wanted.min_articles):
            return Dropped({}, FEW_ARTICLES)
        try:
            entity = entity_of(line, self.wanted)
        except LineError as error:
            return Dropped({}, str(error))
        if entity.num_articles >= self.wanted.min_articles:
            return asdict(entity)
        telling = {
            name: values
            for name, values in entity.claims.items()
            if name in (SUBCLASS_OF, LOCATED_IN, COUNTRY)
        }
        if not telling:
            return Dropped({}, FEW_ARTICLES)
        return asdict(Entity(entity.id, entity.num_articles, {}, {}, telling))


ABOVE = "above.json"


@dataclass(frozen=True)
class Classified:
    """Tells topic, countries and so languages of entities; drops classes and places of others."""

    languages: Sequence[str]
    min_articles: int
    name: str = "classified"

    def identity(self) -> Any:
        """Return the languages and the tables."""
        return [list(self.languages), self.min_articles, table("topics"), table("countries")]

    def plan(self, rows: float) -> Cost:
        """Estimate its time."""
        return Cost(rows, seconds=rows / 20_000)

    @contextmanager
    def opened(self, before: Shards, scratch: Path) -> Iterator[Transform]:
        """Find what is above all classes and places of entities, unless it was found before."""
        known = scratch / ABOVE
        if not known.is_file():
            found = self._above(before, scratch)
            with replaces(known) as partial:
                partial.write_text(json.dumps(found))
        classes, places, countries = (
            {int(item): above for item, above in each.items()}
            for each in json.loads(known.read_text())
        )
        topics, where = read_topics(), Places(places, countries)
        by_language = {language: read_countries()[language] for language in self.languages}

        def transform(shard: Shard) -> Iterator[Outcome]:
            for row in shard.rows:
                if row["num_articles"] < self.min_articles:
                    yield Dropped({}, "only a class or a place of others")
                    continue
                if not row["labels"]:
                    yield Dropped({}, "no label")
                    continue
                topic = topics.of(row["claims"], classes)
                if topic is None:
                    yield Dropped({}, "of no topic")
                    continue
                yield from _of_languages(
                    row | {"topic": topic}, where.of(row["claims"]), by_language
                )

        yield transform

    def _above(self, before: Shards, scratch: Path) -> list[dict[int, list[int]]]:
        subclasses, located, countries = (Edges(scratch / f"{n}.edges") for n in range(3))
        edges = {SUBCLASS_OF: subclasses, LOCATED_IN: located, COUNTRY: countries}
        for each in edges.values():
            each.clear()
        classes: set[int] = set()
        places: set[int] = set()
        for row in before.rows():
            claims = row["claims"]
            for name, each in edges.items():
                each.add(number_of(row["id"]), numbers(claims.get(name, ())))
            if row["num_articles"] >= self.min_articles:
                classes |= set(starts_of(claims))
                places |= set(numbers(claims.get(LOCATED_IN, ())))
        for each in edges.values():
            each.flush()
        above_places = located.above(places)
        return [subclasses.above(classes), above_places, countries.above(above_places)]


def _of_languages(
    row: Row, places: Sequence[int], by_language: Mapping[str, frozenset[int]]
) -> Iterator[Outcome]:
    """A row for each language of one of the places."""
    is_any = False
    for language, known in by_language.items():
        country = next((place for place in places if place in known), None)
        if country is None:
            continue
        is_any = True
        codes = dict.fromkeys((language, "en"))
        found = row | {
            "language": language,
            "country": f"Q{country}",
            "labels": {code: row["labels"][code] for code in codes if code in row["labels"]},
            "descriptions": {
                code: row["descriptions"][code] for code in codes if code in row["descriptions"]
            },
        }
        has_label = language in row["labels"]
        yield found if has_label else Dropped(found, "no label in its language")
    if not is_any:
        yield Dropped(row, "of no country of these languages")


@dataclass(frozen=True)
class Popular:
    """Keeps the entities of a language with the most articles, as many of each topic as of others.

    What a topic lacks goes to the others. Of equally popular ones the first count.
    """

    count: int
    """Of each language."""
    num_languages: int
    name: str = "popular"

    def identity(self) -> Any:
        """Return how many."""
        return self.count

    def plan(self, rows: float) -> Cost:
        """Estimate its time."""
        return Cost(min(rows, self.count * self.num_languages), seconds=rows / 20_000)

    @contextmanager
    def opened(self, before: Shards, scratch: Path) -> Iterator[Transform]:
        """Find the least popular ones that are kept; memory grows with the topics."""
        heights: dict[tuple[str, str], Counter[int]] = {}
        for row in before.rows():
            heights.setdefault(_group(row), Counter())[row["num_articles"]] += 1
        quotas: dict[tuple[str, str], int] = {}
        for language in {language for language, _ in heights}:
            sizes = {group: h.total() for group, h in heights.items() if group[0] == language}
            quotas |= shared_out(self.count, sizes)
        least = {group: _least(heights[group], quota) for group, quota in quotas.items()}
        before_shard: list[Counter[tuple[str, str]]] = []  # as popular as the least
        ties: Counter[tuple[str, str]] = Counter()
        for shard in before:
            before_shard.append(ties.copy())
            ties.update(_group(r) for r in shard.rows if r["num_articles"] == least[_group(r)][0])

        def transform(shard: Shard) -> Iterator[Outcome]:
            so_far = before_shard[shard.number].copy()
            for row in shard.rows:
                group = _group(row)
                bound, room = least[group]
                if row["num_articles"] == bound:
                    so_far[group] += 1
                    is_kept = so_far[group] <= room
                else:
                    is_kept = row["num_articles"] > bound
                yield row if is_kept else Dropped(row, "less popular than others of its topic")

        yield transform


def _group(row: Row) -> tuple[str, str]:
    return language_of(row), row["topic"]


def shared_out(count: int, sizes: Mapping[Any, int]) -> dict[Any, int]:
    """Share a number out evenly; who has less gives the rest to the others."""
    found: dict[Any, int] = {}
    rest = count
    smallest_first = sorted(sizes, key=lambda group: (sizes[group], group))
    for place, group in enumerate(smallest_first):
        fair = rest // (len(sizes) - place)
        found[group] = min(sizes[group], fair)
        rest -= found[group]
    return found


def _least(heights: Counter[int], quota: int) -> tuple[int, int]:
    """How popular the least popular one is that is kept, and how many of them."""
    for height in sorted(heights, reverse=True):
        if heights[height] >= quota:
            return height, quota
        quota -= heights[height]
    return -1, 0


LABELS = "labels.sqlite"


@dataclass(frozen=True)
class Named:
    """Writes facts in words, for which the labels of items are read from the input once more."""

    source: Entities
    min_facts: int
    name: str = "named"

    def identity(self) -> Any:
        """Return what makes a fact."""
        return [property_names(), self.min_facts]

    def plan(self, rows: float) -> Cost:
        """Estimate its time, which is that of reading the input."""
        return Cost(rows, seconds=self.source.plan().seconds / 2)

    @contextmanager
    def opened(self, before: Shards, scratch: Path) -> Iterator[Transform]:
        """Read labels into a store on disk, unless they were before."""
        tables = ("labels (item INTEGER PRIMARY KEY, texts TEXT)", "complete (is_complete INTEGER)")
        with closing(open_store(scratch / LABELS, *tables)) as store:
            if store.execute("SELECT * FROM complete").fetchone() is None:
                items = sorted({item for row in before.rows() for item in _named_items(row)})
                with at_once(store):
                    store.execute("DELETE FROM labels")
                    store.executemany(
                        "INSERT OR REPLACE INTO labels VALUES (?, ?)", self._labels(items)
                    )
                    store.execute("INSERT INTO complete VALUES (1)")

            def transform(shard: Shard) -> Iterator[Outcome]:
                for row in shard.rows:
                    facts = _facts(row, store)
                    if len(facts) < self.min_facts:
                        yield Dropped(row, "too few facts")
                        continue
                    kept = {k: v for k, v in row.items() if k not in ("claims", "names")}
                    yield kept | {"facts": facts, "classes": row["claims"].get(INSTANCE_OF, [])}

            yield transform

    def _labels(self, items: Sequence[int]) -> Iterator[tuple[int, str]]:
        wanted = Wanted(self.source.wanted.languages, frozenset(), 0)
        for file in self.source.files:
            for line in () if is_sparql(file) else read_lines(file):
                id_ = id_of(line) if line else None
                if line is None or id_ is None or not ITEM.fullmatch(id_):
                    continue
                number = number_of(id_)
                place = bisect_left(items, number)
                if place == len(items) or items[place] != number:
                    continue
                try:
                    labels = entity_of(line, wanted).labels
                except LineError:
                    continue
                if labels:
                    yield number, json.dumps(labels, ensure_ascii=False)


def _named_items(row: Row) -> Iterator[int]:
    """Items that the values of a row name, also as units."""
    for values in row["claims"].values():
        for value in values:
            last = value.rsplit(" ", 1)[-1]
            if ITEM.fullmatch(last) and last not in row["names"]:
                yield number_of(last)


def _facts(row: Row, store: sqlite3.Connection) -> list[list[str]]:
    """What is known of an entity, each a property's name before the texts of its values."""
    found = []
    for name, values in row["claims"].items():
        texts = [text for value in values if (text := _text_of(value, row, store))]
        if texts:
            found.append([property_names()[name], *dict.fromkeys(texts)])
    return found


def _text_of(value: str, row: Row, store: sqlite3.Connection) -> str | None:
    """A value in words; None where the item that it names has none."""
    number, _, item = value.rpartition(" ")
    if not ITEM.fullmatch(item):
        return value
    labels = row["names"].get(item)
    if labels is None:
        query = "SELECT texts FROM labels WHERE item = ?"
        known = store.execute(query, (number_of(item),)).fetchone()
        labels = json.loads(known[0]) if known else {}
    label = label_of(labels, row["language"])
    if label is None:
        return number or None
    return f"{number} {label}".strip()
