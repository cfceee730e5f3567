"""The rows of one dataset as conversations."""

import re
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from marco_train.config.data import SourceConfig
from marco_train.data.cache import digest_of, read_json, write_json
from marco_train.data.duplicates import distinct_rows, share_of_prompts
from marco_train.data.formats import STANDARD_COLUMNS, Format, Reading
from marco_train.data.sources import open_rows
from marco_train.data.turns import MOST_SHOWN, RowError
from marco_train.errors import InputError, require
from marco_train.types import Conversation, PlainText, TokenRow, UsableRow

# ISO 639 with what BCP 47 and FLORES add: de, zh-Hans, pt_BR, eng_Latn.
LANGUAGE_CODE = re.compile(r"[a-z]{2,3}([-_][A-Za-z0-9]{2,8})*", re.IGNORECASE)
# What sets of programs have in a column `language`, of the length of a code and none.
PROGRAMS = {"asm", "awk", "cpp", "css", "go", "js", "lua", "md", "php", "py", "rb", "sed", "sql"}
PROGRAMS |= {"tex", "vb", "xml", "zig"}


@dataclass(frozen=True)
class BadRow:
    """A row that is no conversation, and why."""

    source: str
    row: int
    """Its place among the rows of the source, from 0."""
    kind: str
    """Of the fault, in a few words."""
    reason: str
    """What is wrong with this row, in a sentence."""
    begins: str
    """What the row begins with, for the quarantine."""


class Source:
    """The conversations of one dataset, by row."""

    def __init__(self, name: str, cfg: SourceConfig) -> None:
        """Open a dataset.

        Args:
            name: What messages call it.
            cfg: Where it lies and how its rows are read.

        Raises:
            InputError: It cannot be opened, or has no rows.
        """
        self.name = name
        self._cfg = cfg
        unknown = sorted(cfg.columns.keys() - STANDARD_COLUMNS)
        require(
            not unknown,
            f"data.sources.{name}.columns names {', '.join(unknown)}; it maps one of "
            f"{', '.join(sorted(STANDARD_COLUMNS))}",
        )
        self._rows = open_rows(name, cfg)
        self._format = Format(
            dict(cfg.columns), {own.lower(): role for own, role in cfg.roles.items()}
        )
        self._part: list[Any] = []  # of the prompts, where some are held out
        self._kept: Sequence[int] = range(len(self._rows))
        if cfg.unique_prompts or cfg.near_duplicates is not None:
            self._kept = self._distinct()
        if not len(self._kept):
            raise InputError(f"source {name!r} ({cfg.path}) has no rows")

    def _distinct(self) -> Sequence[int]:
        """Rows of distinct prompts, worked out once."""
        cfg = self._cfg
        read_by = [dict(cfg.columns), dict(cfg.roles), cfg.near_duplicates]
        name = f"distinct-{digest_of(self._rows.digest, read_by)}"
        kept = read_json(name)
        if kept is None:
            kept = list(distinct_rows(self._rows, self._format, self._cfg.near_duplicates))
            write_json(name, kept)
        return array("q", kept)

    def keep_part(self, share: float, is_held_out: bool) -> None:
        """Keep the rows of a share of the prompts, or all others; the same at every launch.

        Args:
            share: Of the distinct prompts; one at least, and never all.
            is_held_out: Whether that share is kept, or the others.
        """
        read_by = [dict(self._cfg.columns), dict(self._cfg.roles), share]
        name = f"held-out-{digest_of(self._rows.digest, read_by)}"
        found = read_json(name)
        if found is None:
            found = list(share_of_prompts(self._rows, self._format, share))
            write_json(name, found)
        held_out = set(found)
        kept = (row for row in self._kept if (row in held_out) == is_held_out)
        self._kept = array("q", kept)
        self._part = [share, is_held_out]

    def keep_first(self, num_rows: int) -> None:
        """Leave out all rows but the first."""
        self._kept = self._kept[:num_rows]

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int) -> UsableRow | BadRow:
        return self.read(index)[0]

    @property
    def fingerprint(self) -> str:
        """Digest of what the rows say, wherever they lie."""
        return self._rows.digest

    @property
    def identity(self) -> list[Any]:
        """All that its conversations are a function of, as JSON."""
        cfg = self._cfg
        labels = [cfg.category, cfg.category_column]
        unique = (cfg.unique_prompts, cfg.near_duplicates)
        read_by = [dict(cfg.columns), dict(cfg.roles)]
        return [self.fingerprint, list(unique), *read_by, labels, self._part]

    def begins(self, row: int) -> str:
        """What a row begins with, by its place in the dataset."""
        try:
            return repr(self._rows[row])[:MOST_SHOWN]
        except RowError as fault:
            return fault.begins

    def place(self, index: int) -> int:
        """Where a row stands in the dataset, of which some rows are left out."""
        return int(self._kept[index])

    def raw(self, index: int) -> Any:
        """What a row holds, or the RowError that says why nothing can be read of it."""
        try:
            return self._rows[self.place(index)]
        except RowError as fault:
            return fault

    def read(self, index: int) -> tuple[UsableRow | BadRow, Reading | None, Any]:
        """Read a row.

        Returns:
            What it is, how it was read, and what it held. A row at fault was not read.
        """
        place = self.place(index)
        found = self.raw(index)
        try:
            if isinstance(found, RowError):
                raise found
            reading = self._format.read(found)
        except RowError as fault:
            begins = fault.begins or repr(found)[:MOST_SHOWN]
            return BadRow(self.name, place, fault.kind, str(fault), begins), None, found
        language = found.get(self._cfg.columns.get("language", "language"))
        labels: dict[str, Any] = {
            "source": self.name,
            "category": self._category(found),
            "language": read_language(language),
            "row": place,
        }
        if reading.input_ids:
            return (
                TokenRow(
                    **labels, input_ids=list(reading.input_ids), loss_mask=list(reading.loss_mask)
                ),
                reading,
                found,
            )
        if reading.text:
            return PlainText(**labels, text=reading.text), reading, found
        verifier = found.get("verifier") or {}
        is_named = isinstance(verifier, Mapping)
        return (
            Conversation(
                **labels,
                messages=reading.messages,
                tools=reading.tools,
                verifier=verifier if is_named else {"name": read_label(verifier)},
                is_preference=reading.shape == "preference",
            ),
            reading,
            found,
        )

    def _category(self, row: Mapping[str, Any]) -> str:
        column = self._cfg.category_column
        own = read_label(row.get(column)) if column is not None else ""
        return own or self._cfg.category


def read_label(value: Any) -> str:
    """Read a category of any type as text; a list is its items joined with `+`."""
    if isinstance(value, list | tuple):
        return "+".join(filter(None, map(read_label, value)))
    # Half of a surrogate pair has no bytes in a file.
    return "" if value is None else str(value).encode("utf-8", "replace").decode()


def read_language(value: Any) -> str:
    """Read a language's code; what is none, as the language of a program, is no language."""
    label = read_label(value).strip()
    is_code = LANGUAGE_CODE.fullmatch(label) and label.lower() not in PROGRAMS
    return label if is_code else ""
