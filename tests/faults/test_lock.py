"""One launch at a time in a run's directory, and no dead one keeps the next out."""

import errno
import fcntl
import json
import multiprocessing
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from marco_train.checkpoint import lock
from marco_train.checkpoint.lock import LOCK, Process, held
from marco_train.distributed import barrier
from marco_train.errors import DirectoryInUseError, InputError
from tests.helpers.processes import soon
from tests.helpers.ranks import run_on_ranks

SINCE = "2026-01-02T03:04:05-00:00"


def leave_lock(directory: Path, *processes: Process) -> Path:
    """The lock of a launch of these ranks."""
    content = {"id": "x", "since": SINCE, "processes": [asdict(each) for each in processes]}
    (directory / LOCK).write_text(json.dumps(content))
    return directory / LOCK


def elsewhere(rank: int = 0) -> Process:
    return replace(Process.own(), rank=rank, host="elsewhere", pid=77)


@pytest.fixture
def ended() -> Process:
    """A process of this host that has ended."""
    child = os.fork()
    if child == 0:
        time.sleep(60)
    found = replace(Process.own(), pid=child, started=lock._started(child) or "")
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return found


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[int]:
    """Another process that holds the directory."""
    child = os.fork()
    if child == 0:
        with held(tmp_path):
            time.sleep(60)
        os._exit(0)
    soon(lambda: (tmp_path / LOCK).is_file() and (tmp_path / LOCK).read_text().endswith("}"))
    yield child
    with suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_directory_is_held_while_the_block_lasts(tmp_path: Path) -> None:
    with held(tmp_path / "run"):
        found = json.loads((tmp_path / "run" / LOCK).read_text())
        assert found["processes"][0]["pid"] == os.getpid()
    assert list((tmp_path / "run").iterdir()) == []
    with pytest.raises(RuntimeError, match="fails"), held(tmp_path / "run"):
        raise RuntimeError("it fails")
    assert list((tmp_path / "run").iterdir()) == []


def test_a_second_launch_is_refused_with_the_firsts_process_host_and_time(
    holder: int, tmp_path: Path
) -> None:
    since = json.loads((tmp_path / LOCK).read_text())["since"]
    with pytest.raises(DirectoryInUseError) as refused, held(tmp_path):
        pass
    assert str(refused.value) == (
        f"{tmp_path} is in use by another launch since {since}: pid {holder} on "
        f"{socket.gethostname()}. Wait for it, end it, or choose another output_dir"
    )
    assert (tmp_path / LOCK).is_file()


def test_a_lock_of_a_killed_launch_is_taken_over_with_a_line(
    holder: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.kill(holder, signal.SIGKILL)
    soon(lambda: lock._started(holder) is None)
    with held(tmp_path):
        assert [path.name for path in tmp_path.iterdir()] == [LOCK]
    assert (
        f"is taken over: pid {holder} on {socket.gethostname()} is gone" in capsys.readouterr().out
    )


def test_a_lock_of_a_process_whose_number_another_has_is_taken_over(tmp_path: Path) -> None:
    leave_lock(tmp_path, replace(Process.own(), started="1"))
    with held(tmp_path):
        pass


def test_ranks_that_outlive_their_launch_are_named(ended: Process, tmp_path: Path) -> None:
    leave_lock(tmp_path, ended, replace(Process.own(), rank=1))
    with (
        pytest.raises(
            DirectoryInUseError, match=rf"since {SINCE}: pid {os.getpid()} on [\w.-]+\. "
        ),
        held(tmp_path),
    ):
        pass


@pytest.fixture
def short_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "SECONDS_OF_SILENCE", 1.5)


