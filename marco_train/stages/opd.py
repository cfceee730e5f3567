"""Cascaded on-policy distillation."""

from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial

from marco_train.config import TrainConfig
from marco_train.config.lengths import longest_sequence
from marco_train.config.resumption import schedule_steps
from marco_train.data.chat import load_tokenizer
from marco_train.data.loader import PromptLoader
from marco_train.data.packing import pack_rollouts
from marco_train.engine.policy import Policy, build_policy
from marco_train.losses.distillation import build_reverse_kl
from marco_train.metrics import check_names
from marco_train.models.hf_io import stop_token_ids, student_architecture
from marco_train.rollout.base import Sampler, summarize
from marco_train.rollout.build import build_sampler, check_sampler
from marco_train.rollout.stream import Ahead
from marco_train.rollout.sync import canaries, sync_weights
from marco_train.run import Run
from marco_train.teachers.cascade import Cascade
from marco_train.teachers.preflight import NUM_ANSWERED, FirstOfEachKind
from marco_train.teachers.vocab import check_student_vocabulary
from marco_train.types import Prompt, Rollout


class RolloutMismatchError(RuntimeError):
    """The sampler does not sample from the policy."""


def run_opd(cfg: TrainConfig) -> None:
    """Distil a cascade of teachers into the policy, on the policy's own samples.

    Each step samples responses from the policy, has the teacher score every sampled
    token, and lowers the reverse KL  E_{x~policy}[log policy(x) - log teacher(x)].
    """
    opd, student = cfg.stage, student_architecture(cfg)
    check_student_vocabulary(cfg.model)
    check_sampler(opd.rollout, student)
    tokenizer = load_tokenizer(cfg.model)
    prompts = PromptLoader(cfg.data, opd, tokenizer, cfg.seed)
    cascade = Cascade(  # refuses a teacher of other tokens, turns or stops
        opd,
        cfg.model.tokenizer,
        tokenizer.chat_template,
        student.vocab_size,
        tokenizer.template_kwargs,
    )
    groups = prompts.groups()
    check_names(f"kl/reverse/{group}" for group in groups)
    cascade.check_groups(groups)
    cascade.check_turns(prompts.first_prompts(FirstOfEachKind()))
    held_out = prompts.held_out(cascade.num_held_out)
    first_prompts = prompts.first(NUM_ANSWERED)
    policy = build_policy(
        cfg.model, cfg.optim, cfg.parallel, schedule_steps(cfg), cfg.seed, tokenizer.chat_template
    )
    stop_ids = stop_token_ids(cfg.model.tokenizer)
    sampler = build_sampler(opd, student, cfg.model.dtype, stop_ids, cfg.seed)
    ahead = Ahead(opd, sampler, prompts)
    probes = canaries(student.vocab_size, longest_sequence(opd))
    run = Run.open(cfg, policy, prompts, cascade)

    for step in run.steps(until=cascade.num_steps):
        with run.timer("sample"):  # what was asked for ahead, by choice
            run.outlast(step, ahead.settle)
        with run.timer("sync"):  # verified by numbers
            tolerance = opd.rollout.canary_tolerance
            hand_over = partial(sync_weights, policy, sampler, step, probes, tolerance)
            synced = run.outlast(step, hand_over)
        # what a teacher is checked with when it is opened
        answer = cache(lambda: run.timed("sample", sampler.sample(first_prompts, 1)))
        if cascade.measure_due(step):
            end_converged_phases(cfg, run, step, policy, sampler, cascade, held_out, answer)
            if step == cascade.num_steps:
                break
        teacher = run.outlast(step, partial(cascade.teacher_at, step, answer))  # of the phase

        rollouts = run.timed("sample", ahead.rollouts(step, cascade.num_steps))
        with run.timer("score"):  # servers begin with the first response that has ended
            scored = run.outlast(step, partial(teacher.score, rollouts))
        with run.timer("train"):
            sampler.sleep()  # its memory is the trainer's until the next sync
            packed = pack_rollouts(scored, opd.objective, cfg.data.max_tokens_per_microbatch)
            metrics = policy.train_step(packed, build_reverse_kl(opd, teacher.head))

        metrics |= synced | summarize(rollouts) | ahead.metrics() | cascade.metrics(step)
        phase = cascade.phase_at(step).name
        run.log(step, metrics, phase)
        refuse_mismatch(step, metrics["kl/sampler_mismatch"], opd.max_mismatch)
        if cascade.ends_at(step):
            run.export(f"export-{phase}")
        run.save_if_due(step)

    cascade.close()
    sampler.close()
    run.finish()


def end_converged_phases(
    cfg: TrainConfig,
    run: Run,
    step: int,
    policy: Policy,
    sampler: Sampler,
    cascade: Cascade,
    held_out: Sequence[Prompt],
    answer: Callable[[], Iterable[Rollout]],
) -> None:
    """Measure the reverse KL on held-out prompts, and end the phase where it falls no more."""
    with run.timer("evaluate"):
        while cascade.measure_due(step):  # of the next phase too, where one ends
            teacher = run.outlast(step, partial(cascade.teacher_at, step, answer))
            rollouts = run.timed("sample", sampler.sample(held_out, 1))
            scored = run.outlast(step, partial(teacher.score, rollouts))
            packed = pack_rollouts(scored, cfg.stage.objective, cfg.data.max_tokens_per_microbatch)
            found = policy.measure(packed, build_reverse_kl(cfg.stage, teacher.head))
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
            f"a token in the mean, more than stage.max_mismatch {bound}: the responses are of "
            "another distribution than the one that is trained; with max_staleness=1 an update "
            "lies between, and the bound may want raising. The last checkpoint is intact"
        )
