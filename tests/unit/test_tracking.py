"""What a person and a machine read of a run."""

import io
import json
import os
import struct
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from wandb.proto.wandb_internal_pb2 import HistoryItem, HistoryRecord, HistoryStep, Record

from marco_train.config.tracking import LoggingBackend, LoggingConfig
from marco_train.errors import InputError
from marco_train.metrics import NAMES
from marco_train.tracking import Sample, Tracker
from marco_train.tracking.console import format_eta, step_line
from marco_train.tracking.wandb_run import WandbRun, lost_after, tags_of
from marco_train.tracking.warnings import Watch
from tests.helpers.configs import compose_config


def logging(every: int = 1, **changes: Any) -> LoggingConfig:
    fields: dict[str, Any] = {"backends": [], "console_every": every, "project": "test"}
    return LoggingConfig(**fields | changes)


def test_a_step_is_one_line() -> None:
    metrics = {
        "kl/reverse": 0.2144,
        "optim/grad_norm": 0.834,
        "optim/lr": 1e-6,
        "perf/tokens_per_second": 8123.0,
        "time/sync": 0.04,
        "time/sample": 31.21,
        "time/score": 9.84,
        "time/train": 22.37,
    }
    assert step_line(120, 3800, "first", metrics, eta=3725.0) == (
        "step 120/3800 | phase first | kl 0.214 | grad 0.83 | lr 1.0e-06 | 8.1k tok/s | "
        "sync 40ms sample 31.2s score 9.8s train 22.4s | eta 1h02m"
    )


@pytest.mark.parametrize(
    ("seconds", "text"), [(4.4, "4s"), (59.6, "1m00s"), (61, "1m01s"), (7322, "2h02m")]
)
def test_eta_is_short(seconds: float, text: str) -> None:
    assert format_eta(seconds) == text


def test_every_step_is_recorded_and_every_fifth_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tracker = Tracker(logging(every=5), tmp_path, "run", {})
    tracker.start(0, 7)
    for step in range(1, 8):
        tracker.log(step, 7, None, {"loss/cross_entropy": float(step)}, eta=0.0)
    tracker.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": n, "loss/cross_entropy": float(n)} for n in range(1, 8)]
    printed = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in printed] == ["step 5/7", "step 7/7"]


@pytest.mark.parametrize(
    ("stage", "limit"),
    [
        ({"max_length": 96}, "stage.max_length=96"),
        ({"max_prompt_length": 72, "max_response_length": 24}, "stage.max_prompt_length=72"),
        ({}, "the length limit"),
    ],
)
def test_a_warning_of_rows_that_are_too_long_names_their_limit(
    stage: dict[str, int], limit: str
) -> None:
    said = Watch({"stage": stage}).sentences({"data/dropped_too_long": 3.0})
    assert said == [
        f"3 draws of rows over {limit} were dropped in this launch (data/dropped_too_long)"
    ]


def test_lines_past_the_resumed_step_are_dropped(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(json.dumps({"step": n}) + "\n" for n in range(1, 6)))
    tracker = Tracker(logging(), tmp_path, "run", {})
    tracker.start(3, 6)
    tracker.close()
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [1, 2, 3]


@pytest.mark.parametrize(
    "torn", [b"{}", b"null", b"[1]", b'{"step": 2', b'\xff\xfe{"step": 1}', b'{"step": "2"}']
)
def test_a_torn_line_is_left_out_at_a_resumption(
    torn: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b'{"step": 1}\n' + torn + b"\n")
    tracker = Tracker(logging(), tmp_path, "run", {})
    tracker.start(3, 6)
    tracker.close()
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [1]
    assert "left out a torn line" in capsys.readouterr().out


def test_a_full_disk_ends_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tracker = Tracker(logging(), tmp_path, "run", {})
    tracker.start(0, 3)
    whole = tracker._files["metrics.jsonl"]
    with Path("/dev/full").open("w", buffering=1) as full:
        tracker._files["metrics.jsonl"] = full
        for step in (1, 2):
            tracker.log(step, 3, None, {"loss/cross_entropy": 1.0}, eta=0.0)
        tracker._files["metrics.jsonl"] = whole
        os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())  # so that it can be closed
    tracker.log(3, 3, None, {"loss/cross_entropy": 1.0}, eta=0.0)
    tracker.close()
    (said,) = [line for line in capsys.readouterr().out.splitlines() if "no metrics" in line]
    assert said.startswith("metrics.jsonl takes no metrics (OSError: [Errno 28] No space left")
    assert '"step": 3' in (tmp_path / "metrics.jsonl").read_text()


def test_a_disk_that_is_full_at_the_start_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tracker = Tracker(logging(), tmp_path, "run", {})
    monkeypatch.setattr(tracker, "_directory", tmp_path / "absent")
    tracker.start(0, 1)
    tracker.log(1, 1, None, {"loss/cross_entropy": 1.0}, eta=0.0)
    tracker.close()
    assert "metrics.jsonl takes no metrics (FileNotFoundError" in capsys.readouterr().out


