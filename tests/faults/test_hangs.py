"""A rank that stops is named with where it stands, and so is one that is gone; the run goes on."""

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from torch._C._distributed_c10d import HashStore  # torch exports it without a type

from marco_train import watch as watch_module
from marco_train.watch import Seen, Watch, name_fault
from tests.helpers.faults import Fault, launch
from tests.helpers.processes import soon
from tests.helpers.runs import num_steps_of, overrides
from tests.helpers.world import World

NUM_RANKS = 2
HANG_SECONDS = 8
OWN = str(watch_module.PACKAGE / "own.py").removeprefix("/")


def given(world: World, out: Path, *more: str) -> list[str]:
    return [
        "experiment=quickstart_sft",
        *overrides("sft", world, out, NUM_RANKS),
        "checkpoint.save_every=1",
        f"parallel.hang_seconds={HANG_SECONDS}",
        *more,
    ]


def run(world: World, out: Path, *faults: Fault) -> tuple[int, str]:
    """Exit status and output of one launch."""
    process = launch(given(world, out), faults, out / "struck", NUM_RANKS)
    output, _ = process.communicate(timeout=240)
    return process.returncode, output


def status(out: Path) -> dict[str, Any]:
    return dict(json.loads((out / "exit_status.json").read_text()))


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("at_fault", [1, 0])
def test_a_rank_that_hangs_is_named_with_its_stack(
    at_fault: int, world: World, tmp_path: Path
) -> None:
    code, output = run(world, tmp_path, Fault("train_step", "hang", step=2, rank=at_fault))
    assert code != 0
    found = status(tmp_path)
    assert found["code"] == 70
    assert found["reason"].startswith("no rank gets on for ")
    assert f"rank {at_fault} stands at " in found["reason"]
    assert "faults.py:" in found["reason"] and "stages/sft.py:" in found["reason"]
    assert found["reason"].endswith(f"; waiting for it: {1 - at_fault}")
    assert f"error: {found['reason']}" in output
    assert f"rank {at_fault} stands here:" in output and "in strike" in output
    code, output = run(world, tmp_path, Fault("train_step", "hang", step=2, rank=at_fault))
    assert code == 0 and "resumed from" in output, output


@pytest.mark.slow
@pytest.mark.long
def test_a_rank_that_is_stopped_is_named_by_the_other(world: World, tmp_path: Path) -> None:
    stop = Fault("train_step", "stop", step=2, rank=1)
    more = given(world, tmp_path, "stage.num_steps=1000")  # it is ended, however long it went on
    process = launch(more, [stop], tmp_path / "struck", NUM_RANKS)
    try:
        soon((tmp_path / "exit_status.json").exists)
    finally:
        os.killpg(process.pid, signal.SIGCONT)  # else torchrun waits half a minute for its end
    output, _ = process.communicate(timeout=240)
    reason = status(tmp_path)["reason"]
    assert "the process is stopped or gone of rank 1, last at " in reason, output
    assert status(tmp_path)["code"] == 70 and f"error: {reason}" in output


@pytest.mark.slow
@pytest.mark.long
def test_a_rank_whose_peer_is_killed_says_so_in_a_sentence(world: World, tmp_path: Path) -> None:
    code, output = run(world, tmp_path, Fault("train_step", "kill", step=2, rank=1))
    assert code != 0
    assert "error: rank 1 is gone, and this one waited in vain" in output
    assert status(tmp_path)["reason"].startswith("rank 1 is gone, and this one waited in vain")
    assert "Connection closed by peer" not in output


@pytest.mark.slow
@pytest.mark.long
def test_a_signal_prints_the_stacks_and_the_run_goes_on(world: World, tmp_path: Path) -> None:
    more = given(world, tmp_path, "stage.num_steps=40", "checkpoint.save_every=1000")
    process = launch(more, [], tmp_path / "struck", NUM_RANKS)

    def wait_for_steps(number: int) -> None:
        soon(lambda: num_steps_of(tmp_path) >= number)

    wait_for_steps(2)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for child in map(int, children):  # in turn: what two ranks print at once mixes within a line
        os.kill(child, signal.SIGUSR2)
        wait_for_steps(num_steps_of(tmp_path) + 2)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    assert output.count("Current thread") >= NUM_RANKS and "in run_sft" in output
    assert num_steps_of(tmp_path) == 40


