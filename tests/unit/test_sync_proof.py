"""A weight that is not the policy's is named, whatever the canary says of it."""

import math
import re
from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor

from marco_train.config.model import DType
from marco_train.errors import WeightSyncError
from marco_train.inference.layout import kept_weights
from marco_train.models.agreement import Spread, same_answer, spread_of
from marco_train.models.checksums import Checksums, checksum, checksums, checksums_of
from marco_train.models.weights import (
    ALL_EXPERTS,
    ExpertShare,
    checkpoint_names,
    joined_shapes,
    local_weights,
    named_weights,
    random_model,
    weight_shapes,
)
from marco_train.rollout.base import Sampler
from marco_train.rollout.sync import Canary, sync_weights
from tests.helpers.fake_engine import FakeEngineSampler, laid_out
from tests.helpers.models import DENSE, architecture

CANARY = Canary([[1, 2, 3]], DType.bfloat16, num_layers=28)


class Changing:
    """A policy of random weights; norms too, unlike those of a fresh model."""

    def __init__(self, **changes: object) -> None:
        self.model = random_model(architecture(vocab_size=100, **changes), torch.float32, seed=0)
        self.update()

    def update(self) -> None:
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)

    def named_weights(self, share: ExpertShare = ALL_EXPERTS) -> Iterator[tuple[str, Tensor]]:
        return named_weights(self.model, share)

    def score(self, sequences: Sequence[list[int]]) -> Tensor:
        return torch.zeros(sum(len(ids) - 1 for ids in sequences))


FAULTS = {
    "two experts swapped": (6, r"experts\.2\.down_proj\.weight, .*experts\.5\.up_proj\.weight$"),
    "gate and up swapped": (2, r"layers\.1\.mlp\.experts\.3\.gate_proj\.weight, .*3\.up_proj"),
    "a stale layer": (33, r"layers\.1\.input_layernorm\.weight, .* and 23 more$"),
    "one norm off": (1, r"policy's: model\.layers\.0\.self_attn\.k_norm\.weight$"),
    "a row of k lost": (1, r"policy's: model\.layers\.0\.self_attn\.k_proj\.weight$"),
}


@pytest.mark.parametrize(("fault", "count", "names"), [(f, *said) for f, said in FAULTS.items()])
def test_a_weight_of_an_engine_that_is_not_the_policys_is_named_though_the_canary_is_right(
    fault: str, count: int, names: str
) -> None:
    policy = Changing()
    sampler = FakeEngineSampler(policy.model)
    assert sync_weights(policy, sampler, 0, CANARY)["rollout/sync_proved"] == 1
    policy.update()
    sampler._fault = fault
    with pytest.raises(WeightSyncError, match=names) as caught:
        sync_weights(policy, sampler, 1, CANARY)
    total = len(weight_shapes(policy.model))
    assert f"step 1: {count} of {total} weights of the sampler" in str(caught.value)


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False}, DENSE])
def test_all_weights_of_an_engine_on_a_gpu_are_found_under_their_checkpoint_names(
    changes: dict[str, object],
) -> None:
    model = Changing(**changes).model
    engine = laid_out(dict(named_weights(model)), num_layers=2)
    kept = kept_weights(engine, joined_shapes(model), torch.float32, "cuda")
    wanted = {name: checksum(weight) for name, weight in local_weights(model)}
    assert checksums_of(kept) == wanted


