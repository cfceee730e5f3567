"""What a benchmark writes.

benchmark.json   each row's score, spread and interval, and the means of the card's sections
details.json     what else is known of the rows: pass@k, majority, lengths, languages, signatures
benchmark.md     the rows beside the published ones, as tables
benchmark.html   the same as one page, with plots
items.jsonl      each item's grades, by which two reports are compared
lm_eval/         the results and the samples of each task, as lm-eval writes them
"""

import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import Any

from marco_train.config import TrainConfig
from marco_train.config.benchmark import (
    FIXTURE,
    OWN,
    BenchmarkConfig,
    card_rows,
    reported,
)
from marco_train.data.chat import Tokenizer, without_thinking
from marco_train.distributed import is_main
from marco_train.evaluation.benchmark.aggregate import RowScore, row_score, section_means
from marco_train.evaluation.benchmark.harness import Asked, BenchmarkTask
from marco_train.evaluation.benchmark.page import page
from marco_train.evaluation.benchmark.store import TOO_LONG
from marco_train.evaluation.benchmark.tasks import TaskSet
from marco_train.evaluation.languages import LanguageJudge
from marco_train.files import replaces
from marco_train.tracking import format_seconds, log_line
from marco_train.types import FinishReason

DIGITS = 4
MOST_ERRORS = 3  # of a verifier, that are shown
SECTION_TITLES = {
    "english": "English",
    "multilingual": "Multilingual, general",
    "cultural": "Multilingual, cultural and regional",
    OWN: "Own rows",
}


