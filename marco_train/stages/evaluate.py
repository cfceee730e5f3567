"""Sampled accuracy of exported models, and their reverse KL to each teacher."""

import time
from typing import Any

from marco_train.config import TrainConfig
from marco_train.config.evaluate import EvaluateConfig
from marco_train.config.resumption import observed
from marco_train.data.chat import load_tokenizer
from marco_train.distributed import barrier, is_main, rank, world_size
from marco_train.evaluation.answers import (
    accuracy_of,
    checked_questions,
    sample_answers,
    shown_answers,
)
from marco_train.evaluation.measured import check_models, measured_models
from marco_train.evaluation.report import write_reports
from marco_train.evaluation.reverse_kl import mean_reverse_kl, open_teachers
from marco_train.evaluation.signatures import signatures_of
from marco_train.models import load_model
from marco_train.models.weights import torch_dtype
from marco_train.run import begin, mark_finished
from marco_train.tracking import format_seconds, log_line


def run_evaluate(cfg: TrainConfig) -> None:
    """Sample answers of every model at temperature 1, check them, and let the teachers score them.

    Writes evaluation.json: per cent of accepted answers by category (`avg_at_n`), reverse KL to
    each teacher in nats a token, and some answers to read; and signatures.json, if asked for:
    which experts each language used.
    """
    stage: EvaluateConfig = cfg.stage
    tokenizer = load_tokenizer(cfg.model)
    measured = measured_models(cfg)
    vocab_size = check_models(cfg, tokenizer)
    questions = checked_questions(cfg, tokenizer)
    mine = questions[rank() :: world_size()]
    content = observed(cfg, digests={})
    if is_main():
        begin(cfg)
    teachers = open_teachers(cfg, vocab_size)
    report: dict[str, Any] = {
        "num_questions": len(questions),
        "num_dropped": stage.num_prompts - len(questions),  # over the limit, or control tokens
        "models": {},
        "teachers": {},
        "answers": {},
    }
    signatures: dict[str, Any] = {}

    for kind, name, path in measured:
        start = time.perf_counter()
        model = load_model(path, torch_dtype(cfg.model.dtype))
        answers = sample_answers(cfg, model, mine, tokenizer)
        found = report[kind][name] = {"avg_at_n": accuracy_of(answers)}
        if kind == "models":
            scored = [r for _, r, _ in answers if r.sample_index < stage.num_kl_responses]
            found["reverse_kl"] = {
                each: mean_reverse_kl(cfg, model, scored, teacher)
                for each, teacher in teachers.items()
            }
            if stage.signatures and model.architecture.is_moe:
                signatures[name] = signatures_of(cfg, model, scored)
        if is_main():
            report["answers"][name] = shown_answers(answers, stage.num_examples_shown)
            spent = format_seconds(time.perf_counter() - start)
            accuracy = found["avg_at_n"]["all"]
            log_line(f"{name}: avg@{stage.responses_per_prompt} {accuracy:.1f} %, {spent}")

    for teacher in teachers.values():
        teacher.close()
    if is_main():
        write_reports(cfg, report, signatures)
        mark_finished(cfg, content)
    barrier()
