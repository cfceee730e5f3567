"""A suite of questions, asked of the model as it stands while it is trained."""

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from marco_train.config.trained import SCORE, EvalConfig
from marco_train.data.chat import Tokenizer
from marco_train.distributed import is_main
from marco_train.errors import require
from marco_train.evaluation.benchmark.aggregate import RowScore, row_score
from marco_train.evaluation.benchmark.grading import Graded
from marco_train.evaluation.benchmark.harness import (
    Asked,
    BenchmarkTask,
    SampledLM,
    ask,
    load_tasks,
    prompt_lengths,
)
from marco_train.evaluation.benchmark.store import TOO_LONG
from marco_train.evaluation.html import Section, page, plain_text
from marco_train.metrics import Metrics
from marco_train.rollout.base import Sampler
from marco_train.tracking import Sample, log_line
from marco_train.types import FinishReason


class Suite:
    """The tasks that a run asks its own model, by the code of stage=benchmark."""

    def __init__(
        self,
        cfg: EvalConfig,
        tasks: Sequence[BenchmarkTask],
        tokenizer: Tokenizer,
        max_prompt_length: int,
    ) -> None:
        """Ask these tasks.

        Args:
            cfg: How they are asked.
            tasks: None of them where the run names no suite.
            tokenizer: Of the run.
            max_prompt_length: Tokens, over which a question is not asked, and counts as wrong.
        """
        self._cfg = cfg
        self._tasks = tasks
        self._tokenizer = tokenizer
        self._max_prompt_length = max_prompt_length

    @classmethod
    def load(cls, cfg: EvalConfig, tokenizer: Tokenizer, max_prompt_length: int) -> "Suite":
        """Load the questions of the suite that a run names, if it names one.

        Raises:
            InputError: They are not there, are not what they should be, or are all too long.
        """
        tasks = [] if cfg.suite is None else load_tasks(cfg.suite, cfg)
        for task in tasks:
            if task.items.left_out and is_main():
                log_line(f"{task.card.name} of stage.eval: {task.items.left_out}")
            lengths = prompt_lengths(tokenizer, task.items)
            num_long = sum(length > max_prompt_length for length in lengths)
            said = (
                f"{task.card.name}: {num_long} of {len(lengths)} questions of stage.eval.suite "
                f"have more than the {max_prompt_length} tokens that this run has for a prompt"
            )
            require(
                num_long < len(lengths),
                f"{said}, the shortest {min(lengths)}: raise stage.max_prompt_length, or of SFT "
                "stage.max_length, or ask another suite",
            )
            if num_long and is_main():
                log_line(f"{said}; they are not asked, and count as answered wrong")
        return cls(cfg, tasks, tokenizer, max_prompt_length)

    def __bool__(self) -> bool:
        return bool(self._tasks)

    def ask(self, sampler: Sampler, step: int) -> tuple[Metrics, list[Sample]]:
        """Ask all tasks with the weights that a sampler has; all ranks take part.

        Args:
            sampler: Has the weights to be measured.
            step: That was made last, from 0.

        Returns:
            Metrics of all ranks, and on the main one answers to read.
        """
        lm = SampledLM(
            sampler, self._tokenizer, None, self._max_prompt_length, greedy=self._cfg.greedy
        )
        asked = [ask(lm, task) for task in self._tasks]
        if not asked:
            return {}, []
        scored = [row_score(each.graded) for each in asked]
        samples = shown(step + 1, asked, self._cfg.num_examples_shown) if is_main() else []
        return metrics_of(asked, scored), samples


def metrics_of(asked: Sequence[Asked], scored: Sequence[RowScore]) -> Metrics:
    """Score each task, and describe the answers to all of them."""
    answers = [a for each in asked for of_item in each.answers.values() for a in of_item]
    sampled = [answer for answer in answers if answer.finish != TOO_LONG]
    failures = sum(each.extraction_failures * each.num_samples for each in scored)
    found: Metrics = {
        f"{SCORE}/task_{each.task.name}": of.score for each, of in zip(asked, scored, strict=True)
    }
    return found | {
        SCORE: fmean(of.score for of in scored),
        "eval/no_answer": failures / len(answers),
        "eval/truncated": fmean(a.finish == FinishReason.length.value for a in answers),
        "eval/response_length": fmean(a.num_tokens for a in sampled) if sampled else 0.0,
        "eval/verifier_errors": float(sum(len(of.errors) for of in scored)),
    }


def shown(num_updates: int, asked: Sequence[Asked], count: int) -> list[Sample]:
    """Choose first answers to read: of each task one, then a second, and so on."""
    turns = [
        (turn, _sample(num_updates, each, turn))
        for each in asked
        for turn in range(min(count, len(each.task.items)))
    ]
    return [sample for _, sample in sorted(turns, key=lambda turn: turn[0])[:count]]


def _sample(num_updates: int, asked: Asked, number: int) -> Sample:
    item, graded = asked.task.items[number], asked.graded[number]
    answer = asked.answers[item["id"]][0]
    facts: dict[str, Any] = {
        "step": num_updates,
        "source": asked.task.name,
        "category": asked.task.card.name,
        "language": item["language"],
        "prompt": item["prompt"],
        "tokens": [answer.text],
        "kl": [None],
        "finish_reason": answer.finish,
        "reference": str(item["gold"]),
        "answer": graded.answers[0] if isinstance(graded, Graded) else None,
        "right": graded.right[0] if isinstance(graded, Graded) else None,
    }
    parts = [plain_text(facts["prompt"]), plain_text(answer.text)]
    return Sample(facts, page(f"step {num_updates}", [], [Section("", parts)]))
