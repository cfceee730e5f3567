"""Cascaded on-policy distillation."""

from collections.abc import Iterator
from contextlib import closing, contextmanager

from marco_train.config import TrainConfig
from marco_train.config.lengths import longest_sequence
from marco_train.config.opd import OPDConfig
from marco_train.config.resumption import schedule_steps
from marco_train.data.chat import load_tokenizer
from marco_train.data.loader import PromptLoader
from marco_train.data.packing import pack_rollouts
from marco_train.engine.policy import Policy, build_policy
from marco_train.errors import RolloutMismatchError
from marco_train.losses.distillation import build_reverse_kl
from marco_train.metrics import Metrics, check_names
from marco_train.models.hf_io import stop_token_ids, student_architecture
from marco_train.rollout.base import Sampler, summarize
from marco_train.rollout.build import build_sampler, check_sampler
from marco_train.rollout.stream import RolloutStream
from marco_train.rollout.sync import canaries, sync_weights
from marco_train.run import Run
from marco_train.teachers.cascade import Cascade
from marco_train.teachers.preflight import NUM_ANSWERED, FirstOfEachKind
from marco_train.teachers.vocab import check_student_vocabulary


def run_opd(cfg: TrainConfig) -> None:
    """Distil a cascade of teachers into the policy, on the policy's own samples.

    Each step samples responses from the policy, has the teacher score every sampled
    token, and lowers the reverse KL  E_{x~policy}[log policy(x) - log teacher(x)].
    """
    opd = cfg.stage
    with open_opd(cfg) as (policy, prompts, sampler, cascade, run):
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
                batch = pack_rollouts(scored, opd.objective, cfg.data.max_tokens_per_microbatch)
                metrics |= policy.train_step(batch, build_reverse_kl(opd, teacher.head))

            metrics |= summarize(submitted.rollouts) | prompts.metrics() | cascade.metrics(step)
            run.log(step, metrics, cascade.phase_at(step).name)
            refuse_mismatch(step, metrics["kl/sampler_mismatch"], opd.max_sampler_mismatch)
            if cascade.ends_at(step):
                run.export(f"export-{cascade.phase_at(step).name}")
            run.save_if_due(step)

    run.finish()  # saves and exports


@contextmanager
def open_opd(
    cfg: TrainConfig,
) -> Iterator[tuple[Policy, RolloutStream, Sampler, Cascade, Run]]:
    """Build what a run is made of, and close sampler and teachers, however it ends.

    Raises:
        InputError: Something is wrong with it; most is found before a model is built.
    """
    opd, student = cfg.stage, student_architecture(cfg)
    check_student_vocabulary(cfg.model)
    check_sampler(opd.rollout, student)
    tokenizer = load_tokenizer(cfg.model)
    loader = PromptLoader(cfg.data, opd, tokenizer, cfg.seed)
    cascade = Cascade(  # refuses a teacher of other tokens, turns or stops
        opd,
        cfg.model.tokenizer,
        tokenizer.chat_template,
        student.vocab_size,
        tokenizer.template_kwargs,
    )
    groups = loader.groups()
    check_names(f"kl/reverse/{group}" for group in groups)
    cascade.check_groups(groups)
    cascade.check_turns(loader.first_prompts(FirstOfEachKind()))
    held_out = loader.held_out(cascade.num_held_out)
    first_prompts = loader.first(NUM_ANSWERED)
    policy = build_policy(
        cfg.model, cfg.optim, cfg.parallel, schedule_steps(cfg), cfg.seed, tokenizer.chat_template
    )
    run = Run.open(cfg, policy, loader, cascade)
    loader.log_plan(cascade.num_steps)
    cascade.save_early = run.save_early
    stop_ids = stop_token_ids(cfg.model.tokenizer)
    sampler = build_sampler(opd, student, cfg.model.dtype, stop_ids, cfg.seed, run.save_early)
    with closing(sampler), closing(cascade):
        prompts = RolloutStream(opd, sampler, loader, first_prompts, held_out)
        yield policy, prompts, sampler, cascade, run
        loader.log_epochs()


def sync(cfg: TrainConfig, policy: Policy, sampler: Sampler, step: int) -> Metrics:
    """Hand the policy's weights to the sampler, proved by numbers; see `sync_weights`."""
    opd: OPDConfig = cfg.stage
    probes = canaries(policy.model.architecture.vocab_size, longest_sequence(opd))
    return sync_weights(policy, sampler, step, probes, opd.rollout.canary_tolerance)


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
        held_out = prompts.held_out()
        sampler.sleep()
        teacher = cascade.teacher_at(step, answers)
        scored = teacher.score(held_out)
        batch = pack_rollouts(scored, cfg.stage.objective, cfg.data.max_tokens_per_microbatch)
        found = policy.measure(batch, build_reverse_kl(cfg.stage, teacher.head))
        converged = cascade.observe(step, found["kl/reverse"])
        if converged is not None:
            run.export(f"export-{converged}")


def refuse_mismatch(step: int, mismatch: float, bound: float | None) -> None:
    """Stop where the sampler's log-probabilities are not the policy's.

    Raises:
        RolloutMismatchError: Gives both numbers.
    """
    if bound is not None and mismatch > bound:
        raise RolloutMismatchError(
            f"step {step}: log-probabilities of sampler and policy differ by {mismatch:.3g} nats "
            f"a token in the mean, more than stage.max_sampler_mismatch {bound}: the responses are "
            "of another distribution than the one that is trained; with max_staleness=1 an update "
            "lies between, and the bound may want raising. The last checkpoint is intact"
        )