class BenchmarkReport:
    """Collects rows and writes them; every rank may call it, and the main one does the work."""

    def __init__(self, cfg: TrainConfig, tokenizer: Tokenizer) -> None:
        stage: BenchmarkConfig = cfg.stage
        self._stage = stage
        self._seed = cfg.seed
        self._directory = Path(cfg.output_dir)
        self._found: dict[str, Any] = {"model": cfg.model.path, "suite": stage.suite, "rows": {}}
        self._details: dict[str, Any] = {}
        self._judge: LanguageJudge | None = None
        if is_main():
            (self._directory / "lm_eval").mkdir(parents=True, exist_ok=True)
            (self._directory / "items.jsonl").write_text("")
            if stage.identify_languages and find_spec("lingua") is not None:
                self._judge = LanguageJudge(tokenizer, [])

    def add(self, asked: Asked) -> None:
        """Score a task, write its items and samples down, and say how it went."""
        if not is_main():
            return
        task, scored = asked.task, row_score(asked.graded, self._seed)
        answers = [answer for of_item in asked.answers.values() for answer in of_item]
        truncated = sum(answer.finish == FinishReason.length.value for answer in answers)
        row = {
            "metric": task.card.metric,
            "score": round(scored.score, DIGITS),
            "std": round(scored.std, DIGITS),
            "ci95": [round(bound, DIGITS) for bound in scored.ci95],
            "n_items": scored.num_items,
            "n_samples": scored.num_samples,
            "extraction_failures": round(scored.extraction_failures, DIGITS),
            "truncated": round(truncated / len(answers), DIGITS),
            "languages": {code: round(score, DIGITS) for code, score in scored.languages.items()},
        }
        self._found["rows"][task.card.name] = row
        self._details[task.card.name] = self._details_of(asked, scored)
        self._write_items(asked, scored)
        self._log(asked, scored, truncated)

    def _details_of(self, asked: Asked, scored: RowScore) -> dict[str, Any]:
        task, answers = asked.task, [a for of_item in asked.answers.values() for a in of_item]
        sampled = [answer.num_tokens for answer in answers if answer.finish != TOO_LONG]
        return {
            "task": task.name,
            **self._set_of(task),
            "responses_per_item": task.num_responses,
            "runs": [round(score, DIGITS) for score in scored.runs],
            **{
                name: round(value, DIGITS) if isinstance(value, float) else value
                for name, value in scored.also.items()
            },
            "mean_tokens": round(fmean(sampled), 1) if sampled else None,
            "in_language": self._share_in_language(asked),
            "questions_too_long": sum(a.finish == TOO_LONG for a in answers) // task.num_responses,
            "rows_left_out": task.items.num_faulty,
            "left_out": task.items.left_out,
            "verifier_errors": len(scored.errors),
            "first_verifier_errors": scored.errors[:MOST_ERRORS],
            "seconds": round(asked.seconds, 1),
        }

    def _set_of(self, task: BenchmarkTask) -> dict[str, Any]:
        """Where the items are from, and how they are asked."""
        if task.name == OWN:
            own = self._stage.own
            return {"set": own.path, "verifier": own.verifier, "prompt": own.prompt}
        task_set = TaskSet.of(task.of_lm_eval.config.metadata["set"])
        return {
            "set": task_set.path,
            "revision": task_set.revision,
            "licence": task_set.licence,
            "prompt": task_set.prompt,
        }

    def _share_in_language(self, asked: Asked) -> float | None:
        """Share of items whose first answer is in their language, of those that can be told."""
        if self._judge is None:
            return None
        told = []
        for item in asked.task.items:
            text = without_thinking(asked.answers[item["id"]][0].text)
            told.append(self._judge.matches(text, item.get("target_language", item["language"])))
        judged = [match for match in told if match is not None]
        return round(fmean(judged), DIGITS) if judged else None

    def _write_items(self, asked: Asked, scored: RowScore) -> None:
        task = asked.task
        with (self._directory / "items.jsonl").open("a", encoding="utf-8") as file:
            for item in scored.items:
                file.write(json.dumps({"row": task.card.name, **item}) + "\n")
        below = self._directory / "lm_eval"
        results = json.dumps(asked.results, indent=2, ensure_ascii=False, default=str)
        (below / f"results_{task.name}.json").write_text(results, encoding="utf-8")
        with (below / f"samples_{task.name}.jsonl").open("w", encoding="utf-8") as file:
            for sample in asked.samples:
                file.write(json.dumps(sample, ensure_ascii=False, default=str) + "\n")

    def _log(self, asked: Asked, scored: RowScore, truncated: int) -> None:
        task, (low, high) = asked.task, scored.ci95
        parts = [
            f"{task.card.name}: {task.card.metric} {scored.score:.1f} ({low:.1f}-{high:.1f})",
            f"{scored.num_items} items x {task.num_responses}",
            f"no answer {100 * scored.extraction_failures:.1f} %",
            f"cut {100 * truncated / scored.num_samples:.1f} %",
            format_seconds(asked.seconds),
        ]
        if scored.errors:
            parts.insert(4, f"{len(scored.errors)} verifier errors, as {scored.errors[0]}")
        log_line(" | ".join(parts))

    def write(self) -> None:
        """Write the files of the whole suite."""
        if not is_main():
            return
        found = self._found["rows"]
        named = [name for names in reported(found).values() for name in names]
        self._found["rows"] = {name: found[name] for name in named if name in found}
        scores = {name: row["score"] for name, row in self._found["rows"].items()}
        means = section_means(scores, reported(found))
        self._found["means"] = {
            section: None if mean is None else round(mean, DIGITS)
            for section, mean in means.items()
        }
        published = self._stage.suite not in (FIXTURE, OWN)  # whose items are not the card's
        _write(self._directory / "benchmark.json", _json(self._found))
        _write(self._directory / "details.json", _json(self._details))
        tables = as_markdown(self._found, self._details, with_published=published)
        _write(self._directory / "benchmark.md", tables)
        html = page(self._found, self._details, with_published=published)
        _write(self._directory / "benchmark.html", html)


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _write(path: Path, text: str) -> None:
    with replaces(path) as partial:
        partial.write_text(text, encoding="utf-8")


