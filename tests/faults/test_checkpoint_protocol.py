"""Checkpoints that power cuts, full disks, damage and other launches cannot take away."""

import errno
import json
import os
import re
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from subprocess import run as run_command
from typing import Any

import pytest
import torch

from marco_train.checkpoint import (
    KINDS,
    Piece,
    Retention,
    TrainingState,
    load_checkpoint,
    save_checkpoint,
    settle_checkpoint,
    store,
)
from marco_train.checkpoint.room import check_room, check_writable
from marco_train.checkpoint.store import set_aside_damaged, set_aside_newer, sweep, verify
from marco_train.config import TrainConfig
from marco_train.config.resumption import (
    check_resume,
    checkpoints_of,
    complete_checkpoints,
    find_checkpoint,
)
from marco_train.distributed import barrier, rank, world_size
from marco_train.errors import CheckpointError, InputError
from tests.helpers.configs import compose_config
from tests.helpers.processes import soon
from tests.helpers.ranks import run_on_ranks


def save(directory: Path, step: int, keep_last: int = 9, **more: Any) -> None:
    """A checkpoint of a few kilobytes, whose values are its step."""
    retention = Retention(keep_last, **more)
    save_checkpoint(directory, step, state_of(step), {}, {"num_updates": step}, retention)


def state_of(step: int) -> TrainingState:
    """512 elements on each rank."""
    tensors = {kind: torch.full((512,), float(step)) for kind in KINDS}
    shape = (512 * world_size(),)
    return TrainingState([Piece("a", "float32", shape, 512 * rank(), tensors)], step)


def steps_in(directory: Path) -> list[int]:
    return [int(path.name[5:]) for path in complete_checkpoints(directory)]


