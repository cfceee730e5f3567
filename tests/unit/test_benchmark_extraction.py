"""What answers of many shapes and scripts are read as."""

import time
from pathlib import Path

import pytest

from marco_train.evaluation.benchmark.extraction import (
    boxed,
    formula_of,
    letter_of,
    number_of,
    plain_number,
    translation_of,
)
from marco_train.evaluation.benchmark.grading import answer_of, grade, is_right
from marco_train.evaluation.benchmark.judge import Judge, VerifierError
from marco_train.evaluation.benchmark.tasks import Kind

CITIES = ["Paris", "Rome", "Bonn", "Oslo"]
# A response, and the letter that it names among four choices.
LETTERS = [
    (r"So it is Bonn. \boxed{C}", "C"),
    (r"\boxed{\text{C}}", "C"),
    (r"\boxed{\textbf{(B)}}", "B"),
    (r"\boxed{\mathrm{d}}", "D"),
    (r"First \boxed{A}, but no: \boxed{B}", "B"),  # of two boxes the last
    (r"\boxed{C. Bonn}", "C"),
    (r"\boxed{Oslo}", "D"),  # by its text
    (r"\boxed{2}", "B"),  # by its number, where choices are no numbers
    (r"\boxed{٣}", "C"),  # in the digits of Arabic
    (r"\boxed{Ｂ}", "B"),
    (r"$\boxed{A}$.", "A"),
    (r"\fbox{D}", "D"),
    (r"\boxed{E}", None),  # there are four
    (r"\boxed{London}", None),
    (r"\boxed{}", None),
    (r"\boxed{C", None),  # never ends
    ("Answer: C", "C"),
    ("**Answer: (B)**", "B"),
    ("The final answer is D.", "D"),
    ("The answer is option A because of that.", "A"),
    ("Answer: A\nNo, wait.\nAnswer: B", "B"),
    ("答案是 C", "C"),
    ("答案：Ｂ。", "B"),
    ("答えは D です", "D"),
    ("정답은 B", "B"),
    ("الإجابة: ب", "B"),
    ("الجواب هو ج", "C"),
    ("Ответ: Б", "B"),
    ("Ответ: В", "B"),  # looks like the Latin letter that the prompt has
    ("Відповідь: Г", "D"),
    ("Απάντηση: Γ", "C"),
    ("תשובה: ד", "D"),
    ("উত্তর: খ", "B"),
    ("उत्तर: ग", "C"),
    ("คำตอบ: ค", "C"),
    ("Antwort: C", "C"),
    ("La respuesta es B", "B"),
    ("Cevap: A", "A"),
    ("Đáp án: D", "D"),
    ("Жауап: A", "A"),
    ("C", "C"),
    ("(B)", "B"),
    ("B. Rome", "B"),
    ("B. Paris", None),  # says two things
    ("A city in Italy.", None),  # an article is no letter
    ("I do not know the answer.", None),
    ("The answer depends on the country.", None),
    ("", None),
    (r"<think>\boxed{A}</think>\boxed{B}", "B"),
    (r"<think>\boxed{A} and so on", None),  # thinking that never ends
]


@pytest.mark.parametrize(("response", "letter"), LETTERS)
def test_a_letter_is_read(response: str, letter: str | None) -> None:
    assert letter_of(response, CITIES) == letter


def test_a_number_in_a_box_is_the_choice_that_says_it_where_choices_are_numbers() -> None:
    assert letter_of(r"\boxed{3}", ["1", "2", "3", "4"]) == "C"
    assert letter_of(r"\boxed{7}", ["5", "6", "7", "8"]) == "C"
    assert letter_of(r"\boxed{1}", ["5", "6", "7", "8"]) is None


@pytest.mark.parametrize(
    ("response", "number"),
    [
        (r"3 + 4 is \boxed{7}", "7"),
        (r"\boxed{1,234}", "1234"),
        (r"\boxed{৭}", "7"),
        (r"\boxed{٤٢}", "42"),
        (r"\boxed{\$18}", "18"),
        (r"\boxed{-2.50}", "-2.50"),
        (r"\boxed{3} or rather \boxed{5}", "5"),
        ("2 x 36 = 72\n#### 72", "72"),
        ("The answer is 1 000.", "1000"),
        ("答案是 12。", "12"),
        ("So she has 5 left", "5"),
        ("0,5", "0.5"),
        ("no number", None),
        ("", None),
        (r"\boxed{seven}", "seven"),
    ],
)
def test_a_number_is_read(response: str, number: str | None) -> None:
    assert number_of(response) == number


