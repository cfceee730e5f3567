"""A sampler behind servers: whose responses they are, and what it does while they misbehave."""

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from marco_train.config import TrainConfig
from marco_train.config.model import DType
from marco_train.config.opd import OPDConfig
from marco_train.config.rollout import VLLMServerRolloutConfig, WeightsBy
from marco_train.config.servers import SamplerServersConfig
from marco_train.errors import InputError, ServersUnavailable, WeightSyncError
from marco_train.inference.pool import SaveEarly, nothing_to_save
from marco_train.inference.worker import Receiver
from marco_train.losses.logprobs import sequence_logprobs
from marco_train.models.qwen3_moe import Qwen3Moe
from marco_train.models.weights import ALL_EXPERTS, ExpertShare, named_weights, random_model
from marco_train.rollout.base import Sampler, SamplerSpec, in_order, response_seed
from marco_train.rollout.build import build_sampler
from marco_train.rollout.sync import Canary, canary_sequences, sync_weights
from marco_train.rollout.vllm_server import ServerSampler
from marco_train.stages import opd
from marco_train.types import FinishReason, Prompt, Rollout
from tests.helpers.configs import compose_config
from tests.helpers.fake_sampler import FakeSampler, draw, fake_samplers
from tests.helpers.fake_server import NEUTRAL, stop_all
from tests.helpers.models import VOCAB_SIZE, architecture, sparse_mlps
from tests.helpers.processes import soon
from tests.helpers.ranks import run_on_ranks
from tests.helpers.runs import distil, learnt, num_steps_of, saved_steps
from tests.helpers.samplers import Stream, with_one_twice, without_one
from tests.helpers.weight_transfer import TransferSampler, join_by_wire
from tests.helpers.world import World

pytestmark = pytest.mark.slow

STOP_IDS = [2, *range(100, 140)]
LIMIT = 8
TOP_K = 3
PROBES = canary_sequences(VOCAB_SIZE, 80)
CANARY = Canary(PROBES, DType.float32, num_layers=2)
OPENED: list[Sampler] = []


@pytest.fixture(autouse=True)
def close_samplers() -> Iterator[None]:
    yield
    while OPENED:
        OPENED.pop().close()


@pytest.fixture
def servers() -> Iterator[list[FakeSampler]]:
    with fake_samplers(2) as found:
        yield found


class Fixed:
    """The part of a policy that a sync needs, far from sure and far from uniform."""

    def __init__(self, seed: int) -> None:
        self.model = random_model(architecture(), torch.float32, seed)
        with torch.no_grad():
            self.model.head.mul_(4)

    def named_weights(self, share: ExpertShare = ALL_EXPERTS) -> Iterator[tuple[str, Tensor]]:
        return named_weights(self.model, share)

    @torch.no_grad()
    def score(self, sequences: Sequence[list[int]]) -> Tensor:
        return sequence_logprobs(self.model, self.model.head, sequences)


def sampler_of(
    servers: list[FakeSampler],
    path: Path,
    save_early: SaveEarly = nothing_to_save,
    **changes: Any,
) -> Sampler:
    given = {"max_requests": 4, "request_timeout_seconds": 1.0, "save_after_seconds": 20.0}
    given |= {"give_up_after_seconds": 40.0, **changes}
    cfg: OPDConfig = compose_config(
        "quickstart_opd",
        "rollout@stage.rollout=vllm_server",
        f"stage.rollout.servers.urls=[{','.join(server.url for server in servers)}]",
        f"stage.rollout.sync_path={path}",
        "stage.objective=topk",
        f"stage.top_k={TOP_K}",
        f"stage.max_response_length={LIMIT}",
        *(f"stage.rollout.servers.{name}={value}" for name, value in given.items()),
    ).stage
    shape = architecture()
    OPENED.append(build_sampler(cfg, shape, DType.float32, STOP_IDS, 5, save_early))
    return OPENED[-1]


