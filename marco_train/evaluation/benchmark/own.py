"""Rows of one's own as a benchmark's task: a file, two columns and a verifier.

rows -> items as those of the card's tasks, asked and graded in the same way
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from marco_train.config.benchmark import PYTHON, OwnRowsConfig
from marco_train.config.data import SourceConfig
from marco_train.data.conversations import read_language
from marco_train.data.sources import Rows, open_rows
from marco_train.data.turns import RowError
from marco_train.errors import require
from marco_train.evaluation.benchmark.extraction import LETTERS, boxed, number_of, plain_number
from marco_train.evaluation.benchmark.grading import function_of
from marco_train.evaluation.benchmark.tasks import (
    MAX_FAULTY,
    Items,
    Kind,
    fill,
    options_of,
    prompt_text,
)

NO_LANGUAGE = "und"
"""Code of ISO 639 for a language that is not named."""
KINDS = {"math": Kind.formula}
"""Of verifiers that are called otherwise than the kind of their items."""
PROMPTS = {Kind.number: "answer_v1", Kind.formula: "answer_v1", Kind.choice: "choice_v1"}
MAX_CHOICES = len(LETTERS)


class UnusableError(ValueError):
    """Why a row cannot be asked, as the end of a sentence."""

    def __init__(self, reason: str, value: str = "") -> None:
        """Say why, in words that many rows share, and what of this row shows it."""
        super().__init__(reason + value)
        self.reason = reason


def load(
    *,
    own: Mapping[str, Any],
    languages: Sequence[str] | None = None,
    max_items: int | None = None,
    **_: Any,
) -> dict[str, Items]:
    """Make the items of one's own rows, under `test`; lm-eval calls it with its metadata.

    Args:
        own: What `OwnRowsConfig` says.
        languages: Codes to keep. None: all.
        max_items: Most items, chosen by their ids. None: all.

    Raises:
        InputError: Something of it is not there, or is not what it should be.
    """
    asked = OwnRowsConfig(**own)
    asked.check()
    assert asked.path is not None
    kind = kind_of(asked.verifier)
    function = asked.verifier.removeprefix(PYTHON) if kind is Kind.python else None
    if function is not None:
        function_of(function)
    rows = open_rows("own", SourceConfig(path=asked.path, subset=asked.subset, split=asked.split))
    _check_columns(asked, rows)
    items, faults = Items(), list[tuple[str, str]]()
    for number, row in enumerate(rows.walk(columns_of(asked))):
        try:
            item = _item(asked, kind, row)
        except UnusableError as error:
            faults.append((error.reason, f"row {number} {error}"))
            continue
        language = item["language"]
        if languages is None or language in languages:
            head = {"id": f"{language}/own/{number}", "group": "own", "weight": 1.0}
            items.append({**head, **item, "verifier": function})
    items.num_faulty = len(faults)
    total = len(items) + len(faults)
    require(
        len(faults) <= 10 or len(faults) <= MAX_FAULTY * total,
        f"own.path {asked.path!r}: {len(faults)} of {total} rows cannot be asked, as "
        f"{[said for _, said in faults[:1]]}",
    )
    said = f": {faults[0][1]}" if faults else ""
    wanted = f" in the languages {', '.join(languages)}" if languages is not None else ""
    require(bool(items), f"own.path {asked.path!r} holds no row that can be asked{wanted}{said}")
    items.left_out = _left_out(faults, total)
    return {"test": items.first(max_items)}


def _left_out(faults: Sequence[tuple[str, str]], total: int) -> str:
    """Say how many rows are left out, by reason, each with its first row."""
    if not faults:
        return ""
    first: dict[str, str] = {}
    for reason, said in faults:
        first.setdefault(reason, said)
    counts = Counter(reason for reason, _ in faults)
    why = "; ".join(f"{count:,} as {first[reason]}" for reason, count in counts.most_common())
    return f"{len(faults):,} of {total:,} rows left out: {why}"


def kind_of(verifier: str) -> Kind:
    """How the answers that a verifier judges are read."""
    return Kind.python if verifier.startswith(PYTHON) else KINDS.get(verifier) or Kind(verifier)


def columns_of(asked: OwnRowsConfig) -> list[str]:
    """Columns that rows have to have."""
    named = (asked.question, asked.answer, asked.choices, asked.language)
    return [column for column in named if column is not None]


def _check_columns(asked: OwnRowsConfig, rows: Rows) -> None:
    """Refuse columns that the first row has not.

    Raises:
        InputError: Names those that it has.
    """
    try:
        first = rows[0] if len(rows) else {}
    except RowError:
        return
    if not isinstance(first, Mapping) or not first:
        return
    for column in columns_of(asked):
        near = get_close_matches(column, first, n=1)
        meant = f"; did you mean {near[0]}?" if near else ""
        require(
            column in first,
            f"own.path {asked.path!r} has no column {column!r}, and has "
            f"{', '.join(map(str, first))}{meant}",
        )


def _item(asked: OwnRowsConfig, kind: Kind, row: Any) -> dict[str, Any]:
    """What an item is beside its name.

    Raises:
        UnusableError: The row cannot be asked.
    """
    if isinstance(row, RowError):
        raise UnusableError("cannot be read", f": {row}")
    if not isinstance(row, Mapping):
        raise UnusableError("is no object with columns")
    for column in columns_of(asked):
        if column not in row:
            raise UnusableError(f"has no column {column!r}")
    if isinstance(row[asked.question], list | dict):
        raise UnusableError(f"has no text in {asked.question}, but a list or an object")
    question, answer = str(row[asked.question] or "").strip(), row[asked.answer]
    if not question or answer is None or answer == "":
        raise UnusableError(f"has no {asked.answer if question else asked.question}")
    choices = _choices(asked, row)
    gold = _gold(kind, answer, choices)
    text = asked.prompt
    if text is None:
        text = prompt_text(PROMPTS[kind]) if kind in PROMPTS else "{{question}}"
    language = read_language(row[asked.language]) if asked.language is not None else ""
    return {
        "language": language or NO_LANGUAGE,
        "kind": kind.value,
        "question": question,
        "prompt": fill(text, {"question": question, "options": options_of(choices)}),
        "gold": gold,
        # Those that a question names itself have no text here.
        "choices": choices or [""] * MAX_CHOICES * (kind is Kind.choice),
    }


def _choices(asked: OwnRowsConfig, row: Mapping[str, Any]) -> list[str]:
    if asked.choices is None:
        return []
    found = row[asked.choices]
    if isinstance(found, str) or not isinstance(found, Iterable):
        raise UnusableError(f"has no list of choices in {asked.choices!r}")
    texts = [str(each).strip() for each in found]
    if not 2 <= len(texts) <= MAX_CHOICES:
        raise UnusableError(f"has {len(texts)} choices, and 2 to {MAX_CHOICES} can be asked")
    return texts


def _gold(kind: Kind, answer: Any, choices: Sequence[str]) -> Any:
    """The reference as a judge takes it.

    Raises:
        UnusableError: It is none for this kind.
    """
    match kind:
        case Kind.python:
            return answer
        case Kind.json_schema:
            return _schema(answer)
        case Kind.choice:
            return _letter(answer, choices)
        case Kind.exact:
            return str(answer)
        case Kind.regex:
            return _pattern(str(answer))
    text = str(answer).strip()
    _, marked, behind = text.rpartition("####")  # as GSM8K has it
    if kind is Kind.number:
        found = plain_number(behind.strip()) if marked else number_of(text)
    else:
        found = behind.strip() if marked else boxed(text) or text.strip("$").strip()
    if not found:
        raise UnusableError(f"has no {kind.value} in its answer", f" {text[:60]!r}")
    return found


def _letter(answer: Any, choices: Sequence[str]) -> str:
    """The letter of the right choice, which the answer names by place, letter or text."""
    letters = LETTERS[: len(choices) or MAX_CHOICES]
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        if answer in range(len(letters)):
            return letters[int(answer)]
        raise UnusableError(
            "has an answer that is no place", f": {answer} of 0 to {len(letters) - 1}"
        )
    text = str(answer).strip()
    letter = text.strip("(). ").upper()
    if text in choices:
        return letters[choices.index(text)]
    if len(letter) == 1 and letter in letters:
        return letter
    raise UnusableError(
        "has an answer that names no choice", f": {text[:60]!r} of {', '.join(letters)}"
    )


def _pattern(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise UnusableError(
            "has an answer that is no pattern", f", {text[:60]!r}: {error}"
        ) from error
    return text


def _schema(answer: Any) -> str:
    """A schema as JSON."""
    text = answer if isinstance(answer, str) else json.dumps(answer)
    try:
        schema = json.loads(text)
    except ValueError as error:
        raise UnusableError("has an answer that is no JSON", f": {error}") from error
    if not isinstance(schema, dict | bool):
        raise UnusableError("has an answer that is no schema", f": {text[:60]!r}")
    return text
