"""Rows of a benchmark's set: files of a local mirror, or the hub."""

import csv
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from marco_train.config.data import SourceConfig, SourceKind
from marco_train.data.sources import SPLITS, open_rows, subset_names
from marco_train.data.turns import RowError
from marco_train.errors import InputError, require

if TYPE_CHECKING:
    from marco_train.evaluation.benchmark.tasks import TaskSet

SUFFIXES = (".jsonl", ".json", ".parquet", ".csv", ".jsonl.gz", ".jsonl.zst")
WHOLE_SETS = {"all", "default"}
"""Names of configurations that repeat the others."""
SHARD = re.compile(r"-\d{5}-of-\d{5}$")


@dataclass(frozen=True)
class SetRows:
    """Where the rows of a set are read."""

    task_set: "TaskSet"
    directory: Path | None
    """Of local files. None: the hub."""
    data_dir_is: str | None = None
    """What a user calls the directory of all sets, where no set has one of its own. None: a field
    of the stage."""

    @classmethod
    def of(
        cls,
        task_set: "TaskSet",
        data_dir: str | None,
        data_dirs: Mapping[str, str],
        data_dir_is: str | None = None,
    ) -> "SetRows":
        """Choose the set's own directory, its folder below the common one, or the hub.

        Raises:
            InputError: The directory is not there, or the hub cannot give the rows of this set.
        """
        own = data_dirs.get(task_set.mirror)
        directory = Path(own) if own is not None else None
        if directory is None and data_dir is not None:
            below = Path(data_dir) / task_set.mirror
            directory = below if below.is_dir() else None
        rows = cls(task_set, directory, data_dir_is)
        if directory is not None:
            require(
                directory.is_dir(),
                f"{task_set.row}: there is no directory {str(directory)!r}{rows.how}",
            )
        require(
            directory is not None or task_set.access.value != "script",
            f"{task_set.row}: {task_set.path} on the hub is a program that makes rows, which is "
            f"not run{rows.how}",
        )
        return rows

    @property
    def how(self) -> str:
        """How a user gets the rows, as the end of a sentence."""
        this = self.task_set
        terms = (
            f"accept the terms at https://huggingface.co/datasets/{this.path}, log in with `hf "
            "auth login`, and "
            if this.access.value == "gated"
            else ""
        )
        subset = next(iter(this.subsets.values()))[0]
        subset = "<subset>" if "*" in subset else subset
        revision = f" --revision {this.revision}" if this.revision else ""
        give = f"stage.data_dirs.{this.mirror}=DIR, or stage.data_dir of"
        if self.data_dir_is is not None:
            give = f"{self.data_dir_is},"
        return (
            f": {terms}fetch its files with `hf download {this.path} --repo-type "
            f"dataset{revision} --local-dir DIR` and give {give} a directory that has them in its "
            f"folder {this.mirror}; "
            f"expected are DIR/{subset}/{this.splits[0]}.parquet, .jsonl or .csv, or "
            f"DIR/{subset}.parquet where there is one split, with the columns "
            f"{', '.join(name for name, is_needed in this.column_names.items() if is_needed)}"
        )

    def read(self, subset: str, split: str) -> Iterator[dict[str, Any]]:
        """Rows of a subset's split, in order.

        Raises:
            InputError: There are none, one cannot be read, or a column is absent.
        """
        what = f"{self.task_set.row}, subset {subset!r}, split {split!r}"
        needed = [name for name, is_needed in self.task_set.column_names.items() if is_needed]
        for number, row in enumerate(self._rows(what, subset, split)):
            if isinstance(row, RowError) or not isinstance(row, dict):
                raise InputError(f"{what}: row {number} cannot be read ({row}); fetch it again")
            absent = [name for name in needed if name not in row]
            require(
                not absent,
                f"{what}: row {number} has no column {', '.join(map(repr, absent))}, but "
                f"{', '.join(map(repr, row))}; the set is another one, or has changed"
                f"{self.how}",
            )
            yield row

    def _rows(self, what: str, subset: str, split: str) -> Iterable[Any]:
        columns = list(self.task_set.column_names)
        if self.directory is None:
            source = SourceConfig(
                kind=SourceKind.hub,
                path=self.task_set.path,
                subset=subset,
                split=split,
                revision=self.task_set.revision,
            )
            try:
                yield from open_rows(what, source).walk(columns)
            except InputError as error:
                raise InputError(f"{error}{self.how}") from error
            return
        files = self._files_of(subset, split)
        require(bool(files), f"{what}: no file of it is in {str(self.directory)!r}{self.how}")
        for file in files:
            if file.suffix == ".csv":
                yield from _csv_rows(file)
            else:
                yield from open_rows(what, SourceConfig(path=str(file))).walk(columns)

    def _files_of(self, subset: str, split: str) -> list[Path]:
        """Files whose folder or own name is the subset's, and that name no other split."""
        found = [(file, *self._names(file)) for file in self._files()]
        of_split = [each for each in found if each[2] in ("", split)]
        of_subset = [file for file, names, _ in of_split if subset in names]
        alone = [name for names in self.task_set.subsets.values() for name in names]
        if not of_subset and len(alone) == 1 and "*" not in alone[0]:
            return [file for file, _, _ in of_split]  # of the only one
        return of_subset

    def _files(self) -> list[Path]:
        assert self.directory is not None
        below = sorted(self.directory.rglob("*"))
        return [
            file
            for file in below
            if file.name.endswith(SUFFIXES)
            and file.is_file()
            and not any(p.startswith(".") for p in file.relative_to(self.directory).parts)
        ]

    def _names(self, file: Path) -> tuple[list[str], str]:
        """What may be the subset of a file, the likeliest first, and its split or an empty text."""
        assert self.directory is not None
        folders = list(file.relative_to(self.directory).parent.parts)
        stem = file.name
        for suffix in sorted(SUFFIXES, key=len, reverse=True):
            stem = stem.removesuffix(suffix)
        stem = SHARD.sub("", stem)
        known = [*self.task_set.splits, *SPLITS]
        split = next((name for name in known if name in folders or name == stem), "")
        if not split:
            ends = [
                s for s in known if re.search(rf"(^{re.escape(s)}[-_.]|[-_.]{re.escape(s)}$)", stem)
            ]
            split = ends[0] if ends else ""
            stem = re.sub(rf"^{split}[-_.]|[-_.]{split}$", "", stem) if split else stem
        names = [name for name in (*reversed(folders), stem) if name not in (split, "data")]
        return names, split

    def names(self) -> list[str]:
        """All subsets that are there.

        Raises:
            InputError: The hub does not say.
        """
        if self.directory is None:
            try:
                found = subset_names(self.task_set.path, self.task_set.revision)
            except InputError as error:
                raise InputError(f"{self.task_set.row}: {error}{self.how}") from error
        else:
            found = [name for file in self._files() for name in self._names(file)[0][:1]]
        return sorted(set(found))


def subsets_of(rows: SetRows, patterns: Sequence[str], *, is_partial: bool) -> list[str]:
    """Names of the subsets that patterns stand for.

    Args:
        rows: Of the set.
        patterns: Names, or patterns with *.
        is_partial: Whether some may be missing.

    Raises:
        InputError: A pattern fits none.
    """
    found: list[str] = []
    for pattern in patterns:
        if "*" in pattern:
            names = [name for name in rows.names() if name.lower() not in WHOLE_SETS]
            fitting = [name for name in names if fnmatchcase(name, pattern)]
            require(
                bool(fitting) or is_partial,
                f"{rows.task_set.row}: no subset is named as {pattern!r}{rows.how}",
            )
            found += fitting
        elif not is_partial or any(rows._files_of(pattern, s) for s in rows.task_set.splits):
            found.append(pattern)
    return list(dict.fromkeys(found))


def _csv_rows(file: Path) -> Iterator[dict[str, Any]]:
    with file.open(newline="", encoding="utf-8-sig") as content:
        yield from csv.DictReader(content)
