"""The model card's benchmarks, asked of one model."""

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from marco_train.config import TrainConfig
from marco_train.config.architecture import ArchitectureConfig, read_architecture
from marco_train.config.benchmark import BenchmarkConfig
from marco_train.config.resumption import observed
from marco_train.config.rollout import SamplerBackend
from marco_train.data.chat import Tokenizer, load_tokenizer
from marco_train.distributed import barrier, device, is_main
from marco_train.errors import InputError
from marco_train.evaluation.answers import AnswerSampler
from marco_train.evaluation.benchmark.harness import (
    BenchmarkTask,
    SampledLM,
    ask,
    load_tasks,
    mean_prompt_tokens,
)
from marco_train.evaluation.benchmark.report import BenchmarkReport
from marco_train.evaluation.benchmark.store import AnswerStore, made_by
from marco_train.inference.engine import require_one_engine
from marco_train.models import load_model
from marco_train.models.hf_io import stored_weights
from marco_train.models.weights import torch_dtype
from marco_train.planning.asking import AskedTask, plan_asking
from marco_train.rollout.build import check_sampler
from marco_train.run import begin, mark_finished
from marco_train.stages.checks import Checks
from marco_train.tracking import log_line


def run_benchmark(cfg: TrainConfig) -> None:
    """Ask a model all items of a suite, and report each row as the model card does.

    What is written stands in `evaluation/benchmark/report.py`.
    """
    prepared = prepare_benchmark(cfg, Checks())
    say_plan(prepared, prepared.tasks)
    if prepared.cfg.stage.plan:
        return
    with open_benchmark(cfg, prepared) as (lm, report):
        for task in prepared.tasks:
            report.add(ask(lm, task))


@dataclass(frozen=True)
class PreparedBenchmark:
    """What is known of a benchmark before the model is loaded."""

    cfg: TrainConfig
    """With a model on this machine, and lengths that it has positions for."""
    tokenizer: Tokenizer
    architecture: ArchitectureConfig
    tasks: list[BenchmarkTask]


def prepare_benchmark(cfg: TrainConfig, checks: Checks) -> PreparedBenchmark:
    """Read and check all that a benchmark needs before it loads a model.

    Raises:
        InputError: Something is wrong with it.
    """
    stage: BenchmarkConfig = cfg.stage
    tokenizer = checks.make("tokenizer and template", load_tokenizer, cfg.model)
    path = checks.make("model's path", path_of, cfg)
    architecture = checks.make("model", read_architecture, path)
    checks.make("files of the model", stored_weights, path, architecture)
    engines = ["stage.rollout"] if stage.rollout.backend is SamplerBackend.vllm else []
    checks.make("engines of vLLM", require_one_engine, engines, device())
    fitted = checks.make("lengths", fit_lengths, cfg, architecture)
    checks.make("sampler", check_sampler, fitted.stage, architecture, cfg.model.dtype)
    tasks = checks.make("tasks", load_tasks, stage.suite, stage)
    return PreparedBenchmark(fitted, tokenizer, architecture, tasks)


def path_of(cfg: TrainConfig) -> str:
    """Give the directory of the model.

    Raises:
        InputError: There is none.
    """
    if cfg.model.path is None:
        raise InputError("model.path is null, and random weights answer nothing: name a model")
    return cfg.model.path


def fit_lengths(cfg: TrainConfig, architecture: ArchitectureConfig) -> TrainConfig:
    """Shorten the lengths of a benchmark to a model's positions, and say so.

    Of too few, 25 of 32 are the question's at most, as 200 of 256, and the rest the response's.
    """
    stage: BenchmarkConfig = cfg.stage
    positions = architecture.max_position_embeddings
    if positions is None or stage.max_prompt_length + stage.max_response_length <= positions:
        return cfg
    prompt = min(stage.max_prompt_length, positions * 25 // 32)
    response = min(stage.max_response_length, positions - prompt)
    if is_main():
        log_line(
            f"the model has {positions} positions: questions of up to {prompt} tokens are asked, "
            f"and responses end at {response}, where {stage.max_response_length} were asked for"
        )
    fitted = replace(stage, max_prompt_length=prompt, max_response_length=response)
    return replace(cfg, stage=fitted)


def say_plan(prepared: PreparedBenchmark, tasks: Sequence[BenchmarkTask]) -> None:
    """Say what is asked, and how long it is planned to take."""
    if is_main():
        for task in tasks:
            if task.items.left_out:
                log_line(f"{task.card.name}: {task.items.left_out}")
        asked = [
            AskedTask(
                task.card.name,
                len(task.items),
                task.num_responses,
                mean_prompt_tokens(prepared.tokenizer, task),
            )
            for task in tasks
        ]
        for line in plan_asking(prepared.cfg, prepared.architecture, asked):
            log_line(line)


@contextmanager
def open_benchmark(
    asked: TrainConfig, prepared: PreparedBenchmark
) -> Iterator[tuple[SampledLM, BenchmarkReport]]:
    """Load the model and its sampler; writes the report, unless the block was left by an error.

    Args:
        asked: The run as it was asked for.
        prepared: What was made of it.

    Raises:
        InputError: The output directory holds answers that something else made.
    """
    cfg, tokenizer = prepared.cfg, prepared.tokenizer
    content = observed(asked, digests={})  # before the model is read
    if is_main():
        begin(asked, content)
    made = made_by(cfg, tokenizer, path_of(cfg)) | ({"greedy": True} if cfg.stage.greedy else {})
    store = AnswerStore(Path(cfg.output_dir), made, anew=cfg.resume == "never")
    model = load_model(str(cfg.model.path), torch_dtype(cfg.model.dtype))
    report = BenchmarkReport(asked, tokenizer)
    with closing(AnswerSampler(cfg, tokenizer)) as sampler, closing(store):
        lm = SampledLM(
            sampler.sampler_of(model),
            tokenizer,
            store,
            cfg.stage.max_prompt_length,
            greedy=cfg.stage.greedy,
        )
        yield lm, report
    report.write()
    if is_main():
        mark_finished(asked, content)
    barrier()
