"""Rules that a sentence of English or a pair of sentences has to pass, each with its source.

Gopher's and FineWeb's rules are made for documents. Those that say something of a sentence are on;
those that need lines, paragraphs or many words are listed, and off until `rules.<name>=true`.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Generic, TypeVar

from marco_train.curation.scripts import share_of_script
from marco_train.errors import require

GOPHER = "Gopher (arXiv 2112.11446, table A1)"
FINEWEB = "FineWeb (arXiv 2406.17557, section 3.5)"
C4 = "C4's rules as FineWeb takes them (arXiv 2406.17557, section 3.4)"
OURS = "ours"
STOP_WORDS = {"the", "be", "to", "of", "and", "that", "have", "with"}
ENDS = (".", "!", "?", '"', "'", "\u201d", "\u2019", "\u3002", "\uff01", "\uff1f")
BULLETS = ("\u2022", "\u2023", "\u25b6", "\u25e6", "-", "*")
POLICIES = (
    "terms of use",
    "privacy policy",
    "cookie policy",
    "uses cookies",
    "use of cookies",
    "use cookies",
)
REPEATED = 5
SHORT_LINE = 30  # characters
# By how much more a letter says than one of an alphabet: whole words and syllables, and consonants
# whose vowels are marks or are not written.
DENSE = (
    (re.compile("[\u3400-\u4dbf\u4e00-\u9fff]"), 2.0),
    (re.compile("[\u3040-\u30ff\uac00-\ud7af]"), 1.0),
    (re.compile("[\u0900-\u09ff]"), 0.6),
    (re.compile("[\u0590-\u05ff\u0600-\u06ff\u0e00-\u0e7f]"), 0.25),
)
NO_LETTERS_OR_DIGITS = re.compile(r"[\W_]+")
NUMBERS = re.compile(
    r"\d{1,3}(?:[ .,'\u00a0\u202f\u066b\u066c\u2019]\d{3})+(?!\d)|\d+(?:[.,\u066b]\d+)*"
)


class Text:
    """A text of English, taken apart once for all rules."""

    def __init__(self, whole: str) -> None:
        self.whole = whole

    @cached_property
    def words(self) -> list[str]:
        """Parted by spaces, with their punctuation."""
        return self.whole.split()

    @cached_property
    def repeats(self) -> bool:
        """Whether an n-gram of `REPEATED` words stands twice; else no longer one does."""
        words = self.words
        grams = list(zip(*(words[at:] for at in range(REPEATED)), strict=False))
        return len(set(grams)) < len(grams)

    @cached_property
    def folded(self) -> str:
        """In small letters."""
        return self.whole.casefold()

    @cached_property
    def lines(self) -> list[str]:
        """That hold anything."""
        return [line for line in self.whole.splitlines() if line.strip()]

    @cached_property
    def paragraphs(self) -> list[str]:
        """Parted by empty lines."""
        return [part for part in re.split(r"\n\s*\n", self.whole) if part.strip()]


def _share(count: float, whole: float) -> float:
    return count / whole if whole else 0.0


def _repeated(parts: list[str]) -> float:
    return _share(len(parts) - len(set(parts)), len(parts))


def _repeated_characters(parts: list[str]) -> float:
    seen: set[str] = set()
    repeated = 0
    for part in parts:
        repeated += len(part) if part in seen else 0
        seen.add(part)
    return _share(repeated, sum(map(len, parts)))


def top_ngram_share(text: Text, n: int) -> float:
    """Share of the characters that the commonest n-gram of words has, over all its places."""
    words = text.words
    grams = Counter(" ".join(words[at : at + n]) for at in range(len(words) - n + 1))
    if not grams:
        return 0.0
    gram, count = max(grams.items(), key=lambda found: (found[1], len(found[0])))
    return _share(len(gram) * count, len(text.whole))


def repeated_ngram_share(text: Text, n: int) -> float:
    """Share of the words' characters in n-grams that stood before; each word counts once."""
    words = text.words
    if len(words) <= n or (n >= REPEATED and not text.repeats):
        return 0.0
    seen: set[tuple[str, ...]] = set()
    marked: set[int] = set()
    for at in range(len(words) - n + 1):
        gram = tuple(words[at : at + n])
        if gram in seen:
            marked.update(range(at, at + n))
        seen.add(gram)
    return _share(sum(len(words[at]) for at in marked), sum(map(len, words)))


Of = TypeVar("Of")


