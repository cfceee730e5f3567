"""The best rows of each language, of which no web domain has more than its share."""

import sqlite3
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from marco_train.curation.duplicates import at_once, open_store, place_of
from marco_train.curation.frame import (
    Cost,
    Counted,
    Dropped,
    Outcome,
    Row,
    Shard,
    Shards,
    Transform,
    language_of,
)

STORE = "scores.sqlite"
OVER_SHARE = "rows of domains over their share"
NOT_BEST, OF_FULL_DOMAIN = "not among the best", "its domain has its share"


class _Found(IntEnum):
    kept = 0
    kept_over_share = 1
    passed_over = 2


@dataclass(frozen=True)
class Best:
    """Keeps the rows with the highest scores, of each language; of equal ones the first.

    A domain has at most its share of them. Where the others are too few, the best of those that
    were passed over fill up; rows without a domain are never passed over.
    """

    score: Callable[[Row], float]
    about: str
    """Which score it is."""
    count: int
    """Of each language."""
    domain_share: float
    num_languages: int
    name: str = "best"

    def identity(self) -> object:
        """Return score, count and share."""
        return [self.about, self.count, self.domain_share]

    def plan(self, rows: float) -> Cost:
        """Estimate its time."""
        return Cost(min(rows, self.count * self.num_languages), seconds=rows / 20_000)

    @contextmanager
    def opened(self, before: Shards, scratch: Path) -> Iterator[Transform]:
        """Rank all rows, unless they were before."""
        tables = (
            "scores (place INTEGER PRIMARY KEY, language TEXT, domain TEXT, score REAL)",
            "found (place INTEGER PRIMARY KEY, became INTEGER)",
            "ranked (is_ranked INTEGER)",
        )
        with closing(open_store(scratch / STORE, *tables)) as store:
            if store.execute("SELECT * FROM ranked").fetchone() is None:
                with at_once(store):
                    store.executemany(
                        "INSERT INTO scores VALUES (?, ?, ?, ?)",
                        (
                            (place_of(shard, at), language_of(row), row["domain"], self.score(row))
                            for shard in before
                            for at, row in enumerate(shard.rows)
                        ),
                    )
                    for place, found in self._ranked(store):
                        store.execute("INSERT INTO found VALUES (?, ?)", (place, found))
                    store.execute("INSERT INTO ranked VALUES (1)")

            def transform(shard: Shard) -> Iterator[Outcome]:
                span = place_of(shard, 0), place_of(shard, len(shard.rows))
                query = "SELECT * FROM found WHERE place >= ? AND place < ?"
                found = dict(store.execute(query, span))
                for at, row in enumerate(shard.rows):
                    match found.get(place_of(shard, at)):
                        case _Found.kept:
                            yield row
                        case _Found.kept_over_share:
                            yield row
                            yield Counted(OVER_SHARE, 1, language_of(row))
                        case _Found.passed_over:
                            yield Dropped(row, OF_FULL_DOMAIN)
                        case _:
                            yield Dropped(row, NOT_BEST)

            yield transform

    def _ranked(self, store: sqlite3.Connection) -> Iterator[tuple[int, int]]:
        """The rows that count, each with what becomes of it."""
        languages = [name for (name,) in store.execute("SELECT DISTINCT language FROM scores")]
        for language in languages:
            best_first = store.execute(
                "SELECT place, domain FROM scores WHERE language = ? ORDER BY score DESC, place",
                (language,),
            )
            most = max(1, int(self.domain_share * self.count))
            of_domain: Counter[str] = Counter()
            num_kept, passed_over = 0, array("q")
            for place, domain in best_first:
                if num_kept == self.count:
                    break
                if domain and of_domain[domain] == most:
                    passed_over.append(place)
                    continue
                of_domain[domain] += 1
                num_kept += 1
                yield place, _Found.kept
            room = self.count - num_kept
            yield from ((place, _Found.kept_over_share) for place in passed_over[:room])
            yield from ((place, _Found.passed_over) for place in passed_over[room:])
