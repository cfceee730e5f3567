"""What asks a run to save or to end before its time: signals, files in its directory, the clock.

SIGTERM or SIGINT, or a file STOP: the step is finished and saved, and the run ends. SIGUSR1, or a
file SAVE: it is saved and goes on. A second signal to end ends the process at once.
"""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from pathlib import Path
from types import FrameType
from typing import ClassVar

from marco_train.distributed import gather_objects, is_main

# A launcher passes a signal on that a terminal has sent to all its processes.
SECONDS_OF_ONE_SIGNAL = 3.0


class Wish(IntEnum):
    """The strongest of all ranks' counts."""

    go_on = 0
    save = 1
    end = 2
    end_for_time = 3
    """To be queued again, as its time is up."""


class Signals:
    """Those that this process was sent and has not acted upon."""

    to_end: ClassVar[str | None] = None
    to_save: ClassVar[str | None] = None
    first_at: ClassVar[float] = 0.0
    listened_since: ClassVar[float | None] = None


@contextmanager
def listening() -> Iterator[None]:
    """Let signals ask instead of ending the process, as long as the block lasts."""
    before = {s: signal.signal(s, _told) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    Signals.listened_since = time.monotonic()
    try:
        yield
    finally:
        for number, action in before.items():
            signal.signal(number, action)
        Signals.to_end = Signals.to_save = Signals.listened_since = None


def _told(number: int, _: FrameType | None) -> None:
    name = signal.Signals(number).name
    if number == signal.SIGUSR1:
        Signals.to_save = name
    elif Signals.to_end is None:
        Signals.to_end, Signals.first_at = name, time.monotonic()
    elif time.monotonic() - Signals.first_at > SECONDS_OF_ONE_SIGNAL:
        os._exit(128 + number)


class Interruption:
    """What a run is asked, looked up between its steps."""

    def __init__(self, directory: Path, seconds: float | None) -> None:
        """Look for files in a directory, and end in time.

        Args:
            directory: The run's.
            seconds: Of the launch, since signals are listened to, what was loaded since included;
                from now on without that. None: no end.
        """
        self._directory = directory
        began = Signals.listened_since or time.monotonic()
        self._ends_at = None if seconds is None else began + seconds
        self._longest_step = 0.0
        self._looked_at = time.monotonic()

    @staticmethod
    def agreed(strongest: Wish, wish: Wish, why: str) -> tuple[Wish, str]:
        """The strongest wish of all ranks and by what it is asked; all ranks take part.

        Args:
            strongest: Of all ranks.
            wish: This rank's.
            why: By what.
        """
        if strongest is Wish.go_on:
            return strongest, ""
        said = [reason for found, reason in gather_objects((wish, why)) if found == strongest]
        return strongest, said[0]

    def asked_here(self) -> tuple[Wish, str]:
        """What this rank is asked, and by what; once a step."""
        now = time.monotonic()
        self._longest_step = max(self._longest_step, now - self._looked_at)
        self._looked_at = now
        if Signals.to_end is not None:
            return Wish.end, Signals.to_end
        if is_main() and self._take("STOP"):
            return Wish.end, f"a file {self._directory / 'STOP'}"
        if self._ends_at is not None and now + self._longest_step > self._ends_at:
            return Wish.end_for_time, "checkpoint.must_save_by"
        if Signals.to_save is not None:
            why, Signals.to_save = Signals.to_save, None
            return Wish.save, why
        if is_main() and self._take("SAVE"):
            return Wish.save, f"a file {self._directory / 'SAVE'}"
        return Wish.go_on, ""

    def _take(self, name: str) -> bool:
        """Whether a file is there, which is then gone."""
        file = self._directory / name
        found = file.is_file()
        if found:
            file.unlink()
        return found
