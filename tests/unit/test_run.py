"""What a run measures of its own time."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from marco_train import run as run_module
from marco_train.checkpoint import TrainingState
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
