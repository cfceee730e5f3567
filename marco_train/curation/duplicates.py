"""Rows that say what an earlier one says, or nearly; what was seen lies on disk.

A shard that is given again finds what it left the first time, and takes no notice of it: only rows
that stand before its own first one count.
"""

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

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
from marco_train.data.duplicates import NUM_HASHES, SEED, SHINGLE
from marco_train.errors import InputError

SEEN = "seen.sqlite"
CACHE_KIB = 32_768
MOST_ASKED = 900  # values of one query of SQLite
RECALL = 0.99  # of pairs that are just as similar as the bound


def open_store(file: Path, *tables: str) -> sqlite3.Connection:
    """Open a store of what was seen, which is safe from a kill at any time."""
    store = sqlite3.connect(file, isolation_level=None)
    store.execute("PRAGMA journal_mode=WAL")
    store.execute(f"PRAGMA cache_size=-{CACHE_KIB}")
    for table in tables:
        store.execute(f"CREATE TABLE IF NOT EXISTS {table}")
    return store


@contextmanager
def at_once(store: sqlite3.Connection) -> Iterator[None]:
    """Write all of a block or nothing."""
    store.execute("BEGIN")
    try:
        yield
    except BaseException:
        store.execute("ROLLBACK")
        raise
    store.execute("COMMIT")


def place_of(shard: Shard, at: int) -> int:
    """The place of a row among all, in their order."""
    return shard.number * 2**32 + at


def _digest(text: str) -> int:
    raw = blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(raw, "big", signed=True)


def normal(text: str) -> str:
    """What equal texts have in common: case and spaces do not count."""
    return " ".join(text.casefold().split())


@dataclass(frozen=True)
class ExactDuplicates:
    """Drops rows whose text an earlier row of their language has."""

    text: Callable[[Row], str]
    about: str
    """Which text it is."""
    name: str = "exact"

    def identity(self) -> Any:
        """Return which text."""
        return self.about

    def plan(self, rows: float) -> Cost:
        """Estimate its time."""
        return Cost(rows, seconds=rows / 50_000)

    @contextmanager
    def opened(self, before: Shards, scratch: Path) -> Iterator[Transform]:
        """Open what was seen; 8 bytes of a digest stand for a text."""
        table = "seen (digest INTEGER PRIMARY KEY, place INTEGER)"
        with closing(open_store(scratch / SEEN, table)) as store:

            def transform(shard: Shard) -> Iterator[Outcome]:
                digests = [_digest(f"{language_of(r)}\n{self.text(r)}") for r in shard.rows]
                with at_once(store):
                    store.executemany(
                        "INSERT OR IGNORE INTO seen VALUES (?, ?)",
                        ((digest, place_of(shard, at)) for at, digest in enumerate(digests)),
                    )
                first = dict(_looked_up(store, "digest, place FROM seen WHERE digest", digests))
                for at, (row, digest) in enumerate(zip(shard.rows, digests, strict=True)):
                    is_first = first[digest] == place_of(shard, at)
                    yield row if is_first else Dropped(row, "equal to an earlier row")

            yield transform


def _looked_up(store: sqlite3.Connection, what: str, values: list[int]) -> Iterator[Any]:
    rest = iter(values)
    while asked := list(islice(rest, MOST_ASKED)):
        marks = ",".join("?" * len(asked))
        yield from store.execute(f"SELECT {what} IN ({marks})", asked)


@dataclass(frozen=True)
class NearDuplicates:
    """Drops rows whose text is like that of an earlier row of their language that was kept."""

    text: Callable[[Row], str]
    about: str
    """Which text it is."""
    similarity: float
    """Jaccard, of strings of `SHINGLE` characters, from which texts count as one."""
    name: str = "near"

    def identity(self) -> Any:
        """Return which text, and from which similarity."""
        return [self.about, self.similarity]

    def plan(self, rows: float) -> Cost:
        """Estimate its time."""
        return Cost(rows, seconds=rows / 2_000)

    @contextmanager
    def opened(self, before: Shards, scratch: Path) -> Iterator[Transform]:
        """Open what was kept.

        Raises:
            InputError: The package for MinHash is not installed.
        """
        try:
            import rensa
        except ImportError as error:
            raise InputError(
                "near_duplicates needs the package rensa: pip install 'marco-train[curation]'"
            ) from error
        bands = "bands (key INTEGER, place INTEGER, PRIMARY KEY (key, place)) WITHOUT ROWID"
        kept = "kept (place INTEGER PRIMARY KEY, hashes BLOB)"
        with closing(open_store(scratch / SEEN, bands, kept)) as store:
            index = _Index(store, self.similarity)

            def transform(shard: Shard) -> Iterator[Outcome]:
                texts = [self.text(row) for row in shard.rows]
                digests = rensa.RMinHash.digests_from_token_sets(
                    map(shingles, texts), NUM_HASHES, SEED
                )
                hashes = np.array(digests, np.uint32).reshape(-1, NUM_HASHES)
                languages = [_digest(language_of(row)) for row in shard.rows]
                like = index.like(shard, hashes, np.array(languages, np.int64))
                for row, is_like in zip(shard.rows, like, strict=True):
                    yield Dropped(row, "nearly an earlier row") if is_like else row

            yield transform


