"""Cascaded on-policy distillation."""

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from marco_train.checkpoint import settle_checkpoint
from marco_train.config import TrainConfig
from marco_train.config.architecture import ArchitectureConfig
from marco_train.config.opd import OPDConfig
from marco_train.config.resumption import schedule_steps
from marco_train.config.rollout import SamplerBackend
from marco_train.config.teacher import TeacherBackend
from marco_train.data.chat import Tokenizer, load_tokenizer
from marco_train.data.loader import QUARANTINE, PromptLoader
from marco_train.data.packing import pack_rollouts
from marco_train.distributed import device
from marco_train.engine.policy import Policy, build_policy
from marco_train.engine.student import Student
from marco_train.errors import RolloutMismatchError, require
from marco_train.evaluation.languages import LanguageJudge
from marco_train.evaluation.samples import SampleRecorder
from marco_train.evaluation.suite import Suite
from marco_train.inference.engine import require_one_engine
from marco_train.inference.pool import SaveEarly, nothing_to_save
from marco_train.losses.distillation import build_reverse_kl
from marco_train.metrics import Metrics, check_names
from marco_train.models.hf_io import stop_token_ids, student_architecture
from marco_train.planning.check import RunPlan, check_disk, check_plan, planned_teacher_bytes
from marco_train.rollout.balance import balance_ranks
from marco_train.rollout.base import InLanguage, Sampler
from marco_train.rollout.build import build_sampler, check_sampler
from marco_train.rollout.loops import without_loops
from marco_train.rollout.stream import RolloutStream
from marco_train.rollout.sync import canary_of, sync_weights
from marco_train.run import Run, due, phase_export
from marco_train.stages.checks import Checks
from marco_train.stages.header import say_header
from marco_train.stages.skipped import note_skipped
from marco_train.teachers.base import Teacher
from marco_train.teachers.cascade import Cascade, check_teacher, teachers_of
from marco_train.teachers.preflight import NUM_ANSWERED, FirstOfEachKind
from marco_train.teachers.vocab import check_head_rows, check_student_vocabulary
from marco_train.tracking import Sample
from marco_train.types import Prompt, Rollout


def run_opd(cfg: TrainConfig) -> None:
    """Distil a cascade of teachers into the policy, on the policy's own samples.

    Each step samples responses from the policy, has the teacher score every sampled
    token, and lowers the reverse KL  E_{x~policy}[log policy(x) - log teacher(x)].
    """
    opd = cfg.stage
    with open_opd(cfg) as (policy, prompts, sampler, cascade, samples, run, data, suite):
        for step in run.steps(cascade):
            if cascade.measure_due(step):
                with run.timer("evaluate"):  # syncs, sleeps and scores on its own
                    end_converged_phases(cfg, run, step, policy, prompts, sampler, cascade)
                if step == cascade.num_steps:
                    break
            with run.timer("sync"):
                sampler.drain()  # max_staleness=1: finish the requests sent during the last step
                metrics = sync(cfg, policy, sampler, step)  # weights, verified by numbers
            with run.timer("sample"):
                # A new teacher is checked with answers of the student to the run's first prompts.
                answers = prompts.answers() if cascade.opens_at(step) else []
                # Server teachers score each response as soon as it is complete.
                submitted = cascade.submit(step, prompts.rollouts(step, cascade.num_steps))
            with run.timer("score"):
                sampler.sleep()  # its memory is free before a teacher in this process needs some
                teacher = cascade.teacher_at(step, answers)  # changes only where a phase begins
                scored = teacher.collect(submitted)
            with run.timer("train"):
                scored, dropped = without_loops(scored, step, are_dropped=opd.drop_repetitive)
                scored = balance_ranks(scored)
                batch = pack_rollouts(scored, opd.objective, cfg.data.max_tokens_per_microbatch)
                loss_fn = samples.watching(step, scored, build_reverse_kl(opd, teacher.head))
                metrics |= policy.train_step(batch, loss_fn)
                note_skipped(policy, data, cfg.optim.max_skipped_in_a_row)

            metrics |= dropped | prompts.metrics(submitted.rollouts) | cascade.metrics(step)
            shown = samples.collected(step)
            if due(step, opd.eval_every):
                with run.timer("evaluate"):
                    found, asked = evaluate(cfg, step, policy, prompts, sampler, teacher, suite)
                metrics, shown = metrics | found, shown + asked
            run.log_samples(step, shown)
            run.log(step, metrics, cascade.phase_at(step).name)
            refuse_mismatch(step, metrics, opd.max_sampler_mismatch)
            if cascade.ends_at(step):
                policy.guard.forget()
                if step + 1 < cascade.num_steps:
                    run.export(phase_export(cascade.phase_at(step).name))
                run.keep(step + 1)
            run.save_if_due(step)  # also where it is the best so far

    run.finish(cascade.phases[-1].name)  # saves and exports


