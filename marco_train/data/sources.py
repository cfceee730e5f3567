"""Rows of datasets as conversations: JSONL and Parquet files, and the hub."""

import json
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from marco_train.config import SourceConfig, SourceKind
from marco_train.errors import InputError
from marco_train.types import Conversation, Message

ROLES = {"system", "user", "assistant", "tool"}


class Source:
    """The conversations of one dataset, by row."""

    def __init__(self, name: str, cfg: SourceConfig, num_rows: int | None) -> None:
        self.name = name
        self._category = cfg.category
        self._rows, self.fingerprint = _open_rows(name, cfg)
        self._kept: Sequence[int] = range(len(self._rows))
        if cfg.unique_prompts:
            first_of_prompt: dict[tuple[Message, ...], int] = {}
            for row in self._kept:
                first_of_prompt.setdefault(_prompt_of(self._conversation(row)), row)
            self._kept = list(first_of_prompt.values())
        if num_rows is not None:
            self._kept = self._kept[:num_rows]
        if not self._kept:
            raise InputError(f"source {name!r} ({cfg.path}) has no rows")

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, row: int) -> Conversation:
        return self._conversation(self._kept[row])

    def values(self, column: str) -> set[str]:
        """What stands in a column of text, over all rows; `category` falls back on the source's."""
        default = self._category if column == "category" else ""
        if isinstance(self._rows, list):
            found = {row.get(column) for row in self._rows}
        else:  # a dataset reads one column alone
            known = column in self._rows.column_names  # type: ignore[attr-defined]
            found = set(self._rows.unique(column)) if known else {None}  # type: ignore[attr-defined]
        return {value or default for value in found}

    def _conversation(self, row: int) -> Conversation:
        found = self._rows[row]
        try:
            messages = read_messages(found)
        except (KeyError, TypeError) as error:
            raise InputError(f"source {self.name!r}, row {row}: {error}") from error
        return Conversation(
            messages=messages,
            source=self.name,
            category=found.get("category") or self._category,
            language=found.get("language") or "",
            verifier=found.get("verifier") or {},
        )


def _prompt_of(conversation: Conversation) -> tuple[Message, ...]:
    return tuple(m for m in conversation.messages if m.role != "assistant")


def read_messages(row: Mapping[str, Any]) -> tuple[Message, ...]:
    """Read the chat of a row in any of the shapes of the datasets on the card.

    `messages` or `prompt` as a list of {role, content}, `prompt` as text, or
    `responses_create_params.input`.

    Raises:
        KeyError: No such column.
        TypeError: A turn is not {role: text, content: text}.
    """
    turns: Any = row.get("messages")
    if turns is None and "responses_create_params" in row:
        turns = row["responses_create_params"]["input"]
    if turns is None:
        turns = row.get("prompt")
    if turns is None:
        raise KeyError(
            f"no column messages, prompt or responses_create_params.input among {sorted(row)}"
        )
    if isinstance(turns, str):
        turns = [{"role": "user", "content": turns}]
    if not isinstance(turns, list) or not turns:
        raise TypeError(f"the chat is {turns!r}, not a list of turns")
    for turn in turns:
        if not isinstance(turn, Mapping) or turn.get("role") not in ROLES:
            raise TypeError(f"the turn {turn!r} has no role among {sorted(ROLES)}")
        if not isinstance(turn.get("content"), str):
            raise TypeError(f"the content of {turn!r} is not text")
    return tuple(Message(turn["role"], turn["content"]) for turn in turns)


def _open_rows(name: str, cfg: SourceConfig) -> tuple[Sequence[Mapping[str, Any]], str]:
    """Open the rows of a source; the digest changes when they do."""
    if cfg.kind is not SourceKind.hub and not Path(cfg.path).is_file():
        raise InputError(f"source {name!r}: there is no file {cfg.path!r}")
    if cfg.kind is SourceKind.jsonl:
        return _read_jsonl(Path(cfg.path))
    import datasets  # seconds to import

    try:
        rows = (
            datasets.load_dataset("parquet", data_files=cfg.path, split="train")
            if cfg.kind is SourceKind.parquet
            else datasets.load_dataset(cfg.path, cfg.subset, split=cfg.split)
        )
    # No such dataset, subset or split; no network; not a parquet file.
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        said = str(error).splitlines()[0]
        raise InputError(f"source {name!r}: {cfg.path!r} cannot be opened: {said}") from error
    return rows, rows._fingerprint


def _read_jsonl(path: Path) -> tuple[list[Mapping[str, Any]], str]:
    content = path.read_bytes()
    rows = []
    for number, line in enumerate(content.decode("utf-8-sig").split("\n"), 1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise InputError(f"{path}, line {number}: not JSON ({error})") from error
    return rows, sha256(content).hexdigest()