def test_what_an_engine_packs_or_shares_out_is_left_to_the_canary() -> None:
    model = Changing().model
    shapes, weights = joined_shapes(model), dict(named_weights(model))

    def kept(engine: torch.nn.Module, dtype: torch.dtype, platform: str) -> set[str]:
        return set(checksums_of(kept_weights(engine, shapes, dtype, platform)))

    every = set(weight_shapes(model))
    experts = {name for name in every if ".experts." in name}
    whole = laid_out(weights, num_layers=2)
    packed = laid_out(weights, num_layers=2, backend="FLASHINFER_TRTLLM")
    assert kept(packed, torch.float32, "cuda") == every - experts
    assert kept(whole, torch.bfloat16, "cuda") == set()
    on_cpu = {n for n in every if n.endswith("norm.weight") or "embed_tokens" in n}
    assert len(on_cpu) == 10 and kept(whole, torch.float32, "cpu") == on_cpu
    halves = {n: w[:4] if ".experts." in n else w for n, w in weights.items()}
    shared = laid_out(halves, num_layers=2)  # of two processes, which it is not said to be of
    assert kept(shared, torch.float32, "cuda") == every - experts


@pytest.mark.parametrize("number", [0, 1])
def test_of_experts_that_engines_share_each_is_proved_under_its_number(number: int) -> None:
    policy = Changing()
    share = ExpertShare(number, 2)
    mine = range(4 * number, 4 * number + 4)
    wanted = {
        name: checksum(weight)
        for name, weight in local_weights(policy.model)
        if ".experts." not in name or int(name.split(".experts.")[1][0]) in mine
    }
    assert len(wanted) == len(weight_shapes(policy.model)) - 2 * 4 * 3
    sampler = FakeEngineSampler(policy.model)
    sampler.share = share
    assert sync_weights(policy, sampler, 0, CANARY)["rollout/sync_proved"] == 1
    assert sampler.checksums() == [wanted]
    policy.update()
    sampler._fault = "gate and up swapped"
    last = rf"2 of {len(wanted)} weights .*layers\.1\.mlp\.experts\.{mine[3]}\.gate_proj\.weight, "
    with pytest.raises(WeightSyncError, match=last):
        sync_weights(policy, sampler, 1, CANARY)


def test_the_share_that_is_proved_is_one_of_bytes() -> None:
    policy = Changing()
    sampler = FakeEngineSampler(policy.model, backend="FLASHINFER_TRTLLM")
    found = sync_weights(policy, sampler, 0, CANARY)["rollout/sync_proved"]
    experts = 2 * 8 * 3 * 16 * 32
    attention = 2 * (2 * 32 * 32 + 2 * 16 * 32)
    others = 100 * 32 + 2 * 8 * 32 + 5 * 32 + 2 * 2 * 8
    assert found == pytest.approx((attention + others) / (experts + attention + others))


def reference(weight: Tensor) -> int:
    """The digest in whole numbers, as a signed one of 64 bits."""

    def weighed(words: list[int]) -> int:
        return sum(word * (place % 65_521 * 2 + 1) for place, word in enumerate(words))

    words = weight.flatten().view(torch.int64).tolist()
    parts = [weighed(words[start : start + 2**18]) for start in range(0, len(words), 2**18)]
    total = weighed(parts) if len(parts) > 1 else parts[0]
    return (total + 2**63) % 2**64 - 2**63


@pytest.mark.parametrize("size", [6, 2**18, 2**19 + 10, 2**20])
def test_a_digest_weighs_each_word_by_its_place(size: int) -> None:
    weight = torch.randn(size, generator=torch.Generator().manual_seed(size))
    assert checksum(weight) == reference(weight)


