"""The token ids of a source's rows, made once and kept on disk.

Legend: N rows, T tokens of all of them.
"""

import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

import numpy as np

from marco_train.data.cache import cache_directory
from marco_train.data.conversations import BadRow, Source
from marco_train.data.drops import DROPS, MALFORMED, TRUNCATED, Dropped
from marco_train.distributed import gather_objects, is_main, rank
from marco_train.errors import InputError
from marco_train.files import replace_directory
from marco_train.types import Example, Row, UsableRow

Render = Callable[[UsableRow], Example | str]
"""Gives the metric that counts the row instead, where it is to be dropped."""

DAY = 24 * 60 * 60  # seconds
MAX_BYTES = 50 * 2**30  # of all token files; the ones that were not used for longest go
# ids, mask: [T]; of each row: where its tokens end, 0 or which of DROPS it is or CUT, its category
# and language, its place in the dataset.
FILES = {
    "ids": np.int32,
    "mask": np.uint8,
    "ends": np.int64,
    "codes": np.int8,
    "labels": np.int32,
    "rows": np.int64,
}
CUT = -1  # the code of a row that was cut to the limit


T = TypeVar("T")


def render_row(
    source: Source, index: int, render: Callable[[UsableRow], T | str]
) -> tuple[Row, T] | Dropped:
    """Render a row, unless it is dropped."""
    row = source[index]
    if isinstance(row, BadRow):
        return Dropped(MALFORMED, row.source, row.row, row.reason)
    try:
        found = render(row)
    except InputError as error:
        return Dropped(MALFORMED, row.source, row.row, str(error), row.language)
    if isinstance(found, str):
        return Dropped(found, row.source, row.row, "", row.language)
    return row, found


@dataclass
class LostRows:
    """Which rows of a source a stage cannot use."""

    counts: Counter[str] = field(default_factory=Counter)
    """By the metric that counts them."""
    reasons: dict[int, str] = field(default_factory=dict)
    """What is wrong with those that cannot be rendered, by index."""
    languages: dict[str, Counter[str]] = field(default_factory=dict)
    """By the metric and the language; also of rows that are cut and used."""

    def add(self, index: int, found: tuple[Row, Example] | Dropped) -> None:
        """Count a row, where it is lost or cut."""
        if isinstance(found, Dropped):
            self.counts[found.metric] += 1
            self._languages_of(found.metric)[found.language] += 1
            if found.reason:
                self.reasons[index] = found.reason
        elif found[1].is_truncated:
            self._languages_of(TRUNCATED)[found[0].language] += 1

    def update(self, other: "LostRows") -> None:
        """Add what another rank counted."""
        self.counts.update(other.counts)
        self.reasons |= other.reasons
        for metric, languages in other.languages.items():
            self._languages_of(metric).update(languages)

    def _languages_of(self, metric: str) -> Counter[str]:
        return self.languages.setdefault(metric, Counter())

    @staticmethod
    def of_json(kept: Mapping[str, Any]) -> "LostRows":
        """Read what `vars` gave."""
        return LostRows(
            Counter(kept["counts"]),
            {int(index): reason for index, reason in kept["reasons"].items()},
            {metric: Counter(languages) for metric, languages in kept["languages"].items()},
        )


class TokenFiles:
    """The rendered rows of a source, dealt out to as many parts as there were ranks."""

    def __init__(self, directory: Path, source: str) -> None:
        """Map the files of a directory into memory.

        Raises:
            OSError: Some of them are not here, or not whole.
        """
        self._source = source
        kept = json.loads((directory / "rows.json").read_text())
        sizes = {file.name: file.stat().st_size for file in directory.iterdir()}
        if any(sizes.get(name) != size for name, size in kept["sizes"].items()):
            raise OSError(f"files under {directory} are missing or cut off")
        self._labels: list[list[tuple[str, str]]] = kept["labels"]  # by part
        self.lost = LostRows.of_json(kept["lost"])
        self._parts = [
            {name: _read(directory / f"{part}.{name}", kind) for name, kind in FILES.items()}
            for part in range(kept["num_parts"])
        ]

    @property
    def mean_length(self) -> float:
        """Tokens of a row that is used, in the mean."""
        num_tokens = sum(int(part["ends"][-1]) for part in self._parts if len(part["ends"]))
        return num_tokens / max(1, sum(int((part["codes"] <= 0).sum()) for part in self._parts))

    def __getitem__(self, index: int) -> tuple[Row, Example] | Dropped:
        """What `render_row` made of a row."""
        place, number = divmod(index, len(self._parts))
        part = self._parts[number]
        code, row = int(part["codes"][place]), int(part["rows"][place])
        category, language = self._labels[number][part["labels"][place]]
        if code > 0:
            reason = self.lost.reasons.get(index, "")
            return Dropped(DROPS[code - 1], self._source, row, reason, language)
        start, end = (int(part["ends"][place - 1]) if place else 0), int(part["ends"][place])
        example = Example(
            part["ids"][start:end].tolist(),
            part["mask"][start:end].astype(bool).tolist(),
            is_truncated=code == CUT,
        )
        return Row(self._source, category, language, row), example


