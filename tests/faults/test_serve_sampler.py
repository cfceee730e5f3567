"""`scripts/serve_sampler.sh`, with a stand-in for vLLM's server and with the real one."""

import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
import torch

from marco_train.config.model import DType
from marco_train.errors import WeightSyncError
from marco_train.models.hf_io import hf_config
from marco_train.rollout.base import Sampler, in_order
from marco_train.rollout.build import build_sampler
from marco_train.types import Rollout
from tests.helpers.configs import compose_config
from tests.helpers.processes import REPOSITORY, soon
from tests.helpers.ranks import run_on_ranks
from tests.helpers.samplers import (
    MAX_PROMPT_LENGTH,
    SHAPE,
    STOP_IDS,
    prompts,
    sampler_of,
    spread,
    sync,
    transposed,
)
from tests.helpers.vllm_runs import IN_PROCESS, distil
from tests.helpers.world import World

SCRIPT = REPOSITORY / "scripts" / "serve_sampler.sh"
pytestmark = pytest.mark.slow


def members(group: int) -> list[int]:
    """Processes of a group that run."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, its_group = stat.read_text().rpartition(")")[2].split()[:3]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(its_group) == group and state != "Z":
            found.append(int(stat.parent.name))
    return found


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """A copy away from this environment, and a `python` that notes its call and runs on."""
    copy, python = tmp_path / "scripts" / SCRIPT.name, tmp_path / "bin" / "python"
    for file in (copy, python):
        file.parent.mkdir()
    shutil.copy(SCRIPT, copy)
    python.write_text(
        '#!/usr/bin/env bash\necho "$$ ${CUDA_VISIBLE_DEVICES:-none} $*" >> started\n'
        '[ "${ENDS:-no}" = no ] || exit 1\nsleep 1000 & sleep 1000\n'
    )
    python.chmod(0o755)
    return copy


def begin(script: Path, *arguments: str, **settings: str) -> "subprocess.Popen[str]":
    # An interrupt is heeded as in a terminal, also where these tests run in the background.
    return subprocess.Popen(
        ["env", "--default-signal=INT", str(script), "/models/student", *arguments],
        cwd=script.parents[1],
        env=os.environ | {"PATH": f"{script.parents[1] / 'bin'}:/usr/bin:/bin"} | settings,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def started(script: Path) -> list[list[str]]:
    """Group, devices and last words of each call."""
    file = script.parents[1] / "started"
    return [line.split() for line in file.read_text().splitlines()] if file.exists() else []


def test_servers_live_as_long_as_the_command(script: Path) -> None:
    command = ["bash", "-c", "until [ $(wc -l < started) = 2 ]; do sleep 0.1; done; exit 7"]
    run = begin(script, "--seed", "3", "--", *command, NUM_SERVERS="2", PORT="9000", GPUS="4 6")
    _, errors = run.communicate(timeout=60)
    assert run.returncode == 7, errors
    calls = sorted(started(script), key=lambda call: call[1])
    assert [call[1] for call in calls] == ["4", "6"]
    assert [call[-4:] for call in calls] == [["--seed", "3", "--port", p] for p in ("9000", "9001")]
    for call in calls:
        assert "--host 127.0.0.1 --hf-overrides" in " ".join(call)
        soon(lambda group=int(call[0]): not members(group))  # type: ignore[misc]


def test_the_status_is_the_commands_even_where_it_ends_at_once(script: Path) -> None:
    for _ in range(20):
        run = begin(script, "--", "bash", "-c", "exit 7")
        run.communicate(timeout=60)
        assert run.returncode == 7
    for call in started(script):
        soon(lambda group=int(call[0]): not members(group))  # type: ignore[misc]


def test_fewer_devices_than_servers_are_refused(script: Path) -> None:
    run = begin(script, NUM_SERVERS="2", GPUS="6")
    _, errors = run.communicate(timeout=60)
    assert run.returncode == 2 and "GPUS names 1 devices for 2 servers" in errors
    assert not started(script)


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_script_takes_command_and_servers_with_it(
    ending: signal.Signals, script: Path
) -> None:
    run = begin(script, "--", "sleep", "1000")
    soon(lambda: len(started(script)) == 1)
    run.send_signal(ending)
    run.communicate(timeout=60)
    assert run.returncode not in {0, None}
    soon(lambda: not members(int(started(script)[0][0])))


def test_a_server_that_ends_is_started_so_many_times(script: Path) -> None:
    run = begin(script, "--", "sleep", "3", MAX_RESTARTS="2", ENDS="yes")
    _, errors = run.communicate(timeout=60)
    assert run.returncode == 0
    assert len(started(script)) == 3
    assert "gave up port 8100 after 2 restarts" in errors
    alone = begin(script, MAX_RESTARTS="0", ENDS="yes")
    alone.communicate(timeout=60)
    assert alone.returncode == 1  # without a command there is nothing left to do


def test_the_command_of_a_server_is_printed(script: Path) -> None:
    printed, _ = begin(script, "--dtype", "float32", DRY_RUN="1").communicate(timeout=60)
    assert printed.startswith(
        "python -m vllm.entrypoints.openai.api_server --model /models/student"
    )
    assert " --generation-config vllm " in printed  # a model's own settings do not count
    assert printed.endswith("--dtype float32 --port 8100 \n")
    assert not started(script)


class Served:
    """The script with a real server."""

    def __init__(self, directory: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.sync_path = directory / "sync"
        model = directory / "model"
        model.mkdir()
        (model / "config.json").write_text(json.dumps(hf_config(SHAPE, torch.float32)))
        options = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "256"]
        options += ["--max-num-batched-tokens", "512", "--kv-cache-memory-bytes", str(64 << 20)]
        self.log = directory / "log"
        with self.log.open("w") as output:
            self.script = subprocess.Popen(
                [str(SCRIPT), str(model), *options],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ
                | {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "PORT": str(self.port)}
                | {"MAX_RESTARTS": "1"},
            )

    @property
    def group(self) -> int:
        """Process group of the server that listens now."""
        for file in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                words = file.read_text().split("\0")
            except (FileNotFoundError, ProcessLookupError):
                continue
            pid = int(file.parent.name)
            if words[-3:-1] == ["--port", str(self.port)] and os.getpgid(pid) == pid:
                return pid
        raise AssertionError(self.log.read_text()[-3000:])

    def sampler(self) -> Sampler:
        """One that asks it."""
        cfg = compose_config(
            "quickstart_opd",
            *self.overrides(),
            "stage.objective=topk",
            "stage.top_k=3",
            f"stage.max_prompt_length={MAX_PROMPT_LENGTH}",
            "stage.max_response_length=12",
        ).stage
        return build_sampler(cfg, SHAPE, DType.float32, STOP_IDS, seed=5)

    def overrides(self) -> list[str]:
        """Of a run that samples with it."""
        return [
            "rollout@stage.rollout=vllm_server",
            f"stage.rollout.servers.urls=[{self.url}]",
            f"stage.rollout.sync_path={self.sync_path}",
            "stage.rollout.servers.give_up_after_seconds=240",
        ]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    found = Served(tmp_path_factory.mktemp("served"))
    yield found
    if found.script.poll() is None:
        found.script.terminate()
        found.script.wait(timeout=60)


def same(found: Iterable[Rollout], expected: Iterable[Rollout]) -> None:
    """Compare rollouts; what is computed beside them changes the last bits of a number."""
    for one, other in zip(in_order(found), in_order(expected), strict=True):
        logprobs = [torch.tensor(r.sampler_logprobs) for r in (one, other)]
        torch.testing.assert_close(*logprobs, rtol=1e-5, atol=1e-5)
        assert one == replace(other, sampler_logprobs=one.sampler_logprobs)


def sampled_in_process() -> list[Rollout]:
    sampler = sampler_of("vllm", top_k=3)
    sync(spread(2), sampler, 2)
    return in_order(sampler.sample(prompts(), 4))


@pytest.mark.vllm
@pytest.mark.long
def test_a_real_server_samples_what_an_engine_in_process_does(served: Served) -> None:
    sampler = served.sampler()
    for version in (1, 2):
        policy = spread(version)
        sync(policy, sampler, version)
        found = in_order(sampler.sample(prompts(), 4))
        for r in found:
            logprobs = policy.score([r.input_ids])[len(r.prompt.input_ids) - 1 :]
            torch.testing.assert_close(
                torch.tensor(r.sampler_logprobs), logprobs, rtol=1e-4, atol=1e-4
            )
    (in_process,) = run_on_ranks(1, sampled_in_process)
    same(found, in_process)
    sampler.close()


@pytest.mark.vllm
def test_other_weights_in_a_real_server_are_caught(served: Served) -> None:
    sampler, policy = served.sampler(), spread(2)
    sync(spread(1), sampler)
    stream = transposed(policy.named_weights())
    policy.named_weights = lambda *_: stream  # type: ignore[method-assign]
    with pytest.raises(WeightSyncError, match="the canary's log-probabilities differ by"):
        sync(policy, sampler, version=2)
    sampler.close()


@pytest.mark.long
@pytest.mark.vllm
def test_a_run_learns_the_same_from_a_server(
    served: Served, wide_world: World, tmp_path: Path
) -> None:
    alone = distil(wide_world, tmp_path / "alone", 1, *IN_PROCESS)
    asked = distil(wide_world, tmp_path / "asked", 2, *served.overrides())
    # An update of these models moves them far.
    one_ahead = [
        *served.overrides(),
        "stage.rollout.max_staleness=1",
        "stage.max_sampler_mismatch=null",
    ]
    ahead = distil(wide_world, tmp_path / "ahead", 1, *one_ahead)
    for one, other in zip(alone, asked, strict=True):
        assert one["data/num_tokens"] == other["data/num_tokens"]
        for name in ("kl/reverse", "optim/grad_norm", "loss/entropy"):
            assert one[name] == pytest.approx(other[name], rel=1e-4)
    assert [step["rollout/staleness"] for step in ahead] == [0, 1, 1]
    assert alone[0]["kl/reverse"] == pytest.approx(ahead[0]["kl/reverse"], rel=1e-4)


@pytest.mark.long
@pytest.mark.vllm
def test_a_killed_engine_loses_no_prompt_and_comes_back_with_the_weights(served: Served) -> None:
    policy, sampler = spread(3), served.sampler()
    sync(policy, sampler, 3)
    expected = in_order(sampler.sample(prompts(), 8))
    first, group = served.group, members(served.group)
    responses = sampler.sample(prompts(), 8)
    found = [next(responses)]
    os.kill(max(group), signal.SIGKILL)  # the last that was started: the worker, or its engine
    found += list(responses)
    same(found, expected)
    soon(lambda: not members(first))
    same(sampler.sample(prompts(), 8), expected)  # by the new server at the latest
    assert served.group != first
    sampler.close()


@pytest.mark.vllm
def test_nothing_outlives_a_script_that_was_killed(served: Served) -> None:
    group = served.group
    assert len(members(group)) >= 3
    served.script.kill()
    served.script.wait()
    soon(lambda: not members(group))
    time.sleep(1.0)
    with pytest.raises(AssertionError):
        _ = served.group  # nor is another one started
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{served.url}/health", trust_env=False)
