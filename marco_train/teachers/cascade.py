"""The order of teachers: one run, one optimizer, and a teacher that changes at a known step."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from marco_train.architecture import InputError, require
from marco_train.config import OPDConfig, PhaseConfig, TeacherConfig
from marco_train.metrics import Metrics
from marco_train.teachers.base import Teacher, Wanted
from marco_train.teachers.build import build_teacher
from marco_train.teachers.cache import ScoreCache, cache_metrics, teacher_identity
from marco_train.teachers.preflight import check_files, check_scores, probe_rollouts
from marco_train.teachers.routed import RoutedTeacher


@dataclass(frozen=True)
class Phase:
    """The steps in which one teacher teaches: first <= step < end."""

    name: str
    index: int
    first: int
    end: int
    cfg: PhaseConfig


def _teachers(phase: PhaseConfig) -> dict[str, TeacherConfig]:
    """All teachers of a phase, by their key in its config."""
    others = {f"teacher_of.{group}": cfg for group, cfg in phase.teacher_of.items()}
    return {"teacher": phase.teacher} | others


class Cascade:
    """Opens each teacher when its phase begins; only one occupies memory."""

    name = "cascade"

    def __init__(
        self, cfg: OPDConfig, student_tokenizer: str, chat_template: str, vocab_size: int
    ) -> None:
        """Plan the phases and check every teacher's files; no model is loaded.

        Raises:
            InputError: A teacher is missing or has another vocabulary.
        """
        require(
            (cfg.top_k or 0) <= vocab_size,
            f"stage.top_k is {cfg.top_k}, more than the {vocab_size} tokens of the vocabulary",
        )
        self._wanted = Wanted(cfg.objective, cfg.top_k or 0, cfg.top_k_from)
        self.phases: list[Phase] = []
        first = 0
        for index, (name, phase) in enumerate(cfg.cascade.items()):
            for key, cfg_of_group in _teachers(phase).items():
                path = cfg_of_group.path
                if not (Path(path) / "config.json").is_file():
                    raise InputError(
                        f"stage.cascade.{name}.{key}.path: there is no model at {path!r}"
                    )
                owner = f"teacher {name!r}" if key == "teacher" else f"teacher {name!r} ({key})"
                check_files(student_tokenizer, chat_template, vocab_size, path, owner)
            end = first + cfg.capped(phase.num_steps)
            self.phases.append(Phase(name, index, first, end, phase))
            first = end
        self._student_tokenizer = student_tokenizer
        self._score_cache = cfg.score_cache
        self._open: tuple[str, Teacher] | None = None
        self._caches: list[ScoreCache] = []

    @property
    def num_steps(self) -> int:
        """Steps of all phases."""
        return self.phases[-1].end

    def phase_at(self, step: int) -> Phase:
        """Find the phase of a step, from 0."""
        return next(phase for phase in self.phases if step < phase.end)

    def teacher_at(self, step: int) -> Teacher:
        """Return the teacher of a step; opens it where its phase begins or a run resumes."""
        phase = self.phase_at(step)
        if self._open is None or self._open[0] != phase.name:
            self._open, self._caches = None, []  # let go of the former before the next takes memory
            default = self._open_teacher(phase.cfg.teacher, phase.name)
            others = {
                group: self._open_teacher(cfg, phase.name)
                for group, cfg in phase.cfg.teacher_of.items()
            }
            self._open = phase.name, RoutedTeacher(default, others) if others else default
        return self._open[1]

    def _open_teacher(self, cfg: TeacherConfig, phase: str) -> Teacher:
        """Load a teacher and check its numbers before it teaches anything."""
        teacher = build_teacher(cfg, self._wanted)
        probes = probe_rollouts(self._student_tokenizer, self._wanted)
        check_scores(teacher, probes, f"teacher {phase!r} ({cfg.path})")
        if self._score_cache is None:
            return teacher
        identity = teacher_identity(cfg.path)
        self._caches.append(ScoreCache(teacher, identity, self._wanted, self._score_cache))
        return self._caches[-1]

    def ends_at(self, step: int) -> bool:
        """Whether a step is the last of its phase."""
        return step + 1 == self.phase_at(step).end

    def metrics(self, step: int) -> Metrics:
        """Say which phase a step belongs to, and what its teacher's cache was worth."""
        metrics: Metrics = {"cascade/phase": self.phase_at(step).index}
        return metrics | cache_metrics(self._caches)

    def state_at(self, step: int) -> dict[str, Any]:
        """What a checkpoint keeps before a step is made: the coming phase and those behind it."""
        done = [p for p in self.phases if p.end <= step]
        running = [p for p in self.phases if p.first <= step < p.end]
        return {
            "phase": running[0].name if running else None,
            "finished": {p.name: p.end for p in done},
        }

    def resume(self, step: int, state: dict[str, Any]) -> None:
        """Go on at a step.

        Raises:
            InputError: The phases before this step are not those of the checkpoint.
        """
        expected = self.state_at(step)
        if state != expected:
            raise InputError(
                f"the cascade changed since the checkpoint was saved ({state} -> {expected}); "
                "keep the phases up to this step as they were, or start with resume=never"
            )
