"""Runs that are told to save or to end: nothing is lost, and the exit status says which it was."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from marco_train import interruption, train
from marco_train.config import TrainConfig
from marco_train.interruption import Interruption, Signals, Wish, listening
from marco_train.run import begin
from tests.helpers.configs import compose_config
from tests.helpers.processes import REPOSITORY, fork, soon
from tests.helpers.ranks import run_on_ranks
from tests.helpers.runs import num_steps_of, saved_steps
from tests.helpers.world import World

NUM_STEPS = 60


def given(world: World, out: Path, *extra: str) -> list[str]:
    return [
        *(
            f"root={world.root}",
            f"output_dir={out}",
            "logging=console",
            "checkpoint.save_every=1000",
        ),
        *(f"stage.num_steps={NUM_STEPS}", "stage.global_batch_size=6", "stage.eval_every=null"),
        *("data.max_tokens_per_microbatch=128", "optim.warmup_steps=2", *extra),
    ]


def launch(world: World, out: Path, *extra: str) -> subprocess.Popen[str]:
    """A recipe's launch of two ranks, in a process group of its own."""
    script = 'source recipes/launch.sh; launch quickstart_sft "$@"'
    return subprocess.Popen(
        # Where SIGINT is ignored, as in a script's background, no shell can take it again.
        ["env", "--default-signal=INT", "bash", "-c", script, "_", *given(world, out, *extra)],
        cwd=REPOSITORY,
        env=os.environ | {"NPROC": "2", "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def launch_quickly(world: World, out: Path) -> subprocess.Popen[str]:
    """The same ranks without the recipe."""
    return fork(train.main, ["experiment=quickstart_sft", *given(world, out)], num_ranks=2)


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit status and output."""
    output, _ = process.communicate(timeout=120)
    return process.returncode, output


def exit_status(out: Path) -> dict[str, Any]:
    return dict(json.loads((out / "exit_status.json").read_text()))


@pytest.fixture(scope="module")
def calm(world: World, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """What a run learns that nobody disturbs."""
    out = tmp_path_factory.mktemp("calm")
    code, output = ended(launch_quickly(world, out))
    assert code == 0, output
    assert exit_status(out) == {"code": 0, "reason": "finished", "step": None, "checkpoint": None}
    return (out / "export" / "model.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("told", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.long
def test_a_run_that_is_told_to_end_saves_its_step_and_goes_on_from_it(
    told: signal.Signals, world: World, tmp_path: Path, calm: bytes
) -> None:
    process = launch(world, tmp_path)
    soon(lambda: num_steps_of(tmp_path) >= 2)
    if told is signal.SIGINT:  # as a terminal does
        os.killpg(process.pid, told)
    else:
        process.send_signal(told)
    code, output = ended(process)
    assert code == 143, output
    assert "Traceback" not in output
    status = exit_status(tmp_path)
    step, reason = status["step"], status["reason"]  # a launcher may pass SIGINT on as SIGTERM
    path = tmp_path / "checkpoints" / f"step_{step:06d}"
    assert status == {"code": 143, "reason": reason, "step": step, "checkpoint": str(path)}
    assert reason in {told.name, "SIGTERM"}
    assert saved_steps(tmp_path) == [step] and num_steps_of(tmp_path) == step < NUM_STEPS
    assert f"ends after step {step}, as {reason} asks; saved in {path}" in output

    code, output = ended(launch_quickly(world, tmp_path))
    assert code == 0 and f"resumed from {path}" in output, output
    assert (tmp_path / "export" / "model.safetensors").read_bytes() == calm


@pytest.mark.slow
def test_a_signal_and_a_file_save_and_another_file_ends(world: World, tmp_path: Path) -> None:
    more = ["stage.num_steps=100000", "checkpoint.save_every=100000", "checkpoint.keep_last=5"]
    process = launch(world, tmp_path, *more)
    soon(lambda: num_steps_of(tmp_path) >= 2)
    os.killpg(process.pid, signal.SIGUSR1)  # as scancel does
    soon(lambda: len(saved_steps(tmp_path)) == 1)
    (tmp_path / "SAVE").touch()
    soon(lambda: len(saved_steps(tmp_path)) == 2)
    assert not (tmp_path / "SAVE").exists()
    (tmp_path / "STOP").touch()
    code, output = ended(process)
    assert code == 143, output
    assert exit_status(tmp_path)["reason"] == f"a file {tmp_path / 'STOP'}"
    assert len(saved_steps(tmp_path)) == 3 and not (tmp_path / "STOP").exists()


@pytest.mark.slow
@pytest.mark.long
def test_a_run_whose_time_is_up_is_queued_again(world: World, tmp_path: Path) -> None:
    code, output = ended(launch(world, tmp_path, "checkpoint.must_save_by='0:00:01'"))
    assert code == 75, output
    assert exit_status(tmp_path)["reason"] == "checkpoint.must_save_by"
    assert saved_steps(tmp_path) == [num_steps_of(tmp_path)]


@pytest.mark.slow
@pytest.mark.long
def test_a_run_that_is_refused_keeps_its_exit_status(world: World, tmp_path: Path) -> None:
    code, output = ended(launch(world, tmp_path, "data.sources.math.path=nowhere"))
    assert code == 2 and "nowhere" in output


def test_time_is_left_for_the_longest_step(tmp_path: Path) -> None:
    asked = Interruption(tmp_path, seconds=1.0)
    assert asked.asked_here()[0] is Wish.go_on
    time.sleep(0.6)
    assert asked.asked_here() == (
        Wish.end_for_time,
        "checkpoint.must_save_by",
    )  # 0.6 s more are too many


def test_what_a_launch_has_loaded_counts_to_its_time(tmp_path: Path) -> None:
    with listening():
        time.sleep(0.3)
        assert Interruption(tmp_path, seconds=0.2).asked_here()[0] is Wish.end_for_time
    assert Interruption(tmp_path, seconds=0.2).asked_here()[0] is Wish.go_on


def is_listened_to(cfg: TrainConfig) -> bool:
    """Whether the stage's signals are caught while it runs, on a rank of its own."""
    seen: list[bool] = []

    def look(_: TrainConfig) -> None:
        seen.append(signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL)

    setattr(train, train.run_kind.__name__, look)  # in this process, which ends
    train.run_stage(cfg)
    return seen[0]


@pytest.mark.parametrize(
    ("experiment", "caught"),
    [("quickstart_sft", True), ("quickstart_opd", True), ("quickstart_evaluate", False)],
)
def test_an_evaluation_ends_at_once(experiment: str, caught: bool) -> None:
    assert run_on_ranks(1, is_listened_to, compose_config(experiment)) == [caught]


def test_a_launch_forgets_how_the_last_one_ended(tmp_path: Path) -> None:
    (tmp_path / "exit_status.json").write_text("{}")
    begin(compose_config("quickstart_sft", f"output_dir={tmp_path}"), {})
    assert not (tmp_path / "exit_status.json").exists()


def test_signals_ask_once_and_only_while_a_run_listens(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    asked = Interruption(tmp_path, seconds=None)
    with listening():
        signal.raise_signal(signal.SIGUSR1)
        assert [asked.asked_here() for _ in range(2)] == [(Wish.save, "SIGUSR1"), (Wish.go_on, "")]
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)  # the same, passed on by a launcher
        assert asked.asked_here() == (Wish.end, "SIGTERM")
    assert signal.getsignal(signal.SIGTERM) is before
    assert Signals.to_end is None


def test_a_second_signal_ends_a_process_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interruption, "SECONDS_OF_ONE_SIGNAL", 0.0)
    child = os.fork()
    if child == 0:
        with listening():
            signal.raise_signal(signal.SIGTERM)
            time.sleep(0.01)
            signal.raise_signal(signal.SIGTERM)
            os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 143
