"""A teacher behind servers: its numbers, and what it does while they misbehave."""

import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from marco_train.config.opd import Objective, TopKSource
from marco_train.config.servers import TeacherServersConfig
from marco_train.config.teacher import TeacherBackend, VLLMServerTeacherConfig
from marco_train.errors import InputError, ServersUnavailable
from marco_train.inference.pool import SaveEarly, nothing_to_save
from marco_train.teachers.vllm_server import ServerTeacher
from marco_train.types import Rollout, ScoredRollout, TokenScores, TopKScores
from tests.helpers import fake_server
from tests.helpers.fake_server import NEUTRAL, FakeServer, connections, distribution, fake_servers
from tests.helpers.rollouts import rollouts
from tests.helpers.teachers import teacher_config, wanted_of
from tests.helpers.world import World

pytestmark = pytest.mark.slow

OPENED: list[ServerTeacher] = []


@pytest.fixture(autouse=True)
def close_teachers() -> Iterator[None]:
    yield
    while OPENED:
        OPENED.pop().close()


@pytest.fixture
def servers() -> Iterator[list[FakeServer]]:
    """Two that answer with arrays, as vLLM on a GPU."""
    with fake_servers(2) as found:
        yield found


ANSWERS = pytest.mark.parametrize("in_binary", [True, False], ids=["arrays", "json"])


def answering(servers: list[FakeServer], in_binary: bool) -> list[FakeServer]:
    for server in servers:
        server.scores_given_ids = in_binary
    return servers


def open_teacher(
    world: World,
    servers: list[FakeServer],
    *kind: Any,
    stop_id: int | None = None,
    save_early: SaveEarly = nothing_to_save,
    **changes: Any,
) -> ServerTeacher:
    fields: dict[str, Any] = {
        "urls": [server.url for server in servers],
        "max_requests": 4,
        "request_timeout_seconds": 1.0,
        "save_after_seconds": 20.0,
        "give_up_after_seconds": 40.0,
        "max_rejected": 0.0,
    }
    cfg = teacher_config(
        world.path("teacher_first", "export"),
        TeacherBackend.vllm_server,
        stop_id=stop_id,
        servers=TeacherServersConfig(**fields | changes),
    )
    assert isinstance(cfg, VLLMServerTeacherConfig)
    wanted = wanted_of(*(kind or (Objective.sampled,)))
    OPENED.append(ServerTeacher(cfg, wanted, save_early))
    return OPENED[-1]


def expected(rollout: Rollout) -> torch.Tensor:
    """The distribution in each place of a response, [R, V]."""
    first = len(rollout.prompt.input_ids)
    ends = range(first, len(rollout.input_ids))
    return torch.stack([distribution(rollout.input_ids[:end]) for end in ends])


def check_tokens(scored: list[ScoredRollout], asked: list[Rollout]) -> None:
    assert [s.rollout for s in scored] == asked
    for s in scored:
        assert isinstance(s.scores, TokenScores)
        ids = torch.tensor(s.rollout.response_ids)
        wanted = expected(s.rollout)[torch.arange(len(ids)), ids]
        torch.testing.assert_close(s.scores.teacher_logprobs, wanted)


@ANSWERS
def test_the_scores_of_tokens_come_from_both_servers(
    in_binary: bool, world: World, servers: list[FakeServer]
) -> None:
    asked = rollouts()
    for server in answering(servers, in_binary):
        server.slowness = 0.05
    teacher = open_teacher(world, servers, max_requests=2)
    check_tokens(teacher.score(asked), asked)
    assert all(server.outcomes["fine"] >= 2 for server in servers)
    counts = teacher.take_counts()
    assert counts.pop("milliseconds") >= 50
    assert not counts
    check_tokens(teacher.score(asked[:2]), asked[:2])  # and once more


