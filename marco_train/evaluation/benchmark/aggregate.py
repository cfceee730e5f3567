"""From graded items to the score of a row: means of the languages' means.

What lm-eval calls gives shares from 0 to 1, and BLEU from 0 to 100; a `RowScore` is in per cent, as
the card is.

Legend: L languages, N items of a language, k responses to an item, R resamples.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from marco_train.evaluation.benchmark.bleu import (
    has_flores200,
    score_of,
    signature,
    statistics,
    tokenizer_of,
)
from marco_train.evaluation.benchmark.grading import Graded, Translated

T = TypeVar("T", Graded, Translated)
Floats = NDArray[np.float64]

RESAMPLES = {"accuracy": 1000, "bleu": 200}
"""Of the items, for an interval."""


def by_language(items: Iterable[T]) -> dict[str, list[T]]:
    """Group items by their language, in the order of codes."""
    found: dict[str, list[T]] = defaultdict(list)
    for item in items:
        found[item.language].append(item)
    return dict(sorted(found.items()))


def mean_of_languages(items: Iterable[T], measure: Callable[[list[T]], float]) -> float:
    """Measure the items of each language; every language weighs the same."""
    return fmean(measure(found) for found in by_language(items).values())


def avg_at_k(items: Sequence[Graded]) -> float:
    """Mean share of right responses, from 0 to 1: 3 of 8 are 0.375."""
    return mean_of_languages(items, lambda found: fmean(item.share_right for item in found))


def pass_at_k(items: Sequence[Graded]) -> float:
    """Share of items with a right response among their k."""
    return mean_of_languages(items, lambda found: fmean(any(item.right) for item in found))


def maj_at_k(items: Sequence[Graded]) -> float:
    """Share of items whose most frequent answer is right; of equally many, the first."""
    return mean_of_languages(items, lambda found: fmean(majority_right(item) for item in found))


def majority_right(item: Graded) -> bool:
    """Whether the most frequent answer to an item is right; what could not be read has no vote."""
    votes = Counter(answer for answer in item.answers if answer is not None)
    if not votes:
        return False
    (winner, _), *_ = votes.most_common(1)
    return item.right[item.answers.index(winner)]


def extraction_failures(items: Sequence[Graded]) -> float:
    """Share of responses in which no answer was found."""
    answers = [answer for item in items for answer in item.answers]
    return answers.count(None) / len(answers)


def weighted_avg_at_k(items: Sequence[Graded]) -> float:
    """Mean of the groups' avg@k by their weights, as PolyMath's authors weigh its levels."""

    def measure(found: list[Graded]) -> float:
        groups: dict[Hashable, list[Graded]] = defaultdict(list)
        for item in found:
            groups[item.group].append(item)
        weights = {group: members[0].weight for group, members in groups.items()}
        total = sum(
            weights[group] * fmean(item.share_right for item in members)
            for group, members in groups.items()
        )
        return total / sum(weights.values())

    return mean_of_languages(items, measure)


def mean_bleu(items: Sequence[Translated]) -> float:
    """BLEU of a corpus of each of the k responses, from 0 to 100, as the mean of all k."""
    return Corpora(items).score


class Corpora:
    """The statistics of translations: k corpora of each language."""

    def __init__(self, items: Sequence[Translated], tokenizer: str | None = None) -> None:
        """Count n-grams with a tokenizer; None: the language's own."""
        self.languages = by_language(items)
        self._tokenizer = tokenizer
        self.statistics = {
            code: self._statistics(found) for code, found in self.languages.items()
        }  # [N, k, S]

    def _name(self, found: Sequence[Translated]) -> str:
        return self._tokenizer or tokenizer_of(found[0].target_language)

    def _statistics(self, found: Sequence[Translated]) -> NDArray[np.int64]:
        references = [item.reference for item in found]
        runs = [
            statistics(self._name(found), references, [item.texts[run] for item in found])
            for run in range(len(found[0].texts))
        ]
        return np.stack(runs, axis=1)

    @cached_property
    def runs(self) -> dict[str, list[float]]:
        """BLEU of each of the k corpora, by language."""
        return {
            code: [score_of(sums) for sums in counts.sum(axis=0)]
            for code, counts in self.statistics.items()
        }

    @property
    def score(self) -> float:
        """Mean of the languages' means."""
        return fmean(fmean(runs) for runs in self.runs.values())

    def resampled(self, resamples: int, seed: int) -> Floats:
        """Scores of corpora drawn from the items with replacement, [R]."""
        found: Floats = np.mean(
            [
                resampled_bleu(counts, resamples, seed, number)
                for number, counts in enumerate(self.statistics.values())
            ],
            axis=0,
        )
        return found

    @property
    def signatures(self) -> list[str]:
        """Sacrebleu's, of the tokenizers in use."""
        names = {self._name(found) for found in self.languages.values()}
        return sorted(signature(name) for name in names)


def weights_of(num_items: int, resamples: int, seed: int, number: int) -> Floats:
    """How often each resample drew each item of a language, [R, N]."""
    generator = np.random.default_rng([seed, number])
    evenly = np.full(num_items, 1 / num_items)
    drawn: Floats = generator.multinomial(num_items, evenly, resamples).astype(np.float64)
    return drawn


