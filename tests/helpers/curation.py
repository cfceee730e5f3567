"""Steps of a pipeline, run over rows that are there, and the inputs that recipes ship."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from runpy import run_path
from types import SimpleNamespace
from typing import Any

from marco_train.curation.frame import (
    Cost,
    Origin,
    Pipeline,
    Ran,
    Row,
    RowSource,
    Step,
    run,
)
from tests.helpers.processes import REPOSITORY

example: Any = SimpleNamespace(**run_path(str(REPOSITORY / "recipes" / "curation" / "example.py")))
"""What `recipes/curation/example.py` defines."""


class Given:
    """Rows that are there."""

    name = "given"

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = rows

    def identity(self) -> Any:
        return list(self._rows)

    def plan(self) -> Cost:
        return Cost(len(self._rows))

    def read(self, skip: int) -> Iterator[Row]:
        return iter(self._rows[skip:])


def ran(source: RowSource, steps: Sequence[Step], work: Path, shard_rows: int = 50) -> Ran:
    origin = Origin("", "", "")
    return run(Pipeline("culture", source, steps, [origin], {}, lambda _: []), work, shard_rows)
