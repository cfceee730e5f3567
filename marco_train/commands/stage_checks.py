"""The doctor's checks of each stage: the stage's own, and then what its first update would compute.

Nothing is trained and there is no optimizer.
"""

from collections.abc import Sequence
from contextlib import closing

from marco_train.commands.examination import Examination, any_absent
from marco_train.config import TrainConfig
from marco_train.config.architecture import ArchitectureConfig
from marco_train.config.opd import OPDConfig
from marco_train.data.loader import PromptLoader, Question, SFTLoader
from marco_train.data.packing import pack_rollouts
from marco_train.distributed import is_main, world_size
from marco_train.engine.student import Student, load_student
from marco_train.errors import InputError, WeightSyncError, require
from marco_train.evaluation.answers import AnswerSampler
from marco_train.evaluation.benchmark.harness import (
    BenchmarkTask,
    held_out_task,
    prompt_of,
    rollouts_of,
)
from marco_train.evaluation.measured import Measured
from marco_train.evaluation.reverse_kl import mean_reverse_kl
from marco_train.losses.cross_entropy import cross_entropy
from marco_train.losses.distillation import build_reverse_kl
from marco_train.models import load_model
from marco_train.models.weights import torch_dtype
from marco_train.rollout.stream import RolloutStream
from marco_train.run import check_resumption
from marco_train.stages.benchmark import PreparedBenchmark, prepare_benchmark, say_plan
from marco_train.stages.evaluate import open_teachers, prepare_evaluate
from marco_train.stages.opd import open_sampler, prepare_opd, sync
from marco_train.stages.sft import prepare_sft
from marco_train.teachers.base import Teacher
from marco_train.teachers.cascade import Cascade
from marco_train.tracking import log_line
from marco_train.types import LossFn, Message, Microbatch, Prompt, Rollout


def check_sft(cfg: TrainConfig, checks: Examination) -> None:
    """Make what the first update needs, and the loss of the first microbatch."""
    prepared = prepare_sft(cfg, checks)
    data = prepared.train_data
    checks.make("samples", data.log_plan, data.num_steps)
    batch = checks.make("first batch", data.__next__)
    checks.after(batch).make("rows of the first batch", log_rows, data)
    if checks.can_resume:
        checks.after(data).make("resumption", check_resumption, cfg, [data], data.epoch_rows)
    student = checks.after(prepared.student).make("weights", untrained, cfg)
    checks.make("first loss", log_loss, student, batch, cross_entropy)


def check_opd(cfg: TrainConfig, checks: Examination) -> None:
    """Make what the first update needs: rollouts, and every teacher's scores of them."""
    prepared = prepare_opd(cfg, checks)
    loader, cascade = prepared.loader, prepared.cascade
    checks.make("samples", loader.log_plan, cascade.num_steps)
    batch = checks.make("first batch", loader.__next__)
    checks.after(batch).make("rows of the first batch", log_rows, loader)
    if checks.can_resume:
        both = checks.after(loader, cascade)
        both.make("resumption", check_resumption, cfg, [loader, cascade], loader.epoch_rows)
    student = checks.after(prepared.student).make("weights", untrained, cfg)
    prompts = loader, prepared.first_prompts
    answers = checks.after(batch).make(
        "student's answers", answers_of, cfg, prepared.student, student, *prompts
    )
    for phase in cascade.phases:
        if phase.first == phase.end:
            continue  # of a checkpoint: it converged before it taught
        checks.make(f"teacher {phase.name!r}", log_kl, cfg, cascade, phase.first, student, answers)
    cascade.close()


def check_evaluate(cfg: TrainConfig, checks: Examination) -> None:
    """Open all that is measured, and measure it on the first question of each rank."""
    prepared = prepare_evaluate(cfg, checks)
    teachers = open_teachers(cfg, prepared, checks)
    opened = [teacher for teacher in teachers.values() if not any_absent(teacher)]
    sampler = AnswerSampler(cfg, prepared.tokenizer)
    for measured in prepared.measured:
        asked = measured, opened, sampler, prepared.questions
        checks.make(f"{measured.name}'s first answers", measure, cfg, *asked)
    sampler.close()
    for teacher in opened:
        teacher.close()


