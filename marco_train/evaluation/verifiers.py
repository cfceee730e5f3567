"""Judges: is this answer right? One function, `verify`, over the kinds of check a data row names.

A verifier is the plain mapping that a row of data carries, for example `{"name": "exact"}`.
"""

import json
import re
import unicodedata
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from marco_train.errors import InputError, require

KNOWN = ("exact", "json_schema", "reasoning_gym")
# What stands between characters and is not read: bidi controls (UAX #9), the zero-width space, the
# word joiner and the byte order mark. The joiners U+200C and U+200D spell words and stay.
MARKS = re.compile("[\u061c\u200b\u200e\u200f\u202a-\u202e\u2060\u2066-\u2069\ufeff]")


def verify(answer: str, reference: str, verifier: Mapping[str, object]) -> bool:
    """Judge one answer; a wrong or malformed answer is False, never an error.

    Texts are compared in `comparable` form: digits of any script are those of ASCII, and marks that
    are not read, as those of the writing direction, do not count.

    - `exact`: equals the reference; outer whitespace does not count.
    - `json_schema`: parses as JSON, equals the parsed reference and satisfies `schema`. White
      space and the order of keys are free; `1` and `true` differ, `1` and `1.0` do not. Numbers
      have the digits that JSON allows, those of ASCII, and the schema sees texts as they were
      written.
    - `reasoning_gym`: full marks from the scorer of `dataset` for `entry`, to the answer as it
      stands or in comparable form. The scorers of `chain_sum` and `products` compare decimals: for
      the entry `7` they give full marks to `7.0`, `07`, `+7`, `7,` and `7e0`. The scorers of
      `gcd`, `count_bits`, `letter_counting` and `syllogism` want the very string.

    The first call of a kind imports its package (reasoning-gym: about two seconds).

    Raises:
        ValueError: The verifier's name is unknown.
        ImportError: The package that the verifier needs is not installed.
    """
    match verifier.get("name"):
        case "exact":
            return comparable(answer) == comparable(reference)
        case "json_schema":
            return _satisfies_schema(answer, reference, verifier["schema"])
        case "reasoning_gym":
            score = _gym_scorer(str(verifier["dataset"]))
            forms = dict.fromkeys((answer.strip(), comparable(answer)))
            return any(score(form, verifier["entry"]) == 1.0 for form in forms)
        case name:
            raise ValueError(f"unknown verifier {name!r}; known are {', '.join(KNOWN)}")


def comparable(text: str) -> str:
    """Write a text so that equal answers in other digits or with other marks are equal.

    NFC, decimal digits (Unicode's Nd: Arabic, Devanagari, Thai, full-width, ...) as those of ASCII,
    without bidi controls, zero-width spaces and outer whitespace. What only looks alike stays: NFKC
    would make `2²` equal `22`. Separators of decimals and thousands stay too.
    """
    composed = unicodedata.normalize("NFC", MARKS.sub("", text))
    return "".join(
        str(unicodedata.decimal(char)) if char.isdecimal() else char for char in composed
    ).strip()


def check_verifier(verifier: Mapping[str, object]) -> None:
    """Refuse a verifier that `verify` would fail on, before anything is sampled.

    Raises:
        InputError: Its name is unknown, or it lacks what it compares with.
    """
    name = verifier.get("name")
    require(
        name in KNOWN,
        f"the row's column `verifier` names {name!r}; known are {', '.join(KNOWN)}, as "
        '{"name": "exact"}',
    )
    if name == "json_schema":
        schema = verifier.get("schema")
        require(
            isinstance(schema, dict | bool), f"the verifier json_schema has the schema {schema}"
        )
    if name == "reasoning_gym":
        dataset = str(verifier.get("dataset"))
        try:
            _gym_scorer(dataset)
        except ValueError as error:
            raise InputError(f"the verifier reasoning_gym: {error}") from error
        require("entry" in verifier, "the verifier reasoning_gym has no entry")


def _satisfies_schema(answer: str, reference: str, schema: object) -> bool:
    wanted = _comparable_value(json.loads(reference))
    try:
        value = json.loads(MARKS.sub("", answer))
        is_equal = bool(_comparable_value(value) == wanted)
    except (ValueError, RecursionError):  # not JSON, an endless number, brackets without end
        return False
    # Equality comes first, so the schema only ever sees a value as tame as the reference.
    return is_equal and bool(_schema_class()(schema).is_valid(value))


def _comparable_value(value: Any) -> Any:
    """A value of JSON with its texts, but for the names of keys, in comparable form."""
    match value:
        case bool():
            return (value,)  # to Python, true is 1
        case str():
            return comparable(value)
        case list():
            return [_comparable_value(item) for item in value]
        case dict():
            return {key: _comparable_value(item) for key, item in value.items()}
    return value


@cache
def _schema_class() -> Any:
    try:
        from jsonschema import Draft202012Validator
    except ImportError as error:
        raise ImportError(_missing("json_schema", "jsonschema")) from error
    return Draft202012Validator


@cache
def _gym_scorer(dataset: str) -> Callable[[str, object], float]:
    try:
        from reasoning_gym import get_score_answer_fn
    except ImportError as error:
        raise ImportError(_missing("reasoning_gym", "reasoning-gym")) from error
    scorer: Callable[[str, object], float] = get_score_answer_fn(dataset)
    return scorer


def _missing(verifier: str, package: str) -> str:
    return (
        f"the verifier {verifier} needs the package {package}: "
        "install it with `pip install 'marco-train[quickstart]'`"
    )
