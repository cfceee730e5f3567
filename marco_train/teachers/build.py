"""From a teacher's config to the teacher."""

from marco_train.config.teacher import (
    HFTeacherConfig,
    NativeTeacherConfig,
    TeacherConfig,
    VLLMServerTeacherConfig,
    VLLMTeacherConfig,
)
from marco_train.inference.pool import SaveEarly, nothing_to_save
from marco_train.teachers.base import ScoreSpec, Teacher


def build_teacher(
    cfg: TeacherConfig, spec: ScoreSpec, save_early: SaveEarly = nothing_to_save
) -> Teacher:
    """Open a teacher; every rank takes part."""
    match cfg:
        case HFTeacherConfig():
            from marco_train.teachers.hf import HFTeacher

            return HFTeacher(cfg, spec)
        case NativeTeacherConfig():
            from marco_train.teachers.native import NativeTeacher

            return NativeTeacher(cfg, spec)
        case VLLMTeacherConfig():
            from marco_train.teachers.vllm import VLLMTeacher

            return VLLMTeacher(cfg, spec)
        case VLLMServerTeacherConfig():
            from marco_train.teachers.vllm_server import ServerTeacher

            return ServerTeacher(cfg, spec, save_early)
    raise TypeError(f"no such teacher: {type(cfg).__name__}")
