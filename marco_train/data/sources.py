"""Rows of datasets as conversations: JSONL and Parquet files, and the hub."""

import gzip
import json
import re
import zlib
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any

from marco_train.config.data import SourceConfig, SourceKind
from marco_train.errors import InputError
from marco_train.types import Conversation, Message

CHAT_COLUMNS = ("messages", "responses_create_params", "prompt")
ROLES = {"system", "user", "assistant", "tool"}
TEXT_PARTS = {"text", "input_text", "output_text"}
# What a turn says beside its content; without it, the content would be another answer.
CALLS = ("tool_calls", "function_calls", "function_call")
GZIP = b"\x1f\x8b"
# Characters of a row that a message shows.
MOST_SHOWN = 200
# Rows that are digested together; to change it changes every digest.
ROWS_TOGETHER = 1000


@dataclass(frozen=True)
class BadRow:
    """A row that is no conversation, and why."""

    source: str
    row: int
    """Its place among the rows of the source, from 0."""
    reason: str


class Source:
    """The conversations of one dataset, by row."""

    def __init__(self, name: str, cfg: SourceConfig) -> None:
        self.name = name
        self._category = cfg.category
        self._rows, self.fingerprint = _open_rows(name, cfg)
        self._kept: Sequence[int] = range(len(self._rows))
        if cfg.unique_prompts:
            first_of_prompt: dict[Hashable, int] = {}
            for row in self._kept:
                found = self._conversation(row)
                # A row at fault repeats none: it is dropped and counted where it is drawn.
                prompt = row if isinstance(found, BadRow) else _prompt_of(found)
                first_of_prompt.setdefault(prompt, row)
            self._kept = list(first_of_prompt.values())
        if not self._kept:
            raise InputError(f"source {name!r} ({cfg.path}) has no rows")

    def keep_first(self, num_rows: int) -> None:
        """Leave out all rows but the first."""
        self._kept = self._kept[:num_rows]

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, row: int) -> Conversation | BadRow:
        return self._conversation(self._kept[row])

    def values(self, column: str) -> set[str]:
        """What stands in a column of labels, over all rows; `category` falls back on the source's.

        Rows at fault have none.
        """
        default = self._category if column == "category" else ""
        if isinstance(self._rows, list):
            found = {read_label(row.get(column)) for row in self._rows if isinstance(row, Mapping)}
        elif column in self._rows.column_names:  # type: ignore[attr-defined]
            # A dataset reads one column alone.
            alone = self._rows.select_columns(column).with_format("arrow")  # type: ignore[attr-defined]
            found = {read_label(value) for value in alone[:][column].to_pylist()}
        else:
            found = {""}
        return {value or default for value in found}

    def _conversation(self, row: int) -> Conversation | BadRow:
        try:
            found = self._rows[row]
            messages = read_messages(found)
        except (KeyError, TypeError, ValueError) as error:
            # str() of a KeyError is the repr of what it says.
            said = error.args[0] if isinstance(error, KeyError) else error
            return BadRow(self.name, row, str(said))
        verifier = found.get("verifier") or {}
        return Conversation(
            messages=messages,
            source=self.name,
            category=read_label(found.get("category")) or self._category,
            language=read_label(found.get("language")),
            verifier=verifier if isinstance(verifier, Mapping) else {"name": read_label(verifier)},
            row=row,
        )


def _prompt_of(conversation: Conversation) -> tuple[Message, ...]:
    return tuple(m for m in conversation.messages if m.role != "assistant")


def read_label(value: Any) -> str:
    """Read a category or a language of any type as text; a list is its items joined with `+`."""
    if isinstance(value, list | tuple):
        return "+".join(filter(None, map(read_label, value)))
    # Half of a surrogate pair has no bytes in a file.
    return "" if value is None else str(value).encode("utf-8", "replace").decode()


def read_messages(row: Mapping[str, Any]) -> tuple[Message, ...]:
    """Read the chat of a row in any of the shapes of the datasets on the card.

    `messages` as a list of {role, content} or as JSON of one, `prompt` or
    `responses_create_params.input` as such a list or as text; the first of them that is not empty,
    as files of several datasets fill the columns of the others with null. Content is text, or a
    list of parts of text.

    Raises:
        KeyError: No such column.
        TypeError: The row is no object, or a turn is not {role: text, content: text}.
    """
    if not isinstance(row, Mapping):
        raise TypeError(f"the row is {_shown(row)}, not an object with columns")
    columns = {name: row[name] for name in CHAT_COLUMNS if name in row}
    if columns.get("messages") and isinstance(columns["messages"], str):
        columns["messages"] = _parsed(columns["messages"])
    if not columns:
        raise KeyError(
            f"no column messages, prompt or responses_create_params.input among {sorted(row)}"
        )
    nested = columns.get("responses_create_params")
    if nested is not None:
        columns["responses_create_params"] = dict(nested).get("input")
    turns: Any = next((chat for chat in columns.values() if chat not in (None, [], "")), None)
    if turns is None:
        raise TypeError(f"the chat is empty: there is no turn in {', '.join(columns)}")
    if isinstance(turns, str):
        turns = [{"role": "user", "content": turns}]
    if not isinstance(turns, list):
        raise TypeError(f"the chat is {_shown(turns)}, not a list of turns")
    return tuple(_read_turn(turn) for turn in turns)


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise TypeError(f"messages is {_shown(text)}, neither a list nor JSON of one") from error