def transfer_sampler(servers: Sequence[TransferSampler], path: Path) -> Sampler:
    """Its weights go by a wire, as over NCCL."""
    urls = [server.url for server in servers]
    cfg = VLLMServerRolloutConfig(
        servers=SamplerServersConfig(urls=urls, max_requests=4, request_timeout_seconds=10.0),
        sync_path=str(path),
        weights_by=WeightsBy.nccl,
    )
    spec = SamplerSpec(
        architecture(),
        DType.float32,
        STOP_IDS,
        max_length=81,
        max_response_length=LIMIT,
        num_topk=TOP_K,
        replay_routing=False,
        seed=5,
    )
    OPENED.append(ServerSampler(cfg, spec, nothing_to_save, join_by_wire))
    return OPENED[-1]


def enlarge_experts(model: Qwen3Moe) -> None:
    sparse_mlps(model)[1].experts.down_proj.data.mul_(1.1)


def sync(policy: Fixed, sampler: Sampler, version: int = 1) -> None:
    sync_weights(policy, sampler, version, CANARY)


def prompts(count: int = 5) -> list[Prompt]:
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, 320, (3 + i,), generator=generator).tolist() for i in range(count)]
    return [Prompt(i, prompt, "s", "c", "en") for i, prompt in enumerate(ids)]


def expected(model: Qwen3Moe, version: int = 1, num_responses: int = 2) -> list[Rollout]:
    """What the servers have to sample from a model."""
    found = []
    for prompt in prompts():
        for number in range(num_responses):
            seed = response_seed(5, prompt.index, number)
            params = {"seed": seed, "stop_token_ids": STOP_IDS, "max_tokens": LIMIT}
            drawn = draw(model, prompt.input_ids, params)
            ids = [token for token, _ in drawn]
            stopped = ids[-1] in STOP_IDS
            found.append(
                Rollout(
                    prompt,
                    number,
                    ids,
                    [float(logprobs[token]) for token, logprobs in drawn],
                    [logprobs.topk(TOP_K).indices.tolist() for _, logprobs in drawn],
                    FinishReason.stop if stopped else FinishReason.length,
                    version,
                )
            )
    return found


def test_two_servers_sample_from_the_policy_after_each_sync(
    servers: list[FakeSampler], tmp_path: Path
) -> None:
    sampler = sampler_of(servers, tmp_path)
    model = tmp_path / "model.safetensors"
    for file in (model, tmp_path / "sync-of-a-run-that-died-7.safetensors"):
        file.touch()
    with pytest.raises(RuntimeError, match="no complete weights"):
        sampler.sample(prompts(), 1)
    for server in servers:
        server.slowness = 0.02
    for version in (1, 2):
        policy = Fixed(version)
        sync(policy, sampler, version)
        found = in_order(sampler.sample(prompts(), 2))
        assert found == expected(policy.model, version)
        assert {r.finish_reason for r in found} == set(FinishReason)
        assert any(r.response_ids[0] not in r.topk_ids[0] for r in found)
        backwards = in_order(sampler.sample(prompts()[::-1], 2))
        assert found == backwards
        (file,) = set(tmp_path.iterdir()) - {model}  # and not that of the former version
        assert file.stem.endswith(f"-{version}")
    for server in servers:
        assert len(server.loads) == 2
        asked = [body["sampling_params"] for body in server.bodies]
        assert len(asked) > 5  # of 40; both take part
        wanted = NEUTRAL | {"max_tokens": LIMIT, "ignore_eos": True, "stop_token_ids": STOP_IDS}
        assert all(wanted.items() <= params.items() for params in asked)
        server.bodies.clear()
    assert len(list(sampler.sample(prompts(), 1, greedy=True))) == len(prompts())
    bodies = [body["sampling_params"] for server in servers for body in server.bodies]
    assert {params["temperature"] for params in bodies} == {0.0}
    OPENED.pop().close()
    assert list(tmp_path.iterdir()) == [model]


ANSWERED_ANEW = [
    *("hangs", "429", "500", "503", "dies mid-answer", "no JSON", "no choices"),
    *("one place short", "NaN", "other ids", "cut", "fewer candidates", "stale"),
]


@pytest.mark.parametrize("fault", ANSWERED_ANEW)
def test_a_fault_costs_a_request_and_no_prompt(
    fault: str, servers: list[FakeSampler], tmp_path: Path
) -> None:
    policy, sampler = Fixed(1), sampler_of(servers, tmp_path)
    sync(policy, sampler)
    for server in servers:
        server.script = [fault]
    assert in_order(sampler.sample(prompts(), 2)) == expected(policy.model)
    assert sum(server.outcomes[fault] for server in servers) >= 1
    assert all(len(server.loads) == 1 for server in servers)  # none was lost


