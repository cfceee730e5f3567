"""Average linkage, the families that it finds, and their picture."""

from xml.etree import ElementTree

import pytest

from marco_train.evaluation.dendrogram import (
    Merge,
    average_linkage,
    cut_of,
    dendrogram,
    families,
)

# a and b are near, d and e too; c is nearer to a and b.
DISTANCES = [
    [0.0, 0.2, 0.6, 1.0, 1.2],
    [0.2, 0.0, 0.4, 1.1, 0.9],
    [0.6, 0.4, 0.0, 0.8, 1.0],
    [1.0, 1.1, 0.8, 0.0, 0.3],
    [1.2, 0.9, 1.0, 0.3, 0.0],
]


def test_groups_are_as_far_apart_as_their_pairs_in_the_mean() -> None:
    merges = average_linkage(DISTANCES)
    assert [(m.first, m.second, m.size) for m in merges] == [
        (0, 1, 2),
        (3, 4, 2),
        (2, 5, 3),
        (6, 7, 5),
    ]
    # (0.6 + 0.4) / 2, then (1.0 + 1.2 + 1.1 + 0.9 + 0.8 + 1.0) / 6.
    assert [m.distance for m in merges] == pytest.approx([0.2, 0.3, 0.5, 1.0])


def test_families_are_joined_below_seven_tenths_of_the_last_merge() -> None:
    merges = average_linkage(DISTANCES)
    assert cut_of(merges) == pytest.approx(0.7)
    assert families(merges, 0.7) == [[3, 4], [2, 0, 1]]
    assert families(merges, 0.4) == [[3, 4], [2], [0, 1]]
    assert families(merges, 0.1) == [[3], [4], [2], [0], [1]]
    assert families(merges, 2.0) == [[3, 4, 2, 0, 1]]


def test_one_thing_is_a_family() -> None:
    assert average_linkage([[0.0]]) == []
    assert families([], 0.0) == [[0]]


def test_the_picture_is_a_file_with_every_name() -> None:
    merges = average_linkage(DISTANCES)
    drawn = ElementTree.fromstring(dendrogram("five", ["a<b", "b", "c", "d", "e"], merges, 0.7))
    texts = [node.text for node in drawn.iter("{http://www.w3.org/2000/svg}text")]
    assert [t for t in texts if t in {"a<b", "b", "c", "d", "e"}] == ["d", "e", "c", "a<b", "b"]
    paths = [node.get("d") for node in drawn.iter("{http://www.w3.org/2000/svg}path")]
    # The cut, the axis and four merges; the last ends at 1 of 1.05 of the width of 474.
    assert len(paths) == 6
    assert max(float(str(p).split("H")[1].split("V")[0]) for p in paths[2:]) == pytest.approx(
        70 + 474 / 1.05, abs=0.1
    )


def test_things_that_are_all_alike_are_one_family() -> None:
    merges = [Merge(0, 1, 0.0, 2)]
    assert families(merges, cut_of(merges)) == [[0, 1]]
    ElementTree.fromstring(dendrogram("two", ["a", "b"], merges, cut_of(merges)))
