"""A pipeline goes on shard by shard, and whatever is redone comes out the same."""

import errno
import os
import shutil
import signal
import sqlite3
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from marco_train.curation import frame
from marco_train.curation.frame import (
    Cost,
    Counted,
    Dropped,
    Outcome,
    Pipeline,
    Row,
    RowStep,
    Shard,
    Shards,
    Step,
    Transform,
    planned,
    run,
)
from marco_train.errors import InputError, RunError


@dataclass
class Numbers:
    """Rows 0 to `count` - 1 in two languages; every tenth is at fault."""

    count: int = 100
    name: str = "numbers"

    def identity(self) -> Any:
        return self.count

    def plan(self) -> Cost:
        return Cost(self.count, seconds=1)

    def read(self, skip: int) -> Iterator[Row | Dropped]:
        for n in range(skip, self.count):
            row: Row = {"n": n, "language": "de" if n % 2 else "fr"}
            yield Dropped(row, "tenth") if n % 10 == 0 else row


@dataclass
class Watched:
    """Says which shards it was given, and fails once at one."""

    seen: list[int] = field(default_factory=list)
    fails_at: int = -1
    error: Exception = field(default_factory=lambda: RuntimeError("ended"))
    setting: int = 1
    name: str = "watched"

    def identity(self) -> Any:
        return self.setting

    def plan(self, rows: float) -> Cost:
        return Cost(rows, llm_calls=rows)

    def opened(self, before: Shards, scratch: Path) -> AbstractContextManager[Transform]:
        return nullcontext(self._outcomes)

    def _outcomes(self, shard: Shard) -> Iterator[Outcome]:
        self.seen.append(shard.number)
        for row in shard.rows:
            if shard.number == self.fails_at and row["n"] % 16 == 15:
                self.fails_at = -1
                raise self.error
            yield row | {"double": 2 * row["n"]}
            yield Counted("looked at", 1, row["language"])


def odd_twice(row: Row) -> list[Outcome]:
    return [row, row] if row["n"] % 2 else [Dropped(row, "even")]


def pipeline(step: Watched, count: int = 100) -> Pipeline:
    steps: list[Step] = [step, RowStep("odd", odd_twice)]
    return Pipeline("numbers", Numbers(count), steps, [], {"n": "int64"}, lambda counts: [])


def test_rows_are_counted_by_step_language_and_reason(tmp_path: Path) -> None:
    ran = run(pipeline(Watched()), tmp_path, 16)
    numbers, watched, odd = ran.counts
    assert numbers.as_json() | {"languages": {}} == {
        "name": "numbers",
        "in": 100,
        "out": 90,
        "dropped": {"tenth": 10},
        "counted": {},
        "languages": {},
    }
    assert watched.languages["de"].as_json() == {
        "in": 50,
        "out": 50,
        "dropped": {},
        "counted": {"looked at": 50},
    }
    assert odd.whole.as_json() == {"in": 90, "out": 100, "dropped": {"even": 40}, "counted": {}}
    assert [row["n"] for row in ran.shards.rows()] == [n for n in range(1, 100, 2) for _ in "ab"]


def test_what_was_finished_is_not_done_again(tmp_path: Path) -> None:
    step = Watched(fails_at=3)
    with pytest.raises(RuntimeError, match="ended"):
        run(pipeline(step), tmp_path / "ended", 16)
    ended = run(pipeline(step), tmp_path / "ended", 16)
    assert step.seen == [0, 1, 2, 3, 3, 4, 5, 6]
    calm = run(pipeline(Watched()), tmp_path / "calm", 16)
    assert list(ended.shards.rows()) == list(calm.shards.rows())
    assert [c.as_json() for c in ended.counts] == [c.as_json() for c in calm.counts]
    again = Watched()
    run(pipeline(again), tmp_path / "ended", 16)
    assert again.seen == []


def test_a_step_that_leaves_nothing_ends_the_pipeline_in_a_sentence(tmp_path: Path) -> None:
    none = RowStep("none", lambda row: Dropped(row, "odd" if row["n"] % 2 else "even"))
    behind = Watched()
    whole = Pipeline("numbers", Numbers(12), [none, behind], [], {}, lambda counts: [])
    said = r"step 01-none leaves none of 10 rows, most of them \(6\) for: odd"
    for _ in range(2):  # also where it was finished before
        with pytest.raises(InputError, match=said):
            run(whole, tmp_path, 4)
    assert behind.seen == []
    with pytest.raises(InputError, match="step 00-numbers leaves none of 0 rows: give another"):
        run(pipeline(Watched(), count=0), tmp_path, 4)