def test_a_server_that_comes_back_gets_the_weights_before_it_answers(
    servers: list[FakeSampler], tmp_path: Path
) -> None:
    policy, sampler = Fixed(1), sampler_of(servers, tmp_path)
    sync(policy, sampler)
    lost = servers[0]
    lost.script = ["dies mid-answer"]
    lost.begin_anew()  # says random weights of its first answer, or takes the next question
    assert in_order(sampler.sample(prompts(), 2)) == expected(policy.model)
    soon(lambda: lost.version != "default" or not lost.answered)
    assert in_order(sampler.sample(prompts(), 2)) == expected(policy.model)
    assert len(lost.loads) == 2 and lost.loads[0] == lost.loads[1]
    assert len(servers[1].loads) == 1


def test_a_server_that_cannot_forget_old_keys_is_asked_again(
    servers: list[FakeSampler], tmp_path: Path
) -> None:
    policy, sampler = Fixed(1), sampler_of(servers[:1], tmp_path)
    servers[0].num_busy = 2
    sync(policy, sampler)
    assert len(servers[0].loads) == 3
    assert in_order(sampler.sample(prompts(), 2)) == expected(policy.model)


def test_a_server_that_ends_between_its_load_and_its_proof_loads_again(
    servers: list[FakeSampler], tmp_path: Path
) -> None:
    policy, sampler = Fixed(1), sampler_of(servers, tmp_path)
    sampler.load_weights(policy.named_weights(), 1)
    servers[0].begin_anew()
    torch.testing.assert_close(
        sampler.score(PROBES), policy.score(PROBES).expand(2, -1), rtol=0, atol=1e-4
    )
    assert [len(server.loads) for server in servers] == [2, 1]


def answered_with_weights(server: FakeSampler) -> int:
    """How many responses were of weights that it had loaded, and so counted."""
    return sum(version != "default" for version, _ in server.answered)


def double_embeddings(model: Qwen3Moe) -> None:
    model.model.embed_tokens.weight.data.mul_(2)


BROKEN: dict[Callable[[Qwen3Moe], None], str] = {
    enlarge_experts: r"came back, and with the weights of .*-1 its log-probabilities of the canary",
    double_embeddings: r"came back, and 1 of the weights of .*-1 .* model.embed_tokens.weight",
}


@pytest.mark.parametrize("fault", BROKEN, ids=lambda fault: fault.__name__)
def test_a_server_that_comes_back_broken_is_waited_for_and_not_sampled_from(
    fault: Callable[[Qwen3Moe], None], servers: list[FakeSampler], tmp_path: Path
) -> None:
    policy, saves = Fixed(1), [0]

    def save_early() -> bool:
        saves[0] += 1
        return True

    bounds = {"save_after_seconds": 1.0, "give_up_after_seconds": 3.0}
    sampler = sampler_of(servers[:1], tmp_path, save_early, **bounds)
    sync(policy, sampler)
    servers[0].spoil = fault
    servers[0].begin_anew()
    servers[0].answered.clear()
    with pytest.raises(ServersUnavailable, match=BROKEN[fault]):
        list(sampler.sample(prompts(), 2))
    assert saves[0] >= 1 and answered_with_weights(servers[0]) == 0


def test_another_server_answers_while_one_is_not_trusted_which_may_be_mended(
    servers: list[FakeSampler], tmp_path: Path
) -> None:
    policy, sampler = Fixed(1), sampler_of(servers, tmp_path)
    sync(policy, sampler)
    servers[0].spoil = enlarge_experts
    servers[0].begin_anew()
    assert in_order(sampler.sample(prompts(), 2)) == expected(policy.model)
    assert answered_with_weights(servers[0]) == 0 and servers[1].answered
    servers[0].spoil = lambda _: None
    servers[0].begin_anew()
    soon(lambda: bool(list(sampler.sample(prompts(), 2)) and answered_with_weights(servers[0])))


