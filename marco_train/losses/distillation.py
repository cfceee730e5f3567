r"""Reverse KL of policy against teacher on the policy's own samples.

    KL(policy || teacher) = E_{x ~ policy} [ log policy(x) - log teacher(x) ]

`sampled` takes the one token that was sampled in each place. Its log-ratio cannot be
differentiated directly: E[grad log policy] = 0, so the signal would vanish on average and leave
noise. It serves as an advantage instead, A = log teacher - log sampler, detached, under the
gradient of -ratio * A with ratio = policy / sampler, whose expectation is the gradient of the KL.
`topk` sums over K tokens and one bucket of all others, differentiated directly: a lower bound of
the KL that needs the teacher's log-probabilities at K tokens. Without the bucket, the policy could
lower the sum by moving its mass out of sight.
`full` sums over the whole vocabulary in each place, which has no variance from the sampled token,
and needs the teacher's hidden states and head.

All hold the prefix fixed: the gradient does not run through how the prefix was sampled, as
in the token-level estimate of the paper's framework (no discount, Marco-MoE section 4.2).

Legend: N tokens with loss, V vocabulary, B of its entries in a tile, D width.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from marco_train.config import Objective, OPDConfig
from marco_train.losses.logprobs import (
    HeadGradient,
    RunningSoftmax,
    gather_logprobs,
    pick,
    token_logprobs,
    vocabulary_blocks,
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
    """Truncation of policy/sampler. None: no truncation."""
    max_advantage: float | None
    """Bound on |A|, in nats. None: no bound."""

    def __call__(self, output: PolicyOutput, microbatch: SampledMicrobatch) -> LossOutput:
        """Sum -ratio * A over the sampled tokens."""
        mask = microbatch.loss_mask
        policy_logprobs, entropy = token_logprobs(
            output.hidden[mask], output.head, microbatch.targets[mask]
        )
        sampler_logprobs = microbatch.sampler_logprobs[mask]
        advantage = microbatch.teacher_logprobs[mask] - sampler_logprobs
        reverse_kl = -advantage.sum()
        if self.max_advantage is not None:
            advantage = advantage.clamp(-self.max_advantage, self.max_advantage)
        log_ratio = policy_logprobs - sampler_logprobs
        ratio = log_ratio.exp()
        if self.max_importance_ratio is not None:
            ratio = ratio.clamp(max=self.max_importance_ratio)
        loss = -(ratio * advantage).sum()
        return LossOutput(
            loss,
            {
                "loss/objective": loss.detach(),
                "kl/reverse": reverse_kl,
                "kl/sampler_mismatch": log_ratio.detach().abs().sum(),
                "loss/entropy": entropy.sum(),
            },
        )


# Mass below which a bucket's logarithm would be of rounding errors.
MIN_MASS = 1e-6


def bucketed_reverse_kl(policy_logprobs: Tensor, teacher_logprobs: Tensor) -> Tensor:
    """Reverse KL between distributions over K tokens and one bucket of all others.

    Args:
        policy_logprobs: [N, K] float32, of K different tokens in each place.
        teacher_logprobs: [N, K] float32, of the same.

    Returns:
        [N] float32 in nats, differentiable in the policy; at most the KL over all tokens.
    """
    p = policy_logprobs.exp()
    p_rest = (1 - p.sum(1)).clamp(min=MIN_MASS)
    q_rest = (1 - teacher_logprobs.exp().sum(1)).clamp(min=MIN_MASS)
    # A token that the policy holds impossible adds nothing, whatever the teacher says of it.
    gaps = torch.where(p > 0, policy_logprobs - teacher_logprobs, 0.0)
    return (p * gaps).sum(1) + p_rest * (p_rest.log() - q_rest.log())


@dataclass(frozen=True)
class TopKReverseKL:
    """The reverse KL over K tokens and the rest of each place, differentiated directly."""

    def __call__(self, output: PolicyOutput, microbatch: TopKMicrobatch) -> LossOutput:
        """Sum the bucketed reverse KL over the places of the sampled tokens."""
        mask = microbatch.loss_mask
        ids = torch.cat([microbatch.topk_ids, microbatch.targets[mask, None]], 1)
        logprobs, entropy = gather_logprobs(output.hidden[mask], output.head, ids)
        policy_topk, policy_logprobs = logprobs[:, :-1], logprobs[:, -1].detach()
        teacher_topk = microbatch.teacher_topk_logprobs
        loss = bucketed_reverse_kl(policy_topk, teacher_topk).sum()
        mismatch = (policy_logprobs - microbatch.sampler_logprobs[mask]).abs()
        return LossOutput(
            loss,
            {
                "loss/objective": loss.detach(),
                "kl/reverse": loss.detach(),
                "kl/policy_mass": policy_topk.detach().exp().sum(),
                "kl/teacher_mass": teacher_topk.exp().sum(),
                "kl/sampler_mismatch": mismatch.sum(),
                "loss/entropy": entropy.sum(),
            },
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
    ) -> tuple[Tensor, Tensor, Tensor]:
        policy = RunningSoftmax(len(hidden), 2, hidden.device)
        teacher = RunningSoftmax(len(hidden), 0, hidden.device)
        target_logits = torch.empty(len(hidden), 1, device=hidden.device)
        for block in vocabulary_blocks(len(hidden), len(head), hidden.device):
            policy_NB = F.linear(hidden, head[block]).float()
            teacher_NB = F.linear(teacher_hidden, teacher_head[block]).float()
            policy.add(policy_NB, policy_NB, policy_NB - teacher_NB)
            teacher.add(teacher_NB)
            pick(policy_NB, targets[:, None], block, into=target_logits)
        mean_logit, gap = policy.means
        kl = gap - policy.logsumexp + teacher.logsumexp
        ctx.save_for_backward(hidden, head, teacher_hidden, teacher_head, policy.logsumexp, gap)
        entropy = policy.logsumexp - mean_logit
        logprobs = target_logits[:, 0] - policy.logsumexp
        ctx.mark_non_differentiable(entropy, logprobs)
        return kl, entropy, logprobs

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, grad: Tensor, *_: Tensor
    ) -> tuple[Tensor, Tensor, None, None, None]:
        hidden, head, teacher_hidden, teacher_head, logsumexp, gap = ctx.saved_tensors  # type: ignore[attr-defined]
        carried = HeadGradient(hidden, head)
        for block in vocabulary_blocks(len(hidden), len(head), hidden.device):
            policy_NB = F.linear(hidden, head[block]).float()
            teacher_NB = F.linear(teacher_hidden, teacher_head[block]).float()
            # d KL / d logits = p (log p - log q - KL), in which both logsumexps cancel.
            gap_NB = (policy_NB - teacher_NB).sub_(gap[:, None])
            p_NB = policy_NB.sub_(logsumexp[:, None]).exp_()
            carried.add(gap_NB.mul_(p_NB).mul_(grad[:, None]), block)
        return (*carried.gradients(), None, None, None)


def full_reverse_kl(
    hidden: Tensor,
    head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    targets: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Reverse KL over the whole vocabulary in each place, in nats.

    Args:
        hidden: [N, D] of the policy.
        head: [V, D] of the policy.
        teacher_hidden: [N, D'] of the teacher, after its final norm.
        teacher_head: [V, D'] of the teacher.
        targets: [N] int64, the sampled tokens.

    Returns:
        KL [N] float32, differentiable in the policy; the policy's entropy [N] and its
        log-probability of the targets [N], not differentiable.
    """
    found: tuple[Tensor, Tensor, Tensor] = _FullReverseKL.apply(  # type: ignore[no-untyped-call]
        hidden, head, teacher_hidden, teacher_head, targets
    )
    return found


