"""vLLM as the sampler: the policy's distribution, proved after every sync."""

import functools
import math
import re
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from marco_train.errors import WeightSyncError
from marco_train.inference import engine as vllm_engine
from marco_train.inference.engine import VLLMEngine
from marco_train.models.weights import meta_model, weight_shapes
from marco_train.rollout import vllm
from marco_train.rollout.base import Sampler, in_order
from marco_train.rollout.sync import sync_weights
from marco_train.types import FinishReason, Rollout
from tests.helpers.ranks import Rank, run_on_ranks
from tests.helpers.samplers import (
    CANARY,
    PROBES,
    SHAPE,
    STOP_IDS,
    Stream,
    prompts,
    sampler_of,
    spread,
    sync,
    transposed,
    with_one_twice,
    without_one,
)

pytestmark = pytest.mark.vllm


@functools.cache
def shared() -> Sampler:
    """One engine for all tests that give it weights first, kept by the rank that makes it."""
    return sampler_of("vllm", top_k=3)


def check_samples() -> None:
    sampler = shared()
    for version in (1, 2):  # a second set of weights takes the place of the first
        policy = spread(version)
        sync(policy, sampler, version)
        found = in_order(sampler.sample(prompts(), 4))
        assert len(found) == 24
        for r in found:
            logprobs = policy.score([r.input_ids])[len(r.prompt.input_ids) - 1 :]
            torch.testing.assert_close(
                torch.tensor(r.sampler_logprobs), logprobs, rtol=1e-4, atol=1e-4
            )
            assert r.weight_version == version
            assert not set(r.response_ids[:-1]) & set(STOP_IDS)
            stopped = r.response_ids[-1] in STOP_IDS
            assert r.finish_reason is (FinishReason.stop if stopped else FinishReason.length)
            assert stopped or len(r.response_ids) == 12
            ids = torch.tensor([r.input_ids])
            with torch.no_grad():
                hidden = policy.model(ids, torch.arange(ids.shape[1])[None])
                logits = policy.model.logits(hidden)[len(r.prompt.input_ids) - 1 : -1]
            assert r.topk_ids == logits.topk(3).indices.tolist()
        assert {r.finish_reason for r in found} == set(FinishReason)
        assert len({tuple(r.response_ids) for r in found}) > 12
    again = in_order(sampler.sample(prompts(), 4))
    backwards = in_order(sampler.sample(prompts()[::-1], 4))
    alone = [r for p in prompts() for r in in_order(sampler.sample([p], 4))]
    assert found == again == backwards == alone
    for r in sampler.sample(prompts(), 1, greedy=True):
        assert r.response_ids == [likeliest for likeliest, *_ in r.topk_ids]


def test_responses_are_the_policys_and_depend_on_nothing_else(rank: Rank) -> None:
    rank.call(check_samples)


def frequencies(backend: str, count: int) -> tuple[Counter[int], Tensor]:
    """First tokens of many samples of one prompt, and what they should be drawn from."""
    policy = spread(3)
    sampler = sampler_of(backend, limit=1, batch_size=256)
    (prompt,) = prompts(1)
    with pytest.raises(RuntimeError, match="no complete weights"):
        sampler.sample([prompt], 1)
    sync(policy, sampler)
    found = Counter(r.response_ids[0] for r in sampler.sample([prompt], count))
    with torch.no_grad():
        ids = torch.tensor([prompt.input_ids])
        hidden = policy.model(ids, torch.arange(ids.shape[1])[None])
        wanted = policy.model.logits(hidden)[-1].softmax(-1)
    sampler.close()
    return found, wanted


@pytest.mark.parametrize("backend", ["native", "vllm"])
def test_tokens_are_as_frequent_as_the_policy_makes_them(backend: str, rank: Rank) -> None:
    count = 4000
    found, wanted = rank.call(frequencies, backend, count)
    expected = (wanted * count).tolist()
    common = [i for i, value in enumerate(expected) if value >= 5]
    rest = count - sum(found[i] for i in common), count - sum(expected[i] for i in common)
    cells = [(found[i], expected[i]) for i in common] + [rest]
    statistic = sum((seen - value) ** 2 / value for seen, value in cells)
    degrees = len(cells) - 1
    assert degrees > 20
    # The 99.9 % quantile of chi-square, after Wilson and Hilferty. The seed is fixed: no luck.
    bound = degrees * (1 - 2 / (9 * degrees) + 3.09 * (2 / (9 * degrees)) ** 0.5) ** 3
    assert statistic < bound


