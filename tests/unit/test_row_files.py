"""Files as people have them become rows; a broken line is one row, not the end."""

import gzip
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from marco_train.config.data import SourceConfig, SourceKind
from marco_train.data.conversations import BadRow, Source
from marco_train.data.sources import open_rows
from marco_train.data.turns import RowError
from marco_train.errors import InputError
from marco_train.types import Conversation
from tests.helpers.rows import conversations, source_at


def said(found: Source) -> list[str]:
    """The first turn of each row; of a row at fault, its kind."""
    rows = [found[i] for i in range(len(found))]
    chats = {row.row: row.messages[0].content for row in rows if isinstance(row, Conversation)}
    return [row.kind if isinstance(row, BadRow) else chats[row.row] for row in rows]


def lines(*texts: str) -> bytes:
    return "".join(json.dumps({"prompt": text}) + "\n" for text in texts).encode()


def zstd(content: bytes) -> bytes:
    return bytes(pa.Codec("zstd").compress(content))


def array(*texts: str, **how: Any) -> bytes:
    return json.dumps([{"prompt": text} for text in texts], **how).encode()


BOM = b"\xef\xbb\xbf"
# What stands in a file, whatever its name.
CONTENTS = {
    "lines": lines("a", "b"),
    "no line break at the end": lines("a", "b")[:-1],
    "a byte order mark": BOM + lines("a", "b"),
    "a byte order mark in each line, of files joined": BOM + lines("a") + BOM + lines("b"),
    "line ends of Windows": lines("a", "b").replace(b"\n", b"\r\n"),
    "blank lines": b"\n" + lines("a") + b"\n  \n\r\n\t\n" + lines("b") + b"\n\n",
    "lines that begin with a space": b" " + lines("a") + b"\t" + lines("b"),
    "gzip": gzip.compress(lines("a", "b")),
    "two files of gzip joined": gzip.compress(lines("a")) + gzip.compress(lines("b")),
    "zstd": zstd(lines("a", "b")),
    "two files of zstd joined": zstd(lines("a")) + zstd(lines("b")),
    "an array": array("a", "b"),
    "an array over lines": array("a", "b", indent=1),
    "an array behind a byte order mark and a break": BOM + b"\r\n" + array("a", "b"),
    "an array in gzip": gzip.compress(array("a", "b")),
}


