"""Drops rows that hold what a benchmark asks: the same words, or nearly the same to a model.

Legend: B texts of benchmarks, N texts of rows, D numbers of an embedding.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from marco_train.config.curation import CurationConfig, DecontaminationConfig, EmbeddingConfig
from marco_train.content import look
from marco_train.curation.embedding import embedder
from marco_train.curation.frame import (
    Cost,
    Counted,
    Dropped,
    Outcome,
    Row,
    Shard,
    Shards,
    Step,
    Transform,
)
from marco_train.data.contamination import Benchmarks, Hit, read_benchmarks, texts_of
from marco_train.errors import require
from marco_train.evaluation.benchmark.tasks import questions_of
from marco_train.types import Conversation, Message, UsableRow

SUITES = ("fixture", "card")
NEAR = "near"
LONGEST = 2000  # characters of a text that are embedded: questions are shorter
CHUNK = 2**16  # texts of benchmarks that are compared together


def texts_against(
    against: str, data_dir: str | None, data_dir_is: str = "decontamination.data_dir"
) -> Iterator[tuple[str, str]]:
    """Texts to look for, each with its benchmark: of a suite's tasks, or of a directory.

    Args:
        against: A suite or the directory.
        data_dir: A folder for each set of the suite that is read from files.
        data_dir_is: What a user calls it.

    Raises:
        InputError: They cannot be read.
    """
    require(
        data_dir is None or Path(data_dir).is_dir(),
        f"{data_dir_is}: there is no directory {data_dir!r}",
    )
    if against in SUITES:
        return questions_of(against, data_dir, data_dir_is)
    return read_benchmarks(Path(against))


class NearBenchmarks:
    """Texts of benchmarks as an embedding model has them."""

    def __init__(
        self,
        texts: Iterable[tuple[str, str]],
        embed: Callable[[Sequence[str]], NDArray[np.float32]],
        similarity: float,
    ) -> None:
        """Embed the texts.

        Args:
            texts: Each with the name of its benchmark.
            embed: Makes vectors of length 1, [N, D].
            similarity: The cosine from which texts count as near.
        """
        self.similarity = similarity
        self._embed = embed
        named = list(dict.fromkeys(texts))
        self.names = list(dict.fromkeys(name for name, _ in named))
        places = {name: place for place, name in enumerate(self.names)}
        self._numbers = np.array([places[name] for name, _ in named])  # [B]
        self._vectors = embed([text[:LONGEST] for _, text in named])  # [B, D]

    def hits(self, rows: Sequence[UsableRow]) -> list[Hit]:
        """Look for the texts in all turns of some rows; one hit of a benchmark and row."""
        texts = [
            (place, text[:LONGEST]) for place, row in enumerate(rows) for text in texts_of(row)
        ]
        if not texts:
            return []
        vectors = self._embed([text for _, text in texts])
        found: dict[tuple[int, int], None] = {}
        for start in range(0, len(self._vectors), CHUNK):
            cosines = vectors @ self._vectors[start : start + CHUNK].T  # [N, B]
            for text, near in np.argwhere(cosines >= self.similarity).tolist():
                found[texts[text][0], int(self._numbers[start + near])] = None
        return [Hit(rows[place].row, self.names[number], NEAR) for place, number in sorted(found)]


class Decontaminated:
    """The step of a pipeline; hits are counted by benchmark and kind."""

    name = "decontaminated"

    def __init__(self, cfg: DecontaminationConfig, embedding: EmbeddingConfig) -> None:
        """Say against what; without an embedding model, only the same words are looked for."""
        assert cfg.against is not None
        self._cfg, self._embedding, self._against = cfg, embedding, cfg.against

    def identity(self) -> Any:
        """Return the texts and the model."""
        files = [look(path) for path in (self._against, self._cfg.data_dir) if path]
        return [asdict(self._cfg), files, self._embedding.model, self._embedding.revision]

    def plan(self, rows: float) -> Cost:
        """Estimate what the rows take; the benchmarks' texts are not counted."""
        if self._embedding.model is None:
            return Cost(rows, seconds=rows / 5_000)
        texts = 2 * rows
        return Cost(
            rows,
            embedding_batches=texts / self._embedding.batch_size,
            seconds=texts / self._embedding.texts_per_second,
        )

    @contextmanager
    def opened(self, before: Shards, scratch: Path) -> Iterator[Transform]:
        """Read the benchmarks, and embed them where there is a model."""
        texts = list(texts_against(self._against, self._cfg.data_dir))
        benchmarks = Benchmarks(texts)
        near = None
        if self._embedding.model is not None:
            near = NearBenchmarks(texts, embedder(self._embedding), self._cfg.similarity)

        def transform(shard: Shard) -> Iterator[Outcome]:
            rows = [conversation_of(row, place) for place, row in enumerate(shard.rows)]
            hits = [hit for row in rows for hit in benchmarks.hits(row)]
            hits += near.hits(rows) if near is not None else []
            of_row: dict[int, list[Hit]] = {}
            for hit in hits:
                of_row.setdefault(hit.row, []).append(hit)
            for place, row in enumerate(shard.rows):
                language = str(row.get("language") or "")
                for hit in of_row.get(place, ()):
                    yield Counted(f"{hit.kind} of {hit.benchmark}", 1, language)
                yield Dropped(row, "holds a text of a benchmark") if place in of_row else row

        yield transform


def decontaminated(cfg: CurationConfig) -> list[Step]:
    """The step of a pipeline, where it was asked for."""
    if cfg.decontamination.against is None:
        return []
    return [Decontaminated(cfg.decontamination, cfg.embedding)]


def conversation_of(row: Row, place: int) -> Conversation:
    """A row as data is read."""
    messages = tuple(Message(each["role"], each["content"]) for each in row["messages"])
    return Conversation("", "", str(row.get("language") or ""), place, messages)
