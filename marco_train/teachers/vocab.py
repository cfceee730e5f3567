"""Refuse a teacher whose token ids mean something else, from the files alone.

With a foreign vocabulary the KL falls while the student is destroyed, so nothing else shows it.
"""

from pathlib import Path

from marco_train.config.model import ModelConfig
from marco_train.config.resumption import field_difference
from marco_train.errors import InputError
from marco_train.models.hf_io import decoder_config
from marco_train.models.tokenizer_files import read_tokenizer, tokenizer_meaning

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
    student_side = tokenizer_meaning(read_tokenizer(student_tokenizer, "the student"))
    other_side = tokenizer_meaning(read_tokenizer(other, name))
    found = field_difference(student_side, other_side)
    if not found:
        return
    raise InputError(
        f"the tokenizer of {name} ({other}) is not the student's ({student_tokenizer}); "
        f"{len(found)} differences (student -> {name}), the first: " + "; ".join(found[:SHOWN])
    )


def check_head_rows(vocab_size: int, other: str, name: str) -> None:
    """Refuse a model whose output head has another number of rows than the student's.

    Raises:
        InputError: Gives both numbers.
    """
    rows = decoder_config(other).get("vocab_size")
    if rows != vocab_size:
        raise InputError(
            f"{name} ({other}) has {rows} output rows and the student {vocab_size}: the "
            "distributions cannot be compared"
        )
