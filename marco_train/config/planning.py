"""What becomes of a run that is planned not to fit."""

from dataclasses import dataclass
from enum import Enum


class PlanCheck(Enum):
    """What is done where the plan of a run is over its GPUs' memory.

    refuse: the run ends before anything is loaded, if it is over by more than the plan may err;
    warn: it is said; off: nothing is planned.
    """

    refuse = "refuse"
    warn = "warn"
    off = "off"


@dataclass(kw_only=True)
class PlanningConfig:
    """The plan that a run makes of itself, see `planning/`."""

    check: PlanCheck = PlanCheck.refuse
    """Of use on GPUs whose memory is known; without a GPU nothing is refused."""
