"""What a person runs first with rows of their own."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from marco_train.commands.inspect_data import main
from tests.helpers.processes import run_script
from tests.helpers.world import World

pytestmark = pytest.mark.slow

ASKED = {"role": "user", "content": "one?"}
ANSWERED = {"role": "assistant", "content": "yes"}
GOOD = {"messages": [ASKED, ANSWERED], "note": "kept", "answer": "a label"}


def inspected(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return run_script("inspect_data.py", *arguments, **environment)


def write(tmp_path: Path, *rows: Any) -> str:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def test_a_report_is_one_line_of_json(tmp_path: Path) -> None:
    empty = {"messages": [ASKED, {"role": "assistant", "content": " "}]}
    file = write(tmp_path, *[GOOD] * 5, {"messages": [{"role": "user", "content": None}]}, empty)
    done = inspected(file, "--json", "--samples", "1")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "shape": "messages",
        "rows": 7,
        "kept": 5,
        "quarantined": {"content that is not text": 1, "empty answer": 1},
        "duplicates": 4,
        "repeated_roles": 0,
        "ignored_columns": ["answer"],
        "samples": [
            {
                "row": 3,  # drawn, of the five that can be shown
                "text": "<|im_start|>user\none?<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n",
                "learnt": ["yes<|im_end|>"],
            }
        ],
    }
    assert done.stdout.count("\n") == 1


def test_rows_of_any_characters_are_one_line_on_a_terminal_of_few(tmp_path: Path) -> None:
    answer = "مرحبا 🇩🇪\u2028zwei\x85drei\r\nvier"
    file = write(tmp_path, {"messages": [ASKED, {"role": "assistant", "content": answer}]})
    done = inspected(file, "--json", PYTHONIOENCODING="latin1")
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()  # which ends a line at each of these
    assert json.loads(line)["samples"][0]["learnt"] == [f"{answer}<|im_end|>"]
    done = inspected(file, PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert "\\u0645" in done.stdout and "zwei" in done.stdout


def test_a_report_for_a_person_shows_lengths_and_marks_what_is_learnt(tmp_path: Path) -> None:
    done = inspected(write(tmp_path, *[GOOD] * 3))
    assert done.returncode == 0, done.stderr
    for part in ("shape    messages", "rows     3", "28 bytes", "»yes<|im_end|>«", "answer"):
        assert part in done.stdout, done.stdout


def test_names_of_columns_and_roles_are_given(tmp_path: Path) -> None:
    chat = [{"role": "asker", "content": "one?"}, {"role": "bot", "content": "yes"}]
    file = write(tmp_path, {"chat": chat})
    done = inspected(file, "--json")
    assert done.returncode == 1
    assert json.loads(done.stdout)["quarantined"] == {"unknown columns": 1}
    assert done.stderr.splitlines()[-1].startswith("error: source 'rows.jsonl': 1 of 1 rows are at")
    done = inspected(file, "--json", "--columns", "messages=chat", "--roles", "asker=user")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["samples"][0]["learnt"] == ["yes<|im_end|>"]


def test_prompts_are_shown_for_distillation(tmp_path: Path) -> None:
    file = write(tmp_path, {"prompt": "one?"})
    assert inspected(file).returncode == 1  # nothing to learn from
    done = inspected(file, "--stage", "opd", "--json")
    assert done.returncode == 0, done.stderr
    (sample,) = json.loads(done.stdout)["samples"]
    assert sample["text"] == "<|im_start|>user\none?<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("stage", ["sft", "opd"])
def test_a_tokenizer_of_ones_own_counts_its_tokens(
    stage: str, world: World, tmp_path: Path
) -> None:
    tokenizer = world.path("data", "tokenizer")
    done = inspected(write(tmp_path, GOOD), "--stage", stage, "--tokenizer", tokenizer)
    assert done.returncode == 0, done.stderr
    assert " tokens in the middle" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nowhere.jsonl"], "there is no file 'nowhere.jsonl'"),
        (
            ["{file}", "--tokenizer", "nowhere"],
            "no tokenizer.json in 'nowhere', which is no directory; one of",
        ),
        (["{file}", "--columns", "messages"], "is no list like name=value"),
        (["{file}", "--samples", "-1"], "--samples is -1, and must be 0 or more"),
        (["{file}", "--roles", "env=robot"], "must map it to one of system, user, assistant"),
    ],
)
def test_what_cannot_be_looked_at_is_a_sentence(
    arguments: list[str], says: str, tmp_path: Path
) -> None:
    file = write(tmp_path, GOOD)
    done = inspected(*(argument.format(file=file) for argument in arguments))
    assert done.returncode != 0
    assert says in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("stage", "more", "limit"),
    [("sft", [], 40), ("opd", [], 20), ("sft", ["--max-length", "30"], 30)],
)
def test_rows_over_the_positions_of_the_model_beside_the_tokenizer_are_not_used(
    stage: str,
    more: list[str],
    limit: int,
    world: World,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = tmp_path / "model"
    shutil.copytree(world.path("data", "tokenizer"), model)
    shape = {"model_type": "qwen3", "max_position_embeddings": 40}
    (model / "config.json").write_text(json.dumps(shape))
    long = {"messages": [{"role": "user", "content": "one? " * 40}, ANSWERED]}
    file = write(tmp_path, *[GOOD] * 3, long)
    main([file, "--stage", stage, "--tokenizer", str(model), *more])
    said = capsys.readouterr().out
    assert "rows     4, of which 3 would be used" in said
    assert f"1 not used: too long over --max-length={limit}\n" in said


def test_advice_is_of_options_that_are_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([write(tmp_path, {"chat": [ASKED, ANSWERED]})])
    said = str(ended.value)
    assert said.endswith(
        "mend the rows, say with --columns and --roles (in a run data.sources.own.columns and "
        ".roles) how they are to be read, or raise the run's data.max_bad_rows"
    )
    mapped = "--columns messages=<own name> (in a run data.sources.own.columns.messages=<own name>)"
    assert mapped in said
    main([write(tmp_path, *[GOOD] * 3, {"chat": [ASKED, ANSWERED]})])
    assert mapped in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        main([write(tmp_path, {"prompt": "one?"})])
    assert (
        "name the column of the answer with --columns response=<own name> (in a run "
        "data.sources.own.columns.response), or raise the run's data.max_lost_rows"
    ) in str(ended.value)


def test_a_column_that_is_not_read_is_named_and_a_context_beside_a_question_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path, {"question": "one?", "context": "two.", "response": "yes"})
    main([file])
    said = capsys.readouterr().out
    assert "one?\n\ntwo." in said and "not read" not in said
    main([file, "--columns", "prompt=question"])
    assert "not read context: columns that hold something\n" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["rows.csv", "rows.TSV", "rows.csv.gz"])
def test_a_file_of_csv_is_named_as_what_it_is(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("prompt,response\none?,yes\n")
    with pytest.raises(SystemExit, match=r"CSV is not read: .*, with datasets.Dataset.from_csv"):
        main([str(tmp_path / name)])


def test_rows_shown_are_of_every_kind_of_a_periodic_file_and_the_same_at_every_launch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path, *[{"prompt": f"{n}?", "completion": f"of {n % 2}"} for n in range(100)])
    main([file, "--samples", "10"])
    said = capsys.readouterr().out
    assert "»of 0<|im_end|>«" in said and "»of 1<|im_end|>«" in said
    main([file, "--samples", "10"])
    assert capsys.readouterr().out == said
    main([file, "--samples", "200"])
    assert capsys.readouterr().out.count("--- row ") == 100


def test_repeated_rows_and_two_turns_of_one_role_in_a_row_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    called = {"role": "tool", "content": "3"}
    twice = {"messages": [ASKED, ASKED, ANSWERED]}
    tools = {"messages": [ASKED, ANSWERED, called, called, ANSWERED]}
    file = write(tmp_path, GOOD, twice, tools, GOOD, twice, GOOD)
    main([file])
    said = capsys.readouterr().out
    assert "repeated 3 rows say what an earlier one says, in all columns\n" in said
    assert "turns    2 chats have two turns of one role in a row\n" in said
