"""What is wrong with texts that somebody shall learn from: counted, and dropped by rule."""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from marco_train.config.curation import CARD_LANGUAGES, CURATION_DIR, QualityConfig
from marco_train.curation.frame import (
    Cost,
    Counted,
    Dropped,
    Outcome,
    PerRow,
    Row,
    Shard,
    Shards,
    Transform,
    language_of,
)
from marco_train.curation.scripts import share_of_script
from marco_train.evaluation.languages import Identifier
from marco_train.rollout.loops import is_loop_at_end

RULES = tuple(each.name for each in fields(QualityConfig) if each.type is bool)
LEAST_OF_SCRIPT = 0.5
"""Of a text in a language that the identifier does not know."""
LEFTOVERS = re.compile(
    r"\{\{|\}\}|<\|[\w ]+\|>|\[/?INST\]|<</?SYS>>|\[(?:insert|your|name of|placeholder)\b[^\]]*\]"
    r"|\{(?:text|question|answer|language|name|title|input|output)\}|\blorem ipsum\b"
    r"|\AAssistant:|\A(?:Sure|Certainly)[,!] here(?:'s| is)",
    re.IGNORECASE,
)
EMAIL = r"\b[\w.+-]+@[\w-]+(?:\.[\w-]+)*\.[a-z]{2,}\b"
PHONE = r"(?<![\w+])\+\d{1,3}[ .-]?\(?\d{1,4}\)?(?:[ .-]?\d{2,4}){2,4}(?!\d)"
IBAN = r"\b[A-Z]{2}\d{2}(?: ?[A-Z\d]{4}){3,7}(?: ?[A-Z\d]{1,3})?\b"
CARD = r"(?<!\d)(?:\d{4}[ -]){3}\d{4}(?!\d)"
PERSONAL = re.compile(f"{EMAIL}|{PHONE}|{IBAN}|{CARD}")


@cache
def _refusals() -> dict[str, re.Pattern[str]]:
    read: Any = OmegaConf.to_container(OmegaConf.load(CURATION_DIR / "refusals.yaml"))
    return {code: re.compile("|".join(each), re.IGNORECASE) for code, each in read.items()}


def answers_of(row: Row) -> Sequence[tuple[str, str]]:
    """What the assistant says in a row, each text with the code of its language."""
    return [
        (message["content"], language_of(row))
        for message in row["messages"]
        if message["role"] == "assistant"
    ]


@dataclass(frozen=True)
class Quality(PerRow):
    """Counts the faults of texts, and drops the rows whose faults a rule is on for."""

    cfg: QualityConfig
    texts: Callable[[Row], Sequence[tuple[str, str]]] = answers_of
    """Of a row, each with the code of its language."""
    about: str = "answers"
    """Which texts they are."""
    name: str = "quality"

    def identity(self) -> Any:
        """Return the rules and the texts."""
        return [asdict(self.cfg), self.about]

    def plan(self, rows: float) -> Cost:
        """Estimate its time."""
        return Cost(rows, seconds=rows / (1_000 if self.cfg.language else 10_000))

    @contextmanager
    def opened(self, before: Shards, scratch: Path) -> Iterator[Transform]:
        """Open the identifier of languages, where its rule is on.

        Raises:
            InputError: It is not installed.
        """
        identifier = Identifier([], "quality.language") if self.cfg.language else None

        def transform(shard: Shard) -> Iterator[Outcome]:
            for row in shard.rows:
                language = language_of(row)
                found = {
                    fault
                    for text, code in self.texts(row)
                    for fault in faults_of(text, code, self.cfg, identifier)
                }
                for fault in sorted(found):
                    yield Counted(f"fault {fault}", 1, language)
                dropping = next(
                    (rule for rule in RULES if getattr(self.cfg, rule) and rule in found), ""
                )
                yield Dropped(row, f"quality: {dropping}") if dropping else row

        yield transform


def faults_of(
    text: str, code: str, cfg: QualityConfig, identifier: Identifier | None
) -> Iterator[str]:
    """Name what is wrong with a text, by the names of the rules.

    Args:
        text: Of one turn.
        code: Of its language, of two letters.
        cfg: Bounds of the length.
        identifier: Tells languages. None: they are not looked at.
    """
    if not cfg.min_characters <= len(text.strip()) <= cfg.max_characters:
        yield "length"
    if identifier is not None and not is_in_language(text, code, identifier):
        yield "language"
    if repeats(text):
        yield "repetition"
    refusals = _refusals()
    if any(code in refusals and refusals[code].search(text[:400]) for code in {code, "en"}):
        yield "refusal"
    if LEFTOVERS.search(text):
        yield "template"
    if PERSONAL.search(text):
        yield "personal"


def is_in_language(text: str, code: str, identifier: Identifier) -> bool:
    """Whether a text is in a language; where that cannot be told, whether it is in its script."""
    told = identifier.matches(text, code)
    if told is not None or code not in CARD_LANGUAGES:
        return told is not False
    script = CARD_LANGUAGES[code][0].partition("_")[2]
    has_letters = any(map(str.isalpha, text))
    return (
        identifier.knows(code)
        or not has_letters
        or (share_of_script(text, script) >= LEAST_OF_SCRIPT)
    )


def repeats(text: str) -> bool:
    """Whether a text ends in a loop of words, or of characters where it has no spaces."""
    words = text.split()
    return is_loop_at_end(words) or (len(text) > 12 * len(words) and is_loop_at_end(text))
