"""The checks of a run, all of them made, and every fault kept."""

import json
import sys
import time
from collections.abc import Callable, Iterator
from copy import copy
from datetime import timedelta
from itertools import count
from typing import TYPE_CHECKING, Any, ParamSpec, Self, TypeVar, cast

from marco_train.errors import InputError, ServersUnavailable
from marco_train.stages.checks import Checks
from marco_train.train import is_first_rank

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

P = ParamSpec("P")
T = TypeVar("T")

PATIENCE = timedelta(seconds=60)
"""Of a rank that found a fault, with those still at the check, who may wait for it there."""
REFUSALS = (FloatingPointError, InputError, ServersUnavailable)


class Absent:
    """Stands for a part that could not be made; whatever is asked of it is absent too."""

    def __getattr__(self, _: str) -> "Absent":
        return self

    def __call__(self, *_: object) -> "Absent":
        """Give what is absent."""
        return self

    def __iter__(self) -> Iterator[Any]:
        return iter(())


def any_absent(*parts: object) -> bool:
    """Whether a part could not be made."""
    return any(isinstance(part, Absent) for part in parts)


class Examination(Checks):
    """Makes checks, prints how each went and keeps what was wrong.

    A part that could not be made is absent, and what needs it is left out. On several ranks it is
    absent on all where it is on one, so that they go on with the same checks.
    """

    writes_files = False

    def __init__(self) -> None:
        self.faults: list[str] = []
        self.can_resume = False
        self._leaves_out = False
        self._store: Store | None = None
        self._numbers = count()  # of what ranks tell each other

    def meet(self, timeout_seconds: float) -> None:
        """Share what was found with the other ranks, from now on after each check.

        Args:
            timeout_seconds: Longest that a rank waits for another one.
        """
        from marco_train.distributed import shared_store

        self._store = shared_store()
        if self._store is not None:
            self._store.set_timeout(timedelta(seconds=timeout_seconds))
        self._keep(self._shared(self.faults))

    def make(self, what: str, make: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Make one part from others; absent where it cannot be made, or needs what is absent."""
        absent = cast("T", Absent())
        if self._leaves_out or any_absent(make, *args, *kwargs.values()):
            return absent
        start = time.perf_counter()
        made, found = absent, list[str]()
        try:
            made = make(*args, **kwargs)
        except REFUSALS as error:
            found = [" ".join(str(error).split())]
        found = self._shared(found)
        if found:
            self._print(f"{what} ... wrong")
            self._keep(found)
            return absent
        self._print(f"{what} ... fine, {time.perf_counter() - start:.1f} s")
        return made

    def after(self, *earlier: object) -> Self:
        """Leave out what is made with the result, if an earlier part is absent."""
        following = copy(self)  # of the same list of faults
        following._leaves_out = self._leaves_out or any_absent(*earlier)
        return following

    def _shared(self, found: list[str]) -> list[str]:
        """What all ranks found, in their order; this one ends if the others do not get here."""
        if self._store is None:
            return found
        from marco_train.distributed import rank, world_size

        number = next(self._numbers)
        keys = [f"examination/{number}/{each}" for each in range(world_size())]
        self._store.set(keys[rank()], json.dumps(found))
        if found:
            try:
                self._store.wait(keys, PATIENCE)
            except RuntimeError:  # they wait for this rank, in the midst of the check
                self._keep(found)
                sys.exit("\n".join(f"error: {fault}" for fault in self.faults))
        return [fault for key in keys for fault in json.loads(self._store.get(key))]

    def _keep(self, found: list[str]) -> None:
        self.faults += [fault for fault in dict.fromkeys(found) if fault not in self.faults]

    @staticmethod
    def _print(line: str) -> None:
        if is_first_rank():
            print(line, flush=True)