def test_a_silent_lock_of_another_host_is_taken_over(
    short_silence: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    leave_lock(tmp_path, elsewhere())
    with held(tmp_path):
        pass
    said = capsys.readouterr().out
    assert f"launch since {SINCE} is taken over: no sign of life of it for 2 s" in said


@pytest.mark.parametrize("content", ["", '{"id": ', "[]", '{"since": 1, "processes": [{}]}'])
def test_a_torn_lock_is_taken_over_once_it_is_silent(
    content: str, short_silence: None, tmp_path: Path
) -> None:
    (tmp_path / LOCK).write_text(content)
    with held(tmp_path):
        pass


def test_a_lock_of_another_host_that_beats_is_respected(
    short_silence: None, tmp_path: Path
) -> None:
    file = leave_lock(tmp_path, elsewhere(), elsewhere(1))
    done = threading.Event()

    def beat() -> None:
        while not done.wait(0.2):
            file.touch()

    beating = threading.Thread(target=beat)
    beating.start()
    with (
        pytest.raises(DirectoryInUseError, match="pid 77 on elsewhere, pid 77 on elsewhere"),
        held(tmp_path),
    ):
        pass
    done.set()
    beating.join()


def test_a_container_of_the_same_name_is_another_host(short_silence: None, tmp_path: Path) -> None:
    leave_lock(tmp_path, replace(Process.own(), space="another"))
    with held(tmp_path):  # though a process of this number runs here
        pass


def test_a_holder_beats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "SECONDS_OF_A_BEAT", 0.05)
    with held(tmp_path):
        os.utime(tmp_path / LOCK, (0, 0))
        soon(lambda: (tmp_path / LOCK).stat().st_mtime > 0)
        (tmp_path / LOCK).unlink()
        soon((tmp_path / LOCK).is_file)


def test_a_holder_whose_lock_another_took_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "SECONDS_OF_A_BEAT", 0.05)
    child = os.fork()
    if child == 0:
        with held(tmp_path):
            leave_lock(tmp_path, elsewhere())
            time.sleep(60)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 1
    assert json.loads((tmp_path / LOCK).read_text())["id"] == "x"


def refused_on_rank(directory: Path) -> str:
    with pytest.raises(DirectoryInUseError) as refused, held(directory):
        pass
    return str(refused.value)


def test_all_ranks_are_refused_alike(holder: int, tmp_path: Path) -> None:
    one, other = run_on_ranks(2, refused_on_rank, tmp_path)
    assert one == other and f"pid {holder} on" in one


def pids_in_lock(directory: Path) -> list[Any]:
    with held(directory):
        barrier()
        found = json.loads((directory / LOCK).read_text())["processes"]
        barrier()
    return [os.getpid(), [each["pid"] for each in found], [each["rank"] for each in found]]


def test_a_lock_names_all_ranks(tmp_path: Path) -> None:
    (one, named, ranks), (other, _, _) = run_on_ranks(2, pids_in_lock, tmp_path)
    assert named == [one, other] and ranks == [0, 1]


def enter_alone(directory: Path, start: float, entered: Any) -> None:
    time.sleep(max(0.0, start - time.monotonic()))
    with suppress(DirectoryInUseError), held(directory):
        (directory / "inside").mkdir()  # fails where another is
        time.sleep(0.05)
        (directory / "inside").rmdir()
        entered.value += 1
    os._exit(0)


def test_of_many_that_find_a_dead_lock_one_at_a_time_enters(ended: Process, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    leave_lock(tmp_path, ended)
    entered = context.Value("i", 0)
    arguments = tmp_path, time.monotonic() + 0.3, entered
    launches = [context.Process(target=enter_alone, args=arguments) for _ in range(8)]
    for each in launches:
        each.start()
    for each in launches:
        each.join()
    assert [each.exitcode for each in launches] == [0] * 8
    assert entered.value >= 1


def test_a_launch_that_comes_late_leaves_the_others_lock_in_place(
    ended: Process, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = leave_lock(tmp_path, ended)
    first, late = (lock.Lock(file, [asdict(Process.own())]) for _ in range(2))
    described, moved = lock._described, []

    def meanwhile(content: str) -> Any:
        """Of a launch that has read the lock, and is not yet about to take it over."""
        monkeypatch.setattr(lock, "_described", described)
        assert first.acquire()
        moved.append(file.stat().st_ctime_ns)
        return described(content)

    monkeypatch.setattr(lock, "_described", meanwhile)
    assert not late.acquire()
    assert moved == [file.stat().st_ctime_ns]  # not away for a moment, in which a third would enter
    with pytest.raises(DirectoryInUseError):
        late.acquire()
    first.release()
    assert list(tmp_path.iterdir()) == []


def test_a_lock_is_taken_over_where_files_cannot_be_locked(
    ended: Process, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refused)
    leave_lock(tmp_path, ended)
    with held(tmp_path):
        assert [path.name for path in tmp_path.iterdir()] == [LOCK]


def test_a_directory_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(InputError, match=r"file/run cannot be written .*output_dir"),
        held(tmp_path / "file" / "run"),
    ):
        pass