def check_benchmark(cfg: TrainConfig, checks: Examination) -> None:
    """Make all up to the first question, and one answer to it on each rank."""
    prepared = prepare_benchmark(cfg, checks)
    parts = prepared.tokenizer, prepared.architecture, prepared.cfg
    checks = checks.after(*parts)
    checks.make("plan", say_plan, prepared, prepared.tasks)
    checks.make("first answer", answer_first, prepared, prepared.tasks)


def answer_first(prepared: PreparedBenchmark, tasks: Sequence[BenchmarkTask]) -> None:
    """Sample one answer of the model on each rank, with the run's own sampler."""
    cfg = prepared.cfg
    model = load_model(str(cfg.model.path), torch_dtype(cfg.model.dtype))
    item = tasks[0].items[0]
    turns = [Message("user", item["prompt"])]
    text = prepared.tokenizer.render(turns, open_answer=True).text
    prompt = prompt_of(tasks[0], item["id"], prepared.tokenizer.encoder.encode(text)[0])
    with closing(AnswerSampler(cfg, prepared.tokenizer)) as sampler:
        (answer,) = sampler.sampler_of(model).sample([prompt], num_responses=1)
    if is_main():
        log_line(f"  {len(answer.response_ids)} tokens to {len(prompt.input_ids)}")


def log_rows(data: SFTLoader | PromptLoader) -> None:
    """Say how many rows the first batch has, and how many were dropped and why."""
    metrics = data.metrics()
    drops = {name: count for name, count in metrics.items() if "dropped" in name and count > 0}
    said = [f"{count:.0f} {name}" for name, count in drops.items()] or ["none dropped"]
    if is_main():
        log_line(f"  {metrics['data/num_sequences']:.0f} rows; {', '.join(said)}")


def untrained(cfg: TrainConfig) -> Student:
    """Load the student as the run would, without an optimizer."""
    model = load_student(cfg.model, cfg.parallel, cfg.seed)
    return Student(model, model)


def log_loss(student: Student, batch: Sequence[Microbatch], loss_fn: LossFn) -> None:
    """Say the loss of the first microbatch of every rank; all ranks take part.

    Raises:
        InputError: It is not finite.
    """
    found = student.measure(batch[:1], loss_fn)
    shown = {n: v for n, v in found.items() if n in {"loss/cross_entropy", "kl/reverse"}}
    bad = [name for name, value in found.items() if not abs(value) < float("inf")]
    require(not bad, f"the first microbatch gives {', '.join(bad)} that are not finite")
    if is_main():
        log_line(f"  {', '.join(f'{name} {value:.3f}' for name, value in shown.items())}")


def answers_of(
    cfg: TrainConfig,
    architecture: ArchitectureConfig,
    student: Student,
    loader: PromptLoader,
    first_prompts: Sequence[Prompt],
) -> list[Rollout]:
    """Hand the student to the run's sampler, and let it answer the run's first prompts.

    Raises:
        InputError: The weights did not arrive.
    """
    sampler = open_sampler(cfg, architecture)
    try:
        sync(cfg, student, sampler, step=0)
        return RolloutStream(cfg.stage, sampler, loader, first_prompts).answers()
    except WeightSyncError as error:
        raise InputError(str(error)) from error
    finally:
        sampler.close()


def log_kl(
    cfg: TrainConfig, cascade: Cascade, step: int, student: Student, answers: list[Rollout]
) -> None:
    """Open the teacher of a step as the run does, and say the KL of the student's answers."""
    opd: OPDConfig = cfg.stage
    teacher = cascade.teacher_at(step, answers)
    scored = teacher.score(answers)
    packed = pack_rollouts(scored, opd.objective, cfg.data.max_tokens_per_microbatch)
    log_loss(student, packed, build_reverse_kl(opd, teacher.head))


def measure(
    cfg: TrainConfig,
    measured: Measured,
    teachers: Sequence[Teacher],
    sampler: AnswerSampler,
    questions: Sequence[Question],
) -> None:
    """Measure a model on the first question of each rank, by the teachers that could be opened.

    Raises:
        InputError: The weights did not arrive in the sampler.
    """
    model = measured.load(cfg)
    try:
        task = held_out_task(questions[: world_size()], cfg.stage.responses_per_prompt)
        asked = sampler.ask(model, task, None)
    except WeightSyncError as error:
        raise InputError(str(error)) from error
    if measured.kind == "models":
        for teacher in teachers:
            mean_reverse_kl(cfg, model, rollouts_of(asked), teacher)