@pytest.mark.parametrize("top_k_source", TopKSource)
def test_the_scores_of_likeliest_tokens(
    top_k_source: TopKSource, world: World, servers: list[FakeServer]
) -> None:
    asked = rollouts()
    scored = open_teacher(world, servers, Objective.topk, 5, top_k_source).score(asked)
    for s in scored:
        assert isinstance(s.scores, TopKScores)
        wanted = expected(s.rollout)
        likeliest = wanted.topk(5).indices
        ids = torch.tensor(s.rollout.topk_ids) if top_k_source is TopKSource.sampler else likeliest
        assert torch.equal(s.scores.topk_ids, ids)
        torch.testing.assert_close(s.scores.teacher_topk_logprobs, wanted.gather(1, ids))
        overlap = (ids[:, :, None] == likeliest[:, None]).any(2).float().mean(1)
        assert torch.equal(s.scores.topk_overlap, overlap)


def test_the_teachers_stop_token_stands_for_the_students(
    world: World, servers: list[FakeServer]
) -> None:
    first = rollouts()[1]
    asked = replace(first, response_ids=[*first.response_ids[:-1], 2])
    sent = replace(first, response_ids=[*first.response_ids[:-1], 9])
    (found,) = open_teacher(world, servers, stop_id=9).score([asked])
    (wanted,) = open_teacher(world, servers).score([sent])
    assert isinstance(found.scores, TokenScores) and isinstance(wanted.scores, TokenScores)
    assert torch.equal(found.scores.teacher_logprobs, wanted.scores.teacher_logprobs)

    given = replace(asked, topk_ids=[[2, 9, 5, 6, 7]] * len(asked.response_ids))
    (found,) = open_teacher(world, servers, Objective.topk, 5, stop_id=9).score([given])
    assert isinstance(found.scores, TopKScores)
    assert found.scores.topk_ids.tolist() == given.topk_ids
    traded = torch.tensor([9, 2, 5, 6, 7])
    last = distribution(asked.input_ids[:-1])[traded]
    torch.testing.assert_close(found.scores.teacher_topk_logprobs[-1], last)


def test_an_empty_response_has_no_scores_and_asks_nobody(
    world: World, servers: list[FakeServer]
) -> None:
    empty = replace(rollouts()[0], response_ids=[], sampler_logprobs=[], topk_ids=[])
    (scored,) = open_teacher(world, servers).score([empty])
    assert isinstance(scored.scores, TokenScores) and len(scored.scores.teacher_logprobs) == 0
    (scored,) = open_teacher(world, servers, Objective.topk, 5).score([empty])
    assert isinstance(scored.scores, TopKScores) and scored.scores.topk_ids.shape == (0, 5)
    assert not any(server.bodies for server in servers)


def test_every_sampling_field_is_sent(world: World, servers: list[FakeServer]) -> None:
    open_teacher(world, servers).score(rollouts()[:1])
    open_teacher(world, servers, Objective.topk, 5).score(rollouts()[:1])
    open_teacher(world, answering(servers, in_binary=False)).score(rollouts()[:1])
    bodies = [body for server in servers for body in server.bodies]
    in_json = [body for body in bodies if body["path"] == "/v1/completions"]
    of_ids = [body["sampling_params"] for body in bodies if body not in in_json]
    assert len(in_json) == 1 and len(of_ids) == 2
    assert all(NEUTRAL.items() <= given.items() for given in [*in_json, *of_ids])


def test_an_array_holds_the_places_of_the_response_alone(
    world: World, servers: list[FakeServer]
) -> None:
    (asked,) = rollouts()[1:2]
    open_teacher(world, servers).score([asked])
    (body,) = [body for server in servers for body in server.bodies]
    assert body["token_ids"] == asked.input_ids
    assert not body["return_token_ids"]
    params = body["sampling_params"]
    assert params["prompt_logprob_start"] == len(asked.prompt.input_ids) - 1
    assert params["prompt_logprob_token_ids"] == [[token] for token in asked.response_ids]
    assert "prompt_logprobs" not in params


