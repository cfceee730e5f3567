"""Rows of datasets where they lie: JSON lines, JSON arrays, Parquet and Arrow files, and the hub.

Files stay on disk: JSON lines are mapped into memory and parsed row by row, others become Arrow
tables that are mapped as well. So a source costs memory by its number of rows, not by its size; a
JSON array is read whole once, and then lies on disk as lines.
"""

import glob
import gzip
import json
import mmap
import re
import tempfile
import zlib
from bisect import bisect_right
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from functools import cached_property
from hashlib import sha256
from itertools import accumulate
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np

from marco_train.config.data import SourceConfig, SourceKind
from marco_train.data.cache import digest_of_file, read_json, write_json
from marco_train.data.turns import MOST_SHOWN, RowError
from marco_train.distributed import is_main
from marco_train.errors import InputError
from marco_train.tracking import log_line

GZIP, ZSTD, PARQUET, ARROW = b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"PAR1", b"ARROW1"
NO_ROWS = {
    b"PK\x03\x04": "a zip file: unpack it",
    b"\xfd7zXZ": "an xz file: unpack it, or pack it with gzip or zstd",
    b"BZh": "a bzip2 file: unpack it, or pack it with gzip or zstd",
    b"\xff\xfe": "UTF-16: save it as UTF-8",
    b"\xfe\xff": "UTF-16: save it as UTF-8",
}
SPLITS = ("train", "validation", "valid", "test", "dev", "eval")
SUFFIXES = (".jsonl", ".json", ".ndjson", ".parquet", ".arrow")
PACKED = (".gz", ".zst")
OF_DATASETS = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
# Rows that are digested together; to change it changes every digest.
ROWS_TOGETHER = 1000
# What a value of a table raises that Python cannot take: text of other bytes than UTF-8, a date
# beyond its years, a time zone that is none.
UNREADABLE = (ValueError, OverflowError, LookupError)
CHUNK = 2**24  # bytes that are searched for ends of lines together
BEFORE_ITEM, END_OF_ARRAY = re.compile(r"[\s,]*"), re.compile(r"[\s,]*(\]|\Z)")
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


class Rows(Protocol):
    """The rows of a dataset; what stands in a row is not looked at."""

    def __len__(self) -> int:
        """Number of rows."""

    def __getitem__(self, row: int) -> Any:
        """What a row holds; raises RowError where nothing can be read of it."""

    def walk(self, columns: Collection[str]) -> Iterator[Any]:
        """All rows in order, quicker than one by one; a RowError in place of one at fault.

        Of files with columns, only those that are asked for are read.
        """

    @property
    def digest(self) -> str:
        """Of what the rows say: the same wherever they lie and whenever they were written."""


def open_rows(name: str, cfg: SourceConfig) -> Rows:
    """Open the rows of a source.

    Raises:
        InputError: There is nothing, or it cannot be read.
    """
    try:
        return _open_rows(name, cfg)
    except OSError as error:
        raise InputError(f"source {name!r}: {cfg.path!r} cannot be read: {error}") from error


def lies_here(cfg: SourceConfig) -> bool:
    """Whether the rows of a source are files of this machine, and nothing has to be fetched."""
    return cfg.kind is not SourceKind.hub and bool(_files(cfg.path, cfg.split))


def _open_rows(name: str, cfg: SourceConfig) -> Rows:
    if cfg.kind is SourceKind.hub:
        return _open_hub(name, cfg)
    files = _files(cfg.path, cfg.split)
    if files:
        opened = [_open_file(name, file, cfg.kind) for file in files]
        return opened[0] if len(opened) == 1 else _Shards(opened)
    if cfg.kind is SourceKind.auto and (
        Path(cfg.path).is_dir() or (HUB_NAME.fullmatch(cfg.path) and not Path(cfg.path).suffix)
    ):
        return _open_hub(name, cfg)
    raise InputError(
        f"source {name!r}: there is no file {cfg.path!r}, nor one below it or of that pattern "
        f"that ends in {', '.join(SUFFIXES)}, with or without .gz or .zst"
    )