@contextmanager
def open_opd(
    cfg: TrainConfig,
) -> Iterator[
    tuple[Policy, RolloutStream, Sampler, Cascade, SampleRecorder, Run, PromptLoader, Suite]
]:
    """Build what a run is made of, and close sampler and teachers, however it ends.

    Raises:
        InputError: Something is wrong with it; most is found before a model is built.
    """
    prepared = prepare_opd(cfg, Checks())
    policy = build_policy(
        cfg.model,
        cfg.optim,
        cfg.parallel,
        schedule_steps(cfg, prepared.loader.epoch_rows),
        cfg.seed,
        prepared.tokenizer.chat_template,
    )
    cascade = prepared.cascade
    parts = prepared.loader, cascade, policy.guard
    epoch_rows = prepared.loader.epoch_rows
    run = Run.open(cfg, policy, *parts, epoch_rows=epoch_rows, work=prepared.plan.work)
    prepared.loader.log_plan(cascade.num_steps)
    header = prepared.loader.header(cascade.num_steps)
    say_header(cfg, prepared.student, header, policy.schedule_steps, prepared.plan.gib)
    cascade.save_early = run.save_early
    sampler = open_sampler(cfg, prepared.student, run.save_early)
    samples = SampleRecorder(cfg.logging, prepared.tokenizer)
    prompts = prepared.loader, prepared.first_prompts, prepared.held_out, prepared.in_language
    with closing(sampler), closing(cascade):
        stream = RolloutStream(cfg.stage, sampler, *prompts)
        yield policy, stream, sampler, cascade, samples, run, prepared.loader, prepared.suite
    prepared.loader.log_end()


@dataclass(frozen=True)
class Prepared:
    """What is known of a run before the student is loaded."""

    student: ArchitectureConfig
    tokenizer: Tokenizer
    loader: PromptLoader
    cascade: Cascade
    first_prompts: list[Prompt]
    """This rank's share of those that new teachers are checked with."""
    held_out: list[Prompt]
    """This rank's share of those that the reverse KL is measured on."""
    suite: Suite
    """Questions that are asked meanwhile, if the run names any."""
    in_language: InLanguage | None
    """Judges responses, where the run asks for it."""
    plan: RunPlan