def test_no_usable_answer_stops_the_run(servers: list[FakeSampler], tmp_path: Path) -> None:
    sampler = sampler_of(servers, tmp_path)
    sync(Fixed(1), sampler)
    for server in servers:
        server.script = ["NaN"] * 100
    with pytest.raises(InputError, match=r"does not work: \d log-probabilities of \d tokens"):
        list(sampler.sample(prompts(), 2))


def test_an_engine_that_hangs_behind_a_healthy_server_is_away_and_no_prompt_is_lost(
    servers: list[FakeSampler], tmp_path: Path
) -> None:
    policy = Fixed(1)
    saves: list[int] = []

    def save_early() -> bool:
        saves.append(len(saves))
        for server in servers:
            server.script = []
        return True

    bounds = {
        "request_timeout_seconds": 1.0,
        "save_after_seconds": 5.0,
    }  # longer than a busy machine waits
    sampler = sampler_of(servers, tmp_path, save_early, **bounds)
    sync(policy, sampler)
    for server in servers:
        server.script = ["hangs"] * 1000
    assert in_order(sampler.sample(prompts(), 2)) == expected(policy.model)
    assert saves == [0]


def test_drained_responses_are_of_the_weights_that_they_were_asked_of(
    servers: list[FakeSampler], tmp_path: Path
) -> None:
    sampler = sampler_of(servers, tmp_path)
    sync(Fixed(1), sampler)
    for server in servers:
        server.slowness = 0.05
    asked = sampler.sample(prompts(), 2)
    sampler.drain()
    sync(Fixed(2), sampler, version=2)
    assert in_order(asked) == expected(Fixed(1).model)
    sampler.drain()  # once more changes nothing


def upside_down(stream: Stream) -> Stream:
    """Same names and shapes, and other numbers in one weight."""
    for name, weight in stream:
        turned = weight.flip(0) if name.endswith("layers.1.self_attn.v_proj.weight") else weight
        yield name, turned.contiguous()


def outlast(servers: list[FakeSampler], path: Path, *listening: int) -> tuple[int, list[Rollout]]:
    """Sample on the second of two ranks; how often each was to save, and the rollouts."""
    for each in listening:
        os.close(each)
    saves: list[int] = []

    def save_early() -> bool:
        dist.barrier()  # as whoever saves: every rank is here
        saves.append(len(saves))
        return True

    bounds = {"request_timeout_seconds": 1.0, "save_after_seconds": 1.5}
    sampler = sampler_of(servers, path, save_early, **bounds)
    sync(Fixed(1), sampler)
    found = list(sampler.sample(prompts() if dist.get_rank() == 1 else [], 2))
    return len(saves), in_order(found)


def test_ranks_wait_together_where_one_has_all_its_responses(
    servers: list[FakeSampler], tmp_path: Path
) -> None:
    servers[0].script = ["hangs"] * 12
    shares = run_on_ranks(2, outlast, servers[:1], tmp_path, *sockets(servers))
    assert shares[0][0] == shares[1][0] >= 1  # once a wait, of which a busy machine has more
    assert len(servers[0].loads) == 1
    assert shares[0][1] == [] and shares[1][1] == expected(Fixed(1).model)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (without_one, "1 weights are missing: .*k_proj"),
        (with_one_twice, "experts.gate_up_proj came twice"),
        (upside_down, "the canary's log-probabilities differ by"),
    ],
)
def test_a_sync_that_is_not_complete_or_not_right_is_caught(
    fault: Callable[[Stream], Stream], said: str, servers: list[FakeSampler], tmp_path: Path
) -> None:
    sampler, policy = sampler_of(servers, tmp_path), Fixed(2)
    sync(Fixed(1), sampler)
    stream = fault(policy.named_weights())
    policy.named_weights = lambda *_: stream  # type: ignore[method-assign]
    with pytest.raises((InputError, WeightSyncError), match=said):
        sync(policy, sampler, version=2)


def test_one_server_that_only_says_that_it_loads_is_caught(
    servers: list[FakeSampler], tmp_path: Path
) -> None:
    sampler = sampler_of(servers, tmp_path)
    sync(Fixed(1), sampler)
    servers[1].deaf = True
    with pytest.raises(WeightSyncError, match=r"1 of \d+ weights .*: model.embed_tokens.weight"):
        sync(Fixed(2), sampler, version=2)


