"""Rows that hold what a benchmark asks: the same text, or a long run of the same words.

Texts are compared in NFKC, case-folded, with the digits of ASCII and without punctuation, as units:
words, and single characters of scripts that are written without spaces (Han, Kana, Thai, Lao,
Khmer, Burmese, Tibetan).

Legend: U units of a text, L units of a run, R runs.
"""

import sys
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from marco_train.config.data import SourceConfig, SourceKind
from marco_train.data.sources import open_rows
from marco_train.data.turns import RowError
from marco_train.errors import InputError, require
from marco_train.types import Conversation, PlainText, UsableRow

# Names that the characters of scripts without spaces begin with.
SPACELESS = ("CJK UNIFIED", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN")
UInt64s = NDArray[np.uint64]
SIGNS = frozenset("-*/%^")  # what NFKC and Unicode's Sm leave out of a sum


@dataclass(frozen=True)
class Lengths:
    """How long a text has to be, in its units."""

    run: int
    """Of a run by which a row is found."""
    whole: int
    """Of a shorter text, to be found where a row holds all of it."""
    equal: int
    """Of a still shorter one, to be found where a turn says it and nothing else."""


# 13 words are the measure of GPT-3 (arXiv 2005.14165, appendix C), which takes 8 at least.
WORDS = Lengths(run=13, whole=8, equal=4)
CHARACTERS = Lengths(run=30, whole=20, equal=8)  # of Chinese 20 words, of Thai 8


@dataclass(frozen=True)
class Hit:
    """A row that holds a text of a benchmark."""

    row: int
    """Its place among the rows of the source, from 0."""
    benchmark: str
    kind: str
    """`hash`: a turn is such a text; `ngram`: a turn holds a run of one, or all of a short one;
    `near`: a turn is near one to an embedding model."""


class _Spacing(dict[int, str]):
    """Of each character what stands for it in a text whose units are parted by spaces."""

    def __init__(self, *, keeps_signs: bool) -> None:
        super().__init__()
        self._keeps_signs = keeps_signs

    def __missing__(self, code: int) -> str:
        char, category = chr(code), unicodedata.category(chr(code))
        if category == "Nd":
            found = str(unicodedata.decimal(char))
        elif _is_spaceless(char) or (self._keeps_signs and (category == "Sm" or char in SIGNS)):
            found = f" {char} "
        elif category[0] in "LMN":
            found = char
        else:
            found = "" if category == "Cf" else " "  # joiners and marks of direction
        self[code] = found
        return found


WORDS_ALONE, WITH_SIGNS = _Spacing(keeps_signs=False), _Spacing(keeps_signs=True)


def _is_spaceless(char: str) -> bool:
    return unicodedata.name(char, "").startswith(SPACELESS)


def _folded(text: str) -> str:
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())


def _lengths(units: Sequence[str]) -> Lengths:
    spaceless = sum(len(unit) == 1 and _is_spaceless(unit) for unit in units)
    return CHARACTERS if 2 * spaceless > len(units) else WORDS


class _Runs:
    """Hashes of all runs of a text: polynomials of its units' hashes, modulo 2**64."""

    BASE = 0x9E3779B97F4A7C15  # odd, so that it has an inverse
    INVERSE = pow(BASE, -1, 2**64)

    def __init__(self, units: Sequence[str]) -> None:
        # Python's hashes are others in every process, and none leaves this one.
        hashes = np.fromiter(map(hash, units), np.int64, len(units)).view(np.uint64)
        self._down = self._powers(self.INVERSE, len(units))
        self._sums: UInt64s = np.concatenate(  # [U + 1]
            [np.zeros(1, np.uint64), np.cumsum(hashes * self._powers(self.BASE, len(units)))]
        )

    @staticmethod
    def _powers(base: int, count: int) -> UInt64s:
        factors = np.full(count, base, np.uint64)
        factors[:1] = 1
        powers: UInt64s = np.cumprod(factors)
        return powers

    def of(self, length: int) -> UInt64s:
        """Hashes of the runs of `length` units, [U - L + 1] uint64; none of a shorter text."""
        sums = self._sums
        if length >= len(sums):
            return sums[:0]
        differences: UInt64s = sums[length:] - sums[:-length]
        hashes: UInt64s = differences * self._down[: len(differences)]
        return hashes


