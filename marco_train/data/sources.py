"""Rows of datasets where they lie: JSON lines, JSON arrays, Parquet and Arrow files, and the hub.

Files stay on disk: JSON lines are mapped into memory and parsed row by row, others become Arrow
tables that are mapped as well. So a source costs memory by its number of rows, not by its size.
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
from functools import cached_property
from hashlib import sha256
from itertools import accumulate
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np

from marco_train.config.data import SourceConfig, SourceKind
from marco_train.data.cache import digest_of_file
from marco_train.data.turns import MOST_KEPT, RowError
from marco_train.errors import InputError

GZIP, ZSTD, PARQUET, ARROW = b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"PAR1", b"ARROW1"
SUFFIXES = (".jsonl", ".json", ".ndjson", ".parquet", ".arrow")
PACKED = (".gz", ".zst", "")
# Rows that are digested together; to change it changes every digest.
ROWS_TOGETHER = 1000
CHUNK = 2**24  # bytes that are searched for ends of lines together
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
    if cfg.kind is SourceKind.hub:
        return _open_hub(name, cfg)
    files = _files(cfg.path)
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


def _files(path: str) -> list[Path]:
    """The files of a path, of a directory and those below it, or of a pattern; in order."""
    if Path(path).is_file():
        return [Path(path)]
    if Path(path).is_dir():
        if (Path(path) / "state.json").is_file():  # of datasets' save_to_disk
            return sorted(Path(path).glob("*.arrow"))
        found = Path(path).rglob("*")
    elif glob.has_magic(path):
        return sorted(
            Path(file) for file in glob.glob(path, recursive=True) if Path(file).is_file()
        )
    else:
        return []
    endings = tuple(suffix + packed for suffix in SUFFIXES for packed in PACKED)
    return sorted(
        file
        for file in found
        if file.name.endswith(endings) and file.is_file() and not file.name.startswith((".", "_"))
        if file.name not in ("dataset_info.json", "dataset_infos.json", "state.json")
    )


def _open_file(name: str, file: Path, kind: SourceKind) -> Rows:
    """Open a file by what it holds, whatever it is called."""
    with file.open("rb") as content:
        begins = content.read(8)
    if begins.startswith((PARQUET, ARROW)) or file.suffix == ".arrow":
        return _open_table(name, file, "parquet" if begins.startswith(PARQUET) else "arrow")
    if kind is SourceKind.parquet:
        raise InputError(f"source {name!r}: {str(file)!r} cannot be opened: it is no Parquet file")
    return _JsonLines(file, begins)


def _open_table(name: str, file: Path, builder: str) -> Rows:
    import datasets  # seconds to import

    digest = digest_of_file(file)
    try:
        # `datasets` knows a file by its path and time; the name makes it read other bytes anew.
        found = datasets.load_dataset(
            builder, f"rows-{digest}", data_files=str(file), split="train"
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
        raise InputError(f"source {name!r}: {cfg.path!r} cannot be opened: {said}") from error
    return _Table(found, "")


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
        self._digest = digest

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, row: int) -> Any:
        return self._table[row]

    def walk(self, columns: Collection[str]) -> Iterator[Any]:
        """All rows in order, with some of their columns."""
        asked = [name for name in self._table.column_names if name in columns]
        part = self._table.select_columns(asked or self._table.column_names[:1])
        for batch in part.with_format("arrow").iter(batch_size=ROWS_TOGETHER):
            yield from batch.to_pylist()

    @cached_property
    def digest(self) -> str:
        """Of the file; else of what the rows say, however the files of the hub are cut."""
        if self._digest:
            return self._digest
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
        begins = line[:MOST_KEPT].decode("utf-8", "replace")
        raise RowError(kind, f"{self._file}, line {self._numbers[row]}: {kind} ({why})", begins)

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
    """Write each row of a JSON array as a line; what is no such array stays as it is."""
    try:
        rows = json.loads(bytes(content).decode("utf-8-sig"), object_pairs_hook=_object)
    except (ValueError, RecursionError):
        return content
    if not isinstance(rows, list):
        return content
    with tempfile.TemporaryFile() as lines:
        lines.writelines(json.dumps(row).encode() + b"\n" for row in rows)
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
