"""Conversations of a source: which rows, and what they are called; answers become a score."""

from pathlib import Path
from typing import Any

import pytest

from marco_train.data.conversations import BadRow
from marco_train.types import Conversation, prompt_groups
from tests.helpers.rows import conversations, source, source_at


def test_a_repeated_prompt_counts_once_where_asked(tmp_path: Path) -> None:
    rows = [{"prompt": text} for text in ["a", "b", "a", "c", "b", "a"]]
    assert len(source(tmp_path, *rows)) == 6
    unique = source(tmp_path, *rows, unique_prompts=True)
    assert [row.messages[0].content for row in conversations(unique)] == ["a", "b", "c"]


def test_a_prompt_is_all_that_stands_before_the_answer(tmp_path: Path) -> None:
    first = {"role": "user", "content": "a"}
    then = [{"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    rows = [
        {"messages": [first, {"role": "assistant", "content": "one"}]},
        {"messages": [first, {"role": "assistant", "content": "another answer"}]},
        {"messages": [first, *then]},
        {"messages": [{"role": "system", "content": "s"}, first]},
        {"messages": [first], "tools": [{"name": "f"}]},
        {"messages": [first, *then, {"role": "assistant", "content": "d"}]},
        {"prompt": "a"},
    ]
    unique = source(tmp_path, *rows, unique_prompts=True)
    assert [unique[i].row for i in range(len(unique))] == [0, 2, 3, 4]


def test_distinct_prompts_are_told_among_rows_at_fault(tmp_path: Path) -> None:
    rows = [{"prompt": "a"}, {"other": "?"}, {"prompt": "a"}, 7, {"prompt": "b"}]
    found = source(tmp_path, *rows, unique_prompts=True)
    kept = [found[i] for i in range(len(found))]
    # A row at fault is kept, to be counted where it is drawn.
    assert [item.row for item in kept] == [0, 1, 3, 4]
    assert [isinstance(item, BadRow) for item in kept] == [False, True, True, False]


def test_a_budget_takes_the_first_rows(tmp_path: Path) -> None:
    few = source(tmp_path, *({"prompt": str(n)} for n in range(10)))
    few.keep_first(3)
    assert [row.messages[0].content for row in conversations(few)] == ["0", "1", "2"]


def test_the_source_names_the_category_unless_it_names_a_column(tmp_path: Path) -> None:
    rows = [{"prompt": "x"}, {"prompt": "y", "category": "chat"}]
    found = source(tmp_path, *rows)
    assert [row.category for row in conversations(found)] == ["math", "math"]
    by_row = source(tmp_path, *rows, category_column="category")
    assert [row.category for row in conversations(by_row)] == ["math", "chat"]


# A value, and the category that it gives; "" stands for the source's own.
CATEGORIES = [
    ("algebra", "algebra"),
    ("zh/en", "zh/en"),
    ("数学 🧮", "数学 🧮"),
    (["science", "history"], "science+history"),
    (["science", None, ["deep"]], "science+deep"),
    ([], ""),
    (None, ""),
    ("", ""),
    (3, "3"),
    (0, "0"),
    (0.5, "0.5"),
    (True, "True"),
    ({"a": 1}, "{'a': 1}"),
    ("half \ud800", "half ?"),
]


@pytest.mark.parametrize(("value", "category"), CATEGORIES)
def test_a_category_of_any_type_is_text(value: Any, category: str, tmp_path: Path) -> None:
    found = source(tmp_path, {"prompt": "x", "topic": value}, category_column="topic")[0]
    assert isinstance(found, Conversation)
    assert found.category == (category or "math")


def test_labels_of_a_parquet_column_may_be_lists(tmp_path: Path) -> None:
    import datasets

    rows = [{"prompt": "x", "category": ["a", "b"]}, {"prompt": "y", "category": None}]
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "rows.parquet"))
    found = source_at(tmp_path / "rows.parquet", category_column="category")
    assert [row.category for row in conversations(found)] == ["a+b", "math"]


LANGUAGES = {
    "en": "en",
    "fil": "fil",
    "zh-Hans": "zh-Hans",
    "pt_BR": "pt_BR",
    "zh-Hans-CN": "zh-Hans-CN",
    "eng_Latn": "eng_Latn",
    " de ": "de",
    "python": "",
    "English": "",
    "c++": "",
    "": "",
    "en fr": "",
}


@pytest.mark.parametrize(("value", "language"), LANGUAGES.items())
def test_only_the_code_of_a_language_is_one(value: str, language: str, tmp_path: Path) -> None:
    found = source(tmp_path, {"prompt": "x", "language": value, "category": "humaneval"})[0]
    assert isinstance(found, Conversation)
    assert found.language == language
    groups = [f"language_{language}"] if language else []
    assert prompt_groups(found.category, found.language) == ["category_math", *groups]


def test_a_row_without_a_language_is_in_no_group_of_one(tmp_path: Path) -> None:
    rows = [{"prompt": "x"}, {"prompt": "x", "language": None}, {"prompt": "x", "language": 3}]
    found = source(tmp_path, *rows)
    assert {prompt_groups(row.category, row.language)[-1] for row in conversations(found)} == {
        "category_math"
    }
    named = source(tmp_path, {"prompt": "x", "lang": "de"}, columns={"language": "lang"})
    assert conversations(named)[0].language == "de"


@pytest.mark.parametrize("value", ["exact", ["exact"], 3])
def test_a_verifier_that_is_no_object_is_a_name(value: Any, tmp_path: Path) -> None:
    found = source(tmp_path, {"prompt": "x", "verifier": value})[0]
    assert isinstance(found, Conversation)
    assert found.verifier == {"name": "3" if value == 3 else "exact"}