@dataclass(frozen=True)
class Rule(Generic[Of]):
    """A bound on a number of a text or of a pair."""

    name: str
    bound: float
    is_least: bool
    """Whether the number may not be less; else it may not be more."""
    is_on: bool
    source: str
    what: str
    """The number, in words."""
    measure: Callable[[Of], float]

    def passes(self, judged: Of) -> bool:
        """Whether it is within the bound."""
        value = self.measure(judged)
        return value >= self.bound if self.is_least else value <= self.bound


def _english() -> list[Rule[Text]]:
    def least(name: str, bound: float, source: str, what: str, measure: Any) -> Rule[Text]:
        return Rule(name, bound, True, True, source, what, measure)

    def most(name: str, bound: float, source: str, what: str, measure: Any) -> Rule[Text]:
        return Rule(name, bound, False, True, source, what, measure)

    def of_documents(rule: Rule[Text]) -> Rule[Text]:
        return replace(rule, is_on=False)

    return [
        least("min_words", 4, f"{OURS}; Gopher's 50 is of documents", "words", _num_words),
        most("max_words", 150, f"{OURS}; Gopher's 100,000 is of documents", "words", _num_words),
        least("min_word_length", 3, GOPHER, "mean characters of a word", _word_length),
        most("max_word_length", 10, GOPHER, "mean characters of a word", _word_length),
        most(
            "symbols",
            0.1,
            GOPHER,
            "# and ellipses a word",
            lambda t: _share(
                t.whole.count("#") + t.whole.count("...") + t.whole.count("\u2026"), len(t.words)
            ),
        ),
        least(
            "alphabetic_words",
            0.8,
            GOPHER,
            "share of words with a letter",
            lambda t: _share(sum(map(_has_letter, t.words)), len(t.words)),
        ),
        *(
            most(
                f"repeated_{n}grams",
                bound,
                GOPHER,
                f"share of characters in {n}-grams that stood before",
                lambda t, n=n: repeated_ngram_share(t, n),
            )
            for n, bound in ((5, 0.15), (6, 0.14), (7, 0.13), (8, 0.12), (9, 0.11), (10, 0.10))
        ),
        most("braces", 0, C4, "curly brackets", lambda t: t.whole.count("{") + t.whole.count("}")),
        most("lorem_ipsum", 0, C4, "`lorem ipsum`", lambda t: t.folded.count("lorem ipsum")),
        most("javascript", 0, C4, "`javascript`", lambda t: t.folded.count("javascript")),
        most(
            "policies",
            0,
            C4,
            "phrases of policies and cookies",
            lambda t: sum(phrase in t.folded for phrase in POLICIES),
        ),
        *map(
            of_documents,
            (
                least(
                    "stop_words",
                    2,
                    GOPHER,
                    f"of the words {', '.join(sorted(STOP_WORDS))}",
                    lambda t: len(STOP_WORDS & set(t.folded.split())),
                ),
                most(
                    "bullet_lines",
                    0.9,
                    GOPHER,
                    "share of lines that begin with a bullet",
                    lambda t: _share(
                        sum(line.lstrip().startswith(BULLETS) for line in t.lines), len(t.lines)
                    ),
                ),
                most(
                    "ellipsis_lines",
                    0.3,
                    GOPHER,
                    "share of lines that end in an ellipsis",
                    lambda t: _share(
                        sum(line.rstrip().endswith(("...", "\u2026")) for line in t.lines),
                        len(t.lines),
                    ),
                ),
                most("repeated_lines", 0.3, GOPHER, "share", lambda t: _repeated(t.lines)),
                most(
                    "repeated_line_characters",
                    0.2,
                    GOPHER,
                    "share of characters",
                    lambda t: _repeated_characters(t.lines),
                ),
                most(
                    "repeated_paragraphs", 0.3, GOPHER, "share", lambda t: _repeated(t.paragraphs)
                ),
                most(
                    "repeated_paragraph_characters",
                    0.2,
                    GOPHER,
                    "share of characters",
                    lambda t: _repeated_characters(t.paragraphs),
                ),
                *(
                    most(
                        f"top_{n}gram",
                        bound,
                        GOPHER,
                        f"share of characters of the commonest {n}-gram",
                        lambda t, n=n: top_ngram_share(t, n),
                    )
                    for n, bound in ((2, 0.20), (3, 0.18), (4, 0.16))
                ),
                least(
                    "ended_lines",
                    0.12,
                    FINEWEB,
                    "share of lines that end in punctuation",
                    lambda t: _share(
                        sum(line.rstrip().endswith(ENDS) for line in t.lines), len(t.lines)
                    ),
                ),
                most(
                    "short_lines",
                    0.67,
                    FINEWEB,
                    f"share of lines of less than {SHORT_LINE} characters",
                    lambda t: _share(sum(len(line) < SHORT_LINE for line in t.lines), len(t.lines)),
                ),
                most(
                    "characters_in_repeated_lines",
                    0.1,
                    FINEWEB,
                    "share of characters",
                    lambda t: _repeated_characters(t.lines),
                ),
                most(
                    "newlines",
                    0.3,
                    "FineWeb's code (datatrove, FineWebQualityFilter)",
                    "ends of lines a word",
                    lambda t: _share(t.whole.count("\n"), len(t.words)),
                ),
            ),
        ),
    ]


