"""What a run measures of its own time."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from marco_train import run as run_module
from marco_train.checkpoint import TrainingState, background
from marco_train.errors import CheckpointError, RunInterrupted
from marco_train.run import Run
from tests.helpers.configs import compose_config
from tests.helpers.world import World


class Clock:
    """Time that passes only where a test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


class Untrained:
    """The part of a policy that a run looks at."""

    num_updates = 0
    schedule_steps = 9

    def state(self) -> TrainingState:
        return TrainingState([], 0)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(run_module, "time", found)
    return found


@pytest.fixture
def run(world: World, tmp_path: Path) -> Run:
    cfg = compose_config("quickstart_opd", f"root={world.root}", f"output_dir={tmp_path}")
    return Run(cfg, Untrained(), [], resumed=False)  # type: ignore[arg-type]


def test_a_timer_takes_the_time_of_its_block(clock: Clock, run: Run) -> None:
    for name, seconds in (("sync", 1.0), ("sample", 10.0)):
        with run.timer(name):
            clock.now += seconds
        clock.now += 100
    assert run._timers == {"sync": 1.0, "sample": 10.0}


def test_a_plan_that_becomes_shorter_ends_the_run_earlier(run: Run) -> None:
    plan = SimpleNamespace(num_steps=9)
    made = []
    for step in run.steps(plan):
        made.append(step)
        plan.num_steps = 3
    assert made == [0, 1, 2]


