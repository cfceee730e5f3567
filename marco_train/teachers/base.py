"""What a teacher is."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from marco_train.config import Objective, TopKFrom
from marco_train.losses.logprobs import gather_logprobs, token_logprobs, topk_logprobs
from marco_train.types import HiddenScores, Rollout, ScoredRollout, TokenScores, TopKScores


@dataclass(frozen=True)
class Wanted:
    """What the objective needs of a teacher."""

    objective: Objective
    top_k: int  # 0 unless the objective is topk
    top_k_from: TopKFrom


def scores_from_hidden(
    rollout: Rollout, hidden: Tensor, head: Tensor, wanted: Wanted
) -> TokenScores | TopKScores | HiddenScores:
    """Score a response from the teacher's last hidden states.

    Args:
        rollout: R response tokens.
        hidden: [R, D], those that predict the response.
        head: [V, D].
        wanted: Which kind of scores.

    Returns:
        Scores on the CPU.
    """
    match wanted.objective:
        case Objective.full:
            return HiddenScores(hidden.cpu().clone())
        case Objective.sampled:
            targets = torch.tensor(rollout.response_ids, device=hidden.device)
            logprobs, _ = token_logprobs(hidden, head, targets)
            return TokenScores(logprobs.cpu().clone())
        case Objective.topk:
            logprobs, likeliest = topk_logprobs(hidden, head, wanted.top_k)
            ids = likeliest
            if wanted.top_k_from is TopKFrom.sampler:
                ids = torch.tensor(rollout.topk_ids, dtype=torch.int64, device=hidden.device)
                ids = ids.view(len(rollout.response_ids), wanted.top_k)
                logprobs, _ = gather_logprobs(hidden, head, ids)
            overlap = (ids[:, :, None] == likeliest[:, None]).any(2).float().mean(1)
            return TopKScores(ids.cpu().clone(), logprobs.cpu().clone(), overlap.cpu())


class Teacher(Protocol):
    """Frozen; scores the tokens of rollouts, by their ids."""

    @property
    def head(self) -> Tensor:
        """Weights of the output head, [V, D]."""

    def score(self, rollouts: Sequence[Rollout]) -> list[ScoredRollout]:
        """Score this rank's rollouts, in their order."""