@pytest.mark.parametrize("shape", [(8, 6, 4), (3, 2, 7, 5), (2, 2**18 + 3), (2, 2**19 + 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_are_digested_as_one_is(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    weights = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert checksums(weights.flatten(1)).tolist() == [checksum(one) for one in weights]


def test_experts_are_digested_under_their_names_in_the_checkpoint() -> None:
    model = Changing().model
    found = Checksums()
    for name, weight in named_weights(model):
        found.add(name, weight)
    assert found.by_name() == {name: checksum(weight) for name, weight in local_weights(model)}
    assert found.num_bytes == {n: 4 * math.prod(s) for n, s in weight_shapes(model).items()}
    assert checkpoint_names("model.layers.3.mlp.experts.gate_up_proj", (2, 8, 4)) == [
        "model.layers.3.mlp.experts.0.gate_proj.weight",
        "model.layers.3.mlp.experts.0.up_proj.weight",
        "model.layers.3.mlp.experts.1.gate_proj.weight",
        "model.layers.3.mlp.experts.1.up_proj.weight",
    ]


class Apart(FakeEngineSampler):
    """Says of the canary what lies so far from the policy's word of it."""

    apart: Tensor = torch.zeros(2)

    def score(self, sequences: Sequence[list[int]]) -> Tensor:
        return self.apart


def canary_of(sampler: Sampler, *apart: float, tolerance: float | None = None) -> str:
    """What a sync in bfloat16 at 28 layers says that is so far off; nothing where it passes."""
    sampler.apart = torch.tensor(apart)  # type: ignore[attr-defined]
    policy = Changing()
    sequences = [list(range(len(apart) + 1))]
    canary = Canary(sequences, DType.bfloat16, 28, tolerance)
    try:
        sync_weights(policy, sampler, 0, canary)
    except WeightSyncError as error:
        return str(error)
    return ""


def test_later_syncs_may_be_half_as_far_off_again_as_the_first() -> None:
    sampler = Apart(Changing().model)
    assert canary_of(sampler, *[0.10] * 20) == ""  # the first: 0.2 in the mean at most
    assert canary_of(sampler, *[0.14] * 20) == ""
    said = canary_of(sampler, *[0.16] * 20)
    assert re.search(r"differ by 0.16 nats in the mean, 0.16 .* bounds: 0.15 nats in the", said)
    assert canary_of(sampler, *[0.14] * 20) == ""
    assert canary_of(sampler, *[0.0] * 17, 0.4, 0.4, 0.4)  # the mean is 0.06
    assert canary_of(sampler, *[0.0] * 18, 0.4, 2.0) == ""  # two improbable tokens
    assert canary_of(sampler, *[0.0] * 19, math.nan)


def test_a_first_sync_that_is_far_off_is_caught_and_a_near_one_leaves_room_for_noise() -> None:
    sampler = Apart(Changing().model)
    assert "in the mean" in canary_of(sampler, *[0.21] * 20)
    assert sampler.first_canary is None
    assert canary_of(sampler, *[0.0] * 20) == ""
    assert canary_of(sampler, *[0.049] * 20) == ""
    assert canary_of(sampler, *[0.051] * 20) != ""


def test_a_tolerance_that_is_given_caps_the_largest_difference() -> None:
    sampler = Apart(Changing().model)
    assert canary_of(sampler, *[0.0] * 19, 0.29, tolerance=0.3) == ""
    assert canary_of(sampler, *[0.0] * 19, 0.31, tolerance=0.3) != ""
    assert Canary([], DType.float32, 28).bound(None) == (math.inf, math.inf, 1e-4)
    assert Canary([], DType.float32, 28, 1e-3).bound(Spread(0, 0, 0)) == (math.inf, math.inf, 1e-3)


def test_of_several_servers_the_worst_counts() -> None:
    right, one_off = torch.zeros(10), torch.zeros(3, 10)
    one_off[1, :2] = torch.tensor([0.5, 1.0])
    found = spread_of(right, one_off)
    assert found == pytest.approx((0.15, 0.55, 1.0))


def test_two_answers_may_be_further_apart_in_a_deeper_model_and_in_bfloat16() -> None:
    assert same_answer(DType.float32, 94) == (math.inf, math.inf, 1e-3)
    assert same_answer(DType.bfloat16, 2) == same_answer(DType.bfloat16, 28)
    assert same_answer(DType.bfloat16, 28) == pytest.approx((0.1, 0.22, math.inf))
    assert same_answer(DType.bfloat16, 112) == pytest.approx((0.2, 0.44, math.inf))