def test_a_number_has_one_spelling() -> None:
    assert plain_number("1'234.50") == "1234.50"
    assert plain_number("−7") == "-7"
    assert plain_number("12,5") == "12.5"
    assert plain_number("12,500") == "12500"


def test_a_formula_is_that_of_the_last_box_or_of_the_last_line_that_says_so() -> None:
    assert formula_of(r"so \boxed{\frac{1}{2}}") == r"\frac{1}{2}"
    assert formula_of(r"Answer: $x + 1$") == "$x + 1$"
    assert formula_of("we get $a$ and then $b$") == "b"
    assert formula_of("it is") is None
    assert boxed(r"\boxed{a} \boxed{b{c}d}") == "b{c}d"


def test_a_translation_is_one_line_without_thinking() -> None:
    assert translation_of("<think>hm</think>\nDie  Katze\nschläft. ") == "Die Katze schläft."


@pytest.mark.parametrize(
    ("gold", "answer", "right"),
    [
        (r"\frac{3}{4}", "0.75", True),
        (r"\frac{3}{4}", r"\dfrac{6}{8}", True),
        (r"\frac{3}{4}", r"\frac{4}{3}", False),
        (r"x + 1", r"1 + x", True),
        (r"(1, 2)", r"(2, 1)", False),
        ("7", "7.0", True),
        ("2000", "2000", True),
        ("7", "seven", False),
    ],
)
def test_formulas_are_equal_by_what_they_say(gold: str, answer: str, right: bool) -> None:
    assert is_right(Kind.formula, gold, answer) is right


def doc(**changes: object) -> dict[str, object]:
    found = {
        "id": "en/x/test/0",
        "language": "en",
        "group": "x",
        "kind": "choice",
        "weight": 1.0,
        "gold": "C",
        "choices": CITIES,
    }
    return found | changes


def test_three_right_answers_of_eight_are_three_eighths() -> None:
    responses = [r"\boxed{C}"] * 3 + [r"\boxed{A}"] * 3 + ["", "no"]
    graded = grade(doc(), responses)
    assert graded.share_right == 0.375
    assert graded.answers == ("C", "C", "C", "A", "A", "A", None, None)
    assert graded.errors == ()


def judge_of(tmp_path: Path, program: str) -> Judge:
    worker = tmp_path / "worker.py"
    worker.write_text(program)
    return Judge(seconds=0.3, worker=worker)


def test_a_verifier_that_raises_hangs_or_dies_is_an_error_and_not_the_end(tmp_path: Path) -> None:
    answering = "import sys\nfor line in sys.stdin:\n"
    raising = judge_of(
        tmp_path, answering + """    print('{"error": "ValueError: no"}', flush=True)"""
    )
    for _ in range(2):
        with pytest.raises(VerifierError, match="ValueError: no on 'x'"):
            raising.is_right("math", "1", "x")
    raising.close()
    dying = judge_of(tmp_path, answering + "    sys.exit(3)")
    for _ in range(2):
        with pytest.raises(VerifierError, match="the process died"):
            dying.is_right("math", "1", "x")


def test_a_verifier_that_hangs_is_ended(tmp_path: Path) -> None:
    hanging = judge_of(
        tmp_path,
        "import sys, time\n"
        """print('{"right": true}', flush=True)\nsys.stdin.readline()\ntime.sleep(1e3)""",
    )
    assert hanging.is_right("math", "1", "1")
    start = time.monotonic()
    with pytest.raises(VerifierError, match="no answer within 0 s"):
        hanging.is_right("math", "1", "2")
    assert time.monotonic() - start < 30
    assert hanging.is_right("math", "1", "1")  # by a new process
    hanging.close()


def test_errors_of_a_verifier_are_kept_and_count_as_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(kind: Kind, *_: object) -> bool:
        raise VerifierError("no reason")

    monkeypatch.setattr("marco_train.evaluation.benchmark.grading.is_right", fails)
    graded = grade(doc(kind="formula", gold="1"), [r"\boxed{2}", ""])
    assert graded.right == (False, False)
    assert graded.errors == ("no reason",)


def test_what_a_string_of_data_or_a_response_says_is_never_run(tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    program = f"__import__('pathlib').Path({str(trap)!r}).touch()"
    for kind in (Kind.choice, Kind.number, Kind.formula):
        answer = answer_of(kind, rf"\boxed{{{program}}}", CITIES)
        if kind is not Kind.choice and answer is not None:
            is_right(kind, "1", answer)
    assert not trap.exists()
