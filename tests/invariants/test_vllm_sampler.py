"""vLLM as the sampler: the policy's distribution, proved after every sync."""

import importlib.util
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from marco_train.errors import WeightSyncError
from marco_train.inference import engine as vllm_engine
from marco_train.inference.engine import VLLMEngine
from marco_train.rollout import vllm
from marco_train.rollout.base import in_order
from marco_train.types import FinishReason, Rollout
from tests.helpers.ranks import run_on_ranks
from tests.helpers.samplers import (
    PROBES,
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

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"
)


def sampled_ids(rollouts: list[Rollout]) -> list[list[int]]:
    return [r.response_ids for r in rollouts]


def check_samples() -> None:
    sampler = sampler_of("vllm", top_k=3)
    with pytest.raises(RuntimeError, match="no complete weights"):
        sampler.sample(prompts(), 1)
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
    sampler.close()


def test_responses_are_the_policys_and_depend_on_nothing_else() -> None:
    run_on_ranks(1, check_samples)


def frequencies(backend: str, count: int) -> tuple[Counter[int], Tensor]:
    """First tokens of many samples of one prompt, and what they should be drawn from."""
    policy = spread(3)
    sampler = sampler_of(backend, limit=1, batch_size=256)
    sync(policy, sampler)
    (prompt,) = prompts(1)
    found = Counter(r.response_ids[0] for r in sampler.sample([prompt], count))
    with torch.no_grad():
        ids = torch.tensor([prompt.input_ids])
        hidden = policy.model(ids, torch.arange(ids.shape[1])[None])
        return found, policy.model.logits(hidden)[-1].softmax(-1)


@pytest.mark.parametrize("backend", ["native", "vllm"])
def test_tokens_are_as_frequent_as_the_policy_makes_them(backend: str) -> None:
    count = 4000
    ((found, wanted),) = run_on_ranks(1, frequencies, backend, count)
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


FAULTS: dict[Callable[[Stream], Stream], str] = {
    without_one: "1 weights are missing: .*k_proj",
    with_one_twice: "experts.3.up_proj.weight came twice",
    cut: r"gate.weight is \[7, 32\], not \[8, 32\]",
    renamed: "q_normal.* is not of this model",
    transposed: "the canary's log-probabilities differ by",
    skipped: "the canary's log-probabilities differ by",
}


def check_fault(fault: Callable[[Stream], Stream]) -> str:
    sampler, policy = sampler_of("vllm"), spread(2)
    sync(spread(1), sampler)
    stream = fault(policy.named_weights())
    policy.named_weights = lambda: stream  # type: ignore[method-assign]
    with pytest.raises((ValueError, RuntimeError, WeightSyncError)) as caught:
        sync(policy, sampler, version=2)
    sampler.close()
    return str(caught.value)


def check_faults() -> list[str]:
    return [check_fault(fault) for fault in FAULTS]


def test_a_sync_that_is_not_complete_or_not_right_is_caught() -> None:
    (said,) = run_on_ranks(1, check_faults)
    for found, message in zip(said, FAULTS.values(), strict=True):
        assert re.search(message, found), said


class CachingEngine(VLLMEngine):
    """Keeps keys of prompts that begin alike, until the weights change."""

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named | {"prefix_caching": True})


class StaleEngine(CachingEngine):
    """Keeps them for good."""

    def forget_keys(self) -> None:
        pass


def sync_twice(engine: type[VLLMEngine], forgets_experts: bool) -> str:
    """What the second sync says, where vLLM is left to itself in some way."""
    monkeypatch = pytest.MonkeyPatch()  # in this process, which ends with the test
    monkeypatch.setattr(vllm, "VLLMEngine", engine)
    if not forgets_experts:
        monkeypatch.setattr(vllm_engine, "forget_packed_experts", lambda _: None)
    sampler = sampler_of("vllm")
    try:
        for version in (1, 2):
            sync(spread(version), sampler, version)
    except WeightSyncError as error:
        return str(error)
    return "fine"


@pytest.mark.parametrize(
    ("engine", "forgets_experts", "step"),
    [
        (VLLMEngine, False, 1),  # the first sync finds those of random weights
        (StaleEngine, True, 2),
        (CachingEngine, True, None),
    ],
    ids=["packed experts", "prefix cache", "prefix cache with a reset"],
)
def test_the_canary_sees_what_vllm_keeps_of_old_weights(
    engine: type[VLLMEngine], forgets_experts: bool, step: int | None
) -> None:
    (said,) = run_on_ranks(1, sync_twice, engine, forgets_experts)
    caught = f"step {step}: the canary's log-probabilities differ by"
    assert said.startswith("fine" if step is None else caught)


def change_after_sync() -> Tensor:
    """How far the sampler's scores move when the policy's weights change in place."""
    policy, sampler = spread(1), sampler_of("vllm")
    sync(policy, sampler)
    probes = PROBES
    before = sampler.score(probes)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.mul_(3.0).add_(1.0)
    return (sampler.score(probes) - before).abs().max()


def test_the_engine_keeps_none_of_the_policys_tensors() -> None:
    (moved,) = run_on_ranks(1, change_after_sync)
    assert moved == 0


def sample_my_share() -> list[Any]:
    sampler = sampler_of("vllm")
    sync(spread(1), sampler)
    mine = prompts()[dist.get_rank() :: dist.get_world_size()]
    return in_order(sampler.sample(mine, 2))


def test_any_number_of_ranks_samples_the_same() -> None:
    (whole,) = run_on_ranks(1, sample_my_share)
    shares = run_on_ranks(2, sample_my_share)
    assert whole == in_order(shares[0] + shares[1])
