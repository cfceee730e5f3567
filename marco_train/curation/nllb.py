"""Pairs of NLLB as they are mined: lines of nine columns, in gzip or not, of two languages a file.

    source, target, LASER score, LID of source, LID of target, then crawl and address of each

as https://huggingface.co/datasets/allenai/nllb has them; the names of the two languages, in the
order of the columns, begin the file's name: `deu_Latn-eng_Latn.gz`.
"""

import gzip
import math
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

from xxhash import xxh3_128

from marco_train.config.curation import CARD_LANGUAGES
from marco_train.curation.frame import Cost, Dropped, Row
from marco_train.errors import InputError, require
from marco_train.tracking import log_line

NAME = re.compile(r"([a-z]{3}_[A-Z][a-z]{3})-([a-z]{3}_[A-Z][a-z]{3})(?=[._]|$)")
ENGLISH = CARD_LANGUAGES["en"][0]
NUM_COLUMNS = 9
LONGEST_LINE = 2**16  # bytes; mined sentences are far shorter
SAMPLED = 2**20  # bytes of a file that a plan reads
LINES_PER_SECOND = 60_000
CUT = "the rest of a file that is cut short"
# Of names like example.co.uk, the part before the country.
SECOND_LEVEL = {"ac", "co", "com", "edu", "go", "gov", "gob", "ne", "net", "or", "org"}


@dataclass(frozen=True)
class PairFile:
    """The pairs of English and one language."""

    path: Path
    language: str
    english_first: bool


@dataclass(frozen=True)
class NLLB:
    """The files of some languages, one after the other."""

    files: Sequence[PairFile]
    most: int | None = None
    """Lines of a file that are read. None: all."""
    name: str = "pairs"

    @classmethod
    def of(cls, path: Path, languages: Sequence[str], most: int | None = None) -> "NLLB":
        """Find the files of languages below a directory, or take one file.

        Raises:
            InputError: There is none of a language.
        """
        require(path.exists(), f"input: there is no file and no directory {str(path)!r}")
        by_code = {CARD_LANGUAGES[code][0]: code for code in languages}
        found: dict[str, PairFile] = {}
        other = []
        for file in [path] if path.is_file() else sorted(path.rglob("*")):
            sides = NAME.match(file.name)
            if not file.is_file() or file.name.startswith("."):
                continue
            codes = sides.groups() if sides else ()
            if ENGLISH not in codes or not set(codes) & set(by_code):
                other.append(file.name)
                continue
            language = by_code[codes[0] if codes[1] == ENGLISH else codes[1]]
            require(
                language not in found,
                f"input has two files of {language}, {str(file)!r} beside "
                f"{str(found[language].path) if language in found else ''!r}: leave one",
            )
            found[language] = PairFile(file, language, codes[0] == ENGLISH)
        missing = [code for code in languages if code not in found]
        wanted = f"{CARD_LANGUAGES[missing[0]][0]}-{ENGLISH}.gz" if missing else ""
        require(
            not missing,
            f"input {str(path)!r} has no file of {' '.join(missing)}, as {wanted}; leave them out "
            f"of languages, or fetch https://huggingface.co/datasets/allenai/nllb",
        )
        if other:
            log_line(f"{path}: not read: {', '.join(other[:5])}{', ...' * (len(other) > 5)}")
        return cls([found[code] for code in languages], most)

    def identity(self) -> Any:
        """Names, sizes, and digests of the files' beginnings and ends."""
        files = [
            [each.path.name, each.path.stat().st_size, _ends(each.path)] for each in self.files
        ]
        return [files, self.most]

    def plan(self) -> Cost:
        """Estimate the lines from the first of each file."""
        most = float("inf") if self.most is None else self.most
        rows = sum(min(most, _estimated_lines(each.path)) for each in self.files)
        return Cost(rows, seconds=rows / LINES_PER_SECOND)

    def read(self, skip: int) -> Iterator[Row | Dropped]:
        """Read all pairs; a line at fault is dropped, and so is what a cut file would go on with.

        Lines that are skipped are read, and not taken apart.
        """
        for file in self.files:
            for number, line in enumerate(islice(_lines(file.path), self.most), 1):
                if skip:
                    skip -= 1
                else:
                    yield _pair(file, number, line)


