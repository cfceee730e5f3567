"""Which experts each language uses, and which languages are near each other, for readers."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from marco_train.evaluation.dendrogram import average_linkage, cut_of, dendrogram
from marco_train.evaluation.html import (
    Markup,
    Section,
    grid,
    page,
    plain_text,
    raster,
    shade_of,
    table,
)

STRONG_SHARE = 0.99
"""Share of all experts' shares below the darkest."""


def signature_page(found: Mapping[str, Any]) -> str:
    """Lay out a page.

    Args:
        found: What signatures.json of the command holds.
    """
    families = [[", ".join(family)] for family in found["families"]]
    counts = [
        [language, found["num_rows"][language], found["num_tokens"][language]]
        for language in found["languages"]
    ]
    named = f"cut at {found['cut']:.3g}, 0.7 of the last merge's distance"
    return page(
        f"Experts by language: {found['model']}",
        [f"Rows of {found['data']}; each pair of token and expert counts once."],
        [
            Section("Families", [tree_of(found), plain_text(named), table(["family"], families)]),
            Section("Signatures", signature_grid(found)),
            Section("Distances", [distance_table(found)]),
            Section("Rows", [table(["language", "rows", "tokens"], counts)]),
        ],
    )


def tree_of(found: Mapping[str, Any]) -> Markup:
    """Draw how the languages are joined; nothing where they are fewer than two."""
    merges = average_linkage(found["distances"])
    if not merges:
        return Markup("")
    return dendrogram("Languages by experts", found["languages"], merges, cut_of(merges))


def distance_table(found: Mapping[str, Any]) -> Markup:
    """Table of 1 - correlation of each two languages."""
    languages: Sequence[str] = found["languages"]
    rows = [[name, *row] for name, row in zip(languages, found["distances"], strict=True)]
    return table(["", *languages], rows, partial(shade_of, scale=1.5))


def signature_grid(found: Mapping[str, Any]) -> list[Markup]:
    """Draw each language's shares: a line a layer from the first at the top, a column an expert."""
    shares: Sequence[Sequence[Sequence[float]]] = found["expert_shares"]
    known = sorted(share for layers in shares for layer in layers for share in layer)
    strong = known[int(STRONG_SHARE * (len(known) - 1))] or 1.0
    said = (
        f"A line is a layer, the first at the top, and a column an expert: the darker, the more of "
        f"the layer's tokens it gets; black from {100 * strong:.3g} % on."
    )
    pictures = (
        raster(language, [[share / strong for share in layer] for layer in layers])
        for language, layers in zip(found["languages"], shares, strict=True)
    )
    return [plain_text(said), *grid(pictures)]
