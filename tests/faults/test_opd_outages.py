"""A run of distillation whose teacher goes away learns what it would have learnt."""

import json
import os
import socket
import threading
import time
from pathlib import Path

import pytest

from marco_train.config import TrainConfig
from marco_train.errors import RolloutMismatchError, ServersUnavailable
from marco_train.rollout import native
from marco_train.stages.opd import run_opd
from marco_train.teachers.preflight import NUM_ANSWERED, PROBES
from tests.helpers.configs import compose_config
from tests.helpers.fake_server import FakeServer, connections, fake_servers
from tests.helpers.processes import launch, soon
from tests.helpers.ranks import run_on_ranks
from tests.helpers.runs import distil, learnt, num_steps_of, saved_steps
from tests.helpers.world import World

pytestmark = pytest.mark.slow

NUM_STEPS = 6


def config(world: World, out: Path, server: FakeServer, num_ranks: int, *more: str) -> TrainConfig:
    return compose_config("quickstart_opd", *overrides(world, out, server.url, num_ranks), *more)


def overrides(world: World, out: Path, url: str, num_ranks: int) -> list[str]:
    return [
        f"root={world.root}",
        f"output_dir={out}",
        "teacher@stage.cascade.first.teacher=vllm_server",
        f"stage.cascade.first.teacher.servers.urls=[{url}]",
        "stage.cascade.first.teacher.dtype=float32",
        "stage.cascade.first.teacher.servers.max_requests=2",
        "stage.cascade.first.teacher.servers.request_timeout_seconds=2",
        "stage.cascade.first.teacher.servers.save_after_seconds=0.3",
        "stage.cascade.first.teacher.servers.give_up_after_seconds=30",
        f"stage.cascade.first.num_steps={NUM_STEPS - 2}",
        "stage.cascade.second.num_steps=2",
        "stage.objective=sampled",
        "stage.global_batch_size=4",
        "stage.max_response_length=6",
        "data.max_tokens_per_microbatch=128",
        "checkpoint.save_every=100",
        f"parallel.expert_parallel_size={num_ranks}",
        "logging.console_every=100",
    ]


def test_a_run_waits_saved_and_goes_on_where_it_stood(world: World, tmp_path: Path) -> None:
    num_ranks = 2
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    with fake_servers(1) as (server,):
        run_on_ranks(num_ranks, distil, config(world, whole, server, num_ranks), server.socket)
        server.slowness = 0.05

        def go_away_and_come_back() -> None:
            soon(lambda: num_steps_of(parts) >= 2)
            server.stop()
            soon(lambda: len(saved_steps(parts)) > 0)
            server.start()

        absence = threading.Thread(target=go_away_and_come_back)
        absence.start()
        run_on_ranks(num_ranks, distil, config(world, parts, server, num_ranks), server.socket)
        absence.join()
    assert learnt(parts) == learnt(whole)
    assert [step["step"] for step in learnt(whole)[0]] == list(range(1, NUM_STEPS + 1))