@dataclass(frozen=True)
class FullReverseKL:
    """The exact reverse KL of each place, differentiated directly."""

    teacher_head: Tensor  # [V, D'], frozen

    def __call__(self, output: PolicyOutput, microbatch: FullMicrobatch) -> LossOutput:
        """Sum the reverse KL over the places of the sampled tokens."""
        mask = microbatch.loss_mask
        kl, entropy, policy_logprobs = full_reverse_kl(
            output.hidden[mask],
            output.head,
            # [0, 0] where no rollout told the width.
            microbatch.teacher_hidden.view(-1, self.teacher_head.shape[1]),
            self.teacher_head,
            microbatch.targets[mask],
        )
        loss = kl.sum()
        mismatch = (policy_logprobs - microbatch.sampler_logprobs[mask]).abs()
        return LossOutput(
            loss,
            {
                "loss/objective": loss.detach(),
                "kl/reverse": loss.detach(),
                "kl/sampler_mismatch": mismatch.sum(),
                "loss/entropy": entropy.sum(),
            },
        )


def build_reverse_kl(cfg: OPDConfig, teacher_head: Tensor) -> LossFn:
    """Choose the objective by its config; `teacher_head` is [V, D']."""
    match cfg.objective:
        case Objective.sampled:
            return SampledReverseKL(cfg.max_importance_ratio, cfg.max_advantage)
        case Objective.topk:
            return TopKReverseKL()
        case Objective.full:
            return FullReverseKL(teacher_head)
