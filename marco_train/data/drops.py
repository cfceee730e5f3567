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
    """Counts the rows that are dropped or cut, by reason, source and language."""

    def __init__(self, limit: str = "") -> None:
        """Begin without any.

        Args:
            limit: On their length, as stage.max_length=256. Nothing: it is not said.
        """
        self._limit = limit
        self._counts: Counter[tuple[str, str, str]] = Counter()  # metric, source, language
        self._first: dict[str, str] = {}  # source -> what is wrong with its first row at fault

    def add(self, drop: Dropped) -> None:
        """Count a row."""
        self._counts[drop.metric, drop.source, drop.language] += 1
        if drop.metric == MALFORMED:
            self._first.setdefault(drop.source, f"{drop.place}: {drop.reason}")

    def add_truncated(self, row: Row) -> None:
        """Count a row that is used, but for a part of it."""
        self._counts[TRUNCATED, row.source, row.language] += 1

    def count(self, metric: str) -> int:
        """How many rows a metric counts."""
        return sum(count for (name, *_), count in self._counts.items() if name == metric)

    def update(self, other: "Tally") -> None:
        """Add what another one counted."""
        self._counts.update(other._counts)
        self._first = other._first | self._first

    def gathered(self) -> "Tally":
        """Add up the counts of all ranks; all of them take part."""
        total = Tally(self._limit)
        for counts, first in gather_objects((self._counts, self._first)):
            total._counts.update(counts)
            total._first = first | total._first
        return total

    def said(self) -> list[str]:
        """Say how many rows were dropped or cut, by reason, source and language."""
        found: dict[tuple[str, str], Counter[str]] = {}
        for (metric, source, language), n in sorted(self._counts.items()):
            found.setdefault((metric, source), Counter())[language] = n
        return [
            f"{languages.total()} {metric} in {source!r}{by_language(languages)}"
            f"{over(metric, self._limit)}"
            for (metric, source), languages in found.items()
        ]

    def gathered_refusal(self, what: str) -> InputError:
        """Say why no row can be used; all ranks take part."""
        total = self.gathered()
        key = self._limit.partition("=")[0] or "the stage's limit on their length"
        return InputError(
            f"{what} can be used ({'; '.join([*total.said(), *total._first.values()])}): mend the "
            f"rows, or raise {key}"
        )
