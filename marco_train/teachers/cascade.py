"""The order of teachers: one run and one optimizer, and a teacher that changes.

It changes at a known step, or earlier, where the held-out reverse KL has stopped falling.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

from marco_train.config.lengths import longest_sequence
from marco_train.config.opd import OPDConfig, PhaseConfig
from marco_train.config.resume import ResumeChange
from marco_train.config.resumption import field_difference
from marco_train.config.teacher import TeacherBackend, TeacherConfig
from marco_train.distributed import gather_objects, is_main, reduce_sums, world_size
from marco_train.errors import InputError, require
from marco_train.inference.engine import require_vllm
from marco_train.inference.pool import SaveEarly, nothing_to_save
from marco_train.metrics import Metrics
from marco_train.models.chat_template import check_template_kwargs
from marco_train.models.hf_io import check_teacher_positions, stop_token_ids
from marco_train.teachers.base import ScoreSpec, Submitted, Teacher, answer_bound
from marco_train.teachers.build import build_teacher
from marco_train.teachers.cache import ScoreCache
from marco_train.teachers.identity import Identity
from marco_train.teachers.preflight import (
    check_files,
    check_scores,
    check_turns,
    compare_with_student,
    probe_rollouts,
    same_answers,
)
from marco_train.teachers.routed import RoutedTeacher
from marco_train.tracking import log_line
from marco_train.types import Conversation, Prompt, Rollout, group_name


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
    others = {f"teachers_by_group.{group}": cfg for group, cfg in phase.teachers_by_group.items()}
    return {"teacher": phase.teacher} | others


def owner_of(phase: str, key: str) -> str:
    """What messages call a teacher."""
    return f"teacher {phase!r}" if key == "teacher" else f"teacher {phase!r} ({key})"


def teachers_of(cfg: OPDConfig) -> list[tuple[str, TeacherConfig]]:
    """All teachers of a cascade, each with what messages call it."""
    return [
        (owner_of(name, key), teacher)
        for name, phase in cfg.cascade.items()
        for key, teacher in _teachers(phase).items()
    ]


def check_teacher(
    cfg: OPDConfig,
    owner: str,
    teacher: TeacherConfig,
    student_tokenizer: str,
    chat_template: str,
    template_kwargs: Mapping[str, Any] | None,
) -> None:
    """Check a teacher's files; see `check_files`. No model is loaded.

    Raises:
        InputError: Says what is wrong with them.
    """
    if teacher.backend is TeacherBackend.vllm:
        require_vllm()
    if not Path(teacher.path).is_dir():
        raise InputError(f"{owner}: there is no model at {teacher.path!r}")
    check_files(student_tokenizer, chat_template, teacher, owner, template_kwargs)
    check_teacher_positions(cfg, teacher, owner)


class Cascade:
    """Opens each teacher when its phase begins; closes the previous one after the next's checks."""

    name = "cascade"

    def __init__(
        self,
        cfg: OPDConfig,
        student_tokenizer: str,
        chat_template: str,
        vocab_size: int,
        epoch_rows: int | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        """Plan the phases; no file is read but the student's tokenizer.

        Args:
            cfg: The stage.
            student_tokenizer: Directory of the student's tokenizer.
            chat_template: What the run renders conversations with.
            vocab_size: Rows of the student's head.
            epoch_rows: Prompts of an epoch. None: no phase is as long as epochs say.
            template_kwargs: Arguments of the template. None: there are none.

        Raises:
            InputError: `stage.top_k` is more than the vocabulary has.
        """
        require(
            (cfg.top_k or 0) <= vocab_size,
            f"stage.top_k is {cfg.top_k}, more than the {vocab_size} tokens of the vocabulary",
        )
        self._spec = ScoreSpec(
            cfg.objective,
            cfg.top_k or 0,
            cfg.top_k_source,
            vocab_size,
            longest_sequence(cfg),
            stop_token_ids(student_tokenizer)[0],
        )
        self._cfg = cfg
        self._epoch_rows = epoch_rows
        self._chat_template = chat_template
        self._template_kwargs = template_kwargs or {}
        self._student_tokenizer = student_tokenizer
        self._open: tuple[str, Teacher] | None = None
        self.save_early: SaveEarly = nothing_to_save  # while servers are away
        self._allowed: Collection[ResumeChange] = ()
        # By phase; all are kept in checkpoints.
        self._converged: dict[str, int] = {}  # the step before which it ended
        self._measures: dict[str, dict[int, float]] = {}  # step -> held-out reverse KL
        self._identities: dict[str, Identity] = {}
        self._probe_logprobs: dict[
            str, dict[str, list[float]]
        ] = {}  # of the probe sentences, by teacher
        self.phases = self._plan()

    def check_groups(self, known: set[str]) -> None:
        """Refuse teachers of groups that no prompt belongs to.

        Raises:
            InputError: Names them, and those that there are.
        """
        for name, phase in self._cfg.cascade.items():
            unknown = sorted({group_name(group) for group in phase.teachers_by_group} - known)
            require(
                not unknown,
                f"stage.cascade.{name}.teachers_by_group names {', '.join(unknown)}, of which "
                f"there are no prompts; there are {', '.join(sorted(known))}",
            )

    def check_turns(self, prompts: Iterable[tuple[Conversation, Prompt]]) -> None:
        """Refuse teachers whose own templates render the run's prompts otherwise; see `preflight`.

        Raises:
            InputError: Shows the first difference, or names an argument that no template reads.
        """
        compared, templates = list(prompts), [self._chat_template]
        for name, phase in self._cfg.cascade.items():
            for key, teacher in _teachers(phase).items():
                owner = owner_of(name, key)
                templates.append(check_turns(compared, teacher.path, self._template_kwargs, owner))
        check_template_kwargs(templates, self._template_kwargs)

    def _plan(self) -> list[Phase]:
        phases: list[Phase] = []
        first = 0
        for index, (name, cfg) in enumerate(self._cfg.cascade.items()):
            end = self._converged.get(name, first + self._cfg.phase_steps(name, self._epoch_rows))
            phases.append(Phase(name, index, first, end, cfg))
            first = end
        return phases

    @property
    def num_steps(self) -> int:
        """Steps of all phases; fewer than were planned once one has converged."""
        return self.phases[-1].end

    @property
    def num_held_out(self) -> int:
        """Most prompts that a measure of convergence needs."""
        rules = [phase.cfg.early_switch for phase in self.phases]
        return max(rule.num_prompts if rule.measure_every else 0 for rule in rules)

    def phase_at(self, step: int) -> Phase:
        """Find the phase of a step, from 0."""
        return next(phase for phase in self.phases if step < phase.end)

    def measure_due(self, step: int) -> bool:
        """Whether the held-out reverse KL is to be measured before a step."""
        if step == self.num_steps:
            return False
        phase = self.phase_at(step)
        every = phase.cfg.early_switch.measure_every
        if every is None or step in self._measures.get(phase.name, {}):
            return False
        return (step - phase.first) % every == 0

    def observe(self, step: int, kl: float) -> str | None:
        """Take a measure made before a step; names the phase that it ended, if it did."""
        phase = self.phase_at(step)
        rule = phase.cfg.early_switch
        known = self._measures.setdefault(phase.name, {})
        known[step] = kl
        values = [known[at] for at in sorted(known)]
        before, lately = values[: -rule.num_measures], values[-rule.num_measures :]
        if not before or min(before) - min(lately) >= rule.min_fall:
            return None
        self._converged[phase.name] = step
        self.phases = self._plan()
        if is_main():
            shown = ", ".join(f"{value:.4g}" for value in values[-rule.num_measures - 1 :])
            log_line(f"phase {phase.name!r} has converged before step {step}: held-out KL {shown}")
        return phase.name

    def _open_at(self, step: int) -> Teacher | None:
        """The teacher of a step, if it is open."""
        name, teacher = self._open or (None, None)
        return teacher if name == self.phase_at(step).name else None

    def opens_at(self, step: int) -> bool:
        """Whether a step's teacher is still to be opened: its phase begins, or a run resumes."""
        return self._open_at(step) is None

    def submit(self, step: int, rollouts: Iterable[Rollout]) -> Submitted:
        """Take the rollouts of a step as they are sampled, for `Teacher.collect`.

        Servers of a teacher that is open begin with each at once.
        """
        teacher = self._open_at(step)
        return Submitted(list(rollouts)) if teacher is None else teacher.submit(rollouts)

    def teacher_at(self, step: int, answers: Sequence[Rollout]) -> Teacher:
        """Return the teacher of a step; opens it where its phase begins or a run resumes.

        Args:
            step: The step.
            answers: This rank's share of the student's answers to the run's first prompts, with
                which a teacher that is opened is checked.

        Raises:
            InputError: The teacher is not fit to teach, or another than before the run resumed.
            ServersUnavailable: Its servers do not answer.
        """
        if (teacher := self._open_at(step)) is not None:
            return teacher
        phase = self.phase_at(step)
        with ExitStack() as unless_fit:
            opened = self._open_phase(phase, answers, unless_fit)
            unless_fit.pop_all()
        self.close()
        self._open = phase.name, opened
        return opened

    def _open_phase(
        self, phase: Phase, answers: Sequence[Rollout], unless_fit: ExitStack
    ) -> Teacher:
        """Load the teachers of a phase and check their numbers before they teach anything."""
        opened, probed = {}, {}
        for key, cfg in _teachers(phase.cfg).items():
            opened[key], probed[key] = self._open_teacher(cfg, phase.name, answers, unless_fit)
        others = {
            group_name(g): opened[f"teachers_by_group.{g}"] for g in phase.cfg.teachers_by_group
        }
        teacher = RoutedTeacher(opened["teacher"], others) if others else opened["teacher"]
        known = self._identities.setdefault(phase.name, teacher.identity)
        changed = field_difference(known, teacher.identity)
        known_logprobs = self._probe_logprobs.setdefault(phase.name, probed)
        for key, cfg in _teachers(phase.cfg).items():
            bound = answer_bound(cfg)
            if not same_answers(known_logprobs.get(key, []), probed[key], bound):
                changed.append(f"{key}: says of plain sentences what is further away than {bound}")
        changed = next(filter(None, gather_objects(changed)), [])  # all ranks go on, or none
        if changed:
            self._take_another(phase.name, changed)
            self._identities[phase.name], self._probe_logprobs[phase.name] = (
                teacher.identity,
                probed,
            )
        return teacher

    def _take_another(self, phase: str, changed: list[str]) -> None:
        """Refuse a teacher that is not the one before, unless it is allowed to be another."""
        what = (
            f"teacher {phase!r} is another than the one that taught before this run was resumed "
            f"({'; '.join(changed)})"
        )
        require(
            ResumeChange.teacher in self._allowed,
            f"{what}: bring that one back, go on with this one with on_resume.allow=[teacher], or "
            "start with resume=never",
        )
        if is_main():
            log_line(f"{what}, as on_resume.allow=[teacher] allows")
        self._forget_measures(phase)

    def _open_teacher(
        self, cfg: TeacherConfig, phase: str, answers: Sequence[Rollout], unless_fit: ExitStack
    ) -> tuple[Teacher, list[float]]:
        """Load a teacher and check it; also returns its log-probabilities of probe sentences."""
        teacher = build_teacher(cfg, self._spec, self.save_early)
        unless_fit.callback(teacher.close)
        probes = probe_rollouts(self._student_tokenizer, self._spec)
        name = f"teacher {phase!r} ({cfg.path})"
        bound = answer_bound(cfg)
        probe_logprobs = check_scores(teacher, probes, self._spec.vocab_size, bound, name)
        compare_with_student(teacher, answers, self._spec.vocab_size, name)
        teacher.take_counts()  # of the checks
        if self._cfg.score_cache.path is None:
            return teacher, probe_logprobs
        same = partial(same_answers, probe_logprobs, bound=bound)
        cached = ScoreCache(teacher, self._spec, self._cfg.score_cache, probe_logprobs, same)
        return cached, probe_logprobs

    def close(self) -> None:
        """Let go of the teacher that is open."""
        if self._open is not None:
            self._open[1].close()
            self._open = None

    def ends_at(self, step: int) -> bool:
        """Whether a step is the last of its phase."""
        return step + 1 == self.phase_at(step).end

    def metrics(self, step: int) -> Metrics:
        """Say which phase a step belongs to, and what its teacher counted, over all ranks."""
        phase = self.phase_at(step)
        metrics: Metrics = {"cascade/phase": phase.index}
        measured = self._measures.get(phase.name, {})
        if step in measured:
            metrics["eval/reverse_kl"] = measured[step]
        counts = self._open[1].take_counts() if self._open is not None else Counter[str]()
        return metrics | teacher_metrics(counts, phase.cfg, self._cfg.score_cache.path is not None)

    def state_at(self, step: int) -> dict[str, Any]:
        """What a checkpoint keeps before a step is made: phases behind, coming, and measures."""
        done = [p for p in self.phases if p.end <= step]
        running = [p for p in self.phases if p.first <= step < p.end]
        return {
            "phase": running[0].name if running else None,
            "finished": {p.name: p.end for p in done},
            "converged": self._converged,
            "measures": {
                name: [[at, value] for at, value in sorted(known.items())]
                for name, known in self._measures.items()
            },
            "teachers": self._identities,
            "probe_logprobs": self._probe_logprobs,
            "objective": self._objective(),
            "rules": {p.name: asdict(p.cfg.early_switch) for p in self.phases},
        }

    def _objective(self) -> list[Any]:
        """What scores and measures are of."""
        cfg = self._cfg
        return [cfg.objective.value, cfg.top_k, cfg.top_k_source.value]

    def _forget_other_measures(self, state: dict[str, Any]) -> None:
        """Forget what cannot be compared with what this run measures."""
        other_objective = state["objective"] != self._objective()
        if other_objective:
            self._probe_logprobs = {}  # the same teachers say it of other tokens
        rules = {phase.name: asdict(phase.cfg.early_switch) for phase in self.phases}
        for name in list(self._measures):
            other_rule = state["rules"].get(name) != rules.get(name)
            if other_objective or other_rule or ResumeChange.data in self._allowed:
                self._forget_measures(name)

    def _forget_measures(self, phase: str) -> None:
        """Begin to measure anew whether a phase has converged, unless it has ended."""
        if phase in self._converged or phase not in self._measures:
            return
        del self._measures[phase]
        if is_main():
            log_line(f"phase {phase!r}: its convergence is measured anew")

    def resume(
        self, step: int, state: dict[str, Any], allowed: Collection[ResumeChange] = ()
    ) -> None:
        """Go on at a step; phases may come after it, and become longer or shorter.

        Raises:
            InputError: The steps before this one were made in other phases.
        """
        self._allowed = allowed
        self._converged = dict(state["converged"])
        self._measures = {
            name: {int(at): float(value) for at, value in known}
            for name, known in state["measures"].items()
        }
        self._identities = dict(state["teachers"])
        self._probe_logprobs = dict(state["probe_logprobs"])
        self.phases = self._plan()
        self._forget_other_measures(state)
        then = sorted(((name, end) for name, end in state["finished"].items()), key=itemgetter(1))
        if step > (then[-1][1] if then else 0):
            then.append((state["phase"], step))
        now = [(p.name, min(p.end, step)) for p in self.phases if p.first < step]
        require(
            then == now,
            f"the cascade changed since the checkpoint was saved (phases with their last step: "
            f"{then} -> {now}); keep the phases up to this step as they were, or start with "
            "resume=never",
        )


def teacher_metrics(counts: Counter[str], phase: PhaseConfig, cached: bool) -> Metrics:
    """Reduce what a phase's teachers counted on each rank; all ranks take part."""
    metrics: Metrics = {}
    teachers = _teachers(phase).values()
    if any(teacher.backend is TeacherBackend.vllm_server for teacher in teachers):
        names = ("rejected", "missing_tokens", "repeated_requests")
        *sums, milliseconds = reduce_sums([counts[name] for name in (*names, "milliseconds")])
        metrics |= {f"teacher/{name}": value for name, value in zip(names, sums, strict=True)}
        metrics["teacher/seconds"] = milliseconds / 1e3 / world_size()
    if cached:
        asked, found, corrupt = reduce_sums(
            [counts[f"cache_{name}"] for name in ("asked", "found", "corrupt")]
        )
        metrics |= {"teacher/cache_hits": found / max(1.0, asked), "teacher/cache_corrupt": corrupt}
    return metrics