def shingles(text: str) -> list[str]:
    """The strings of `SHINGLE` characters of a text; all of a shorter one."""
    return [text[at : at + SHINGLE] for at in range(max(1, len(text) - SHINGLE + 1))]


class _Index:
    """Locality-sensitive hashing: rows that are alike share a band of their hashes.

    Legend: N rows of a shard, B bands, H hashes.
    """

    def __init__(self, store: sqlite3.Connection, similarity: float) -> None:
        self._store = store
        self._similarity = similarity
        self._rows = rows_of_a_band(similarity)

    def like(
        self, shard: Shard, hashes: NDArray[np.uint32], languages: NDArray[np.int64]
    ) -> list[bool]:
        """Whether each row of a shard is like an earlier one; the others are kept.

        Args:
            shard: Its number counts.
            hashes: [N, H].
            languages: [N], of each a number.
        """
        keys = self._keys(hashes, languages)
        earlier = self._earlier(shard, keys)
        known = self._hashes_of({place for places in earlier.values() for place in places})
        inside: dict[int, list[int]] = {}
        found = []
        for at, row_keys in enumerate(keys.tolist()):
            row = hashes[at]
            near = {place for key in row_keys for place in earlier.get(key, ())}
            near_inside = {place for key in row_keys for place in inside.get(key, ())}
            others = [known[place] for place in near] + [hashes[place] for place in near_inside]
            is_like = bool(others) and bool(
                (np.stack(others) == row).mean(axis=1).max() >= self._similarity
            )
            found.append(is_like)
            if not is_like:
                for key in row_keys:
                    inside.setdefault(key, []).append(at)
        self._keep(shard, hashes, keys, found)
        return found

    def _keys(self, hashes: NDArray[np.uint32], languages: NDArray[np.int64]) -> NDArray[np.int64]:
        """Of each row one number a band, [N, B]; the language and the band are part of it."""
        num_bands = NUM_HASHES // self._rows
        bands = hashes[:, : num_bands * self._rows].astype(np.uint64)
        keys = np.full((len(hashes), num_bands), 0xCBF29CE484222325, np.uint64)
        keys ^= languages.view(np.uint64)[:, None]
        keys += np.arange(num_bands, dtype=np.uint64)[None]
        for part in range(self._rows):
            keys ^= bands[:, part :: self._rows]
            keys *= np.uint64(0x9E3779B97F4A7C15)
            keys ^= keys >> np.uint64(29)
        return keys.view(np.int64)

    def _earlier(self, shard: Shard, keys: NDArray[np.int64]) -> dict[int, list[int]]:
        start = place_of(shard, 0)
        found: dict[int, list[int]] = {}
        asked = np.unique(keys).tolist()
        for key, place in _looked_up(self._store, "key, place FROM bands WHERE key", asked):
            if place < start:
                found.setdefault(key, []).append(place)
        return found

    def _hashes_of(self, places: set[int]) -> dict[int, NDArray[np.uint32]]:
        asked = _looked_up(self._store, "place, hashes FROM kept WHERE place", sorted(places))
        return {place: np.frombuffer(raw, np.uint32) for place, raw in asked}

    def _keep(
        self,
        shard: Shard,
        hashes: NDArray[np.uint32],
        keys: NDArray[np.int64],
        like: list[bool],
    ) -> None:
        new = [at for at, is_like in enumerate(like) if not is_like]
        with at_once(self._store):
            self._store.executemany(
                "INSERT OR REPLACE INTO kept VALUES (?, ?)",
                ((place_of(shard, at), hashes[at].tobytes()) for at in new),
            )
            self._store.executemany(
                "INSERT OR IGNORE INTO bands VALUES (?, ?)",
                ((key, place_of(shard, at)) for at in new for key in keys[at].tolist()),
            )


def rows_of_a_band(similarity: float) -> int:
    """The most hashes of a band with which rows of a similarity are found, nearly always."""
    for rows in range(NUM_HASHES, 1, -1):
        missed = (1 - similarity**rows) ** (NUM_HASHES // rows)
        if 1 - missed >= RECALL:
            return rows
    return 1