def _has_letter(word: str) -> bool:
    return word.isalpha() or any(map(str.isalpha, word))


def _num_words(text: Text) -> float:
    return len(text.words)


def _word_length(text: Text) -> float:
    return _share(sum(map(len, text.words)), len(text.words))


@dataclass(frozen=True)
class Pair:
    """Two sides that should say the same."""

    english: str
    other: str
    script: str
    """Of the other side."""


def _pairs() -> list[Rule[Pair]]:
    return [
        Rule(
            "length_ratio",
            2.0,
            False,
            True,
            OURS,
            "longer by shorter side, in letters of an alphabet",
            length_ratio,
        ),
        Rule(
            "numbers",
            1.0,
            True,
            True,
            OURS,
            "share of the numbers of two digits and more that both sides have",
            shared_numbers,
        ),
        Rule(
            "english_script",
            0.9,
            True,
            True,
            OURS,
            "share of Latin among the letters of English",
            lambda pair: share_of_script(pair.english, "Latn"),
        ),
        Rule(
            "other_script",
            0.6,
            True,
            True,
            OURS,
            "share of the language's script among its letters",
            lambda pair: share_of_script(pair.other, pair.script),
        ),
        Rule(
            "copied",
            0,
            False,
            True,
            OURS,
            "sides that are one text",
            lambda pair: float(_bare(pair.english) == _bare(pair.other)),
        ),
    ]


def _bare(text: str) -> str:
    return NO_LETTERS_OR_DIGITS.sub("", text.casefold())


def length_ratio(pair: Pair) -> float:
    """How many times longer one side is; infinite where one has no letters or digits."""
    lengths = sorted((_weight(pair.english), _weight(pair.other)))
    return lengths[1] / lengths[0] if lengths[0] else float("inf")


def _weight(text: str) -> float:
    letters = NO_LETTERS_OR_DIGITS.sub("", text)
    if letters.isascii():
        return len(letters)
    return len(letters) + sum(more * len(kind.findall(letters)) for kind, more in DENSE)


def shared_numbers(pair: Pair) -> float:
    """Share of the numbers of either side, of two digits and more, that the other has too."""
    english, other = numbers_of(pair.english), numbers_of(pair.other)
    either = (english | other).total()
    return (english & other).total() / either if either else 1.0


def numbers_of(text: str) -> Counter[str]:
    """The numbers of two digits and more, in the digits of ASCII and without separators."""
    found: Counter[str] = Counter()
    for number in NUMBERS.findall(text):
        digits = "".join(filter(str.isdecimal, number))
        if len(digits) > 1:
            found[str(int(digits)) if len(digits) < 20 else digits] += 1
    return found


ENGLISH_RULES = _english()
PAIR_RULES = _pairs()


def chosen_rules(
    switches: Mapping[str, bool], thresholds: Mapping[str, float]
) -> tuple[list[Rule[Text]], list[Rule[Pair]]]:
    """The rules that are on, with their bounds.

    Args:
        switches: Of rules by name, where they are others than their own.
        thresholds: Bounds of rules by name, likewise.

    Raises:
        InputError: There is no rule of a name.
    """
    names = [rule.name for rule in ENGLISH_RULES] + [rule.name for rule in PAIR_RULES]
    for field, given in (("rules", switches), ("thresholds", thresholds)):
        for name in given:
            require(
                name in names, f"{field}.{name}: there is no such rule; known are {' '.join(names)}"
            )

    english = [replace(r, bound=thresholds.get(r.name, r.bound)) for r in ENGLISH_RULES]
    pairs = [replace(r, bound=thresholds.get(r.name, r.bound)) for r in PAIR_RULES]
    return (
        [rule for rule in english if switches.get(rule.name, rule.is_on)],
        [rule for rule in pairs if switches.get(rule.name, rule.is_on)],
    )
