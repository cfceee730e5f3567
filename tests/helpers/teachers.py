"""Configs of teachers, and what a run asks of one."""

from pathlib import Path
from typing import Any

from marco_train.config.model import DType
from marco_train.config.opd import Objective, TopKSource
from marco_train.config.teacher import (
    HFTeacherConfig,
    NativeTeacherConfig,
    TeacherBackend,
    TeacherConfig,
    VLLMServerTeacherConfig,
    VLLMTeacherConfig,
)
from marco_train.teachers.base import ScoreSpec
from marco_train.teachers.build import build_teacher
from marco_train.teachers.hf import HFTeacher
from tests.helpers.models import VOCAB_SIZE


def wanted_of(
    objective: Objective,
    top_k: int = 0,
    top_k_source: TopKSource = TopKSource.sampler,
    vocab_size: int = VOCAB_SIZE,
) -> ScoreSpec:
    """What a run of the world's student needs of a teacher; its turns end with token 2."""
    return ScoreSpec(objective, top_k, top_k_source, vocab_size, max_length=200, stop_id=2)


TEACHERS: dict[TeacherBackend, tuple[type[TeacherConfig], dict[str, Any]]] = {
    TeacherBackend.hf: (HFTeacherConfig, {"max_tokens_per_batch": 4096}),
    TeacherBackend.native: (
        NativeTeacherConfig,
        {"max_tokens_per_batch": 4096, "expert_parallel_size": 1},
    ),
    TeacherBackend.vllm: (
        VLLMTeacherConfig,
        {"max_tokens_per_batch": 4096, "kv_cache_gib": 0.0625},
    ),
    TeacherBackend.vllm_server: (VLLMServerTeacherConfig, {}),
}


def teacher_config(path: str, backend: TeacherBackend, **changes: Any) -> TeacherConfig:
    """A teacher in float32, or what the changes make of it."""
    kind, own = TEACHERS[backend]
    fields: dict[str, Any] = {"path": path, "dtype": DType.float32}
    return kind(**fields | own | changes)


def hf_teacher(path: str | Path, wanted: ScoreSpec, **changes: Any) -> HFTeacher:
    """A teacher in transformers, opened."""
    cfg = teacher_config(str(path), TeacherBackend.hf, **changes)
    assert isinstance(cfg, HFTeacherConfig)
    return HFTeacher(cfg, wanted)


def wanted_for(objective: Objective) -> ScoreSpec:
    return wanted_of(objective, top_k=5 if objective is Objective.topk else 0)


def opened(path: Path, backend: TeacherBackend = TeacherBackend.hf, **changes: Any) -> Any:
    return build_teacher(
        teacher_config(str(path), backend, **changes), wanted_of(Objective.sampled)
    )
