"""Rows that are not used: what counts them, and what is said of them."""

from collections import Counter
from dataclasses import dataclass

from marco_train.distributed import gather_objects
from marco_train.errors import InputError

MALFORMED = "data/dropped_malformed"
DROPS = (
    "data/dropped_too_long",
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

    @property
    def place(self) -> str:
        """Where the row stands."""
        return f"source {self.source!r}, row {self.row} (from 0)"


class Tally:
    """Counts the rows that are dropped, by reason and source."""

    def __init__(self) -> None:
        self._counts: Counter[tuple[str, str]] = Counter()  # metric, source
        self._first: dict[str, str] = {}  # source -> what is wrong with its first row at fault

    def add(self, drop: Dropped) -> None:
        """Count a row."""
        self._counts[drop.metric, drop.source] += 1
        if drop.metric == MALFORMED:
            self._first.setdefault(drop.source, f"{drop.place}: {drop.reason}")

    def count(self, metric: str) -> int:
        """How many rows a metric counts."""
        return sum(count for (name, _), count in self._counts.items() if name == metric)

    def update(self, other: "Tally") -> None:
        """Add what another one counted."""
        self._counts.update(other._counts)
        self._first = other._first | self._first

    def gathered(self) -> "Tally":
        """Add up the counts of all ranks; all of them take part."""
        total = Tally()
        for counted in gather_objects(self):
            total.update(counted)
        return total

    def said(self) -> list[str]:
        """Say how many rows were dropped, by reason and source."""
        return [
            f"{n} {metric} in {source!r}" for (metric, source), n in sorted(self._counts.items())
        ]

    def gathered_refusal(self, what: str) -> InputError:
        """Say why no row can be used; all ranks take part."""
        total = self.gathered()
        return InputError(
            f"{what} can be used ({'; '.join([*total.said(), *total._first.values()])}): mend the "
            "rows, or raise the stage's limit on their length"
        )
