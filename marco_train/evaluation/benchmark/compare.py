"""Two reports of benchmarks: by how much each row moved, and whether that is more than noise.

Legend: L languages, N items of a language, k responses, R resamples.
"""

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from marco_train.config.benchmark import OWN_ROW, card_rows, sections
from marco_train.errors import InputError, require
from marco_train.evaluation.benchmark.aggregate import (
    RESAMPLES,
    Floats,
    interval,
    resampled_bleu,
    weights_of,
)
from marco_train.evaluation.benchmark.bleu import score_of

Items = dict[str, dict[str, dict[str, Any]]]  # row -> id -> line of items.jsonl


@dataclass(frozen=True)
class Moved:
    """A row of both reports, in per cent or BLEU, over the items that both have."""

    row: str
    first: float
    second: float
    ci95: tuple[float, float]
    """Of the difference, second less first."""
    num_items: int
    num_unpaired: int
    """Items that one of the two has alone."""

    @property
    def difference(self) -> float:
        """Second less first."""
        return self.second - self.first

    @property
    def is_beyond_noise(self) -> bool:
        """Whether the interval of the difference leaves out 0."""
        return not self.ci95[0] <= 0 <= self.ci95[1]


def compare(first: Path, second: Path, seed: int = 0) -> list[Moved]:
    """Compare the rows that two reports have in common.

    Items are drawn with replacement, the same ones for both, of each language as many as it has.

    Raises:
        InputError: A directory holds no report, or they have no items in common.
    """
    ours, theirs = read_items(first), read_items(second)
    names = [row.name for row in (*card_rows().values(), OWN_ROW)]
    moved, drawn = [], {}
    for row in [name for name in names if name in ours and name in theirs]:
        found = _paired(ours[row], theirs[row], seed)
        if found is not None:
            scores, differences, num_items = found
            total = len(ours[row].keys() | theirs[row].keys())
            moved.append(Moved(row, *scores, interval(differences), num_items, total - num_items))
            drawn[row] = differences
    require(bool(moved), f"{first} and {second} have no item in common: they ran other suites")
    return moved + _means(moved, drawn)


def _means(moved: list[Moved], drawn: Mapping[str, Floats]) -> list[Moved]:
    """The sections' means over the rows of both, where these have as many resamples."""
    by_name = {each.row: each for each in moved}
    found = []
    for section, names in sections().items():
        rows = [by_name[name] for name in names if name in by_name]
        if len(rows) < 2:
            continue
        count = min(len(drawn[each.row]) for each in rows)
        differences = np.mean([drawn[each.row][:count] for each in rows], axis=0)
        found.append(
            Moved(
                f"mean of {section}",
                fmean(each.first for each in rows),
                fmean(each.second for each in rows),
                interval(differences),
                sum(each.num_items for each in rows),
                sum(each.num_unpaired for each in rows),
            )
        )
    return found


def read_items(directory: Path) -> Items:
    """Read the graded items of a report.

    Raises:
        InputError: There are none.
    """
    file = directory / "items.jsonl"
    require(
        file.is_file(),
        f"{str(directory)!r} holds no report of a benchmark: there is no items.jsonl in it",
    )
    found: Items = defaultdict(dict)
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        try:
            item = json.loads(line)
            found[item["row"]][item["id"]] = item
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(f"{file}, line {number} is torn: run the benchmark again") from error
    return dict(found)


def _paired(
    first: dict[str, dict[str, Any]], second: dict[str, dict[str, Any]], seed: int
) -> tuple[tuple[float, float], Floats, int] | None:
    """Scores of both, and resampled differences [R]; None where no item is in both."""
    languages: dict[str, list[str]] = defaultdict(list)
    for item in first.keys() & second.keys():
        languages[first[item]["language"]].append(item)
    if not languages:
        return None
    scores: list[tuple[float, float]] = []
    drawn: list[tuple[Floats, Floats]] = []
    for number, ids in enumerate(map(sorted, dict(sorted(languages.items())).values())):
        sides = [_measured([side[i] for i in ids], seed, number) for side in (first, second)]
        scores.append((sides[0][0], sides[1][0]))
        drawn.append((sides[0][1], sides[1][1]))
    differences: Floats = np.mean([b - a for a, b in drawn], axis=0)
    means = fmean(a for a, _ in scores), fmean(b for _, b in scores)
    return means, differences, sum(map(len, languages.values()))


def _measured(items: list[dict[str, Any]], seed: int, number: int) -> tuple[float, Floats]:
    """Score of a language's items, and of resamples of them, [R]."""
    if "right" in items[0]:
        right = 100 * np.array([fmean(item["right"]) for item in items])
        drawn = weights_of(len(items), RESAMPLES["accuracy"], seed, number)
        return float(right.mean()), drawn @ right / len(items)
    counts = np.array([item["statistics"] for item in items])  # [N, k, S]
    score = fmean(score_of(sums) for sums in counts.sum(axis=0))
    return score, np.array(resampled_bleu(counts, RESAMPLES["bleu"], seed, number))


def as_table(moved: list[Moved]) -> list[str]:
    """Lay a comparison out for a reader."""
    width = max(len(each.row) for each in moved)
    lines = [f"{'row':{width}} {'A':>6} {'B':>6} {'B - A':>6}  95 % of the difference"]
    for each in moved:
        low, high = each.ci95
        said = "moved" if each.is_beyond_noise else "within noise"
        unpaired = f", {each.num_unpaired} items in one alone" if each.num_unpaired else ""
        lines.append(
            f"{each.row:{width}} {each.first:>6.1f} {each.second:>6.1f} {each.difference:>+6.1f}  "
            f"{low:+.1f} to {high:+.1f}, {said}{unpaired}"
        )
    return lines
