"""Launches that are killed, collide, find damage or cannot write: what was learnt is not lost."""

import errno
import json
import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from marco_train import run as run_module
from marco_train import train
from marco_train.checkpoint import load_checkpoint, store
from marco_train.checkpoint.lock import LOCK
from marco_train.checkpoint.shards import write_shard
from marco_train.config import TrainConfig
from marco_train.config.resumption import is_finished, lost_since_finished
from marco_train.distributed import rank
from tests.helpers.configs import compose_config
from tests.helpers.processes import fork, soon
from tests.helpers.processes import launch as run_to_its_end
from tests.helpers.ranks import run_on_ranks
from tests.helpers.runs import losses, num_steps_of, overrides, run, saved_steps
from tests.helpers.world import World

pytestmark = pytest.mark.slow

NUM_STEPS = 30


def given(world: World, out: Path, *more: str) -> list[str]:
    return [
        *("experiment=quickstart_sft", *overrides("sft", world, out, 2)),
        *("checkpoint.save_every=1", "checkpoint.keep_last=3", "stage.eval_every=null"),
        *(f"stage.num_steps={NUM_STEPS}", *more),
    ]


def launch(*overrides: str) -> subprocess.Popen[str]:
    """Two ranks under torchrun."""
    return fork(train.main, overrides, num_ranks=2)


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    output, _ = process.communicate(timeout=240)
    return process.returncode, output


def ranks_of(out: Path) -> list[int]:
    return [each["pid"] for each in json.loads((out / LOCK).read_text())["processes"]]


def is_alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.is_file() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.long
def test_a_launch_is_kept_out_by_ranks_that_live_and_goes_on_from_what_dead_ones_saved(
    world: World, tmp_path: Path
) -> None:
    calm, out = tmp_path / "calm", tmp_path / "run"
    code, output = ended(launch(*given(world, calm)))
    assert code == 0, output
    assert not (calm / LOCK).exists()

    first = launch(*given(world, out))
    soon(lambda: num_steps_of(out) >= 4)  # three are saved
    pids = ranks_of(out)
    os.kill(first.pid, signal.SIGKILL)  # torchrun alone
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)  # so that they do not end before the next launch looks
    code, output = ended(launch(*given(world, out, "seed=1", "resume=never")))
    assert code != 0
    assert f"error: {out} is in use by another launch since 2" in output
    assert f"pid {pids[0]} on " in output and f"pid {pids[1]} on " in output
    assert output.partition("\n====")[0].count("is in use by another launch") == 1
    assert not (out / "exit_status.json").exists()
    assert all(map(is_alive, pids))

    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    soon(lambda: not any(map(is_alive, pids)))
    first.communicate(timeout=60)
    newest = max(saved_steps(out))
    assert 3 <= newest < NUM_STEPS
    damaged = out / "checkpoints" / f"step_{newest:06d}"
    shard = damaged / "rank_001.safetensors"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    (out / "checkpoints" / ".partial_000150").mkdir()

    code, output = ended(launch(*given(world, out)))
    assert code == 0, output
    assert f"is taken over: pid {pids[0]} on " in output
    assert f"removed {out}/checkpoints/.partial_000150" in output
    assert f"{shard} is damaged: digest" in output
    assert f"resumed from {out}/checkpoints/step_{newest - 1:06d}\n" in output
    assert (out / "checkpoints" / f"damaged_{damaged.name}" / "state.json").is_file()
    assert (out / "export" / "model.safetensors").read_bytes() == (
        calm / "export" / "model.safetensors"
    ).read_bytes()
    assert not (out / LOCK).exists()


def run_with_a_full_disk(cfg: TrainConfig, failing: int, saves: list[int]) -> None:
    """Run on a rank, where on one of them some saves find no room."""
    plain, made = write_shard, 0

    def save(*args: Any) -> Any:
        nonlocal made
        made += 1
        if rank() == failing and made in saves:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return plain(*args)

    setattr(store, plain.__name__, save)
    run(cfg, "sft", None)


