"""Is an answer right? What lm-eval calls with an item and its responses.

item, responses -> letters, numbers, formulas or texts -> Graded | Translated -> aggregate.py
"""

import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any, cast

from marco_train.config.benchmark import PYTHON
from marco_train.data.chat import without_thinking
from marco_train.errors import InputError, require
from marco_train.evaluation.benchmark.extraction import (
    boxed,
    formula_of,
    letter_of,
    number_of,
    translation_of,
)
from marco_train.evaluation.benchmark.judge import VerifierError, judge, same_number
from marco_train.evaluation.benchmark.tasks import Kind
from marco_train.evaluation.verifiers import verify

FENCED = re.compile(r"```(?:json)?\s*\n(.*?)```", re.DOTALL)


@dataclass(frozen=True)
class Graded:
    """The answers to one item, k of them."""

    item: str
    language: str
    group: str
    right: tuple[bool, ...]
    """[k]."""
    answers: tuple[str | None, ...]
    """[k], as they were read; None: nothing was found."""
    errors: tuple[str, ...] = ()
    """What a verifier raised, by which an answer counts as wrong."""
    weight: float = 1.0
    """Of the item's group."""

    @property
    def share_right(self) -> float:
        """From 0 to 1."""
        return sum(self.right) / len(self.right)


@dataclass(frozen=True)
class Translated:
    """The translations of one sentence, k of them."""

    item: str
    language: str
    target_language: str
    reference: str
    texts: tuple[str, ...]
    """[k]; an empty one is a failure to answer."""


def grade_answers(doc: Mapping[str, Any], results: Sequence[Any]) -> dict[str, Graded]:
    """Grade an item's responses; lm-eval aggregates each metric over the items."""
    graded = grade(doc, responses_of(results))
    return dict.fromkeys(("avg_at_k", "pass_at_k", "maj_at_k", "extraction_failures"), graded)


def grade_levels(doc: Mapping[str, Any], results: Sequence[Any]) -> dict[str, Graded]:
    """Grade an item of a set whose groups have weights."""
    found = grade_answers(doc, results)
    return found | {"weighted_avg_at_k": found["avg_at_k"]}


def grade_translations(doc: Mapping[str, Any], results: Sequence[Any]) -> dict[str, Translated]:
    """Take an item's translations, which are scored as a corpus."""
    texts = tuple(map(translation_of, responses_of(results)))
    target = doc["target_language"]
    return {"bleu": Translated(doc["id"], doc["language"], target, doc["gold"], texts)}


def responses_of(results: Sequence[Any]) -> list[str]:
    """The texts of an item's responses, of which lm-eval gives one, or a list of them."""
    (found,) = results
    return [found] if isinstance(found, str) else list(found)


def grade(doc: Mapping[str, Any], responses: Sequence[str]) -> Graded:
    """Read and judge the responses to an item whose answer is right or wrong."""
    kind, gold = Kind(doc["kind"]), doc["gold"]
    right, answers, errors = [], [], []
    for response in responses:
        answer = answer_of(kind, response, doc["choices"])
        answers.append(answer)
        try:
            right.append(answer is not None and is_right(kind, gold, answer, doc.get("verifier")))
        except VerifierError as error:
            right.append(False)
            errors.append(str(error))
    return Graded(
        doc["id"],
        doc["language"],
        doc["group"],
        tuple(right),
        tuple(answers),
        tuple(errors),
        doc["weight"],
    )


def answer_of(kind: Kind, response: str, choices: Sequence[str]) -> str | None:
    """What a response answers; None: nothing that can be read."""
    match kind:
        case Kind.choice:
            return letter_of(response, choices)
        case Kind.number:
            return number_of(response)
        case Kind.formula:
            return formula_of(response)
    text = without_thinking(response).strip()
    match kind:
        case Kind.exact:
            return boxed(text) or text or None
        case Kind.json_schema:
            fenced = FENCED.findall(text)
            return (fenced[-1] if fenced else text).strip() or None
    return text or None


def is_right(kind: Kind, gold: Any, answer: str, verifier: Any = None) -> bool:
    """Whether an answer is the reference, or fits it.

    Args:
        kind: Of the item.
        gold: Its reference: a text, but for `python`, which takes any value.
        answer: As it was read.
        verifier: Of `python`, as `module.function`; of `row`, the mapping that the row carries.

    Raises:
        VerifierError: The verifier could not tell.
    """
    match kind:
        case Kind.choice:
            return bool(answer == gold)
        case Kind.exact | Kind.row:
            return verify(answer, gold, verifier or {"name": "exact"})
        case Kind.regex | Kind.json_schema:
            return judge().is_right(kind.value, gold, answer)
        case Kind.python:
            return says(function_of(verifier), answer, gold)
    if answer == gold:
        return True
    same = same_number(gold, answer)
    return judge().is_right("math", gold, answer) if same is None else same


def says(function: Callable[[str, Any], object], answer: str, gold: Any) -> bool:
    """Ask a function of the user's own.

    Raises:
        VerifierError: It raised something, or answered neither yes nor no.
    """
    try:
        found = function(answer, gold)
    except Exception as error:  # whatever it is that others' code raises
        raise VerifierError(f"{type(error).__name__}: {error}"[:200]) from error
    if not isinstance(found, bool | int) or found not in (0, 1):
        raise VerifierError(f"answers {str(found)[:60]!r}, and neither true nor false")
    return bool(found)


@cache
def function_of(name: str) -> Callable[[str, Any], object]:
    """Import a function by `module.function`; modules of the working directory are found too.

    Raises:
        InputError: There is none.
    """
    module, _, attribute = name.rpartition(".")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        found = getattr(import_module(module), attribute)
    except Exception as error:  # whatever it is that others' modules raise
        raise InputError(
            f"own.verifier is {PYTHON}{name}, and it cannot be imported: "
            f"{type(error).__name__}: {error}"
        ) from error
    require(callable(found), f"own.verifier is {PYTHON}{name}, which is no function: {found!r}")
    return cast(Callable[[str, Any], object], found)
