"""Watches whether the ranks get on: one that stops is named with its stack, and the run ends.

A thread of each rank looks at the main thread, tells the others what it saw, and sees whether they
still tell. A main thread gets on when the line it is at changes or a collective of `distributed`
ends: ranks that wait for servers agree every few seconds, so their patience is no hang. At fault is
a rank that tells nothing any more, else one that stands elsewhere than in a collective.
"""

import faulthandler
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from itertools import takewhile
from pathlib import Path
from tempfile import TemporaryFile
from types import FrameType
from typing import ClassVar

from torch._C._distributed_c10d import Store  # torch exports it without a type

from marco_train.distributed import Progress, rank, shared_store, world_size
from marco_train.errors import HUNG

SECONDS_BETWEEN_LOOKS = 1.0
LOOKS_OF_A_TIME = 5  # at least so many in the seconds after which a rank is at fault
# Looks without a word after which a rank is held to be gone.
SILENT_LOOKS = 4
STORE_SECONDS = 5.0
COLLECTIVES = f"{os.sep}torch{os.sep}distributed{os.sep}"
PACKAGE = Path(__file__).parent

OnHang = Callable[[str, bool], None]
"""Told what is said of a hang, and whether this rank speaks for all, before the process ends."""


@dataclass(frozen=True)
class Seen:
    """What a rank tells of itself at a look."""

    look: int
    progress: int
    """Collectives that have ended."""
    seconds: float
    """Since its main thread got on."""
    waits: bool
    """Whether it stands in a collective."""
    where: str
    """The line it is at."""


class Watch:
    """Watches the main thread of this process, and what other ranks tell of theirs."""

    running: ClassVar["Watch | None"] = None

    def __init__(self, seconds: float, on_hang: OnHang) -> None:
        """Begin to watch the thread that calls this.

        Args:
            seconds: Without getting on, after which a rank is at fault.
            on_hang: Called once, before this process ends with status `HUNG`.
        """
        self._seconds = seconds
        self._between = min(SECONDS_BETWEEN_LOOKS, seconds / LOOKS_OF_A_TIME)
        self._on_hang = on_hang
        self._main = threading.get_ident()
        self._rank, self._num_ranks = rank(), world_size()
        self._store: Store | None = shared_store()
        if self._store is not None:
            self._store.set_timeout(timedelta(seconds=STORE_SECONDS))
        self._look = 0
        self._others: dict[int, Seen] = {}  # what they told last
        self._new_at: dict[int, int] = {}  # the own look at which that was new
        self._left: set[int] = set()
        self._last: tuple[object, ...] = ()
        self._since = time.monotonic()
        self._ended = threading.Event()
        self._is_failing = False
        self._thread = threading.Thread(target=self._watch, name="watch", daemon=True)
        self._thread.start()

    def stop(self, *, is_well: bool = True) -> None:
        """Watch no more.

        Args:
            is_well: Whether to tell the others that this rank has left by itself; else it falls
                silent, and those that wait for it say that it is gone.
        """
        self._ended.set()
        # Behind a cut wire the store answers after a quarter of an hour, when TCP gives it up.
        self._thread.join(STORE_SECONDS)
        if is_well and self._store is not None and not self._thread.is_alive():
            with suppress(RuntimeError):
                self._store.set(f"watch/{self._rank}", "left")

    def _watch(self) -> None:
        while True:  # the first look at once: a rank that ends within a second has told of itself
            mine = self._look_around()
            if mine.seconds >= self._seconds and not self._is_failing:
                self._end(mine)
            if self._ended.wait(self._between):
                return

    def _look_around(self) -> Seen:
        frame = sys._current_frames().get(self._main)
        state = (Progress.num_collectives, *(_place(each) for each in _stack(frame)))
        now = time.monotonic()
        if state != self._last:
            self._last, self._since = state, now
        self._look += 1
        mine = Seen(self._look, Progress.num_collectives, now - self._since, _waits(), _said(frame))
        if self._store is not None:
            try:
                self._store.set(f"watch/{self._rank}", json.dumps(asdict(mine)))
                self._listen(self._store)
            except (RuntimeError, ValueError):  # who held it is gone, and says so elsewhere
                self._store = None
        return mine

    def _listen(self, store: Store) -> None:
        for number in {*range(self._num_ranks)} - {self._rank} - self._left:
            if not store.check([f"watch/{number}"]):
                continue
            told = store.get(f"watch/{number}")
            if told == b"left":
                self._left.add(number)
                self._others.pop(number, None)
                continue
            seen = Seen(**json.loads(told))
            if self._others.get(number) != seen:
                self._others[number], self._new_at[number] = seen, self._look

    def silent(self) -> list[int]:
        """Ranks that have told nothing for some looks, and had not left."""
        bound = self._look - SILENT_LOOKS
        return sorted(r for r in self._others if self._new_at[r] < bound)

    def gone(self) -> list[int]:
        """Ranks that tell nothing any more; waits long enough to know."""
        self._is_failing = True
        if self._store is None:
            return []
        before = self._look
        # A last word may be heard at the next look, and looks of a busy machine are late.
        enough = SILENT_LOOKS + 2
        deadline = time.monotonic() + 1.5 * enough * self._between
        while self._look < before + enough and time.monotonic() < deadline:
            time.sleep(self._between / 10)
        if self._look <= before + 1:  # the store does not answer, which the first rank's node holds
            return [0]
        return self.silent()

    def _end(self, mine: Seen) -> None:
        """Say who is at fault, and end this process."""
        silent = self.silent()
        said = name_fault(self._rank, mine, self._others, silent)
        print(f"rank {self._rank} stands here:\n{_stacks()}", file=sys.stderr, flush=True)
        is_first = self._rank == min({*range(self._num_ranks)} - {*silent})
        if is_first:
            print(f"error: {said}", file=sys.stderr, flush=True)
        self._on_hang(said, is_first)
        # A launcher ends all ranks when one has ended, and the store may hold others up meanwhile.
        time.sleep(STORE_SECONDS + SILENT_LOOKS * self._between)
        os._exit(HUNG)


