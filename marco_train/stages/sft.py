"""Supervised fine-tuning."""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from marco_train.checkpoint import settle_checkpoint
from marco_train.config import TrainConfig
from marco_train.config.architecture import ArchitectureConfig
from marco_train.config.resumption import schedule_steps
from marco_train.config.rollout import SamplerBackend
from marco_train.config.sft import SFTConfig
from marco_train.data.chat import Tokenizer, load_tokenizer
from marco_train.data.loader import QUARANTINE, SFTLoader
from marco_train.distributed import device
from marco_train.engine.policy import Policy, build_policy
from marco_train.evaluation.held_out import evaluate
from marco_train.evaluation.suite import Suite
from marco_train.inference.engine import require_one_engine
from marco_train.losses.cross_entropy import cross_entropy
from marco_train.metrics import Metrics
from marco_train.models.hf_io import stop_token_ids, student_architecture
from marco_train.planning.check import RunPlan, check_disk, check_plan
from marco_train.rollout.base import Sampler
from marco_train.rollout.build import build_sampler, check_sampler
from marco_train.rollout.sync import canary_of, sync_weights
from marco_train.run import Run, due
from marco_train.stages.checks import Checks
from marco_train.stages.header import say_header
from marco_train.stages.skipped import note_skipped
from marco_train.teachers.vocab import check_student_vocabulary
from marco_train.tracking import Sample
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
    header = train_data.header(train_data.num_steps)
    say_header(cfg, prepared.student, header, policy.schedule_steps, plan.gib)

    with open_sampler(cfg, prepared) as sampler:
        for step in run.steps(train_data):
            microbatches = next(train_data)  # this rank's share of the global batch
            metrics = policy.train_step(microbatches, cross_entropy)
            note_skipped(policy, train_data, cfg.optim.max_skipped_in_a_row)
            if due(step, cfg.stage.eval_every):
                with run.timer("evaluate"):
                    metrics |= evaluate(policy, prepared.held_out, cross_entropy)
                    if sampler is not None:
                        scores, answers = ask_suite(cfg, prepared, policy, sampler, step)
                        metrics |= scores
                        run.log_samples(step, answers)
            run.log(step, metrics | train_data.metrics())
            run.save_if_due(step)  # also where it is the best so far

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
    suite: Suite
    """Questions that are asked meanwhile, if the run names any."""
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
    fits = checks.make("sampler", check_answers, cfg, student)
    lengths = cfg.stage.answers.max_prompt_length
    suite = checks.after(fits).make("suite", Suite.load, cfg.stage.eval, tokenizer, lengths)
    return Prepared(student, tokenizer, train_data, held_out, suite, plan)


def check_answers(cfg: TrainConfig, student: ArchitectureConfig) -> None:
    """Refuse a sampler that cannot answer the run's suite, if it names one.

    Raises:
        InputError: Says what to install or to change.
    """
    stage: SFTConfig = cfg.stage
    if stage.eval.suite is not None:
        engines = ["stage.rollout"] if stage.rollout.backend is SamplerBackend.vllm else []
        require_one_engine(engines, device())
        check_sampler(stage.answers, student, cfg.model.dtype)


@contextmanager
def open_sampler(cfg: TrainConfig, prepared: Prepared) -> Iterator[Sampler | None]:
    """Build what answers the suite, and close it, however the run ends. None: there is no suite."""
    if not prepared.suite:
        yield None
        return
    stop_ids = stop_token_ids(cfg.model.tokenizer)
    spec = cfg.stage.answers, prepared.student, cfg.model.dtype
    with closing(build_sampler(*spec, stop_ids, cfg.seed)) as sampler:
        yield sampler


def ask_suite(
    cfg: TrainConfig, prepared: Prepared, policy: Policy, sampler: Sampler, step: int
) -> tuple[Metrics, list[Sample]]:
    """Hand the policy's weights to the sampler, proved by numbers, and have it answer the suite."""
    canary = canary_of(cfg.stage.answers, prepared.student, cfg.model.dtype)
    sync_weights(policy, sampler, step + 1, canary)
    found = prepared.suite.ask(sampler, step)
    sampler.sleep()
    return found
