"""Which weights sample the rollouts of a step: its own, or by choice those of the step before."""

from collections.abc import Iterator
from functools import partial
from typing import Protocol

from marco_train.config.opd import OPDConfig
from marco_train.metrics import Metrics
from marco_train.rollout.base import Sampler
from marco_train.types import Prompt, Rollout


class StaleRolloutError(RuntimeError):
    """A rollout is of other weights than those that were to sample it."""


class PromptSource(Protocol):
    """Gives the prompts of each step in turn."""

    def __next__(self) -> list[Prompt]:
        """This rank's share of the coming step."""

    def metrics(self) -> Metrics:
        """Describe the last step's, over all ranks; every rank takes part."""


class Ahead:
    """Asks for the rollouts of a step, `max_staleness` steps before it is made.

    A run that resumes begins on-policy: what was being sampled is sampled anew, with the weights at
    hand.
    """

    def __init__(self, cfg: OPDConfig, sampler: Sampler, prompts: PromptSource) -> None:
        self._num_responses = cfg.responses_per_prompt
        self._max_staleness = cfg.max_staleness
        self._sampler = sampler
        self._prompts = prompts
        self._asked: Iterator[Rollout] | None = None
        self._settled: list[Rollout] = []
        self._metrics: Metrics = {}
        self._metrics_ahead: Metrics = {}

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
        staleness = 0 if self._asked is None else 1
        current = self._ask() if self._asked is None else iter(self._settled)
        self._metrics = self._metrics_ahead | {"rollout/staleness": staleness}
        self._settled, self._asked = [], None
        if self._max_staleness > 0 and step + 1 < until:
            self._asked = self._ask()
        # Not a generator: that would end with the first error.
        return map(partial(self._checked, step - staleness), current)

    def _ask(self) -> Iterator[Rollout]:
        """Ask for the rollouts of the coming prompts, and keep what is to be said of these."""
        prompts = next(self._prompts)
        self._metrics_ahead = self._prompts.metrics()
        return self._sampler.sample(prompts, self._num_responses)

    @staticmethod
    def _checked(version: int, rollout: Rollout) -> Rollout:
        if rollout.weight_version != version:
            raise StaleRolloutError(
                f"a response of the weights of step {rollout.weight_version}, where those of step "
                f"{version} were to sample"
            )
        return rollout

    def metrics(self) -> Metrics:
        """Describe the prompts of the last rollouts, and how stale these were."""
        return self._metrics
