"""What an evaluation writes."""

import json
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from marco_train.config.evaluate import EvaluateConfig
from marco_train.distributed import is_main
from marco_train.evaluation.benchmark.grading import Graded
from marco_train.evaluation.benchmark.harness import Asked
from marco_train.evaluation.benchmark.held_out import ALL, scores_by_category
from marco_train.evaluation.measured import Measured
from marco_train.tracking import format_seconds, log_line


class Report:
    """Collects what is measured of each model, and says it; all ranks take part in every call.

    evaluation.json: per cent of accepted answers by category (`avg_at_n`), its standard deviation
    over the n runs (`std`) and 95 % interval over resampled questions (`ci95`), reverse KL to each
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

    def add_answers(self, measured: Measured, asked: Asked) -> None:
        """Take what a model answered."""
        graded = [each for each in asked.graded if isinstance(each, Graded)]
        scores = scores_by_category(graded)
        self._found[measured.kind][measured.name] = {
            "avg_at_n": {name: scored.score for name, scored in scores.items()},
            "std": {name: scored.std for name, scored in scores.items()},
            "ci95": {name: scored.ci95 for name, scored in scores.items()},
        }
        shown = shown_answers(asked, graded, self._stage.num_examples_shown)
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
            found = self._found[measured.kind][measured.name]
            low, high = found["ci95"][ALL]
            said = f"avg@{self._stage.responses_per_prompt} {found['avg_at_n'][ALL]:.1f} %"
            spent = format_seconds(self._logged - start)
            log_line(f"{measured.name}: {said} ({low:.1f}-{high:.1f}), {spent}")

    def write(self, directory: Path) -> None:
        """Write evaluation.json, and signatures.json where there are any; the main rank does."""
        if not is_main():
            return
        text = json.dumps(self._found, indent=2, ensure_ascii=False)
        (directory / "evaluation.json").write_text(text, encoding="utf-8")
        if self._signatures:
            (directory / "signatures.json").write_text(json.dumps(self._signatures))


def shown_answers(asked: Asked, graded: Sequence[Graded], count: int) -> list[dict[str, Any]]:
    """Answers to read: one question of each category, then a second one, until there are enough."""
    turn_of_category: Counter[str] = Counter()
    turns: list[tuple[int, int]] = []
    for number, item in enumerate(asked.task.items):
        turns.append((turn_of_category[item["group"]], number))
        turn_of_category[item["group"]] += 1
    found = []
    for _, number in sorted(turns)[:count]:
        item = asked.task.items[number]
        found.append(
            {
                "category": item["group"],
                "language": item["language"],
                "prompt": item["question"],
                "reference": item["gold"],
                "answer": asked.answers[item["id"]][0].text,
                "accepted": graded[number].right[0],
            }
        )
    return found
