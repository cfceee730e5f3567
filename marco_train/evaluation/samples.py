"""Responses of a step to read, each token with its reverse KL as the update's own loss found it."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

from torch import Tensor

from marco_train.config.tracking import LoggingConfig
from marco_train.data.chat import Tokenizer
from marco_train.distributed import gather_objects, is_main
from marco_train.evaluation.html import Section, heat_text, page, plain_text
from marco_train.run import due
from marco_train.tracking import Sample
from marco_train.types import (
    LossFn,
    LossOutput,
    Microbatch,
    PolicyOutput,
    Rollout,
    ScoredRollout,
    no_experts,
)

# Nats a token from which on the colour of a sample that stands alone is strongest.
STRONG_KL = 2.0
# Tokens that one character may take; what is no character after so many is shown as it is.
MOST_BYTES = 8


class SampleRecorder:
    """Looks over the shoulder of the loss at the steps whose responses are kept."""

    def __init__(self, cfg: LoggingConfig, tokenizer: Tokenizer) -> None:
        self._cfg = cfg
        self._tokenizer = tokenizer
        self._chosen: dict[tuple[int, ...], Rollout] = {}  # by the inputs of its sequence
        self._kl: dict[tuple[int, ...], list[float | None]] = {}

    def watching(self, step: int, scored: Iterable[ScoredRollout], loss_fn: LossFn) -> LossFn:
        """Give a loss that is `loss_fn`, and notes the KL of this rank's first rollouts of a step.

        Args:
            step: From 0.
            scored: This rank's rollouts.
            loss_fn: Whose value `kl/reverse` is noted.
        """
        self._chosen, self._kl = {}, {}
        if not due(step, self._cfg.samples_every):
            return loss_fn
        for rollout in varied((s.rollout for s in scored), self._cfg.num_samples):
            self._chosen[tuple(rollout.input_ids[:-1])] = rollout

        def watched(output: PolicyOutput, microbatch: Microbatch) -> LossOutput:
            found = loss_fn(output, microbatch)
            self._note(microbatch, found.values["kl/reverse"])
            return found

        return watched

    def _note(self, microbatch: Microbatch, kl: Tensor) -> None:
        """Keep what belongs to chosen rollouts of a loss's values [N]."""
        ids = microbatch.input_ids[0].tolist()
        at: list[float | None] = [None] * len(ids)
        for place, value in zip(microbatch.loss_places.tolist(), kl.tolist(), strict=True):
            at[place] = value
        starts = [n for n, place in enumerate(microbatch.position_ids[0].tolist()) if place == 0]
        for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
            inputs = tuple(ids[start:end])
            if inputs in self._chosen:
                self._kl[inputs] = at[start:end][self._chosen[inputs].predicting]

    def collected(self, step: int) -> list[Sample]:
        """Collect the samples of a step on the main rank, if any are due; all ranks take part."""
        if not due(step, self._cfg.samples_every):
            return []
        mine = [
            (replace(rollout, routed_experts=no_experts()), self._kl[inputs])
            for inputs, rollout in self._chosen.items()
            if inputs in self._kl
        ]
        of_ranks = gather_objects(mine)
        if not is_main():
            return []
        found = {rollout.order: (rollout, kl) for rollout, kl in chain.from_iterable(of_ranks)}
        chosen = varied((rollout for rollout, _ in found.values()), self._cfg.num_samples)
        return [self._sample(step + 1, *found[rollout.order]) for rollout in chosen]

    def _sample(self, num_updates: int, rollout: Rollout, kl: list[float | None]) -> Sample:
        tokens = token_texts(self._tokenizer, rollout.response_ids)
        facts: dict[str, Any] = {
            "step": num_updates,
            "source": rollout.prompt.source,
            "category": rollout.prompt.category,
            "language": rollout.prompt.language,
            "prompt": self._tokenizer.decode(rollout.prompt.input_ids),
            "tokens": tokens,
            "kl": kl,
            "finish_reason": rollout.finish_reason.value,
        }
        shown = [plain_text(facts["prompt"]), heat_text(tokens, kl, STRONG_KL)]
        return Sample(facts, page(f"step {num_updates}", [], [Section("", shown)]))


def varied(rollouts: Iterable[Rollout], count: int) -> list[Rollout]:
    """Choose first responses to so many prompts: of each category one, then a second, and so on."""
    seen: dict[str, int] = {}
    turns: list[tuple[int, Rollout]] = []
    for rollout in sorted(rollouts, key=lambda rollout: rollout.order):
        if rollout.sample_index == 0:
            turn = seen.get(rollout.prompt.category, 0)
            seen[rollout.prompt.category] = turn + 1
            turns.append((turn, rollout))
    return [rollout for _, rollout in sorted(turns, key=lambda turn: turn[0])[:count]]


def token_texts(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """Give the text that each token adds; their concatenation is the whole text.

    A character of several tokens is the last one's, and the others add nothing.
    """
    texts: list[str] = []
    start = read = 0  # decoded together with the tokens from `start`; said up to `read`
    for end in range(1, len(ids) + 1):
        before = tokenizer.decode(ids[start:read])
        now = tokenizer.decode(ids[start:end])
        is_torn = now.endswith("\ufffd") and end - read < MOST_BYTES and end < len(ids)
        if is_torn:
            texts.append("")
        else:
            texts.append(now[len(before) :])
            start, read = read, end
    return texts
