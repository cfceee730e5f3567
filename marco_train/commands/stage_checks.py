"""The checks of each stage, in the order in which a run meets what it needs."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from marco_train.config import TrainConfig
from marco_train.config.architecture import ArchitectureConfig, check_expert_parallel
from marco_train.config.lengths import longest_sequence
from marco_train.config.opd import OPDConfig
from marco_train.config.teacher import TeacherConfig
from marco_train.data.chat import Tokenizer, load_tokenizer
from marco_train.data.loader import PromptLoader, SFTLoader
from marco_train.data.packing import pack_rollouts
from marco_train.distributed import (
    device,
    expert_parallel_group,
    is_main,
    rank,
    reduce_sums,
)
from marco_train.errors import InputError, WeightSyncError, require
from marco_train.losses.cross_entropy import cross_entropy
from marco_train.losses.distillation import build_reverse_kl
from marco_train.losses.logprobs import sequence_logprobs
from marco_train.metrics import Metrics, MetricSums, check_names
from marco_train.models import Qwen3Moe, load_model
from marco_train.models.hf_io import (
    check_architecture,
    decoder_config,
    stop_token_ids,
    student_architecture,
)
from marco_train.models.weights import named_weights, random_model, torch_dtype
from marco_train.rollout.build import build_sampler, check_sampler
from marco_train.rollout.sync import canaries, sync_weights
from marco_train.run import check_resumption
from marco_train.stages import evaluate
from marco_train.teachers.cascade import Cascade, check_teacher, teachers_of
from marco_train.teachers.preflight import NUM_ANSWERED, FirstOfEachKind
from marco_train.teachers.vocab import check_student_vocabulary
from marco_train.tracking import log_line
from marco_train.types import LossFn, Microbatch, PolicyOutput, Rollout

if TYPE_CHECKING:
    from marco_train.commands.doctor import Examination


def check_sft(cfg: TrainConfig, made: "Examination") -> None:
    """Make what the first update needs, and the loss of the first microbatch."""
    student = made.check("student's files", partial(student_architecture, cfg))
    made.check("student's vocabulary", partial(check_student_vocabulary, cfg.model))
    tokenizer = made.check("tokenizer and template", partial(load_tokenizer, cfg.model))
    batch: list[Microbatch] | None = None
    if tokenizer is not None:
        data = made.check("data", partial(SFTLoader, cfg.data, cfg.stage, tokenizer, cfg.seed))
        if data is not None:
            data.log_plan(data.num_steps)
            made.check("every source", data.check_sources)
            batch = made.check("first batch", partial(next, data))
            say_batch(data.metrics())
            made.check("held-out rows", data.held_out)
            if made.can_resume:
                made.check("resumption", partial(check_resumption, cfg, [data], data.epoch_rows))
    model = None if student is None else made.check("weights", partial(load_student, cfg, student))
    if model is not None and batch is not None:
        made.check("first loss", partial(first_loss, model, batch, cross_entropy))


def check_opd(cfg: TrainConfig, made: "Examination") -> None:
    """Make what the first update needs: rollouts, and every teacher's scores of them."""
    opd: OPDConfig = cfg.stage
    student = made.check("student's files", partial(student_architecture, cfg))
    made.check("student's vocabulary", partial(check_student_vocabulary, cfg.model))
    fit = student is not None and made.passes(
        "sampler", partial(check_sampler, opd.rollout, student)
    )
    tokenizer = made.check("tokenizer and template", partial(load_tokenizer, cfg.model))
    if tokenizer is None:
        return
    prompts = made.check("data", partial(PromptLoader, cfg.data, opd, tokenizer, cfg.seed))
    if prompts is not None:
        made.check("every source", prompts.check_sources)
        fit &= made.passes("first batch", partial(next, prompts))
        say_batch(prompts.metrics())
    model = None if student is None else made.check("weights", partial(load_student, cfg, student))
    cascade = open_cascade(cfg, made, tokenizer, student)
    if cascade is None or prompts is None or student is None:
        return
    prompts.log_plan(cascade.num_steps)
    made.check("groups", partial(check_groups, cascade, prompts))
    turns = prompts.first_prompts(FirstOfEachKind())
    made.check("teachers' turns", partial(cascade.check_turns, turns))
    made.check("held-out prompts", partial(prompts.held_out, cascade.num_held_out))
    if made.can_resume:
        made.check("resumption", partial(check_resumption, cfg, [prompts, cascade]))
    if model is None or not fit:
        return
    answers = made.check("student's answers", partial(answers_of, cfg, student, model, prompts))
    if answers is None:
        return
    for phase in cascade.phases:
        if phase.first == phase.end:
            continue  # of a checkpoint: it converged before it taught
        made.check(
            f"teacher {phase.name!r}",
            partial(first_scores, cfg, cascade, phase.first, model, answers),
        )
    cascade.close()