def test_the_newest_is_found_by_its_name_whatever_else_says_so(tmp_path: Path) -> None:
    for name in ("step_000009", "step_999999", "step_1000000", "step_0000x1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text("{}")
    (tmp_path / "step_2000000").mkdir()  # has no manifest
    for name in ("LATEST", "latest", "latest_checkpointed_iteration.txt"):
        (tmp_path / name).write_text("")
        assert steps_in(tmp_path) == [1_000_000, 999_999, 9]
        (tmp_path / name).write_text("step_000009\x00garbage")
        assert steps_in(tmp_path) == [1_000_000, 999_999, 9]


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def config(out: Path, *more: str) -> TrainConfig:
    return compose_config("quickstart_sft", f"output_dir={out}", *more)


# What makes a checkpoint's files and names last.


def test_all_files_and_directories_are_on_the_disk_before_the_name_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    plain_sync, plain_rename = os.fsync, Path.rename

    def sync(descriptor: int) -> None:
        done.append(os.readlink(f"/proc/self/fd/{descriptor}").removeprefix(str(tmp_path)))
        plain_sync(descriptor)

    def rename(self: Path, target: Path) -> Path:
        done.append(f"{self.name} -> {target.name}")
        return plain_rename(self, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(Path, "rename", rename)
    save(tmp_path / "run" / "checkpoints", 3)
    renamed = done.index(".partial_000003 -> step_000003")
    unnamed = "/run/checkpoints/.partial_000003"
    wanted = {f"{unnamed}/{n}" for n in ("rank_000.safetensors", "state.json", "manifest.json")}
    assert {*wanted, unnamed, "/run"} <= set(done[:renamed])
    assert "/run/checkpoints" in done[renamed:]


CALLS = ("mkdir", "rename", "fsync", "unlink", "rmdir")


def die_at(call: int) -> None:
    """Kill this process at its so-manyth change of the file system."""
    made = 0

    def counted(plain: Callable[..., Any]) -> Callable[..., Any]:
        def instead(*args: Any, **given: Any) -> Any:
            nonlocal made
            made += 1
            if made == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return plain(*args, **given)

        return instead

    for name in CALLS:
        setattr(os, name, counted(getattr(os, name)))


def killed(call: int, function: Callable[[], None]) -> bool:
    """Whether a process that is killed at a call had not ended before."""
    child = os.fork()
    if child == 0:
        die_at(call)
        function()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert status in {0, signal.SIGKILL}
    return status == signal.SIGKILL


@pytest.mark.parametrize("keep_last", [1, 2])
def test_a_kill_at_any_point_of_a_save_leaves_a_sound_checkpoint(
    keep_last: int, tmp_path: Path
) -> None:
    call = 0
    while True:
        call += 1
        directory = tmp_path / str(call) / "checkpoints"
        for step in (1, 2)[:keep_last]:
            save(directory, step)
        was_killed = killed(call, partial(save, directory, 3, keep_last))
        newest, *older = complete_checkpoints(directory)
        assert [verify(each) for each in (newest, *older)] == [None] * (1 + len(older))
        stored, state = load_checkpoint(newest)
        assert state["num_updates"] in {keep_last, 3}
        assert torch.equal(stored.weight("a"), torch.full((512,), float(state["num_updates"])))
        sweep(directory)
        assert all(name.startswith("step_") for name in names(directory))
        save(directory, 4, keep_last)
        assert steps_in(directory)[0] == 4
        if not was_killed:
            break
    assert call > 10


# Which are kept.


def test_old_ones_go_and_milestones_stay(tmp_path: Path) -> None:
    for step in range(1, 9):
        save(tmp_path, step, keep_last=2, kept=[2], keep_every=5)
    assert names(tmp_path) == ["step_000002", "step_000005", "step_000007", "step_000008"]


def test_a_damaged_one_counts_for_none_that_is_kept(tmp_path: Path) -> None:
    for step in (1, 2):
        save(tmp_path, step)
    (tmp_path / "step_000002" / "rank_000.safetensors").write_bytes(b"")
    save(tmp_path, 3, keep_last=2)
    assert steps_in(tmp_path) == [3, 2, 1]


def test_what_cannot_be_deleted_stays_and_the_save_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path, 1)
    plain = Path.rename

    def rename(self: Path, target: Path) -> Path:
        if self.name == "step_000001":
            raise OSError(errno.EACCES, "Permission denied")
        return plain(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    save(tmp_path, 2, keep_last=1)
    assert steps_in(tmp_path) == [2, 1]
    assert "step_000001 could not be deleted" in capsys.readouterr().out


def test_more_than_a_million_updates_are_sorted_as_numbers(tmp_path: Path) -> None:
    for step in (999_900, 1_000_000, 10_000_000):
        save(tmp_path / "checkpoints", step, keep_last=2)
    assert steps_in(tmp_path / "checkpoints") == [10_000_000, 1_000_000]
    set_aside_newer(tmp_path / "checkpoints", 1_000_000)
    assert steps_in(tmp_path / "checkpoints") == [1_000_000]


def test_a_stale_directory_of_the_same_save_is_in_nobodys_way(tmp_path: Path) -> None:
    (tmp_path / ".partial_000003" / "rank_000.safetensors").mkdir(parents=True)
    (tmp_path / ".trash_step_000003").mkdir()
    (tmp_path / "step_000003").mkdir()  # without a manifest
    save(tmp_path, 3)
    assert verify(tmp_path / "step_000003") is None
    assert names(tmp_path) == ["step_000003"]


def test_a_stale_directory_that_cannot_be_deleted_is_written_into(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".partial_000003").mkdir()
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)
    save(tmp_path, 3)
    assert verify(tmp_path / "step_000003") is None


def test_what_killed_launches_left_is_removed_in_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path, 3)
    for left in (".partial_000004", ".trash_step_000001"):
        (tmp_path / left).mkdir()
        (tmp_path / left / "state.json").write_text("{}")
    sweep(tmp_path)
    assert names(tmp_path) == ["step_000003"]
    said = capsys.readouterr().out.splitlines()
    assert said == [
        f"removed {tmp_path}/{left}, which an earlier launch left incomplete"
        for left in (".partial_000004", ".trash_step_000001")
    ]


# Which is resumed from.


def settled(cfg: TrainConfig) -> Path | None:
    """What a launch goes on from."""
    settle_checkpoint(cfg, may_move=True)
    return find_checkpoint(cfg)


