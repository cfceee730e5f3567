"""Which weights sample the rollouts of a step: its own, or by choice those of the step before."""

from collections.abc import Iterator
from functools import partial

from marco_train.config import OPDConfig
from marco_train.metrics import Metrics
from marco_train.rollout.base import Sampler
from marco_train.types import Prompt, Rollout


class StaleRolloutError(RuntimeError):
    """A rollout is of other weights than those that were to sample it."""


class Ahead:
    """Asks for the rollouts of a step, `max_staleness` steps before it is made.

    A run that resumes begins on-policy: what was being sampled is sampled anew, with the weights at
    hand.
    """

    def __init__(self, cfg: OPDConfig, sampler: Sampler, prompts: Iterator[list[Prompt]]) -> None:
        self._num_responses = cfg.responses_per_prompt
        self._max_staleness = cfg.rollout.max_staleness
        self._sampler = sampler
        self._prompts = prompts
        self._asked: Iterator[Rollout] | None = None
        self._settled: list[Rollout] = []
        self._staleness = 0

    def settle(self) -> None:
        """Wait for what was asked for ahead, after which the sampler may get other weights.

        Raises:
            AwayError: Servers do not answer; asked again, it goes on waiting.
        """
        if self._asked is not None:
            for rollout in self._asked:  # one by one: those before an error are kept
                self._settled.append(rollout)

    def rollouts(self, step: int, until: int) -> Iterator[Rollout]:
        """Rollouts of a step, as each ends; those of the next are asked for first, by choice.

        Args:
            step: The step.
            until: Steps of the run; none is asked for beyond.

        Raises:
            StaleRolloutError: One is of other weights.
        """
        self._staleness = 0 if self._asked is None else 1
        if self._asked is None:
            current = self._sampler.sample(next(self._prompts), self._num_responses)
        else:
            current = iter(self._settled)
        self._settled, self._asked = [], None
        if self._max_staleness > 0 and step + 1 < until:
            self._asked = self._sampler.sample(next(self._prompts), self._num_responses)
        # Not a generator: that would end with the first error.
        return map(partial(self._checked, step - self._staleness), current)

    @staticmethod
    def _checked(version: int, rollout: Rollout) -> Rollout:
        if rollout.weight_version != version:
            raise StaleRolloutError(
                f"a response of the weights of step {rollout.weight_version}, where those of step "
                f"{version} were to sample"
            )
        return rollout

    def metrics(self) -> Metrics:
        """Say how stale the last rollouts were."""
        return {"rollout/staleness": self._staleness}