def _files(path: str, split: str) -> list[Path]:
    """The files of a path, of a directory and those below it, or of a pattern; in order.

    Of a directory whose files name several splits, those of one.
    """
    if Path(path).is_file():
        return [Path(path)]
    root = Path(path)
    if root.is_dir():
        found = [file for file in root.rglob("*") if _may_hold_rows(file, file.relative_to(root))]
    elif glob.has_magic(path):
        found = [Path(file) for file in glob.glob(path, recursive=True) if Path(file).is_file()]
        of_rows = [file for file in found if _may_hold_rows(file, Path(file.name))]
        return sorted(of_rows or found)
    else:
        return []
    split_of = {file: _split_of(file.relative_to(root)) for file in found}
    splits = set(split_of.values()) - {""}
    if len(splits) > 1:
        if split not in splits:
            raise InputError(f"{path} has the splits {sorted(splits)}, and none called {split!r}")
        found = [file for file in found if split_of[file] in ("", split)]
        if is_main():
            others = ", ".join(sorted(splits - {split}))
            log_line(f"{path}: its split {split!r} is read, and not {others}")
    unpacked = set(found)  # of what lies there packed as well, one file counts
    return sorted(
        file for file in found if file.suffix not in PACKED or file.with_suffix("") not in unpacked
    )


def _may_hold_rows(file: Path, below: Path) -> bool:
    """Whether a file below a directory is one of rows, by its name."""
    endings = tuple(suffix + packed for suffix in SUFFIXES for packed in ("", *PACKED))
    return (
        file.name.endswith(endings)
        and file.is_file()
        and not any(part.startswith((".", "_")) for part in below.parts)
        and not (file.suffix == ".arrow" and file.name.startswith("cache-"))
        and file.name not in OF_DATASETS
    )


def _split_of(below: Path) -> str:
    """The split that a path names, as data/train-00000-of-00002.parquet does; else none."""
    words = re.split(r"[^a-z]+", str(below).lower())
    return next((word for word in words if word in SPLITS), "")


def _open_file(name: str, file: Path, kind: SourceKind) -> Rows:
    """Open a file by what it holds, whatever it is called."""
    ending = Path(file.name.lower().removesuffix(".gz")).suffix
    if ending in (".csv", ".tsv"):
        parted = ", sep='\\t'" if ending == ".tsv" else ""
        raise InputError(
            f"source {name!r}: {str(file)!r}: CSV is not read: make JSON lines of it, with "
            f"datasets.Dataset.from_csv({str(file)!r}{parted}).to_json('rows.jsonl') in Python"
        )
    with file.open("rb") as content:
        begins = content.read(8)
    for sign, what in NO_ROWS.items():
        if begins.startswith(sign):
            raise InputError(f"source {name!r}: {str(file)!r} is {what}")
    if begins.startswith((PARQUET, ARROW)) or file.suffix == ".arrow":
        return _open_table(name, file, "parquet" if begins.startswith(PARQUET) else "arrow")
    if kind is SourceKind.parquet:
        raise InputError(f"source {name!r}: {str(file)!r} cannot be opened: it is no Parquet file")
    return _JsonLines(file, begins)


def _open_table(name: str, file: Path, builder: str) -> Rows:
    import datasets  # seconds to import
    from pyarrow.parquet import ParquetFile

    digest = digest_of_file(file)
    try:
        if builder == "parquet" and not ParquetFile(file).metadata.num_rows:
            return _Table(datasets.Dataset.from_list([]), digest)  # which `datasets` cannot load
        # `datasets` knows a file by its path and time; the name makes it read other bytes anew.
        found = datasets.load_dataset(
            builder, f"rows-{digest}", data_files=glob.escape(str(file)), split="train"
        )
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise InputError(f"source {name!r}: {file} cannot be read: {_why(error)}") from error
    return _Table(found, digest)


def _open_hub(name: str, cfg: SourceConfig) -> Rows:
    import datasets

    try:
        found = datasets.load_dataset(cfg.path, cfg.subset, split=cfg.split, revision=cfg.revision)
    # No such dataset, revision, subset or split; no network; a data set that is a program.
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        said = _why(error)
        if "script" in said:
            said += ": it is a program that makes rows, which is not run; fetch its files"
        here = "" if cfg.kind is SourceKind.hub else "is no file here, and as a set of the hub "
        raise InputError(f"source {name!r}: {cfg.path!r} {here}cannot be opened: {said}") from error
    return _Table(found, "")


def subset_names(path: str, revision: str | None) -> list[str]:
    """Name the configurations of a set of the hub.

    Raises:
        InputError: It cannot be asked.
    """
    import datasets

    try:
        return list(datasets.get_dataset_config_names(path, revision=revision))
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise InputError(f"{path!r} cannot be opened: {_why(error)}") from error