def _ends(path: Path) -> str:
    digest = xxh3_128()
    with path.open("rb") as content:
        digest.update(content.read(SAMPLED))
        content.seek(max(0, path.stat().st_size - SAMPLED))
        digest.update(content.read())
    return str(digest.hexdigest())


def _opened(path: Path) -> IO[bytes]:
    with path.open("rb") as content:
        is_packed = content.read(2) == b"\x1f\x8b"
    return gzip.open(path) if is_packed else path.open("rb")  # type: ignore[return-value]


def _lines(path: Path) -> Iterator[bytes | None]:
    """All lines of a file; None in place of one that is too long, and of what was cut off."""
    with _opened(path) as content:
        try:
            while line := content.readline(LONGEST_LINE):
                if line.endswith(b"\n") or len(line) < LONGEST_LINE:
                    yield line
                    continue
                while line and not line.endswith(b"\n"):
                    line = content.readline(LONGEST_LINE)
                yield b""
        except (EOFError, gzip.BadGzipFile, zlib.error):
            yield None


class _LineError(ValueError):
    """Why a line cannot be taken."""


def _pair(file: PairFile, number: int, line: bytes | None) -> Row | Dropped:
    row: Row = {
        "id": f"{file.path.name.partition('.')[0]}:{number}",
        "language": file.language,
    }
    if line is None:
        return Dropped(row, CUT)
    try:
        return row | _taken_apart(line, english_first=file.english_first)
    except _LineError as error:
        return Dropped(row, str(error))


def _taken_apart(line: bytes, *, english_first: bool) -> Row:
    """Read the columns of a line.

    Raises:
        _LineError: It cannot be taken.
    """
    if not line:
        raise _LineError(f"a line of more than {LONGEST_LINE} bytes")
    try:
        columns = line.decode("utf-8").rstrip("\r\n").split("\t")
    except UnicodeDecodeError as error:
        raise _LineError("a line that is not UTF-8") from error
    if len(columns) != NUM_COLUMNS:
        raise _LineError(f"a line of other than {NUM_COLUMNS} columns")
    try:
        laser, *lid = map(float, columns[2:5])
    except ValueError as error:
        raise _LineError("a line whose scores are no numbers") from error
    if not all(map(math.isfinite, (laser, *lid))):
        raise _LineError("a line whose scores are no numbers")
    texts, addresses = [columns[0].strip(), columns[1].strip()], [columns[6], columns[8]]
    if not all(texts):
        raise _LineError("a line with an empty side")
    english, other = (0, 1) if english_first else (1, 0)
    return {
        "english": texts[english],
        "other": texts[other],
        "laser": laser,
        "english_lid": lid[english],
        "other_lid": lid[other],
        "domain": domain_of(addresses[other]) or domain_of(addresses[english]),
    }


def domain_of(address: str) -> str:
    """The registered name of an address's host, nearly; empty where there is none."""
    try:
        host = (urlsplit(address if "//" in address else f"//{address}").hostname or "").strip(".")
    except ValueError:
        return ""
    parts = host.split(".")
    if len(parts) < 2:
        return ""
    three = len(parts) > 2 and len(parts[-1]) == 2 and parts[-2] in SECOND_LEVEL
    return ".".join(parts[-3 if three else -2 :])


def _estimated_lines(path: Path) -> float:
    """Lines of a file, as its beginning has them; exact where it is short."""
    size = path.stat().st_size
    with path.open("rb") as content:
        begin = content.read(SAMPLED)
    if begin.startswith(b"\x1f\x8b"):
        try:
            begin_text = zlib.decompressobj(wbits=31).decompress(begin)
        except zlib.error as error:
            raise InputError(f"{str(path)!r} cannot be unpacked: {error}") from error
    else:
        begin_text = begin
    return begin_text.count(b"\n") * size / len(begin) if begin else 0.0
