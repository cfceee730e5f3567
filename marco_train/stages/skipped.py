"""What becomes of an update that was not made: its rows are named, and too many end the run."""

from typing import Protocol

from marco_train.distributed import is_main
from marco_train.engine.guard import Skipped
from marco_train.engine.policy import Policy
from marco_train.errors import SkippedUpdatesError
from marco_train.tracking import log_line


class Rows(Protocol):
    """The part of a loader that knows which rows an update was of."""

    def skip(self, update: int, samples: list[int], reason: str) -> list[str]:
        """Write them down, and say where they stand."""


def note_skipped(policy: Policy, rows: Rows, most_in_a_row: int) -> None:
    """Name the rows of the last update, if it was not made; all ranks take part.

    Raises:
        SkippedUpdatesError: It was one too many in a row.
    """
    skipped: Skipped | None = policy.skipped
    if skipped is None:
        return
    places = "; ".join(rows.skip(skipped.update, skipped.samples, skipped.reason))
    said = f"update {skipped.update} is not made: {skipped.reason}; of {places}"
    num_skipped = policy.guard.num_in_a_row
    if num_skipped <= most_in_a_row:
        if is_main():
            log_line(said)
        return
    raise SkippedUpdatesError(
        f"{said}. It is number {num_skipped} in a row, and optim.max_skipped_in_a_row is "
        f"{most_in_a_row}: look at the rows in quarantine.jsonl and mend them "
        "(data.on_change=continue), go on from an earlier checkpoint with a lower "
        "optim.learning_rate (on_resume.allow=[optim]), or raise optim.max_skipped_in_a_row. The "
        "weights and the last checkpoint are intact"
    )
