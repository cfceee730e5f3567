"""The rollouts of each step, of its own weights or, by choice, of those of the step before."""

from collections.abc import Iterator, Sequence
from typing import Protocol

from marco_train.config.opd import OPDConfig
from marco_train.errors import StaleRolloutError
from marco_train.metrics import Metrics
from marco_train.rollout.base import Sampler
from marco_train.types import Prompt, Rollout


class PromptSource(Protocol):
    """Gives the prompts of each step in turn."""

    def __next__(self) -> list[Prompt]:
        """This rank's share of the coming step."""

    def metrics(self) -> Metrics:
        """Describe the last step's, over all ranks; every rank takes part."""


class RolloutStream:
    """Asks for the rollouts of a step, `max_staleness` steps before it is made.

    A run that resumes begins on-policy: what was being sampled is sampled anew, with the weights at
    hand.
    """

    def __init__(
        self,
        cfg: OPDConfig,
        sampler: Sampler,
        prompts: PromptSource,
        first_prompts: Sequence[Prompt] = (),
        held_out: Sequence[Prompt] = (),
    ) -> None:
        """Sample what prompts ask.

        Args:
            cfg: The stage.
            sampler: Has the weights of a step when its rollouts are asked for.
            prompts: To train on.
            first_prompts: This rank's share of those that new teachers are checked with.
            held_out: This rank's share of those that convergence is measured on.
        """
        self._num_responses = cfg.responses_per_prompt
        self._max_staleness = cfg.max_staleness
        self._sampler = sampler
        self._prompts = prompts
        self._first_prompts = first_prompts
        self._held_out = held_out
        self._ahead: Iterator[Rollout] | None = None  # of the coming step
        self._metrics: Metrics = {}
        self._metrics_ahead: Metrics = {}

    def rollouts(self, step: int, until: int) -> Iterator[Rollout]:
        """Yield the rollouts of a step as each ends; those of the next are asked for first, if any.

        Args:
            step: The step.
            until: Steps of the run; none is asked for beyond.

        Raises:
            StaleRolloutError: One is of other weights.
        """
        staleness = 0 if self._ahead is None else 1
        current = self._ask() if self._ahead is None else self._ahead
        self._metrics = self._metrics_ahead | {"rollout/staleness": staleness}
        self._ahead = self._ask() if self._max_staleness > 0 and step + 1 < until else None
        for rollout in current:
            if rollout.weight_version != step - staleness:
                raise StaleRolloutError(
                    f"a response of the weights of step {rollout.weight_version}, where those of "
                    f"step {step - staleness} were to sample"
                )
            yield rollout

    def _ask(self) -> Iterator[Rollout]:
        """Ask for the rollouts of the coming prompts, and keep what is to be said of these."""
        prompts = next(self._prompts)
        self._metrics_ahead = self._prompts.metrics()
        return self._sampler.sample(prompts, self._num_responses)

    def answers(self) -> list[Rollout]:
        """Sample one response to each of the run's first prompts, to check a new teacher with."""
        return list(self._sampler.sample(self._first_prompts, 1))

    def held_out(self) -> list[Rollout]:
        """Sample one response to each held-out prompt."""
        return list(self._sampler.sample(self._held_out, 1))

    def metrics(self) -> Metrics:
        """Describe the prompts of the last rollouts, and how stale these were."""
        return self._metrics
