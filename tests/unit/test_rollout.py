"""The sampler samples the model's distribution, by seed, and holds the policy's weights."""

import platform
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from marco_train import distributed
from marco_train.config.model import DType
from marco_train.config.rollout import (
    NativeRolloutConfig,
    VLLMRolloutConfig,
)
from marco_train.errors import InputError, WeightSyncError
from marco_train.inference import engine
from marco_train.inference.engine import Generation
from marco_train.losses.logprobs import sequence_logprobs, token_logprobs, topk_logprobs
from marco_train.models import Qwen3Moe, decoding_head
from marco_train.models.checksums import CHECKSUM_CHUNK, WORD_BYTES, checksum
from marco_train.models.decoding_head import (
    LARGE_HEAD,
    MOST_TOKENS,
    DecodingHead,
    is_laid_out,
)
from marco_train.models.routing import Router, Routing
from marco_train.models.weights import (
    ALL_EXPERTS,
    ExpertShare,
    empty_model,
    named_weights,
    random_model,
)
from marco_train.rollout import vllm as rollout_vllm
from marco_train.rollout.base import SamplerSpec, in_order, response_seed, summarize
from marco_train.rollout.native import BLOCK, NativeSampler, draw_tokens
from marco_train.rollout.sync import Canary, canary_sequences, sync_weights
from marco_train.rollout.vllm import VLLMSampler, check_experts, share_for_keys
from marco_train.types import FinishReason, Prompt, Rollout
from tests.helpers.models import architecture, sparse_mlps

STOP_IDS = [2, 0]
LIMIT = 12
TOP_K = 3
PROBES = canary_sequences(16, 200)
CANARY = Canary(PROBES, DType.float32, num_layers=2)


def config(batch_size: int = 64, replay_routing: bool = False) -> NativeRolloutConfig:
    return NativeRolloutConfig(batch_size=batch_size, replay_routing=replay_routing)


def spread_model(seed: int = 0) -> Qwen3Moe:
    """A random model whose next token is far from certain and far from uniform."""
    model = random_model(architecture(vocab_size=16), torch.float32, seed)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(3.0)
    return model


def prompts() -> list[Prompt]:
    generator = torch.Generator().manual_seed(1)
    lengths = [3, 9, 1, 5, 9, 2]
    return [
        Prompt(10 + i, torch.randint(3, 16, (n,), generator=generator).tolist(), "s", "c", "en")
        for i, n in enumerate(lengths)
    ]


def sampler(model: Qwen3Moe, batch_size: int = 64, seed: int = 7) -> NativeSampler:
    return NativeSampler(config(batch_size), model, STOP_IDS, LIMIT, TOP_K, seed, weight_version=3)


def test_the_logprobs_with_a_cache_are_those_of_a_full_forward_pass() -> None:
    model = spread_model()
    rollouts = in_order(sampler(model).sample(prompts(), 12))
    assert len({len(r.response_ids) for r in rollouts}) > 2, "lengths should differ"
    for r in rollouts:
        ids = torch.tensor([r.input_ids])
        hidden = model(ids, torch.arange(ids.shape[1])[None])
        every, _ = token_logprobs(hidden[:-1], model.head, ids[0, 1:])
        wanted = every[len(r.prompt.input_ids) - 1 :]
        torch.testing.assert_close(torch.tensor(r.sampler_logprobs), wanted, rtol=0, atol=1e-5)
        _, likeliest = topk_logprobs(hidden[len(r.prompt.input_ids) - 1 : -1], model.head, TOP_K)
        assert r.topk_ids == likeliest.tolist()