def flip(file: Path, place: int = -5) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def says(content: bytes) -> Callable[[Path], object]:
    return lambda file: file.write_bytes(content)


SHARD = "rank_000.safetensors"
DAMAGE: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "flipped bit": (SHARD, flip, r"rank_000.safetensors is damaged: digest \w{12}, where \w{12} "),
    "cut shard": (SHARD, cut, r"rank_000.safetensors is damaged: \d+ bytes, where \d+ were"),
    "empty shard": (SHARD, empty, r"rank_000.safetensors is damaged: 0 bytes, where"),
    "missing shard": (SHARD, Path.unlink, r"rank_000.safetensors is missing"),
    "flipped bit of the state": ("state.json", flip, r"state.json is damaged: digest"),
    "empty state": ("state.json", empty, r"state.json is damaged: 0 bytes"),
    "missing state": ("state.json", Path.unlink, r"state.json is missing"),
    "empty manifest": ("manifest.json", empty, r"manifest.json is damaged \(JSONDecodeError"),
    "torn manifest": ("manifest.json", cut, r"manifest.json is damaged \(JSONDecodeError"),
    "binary manifest": (
        "manifest.json",
        lambda file: file.write_bytes(b"\xff\0") and None,
        "damag",
    ),
    "manifest of a list": ("manifest.json", says(b"[]"), r"manifest.json is damaged \(KeyError"),
    "manifest of null": ("manifest.json", says(b"null"), r"manifest.json is damaged \(TypeError"),
    "manifest of numbers": (
        "manifest.json",
        says(b'{"files": 3}'),
        r"manifest.json is damaged \(A",
    ),
    "manifest of no entries": (
        "manifest.json",
        says(b'{"files": {"state.json": 3}}'),
        r"manifest.json is damaged \(TypeError",
    ),
    "manifest of no state": ("manifest.json", says(b'{"files": {}}'), "names no state.json"),
}


