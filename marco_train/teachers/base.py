"""What a teacher is."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from marco_train.config.opd import Objective, TopKSource
from marco_train.config.teacher import TeacherConfig
from marco_train.losses.logprobs import gather_logprobs, token_logprobs, topk_logprobs
from marco_train.models.agreement import Spread, same_answer
from marco_train.models.hf_io import decoder_config
from marco_train.teachers.identity import Identity
from marco_train.types import HiddenScores, Rollout, ScoredRollout, TokenScores, TopKScores


def answer_bound(cfg: TeacherConfig) -> Spread:
    """Bound on two answers of a teacher to one question: the rest of a batch changes them."""
    return same_answer(cfg.dtype, int(decoder_config(cfg.path).get("num_hidden_layers", 0)))


@dataclass(frozen=True)
class ScoreSpec:
    """What a run needs of its teachers."""

    objective: Objective
    top_k: int  # 0 unless the objective is topk
    top_k_source: TopKSource
    vocab_size: int
    max_length: int
    """Tokens of the longest prompt with its response."""
    stop_id: int
    """With which the student ends a turn."""


def scores_from_hidden(
    rollout: Rollout, hidden: Tensor, head: Tensor, spec: ScoreSpec
) -> TokenScores | TopKScores | HiddenScores:
    """Score a response from the teacher's last hidden states.

    Args:
        rollout: R response tokens.
        hidden: [R, D], those that predict the response.
        head: [V, D].
        spec: Which kind of scores.

    Returns:
        Scores on the CPU.

    Raises:
        FloatingPointError: The hidden states are not numbers.
    """
    refuse_non_finite(hidden)
    match spec.objective:
        case Objective.full:
            return HiddenScores(hidden.cpu().clone())
        case Objective.sampled:
            targets = torch.tensor(rollout.response_ids, device=hidden.device)
            logprobs, _ = token_logprobs(hidden, head, targets)
            return TokenScores(logprobs.cpu().clone())
        case Objective.topk:
            logprobs, likeliest = topk_logprobs(hidden, head, spec.top_k)
            ids = likeliest
            if spec.top_k_source is TopKSource.sampler:
                ids = torch.tensor(rollout.topk_ids, dtype=torch.int64, device=hidden.device)
                ids = ids.view(len(rollout.response_ids), spec.top_k)
                logprobs, _ = gather_logprobs(hidden, head, ids)
            overlap = overlap_with(likeliest, ids)
            return TopKScores(ids.cpu().clone(), logprobs.cpu().clone(), overlap.cpu())


def overlap_with(likeliest: Tensor, ids: Tensor) -> Tensor:
    """Share [R] of each row of ids [R, K] that is among the teacher's likeliest [R, K]."""
    return (ids[:, :, None] == likeliest[:, None]).any(2).float().mean(1)


def refuse_non_finite(values: Tensor) -> None:
    """Stop where a teacher in this process computes what is not finite."""
    if not values.isfinite().all():
        raise FloatingPointError(
            "the teacher computed values that are not finite; the weights and the last checkpoint "
            "of the student are intact"
        )


def swap_ids(ids: Tensor, one: int, other: int | None) -> Tensor:
    """Exchange two ids wherever they stand, into a new tensor; None exchanges nothing."""
    if other is None:
        return ids
    traded = ids.clone()
    traded[ids == one] = other
    traded[ids == other] = one
    return traded


def ids_for_teacher(ids: list[int], spec: ScoreSpec, stop_id: int | None) -> list[int]:
    """Ids with the stop tokens of student and teacher in each other's place; None: as they are."""
    traded: list[int] = swap_ids(
        torch.tensor(ids, dtype=torch.int64), spec.stop_id, stop_id
    ).tolist()
    return traded


def head_for_student(head: Tensor, spec: ScoreSpec, stop_id: int | None) -> Tensor:
    """The teacher's head [V, D] with its stop token in the row of the student's."""
    if stop_id is None:
        return head
    rows = swap_ids(torch.arange(len(head)), spec.stop_id, stop_id)
    return head[rows.to(head.device)]


@dataclass(frozen=True)
class Submitted:
    """Rollouts that a teacher is to score."""

    rollouts: list[Rollout]
    asked: Any = None
    """What the teacher keeps of them until they are collected; None: nothing has begun."""


class Teacher:
    """Frozen; scores the tokens of rollouts, by their ids."""

    head: Tensor | None
    """Weights of the output head, [V, D]; None where it is not at hand."""
    identity: Identity
    """What its scores are a function of, beside what is asked; the same on every rank."""

    def score(self, rollouts: Sequence[Rollout]) -> list[ScoredRollout]:
        """Score this rank's rollouts, in their order; every rank takes part.

        What could not be scored is left out and counted.
        """
        raise NotImplementedError

    def submit(self, rollouts: Iterable[Rollout]) -> Submitted:
        """Take this rank's rollouts as they are sampled; servers begin with each at once."""
        return Submitted(list(rollouts))

    def collect(self, submitted: Submitted) -> list[ScoredRollout]:
        """Score what was submitted, as `score` does."""
        return self.score(submitted.rollouts)

    def take_counts(self) -> Counter[str]:
        """What happened on this rank since last taken, by the names in `cascade.metrics`."""
        return Counter()

    def close(self) -> None:
        """Let go of memory and connections."""