def test_a_server_that_comes_back_without_arrays_answers_with_json(
    world: World, servers: list[FakeServer]
) -> None:
    teacher = open_teacher(world, servers[:1])
    check_tokens(teacher.score(rollouts()), rollouts())
    servers[0].stop()
    answering(servers, in_binary=False)
    threading.Timer(0.3, servers[0].start).start()
    check_tokens(teacher.score(rollouts()), rollouts())
    assert servers[0].bodies[-1]["path"] == "/v1/completions"


FAULTS = ["hangs", "429", "500", "503", "dies mid-answer", "no JSON", "one place short", "NaN"]
FAULTS += ["minus infinity everywhere"]


@pytest.mark.parametrize(
    ("in_binary", "fault"),
    [
        *((in_binary, fault) for in_binary in (True, False) for fault in FAULTS),
        *((False, fault) for fault in ("without the token", "other ids", "no choices")),
        *((True, fault) for fault in ("half of the array", "no array")),
    ],
)
def test_a_fault_that_passes_leaves_no_trace(
    in_binary: bool, fault: str, world: World, servers: list[FakeServer]
) -> None:
    asked = rollouts()[1:2]  # nine tokens, of which none may be missing
    teacher = open_teacher(world, answering(servers, in_binary))
    for server in servers:
        server.script = [fault]
    check_tokens(teacher.score(asked), asked)
    assert sum(server.outcomes[fault] for server in servers) >= 1
    assert teacher.take_counts()["repeated_requests"] >= 1


def test_an_answer_that_is_never_usable_is_left_out_and_counted(
    world: World, servers: list[FakeServer]
) -> None:
    asked = rollouts()
    teacher = open_teacher(world, servers, max_requests=1, max_rejected=0.2)
    servers[0].script = servers[1].script = ["no array"] * 3
    servers[1].stop()
    scored = teacher.score(asked)
    check_tokens(scored, asked[1:])
    assert teacher.take_counts()["rejected"] == 1

    servers[0].script = ["one place short"] * 6
    with pytest.raises(InputError, match=r"2 of 5 rollouts had no usable score \(40.0%, more than"):
        teacher.score(asked)


@ANSWERS
def test_few_tokens_without_a_number_are_left_out_and_counted(
    in_binary: bool, world: World, servers: list[FakeServer]
) -> None:
    asked = [r for r in rollouts() if len(r.response_ids) == 12]
    teacher = open_teacher(world, answering(servers, in_binary))
    servers[0].script = servers[1].script = ["NaN"]
    (scored,) = teacher.score(asked)
    assert isinstance(scored.scores, TokenScores)
    assert scored.scores.teacher_logprobs.isnan().tolist() == [False] * 11 + [True]
    assert teacher.take_counts()["missing_tokens"] == 1


def test_a_teacher_that_is_down_at_the_start_is_waited_for(world: World) -> None:
    with fake_servers(1) as (server,):
        server.stop()
        threading.Timer(0.7, server.start).start()
        assert open_teacher(world, [server]).identity["served_as"] == "teacher"
        server.stop()
        message = rf"no answer for \d s from .* {server.url}, .* the last error: .*attempts failed"
        with pytest.raises(ServersUnavailable, match=message):
            open_teacher(world, [server], save_after_seconds=0.1, give_up_after_seconds=1.0)


def test_a_teacher_that_goes_away_is_waited_for_and_nothing_is_asked_twice(
    world: World, servers: list[FakeServer], capsys: pytest.CaptureFixture[str]
) -> None:
    asked = rollouts()
    saves: list[int] = []

    def save_early() -> bool:
        saves.append(sum(server.outcomes["fine"] for server in servers))
        for server in servers:
            server.start()
        return True

    bounds: dict[str, Any] = {"save_after_seconds": 0.5, "give_up_after_seconds": 30.0}
    teacher = open_teacher(world, servers, max_requests=1, save_early=save_early, **bounds)

    def as_they_come() -> Iterator[Rollout]:
        yield from asked[:2]
        while sum(server.outcomes["fine"] for server in servers) < 2:
            time.sleep(0.01)
        for server in servers:
            server.stop()
        yield from asked[2:]

    check_tokens(teacher.collect(teacher.submit(as_they_come())), asked)
    assert saves == [2]  # once, for what was learnt before
    assert sum(server.outcomes["fine"] for server in servers) == len(asked)
    (said,) = [line for line in capsys.readouterr().out.splitlines() if "no answer" in line]
    assert said.endswith("attempts failed; the run is saved, and it waits")


