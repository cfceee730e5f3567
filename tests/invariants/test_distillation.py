"""The objectives against references written out in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import marco_train.losses.ahead as ahead_module
import marco_train.losses.logprobs as logprobs_module
from marco_train.losses.cross_entropy import cross_entropy
from marco_train.losses.distillation import (
    FullReverseKL,
    SampledReverseKL,
    TopKReverseKL,
    bucketed_kl,
    full_reverse_kl,
    summed_reverse_kl,
)
from marco_train.losses.logprobs import token_logprobs
from marco_train.types import (
    FullMicrobatch,
    Microbatch,
    PolicyOutput,
    SampledMicrobatch,
    TopKMicrobatch,
    no_experts,
)

TOKENS, WIDTH, TEACHER_WIDTH, VOCAB = 11, 6, 5, 9


def setting(dtype: torch.dtype) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    return {
        "hidden": draw(TOKENS, WIDTH).requires_grad_(),
        "head": draw(VOCAB, WIDTH).requires_grad_(),
        "teacher_hidden": draw(TOKENS, TEACHER_WIDTH),
        "teacher_head": draw(VOCAB, TEACHER_WIDTH),
        "targets": torch.randint(0, VOCAB, (TOKENS,), generator=g),
    }


@pytest.mark.parametrize(("rows", "block"), [(1, 4), (3, 1), (4, 64), (64, 4), (64, 64)])
def test_a_full_reverse_kl_that_is_learnt_ahead_equals_one_that_is_not(
    rows: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = [setting(torch.float32), setting(torch.float32), setting(torch.float64)]
    sums, terms = [], []
    for at_once in (False, True):
        if at_once:
            monkeypatch.setattr(ahead_module, "AHEAD_WIDTH", WIDTH)
            monkeypatch.setattr(ahead_module, "PIECE_ELEMENTS", {"cpu": 2 * rows * VOCAB})
            monkeypatch.setattr(ahead_module, "KEPT_TILE_ELEMENTS", rows * block)
            monkeypatch.setattr(logprobs_module, "MIN_BLOCK", 1)
        total, seen = summed_reverse_kl(**given[at_once])
        name = "_SumFullReverseKLBackward" if at_once else "SumBackward0"
        assert total.grad_fn is not None and total.grad_fn.name() == name
        assert not any(value.requires_grad for value in seen)
        (total * 0.5).backward()
        sums.append(total.detach())
        terms.append(seen)
    torch.testing.assert_close(*sums)
    for one, other in zip(*terms, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    plain = given[2]
    logp = F.linear(plain["hidden"], plain["head"]).log_softmax(-1)
    logq = F.linear(plain["teacher_hidden"], plain["teacher_head"]).log_softmax(-1)
    (0.5 * (logp.exp() * (logp - logq)).sum()).backward()
    for made in given[:2]:
        for name in ("hidden", "head"):
            found, wanted = made[name].grad, plain[name].grad
            assert found is not None and wanted is not None
            bound = 1e-5 * float(wanted.abs().max())
            torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=bound)


@pytest.mark.parametrize(("rows", "block"), [(64, 1), (64, 4), (3, 4), (1, 64), (64, 64)])
def test_full_reverse_kl_equals_the_plain_sum_with_its_gradients(
    rows: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logprobs_module, "TILE_ROWS", {"cpu": rows})
    monkeypatch.setattr(logprobs_module, "TILE_ELEMENTS", {"cpu": block * min(rows, TOKENS)})
    monkeypatch.setattr(logprobs_module, "MIN_BLOCK", 1)
    ours, plain = setting(torch.float32), setting(torch.float64)
    weights = torch.arange(1.0, TOKENS + 1)
    seen = full_reverse_kl(**ours)
    found = seen.reverse
    logp = F.linear(plain["hidden"], plain["head"]).log_softmax(-1)
    logq = F.linear(plain["teacher_hidden"], plain["teacher_head"]).log_softmax(-1)
    wanted = (logp.exp() * (logp - logq)).sum(-1)
    beside = {
        "entropy": -(logp.exp() * logp).sum(-1),
        "logprobs": logp.gather(1, plain["targets"][:, None])[:, 0],
        "forward": (logq.exp() * (logq - logp)).sum(-1),
        "teacher_entropy": -(logq.exp() * logq).sum(-1),
    }
    for name, expected in beside.items():
        value = getattr(seen, name)
        assert not value.requires_grad
        torch.testing.assert_close(value.double(), expected.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
    (found * weights).sum().backward()
    (wanted * weights).sum().backward()
    for name in ("hidden", "head"):
        gradient = ours[name].grad
        assert gradient is not None
        torch.testing.assert_close(gradient.double(), plain[name].grad, rtol=1e-4, atol=1e-5)


def microbatch(targets: Tensor, mask: Tensor) -> Microbatch:
    return Microbatch(
        input_ids=torch.zeros(1, len(targets), dtype=torch.int64),
        position_ids=torch.arange(len(targets))[None],
        targets=targets,
        loss_places=mask.nonzero()[:, 0],
        num_tokens=len(targets),
        num_loss_tokens=int(mask.sum()),
        groups=(),
        group_ids=torch.zeros(int(mask.sum()), 0, dtype=torch.int64),
        routed_experts=no_experts().long(),
    )


def topk_batch(s: dict[str, Tensor], top_k: int) -> tuple[PolicyOutput, TopKMicrobatch]:
    """The policy's likeliest tokens of every place, with the teacher's log-probabilities."""
    logp = F.linear(s["hidden"], s["head"]).log_softmax(-1).detach().float()
    logq = F.linear(s["teacher_hidden"], s["teacher_head"]).log_softmax(-1).float()
    ids = logp.topk(top_k).indices
    everywhere = torch.ones(TOKENS, dtype=torch.bool)
    batch = TopKMicrobatch(
        **vars(microbatch(s["targets"], everywhere)),
        sampler_logprobs=logp.gather(1, s["targets"][:, None])[:, 0],
        topk_ids=ids,
        teacher_topk_logprobs=logq.gather(1, ids),
        topk_overlap=torch.zeros(TOKENS),
    )
    return PolicyOutput(s["hidden"], s["head"]), batch


@pytest.mark.parametrize("top_k", [1, 3, VOCAB - 1, VOCAB])
def test_the_topk_objective_equals_its_formula_with_its_gradients(top_k: int) -> None:
    ours, plain = setting(torch.float32), setting(torch.float64)
    output, batch = topk_batch(ours, top_k)
    found = TopKReverseKL()(output, batch)
    p = F.linear(plain["hidden"], plain["head"]).softmax(-1)
    q = F.linear(plain["teacher_hidden"], plain["teacher_head"]).softmax(-1)
    chosen = torch.zeros_like(p, dtype=torch.bool).scatter(1, batch.topk_ids, True)
    wanted = torch.zeros((), dtype=torch.float64)
    for place in range(TOKENS):
        inside, outside = chosen[place], ~chosen[place]
        wanted = wanted + (p[place, inside] * (p[place, inside] / q[place, inside]).log()).sum()
        if outside.any():
            rest, teachers_rest = p[place, outside].sum(), q[place, outside].sum()
            wanted = wanted + rest * (rest / teachers_rest).log()
    assert found.loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    mass = (p * chosen).sum().item()
    assert found.values["kl/policy_mass"].sum().item() == pytest.approx(mass, rel=1e-5)
    found.loss.backward()
    wanted.backward()
    for name in ("hidden", "head"):
        gradient = ours[name].grad
        assert gradient is not None
        torch.testing.assert_close(gradient.double(), plain[name].grad, rtol=1e-4, atol=1e-5)


def test_topk_of_the_whole_vocabulary_is_the_full_objective_and_fewer_are_a_lower_bound() -> None:
    s = setting(torch.float32)
    kl = full_reverse_kl(**s).reverse
    whole = torch.autograd.grad(kl.sum(), [s["hidden"], s["head"]])
    losses = []
    for top_k in range(1, VOCAB + 1):
        found = TopKReverseKL()(*topk_batch(s, top_k))
        losses.append(found.loss.item() / TOKENS)
    gradients = torch.autograd.grad(found.loss, [s["hidden"], s["head"]])
    assert losses[-1] == pytest.approx(kl.mean().item(), abs=1e-6)
    for gradient, wanted in zip(gradients, whole, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-6)
    steps = torch.tensor(losses).diff()
    assert bool((steps > -1e-6).all()) and losses[0] < losses[-1] - 0.01


def test_mass_moved_out_of_the_likeliest_tokens_is_seen() -> None:
    # Without the bucket of the others, shrinking all K probabilities together would lower the sum.
    teacher = torch.tensor([[0.6, 0.3]]).log()
    inside = bucketed_kl(torch.tensor([[0.6, 0.3]]).log(), teacher)
    fled = bucketed_kl(torch.tensor([[0.06, 0.03]]).log(), teacher)
    assert inside.item() == pytest.approx(0, abs=1e-6)
    assert fled.item() > 1


def test_the_advantage_can_be_bounded() -> None:
    s = setting(torch.float32)
    targets, mask = s["targets"], torch.ones(TOKENS, dtype=torch.bool)
    logprobs, _ = token_logprobs(s["hidden"], s["head"], targets)
    advantage = torch.linspace(-6, 5, TOKENS)
    batch = SampledMicrobatch(
        **vars(microbatch(targets, mask)),
        sampler_logprobs=logprobs.detach(),
        teacher_logprobs=logprobs.detach() + advantage,
    )
    found = SampledReverseKL(None, max_advantage=2.0)(PolicyOutput(s["hidden"], s["head"]), batch)
    (gradient,) = torch.autograd.grad(found.loss, s["hidden"], retain_graph=True)
    (wanted,) = torch.autograd.grad(-(advantage.clamp(-2, 2) * logprobs).sum(), s["hidden"])
    torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-5)
    # What is reported is the KL itself.
    assert found.values["kl/reverse"].sum().item() == pytest.approx(
        -advantage.sum().item(), abs=1e-4
    )


def test_the_expected_sampled_gradient_is_the_gradient_of_the_reverse_kl() -> None:
    # By enumeration: every token v at every place, weighted with the policy's probability of v.
    s = setting(torch.float32)
    logits = F.linear(s["hidden"], s["head"])
    logp = logits.log_softmax(-1).detach()
    logq = F.linear(s["teacher_hidden"], s["teacher_head"]).log_softmax(-1)
    objective = SampledReverseKL(max_importance_ratio=None, max_advantage=None)
    expected = {"hidden": torch.zeros(TOKENS, WIDTH), "head": torch.zeros(VOCAB, WIDTH)}
    for place in range(TOKENS):
        for v in range(VOCAB):
            targets = torch.full((TOKENS,), v)
            batch = SampledMicrobatch(
                **vars(microbatch(targets, torch.arange(TOKENS) == place)),
                sampler_logprobs=logp[place, v][None],
                teacher_logprobs=logq[place, v][None],
            )
            output = objective(PolicyOutput(s["hidden"], s["head"]), batch)
            gradients = torch.autograd.grad(output.loss, [s["hidden"], s["head"]])
            for name, gradient in zip(("hidden", "head"), gradients, strict=True):
                expected[name] += logp[place, v].exp() * gradient

    kl = full_reverse_kl(**s).reverse
    analytic = torch.autograd.grad(kl.sum(), [s["hidden"], s["head"]])
    for name, wanted in zip(("hidden", "head"), analytic, strict=True):
        torch.testing.assert_close(expected[name], wanted, rtol=1e-4, atol=1e-5)
        assert wanted.abs().max() > 0.01


def test_a_teacher_that_is_the_policy_gives_zero_loss_and_zero_gradient() -> None:
    s = setting(torch.float32)
    targets, mask = s["targets"], torch.ones(TOKENS, dtype=torch.bool)
    logprobs, _ = token_logprobs(s["hidden"], s["head"], targets)
    output = PolicyOutput(s["hidden"], s["head"])
    plain = vars(microbatch(targets, mask))
    sampled = SampledMicrobatch(
        **plain, sampler_logprobs=logprobs.detach(), teacher_logprobs=logprobs.detach()
    )
    full = FullMicrobatch(
        **plain, sampler_logprobs=logprobs.detach(), teacher_hidden=s["hidden"].detach()
    )
    teacher_is_policy = {
        "teacher_hidden": s["hidden"].detach(),
        "teacher_head": s["head"].detach().clone(),
    }
    losses = [
        SampledReverseKL(2.0, None)(output, sampled),
        TopKReverseKL()(*topk_batch(s | teacher_is_policy, 3)),
        FullReverseKL(s["head"].detach().clone())(output, full),
    ]
    for found in losses:
        gradients = torch.autograd.grad(found.loss, [s["hidden"], s["head"]])
        assert abs(found.loss.item()) < 1e-5
        assert abs(float(found.values["kl/reverse"].sum())) < 1e-5
        assert all(gradient.abs().max() < 1e-6 for gradient in gradients)


@pytest.mark.parametrize("cap", [None, 4.0, 2.0, 1.0, 0.9, 0.01])
@pytest.mark.parametrize("on_policy", [True, False])
def test_the_importance_ratio_is_a_capped_weight_and_no_token_loses_its_gradient(
    cap: float | None, on_policy: bool
) -> None:
    s, plain = setting(torch.float32), setting(torch.float64)
    targets, mask = s["targets"], torch.ones(TOKENS, dtype=torch.bool)
    logprobs, _ = token_logprobs(s["hidden"], s["head"], targets)
    g = torch.Generator().manual_seed(1)
    advantage = torch.randn(TOKENS, generator=g)
    # On-policy, rounding alone makes some ratios larger than 1; else they lie between 1/8 and 8.
    spread = 1e-6 if on_policy else 2.0
    log_ratio = (torch.rand(TOKENS, generator=g) - 0.5) * 2 * spread
    batch = SampledMicrobatch(
        **vars(microbatch(targets, mask)),
        sampler_logprobs=logprobs.detach() - log_ratio,
        teacher_logprobs=logprobs.detach() - log_ratio + advantage,
    )
    found = SampledReverseKL(cap, None)(PolicyOutput(s["hidden"], s["head"]), batch)
    gradients = torch.autograd.grad(found.loss, [s["hidden"], s["head"]])

    # Place by place: the policy gradient of the sampled token, times a constant.
    reference = torch.zeros((), dtype=torch.float64)
    logits = F.linear(plain["hidden"], plain["head"])
    num_above = 0
    value = 0.0
    for place in range(TOKENS):
        weight = float(log_ratio[place].double().exp())
        num_above += cap is not None and weight > cap
        weight = weight if cap is None else min(weight, cap)
        logp = logits[place, targets[place]] - logits[place].logsumexp(0)
        reference = reference - weight * float(advantage[place]) * logp
        value -= weight * float(advantage[place])
    wanted = torch.autograd.grad(reference, [plain["hidden"], plain["head"]])
    for ours, theirs in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-5)
    assert (gradients[0].abs().amax(1) > 0).all()  # each place has its part
    assert found.loss.item() == pytest.approx(value, abs=1e-4)
    assert found.values["loss/objective"].sum().item() == pytest.approx(value, abs=1e-4)
    if cap is None:
        assert "kl/ratio_truncated" not in found.values
    elif cap != 1.0 or not on_policy:  # there it is a matter of rounding
        assert int(found.values["kl/ratio_truncated"].sum()) == num_above
        assert num_above > 0 or cap >= (1.0 if on_policy else 4.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_microbatch_without_loss_tokens_has_zero_loss_and_a_whole_graph(
    dtype: torch.dtype,
) -> None:
    s = setting(dtype)
    empty = microbatch(s["targets"], torch.zeros(TOKENS, dtype=torch.bool))
    output = PolicyOutput(s["hidden"], s["head"])
    zeros = torch.zeros(0)
    full = FullMicrobatch(**vars(empty), sampler_logprobs=zeros, teacher_hidden=torch.zeros(0, 0))
    sampled = SampledMicrobatch(**vars(empty), sampler_logprobs=zeros, teacher_logprobs=zeros)
    topk = TopKMicrobatch(
        **vars(empty),
        sampler_logprobs=zeros,
        topk_ids=torch.zeros(0, 0, dtype=torch.int64),
        teacher_topk_logprobs=torch.zeros(0, 0),
        topk_overlap=torch.zeros(0),
    )
    for found in (
        cross_entropy(output, empty),
        FullReverseKL(s["teacher_head"])(output, full),
        SampledReverseKL(None, None)(output, sampled),
        TopKReverseKL()(output, topk),
    ):
        gradients = torch.autograd.grad(found.loss, [s["hidden"], s["head"]])
        assert found.loss.item() == 0.0
        assert all(torch.count_nonzero(gradient) == 0 for gradient in gradients)