@pytest.mark.long
def test_a_run_that_gave_up_is_saved_and_can_be_resumed(world: World, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    with fake_servers(1) as (server,):
        run_on_ranks(1, distil, config(world, whole, server, 1), server.socket)
        server.slowness = 0.05

        def go_away() -> None:
            soon(lambda: num_steps_of(parts) >= 2)
            server.stop()

        absence = threading.Thread(target=go_away)
        absence.start()
        give_up = [  # and no early save of a busy machine before
            "stage.cascade.first.teacher.servers.save_after_seconds=3",
            "stage.cascade.first.teacher.servers.give_up_after_seconds=5",
        ]
        with pytest.raises(AssertionError, match=r"ServersUnavailable: no answer for \d+ s from"):
            run_on_ranks(1, distil, config(world, parts, server, 1, *give_up), server.socket)
        absence.join()
        (saved,) = saved_steps(parts)
        assert saved >= 2 and not (parts / "finished.json").exists()

        server.start()
        server.model = "another"
        cfg = config(world, parts, server, 1)
        with pytest.raises(AssertionError, match="'first' is another than the one that taught"):
            run_on_ranks(1, distil, cfg, server.socket)
        server.model = "teacher"
        server.weights = 1
        otherwise = r"resumed \(teacher: says of plain sentences what is further away than 0\.001 "
        with pytest.raises(AssertionError, match=otherwise):
            run_on_ranks(1, distil, cfg, server.socket)
        server.weights = 0
        run_on_ranks(1, distil, cfg, server.socket)
    assert learnt(parts) == learnt(whole)


HANGING = [
    "stage.cascade.{}.teacher.servers.save_after_seconds=0.5",
    "stage.cascade.{}.teacher.servers.give_up_after_seconds=4",
    "stage.cascade.{}.teacher.servers.max_requests=8",
]


def give_up_on(cfg: TrainConfig, server: FakeServer) -> tuple[str, float, int, int]:
    """How a run ends on a rank, how long it took, and the threads and connections that are left."""
    os.close(server.socket)
    start, before = time.monotonic(), set(threading.enumerate())
    with pytest.raises(ServersUnavailable) as ended:
        run_opd(cfg)
    seconds = time.monotonic() - start
    left = [t for t in set(threading.enumerate()) - before if t.name == "asks teacher"]
    return str(ended.value), seconds, len(left), connections([server])


def test_a_teacher_that_hangs_on_scoring_while_its_phase_opens_is_opened_once(
    world: World, tmp_path: Path
) -> None:
    with fake_servers(1) as (server,):
        server.script = ["hangs"] * 10_000
        cfg = config(world, tmp_path, server, 1, *(each.format("first") for each in HANGING))
        ((said, seconds, num_threads, num_connections),) = run_on_ranks(1, give_up_on, cfg, server)
    assert said.startswith("no answer for 4 s from the teacher's servers")
    assert 4 <= seconds < 60  # no more than some of the requests' own limits of 2 s
    assert num_threads == num_connections == 0
    assert saved_steps(tmp_path) == []  # nothing was learnt


@pytest.mark.long
def test_a_later_phase_whose_teacher_hangs_is_saved_and_resumed(
    world: World, tmp_path: Path
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    later = [
        "teacher@stage.cascade.first.teacher=hf",
        "stage.cascade.first.num_steps=2",
        "teacher@stage.cascade.second.teacher=vllm_server",
        "stage.cascade.second.teacher.dtype=float32",
        "stage.cascade.second.teacher.servers.request_timeout_seconds=2",
        *(each.format("second") for each in HANGING),
    ]
    common = [
        each for each in overrides(world, parts, "", 1) if not each.startswith(("stage.c", "teach"))
    ]
    with fake_servers(1) as (server,):
        later += [f"stage.cascade.second.teacher.servers.urls=[{server.url}]"]
        later += ["stage.cascade.second.num_steps=2"]
        cfg = compose_config("quickstart_opd", *common, *later)
        server.script = ["hangs"] * 10_000
        ((_, seconds, num_threads, num_connections),) = run_on_ranks(1, give_up_on, cfg, server)
        assert 4 <= seconds < 60
        assert num_threads == num_connections == 0
        assert saved_steps(parts) == [2]
        server.script = []
        run_on_ranks(1, distil, cfg, server.socket)
        cfg = compose_config("quickstart_opd", *common, *later, f"output_dir={whole}")
        run_on_ranks(1, distil, cfg, server.socket)
    assert learnt(parts) == learnt(whole)


def test_a_launch_that_gave_up_says_so_and_may_be_queued_again(
    world: World, tmp_path: Path
) -> None:
    with socket.socket() as closed:  # bound, so that no other takes the port; nobody listens
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
        given = overrides(world, tmp_path, url, num_ranks=1)
        give_up = "stage.cascade.first.teacher.servers.give_up_after_seconds=1"
        done = launch("experiment=quickstart_opd", *given, give_up)
    assert done.returncode == 75, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    (said,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert said.startswith(f"error: no answer for 1 s from the teacher's servers {url}, ")
    assert said.endswith("; nothing is lost: launch it again later")
    assert not (tmp_path / "finished.json").exists()


def test_a_second_run_over_the_same_rollouts_asks_no_server(world: World, tmp_path: Path) -> None:
    kept = f"stage.score_cache.path={tmp_path / 'scores'}"
    outs = [tmp_path / "first", tmp_path / "second"]
    num_asked = []
    with fake_servers(1) as (server,):
        for out in outs:
            server.outcomes.clear()
            run_on_ranks(1, distil, config(world, out, server, 1, kept), server.socket)
            num_asked.append(server.outcomes["fine"] - 2 * len(PROBES) - NUM_ANSWERED)  # preflight
    assert num_asked == [(NUM_STEPS - 2) * 4 * 2, 0]
    assert learnt(outs[0]) == learnt(outs[1])
    for out, share in zip(outs, (0, 1), strict=True):
        for line in (out / "metrics.jsonl").read_text().splitlines():
            assert json.loads(line)["teacher/cache_hits"] == share


def test_scores_of_a_server_that_served_other_weights_are_asked_anew(
    world: World, tmp_path: Path
) -> None:
    kept = f"stage.score_cache.path={tmp_path / 'scores'}"
    num_asked = []
    with fake_servers(1) as (server,):
        for weights in (0, 1):
            server.weights = weights
            server.outcomes.clear()
            out = tmp_path / f"of_{weights}"
            run_on_ranks(1, distil, config(world, out, server, 1, kept), server.socket)
            num_asked.append(server.outcomes["fine"])
    assert num_asked[0] == num_asked[1]


def test_a_sampler_of_another_distribution_stops_the_run(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = native.draw_tokens

    def perturbed(*args: object) -> object:
        tokens, logprobs = plain(*args)  # type: ignore[arg-type]
        return tokens, logprobs + 0.3

    monkeypatch.setattr(native, "draw_tokens", perturbed)
    with fake_servers(1) as (server,):
        message = (
            r"differ by 0\.3 nats a token in the mean, more than stage\.max_sampler_mismatch 0\.2"
        )
        with pytest.raises(AssertionError, match=message) as failure:
            run_on_ranks(1, distil, config(world, tmp_path, server, 1), server.socket)
        assert RolloutMismatchError.__name__ in str(failure.value)
        assert num_steps_of(tmp_path) == 1
        cfg = config(world, tmp_path / "free", server, 1, "stage.max_sampler_mismatch=null")
        run_on_ranks(1, distil, cfg, server.socket)
