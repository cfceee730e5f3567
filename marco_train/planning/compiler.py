"""Keeps torch's compiler out of a trace.

torch's kernels for the meta device and its recomputation import the compiler, only to ask it to
leave them alone. That takes a second, and in the middle of a trace it keeps tensors alive that a
run lets go.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType
from typing import Any, ClassVar

COMPILER = "torch._dynamo"


class StandIn(ModuleType):
    """Part of torch's compiler for those who ask it for no more than to leave them alone.

    Whoever asks for anything else gets the real one.
    """

    told: ClassVar[list[Callable[..., Any]]] = []
    """Functions that it was told to leave alone."""

    def disable(self, function: Callable[..., Any], *_: Any, **__: Any) -> Callable[..., Any]:
        """Leave a function as it is."""
        self.told.append(function)
        return function

    def __getattr__(self, name: str) -> Any:
        """Import the real module, if this one is still there, and look in it."""
        if name.startswith("__"):  # what Python asks of every module
            raise AttributeError(name)
        drop_stand_in()
        return getattr(import_module(self.__name__), name)


def drop_stand_in() -> None:
    """Let the compiler be imported again, and forget what it was told."""
    if isinstance(sys.modules.get(COMPILER), StandIn):
        del sys.modules[COMPILER]
    for function in StandIn.told:  # torch keeps there what it was given; see its _compile.py
        vars(function).pop("__dynamo_disable", None)
    StandIn.told.clear()


@contextmanager
def compiler_left_out() -> Iterator[None]:
    """Let a stand-in take the compiler's place, unless it is there already."""
    if COMPILER in sys.modules:
        yield
        return
    stand_in, options = StandIn(COMPILER), StandIn(f"{COMPILER}.config")
    vars(options)["error_on_nested_fx_trace"] = True  # as it is there
    vars(stand_in)["config"] = options
    sys.modules[COMPILER] = stand_in
    try:
        yield
    finally:
        drop_stand_in()
