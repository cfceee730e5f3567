"""The named checks that a stage makes before its first step, and that the doctor makes too."""

from collections.abc import Callable
from typing import ParamSpec, Self, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class Checks:
    """Makes what a run needs, part by part; the first fault ends the run.

    The doctor overrides both methods: it keeps a fault, and leaves out what depends on it.
    """

    writes_files = True
    """Whether what is found may be written under the run's directory."""

    def make(self, what: str, make: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Make one part from others.

        Args:
            what: Names the part for a reader.
            make: Makes it, or checks something and returns None.
            *args: Its arguments.
            **kwargs: Its arguments by name.

        Raises:
            InputError: Whatever `make` refuses.
        """
        return make(*args, **kwargs)

    def after(self, *earlier: object) -> Self:
        """Let what is made with the result also depend on earlier parts that it is not given."""
        return self
