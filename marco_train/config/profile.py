"""Which steps of a run a profiler looks at."""

import re
from dataclasses import dataclass

from marco_train.errors import require


@dataclass(kw_only=True)
class ProfileConfig:
    """What torch's profiler records; see `profiling.py`."""

    steps: str | None = None
    """First and last step that are recorded, as 10-12, or the only one; the first of a run is 1.
    They take longer than others. None: none."""

    def __post_init__(self) -> None:
        _ = self.bounds

    @property
    def bounds(self) -> tuple[int, int] | None:
        """First and last recorded step, from 1. None: none.

        Raises:
            InputError: `steps` is no range of steps.
        """
        if self.steps is None:
            return None
        found = re.fullmatch(r"(\d+)(?:-(\d+))?", self.steps)
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
        require(
            1 <= first <= last,
            f"profile.steps is {self.steps!r}: write the first and the last step to record, from 1 "
            "on, as 10-12, or a single one",
        )
        return first, last

    def check(self, num_steps: int) -> None:
        """Refuse steps that a run of so many does not make.

        Raises:
            InputError: Gives both numbers.
        """
        if self.bounds is not None:
            require(
                self.bounds[1] <= num_steps,
                f"profile.steps is {self.steps}, and the run makes {num_steps} steps: name some of "
                "these",
            )