def open_cascade(
    cfg: TrainConfig, made: "Examination", tokenizer: Tokenizer, student: ArchitectureConfig | None
) -> Cascade | None:
    """Check the files of every teacher, each on its own; None where one is not fit."""
    opd: OPDConfig = cfg.stage
    turns = (cfg.model.tokenizer, tokenizer.chat_template)

    def check_one(owner: str, teacher: TeacherConfig) -> None:
        # Where the student's files are broken, as many rows as the teacher has.
        if student is not None:
            rows = student.vocab_size
        else:
            there = Path(teacher.path).is_dir()
            rows = decoder_config(teacher.path).get("vocab_size", 0) if there else 0
        check_teacher(opd, owner, teacher, *turns, rows, tokenizer.template_kwargs)

    fit = [
        made.passes(f"files of {each[0]}", partial(check_one, *each)) for each in teachers_of(opd)
    ]
    if student is None or not all(fit):
        return None
    return Cascade(opd, *turns, student.vocab_size, tokenizer.template_kwargs)


def check_groups(cascade: Cascade, prompts: PromptLoader) -> None:
    """Check the names of groups of prompts as metrics' names and as teachers' groups."""
    groups = prompts.groups()
    check_names(f"kl/reverse/{group}" for group in groups)
    cascade.check_groups(groups)


def check_evaluate(cfg: TrainConfig, made: "Examination") -> None:
    """Open all that is measured, and measure it on the first question of each rank."""
    tokenizer = made.check("tokenizer and template", partial(load_tokenizer, cfg.model))
    if tokenizer is None:
        return
    measured = evaluate.measured_models(cfg)
    vocab_size = made.check("vocabulary", partial(evaluate.shared_vocabulary, measured))
    fit = vocab_size is not None
    if vocab_size is not None:
        for each in measured:
            check = partial(evaluate.check_model, cfg, tokenizer, vocab_size, *each)
            fit &= made.passes(f"files of {each[1]}", check)
    questions = made.check("questions", partial(evaluate.checked_questions, cfg, tokenizer))
    if questions is None or vocab_size is None or not fit:
        return
    teachers = {
        name: made.check(name, partial(evaluate.open_teacher, cfg, vocab_size, name, teacher))
        for name, teacher in cfg.stage.teachers.items()
    }
    mine = questions[rank() : rank() + 1]

    def measure(kind: str, path: str) -> None:
        model = load_model(path, torch_dtype(cfg.model.dtype))
        answers = evaluate.sample_answers(cfg, model, mine, tokenizer)
        evaluate.accuracy_of(answers)
        if kind == "models":
            for teacher in filter(None, teachers.values()):
                evaluate.mean_reverse_kl(cfg, model, [r for _, r, _ in answers], teacher)

    for kind, name, path in measured:
        made.check(f"{name}'s first answers", partial(measure, kind, path))
    for teacher in filter(None, teachers.values()):
        teacher.close()


