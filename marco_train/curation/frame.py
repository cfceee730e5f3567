"""Pipelines over rows on disk, which go on shard by shard wherever they were ended.

    source -> work/00-<source>/00000, 00001, ... -> work/01-<step>/00000, ... -> <kind>.jsonl

A shard is a directory of rows and of what became of the rows before them; it takes its name once
both are on the disk. A step is a function of its rows and of its identity, so whatever is redone
comes out the same; memory grows with a shard and not with the input.
"""

import errno
import json
import os
import re
import shutil
import signal
import sqlite3
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import islice
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from marco_train.errors import InputError, RunError, require
from marco_train.files import replace_directory, replaces
from marco_train.tracking import log_line

Row = dict[str, Any]
"""Columns by name, of what JSON has; `language` is the code that counts go by, where there is
one."""

ROWS, COUNTS, KEY, COMPLETE = "rows.jsonl", "counts.json", "key.json", "complete.json"
STEP = re.compile(r"\d{2}-")
"""Begins the names of steps' directories."""
SCRATCH = "scratch"
"""Of a step, for what it looks up."""
SHARDS_OF_A_PROCESS = 8
"""At least; an identifier of languages takes longer to load than it does for them."""
FULL_DISK = {errno.ENOSPC, errno.EDQUOT}


@dataclass(frozen=True)
class Dropped:
    """A row that ends here."""

    row: Row
    reason: str
    """A few words that many rows share; they are counted by it."""


@dataclass(frozen=True)
class Counted:
    """Something beside rows that is counted, as tokens of a prompt."""

    name: str
    amount: int = 1
    language: str = ""


Outcome = Row | Dropped | Counted
"""What comes out of a step."""


@dataclass(frozen=True)
class Shard:
    """Rows that are worked on together."""

    number: int
    """From 0, in the order of the rows."""
    rows: list[Row]


Transform = Callable[[Shard], Iterable[Outcome]]


@dataclass(frozen=True)
class Cost:
    """What a plan says of a step before it runs."""

    rows: float
    """That come out of it, at most."""
    llm_calls: float = 0
    prompt_tokens: float = 0
    completion_tokens: float = 0
    embedding_batches: float = 0
    seconds: float = 0


class RowSource(Protocol):
    """Where a pipeline's rows come from."""

    @property
    def name(self) -> str:
        """A word, which names a directory."""

    def identity(self) -> Any:
        """What its rows are a function of, as JSON."""

    def plan(self) -> Cost:
        """Estimate its rows."""

    def read(self, skip: int) -> Iterator[Row | Dropped]:
        """Read all of its outcomes in order but for the first `skip`, the same every time."""


class Step(Protocol):
    """One step over all rows."""

    @property
    def name(self) -> str:
        """A word, which names a directory."""

    def identity(self) -> Any:
        """What its outcomes are a function of beside its rows, as JSON; the code is not of it."""

    def plan(self, rows: float) -> Cost:
        """Estimate what so many rows cost."""

    def opened(self, before: "Shards", scratch: Path) -> AbstractContextManager[Transform]:
        """Open what it needs.

        Args:
            before: All rows that it will get.
            scratch: A directory of its own, which a step that goes on finds as it was left, perhaps
                with something of a shard that it gets again.
        """


class PerRow:
    """Marks a step whose outcomes of a shard follow from that shard alone: processes share them."""


@dataclass(frozen=True)
class RowStep(PerRow):
    """A step that looks at one row at a time."""

    name: str
    apply: Callable[[Row], Outcome | Iterable[Outcome]]
    about: Any = None
    """Its identity."""
    rows_per_second: float = 20_000
    made_of_each: float = 1
    """Rows that come out of one."""

    def identity(self) -> Any:
        """Return what it was given."""
        return self.about

    def plan(self, rows: float) -> Cost:
        """Estimate its time."""
        return Cost(rows * self.made_of_each, seconds=rows / self.rows_per_second)

    def opened(self, before: "Shards", scratch: Path) -> AbstractContextManager[Transform]:
        """Look at the rows of a shard one after the other."""
        return nullcontext(self._outcomes)

    def _outcomes(self, shard: Shard) -> Iterator[Outcome]:
        for row in shard.rows:
            yield from outcomes_of(self.apply(row))


def outcomes_of(found: Outcome | Iterable[Outcome]) -> Iterable[Outcome]:
    """What a row became: one outcome or several."""
    return [found] if isinstance(found, dict | Dropped | Counted) else found


