"""Questions with choices: what stands beside the right answer, and at which letter it stands."""

import random
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from xxhash import xxh3_64_intdigest

from marco_train.curation.frame import (
    Cost,
    Counted,
    Outcome,
    Row,
    Shard,
    Shards,
    Transform,
    language_of,
)
from marco_train.curation.taxonomy import table

NUM_CHOICES = 4
LETTERS = "ABCD"
MOST_ALIKE = 24  # entities of a class and country that are kept to choose from
OPEN, CHOICE = "open", "choice"


@cache
def texts_of_choices() -> dict[str, dict[str, str]]:
    """What is asked for, and how an answer ends, by language."""
    texts: dict[str, dict[str, str]] = table("choice")
    return texts


@dataclass(frozen=True)
class Distractors:
    """Makes of each row one for an open question, and of a share of them one with wrong choices.

    These are entities of the same class, country and language, the most popular ones.
    """

    share: float
    seed: int
    name: str = "distractors"

    def identity(self) -> Any:
        """Return the share and the seed."""
        return [self.share, self.seed]

    def plan(self, rows: float) -> Cost:
        """Estimate its rows."""
        return Cost(rows * (1 + self.share), seconds=rows / 20_000)

    @contextmanager
    def opened(self, before: Shards, scratch: Path) -> Iterator[Transform]:
        """Gather entities that are alike; memory grows with the classes and countries."""
        alike: dict[tuple[str, str, str], list[tuple[int, str]]] = {}
        for row in before.rows():
            for group in _groups(row):
                others = alike.setdefault(group, [])
                others.append((-row["num_articles"], row["labels"][language_of(row)]))
                if len(others) > 2 * MOST_ALIKE:
                    others[:] = sorted(others)[:MOST_ALIKE]

        def transform(shard: Shard) -> Iterator[Outcome]:
            for row in shard.rows:
                language = language_of(row)
                yield row | {"form": OPEN, "others": []}
                number = xxh3_64_intdigest(f"{row['id']} {language}".encode(), self.seed)
                if number >= self.share * 2**64:
                    continue
                others = _others(row, alike, number)
                if others is None:
                    yield Counted("too few like it for choices", 1, language)
                else:
                    yield row | {"form": CHOICE, "others": others}

        yield transform


def _groups(row: Row) -> Iterator[tuple[str, str, str]]:
    return ((language_of(row), row["country"], each) for each in row["classes"])


def _others(
    row: Row, alike: dict[tuple[str, str, str], list[tuple[int, str]]], number: int
) -> list[str] | None:
    """Draw labels of the first class with enough of them; None: there is none."""
    own = row["labels"][language_of(row)].casefold()
    for group in _groups(row):
        labels = {label.casefold(): label for _, label in sorted(alike[group])[:MOST_ALIKE]}
        candidates = [label for key, label in labels.items() if key not in own and own not in key]
        if len(candidates) >= NUM_CHOICES - 1:
            return random.Random(number).sample(candidates, NUM_CHOICES - 1)
    return None


@dataclass(frozen=True)
class Lettered:
    """Puts the choices in an order, so that each letter is right equally often in a language."""

    seed: int
    name: str = "lettered"

    def identity(self) -> Any:
        """Return the seed."""
        return [self.seed, table("choice")]

    def plan(self, rows: float) -> Cost:
        """Estimate its time."""
        return Cost(rows, seconds=rows / 50_000)

    @contextmanager
    def opened(self, before: Shards, scratch: Path) -> Iterator[Transform]:
        """Count the questions before each shard."""
        starts: list[Counter[str]] = []
        counts: Counter[str] = Counter()
        for shard in before:
            starts.append(counts.copy())
            counts.update(language_of(row) for row in shard.rows if row["form"] == CHOICE)

        def transform(shard: Shard) -> Iterator[Outcome]:
            so_far = starts[shard.number].copy()
            for row in shard.rows:
                if row["form"] == CHOICE:
                    yield self._lettered(row, so_far[language_of(row)])
                    so_far[language_of(row)] += 1
                else:
                    yield row | {"letter": ""}

        yield transform

    def _lettered(self, row: Row, place: int) -> Row:
        """Write out a question; of each four in a row, every letter is right once."""
        language = language_of(row)
        round_, turn = divmod(place, NUM_CHOICES)
        order = list(LETTERS)
        random.Random(f"{self.seed} {language} {round_}").shuffle(order)
        letter = order[turn]
        options = list(row["others"])
        options.insert(LETTERS.index(letter), row["labels"][language])
        lines = [f"{each}. {option}" for each, option in zip(LETTERS, options, strict=True)]
        texts = texts_of_choices()[language]
        asked = "\n".join([row["question"], "", *lines, "", texts["ask"]])
        answered = f"{row['reason']}\n\n{texts['answer'].format(letter=letter)}"
        return row | {"letter": letter, "messages": turns(asked, answered)}


def turns(asked: str, answered: str) -> list[dict[str, str]]:
    """A question and its answer as a conversation."""
    return [
        {"role": "user", "content": asked},
        {"role": "assistant", "content": answered},
    ]
