"""Which of several things are near each other: average linkage, families, and their tree as SVG.

    distances -> average_linkage -> families | dendrogram

The numbering is scipy's: things are 0 to n - 1, what the k-th merge makes is n + k.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple

from marco_train.evaluation.html import Markup, short, text, ticks

CUT_SHARE = 0.7
"""Of the highest merge's distance: below it things are one family. scipy's dendrograms colour by
the same rule (`color_threshold`)."""
COLORS = ("#2f6fde", "#d9622b", "#25924a", "#a045c4", "#b8860b", "#0e8f9c", "#d13b74")
ALONE = "#6b7280"
WIDTH, LEFT, RIGHT, TOP, LEAF, BOTTOM = 560, 70, 16, 10, 18, 34
"""Of a drawing, in its own units; `LEAF` is the height of a line."""


class Merge(NamedTuple):
    """Two groups that become one."""

    first: int
    second: int
    distance: float
    size: int
    """Things in the new group."""


def average_linkage(distances: Sequence[Sequence[float]]) -> list[Merge]:
    """Join the two nearest groups until there is one (UPGMA).

    Args:
        distances: [n, n], symmetric. That of two groups is the mean over their pairs.

    Returns:
        The n - 1 merges, in their order; of equally near groups the first are joined.
    """
    members = {n: [n] for n in range(len(distances))}
    between = {(a, b): distances[a][b] for a, b in combinations(members, 2)}
    merges: list[Merge] = []
    while between:
        first, second = min(between, key=lambda pair: (between[pair], pair))
        merged = members.pop(first) + members.pop(second)
        made = len(distances) + len(merges)
        merges.append(Merge(first, second, between[first, second], len(merged)))
        between = {pair: d for pair, d in between.items() if not {first, second} & set(pair)}
        for other, theirs in members.items():
            total = sum(distances[a][b] for a in merged for b in theirs)
            between[other, made] = total / (len(merged) * len(theirs))
        members[made] = merged
    return merges


def cut_of(merges: Sequence[Merge]) -> float:
    """The distance up to which groups are one family."""
    return CUT_SHARE * max((merge.distance for merge in merges), default=0.0)


def families(merges: Sequence[Merge], cut: float) -> list[list[int]]:
    """Group what is joined up to a distance, in the order of the tree's leaves.

    Args:
        merges: As `average_linkage` gives them.
        cut: The distance.

    Returns:
        The members of each family; what is joined with nothing is a family of its own.
    """
    num_things = len(merges) + 1

    def members(node: int) -> list[int]:
        if node < num_things:
            return [node]
        merge = merges[node - num_things]
        return members(merge.first) + members(merge.second)

    def split(node: int) -> list[list[int]]:
        if node >= num_things and merges[node - num_things].distance > cut:
            merge = merges[node - num_things]
            return split(merge.first) + split(merge.second)
        return [members(node)]

    return split(2 * len(merges))


@dataclass
class _Tree:
    """Lines of a drawing, made from the leaves to the root."""

    merges: Sequence[Merge]
    labels: Sequence[str]
    scale: float
    """Distance at the right edge."""
    colors: Mapping[int, str]
    """Of each thing, by its family."""
    shapes: list[str]
    num_drawn: int = 0

    def draw(self, node: int) -> tuple[float, float, set[str]]:
        """Draw what lies below a node; gives its place and the colours of its things."""
        num_things = len(self.labels)
        if node < num_things:
            y = TOP + (self.num_drawn + 0.5) * LEAF
            self.num_drawn += 1
            color = self.colors[node]
            self.shapes.append(
                f'<text x="{LEFT - 6}" y="{y:.1f}" dy="4" text-anchor="end" style="fill:{color}">'
                f"{text(self.labels[node])}</text>"
            )
            return LEFT, y, {color}
        merge = self.merges[node - num_things]
        x1, y1, above = self.draw(merge.first)
        x2, y2, below = self.draw(merge.second)
        x, joined = self.x(merge.distance), above | below
        color = min(joined) if len(joined) == 1 else ALONE
        self.shapes.append(
            f'<path d="M{x1:.1f} {y1:.1f}H{x:.1f}V{y2:.1f}H{x2:.1f}" '
            f'style="fill:none;stroke:{color};stroke-width:1.5"/>'
        )
        return x, (y1 + y2) / 2, joined

    def x(self, distance: float) -> float:
        """Place of a distance."""
        return LEFT + max(0.0, distance) / self.scale * (WIDTH - LEFT - RIGHT)


def dendrogram(title: str, labels: Sequence[str], merges: Sequence[Merge], cut: float) -> Markup:
    """Draw a tree from its leaves at the left to its root at the right, coloured by families.

    Args:
        title: For those who do not see it.
        labels: Of two things or more.
        merges: As `average_linkage` gives them.
        cut: Drawn as a line.

    Returns:
        One SVG element, which is a file too.
    """
    scale = max(merge.distance for merge in merges) * 1.05 or 1.0
    colors = dict.fromkeys(range(len(labels)), ALONE)
    shared = [family for family in families(merges, cut) if len(family) > 1]
    for number, family in enumerate(shared):
        colors |= dict.fromkeys(family, COLORS[number % len(COLORS)])
    tree = _Tree(merges, labels, scale, colors, [])
    tree.draw(len(labels) + len(merges) - 1)
    bottom = TOP + LEAF * len(labels)
    height = bottom + BOTTOM
    at = tree.x(cut)
    axis = [
        f'<path d="M{at:.1f} {TOP}V{bottom}" style="stroke:{ALONE};stroke-dasharray:3 3"/>',
        f'<path d="M{LEFT} {bottom}H{WIDTH - RIGHT}" style="stroke:{ALONE}"/>',
        *(
            f'<text x="{tree.x(value):.1f}" y="{bottom + 13}" text-anchor="middle" '
            f'style="fill:{ALONE}">{short(value)}</text>'
            for value in ticks(0.0, scale)
        ),
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{bottom + 28}" text-anchor="middle" '
        f'style="fill:{ALONE}">1 - Pearson correlation</text>',
    ]
    return Markup(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="{text(title)}" style="font:12px system-ui,sans-serif">'
        f"{''.join(axis)}{''.join(tree.shapes)}</svg>"
    )
