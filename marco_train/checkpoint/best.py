"""Which checkpoint of a run is the best by a metric of its evaluations."""

import math
from collections.abc import Mapping, Sequence
from typing import Any


class BestSoFar:
    """The measures of a run that were better than all before them."""

    def __init__(self, metric: str | None, how: Mapping[str, Any], *, is_max: bool) -> None:
        """Begin without any.

        Args:
            metric: Its name. None: no checkpoint is the best.
            how: What else decides the measure, as JSON: values of another are not compared.
            is_max: Whether larger values are better.
        """
        self._metric = metric
        self._how = {"metric": metric, "is_max": is_max, **how}
        self._is_max = is_max
        self._found: list[tuple[int, float]] = []  # updates and value, each better than the last

    @property
    def steps(self) -> Sequence[int]:
        """Updates after which they were made, from the best on downwards."""
        return [step for step, _ in reversed(self._found)]

    @property
    def value(self) -> float | None:
        """The best one. None: there is none yet."""
        return self._found[-1][1] if self._found else None

    def note(self, num_updates: int, metrics: Mapping[str, float]) -> bool:
        """Take what was measured after so many updates; says whether it is the best so far.

        What is not there, or no number, is not.
        """
        value = metrics.get(self._metric or "")
        if value is None or math.isnan(value):
            return False
        known = self.value
        if known is not None and not (value > known if self._is_max else value < known):
            return False
        self._found.append((num_updates, value))
        return True

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        return {"how": self._how, "found": [list(each) for each in self._found]}

    def resume(self, state: Mapping[str, Any]) -> bool:
        """Go on from a checkpoint; says whether its values, if any, are comparable with others."""
        if state["how"] != self._how:
            return not state["found"]
        self._found = [(int(step), float(value)) for step, value in state["found"]]
        return True
