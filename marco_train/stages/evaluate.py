"""Sampled accuracy of exported models, and their reverse KL to each teacher."""

from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from marco_train.config import TrainConfig
from marco_train.config.evaluate import EvaluateConfig
from marco_train.config.resumption import observed
from marco_train.config.rollout import SamplerBackend
from marco_train.config.teacher import TeacherBackend
from marco_train.data.chat import Tokenizer, load_tokenizer
from marco_train.data.loader import Question
from marco_train.distributed import barrier, device, is_main
from marco_train.evaluation.answers import AnswerSampler, check_samplers, checked_questions
from marco_train.evaluation.benchmark.harness import (
    held_out_task,
    require_lm_eval,
    rollouts_of,
)
from marco_train.evaluation.benchmark.store import AnswerStore, made_by
from marco_train.evaluation.measured import (
    Measured,
    check_measured,
    measured_models,
    shared_vocabulary,
)
from marco_train.evaluation.report import Report
from marco_train.evaluation.reverse_kl import mean_reverse_kl, open_teacher
from marco_train.evaluation.signatures import signatures_of
from marco_train.inference.engine import require_one_engine
from marco_train.run import begin, mark_finished
from marco_train.stages.checks import Checks
from marco_train.teachers.base import Teacher


def run_evaluate(cfg: TrainConfig) -> None:
    """Sample answers of every model at temperature 1, check them, and let the teachers score them.

    What is written stands in `Report`, beside the answers of each model in a directory of its name,
    by which an evaluation that was killed goes on with the next one.
    """
    stage: EvaluateConfig = cfg.stage
    with open_evaluate(cfg) as (prepared, teachers, sampler, report):
        task = held_out_task(prepared.questions, stage.responses_per_prompt)
        for measured in prepared.measured:
            model = measured.load(cfg)
            with closing(store_of(cfg, prepared.tokenizer, measured)) as store:
                asked = sampler.ask(model, task, store)
            report.add_answers(measured, asked)
            if measured.kind == "models":
                scored = [r for r in rollouts_of(asked) if r.sample_index < stage.num_kl_responses]
                reverse_kl = {
                    name: mean_reverse_kl(cfg, model, scored, teacher)
                    for name, teacher in teachers.items()
                }
                report.add_reverse_kl(measured, reverse_kl)
                if stage.signatures and model.architecture.is_moe:
                    report.add_signatures(measured, signatures_of(cfg, model, scored))
            report.log(measured)


def store_of(cfg: TrainConfig, tokenizer: Tokenizer, measured: Measured) -> AnswerStore:
    """Open the answers of a model; all ranks take part.

    Raises:
        InputError: They are of something else.
    """
    made = made_by(cfg, tokenizer, measured.path)
    return AnswerStore(Path(cfg.output_dir, measured.name), made, anew=cfg.resume == "never")


@contextmanager
def open_evaluate(
    cfg: TrainConfig,
) -> Iterator[tuple["Prepared", dict[str, Teacher], AnswerSampler, Report]]:
    """Open what an evaluation is made of; writes the report, unless the block was left by an error.

    Raises:
        InputError: Something is wrong with it; most is found before a model is loaded.
    """
    checks = Checks()
    prepared = prepare_evaluate(cfg, checks)
    content = observed(cfg, digests={})  # before the models are read
    if is_main():
        begin(cfg, content)
    with ExitStack() as stack:
        teachers = open_teachers(cfg, prepared, checks)
        for teacher in teachers.values():
            stack.enter_context(closing(teacher))
        sampler = stack.enter_context(closing(AnswerSampler(cfg, prepared.tokenizer)))
        report = Report(cfg.stage, len(prepared.questions))
        yield prepared, teachers, sampler, report
    report.write(Path(cfg.output_dir))
    if is_main():
        mark_finished(cfg, content)
    barrier()


@dataclass(frozen=True)
class Prepared:
    """What is known of an evaluation before a model is loaded."""

    tokenizer: Tokenizer
    measured: list[Measured]
    vocab_size: int
    """Output rows of every model."""
    questions: list[Question]
    """Of all ranks."""


def prepare_evaluate(cfg: TrainConfig, checks: Checks) -> Prepared:
    """Read and check all that an evaluation needs before it loads a model.

    Raises:
        InputError: Something is wrong with it.
    """
    stage: EvaluateConfig = cfg.stage
    engines = ["stage.rollout"] if stage.rollout.backend is SamplerBackend.vllm else []
    teachers = stage.teachers.items()
    engines += [f"stage.teachers.{n}" for n, t in teachers if t.backend is TeacherBackend.vllm]
    checks.make("engines of vLLM", require_one_engine, engines, device())
    checks.make("lm-eval", require_lm_eval)
    tokenizer = checks.make("tokenizer and template", load_tokenizer, cfg.model)
    named = checks.make("models", measured_models, cfg)
    vocab_size = checks.make("vocabulary", shared_vocabulary, named)
    measured = [
        checks.make(f"files of {each.name}", check_measured, cfg, tokenizer, vocab_size, each)
        for each in named
    ]
    fits = checks.after(*measured).make("sampler", check_samplers, cfg, measured)
    questions = checks.after(fits).make("questions", checked_questions, cfg, tokenizer)
    return Prepared(tokenizer, measured, vocab_size, questions)


def open_teachers(cfg: TrainConfig, prepared: Prepared, checks: Checks) -> dict[str, Teacher]:
    """Open the teachers, each checked by what it says of probe sentences.

    Raises:
        InputError: One cannot be trusted.
    """
    checks = checks.after(*prepared.measured)
    opened: dict[str, Teacher] = {}
    try:
        for name in cfg.stage.teachers:
            opened[name] = checks.make(name, open_teacher, cfg, prepared.vocab_size, name)
    except BaseException:
        for teacher in opened.values():
            teacher.close()
        raise
    return opened