class Benchmarks:
    """Texts of benchmarks, to look for in rows; memory grows with them and not with the rows."""

    def __init__(self, texts: Iterable[tuple[str, str]]) -> None:
        """Take texts, each with the name of its benchmark.

        Raises:
            InputError: None of them is long enough to be looked for.
        """
        self.num_texts = self.num_short = 0
        self.names: list[str] = []
        self._equal: dict[tuple[str, ...], set[int]] = {}
        found: dict[int, list[UInt64s]] = {}  # by length, [2, R]: hashes and benchmarks
        for name, text in texts:
            if name not in self.names:
                self.names.append(name)
            number = self.names.index(name)
            folded = _folded(text)
            units = folded.translate(WORDS_ALONE).split()
            lengths = _lengths(units)
            self.num_texts += 1
            if len(units) < lengths.equal:
                self.num_short += 1
                continue
            self._equal.setdefault(_text_key(folded), set()).add(number)
            if len(units) >= lengths.whole:
                length = min(len(units), lengths.run)
                hashes = _Runs(units).of(length)
                pairs = np.stack([hashes, np.full_like(hashes, number)])
                found.setdefault(length, []).append(pairs)
        require(
            bool(self._equal),
            f"none of the benchmarks' {self.num_texts} texts is long enough to be looked for: "
            f"{WORDS.equal} words, or {CHARACTERS.equal} characters of a script without spaces",
        )
        self._runs = {
            length: _sorted_once(np.concatenate(pairs, axis=1)) for length, pairs in found.items()
        }

    def hits(self, row: UsableRow) -> list[Hit]:
        """Look for the texts in all turns of a row; one hit of a benchmark, `hash` before `ngram`.

        Rows that were tokenised before are not read.
        """
        kinds: dict[int, str] = {}
        for text in texts_of(row):
            folded = _folded(text)
            for number in self._equal.get(_text_key(folded), ()):
                kinds[number] = "hash"
            runs = _Runs(folded.translate(WORDS_ALONE).split())
            for length, (known, numbers) in self._runs.items():
                hashes = runs.of(length)
                places = np.searchsorted(known, hashes).clip(max=len(known) - 1)
                for run in hashes[known[places] == hashes]:
                    same = slice(known.searchsorted(run), known.searchsorted(run, "right"))
                    kinds = dict.fromkeys(numbers[same].tolist(), "ngram") | kinds
        return [Hit(row.row, self.names[number], kinds[number]) for number in sorted(kinds)]


def _sorted_once(pairs: UInt64s) -> UInt64s:
    """Sort hashes with their benchmarks, [2, R], and keep each pair once."""
    pairs = pairs[:, np.lexsort(pairs[::-1])]
    is_new = np.ones(pairs.shape[1], bool)
    is_new[1:] = (pairs[:, 1:] != pairs[:, :-1]).any(0)
    return pairs[:, is_new]


def _text_key(folded: str) -> tuple[str, ...]:
    """What equal texts have in common; signs of sums count, as 3 + 5 is not 3 - 5."""
    bare = folded.strip().strip("*")  # of bold type
    return tuple(bare.translate(WITH_SIGNS).split())


def texts_of(row: UsableRow) -> Iterator[str]:
    """All that a row says: what is asked, thought and answered."""
    if isinstance(row, PlainText):
        yield row.text
    if isinstance(row, Conversation):
        for message in row.messages:
            yield message.content
            if message.reasoning_content:
                yield message.reasoning_content


def read_benchmarks(directory: Path) -> Iterator[tuple[str, str]]:
    """Read the text columns of the JSON lines below a directory; a file is a benchmark.

    Lines at fault are left out and named on stderr.

    Raises:
        InputError: There are none.
    """
    if not directory.is_dir():
        raise InputError(
            f"there is no directory {str(directory)!r} with benchmarks as .jsonl files"
        )
    files = sorted(directory.rglob("*.jsonl"))
    require(bool(files), f"{str(directory)!r} holds no benchmark: there is no .jsonl file below it")
    for file in files:
        name = str(file.relative_to(directory).with_suffix(""))
        for row in open_rows(name, SourceConfig(kind=SourceKind.jsonl, path=str(file))).walk(()):
            if isinstance(row, RowError):
                print(f"left out of benchmark {name}: {row}", file=sys.stderr)
                continue
            for value in row.values() if isinstance(row, dict) else ():
                if isinstance(value, str):
                    yield name, value