def test_a_server_that_loads_slowly_reads_the_file_to_its_end(
    servers: list[FakeSampler], tmp_path: Path
) -> None:
    policy, files = Fixed(1), []

    def save_early() -> bool:
        (file,) = tmp_path.iterdir()
        files.append((file.stat().st_ino, file.stat().st_mtime_ns))
        return True

    bounds = {"request_timeout_seconds": 20.0, "save_after_seconds": 0.5}
    sampler = sampler_of(servers, tmp_path, save_early, **bounds)
    servers[0].load_seconds = 2.0
    start = time.perf_counter()
    found = sync_weights(policy, sampler, 1, CANARY)
    seconds = time.perf_counter() - start
    (file,) = tmp_path.iterdir()
    # Saved once a wait; a machine that is busy may wait for the canary too.
    assert set(files) == {(file.stat().st_ino, file.stat().st_mtime_ns)}
    assert len(servers[0].loads) == 1
    # All bytes went, and the wait is part of the time that they took.
    num_gib = sum(weight.nbytes for _, weight in policy.named_weights()) / 2**30
    assert num_gib / seconds <= found["rollout/sync_gib_per_s"] <= num_gib / 2.0
    assert in_order(sampler.sample(prompts(), 2)) == expected(policy.model)


def test_weights_that_are_synced_again_are_proved_again(
    servers: list[FakeSampler], tmp_path: Path
) -> None:
    sampler = sampler_of(servers, tmp_path)
    for _ in range(2):  # as where convergence is measured before a step
        sync(Fixed(1), sampler)
    assert all(len(server.loads) == 1 for server in servers)
    for server in servers:
        server.spoil = enlarge_experts
        server.begin_anew()
    with pytest.raises(WeightSyncError, match="the canary's log-probabilities differ by"):
        sync(Fixed(1), sampler)


def test_a_server_with_a_short_window_is_refused(
    servers: list[FakeSampler], tmp_path: Path
) -> None:
    servers[0].window = 72 + LIMIT
    with pytest.raises(InputError, match=rf"takes sequences of 80 .* --max-model-len {81}"):
        sync(Fixed(1), sampler_of(servers, tmp_path))


def test_the_worker_refuses_a_file_before_it_touches_a_weight(
    servers: list[FakeSampler], tmp_path: Path
) -> None:
    sync(Fixed(1), sampler_of(servers, tmp_path))
    (file,) = tmp_path.glob("*.safetensors")
    with pytest.raises(InputError, match=r"has \d+ weights, and the trainer wrote 3"):
        Receiver().load_checkpoint(str(file), "3")
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(InputError, match="cut short"):
        Receiver().load_checkpoint(str(file), "3")


@pytest.fixture
def takers() -> Iterator[list[TransferSampler]]:
    """Servers that take weights by transfer."""
    found = [TransferSampler(), TransferSampler()]
    yield found
    stop_all(found)


def sample_by_transfer(
    takers: list[TransferSampler], path: Path, *listening: int
) -> list[list[Rollout]]:
    for each in listening:
        os.close(each)
    sampler = transfer_sampler(takers, path)
    found = []
    for version in (1, 2):
        sync(Fixed(version), sampler, version)
        mine = prompts()[dist.get_rank() :: dist.get_world_size()]
        found.append(in_order(sampler.sample(mine, 2)))
        dist.barrier()
    sampler.close()
    return found


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_weights_cross_to_the_processes_of_servers_without_the_file(
    num_ranks: int, takers: list[TransferSampler], tmp_path: Path
) -> None:
    shares = run_on_ranks(num_ranks, sample_by_transfer, takers, tmp_path, *sockets(takers))
    for number, version in enumerate((1, 2)):
        found = in_order(rollout for share in shares for rollout in share[number])
        assert found == expected(Fixed(version).model, version)
    for taker in takers:
        assert (taker.num_taken, taker.num_loaded) == (2, 0)
        assert [each.rpartition("-")[2] for each in taker.loads] == ["1", "2"]
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_comes_back_between_syncs_gets_the_file_and_is_met_again(
    takers: list[TransferSampler], tmp_path: Path
) -> None:
    sampler = transfer_sampler(takers, tmp_path)
    sync(Fixed(1), sampler)
    takers[0].script = ["dies mid-answer"]
    takers[0].begin_anew()
    assert in_order(sampler.sample(prompts(), 2)) == expected(Fixed(1).model)
    soon(lambda: bool(takers[0].num_loaded and takers[0].version != "default"))
    for version in (2, 3):  # the first finds that its group is gone
        sync(Fixed(version), sampler, version)
    assert in_order(sampler.sample(prompts(), 2)) == expected(Fixed(3).model, 3)
    assert [(t.num_taken, t.num_loaded) for t in takers] == [(2, 2), (3, 0)]