def _read(file: Path, kind: Any) -> np.ndarray:
    # What is empty cannot be mapped.
    return np.memmap(file, kind, "r") if file.stat().st_size else np.zeros(0, kind)


def token_files(
    source: Source, rows: Iterator[int], render: Render, name: str
) -> tuple[TokenFiles | None, LostRows | None]:
    """Render all rows of a source, or find them rendered; every rank takes part.

    Args:
        source: Its rows.
        rows: This rank's: rank, rank + world_size, and so on.
        render: Makes the tokens of a row.
        name: Of all that the tokens are a function of.

    Returns:
        The files, or None where this machine holds none: there is no room, or another machine made
        them; and the rows that are lost, the same on every rank, unless some could not be rendered.
    """
    found, lost = _opened(source, name), None
    if not gather_objects(found is not None)[0]:
        partial = gather_objects(f".{uuid4().hex}.partial")[0]
        try:
            part = _write_part(source, rows, render, cache_directory() / partial)
        except OSError:  # no room, or no right
            part = None
        parts = gather_objects(part)
        if None not in parts:
            whole = _joined([each for each in parts if each is not None])
            lost = whole["lost"]
            if is_main():
                _publish(whole, partial, f"tokens-{name}")
        gather_objects(None)  # the others look for it only now
        _remove(partial)  # where it was not given its name
        found = _opened(source, name)
    if found is not None:
        lost = found.lost
    return found, gather_objects(lost)[0]


def _remove(unfinished: str) -> None:
    with suppress(OSError):  # there is no cache
        shutil.rmtree(cache_directory() / unfinished, ignore_errors=True)


def _opened(source: Source, name: str) -> TokenFiles | None:
    try:
        directory = cache_directory() / f"tokens-{name}"
        found = TokenFiles(directory, source.name)
    except (OSError, ValueError, KeyError):
        return None
    with suppress(OSError):  # it may be another user's
        directory.touch()  # it was used
    return found


def _write_part(
    source: Source, rows: Iterator[int], render: Render, directory: Path
) -> dict[str, Any]:
    """Write this rank's part; gives what is no array, as JSON."""
    directory.mkdir(parents=True, exist_ok=True)
    files = {name: (directory / f"{rank()}.{name}").open("wb") for name in FILES}
    labels: dict[tuple[str, str], int] = {}
    lost, end = LostRows(), 0
    with ExitStack() as opened:
        for file in files.values():
            opened.enter_context(file)
        for index in rows:
            found = render_row(source, index, render)
            lost.add(index, found)
            if isinstance(found, Dropped):
                label = labels.setdefault(("", found.language), len(labels))
                values: dict[str, Any] = {"codes": DROPS.index(found.metric) + 1, "labels": label}
                values |= {"ids": [], "mask": [], "rows": found.row}
            else:
                row, example = found
                label = labels.setdefault((row.category, row.language), len(labels))
                code = CUT if example.is_truncated else 0
                values = {"codes": code, "labels": label, "rows": row.row}
                values |= {"ids": example.input_ids, "mask": example.loss_mask}
            end += len(values["ids"])
            values["ends"] = end
            for name, kind in FILES.items():
                files[name].write(np.asarray(values[name], kind).tobytes())
    sizes = {f"{rank()}.{name}": (directory / f"{rank()}.{name}").stat().st_size for name in FILES}
    return {"labels": list(labels), "lost": lost, "sizes": sizes}


def _joined(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What `rows.json` says of the parts of all ranks."""
    lost = LostRows()
    for part in parts:
        lost.update(part["lost"])
    return {
        "num_parts": len(parts),
        "labels": [part["labels"] for part in parts],
        "sizes": {file: size for part in parts for file, size in part["sizes"].items()},
        "lost": lost,
    }


def _publish(whole: dict[str, Any], unfinished: str, name: str) -> None:
    """Give the directory of all parts its name, if they lie in one directory."""
    with suppress(OSError):  # rows are rendered where they are drawn
        partial, directory = cache_directory() / unfinished, cache_directory() / name
        if whole["sizes"].keys() != {file.name for file in partial.iterdir()}:
            return  # other machines have directories of their own
        (partial / "rows.json").write_text(json.dumps(whole | {"lost": vars(whole["lost"])}))
        _make_room(directory.parent)
        replace_directory(directory, partial)


def _make_room(directory: Path) -> None:
    """Remove the files that were not used for longest, where all of them take too much."""
    for left in directory.glob(".*.partial"):  # of a launch that was killed
        if time.time() - left.stat().st_mtime > DAY:
            shutil.rmtree(left, ignore_errors=True)
    kept = sorted(directory.glob("tokens-*"), key=lambda path: path.stat().st_mtime, reverse=True)
    total = 0
    for path in kept:
        total += sum(file.stat().st_size for file in path.iterdir())
        if total > MAX_BYTES:
            shutil.rmtree(path, ignore_errors=True)
