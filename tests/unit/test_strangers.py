"""Rows of other trainers and sets, whose meaning is easily missed."""

import json
from pathlib import Path
from typing import Any

import pytest

from marco_train.config.data import SourceConfig
from marco_train.data.formats import Format
from marco_train.data.sources import open_rows
from marco_train.data.turns import RowError, read_turns
from marco_train.errors import InputError
from marco_train.types import Message
from tests.helpers.rows import source

ASK = {"role": "user", "content": "Weather?"}
CALL = {"type": "function", "function": {"name": "w", "arguments": {"city": "Paris"}}}


def read(row: dict[str, Any]) -> tuple[str, list[tuple[str, str]]]:
    found = Format({}, {}).read(row)
    return found.shape, [(m.role, m.content) for m in found.messages]


RATED = {
    "a question beside": {"question": "2+2?", "chosen": "It is 4", "rejected": "5"},
    "an instruction beside": {"instruction": "2+2?", "chosen": "It is 4", "rejected": "5"},
    "one rated answer": {"prompt": "2+2?", "completion": "5", "label": False},
    "one that is liked": {"prompt": "2+2?", "completion": "4", "label": True},
}


@pytest.mark.parametrize("row", RATED.values(), ids=RATED.keys())
def test_the_question_of_rated_answers_is_asked(row: dict[str, Any]) -> None:
    shape, turns = read(row)
    assert shape == "preference"
    assert turns[0] == ("user", "2+2?")
    assert [role for role, _ in turns[1:]] in ([], ["assistant"])


def test_rated_texts_without_a_question_are_at_fault() -> None:
    with pytest.raises(RowError, match="chosen is text without a question"):
        read({"chosen": "Human: a\n\nAssistant: b", "rejected": "Human: a\n\nAssistant: c"})


HISTORIES = [
    [["2+2?", "4"]],
    [{"role": "user", "content": "2+2?"}, {"role": "gpt", "content": "4"}],
]


@pytest.mark.parametrize("history", HISTORIES, ids=["pairs", "turns"])
def test_a_history_stands_before_the_question(history: list[Any]) -> None:
    row = {"instruction": "And times 3?", "input": "", "output": "12", "history": history}
    said = [("user", "2+2?"), ("assistant", "4"), ("user", "And times 3?"), ("assistant", "12")]
    assert read(row)[1] == said
    assert read({"query": "And times 3?", "response": "12", "history": history})[1] == said


def test_a_context_belongs_to_the_question() -> None:
    row = {"question": "How many?", "context": "CREATE TABLE t", "answer": "SELECT 1"}
    assert read(row)[1] == [("user", "How many?\n\nCREATE TABLE t"), ("assistant", "SELECT 1")]


@pytest.mark.parametrize("key", ["arguments", "parameters", "args", "input"])
def test_arguments_of_a_call_go_by_many_names(key: str) -> None:
    turn = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"name": "w", key: {"city": "Paris"}}],
    }
    assert read_turns([ASK, turn], {})[1].tool_calls == (CALL,)


def test_calls_in_a_row_are_one_turn_with_the_words_before_them() -> None:
    said = {"role": "assistant", "content": "I look."}
    call = {
        "role": "tool_call",
        "content": json.dumps({"name": "w", "arguments": {"city": "Paris"}}),
    }
    (_, found) = read_turns([ASK, said, call, call], {})
    assert found == Message("assistant", "I look.", tool_calls=(CALL, CALL))


def test_a_call_is_no_part_of_an_answer_where_its_role_is_another() -> None:
    said = {"role": "assistant", "content": "I look."}
    found = read_turns([ASK, said, {"role": "tool_call", "content": "20"}], {"tool_call": "tool"})
    assert [(m.role, m.content) for m in found[1:]] == [("assistant", "I look."), ("tool", "20")]


def test_an_answer_is_not_learnt_where_its_call_is_exempt() -> None:
    call = {"role": "tool_call", "content": '{"name": "w", "arguments": {}}', "train": False}
    (_, found) = read_turns([ASK, {"role": "assistant", "content": "I look."}, call], {})
    assert not found.is_learnt


def test_a_label_of_a_text_rates_no_answer() -> None:
    assert read({"text": "A film.", "label": True})[0] == "text"


def test_thinking_before_a_call_is_thinking() -> None:
    call = json.dumps({"name": "w", "arguments": {"city": "Paris"}})
    turn = {"from": "function_call", "value": f"<think>\nplan\n</think>\n\n{call}"}
    (_, found) = read_turns([ASK, turn], {})
    assert found == Message("assistant", "", reasoning_content="plan", tool_calls=(CALL,))


@pytest.mark.parametrize("calls", ["f(x={1, 2})", "f(x=...)", "f(x=b'a')"])
def test_arguments_that_json_does_not_have_stay_as_text(calls: str) -> None:
    (_, found) = read_turns([ASK, {"role": "assistant", "function_calls": calls}], {})
    assert found.content == f"<tool_call>\n{calls}\n</tool_call>"