def as_markdown(found: dict[str, Any], details: dict[str, Any], *, with_published: bool) -> str:
    """Tables of all rows beside the published ones, and of what else is known of ours.

    Args:
        found: What benchmark.json holds.
        details: What details.json holds.
        with_published: Whether the items are those that the published figures are of.
    """
    lines = [f"# {found['model']}, suite {found['suite']}", ""]
    if found["suite"] == FIXTURE:
        lines += ["The items are made up: scores say that all runs, and nothing of the model.", ""]
    card = {row.name: row for row in card_rows().values()}
    models = list(next(iter(card.values())).published) if with_published else []
    for section, names in reported(found["rows"]).items():
        shown = [name for name in names if name in found["rows"]]
        if not shown:
            continue
        head = ["row", "metric", "ours", "95 %", "std", *models]
        lines += [f"## {SECTION_TITLES[section]}", "", *_table_head(head)]
        for name in shown:
            row = found["rows"][name]
            low, high = row["ci95"]
            cells = [name, row["metric"], f"**{row['score']:.1f}**", f"{low:.1f} to {high:.1f}"]
            published = [f"{card[name].published[model]:.1f}" for model in models]
            lines.append(_line([*cells, f"{row['std']:.2f}", *published]))
        known = [f"{fmean(card[name].published[model] for name in shown):.1f}" for model in models]
        mean = f"**{found['means'][section]:.1f}**"
        counted = "" if len(shown) == len(names) else f" of {len(shown)} of {len(names)} rows"
        lines += [_line([f"mean{counted}", "", mean, "", "", *known]), ""]
    lines += ["## What else is known of the answers", "", *_table_head(list(DETAIL_COLUMNS))]
    for name, row in found["rows"].items():
        lines.append(_line([cell(name, row, details[name]) for cell in DETAIL_COLUMNS.values()]))
    lines += ["", "## By language", "", *_table_head(["row", "language: score"])]
    for name, row in found["rows"].items():
        scores = ", ".join(f"{code} {score:.1f}" for code, score in row["languages"].items())
        lines.append(_line([name, scores]))
    signatures = {s for each in details.values() for s in each.get("signatures", [])}
    left_out = [
        f"- {name}: {more['left_out']}" for name, more in details.items() if more["left_out"]
    ]
    if left_out:
        lines += ["", "Rows that were not asked:", "", *left_out]
    errors = {name: more["first_verifier_errors"] for name, more in details.items()}
    if any(errors.values()):
        lines += ["", "Verifiers failed on some answers, which count as wrong:", ""]
        lines += [f"- {name}: {each}" for name, of_row in errors.items() for each in of_row]
    if signatures:
        lines += ["", "BLEU is that of sacrebleu:", "", *(f"- `{s}`" for s in sorted(signatures))]
    return "\n".join(lines) + "\n"


def _share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


DETAIL_COLUMNS: dict[str, Any] = {
    "row": lambda name, row, more: name,
    "items": lambda name, row, more: f"{row['n_items']:,}",
    "responses": lambda name, row, more: f"{more['responses_per_item']}",
    "pass@k": lambda name, row, more: _number(more.get("pass_at_k")),
    "maj@k": lambda name, row, more: _number(more.get("maj_at_k")),
    "weighted": lambda name, row, more: _number(more.get("weighted_avg_at_k")),
    "spBLEU": lambda name, row, more: _number(more.get("spbleu")),
    "no answer": lambda name, row, more: _share(row["extraction_failures"]),
    "cut": lambda name, row, more: _share(row["truncated"]),
    "tokens": lambda name, row, more: _number(more["mean_tokens"]),
    "in language": lambda name, row, more: _share(more["in_language"]),
    "too long": lambda name, row, more: f"{more['questions_too_long']}",
    "verifier errors": lambda name, row, more: f"{more['verifier_errors']}",
}
"""Titles of the columns, and what stands in them, of a row's name, its result and its details."""


def _table_head(cells: Sequence[str]) -> list[str]:
    return [_line(cells), _line(["---"] * len(cells))]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