def resampled_bleu(
    counts: NDArray[np.int64], resamples: int, seed: int, number: int
) -> list[float]:
    """BLEU of corpora drawn from a language's sentences, [R], from their statistics [N, k, S]."""
    num_items, k, width = counts.shape
    drawn = weights_of(num_items, resamples, seed, number)
    sums = (drawn @ counts.reshape(num_items, -1)).reshape(resamples, k, width)
    return [fmean(score_of(run) for run in runs) for runs in sums]


@dataclass(frozen=True)
class RowScore:
    """What is reported of a row, in per cent or BLEU; shares are from 0 to 1."""

    score: float
    std: float
    """Of the k runs' scores; 0 where k is 1."""
    ci95: tuple[float, float]
    """Over resamples of the items, of each language as many as it has."""
    num_items: int
    num_samples: int
    extraction_failures: float
    languages: dict[str, float]
    runs: list[float]
    """Score of each of the k runs."""
    also: dict[str, Any]
    """Other measures of the row, by name."""
    errors: list[str]
    """What verifiers raised."""
    items: list[dict[str, Any]]
    """Of each item `id`, `language`, and what a comparison resamples: `right` [k], or of a
    translation `statistics` [k, S]."""


def row_score(items: Sequence[Graded] | Sequence[Translated], seed: int = 0) -> RowScore:
    """Score the items of a row."""
    if isinstance(items[0], Translated):
        return _translation_score([i for i in items if isinstance(i, Translated)], seed)
    return _accuracy_score([i for i in items if isinstance(i, Graded)], seed)


def _accuracy_score(items: Sequence[Graded], seed: int) -> RowScore:
    languages = {
        code: np.array([item.right for item in found], dtype=np.float64)
        for code, found in by_language(items).items()
    }  # [N, k]
    runs = 100 * np.mean([right.mean(axis=0) for right in languages.values()], axis=0)
    drawn = 100 * resampled_means([right.mean(axis=1) for right in languages.values()], seed)
    also: dict[str, Any] = {
        "pass_at_k": 100 * pass_at_k(items),
        "maj_at_k": 100 * maj_at_k(items),
    }
    if len({item.weight for item in items}) > 1:
        also["weighted_avg_at_k"] = 100 * weighted_avg_at_k(items)
    return RowScore(
        score=100 * avg_at_k(items),
        std=_spread(runs.tolist()),
        ci95=interval(drawn),
        num_items=len(items),
        num_samples=sum(len(item.right) for item in items),
        extraction_failures=extraction_failures(items),
        languages={code: 100 * float(right.mean()) for code, right in languages.items()},
        runs=runs.tolist(),
        also=also,
        errors=[error for item in items for error in item.errors],
        items=[
            {"id": item.item, "language": item.language, "right": [int(r) for r in item.right]}
            for item in items
        ],
    )


def _translation_score(items: Sequence[Translated], seed: int) -> RowScore:
    corpora = Corpora(items)
    runs = [fmean(scores) for scores in zip(*corpora.runs.values(), strict=True)]
    texts = [text for item in items for text in item.texts]
    also: dict[str, Any] = {"signatures": corpora.signatures}
    if has_flores200():
        pieces = Corpora(items, "flores200")
        also |= {"spbleu": pieces.score, "spbleu_signatures": pieces.signatures}
    return RowScore(
        score=corpora.score,
        std=_spread(runs),
        ci95=interval(corpora.resampled(RESAMPLES["bleu"], seed)),
        num_items=len(items),
        num_samples=len(texts),
        extraction_failures=texts.count("") / len(texts),
        languages={code: fmean(scores) for code, scores in corpora.runs.items()},
        runs=runs,
        also=also,
        errors=[],
        items=[
            {"id": item.item, "language": code, "statistics": counts.tolist()}
            for code, found in corpora.languages.items()
            for item, counts in zip(found, corpora.statistics[code], strict=True)
        ],
    )


def resampled_means(shares: Sequence[Floats], seed: int) -> Floats:
    """Means of languages' means over resamples of their items, [R], from L times [N]."""
    drawn = [
        weights_of(len(right), RESAMPLES["accuracy"], seed, number) @ right / len(right)
        for number, right in enumerate(shares)
    ]
    found: Floats = np.mean(drawn, axis=0)
    return found


def interval(drawn: Floats) -> tuple[float, float]:
    """The middle 95 % of resampled scores."""
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(low), float(high)


def _spread(runs: Sequence[float]) -> float:
    """Standard deviation of the runs' scores; 0 of one run."""
    return float(np.std(runs, ddof=1)) if len(runs) > 1 else 0.0


def section_means(
    scores: Mapping[str, float], sections: Mapping[str, Sequence[str]]
) -> dict[str, float | None]:
    """Unweighted means over the rows of a section that were run; None where none was."""
    return {
        section: fmean(scores[row] for row in rows if row in scores)
        if any(row in scores for row in rows)
        else None
        for section, rows in sections.items()
    }
