"""Is an answer right? What lm-eval calls with an item and its responses.

item, responses -> letters, numbers, formulas or texts -> Graded | Translated -> aggregate.py
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from marco_train.evaluation.benchmark.extraction import (
    formula_of,
    letter_of,
    number_of,
    translation_of,
)
from marco_train.evaluation.benchmark.judge import VerifierError, judge, same_number
from marco_train.evaluation.benchmark.tasks import Kind


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
    kind, gold = Kind(doc["kind"]), str(doc["gold"])
    right, answers, errors = [], [], []
    for response in responses:
        answer = answer_of(kind, response, doc["choices"])
        answers.append(answer)
        try:
            right.append(answer is not None and is_right(kind, gold, answer))
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
    return formula_of(response)


def is_right(kind: Kind, gold: str, answer: str) -> bool:
    """Whether an answer is the reference.

    Raises:
        VerifierError: The verifier could not tell.
    """
    if kind is Kind.choice or answer == gold:
        return answer == gold
    same = same_number(gold, answer)
    return judge().equal(gold, answer) if same is None else same
