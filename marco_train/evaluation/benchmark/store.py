"""Answers on disk, so that a benchmark that was killed goes on with the next one.

<output_dir>/answers/made_by.json             what they are answers of: they are kept for it alone
<output_dir>/answers/<task>.<rank>.jsonl      one answer a line, written as it ends
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, TextIO

from marco_train.config import TrainConfig
from marco_train.config.resumption import field_difference
from marco_train.content import look
from marco_train.data.chat import Tokenizer
from marco_train.distributed import barrier, is_main, rank
from marco_train.errors import InputError
from marco_train.files import replaces

TOO_LONG = "too_long"
"""How an answer ended that was never sampled, as its question has too many tokens."""


@dataclass(frozen=True)
class Answer:
    """One response to an item."""

    item: str
    response: int
    """Its number among the item's, from 0."""
    prompt: str
    """Digest of what was asked: the answer counts for this question alone."""
    text: str
    """Without the stop token."""
    num_tokens: int
    finish: str
    """`stop`, `length`, or TOO_LONG."""
    ids: list[int] = field(default_factory=list)
    """Its tokens, where a teacher is to score them."""


def digest_of(prompt: str) -> str:
    """Digest of a prompt as the model gets it."""
    return blake2b(prompt.encode(), digest_size=12).hexdigest()


def made_by(cfg: TrainConfig, tokenizer: Tokenizer, path: str) -> dict[str, Any]:
    """What decides the answers of the model in a directory, as JSON."""
    return {
        "model": look(path),
        "tokenizer": tokenizer.digests(),
        "seed": cfg.seed,
        "dtype": cfg.model.dtype.value,
        "max_response_length": cfg.stage.max_response_length,
    }


class AnswerStore:
    """The answers of one run; every rank writes files of its own and reads all."""

    def __init__(self, directory: Path, made_by: Mapping[str, Any], *, anew: bool) -> None:
        """Open the directory; all ranks take part.

        Args:
            directory: Of the run.
            made_by: What decides the answers, as JSON.
            anew: Whether to drop those that are there.

        Raises:
            InputError: It holds answers that something else made.
        """
        self._directory = directory / "answers"
        self._files: dict[str, TextIO] = {}
        note = self._directory / "made_by.json"
        if is_main() and anew:
            shutil.rmtree(self._directory, ignore_errors=True)
        barrier()
        if note.is_file():
            differing = field_difference(json.loads(note.read_text()), dict(made_by))
            if differing:
                raise InputError(
                    f"{self._directory} holds answers that something else made (then -> now): "
                    f"{'; '.join(differing[:3])}; choose another output_dir, or resume=never to "
                    "ask anew"
                )
        barrier()
        if is_main():
            self._directory.mkdir(parents=True, exist_ok=True)
            with replaces(note) as partial:
                partial.write_text(json.dumps(made_by, indent=2))
        barrier()

    def read(self, task: str) -> dict[tuple[str, int, str], Answer]:
        """Answers to a task by item, response and digest of the prompt; of any number of ranks.

        A line that a kill tore is left out.
        """
        found: dict[tuple[str, int, str], Answer] = {}
        for file in sorted(self._directory.glob(f"{task}.*.jsonl")):
            for line in file.read_bytes().split(b"\n"):
                try:
                    answer = Answer(**json.loads(line))
                except (ValueError, TypeError):
                    continue
                found.setdefault((answer.item, answer.response, answer.prompt), answer)
        return found

    def append(self, task: str, answer: Answer) -> None:
        """Write an answer down, past what happens to this process."""
        if task not in self._files:
            file = self._directory / f"{task}.{rank()}.jsonl"
            is_torn = file.is_file() and not file.read_bytes().endswith(b"\n")
            self._files[task] = file.open("a", encoding="utf-8")
            if is_torn:
                self._files[task].write("\n")
        self._files[task].write(json.dumps(vars(answer), ensure_ascii=False) + "\n")
        self._files[task].flush()

    def close(self) -> None:
        """Close the files."""
        for file in self._files.values():
            file.close()
        self._files.clear()
