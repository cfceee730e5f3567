"""Reverse KL of a model to teachers, exact over the vocabulary."""

from collections.abc import Sequence

import torch

from marco_train.config import TrainConfig
from marco_train.config.lengths import longest_sequence
from marco_train.config.opd import Objective, TopKSource
from marco_train.config.teacher import TeacherConfig
from marco_train.data.packing import pack_rollouts
from marco_train.distributed import device, reduce_sums
from marco_train.losses.distillation import FullReverseKL
from marco_train.models import Qwen3Moe
from marco_train.models.hf_io import stop_token_ids
from marco_train.teachers.base import ScoreSpec, Teacher, answer_bound
from marco_train.teachers.build import build_teacher
from marco_train.teachers.preflight import check_scores, probe_rollouts
from marco_train.types import PolicyOutput, Rollout


def open_teacher(cfg: TrainConfig, vocab_size: int, name: str) -> Teacher:
    """Open one of the stage's teachers, for its hidden states, and check its numbers.

    Raises:
        InputError: They cannot be trusted.
    """
    teacher_cfg: TeacherConfig = cfg.stage.teachers[name]
    states = ScoreSpec(
        Objective.full,
        top_k=0,
        top_k_source=TopKSource.teacher,
        vocab_size=vocab_size,
        max_length=longest_sequence(cfg.stage),
        stop_id=stop_token_ids(cfg.model.tokenizer)[0],
    )
    teacher = build_teacher(teacher_cfg, states)
    try:
        probes = probe_rollouts(cfg.model.tokenizer, states)
        bound = answer_bound(teacher_cfg)
        check_scores(teacher, probes, vocab_size, bound, f"{name} ({teacher_cfg.path})")
    except BaseException:
        teacher.close()
        raise
    return teacher


@torch.no_grad()
def mean_reverse_kl(
    cfg: TrainConfig, model: Qwen3Moe, rollouts: Sequence[Rollout], teacher: Teacher
) -> float:
    """Exact reverse KL over the vocabulary, mean over the sampled tokens of all ranks."""
    assert teacher.head is not None
    objective = FullReverseKL(teacher.head)
    total, num_tokens = 0.0, 0
    scored = teacher.score(rollouts)
    for packed in pack_rollouts(scored, Objective.full, cfg.data.max_tokens_per_microbatch):
        microbatch = packed.to(device())
        hidden = model(microbatch.input_ids, microbatch.position_ids)
        output = objective(PolicyOutput(hidden, model.head), microbatch)  # type: ignore[arg-type]
        total += float(output.values["kl/reverse"].sum())
        num_tokens += microbatch.num_loss_tokens
    all_kl, all_tokens = reduce_sums([total, num_tokens])
    return all_kl / all_tokens
