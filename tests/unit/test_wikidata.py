"""Entities are read from what Wikidata gives, whole or cut, and nothing of them is made up."""

import bz2
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from marco_train.curation.wikidata import (
    Entity,
    LineError,
    Wanted,
    entity_of,
    id_of,
    is_sparql,
    may_matter,
    read_lines,
    read_sparql,
    time_of,
)
from marco_train.errors import InputError

WANTED = Wanted(("de", "zh", "en"), frozenset({"P17", "P31", "P571", "P2044", "P1448", "P214"}), 2)


def item(id_: str) -> dict[str, Any]:
    return {"type": "wikibase-entityid", "value": {"entity-type": "item", "id": id_}}


def claim(value: Any, rank: str = "normal", datatype: str = "wikibase-item") -> dict[str, Any]:
    snak = {"snaktype": "value", "datatype": datatype, "datavalue": value}
    return {"mainsnak": snak, "rank": rank, "type": "statement"}


def texts(**by_code: str) -> dict[str, Any]:
    return {
        code.replace("_", "-"): {"language": code, "value": value}
        for code, value in by_code.items()
    }


CASTLE: dict[str, Any] = {
    "type": "item",
    "id": "Q1000",
    "labels": texts(de="Burg  Eltz", zh_hans="埃尔茨城堡", fr="château d'Eltz"),
    "descriptions": texts(en="castle in Germany"),
    "claims": {
        "P17": [claim(item("Q1"), "deprecated"), claim(item("Q183"))],
        "P31": [claim(item("Q23413")), claim(item("Q570116"), "preferred")],
        "P571": [
            claim({"type": "time", "value": {"time": "+1157-00-00T00:00:00Z", "precision": 9}})
        ],
        "P2044": [
            claim(
                {
                    "type": "quantity",
                    "value": {
                        "amount": "+129.5",
                        "unit": "http://www.wikidata.org/entity/Q11573",
                    },
                }
            )
        ],
        "P1448": [
            claim({"type": "monolingualtext", "value": {"text": "Burg Eltz", "language": "de"}}),
            {"mainsnak": {"snaktype": "novalue"}, "rank": "normal"},
        ],
        "P214": [claim({"type": "string", "value": "234"}, datatype="external-id")],
        "P9": [claim(item("Q2"))],
    },
    "sitelinks": {
        site: {"site": site, "title": "Burg Eltz"} for site in ("dewiki", "frwiki", "commonswiki")
    },
}


def line(**changes: Any) -> bytes:
    return json.dumps(CASTLE | changes, separators=(",", ":")).encode()


def test_an_entity_is_what_its_line_says_in_the_languages_and_properties_asked_for() -> None:
    assert entity_of(line(), WANTED) == Entity(
        "Q1000",
        2,  # an article each in German and French; Commons has none
        {"de": "Burg Eltz", "zh": "埃尔茨城堡"},
        {"en": "castle in Germany"},
        {
            "P17": ["Q183"],
            "P31": ["Q570116"],
            "P571": ["1157"],
            "P2044": ["129.5 Q11573"],
            "P1448": ["Burg Eltz"],
        },
    )


def test_a_label_of_all_languages_stands_for_those_without_their_own() -> None:
    labels = texts(mul="Ada Lovelace", zh="阿达")
    found = entity_of(line(labels=labels), WANTED).labels
    assert found == {"de": "Ada Lovelace", "zh": "阿达", "en": "Ada Lovelace"}


def test_what_php_writes_as_an_empty_list_is_nothing() -> None:
    bare = entity_of(line(labels=[], descriptions=[], claims=[], sitelinks=[]), WANTED)
    assert bare == Entity("Q1000", 0, {}, {}, {})


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (b'{"id": "Q1", "lab', "line is not JSON"),
        (b"\xff\xfe", "line is not JSON"),
        (b"[" * 100_000, "line is not JSON"),
        (b"[1]", "line is no entity"),
        (b'{"labels": {}}', "line is no entity"),
        (line(id="P31"), "entity is no item"),
        (line(id="L7"), "entity is no item"),
    ],
)
def test_a_line_that_gives_no_entity_says_why(bad: bytes, reason: str) -> None:
    with pytest.raises(LineError, match=f"^{reason}$"):
        entity_of(bad, WANTED)


@pytest.mark.parametrize(
    "odd",
    [
        {"claims": {"P17": [None, 3, {"mainsnak": 5}, {"mainsnak": {"datavalue": None}}]}},
        {"claims": {"P17": {"a": 1}}},
        {"labels": {"de": "text"}, "descriptions": {"en": {"value": 7}}, "claims": 5},
        {"sitelinks": {"dewiki": None}},
    ],
)
def test_a_line_of_odd_parts_gives_what_the_others_say(odd: dict[str, Any]) -> None:
    assert entity_of(line(**odd), WANTED).id == "Q1000"


def test_a_line_that_nobody_writes_about_is_not_read_unless_others_are_told_by_it() -> None:
    alone = line(sitelinks={"dewiki": {"site": "dewiki"}})
    assert not may_matter(alone, 2)
    assert may_matter(line(), 2)
    assert may_matter(line(claims={"P279": []}, sitelinks={}), 2)
    assert may_matter(line(claims={"P131": []}, sitelinks={}), 2)
    assert may_matter(b"nonsense", 2)  # so that it is counted as such