def name_fault(me: int, mine: Seen, others: dict[int, Seen], silent: Sequence[int]) -> str:
    """Say which ranks are at fault where this one does not get on.

    Args:
        me: This rank.
        mine: What is seen of it.
        others: What the others told last.
        silent: Those that tell nothing any more.
    """
    beginning = f"no rank gets on for {mine.seconds:.0f} s (parallel.hang_seconds): "
    if silent:
        named = "; ".join(f"rank {r}, last at {others[r].where}" for r in silent)
        return f"{beginning}the process is stopped or gone of {named}"
    everyone = others | {me: mine}
    least = min(seen.progress for seen in everyone.values())
    at_fault = [
        r
        for r, seen in sorted(everyone.items())
        if not seen.waits and seen.seconds >= mine.seconds / 2
    ] or [r for r, seen in sorted(everyone.items()) if seen.progress == least]
    named = "; ".join(f"rank {r} stands at {everyone[r].where}" for r in at_fault)
    waiting = sorted(everyone.keys() - set(at_fault))
    rest = f"; waiting for it: {', '.join(map(str, waiting))}" if waiting else ""
    return f"{beginning}{named}{rest}"


def _stack(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _place(frame: FrameType) -> tuple[str, int]:
    return frame.f_code.co_filename, frame.f_lasti


def _waits() -> bool:
    """Whether a thread of this process stands in a collective, which this package calls.

    What calls this package may be of torch as well, a launcher that forks its ranks say.
    """
    return any(
        COLLECTIVES in frame.f_code.co_filename
        for top in sys._current_frames().values()
        for frame in takewhile(lambda each: not _is_own(each), _stack(top))
    )


def _is_own(frame: FrameType) -> bool:
    return PACKAGE in Path(frame.f_code.co_filename).parents


def _said(frame: FrameType | None) -> str:
    """The line that a thread is at, and the line of this package by which it came there."""
    if frame is None:
        return "its end"
    lines = [_line(frame)]
    own = next(filter(_is_own, _stack(frame)), frame)
    if own is not frame:
        lines.append(f"by {_line(own)}")
    return ", ".join(lines)


def _stacks() -> str:
    """Where every thread of this process stands, in one piece: ranks print theirs at once."""
    try:
        with TemporaryFile("w+") as file:
            faulthandler.dump_traceback(file, all_threads=True)
            file.seek(0)
            return file.read()
    except OSError as error:  # the run ends all the same
        return f"(no file for its stack: {error})"


def _line(frame: FrameType) -> str:
    return f"{frame.f_code.co_filename}:{frame.f_lineno} ({frame.f_code.co_name})"


@contextmanager
def watched(seconds: float, on_hang: OnHang) -> Iterator[None]:
    """Watch as long as the block lasts; SIGUSR2 prints the stacks of this process, and it goes on.

    Args:
        seconds: Without getting on, after which the run ends.
        on_hang: Told of it first.
    """
    faulthandler.register(signal.SIGUSR2, sys.__stderr__ or 2, all_threads=True)
    Watch.running = Watch(seconds, on_hang)
    try:
        yield
        _stop(is_well=True)
    except RuntimeError:  # a collective's, maybe: `said_of_lost_ranks` asks who is gone, and stops
        raise
    except BaseException:
        # The thread would be ended inside the store, for which C++ ends the process with a message.
        _stop(is_well=False)
        raise
    finally:
        faulthandler.unregister(signal.SIGUSR2)


def _stop(*, is_well: bool) -> None:
    if Watch.running is not None:
        Watch.running.stop(is_well=is_well)
    Watch.running = None


def said_of_lost_ranks() -> str | None:
    """Name ranks that are gone, after an error that may be of a collective; None: all are there."""
    watch = Watch.running
    if watch is None:
        return None
    gone = watch.gone()
    with suppress(RuntimeError):
        _stop(is_well=True)
    if not gone:
        return None
    named = " and ".join(f"rank {r}" for r in gone)
    return (
        f"{named} {'is' if len(gone) == 1 else 'are'} gone, and this one waited in vain: what "
        "ended it stands above, or in the log of the machine (out of memory, say)"
    )
