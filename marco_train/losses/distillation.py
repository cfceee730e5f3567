r"""Reverse KL of policy against teacher on the policy's own samples.

    KL(policy || teacher) = E_{x ~ policy} [ log policy(x) - log teacher(x) ]

`sampled` takes the one token that was sampled in each place. Its log-ratio cannot be
differentiated directly: E[grad log policy] = 0, so the signal would vanish on average and leave
noise. It serves as an advantage instead, A = log teacher - log sampler, in a policy gradient with
truncated importance sampling (TIS, fengyao.notion.site/off-policy-rl):

    gradient = -min(policy / sampler, C) * A * grad log policy

in which the weight and A are constants. Where the policy's own weights sampled, its expectation is
the gradient of the KL; where older ones did, A is the log-ratio of these. C bounds the variance:
tokens above the cap count as if their ratio were C, a bias towards the sampler's distribution, and
every token keeps its gradient.
The alternatives take gradient away: a clamp inside of the graph, min(ratio, C) * A, and masked
importance sampling from every token above the cap; PPO's clip where the ratio has moved in the
advantage's favour.
`topk` sums over K tokens and one bucket of all others, differentiated directly: a lower bound of
the KL that needs the teacher's log-probabilities at K tokens. Without the bucket, the policy could
lower the sum by moving its mass out of sight.
`full` sums over the whole vocabulary in each place, which has no variance from the sampled token,
and needs the teacher's hidden states and head.

All hold the prefix fixed: the gradient does not run through how the prefix was sampled, as
in the token-level estimate of the paper's framework (no discount, Marco-MoE section 4.2).

Legend: N tokens with loss, n of them in a tile, V vocabulary, B of its entries in a tile, D width.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from marco_train.config.opd import Objective, OPDConfig
from marco_train.losses.ahead import KeptTiles, LearntAhead, joined, learns_ahead
from marco_train.losses.chains import block_comparison, kl_gradient
from marco_train.losses.logprobs import (
    HeadGradient,
    RunningSoftmax,
    at_loss_tokens,
    float32_logits,
    gather_logprobs,
    pick,
    tiles,
    token_logprobs,
)
from marco_train.types import (
    FullMicrobatch,
    LossFn,
    LossOutput,
    PolicyOutput,
    SampledMicrobatch,
    TopKMicrobatch,
)


@dataclass(frozen=True)
class SampledReverseKL:
    """Policy gradient with the teacher's log-ratio as each token's advantage."""

    max_importance_ratio: float | None
    """Cap C on the weight policy/sampler, above 0. None: no cap."""
    max_advantage: float | None
    """Bound on |A|, in nats. None: no bound."""

    def __call__(self, output: PolicyOutput, microbatch: SampledMicrobatch) -> LossOutput:
        """Sum -min(ratio, C) * A over the sampled tokens; the gradient is that of TIS (above)."""
        policy_logprobs, entropy = token_logprobs(*at_loss_tokens(output, microbatch))
        sampler_logprobs = microbatch.sampler_logprobs
        advantage = microbatch.teacher_logprobs - sampler_logprobs
        log_ratio = policy_logprobs - sampler_logprobs
        weight = log_ratio.detach().exp()
        values = {
            "kl/reverse": -advantage,
            "loss/entropy": entropy,
        } | _sampler_values(log_ratio.detach())
        spreads = {"kl/advantage": advantage}
        if self.max_advantage is not None:
            advantage = advantage.clamp(-self.max_advantage, self.max_advantage)
        if self.max_importance_ratio is not None:
            values["kl/ratio_truncated"] = (weight > self.max_importance_ratio).float()
            weight = weight.clamp(max=self.max_importance_ratio)
        # One, whose gradient is that of the policy's log-probability.
        one = 1 + log_ratio - log_ratio.detach()
        losses = -(weight * advantage) * one
        values["loss/objective"] = losses.detach()
        return LossOutput(losses.sum(), values, spreads)


def _sampler_values(log_ratio: Tensor) -> dict[str, Tensor]:
    """How far the sampler is from the policy, by the sampled tokens' log-ratios [N]."""
    return {
        "kl/sampler_mismatch": log_ratio.abs(),
        # Unbiased for KL(sampler || policy), and never negative.
        "kl/sampler": log_ratio.exp() - 1 - log_ratio,
    }


# Mass below which a bucket's logarithm would be of rounding errors.
MIN_MASS = 1e-6


def bucketed_kl(logp: Tensor, logq: Tensor) -> Tensor:
    """KL(p || q) of distributions over K tokens and one bucket of all others.

    Args:
        logp: [N, K] float32, of K different tokens in each place.
        logq: [N, K] float32, of the same.

    Returns:
        [N] float32 in nats, differentiable; at most the KL over all tokens.
    """
    p = logp.exp()
    p_rest = (1 - p.sum(1)).clamp(min=MIN_MASS)
    q_rest = (1 - logq.exp().sum(1)).clamp(min=MIN_MASS)
    # A token that p holds impossible adds nothing, whatever q says of it.
    gaps = torch.where(p > 0, logp - logq, 0.0)
    return (p * gaps).sum(1) + p_rest * (p_rest.log() - q_rest.log())