def test_a_terminal_gets_a_progress_bar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    tracker = Tracker(logging(), tmp_path, "run", {})
    tracker.start(0, 4)
    tracker.log(1, 4, None, {"loss/cross_entropy": 1.0}, eta=3.0)
    tracker.close()
    assert "1/4" in terminal.getvalue()


def test_a_metric_that_is_not_listed_is_a_mistake_of_ours(tmp_path: Path) -> None:
    tracker = Tracker(logging(), tmp_path, "run", {})
    tracker.start(0, 1)
    with pytest.raises(AssertionError, match="loss/los"):
        tracker.log(1, 1, None, {"loss/los": 1.0}, eta=0.0)
    tracker.close()
    prefixes = {name.split("/")[0] for name in NAMES}
    expected = "loss kl teacher rollout moe optim perf memory time data eval cascade checkpoint"
    assert prefixes == set(expected.split(" "))


def test_a_record_of_wandb_is_found_past_the_end_of_a_block(tmp_path: Path) -> None:
    def history(step: int, length: int) -> bytes:
        """A record of exactly so many bytes."""
        item = HistoryItem(key="loss", value_json="")
        record = Record(history=HistoryRecord(step=HistoryStep(num=step), item=[item]))
        while record.ByteSize() < length:
            record.history.item[0].value_json += "1" * max(1, length - record.ByteSize() - 16)
        assert record.ByteSize() == length
        serialized: bytes = record.SerializeToString()
        return serialized

    def fragment(content: bytes, kind: int) -> bytes:
        return struct.pack("<IHB", 0, len(content), kind) + content

    block = 2**15
    # 3 bytes remain of the first block, too few for a header; the next record crosses into a third.
    first = fragment(history(1, block - 7 - 7 - 3), 1) + bytes(3)
    long = history(2, block + 1000)
    second = fragment(long[: block - 7], 2) + fragment(long[block - 7 :], 4)
    file = tmp_path / "run-a.wandb"
    file.write_bytes(b":W&B\x00\x00\x00" + first + second + fragment(history(3, 100), 1))
    assert lost_after([file]) == 3
    file.write_bytes(file.read_bytes()[:-50])
    assert lost_after([file]) == 2


def sample(**facts: Any) -> Sample:
    known = {"step": 1, "category": "math", "language": "", "prompt": "1+1?\n", "tokens": ["2", ""]}
    return Sample(known | {"kl": [0.5, None]} | facts, "<p>2</p>")


def test_samples_are_recorded_and_printed_by_choice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for printed in (False, True):
        tracker = Tracker(logging(console_samples=printed), tmp_path, "run", {})
        tracker.start(0, 1)
        tracker.log_samples(1, [sample(tokens=["\x1b[2J", "ب"])])
        tracker.close()
        (line,) = (tmp_path / "samples.jsonl").read_text().splitlines()
        assert json.loads(line)["kl"] == [0.5, None]
        said = capsys.readouterr().out.splitlines()
        expected = ["sample of step 1: math, 0.500 nats a token", "  prompt   1+1?⏎"]
        assert said == ([*expected, "  response ·[2Jب"] if printed else [])


def test_answers_to_a_suite_have_a_table_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    class Table:
        def __init__(self, columns: list[str]) -> None:
            self.columns, self.data = columns, list[Any]()

        def add_data(self, *row: Any) -> None:
            self.data.append(dict(zip(self.columns, row, strict=True)))

    logged: list[dict[str, Table]] = []
    run = SimpleNamespace(step=0, log=lambda tables, **_: logged.append(tables))
    fake = SimpleNamespace(Table=Table, Html=lambda html, **_: html)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    recorder = WandbRun.__new__(WandbRun)
    recorder._run = run
    judged = {"reference": "2", "answer": "3", "right": False}
    recorder.log_samples(4, [sample(), sample(category="own", kl=[None, None], **judged)])
    recorder.log_samples(5, [sample()])
    both, alone = logged
    assert list(both) == ["samples", "eval/samples"] and list(alone) == ["samples"]
    (row,) = both["eval/samples"].data
    facts = {"step": 4, "category": "own", "language": "", "prompt": "1+1?\n", "response": "2"}
    assert row == facts | judged
    (row,) = both["samples"].data
    assert row["kl"] == 0.5


def test_samples_and_warnings_past_the_resumed_step_are_dropped(tmp_path: Path) -> None:
    for name in ("samples.jsonl", "warnings.jsonl"):
        lines = "".join(json.dumps({"step": n}) + "\n" for n in (2, 4))
        (tmp_path / name).write_text(lines)
    tracker = Tracker(logging(), tmp_path, "run", {})
    tracker.start(3, 6)
    tracker.close()
    for name in ("samples.jsonl", "warnings.jsonl"):
        assert (tmp_path / name).read_text() == '{"step": 2}\n'


