"""What a run measures of its own time."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from marco_train import run as run_module
from marco_train.errors import AwayError
from marco_train.run import Run
from tests.conftest import World, compose_config


class Clock:
    """Time that passes only where a test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


class Untrained:
    """The part of a policy that a run looks at."""

    num_updates = 0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(run_module, "time", found)
    return found


@pytest.fixture
def run(world: World, tmp_path: Path) -> Run:
    cfg = compose_config("quickstart_opd", f"root={world.root}", f"output_dir={tmp_path}")
    return Run(cfg, Untrained(), [], resumed=False)  # type: ignore[arg-type]


def test_a_timer_inside_another_takes_its_time_from_it(clock: Clock, run: Run) -> None:
    def sampled() -> Iterator[int]:
        for item in range(3):
            clock.now += 10
            yield item

    stream = run.timed("sample", sampled())
    with run.timer("score"):
        clock.now += 1
        assert next(iter(stream)) == 0  # as when scoring broke off
    with run.timer("score"):
        for _ in stream:
            clock.now += 1
        with run.timer("sync"):
            clock.now += 100
        clock.now += 1
    assert list(stream) == [0, 1, 2]  # again, and at no cost
    assert run._timers == {"sample": 30, "score": 5, "sync": 100}


def test_a_timer_counts_what_breaks_off_inside_it(clock: Clock, run: Run) -> None:
    def score() -> None:
        with run.timer("score"):
            clock.now += 2
            with run.timer("sync"):
                clock.now += 10
            raise AwayError("no answer", final=False)

    with run.timer("evaluate"):
        clock.now += 1
        with pytest.raises(AwayError):
            score()
        clock.now += 5
    assert run._timers == {"evaluate": 6, "score": 2, "sync": 10}


def test_a_wait_before_anything_is_learnt_saves_nothing_and_says_so(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = iter([AwayError("no answer", final=False), "here"])

    def ask() -> str:
        answer = next(answers)
        if isinstance(answer, AwayError):
            raise answer
        return str(answer)

    assert run.outlast(next(run.steps(until=4)), ask) == "here"
    assert capsys.readouterr().out.splitlines()[-1] == (
        "step 0: no answer; nothing is lost, and the run waits"
    )
    assert not (tmp_path / "checkpoints").exists()
