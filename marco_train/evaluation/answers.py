"""Held-out questions, and what a model answers to them."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from marco_train.config import TrainConfig
from marco_train.config.evaluate import EvaluateConfig
from marco_train.config.rollout import NativeRolloutConfig
from marco_train.data.chat import Tokenizer
from marco_train.data.loader import Question, held_out_questions
from marco_train.distributed import is_main
from marco_train.errors import InputError, require
from marco_train.evaluation.accuracy import accuracy_by_category
from marco_train.evaluation.verifiers import check_verifier, verify
from marco_train.models import Qwen3Moe
from marco_train.models.hf_io import stop_token_ids
from marco_train.rollout.base import in_order
from marco_train.rollout.native import NativeSampler
from marco_train.tracking import log_line
from marco_train.types import Rollout


@dataclass(frozen=True)
class Answer:
    """One response to a question."""

    question: Question
    rollout: Rollout
    text: str
    """Without the stop token."""

    @property
    def accepted(self) -> bool:
        """Whether the question's verifier takes it."""
        return verify(self.text, self.question.reference, self.question.verifier)


def checked_questions(cfg: TrainConfig, tokenizer: Tokenizer) -> list[Question]:
    """Read the held-out questions whose answers can be checked; others are left out and named.

    Raises:
        InputError: There are none.
    """
    stage: EvaluateConfig = cfg.stage
    if cfg.data.held_out is None:
        raise InputError("an evaluation asks held-out prompts: set data.held_out")
    questions = held_out_questions(
        cfg.data.held_out,
        stage.num_prompts,
        stage.max_prompt_length,
        tokenizer,
        cfg.data.thinking,
    )
    usable, reasons = [], Counter[str]()
    for question in questions:
        try:
            check_verifier(question.verifier)
            usable.append(question)
        except InputError as error:
            reasons[f"{question.prompt.source}: {error}"] += 1
    said = [f"{count} of source {reason}" for reason, count in reasons.items()]
    require(bool(usable), f"no held-out question can be checked ({'; '.join(said)})")
    if said and is_main():
        log_line(f"left out questions that cannot be checked: {'; '.join(said)}")
    return usable


def sample_answers(
    cfg: TrainConfig, model: Qwen3Moe, questions: Sequence[Question], tokenizer: Tokenizer
) -> list[Answer]:
    """Sample every response to this rank's questions, by question and sample."""
    stage: EvaluateConfig = cfg.stage
    assert isinstance(stage.rollout, NativeRolloutConfig)  # any other was refused
    sampler = NativeSampler(
        stage.rollout,
        model,
        stop_token_ids(cfg.model.tokenizer),
        stage.max_response_length,
        num_topk=0,
        seed=cfg.seed,
        weight_version=0,
    )
    rollouts = sampler.sample([q.prompt for q in questions], stage.responses_per_prompt)
    by_index = {q.prompt.index: q for q in questions}
    return [
        Answer(
            by_index[rollout.prompt.index],
            rollout,
            tokenizer.decode(rollout.response_ids, skip_special_tokens=True),
        )
        for rollout in in_order(rollouts)
    ]


def accuracy_of(answers: Sequence[Answer]) -> dict[str, float]:
    """Per cent of accepted answers by category; all ranks take part."""
    return accuracy_by_category([(a.question.prompt.category, a.accepted) for a in answers])
