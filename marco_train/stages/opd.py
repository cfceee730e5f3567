"""Cascaded on-policy distillation."""

import torch

from marco_train.architecture import ArchitectureConfig, read_architecture
from marco_train.config import TrainConfig
from marco_train.data.chat import load_tokenizer
from marco_train.data.loader import PromptLoader
from marco_train.data.packing import pack_rollouts
from marco_train.engine.policy import build_policy
from marco_train.losses.distillation import build_reverse_kl
from marco_train.models.hf_io import stop_token_ids
from marco_train.rollout.base import summarize
from marco_train.rollout.hf import build_sampler
from marco_train.rollout.sync import sync_weights
from marco_train.run import Run
from marco_train.teachers.cascade import Cascade
from marco_train.teachers.vocab import check_student_vocabulary


def run_opd(cfg: TrainConfig) -> None:
    """Distil a cascade of teachers into the policy, on the policy's own samples.

    Each step samples responses from the policy, has the teacher score every sampled
    token, and lowers the reverse KL  E_{x~policy}[log policy(x) - log teacher(x)].
    """
    opd, student = cfg.stage, student_architecture(cfg)
    check_student_vocabulary(cfg.model)
    tokenizer = load_tokenizer(cfg.model.tokenizer, cfg.model.chat_template)
    prompts = PromptLoader(cfg.data, opd, tokenizer, cfg.seed)
    cascade = Cascade(  # refuses a teacher of other tokens, turns or stops
        opd, cfg.model.tokenizer, tokenizer.chat_template, student.vocab_size
    )
    policy = build_policy(
        cfg.model, cfg.optim, cfg.parallel, cascade.num_steps, cfg.seed, tokenizer.chat_template
    )
    sampler = build_sampler(
        opd.rollout,
        student,
        getattr(torch, cfg.model.dtype.value),
        stop_token_ids(cfg.model.tokenizer),
        opd.max_response_length,
        opd.num_sampler_topk,
        cfg.seed,
    )
    run = Run.open(cfg, policy, prompts, cascade)

    for step in run.steps(until=cascade.num_steps):
        teacher = cascade.teacher_at(step)  # changes only where a phase begins

        with run.timer("sync"):  # verified: checksums and canary
            sync_weights(policy, sampler, step, student.vocab_size, opd.rollout.canary_tolerance)
        with run.timer("sample"):
            rollouts = sampler.sample(next(prompts), opd.responses_per_prompt)
        with run.timer("score"):
            scored = teacher.score(rollouts)
        with run.timer("train"):
            packed = pack_rollouts(scored, opd.objective, cfg.data.max_tokens_per_microbatch)
            reverse_kl = build_reverse_kl(opd, teacher.head)
            metrics = policy.train_step(packed, reverse_kl)

        metrics |= summarize(rollouts) | prompts.metrics() | cascade.metrics(step)
        phase = cascade.phase_at(step).name
        run.log(step, metrics, phase)
        if cascade.ends_at(step):
            run.export(f"export-{phase}")
        run.save_if_due(step)

    run.finish()


def student_architecture(cfg: TrainConfig) -> ArchitectureConfig:
    """Shape of the student, from its files or from the config."""
    if cfg.model.path is not None:
        return read_architecture(cfg.model.path)
    assert cfg.model.architecture is not None
    return cfg.model.architecture
