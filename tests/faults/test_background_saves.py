"""A checkpoint that is written beside training: when it appears, and who hears of a fault."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from marco_train.checkpoint import (
    KINDS,
    BackgroundSaves,
    Piece,
    Retention,
    StoredState,
    TrainingState,
)
from marco_train.checkpoint import background as background_module
from marco_train.checkpoint.shards import write_shard
from marco_train.distributed import rank, world_size
from marco_train.errors import CheckpointError
from tests.helpers.processes import soon
from tests.helpers.ranks import run_on_ranks

ONE = Retention(keep_last=1)


def state_of(value: float) -> TrainingState:
    """Two elements on each rank."""
    tensors = {kind: torch.full((2,), value + rank()) for kind in KINDS}
    return TrainingState([Piece("w", "float32", (2 * world_size(),), 2 * rank(), tensors)], 3)


class Disk:
    """Takes the place of `write_shard`: it writes once it may, or fails."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._write = write_shard
        self.may_write = threading.Event()
        self.fails = False
        monkeypatch.setattr(background_module, "write_shard", self.write)

    def write(self, *given: Any) -> dict[str, Any]:
        assert self.may_write.wait(60)
        if self.fails:
            raise OSError(28, "No space left on device")
        return self._write(*given)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_it_appears_once_it_is_written_and_holds_what_was_there_when_it_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(monkeypatch)
    saves = BackgroundSaves(tmp_path)
    live = state_of(5.0)
    saves.start(3, live, {}, {"num_updates": 3}, ONE)
    with live.lock:
        live.pieces[0].tensors["exp_avg"].fill_(-1.0)  # training goes on
    assert saves.publish(wait=False) is None
    assert names(tmp_path) == [".partial_000003"]
    disk.may_write.set()
    soon(lambda: saves.publish(wait=False) == 3)
    assert names(tmp_path) == ["step_000003"]
    found = state_of(0.0)
    StoredState(tmp_path / "step_000003").fill(found.pieces[0])
    assert found.pieces[0].tensors["exp_avg"].tolist() == [5.0, 5.0]
    assert saves.publish(wait=True) is None
    saves.start(4, live, {}, {"num_updates": 4}, ONE)
    assert saves.publish(wait=True) == 4
    assert names(tmp_path) == ["step_000004"]


def test_nothing_is_changed_before_it_is_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_copy = threading.Event()

    @contextmanager
    def slowly() -> Iterator[None]:
        assert may_copy.wait(60)
        yield

    monkeypatch.setattr(background_module, "stream_beside_training", slowly)
    saves = BackgroundSaves(tmp_path)
    live = state_of(5.0)
    for step in (3, 4):
        may_copy.clear()
        saves.start(step, live, {}, {}, ONE)
        assert not live.lock.acquire(blocking=False)
        may_copy.set()
        assert live.lock.acquire(timeout=60)
        live.lock.release()
        assert saves.publish(wait=True) == step
    live.pieces[0].tensors["master"].resize_(3)  # no more of the copy's size
    saves.start(5, live, {}, {}, ONE)
    with pytest.raises(RuntimeError, match="size"):
        saves.publish(wait=True)
    assert live.lock.acquire(blocking=False)


def fail_on_the_second_rank(directory: Path) -> tuple[str, list[str]]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        disk = Disk(monkeypatch)
        disk.may_write.set()
        disk.fails = rank() == 1
        saves = BackgroundSaves(directory)
        saves.start(3, state_of(5.0), {}, {}, ONE)
        with pytest.raises(CheckpointError) as failure:
            saves.publish(wait=True)
        disk.fails = False
        saves.start(4, state_of(6.0), {}, {}, ONE)
        assert saves.publish(wait=True) == 4
    return str(failure.value), names(directory)


def test_a_fault_of_one_rank_is_told_to_all_and_the_next_save_is_made(tmp_path: Path) -> None:
    for said, left in run_on_ranks(2, fail_on_the_second_rank, tmp_path):
        assert said == (
            "the checkpoint of step 3 was not saved (rank 1: [Errno 28] No space left on device); "
            "those before it are intact"
        )
        assert left == ["step_000004"]


def wait_for_a_slow_rank(directory: Path) -> list[str]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        disk = Disk(monkeypatch)
        if rank() == 0:
            disk.may_write.set()
        saves = BackgroundSaves(directory)
        saves.start(3, state_of(5.0), {}, {}, ONE)
        soon(lambda: rank() == 1 or (directory / ".partial_000003/rank_000.safetensors").is_file())
        assert saves.publish(wait=False) is None
        seen = names(directory)
        disk.may_write.set()
        assert saves.publish(wait=True) == 3
    return seen


def test_nothing_appears_before_all_ranks_have_written(tmp_path: Path) -> None:
    assert run_on_ranks(2, wait_for_a_slow_rank, tmp_path) == [[".partial_000003"]] * 2
    assert names(tmp_path / "step_000003") == [
        "index.json",
        "manifest.json",
        "rank_000.safetensors",
        "rank_001.safetensors",
        "state.json",
    ]