@dataclass(frozen=True)
class TopKReverseKL:
    """The reverse KL over K tokens and the rest of each place, differentiated directly."""

    def __call__(self, output: PolicyOutput, microbatch: TopKMicrobatch) -> LossOutput:
        """Sum the bucketed reverse KL over the places of the sampled tokens."""
        hidden, head, targets = at_loss_tokens(output, microbatch)
        ids = torch.cat([microbatch.topk_ids, targets[:, None]], 1)
        logprobs, entropy = gather_logprobs(hidden, head, ids)
        policy_topk, policy_logprobs = logprobs[:, :-1], logprobs[:, -1].detach()
        teacher_topk = microbatch.teacher_topk_logprobs
        losses = bucketed_kl(policy_topk, teacher_topk)
        values = {
            "loss/objective": losses.detach(),
            "kl/reverse": losses.detach(),
            "kl/forward": bucketed_kl(teacher_topk, policy_topk.detach()),
            "kl/policy_mass": policy_topk.detach().exp().sum(1),
            "kl/teacher_mass": teacher_topk.exp().sum(1),
            "kl/topk_overlap": microbatch.topk_overlap,
            "loss/entropy": entropy,
        } | _sampler_values(policy_logprobs - microbatch.sampler_logprobs)
        return LossOutput(losses.sum(), values, spreads={})


class _Comparison:
    """Two distributions over the vocabulary in each place, of which tiles of logits come."""

    def __init__(self, num_tokens: int, device: torch.device) -> None:
        self.policy = RunningSoftmax(num_tokens, 2, device)
        self.teacher = RunningSoftmax(num_tokens, 2, device)
        self._target_logits = torch.empty(num_tokens, 1, device=device)

    @property
    def gap(self) -> Tensor:
        """Mean of policy - teacher, both logits, under the policy's softmax; [N]."""
        return self.policy.means[1]

    def add(
        self, rows: slice, block: slice, policy_nB: Tensor, teacher_nB: Tensor, targets: Tensor
    ) -> None:
        """Take a tile of both logits; `targets` [N] are the sampled tokens."""
        sums = block_comparison(policy_nB, teacher_nB)
        self.policy.add_sums(rows, *sums[:4])
        self.teacher.add_sums(rows, *sums[4:])
        pick(policy_nB, targets[rows, None], block, into=self._target_logits[rows])

    def found(self) -> tuple[Tensor, ...]:
        """What `FullKL` names, in its order, when all tiles have come."""
        policy, teacher = self.policy, self.teacher
        return (
            self.gap - policy.logsumexp + teacher.logsumexp,
            policy.logsumexp - policy.means[0],
            self._target_logits[:, 0] - policy.logsumexp,
            policy.logsumexp - teacher.logsumexp - teacher.means[1],
            teacher.logsumexp - teacher.means[0],
        )


