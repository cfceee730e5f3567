"""Engines of vLLM that share the student's experts do what one with all of them does.

vLLM's collectives for them are replaced here, as `tests/helpers/shared_experts.py` says.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from marco_train.distributed import expert_parallel_group
from marco_train.errors import WeightSyncError
from marco_train.inference import engine as vllm_engine
from marco_train.models import weights
from marco_train.models.weights import random_model
from marco_train.rollout.base import Sampler, in_order
from marco_train.types import Prompt, Rollout
from tests.helpers.ranks import Rank, run_on_ranks
from tests.helpers.samplers import SHAPE, Fixed, prompts, sampler_of, spread, sync
from tests.helpers.shared_experts import run_opd_with_shared_experts, share_experts_on_cpu
from tests.helpers.vllm_runs import IN_PROCESS, distil
from tests.helpers.world import World

pytestmark = [pytest.mark.vllm, pytest.mark.long]

# Prompts of two ranks: none and all, uneven, none at all.
SPLITS = [([], [0, 1, 2, 3, 4, 5]), ([4, 1, 0, 5], [2, 3]), ([], [])]


def shared_sampler() -> Sampler:
    share_experts_on_cpu()
    return sampler_of("vllm", top_k=3, expert_parallel=True)


def spread_over(group_size: int, seed: int) -> Fixed:
    """The model of `spread`, with experts over neighbouring ranks."""
    model = random_model(SHAPE, torch.float32, seed, expert_parallel_group(group_size))
    with torch.no_grad():
        model.head.mul_(4)
    return Fixed(model)


def of_all_experts() -> list[list[Rollout]]:
    """What an engine that holds all experts samples, by version of the weights."""
    sampler = sampler_of("vllm", top_k=3)
    found = []
    for version in (1, 2):
        sync(spread(version), sampler, version)
        found.append(in_order(sampler.sample(prompts(), 2)))
    return found


def of_shared_experts() -> list[list[Rollout]]:
    """What this rank samples of each split, with experts that the policy shares and then not."""
    sampler = shared_sampler()
    found = []
    for version, group_size in ((1, 2), (2, 1)):
        with pytest.MonkeyPatch.context() as monkeypatch:
            if group_size == 2:  # a sync moves no experts
                monkeypatch.setattr(weights, "_gather_experts", None)
            sync(spread_over(group_size, version), sampler, version)
        for split in SPLITS:
            mine = [prompts()[i] for i in split[dist.get_rank()]]
            found.append(in_order(sampler.sample(mine, 2)))
    return found


def test_engines_that_share_experts_sample_what_one_with_all_of_them_does(rank: Rank) -> None:
    wanted = rank.call(of_all_experts)
    first, second = run_on_ranks(2, of_shared_experts)
    for number, (one, other) in enumerate(zip(first, second, strict=True)):
        version, split = divmod(number, len(SPLITS))
        assert [len(one), len(other)] == [2 * len(share) for share in SPLITS[split]]
        if not one + other:
            continue
        for found, alone in zip(in_order(one + other), wanted[version], strict=True):
            assert found.response_ids == alone.response_ids
            assert found.topk_ids == alone.topk_ids
            assert found.weight_version == alone.weight_version == version + 1
            assert found.sampler_logprobs == pytest.approx(alone.sampler_logprobs, abs=1e-5)
    assert len({tuple(r.response_ids) for version in wanted for r in version}) > 12


def norm_off(model: Any) -> None:
    model.model.layers[1].self_attn.k_norm.weight.data[3] += 1e-6


def no_fault(model: Any) -> None:
    pass


def swapped(stream: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Two of a rank's experts in each other's place."""
    for name, weight in stream:
        yield name, weight[[1, 0, 2, 3]] if name.endswith("1.mlp.experts.down_proj") else weight


def as_it_is(stream: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    return stream


# By what is done to a rank's engine and to the stream that reaches it.
FAULTS = [
    (norm_off, as_it_is, "weights of the sampler are not the policy's: model.layers.1.self_attn.k"),
    (no_fault, swapped, "the canary's log-probabilities differ by"),
]


def refusals() -> list[str]:
    """What a sync says on this rank after each fault on the second one."""
    sampler = shared_sampler()
    replace, load = vllm_engine.replace_weights, sampler.load_weights
    faulty = dist.get_rank() == 1
    said = []
    for version, (in_engine, in_stream, _) in enumerate(FAULTS, 2):
        sync(spread_over(2, 1), sampler)

        def off(model: Any, *given: Any, touch: Callable[[Any], None], **named: Any) -> None:
            replace(model, *given, **named)
            touch(model)

        def load_faulty(stream: Any, version: int, change: Callable[[Any], Any]) -> None:
            load(change(stream), version)

        with pytest.MonkeyPatch.context() as monkeypatch:
            if faulty:
                monkeypatch.setattr(vllm_engine, "replace_weights", partial(off, touch=in_engine))
                monkeypatch.setattr(sampler, "load_weights", partial(load_faulty, change=in_stream))
            with pytest.raises(WeightSyncError) as caught:
                sync(spread_over(2, version), sampler, version)
        said.append(str(caught.value))
    return said


def test_a_fault_in_one_ranks_share_ends_the_sync_of_all_by_its_name() -> None:
    first, second = run_on_ranks(2, refusals)
    assert first == second
    for version, (said, (_, _, words)) in enumerate(zip(first, FAULTS, strict=True), 2):
        assert said.startswith(f"step {version}: ") and words in said


def sample_until_one_fails() -> list[Rollout]:
    sampler = shared_sampler()
    sync(spread_over(2, 1), sampler)
    found = []
    mine: list[Prompt] = prompts() if dist.get_rank() == 0 else prompts()[:1]
    for rollout in sampler.sample(mine, 1):
        assert dist.get_rank() == 0, "this rank fails"
        found.append(rollout)
    return found


def test_a_rank_that_fails_while_all_sample_ends_the_others() -> None:
    with pytest.raises(AssertionError) as caught:
        run_on_ranks(2, sample_until_one_fails)
    said = str(caught.value)
    assert "rank 1:" in said and "this rank fails" in said
    assert "rank 0:" in said  # gloo's words for it differ


def test_two_ranks_that_share_experts_distil_as_two_that_do_not(
    wide_world: World, tmp_path: Path
) -> None:
    apart = distil(wide_world, tmp_path / "apart", 2, *IN_PROCESS)
    shared = distil(
        wide_world,
        tmp_path / "shared",
        2,
        *IN_PROCESS,
        "stage.rollout.expert_parallel=true",
        run=run_opd_with_shared_experts,
    )
    assert len(apart) == len(shared) == 3
    for one, other in zip(apart, shared, strict=True):
        assert other["kl/sampler_mismatch"] < 1e-5
        assert one["rollout/response_length"] == other["rollout/response_length"]
        for name in ("kl/reverse", "optim/grad_norm", "loss/entropy"):
            assert one[name] == pytest.approx(other[name], rel=1e-4)