def test_a_source_that_was_ended_is_read_on(tmp_path: Path) -> None:
    calm = run(pipeline(Watched()), tmp_path, 16)
    source = tmp_path / "00-numbers"
    (source / "complete.json").unlink()
    for shard in ("00004", "00005", "00006"):
        shutil.rmtree(source / shard)
    assert run(pipeline(Watched()), tmp_path, 16).counts[0].as_json() == calm.counts[0].as_json()


def test_a_step_of_other_settings_is_redone_with_those_behind_it(tmp_path: Path) -> None:
    run(pipeline(Watched()), tmp_path, 16)
    before = (tmp_path / "00-numbers" / "complete.json").stat().st_mtime_ns
    (tmp_path / "notes").mkdir()  # somebody's
    step = Watched(setting=2)
    run(pipeline(step), tmp_path, 16)
    assert (tmp_path / "notes").is_dir()
    assert step.seen == [0, 1, 2, 3, 4, 5, 6]
    assert (tmp_path / "00-numbers" / "complete.json").stat().st_mtime_ns == before
    more = Watched(setting=2)
    assert run(pipeline(more, count=110), tmp_path, 16).counts[0].whole.rows_in == 110
    assert more.seen == [0, 1, 2, 3, 4, 5, 6]


def full_store() -> sqlite3.Error:
    """What SQLite raises where it finds no room."""
    with closing(sqlite3.connect(":memory:")) as store:
        store.execute("PRAGMA max_page_count=1")
        try:
            store.execute("CREATE TABLE a (b)")
        except sqlite3.Error as error:
            return error
    raise AssertionError


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), full_store()], ids=["file", "store"]
)
def test_a_full_disk_is_said_in_a_sentence_and_loses_nothing(
    error: Exception, tmp_path: Path
) -> None:
    step = Watched(fails_at=2, error=error)
    with pytest.raises(InputError, match="is full; make room and launch this again"):
        run(pipeline(step), tmp_path, 16)
    assert len(list(run(pipeline(step), tmp_path, 16).shards.rows())) == 100
    assert step.seen == [0, 1, 2, 2, 3, 4, 5, 6]


def test_a_plan_adds_up_without_a_row_being_read() -> None:
    found = planned(pipeline(Watched()))
    assert [(name, cost.rows, cost.llm_calls) for name, cost in found] == [
        ("numbers", 100, 0),
        ("watched", 100, 100),
        ("odd", 100, 0),
    ]


def test_processes_share_what_looks_at_rows_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frame, "SHARDS_OF_A_PROCESS", 1)
    alone = run(pipeline(Watched()), tmp_path / "alone", 16)
    shared = run(pipeline(Watched()), tmp_path / "shared", 16, processes=3)
    assert [*shared.shards.rows()] == [*alone.shards.rows()]
    assert [c.as_json() for c in shared.counts] == [c.as_json() for c in alone.counts]

    # Killed, each with a shard of its own: there may be gaps.
    step = tmp_path / "shared" / "02-odd"
    (step / "complete.json").unlink()
    for shard in ("00001", "00004"):
        (step / shard).rename(step / f".{shard}.77.partial")
    assert [*run(pipeline(Watched()), tmp_path / "shared", 16, processes=3).shards.rows()] == [
        *alone.shards.rows()
    ]
    assert {path.name[0] for path in step.iterdir()} == {"0", "c", "k", "s"}


@pytest.mark.parametrize(
    ("fault", "raised", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), InputError, "is full; make room"),
        (ValueError("odd"), ValueError, "odd"),
        (None, RunError, "a process of the step faulty was killed: is there memory for all"),
    ],
)
def test_what_goes_wrong_in_a_process_is_said(
    fault: Exception | None,
    raised: type[Exception],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(frame, "SHARDS_OF_A_PROCESS", 1)

    def look(row: Row) -> Row:
        if row["n"] == 37 and fault is not None:
            raise fault
        if row["n"] == 37:
            os.kill(os.getpid(), signal.SIGKILL)
        return row

    faulty = Pipeline("set", Numbers(), [RowStep("faulty", look)], [], {}, lambda counts: [])
    with pytest.raises(raised, match=said):
        run(faulty, tmp_path, 16, processes=2)
    calm = RowStep("faulty", lambda row: row)
    mended = Pipeline("set", Numbers(), [calm], [], {}, lambda counts: [])
    assert len([*run(mended, tmp_path, 16, processes=2).shards.rows()]) == 90
