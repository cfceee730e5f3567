"""Whether a text says more than the facts that it was to be made of: numbers, years and names.

Numbers are compared in any script's digits. A name is a word with a capital within a sentence,
which only Latin, Cyrillic and Greek letters show; in German, whose nouns have capitals, it follows
another one, as in Stadt Wien. In other scripts what is written in Latin letters, or stands in the
quotation marks of titles, is taken for one. An ending may differ, as names are inflected.
"""

import re
from collections.abc import Iterable, Sequence
from itertools import pairwise

from marco_train.evaluation.verifiers import comparable

NUMBER = re.compile(r"(?<!\d)\d{1,3}(?:[.,\s\u00a0\u202f'’]\d{3})+(?!\d)|\d+")
WORD = re.compile(r"[^\W\d_]+(?:[-'’][^\W\d_]+)*")
TITLE = re.compile(r"[《「『【]([^》」』】]{2,60})[》」』】]")
ENDS_SENTENCE = re.compile(r"(?:[.!?:;…\n\"“„«»()|*#>\]\[-]|^)\s*$")
ROMAN = re.compile(r"[IVXLC]{1,7}")  # of centuries and kings, which are not compared
# Written with capitals wherever they stand: the first person, months and days.
CAPITALS: dict[str, str] = {
    "en": "I January February March April May June July August September October November December"
    " Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
    "el": "Ιανουαρίου Φεβρουαρίου Μαρτίου Απριλίου Μαΐου Ιουνίου Ιουλίου Αυγούστου Σεπτεμβρίου"
    " Οκτωβρίου Νοεμβρίου Δεκεμβρίου",
    "id": "Januari Februari Maret April Mei Juni Juli Agustus September Oktober November Desember",
    "ms": "Januari Februari Mac April Mei Jun Julai Ogos September Oktober November Disember",
    "tr": "Ocak Şubat Mart Nisan Mayıs Haziran Temmuz Ağustos Eylül Ekim Kasım Aralık",
    "de": "Januar Februar März April Mai Juni Juli August September Oktober November Dezember",
}
NOUNS_IN_CAPITALS = {"de"}
CASELESS = {"zh", "ja", "ko", "th", "ar", "he", "ur", "bn", "ne"}
BUDDHIST_ERA = 543  # years ahead, as Thai texts count
STEM = 3  # letters, at least, that two forms of a name have in common


def unsupported(text: str, facts: Sequence[str], language: str) -> list[str]:
    """What a text says and the facts do not: its numbers and names that none of them has.

    Args:
        text: Of the language.
        facts: Labels, descriptions and values; times as 1952-03-11.
        language: A code of two letters.
    """
    said = comparable(text)
    known = [comparable(fact) for fact in facts]
    numbers = _known_numbers(known, language)
    found = [number for number in _numbers(said) if number not in numbers]
    names = _titles(said) if language in CASELESS else []
    spoken = _latin_words(said) if language in CASELESS else _names(said, language)
    words = {
        word.casefold() for fact in [*known, CAPITALS.get(language, "")] for word in _words(fact)
    }
    found += [name for name in spoken if not _is_known(name.casefold(), words)]
    whole = " ".join(known).casefold()
    return [*found, *(title for title in names if title.casefold() not in whole)]


def _words(text: str) -> list[str]:
    return [part for word in WORD.findall(text) for part in re.split("[-'’]", word) if part]


def _numbers(text: str) -> list[str]:
    """Numbers without separators of thousands and zeros before them."""
    return [re.sub(r"\D", "", number).lstrip("0") or "0" for number in NUMBER.findall(text)]


def _known_numbers(facts: Iterable[str], language: str) -> set[str]:
    """Numbers of facts, with the centuries and decades of their years."""
    found: set[str] = set()
    for fact in facts:
        dated = re.fullmatch(r"-?(\d+)(?:-(\d\d))?(?:-(\d\d))?", fact)
        numbers = [p.lstrip("0") for p in dated.groups("")] if dated else _numbers(fact)
        found |= {number for number in numbers if number}
        for number in numbers:
            if number.isdecimal() and 2 <= len(number) <= 4:
                year = int(number)
                found |= {str((year - 1) // 100 + 1), str(year // 10 * 10)}
                if language == "th":
                    found.add(str(year + BUDDHIST_ERA))
    return found


def _names(text: str, language: str) -> list[str]:
    """Words with a capital that begin no sentence."""
    found = []
    for match in WORD.finditer(text):
        word = match[0]
        begins = ENDS_SENTENCE.search(text, max(0, match.start() - 8), match.start())
        if word[0].isupper() and not begins and not ROMAN.fullmatch(word):
            found.append(match)
    if language in NOUNS_IN_CAPITALS:
        found = [
            second
            for first, second in pairwise(found)
            if not text[first.end() : second.start()].strip()
        ]
    return list(dict.fromkeys(part for match in found for part in _words(match[0])))


def _latin_words(text: str) -> list[str]:
    return [
        word for word in dict.fromkeys(re.findall("[A-Za-zÀ-ɏ]{3,}", text)) if word[0].isupper()
    ]


def _titles(text: str) -> list[str]:
    return TITLE.findall(text)


def _is_known(word: str, known: set[str]) -> bool:
    """Whether facts have a word, or one that has the beginning of it in common."""
    if word in known or len(word) < STEM:
        return True
    return any(_same_stem(word, other) for other in known if other[:STEM] == word[:STEM])


def _same_stem(word: str, other: str) -> bool:
    common = next(
        (n for n, (a, b) in enumerate(zip(word, other, strict=False)) if a != b),
        min(len(word), len(other)),
    )
    return 2 * common >= max(len(word), len(other))