def _why(error: BaseException) -> str:
    """What is at the bottom of an error of `datasets`, which hides it behind one of its own."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


class _Table:
    """Rows of a dataset of the library `datasets`."""

    def __init__(self, table: Any, digest: str) -> None:
        self._table = table
        self._arrow = table.with_format("arrow")  # which decodes no images and no sound
        self._digest = digest

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, row: int) -> Any:
        return _row_of(self._arrow[row : row + 1])

    def walk(self, columns: Collection[str]) -> Iterator[Any]:
        """All rows in order, with some of their columns."""
        asked = [name for name in self._table.column_names if name in columns]
        part = self._table.select_columns(asked or self._table.column_names[:1])
        for batch in part.with_format("arrow").iter(batch_size=ROWS_TOGETHER):
            try:
                rows = batch.to_pylist()
            except UNREADABLE:
                rows = [_row_or_fault(batch.slice(row, 1)) for row in range(len(batch))]
            yield from rows

    @cached_property
    def digest(self) -> str:
        """Of the file; else of what the rows say, however the files of the hub are cut."""
        if not self._digest:
            # Of the library's own making: a function of files, times and revision.
            known = f"hub-{sha256(self._table._fingerprint.encode()).hexdigest()}"
            self._digest = read_json(known) or self._digest_of_rows()
            write_json(known, self._digest)
        return self._digest

    def _digest_of_rows(self) -> str:
        import pyarrow as pa

        digest = sha256()
        for table in self._table.with_format("arrow").iter(batch_size=ROWS_TOGETHER):
            # Copied row by row: the bytes of a part depend on what it was cut from.
            copied = table.replace_schema_metadata(None).take(pa.array(range(len(table))))
            written = pa.BufferOutputStream()
            with pa.ipc.new_stream(written, copied.schema) as stream:
                stream.write_table(copied.combine_chunks())
            digest.update(written.getvalue())
        return digest.hexdigest()


def _row_of(table: Any) -> Any:
    """The row of a table that has one.

    Raises:
        RowError: One of its values cannot be read.
    """
    try:
        return table.to_pylist()[0]
    except UNREADABLE as error:
        found: BaseException = error
    readable = {}
    for name, column in zip(table.column_names, table.columns, strict=True):
        with suppress(*UNREADABLE):
            readable[name] = column.to_pylist()[0]
    kind = "not UTF-8" if isinstance(found, UnicodeDecodeError) else "a value that cannot be read"
    names = ", ".join(name for name in table.column_names if name not in readable)
    raise RowError(kind, f"the column {names}: {kind} ({found})", repr(readable)[:MOST_SHOWN])


def _row_or_fault(table: Any) -> Any:
    try:
        return _row_of(table)
    except RowError as fault:
        return fault


class _Shards:
    """Rows of several files, one after the other; their columns may differ."""

    def __init__(self, shards: Sequence[Rows]) -> None:
        self._shards = shards
        self._ends = list(accumulate(map(len, shards)))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, row: int) -> Any:
        shard = bisect_right(self._ends, row)
        return self._shards[shard][row - (self._ends[shard - 1] if shard else 0)]

    def walk(self, columns: Collection[str]) -> Iterator[Any]:
        """All rows in order, shard by shard."""
        for shard in self._shards:
            yield from shard.walk(columns)

    @cached_property
    def digest(self) -> str:
        """Of the files, in order."""
        return sha256("/".join(shard.digest for shard in self._shards).encode()).hexdigest()


class _JsonLines:
    """One row a line, parsed where it is asked for; an array of rows becomes lines first."""

    def __init__(self, file: Path, begins: bytes) -> None:
        self._file = file
        self._is_packed = begins.startswith((GZIP, ZSTD))
        if self._is_packed:
            self._bytes = _unpacked(file, is_gzip=begins.startswith(GZIP))
        else:
            with file.open("rb") as content:
                self._bytes = _mapped(content)
        self._digest_packed = sha256(self._bytes).hexdigest() if self._is_packed else ""
        if re.match(rb"(\xef\xbb\xbf)?\s*\[", self._bytes[:4096]):
            self._bytes = _lines_of_array(self._bytes)
        self._starts, self._numbers = _lines(self._bytes)

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, row: int) -> Any:
        line = self._bytes[self._starts[row] : self._starts[row + 1]]
        try:
            return json.loads(line.decode("utf-8-sig"), object_pairs_hook=_object)
        except UnicodeDecodeError as error:
            byte = error.object[error.start]
            kind, why = "not UTF-8", f"{error.reason}, byte {byte:#04x}; save the file as UTF-8"
        except (ValueError, RecursionError) as error:
            kind, why = "not JSON", str(error)
            if row == 0 and self._begins_with_an_object:
                why = "an object over several lines: write each row in one, or all as an array"
        begins = line[:MOST_SHOWN].decode("utf-8", "replace")
        raise RowError(kind, f"{self._file}, line {self._numbers[row]}: {kind} ({why})", begins)

    @cached_property
    def _begins_with_an_object(self) -> bool:
        """Whether the first lines together are an object, as where a file is indented."""
        begins = self._bytes[:CHUNK].decode("utf-8-sig", "replace").lstrip()
        try:
            found, end = json.JSONDecoder().raw_decode(begins)
        except (ValueError, RecursionError):
            return False
        return isinstance(found, dict) and "\n" in begins[:end]

    def walk(self, columns: Collection[str]) -> Iterator[Any]:
        """All rows in order, whole."""
        for row in range(len(self)):
            try:
                yield self[row]
            except RowError as fault:
                yield fault

    @cached_property
    def digest(self) -> str:
        """Of the text, packed or not."""
        return self._digest_packed if self._is_packed else digest_of_file(self._file)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} stands twice in one object")
    return found


def _mapped(content: IO[bytes]) -> Any:
    """Map a file into memory, which outlives the file's being open."""
    content.seek(0, 2)
    if content.tell() == 0:  # which cannot be mapped
        return b""
    return mmap.mmap(content.fileno(), 0, access=mmap.ACCESS_READ)