def test_a_store_behind_a_cut_wire_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = threading.Event()

    class CutOff:
        def set_timeout(self, _: object) -> None:
            pass

        def set(self, *_: str) -> None:
            answers.wait(60)

        def check(self, _: object) -> bool:
            return False

    settings = {"STORE_SECONDS": 0.1, "SECONDS_BETWEEN_LOOKS": 0.01}
    doubles = {"shared_store": CutOff, "rank": lambda: 1, "world_size": lambda: 2}
    for name, value in (settings | doubles).items():
        monkeypatch.setattr(watch_module, name, value)
    watch = Watch(60, lambda *_: None)
    assert watch.gone() == [0]
    began = time.monotonic()
    watch.stop()
    assert time.monotonic() - began < 30  # and not the minute after which the store answers
    answers.set()


def test_a_rank_that_falls_silent_before_its_second_look_is_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = HashStore()
    doubles = {"shared_store": lambda: store, "world_size": lambda: 2}
    for name, value in doubles.items():
        monkeypatch.setattr(watch_module, name, value)
    watches = []
    for number, seconds in ((0, 0.1), (1, 600)):  # between the looks
        monkeypatch.setattr(watch_module, "rank", lambda number=number: number)
        monkeypatch.setattr(watch_module, "SECONDS_BETWEEN_LOOKS", seconds)
        watches.append(Watch(3600, lambda *_: None))
    stays, goes = watches
    soon(lambda: store.check(["watch/1"]))
    goes.stop(is_well=False)
    assert stays.gone() == [1]
    stays.stop()


@pytest.mark.parametrize(
    ("callers", "waits"),
    [(("torch/distributed/run.py", OWN), False), ((OWN, "torch/distributed/c10d.py"), True)],
)
def test_a_launcher_of_torch_that_calls_this_package_is_no_collective(
    callers: tuple[str, str], waits: bool
) -> None:
    entered, may_leave = threading.Event(), threading.Event()

    def stand() -> None:
        entered.set()
        may_leave.wait()

    call: Callable[[], object] = stand
    for file in reversed(callers):
        made: dict[str, Any] = {}
        exec(compile("def call(inner): inner()", f"/{file}", "exec"), made)  # noqa: S102
        call = partial(made["call"], call)
    thread = threading.Thread(target=call)
    thread.start()
    entered.wait()
    found = watch_module._waits()
    may_leave.set()
    thread.join()
    assert found == waits


def seen(progress: int = 5, seconds: float = 10.0, waits: bool = True) -> Seen:
    return Seen(100, progress, seconds, waits, f"line {progress}")


def test_the_rank_at_fault_is_the_one_that_waits_for_nobody() -> None:
    beginning = "no rank gets on for 10 s (parallel.hang_seconds): "
    others = {1: seen(waits=False), 2: seen()}
    assert name_fault(0, seen(), others, []) == (
        f"{beginning}rank 1 stands at line 5; waiting for it: 0, 2"
    )
    # All wait, but one for a collective that the others have left behind.
    assert name_fault(0, seen(), {1: seen(3), 2: seen()}, []) == (
        f"{beginning}rank 1 stands at line 3; waiting for it: 0, 2"
    )
    # One that is at work has only just begun with it.
    assert "rank 1 stands" in name_fault(0, seen(), {1: seen(4), 2: seen(6, 0.1, False)}, [])
    assert name_fault(0, seen(waits=False), {1: seen()}, []) == (
        f"{beginning}rank 0 stands at line 5; waiting for it: 1"
    )
    assert name_fault(0, seen(), {1: seen(), 2: seen(waits=False)}, [1]) == (
        f"{beginning}the process is stopped or gone of rank 1, last at line 5"
    )
