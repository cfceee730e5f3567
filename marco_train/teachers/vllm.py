"""A teacher in vLLM, in this process: whatever vLLM serves, at its speed.

The objective `sampled` takes log-probabilities from an engine that generates. The others take the
last hidden states from an engine that pools, and multiply them by the head, which is read beside
it: so every objective is exact, and K tokens may be anyone's.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from marco_train.config.opd import Objective
from marco_train.config.teacher import VLLMTeacherConfig
from marco_train.distributed import device
from marco_train.inference.engine import Purpose, VLLMEngine
from marco_train.models.hf_io import read_head
from marco_train.models.weights import torch_dtype
from marco_train.teachers.base import (
    ScoreSpec,
    Teacher,
    head_for_student,
    ids_for_teacher,
    refuse_non_finite,
    scores_from_hidden,
)
from marco_train.teachers.identity import files_identity
from marco_train.types import Rollout, ScoredRollout, TokenScores


class VLLMTeacher(Teacher):
    """Scores this rank's rollouts with an engine of its own."""

    def __init__(self, cfg: VLLMTeacherConfig, spec: ScoreSpec) -> None:
        self._spec = spec
        self._stop_id = cfg.stop_id
        self.identity = files_identity(cfg, served_as=None)
        self.head: Tensor | None = None
        if spec.objective is not Objective.sampled:
            head = read_head(cfg.path).to(device(), torch_dtype(cfg.dtype))
            self.head = head_for_student(head, spec, cfg.stop_id)
        self._engine = VLLMEngine(
            cfg.path,
            cfg.dtype.value,
            max_length=spec.max_length + 1,  # an engine that generates makes one token
            max_tokens_per_batch=cfg.max_tokens_per_batch,
            kv_cache_bytes=int(cfg.kv_cache_gib * 2**30),
            purpose=Purpose.generate if self.head is None else Purpose.hidden_states,
        )

    @torch.inference_mode()
    def score(self, rollouts: Sequence[Rollout]) -> list[ScoredRollout]:
        """Score this rank's rollouts, in their order."""
        if not rollouts:
            return []
        return self._token_scores(rollouts) if self.head is None else self._by_state(rollouts)

    def _token_scores(self, rollouts: Sequence[Rollout]) -> list[ScoredRollout]:
        sequences = [
            r.prompt.input_ids + ids_for_teacher(r.response_ids, self._spec, self._stop_id)
            for r in rollouts
        ]
        scored = []
        pairs = self._engine.token_logprobs(sequences, num_topk=0)
        for rollout, (_, logprobs) in zip(rollouts, pairs, strict=True):
            refuse_non_finite(logprobs)
            of_response = logprobs[rollout.predicting, 0]
            scored.append(ScoredRollout(rollout, TokenScores(of_response.clone())))
        return scored

    def _by_state(self, rollouts: Sequence[Rollout]) -> list[ScoredRollout]:
        assert self.head is not None
        scored = []
        states = self._engine.hidden_states([rollout.input_ids for rollout in rollouts])
        for rollout, hidden in zip(rollouts, states, strict=True):
            on_device = hidden[rollout.predicting].to(self.head.device, self.head.dtype)
            scores = scores_from_hidden(rollout, on_device, self.head, self._spec)
            scored.append(ScoredRollout(rollout, scores))
        return scored

    def close(self) -> None:
        """Free the engine's memory."""
        self._engine.close()