@pytest.mark.parametrize(("file", "damage", "said"), DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_checkpoint_is_passed_over_with_the_reason_and_kept_aside(
    file: str,
    damage: Callable[[Path], object],
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    cfg = config(tmp_path)
    for step in (1, 2, 3):
        save(checkpoints_of(cfg), step)
    damaged = checkpoints_of(cfg) / "step_000003"
    damage(damaged / file)
    with pytest.raises(InputError, match=rf"resume=.*step_000003: .*{said}.*step_000002, "):
        settled(config(tmp_path, f"resume={damaged}"))
    assert len(names(checkpoints_of(cfg))) == 3  # nothing is moved

    settle_checkpoint(cfg, may_move=False)
    assert len(complete_checkpoints(checkpoints_of(cfg))) == 3
    capsys.readouterr()
    assert settled(cfg) == checkpoints_of(cfg) / "step_000002"
    assert names(checkpoints_of(cfg)) == ["damaged_step_000003", "step_000001", "step_000002"]
    line = capsys.readouterr().out
    assert re.search(said, line), line
    assert "step_000003 is set aside" in line


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_over_unasked(
    tmp_path: Path,
) -> None:
    cfg = config(tmp_path)
    settle_checkpoint(cfg, may_move=True)  # none there
    for step in (1, 2):
        save(checkpoints_of(cfg), step)
        flip(checkpoints_of(cfg) / f"step_{step:06d}" / SHARD)
    with pytest.raises(InputError, match=r"step_000002/.*; .*step_000001/.*resume=never") as no:
        settle_checkpoint(cfg, may_move=True)
    assert "JSONDecodeError" not in str(no.value)
    assert steps_in(checkpoints_of(cfg)) == [2, 1]
    settle_checkpoint(config(tmp_path, "resume=never"), may_move=True)
    for step in (1, 2):
        empty(checkpoints_of(cfg) / f"step_{step:06d}" / "manifest.json")
    with pytest.raises(InputError, match=r"no checkpoint in .* can be resumed: .*resume=never"):
        find_checkpoint(cfg)


def test_two_damaged_ones_of_one_step_are_both_kept(tmp_path: Path) -> None:
    for _ in range(3):
        save(tmp_path, 3)
        set_aside_damaged(tmp_path / "step_000003")
    assert names(tmp_path) == [
        "damaged_step_000003",
        "damaged_step_000003-1",
        "damaged_step_000003-2",
    ]


@pytest.mark.parametrize(
    "typo",
    [
        "runs/first/checkpoints/step_000004",
        "runs/first/checkpoint/step_000003",
        "runs/fist/checkpoints/step_000003",
        "runs/first",
        "runs/first/checkpoints",
    ],
)
def test_a_path_that_is_no_checkpoint_is_refused_with_those_near_it(
    typo: str, tmp_path: Path
) -> None:
    for step in (2, 3):
        save(tmp_path / "runs" / "first" / "checkpoints", step)
    cut(tmp_path / "runs" / "first" / "checkpoints" / "step_000002" / "state.json")
    with pytest.raises(InputError) as refused:
        check_resume(config(tmp_path / "other", f"resume={tmp_path / typo}"))
    path = tmp_path / "runs" / "first" / "checkpoints" / "step_000003"
    assert str(refused.value) == (
        f"resume={tmp_path / typo} is no complete checkpoint, nor auto or never; complete ones: "
        f"{path}"
    )


@pytest.mark.parametrize(("word", "meant"), [("True", "auto"), ("no", "never")])
def test_a_word_for_yes_or_no_is_no_checkpoint_and_what_it_may_mean_is_asked(
    word: str, meant: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError) as refused:
        check_resume(config(tmp_path, f"resume={word}"))
    assert f"nor auto or never (did you mean {meant}?); complete" in str(refused.value)


# Ranks agree, on what they read and on what they could not write.


def settled_on(out: Path) -> list[str]:
    cfg = config(out)
    found = settled(cfg)
    assert found is not None
    return [found.name, *names(checkpoints_of(cfg))]


def save_with_a_slow_rank(directory: Path) -> list[str]:
    """What another rank sees when all that it writes itself is written."""
    plain: Callable[..., Any] = getattr(store, "write_shard")  # noqa: B009
    seen: list[str] = []

    def slowly(partial: Path, *args: Any) -> Any:
        soon((partial / "rank_000.safetensors").is_file)
        time.sleep(0.3)
        seen.extend(names(directory))
        return plain(partial, *args)

    if rank() == 1:
        setattr(store, "write_shard", slowly)  # noqa: B010
    save(directory, 1)
    return seen


def test_nothing_appears_before_the_slowest_rank_has_written(tmp_path: Path) -> None:
    assert run_on_ranks(2, save_with_a_slow_rank, tmp_path) == [[], [".partial_000001"]]
    assert verify(tmp_path / "step_000001") is None


@pytest.mark.parametrize("damaged", ["rank_000.safetensors", "rank_001.safetensors", "state.json"])
def test_two_ranks_pass_over_what_one_of_them_finds_damaged(damaged: str, tmp_path: Path) -> None:
    for step in (1, 2):
        run_on_ranks(2, save, tmp_path / "checkpoints", step)
    flip(tmp_path / "checkpoints" / "step_000002" / damaged)
    wanted = ["step_000001", "damaged_step_000002", "step_000001"]
    assert run_on_ranks(2, settled_on, tmp_path) == [wanted, wanted]


def save_where_one_fails(directory: Path, failing: int, at: str) -> tuple[str, list[str], int]:
    """What a rank is told of a save that one of them cannot make; and that the next one goes."""
    save(directory, 1)
    plain: Callable[..., Any] = getattr(store, at)

    def full(*args: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(args[-1]))

    if rank() == failing:
        setattr(store, at, full)
    with pytest.raises(CheckpointError) as failed:
        save(directory, 2)
    barrier()
    there = names(directory)
    barrier()
    setattr(store, at, plain)
    save(directory, 3, keep_last=1)
    return str(failed.value), there, steps_in(directory)[0]


@pytest.mark.parametrize(
    ("failing", "at"),
    [(0, "write_shard"), (1, "write_shard"), (0, "_entry"), (0, "replace_directory")],
)
def test_a_save_that_fails_on_one_rank_is_a_sentence_on_all_and_leaves_nothing(
    failing: int, at: str, tmp_path: Path
) -> None:
    for said, there, newest in run_on_ranks(2, save_where_one_fails, tmp_path, failing, at):
        assert said.startswith(
            f"the checkpoint of step 2 was not saved (rank {failing}: [Errno 28] No space left on "
            "device: "
        )
        assert said.endswith("; those before it are intact")
        assert there == ["step_000001"]
        assert newest == 3


def test_a_file_that_may_not_grow_is_a_save_that_failed(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(CheckpointError, match=r"step 2 was not saved .*File too large"):
            save(tmp_path, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(tmp_path) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = run_command(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)], check=False
    )
    if mounted.returncode:
        pytest.skip("needs root, to mount a file system")
    yield place
    run_command(["umount", "-l", str(place)], check=True)


def test_a_full_disk_is_a_save_that_failed_and_the_next_one_goes(small_disk: Path) -> None:
    save(small_disk / "checkpoints", 1)
    big = small_disk / "big"
    with pytest.raises(OSError, match="No space"):
        big.write_bytes(bytes(2**17))
    with pytest.raises(CheckpointError, match=r"step 2 was not saved .*No space left"):
        save(small_disk / "checkpoints", 2)
    assert names(small_disk / "checkpoints") == ["step_000001"]
    big.unlink()
    save(small_disk / "checkpoints", 3)
    assert steps_in(small_disk / "checkpoints") == [3, 1]


def test_a_save_that_takes_long_is_said_by_its_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(store, "SECONDS_UNTIL_SLOW", 0.05)
    plain: Callable[..., Any] = getattr(store, "write_shard")  # noqa: B009

    def slowly(*args: Any) -> Any:
        time.sleep(0.5)
        return plain(*args)

    monkeypatch.setattr(store, "write_shard", slowly)
    save(tmp_path, 1)
    said = f"rank 0 has been writing {tmp_path}/.partial_000001 for 0 s: the storage may hang"
    assert capsys.readouterr().out.startswith(said)


# Before anything is loaded.


def test_a_directory_that_cannot_be_written_is_refused(small_disk: Path, tmp_path: Path) -> None:
    check_writable(tmp_path / "run" / "checkpoints")
    assert names(tmp_path / "run" / "checkpoints") == []
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="Not a directory"):
        check_writable(tmp_path / "file" / "checkpoints")
    (small_disk / "checkpoints").mkdir()
    run_command(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(InputError, match="Read-only file system"):
        check_writable(small_disk / "checkpoints")


def test_a_disk_without_room_is_refused_with_both_numbers(small_disk: Path) -> None:
    place = small_disk / "run" / "checkpoints"
    check_room(place, 20_000, 2, others=20_000)
    with pytest.raises(InputError) as refused:
        check_room(place, 2**30, 3, others=2**31)
    assert str(refused.value).startswith(
        f"{small_disk} has 0.00 GiB free, and the run needs 5.00: 3 checkpoints of 1.00 GiB "
    )
    save(place, 1)
    # What lies there tells the size of the others, and takes no more room itself.
    files = json.loads((place / "step_000001" / "manifest.json").read_text())["files"]
    most = shutil.disk_usage(place).free // sum(entry["bytes"] for entry in files.values())
    check_room(place, 2**30, most + 1, others=0)
    with pytest.raises(InputError, match=f"{most + 1} checkpoints of"):
        check_room(place, 2**30, most + 2, others=0)
    with pytest.raises(InputError, match="1 checkpoints of"):
        check_room(place, 0, 1, others=2**30)  # one is written at least


def test_json_of_a_manifest_names_each_file(tmp_path: Path) -> None:
    run_on_ranks(2, save, tmp_path, 7)
    found = json.loads((tmp_path / "step_000007" / "manifest.json").read_text())
    shards = ["rank_000.safetensors", "rank_001.safetensors"]
    assert sorted(found["files"]) == ["index.json", *shards, "state.json"]
    assert (found["step"], found["world_size"]) == (7, 2)
