"""Supervised fine-tuning."""

from dataclasses import dataclass
from pathlib import Path

from marco_train.checkpoint import settle_checkpoint
from marco_train.config import TrainConfig
from marco_train.config.architecture import ArchitectureConfig
from marco_train.config.resumption import schedule_steps
from marco_train.data.chat import Tokenizer, load_tokenizer
from marco_train.data.loader import QUARANTINE, SFTLoader
from marco_train.engine.policy import build_policy
from marco_train.evaluation.held_out import evaluate
from marco_train.losses.cross_entropy import cross_entropy
from marco_train.models.hf_io import student_architecture
from marco_train.planning.check import RunPlan, check_disk, check_plan
from marco_train.run import Run, due
from marco_train.stages.checks import Checks
from marco_train.stages.header import say_header
from marco_train.stages.skipped import note_skipped
from marco_train.teachers.vocab import check_student_vocabulary
from marco_train.types import Microbatch


def run_sft(cfg: TrainConfig) -> None:
    """Fine-tune on conversations: packed sequences, loss on assistant tokens only."""
    prepared = prepare_sft(cfg, Checks())  # what is wrong is refused here
    train_data = prepared.train_data
    policy = build_policy(
        cfg.model,
        cfg.optim,
        cfg.parallel,
        schedule_steps(cfg, train_data.epoch_rows),
        cfg.seed,
        prepared.tokenizer.chat_template,
    )
    # A fresh run, or the last checkpoint's.
    plan, epoch_rows = prepared.plan, train_data.epoch_rows
    parts = train_data, policy.guard
    run = Run.open(cfg, policy, *parts, epoch_rows=epoch_rows, work=plan.work)
    train_data.log_plan(train_data.num_steps)
    say_header(cfg, prepared.student, train_data.header(train_data.num_steps), plan.gib)

    for step in run.steps(train_data):
        microbatches = next(train_data)  # this rank's share of the global batch
        metrics = policy.train_step(microbatches, cross_entropy)
        note_skipped(policy, train_data, cfg.optim.max_skipped_in_a_row)
        if due(step, cfg.stage.eval_every):
            metrics |= evaluate(policy, prepared.held_out, cross_entropy)
        run.log(step, metrics | train_data.metrics())
        run.save_if_due(step)

    train_data.log_end()
    run.finish()  # exports Hugging Face weights with the tokenizer


@dataclass(frozen=True)
class Prepared:
    """What is known of a run before the student is loaded."""

    student: ArchitectureConfig
    tokenizer: Tokenizer
    train_data: SFTLoader
    held_out: list[Microbatch]
    """This rank's share."""
    plan: RunPlan


def prepare_sft(cfg: TrainConfig, checks: Checks) -> Prepared:
    """Read and check all that a run needs before it loads the student.

    Raises:
        InputError: Something is wrong with it.
    """
    checks.make("logging", cfg.logging.check_installed)
    checks.make("student's vocabulary", check_student_vocabulary, cfg.model)
    tokenizer = checks.make("tokenizer and template", load_tokenizer, cfg.model)
    student = checks.make("student's files", student_architecture, cfg)
    plan = checks.make("plan", check_plan, cfg, student)
    checks.make("room on the disk", check_disk, cfg, student)
    checks.make("checkpoint", settle_checkpoint, cfg, checks.writes_files)
    quarantine = Path(cfg.output_dir) / QUARANTINE if checks.writes_files else None
    train_data = checks.make(
        "data", SFTLoader, cfg.data, cfg.stage, tokenizer, cfg.seed, quarantine
    )
    checks.make("profile", cfg.profile.check, train_data.num_steps)
    held_out = checks.make("held-out rows", train_data.held_out)
    return Prepared(student, tokenizer, train_data, held_out, plan)