def test_an_outage_saves_the_run_once_and_ends_after_all_the_seconds_of_whoever_waited(
    world: World, servers: list[FakeServer]
) -> None:
    saves: list[float] = []
    start = time.monotonic()

    def save_early() -> bool:
        saves.append(time.monotonic() - start)
        return True

    bounds: dict[str, Any] = {"save_after_seconds": 1.0, "give_up_after_seconds": 4.0}
    teacher = open_teacher(world, servers, save_early=save_early, **bounds)
    for server in servers:
        server.script = ["hangs"] * 1000
    start = time.monotonic()
    submitted = teacher.submit(rollouts())
    time.sleep(2.4)  # sampling goes on
    with pytest.raises(ServersUnavailable, match="no answer for 4 s from the teacher's servers"):
        teacher.collect(submitted)
    early, last = saves  # at once, and before it ends
    assert 2.4 <= early < 4.0 <= last < 6.0  # 6.4 if it waited for 4 s more


def test_a_teacher_that_hangs_leaves_no_thread_and_no_connection(
    world: World, servers: list[FakeServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fake_server, "HANG_SECONDS", 8.0)
    threads, sockets = set(threading.enumerate()), connections(servers)
    bounds: dict[str, Any] = {"request_timeout_seconds": 60.0, "give_up_after_seconds": 1.0}
    for server in servers:
        server.script = ["hangs"] * 1000
    teacher = open_teacher(world, servers, max_requests=8, save_after_seconds=0.5, **bounds)
    start = time.monotonic()
    submitted = teacher.submit(rollouts())
    time.sleep(0.3)
    assert len(ours(threads)) == 1 and connections(servers) == sockets + len(rollouts())
    with pytest.raises(ServersUnavailable):
        teacher.collect(submitted)
    assert time.monotonic() - start < 5  # no request is waited for
    assert ours(threads) == set()
    assert connections(servers) == sockets


def ours(before: set[threading.Thread]) -> set[threading.Thread]:
    """Threads that were started since, but for those of the fake servers."""
    started = set(threading.enumerate()) - before
    return {thread for thread in started if "process_request" not in thread.name}


def test_scoring_begins_before_sampling_ends(world: World, servers: list[FakeServer]) -> None:
    asked = rollouts()
    teacher = open_teacher(world, servers)

    def as_they_come() -> Iterator[Rollout]:
        for number, rollout in enumerate(asked):
            yield rollout
            deadline = time.monotonic() + 5
            while sum(server.outcomes["fine"] for server in servers) <= number:
                assert time.monotonic() < deadline, "nothing was asked yet"
                time.sleep(0.01)

    check_tokens(teacher.collect(teacher.submit(as_they_come())), asked)


def test_slow_sampling_is_no_absence_of_the_teacher(
    world: World, servers: list[FakeServer]
) -> None:
    asked = rollouts()
    teacher = open_teacher(world, servers, save_after_seconds=0.3, give_up_after_seconds=0.6)

    def as_they_come() -> Iterator[Rollout]:
        for rollout in asked[:3]:
            time.sleep(0.8)
            yield rollout

    check_tokens(teacher.collect(teacher.submit(as_they_come())), asked[:3])


def test_open_requests_are_bounded_and_fewer_where_a_server_is_busy(world: World) -> None:
    asked = [
        replace(r, prompt=replace(r.prompt, index=i)) for i in range(8) for r in rollouts()[:1]
    ]
    with fake_servers(1) as (server,):
        server.slowness = 0.03
        teacher = open_teacher(world, [server], max_requests=4)
        teacher.score(asked)
        assert server.most_open == 4
        server.script = ["429"] * 6
        assert len(teacher.score(asked[:2])) == 2
        server.most_open = 0
        assert len(teacher.score(asked[2:6])) == 4
        assert server.most_open < 4


def test_another_model_is_refused(world: World, servers: list[FakeServer]) -> None:
    servers[1].model = "another"
    with pytest.raises(InputError, match=r"serves '(another|teacher)', and the teacher is"):
        open_teacher(world, servers)
    servers[1].model = "teacher"
    servers[1].weights = 1
    with pytest.raises(InputError, match=r"scores a probe .* nats at most away from what"):
        open_teacher(world, servers)


def test_a_server_that_comes_back_with_another_model_is_refused(world: World) -> None:
    asked = rollouts()
    with fake_servers(1) as (server,):
        teacher = open_teacher(world, [server])
        check_tokens(teacher.score(asked), asked)
        server.stop()
        server.model = "another"
        threading.Timer(0.3, server.start).start()
        with pytest.raises(InputError, match=r"serves 'another'"):
            teacher.score(asked)


def test_a_server_that_comes_back_with_other_weights_is_waited_for_until_it_has_its_own(
    world: World,
) -> None:
    asked, saves = rollouts(), [0]
    with fake_servers(1) as (server,):

        def save_early() -> bool:
            saves[0] += 1
            assert server.bodies == []  # nothing was asked but probes
            server.weights = 0
            return True

        bounds: dict[str, Any] = {"save_after_seconds": 1.0, "give_up_after_seconds": 30.0}
        teacher = open_teacher(world, [server], save_early=save_early, **bounds)
        server.stop()
        server.bodies, server.weights = [], 1
        threading.Timer(0.3, server.start).start()
        check_tokens(teacher.score(asked), asked)
        assert saves == [1]


def test_a_server_that_was_never_seen_away_and_has_other_weights_scores_nothing(
    world: World, servers: list[FakeServer]
) -> None:
    teacher, asked = open_teacher(world, servers), rollouts()
    check_tokens(teacher.score(asked), asked)
    servers[0].weights = 1
    before = servers[0].outcomes.copy()
    check_tokens(teacher.score(asked), asked)
    assert servers[0].outcomes == before  # only its probe was asked


def test_a_server_that_keeps_other_weights_ends_the_wait_as_one_that_is_away(world: World) -> None:
    with fake_servers(1) as (server,):
        bounds: dict[str, Any] = {"save_after_seconds": 0.5, "give_up_after_seconds": 2.0}
        teacher = open_teacher(world, [server], **bounds)
        server.stop()
        server.weights = 1
        threading.Timer(0.3, server.start).start()
        with pytest.raises(ServersUnavailable, match=r"scores a probe .* weights are others, or"):
            teacher.score(rollouts())


def test_what_servers_cannot_do_is_refused_at_the_start(world: World) -> None:
    with fake_servers(1) as (server,):
        with pytest.raises(InputError, match="objective=full needs a teacher's hidden states"):
            open_teacher(world, [server], Objective.full)
        server.window = 200
        with pytest.raises(InputError, match=r"of 200 tokens, .* needs 201: .*--max-model-len 201"):
            open_teacher(world, [server])
        server.window = 201
        server.scores_given_ids = False
        with pytest.raises(InputError, match=r"404.*--enable-scale-out.*top_k_source=teacher"):
            open_teacher(world, [server], Objective.topk, 5)
        open_teacher(world, [server], Objective.topk, 5, TopKSource.teacher)
        server.script = ["400"]
        with pytest.raises(InputError, match=r"refuses a request with 400: .*status 400"):
            open_teacher(world, [server]).score(rollouts())


def test_a_server_that_asks_for_a_key_gets_it_or_is_named(world: World) -> None:
    with fake_servers(1) as (server,):
        server.key = "the-key"
        fix = r"asks for a key, and none was sent: set VLLM_API_KEY to what the server was started"
        with pytest.raises(InputError, match=fix):
            open_teacher(world, [server])
        with pytest.raises(InputError, match="asks for a key, and not for the one sent: set"):
            open_teacher(world, [server], api_key="another")
        open_teacher(world, [server], api_key="the-key")
