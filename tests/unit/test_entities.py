"""Entities of a language are those of its countries, the popular ones of each topic, in words."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from marco_train.curation.entities import (
    CUT,
    FEW_ARTICLES,
    Classified,
    Entities,
    Named,
    Popular,
    shared_out,
)
from marco_train.curation.frame import Dropped, Ran, Row, Step
from marco_train.errors import InputError
from tests.helpers.curation import Given, example, ran

LANGUAGES = ("de", "fr", "ar", "ja", "th", "cs")


@pytest.fixture(scope="module")
def dump(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("example")
    example.main(directory)
    return directory / "entities.json.bz2"


def dropped(found: Ran) -> dict[str, dict[str, int]]:
    return {each.name: dict(each.whole.dropped) for each in found.counts}


def entities(file: Path, min_articles: int = 5) -> Entities:
    return Entities.of(file, LANGUAGES, min_articles)


def classified(**fields: Any) -> Row:
    row = {"language": "de", "topic": "music", "num_articles": 9, "id": "Q1", "classes": ["Q2"]}
    return row | {"labels": {"de": "x"}, "country": "Q183"} | fields


def test_all_of_the_example_is_told_and_what_is_lost_is_counted(dump: Path, tmp_path: Path) -> None:
    source = entities(dump)
    steps: list[Step] = [Classified(LANGUAGES, 5), Popular(2000, 6), Named(source, 4)]
    found = ran(source, steps, tmp_path)
    assert dropped(found) == {
        "entities": {FEW_ARTICLES: 7, "line is not JSON": 1, "line is no entity": 1},
        "classified": {
            "only a class or a place of others": 26,
            "no label": 10,
            "no label in its language": 13,
            "of no topic": 10,
        },
        "popular": {},
        "named": {},
    }
    rows = list(found.shards.rows())
    assert {code: sum(row["language"] == code for row in rows) for code in LANGUAGES} == {
        "de": 50, "fr": 50, "ar": 50, "ja": 50, "th": 50, "cs": 3
    }  # fmt: skip
    assert {row["topic"] for row in rows} == {
        "buildings and monuments",
        "food and drink",
        "festivals and customs",
        "nature",
        "visual arts and museums",
    }
    castle = next(row for row in rows if row["labels"].get("fr") == "château de Beauval")
    # Of the country by its town, which is named in its own language as the class is.
    assert castle["country"] == "Q142" and castle["classes"] == ["Q9000"]
    assert sorted(castle["facts"]) == [
        ["country", "France"],
        ["founded or begun", "1213"],
        ["height", "43 mètre"],
        ["is a", "château (2)"],
        ["located in", "Clairval"],
    ]


def test_a_pipeline_that_goes_on_gives_the_same_rows(dump: Path, tmp_path: Path) -> None:
    source = entities(dump)

    def finished(work: Path) -> list[Row]:
        steps: list[Step] = [Classified(LANGUAGES, 5), Popular(60, 6), Named(source, 4)]
        return list(ran(source, steps, work, 80).shards.rows())

    whole = finished(tmp_path / "whole")
    assert finished(tmp_path / "whole") == whole
    for step in ("00-entities", "02-popular", "03-named"):  # as if it was killed there
        directory = tmp_path / "whole" / step
        (directory / "complete.json").unlink()
        for shard in sorted(directory.glob("[0-9]*"))[2:]:
            for file in shard.iterdir():
                file.unlink()
            shard.rmdir()
        for later in sorted((tmp_path / "whole").glob("0*")):
            if later.name > step:
                (later / "key.json").write_text("null")
        assert finished(tmp_path / "whole") == whole


def test_no_entity_is_read_from_what_a_cut_file_has_lost(dump: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.json.bz2"
    cut.write_bytes(dump.read_bytes()[:-2000])
    outcomes = list(entities(cut).read(0))
    assert [o.reason for o in outcomes if isinstance(o, Dropped)][-1] == CUT
    assert list(entities(cut).read(len(outcomes) - 1)) == outcomes[-1:]


def test_all_files_of_a_directory_are_read_and_any_place_is_gone_on_from(tmp_path: Path) -> None:
    line = json.dumps(example.entity("Q7", {"de": "Sieben"}, {"P31": [example.item("Q3")]}, 6))
    (tmp_path / "a.jsonl").write_text(f"{line}\nnonsense\n")
    uri = {"type": "uri", "value": "http://www.wikidata.org/entity/Q8"}
    rows = [{"item": uri}, {"item": {"type": "literal", "value": "x"}}]
    found = {"head": {"vars": ["item"]}, "results": {"bindings": rows}}
    (tmp_path / "b.json").write_text(json.dumps(found))
    (tmp_path / "c.jsonl").write_text(line.replace("Q7", "Q9"))
    source = entities(tmp_path)
    outcomes = list(source.read(0))
    told = [o.reason if isinstance(o, Dropped) else o["id"] for o in outcomes]
    assert told == ["Q7", "line is not JSON", "line is no entity", "Q8", "Q9"]
    for skip in range(6):
        assert list(source.read(skip)) == outcomes[skip:]


def test_an_input_without_entities_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no file that ends in \.json, \.jsonl"):
        entities(tmp_path)
    with pytest.raises(InputError, match="there is no file and no directory"):
        entities(tmp_path / "gone")


def test_lines_are_estimated_from_the_beginning_of_a_file(dump: Path) -> None:
    assert entities(dump).plan().rows == 320  # with the brackets


def test_what_a_topic_lacks_goes_to_the_others() -> None:
    assert shared_out(10, {"a": 2, "b": 100, "c": 100}) == {"a": 2, "b": 4, "c": 4}
    assert shared_out(11, {"a": 2, "b": 100, "c": 100}) == {"a": 2, "b": 4, "c": 5}
    assert shared_out(10, {"a": 1, "b": 2}) == {"a": 1, "b": 2}
    assert shared_out(0, {"a": 1}) == {"a": 0} and shared_out(5, {}) == {}


def test_the_most_popular_ones_of_each_topic_are_kept_and_of_equal_ones_the_first(
    tmp_path: Path,
) -> None:
    rows = [
        classified(id=f"Q{n}", topic=topic, num_articles=articles)
        for n, (topic, articles) in enumerate(
            [("music", 5), ("music", 9), ("food", 5), ("food", 5), ("food", 5), ("food", 6)]
        )
    ]
    other = classified(id="Q9", language="fr", topic="food", num_articles=1)
    found = ran(Given([*rows, other]), [Popular(4, 2)], tmp_path, 2)
    assert [row["id"] for row in found.shards.rows()] == ["Q0", "Q1", "Q2", "Q5", "Q9"]


def test_an_entity_of_two_countries_is_one_of_each_language(tmp_path: Path) -> None:
    labels = {"de": "Matterhorn", "fr": "Cervin", "en": "Matterhorn"}
    claims = {"P31": ["Q8502"], "P17": ["Q39", "Q142"]}
    row = {"id": "Q1", "num_articles": 9, "labels": labels, "descriptions": {}, "names": {}}
    found = ran(Given([row | {"claims": claims}]), [Classified(("de", "fr", "ja"), 5)], tmp_path)
    rows = list(found.shards.rows())
    assert [(row["language"], row["country"], row["labels"]) for row in rows] == [
        ("de", "Q39", {"de": "Matterhorn", "en": "Matterhorn"}),
        ("fr", "Q39", {"fr": "Cervin", "en": "Matterhorn"}),
    ]


def test_an_entity_of_which_little_is_known_is_dropped(dump: Path, tmp_path: Path) -> None:
    source = entities(dump)
    named = replace(Named(source, 4), min_facts=6)
    said = r"step 03-named leaves none of 253 rows, most of them \(253\) for: too few facts"
    with pytest.raises(InputError, match=said):
        ran(source, [Classified(LANGUAGES, 5), Popular(2000, 6), named], tmp_path)


def test_facts_of_a_sparql_result_are_told_by_the_names_that_it_gives(tmp_path: Path) -> None:
    def item(id_: str) -> dict[str, str]:
        return {"type": "uri", "value": f"http://www.wikidata.org/entity/{id_}"}

    def german(text: str) -> dict[str, str]:
        return {"type": "literal", "value": text, "xml:lang": "de"}

    row = {
        "item": item("Q1"),
        "label": german("Burg Eltz"),
        "articles": {"type": "literal", "value": "12"},
        "P31": item("Q23413"),
        "P31Label": german("Burg"),
        "P17": item("Q183"),
        "P17Label": german("Deutschland"),
        "P131": item("Q5"),
        "P131Label": {"type": "literal", "value": "Q5"},  # without a label
    }
    (tmp_path / "a.json").write_text(
        json.dumps({"head": {"vars": list(row)}, "results": {"bindings": [row]}})
    )
    source = entities(tmp_path / "a.json")
    steps: list[Step] = [Classified(LANGUAGES, 5), Popular(2000, 6), Named(source, 2)]
    (found,) = ran(source, steps, tmp_path / "work").shards.rows()
    assert sorted(found["facts"]) == [["country", "Deutschland"], ["is a", "Burg"]]
    assert (found["language"], found["topic"]) == ("de", "buildings and monuments")
