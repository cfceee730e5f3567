"""Of several responses one is kept that a verifier, the source or the others confirm."""

import json
from pathlib import Path
from typing import Any

import pytest

from marco_train.config.data import SourceConfig
from marco_train.curation.frame import Dropped
from marco_train.curation.science import Prompts, confirmed, final_answer

NINE, TEN, OPEN = "So it is $\\boxed{9}$.", "Answer: 10", "Because of the sun."


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (NINE, "9"),
        ("First \\boxed{1}, then \\boxed{1,234.50}", "1234.50"),
        ("The answer is: **B**.", "b"),
        ("#### ٤٢", "42"),
        ("答案：甲", "甲"),
        ("<think>\\boxed{3}</think> I do not know.", None),
        (OPEN, None),
        ("", None),
        ("\\boxed{}", None),
    ],
)
def test_the_answer_that_a_response_ends_in_is_read(text: str, answer: str | None) -> None:
    assert final_answer(text) == answer


def test_a_verifier_decides_where_the_row_has_one() -> None:
    verifier = {"name": "exact"}
    assert confirmed([NINE, TEN], "\\boxed{10}", verifier, 0.5) == ("verifier", [TEN])
    assert confirmed(["Yes", "no"], "no", verifier, 0.5) == ("verifier", ["no"])
    assert confirmed([NINE], "10", verifier, 0.5) == ("verifier", [])


def test_the_answer_of_the_source_decides_where_it_can_be_compared() -> None:
    assert confirmed([NINE, NINE, TEN], TEN, {}, 0.5) == ("source", [TEN])
    assert confirmed([NINE, OPEN], TEN, {}, 0.5) == ("source", [])


def test_most_responses_decide_where_the_source_says_nothing() -> None:
    assert confirmed([TEN, NINE, NINE, OPEN], "", {}, 0.5) == ("agreement", [NINE, NINE])
    assert confirmed([TEN, NINE, NINE, OPEN], "", {}, 0.6) == ("agreement", [])
    assert confirmed([TEN, NINE], "", {}, 0.5) == ("agreement", [])  # none agree
    assert confirmed([NINE], "", {}, 0.5) == ("agreement", [NINE])


def test_without_answers_to_compare_the_response_most_like_the_others_comes_first() -> None:
    texts = ["moons of ice", "the sun is hot", "the sun is very hot", TEN]
    by, found = confirmed(texts, "", {}, 0.5)
    assert by == "nothing" and found[0] in texts[1:3] and sorted(found) == sorted(texts)


def read(tmp_path: Path, *rows: Any) -> list[Any]:
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return list(Prompts(SourceConfig(path=str(file)), "en").read(0))


def test_prompts_are_read_with_the_answer_of_the_source(tmp_path: Path) -> None:
    asked = [{"role": "system", "content": "Teach."}, {"role": "user", "content": "Why?"}]
    answer = {"role": "assistant", "content": "<think>hm</think>So."}
    found = read(
        tmp_path,
        {"messages": [*asked, answer]},
        {"messages": asked, "language": "de"},
        {"messages": [{"role": "user", "content": None}]},
        {"prompt": "2?", "response": "2", "verifier": {"name": "exact"}},
        {"prompt": "2?", "response": "2", "verifier": {"name": "json_schema", "schema": {}}},
        {"prompt": "2?", "response": "x", "verifier": {"name": "json_schema", "schema": {}}},
        {"prompt": "2?", "response": "2", "verifier": {"name": "guess"}},
    )
    told = [
        o.reason if isinstance(o, Dropped) else (o["language"], o["reference"], o["verifier"])
        for o in found
    ]
    assert told == [
        ("en", "So.", {}),
        ("de", "", {}),
        told[2],
        ("en", "2", {"name": "exact"}),
        ("en", "2", {"name": "json_schema", "schema": {}}),
        "its verifier does not take the source's own answer",
        "its verifier does not take the source's own answer",
    ]
    assert str(told[2]).startswith("row at fault: ")
    assert found[0]["asked"] == asked
