"""Refuse a teacher whose token ids mean something else, from the files alone.

With a foreign vocabulary the KL falls while the student is destroyed, so nothing else shows it.
"""

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

from marco_train.architecture import InputError
from marco_train.config import field_difference

# What turns text into ids; the rest of tokenizer.json is padding and truncation.
MEANING = ["added_tokens", "normalizer", "pre_tokenizer", "model"]
SHOWN = 5


def check_vocabulary(student_tokenizer: str, teacher: str, name: str) -> None:
    """Refuse a teacher whose tokenizer gives other ids than the student's.

    Args:
        student_tokenizer: Directory of the student's tokenizer.
        teacher: Directory of the teacher.
        name: The teacher's name, for the message.

    Raises:
        InputError: A tokenizer is missing, or names the first differences.
    """
    student_side = _read_tokenizer(student_tokenizer, "the student")
    teacher_side = _read_tokenizer(teacher, f"teacher {name!r}")
    if _digest(student_side) == _digest(teacher_side):
        return
    found = field_difference(_meaning(student_side), _meaning(teacher_side))
    raise InputError(
        f"the tokenizer of teacher {name!r} ({teacher}) is not the student's "
        f"({student_tokenizer}); {len(found)} differences (student -> teacher), the first: "
        + "; ".join(found[:SHOWN])
    )


def check_head_rows(student_vocab_size: int, teacher: str, name: str) -> None:
    """Refuse a teacher whose output head has another number of rows.

    Raises:
        InputError: Gives both numbers.
    """
    rows = json.loads((Path(teacher) / "config.json").read_text()).get("vocab_size")
    if rows != student_vocab_size:
        raise InputError(
            f"teacher {name!r} ({teacher}) has {rows} output rows and the student "
            f"{student_vocab_size}: the distributions cannot be compared"
        )


def _read_tokenizer(path: str, owner: str) -> dict[str, Any]:
    file = Path(path) / "tokenizer.json"
    if not file.is_file():
        raise InputError(f"{owner}: there is no tokenizer at {str(file)!r}")
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return content


def _meaning(tokenizer: dict[str, Any]) -> dict[str, Any]:
    meaning = {key: tokenizer.get(key) for key in MEANING}
    # By id and by place, so that a difference names the one token or merge.
    meaning["added_tokens"] = {token["id"]: token for token in tokenizer["added_tokens"]}
    meaning["model"] = tokenizer["model"] | {
        "merges": {str(n): merge for n, merge in enumerate(tokenizer["model"].get("merges", []))}
    }
    return meaning


def _digest(tokenizer: dict[str, Any]) -> str:
    canonical = json.dumps({key: tokenizer.get(key) for key in MEANING}, sort_keys=True)
    return sha256(canonical.encode()).hexdigest()
