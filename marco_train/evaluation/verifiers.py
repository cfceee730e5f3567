"""Judges: is this answer right? One function, `verify`, over the kinds of check a data row names.

A verifier is the plain mapping that a row of data carries, for example `{"name": "exact"}`.
"""

import json
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from marco_train.errors import InputError, require

KNOWN = ("exact", "json_schema", "reasoning_gym")


def verify(answer: str, reference: str, verifier: Mapping[str, object]) -> bool:
    """Judge one answer; a wrong or malformed answer is False, never an error.

    - `exact`: equals the reference; outer whitespace does not count.
    - `json_schema`: parses as JSON, equals the parsed reference and satisfies `schema`. White
      space and the order of keys are free; `1` and `true` differ, `1` and `1.0` do not.
    - `reasoning_gym`: full marks from the scorer of `dataset` for `entry`. The scorers of
      `chain_sum` and `products` compare decimals: for the entry `7` they give full marks to
      `7.0`, `07`, `+7`, `7,`, `7e0` and a seven in another script. The scorers of `gcd`,
      `count_bits`, `letter_counting` and `syllogism` want the very string.

    The first call of a kind imports its package (reasoning-gym: about two seconds).

    Raises:
        ValueError: The verifier's name is unknown.
        ImportError: The package that the verifier needs is not installed.
    """
    match verifier.get("name"):
        case "exact":
            return answer.strip() == reference.strip()
        case "json_schema":
            return _satisfies_schema(answer, reference, verifier["schema"])
        case "reasoning_gym":
            score = _gym_scorer(str(verifier["dataset"]))
            return score(answer.strip(), verifier["entry"]) == 1.0
        case name:
            raise ValueError(f"unknown verifier {name!r}; known are {', '.join(KNOWN)}")


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
    try:
        value = json.loads(answer)
    except (ValueError, RecursionError):  # not JSON, an endless number, brackets without end
        return False
    # Equality comes first, so the schema only ever sees a value as tame as the reference.
    return bool(value == json.loads(reference)) and bool(_schema_class()(schema).is_valid(value))


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
