"""Rows that are not used: what counts them, and what is said of them."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from marco_train.distributed import gather_objects
from marco_train.errors import InputError
from marco_train.types import Row

MALFORMED = "data/dropped_malformed"
TOO_LONG = "data/dropped_too_long"
TRUNCATED = "data/truncated"
DROPS = (
    TOO_LONG,
    "data/dropped_no_loss",
    "data/dropped_special",
    "data/dropped_empty",
    MALFORMED,
)


@dataclass(frozen=True)
class Dropped:
    """A row that is not used."""

    metric: str
    """Which counts it."""
    source: str
    row: int
    reason: str
    """What is at fault, of a malformed row."""
    language: str = ""

    @property
    def place(self) -> str:
        """Where the row stands."""
        return f"source {self.source!r}, row {self.row} (from 0)"


def by_language(counts: Mapping[str, int]) -> str:
    """Say how many rows of each language there are, in brackets; nothing where none has one."""
    if not any(counts):
        return ""
    named = (f"{name or 'none'} {n:,}" for name, n in sorted(counts.items()))
    return f" ({', '.join(named)})"


def over(metric: str, limit: str) -> str:
    """Say of rows that are too long which limit they are over, as stage.max_length=256."""
    return f" over {limit}" if metric == TOO_LONG and limit else ""


class Tally:
    """Counts the rows that are dropped or cut, by reason, source and language.

    A row counts once, and each of its draws beside that.
    """

    def __init__(self, limit: str = "") -> None:
        """Begin without any.

        Args:
            limit: On their length, as stage.max_length=256. Nothing: it is not said.
        """
        self._limit = limit
        # By metric, source and language: how often each row was drawn, by its place.
        self._draws: dict[tuple[str, str, str], Counter[int]] = {}
        self._first: dict[str, str] = {}  # source -> what is wrong with its first row at fault

    def add(self, drop: Dropped) -> None:
        """Count a row."""
        self._count(drop.metric, drop.source, drop.language, drop.row)
        if drop.metric == MALFORMED:
            self._first.setdefault(drop.source, f"{drop.place}: {drop.reason}")

    def add_truncated(self, row: Row) -> None:
        """Count a row that is used, but for a part of it."""
        self._count(TRUNCATED, row.source, row.language, row.row)

    def _count(self, metric: str, source: str, language: str, row: int) -> None:
        self._draws.setdefault((metric, source, language), Counter())[row] += 1

    def count(self, metric: str) -> int:
        """How many draws of rows a metric counts."""
        return sum(rows.total() for (name, *_), rows in self._draws.items() if name == metric)

    def update(self, other: "Tally") -> None:
        """Add what another one counted."""
        self._add(other._draws, other._first)

    def _add(
        self, draws: Mapping[tuple[str, str, str], Counter[int]], first: Mapping[str, str]
    ) -> None:
        for key, rows in draws.items():
            self._draws.setdefault(key, Counter()).update(rows)
        self._first = {**first, **self._first}

    def gathered(self) -> "Tally":
        """Add up the counts of all ranks; all of them take part."""
        total = Tally(self._limit)
        for draws, first in gather_objects((self._draws, self._first)):
            total._add(draws, first)
        return total

    def said(self) -> list[str]:
        """Say how many rows were dropped or cut, by reason, source and language.

        Where some were drawn several times, how many draws that are stands beside it.
        """
        found: dict[tuple[str, str], dict[str, Counter[int]]] = {}
        for (metric, source, language), rows in sorted(self._draws.items()):
            found.setdefault((metric, source), {})[language] = rows
        lines = []
        for (metric, source), languages in found.items():
            num_rows = sum(map(len, languages.values()))
            num_draws = sum(rows.total() for rows in languages.values())
            by = by_language({language: len(rows) for language, rows in languages.items()})
            drawn = f", drawn {num_draws:,} times" if num_draws > num_rows else ""
            said = f"{num_rows:,} {metric} in {source!r}{by}{over(metric, self._limit)}{drawn}"
            lines.append(said)
        return lines

    def gathered_refusal(self, what: str) -> InputError:
        """Say why no row can be used; all ranks take part."""
        total = self.gathered()
        key = self._limit.partition("=")[0] or "the stage's limit on their length"
        return InputError(
            f"{what} can be used ({'; '.join([*total.said(), *total._first.values()])}): mend the "
            f"rows, or raise {key}"
        )
