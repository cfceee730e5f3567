"""The checks of a run, all of them made, and every fault kept."""

import os
import sys
import time
from collections.abc import Callable, Iterator
from copy import copy
from typing import Any, ParamSpec, Self, TypeVar, cast

from marco_train.errors import InputError, ServersUnavailable
from marco_train.stages.checks import Checks
from marco_train.train import is_first_rank

P = ParamSpec("P")
T = TypeVar("T")

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

    A part that could not be made is absent, and what needs it is left out.
    """

    writes_files = False

    def __init__(self) -> None:
        self.faults: list[str] = []
        self.can_resume = False
        self._leaves_out = False

    def make(self, what: str, make: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Make one part from others; absent where it cannot be made, or needs what is absent."""
        absent = cast("T", Absent())
        if self._leaves_out or any_absent(make, *args, *kwargs.values()):
            return absent
        start = time.perf_counter()
        try:
            made = make(*args, **kwargs)
        except REFUSALS as error:
            self._keep(what, " ".join(str(error).split()))
            return absent
        self._print(f"{what} ... fine, {time.perf_counter() - start:.1f} s")
        return made

    def after(self, *earlier: object) -> Self:
        """Leave out what is made with the result, if an earlier part is absent."""
        following = copy(self)  # of the same list of faults
        following._leaves_out = self._leaves_out or any_absent(*earlier)
        return following

    def _keep(self, what: str, fault: str) -> None:
        self._print(f"{what} ... wrong")
        if fault not in self.faults:
            self.faults.append(fault)
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            # Other ranks may have found nothing, and would wait for this one in the next check.
            sys.exit("\n".join(f"error: {fault}" for fault in self.faults))

    @staticmethod
    def _print(line: str) -> None:
        if is_first_rank():
            print(line, flush=True)
