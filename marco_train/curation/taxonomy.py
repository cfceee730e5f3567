"""What an entity is about and whose culture it is of, by the classes and places above it.

    edges of all entities, on disk -> what is above some of them -> their topics and countries

Legend: E edges.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from omegaconf import OmegaConf

from marco_train.config.curation import CURATION_DIR
from marco_train.curation.wikidata import (
    COUNTRIES,
    HUMAN,
    INSTANCE_OF,
    ITEM,
    LOCATED_IN,
    OCCUPATION,
    SUBCLASS_OF,
)

TABLES = CURATION_DIR / "tables"
EDGES_TOGETHER = 2**20  # that are read: 16 MiB
EDGES_WAITING = 2**14  # to be written
Claims = Mapping[str, Sequence[str]]


def table(name: str) -> Any:
    """Read one of the tables of `configs/curation/tables`."""
    return OmegaConf.to_container(OmegaConf.load(TABLES / f"{name}.yaml"))


def number_of(item: str) -> int:
    """42 of Q42."""
    return int(item[1:])


def numbers(values: Iterable[str]) -> list[int]:
    """The numbers of those values that are items."""
    return [number_of(value) for value in values if ITEM.fullmatch(value)]


class Edges:
    """Which item is below which, in a file: 16 bytes an edge, and a few MiB of memory to read."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._waiting: list[int] = []

    def clear(self) -> None:
        """Begin anew."""
        self._file.write_bytes(b"")

    def add(self, item: int, above: Iterable[int]) -> None:
        """Add edges; the last ones are in the file once it is flushed."""
        for each in above:
            self._waiting += (item, each)
        if len(self._waiting) >= 2 * EDGES_WAITING:
            self.flush()

    def flush(self) -> None:
        """Write what waits."""
        with self._file.open("ab") as content:
            content.write(np.array(self._waiting, np.int64).tobytes())
        self._waiting = []

    def above(self, items: Iterable[int]) -> dict[int, list[int]]:
        """Find what is directly above items and all that is above them; cycles do no harm."""
        found: dict[int, list[int]] = {}
        frontier = set(items)
        while frontier:
            found |= {item: [] for item in frontier}
            wanted = np.fromiter(frontier, np.int64, len(frontier))
            frontier = set()
            for chunk in self._chunks():
                for item, above in chunk[np.isin(chunk[:, 0], wanted)].tolist():
                    found[item].append(above)
                    if above not in found:
                        frontier.add(above)
        return found

    def _chunks(self) -> Iterable[NDArray[np.int64]]:
        """All edges, [E, 2] at a time."""
        if not self._file.stat().st_size:
            return
        whole = np.memmap(self._file, np.int64, mode="r").reshape(-1, 2)
        for start in range(0, len(whole), EDGES_TOGETHER):
            yield np.array(whole[start : start + EDGES_TOGETHER])


def levels(items: Iterable[int], above: Mapping[int, Sequence[int]]) -> Iterable[list[int]]:
    """Items, what is above them, above that, and so on; each once."""
    seen: set[int] = set()
    level = list(dict.fromkeys(items))
    while level:
        yield level
        seen |= set(level)
        higher = [each for item in level for each in above.get(item, ())]
        level = [each for each in dict.fromkeys(higher) if each not in seen]


def starts_of(claims: Claims) -> list[int]:
    """Where the way up to a topic begins: the classes of an entity, the occupations of a person."""
    is_person = HUMAN in claims.get(INSTANCE_OF, ())
    properties = (OCCUPATION,) if is_person else (INSTANCE_OF, SUBCLASS_OF)
    return numbers(value for name in properties for value in claims.get(name, ()))


@dataclass(frozen=True)
class Topics:
    """Topics by the numbers of their classes and occupations, in the order of the table."""

    names: tuple[str, ...]
    classes: Mapping[int, str]
    occupations: Mapping[int, str]

    def of(self, claims: Claims, above: Mapping[int, Sequence[int]]) -> str | None:
        """Find the topic whose class is nearest above an entity; None: there is none.

        Of classes that are equally near, the table's first counts.
        """
        is_person = HUMAN in claims.get(INSTANCE_OF, ())
        known = self.occupations if is_person else self.classes
        for level in levels(starts_of(claims), above):
            topics = {known[item] for item in level if item in known}
            if topics:
                return min(topics, key=self.names.index)
        return None


@cache
def read_topics() -> Topics:
    """Read the shipped taxonomy."""
    found: dict[str, dict[int, str]] = {"classes": {}, "occupations": {}}
    topics = table("topics")
    for topic, by_kind in topics.items():
        for kind, items in by_kind.items():
            for item in items:
                found[kind].setdefault(number_of(item), topic)
    return Topics(tuple(topics), found["classes"], found["occupations"])


@cache
def read_countries() -> dict[str, frozenset[int]]:
    """Read which countries, and parts of some, a language is spoken in."""
    return {
        language: frozenset(map(number_of, items)) for language, items in table("countries").items()
    }


@dataclass(frozen=True)
class Places:
    """What is above places, and the countries of those that have one."""

    above: Mapping[int, Sequence[int]]
    countries: Mapping[int, Sequence[int]]

    def of(self, claims: Claims) -> list[int]:
        """Countries of an entity and the places it lies in, nearest first.

        What has no country of its own has those of the nearest places with one.
        """
        own = numbers(value for name in COUNTRIES for value in claims.get(name, ()))
        places: list[int] = []
        inherited: list[int] = []
        for level in levels(numbers(claims.get(LOCATED_IN, ())), self.above):
            places += level
            if not own and not inherited:
                inherited = [c for place in level for c in self.countries.get(place, ())]
        return list(dict.fromkeys([*own, *inherited, *places]))