@dataclass
class Tally:
    """What became of rows."""

    rows_in: int = 0
    rows_out: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    counted: Counter[str] = field(default_factory=Counter)

    def add(self, other: "Tally") -> None:
        """Add those of another."""
        self.rows_in += other.rows_in
        self.rows_out += other.rows_out
        self.dropped += other.dropped
        self.counted += other.counted

    def as_json(self) -> dict[str, Any]:
        """For counts.json."""
        return {
            "in": self.rows_in,
            "out": self.rows_out,
            "dropped": dict(sorted(self.dropped.items())),
            "counted": dict(sorted(self.counted.items())),
        }

    @classmethod
    def of_json(cls, said: Mapping[str, Any]) -> "Tally":
        """What `as_json` wrote."""
        return cls(said["in"], said["out"], Counter(said["dropped"]), Counter(said["counted"]))


@dataclass
class StepCounts:
    """What became of the rows of a step, in all and by language."""

    name: str
    whole: Tally = field(default_factory=Tally)
    languages: dict[str, Tally] = field(default_factory=dict)

    def of(self, language: str) -> Tally:
        """Those of a language."""
        return self.languages.setdefault(language, Tally())

    def add(self, other: "StepCounts") -> None:
        """Add those of a shard."""
        self.whole.add(other.whole)
        for language, tally in other.languages.items():
            self.of(language).add(tally)

    def take_in(self, row: Row) -> None:
        """Count a row that goes in."""
        for tally in (self.whole, self.of(language_of(row))):
            tally.rows_in += 1

    def take_out(self, outcome: Outcome) -> None:
        """Count what comes out."""
        language = outcome.language if isinstance(outcome, Counted) else _language(outcome)
        for tally in (self.whole, self.of(language)):
            match outcome:
                case Dropped(reason=reason):
                    tally.dropped[reason] += 1
                case Counted(name=name, amount=amount):
                    tally.counted[name] += amount
                case _:
                    tally.rows_out += 1

    def as_json(self) -> dict[str, Any]:
        """For counts.json."""
        languages = {name: tally.as_json() for name, tally in sorted(self.languages.items())}
        return {"name": self.name, **self.whole.as_json(), "languages": languages}

    @classmethod
    def of_json(cls, said: Mapping[str, Any]) -> "StepCounts":
        """What `as_json` wrote."""
        languages = {name: Tally.of_json(each) for name, each in said["languages"].items()}
        return cls(said["name"], Tally.of_json(said), languages)


def language_of(row: Row) -> str:
    """The code that a row's counts go by; empty where it has none."""
    return str(row.get("language") or "")


def _language(outcome: Row | Dropped) -> str:
    return language_of(outcome.row if isinstance(outcome, Dropped) else outcome)


