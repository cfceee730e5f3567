"""What each rank does in some steps of a run: a trace to look at, and a table of its operators."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from marco_train.distributed import rank

# Operators of the table, those that take longest first.
NUM_ROWS = 40


class StepProfiler:
    """Records the chosen steps of this rank; every other step costs nothing.

    Writes `profile/rank_<n>.json.gz`, a trace for chrome://tracing or ui.perfetto.dev, and
    `profile/rank_<n>.txt`, under the run's directory, after the last of them or where the run ends
    before it.
    """

    def __init__(self, bounds: tuple[int, int] | None, directory: Path) -> None:
        """Wait for steps.

        Args:
            bounds: First and last recorded step, from 1. None: none is.
            directory: The run's.
        """
        self._bounds = bounds
        self._directory = directory / "profile"
        self._recorded: profile | None = None

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Record a step, from 1, if it is one of those chosen."""
        if self._bounds is None or not self._bounds[0] <= number <= self._bounds[1]:
            yield
            return
        if self._recorded is None:  # a resumed run may begin in the middle
            self._recorded = profile(activities=_activities())
            self._recorded.start()
        is_last = True  # also where the run leaves its steps
        try:
            with record_function(f"step {number}"):
                yield
            is_last = number == self._bounds[1]
        finally:
            if is_last:
                self._write(self._recorded)
                self._recorded = None

    def _write(self, recorded: profile) -> None:
        recorded.stop()
        self._directory.mkdir(parents=True, exist_ok=True)
        file = self._directory / f"rank_{rank()}.json.gz"
        recorded.export_chrome_trace(str(file))
        device = "device" if torch.cuda.is_available() else "cpu"
        averages = recorded.key_averages()
        table = averages.table(sort_by=f"self_{device}_time_total", row_limit=NUM_ROWS)
        (self._directory / f"rank_{rank()}.txt").write_text(table)


def _activities() -> list[ProfilerActivity]:
    on_gpu = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
    return [ProfilerActivity.CPU, *on_gpu]
