"""From a teacher's config to the teacher."""

from marco_train.config import TeacherBackend, TeacherConfig
from marco_train.inference.pool import SaveEarly, nothing_to_save
from marco_train.teachers.base import Teacher, Wanted


def build_teacher(
    cfg: TeacherConfig, wanted: Wanted, save_early: SaveEarly = nothing_to_save
) -> Teacher:
    """Open a teacher; every rank takes part. `save_early` saves the run while servers are away."""
    match cfg.backend:
        case TeacherBackend.hf:
            from marco_train.teachers.hf import HFTeacher

            return HFTeacher(cfg, wanted)
        case TeacherBackend.moe:
            from marco_train.teachers.native import MoETeacher

            return MoETeacher(cfg, wanted)
        case TeacherBackend.vllm:
            from marco_train.teachers.vllm import VLLMTeacher

            return VLLMTeacher(cfg, wanted)
        case TeacherBackend.vllm_server:
            from marco_train.teachers.vllm_server import ServerTeacher

            return ServerTeacher(cfg, wanted, save_early)