@pytest.mark.parametrize("arguments", ["{order_id: 5", "{'order_id': 5}", "Paris", " "])
def test_arguments_that_are_text_and_not_json_are_at_fault(arguments: str) -> None:
    call = {"type": "function", "function": {"name": "look", "arguments": arguments}}
    with pytest.raises(RowError, match="of a call of look are not JSON") as fault:
        read_turns([ASK, {"role": "assistant", "tool_calls": [call]}], {})
    assert fault.value.kind == "arguments of a call that are not JSON"


def test_a_turn_that_is_exempt_in_part_is_at_fault() -> None:
    part = {"begin_offset": 0, "end_offset": 3, "train": False}
    turn = {"role": "assistant", "content": "yes", "train_detail": [part]}
    with pytest.raises(RowError, match="learnt whole here, or not at all"):
        read_turns([ASK, turn], {})


def test_one_turn_of_a_tree_is_no_text() -> None:
    with pytest.raises(RowError, match="one turn of a conversation"):
        read({"text": "How do I?", "role": "prompter", "parent_id": None})


@pytest.mark.parametrize("mask", ["assistant_mask", "completion_mask"])
def test_masks_of_tokens_go_by_many_names(mask: str) -> None:
    assert Format({}, {}).read({"input_ids": [1, 2], mask: [0, 1]}).loss_mask == (False, True)
    with pytest.raises(RowError, match=f"{mask} holds other values than 0 and 1"):
        Format({}, {}).read({"input_ids": [1, 2], mask: ["0", "1"]})


def test_a_column_that_is_mapped_has_a_standard_name(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"columns names mesages; it maps one of .*messages"):
        source(tmp_path, {"chat": [ASK]}, columns={"mesages": "chat"})


def texts(path: Path, split: str = "train") -> list[str]:
    rows = open_rows("fixture", SourceConfig(path=str(path), split=split))
    return [rows[i]["prompt"] for i in range(len(rows))]


def put(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"prompt": text}) + "\n")


def test_of_a_directory_with_splits_one_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put(tmp_path / "data" / "train-00000-of-00002.jsonl", "a")
    put(tmp_path / "data" / "train-00001-of-00002.jsonl", "b")
    assert texts(tmp_path, "test") == ["a", "b"]  # there is no other
    put(tmp_path / "data" / "test-00000-of-00001.jsonl", "c")
    assert capsys.readouterr().out == ""
    assert texts(tmp_path) == ["a", "b"]
    assert "its split 'train' is read, and not test" in capsys.readouterr().out
    assert texts(tmp_path, "test") == ["c"]
    with pytest.raises(
        InputError, match=r"has the splits \['test', 'train'\], and none called 'dev'"
    ):
        texts(tmp_path, "dev")


def test_hidden_folders_caches_and_second_copies_are_no_rows(tmp_path: Path) -> None:
    import gzip

    put(tmp_path / "a.jsonl", "a")
    put(tmp_path / ".ipynb_checkpoints" / "a-checkpoint.jsonl", "old")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    (tmp_path / "README.md").write_text("# Rows\n")
    assert texts(tmp_path) == ["a"]
    assert texts(tmp_path / "*") == ["a", "a"]


def test_a_saved_dataset_is_read_by_its_splits(tmp_path: Path) -> None:
    import datasets

    splits = {name: datasets.Dataset.from_list([{"prompt": name}]) for name in ("train", "test")}
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "saved [1]"))
    assert texts(tmp_path / "saved [1]") == ["train"]
    assert texts(tmp_path / "saved [1]", "test") == ["test"]


@pytest.mark.parametrize(
    ("content", "says"), [(b"PK\x03\x04...", "a zip file"), ("x".encode("utf-16"), "UTF-16")]
)
def test_a_file_of_another_kind_is_refused(content: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(content)
    with pytest.raises(InputError, match=says):
        texts(tmp_path / "rows.jsonl")


def test_a_file_that_may_not_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read: "):
        open_rows("fixture", SourceConfig(path="/proc/1/mem"))


def test_images_are_a_fault_of_their_row_and_are_not_opened(tmp_path: Path) -> None:
    import datasets

    rows = {"prompt": ["x"], "image": [{"bytes": b"no image", "path": None}]}
    table = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    table.to_parquet(str(tmp_path / "rows.parquet"))
    found = open_rows("fixture", SourceConfig(path=str(tmp_path / "rows.parquet")))
    with pytest.raises(RowError, match="the row has image, and only text"):
        Format({}, {}).read(found[0])


def test_a_dataset_that_is_a_program_is_refused_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "nllb").mkdir()
    (tmp_path / "nllb" / "nllb.py").write_text("import datasets\n")
    with pytest.raises(InputError, match="is a program that makes rows, which is not run; fetch"):
        open_rows("fixture", SourceConfig(path=str(tmp_path / "nllb")))
