"""Teachers whose scores are scripted, and what is said of them beside a student."""

import re
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from marco_train.teachers.base import Teacher
from marco_train.types import Rollout, ScoredRollout, TokenScores
from tests.helpers.rollouts import rollouts


class Scripted(Teacher):
    """A teacher whose scores of each rollout go through a fault."""

    def __init__(self, fault: Callable[[Tensor, int], Tensor]) -> None:
        self.head = torch.zeros(320, 8)
        self._fault = fault
        self._calls = 0

    def score(self, rollouts: Sequence[Rollout]) -> list[ScoredRollout]:
        self._calls += 1
        generator = torch.Generator().manual_seed(0)
        return [
            ScoredRollout(r, TokenScores(self._fault(self._honest(r, generator), self._calls)))
            for r in rollouts
        ]

    def _honest(self, rollout: Rollout, generator: torch.Generator) -> Tensor:
        return -2 - torch.rand(len(rollout.response_ids), generator=generator)


def answers(own: float) -> list[Rollout]:
    """Answers of a student that gives each of its tokens one log-probability."""
    return [replace(r, sampler_logprobs=[own] * len(r.response_ids)) for r in rollouts()]


def figures(said: str) -> list[float]:
    """The teacher's, the student's, and a uniform guess's."""
    form = (
        r"gives the student's answers to 5 prompts (-[\d.]+) nats a token; "
        r"the student itself (-[\d.]+), a uniform guess (-[\d.]+)"
    )
    (found,) = re.findall(form, said)
    return [float(number) for number in found]