@pytest.mark.parametrize(
    ("first", "last", "is_warned"),
    [(0, 2, True), (0, 4, False), (4, 7, True), (4, 8, False), (4, 4, False)],
)
def test_a_run_that_ends_before_its_first_measure_says_so(
    first: int,
    last: int,
    is_warned: bool,
    world: World,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked = ["stage.eval_every=4", "stage.eval.suite=fixture"]
    best = ["checkpoint.best.metric=eval/score", "checkpoint.save_every=100"]
    given = [f"root={world.root}", f"output_dir={tmp_path}", *asked, *best]
    run = Run(compose_config("quickstart_opd", *given), Untrained(), [], resumed=False)  # type: ignore[arg-type]
    run._first = first
    assert len(list(run.steps(SimpleNamespace(num_steps=last)))) == last - first
    warning = (
        f"nothing will be measured: stage.eval_every is 4, and this run goes from step {first + 1} "
        f"to {last}; give at most stage.eval_every={last - first}\n"
    )
    assert capsys.readouterr().out == warning * is_warned
    run._export_best()
    why = "eval/score was never measured (stage.eval_every=4)"
    assert capsys.readouterr().out == f"no export-best: {why}\n"


def test_a_run_that_learnt_nothing_is_not_saved_early_and_one_that_did_is_saved_once(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[int] = []
    monkeypatch.setattr(run_module, "save_checkpoint", lambda _, step, *__: saved.append(step))
    cfg = compose_config("quickstart_opd", f"root={world.root}", f"output_dir={tmp_path}")
    policy = Untrained()
    policy.num_updates = 2  # as one that was resumed
    run = Run(cfg, policy, [], resumed=False)  # type: ignore[arg-type]
    assert not run.save_early() and saved == []
    policy.num_updates = 3
    assert run.save_early() and run.save_early()
    assert saved == [3]


class Disk:
    """Takes the place of `save_checkpoint`, and may be full."""

    def __init__(self) -> None:
        self.is_full = False
        self.saved: list[int] = []
        self.kept: list[int] = []

    def save(self, _: Path, step: int, *given: Any) -> None:
        if self.is_full:
            raise CheckpointError(f"the checkpoint of step {step} was not saved")
        self.saved.append(step)
        self.kept = list(given[3].kept)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    found = Disk()
    monkeypatch.setattr(run_module, "save_checkpoint", found.save)
    return found


def run_saving_every_step(world: World, out: Path, *more: str) -> Run:
    given = [f"root={world.root}", f"output_dir={out}", "checkpoint.save_every=1", *more]
    cfg = compose_config("quickstart_opd", *given)
    return Run(cfg, Untrained(), [], resumed=False)  # type: ignore[arg-type]


def logged(run: Run, step: int) -> float:
    """What a step says of saves that failed."""
    seen: dict[str, float] = {}
    assert run._tracker is not None
    run._tracker.log = lambda *given: seen.update(given[3])  # type: ignore[method-assign]
    run.log(step, {"data/num_tokens": 1.0})
    return seen["checkpoint/failures"]


def test_a_save_that_fails_is_counted_and_said_and_the_next_is_tried(
    disk: Disk, world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_saving_every_step(world, tmp_path)
    for step, is_full in enumerate((False, True, True, False, True, True, False)):
        disk.is_full = is_full
        run.save_if_due(step)
    assert disk.saved == [1, 4, 7]
    assert logged(run, 7) == 4
    said = capsys.readouterr().out
    assert (
        "step 3 was not saved; failure 2 of checkpoint.max_failures=3 in a row, and the run goes on"
    ) in said


def test_so_many_failures_in_a_row_end_a_run(disk: Disk, world: World, tmp_path: Path) -> None:
    run = run_saving_every_step(world, tmp_path, "checkpoint.max_failures=2")
    disk.is_full = True
    run.save_if_due(0)
    with pytest.raises(CheckpointError, match=r"failure 2 of checkpoint.max_failures=2 in a row"):
        run.save_if_due(1)


def test_a_run_ends_with_the_first_failure_where_that_is_asked(
    disk: Disk, world: World, tmp_path: Path
) -> None:
    run = run_saving_every_step(world, tmp_path, "checkpoint.on_error=stop")
    disk.is_full = True
    with pytest.raises(CheckpointError, match=r"step 1 .*checkpoint.on_error=stop ends the run"):
        run.save_if_due(0)


@pytest.mark.parametrize("ends", [False, True])
def test_a_save_that_failed_beside_training_is_told_at_the_next_step_and_at_the_end(
    ends: bool, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(background, "write_shard", full)
    more = ["checkpoint.asynchronous=true", "checkpoint.on_error=stop", "checkpoint.save_every=2"]
    run = run_saving_every_step(world, tmp_path, *more)
    run.save_if_due(1)
    assert run._background is not None and run._background._pending is not None
    assert run._background._pending.shard.exception(timeout=60) is not None
    with pytest.raises(CheckpointError, match=r"step 2 was not saved .*No space left on device"):
        run.finish() if ends else run.save_if_due(2)  # which saves nothing itself
    assert not (tmp_path / "finished.json").exists()


def test_a_run_that_is_told_to_end_and_cannot_be_saved_says_so(
    disk: Disk, world: World, tmp_path: Path
) -> None:
    for first_is_full in (False, True):
        run = run_saving_every_step(world, tmp_path)
        disk.is_full = first_is_full
        run.save_if_due(0)
        disk.is_full = True
        (tmp_path / "STOP").touch()
        logged(run, 1)
        with pytest.raises(RunInterrupted) as ended:
            run.save_if_due(1)
        last = None if first_is_full else str(tmp_path / "checkpoints" / "step_000001")
        assert (ended.value.code, ended.value.step, ended.value.checkpoint) == (143, 2, last)
        assert ("was not saved" if first_is_full else "were not saved") in str(ended.value)


def test_a_run_that_could_not_be_saved_early_does_not_say_it_was(
    disk: Disk, world: World, tmp_path: Path
) -> None:
    run = run_saving_every_step(world, tmp_path)
    run._policy.num_updates = 3
    disk.is_full = True
    assert not run.save_early()
    disk.is_full = False
    assert run.save_early()


def test_ends_of_phases_are_saved_and_kept_unless_that_is_off(
    disk: Disk, world: World, tmp_path: Path
) -> None:
    run = run_saving_every_step(world, tmp_path, "checkpoint.save_every=3")
    run.keep(2)
    run.save_if_due(2)
    assert (disk.saved, disk.kept) == ([2, 3], [2])
    for off in ("checkpoint.keep_phase_ends=false", "checkpoint.save_every=null"):
        run = run_saving_every_step(world, tmp_path, off)
        run.keep(5)
    assert disk.saved == [2, 3]
