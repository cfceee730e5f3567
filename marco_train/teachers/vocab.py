"""Refuse a teacher whose token ids mean something else, from the files alone.

With a foreign vocabulary the KL falls while the student is destroyed, so nothing else shows it.
"""

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

from marco_train.config import ModelConfig
from marco_train.errors import InputError
from marco_train.resumption import field_difference

# What turns text into ids; the rest of tokenizer.json is padding and truncation.
MEANING = ["added_tokens", "normalizer", "pre_tokenizer", "model"]
SHOWN = 5


def check_student_vocabulary(cfg: ModelConfig) -> None:
    """Refuse weights to start from that were trained with other ids than the run's tokenizer gives.

    Raises:
        InputError: Names the first differences.
    """
    if cfg.path is not None and (Path(cfg.path) / "tokenizer.json").is_file():
        check_vocabulary(cfg.tokenizer, cfg.path, "model.path")


def check_vocabulary(student_tokenizer: str, other: str, name: str) -> None:
    """Refuse a model whose tokenizer gives other ids than the student's.

    Args:
        student_tokenizer: Directory of the student's tokenizer.
        other: Directory of the model, most often a teacher.
        name: What the message calls it.

    Raises:
        InputError: A tokenizer is missing, or names the first differences.
    """
    student_side = _read_tokenizer(student_tokenizer, "the student")
    other_side = _read_tokenizer(other, name)
    if _digest(student_side) == _digest(other_side):
        return
    found = field_difference(_meaning(student_side), _meaning(other_side))
    raise InputError(
        f"the tokenizer of {name} ({other}) is not the student's ({student_tokenizer}); "
        f"{len(found)} differences (student -> {name}), the first: " + "; ".join(found[:SHOWN])
    )


def check_head_rows(vocab_size: int, other: str, name: str) -> None:
    """Refuse a model whose output head has another number of rows than the student's.

    Raises:
        InputError: Gives both numbers.
    """
    rows = json.loads((Path(other) / "config.json").read_text()).get("vocab_size")
    if rows != vocab_size:
        raise InputError(
            f"{name} ({other}) has {rows} output rows and the student {vocab_size}: the "
            "distributions cannot be compared"
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
