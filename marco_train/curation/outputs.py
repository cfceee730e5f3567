"""What a pipeline leaves: rows as JSON lines and Parquet, counts, the card, and rows to look at."""

import heapq
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b, sha256
from pathlib import Path
from typing import Any

from marco_train.curation.frame import Pipeline, Ran, Row, language_of
from marco_train.evaluation import html
from marco_train.files import replaces

NUM_SAMPLES = 50
"""Rows of a language that a person may read."""
ROWS_OF_A_GROUP = 10_000


@dataclass
class Lengths:
    """Characters of all turns of rows, by how many rows have them."""

    counts: Counter[int] = field(default_factory=Counter)

    def add(self, row: Row) -> None:
        """Count a row."""
        self.counts[sum(len(message["content"]) for message in row["messages"])] += 1

    def quantile(self, share: float) -> int:
        """The length that a share of the rows does not exceed."""
        seen = 0
        for length in sorted(self.counts):
            seen += self.counts[length]
            if seen >= share * self.counts.total():
                return length
        return 0


@dataclass
class Outputs:
    """What was written, for the card."""

    digest: str = ""
    """SHA-256 of the JSON lines."""
    num_rows: int = 0
    lengths: dict[str, Lengths] = field(default_factory=dict)
    """By language."""
    categories: Counter[str] = field(default_factory=Counter)

    def add(self, row: Row) -> None:
        """Count a row."""
        self.num_rows += 1
        self.lengths.setdefault(language_of(row), Lengths()).add(row)
        if row.get("category"):
            self.categories[str(row["category"])] += 1


def write_rows(pipeline: Pipeline, ran: Ran, directory: Path, seed: int) -> Outputs:
    """Write <kind>.jsonl, <kind>.parquet, counts.json and samples.html, each as a whole.

    A row has `messages`, `language` and the pipeline's columns; memory does not grow with the rows.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    turn = pa.struct([("role", pa.string()), ("content", pa.string())])
    columns = [("messages", pa.list_(turn)), ("language", pa.string())]
    columns += [(name, pa.type_for_alias(kind)) for name, kind in pipeline.columns.items()]
    schema = pa.schema(columns)
    found, digest, samples = Outputs(), sha256(), _Samples(seed)
    with (
        replaces(directory / f"{pipeline.kind}.jsonl") as lines_file,
        replaces(directory / f"{pipeline.kind}.parquet") as table_file,
        lines_file.open("wb") as lines,
        pq.ParquetWriter(table_file, schema) as table,
    ):
        group: list[Row] = []
        for whole in ran.shards.rows():
            row = {name: whole.get(name) for name in schema.names}
            line = (json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8", "replace")
            lines.write(line)
            digest.update(line)
            found.add(row)
            samples.add(row, line)
            group.append(row)
            if len(group) == ROWS_OF_A_GROUP:
                table.write_table(pa.Table.from_pylist(group, schema))
                group.clear()
        table.write_table(pa.Table.from_pylist(group, schema))
    found.digest = digest.hexdigest()
    counts: dict[str, Any] = {
        "rows": found.num_rows,
        "digest": found.digest,
        "steps": [each.as_json() for each in ran.counts],
    }
    with replaces(directory / "counts.json") as partial:
        partial.write_text(json.dumps(counts, indent=1, ensure_ascii=False), encoding="utf-8")
    with replaces(directory / "samples.html") as partial:
        partial.write_text(samples.page(pipeline.kind, list(pipeline.columns)), encoding="utf-8")
    return found


class _Samples:
    """Some rows of each language, the same of the same rows and seed."""

    def __init__(self, seed: int) -> None:
        self._key = str(seed).encode()
        self._heaps: dict[str, list[tuple[int, bytes]]] = {}

    def add(self, row: Row, line: bytes) -> None:
        """Take a row among them, if its digest is one of the least of its language."""
        digest = blake2b(line, digest_size=8, key=self._key).digest()
        heap = self._heaps.setdefault(language_of(row), [])
        entry = (-int.from_bytes(digest, "big"), line)
        if len(heap) < NUM_SAMPLES:
            heapq.heappush(heap, entry)
        else:
            heapq.heappushpop(heap, entry)

    def page(self, kind: str, columns: Sequence[str]) -> str:
        """Lay them out, a section a language."""
        sections = [
            html.Section(
                language or "no language",
                [_card(json.loads(line), columns) for _, line in sorted(heap, reverse=True)],
            )
            for language, heap in sorted(self._heaps.items())
        ]
        said = [f"Up to {NUM_SAMPLES} rows of each language, drawn by their digests."]
        return html.page(f"{kind}: rows to read", said, sections)


def _card(row: Row, columns: Sequence[str]) -> html.Markup:
    said = ", ".join(f"{name} {row[name]}" for name in columns if row[name] is not None)
    turns = [
        html.card(message["role"], [html.plain_text(message["content"])])
        for message in row["messages"]
    ]
    return html.card(said, turns)
