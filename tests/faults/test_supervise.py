"""A supervised launch: started again where it crashed, as long as that leads anywhere."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.helpers.processes import REPOSITORY, soon
from tests.helpers.runs import num_steps_of, saved_steps
from tests.helpers.world import World

# What a launch of a script finds: `out`, where the run is, and `attempt`, the number of the launch.
PREAMBLE = """
out=${2#output_dir=}
attempt=$(($(cat "$out/attempts" 2>/dev/null || echo 0) + 1))
echo $attempt >"$out/attempts"
save() {
  local path=$out/checkpoints/step_$(printf %06d "$1")
  mkdir -p "$path"; touch "$path/manifest.json"
}
"""


def supervise(out: Path, *command: str, **environment: str) -> subprocess.Popen[str]:
    """Start a command under the supervisor, without pauses."""
    pauses = {"RESTART_SECONDS": "0", "RETRY_SECONDS": "0"}
    return subprocess.Popen(
        # Where SIGINT is ignored, as in a script's background, no shell can take it again.
        ["env", "--default-signal=INT", "recipes/supervise.sh", *command, f"output_dir={out}"],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)} | pauses | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def script(out: Path, lines: str, **environment: str) -> subprocess.Popen[str]:
    """Start a script in the place of a launch."""
    return supervise(out, "bash", "-c", PREAMBLE + lines, "_", "key=value", **environment)


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit status and output."""
    output, _ = process.communicate(timeout=180)
    return process.returncode, output


def num_attempts(out: Path) -> int:
    return int((out / "attempts").read_text())


def is_running(pid: int) -> bool:
    """Whether a process is there, and no zombie."""
    file = Path(f"/proc/{pid}/stat")
    return file.is_file() and file.read_text().rpartition(")")[2].split()[0] != "Z"


def test_a_launch_that_crashes_again_and_again_is_given_up(tmp_path: Path) -> None:
    lines = (
        'printf \'  "reason": "OSError: disk %d",\\n\' $attempt >"$out/exit_status.json"; exit 1'
    )
    code, output = ended(script(tmp_path, lines))
    assert (code, num_attempts(tmp_path)) == (1, 4)
    last = output.splitlines()[-1]
    assert last.startswith("supervise: gives up after 4 crashes without progress (MAX_RESTARTS=3)")
    for number in range(1, 5):
        assert (
            f"attempt {number} ended with status 1 (OSError: disk {number}), saved up to step 0"
            in last
        )


def test_a_crash_after_progress_is_the_first_again(tmp_path: Path) -> None:
    lines = "[ $attempt -gt 3 ] || save $((attempt * 999999)); [ $attempt -lt 5 ] || exit 0; exit 9"
    code, output = ended(script(tmp_path, lines, MAX_RESTARTS="1"))
    assert (code, num_attempts(tmp_path)) == (9, 4), output
    assert "gives up after 2 crashes" in output and "step 2999997" in output
    assert "attempt 2 ended" not in output.splitlines()[-1]


def test_what_an_earlier_attempt_said_is_not_said_of_this_one(tmp_path: Path) -> None:
    said = '  "reason": "old",'
    lines = f"[ $attempt -gt 1 ] || echo '{said}' >\"$out/exit_status.json\"; kill -KILL $$"
    code, output = ended(script(tmp_path, lines, MAX_RESTARTS="1"))
    assert code == 137
    assert "attempt 1 ended with status 137 (old)" in output
    assert "attempt 2 ended with status 137 (signal KILL)" in output


@pytest.mark.parametrize("status", [2, 127])
def test_what_would_be_refused_again_is_not_launched_again(tmp_path: Path, status: int) -> None:
    code, output = ended(script(tmp_path, f"exit {status}"))
    assert (code, num_attempts(tmp_path)) == (status, 1)
    assert "is not launched again" in output


def test_try_again_later_is_no_crash_and_may_be_left_to_a_queue(tmp_path: Path) -> None:
    lines = "[ $attempt -gt 6 ] || exit 75"
    code, _ = ended(script(tmp_path, lines, MAX_RESTARTS="0"))
    assert (code, num_attempts(tmp_path)) == (0, 7)
    (tmp_path / "attempts").unlink()
    code, output = ended(script(tmp_path, lines, RETRY_SECONDS="none"))
    assert (code, num_attempts(tmp_path)) == (75, 1)
    assert "to be launched again later" in output


def test_a_run_that_was_told_to_end_is_not_launched_again(tmp_path: Path) -> None:
    code, output = ended(script(tmp_path, "exit 143"))
    assert (code, num_attempts(tmp_path)) == (143, 1) and "told to end" in output


@pytest.mark.parametrize("told", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_end_reaches_the_launch_and_ends_a_pause(
    tmp_path: Path, told: signal.Signals
) -> None:
    process = script(tmp_path, "trap 'save 7; exit 143' TERM; while :; do sleep 0.1; done")
    soon((tmp_path / "attempts").is_file)
    time.sleep(0.3)  # the trap is set
    process.send_signal(told)
    code, output = ended(process)
    assert code == 143 and f"saved up to step 7; told to end by {told.name}" in output

    process = script(tmp_path, "exit 1", RESTART_SECONDS="1000")
    soon(lambda: num_attempts(tmp_path) == 2)
    time.sleep(0.5)
    process.send_signal(told)
    code, output = ended(process)
    assert code == 143 and f"told to end by {told.name}, saved up to step 7" in output


def test_a_signal_to_save_waits_for_the_run_to_begin(tmp_path: Path) -> None:
    lines = "touch $out/up; until [ -e $out/go ]; do sleep 0.1; done; trap 'save 3' USR1\n"
    lines += 'touch "$out/run.lock"; until [ -e "$out/checkpoints" ]; do sleep 0.1; done'
    process = script(tmp_path, lines)
    soon((tmp_path / "up").is_file)
    process.send_signal(signal.SIGUSR1)
    time.sleep(0.3)
    (tmp_path / "go").touch()
    soon((tmp_path / "run.lock").is_file)
    process.send_signal(signal.SIGUSR1)
    code, output = ended(process)
    assert (code, num_attempts(tmp_path), saved_steps(tmp_path)) == (0, 1, [3])
    assert "nothing is saved for SIGUSR1, as the run has not begun" in output


def test_nothing_that_a_launch_started_outlives_its_attempt(tmp_path: Path) -> None:
    lines = "setsid sleep 1000 & echo $! >>$out/pids; [ $attempt = 2 ]"
    code, output = ended(script(tmp_path, lines))
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    assert code == 0 and len(pids) == 2, output
    assert not any(map(is_running, pids))


def test_a_launch_ends_with_a_supervisor_that_is_killed(tmp_path: Path) -> None:
    lines = "trap 'save 5; exit 143' TERM; echo $$ >$out/pid; while :; do sleep 0.1; done"
    process = script(tmp_path, lines)
    soon((tmp_path / "pid").is_file)
    time.sleep(0.3)
    process.kill()
    soon(lambda: not is_running(int((tmp_path / "pid").read_text())))
    assert saved_steps(tmp_path) == [5]


def test_each_attempt_keeps_what_it_printed(tmp_path: Path) -> None:
    code, output = ended(script(tmp_path, "echo said by $attempt; [ $attempt = 2 ]"))
    assert code == 0 and "said by 1" in output and "said by 2" in output
    logs = tmp_path / "logs"
    first = (logs / "attempt_001" / "node_0.log").read_text()
    assert first.startswith("said by 1\n") and "attempt 1 ended with status 1" in first
    assert (logs / "latest" / "node_0.log").read_text() == "said by 2\n"


@pytest.mark.parametrize("words", [["true"], ["true", "resume=never", "output_dir=x"]])
def test_a_launch_that_cannot_go_on_is_not_supervised(words: list[str]) -> None:
    done = subprocess.run(
        ["recipes/supervise.sh", *words],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert ("output_dir=<directory>" if len(words) == 1 else "resume=never") in done.stderr


def quickstart(world: World, out: Path, *extra: str) -> list[str]:
    """A recipe's launch of two ranks."""
    return [
        *("bash", "-c", 'source recipes/launch.sh; launch quickstart_sft "$@"', "_"),
        *(f"root={world.root}", "logging=console", "stage.num_steps=40"),
        *("stage.global_batch_size=6", "stage.eval_every=null", "checkpoint.save_every=10"),
        *("data.max_tokens_per_microbatch=128", "optim.warmup_steps=2", *extra),
    ]


@pytest.mark.slow
@pytest.mark.long
def test_a_run_learns_the_same_though_a_rank_and_then_torchrun_are_killed(
    world: World, tmp_path: Path
) -> None:
    calm, out = tmp_path / "calm", tmp_path / "out"
    code, output = ended(supervise(calm, *quickstart(world, calm), NPROC="2"))
    assert code == 0, output

    process = supervise(out, *quickstart(world, out), NPROC="2")
    lock = out / "run.lock"
    soon(lambda: num_steps_of(out) >= 12)
    first = [each["pid"] for each in json.loads(lock.read_text())["processes"]]
    os.kill(first[1], signal.SIGKILL)
    soon(lambda: lock.is_file() and str(first[0]) not in lock.read_text())
    soon(lambda: num_steps_of(out) >= 22)
    second = [each["pid"] for each in json.loads(lock.read_text())["processes"]]
    torchrun = int(Path(f"/proc/{second[0]}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(torchrun, signal.SIGKILL)
    code, output = ended(process)
    assert code == 0, output
    assert not any(map(is_running, [*first, *second]))
    assert len(list((out / "logs").glob("attempt_*"))) == 3, output
    weights = [each / "export" / "model.safetensors" for each in (calm, out)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


@pytest.mark.slow
def test_a_run_with_a_wrong_input_is_launched_once(world: World, tmp_path: Path) -> None:
    wrong = quickstart(world, tmp_path, "data.sources.math.path=nowhere")
    code, output = ended(supervise(tmp_path, *wrong))
    assert code == 2 and "nowhere" in output and "is not launched again" in output
    assert len(list((tmp_path / "logs").glob("attempt_*"))) == 1