def cut(stream: Stream) -> Stream:
    return ((n, w[:-1] if n.endswith("0.mlp.gate.weight") else w) for n, w in stream)


def renamed(stream: Stream) -> Stream:
    return ((name.replace("q_norm", "q_normal"), weight) for name, weight in stream)


def skipped(stream: Stream) -> Stream:
    """All names, but one weight still as it was."""
    for name, weight in stream:
        stale = name.endswith("layers.0.self_attn.q_proj.weight")
        yield name, dict(spread(1).named_weights())[name] if stale else weight


INCOMPLETE: dict[Callable[[Stream], Stream], str] = {
    without_one: "1 weights are missing: .*k_proj",
    with_one_twice: "experts.gate_up_proj came twice",
    cut: r"gate.weight is \[7, 32\], not \[8, 32\]",
    renamed: "q_normal.* is not of this model",
}


def refusal_of(fault: Callable[[Stream], Stream], sampler: Sampler) -> str:
    """What a sync says that goes wrong after one that did not."""
    sync(spread(1), sampler)
    policy = spread(2)
    stream = fault(policy.named_weights())
    policy.named_weights = lambda *_: stream  # type: ignore[method-assign]
    with pytest.raises((ValueError, RuntimeError, WeightSyncError)) as caught:
        sync(policy, sampler, version=2)
    return str(caught.value)


def refusal_of_incomplete(fault: Callable[[Stream], Stream]) -> str:
    """By an engine of its own, which vLLM may leave of no use."""
    sampler = sampler_of("vllm")
    said = refusal_of(fault, sampler)
    sampler.close()
    return said


@pytest.mark.parametrize("fault", INCOMPLETE, ids=lambda fault: fault.__name__)
def test_a_sync_that_is_not_complete_is_caught(
    fault: Callable[[Stream], Stream], rank: Rank
) -> None:
    said = rank.call(refusal_of_incomplete, fault)
    assert re.search(INCOMPLETE[fault], said), said


def refusal_of_wrong(fault: Callable[[Stream], Stream]) -> str:
    return refusal_of(fault, shared())


@pytest.mark.parametrize("fault", [transposed, skipped], ids=lambda fault: fault.__name__)
def test_a_complete_sync_of_other_weights_is_caught(
    fault: Callable[[Stream], Stream], rank: Rank
) -> None:
    said = rank.call(refusal_of_wrong, fault)
    assert said.startswith("step 2: the canary's log-probabilities differ by"), said


def sync_with_old_experts() -> str:
    """What a sync says where vLLM keeps the experts that it packed."""
    sync(spread(1), shared())
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(vllm_engine, "forget_packed_experts", lambda _: None)
        with pytest.raises(WeightSyncError) as caught:
            sync(spread(2), shared(), version=2)
    return str(caught.value)


def test_the_canary_sees_experts_that_vllm_keeps_of_old_weights(rank: Rank) -> None:
    said = rank.call(sync_with_old_experts)
    assert said.startswith("step 2: the canary's log-probabilities differ by")


def start_beside_a_trainer(num_free: float) -> int:
    """What vLLM asks for of a GPU of 85 GB; its own check, which refuses a GPU that has less."""
    from vllm.v1.worker.utils import request_memory

    engine = shared()._engine  # type: ignore[attr-defined]
    cache = engine._llm.llm_engine.vllm_config.cache_config
    gpu = SimpleNamespace(total_memory=85e9, free_memory=num_free, device_="cuda:0")
    return int(request_memory(gpu, cache))


def test_an_engine_starts_on_a_gpu_that_a_trainer_fills(rank: Rank) -> None:
    assert rank.call(start_beside_a_trainer, 10e9) <= 1e9


def sync_with_a_norm_off() -> tuple[float, str]:
    """The share that a sync proves, and what one says after which vLLM holds another norm."""
    sampler = shared()
    found = sync_weights(spread(1), sampler, 1, CANARY)
    replace = vllm_engine.replace_weights

    def off(model: Any, *given: Any, **named: Any) -> None:
        replace(model, *given, **named)
        model.model.layers[1].self_attn.k_norm.weight.data[3] += 1e-6

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(vllm_engine, "replace_weights", off)
        with pytest.raises(WeightSyncError) as caught:
            sync(spread(2), sampler, version=2)
    return found["rollout/sync_proved"], str(caught.value)


