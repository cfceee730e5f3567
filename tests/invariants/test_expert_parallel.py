"""Experts over several ranks give what all experts on one rank give."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from marco_train.config.parallel import Dispatch
from marco_train.distributed import expert_parallel_group
from marco_train.errors import InputError
from marco_train.models import Qwen3Moe, hf_io, load_model, save_model, weights
from marco_train.models.checksums import checksums_of
from marco_train.models.dispatch import dispatch
from marco_train.models.routing import Routing
from marco_train.models.weights import (
    ExpertShare,
    local_weights,
    named_weights,
    random_model,
    single_experts,
)
from tests.helpers.models import architecture, sparse_mlps
from tests.helpers.ranks import run_on_ranks

# Tokens of each rank: alike, uneven, one token, none.
SHARES = [(12, 12), (30, 5), (1, 40), (0, 9), (7, 0, 20, 1), (0, 0, 0, 3)]


def probe(hidden: torch.Tensor) -> torch.Tensor:
    """A loss that is not blind to the scale, as the final norm makes a plain square."""
    places = torch.arange(hidden.numel()).view_as(hidden)
    return (hidden * torch.sin(places.float())).sum()


Outcome = tuple[torch.Tensor, dict[str, torch.Tensor]]


def forward_and_backward(model: Qwen3Moe, tokens: int) -> Outcome:
    hidden = model(torch.arange(tokens)[None] * 11 % 320, torch.arange(tokens)[None])
    probe(hidden).backward()
    return hidden.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def on_rank(shares: tuple[int, ...], path: Path, kind: Dispatch) -> Outcome:
    model = load_model(path, torch.float32, dist.new_group(list(range(len(shares)))))
    model.set_dispatch(kind)
    return forward_and_backward(model, shares[dist.get_rank()])


@pytest.mark.parametrize("kind", Dispatch, ids=lambda kind: kind.value)
@pytest.mark.parametrize("shares", SHARES, ids=str)
def test_experts_over_ranks_equal_experts_on_one(
    shares: tuple[int, ...], kind: Dispatch, tmp_path: Path
) -> None:
    path = tmp_path / "model"
    save_model(random_model(architecture(), torch.float32, seed=5), path)
    found = run_on_ranks(len(shares), on_rank, shares, path, kind)
    expected = [forward_and_backward(load_model(path, torch.float32), n) for n in shares]
    for (hidden, _), (wanted, _) in zip(found, expected, strict=True):
        torch.testing.assert_close(hidden, wanted, rtol=1e-5, atol=1e-5)
    for name in expected[0][1]:
        wanted = torch.stack([gradients[name] for _, gradients in expected]).sum(0)
        if ".experts." in name:
            # A rank's experts have the gradient of every rank's tokens already.
            gradient = torch.cat([gradients[name] for _, gradients in found])
        else:
            gradient = sum(gradients[name] for _, gradients in found)
        torch.testing.assert_close(
            gradient, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max())
        )


def rows_that_cross(num_tokens: int, top_k: int, kind: Dispatch) -> tuple[int, int, list[int]]:
    """Rows received by this rank, its pairs, and how many choices of sizes a host waited for."""
    group = dist.new_group(list(range(dist.get_world_size())))
    g = torch.Generator().manual_seed(dist.get_rank())
    ids = torch.rand(num_tokens, 8, generator=g).topk(top_k).indices
    hidden = torch.randn(num_tokens, 16, generator=g)
    arrived = dispatch(hidden, torch.ones(num_tokens, top_k), ids, 8, group, kind)
    return len(arrived.tokens), len(arrived.rows.token_of_row), ids.flatten().tolist()


def test_a_token_crosses_to_a_rank_once_however_many_of_its_experts_it_uses() -> None:
    for kind in Dispatch:
        found = run_on_ranks(2, rows_that_cross, 50, 4, kind)
        chosen = [torch.tensor(ids).view(-1, 4) for _, _, ids in found]
        for rank, (received, pairs, _) in enumerate(found):
            mine = [(ids // 4 == rank) for ids in chosen]  # 4 of the 8 experts are on each rank
            assert pairs == sum(int(m.sum()) for m in mine)
            tokens = sum(int(m.any(1).sum()) for m in mine)
            assert received == (tokens if kind is Dispatch.deduplicated else pairs)
            assert tokens < pairs


def observed(tokens: int, path: Path, kind: Dispatch) -> tuple[torch.Tensor, torch.Tensor]:
    group = None if dist.get_world_size() == 1 else dist.new_group([0, 1])
    model = load_model(path, torch.float32, group)
    model.set_dispatch(kind)
    seen = Routing()
    model(torch.arange(tokens)[None] * 11 % 320, torch.arange(tokens)[None], routing=seen)
    return seen.load, seen.expert_ids


@pytest.mark.parametrize("kind", Dispatch, ids=lambda kind: kind.value)
def test_a_ranks_load_is_of_its_own_tokens_on_all_experts(kind: Dispatch, tmp_path: Path) -> None:
    save_model(random_model(architecture(), torch.float32, seed=5), tmp_path / "model")
    (expected,) = run_on_ranks(1, observed, 30, tmp_path / "model", kind)
    for load, ids in run_on_ranks(2, observed, 30, tmp_path / "model", kind):
        assert torch.equal(load, expected[0]) and torch.equal(ids, expected[1])


def save_sharded(path: Path, out: Path) -> None:
    ranks = dist.get_world_size()
    model = load_model(path, torch.float32, dist.new_group(list(range(ranks))))
    assert sparse_mlps(model)[0].experts.down_proj.shape[0] == 8 // ranks
    save_model(model, out)


def experts_of_rank(path: Path) -> dict[str, torch.Tensor]:
    ranks = dist.get_world_size()
    group = None if ranks == 1 else dist.new_group(list(range(ranks)))
    model = load_model(path, torch.float32, group)
    return {n: p.detach() for n, p in model.named_parameters() if ".experts." in n}


def test_a_model_saved_from_four_ranks_is_the_model_on_four_two_and_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hf_io, "SHARD_BYTES", 30_000)
    original = random_model(architecture(), torch.float32, seed=5)
    save_model(original, tmp_path / "one")
    run_on_ranks(4, save_sharded, tmp_path / "one", tmp_path / "four")
    again = dict(named_weights(load_model(tmp_path / "four", torch.float32)))
    for name, weight in named_weights(original):
        assert torch.equal(weight, again[name]), name
    for file in (tmp_path / "one").iterdir():  # in several shards, the same from any ranks
        assert file.read_bytes() == (tmp_path / "four" / file.name).read_bytes(), file.name
    whole = {n: p for n, p in original.named_parameters() if ".experts." in n}
    for ranks in (1, 2, 4):
        found = run_on_ranks(ranks, experts_of_rank, tmp_path / "four")
        for name, weight in whole.items():
            assert torch.equal(torch.cat([experts[name] for experts in found]), weight), name


def refused(num_experts: int) -> str:
    group = dist.new_group([0, 1])
    dist.barrier()  # neither rank leaves while the other still connects
    try:
        Qwen3Moe(architecture(num_experts=num_experts), group)
    except InputError as error:
        return str(error)
    return "no refusal"


def test_experts_that_cannot_be_shared_evenly_are_refused() -> None:
    for said in run_on_ranks(2, refused, 7):
        assert said == (
            "parallel.expert_parallel_size 2 does not divide the 7 experts; sizes that do: [1, 7]"
        )


def streamed_from_shares() -> dict[str, int]:
    """Checksums of a model whose experts two ranks share, in the dtype that large runs have."""
    model = random_model(architecture(), torch.bfloat16, 3, expert_parallel_group(2))
    return checksums_of(named_weights(model))


def test_experts_that_ranks_share_arrive_whole_and_in_order() -> None:
    whole = checksums_of(named_weights(random_model(architecture(), torch.bfloat16, 3)))
    assert run_on_ranks(2, streamed_from_shares) == [whole, whole]


def share_streamed_to(
    num_shares: int, group_size: int, may_gather: bool
) -> dict[str, torch.Tensor]:
    """What a rank gets that asks for its share, under the checkpoint's names."""
    model = random_model(architecture(), torch.float32, 3, expert_parallel_group(group_size))
    share = ExpertShare(dist.get_rank(), num_shares)
    with pytest.MonkeyPatch.context() as monkeypatch:
        if not may_gather:
            monkeypatch.setattr(weights, "_gather_experts", None)
        return dict(single_experts(named_weights(model, share), share))


@pytest.mark.parametrize(("num_ranks", "group_size"), [(2, 1), (2, 2), (4, 2)])
def test_a_rank_that_asks_for_a_share_of_the_experts_gets_it_whoever_holds_them(
    num_ranks: int, group_size: int
) -> None:
    whole = dict(local_weights(random_model(architecture(), torch.float32, 3)))
    given = num_ranks, group_size, num_ranks != group_size
    found = run_on_ranks(num_ranks, share_streamed_to, *given)
    for number, streamed in enumerate(found):
        mine = range(number * 8 // num_ranks, (number + 1) * 8 // num_ranks)
        own = [n for n in whole if ".experts." in n and int(n.split(".experts.")[1][0]) in mine]
        assert streamed.keys() == {n for n in whole if ".experts." not in n} | {*own}
        for name, weight in streamed.items():
            assert torch.equal(weight, whole[name]), name