def test_a_server_that_is_lost_in_a_transfer_gets_the_file_and_holds_up_no_other(
    takers: list[TransferSampler], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sampler = transfer_sampler(takers, tmp_path)
    takers[0].leave_after = 5
    sync(Fixed(1), sampler)
    assert [(t.num_taken, t.num_loaded) for t in takers] == [(0, 1), (1, 0)]
    assert f"{takers[0].url} was lost on the way, and gets the file" in capsys.readouterr().out
    assert in_order(sampler.sample(prompts(), 2)) == expected(Fixed(1).model)
    sync(Fixed(2), sampler, 2)
    assert [(t.num_taken, t.num_loaded) for t in takers] == [(1, 1), (2, 0)]


def test_a_server_that_cannot_be_met_gets_the_file_which_is_said_once(
    takers: list[TransferSampler], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    takers[0].is_configured = False
    sampler = transfer_sampler(takers, tmp_path)
    for version in (1, 2):
        sync(Fixed(version), sampler, version)
    assert [(t.num_taken, t.num_loaded) for t in takers] == [(0, 2), (2, 0)]
    (said,) = [line for line in capsys.readouterr().out.splitlines() if "NCCL" in line]
    assert f"{takers[0].url} cannot be met over NCCL, and gets its weights by {tmp_path}" in said
    assert "Weight transfer not configured" in said


def test_a_transfer_that_is_not_complete_or_not_right_is_caught(
    takers: list[TransferSampler], tmp_path: Path
) -> None:
    sampler, policy = transfer_sampler(takers, tmp_path), Fixed(2)
    sync(Fixed(1), sampler)
    takers[1].spoil = double_embeddings
    with pytest.raises(WeightSyncError, match=r"1 of \d+ weights .*: model.embed_tokens.weight"):
        sync(policy, sampler, 2)
    stream = without_one(policy.named_weights())
    policy.named_weights = lambda *_: stream  # type: ignore[method-assign]
    with pytest.raises(InputError, match=r"1 weights are missing: .*k_proj"):
        sync(policy, sampler, 3)


NUM_STEPS = 5


def config(
    world: World, out: Path, servers: list[FakeSampler], num_ranks: int, *more: str
) -> TrainConfig:
    return compose_config(
        "quickstart_opd",
        f"root={world.root}",
        f"output_dir={out}",
        "rollout@stage.rollout=vllm_server",
        f"stage.rollout.servers.urls=[{','.join(server.url for server in servers)}]",
        "stage.rollout.servers.max_requests=4",
        "stage.rollout.servers.request_timeout_seconds=5",
        "stage.rollout.servers.save_after_seconds=0.3",
        "stage.rollout.servers.give_up_after_seconds=30",
        "stage.cascade.first.num_steps=3",
        "stage.cascade.second.num_steps=2",
        "stage.objective=sampled",
        "stage.global_batch_size=4",
        "stage.max_response_length=6",
        "data.max_tokens_per_microbatch=128",
        "checkpoint.save_every=100",
        f"parallel.expert_parallel_size={num_ranks}",
        "logging.console_every=100",
        *more,
    )


def sockets(servers: Sequence[FakeSampler]) -> list[int]:
    """Descriptors of all that listen; a fork has to close them."""
    return [server.socket for server in servers if server.is_up]


AHEAD = "stage.rollout.max_staleness=1"


@pytest.mark.long
@pytest.mark.parametrize("more", [[], [AHEAD]], ids=["on-policy", "one step ahead"])
def test_a_run_whose_servers_end_and_come_back_learns_the_same(
    more: list[str], world: World, servers: list[FakeSampler], tmp_path: Path
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for server in servers:
        server.slowness = 0.05
    run_on_ranks(2, distil, config(world, whole, servers, 2, *more), *sockets(servers))

    def end_and_come_back() -> None:
        soon(lambda: num_steps_of(parts) >= 2)
        for server in servers:
            server.stop()
            server.begin_anew()
        soon(lambda: len(saved_steps(parts)) > 0)
        for server in servers:
            server.start()

    absence = threading.Thread(target=end_and_come_back)
    absence.start()
    run_on_ranks(2, distil, config(world, parts, servers, 2, *more), *sockets(servers))
    absence.join()
    assert learnt(parts) == learnt(whole)
    steps = learnt(whole)[0]
    assert [step["step"] for step in steps] == list(range(1, NUM_STEPS + 1))
    late = 1 if more else 0
    assert [step["rollout/staleness"] for step in steps] == [0, *[late] * (NUM_STEPS - 1)]
    assert all(step["kl/sampler_mismatch"] < 1e-5 for step in steps[: 1 if more else NUM_STEPS])
    if more:
        assert all(step["kl/sampler_mismatch"] > 1e-5 for step in steps[1:])


@pytest.mark.long
def test_one_step_ahead_the_weights_are_one_update_older(
    world: World, servers: list[FakeSampler], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opd, "NUM_ANSWERED", 0)  # only what is trained on is asked for
    versions = {}
    for name, more in (("with", []), ("ahead", [AHEAD])):
        for server in servers:
            server.answered.clear()
        cfg = config(world, tmp_path / name, servers, 1, *more)
        run_on_ranks(1, distil, cfg, *sockets(servers))
        answered = [pair for server in servers for pair in server.answered]
        versions[name] = {
            tuple(prompt): int(version.rpartition("-")[2]) for version, prompt in answered
        }
        assert len(answered) == NUM_STEPS * 4 * 2
    assert versions["with"].keys() == versions["ahead"].keys()
    for prompt, version in versions["with"].items():
        assert versions["ahead"][prompt] == max(0, version - 1)


@pytest.mark.long
def test_a_run_replays_the_routing_that_its_servers_name(
    world: World, servers: list[FakeSampler], tmp_path: Path
) -> None:
    replay = "stage.rollout.replay_routing=true"
    cfg = config(world, tmp_path / "unnamed", servers, 1, replay)
    with pytest.raises(AssertionError, match=r"no experts to replay \(start servers with --enable"):
        run_on_ranks(1, distil, cfg, *sockets(servers))
    for server in servers:
        server.names_experts = True
    for out, more in (("without", []), ("with", [replay])):
        cfg = config(world, tmp_path / out, servers, 1, *more)
        run_on_ranks(1, distil, cfg, *sockets(servers))
    plain, replayed = (learnt(tmp_path / out)[0] for out in ("without", "with"))
    for one, other in zip(plain, replayed, strict=True):
        assert other["moe/replay_mismatch"] == 0
        assert one["kl/reverse"] == pytest.approx(other["kl/reverse"], rel=1e-5)


@pytest.mark.long
def test_a_run_that_gave_up_on_its_samplers_is_saved_and_resumes(
    world: World, servers: list[FakeSampler], tmp_path: Path
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    server = servers[:1]
    run_on_ranks(1, distil, config(world, whole, server, 1), *sockets(servers))
    server[0].slowness = 0.05

    def end() -> None:
        soon(lambda: num_steps_of(parts) >= 2)
        server[0].stop()

    absence = threading.Thread(target=end)
    absence.start()
    give_up = [  # and no early save of a busy machine before
        "stage.rollout.servers.save_after_seconds=3",
        "stage.rollout.servers.give_up_after_seconds=5",
    ]
    with pytest.raises(
        AssertionError, match=r"ServersUnavailable: no answer for \d+ s from the sampler's"
    ):
        run_on_ranks(1, distil, config(world, parts, server, 1, *give_up), *sockets(servers))
    absence.join()
    (saved,) = saved_steps(parts)
    assert saved >= 2
    server[0].begin_anew()
    server[0].start()
    run_on_ranks(1, distil, config(world, parts, server, 1), *sockets(servers))
    assert learnt(parts) == learnt(whole)
