r"""Reverse KL of policy against teacher on the policy's own samples.

    KL(policy || teacher) = E_{x ~ policy} [ log policy(x) - log teacher(x) ]

`sampled` takes the one token that was sampled in each place. Its log-ratio cannot be
differentiated directly: E[grad log policy] = 0, so the signal would vanish on average and leave
noise. It serves as an advantage instead, A = log teacher - log sampler, detached, under the
gradient of -ratio * A with ratio = policy / sampler, whose expectation is the gradient of the KL.
`full` sums over the whole vocabulary in each place, which has no variance from the sampled token,
and needs the teacher's hidden states and head.

Both hold the prefix fixed: the gradient does not run through how the prefix was sampled, as
in the token-level estimate of the paper's framework (no discount, Marco-MoE section 4.2).

Legend: N tokens with loss, V vocabulary, D width, C tokens of a chunk.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from marco_train.config import Objective
from marco_train.losses.logprobs import CHUNK, accumulate_head_gradient, token_logprobs
from marco_train.types import FullMicrobatch, LossFn, LossOutput, PolicyOutput, SampledMicrobatch


@dataclass(frozen=True)
class SampledReverseKL:
    """Policy gradient with the teacher's log-ratio as each token's advantage."""

    max_importance_ratio: float | None
    """Truncation of policy/sampler. None: no truncation."""

    def __call__(self, output: PolicyOutput, microbatch: SampledMicrobatch) -> LossOutput:
        """Sum -ratio * A over the sampled tokens."""
        mask = microbatch.loss_mask
        policy_logprobs, entropy = token_logprobs(
            output.hidden[mask], output.head, microbatch.targets[mask]
        )
        sampler_logprobs = microbatch.sampler_logprobs[mask]
        advantage = microbatch.teacher_logprobs[mask] - sampler_logprobs
        log_ratio = policy_logprobs - sampler_logprobs
        ratio = log_ratio.exp()
        if self.max_importance_ratio is not None:
            ratio = ratio.clamp(max=self.max_importance_ratio)
        loss = -(ratio * advantage).sum()
        return LossOutput(
            loss,
            {
                "loss/objective": loss.detach(),
                "kl/reverse": -advantage.sum(),
                "kl/sampler_mismatch": log_ratio.detach().abs().sum(),
                "loss/entropy": entropy.sum(),
            },
        )


class _FullReverseKL(torch.autograd.Function):
    """Saves three numbers a token; backward computes both logits of a chunk again."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        hidden: Tensor,
        head: Tensor,
        teacher_hidden: Tensor,
        teacher_head: Tensor,
        targets: Tensor,
        chunk: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        kl = hidden.new_empty(len(hidden), dtype=torch.float32)
        entropy, logprobs = torch.empty_like(kl), torch.empty_like(kl)
        for start in range(0, len(hidden), chunk):
            part = slice(start, start + chunk)
            logp_CV = F.linear(hidden[part], head).float().log_softmax(-1)
            logq_CV = F.linear(teacher_hidden[part], teacher_head).float().log_softmax(-1)
            logprobs[part] = logp_CV.gather(1, targets[part, None])[:, 0]
            p_CV = logp_CV.exp()
            entropy[part] = -torch.linalg.vecdot(p_CV, logp_CV)
            kl[part] = -entropy[part] - torch.linalg.vecdot(p_CV, logq_CV)
        ctx.save_for_backward(hidden, head, teacher_hidden, teacher_head, kl)
        ctx.chunk = chunk  # type: ignore[attr-defined]
        ctx.mark_non_differentiable(entropy, logprobs)
        return kl, entropy, logprobs

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, grad: Tensor, *_: Tensor
    ) -> tuple[Tensor, Tensor, None, None, None, None]:
        hidden, head, teacher_hidden, teacher_head, kl = ctx.saved_tensors  # type: ignore[attr-defined]
        grad_hidden = torch.empty_like(hidden)
        grad_head = torch.zeros_like(head, dtype=torch.float32)
        chunk: int = ctx.chunk  # type: ignore[attr-defined]
        for start in range(0, len(hidden), chunk):
            part = slice(start, start + chunk)
            logp_CV = F.linear(hidden[part], head).float().log_softmax(-1)
            logq_CV = F.linear(teacher_hidden[part], teacher_head).float().log_softmax(-1)
            # d KL / d logits = p (log p - log q - KL)
            grad_CV = (logp_CV - logq_CV).sub_(kl[part, None]).mul_(logp_CV.exp_())
            grad_CV.mul_(grad[part, None])
            accumulate_head_gradient(grad_CV, hidden[part], head, grad_hidden[part], grad_head)
        return grad_hidden, grad_head.to(head.dtype), None, None, None, None


def full_reverse_kl(
    hidden: Tensor,
    head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    targets: Tensor,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor, Tensor]:
    """Reverse KL over the whole vocabulary in each place, in nats.

    Args:
        hidden: [N, D] of the policy.
        head: [V, D] of the policy.
        teacher_hidden: [N, D'] of the teacher, after its final norm.
        teacher_head: [V, D'] of the teacher.
        targets: [N] int64, the sampled tokens.
        chunk: Tokens whose logits exist at once.

    Returns:
        KL [N] float32, differentiable in the policy; the policy's entropy [N] and its
        log-probability of the targets [N], not differentiable.
    """
    found: tuple[Tensor, Tensor, Tensor] = _FullReverseKL.apply(  # type: ignore[no-untyped-call]
        hidden, head, teacher_hidden, teacher_head, targets, chunk
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
            microbatch.teacher_hidden,
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


def build_reverse_kl(
    objective: Objective, max_importance_ratio: float | None, teacher_head: Tensor
) -> LossFn:
    """Choose the objective by its config; `teacher_head` is [V, D']."""
    match objective:
        case Objective.sampled:
            return SampledReverseKL(max_importance_ratio)
        case Objective.full:
            return FullReverseKL(teacher_head)
