"""The rows of a run are judged before its first step, once, and too many at fault end it there."""

import json
import re
import resource
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from marco_train.config.data import DataConfig, SourceConfig
from marco_train.data import cache as kept
from marco_train.data.conversations import Source
from marco_train.data.gate import (
    Structure,
    check_bad_rows,
    check_lost_rows,
    describe,
    judge_structure,
    judge_tokens,
    judged_rows,
)
from marco_train.data.tokens import LostRows
from marco_train.errors import InputError
from marco_train.types import Example, UsableRow
from tests.helpers.ranks import run_on_ranks
from tests.helpers.rows import chat, loader_of, source, source_at, turns, write
from tests.helpers.world import World

GOOD = [json.dumps(chat(f"question {n}")) for n in range(20)]
NULL = turns({"role": "user", "content": None})
# One line of each kind of fault.
KINDS = {
    "unknown columns": "{}",
    "no object": "[]",
    "content that is not text": NULL,
    "empty chat": turns(),
    "unknown role": turns({"role": "robot", "content": "x"}),
    "not JSON": "{",
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing is known from another test."""
    monkeypatch.setenv("MARCO_TRAIN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def structure(num_rows: int, num_bad: int) -> Structure:
    bad = [
        {"source": "s", "row": row, "kind": "k", "reason": "r", "begins": ""}
        for row in range(num_bad)
    ]
    return Structure(num_rows, num_rows, bad=bad)


# Rows, rows at fault and data.max_bad_rows, and whether a run starts with them.
BUDGETS = [
    (1, 0, 0.01, True),
    (1, 1, 0.01, False),  # nothing is left
    (3, 2, 0.01, False),
    (20, 10, 0.01, True),  # half is left
    (19, 10, 0.01, False),
    (40, 11, 0.01, False),
    (40, 11, 0.3, True),
    (40, 11, 0.0, False),
    (40, 10, 0.0, True),
    (1200, 12, 0.01, True),
    (1200, 13, 0.01, False),
    (1200, 700, 0.49, False),
    (1200, 700, 0.6, True),
    (40, 40, 1.0, True),
]


@pytest.mark.parametrize(("num_rows", "num_bad", "share", "starts"), BUDGETS)
def test_ten_rows_or_a_share_may_be_at_fault_and_half_must_be_left(
    num_rows: int, num_bad: int, share: float, starts: bool
) -> None:
    cfg = DataConfig(max_bad_rows=share)
    if starts:
        check_bad_rows("s", structure(num_rows, num_bad), cfg)
        return
    with pytest.raises(InputError, match=f"'s': {num_bad} of {num_rows} rows are at fault"):
        check_bad_rows("s", structure(num_rows, num_bad), cfg)


@pytest.mark.parametrize(
    ("num_rows", "num_bad", "kind", "says"),
    [
        (
            40,
            11,
            "not JSON",
            "more than data.max_bad_rows=0.01 allows beyond the first 10, which are free (11 not "
            "JSON, as row 0 (from 0): at fault): mend the rows, or raise data.max_bad_rows",
        ),
        (
            1200,
            13,
            "unknown role",
            "more than data.max_bad_rows=0.01 allows (13 unknown role, as row 0 (from 0): at "
            "fault): mend the rows, say with data.sources.s.columns and .roles how they are to be "
            "read, or raise data.max_bad_rows",
        ),
    ],
)
def test_a_refusal_names_what_is_free_and_what_helps_against_its_faults(
    num_rows: int, num_bad: int, kind: str, says: str
) -> None:
    found = structure(num_rows, num_bad)
    found.bad = [row | {"kind": kind, "reason": "at fault"} for row in found.bad]
    with pytest.raises(InputError) as refusal:
        check_bad_rows("s", found, DataConfig())
    assert str(refusal.value) == f"source 's': {num_bad} of {num_rows} rows are at fault, {says}"


@pytest.mark.parametrize("stage", ["sft", "opd"])
def test_the_five_commonest_faults_end_a_run_before_its_first_step(
    stage: str, world: World, tmp_path: Path
) -> None:
    lines = [line for n, line in enumerate(KINDS.values()) for _ in range(6 - n)]
    file = write(tmp_path, *GOOD, *lines)
    quarantine = tmp_path / "quarantine.jsonl"
    with pytest.raises(InputError) as refusal:
        loader_of(stage, world, file, quarantine=quarantine)
    said = str(refusal.value)
    assert said.startswith(
        "source 'text': 21 of 41 rows are at fault, more than data.max_bad_rows=0.01 allows "
        "beyond the first 10, which are free (6 unknown columns, as row 20 (from 0): "
        "no column messages"
    )
    assert "; 5 no object, as row 26 (from 0): the row is [], not an object" in said
    assert "; 4 content that is not text, as row 31 (from 0)" in said
    assert "; 3 empty chat, as row 35 (from 0)" in said
    assert "; 2 unknown role, as row 38 (from 0)" in said
    assert "not JSON" not in said
    assert said.endswith(
        "mend the rows, say with data.sources.text.columns and .roles how they are to be read, "
        "or raise data.max_bad_rows"
    )
    # All of them are written down, to be mended.
    assert len(quarantine.read_text().splitlines()) == 21


def test_rows_at_fault_are_written_down(world: World, tmp_path: Path) -> None:
    long = json.dumps({"prompt": "é" * 500, "images": ["a"]})
    file = write(tmp_path, GOOD[0], "{}", *GOOD[1:4], long, "{\u2028")
    quarantine = tmp_path / "run" / "quarantine.jsonl"
    loader_of("sft", world, file, quarantine=quarantine)
    rows = [json.loads(line) for line in quarantine.read_text("ascii").splitlines()]
    assert [(row["source"], row["row"]) for row in rows] == [("text", 1), ("text", 5), ("text", 6)]
    assert all(row.keys() == {"source", "row", "reason", "begins"} for row in rows)
    assert rows[0]["begins"] == "{}"
    assert rows[1]["reason"] == "the row has images, and only text is learnt here"
    assert rows[1]["begins"] == repr({"prompt": "é" * 500, "images": ["a"]})[:200]
    assert rows[2]["reason"].startswith(f"{file}, line 7: not JSON (")

    loader_of("sft", world, write(tmp_path, *GOOD), quarantine=quarantine)
    assert not quarantine.exists()  # of mended rows


def found_by_rank(world: World, file: Path, quarantine: Path) -> tuple[Any, ...]:
    loader = loader_of("opd", world, file, quarantine=quarantine)
    (found,) = loader._stream._structures.values()
    return found.as_json(), loader._stream.languages()


def test_ranks_share_the_rows_and_know_all_of_them(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [json.dumps(chat(f"{n}") | {"language": "en" if n % 2 else "de"}) for n in range(15)]
    file = write(tmp_path, *rows[:7], "{}", *rows[7:], "[]")
    alone = found_by_rank(world, file, tmp_path / "alone.jsonl")
    assert alone[0]["num_judged"] == 17
    assert alone[1] == {"en", "de"}
    for name in ("cache", "other"):  # known, and worked out by two
        monkeypatch.setenv("MARCO_TRAIN_CACHE", str(tmp_path / name))
        both = run_on_ranks(2, found_by_rank, world, file, tmp_path / "both.jsonl")
        assert both == [alone, alone]
        assert (tmp_path / "both.jsonl").read_text() == (tmp_path / "alone.jsonl").read_text()


class Counted(Source):
    """Counts the rows that are read of it."""

    num_read = 0

    def read(self, index: int) -> Any:
        self.num_read += 1
        return super().read(index)


def counted(path: Path, **changes: Any) -> Counted:
    fields: dict[str, Any] = {"path": str(path), "category": "math", "weight": 1.0}
    return Counted("fixture", SourceConfig(**(fields | changes)))


def judged(path: Path, cfg: DataConfig | None = None, **changes: Any) -> tuple[Structure, int]:
    """What is found of a source, and how many rows were read for it."""
    found = counted(path, **changes)
    return judge_structure(found, cfg or DataConfig()), found.num_read


def test_what_was_judged_is_known_the_second_time(tmp_path: Path) -> None:
    rows = [chat("a") | {"topic": "x", "language": "en"}, {}, chat("b") | {"topic": "y"}]
    file = write(tmp_path, *map(json.dumps, rows))
    first, num_read = judged(file)
    assert num_read == 3
    assert (first.num_rows, first.num_judged) == (3, 3)
    assert first.shapes == {"messages": 2}
    assert first.categories == {"math": 2}
    assert first.languages == {"en": 1, "": 1}
    assert first.kinds == {"unknown columns": 1}
    assert judged(file) == (first, 0)
    # Wherever the file lies, and whatever the source is called.
    moved = tmp_path / "moved.jsonl"
    moved.write_bytes(file.read_bytes())
    assert judged(moved) == (first, 0)
    other = Counted("other", SourceConfig(path=str(file), category="math", weight=0.5))
    assert judge_structure(other, DataConfig()).bad == [first.bad[0] | {"source": "other"}]
    assert other.num_read == 0


CHANGES: dict[str, dict[str, Any]] = {
    "category": {"category": "chat"},
    "category_column": {"category_column": "topic"},
    "columns": {"columns": {"messages": "messages"}},
    "roles": {"roles": {"robot": "user"}},
    "unique_prompts": {"unique_prompts": True},
}


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES.keys())
def test_rows_that_are_read_otherwise_are_judged_anew(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    file = write(tmp_path, *GOOD[:3])
    assert judged(file)[1] == 3
    assert judged(file, **changes)[1] == 3


def test_other_rows_other_samples_and_other_code_are_judged_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(tmp_path, *GOOD[:4])
    assert judged(file)[1] == 4
    assert judged(file, DataConfig(judge_rows=2))[1] == 2
    write(tmp_path, *GOOD[1:5])
    assert judged(file)[1] == 4
    monkeypatch.setattr(kept, "_code_digest", lambda: "of another version")
    assert judged(file)[1] == 4
    few = counted(file)
    few.keep_first(3)
    judge_structure(few, DataConfig())
    assert few.num_read == 3


def test_a_cache_that_is_broken_or_cannot_be_made_is_none(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(tmp_path, *GOOD[:3])
    first, _ = judged(file)
    (kept,) = cache.glob("structure-*.json")
    kept.write_text(kept.read_text()[:-9])
    assert judged(file) == (first, 3)
    monkeypatch.setenv("MARCO_TRAIN_CACHE", str(file / "below"))  # a file has nothing below it
    assert judged(file) == (first, 3)


def test_of_many_rows_a_sample_from_all_over_is_judged(tmp_path: Path) -> None:
    file = write(tmp_path, *GOOD)
    found = source_at(file)
    assert list(judged_rows(found, DataConfig(judge_rows=20))) == list(range(20))
    five = judged_rows(found, DataConfig(judge_rows=5))
    assert len(set(five)) == 5 and set(five) < set(range(20))
    assert five == judged_rows(found, DataConfig(judge_rows=5)) == sorted(five)
    many = source(tmp_path, *({"prompt": ""} for _ in range(25_000)))
    sample = judged_rows(many, DataConfig(judge_rows=20_000))
    assert len(sample) == len(set(sample)) == 10_000
    assert sample[0] < 25 and sample[-1] > 24_975
    by_turns = Counter(row % 5 for row in sample)
    assert all(1900 < by_turns[turn] < 2100 for turn in range(5))


def judged_of(lines: Sequence[str], judge_rows: int, tmp_path: Path) -> Sequence[int]:
    """The rows of so many lines that are judged before the first step."""
    return judged_rows(source_at(write(tmp_path, *lines)), DataConfig(judge_rows=judge_rows))


def test_rows_beyond_the_sample_are_dropped_and_counted_where_they_are_drawn(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines, judged = list(GOOD), judged_of(GOOD, 5, tmp_path)
    beyond = min(set(range(20)) - set(judged))
    lines[beyond] = "{}"
    file = write(tmp_path, *lines)
    given = ["data.judge_rows=5", "stage.global_batch_size=20"]
    loader = loader_of("sft", world, file, *given)
    said = capsys.readouterr().out
    assert said == "source 'text': 20 rows, of which 5 were judged, shape messages\n"
    assert not loader._stream.is_all_judged
    next(loader)
    assert loader.metrics()["data/dropped_malformed"] == 1
    assert loader.metrics()["data/num_sequences"] == 19
    assert f"dropped source 'text', row {beyond} (from 0)" in capsys.readouterr().out
    for row in judged[:3]:
        lines[row] = "{}"
    with pytest.raises(InputError, match="3 of 5 rows are at fault"):
        loader_of("sft", world, write(tmp_path, *lines), *given)


def losses(num_lost: int) -> LostRows:
    return LostRows(Counter({"data/dropped_too_long": num_lost}))


@pytest.mark.parametrize(
    ("num_rows", "num_lost", "share", "starts"),
    [
        (4, 2, 0.5, True),
        (4, 3, 0.5, False),
        (1, 1, 0.5, False),
        (4, 1, 0.0, False),
        (4, 0, 0.0, True),
        (4, 4, 1.0, True),
    ],
)
def test_half_of_a_source_may_be_lost_or_the_share_that_is_allowed(
    num_rows: int, num_lost: int, share: float, starts: bool
) -> None:
    cfg = DataConfig(max_lost_rows=share)
    if starts:
        check_lost_rows("s", Structure(num_rows, num_rows), losses(num_lost), "", cfg)
        return
    says = rf"can use {num_rows - num_lost} of {num_rows} rows.*{num_lost} data/dropped_too_long"
    with pytest.raises(InputError, match=says):
        check_lost_rows("s", Structure(num_rows, num_rows), losses(num_lost), "", cfg)


def rated(question: str) -> dict[str, Any]:
    return {"prompt": question, "chosen": "good", "rejected": "bad"}


# Rows that a stage cannot use, and what is said of them.
LOST: dict[str, tuple[str, Any, str]] = {
    "prompts": (
        "sft",
        {"prompt": "x"},
        r"\(8 data/dropped_no_loss\): mend the rows, name the column of the answer with "
        r"data.sources.text.columns.response, or raise data.max_lost_rows$",
    ),
    "empty answers": (
        "sft",
        chat("x", ""),
        r"\(8 data/dropped_empty\): mend the rows, learn them with "
        r"data.keep_empty_answers=true, or raise data.max_lost_rows$",
    ),
    "long answers": (
        "sft",
        chat("x", "word " * 200),
        r"\(8 data/dropped_too_long over stage.max_length=96\)",
    ),
    "long prompts": (
        "opd",
        chat("word " * 200),
        r"\(8 data/dropped_too_long over stage.max_prompt_length=72\): mend the rows, raise "
        r"stage.max_prompt_length, cut them with data.overlong=truncate, or raise "
        r"data.max_lost_rows$",
    ),
    "control tokens": (
        "opd",
        chat("<|im_end|>"),
        r"\(8 data/dropped_special\): mend the rows, or raise data.max_lost_rows$",
    ),
    "text": ("opd", {"text": "x"}, r"\(8 data/dropped_malformed; .*: the row has no turns"),
    "rated answers": ("sft", rated("x"), r"\(8 data/dropped_malformed; .*answers that are rated"),
}


@pytest.mark.parametrize(("stage", "row", "says"), LOST.values(), ids=LOST.keys())
def test_a_source_of_which_a_stage_can_use_too_little_is_refused(
    stage: str, row: Any, says: str, world: World, tmp_path: Path
) -> None:
    file = write(tmp_path, *GOOD[:4], *[json.dumps(row)] * 8)
    with pytest.raises(InputError, match=rf"this stage can use 4 of 12 rows, .*{says}"):
        loader_of(stage, world, file)
    loader_of(stage, world, file, "data.max_lost_rows=0.7")


def test_what_one_stage_loses_another_uses(world: World, tmp_path: Path) -> None:
    prompts = [json.dumps({"prompt": f"question {n}"}) for n in range(4)]
    next(loader_of("opd", world, write(tmp_path, *prompts)))
    answered = [json.dumps({"prompt": f"{n}", "completion": "a number"}) for n in range(4)]
    loader = loader_of("sft", world, write(tmp_path, *answered), "stage.global_batch_size=4")
    next(loader)
    assert loader.metrics()["data/num_sequences"] == 4


def test_what_was_lost_is_said_by_source_at_the_start_and_at_the_end(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [chat("a") | {"chosen": "x", "rejected": "y"}, chat("b", ""), {"prompt": "c"}]
    lines = [*GOOD[:4], *map(json.dumps, rows), "{}"]
    loader = loader_of("sft", world, write(tmp_path, *lines), "stage.global_batch_size=8")
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("source 'text': 8 rows, shape messages (6), prompt (1); at fault: ")
    assert "; 1 data/dropped_empty" in said[0] and "; 1 data/dropped_no_loss" in said[0]
    assert said[1:] == [
        "source 'text': columns that hold something and are not read: chosen (1), rejected (1)"
    ]
    next(loader)
    capsys.readouterr()
    loader.log_end()
    assert capsys.readouterr().out.splitlines()[-1] == (
        "dropped or cut in this launch: 1 data/dropped_empty in 'text'; "
        "1 data/dropped_malformed in 'text'; 1 data/dropped_no_loss in 'text'"
    )


def test_a_row_that_is_dropped_again_and_again_counts_as_one_row(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [*GOOD[:2], json.dumps({"prompt": "c"}), "{}"]
    loader = loader_of("sft", world, write(tmp_path, *lines), "stage.global_batch_size=4")
    for _ in range(5):
        next(loader)
    loader.log_end()
    assert capsys.readouterr().out.splitlines()[-1] == (
        "dropped or cut in this launch: 1 data/dropped_malformed in 'text', drawn 5 times; "
        "1 data/dropped_no_loss in 'text', drawn 5 times"
    )


def test_a_source_without_a_fault_is_said_in_a_line() -> None:
    found = Structure(1234, 1234, shapes=Counter({"alpaca": 1234}))
    assert describe("s", found, LostRows(), "") == ["source 's': 1,234 rows, shape alpaca"]


def test_columns_that_are_not_read_are_named_up_to_a_number() -> None:
    found = Structure(2, 2, shapes=Counter({"alpaca": 2}))
    found.ignored.update({f"c{n:02}": 2 for n in range(20)} | {"rare": 1, "seldom": 1})
    names = ", ".join(f"c{n:02} (2)" for n in range(20))
    assert describe("s", found, LostRows(), "")[1] == (
        f"source 's': columns that hold something and are not read: {names}, and 2 more"
    )


def tokens(counts: list[int]) -> Callable[[UsableRow], Example | str]:
    def render(row: UsableRow) -> Example | str:
        counts.append(row.row)
        return "data/dropped_too_long" if row.row == 1 else Example([row.row], [True])

    return render


def test_rows_are_rendered_once_and_their_tokens_kept(tmp_path: Path) -> None:
    found = source_at(write(tmp_path, *GOOD[:4]))
    calls: list[int] = []
    files, lost = judge_tokens(found, DataConfig(), tokens(calls), ["a template"])
    assert files is not None
    assert (calls, lost.counts) == ([0, 1, 2, 3], {"data/dropped_too_long": 1})
    again, lost = judge_tokens(found, DataConfig(), tokens(calls), ["a template"])
    assert again is not None
    assert (len(calls), lost.counts) == (4, {"data/dropped_too_long": 1})
    assert [again[i] for i in range(4)] == [files[i] for i in range(4)]
    judge_tokens(found, DataConfig(), tokens(calls), ["another template"])
    assert len(calls) == 8
    # Of many rows a sample is rendered, and the rest where it is drawn.
    sampled, lost = judge_tokens(found, DataConfig(judge_rows=2), tokens(calls), ["a template"])
    assert sampled is None
    assert (calls[8:], lost.counts) == ([1, 3], {"data/dropped_too_long": 1})


def test_a_run_starts_without_a_cache(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(tmp_path, *GOOD)
    monkeypatch.setenv("MARCO_TRAIN_CACHE", str(file / "below"))
    next(loader_of("sft", world, file))


def refusal_without_room(world: World, file: Path) -> str:
    resource.setrlimit(resource.RLIMIT_FSIZE, (256, 256))
    with redirect_stdout(StringIO()):  # which a test's runner keeps in a file
        try:
            loader_of("sft", world, file)
        except InputError as refusal:
            return str(refusal)
    return ""


def test_a_source_that_is_lost_is_refused_without_room(world: World, tmp_path: Path) -> None:
    prompts = [json.dumps({"prompt": f"question {n}"}) for n in range(30)]
    file = write(tmp_path, *GOOD, *prompts)
    (said,) = run_on_ranks(1, refusal_without_room, world, file)
    assert "this stage can use 20 of 50 rows" in said


def test_rows_that_are_at_fault_beyond_the_sample_are_written_down_when_drawn(
    world: World, tmp_path: Path
) -> None:
    lines = [json.dumps(chat(f"{n}")) for n in range(40)]
    beyond = min(set(range(40)) - set(judged_of(lines, 10, tmp_path)))
    lines[beyond] = "not JSON"
    quarantine = tmp_path / "run" / "quarantine.jsonl"
    quarantine.parent.mkdir()
    loader = loader_of(
        "sft",
        world,
        write(tmp_path, *lines),
        "data.judge_rows=10",
        "stage.global_batch_size=40",
        quarantine=quarantine,
    )
    assert not quarantine.exists()
    next(loader)
    (kept,) = map(json.loads, quarantine.read_text().splitlines())
    assert (kept["source"], kept["row"], kept["begins"].strip()) == ("text", beyond, "not JSON")


def steps_until_refused(world: World, file: Path, *more: str) -> tuple[int, str]:
    """How many steps of 20 rows a run makes of which only a sample was judged, and why no more."""
    given = ["data.judge_rows=50", "stage.global_batch_size=20", "data.max_lost_rows=1", *more]
    loader = loader_of("sft", world, file, *given)
    for step in range(20):
        try:
            next(loader)
        except InputError as error:
            return step, str(error)
    return 20, ""


def test_a_run_ends_where_too_many_rows_beyond_the_sample_are_at_fault(
    world: World, tmp_path: Path
) -> None:
    # Of 200 rows 50 are judged; of all, 20 are at fault, and none of the sample.
    lines = [json.dumps(chat(f"{n}")) for n in range(200)]
    for n in sorted(set(range(200)) - set(judged_of(lines, 50, tmp_path)))[1::7][:20]:
        lines[n] = "{}"
    file = write(tmp_path, *lines)
    step, says = steps_until_refused(world, file)
    made = 20 * (step + 1)
    assert 0 < step < 10
    assert re.match(
        rf"source 'text': 1\d of {50 + made} rows are at fault, of 50 that were judged before the "
        rf"first step and {made} that were drawn since the start, more than data.max_bad_rows=0.01",
        says,
    )
    assert run_on_ranks(2, steps_until_refused, world, file) == [(step, says)] * 2
    assert steps_until_refused(world, file, "data.max_bad_rows=0.2") == (20, "")
    # What is no fault of the row counts as lost to the stage.
    other = json.dumps({"input_ids": [100_000]})  # of another tokenizer
    lost = [other if line == "{}" else line for line in lines]
    assert steps_until_refused(world, write(tmp_path, *lost)) == (20, "")
