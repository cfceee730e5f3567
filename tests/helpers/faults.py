"""Faults that strike a run from outside: the package knows nothing of them.

A fault strikes at a point, which is a public function that is wrapped, after so many updates, on
one rank or on all, and does one thing:

    faults = [
        Fault("train_step", "kill", step=3, rank=1),  # kill -9 of one rank, in its fourth update
        Fault("save", "full_disk", step=2),           # the save after two updates runs out of room
        Fault("train_step", "nan", step=4, rank=0),   # a loss that is no number
        Fault("sync", "hang", step=1, rank=1, seconds=30),
    ]
    process = launch(["experiment=quickstart_opd", ...], faults, directory, num_ranks=2)
    output, _ = process.communicate()

A fault strikes once, also over several launches with one `directory`, where it leaves a note (a
file named by its place in the list, before it strikes); so the next launch gets past it. With
`again=True` it strikes in each launch. In a process at hand `install(faults, directory)` does it.
"""

import math
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from importlib import import_module
from pathlib import Path
from typing import Any

from marco_train import train
from tests.helpers.processes import fork

# Where a fault may strike: a module, and what it knows the function by.
POINTS = {
    "train_step": ("marco_train.engine.policy", "Policy.train_step"),
    "export": ("marco_train.engine.policy", "Policy.export"),
    "save": ("marco_train.run", "save_checkpoint"),
    "publish": ("marco_train.checkpoint.store", "replace_directory"),
    "sync": ("marco_train.stages.opd", "sync_weights"),
    "sample": ("marco_train.rollout.stream", "RolloutStream.rollouts"),
    "score": ("marco_train.teachers.base", "Teacher.collect"),
    "log": ("marco_train.tracking", "Tracker.log"),
}
# Bytes of a file for which a full disk still has room.
ROOM = 1000


class FaultError(Exception):
    """What the action `raise` raises."""


@dataclass(frozen=True)
class Fault:
    """What strikes where, when and whom."""

    point: str
    """One of POINTS; strikes as it is called."""
    action: str
    """kill: SIGKILL; stop: SIGSTOP; end: SIGTERM; raise: a FaultError; hang: sleep; nan: a loss
    that is no number (of `train_step`); full_disk: what is written during the call finds no room.
    """
    step: int | None = None
    """Updates made then, those before a resumption included. None: the first time."""
    rank: int | None = None
    """None: every rank."""
    seconds: float = 1e6
    """How long it hangs."""
    again: bool = False
    """Whether it strikes in each launch, and not in one alone."""


class Progress:
    """How far this process is."""

    policy: Any = None

    @classmethod
    def step(cls) -> int:
        """Updates made."""
        return 0 if cls.policy is None else int(cls.policy.num_updates)


def install(faults: Sequence[Fault], directory: Path | None = None) -> None:
    """Wrap the points of faults in this process.

    Args:
        faults: What strikes.
        directory: Holds a note of each that struck. None: each may strike in each launch.
    """
    policy = import_module("marco_train.engine.policy").Policy
    plain = policy.__init__

    @wraps(plain)
    def made(self: Any, *args: Any, **kwargs: Any) -> None:
        plain(self, *args, **kwargs)
        Progress.policy = self

    policy.__init__ = made
    for number, fault in enumerate(faults):
        module, name = POINTS[fault.point]
        *owners, last = name.split(".")
        owner = import_module(module)
        for each in owners:
            owner = getattr(owner, each)
        note = None if directory is None or fault.again else directory / f"struck_{number}"
        setattr(owner, last, struck_by(fault, note, getattr(owner, last)))


def struck_by(fault: Fault, note: Path | None, plain: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function so that the fault strikes when it is called."""
    has_struck = False

    @wraps(plain)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal has_struck
        here = int(os.environ.get("RANK", "0"))
        is_due = fault.step in {None, Progress.step()} and fault.rank in {None, here}
        mine = None if note is None else note.with_name(f"{note.name}_{here}")
        if has_struck or not is_due or (mine is not None and mine.exists()):
            return plain(*args, **kwargs)
        has_struck = True
        if mine is not None:
            mine.parent.mkdir(parents=True, exist_ok=True)
            mine.touch()
        print(f"fault on rank {here}: {fault}", file=sys.stderr, flush=True)
        if fault.action == "nan":
            policy, microbatches, loss_fn = args
            return plain(policy, microbatches, no_number(loss_fn), **kwargs)
        if fault.action == "full_disk":
            with full_disk():
                return plain(*args, **kwargs)
        strike(fault)
        return plain(*args, **kwargs)

    return wrapped


def strike(fault: Fault) -> None:
    """Do what needs no call to be changed."""
    match fault.action:
        case "kill" | "stop" | "end":
            number = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "end": signal.SIGTERM}
            os.kill(os.getpid(), number[fault.action])
        case "hang":
            time.sleep(fault.seconds)
        case "raise":
            raise FaultError(str(fault))
        case _:
            raise ValueError(f"{fault.action!r} is no action of a fault")


def no_number(loss_fn: Callable[..., Any]) -> Callable[..., Any]:
    """A loss that is no number."""

    def loss(*args: Any) -> Any:
        found = loss_fn(*args)
        return type(found)(found.loss * math.nan, found.values, found.spreads)

    return loss


@contextmanager
def full_disk() -> Iterator[None]:
    """Let every file that is written meanwhile fail at its first kilobyte."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (ROOM, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)


def launch(
    overrides: Sequence[str],
    faults: Sequence[Fault],
    directory: Path,
    num_ranks: int = 1,
    **environment: str,
) -> subprocess.Popen[str]:
    """Start a run that faults strike, in a process group of its own.

    Args:
        overrides: Of the command line.
        faults: What strikes.
        directory: Where it is noted what has struck.
        num_ranks: With more than one, torchrun starts them.
        **environment: Beside this process's.

    Returns:
        The process, forked from this one; its output and errors come in one pipe.
    """

    def main() -> None:
        plain = train.run_kind

        def run_kind(*args: Any) -> None:
            install(faults, directory)
            plain(*args)

        # Only now: importing a stage takes longer than refusing what is wrong with a command line.
        setattr(train, plain.__name__, run_kind)
        train.main()

    return fork(main, overrides, num_ranks, environment)
