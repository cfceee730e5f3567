"""Held-out questions, and the sampler of one model after another."""

from collections import Counter
from collections.abc import Sequence

from marco_train.config import TrainConfig
from marco_train.config.architecture import ArchitectureConfig, read_architecture
from marco_train.config.evaluate import EvaluateConfig
from marco_train.config.rollout import NativeRolloutConfig
from marco_train.data.chat import Tokenizer
from marco_train.data.loader import Question, held_out_questions, held_out_stream
from marco_train.distributed import is_main
from marco_train.errors import InputError, require
from marco_train.evaluation.benchmark.harness import Asked, BenchmarkTask, SampledLM, ask
from marco_train.evaluation.benchmark.store import AnswerStore
from marco_train.evaluation.measured import Measured
from marco_train.evaluation.verifiers import check_verifier
from marco_train.models import Qwen3Moe
from marco_train.models.hf_io import stop_token_ids
from marco_train.rollout.base import Sampler
from marco_train.rollout.build import build_sampler, check_sampler
from marco_train.rollout.native import NativeSampler
from marco_train.rollout.sync import canary_of, sync_weights
from marco_train.tracking import log_line


def checked_questions(cfg: TrainConfig, tokenizer: Tokenizer) -> list[Question]:
    """Read the held-out questions whose answers can be checked; others are left out and named.

    Raises:
        InputError: There are none.
    """
    stage: EvaluateConfig = cfg.stage
    if cfg.data.held_out is None:
        raise InputError("an evaluation asks held-out prompts: set data.held_out.sources")
    questions = held_out_questions(
        held_out_stream(cfg.data),
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


def check_samplers(cfg: TrainConfig, measured: Sequence[Measured]) -> None:
    """Refuse a sampler that cannot sample every model, before any is loaded.

    Raises:
        InputError: Says what to install or to change.
    """
    for each in measured:
        check_sampler(cfg.stage, read_architecture(each.path), cfg.model.dtype)


class AnswerSampler:
    """Samples answers of one model after another; all ranks take part in every call.

    Our own sampler takes a model as it is. An engine of vLLM is built for the first model and kept
    for those of its shape that follow, which is cheaper than an engine a model; one of another
    shape closes it, so that there is never more than one.
    """

    def __init__(self, cfg: TrainConfig, tokenizer: Tokenizer) -> None:
        self._cfg = cfg
        self._tokenizer = tokenizer
        self._engine: Sampler | None = None
        self._shape: ArchitectureConfig | None = None

    def ask(self, model: Qwen3Moe, task: BenchmarkTask, store: AnswerStore | None) -> Asked:
        """Ask a model a task, but for the answers that a store has.

        The engine is left asleep: teachers in this process have its memory.

        Raises:
            WeightSyncError: The model's weights did not arrive in it.
        """
        sampler, limit = self.sampler_of(model), self._cfg.stage.max_prompt_length
        lm = SampledLM(sampler, self._tokenizer, store, limit, greedy=False, keeps_ids=True)
        asked = ask(lm, task)
        sampler.sleep()
        return asked

    def close(self) -> None:
        """Free the engine's memory."""
        if self._engine is not None:
            self._engine.close()
        self._engine = None

    def sampler_of(self, model: Qwen3Moe) -> Sampler:
        """The run's sampler, with the weights of a model.

        Raises:
            WeightSyncError: The model's weights did not arrive in it.
        """
        cfg, stage = self._cfg, self._cfg.stage
        stop_ids = stop_token_ids(cfg.model.tokenizer)
        if isinstance(stage.rollout, NativeRolloutConfig):
            return NativeSampler(
                stage.rollout,
                model,
                stop_ids,
                stage.max_response_length,
                stage.num_sampler_topk,
                cfg.seed,
                weight_version=0,
            )
        from marco_train.engine.student import Student  # imports DeepSpeed, for a second

        shape = model.architecture
        if self._engine is None or shape != self._shape:
            self.close()
            self._engine = build_sampler(stage, shape, cfg.model.dtype, stop_ids, cfg.seed)
            self._shape = shape
        self._engine.first_canary = None  # which was another model's
        canary = canary_of(stage, shape, cfg.model.dtype)
        sync_weights(Student(model, model), self._engine, 0, canary)
        return self._engine
