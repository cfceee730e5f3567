"""Share of sampled answers that a verifier accepts, by category."""

from collections import Counter
from collections.abc import Iterable

from marco_train.distributed import gather_objects

Grades = Iterable[tuple[str, bool]]


def accuracy_by_category(grades: Grades) -> dict[str, float]:
    """Per cent of accepted answers in each category and in `all`, over the grades of all ranks.

    Every answer weighs the same in `all`. A category of that name is called `all (category)`.
    """
    asked: Counter[str] = Counter()
    accepted: Counter[str] = Counter()
    for of_rank in gather_objects(list(grades)):
        for category, correct in of_rank:
            for name in ("all (category)" if category == "all" else category, "all"):
                asked[name] += 1
                accepted[name] += correct
    return {name: 100 * accepted[name] / asked[name] for name in sorted(asked)}