def _unpacked(file: Path, *, is_gzip: bool) -> Any:
    """Unpack a file to disk, where nobody else sees it."""
    kind = "gzip" if is_gzip else "zstd"
    with tempfile.TemporaryFile() as unpacked:
        try:
            with _opened(file, kind) as content:
                _copy(content, unpacked)
        except (OSError, EOFError, zlib.error) as error:
            if isinstance(error, OSError) and error.errno is not None:  # as a disk that is full
                raise
            raise InputError(f"{file} is no whole {kind} file ({error}); fetch it again") from error
        return _mapped(unpacked)


def _opened(file: Path, kind: str) -> Any:
    if kind == "gzip":
        return gzip.open(file)
    import pyarrow as pa

    return pa.input_stream(str(file), compression=kind)


def _copy(content: Any, target: IO[bytes]) -> None:
    while chunk := content.read(2**24):
        target.write(chunk)
    target.flush()


def _lines_of_array(content: Any) -> Any:
    """Write each row of a JSON array as a line; lines of which the first is an array stay.

    From where it is no JSON on, the rest of an array is one line at fault. Bytes that are not UTF-8
    become halves of surrogate pairs, of which the row is told.
    """
    text = bytes(content).decode("utf-8-sig", "surrogateescape")
    first_line = text.lstrip().partition("\n")[0]
    with suppress(ValueError, RecursionError):
        json.loads(first_line)
        if len(first_line.strip()) < len(text.strip()):
            return content
    decoder, at = json.JSONDecoder(), text.index("[") + 1
    with tempfile.TemporaryFile() as lines:
        while not (end := END_OF_ARRAY.match(text, at)):
            before = BEFORE_ITEM.match(text, at)
            at = before.end() if before else at
            try:
                row, at = decoder.raw_decode(text, at)
            except (ValueError, RecursionError):
                break
            lines.write(json.dumps(row).encode() + b"\n")
        rest = text[at : at + MOST_SHOWN] if end is None else text[end.end() :].strip()[:MOST_SHOWN]
        if end is not None and end[1] != "]":
            rest = "the array is cut off"
        if rest:
            lines.write(" ".join(rest.split()).encode("utf-8", "replace") + b"\n")
        lines.flush()
        return _mapped(lines)


def _lines(content: Any) -> tuple[np.ndarray, Sequence[int] | np.ndarray]:
    """Where each line that is not blank begins, with the end of all, and its number from 1."""
    view = np.frombuffer(content, np.uint8)
    places = range(0, len(view), CHUNK)
    counts = [int(np.count_nonzero(view[at : at + CHUNK] == ord("\n"))) for at in places]
    starts = np.zeros(sum(counts) + 2, np.int64)
    filled = 1
    for at, count in zip(places, counts, strict=True):
        starts[filled : filled + count] = np.flatnonzero(view[at : at + CHUNK] == ord("\n"))
        starts[filled : filled + count] += at + 1
        filled += count
    starts[-1] = len(view)
    if starts[-2] == len(view):  # nothing stands behind the last line's end
        starts = starts[:-1]
    # Only what begins with white space can be blank.
    doubtful = np.flatnonzero(view[starts[:-1]] <= ord(" ")).tolist() if len(view) else []
    blank = [i for i in doubtful if not content[starts[i] : starts[i + 1]].strip()]
    if not blank:
        return starts, range(1, len(starts))
    kept = np.ones(len(starts), bool)
    kept[blank] = False
    return starts[kept], np.flatnonzero(kept[:-1]) + 1