class _FullReverseKL(torch.autograd.Function):
    """Saves three numbers a token; backward computes both logits of a tile again."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        hidden: Tensor,
        head: Tensor,
        teacher_hidden: Tensor,
        teacher_head: Tensor,
        targets: Tensor,
    ) -> tuple[Tensor, ...]:
        both = _Comparison(len(hidden), hidden.device)
        for rows, block in tiles(hidden, head):
            policy_nB = float32_logits(hidden[rows], head[block])
            teacher_nB = float32_logits(teacher_hidden[rows], teacher_head[block])
            both.add(rows, block, policy_nB, teacher_nB, targets)
        models = (hidden, head, teacher_hidden, teacher_head)
        ctx.save_for_backward(*models, both.policy.logsumexp, both.gap)
        found = both.found()
        ctx.mark_non_differentiable(*found[1:])
        return found

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, grad: Tensor, *_: Tensor
    ) -> tuple[Tensor, Tensor, None, None, None]:
        hidden, head, teacher_hidden, teacher_head, logsumexp, gap = ctx.saved_tensors  # type: ignore[attr-defined]
        carried = HeadGradient(hidden, head)
        for rows, block in tiles(hidden, head):
            policy_nB = float32_logits(hidden[rows], head[block])
            teacher_nB = float32_logits(teacher_hidden[rows], teacher_head[block])
            kl_gradient(policy_nB, teacher_nB, logsumexp[rows], gap[rows], grad[rows])
            carried.add(policy_nB, rows, block)
        return (*carried.gradients(), None, None, None)


class _SumFullReverseKL(LearntAhead):
    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        hidden: Tensor,
        head: Tensor,
        teacher_hidden: Tensor,
        teacher_head: Tensor,
        targets: Tensor,
    ) -> tuple[Tensor, ...]:
        carried = HeadGradient(hidden, head)
        kept = KeptTiles([hidden, teacher_hidden], [head, teacher_head])
        found: list[tuple[Tensor, ...]] = []
        target_logits = (hidden * head[targets]).sum(1)
        for rows in kept.pieces():
            sums = []
            for block in kept.blocks():
                tile = kept.logits(rows, block)
                exponentials, of_tile = kept.exponentials(tile)
                sums.append(of_tile)
                policy_nB, teacher_nB = tile.unbind(1)
                torch.sub(policy_nB, teacher_nB, out=teacher_nB)
                policy_nB.copy_(exponentials[:, 0])
            softmax = joined(sums)
            policy, teacher = softmax.logsumexp.unbind(1)
            # Mean logits of policy and teacher: where the policy is, and where the teacher is.
            own, of_teacher = softmax.means[:, 0].unbind(1)
            of_policy, teachers_own = softmax.means[:, 1].unbind(1)
            gap = own - of_teacher
            for block, shares in zip(kept.blocks(), softmax.shares, strict=True):
                # d KL / d logits = p (log p - log q - KL), in which both logsumexps cancel.
                grad_nB, gap_nB = kept.tile(rows, block).unbind(1)
                grad_nB.mul_(gap_nB.sub_(gap[:, None])).mul_(shares[:, :1])
                carried.add(grad_nB, rows, block)
            found.append(
                (
                    gap - policy + teacher,
                    policy - own,
                    target_logits[rows] - policy,
                    policy - teacher - of_policy + teachers_own,
                    teacher - teachers_own,
                )
            )
        ctx.carried = carried  # type: ignore[attr-defined]
        terms = tuple(torch.cat(pieces) for pieces in zip(*found, strict=True))
        ctx.mark_non_differentiable(*terms)
        return (terms[0].sum(), *terms)


class FullKL(NamedTuple):
    """What `full_reverse_kl` finds in each place, [N] float32 each; nats."""

    reverse: Tensor  # policy against teacher; of `full_reverse_kl` differentiable in the policy
    entropy: Tensor  # of the policy
    logprobs: Tensor  # the policy's, of the targets
    forward: Tensor  # teacher against policy
    teacher_entropy: Tensor


def full_reverse_kl(
    hidden: Tensor,
    head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    targets: Tensor,
) -> FullKL:
    """Reverse KL over the whole vocabulary in each place, and what falls off beside it.

    Args:
        hidden: [N, D] of the policy.
        head: [V, D] of the policy.
        teacher_hidden: [N, D'] of the teacher, after its final norm.
        teacher_head: [V, D'] of the teacher.
        targets: [N] int64, the sampled tokens.
    """
    return FullKL(
        *_FullReverseKL.apply(hidden, head, teacher_hidden, teacher_head, targets)  # type: ignore[no-untyped-call]
    )


def summed_reverse_kl(
    hidden: Tensor,
    head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    targets: Tensor,
) -> tuple[Tensor, FullKL]:
    """Sum `full_reverse_kl` over the places: the sum, which alone is differentiable, and terms."""
    given = hidden, head, teacher_hidden, teacher_head, targets
    if learns_ahead(hidden, head) and teacher_head.dtype == torch.float32:
        total, *found = _SumFullReverseKL.apply(*given)  # type: ignore[no-untyped-call]
        return total, FullKL(*found)
    seen = full_reverse_kl(*given)
    return seen.reverse.sum(), seen._replace(reverse=seen.reverse.detach())


@dataclass(frozen=True)
class FullReverseKL:
    """The exact reverse KL of each place, differentiated directly."""

    teacher_head: Tensor  # [V, D'], frozen

    def __call__(self, output: PolicyOutput, microbatch: FullMicrobatch) -> LossOutput:
        """Sum the reverse KL over the places of the sampled tokens."""
        hidden, head, targets = at_loss_tokens(output, microbatch)
        total, found = summed_reverse_kl(
            hidden,
            head,
            # [0] float32 where no rollout told the width and the type.
            microbatch.teacher_hidden.view(-1, self.teacher_head.shape[1]).to(
                self.teacher_head.dtype
            ),
            self.teacher_head,
            targets,
        )
        values = {
            "loss/objective": found.reverse,
            "kl/reverse": found.reverse,
            "kl/forward": found.forward,
            "kl/teacher_entropy": found.teacher_entropy,
            "loss/entropy": found.entropy,
        } | _sampler_values(found.logprobs - microbatch.sampler_logprobs)
        return LossOutput(total, values, spreads={})


def build_reverse_kl(cfg: OPDConfig, teacher_head: Tensor | None) -> LossFn:
    """Choose the objective by its config; `teacher_head` is [V, D'] for `full`."""
    match cfg.objective:
        case Objective.sampled:
            return SampledReverseKL(cfg.max_importance_ratio, cfg.max_advantage)
        case Objective.topk:
            return TopKReverseKL()
        case Objective.full:
            assert teacher_head is not None, "the teacher has no head"
            return FullReverseKL(teacher_head)
