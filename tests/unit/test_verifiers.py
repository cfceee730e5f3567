"""Answers in the digits and marks of other scripts."""

import json

import pytest

from marco_train.evaluation.verifiers import comparable, verify

EXACT = {"name": "exact"}
# Of letters, which no schema bounds.
TEXTS = {"name": "json_schema", "schema": {"type": "object"}}
GCD = {"name": "reasoning_gym", "dataset": "gcd", "entry": {"answer": "42"}}

RLM, LRM, ALM = "\u200f", "\u200e", "\u061c"
FORTY_TWO = {
    "Arabic-Indic": "٤٢",
    "Persian": "۴۲",
    "Devanagari": "४२",
    "Bengali": "৪২",
    "Thai": "๔๒",
    "full-width": "４２",
    "after a right-to-left mark": RLM + "42",
    "between marks": f"{LRM}4{ALM}2{RLM} ",
    "in an isolate": "\u2067٤٢\u2069",
    "in an override": "\u202e42\u202c",
    "with a zero-width space": "4\u200b2",
    "with a byte order mark": "\ufeff42",
}
OTHERS = {
    "a superscript": "4²",
    "a subscript": "4₂",
    "in a circle": "㊷",
    "Han": "四十二",
    "a Roman numeral": "ⅩⅬⅡ",
    "the other way round": "٢٤",
    "one more digit": "٤٢٠",
    "two numbers": "٤ ٢",
    "a decimal": "٤٫٢",
    "a minus": "-٤٢",
}


@pytest.mark.parametrize("answer", FORTY_TWO.values(), ids=FORTY_TWO.keys())
def test_digits_of_any_script_and_marks_that_are_not_read_do_not_count(answer: str) -> None:
    assert verify(answer, "42", EXACT)
    assert verify("42", answer, EXACT)
    assert verify(json.dumps({"n": answer}), '{"n": "42"}', TEXTS)
    assert verify(json.dumps({"n": [answer]}, ensure_ascii=False), '{"n": ["42"]}', TEXTS)


@pytest.mark.parametrize("answer", OTHERS.values(), ids=OTHERS.keys())
def test_what_only_looks_alike_stays_different(answer: str) -> None:
    assert not verify(answer, "42", EXACT)
    assert not verify(json.dumps({"n": answer}), '{"n": "42"}', TEXTS)


@pytest.mark.parametrize(
    ("answer", "reference", "is_right"),
    [
        ("true", "1", False),
        ("1", "true", False),
        ('{"a": [false]}', '{"a": [0]}', False),
        ("true", "true", True),
        ("1.0", "1", True),
        ('"true"', "true", False),
    ],
)
def test_truth_is_no_number_whatever_the_schema(
    answer: str, reference: str, is_right: bool
) -> None:
    assert verify(answer, reference, {"name": "json_schema", "schema": {}}) is is_right


def test_letters_are_compared_composed_and_keep_what_spells_them() -> None:
    assert verify("cafe\u0301", "caf\u00e9", EXACT)
    assert not verify("ﬁn", "fin", EXACT)  # a ligature, which NFKC would take apart
    assert not verify("2²", "22", EXACT)
    # The joiners: "I want" in Persian, a family of emoji.
    assert comparable("می\u200cخواهم") == "می\u200cخواهم"
    assert comparable("👩\u200d👧") == "👩\u200d👧"


def test_json_is_written_in_the_digits_of_json_and_its_schema_sees_it_as_it_is() -> None:
    assert verify(f'{RLM}{{"n": 42}}{RLM}', '{"n": 42}', TEXTS)
    assert not verify('{"n": ٤٢}', '{"n": 42}', TEXTS)
    assert not verify('{"n": "٤٢"}', '{"n": 42}', TEXTS)
    assert not verify('{"٤": 1}', '{"4": 1}', TEXTS)
    digits = {"type": "object", "properties": {"n": {"enum": ["42"]}}}
    assert not verify('{"n": "٤٢"}', '{"n": "42"}', {"name": "json_schema", "schema": digits})


def test_deep_brackets_are_wrong_and_no_error() -> None:
    answer = "[" * 900 + "]" * 900
    assert not verify(answer, '{"n": 42}', TEXTS)


@pytest.mark.parametrize("answer", ["٤٢", RLM + "42", "４２"])
def test_the_scorers_see_the_digits_of_ascii(answer: str) -> None:
    assert verify(answer, "42", GCD)
    assert not verify(answer + "0", "42", GCD)


def test_an_answer_that_is_right_as_it_stands_stays_right() -> None:
    entry = {"answer": "٤٢" + RLM}
    assert verify("٤٢" + RLM, "", {"name": "reasoning_gym", "dataset": "gcd", "entry": entry})
