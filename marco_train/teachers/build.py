"""From a teacher's config to the teacher."""

from marco_train.config.teacher import (
    HFTeacherConfig,
    NativeTeacherConfig,
    TeacherConfig,
    VLLMServerTeacherConfig,
    VLLMTeacherConfig,
)
from marco_train.inference.pool import SaveEarly, nothing_to_save
from marco_train.teachers.base import Teacher, Wanted


def build_teacher(
    cfg: TeacherConfig, wanted: Wanted, save_early: SaveEarly = nothing_to_save
) -> Teacher:
    """Open a teacher; every rank takes part."""
    match cfg:
        case HFTeacherConfig():
            from marco_train.teachers.hf import HFTeacher

            return HFTeacher(cfg, wanted)
        case NativeTeacherConfig():
            from marco_train.teachers.native import NativeTeacher

            return NativeTeacher(cfg, wanted)
        case VLLMTeacherConfig():
            from marco_train.teachers.vllm import VLLMTeacher

            return VLLMTeacher(cfg, wanted)
        case VLLMServerTeacherConfig():
            from marco_train.teachers.vllm_server import ServerTeacher

            return ServerTeacher(cfg, wanted, save_early)
    raise TypeError(f"no such teacher: {type(cfg).__name__}")