def test_a_greedy_response_is_of_the_likeliest_tokens_whatever_the_seed() -> None:
    model = spread_model()
    found = in_order(sampler(model).sample(prompts(), 1, greedy=True))
    others = in_order(sampler(model, seed=8).sample(prompts(), 1, greedy=True))
    assert found == others
    for r in found:
        assert r.response_ids == [likeliest for likeliest, *_ in r.topk_ids]
        ids = torch.tensor([r.input_ids])
        hidden = model(ids, torch.arange(ids.shape[1])[None])
        every, _ = token_logprobs(hidden[:-1], model.head, ids[0, 1:])
        wanted = every[len(r.prompt.input_ids) - 1 :]
        torch.testing.assert_close(torch.tensor(r.sampler_logprobs), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_the_experts_recorded_are_those_of_a_full_forward_pass(batch_size: int) -> None:
    model = spread_model()
    recording = NativeSampler(config(batch_size, True), model, STOP_IDS, LIMIT, TOP_K, 7, 3)
    rollouts = in_order(recording.sample(prompts(), 6))
    assert len({len(r.response_ids) for r in rollouts}) > 2, "lengths should differ"
    assert rollouts == in_order(sampler(model, batch_size).sample(prompts(), 6))
    for r in rollouts:
        inputs = torch.tensor([r.input_ids[:-1]])
        seen = Routing()
        model(inputs, torch.arange(inputs.shape[1])[None], routing=seen)
        assert r.routed_experts.dtype == torch.int16
        assert r.routed_experts.device.type == "cpu"
        assert torch.equal(r.routed_experts.transpose(0, 1).long(), seen.expert_ids)
    assert len({e for r in rollouts for e in r.routed_experts.flatten().tolist()}) == 8


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32])
def test_the_experts_that_vllm_names_are_taken_as_they_are(dtype: type) -> None:
    named = np.random.default_rng(0).permuted(np.tile(np.arange(8), (11, 2, 1)), axis=-1)[..., :2]
    found = check_experts(named.astype(dtype), 11, architecture())
    assert found.dtype == torch.int16
    assert found.tolist() == named.tolist()


PAIRS = np.tile(np.array([3, 7], dtype=np.uint8), (11, 2, 1))
WRONG_EXPERTS = {
    "none": (None, r"as NoneType, and should have as \(11, 2, 2\)"),
    "one more": (np.tile(PAIRS[:1], (12, 1, 1)), r"as \(12, 2, 2\), and"),
    "layers first": (PAIRS.swapaxes(0, 1), r"as \(2, 11, 2\), and"),
    "one of two": (PAIRS[..., :1], r"as \(11, 2, 1\), and"),
    "beyond the last": (PAIRS + np.uint8(1), "from 4 to 8 .* 2 different ones of 8"),
    "padding": (PAIRS.astype(np.int32) - 4, "from -1 to 3"),
    "an unwatched layer": (PAIRS * np.array([[1], [0]], dtype=np.uint8), "from 0 to 7"),
}


@pytest.mark.parametrize(("named", "said"), WRONG_EXPERTS.values(), ids=WRONG_EXPERTS.keys())
def test_experts_that_cannot_be_those_of_the_tokens_are_refused(
    named: np.ndarray | None, said: str
) -> None:
    with pytest.raises(RuntimeError, match=said):
        check_experts(named, 11, architecture())


