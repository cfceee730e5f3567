"""Rows of every shape on the card become conversations; answers become a score."""

import json
from pathlib import Path
from typing import Any

import pytest

from marco_train.config.data import SourceConfig, SourceKind
from marco_train.data.sources import Source, read_messages
from marco_train.evaluation.accuracy import accuracy_by_category
from marco_train.types import Message
from tests.ranks import run_on_ranks

# The columns of the datasets that the card names, with made-up content.
SHAPES: dict[str, dict[str, Any]] = {
    "messages": {
        "id": "0",
        "messages": [
            {"content": "Hi", "function_calls": None, "functions": None, "role": "user"},
            {"content": "Hello!", "function_calls": None, "functions": None, "role": "assistant"},
        ],
        "source_dataset": "fixture",
    },
    "responses api": {
        "id": 1,
        "prompt": "Hi",
        "responses_create_params": {"input": [{"role": "user", "content": "Hi"}], "tools": []},
    },
    "responses api, plain text": {"responses_create_params": {"input": "Hi"}},
    "prompt": {
        "data_source": "math",
        "prompt": [{"content": "Hi", "role": "user"}],
        "reward_model": {"ground_truth": "2", "style": "rule"},
    },
    "plain text": {"prompt": "Hi"},
}


@pytest.mark.parametrize("row", SHAPES.values(), ids=SHAPES.keys())
def test_every_shape_of_row_is_read(row: dict[str, Any]) -> None:
    messages = read_messages(row)
    assert messages[0] == Message("user", "Hi")


def source(tmp_path: Path, rows: list[dict[str, Any]], **changes: Any) -> Source:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    fields = {"kind": SourceKind.jsonl, "path": str(file), "category": "math", "weight": 1.0}
    return Source("fixture", SourceConfig(**(fields | changes)))


def test_a_repeated_prompt_counts_once_where_asked(tmp_path: Path) -> None:
    rows = [{"prompt": text} for text in ["a", "b", "a", "c", "b", "a"]]
    assert len(source(tmp_path, rows)) == 6
    unique = source(tmp_path, rows, unique_prompts=True)
    assert [unique[i].messages[0].content for i in range(len(unique))] == ["a", "b", "c"]


def test_a_budget_takes_the_first_rows(tmp_path: Path) -> None:
    few = source(tmp_path, [{"prompt": str(n)} for n in range(10)])
    few.keep_first(3)
    assert [few[i].messages[0].content for i in range(len(few))] == ["0", "1", "2"]


def test_the_row_names_its_category_before_the_source_does(tmp_path: Path) -> None:
    found = source(tmp_path, [{"prompt": "x"}, {"prompt": "y", "category": "alignment"}])
    assert [found[i].category for i in range(2)] == ["math", "alignment"]


def test_parquet_and_jsonl_give_the_same_conversations(tmp_path: Path) -> None:
    import datasets

    rows = [{"messages": [{"role": "user", "content": f"{n}"}]} for n in range(3)]
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "rows.parquet"))
    parquet = source(tmp_path, rows, kind=SourceKind.parquet, path=str(tmp_path / "rows.parquet"))
    jsonl = source(tmp_path, rows)
    assert [parquet[i].messages for i in range(3)] == [jsonl[i].messages for i in range(3)]


def grades_of_rank() -> dict[str, float]:
    import torch.distributed as dist

    mine = [[("a", True), ("a", True), ("b", False)], [("a", False)]][dist.get_rank()]
    return accuracy_by_category(mine)


def test_accuracy_weighs_every_answer_of_every_rank_alike() -> None:
    expected = {"a": pytest.approx(100 * 2 / 3), "all": pytest.approx(50.0), "b": 0.0}
    assert run_on_ranks(2, grades_of_rank) == [expected, expected]