def test_a_disk_that_is_full_for_a_while_costs_checkpoints_and_no_updates(
    world: World, tmp_path: Path
) -> None:
    calm, full = tmp_path / "calm", tmp_path / "full"
    for out, saves in ((calm, []), (full, [1, 2])):
        steps = [*overrides("sft", world, out, 2), "checkpoint.save_every=2"]
        cfg = compose_config("quickstart_sft", *steps)
        run_on_ranks(2, run_with_a_full_disk, cfg, 1, saves)
    assert saved_steps(full) == [6] and sorted(saved_steps(calm)) == [2, 4, 6]
    lines, calm_lines = losses(full), losses(calm)
    assert [line.pop("checkpoint/failures") for line in lines] == [0, 0, 1, 1, 2, 2]
    assert {line.pop("checkpoint/failures") for line in calm_lines} == {0}
    assert lines == calm_lines
    for name in ("export/model.safetensors", "checkpoints/step_000006/rank_001.safetensors"):
        one, other = load_file(calm / name), load_file(full / name)
        assert all(one[key].equal(other[key]) for key in one)


def run_where_one_cannot_load(cfg: TrainConfig) -> None:
    """Run on a rank; the second cannot read what was found sound a moment ago."""
    plain = load_checkpoint

    def load(path: Path) -> Any:
        if rank() == 1:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return plain(path)

    setattr(run_module, plain.__name__, load)
    run(cfg, "sft", None)


def test_nothing_is_moved_where_one_rank_cannot_go_on_from_an_older_checkpoint(
    world: World, tmp_path: Path
) -> None:
    steps = [*overrides("sft", world, tmp_path, 2), "checkpoint.save_every=1"]
    steps += ["stage.num_steps=3", "stage.eval_every=null"]
    run_on_ranks(2, run, compose_config("quickstart_sft", *steps), "sft", None)
    older = tmp_path / "checkpoints" / "step_000001"
    cfg = compose_config("quickstart_sft", *steps, f"resume={older}")
    with pytest.raises(AssertionError) as failed:
        run_on_ranks(2, run_where_one_cannot_load, cfg)
    said = f"InputError: rank 1: [Errno 5] Input/output error: '{older}'"
    assert str(failed.value).count(said) == 2  # on either rank
    shard = older / "rank_001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1000])
    with pytest.raises(AssertionError, match=r"resume=.*: .*rank_001.safetensors is damaged: .*3,"):
        run_on_ranks(2, run, cfg, "sft", None)
    assert sorted(saved_steps(tmp_path)) == [1, 2, 3] and (tmp_path / "finished.json").is_file()
    assert sorted(path.name for path in tmp_path.glob("checkpoints*")) == ["checkpoints"]


@pytest.mark.long
def test_a_finished_run_whose_export_is_gone_or_cut_exports_again(
    world: World, tmp_path: Path
) -> None:
    steps = [*overrides("sft", world, tmp_path, 1), "stage.num_steps=3", "stage.eval_every=null"]
    cfg = compose_config("quickstart_sft", *steps)
    run_on_ranks(1, run, cfg, "sft", None)
    assert is_finished(cfg)
    weights = tmp_path / "export" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-9])
    done = run_to_its_end("experiment=quickstart_sft", *steps)
    assert done.returncode == 0, done.stderr
    assert f"{weights} is not what the finished run exported; finishing again" in done.stdout
    assert "step 1/3" not in done.stdout and weights.read_bytes() == whole

    shutil.rmtree(tmp_path / "export")
    note = (tmp_path / "finished.json").read_text()
    for text in (note, note[:99]):  # whole, and torn
        (tmp_path / "finished.json").write_text(text)
        assert lost_since_finished(cfg) is not None and not is_finished(cfg)
    done = run_to_its_end("experiment=quickstart_sft", *steps)
    assert done.returncode == 0, done.stderr
    assert weights.read_bytes() == whole and is_finished(cfg)
    assert [line["step"] for line in losses(tmp_path)] == [1, 2, 3]


def test_a_directory_that_cannot_be_written_is_refused_before_anything_is_read(
    world: World, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    absent = f"data.sources.math.path={tmp_path}/absent"  # would be missed next
    done = run_to_its_end(*given(world, tmp_path / "file" / "run", absent))
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.startswith(f"error: {tmp_path}/file/run cannot be written ([Errno 20] Not")


def test_a_disk_without_room_is_refused_before_the_student_is_loaded(
    world: World, tmp_path: Path
) -> None:
    size = "checkpoint.keep_last=1000000000"
    done = run_to_its_end(*given(world, tmp_path, size, "parallel.expert_parallel_size=1"))
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "GiB free, and the run needs" in done.stderr
    assert "1000000001 checkpoints of 0.00 GiB" in done.stderr
    assert not (tmp_path / LOCK).exists()