class FakeEngine:
    """Answers every request with two tokens, and experts that tell of the request."""

    def __init__(self, *_: object, with_experts: bool, **__: object) -> None:
        self._with_experts = with_experts

    def load_weights(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        list(weights)

    def generate(
        self, requests: Sequence[tuple[list[int], int]], *more: object, greedy: bool
    ) -> Iterator[tuple[int, Generation]]:
        for number, (prompt, _) in reversed(list(enumerate(requests))):
            first = np.full((len(prompt) + 1, 2, 1), number % 7, dtype=np.uint8)
            experts = np.concatenate([first, first + 1], -1) if self._with_experts else None
            yield number, Generation([5, 2], [-1.0, -1.0], [[], []], experts)


@pytest.mark.parametrize("replay_routing", [True, False])
def test_experts_come_from_vllm_with_the_rollout_where_they_are_asked_for(
    replay_routing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rollout_vllm, "VLLMEngine", FakeEngine)
    shape = architecture(vocab_size=16)
    sampling = SamplerSpec(shape, DType.float32, STOP_IDS, 64, LIMIT, 0, replay_routing, seed=7)
    target = VLLMSampler(VLLMRolloutConfig(batch_size=64, kv_cache_gib=1.0), sampling)
    target.load_weights(named_weights(spread_model()), version=1)
    rollouts = in_order(target.sample(prompts(), 2))
    for number, r in enumerate(rollouts):
        rows = len(r.input_ids) - 1
        wanted = [[[number % 7, number % 7 + 1]] * 2] * rows if replay_routing else []
        assert r.routed_experts.tolist() == wanted


def test_no_experts_are_recorded_unless_they_are_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = spread_model()
    observed = []
    plain = Router.forward

    def forward(self: Router, hidden: Tensor, given: Tensor | None, observe: bool) -> object:
        observed.append(observe)
        return plain(self, hidden, given, observe)

    monkeypatch.setattr(Router, "forward", forward)
    rollouts = list(sampler(model).sample(prompts(), 2))
    assert {r.routed_experts.shape for r in rollouts} == {(0, 0, 0)}
    assert not any(observed)


def test_an_engine_is_given_memory_for_keys_by_number_or_by_what_is_free(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gib = 2**30
    sampling = SamplerSpec(architecture(), DType.bfloat16, STOP_IDS, 20, LIMIT, TOP_K, False, 7)
    model = random_model(architecture(), torch.float32, seed=0)
    num_weights = sum(weight.numel() for _, weight in named_weights(model))

    def given(teacher_bytes: int = 0, **fields: Any) -> int:
        built: dict[str, Any] = {}
        monkeypatch.setattr(rollout_vllm, "VLLMEngine", lambda *_, **kwargs: built.update(kwargs))
        VLLMSampler(VLLMRolloutConfig(**{"reserve_gib": 16} | fields), sampling, teacher_bytes)
        return int(built["kv_cache_bytes"])

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert given(kv_cache_gib=0.5) == gib // 2
    assert given() == 4 * gib
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (17 * gib, 80 * gib))
    assert given(kv_cache_gib=0.5) == gib // 2
    # 20 tokens lie in one block of 128, and one is kept back; two layers of two heads of 8.
    one = 2 * 128 * 2 * 2 * 2 * 8 * 2
    assert given(batch_size=3) == 3 * one
    assert given(batch_size=10**6) == gib - 2 * num_weights
    assert given(gib // 4, batch_size=10**6) == gib * 3 // 4 - 2 * num_weights
    # Of two ranks that share the experts each holds half of them.
    num_expert_weights = 2 * 8 * 3 * 16 * 32
    monkeypatch.setattr(rollout_vllm, "world_size", lambda: 2)
    assert given(batch_size=10**6) == gib - 2 * num_weights
    found = given(batch_size=10**6, expert_parallel=True)
    assert found == gib - 2 * (num_weights - num_expert_weights // 2)


def test_keys_get_what_is_free_beside_trainer_weights_and_reserve() -> None:
    gib = 2**30
    # 40 free, 20 of weights, 10 kept: 10 remain, or what 5 sequences of 1 can use.
    assert share_for_keys(40 * gib, 20 * gib, 10 * gib, one=gib, batch_size=256) == 10 * gib
    assert share_for_keys(40 * gib, 20 * gib, 10 * gib, one=gib, batch_size=5) == 5 * gib
    assert share_for_keys(31 * gib, 20 * gib, 10 * gib, one=gib, batch_size=256) == gib
    with pytest.raises(
        InputError,
        match=r"30\.9 GiB of a GPU are free .* weights takes 20\.0, and .*reserve_gib .* 10\.0; "
        r"one .* needs 1\.0000 of keys .*offload_while_sampling=true",
    ):
        share_for_keys(31 * gib - gib // 10, 20 * gib, 10 * gib, one=gib, batch_size=256)


def test_engines_that_share_experts_wait_for_each_other_as_long_as_the_ranks_of_the_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(distributed.Groups, "timeout", timedelta(seconds=90.5))
    assert engine._shared_over_ranks() == {}
    monkeypatch.setattr(distributed, "world_size", lambda: 8)
    assert engine._shared_over_ranks() == {
        "data_parallel_size": 8,
        "enable_expert_parallel": True,
        "async_scheduling": False,
        "distributed_timeout_seconds": 91,
        "cpu_distributed_timeout_seconds": 91,
    }


def test_a_response_ends_at_its_first_stop_token_or_at_the_limit() -> None:
    rollouts = in_order(sampler(spread_model()).sample(prompts(), 8))
    for r in rollouts:
        assert not set(r.response_ids[:-1]) & set(STOP_IDS)
        if r.finish_reason is FinishReason.stop:
            assert r.response_ids[-1] in STOP_IDS
        else:
            assert len(r.response_ids) == LIMIT
            assert r.response_ids[-1] not in STOP_IDS
        assert r.weight_version == 3
    assert {r.finish_reason for r in rollouts} == set(FinishReason)


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_samples_depend_on_prompt_and_seed_and_not_on_the_batch(batch_size: int) -> None:
    model = spread_model()
    wanted = in_order(sampler(model).sample(prompts(), 3))
    shuffled = in_order(sampler(model, batch_size).sample(prompts()[::-1], 3))
    found = {(r.prompt.index, r.sample_index): r.response_ids for r in shuffled}
    assert found == {(r.prompt.index, r.sample_index): r.response_ids for r in wanted}


def test_another_seed_and_another_sample_index_give_other_responses() -> None:
    model = spread_model()
    one, other = (
        in_order(sampler(model).sample(prompts(), 2)),
        in_order(sampler(model, seed=8).sample(prompts(), 2)),
    )
    assert [r.response_ids for r in one] != [r.response_ids for r in other]
    assert one[0].response_ids != one[1].response_ids or one[2].response_ids != one[3].response_ids
    assert len({response_seed(0, p, n) for p in range(50) for n in range(4)}) == 200


def test_drawn_tokens_follow_the_distribution() -> None:
    logits = torch.tensor([0.0, 1.0, -2.0, 3.0, -30.0]).repeat(20_000, 1)
    uniforms = torch.rand(20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    tokens, logprobs = draw_tokens(logits, uniforms)
    p = logits[0].softmax(0)
    counts = torch.bincount(tokens, minlength=5).double()
    # Chi-square with 3 degrees of freedom (the last token never comes): 16.3 at 99.9 %.
    wanted = p[:4].double() * 20_000
    assert counts[4] == 0
    assert float(((counts[:4] - wanted) ** 2 / wanted).sum()) < 16.3
    torch.testing.assert_close(logprobs, p.log()[tokens], rtol=1e-5, atol=1e-5)


def test_the_ends_of_the_unit_interval_draw_tokens_of_positive_probability() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]] * 2)
    tokens, _ = draw_tokens(logits, torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64))
    assert tokens.tolist() == [1, 2]


def test_a_large_vocabulary_is_drawn_as_its_whole_distribution() -> None:
    generator = torch.Generator().manual_seed(0)
    vocab_size = 3 * BLOCK + 1001
    logits = 3 * torch.randn(64, vocab_size, generator=generator)
    logits[:, BLOCK : 2 * BLOCK] = -torch.inf
    uniforms = torch.rand(64, generator=generator, dtype=torch.float64)
    tokens, logprobs = draw_tokens(logits, uniforms, torch.full((70, vocab_size), torch.nan))
    fresh = draw_tokens(logits, uniforms)
    assert torch.equal(fresh[0], tokens) and torch.equal(fresh[1], logprobs)
    p = logits.double().softmax(1)
    ends = p.cumsum(1).gather(1, tokens[:, None])[:, 0]
    begins = ends - p.gather(1, tokens[:, None])[:, 0]
    # Float32 probabilities move the ends of a token's interval by a few parts in 10^7.
    assert bool(((begins - 1e-6 < uniforms) & (uniforms < ends + 1e-6)).all())
    assert {int(token) // BLOCK for token in tokens} == {0, 2, 3}
    wanted = p.log().gather(1, tokens[:, None])[:, 0]
    torch.testing.assert_close(logprobs.double(), wanted, rtol=1e-5, atol=1e-5)


def test_the_ends_of_the_unit_interval_draw_from_the_first_and_last_block() -> None:
    first, last = 1, 2 * BLOCK + 2
    logits = torch.full((100, 2 * BLOCK + 5), -torch.inf)
    logits[:, first] = 0
    logits[:, [last - 1, last]] = torch.linspace(-25, 0, 100)[:, None]
    for uniform, token in ((0.0, first), (1 - 2**-53, last)):
        tokens, _ = draw_tokens(logits, torch.full((100,), uniform, dtype=torch.float64))
        assert tokens.tolist() == [token] * 100


@pytest.mark.parametrize("vocab_size", [5, BLOCK + 5])
def test_logits_that_are_no_numbers_give_a_log_probability_that_is_none(
    vocab_size: int,
) -> None:
    tokens, logprobs = draw_tokens(torch.full((2, vocab_size), torch.nan), torch.tensor([0, 0.5]))
    assert tokens.tolist() == [vocab_size - 1] * 2
    assert bool(logprobs.isnan().all())


@pytest.mark.parametrize("num_tokens", [0, 1, 3, MOST_TOKENS, 2 * MOST_TOKENS + 1])
@pytest.mark.parametrize("num_elements", [LARGE_HEAD // 2, LARGE_HEAD + 100 * 256])
def test_few_tokens_meet_the_whole_of_a_head(num_elements: int, num_tokens: int) -> None:
    draws = torch.Generator().manual_seed(0)
    weights = torch.randn(num_elements // 256, 256, generator=draws) / 16
    head = DecodingHead(torch.nn.Parameter(weights))
    for hidden in torch.randn(2, num_tokens, 256, generator=draws):  # the second in the same room
        found = head.logits(hidden)
        wanted = hidden.double() @ weights.double().T
        assert found.is_contiguous() and found.shape == wanted.shape
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)


def test_a_large_head_is_copied_where_its_kernels_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    large = LARGE_HEAD, torch.float32, True
    assert is_laid_out(*large) == torch.backends.mkldnn.is_available()
    assert not is_laid_out(LARGE_HEAD - 1, torch.float32, True)
    assert not is_laid_out(LARGE_HEAD, torch.bfloat16, True)
    assert not is_laid_out(LARGE_HEAD, torch.float32, False)
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    assert not is_laid_out(*large)


class FakePolicy:
    """Hands over a model's weights, after a fault has had them."""

    def __init__(self, model: Qwen3Moe) -> None:
        self.model = model

    def named_weights(self, share: ExpertShare = ALL_EXPERTS) -> Iterator[tuple[str, Tensor]]:
        yield from named_weights(self.model, share)

    @torch.no_grad()
    def score(self, sequences: Sequence[list[int]]) -> Tensor:
        return sequence_logprobs(self.model, self.model.head, sequences)


def fresh_sampler() -> NativeSampler:
    model = empty_model(architecture(vocab_size=16), torch.float32, ep_group=None)
    return NativeSampler(config(), model, STOP_IDS, LIMIT, TOP_K, seed=7)


@pytest.mark.parametrize("smallest_large_head", [LARGE_HEAD, 1])
def test_a_sync_makes_the_sampler_the_policy(
    smallest_large_head: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = fresh_sampler()
    for version, seed in ((5, 4), (6, 5)):
        policy = FakePolicy(spread_model(seed=seed))
        wanted = in_order(sampler(policy.model).sample(prompts(), 1))
        monkeypatch.setattr(decoding_head, "LARGE_HEAD", smallest_large_head)
        metrics = sync_weights(policy, target, version, CANARY)
        assert metrics["rollout/sync_proved"] == 1
        found = in_order(target.sample(prompts(), 1))
        monkeypatch.undo()
        assert [r.response_ids for r in found] == [r.response_ids for r in wanted]
        assert all(r.weight_version == version for r in found)


def test_nothing_is_sampled_before_the_first_sync() -> None:
    with pytest.raises(RuntimeError, match="no complete weights"):
        fresh_sampler().sample(prompts(), 1)


class LossyPolicy(FakePolicy):
    """Streams all but one weight."""

    def named_weights(self, share: ExpertShare = ALL_EXPERTS) -> Iterator[tuple[str, Tensor]]:
        return (pair for pair in super().named_weights(share) if "gate_up_proj" not in pair[0])


def test_a_weight_that_is_missing_stops_the_sync() -> None:
    target = fresh_sampler()
    with pytest.raises(ValueError, match=r"2 weights are missing: .*experts\.gate_up_proj"):
        sync_weights(LossyPolicy(spread_model()), target, 0, CANARY)
    with pytest.raises(RuntimeError, match="no complete weights"):
        target.sample(prompts(), 1)


class DeafSampler(NativeSampler):
    """Takes every weight and keeps one of them as it was, as a stale kernel would."""

    def load_weights(self, weights: Iterator[tuple[str, Tensor]], version: int) -> None:  # type: ignore[override]
        stale = sparse_mlps(self._model)[1].experts.down_proj
        kept = stale.detach().clone()
        super().load_weights(weights, version)
        with torch.no_grad():
            stale.copy_(kept)


def test_a_weight_that_did_not_arrive_is_named() -> None:
    deaf = DeafSampler(config(), spread_model(seed=1), STOP_IDS, LIMIT, TOP_K, seed=7)
    with pytest.raises(WeightSyncError, match=r"8 of \d+ weights .*layers.1.mlp.experts.0.down"):
        sync_weights(FakePolicy(spread_model(seed=2)), deaf, 0, CANARY)


class Miscalculating(NativeSampler):
    """Holds the right weights and computes with others, as a packed expert kernel can."""

    def score(self, sequences: Sequence[list[int]]) -> Tensor:
        return super().score(sequences) + 0.01


def test_a_sampler_that_computes_something_else_is_caught_by_the_canary() -> None:
    wrong = Miscalculating(config(), spread_model(seed=1), STOP_IDS, LIMIT, TOP_K, seed=7)
    with pytest.raises(WeightSyncError, match=r"canary's log-probabilities differ by 0.01"):
        sync_weights(FakePolicy(spread_model(seed=2)), wrong, 0, CANARY)


def test_the_checksum_sees_bits_and_places() -> None:
    weight = torch.arange(12.0).view(3, 4)
    flipped = weight.clone()
    flipped.view(torch.int32)[1, 2] ^= 1
    assert checksum(weight) == checksum(weight.clone())
    assert checksum(weight) != checksum(flipped)
    assert checksum(weight) != checksum(weight.T)
    assert checksum(weight.bfloat16()) != checksum(weight.bfloat16().flip(0))
    for dtype, size in ((torch.float32, 7), (torch.bfloat16, 9)):  # no whole number of words
        odd = torch.arange(1.0, 1 + size).to(dtype)
        shifted = torch.cat([odd[:1], odd])[1:]  # the same from another place in memory
        assert checksum(shifted) == checksum(odd)
        for place in range(size):
            negated = odd.clone()
            negated[place] *= -1  # the uppermost bit of a word, in some places
            assert checksum(negated) != checksum(odd)


def test_the_checksum_sees_large_parts_that_traded_places() -> None:
    # Experts and rows of a fused weight are often whole numbers of the parts it is summed in.
    part = CHECKSUM_CHUNK * WORD_BYTES // torch.float32.itemsize
    weight = torch.arange(3.0 * part).view(3, part)
    assert checksum(weight) == checksum(weight.clone())
    assert checksum(weight) != checksum(weight[[1, 0, 2]])
    assert checksum(weight) != checksum(weight[[0, 2, 1]])


def test_the_summary_counts_lengths_cuts_and_empty_answers() -> None:
    asked = prompts()[0]
    rollouts = [
        Rollout(asked, 0, [2], [-0.1], [[]], FinishReason.stop, 0),
        Rollout(asked, 1, [5, 6, 7], [-0.1] * 3, [[]] * 3, FinishReason.length, 0),
    ]
    found = summarize(rollouts)
    whole = {
        "rollout/response_length": 2.0,
        "rollout/truncated": 0.5,
        "rollout/empty": 0.5,
    }
    assert {name: found[name] for name in whole} == whole
    for group in ("category_c", "language_en"):
        assert {name: found[f"{name}/{group}"] for name in whole} == whole
    assert set(summarize([]).values()) == {0.0}
