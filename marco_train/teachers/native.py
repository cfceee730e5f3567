"""A Qwen3-MoE or dense Qwen3 teacher in our own model, frozen, its experts shared over ranks.

An MoE model like Qwen3-30B-A3B does not fit one GPU beside the student; spread over eight it does.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from marco_train.config.architecture import check_expert_parallel, read_architecture
from marco_train.config.teacher import NativeTeacherConfig
from marco_train.distributed import device, expert_parallel_group, reduce_max
from marco_train.models import load_model
from marco_train.models.attention import PackedSequences
from marco_train.models.weights import local_weights, torch_dtype
from marco_train.teachers.base import ScoreSpec, Teacher, head_for_student, scores_from_hidden
from marco_train.teachers.identity import memory_identity
from marco_train.types import Rollout, ScoredRollout


class NativeTeacher(Teacher):
    """Scores this rank's rollouts; every rank takes part in every pass."""

    def __init__(self, cfg: NativeTeacherConfig, spec: ScoreSpec) -> None:
        check_expert_parallel(read_architecture(cfg.path), cfg.expert_parallel_size)
        group = expert_parallel_group(cfg.expert_parallel_size)
        model = load_model(cfg.path, torch_dtype(cfg.dtype), group)
        self._model = model.eval().requires_grad_(False)
        self._spec = spec
        self._max_tokens = cfg.max_tokens_per_batch
        self.identity = memory_identity(cfg, local_weights(self._model))
        self.head: Tensor = head_for_student(self._model.head, spec, cfg.stop_id)

    @torch.inference_mode()
    def score(self, rollouts: Sequence[Rollout]) -> list[ScoredRollout]:
        """Score this rank's rollouts, in their order."""
        batches = self._batches(rollouts)
        # A rank that is done runs passes without a token: its experts are needed.
        batches += [[]] * (reduce_max(len(batches)) - len(batches))
        return [scored for batch in batches for scored in self._score_batch(batch)]

    def _batches(self, rollouts: Iterable[Rollout]) -> list[list[Rollout]]:
        """Cut rollouts, in their order, into packs of a bounded number of tokens."""
        batches: list[list[Rollout]] = []
        filled = self._max_tokens
        for rollout in rollouts:
            length = len(rollout.input_ids)
            if filled + length > self._max_tokens:
                batches.append([])
                filled = 0
            batches[-1].append(rollout)
            filled += length
        return batches

    def _score_batch(self, batch: Sequence[Rollout]) -> list[ScoredRollout]:
        # The state at a token predicts the next one, so the last token is not needed.
        ids = [token for rollout in batch for token in rollout.input_ids[:-1]]
        places = [place for rollout in batch for place in range(len(rollout.input_ids) - 1)]
        positions = torch.tensor([places], dtype=torch.int64)
        hidden = self._model(
            torch.tensor([ids], dtype=torch.int64, device=device()),
            positions.to(device()),
            PackedSequences(positions).to(device()),
        )
        scored = []
        lengths = [len(rollout.input_ids) - 1 for rollout in batch]
        for rollout, states in zip(batch, hidden.split(lengths), strict=True):
            predicting = states[rollout.predicting]
            scores = scores_from_hidden(rollout, predicting, self.head, self._spec)
            scored.append(ScoredRollout(rollout, scores))
        return scored
