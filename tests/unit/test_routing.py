"""Routers, their losses and what they report."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from marco_train.config.parallel import Recompute
from marco_train.losses.balance import balance_loss, router_z_loss
from marco_train.models import load_model, save_model
from marco_train.models.routing import LanguageSignatures, Router, Routing, summarize_load
from marco_train.models.weights import random_model
from tests.helpers.models import DENSE, architecture, sparse_mlps

TOKENS, WIDTH, EXPERTS, TOP_K = 40, 8, 6, 2


def router(norm: bool = True) -> tuple[Router, Tensor]:
    g = torch.Generator().manual_seed(0)
    found = Router(WIDTH, EXPERTS, TOP_K, norm)
    with torch.no_grad():
        found.weight.copy_(torch.randn(EXPERTS, WIDTH, generator=g))
    return found, torch.randn(TOKENS, WIDTH, generator=g)


@pytest.mark.parametrize("norm", [True, False])
def test_a_token_goes_to_its_likeliest_experts(norm: bool) -> None:
    gate, hidden = router(norm)
    weights, ids, _ = gate(hidden, None, observe=False)
    p = F.linear(hidden.double(), gate.weight.double()).softmax(-1)
    for token in range(TOKENS):
        best = sorted(range(EXPERTS), key=lambda e: -p[token, e].item())[:TOP_K]
        assert ids[token].tolist() == best
        wanted = p[token, best] / (p[token, best].sum() if norm else 1)
        torch.testing.assert_close(weights[token].double(), wanted, rtol=1e-6, atol=1e-6)


def test_bfloat16_tokens_are_weighed_in_float32() -> None:
    gate, hidden = router()
    weights, _, _ = gate.bfloat16()(hidden.bfloat16(), None, observe=False)
    assert weights.dtype == torch.float32
    assert torch.allclose(weights.sum(1), torch.ones(TOKENS), rtol=0, atol=1e-6)


def test_given_experts_are_taken_with_the_routers_weights() -> None:
    gate, hidden = router()
    given = torch.stack([torch.randperm(EXPERTS)[:TOP_K] for _ in range(TOKENS)])
    weights, ids, seen = gate(hidden, given, observe=True)
    p = F.linear(hidden, gate.weight).softmax(-1).gather(1, given)
    assert torch.equal(ids, given)
    torch.testing.assert_close(weights, p / p.sum(1, keepdim=True))
    assert seen.load.tolist() == torch.bincount(given.flatten(), minlength=EXPERTS).tolist()


def test_given_experts_are_compared_with_the_routers_own_as_sets() -> None:
    gate, hidden = router()
    _, own, seen = gate(hidden, None, observe=True)
    assert seen.replayed.tolist() == [0, 0]
    _, _, seen = gate(hidden, own.flip(1), observe=True)
    assert seen.replayed.tolist() == [TOKENS * TOP_K, 0]
    others = own.clone()
    for token, place in ((0, 1), (7, 0), (7, 1)):
        free = set(range(EXPERTS)) - set(own[token].tolist()) - set(others[token].tolist())
        others[token, place] = min(free)
    _, _, seen = gate(hidden, others, observe=True)
    assert seen.replayed.tolist() == [TOKENS * TOP_K, 3]


def test_the_sums_of_a_router_are_those_of_its_tokens() -> None:
    gate, hidden = router()
    _, ids, seen = gate(hidden, None, observe=True)
    logits = F.linear(hidden.double(), gate.weight.double())
    p = logits.softmax(-1)
    assert seen.load.tolist() == [float((ids == e).sum()) for e in range(EXPERTS)]
    torch.testing.assert_close(seen.probability.double(), p.sum(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(seen.entropy.double(), -(p * p.log()).sum(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        seen.squared_logsumexp.double(), logits.exp().sum(1).log().square().sum(), rtol=1e-5, atol=0
    )


def test_the_balance_loss_is_one_when_even_and_the_number_of_experts_at_worst() -> None:
    even = torch.full((3, EXPERTS), 10.0)
    assert balance_loss(even, even, num_tokens=60) == pytest.approx(3)  # three layers
    one = torch.zeros(1, EXPERTS)
    one[0, 2] = 60
    assert balance_loss(one, one, num_tokens=60) == pytest.approx(EXPERTS)


def test_the_balance_loss_is_that_of_transformers_over_top_k() -> None:
    from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

    gate, hidden = router()
    _, _, seen = gate(hidden, None, observe=True)
    logits = F.linear(hidden, gate.weight)
    theirs = load_balancing_loss_func((logits,), EXPERTS, TOP_K)
    ours = balance_loss(seen.load[None], seen.probability[None], TOKENS)
    torch.testing.assert_close(ours * TOP_K, theirs)


def test_router_losses_have_the_gradients_of_their_formulas() -> None:
    gate, hidden = router()
    _, ids, seen = gate(hidden, None, observe=True)
    balance = balance_loss(seen.load[None], seen.probability[None], TOKENS)
    z = router_z_loss(seen.squared_logsumexp[None], TOKENS)
    (balance_grad,) = torch.autograd.grad(balance, gate.weight, retain_graph=True)
    (z_grad,) = torch.autograd.grad(z, gate.weight)

    weight = gate.weight.detach().double()

    def balance_by_hand(weight: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for e in range(EXPERTS):
            share = (ids == e).sum() / (TOKENS * TOP_K)
            total = total + share * (hidden.double() @ weight.T).softmax(-1)[:, e].mean()
        return EXPERTS * total

    def z_by_hand(weight: Tensor) -> Tensor:
        return (hidden.double() @ weight.T).exp().sum(1).log().square().mean()

    step = 1e-6  # central differences: no autograd on the reference's side
    for function, found in ((balance_by_hand, balance_grad), (z_by_hand, z_grad)):
        wanted = torch.zeros_like(weight)
        for place in range(weight.numel()):
            moved = torch.zeros(weight.numel(), dtype=torch.float64)
            moved[place] = step
            moved = moved.view_as(weight)
            difference = function(weight + moved) - function(weight - moved)
            wanted.view(-1)[place] = difference / (2 * step)
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-6)


def test_a_load_is_summed_up_as_violation_entropy_and_dead_experts() -> None:
    load = torch.tensor([[4.0, 4, 4, 4], [16, 0, 0, 0], [8, 4, 4, 0]])
    found = summarize_load(load, torch.tensor([8.0, 0.0, 4.0]), num_tokens=8)
    assert [layer.max_violation for layer in found] == pytest.approx([0, 3, 1])
    assert [layer.entropy for layer in found] == pytest.approx([1, 0, 0.5])
    assert [layer.num_dead for layer in found] == [0, 3, 1]


IDS, POSITIONS = torch.arange(30)[None] * 7 % 320, torch.arange(30)[None]


def test_replaying_the_experts_of_a_pass_gives_the_same_pass() -> None:
    model = random_model(architecture(), torch.float32, seed=0)
    seen = Routing()
    hidden = model(IDS, POSITIONS, routing=seen)
    assert seen.expert_ids.shape == (2, 30, architecture().num_experts_per_tok)
    assert torch.equal(model(IDS, POSITIONS, routing=Routing(seen.expert_ids)), hidden)
    others = (seen.expert_ids + 1) % 8
    assert not torch.allclose(model(IDS, POSITIONS, routing=Routing(others)), hidden, atol=1e-3)


@pytest.mark.parametrize("policy", Recompute, ids=lambda policy: policy.value)
def test_what_is_computed_again_is_not_counted_again(policy: Recompute) -> None:
    model = random_model(architecture(), torch.float32, seed=0)
    model.recompute = policy
    seen = Routing()
    model(IDS, POSITIONS, routing=seen).square().sum().backward()
    assert seen.load.sum(1).tolist() == [30 * TOP_K] * 2


def test_a_policy_keeps_less_for_backward_and_gives_the_same_gradients() -> None:
    kept, gradients = {}, {}
    for policy in Recompute:
        model = random_model(architecture(), torch.float32, seed=0)
        model.recompute = policy
        sizes: dict[int, int] = {}

        def keep(x: Tensor, sizes: dict[int, int] = sizes) -> Tensor:
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            hidden = model(IDS, POSITIONS)
        (hidden * torch.arange(32.0)).sum().backward()
        for parameter in model.parameters():
            sizes.pop(parameter.untyped_storage().data_ptr(), None)
        kept[policy] = sum(sizes.values())
        gradients[policy] = [p.grad for p in model.parameters() if p.grad is not None]
    assert kept[Recompute.layer] < kept[Recompute.attention] < kept[Recompute.none]
    for policy in (Recompute.attention, Recompute.layer):
        for found, wanted in zip(gradients[policy], gradients[Recompute.none], strict=True):
            assert torch.equal(found, wanted)


def test_a_dense_model_has_no_routing() -> None:
    seen = Routing()
    random_model(architecture(**DENSE), torch.float32, seed=0)(IDS, POSITIONS, routing=seen)
    assert seen.is_empty


def test_signatures_are_shares_by_language_and_alike_languages_are_near() -> None:
    signatures = LanguageSignatures()
    signatures.add("en", torch.tensor([[6.0, 2, 0, 0], [0, 0, 4, 4]]))
    signatures.add("de", torch.tensor([[5.0, 3, 0, 0], [0, 1, 3, 4]]))
    signatures.add("zh", torch.tensor([[0.0, 0, 7, 1], [4, 4, 0, 0]]))
    signatures.add("zh", torch.tensor([[0.0, 0, 7, 1], [4, 4, 0, 0]]))
    assert signatures.languages == ["de", "en", "zh"]
    shares = signatures.shares()
    assert shares[2].tolist() == [[0, 0, 0.875, 0.125], [0.5, 0.5, 0, 0]]
    distances = signatures.distances()
    assert distances[0, 1] < 0.1
    assert distances[0, 2] > 1
    assert torch.allclose(distances.diagonal(), torch.zeros(3, dtype=torch.float64), atol=1e-12)


def test_a_signature_that_is_the_same_for_all_experts_is_near_no_other() -> None:
    signatures = LanguageSignatures()
    signatures.add("en", torch.tensor([[6.0, 2, 0, 0]]))
    signatures.add("de", torch.tensor([[2.0, 2, 2, 2]]))
    assert signatures.distances()[0, 1] == 1


def test_zero_routers_take_the_first_experts(tmp_path: Path) -> None:
    # What the paper's upcycling starts from: every token ties, and goes to the same experts.
    model = random_model(architecture(), torch.float32, seed=0)
    with torch.no_grad():
        for mlp in sparse_mlps(model):
            mlp.gate.weight.zero_()
    save_model(model, tmp_path / "model")
    seen = Routing()
    load_model(tmp_path / "model", torch.float32)(IDS, POSITIONS, routing=seen)
    assert (seen.load > 0).sum(1).tolist() == [TOP_K] * 2
