"""Why a run ends before its time, in one sentence for whoever started it."""

import math


class InputError(ValueError):
    """What a user gave cannot be used; the message says what, the bound, and the fix."""


class AwayError(RuntimeError):
    """Something that a run depends on does not answer; nothing is lost."""

    def __init__(self, message: str, final: bool) -> None:
        """Say whether waiting has come to its end."""
        super().__init__(message)
        self.final = final


def require(condition: bool, message: str) -> None:
    """Raise `InputError(message)` unless the condition holds."""
    if not condition:
        raise InputError(message)


def require_positive(owner: str, **values: float | None) -> None:
    """Refuse zero, negative and non-finite values; None means off and passes."""
    for name, value in values.items():
        require(
            value is None or (math.isfinite(value) and value > 0),
            f"{owner}.{name} is {value}, and must be greater than 0",
        )
