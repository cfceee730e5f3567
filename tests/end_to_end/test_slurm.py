"""Jobs of Slurm, with a srun and scontrol of this machine's."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.processes import REPOSITORY, soon
from tests.helpers.runs import num_steps_of, saved_steps
from tests.helpers.world import World

FAKES = REPOSITORY / "tests" / "helpers" / "slurm"
JOB_ID = "4711"


@contextmanager
def job(
    name: str, nodes: str, spool: Path, recipe: str, *words: str, **environment: str
) -> Iterator[subprocess.Popen[str]]:
    """Run a job's script as slurmd does: a copy of it, in the directory of submission."""
    spool.mkdir(parents=True, exist_ok=True)
    script = Path(shutil.copy(REPOSITORY / "recipes" / "slurm" / name, spool / "slurm_script"))
    executable = spool / "recipe.sh"
    executable.write_text(f"#!/usr/bin/env bash\n{recipe}\n")
    executable.chmod(0o755)
    kept = {k: v for k, v in os.environ.items() if k not in {"RANK", "WORLD_SIZE"}}
    told = {
        "SLURM_SUBMIT_DIR": str(REPOSITORY),
        "SLURM_JOB_ID": JOB_ID,
        "SLURM_JOB_NODELIST": nodes,
        "SLURM_JOB_NUM_NODES": str(nodes.count(",") + 1),
        "FAKE_SLURM": str(spool),
        "FAKE_SERVER": f"{sys.executable} -m tests.helpers.slurm.server",
        "PATH": f"{FAKES}:{os.environ['PATH']}",
        "PYTHONPATH": str(REPOSITORY),
        "RESTART_SECONDS": "0",
        "NPROC": "1",
    }
    process = subprocess.Popen(
        ["bash", str(script), str(executable), *words],
        cwd=spool,
        env=kept | told | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield process
    finally:
        process.terminate()
        process.wait()


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit status and output."""
    output, _ = process.communicate(timeout=240)
    return process.returncode, output


def steps(spool: Path) -> list[dict[str, Any]]:
    """What was started on nodes."""
    return [json.loads(line) for line in (spool / "steps").read_text().splitlines()]


def was_requeued(spool: Path) -> bool:
    return (spool / "requeued").is_file()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def test_a_job_launches_one_torchrun_a_node_which_meet_at_the_first(tmp_path: Path) -> None:
    recipe = 'echo "rank $NODE_RANK of $NNODES meets at $MASTER_ADDR:$MASTER_PORT: $*"'
    words = [f"output_dir={tmp_path}", "seed=1"]
    ends = str(int(time.time()) + 2 * 3600 + 425)  # of which 420 s are left for the end
    with job("sft.sbatch", "n1,n2", tmp_path, recipe, *words, SLURM_JOB_END_TIME=ends) as process:
        code, output = ended(process)
    assert code == 0, output
    for rank in range(2):  # 20000 + (4711 * 7 + 1) % 10000
        assert f"rank {rank} of 2 meets at n1:22978: checkpoint.must_save_by='2:00:0" in output
    assert output.count(f"output_dir={tmp_path} seed=1\n") == 2
    (step,) = steps(tmp_path)
    assert step["nodes"] == ["n1", "n2"] and step["options"]["--ntasks-per-node"] == "1"


@pytest.mark.parametrize(
    ("status", "is_queued_again"), [(0, False), (2, False), (75, True), (143, False)]
)
def test_a_job_is_queued_again_where_its_run_asks_for_it(
    status: int, is_queued_again: bool, tmp_path: Path
) -> None:
    with job("sft.sbatch", "n1", tmp_path, f"exit {status}", f"output_dir={tmp_path}") as process:
        code, output = ended(process)
    assert (code, was_requeued(tmp_path)) == (status, is_queued_again), output


@pytest.mark.parametrize(
    ("told", "is_queued_again"), [(signal.SIGUSR1, True), (signal.SIGTERM, False)]
)
def test_a_job_that_has_to_leave_is_queued_again_and_one_that_is_cancelled_is_not(
    told: signal.Signals, is_queued_again: bool, tmp_path: Path
) -> None:
    recipe = f"trap 'exit 143' TERM; touch {tmp_path}/up; while :; do sleep 0.1; done"
    with job("sft.sbatch", "n1", tmp_path, recipe, f"output_dir={tmp_path}") as process:
        soon((tmp_path / "up").is_file)
        process.send_signal(told)
        code, output = ended(process)
    assert (code, was_requeued(tmp_path)) == (143, is_queued_again), output


def test_a_run_that_does_not_end_is_queued_again_all_the_same(tmp_path: Path) -> None:
    recipe = (
        f"trap '' TERM; touch {tmp_path}/up; until [ -e {tmp_path}/requeued ]; do sleep 0.1; done"
    )
    given = [f"output_dir={tmp_path}"]
    with job("sft.sbatch", "n1", tmp_path, recipe, *given, SAVE_SECONDS="1") as process:
        soon((tmp_path / "up").is_file)
        process.send_signal(signal.SIGUSR1)
        ended(process)
    assert was_requeued(tmp_path)


def test_a_job_is_not_queued_again_for_ever(tmp_path: Path) -> None:
    given = [f"output_dir={tmp_path}"]
    environment = {"SLURM_RESTART_COUNT": "3", "MAX_REQUEUES": "3"}
    with job("sft.sbatch", "n1", tmp_path, "exit 75", *given, **environment) as process:
        code, output = ended(process)
    assert code == 75 and not was_requeued(tmp_path)
    assert "not queued again, after MAX_REQUEUES=3 times" in output


def test_a_run_gets_the_addresses_of_servers_that_answer(tmp_path: Path) -> None:
    port, other = free_port(), free_port()
    environment = {
        "TEACHERS": "second=/models/a",
        "TEACHER_OPTIONS": "--tensor-parallel-size 8",
        "SAMPLERS": "/models/student",
        "TEACHER_PORT": str(port),
        "SAMPLER_PORT": str(other),
    }
    nodes = "127.0.0.2,127.0.0.1,127.0.0.1"  # the run's, the sampler's, the teacher's
    recipe = 'printf "given %s\\n" "$@"; [ ${#VLLM_API_KEY} = 32 ]'
    words = [f"output_dir={tmp_path}"]
    with job("opd.sbatch", nodes, tmp_path, recipe, *words, **environment) as process:
        code, output = ended(process)
    assert code == 0, output
    teacher = f"stage.cascade.second.teacher.servers.urls=[http://127.0.0.1:{port}]"
    assert f"given {teacher}\n" in output
    assert f"given stage.rollout.servers.urls=[http://127.0.0.1:{other}]\n" in output
    started = {step["command"][0]: step for step in steps(tmp_path)}
    assert started["recipes/serve_teacher.sh"]["command"][1:] == [
        *("/models/a", "--tensor-parallel-size", "8")
    ]
    assert "--overlap" in started["recipes/serve_teacher.sh"]["options"]
    assert started["bash"]["nodes"] == ["127.0.0.2"]
    with socket.socket() as left:  # nothing listens any more
        assert left.connect_ex(("127.0.0.1", port)) != 0


def test_a_job_without_a_node_for_its_run_is_refused(tmp_path: Path) -> None:
    environment = {"TEACHERS": "first=/models/a"}
    words = [f"output_dir={tmp_path}"]
    with job("opd.sbatch", "n1", tmp_path, "", *words, **environment) as process:
        code, output = ended(process)
    assert code == 2 and "no node is left for the run" in output


def recipe_of(experiment: str) -> str:
    return f'source {REPOSITORY}/recipes/launch.sh; launch {experiment} "$@"'


def sft_words(world: World, out: Path) -> list[str]:
    return [
        *(f"root={world.root}", f"output_dir={out}", "logging=console", "stage.num_steps=60"),
        *("stage.global_batch_size=6", "stage.eval_every=null", "checkpoint.save_every=1000"),
        *("data.max_tokens_per_microbatch=128", "optim.warmup_steps=2"),
        "parallel.timeout_seconds=60",
    ]


def weights_of(out: Path) -> bytes:
    return (out / "export" / "model.safetensors").read_bytes()


def check_preempted(world: World, tmp_path: Path, nodes: str, **environment: str) -> None:
    """A run that is preempted once learns what an undisturbed one does."""
    experiment = recipe_of("quickstart_sft")
    calm, out, spool = tmp_path / "calm", tmp_path / "out", tmp_path / "spool"
    words = sft_words(world, calm)
    with job(
        "sft.sbatch", nodes, tmp_path / "calm_spool", experiment, *words, **environment
    ) as process:
        code, output = ended(process)
    assert code == 0, output

    words = sft_words(world, out)
    with job("sft.sbatch", nodes, spool, experiment, *words, **environment) as process:
        soon(lambda: num_steps_of(out) >= 3)
        process.send_signal(signal.SIGUSR1)  # to the script alone: --signal=B:USR1@300
        code, output = ended(process)
    assert code == 143 and was_requeued(spool), output
    assert saved_steps(out) == [num_steps_of(out)] and num_steps_of(out) < 60
    again = environment | {"SLURM_RESTART_COUNT": "1"}
    with job("sft.sbatch", nodes, spool, experiment, *words, **again) as process:
        code, output = ended(process)
    assert code == 0 and "resumed from" in output, output
    assert weights_of(out) == weights_of(calm)


@pytest.mark.long
@pytest.mark.slow
def test_a_run_that_was_preempted_learns_what_it_would_have_learnt(
    world: World, tmp_path: Path
) -> None:
    check_preempted(world, tmp_path, "n1", NPROC="2")


@contextmanager
def two_nodes() -> Iterator[str]:
    """Network namespaces joined by a wire, gone with the block: 10.78.0.1 and 10.78.0.2."""
    names = [f"slurm-{os.getpid()}-{i}" for i in range(2)]

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True)

    try:
        for name in names:
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        wire = "link add wire0 type veth peer name wire1 netns"
        ip("-n", names[0], *wire.split(" "), names[1])
        for i, name in enumerate(names):
            ip("-n", name, "addr", "add", f"10.78.0.{i + 1}/24", "dev", f"wire{i}")
            ip("-n", name, "link", "set", f"wire{i}", "up")
        yield " ".join(names)
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False)


@pytest.mark.long
@pytest.mark.netns
def test_a_run_over_two_nodes_that_was_preempted_learns_what_it_would_have_learnt(
    world: World, tmp_path: Path
) -> None:
    with two_nodes() as names:
        check_preempted(world, tmp_path, "10.78.0.1,10.78.0.2", FAKE_NAMESPACES=names)


@pytest.mark.long
@pytest.mark.slow
def test_a_job_keeps_its_teachers_server_up(world: World, tmp_path: Path) -> None:
    port = free_port()
    words = [
        *(f"root={world.root}", f"output_dir={tmp_path / 'out'}", "logging=console"),
        "teacher@stage.cascade.first.teacher=vllm_server",
        "stage.cascade.first.teacher.dtype=float32",
        "stage.cascade.first.teacher.servers.request_timeout_seconds=2",
        "stage.cascade.first.teacher.servers.save_after_seconds=60",
        "stage.cascade.first.teacher.servers.give_up_after_seconds=90",
        *("stage.cascade.first.num_steps=12", "stage.cascade.second.num_steps=1"),
        *("stage.objective=sampled", "stage.global_batch_size=4", "stage.max_response_length=6"),
        *("data.max_tokens_per_microbatch=128", "checkpoint.save_every=100"),
        "parallel.expert_parallel_size=1",
    ]
    given = {"TEACHERS": "first=/models/a", "TEACHER_PORT": str(port)}
    recipe, out = recipe_of("quickstart_opd"), tmp_path / "out"
    nodes = "127.0.0.2,127.0.0.1"
    with job("opd.sbatch", nodes, tmp_path / "spool", recipe, *words, **given) as process:
        soon(lambda: num_steps_of(out) >= 2)
        os.kill(int((tmp_path / "spool" / "server").read_text()), signal.SIGKILL)
        code, output = ended(process)
    assert code == 0, output
    assert num_steps_of(out) == 13
    assert "is begun again" in output
    assert "Bearer" not in (out / "header.json").read_text()