def _read_turn(turn: Any) -> Message:
    role = turn.get("role") if isinstance(turn, Mapping) else None
    if not isinstance(role, str) or role not in ROLES:
        raise TypeError(f"the turn {_shown(turn)} has no role among {sorted(ROLES)}")
    calls = [name for name in CALLS if turn.get(name)]
    if calls:
        raise TypeError(f"the turn {_shown(turn)} holds {calls[0]}, which are not rendered here")
    content = turn.get("content")
    if isinstance(content, list):
        content = _joined(content)
    if not isinstance(content, str):
        raise TypeError(f"the content of {_shown(turn)} is not text")
    try:
        content.encode()
    except UnicodeEncodeError as error:
        raise TypeError(f"the content of {_shown(turn)} holds half of a surrogate pair") from error
    return Message(role, content)


def _joined(parts: list[Any]) -> str | None:
    """Text of the parts of a content; None where one is no text."""
    texts = [
        part["text"]
        for part in parts
        if isinstance(part, Mapping)
        and part.get("type") in TEXT_PARTS
        and isinstance(part.get("text"), str)
    ]
    return "".join(texts) if texts and len(texts) == len(parts) else None


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]} ..."


def _open_rows(name: str, cfg: SourceConfig) -> tuple[Sequence[Any], str]:
    """Open the rows of a source; the digest changes when what they say does."""
    if cfg.kind is not SourceKind.hub and not Path(cfg.path).is_file():
        raise InputError(f"source {name!r}: there is no file {cfg.path!r}")
    if cfg.kind is SourceKind.jsonl:
        return _read_jsonl(Path(cfg.path))
    import datasets  # seconds to import

    digest = _digest_file(Path(cfg.path)) if cfg.kind is SourceKind.parquet else ""
    try:
        rows = (
            # `datasets` knows a file by its path and time; the name makes it read other bytes anew.
            datasets.load_dataset("parquet", f"rows-{digest}", data_files=cfg.path, split="train")
            if cfg.kind is SourceKind.parquet
            else datasets.load_dataset(cfg.path, cfg.subset, split=cfg.split)
        )
    # No such dataset, subset or split; no network; not a parquet file.
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        said = str(error).splitlines()[0]
        raise InputError(f"source {name!r}: {cfg.path!r} cannot be opened: {said}") from error
    return rows, digest or _digest_rows(rows)


def _digest_file(path: Path) -> str:
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


def _digest_rows(rows: Any) -> str:
    """Digest what the rows of a dataset say, wherever its files lie and however they are cut."""
    import pyarrow as pa

    digest = sha256()
    for table in rows.with_format("arrow").iter(batch_size=ROWS_TOGETHER):
        # Copied row by row: the bytes of a part depend on what it was cut from.
        copied = table.replace_schema_metadata(None).take(pa.array(range(len(table))))
        written = pa.BufferOutputStream()
        with pa.ipc.new_stream(written, copied.schema) as stream:
            stream.write_table(copied.combine_chunks())
        digest.update(written.getvalue())
    return digest.hexdigest()


def _read_jsonl(path: Path) -> tuple[list[Any], str]:
    """Read one row a line; also a JSON array of rows, and either of them packed by gzip."""
    content = path.read_bytes()
    if content.startswith(GZIP):
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise InputError(f"{path} is no whole gzip file ({error}); fetch it again") from error
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = error.object.count(b"\n", 0, error.start) + 1
        byte = error.object[error.start]
        raise InputError(
            f"{path}, line {number}: not UTF-8 ({error.reason}, byte {byte:#04x}); "
            "save the file as UTF-8"
        ) from error
    rows = _read_array(text)
    if rows is None:
        rows = []
        for number, line in enumerate(text.split("\n"), 1):
            if not line.strip():
                continue
            try:
                rows.append(json.loads(line))
            except (ValueError, RecursionError) as error:
                raise InputError(f"{path}, line {number}: not JSON ({error})") from error
    return rows, sha256(content).hexdigest()


def _read_array(text: str) -> list[Any] | None:
    """Read a file that is one JSON array; None for any other."""
    if not re.match(r"\s*\[", text):
        return None
    try:
        return list(json.loads(text))
    except (ValueError, RecursionError):
        return None
