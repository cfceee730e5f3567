"""Topics and languages follow from the classes and places above an entity."""

from pathlib import Path

import pytest

from marco_train.config.curation import CARD_LANGUAGES
from marco_train.curation.taxonomy import (
    Edges,
    Places,
    Topics,
    levels,
    read_countries,
    read_topics,
    starts_of,
    table,
)

TOPICS = Topics(("food", "music"), {1: "food", 2: "music"}, {9: "music"})


@pytest.fixture
def edges(tmp_path: Path) -> Edges:
    made = Edges(tmp_path / "edges")
    made.clear()
    # 10 -> 11 -> 1 and 10 -> 2; 20 and 21 in a circle.
    for item, above in {10: [11, 2], 11: [1], 20: [21], 21: [20], 30: [31]}.items():
        made.add(item, above)
    made.flush()
    return made


def test_all_that_is_above_items_is_found_and_circles_end(edges: Edges) -> None:
    assert edges.above([10, 20, 99]) == {
        10: [11, 2], 11: [1], 2: [], 1: [], 20: [21], 21: [20], 99: []
    }  # fmt: skip
    assert edges.above([]) == {}


def test_of_no_edges_nothing_is_above(tmp_path: Path) -> None:
    none = Edges(tmp_path / "edges")
    none.clear()
    assert none.above([1]) == {1: []}


def test_levels_go_up_and_name_each_item_once() -> None:
    above = {1: [2, 3], 2: [4], 3: [4, 1], 4: []}
    assert list(levels([1], above)) == [[1], [2, 3], [4]]


def test_the_nearest_topic_counts_and_of_equally_near_ones_the_first() -> None:
    above = {10: [11, 2], 11: [1], 12: [2, 1]}
    assert TOPICS.of({"P31": ["Q10"]}, above) == "music"
    assert TOPICS.of({"P31": ["Q12"]}, above) == "food"
    assert TOPICS.of({"P31": ["Q50"]}, above) is None
    assert TOPICS.of({}, above) is None


def test_a_person_has_the_topic_of_an_occupation_and_not_of_a_class() -> None:
    person = {"P31": ["Q5"], "P106": ["Q8"]}
    assert TOPICS.of(person, {5: [1], 8: [9]}) == "music"
    assert TOPICS.of({"P31": ["Q5"]}, {5: [1]}) is None
    assert starts_of(person) == [8]


def test_an_entity_is_of_its_own_countries_and_of_all_places_around_it() -> None:
    places = Places({100: [101], 101: [102]}, {101: [7], 102: [8]})
    claims = {"P17": ["Q1"], "P495": ["Q2"], "P27": ["Q3"], "P131": ["Q100"]}
    assert places.of(claims) == [1, 2, 3, 100, 101, 102]


def test_what_has_no_country_has_that_of_the_nearest_place_with_one() -> None:
    places = Places({100: [101], 101: [102]}, {101: [7], 102: [8]})
    assert places.of({"P131": ["Q100"]}) == [7, 100, 101, 102]
    assert places.of({}) == []


def test_the_tables_know_all_languages_of_the_card_and_about_twenty_topics() -> None:
    assert set(read_countries()) == set(table("choice")) == set(CARD_LANGUAGES)
    assert 20 <= len(read_topics().names) <= 30
    assert set(read_topics().classes).isdisjoint(read_topics().occupations)
    assert all("{letter}" in each["answer"] for each in table("choice").values())