@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS.keys())
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json.gz", "rows"])
def test_a_file_is_read_by_what_it_holds(content: bytes, name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    assert said(source_at(tmp_path / name)) == ["a", "b"]


def test_packed_and_plain_are_the_same_rows(tmp_path: Path) -> None:
    digests = set()
    for name, content in CONTENTS.items():
        if name in ("lines", "gzip", "zstd", "two files of gzip joined"):
            (tmp_path / name).write_bytes(content)
            digests.add(source_at(tmp_path / name).fingerprint)
    assert len(digests) == 1


# Lines of a file, and what its rows are.
BROKEN = {
    "latin-1": (lines("a") + '{"prompt": "café"}\n'.encode("latin-1"), ["a", "not UTF-8"]),
    "a bad byte in the first line": (b'{"prompt": "\xff"}\n' + lines("b"), ["not UTF-8", "b"]),
    "a bad byte behind the mark": (BOM + b'{"prompt": "\xe9"}\n', ["not UTF-8"]),
    "half a surrogate pair in bytes": (b'{"prompt": "\xed\xa0\x80"}\n', ["not UTF-8"]),
    "the last line cut off": (lines("a", "b")[:-5], ["a", "not JSON"]),
    "the last line cut within a character": (
        lines("a") + '{"prompt": "é'.encode()[:-1],
        ["a", "not UTF-8"],
    ),
    "two rows in a line": (lines("a")[:-1] + lines("b"), ["not JSON"]),
    "a comma behind a row": (lines("a")[:-1] + b",\n", ["not JSON"]),
    "an array cut off": (array("a", "b")[:-1], ["a", "b", "not JSON"]),
    "a line that is an array": (b"[1]\n" + lines("b"), ["no object", "b"]),
    "bytes of nothing": (lines("a") + b"\x00\x00\n", ["a", "not JSON"]),
}


@pytest.mark.parametrize(("content", "rows"), BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_line_is_one_row_at_fault(content: bytes, rows: list[str], tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(content)
    found = source_at(file)
    assert said(found) == rows


def test_a_row_at_fault_names_file_line_and_byte(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b"\n" + lines("a") + b"\n" + '{"prompt": "café"}\n{'.encode("latin-1"))
    found = source_at(file)
    _, latin, cut = (found[i] for i in range(3))
    assert isinstance(latin, BadRow) and isinstance(cut, BadRow)
    assert latin.row == 1
    assert latin.reason.startswith(f"{file}, line 4: not UTF-8 (")
    assert latin.reason.endswith(", byte 0xe9; save the file as UTF-8)")
    assert cut.reason.startswith(f"{file}, line 5: not JSON (")


@pytest.mark.parametrize("content", ['{\n "data": [\n  1]\n}\n', '{\n "a": 1\n}\n{\n "a": 2\n}\n'])
def test_an_object_over_several_lines_is_told_from_a_line_that_is_broken(
    content: str, tmp_path: Path
) -> None:
    file = tmp_path / "rows.json"
    file.write_text(content)
    first = source_at(file)[0]
    assert isinstance(first, BadRow)
    assert first.reason == (
        f"{file}, line 1: not JSON (an object over several lines: write each row in one, or all as "
        "an array)"
    )
    file.write_text('{"a": 1} {"a": 2}\n')
    twice = source_at(file)[0]
    assert isinstance(twice, BadRow) and "Extra data" in twice.reason


def all_of(rows: Any) -> list[Any]:
    return [row if isinstance(row, dict) else type(row).__name__ for row in rows]


def test_rows_are_the_same_in_order_and_one_by_one(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(*map(str, range(1203))) + b"{\n")
    parquet(tmp_path / "b.parquet", *map(str, range(1203)))
    cfg = SourceConfig(path=str(tmp_path), category="c", weight=1.0)
    rows = open_rows("fixture", cfg)
    assert len(rows) == 2407
    one_by_one = []
    for i in range(len(rows)):
        try:
            one_by_one.append(rows[i])
        except ValueError:
            one_by_one.append("RowError")
    assert all_of(rows.walk({"prompt", "messages"})) == one_by_one
    assert one_by_one[1203] == "RowError"


@pytest.mark.parametrize("kind", ["gzip", "zstd"])
def test_a_packed_file_that_is_cut_off_is_refused(kind: str, tmp_path: Path) -> None:
    content = CONTENTS[kind]
    for cut in (9, len(content) // 2):
        (tmp_path / "rows.jsonl").write_bytes(content[:-cut])
        with pytest.raises(InputError, match=rf"rows.jsonl is no whole {kind} file .*fetch it"):
            source_at(tmp_path / "rows.jsonl")


EMPTY = {"nothing": b"", "breaks": b"\n\n", "gzip": gzip.compress(b""), "zstd": zstd(b"")}


@pytest.mark.parametrize("content", EMPTY.values(), ids=EMPTY.keys())
def test_a_file_of_no_rows_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(content)
    with pytest.raises(InputError, match=r"source 'fixture' .* has no rows"):
        source_at(tmp_path / "rows.jsonl")


def parquet(path: Path, *texts: str) -> Path:
    import datasets

    rows = [{"messages": [{"role": "user", "content": text}]} for text in texts]
    datasets.Dataset.from_list(rows).to_parquet(str(path))
    return path


def test_text_of_other_bytes_in_a_table_is_one_row_at_fault(tmp_path: Path) -> None:
    ends = pa.py_buffer(np.array([0, 1, 5, 6], np.int32))
    prompts = pa.Array.from_buffers(pa.string(), 3, [None, ends, pa.py_buffer(b"acaf\xe9b")])
    table = pa.table({"prompt": prompts, "answer": ["x", "y", "z"]})
    pq.write_table(table, tmp_path / "rows.parquet")
    found = source_at(tmp_path / "rows.parquet")
    assert said(found) == ["a", "not UTF-8", "b"]
    bad = found[1]
    assert isinstance(bad, BadRow)
    assert bad.reason.startswith("the column prompt: not UTF-8 ('utf-8' codec can't decode byte")
    assert bad.begins == "{'answer': 'y'}"
    rows = open_rows("fixture", SourceConfig(path=str(tmp_path / "rows.parquet")))
    asked, fault, other = rows.walk({"prompt", "answer"})
    assert (asked["prompt"], other["prompt"]) == ("a", "b")
    assert isinstance(fault, RowError)


def test_a_table_of_no_rows_is_refused_by_itself_and_passed_over_among_others(
    tmp_path: Path,
) -> None:
    none = pa.table({"prompt": pa.array([], pa.string())})
    pq.write_table(none, tmp_path / "train-0.parquet")
    with pytest.raises(InputError, match=r"source 'fixture' .* has no rows"):
        source_at(tmp_path / "train-0.parquet")
    parquet(tmp_path / "train-1.parquet", "a")
    assert said(source_at(tmp_path)) == ["a"]
    rows = open_rows("fixture", SourceConfig(path=str(tmp_path)))
    assert len(list(rows.walk({"messages"}))) == 1


def shards(directory: Path) -> None:
    """Files of a dataset, and what lies beside them."""
    (directory / "data" / "deep").mkdir(parents=True)
    (directory / "data" / "train-1.jsonl").write_bytes(lines("b", "c"))
    (directory / "data" / "train-0.jsonl.gz").write_bytes(gzip.compress(lines("a")))
    (directory / "data" / "train-2.json.zst").write_bytes(zstd(array("d")))
    parquet(directory / "data" / "deep" / "train-3.parquet", "e")
    (directory / "README.md").write_text("# Rows\n")
    (directory / "dataset_info.json").write_text("{}")
    (directory / "data" / ".train-9.jsonl").write_text("a file that is being written")
    (directory / "data" / "_SUCCESS").write_text("")


WHERE = {
    "": ["e", "a", "b", "c", "d"],  # in the order of their paths
    "data/train-*": ["a", "b", "c", "d"],
    "data/*.jsonl": ["b", "c"],
    "**/*.parquet": ["e"],
    "data/train-[12]*": ["b", "c", "d"],
}


@pytest.mark.parametrize(("path", "rows"), WHERE.items())
def test_directories_and_patterns_of_files_are_read_in_order(
    path: str, rows: list[str], tmp_path: Path
) -> None:
    shards(tmp_path)
    for kind in (SourceKind.auto, SourceKind.jsonl):
        assert said(source_at(tmp_path / path, kind=kind)) == rows


def test_nothing_of_a_pattern_is_refused(tmp_path: Path) -> None:
    shards(tmp_path)
    with pytest.raises(InputError, match=r"there is no file '.*absent-\*.jsonl'"):
        source_at(tmp_path / "absent-*.jsonl")


def test_files_of_different_columns_are_one_source(tmp_path: Path) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    asked = {"role": "user", "content": "a"}
    one = {"messages": [asked, {"role": "assistant", "content": "b"}]}
    other = {
        "messages": [asked, {"role": "assistant", "content": "", "tool_calls": [call]}],
        "tools": [{"name": "f"}],
    }
    (tmp_path / "train-0.jsonl").write_text(json.dumps(one) + "\n")
    (tmp_path / "train-1.jsonl").write_text(json.dumps(other) + "\n")
    parquet(tmp_path / "train-2.parquet", "c")
    found = source_at(tmp_path)
    assert said(found) == ["a", "a", "c"]
    called = conversations(found)[1]
    assert called.messages[1].tool_calls[0]["function"]["name"] == "f"
    assert called.tools[0]["function"] == {"name": "f"}


def test_columns_that_null_fills_up_are_read_from_parquet(tmp_path: Path) -> None:
    import datasets

    asked = [{"role": "user", "content": "b"}]
    rows = [
        {"prompt": "a", "messages": [], "responses_create_params": None},
        {"prompt": None, "messages": None, "responses_create_params": {"input": asked}},
        {"prompt": None, "messages": None, "responses_create_params": None},
    ]
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "rows.parquet"))
    assert said(source_at(tmp_path / "rows.parquet")) == ["a", "b", "empty chat"]


def test_a_dataset_that_was_saved_to_disk_is_read(tmp_path: Path) -> None:
    import datasets

    rows = datasets.Dataset.from_list([{"prompt": str(n)} for n in range(4)])
    rows.save_to_disk(str(tmp_path / "saved"), num_shards=2)
    assert said(source_at(tmp_path / "saved")) == ["0", "1", "2", "3"]


def test_parquet_and_jsonl_give_the_same_conversations(tmp_path: Path) -> None:
    parquet(tmp_path / "rows.parquet", "0", "1", "2")
    (tmp_path / "rows.jsonl").write_bytes(lines("0", "1", "2"))
    of_parquet, of_lines = (source_at(tmp_path / f"rows.{kind}") for kind in ("parquet", "jsonl"))
    assert said(of_parquet) == said(of_lines) == ["0", "1", "2"]


def make(path: Path, *texts: str) -> Path:
    if path.suffix == ".parquet":
        return parquet(path, *texts)
    path.write_bytes(lines(*texts))
    return path


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_a_file_is_known_by_its_content(kind: str, tmp_path: Path) -> None:
    def opened(path: Path) -> tuple[str, list[str]]:
        found = source_at(path)
        return found.fingerprint, said(found)

    file = make(tmp_path / f"rows.{kind}", "a", "b")
    os.utime(file, (1000, 1000))
    before = opened(file)
    os.utime(file, (2000, 2000))
    assert opened(file) == before
    shutil.copy(file, tmp_path / f"moved.{kind}")
    assert opened(tmp_path / f"moved.{kind}") == before
    # Other rows of as many bytes, under the time of the first.
    make(file, "c", "d")
    os.utime(file, (1000, 1000))
    after = opened(file)
    assert after[0] != before[0]
    assert after[1] == ["c", "d"]


def test_a_dataset_of_the_hub_is_known_by_what_its_rows_say(tmp_path: Path) -> None:
    def fingerprint(name: str) -> str:
        return source_at(tmp_path / name, kind=SourceKind.hub).fingerprint

    texts = [str(n) for n in range(2500)]
    for name in ("whole", "parts", "other"):
        (tmp_path / name).mkdir()
    parquet(tmp_path / "whole" / "train.parquet", *texts)
    parquet(tmp_path / "parts" / "train-0.parquet", *texts[:7])
    parquet(tmp_path / "parts" / "train-1.parquet", *texts[7:])
    parquet(tmp_path / "other" / "train.parquet", *texts[:-1], "2500")
    assert fingerprint("whole") == fingerprint("parts")
    assert fingerprint("whole") != fingerprint("other")


def test_a_dataset_that_is_a_program_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "rows.py").write_text("raise SystemExit('never run')\n")
    with pytest.raises(InputError, match="it is a program that makes rows, which is not run"):
        source_at(tmp_path / "rows")
