"""The rollouts of each step, of its own weights or, by choice, of those of the step before."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

from marco_train.config.opd import OPDConfig
from marco_train.errors import StaleRolloutError
from marco_train.metrics import Metrics
from marco_train.rollout.base import InLanguage, Sampler, summarize
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
        in_language: InLanguage | None = None,
    ) -> None:
        """Sample what `prompts` asks, with the weights that the sampler has when it is asked.

        `first_prompts` and `held_out` are this rank's shares, for `answers` and `held_out`;
        `in_language` judges responses for `metrics`.
        """
        self._cfg = cfg
        self._sampler = sampler
        self._prompts = prompts
        self._first_prompts = first_prompts
        self._held_out = held_out
        self._in_language = in_language
        self._ahead: tuple[Iterator[Rollout], Metrics] | None = None  # of the coming step
        self._metrics: Metrics = {}

    def rollouts(self, step: int, until: int) -> Iterator[Rollout]:
        """Yield the rollouts of a step as each ends; those of the next are asked for first, if any.

        A run has steps `until` there, and none is asked for beyond.

        Raises:
            StaleRolloutError: One is of other weights.
        """
        staleness = 0 if self._ahead is None else 1
        current, described = self._ahead or self._ask()
        self._metrics = described | {"rollout/staleness": staleness}
        self._ahead = self._ask() if self._cfg.max_staleness > 0 and step + 1 < until else None
        for rollout in current:
            if rollout.weight_version != step - staleness:
                raise StaleRolloutError(
                    f"a response of the weights of step {rollout.weight_version}, where those of "
                    f"step {step - staleness} were to sample"
                )
            yield rollout

    def _ask(self) -> tuple[Iterator[Rollout], Metrics]:
        """Ask for the rollouts of the coming prompts, and describe these."""
        asked = self._sampler.sample(next(self._prompts), self._cfg.responses_per_prompt)
        return asked, self._prompts.metrics()

    def answers(self) -> list[Rollout]:
        """Sample one response to each of the run's first prompts, to check a new teacher with."""
        return list(self._sampler.sample(self._first_prompts, 1))

    def held_out(self, count: int) -> list[Rollout]:
        """Sample one response to each of this rank's prompts among the first held-out ones."""
        asked = [prompt for prompt in self._held_out if prompt.index < count]
        return list(self._sampler.sample(asked, 1))

    def metrics(self, rollouts: Iterable[Rollout]) -> Metrics:
        """Describe the last rollouts, their prompts, and how stale they were, over all ranks."""
        return summarize(rollouts, self._in_language) | self._metrics
