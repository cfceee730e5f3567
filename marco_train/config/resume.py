"""What a run that goes on from a checkpoint may change."""

from dataclasses import dataclass, field
from enum import Enum


class ResumeChange(Enum):
    """What a resumption may be allowed to change; see `OnResumeConfig`."""

    model = "model"
    data = "data"
    objective = "objective"
    optim = "optim"
    teacher = "teacher"
    rollout = "rollout"


class ChangedSchedule(Enum):
    """Which course the learning rate takes once a resumption has changed the number of steps.

    keep: the old one, which stays at its end value from its last step on; stretch: the one of a run
    that had the new number of steps from its start.
    """

    keep = "keep"
    stretch = "stretch"


@dataclass(kw_only=True)
class OnResumeConfig:
    """What a run that goes on from a checkpoint may change, beside what is free.

    Free is what learns the same or only measures: places, time-outs, memory, logs, servers, and
    files that moved. `config/resumption.py` says it of every field.
    """

    allow: list[ResumeChange] = field(default_factory=list)
    """Groups of fields that may differ from the checkpoint's.

    model: the student's config.json or its starting weights (those of the checkpoint are kept);
    data: rows, their mixture and rendering, batch sizes, limits of length, and the seed;
    objective: what is minimised, and when a phase has converged;
    optim: all of `optim`;
    teacher: the teachers of a cascade and the order of coming phases;
    rollout: who samples, and with which weights.
    """
    schedule: ChangedSchedule | None = None
    """Asked for where more or fewer steps change the learning rate. None: no choice was made."""
