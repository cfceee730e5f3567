"""Rows of one's own: what is asked of them, how answers are judged, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from marco_train.config.benchmark import OwnRowsConfig, SuiteConfig
from marco_train.config.compose import read_run
from marco_train.errors import InputError
from marco_train.evaluation.benchmark.grading import Graded, grade
from marco_train.evaluation.benchmark.harness import load_tasks
from marco_train.evaluation.benchmark.own import load

GSM8K = {
    "question": "Natalia sold 48 clips in April, and half as many in May. How many in all?",
    "answer": "In May she sold 48/2 = <<48/2=24>>24.\nIn all 72, of 2 months.\n#### 72",
}
CAPITAL = {"question": "What is the capital of Peru?", "answer": "Lima"}
SCHEMA = {"type": "object", "required": ["name"], "properties": {"name": {"type": "string"}}}


def rows_of(path: Path, *rows: Any) -> Path:
    file = path / "my.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def items_of(path: Path, *rows: Any, **own: Any) -> list[dict[str, Any]]:
    return load(own={"path": str(rows_of(path, *rows)), **own})["test"]


def graded(path: Path, row: dict[str, Any], responses: list[str], **own: Any) -> Graded:
    (item,) = items_of(path, row, **own)
    return grade(item, responses)


def test_rows_of_gsm8k_are_asked_as_they_are(tmp_path: Path) -> None:
    (item,) = items_of(tmp_path, GSM8K)
    assert item["gold"] == "72"
    asked = "\n\nThink step by step. Then put your final answer into \\boxed{}."
    assert item["prompt"] == GSM8K["question"] + asked
    assert item["id"] == "und/own/0"
    found = grade(item, [r"\boxed{72}", "So it is 72.0", "#### 72", "72 or 73", "none"])
    assert found.right == (True, True, True, False, False)
    assert found.answers[-1] is None


PERU = {"question": "Capital of Peru?", "options": ["Quito", "Lima", "La Paz"]}


@pytest.mark.parametrize("answer", [1, "B", "(b)", "Lima"])
def test_a_choice_is_named_by_its_place_its_letter_or_its_text(tmp_path: Path, answer: Any) -> None:
    row = PERU | {"answer": answer}
    (item,) = items_of(tmp_path, row, verifier="choice", choices="options")
    assert item["prompt"].startswith("Capital of Peru?\nA. Quito\nB. Lima\nC. La Paz\n\nThink")
    found = grade(item, [r"\boxed{B}", "Answer: B", r"\boxed{Lima}", r"\boxed{A}", r"\boxed{D}"])
    assert found.right == (True, True, True, False, False)


def test_choices_may_stand_in_the_question(tmp_path: Path) -> None:
    row = {"question": "Capital of Peru?\n(A) Quito\n(B) Lima", "answer": "B"}
    found = graded(tmp_path, row, ["Answer: B", r"\boxed{A}", "Lima"], verifier="choice")
    assert found.right == (True, False, False)
    assert found.answers == ("B", "A", None)


def test_a_text_has_to_be_the_reference(tmp_path: Path) -> None:
    said = ["Lima", " Lima\n", "<think>Quito?</think>Lima", r"It is \boxed{Lima}", "lima", ""]
    found = graded(tmp_path, CAPITAL, said, verifier="exact")
    assert found.right == (True, True, True, True, False, False)


def test_a_pattern_has_to_be_found(tmp_path: Path) -> None:
    row = {"question": "Name a year of the nineties.", "answer": r"\b199\d\b"}
    found = graded(
        tmp_path, row, ["It is 1994.", "1894", "<think>1991</think>No"], verifier="regex"
    )
    assert found.right == (True, False, False)
    (item,) = items_of(tmp_path, row, verifier="regex")
    assert item["prompt"] == row["question"]


def test_formulas_are_compared_as_such(tmp_path: Path) -> None:
    row = {"question": "Half of 3?", "answer": r"Thus \boxed{\frac{3}{2}}"}
    found = graded(
        tmp_path, row, [r"\boxed{1.5}", r"\boxed{\frac{6}{4}}", r"\boxed{3}"], verifier="math"
    )
    assert found.right == (True, True, False)


def test_json_has_to_satisfy_the_schema_of_its_row(tmp_path: Path) -> None:
    row = {"question": "Who?", "answer": SCHEMA}
    good = '{"name": "Ada"}'
    said = [good, f"Here it is:\n```json\n{good}\n```", '{"name": 1}', "no JSON", "[" * 10_000]
    assert graded(tmp_path, row, said, verifier="json_schema").right == (
        *(True, True),
        *(False, False, False),
    )
    as_text = row | {"answer": json.dumps(SCHEMA)}
    assert graded(tmp_path, as_text, [good], verifier="json_schema").right == (True,)


def test_a_schema_reaches_nothing_else_and_what_it_raises_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "any.json").write_text("{}")
    row = {"question": "Who?", "answer": {"$ref": (tmp_path / "any.json").as_uri()}}
    found = graded(tmp_path, row, ["{}"], verifier="json_schema")
    assert found.right == (False,)
    assert "Unresolvable" in found.errors[0]


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module of the working directory, with verifiers."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_verifiers.py").write_text(
        "def longer(response, reference):\n"
        "    return len(response) > reference['length']\n"
        "def raises(response, reference):\n"
        "    raise KeyError('no such word')\n"
        "def scores(response, reference):\n"
        "    return 0.5\n"
        "constant = 3\n"
    )


@pytest.mark.usefixtures("own_module")
def test_a_function_gets_the_response_and_the_reference_as_it_stands(tmp_path: Path) -> None:
    row = {"question": "Say much.", "answer": {"length": 3}}
    longer = "python:my_verifiers.longer"
    found = graded(tmp_path, row, ["four", "two", "<think>long</think>no"], verifier=longer)
    assert found.right == (True, False, False)


@pytest.mark.usefixtures("own_module")
@pytest.mark.parametrize(
    ("name", "said"),
    [("raises", "KeyError: 'no such word'"), ("scores", "answers '0.5', and neither true nor")],
)
def test_a_function_that_raises_is_counted(tmp_path: Path, name: str, said: str) -> None:
    found = graded(tmp_path, CAPITAL, ["Lima", "x"], verifier=f"python:my_verifiers.{name}")
    assert found.right == (False, False)
    assert [error.startswith(said) for error in found.errors] == [True, True]


@pytest.mark.usefixtures("own_module")
@pytest.mark.parametrize(
    ("own", "said"),
    [
        ({"path": None}, "suite is own, and no rows are named: give own.path=<file>"),
        ({"path": "none.jsonl"}, "there is no file 'none.jsonl'"),
        ({"verifier": "numbr"}, "own.verifier is 'numbr': did you mean number"),
        ({"verifier": "python:longer"}, "own.verifier is 'python:longer': Known are number"),
        ({"verifier": "python:none.such"}, "it cannot be imported: ModuleNotFoundError"),
        ({"verifier": "python:my_verifiers.none"}, "it cannot be imported: AttributeError"),
        ({"verifier": "python:my_verifiers.constant"}, "which is no function: 3"),
        ({"question": "questoin"}, "no column 'questoin', and has question, answer; did you mean"),
        ({"choices": "options"}, "choices are for own.verifier=choice"),
        ({"prompt": "Answer."}, "own.prompt has no {{question}} in it"),
        ({"verifier": "choice"}, "row 0 has an answer that names no choice: 'Lima' of A, B"),
    ],
)
def test_what_cannot_be_asked_is_refused(tmp_path: Path, own: dict[str, Any], said: str) -> None:
    file = rows_of(tmp_path, CAPITAL)
    with pytest.raises(InputError) as refused:
        load(own={"path": str(file), **own})
    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["stage.suite=own"], "no rows are named: give own.path=<file>"),
        (["stage.suite=own", "stage.own.path=x", "stage.own.verifier=maths"], "did you mean math?"),
        (["stage.suite=card", "stage.greedy=true", "stage.responses_per_prompt=8"], "are all the"),
        (["stage.suite=card", "stage.max_items=0"], "stage.max_items is 0"),
    ],
)
def test_a_run_is_refused_before_anything_is_loaded(words: list[str], said: str) -> None:
    with pytest.raises(InputError) as refused:
        read_run(["experiment=benchmark", "model.path=x", *words])
    assert said in str(refused.value)


def test_a_few_rows_without_an_answer_are_left_out_and_counted(tmp_path: Path) -> None:
    rows = [GSM8K, {"question": "?", "answer": ""}, {"question": "?"}, "text", GSM8K]
    items = items_of(tmp_path, *rows)
    assert [item["id"] for item in items] == ["und/own/0", "und/own/4"]
    assert items.num_faulty == 3  # type: ignore[attr-defined]
    assert items.left_out == (  # type: ignore[attr-defined]
        "3 of 5 rows left out: 1 as row 1 has no answer; 1 as row 2 has no column 'answer'; "
        "1 as row 3 is no object with columns"
    )
    with pytest.raises(InputError, match=r"11 of 12 rows cannot be asked, as \['row 1 has no ans"):
        items_of(tmp_path, GSM8K, *rows[1:2] * 11)


def test_why_rows_are_left_out_is_said_by_reason_with_the_first(tmp_path: Path) -> None:
    words = [GSM8K | {"answer": word} for word in ("four", "five")]
    rows = [GSM8K, *words, GSM8K | {"answer": None}, GSM8K | {"question": ["a", "b"]}]
    own = {"path": str(rows_of(tmp_path, *rows))}
    said = (
        "4 of 5 rows left out: 2 as row 1 has no number in its answer 'four'; "
        "1 as row 3 has no answer; 1 as row 4 has no text in question, but a list or an object"
    )
    items = load(own=own, max_items=1)["test"]
    assert (len(items), items.left_out) == (1, said)
    assert load(own={"path": str(rows_of(tmp_path, GSM8K))})["test"].left_out == ""


def test_rows_may_have_languages_and_a_prompt_of_their_own(tmp_path: Path) -> None:
    rows = [GSM8K | {"lang": code} for code in ("de", "fr", "de")]
    own = {"path": str(rows_of(tmp_path, *rows)), "language": "lang", "prompt": "Q: {{question}}"}
    items = load(own=own, languages=["de"])["test"]
    assert [(item["id"], item["language"]) for item in items] == [
        ("de/own/0", "de"),
        ("de/own/2", "de"),
    ]
    assert items[0]["prompt"] == f"Q: {GSM8K['question']}"


def test_lm_eval_takes_the_rows_as_a_task_of_n_responses_or_one_greedy(tmp_path: Path) -> None:
    own = OwnRowsConfig(path=str(rows_of(tmp_path, *[GSM8K] * 5)))
    (task,) = load_tasks("own", SuiteConfig(own=own, responses_per_prompt=3, max_items=2))
    assert (task.num_responses, len(task.items)) == (3, 2)
    (task,) = load_tasks("own", SuiteConfig(own=own, greedy=True))
    assert (task.num_responses, len(task.items)) == (1, 5)