def test_a_norm_in_vllm_that_is_hardly_off_is_named_and_embeddings_and_norms_are_proved(
    rank: Rank,
) -> None:
    proved, said = rank.call(sync_with_a_norm_off)
    shapes = weight_shapes(meta_model(SHAPE))
    kept = [n for n in shapes if n.endswith("norm.weight") or "embed_tokens" in n]
    sizes = {n: math.prod(shape) for n, shape in shapes.items()}
    assert proved == sum(sizes[n] for n in kept) / sum(sizes.values())
    assert said == (
        f"step 2: 1 of {len(shapes)} weights of the sampler are not the policy's: "
        "model.layers.1.self_attn.k_norm.weight"
    )


class LostGroup:
    """In place of NCCL: gives weights in turn, so many."""

    def __init__(self, weights: list[tuple[str, Tensor]], until: int) -> None:
        self._weights = iter([weight for _, weight in weights[:until]])

    def broadcast(self, tensor: Tensor, src: int, stream: object) -> None:
        tensor.copy_(next(self._weights))


def take_by_transfer(model: Any, weights: Stream, config: Any, until: int = 10_000) -> None:
    """Have vLLM's own class for a worker receive weights, in place of `replace_weights`."""
    from vllm.config import set_current_vllm_config
    from vllm.config.weight_transfer import WeightTransferConfig
    from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine

    vllm_engine.forget_packed_experts(model)
    device = torch.device("cpu")
    engine = NCCLWeightTransferEngine(WeightTransferConfig(backend="nccl"), config, device, model)
    sent = list(weights)
    engine.model_update_group = LostGroup(sent, until)
    info = {
        "names": [name for name, _ in sent],
        "dtype_names": ["float32"] * len(sent),
        "shapes": [list(weight.shape) for _, weight in sent],
    }
    with pytest.MonkeyPatch.context() as monkeypatch, set_current_vllm_config(config):
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
        engine.start_weight_update()
        engine.receive_weights(engine.parse_update_info(info))
        engine.finish_weight_update()


def sync_by_transfer() -> None:
    """Sync by vLLM's weight transfer, and from a stream after one that broke off."""
    sampler, whole = shared(), vllm_engine.replace_weights
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(vllm_engine, "replace_weights", take_by_transfer)
        for version in (1, 2):
            sync(spread(version), sampler, version)
        for until in (3, 10):  # between two of the matrices that vLLM joins, and of an expert
            broken = functools.partial(take_by_transfer, until=until)
            monkeypatch.setattr(vllm_engine, "replace_weights", broken)
            with pytest.raises(StopIteration):
                sync(spread(3), sampler, version=3)
            monkeypatch.setattr(vllm_engine, "replace_weights", whole)
            sync(spread(4), sampler, version=4)


def test_vllms_weight_transfer_takes_a_stream_and_leaves_nothing_where_it_breaks_off(
    rank: Rank,
) -> None:
    rank.call(sync_by_transfer)


class CachingEngine(VLLMEngine):
    """Keeps keys of prompts that begin alike, until the weights change."""

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named | {"prefix_caching": True})


def sync_with_old_keys() -> str:
    """What a sync says where vLLM keeps keys, once others of the same engine were fine."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(vllm, "VLLMEngine", CachingEngine)
        sampler = sampler_of("vllm")
        for version in (1, 2):
            sync(spread(version), sampler, version)
        monkeypatch.setattr(CachingEngine, "forget_keys", lambda _: None)
        with pytest.raises(WeightSyncError) as caught:
            sync(spread(3), sampler, version=3)
    sampler.close()
    return str(caught.value)


def test_the_canary_sees_keys_that_vllm_keeps_of_old_weights(rank: Rank) -> None:
    said = rank.call(sync_with_old_keys)
    assert said.startswith("step 3: the canary's log-probabilities differ by")


def change_after_sync() -> Tensor:
    """How far the sampler's scores move when the policy's weights change in place."""
    policy, sampler = spread(1), shared()
    sync(policy, sampler)
    before = sampler.score(PROBES)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.mul_(3.0).add_(1.0)
    return (sampler.score(PROBES) - before).abs().max()


def test_the_engine_keeps_none_of_the_policys_tensors(rank: Rank) -> None:
    assert rank.call(change_after_sync) == 0


def sample_my_share() -> list[Rollout]:
    sampler = shared()
    sync(spread(1), sampler)
    mine = prompts()[dist.get_rank() :: dist.get_world_size()]
    return in_order(sampler.sample(mine, 2))


@pytest.mark.long
def test_any_number_of_ranks_samples_the_same(rank: Rank) -> None:
    whole = rank.call(sample_my_share)
    shares = run_on_ranks(2, sample_my_share)
    assert whole == in_order(shares[0] + shares[1])
