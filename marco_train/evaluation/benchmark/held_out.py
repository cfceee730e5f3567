"""Held-out rows of a run's own data as a benchmark's task, each judged by its row's own verifier.

questions -> items as those of the card's tasks, asked and graded in the same way -> categories
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from marco_train.data.loader import Question
from marco_train.evaluation.benchmark.aggregate import RowScore, row_score
from marco_train.evaluation.benchmark.grading import Graded
from marco_train.evaluation.benchmark.tasks import Items, Kind

ALL = "all"


def items_of(questions: Sequence[Question]) -> Items:
    """Make the items of questions; an item's group is its row's category."""
    return Items(
        {
            "id": f"{question.prompt.language}/{question.prompt.source}/{question.prompt.index}",
            "language": question.prompt.language,
            "group": question.prompt.category,
            "weight": 1.0,
            "kind": Kind.row.value,
            "question": question.text,
            "prompt": question.text,
            # Rendered as in training: turns before the last one and tools are no part of `prompt`.
            "prompt_ids": question.prompt.input_ids,
            "gold": question.reference,
            "choices": [],
            "verifier": question.verifier,
        }
        for question in questions
    )


def load(*, items: Items, **_: Any) -> dict[str, Items]:
    """Give the items under `test`; lm-eval calls it with its metadata."""
    return {"test": items}


def scores_by_category(graded: Sequence[Graded]) -> dict[str, RowScore]:
    """Score each category, and `all`; every answer weighs the same, in whatever language.

    A category of that name is called `all (category)`.
    """
    groups: dict[str, list[Graded]] = defaultdict(list)
    for item in graded:
        alike = replace(item, language="")
        for name in (f"{ALL} (category)" if item.group == ALL else item.group, ALL):
            groups[name].append(alike)
    return {name: row_score(groups[name]) for name in sorted(groups)}
