"""What an evaluation writes."""

import json
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from marco_train.config.evaluate import EvaluateConfig
from marco_train.distributed import is_main
from marco_train.evaluation.answers import Answer, accuracy_of
from marco_train.evaluation.measured import Measured
from marco_train.tracking import format_seconds, log_line


class Report:
    """Collects what is measured of each model, and says it; all ranks take part in every call.

    evaluation.json: per cent of accepted answers by category (`avg_at_n`), reverse KL to each
    teacher in nats a token, and some answers to read. signatures.json, where any are measured:
    which experts each language used.
    """

    def __init__(self, stage: EvaluateConfig, num_questions: int) -> None:
        self._stage = stage
        self._found: dict[str, Any] = {
            "num_questions": num_questions,
            "num_dropped": stage.num_prompts - num_questions,  # over the limit, or control tokens
            "models": {},
            "teachers": {},
            "answers": {},
        }
        self._signatures: dict[str, Any] = {}
        self._logged = time.perf_counter()

    def add_answers(self, measured: Measured, answers: Sequence[Answer]) -> None:
        """Take what a model answered."""
        self._found[measured.kind][measured.name] = {"avg_at_n": accuracy_of(answers)}
        shown = shown_answers(answers, self._stage.num_examples_shown) if is_main() else []
        self._found["answers"][measured.name] = shown

    def add_reverse_kl(self, measured: Measured, reverse_kl: dict[str, float]) -> None:
        """Take a model's KL to each teacher, nats a token."""
        self._found[measured.kind][measured.name]["reverse_kl"] = reverse_kl

    def add_signatures(self, measured: Measured, signatures: dict[str, Any]) -> None:
        """Take which experts of a model each language used, as `signature_report` gives it."""
        self._signatures[measured.name] = signatures

    def log(self, measured: Measured) -> None:
        """Say how a model did, and how long it took since the last one was said."""
        start, self._logged = self._logged, time.perf_counter()
        if is_main():
            accuracy = self._found[measured.kind][measured.name]["avg_at_n"]["all"]
            count = self._stage.responses_per_prompt
            spent = format_seconds(self._logged - start)
            log_line(f"{measured.name}: avg@{count} {accuracy:.1f} %, {spent}")

    def write(self, directory: Path) -> None:
        """Write evaluation.json, and signatures.json where there are any; the main rank does."""
        if not is_main():
            return
        text = json.dumps(self._found, indent=2, ensure_ascii=False)
        (directory / "evaluation.json").write_text(text, encoding="utf-8")
        if self._signatures:
            (directory / "signatures.json").write_text(json.dumps(self._signatures))


def shown_answers(answers: Sequence[Answer], count: int) -> list[dict[str, Any]]:
    """Answers to read: one question of each category, then a second one, until there are enough."""
    turn_of_category: Counter[str] = Counter()
    turns: list[tuple[int, Answer]] = []
    for answer in answers:
        if answer.rollout.sample_index == 0:
            category = answer.question.prompt.category
            turns.append((turn_of_category[category], answer))
            turn_of_category[category] += 1
    return [
        {
            "category": answer.question.prompt.category,
            "language": answer.question.prompt.language,
            "prompt": answer.question.text,
            "reference": answer.question.reference,
            "answer": answer.text,
            "accepted": answer.accepted,
        }
        for _, answer in sorted(turns, key=lambda turn: turn[0])[:count]
    ]
