"""One launch at a time in a run's directory: a file that names its processes, and beats.

Processes on this host are known to be alive by their number and start; those elsewhere by the
beat, a touch of the file every few seconds by the launch's first rank. A lock whose launch is dead
is taken over.
"""

import fcntl
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

from marco_train.distributed import gather_objects, is_main, rank
from marco_train.errors import DirectoryInUseError, InputError
from marco_train.files import replaces
from marco_train.tracking import log_line

LOCK = "run.lock"
SECONDS_OF_A_BEAT = 10.0
# Of a lock on another host without a beat, after which its launch is taken for dead.
SECONDS_OF_SILENCE = 60.0


@dataclass(frozen=True)
class Process:
    """One rank of a launch."""

    rank: int
    host: str
    space: str
    """Tells apart the numbers of processes in containers, and before and after a boot."""
    pid: int
    started: str
    """By the kernel's clock; tells a process from a later one of the same number."""

    def __str__(self) -> str:
        """As a person looks for it."""
        return f"pid {self.pid} on {self.host}"

    @classmethod
    def own(cls) -> "Process":
        """This one."""
        return cls(rank(), socket.gethostname(), _space(), os.getpid(), _started(os.getpid()) or "")

    @property
    def is_near(self) -> bool:
        """Whether this process can see that one."""
        return (self.host, self.space) == (socket.gethostname(), _space())

    @property
    def is_alive(self) -> bool:
        """Whether it still runs; it is near."""
        return _started(self.pid) == self.started


def _space() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id")
    number = boot.read_text().strip() if boot.is_file() else ""
    with suppress(OSError):
        return f"{number} {os.readlink('/proc/self/ns/pid')}"
    return number


def _started(pid: int) -> str | None:
    """When a process began, in ticks since the boot; None: there is none that runs.

    See proc_pid_stat(5), fields 3 and 22.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in {"Z", "X"} else fields[19]


@contextmanager
def held(directory: Path) -> Iterator[None]:
    """Hold a run's directory, made where it is not there, for this launch; all ranks take part.

    Raises:
        DirectoryInUseError: Another launch does; names it.
        InputError: The directory cannot be written.
    """
    processes = gather_objects(asdict(Process.own()))
    lock = Lock(directory / LOCK, processes) if is_main() else None
    while True:
        # The others wait in short turns, however long the first looks for a beat.
        fault, kind, is_held = gather_objects(_tried(lock))[0]
        if fault is not None:
            raise (DirectoryInUseError if kind == "in use" else InputError)(fault)
        if is_held:
            break
        time.sleep(1.0)
    if lock is not None:
        lock.beat()
    try:
        yield
    finally:
        if lock is not None:
            lock.release()


def _tried(lock: "Lock | None") -> tuple[str | None, str, bool]:
    if lock is None:
        return None, "", False
    try:
        return None, "", lock.acquire()
    except DirectoryInUseError as error:
        return str(error), "in use", False
    except OSError as error:
        return (
            f"{lock.file.parent} cannot be written ({error}): choose another output_dir",
            "",
            False,
        )


class Lock:
    """The file, as the first rank of a launch sees it."""

    def __init__(self, file: Path, processes: Sequence[dict[str, Any]]) -> None:
        """Describe the launch that is to hold it.

        Args:
            file: The lock.
            processes: Fields of every rank's, the first rank's first.
        """
        self.file = file
        self._content = json.dumps(
            {
                "id": uuid4().hex,
                "since": datetime.now().astimezone().isoformat(timespec="seconds"),
                "processes": list(processes),
            },
            indent=2,
        )
        self._heard: tuple[str, int] | None = None
        self._heard_at = 0.0
        self._ended = threading.Event()
        self._touching = threading.Lock()

    def acquire(self) -> bool:
        """Try to take the lock.

        Returns:
            False where it is of a launch on another host that has not beaten since the last try:
            to be tried again.

        Raises:
            DirectoryInUseError: Its launch is alive.
            OSError: The directory cannot be written.
        """
        self.file.parent.mkdir(parents=True, exist_ok=True)
        if self._create():
            return True
        try:
            with self.file.open() as file:  # opened anew: a network's file system then asks
                content, beat = file.read(), os.fstat(file.fileno()).st_mtime_ns
        except FileNotFoundError:
            return False  # released meanwhile
        since, processes = _described(content)
        living = [process for process in processes if process.is_near and process.is_alive]
        if living:
            raise DirectoryInUseError(_in_use(self.file, since, living))
        if processes and processes[0].is_near:
            return self._take_over(content, f"{processes[0]} is gone")
        heard = content, beat
        if self._heard is None or self._heard[0] != content:
            self._heard, self._heard_at = heard, time.monotonic()
        elif heard != self._heard:
            raise DirectoryInUseError(_in_use(self.file, since, processes))
        elif time.monotonic() - self._heard_at > SECONDS_OF_SILENCE:
            silence = f"no sign of life of it for {SECONDS_OF_SILENCE:.0f} s"
            return self._take_over(content, silence)
        return False

    def _create(self) -> bool:
        try:
            descriptor = os.open(self.file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        with os.fdopen(descriptor, "w") as file:
            file.write(self._content)
            file.flush()
            os.fsync(descriptor)
        return True

    def _take_over(self, content: str, why: str) -> bool:
        """Put a dead launch's lock away, unless another launch was faster.

        Of launches that found the same lock dead, one at a time goes on from here, and sees whether
        it still is the one they found. The file is replaced, so that no other launch finds none.
        """
        try:
            with self.file.open("r+") as found:  # a network's file system locks what can be written
                try:
                    fcntl.flock(found, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    return False
                except OSError:
                    pass  # Not all can: of two that replace the file, the first ends at a beat.
                if self.file.read_text() != content:
                    return False
                with replaces(self.file) as mine:
                    mine.write_text(self._content)
        except FileNotFoundError:  # released meanwhile
            return False
        since, _ = _described(content)
        log_line(f"{self.file} of a launch since {since} is taken over: {why}")
        return True

    def beat(self) -> None:
        """Touch the file from now on, in the background."""
        threading.Thread(target=self._beat, name="beats", daemon=True).start()

    def _beat(self) -> None:
        while not self._ended.wait(SECONDS_OF_A_BEAT):
            # A storage that is away says so where it is needed.
            with self._touching, suppress(OSError):
                if self._ended.is_set():
                    return
                if not self.file.exists():
                    self._create()
                elif self.file.read_text() == self._content:
                    os.utime(self.file)
                else:
                    # This launch stood still for so long that another took it for dead. It must
                    # not write any more.
                    print(
                        f"error: {self.file} was taken over by another launch: this one ends",
                        file=sys.stderr,
                        flush=True,
                    )
                    os._exit(1)

    def release(self) -> None:
        """Let others in."""
        self._ended.set()
        with self._touching, suppress(OSError):
            if self.file.read_text() == self._content:
                self.file.unlink()


def _described(content: str) -> tuple[str, list[Process]]:
    """Since when a lock is held, and by whom; of a torn one nothing is known."""
    try:
        found: dict[str, Any] = json.loads(content)
        return str(found["since"]), [Process(**process) for process in found["processes"]]
    except (LookupError, TypeError, ValueError):
        return "an unknown time", []


def _in_use(file: Path, since: str, processes: Sequence[Process]) -> str:
    named = ", ".join(str(process) for process in processes) or "a process that is not known"
    return (
        f"{file.parent} is in use by another launch since {since}: {named}. Wait for it, end it, "
        "or choose another output_dir"
    )
