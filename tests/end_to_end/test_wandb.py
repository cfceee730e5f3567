"""What W&B keeps offline of a run and of its resumptions."""

import json
import os
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
from wandb.proto.wandb_internal_pb2 import Record

from marco_train.config.tracking import LoggingBackend, LoggingConfig, WandbMode
from marco_train.tracking import Tracker
from marco_train.tracking.wandb_run import lost_after
from tests.helpers.processes import REPOSITORY

pytestmark = pytest.mark.slow


def test_wandb_works_offline_without_an_account(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    cfg = LoggingConfig(
        backends=[LoggingBackend.wandb], console_every=1, project="test", mode=WandbMode.offline
    )
    tracker = Tracker(cfg, tmp_path, "run", {"seed": 0})
    tracker.start(0, 1)
    tracker.log(1, 1, None, {"loss/cross_entropy": 1.0}, eta=0.0)
    tracker.close()
    (found,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    assert found.stat().st_size > 0


def launch_offline(directory: Path, first: int, until: int, killed: bool = False) -> None:
    """One launch of a run that is tracked by W&B, in a process of its own."""
    code = f"""
import os
from pathlib import Path
from marco_train.config.tracking import LoggingBackend, LoggingConfig, WandbMode
from marco_train.tracking import Tracker
cfg = LoggingConfig(
    backends=[LoggingBackend.wandb], console_every=100, project="test", mode=WandbMode.offline
)
tracker = Tracker(cfg, Path({str(directory)!r}), "run", {{}}, resumed={first > 0})
tracker.start({first}, {until})
for step in range({first + 1}, {until + 1}):
    tracker.log(step, {until}, None, {{"loss/cross_entropy": float(step)}}, eta=0.0)
if {killed}:
    os._exit(9)
tracker.close()
"""
    env = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=False,
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env=env | {"WANDB_SILENT": "true"},
    )
    assert done.returncode == (9 if killed else 0), done.stderr


Recorded = list[tuple[int, dict[str, float]]]


def recorded(directory: Path) -> list[tuple[str, Recorded]]:
    """What W&B's files hold, in the order of the launches: its id, and its history by its step."""
    found = []
    for file in sorted(directory.glob("wandb/offline-run-*/run-*.wandb")):
        content, place, fragments = file.read_bytes(), 7, b""
        run_id, history = "", []
        while place + 7 <= len(content):
            if place % 32768 > 32768 - 7:  # a header does not cross a block of LevelDB
                place += 32768 - place % 32768
            _, length, kind = struct.unpack("<IHB", content[place : place + 7])
            fragments += content[place + 7 : place + 7 + length]
            place += 7 + length
            if kind not in {1, 4}:
                continue
            record = Record.FromString(fragments)
            fragments = b""
            run_id = record.run.run_id or run_id
            if record.HasField("history"):
                items = {i.key or i.nested_key[0]: i.value_json for i in record.history.item}
                values = {k: json.loads(v) for k, v in items.items() if not k.startswith("_")}
                history.append((int(items["_step"]), values))
        found.append((run_id, history))
    return found


def curve(steps: range) -> Recorded:
    return [(n, {"step": n, "loss/cross_entropy": float(n)}) for n in steps]


@pytest.mark.long
def test_a_run_resumed_offline_goes_on_with_its_steps_under_one_id(tmp_path: Path) -> None:
    launch_offline(tmp_path, 0, 5)
    time.sleep(1.1)  # W&B names directories by the second
    launch_offline(tmp_path, 3, 8)  # from a checkpoint of 3: steps 4 and 5 are made again
    (first_id, first), (second_id, second) = recorded(tmp_path)
    assert first_id == second_id == (tmp_path / "wandb_id").read_text()
    assert first == curve(range(1, 6))
    assert second == curve(range(4, 9))


@pytest.mark.long
def test_what_a_killed_launch_had_not_written_is_recorded_by_the_next(tmp_path: Path) -> None:
    launch_offline(tmp_path, 0, 5, killed=True)
    time.sleep(1.1)
    launch_offline(tmp_path, 4, 6)
    assert [history for _, history in recorded(tmp_path)] == [[], curve(range(1, 7))]


def test_long_files_of_wandb_are_read_to_their_end(tmp_path: Path) -> None:
    launch_offline(tmp_path, 0, 600)
    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    assert file.stat().st_size > 2 * 2**15
    assert recorded(tmp_path)[0][1] == curve(range(1, 601))
    assert lost_after([file]) is None
    content = file.read_bytes()
    file.write_bytes(content[: 2**16])  # as of a launch that was killed
    last = lost_after([file])
    assert last is not None and 100 < last < 600
    file.write_bytes(content[: 2**16 - 5000])
    assert (lost_after([file]) or 0) < last


def in_its_own_process(
    directory: Path, mode: str, before: str = "", **env: str
) -> subprocess.CompletedProcess[str]:
    """Log 50 steps of a run that is tracked by W&B."""
    code = f"""
import os, signal
from pathlib import Path
from marco_train.config.tracking import LoggingBackend, LoggingConfig, WandbMode
from marco_train.tracking import Tracker
cfg = LoggingConfig(
    backends=[LoggingBackend.wandb], console_every=100, project="test", mode=WandbMode.{mode}
)
tracker = Tracker(cfg, Path({str(directory)!r}), "run", {{}})
tracker.start(0, 50)
{before}
for step in range(1, 51):
    tracker.log(step, 50, None, {{"loss/cross_entropy": float(step)}}, eta=0.0)
tracker.close()
print("made all steps")
"""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")}
    return subprocess.run(
        [sys.executable, "-c", code],
        check=False,
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env=inherited | env,
        timeout=120,
    )


def test_wandb_that_is_not_reached_is_recorded_offline(tmp_path: Path) -> None:
    with socket.socket() as closed:  # bound, and nobody listens
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
        done = in_its_own_process(
            tmp_path, "online", WANDB_BASE_URL=url, WANDB_API_KEY="0" * 40, WANDB_SILENT="true"
        )
    assert "made all steps" in done.stdout, done.stdout + done.stderr
    assert "W&B is not reached ([Errno 111] Connection refused)" in done.stdout
    (found,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    assert found.stat().st_size > 0


def test_a_run_outlives_the_process_of_wandb(tmp_path: Path) -> None:
    kill = """
children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
assert children
for child in children:
    os.kill(int(child), signal.SIGKILL)
"""
    done = in_its_own_process(tmp_path, "offline", kill)
    assert "made all steps" in done.stdout, done.stdout + done.stderr
    assert "W&B takes no metrics" in done.stdout
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 50


def test_wandb_gets_samples_and_tags_and_no_secrets(tmp_path: Path) -> None:
    code = f"""
from pathlib import Path
from marco_train.config.tracking import LoggingBackend, LoggingConfig
from marco_train.tracking import Sample, Tracker
cfg = LoggingConfig(backends=[LoggingBackend.wandb], project="test", tags=["mine"])
config = {{
    "root": "outputs/mine", "api_key": "a-secret-of-mine",
    "stage": {{"kind": "opd", "objective": "full", "urls": ["http://me:a-secret-of-mine@host"]}},
}}
tracker = Tracker(cfg, Path({str(tmp_path)!r}), "run", config)
tracker.start(0, 1)
facts = {{"category": "math", "language": "ar", "prompt": "?", "tokens": ["!"], "kl": [0.5]}}
tracker.log_samples(1, [Sample(facts, "<p>heat</p>")])
tracker.log(1, 1, None, {{"loss/cross_entropy": 1.0}}, eta=0.0)
tracker.close()
"""
    env = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")}
    command = [sys.executable, "-c", code, "model.api_key=a-secret-of-mine"]
    env |= {"WANDB_SILENT": "true", "WANDB_DATA_DIR": str(tmp_path / "data")}
    subprocess.run(command, check=True, cwd=REPOSITORY, env=env)
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    leaking = [str(file) for file in files if b"a-secret-of-mine" in file.read_bytes()]
    assert leaking == []
    ((_, [(step, values)]),) = recorded(tmp_path)
    assert (step, values["loss/cross_entropy"]) == (1, 1.0)
    (table,) = tmp_path.rglob("*.table.json")
    assert json.loads(table.read_text())["data"][0][:4] == [1, "math", "ar", "?"]
    staged = [file.read_text() for file in (tmp_path / "data").rglob("*") if file.is_file()]
    assert "<p>heat</p>" in staged  # the cell's own page, which is sent with the table
    content = next(tmp_path.glob("wandb/offline-run-*/run-*.wandb")).read_bytes()
    for tag in (b"mine", b"opd", b"full", b"outputs/mine"):
        assert tag in content
