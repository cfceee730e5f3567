"""Time the steps of a curation that ask no LLM and no embedding model, and watch their memory.

    python scripts/bench/curation.py --json curation.json --repeats 3

Pairs are of made-up words; each step reads its shards and writes them, as in a pipeline.
"""

import contextlib
import io
import random
import resource
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from harness import MIB, Bench, do_job, parser_of, peak_bytes, run_job, span

from marco_train.curation.duplicates import ExactDuplicates, NearDuplicates, normal
from marco_train.curation.frame import Cost, Dropped, Pipeline, Row, Step, run
from marco_train.curation.heuristics import chosen_rules
from marco_train.curation.selection import Best
from marco_train.curation.translation import Languages, checks, heuristics

NUM_PAIRS = {"heuristics": 40_000, "languages": 10_000, "duplicates": 20_000}
NUM_PAIRS_OF_MEMORY = (20_000, 80_000)
NUM_WORDS = 18
SHARD_ROWS = 2_000
PROCESSES = 2
LATIN, CYRILLIC = "abcdefghiklmnoprstuvwy", "абвгдезиклмнопрстуфхцшя"

SENTENCES = {
    LATIN: "You can buy the tickets at the station or online before you travel on day",
    CYRILLIC: "Билеты можно купить на вокзале или заранее через интернет до поездки в день",
}


@dataclass(frozen=True)
class MadeUp:
    """Pairs of English and Russian letters, the same of the same seed."""

    count: int
    in_sentences: bool = False
    """Whether the words are those of a language, which an identifier would take longer to find in
    made-up ones."""
    name: str = "pairs"

    def identity(self) -> Any:
        """Return how many, and which words."""
        return [self.count, self.in_sentences]

    def plan(self) -> Cost:
        """Return how many."""
        return Cost(self.count)

    def read(self, skip: int) -> Iterator[Row | Dropped]:
        """Make them anew; none is kept."""
        drawn = random.Random(0)
        words = {letters: _words(drawn, letters) for letters in (LATIN, CYRILLIC)}
        for number in range(self.count):
            english, other = (
                SENTENCES[letters]
                if self.in_sentences
                else " ".join(drawn.choices(words[letters], k=NUM_WORDS))
                for letters in (LATIN, CYRILLIC)
            )
            yield {
                "id": f"x:{number}",
                "language": "ru",
                "english": f"{english} {number + 10}.",
                "other": f"{other} {number + 10}.",
                "laser": drawn.random(),
                "english_lid": 0.9,
                "other_lid": 0.9,
                "domain": f"d{number % 1000}.org",
            }


def _words(drawn: random.Random, letters: str) -> list[str]:
    return ["".join(drawn.choices(letters, k=drawn.randint(2, 8))) for _ in range(4_000)]


def rules() -> list[Step]:
    """Those of sentences and of pairs."""
    english, pairs = chosen_rules({}, {})
    return [heuristics(english), checks(pairs)]


def duplicates() -> list[Step]:
    """Equal and near ones."""
    exact = ExactDuplicates(lambda row: f"{row['english']}\n{row['other']}", "pairs")
    return [exact, NearDuplicates(lambda row: normal(row["english"]), "English", 0.8)]


def built(source: MadeUp, steps: Sequence[Step], work: Path) -> int:
    """Run steps over made-up pairs; how many come out."""
    pipeline = Pipeline("pairs", source, steps, [], {}, lambda counts: [])
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return run(pipeline, work, SHARD_ROWS, PROCESSES).counts[-1].whole.rows_out


def processor_seconds() -> float:
    """Of this process and of those that it has ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def bench_rates(bench: Bench, part: str, steps: Sequence[Step]) -> None:
    """Time steps by the clock and by the processor; the pairs lie on disk before.

    Two processes share the steps that look at pairs one by one.
    """
    count = NUM_PAIRS[part]
    source = MadeUp(count, in_sentences=part == "languages")
    clock, processor, out = [], [], 0
    for _ in range(bench.repeats):
        with tempfile.TemporaryDirectory() as directory:
            built(source, [], Path(directory))
            start, start_processor = time.perf_counter(), processor_seconds()
            out = built(source, steps, Path(directory))
            clock.append(count / (time.perf_counter() - start))
            processor.append(count / (processor_seconds() - start_processor))
    cells = {
        "steps": ", ".join(step.name for step in steps),
        "pairs": count,
        "out": out,
        "pairs a second": median(clock),
        "range": span(clock),
        "of a core's time": median(processor),
        "its range": span(processor),
    }
    bench.add(part, cells, {"clock": clock, "processor": processor})


def bench_heuristics(bench: Bench) -> None:
    """All rules of sentences and of pairs that are on."""
    bench_rates(bench, "heuristics", rules())


def bench_languages(bench: Bench) -> None:
    """Identify both sides by lingua; its loading in each process is part of the time."""
    bench_rates(bench, "languages", [Languages(None)])


def bench_duplicates(bench: Bench) -> None:
    """Equal pairs, then MinHash."""
    exact, near = duplicates()
    bench_rates(bench, "duplicates", [exact])
    bench_rates(bench, "duplicates", [near])


def peak_of(count: int) -> int:
    """Most memory that all of it takes, over what the process had before, in bytes."""
    steps = [*rules(), *duplicates(), Best(lambda row: row["laser"], "laser", 2_000, 0.05, 1)]
    with tempfile.TemporaryDirectory() as directory:
        built(MadeUp(SHARD_ROWS), steps, Path(directory, "first"))  # loads the libraries
        return peak_bytes(
            lambda: built(MadeUp(count), steps, Path(directory, "all")), torch.device("cpu")
        )


def bench_memory(bench: Bench) -> None:
    """Peak of inputs of two sizes, each in a process of its own."""
    for count in NUM_PAIRS_OF_MEMORY:
        peak = run_job(__file__, "peak_of", {"count": count})
        bench.add("memory", {"pairs": count, "peak, MiB": peak / MIB}, peak)


PARTS = {
    "heuristics": bench_heuristics,
    "languages": bench_languages,
    "duplicates": bench_duplicates,
    "memory": bench_memory,
}


def main() -> None:
    """Run the parts that are asked for."""
    args = parser_of(__doc__ or "", PARTS, ["pairs"], ["pairs"]).parse_args()
    Bench(args, torch.device("cpu")).run(PARTS)


if __name__ == "__main__" and not do_job({"peak_of": peak_of}):
    main()