def test_the_id_of_a_line_is_not_that_of_a_claim() -> None:
    assert id_of(line()) == "Q1000"
    reordered = {"claims": CASTLE["claims"], "id": "Q7"}
    assert id_of(json.dumps(reordered).encode()) == "Q7"
    assert id_of(b'{"id": 3}') is None and id_of(b"{") is None and id_of(b"[]") is None


def test_times_are_written_as_far_as_they_are_known() -> None:
    assert time_of("+1952-03-11T00:00:00Z", 11) == "1952-03-11"
    assert time_of("+1952-03-11T00:00:00Z", 10) == "1952-03"
    assert time_of("+1952-03-11T00:00:00Z", 9) == "1952"
    assert time_of("-0044-03-15T00:00:00Z", 11) == "-44-03-15"
    assert time_of("+2000-00-00T00:00:00Z", 11) == "2000"
    assert time_of("+1900-00-00T00:00:00Z", 7) is None  # a century
    assert time_of("some day", 11) is None


@pytest.mark.parametrize("pack", [bytes, bz2.compress, gzip.compress])
def test_lines_are_read_packed_or_not_without_the_brackets_around_them(
    pack: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    file = tmp_path / "dump"
    file.write_bytes(pack(b'[\n{"id":"Q1"},\r\n\n{"id":"Q2"}\n]\n'))
    assert list(read_lines(file)) == [b'{"id":"Q1"}', b'{"id":"Q2"}']


def test_bzip2_of_several_streams_as_dumps_have_it_is_read_to_its_end(tmp_path: Path) -> None:
    file = tmp_path / "dump.json.bz2"
    file.write_bytes(b"".join(bz2.compress(b'{"id":"Q%d"},\n' % n) for n in range(3)))
    assert len(list(read_lines(file))) == 3


def small_blocks(content: bytes) -> bytes:
    return bz2.compress(content, compresslevel=1)


@pytest.mark.parametrize(
    ("pack", "damage"),
    # What was overwritten in gzip unpacks to something else, and only its end shows it.
    [(small_blocks, "cut"), (gzip.compress, "cut"), (small_blocks, "overwritten")],
)
def test_a_damaged_file_gives_the_lines_before_the_damage_and_says_so(
    pack: Callable[[bytes], bytes], damage: str, tmp_path: Path
) -> None:
    lines = [json.dumps({"id": f"Q{n}", "n": n * 7919 % 10_007}).encode() for n in range(1, 20_000)]
    whole = pack(b"\n".join(lines))
    half = len(whole) // 2
    file = tmp_path / "dump"
    file.write_bytes(whole[:half] + (b"" if damage == "cut" else bytes(4096) + whole[half:]))
    *read, rest = read_lines(file)
    assert rest is None
    assert 2_000 < len(read) < len(lines)
    assert read[:-1] == lines[: len(read) - 1]  # the last one may be a part of a line


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gone.json' cannot be read"):
        list(read_lines(tmp_path / "gone.json"))


def uri(item: str) -> dict[str, str]:
    return {"type": "uri", "value": f"http://www.wikidata.org/entity/{item}"}


def literal(value: str, **more: str) -> dict[str, str]:
    return {"type": "literal", "value": value} | more


def write_sparql(file: Path, *rows: Any, variables: str = "item label P17") -> Path:
    found = {"head": {"vars": variables.split()}, "results": {"bindings": list(rows)}}
    file.write_text(json.dumps(found))
    return file


def test_rows_of_a_sparql_result_are_joined_to_entities(tmp_path: Path) -> None:
    german = {"xml:lang": "de"}
    castle = {"item": uri("Q1000"), "articles": literal("12"), "P17": uri("Q183")}
    day = {"datatype": "http://www.w3.org/2001/XMLSchema#dateTime"}
    file = write_sparql(
        tmp_path / "result.json",
        castle
        | {"label": literal("Burg Eltz", **german), "P17Label": literal("Deutschland", **german)},
        castle
        | {
            "label": literal("埃尔茨城堡", **{"xml:lang": "zh-hans"}),
            "P571": literal("1157-01-01T00:00:00Z", **day),
            "P214": literal("text"),
        },
        {"item": uri("Q2"), "label": literal("Q2", **german)},
        {"item": literal("nonsense")},
        5,
    )
    assert is_sparql(file)
    assert list(read_sparql(file, WANTED)) == [
        None,
        None,
        Entity(
            "Q1000",
            12,
            {"de": "Burg Eltz", "zh": "埃尔茨城堡"},
            {},
            {"P17": ["Q183"], "P571": ["1157"], "P214": ["text"]},
            {"Q183": {"de": "Deutschland"}},
        ),
        Entity("Q2", 0, {}, {}, {}),
    ]


def test_a_sparql_result_that_is_none_is_refused(tmp_path: Path) -> None:
    file = write_sparql(tmp_path / "a.json", variables="thing")
    with pytest.raises(InputError, match=r"has the variables \['thing'\] and no `item`"):
        list(read_sparql(file, WANTED))
    file.write_text(file.read_text()[:-9])
    with pytest.raises(InputError, match="no whole SPARQL result"):
        list(read_sparql(file, WANTED))