def test_a_warning_is_said_again_where_there_is_twice_as_much_of_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tracker = Tracker(logging(every=100), tmp_path, "run", {})
    tracker.start(0, 100)
    for step in range(1, 9):
        dead = [0.0, 3.0, 2.0, 5.0, 6.0, 0.0, 3.0, 6.0][step - 1]
        tracker.log(step, 100, None, {"moe/dead_experts": dead, "data/dropped_empty": 1.0}, eta=0.0)
    tracker.close()
    found = [json.loads(line) for line in (tmp_path / "warnings.jsonl").read_text().splitlines()]
    experts = "{} experts, over all layers, got no token of a step (moe/dead_experts)"
    rows = "{} draws of rows with an empty answer were dropped in this launch (data/dropped_empty)"
    assert [(line["step"], line["text"]) for line in found] == [
        (1, rows.format(1)),
        (2, experts.format(3)),
        (2, rows.format(2)),
        (4, rows.format(4)),
        (5, experts.format(6)),
        (8, rows.format(8)),
    ]
    said = capsys.readouterr().out.splitlines()
    assert said == [f"warning at step {line['step']}: {line['text']}" for line in found]


def test_a_mismatch_of_sampler_and_policy_is_warned_of_above_what_rounding_explains(
    tmp_path: Path,
) -> None:
    tracker = Tracker(logging(every=100), tmp_path, "run", {})
    tracker.start(0, 100)
    for step, nats in enumerate([0.0, 0.05, 0.1, 0.11, 0.2, 0.23], 1):
        tracker.log(step, 100, None, {"kl/sampler_mismatch": nats}, eta=0.0)
    tracker.close()
    found = [json.loads(line) for line in (tmp_path / "warnings.jsonl").read_text().splitlines()]
    said = "differ by {} nats a token in the mean (kl/sampler_mismatch)"
    assert [(line["step"], line["text"].partition("policy ")[2]) for line in found] == [
        (4, said.format(0.11)),
        (6, said.format(0.23)),
    ]


def test_a_held_out_figure_is_printed_whenever_it_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tracker = Tracker(logging(every=100), tmp_path, "run", {})
    tracker.start(0, 9)
    tracker.log(3, 9, None, {"kl/reverse": 1.0}, eta=0.0)
    tracker.log(4, 9, None, {"kl/reverse": 1.0, "eval/reverse_kl": 2.0}, eta=0.0)
    tracker.close()
    assert capsys.readouterr().out == "step 4/9 | kl 1.000 | held-out kl 2.000 | eta 0s\n"


def test_a_backend_that_is_not_installed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "marco_train.config.tracking.find_spec", lambda name: name if name == "wandb" else None
    )
    backends = [LoggingBackend.wandb, LoggingBackend.trackio]
    logging(backends=backends[:1]).check_installed()
    with pytest.raises(InputError, match=r"trackio, which is not .*pip install 'marco-train\[tr"):
        logging(backends=backends).check_installed()


def test_backends_are_chosen_by_name_and_may_be_several() -> None:
    sft = "quickstart_sft"
    assert compose_config(sft).logging.backends == []
    for backend in LoggingBackend:
        assert compose_config(sft, f"logging={backend.value}").logging.backends == [backend]
    several = compose_config(sft, "logging.backends=[wandb,tensorboard]").logging.backends
    assert several == [LoggingBackend.wandb, LoggingBackend.tensorboard]


def test_tags_name_the_stage_and_its_objective() -> None:
    cfg = logging(tags=["mine", "opd"])
    assert tags_of(cfg, {"stage": {"kind": "opd", "objective": "full"}}) == ["opd", "full", "mine"]
    assert tags_of(cfg, {}) == ["mine", "opd"]


@pytest.mark.skipif(find_spec("tensorboard") is None, reason="needs tensorboard")
def test_tensorboard_goes_on_after_the_last_step_that_stands(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first, until in ((0, 5), (3, 6)):
        cfg = logging(backends=[LoggingBackend.tensorboard])
        tracker = Tracker(cfg, tmp_path, "run", {}, resumed=first > 0)
        tracker.start(first, until)
        for step in range(first + 1, until + 1):
            tracker.log_samples(step, [sample()])
            tracker.log(step, until, None, {"kl/reverse": first + step}, eta=0.0)
        tracker.close()
        time.sleep(1.1)  # its files are named by the second
    found = EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    values = [(event.step, event.value) for event in found.Scalars("kl/reverse")]
    assert values == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 7.0), (5, 8.0), (6, 9.0)]


@pytest.mark.skipif(find_spec("trackio") is None, reason="needs trackio")
def test_trackio_keeps_a_run_on_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    import trackio

    for first, until in ((0, 3), (3, 5)):
        cfg = logging(backends=[LoggingBackend.trackio])
        tracker = Tracker(cfg, tmp_path, "run", {"api_key": "a secret"}, resumed=first > 0)
        tracker.start(first, until)
        for step in range(first + 1, until + 1):
            tracker.log(step, until, None, {"kl/reverse": float(step)}, eta=0.0)
        tracker.close()
    assert list((tmp_path / "trackio").glob("test*.db"))
    runs = trackio.Api().runs("test")
    assert [run.name for run in runs] == ["run"]
