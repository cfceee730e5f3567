"""Time the reading of entities of Wikidata, packed and not, and watch its memory.

    python scripts/bench/entities.py --json entities.json --repeats 3

Lines are made up, in the sizes and shares of a dump: of ten, six are papers and stars that nobody
wrote an article on, two have one article, one is a class or a place, one has articles in 20.
"""

import bz2
import contextlib
import gzip
import io
import json
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import IO, Any

import torch
from harness import MIB, Bench, do_job, parser_of, peak_bytes, run_job, span

from marco_train.curation.entities import Classified, Entities
from marco_train.curation.frame import Pipeline, run

LANGUAGES = ("de", "fr", "ja")
NUM_LINES_OF_MEMORY = (20_000, 80_000)
SHARD_ROWS = 2_000
MIN_ARTICLES = 5
LETTERS = "abcdefghiklmnoprstuvwy"
PACKS: dict[str, Callable[..., Any]] = {"plain": Path.open, "gzip": gzip.open, "bzip2": bz2.open}


def word(drawn: random.Random) -> str:
    """A made-up word."""
    return "".join(drawn.choices(LETTERS, k=drawn.randint(3, 9)))


def statement(drawn: random.Random, property_: str, item: str) -> dict[str, Any]:
    """One with the weight of a dump's: with an id, a hash and a reference."""
    value = {"entity-type": "item", "numeric-id": int(item[1:]), "id": item}
    snak = {
        "snaktype": "value",
        "property": property_,
        "datavalue": {"value": value, "type": "wikibase-entityid"},
        "datatype": "wikibase-item",
        "hash": f"{drawn.getrandbits(160):040x}",
    }
    reference = {"hash": f"{drawn.getrandbits(160):040x}", "snaks": {"P248": [snak]}}
    return {
        "mainsnak": snak,
        "type": "statement",
        "id": f"Q1${drawn.getrandbits(128):032x}",
        "rank": "normal",
        "references": [reference],
    }


def line_of(drawn: random.Random, number: int) -> bytes:
    """A line of the dump."""
    kind = number % 10
    num_articles = {7: 1, 8: 1, 9: 20}.get(kind, 0)
    labels = {
        code: {"language": code, "value": f"{word(drawn)} {word(drawn)}"}
        for code in ("en", "de", "fr", "ja", "es", "nl", "it", "ru")[: 2 + 6 * (kind == 9)]
    }
    properties = ["P31", "P50", "P577", "P921", "P433", "P304", "P1433", "P2860"]
    if kind == 6:
        properties = ["P31", "P279", "P131", "P17"]
    if kind == 9:
        properties += ["P17", "P131", "P27", "P106", "P19", "P569", "P571"]
    claims = {
        name: [statement(drawn, name, f"Q{drawn.randint(1, 10**4)}") for _ in range(2)]
        for name in properties
    }
    claims["P31"] = [statement(drawn, "P31", "Q23413")]
    claims |= {"P17": [statement(drawn, "P17", "Q183")]} if kind in (6, 9) else {}
    sites = {
        f"x{n}wiki": {"site": f"x{n}wiki", "title": word(drawn), "badges": [], "url": ""}
        for n in range(num_articles)
    }
    found = {
        "type": "item",
        "id": f"Q{number + 1}",
        "labels": labels,
        "descriptions": labels,
        "aliases": {},
        "claims": claims,
        "sitelinks": sites,
    }
    return json.dumps(found, separators=(",", ":")).encode()


def write(content: IO[bytes], count: int) -> int:
    """Write so many lines; says how many bytes they are."""
    drawn, size = random.Random(0), 0
    content.write(b"[\n")
    for number in range(count):
        size += content.write(line_of(drawn, number) + b",\n")
    content.write(b"]\n")
    return size


def entities(file: Path) -> Entities:
    """The source of the pipeline."""
    return Entities.of(file, LANGUAGES, MIN_ARTICLES)


def bench_lines(bench: Bench) -> None:
    """Read a dump, each line to a row or to what is dropped."""
    for pack, opened in PACKS.items():
        with tempfile.TemporaryDirectory() as directory:
            file = Path(directory, "dump.json")
            with opened(file, "wb") as content:
                size = write(content, bench.args.lines)
            rates, kept = [], 0
            for _ in range(bench.repeats):
                start = time.process_time()
                kept = sum(isinstance(each, dict) for each in entities(file).read(0))
                rates.append(bench.args.lines / (time.process_time() - start))
        cells = {
            "packed": pack,
            "KiB a line": size / bench.args.lines / 1024,
            "kept": kept / bench.args.lines,
            "lines a second of a core": median(rates),
            "range": span(rates),
        }
        bench.add("lines", cells, rates)


def built(file: Path, work: Path) -> int:
    """Read entities and tell their topics and countries; how many come out."""
    steps = [Classified(LANGUAGES, MIN_ARTICLES)]
    pipeline = Pipeline("culture", entities(file), steps, [], {}, lambda counts: [])
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return run(pipeline, work, SHARD_ROWS).counts[-1].whole.rows_out


def peak_of(count: int) -> int:
    """Most memory that it takes, over what the process had before, in bytes."""
    with tempfile.TemporaryDirectory() as directory:
        for name, lines in (("first", SHARD_ROWS), ("all", count)):
            with Path(directory, f"{name}.json").open("wb") as content:
                write(content, lines)
        built(Path(directory, "first.json"), Path(directory, "first"))  # loads the libraries
        whole = Path(directory, "all.json")
        return peak_bytes(lambda: built(whole, Path(directory, "all")), torch.device("cpu"))


def bench_memory(bench: Bench) -> None:
    """Peak of dumps of two sizes, each in a process of its own."""
    for count in NUM_LINES_OF_MEMORY:
        peak = run_job(__file__, "peak_of", {"count": count})
        bench.add("memory", {"lines": count, "peak, MiB": peak / MIB}, peak)


PARTS = {"lines": bench_lines, "memory": bench_memory}


def main() -> None:
    """Run the parts that are asked for."""
    parser = parser_of(__doc__ or "", PARTS, ["lines"], ["lines"])
    parser.add_argument("--lines", type=int, default=20_000, help="Of a dump; 20000 if absent.")
    Bench(parser.parse_args(), torch.device("cpu")).run(PARTS)


if __name__ == "__main__" and not do_job({"peak_of": peak_of}):
    main()