def prepare_opd(cfg: TrainConfig, checks: Checks) -> Prepared:
    """Read and check all that a run needs before it loads the student.

    Raises:
        InputError: Something is wrong with it.
    """
    opd: OPDConfig = cfg.stage
    checks.make("logging", cfg.logging.check_installed)
    student = checks.make("student's files", student_architecture, cfg)
    plan = checks.make("plan", check_plan, cfg, student)
    checks.make("room on the disk", check_disk, cfg, student)
    checks.make("checkpoint", settle_checkpoint, cfg, checks.writes_files)
    checks.make("student's vocabulary", check_student_vocabulary, cfg.model)
    sampler_fits = checks.make("sampler", check_sampler, opd, student, cfg.model.dtype)
    checks.make("engines of vLLM", require_one_engine, engine_owners(opd), device())
    tokenizer = checks.make("tokenizer and template", load_tokenizer, cfg.model)
    quarantine = Path(cfg.output_dir) / QUARANTINE if checks.writes_files else None
    loader = checks.make("data", PromptLoader, cfg.data, opd, tokenizer, cfg.seed, quarantine)

    turns = cfg.model.tokenizer, tokenizer.chat_template
    kwargs = tokenizer.template_kwargs
    fit: list[object] = []
    for owner, teacher in teachers_of(opd):
        files = checks.make(f"files of {owner}", check_teacher, opd, owner, teacher, *turns, kwargs)
        head = student.vocab_size, teacher.path, owner
        fit += [files, checks.after(files).make(f"head of {owner}", check_head_rows, *head)]
    sizes = student.vocab_size, loader.epoch_rows
    cascade = checks.after(*fit).make("cascade", Cascade, opd, *turns, *sizes, kwargs)
    checks.make("profile", cfg.profile.check, cascade.num_steps)
    checks.make("groups", check_groups, cascade, loader)
    checks.make("teachers' turns", check_turns, cascade, loader)

    first = checks.after(sampler_fits).make("first prompts", loader.first, NUM_ANSWERED)
    held_out = checks.make("held-out prompts", held_out_prompts, cfg, loader, cascade)
    asked = checks.after(sampler_fits)
    suite = asked.make("suite", Suite.load, opd.eval, tokenizer, opd.max_prompt_length)
    judge = checks.make("languages of responses", language_judge, opd, tokenizer, loader)
    return Prepared(student, tokenizer, loader, cascade, first, held_out, suite, judge, plan)


def held_out_prompts(cfg: TrainConfig, loader: PromptLoader, cascade: Cascade) -> list[Prompt]:
    """Render this rank's share of the prompts that convergence or `eval_every` measures on.

    Raises:
        InputError: There are none to measure on.
    """
    return loader.held_out(max(cascade.num_held_out, num_eval_prompts(cfg)))


def num_eval_prompts(cfg: TrainConfig) -> int:
    """Held-out prompts that a measure of `eval_every` asks; none where there are only questions.

    Raises:
        InputError: There is nothing to measure.
    """
    opd: OPDConfig = cfg.stage
    if opd.eval_every is None:
        return 0
    require(
        cfg.data.held_out is not None or opd.eval.suite is not None,
        f"stage.eval_every is {opd.eval_every}, and there is nothing to measure: set "
        "data.held_out.share or data.held_out.sources for the reverse KL, or stage.eval.suite",
    )
    return opd.num_eval_examples if cfg.data.held_out is not None else 0


def language_judge(
    opd: OPDConfig, tokenizer: Tokenizer, loader: PromptLoader
) -> LanguageJudge | None:
    """Open what tells the languages of responses; None where the run does not ask for it.

    Raises:
        InputError: It is not installed.
    """
    return LanguageJudge(tokenizer, loader.languages()) if opd.identify_languages else None


def engine_owners(opd: OPDConfig) -> list[str]:
    """Who wants an engine of vLLM in the trainer's process, by what messages call them."""
    sampler = ["stage.rollout"] if opd.rollout.backend is SamplerBackend.vllm else []
    teachers = teachers_of(opd)
    return sampler + [owner for owner, cfg in teachers if cfg.backend is TeacherBackend.vllm]


def check_groups(cascade: Cascade, loader: PromptLoader) -> None:
    """Check the names of groups of prompts as metrics' names and as teachers' groups.

    Raises:
        InputError: One is no name of a metric, or a teacher's group has no prompts.
    """
    groups = loader.groups()
    check_names(f"kl/reverse/{group}" for group in groups)
    if loader.knows_all_groups:
        cascade.check_groups(groups)