class Shards:
    """The shards of one step, on disk."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def __len__(self) -> int:
        """Number of those that are finished; of a step that is, they have no gaps."""
        return len(self.finished())

    def finished(self) -> set[int]:
        """Numbers of those that are finished."""
        return {int(path.name) for path in self.directory.iterdir() if path.name.isdigit()}

    def __iter__(self) -> Iterator[Shard]:
        """Those that are finished, in order, one in memory at a time."""
        return (self.read(number) for number in range(len(self)))

    def rows(self) -> Iterator[Row]:
        """All rows, in order."""
        return (row for shard in self for row in shard.rows)

    def read(self, number: int) -> Shard:
        """Read one."""
        with (self._path(number) / ROWS).open(encoding="utf-8") as lines:
            return Shard(number, [json.loads(line) for line in lines])

    def counts(self) -> StepCounts:
        """Add up what became of all rows."""
        whole = StepCounts(self.directory.name.partition("-")[2])
        for number in range(len(self)):
            said = json.loads((self._path(number) / COUNTS).read_text(encoding="utf-8"))
            whole.add(StepCounts.of_json(said))
        return whole

    def write(self, number: int, rows_in: Iterable[Row], outcomes: Iterable[Outcome]) -> None:
        """Write one as a whole, or nothing of it."""
        counts = StepCounts(self.directory.name)
        for row in rows_in:
            counts.take_in(row)
        for left in self.directory.glob(f".{number:05d}.*"):
            shutil.rmtree(left, ignore_errors=True)
        partial = self.directory / f".{number:05d}.{os.getpid()}.partial"
        partial.mkdir()
        with (partial / ROWS).open("w", encoding="utf-8", errors="replace") as lines:
            for outcome in outcomes:
                counts.take_out(outcome)
                if isinstance(outcome, dict):
                    lines.write(json.dumps(outcome, ensure_ascii=False) + "\n")
        (partial / COUNTS).write_text(json.dumps(counts.as_json()), encoding="utf-8")
        replace_directory(self._path(number), partial)

    def _path(self, number: int) -> Path:
        return self.directory / f"{number:05d}"


@dataclass(frozen=True)
class Origin:
    """What a set is made of, for its card."""

    name: str
    revision: str
    licence: str


@dataclass(frozen=True)
class Pipeline:
    """A source and named steps."""

    kind: str
    """The name of what comes out: <kind>.jsonl."""
    source: RowSource
    steps: Sequence[Step]
    origins: Sequence[Origin]
    columns: Mapping[str, str]
    """Beside `messages`, of each row that comes out, with its type as pyarrow names it: string,
    int64, double, bool."""
    weaknesses: Callable[[Sequence[StepCounts]], Iterable[str]]
    """Sentences for the card, by what became of the rows."""
    prompts: Mapping[str, str] = field(default_factory=dict)
    """Digests of prompts and templates, by name."""
    details: Sequence[str] = ()
    """Lines for the card: rules with their bounds and sources."""


@dataclass(frozen=True)
class Ran:
    """A pipeline that was run to its end."""

    shards: Shards
    """Of its last step."""
    counts: list[StepCounts]
    """Of its source and its steps, in order."""


def planned(pipeline: Pipeline) -> list[tuple[str, Cost]]:
    """Estimate the source and all steps, in order; nothing is asked and nothing written."""
    cost = pipeline.source.plan()
    found = [(pipeline.source.name, cost)]
    for step in pipeline.steps:
        cost = step.plan(cost.rows)
        found.append((step.name, cost))
    return found


def run(pipeline: Pipeline, work: Path, shard_rows: int, processes: int = 1) -> Ran:
    """Run a pipeline, or go on with it where it was ended.

    Args:
        pipeline: What to run.
        work: Where shards lie.
        shard_rows: Outcomes of the source that are a shard.
        processes: That share a step's shards, where it is `PerRow`.

    Raises:
        InputError: The disk is full, a step refuses, or one leaves no row; what is finished stays.
    """
    with room_on_disk(work):
        work.mkdir(parents=True, exist_ok=True)
        keys, places = _keys_of(pipeline, shard_rows), _places_of(pipeline, work)
        before = _prepared(places, 0, keys[0])
        _read_source(pipeline.source, before, shard_rows)
        counts = [_counts_of_some(before)]
        for number, step in enumerate(pipeline.steps, 1):
            after = _prepared(places, number, keys[number])
            _run_step(step, before, after, processes)
            before = after
            counts.append(_counts_of_some(after))
        return Ran(before, counts)


def unfinished(pipeline: Pipeline, work: Path, shard_rows: int) -> list[Step]:
    """Steps that `run` has something left to do in; reads only what says so."""
    keys, places = _keys_of(pipeline, shard_rows), _places_of(pipeline, work)
    return [
        step
        for step, place, key in zip(pipeline.steps, places[1:], keys[1:], strict=True)
        if not (_has_key(place, key) and _is_complete(Shards(place)))
    ]


def _keys_of(pipeline: Pipeline, shard_rows: int) -> list[str]:
    """What tells the rows of the source and of each step from those of other settings."""
    keys = [_key_of("", [pipeline.source.name, pipeline.source.identity(), shard_rows])]
    for step in pipeline.steps:
        keys.append(_key_of(keys[-1], [step.name, step.identity()]))
    return keys


def _places_of(pipeline: Pipeline, work: Path) -> list[Path]:
    """Directories of the source and of each step."""
    names = [pipeline.source.name, *(step.name for step in pipeline.steps)]
    return [work / f"{number:02d}-{name}" for number, name in enumerate(names)]


@contextmanager
def room_on_disk(work: Path) -> Iterator[None]:
    """Say in a sentence that a disk is full.

    Raises:
        InputError: It is.
    """
    try:
        yield
    except (OSError, sqlite3.Error) as error:
        is_full = getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL
        if not is_full and getattr(error, "errno", None) not in FULL_DISK:
            raise
        raise InputError(
            f"the disk of {str(work)!r} is full; make room and launch this again: it goes on with "
            "the shard that was being written"
        ) from error


def _key_of(before: str, identity: Any) -> str:
    said = json.dumps([before, identity], sort_keys=True, ensure_ascii=False, default=str)
    return sha256(said.encode("utf-8", "replace")).hexdigest()


def _prepared(places: Sequence[Path], number: int, key: str) -> Shards:
    """Make the directory of a step; what another identity left there, and behind it, goes."""
    place = places[number]
    known = place / KEY
    if place.is_dir() and not _has_key(place, key):
        if known.is_file():
            log_line(f"{place.name}: its rows or its settings are others than before; redone")
        for each in sorted(place.parent.iterdir()):
            if STEP.match(each.name) and each.name >= f"{number:02d}-":
                shutil.rmtree(each)
    if not place.is_dir():
        place.mkdir()
        with replaces(known) as partial:
            partial.write_text(json.dumps(key))
    return Shards(place)


def _has_key(place: Path, key: str) -> bool:
    known = place / KEY
    return known.is_file() and bool(json.loads(known.read_text()) == key)


def _read_source(source: RowSource, shards: Shards, shard_rows: int) -> None:
    if _is_complete(shards):
        return
    start, first = time.monotonic(), len(shards)
    outcomes = source.read(first * shard_rows)
    shown = tqdm(desc=source.name, unit=" rows", initial=first * shard_rows, delay=3)
    with shown:
        number = first
        while chunk := list(islice(outcomes, shard_rows)):
            rows_in = [each.row if isinstance(each, Dropped) else each for each in chunk]
            shards.write(number, rows_in, chunk)
            shown.update(len(chunk))
            number += 1
    _complete(shards, start)


def _run_step(step: Step, before: Shards, after: Shards, processes: int) -> None:
    if _is_complete(after):
        return
    start, finished, count = time.monotonic(), after.finished(), len(before)
    todo = [number for number in range(count) if number not in finished]
    (after.directory / SCRATCH).mkdir(exist_ok=True)
    shown = tqdm(desc=step.name, total=count, initial=len(finished), unit=" shards", delay=3)
    with shown:
        processes = min(processes, len(todo) // SHARDS_OF_A_PROCESS)
        if isinstance(step, PerRow) and processes > 1:
            _share_shards(step, before, after, todo, processes, shown)
        else:
            for _ in _done(step, before, after, todo):
                shown.update()
    _complete(after, start)


def _done(step: Step, before: Shards, after: Shards, todo: Sequence[int]) -> Iterator[int]:
    """Do shards one after the other, and say so of each."""
    with step.opened(before, after.directory / SCRATCH) as transform:
        for number in todo:
            shard = before.read(number)
            after.write(number, shard.rows, transform(shard))
            yield number


def _share_shards(
    step: Step, before: Shards, after: Shards, todo: Sequence[int], processes: int, shown: Any
) -> None:
    """Let processes do shards, each every so manyth.

    Raises:
        RunError: One ended without a word; what others raise is raised here.
    """
    # A fork has the step as it is, with what cannot be pickled; no thread of ours runs by now.
    context = get_context("fork")
    ends = [context.Pipe(duplex=False) for _ in range(processes)]
    workers = [
        context.Process(
            target=_work, args=(step, before, after, todo[turn::processes], said), daemon=True
        )
        for turn, (_, said) in enumerate(ends)
    ]
    for worker in workers:
        worker.start()
    try:
        while running := [worker.sentinel for worker in workers if worker.exitcode is None]:
            wait(running, timeout=1.0)
            shown.update(len(after) - shown.n)
            if any(worker.exitcode for worker in workers):
                break
    finally:
        for worker in workers:
            worker.kill()
            worker.join()
    for worker, (heard, _) in zip(workers, ends, strict=True):
        if heard.poll():
            raise heard.recv()
        if worker.exitcode not in (0, -signal.SIGKILL):
            raise RunError(f"a process of the step {step.name} ended with {worker.exitcode}")
    if len(after) < len(before):
        raise RunError(f"a process of the step {step.name} was killed: is there memory for all?")


def _work(step: Step, before: Shards, after: Shards, todo: Sequence[int], said: Connection) -> None:
    parent = os.getppid()
    try:
        for _ in _done(step, before, after, todo):
            if os.getppid() != parent:  # it was killed, and another may have taken its place
                return
    except BaseException as error:
        said.send(error)
        sys.exit(1)


def _counts_of_some(shards: Shards) -> StepCounts:
    """What became of the rows of a step that is finished.

    Raises:
        InputError: None of them is left.
    """
    counts = shards.counts()
    whole, name = counts.whole, shards.directory.name
    why = ""
    if whole.dropped:
        ((reason, count),) = whole.dropped.most_common(1)
        why = f", most of them ({count:,}) for: {reason}"
    require(
        whole.rows_out > 0,
        f"the step {name} leaves none of {whole.rows_in:,} rows{why}: give another input, or other "
        "settings of this step",
    )
    return counts


def _is_complete(shards: Shards) -> bool:
    return (shards.directory / COMPLETE).is_file()


def _complete(shards: Shards, start: float) -> None:
    seconds = time.monotonic() - start
    whole = shards.counts().whole
    with replaces(shards.directory / COMPLETE) as partial:
        partial.write_text(json.dumps({"shards": len(shards), "seconds": round(seconds, 1)}))
    most = ", ".join(f"{reason} {count:,}" for reason, count in whole.dropped.most_common(4))
    dropped = f" (dropped: {most})" if most else ""
    log_line(
        f"{shards.directory.name}: {whole.rows_in:,} in, {whole.rows_out:,} out{dropped}, "
        f"{seconds:.1f}s"
    )