def say_batch(metrics: Metrics) -> None:
    """Say how many rows the first batch has, and how many were dropped and why."""
    if not metrics or not is_main():
        return
    drops = {name: count for name, count in metrics.items() if "dropped" in name and count > 0}
    said = [f"{count:.0f} {name}" for name, count in drops.items()] or ["none dropped"]
    log_line(f"  {metrics['data/num_sequences']:.0f} rows; {', '.join(said)}")


def load_student(cfg: TrainConfig, student: ArchitectureConfig) -> Qwen3Moe:
    """Load the student as the policy would, or draw it."""
    dtype = torch_dtype(cfg.model.dtype)
    ep_size = cfg.parallel.expert_parallel_size
    check_expert_parallel(student, ep_size)
    group = expert_parallel_group(ep_size)
    if cfg.model.path is None:
        return random_model(student, dtype, cfg.seed, group)
    if cfg.model.architecture is not None:
        check_architecture(cfg.model.path, cfg.model.architecture)
    return load_model(cfg.model.path, dtype, group)


@torch.no_grad()
def first_loss(model: Qwen3Moe, batch: Sequence[Microbatch], loss_fn: LossFn) -> None:
    """Say the loss of the first microbatch of every rank; all ranks take part.

    Raises:
        InputError: It is not finite.
    """
    microbatch = batch[0].to(device())
    hidden = model(microbatch.input_ids, microbatch.position_ids)
    sums = MetricSums()
    sums.add(loss_fn(PolicyOutput(hidden, model.head), microbatch), microbatch)
    (num_tokens,) = reduce_sums([microbatch.num_loss_tokens])
    found = sums.mean(max(1, num_tokens))
    shown = {n: v for n, v in found.items() if n in {"loss/cross_entropy", "kl/reverse"}}
    bad = [name for name, value in found.items() if not abs(value) < float("inf")]
    require(not bad, f"the first microbatch gives {', '.join(bad)} that are not finite")
    if is_main():
        log_line(f"  {', '.join(f'{name} {value:.3f}' for name, value in shown.items())}")


@dataclass(frozen=True)
class Untrained:
    """The student where a sync expects a policy."""

    model: Qwen3Moe

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Stream all weights; all ranks take part."""
        return named_weights(self.model)

    @torch.no_grad()
    def score(self, sequences: Sequence[list[int]]) -> Tensor:
        """Log-probabilities of the tokens of sequences; all ranks take part."""
        return sequence_logprobs(self.model, self.model.head, sequences)


def answers_of(
    cfg: TrainConfig, student: ArchitectureConfig, model: Qwen3Moe, prompts: PromptLoader
) -> list[Rollout]:
    """Hand the student to the run's sampler, and let it answer the run's first prompts.

    Raises:
        InputError: The weights did not arrive.
    """
    opd: OPDConfig = cfg.stage
    stop_ids = stop_token_ids(cfg.model.tokenizer)
    sampler = build_sampler(opd, student, cfg.model.dtype, stop_ids, cfg.seed)
    probes = canaries(student.vocab_size, longest_sequence(opd))
    try:
        sync_weights(Untrained(model), sampler, 0, probes, opd.rollout.canary_tolerance)
        return list(sampler.sample(prompts.first(NUM_ANSWERED), 1))
    except WeightSyncError as error:
        raise InputError(str(error)) from error
    finally:
        sampler.close()


def first_scores(
    cfg: TrainConfig, cascade: Cascade, step: int, model: Qwen3Moe, answers: list[Rollout]
) -> None:
    """Open the teacher of a step as the run does, and say the KL of the student's answers."""
    opd: OPDConfig = cfg.stage
    teacher = cascade.teacher_at(step, answers)
    scored = teacher.score(answers)
    packed = pack_rollouts(scored, opd.objective, cfg.data.max_tokens_per_microbatch)
    first_loss(model, packed, build_reverse_kl(opd, teacher.head))
