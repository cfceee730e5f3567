"""What a person and a machine read of a run."""

import io
import json
import os
import struct
import sys
from pathlib import Path

import pytest
from wandb.proto.wandb_internal_pb2 import HistoryItem, HistoryRecord, HistoryStep, Record

from marco_train.config.run import LoggingBackend, LoggingConfig, WandbMode
from marco_train.metrics import NAMES
from marco_train.tracking.tracker import Tracker, _lost_after, format_eta, step_line


def logging(every: int = 1, backend: LoggingBackend = LoggingBackend.none) -> LoggingConfig:
    return LoggingConfig(
        backend=backend, console_every=every, project="test", mode=WandbMode.offline
    )


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
    whole = tracker._file
    with Path("/dev/full").open("w", buffering=1) as full:
        tracker._file = full
        for step in (1, 2):
            tracker.log(step, 3, None, {"loss/cross_entropy": 1.0}, eta=0.0)
        tracker._file = whole
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
    monkeypatch.setattr(tracker, "_jsonl", tmp_path / "absent" / "metrics.jsonl")
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
    expected = "loss kl teacher rollout moe optim perf memory time data eval cascade"
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
    assert _lost_after([file]) == 3
    file.write_bytes(file.read_bytes()[:-50])
    assert _lost_after([file]) == 2
