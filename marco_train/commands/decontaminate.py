"""Look for the questions of benchmarks in a data set."""

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tqdm import tqdm

from marco_train.commands.source import add_source_arguments, escape_unprintable, open_source
from marco_train.config.curation import DecontaminationConfig, EmbeddingConfig
from marco_train.curation.decontamination import NearBenchmarks, texts_against
from marco_train.curation.embedding import embedder
from marco_train.data.contamination import CHARACTERS, WORDS, Benchmarks, Hit
from marco_train.data.conversations import BadRow, Source
from marco_train.errors import InputError, require
from marco_train.files import replaces
from marco_train.types import TokenRow, UsableRow

ROWS_TOGETHER = 256  # that an embedding model gets
MOST_NAMED = 5  # rows of a benchmark that the table names
OPTIONS = {"decontamination.similarity": "--similarity", "embedding.model": "--embedding-model"}
"""What fields of a curation, by which faults are named, are called here."""


@dataclass
class Report:
    """What was found; `rows` and `hits` are those of the JSON."""

    rows: int = 0
    hits: list[Hit] = field(default_factory=list)
    num_at_fault: int = 0
    num_tokenised: int = 0


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, print a table, and write the JSON where one is asked for."""
    args = _parser().parse_args(arguments)
    escape_unprintable()
    try:
        if args.json is not None:
            file, parent = str(args.json), args.json.parent
            require(parent.is_dir(), f"--json: there is no directory {str(parent)!r}; make it")
            require(not args.json.is_dir(), f"--json: {file!r} is a directory; name a file in it")
            is_open = os.access(parent, os.W_OK)
            require(is_open, f"--json: {str(parent)!r} may not be written to; choose another")
        with redirect_stdout(sys.stderr):
            similarity = DecontaminationConfig(similarity=args.similarity).similarity
            texts = list(texts_against(args.against, args.data_dir, "--data-dir"))
            benchmarks, near = Benchmarks(texts), None
            if args.embedding_model is not None:
                embed = embedder(EmbeddingConfig(model=args.embedding_model))
                near = NearBenchmarks(texts, embed, similarity)
            report = look(open_source(args), benchmarks, near)
    except InputError as error:
        said = " ".join(str(error).split())
        for field_of_curation, option in OPTIONS.items():
            said = said.replace(field_of_curation, option)
        sys.exit(f"error: {said}")
    print("\n".join(_as_text(report, benchmarks, near)))
    if args.json is not None:
        found = {"rows": report.rows, "hits": [asdict(hit) for hit in report.hits]}
        with replaces(args.json) as partial:
            partial.write_text(json.dumps(found) + "\n", encoding="utf-8")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="marco-train decontaminate", description=__doc__)
    add_source_arguments(parser)
    parser.add_argument(
        "--against",
        required=True,
        help="directory of .jsonl files whose text columns are questions, a file a benchmark; or "
        "fixture or card, the questions that stage=benchmark asks",
    )
    parser.add_argument(
        "--data-dir",
        help="directory with a folder for each set of the card that is read from files",
    )
    parser.add_argument(
        "--embedding-model",
        metavar="NAME",
        help="a model of sentence-transformers, by name or directory: also what is near a question "
        "by it is found, in other words or in another language",
    )
    parser.add_argument(
        "--similarity",
        type=float,
        default=DecontaminationConfig.similarity,
        help="cosine from which a turn is near (%(default)s)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the hits")
    return parser


def look(source: Source, benchmarks: Benchmarks, near: NearBenchmarks | None = None) -> Report:
    """Look for the benchmarks in all rows of a data set, one after the other.

    What an embedding model finds counts where the words do not find it.
    """
    report = Report(rows=len(source))
    waiting: list[UsableRow] = []
    for index in tqdm(range(len(source)), f"rows of {source.name}", delay=3):
        row = source[index]
        if isinstance(row, BadRow):
            report.num_at_fault += 1
        elif isinstance(row, TokenRow):
            report.num_tokenised += 1
        else:
            report.hits += benchmarks.hits(row)
            waiting += [row] if near is not None else []
        if near is not None and (len(waiting) == ROWS_TOGETHER or index + 1 == len(source)):
            known = {(hit.row, hit.benchmark) for hit in report.hits}
            found = near.hits(waiting)
            report.hits += [hit for hit in found if (hit.row, hit.benchmark) not in known]
            waiting.clear()
    report.hits.sort(key=lambda hit: hit.row)
    return report


def _as_text(report: Report, benchmarks: Benchmarks, near: NearBenchmarks | None) -> Iterable[str]:
    """The report for a person."""
    rows = {hit.row for hit in report.hits}
    yield f"rows       {report.rows:,}, of which {len(rows):,} hold a text of a benchmark"
    if report.num_at_fault:
        yield f"           {report.num_at_fault:,} not looked at: they cannot be read"
    if report.num_tokenised:
        yield f"           {report.num_tokenised:,} not looked at: they were tokenised before"
    yield (
        f"texts      {benchmarks.num_texts:,} of {len(benchmarks.names)} benchmarks, of which "
        f"{benchmarks.num_short:,} are too short to be looked for"
    )
    yield (
        f"ngram      {WORDS.run} words in a row, or {CHARACTERS.run} characters of a script "
        f"without spaces; all of a text from {WORDS.whole} or {CHARACTERS.whole}"
    )
    yield f"hash       a whole turn, from {WORDS.equal} words or {CHARACTERS.equal} characters"
    if near is not None:
        yield f"near       a turn whose embedding has a cosine of {near.similarity:g} or more"
    kinds = ("hash", "ngram", *(["near"] if near is not None else []))
    width = max(9, *(len(name) for name in benchmarks.names))
    yield " ".join([f"{'benchmark':{width}}", *(f"{kind:>8}" for kind in kinds), " rows, from 0"])
    for name in sorted(benchmarks.names):
        hits = [hit for hit in report.hits if hit.benchmark == name]
        counts = Counter(hit.kind for hit in hits)
        named = ", ".join(str(hit.row) for hit in hits[:MOST_NAMED])
        more = ", ..." if len(hits) > MOST_NAMED else ""
        cells = [f"{name:{width}}", *(f"{counts[kind]:>8,}" for kind in kinds)]
        yield " ".join([*cells, f" {named}{more}"]).rstrip()