def check_turns(cascade: Cascade, loader: PromptLoader) -> None:
    """Compare how the teachers render the run's prompts with how the run does.

    Raises:
        InputError: Shows the first difference.
    """
    cascade.check_turns(loader.first_prompts(FirstOfEachKind()))


def open_sampler(
    cfg: TrainConfig, student: ArchitectureConfig, save_early: SaveEarly = nothing_to_save
) -> Sampler:
    """Open the run's sampler, without weights yet; `save_early` saves while servers are away."""
    return build_sampler(
        cfg.stage,
        student,
        cfg.model.dtype,
        stop_token_ids(cfg.model.tokenizer),
        cfg.seed,
        save_early,
        planned_teacher_bytes(cfg, student),
    )


def sync(cfg: TrainConfig, policy: Student, sampler: Sampler, step: int) -> Metrics:
    """Hand the policy's weights to the sampler, proved by numbers; see `sync_weights`."""
    canary = canary_of(cfg.stage, policy.model.architecture, cfg.model.dtype)
    return sync_weights(policy, sampler, step, canary)


def end_converged_phases(
    cfg: TrainConfig,
    run: Run,
    step: int,
    policy: Policy,
    prompts: RolloutStream,
    sampler: Sampler,
    cascade: Cascade,
) -> None:
    """Measure the reverse KL on held-out prompts, and end the phase where it falls no more.

    The sampler is left asleep.
    """
    while cascade.measure_due(step):  # of the next phase too, where one ends
        sampler.drain()
        sync(cfg, policy, sampler, step)
        answers = prompts.answers() if cascade.opens_at(step) else []
        held_out = prompts.held_out(cascade.num_held_out)
        sampler.sleep()
        teacher = cascade.teacher_at(step, answers)
        converged = cascade.observe(step, reverse_kl(cfg, policy, teacher, held_out))
        if converged is not None:
            policy.guard.forget()
            if step < cascade.num_steps:
                run.export(phase_export(converged))
            run.keep(step)


def reverse_kl(
    cfg: TrainConfig, policy: Policy, teacher: Teacher, rollouts: Sequence[Rollout]
) -> float:
    """Reverse KL of the policy to a teacher on its responses, nats a token, over all ranks."""
    scored = teacher.score(rollouts)
    batch = pack_rollouts(scored, cfg.stage.objective, cfg.data.max_tokens_per_microbatch)
    return policy.measure(batch, build_reverse_kl(cfg.stage, teacher.head))["kl/reverse"]


def evaluate(
    cfg: TrainConfig,
    step: int,
    policy: Policy,
    prompts: RolloutStream,
    sampler: Sampler,
    teacher: Teacher,
    suite: Suite,
) -> tuple[Metrics, list[Sample]]:
    """Measure the policy after a step, on held-out prompts and on a suite; see `eval_every`.

    The sampler is left asleep.
    """
    sampler.drain()
    sync(cfg, policy, sampler, step + 1)
    held_out = prompts.held_out(num_eval_prompts(cfg))
    metrics, answers = suite.ask(sampler, step)
    sampler.sleep()
    if cfg.data.held_out is not None:
        metrics["eval/reverse_kl"] = reverse_kl(cfg, policy, teacher, held_out)
    return metrics, answers


def refuse_mismatch(step: int, metrics: Metrics, bound: float | None) -> None:
    """Stop where the sampler's log-probabilities are not the policy's.

    Raises:
        RolloutMismatchError: Gives both numbers.
    """
    mismatch = metrics.get("kl/sampler_mismatch", 0.0)  # left out where it is not finite
    if bound is not None and mismatch > bound:
        raise RolloutMismatchError(
            f"step {step}: log-probabilities of sampler and policy differ by {mismatch:.3g} nats "
            f"a token in the mean, more than stage.max_sampler_mismatch {bound}: the responses are "
            "of another distribution than the one that is trained; with max_staleness=1 an update "
            "lies between, and the bound may want raising. The last checkpoint is intact"
        )
