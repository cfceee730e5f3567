"""Log-probabilities of given tokens from hidden states, in chunks: [N, V] never exists whole.

Legend: N tokens with loss, V vocabulary, D width, C tokens of a chunk.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# Tokens whose logits exist at once: large enough for full-speed matrix products, small enough
# for a vocabulary of 151,936 (1.2 GiB in float32).
CHUNK = 2048


class _TokenLogprobs(torch.autograd.Function):
    """Saves one logsumexp a token; backward computes the logits of a chunk again."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        hidden: Tensor,
        head: Tensor,
        targets: Tensor,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        logprobs = hidden.new_empty(len(hidden), dtype=torch.float32)
        logsumexp = torch.empty_like(logprobs)
        entropy = torch.empty_like(logprobs)
        for start in range(0, len(hidden), chunk):
            part = slice(start, start + chunk)
            logits_CV = F.linear(hidden[part], head).float()
            logsumexp[part] = logits_CV.logsumexp(-1)
            logprobs[part] = logits_CV.gather(1, targets[part, None])[:, 0] - logsumexp[part]
            p_CV = (logits_CV - logsumexp[part, None]).exp_()
            entropy[part] = logsumexp[part] - torch.linalg.vecdot(p_CV, logits_CV)
        ctx.save_for_backward(hidden, head, targets, logsumexp)
        ctx.chunk = chunk  # type: ignore[attr-defined]
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, grad: Tensor, _entropy: Tensor
    ) -> tuple[Tensor, Tensor, None, None]:
        hidden, head, targets, logsumexp = ctx.saved_tensors  # type: ignore[attr-defined]
        grad_hidden = torch.empty_like(hidden)
        grad_head = torch.zeros_like(head, dtype=torch.float32)
        chunk: int = ctx.chunk  # type: ignore[attr-defined]
        for start in range(0, len(hidden), chunk):
            part = slice(start, start + chunk)
            logits_CV = F.linear(hidden[part], head).float()
            # d log p[target] / d logits = onehot(target) - p
            grad_CV = (logits_CV - logsumexp[part, None]).exp_().mul_(-grad[part, None])
            grad_CV.scatter_add_(1, targets[part, None], grad[part, None])
            accumulate_head_gradient(grad_CV, hidden[part], head, grad_hidden[part], grad_head)
        return grad_hidden, grad_head.to(head.dtype), None, None


def accumulate_head_gradient(
    grad_CV: Tensor, hidden_CD: Tensor, head: Tensor, grad_hidden_CD: Tensor, grad_head: Tensor
) -> None:
    """Carry the gradient of a chunk's logits to its hidden states and, in float32, to the head."""
    grad_CV = grad_CV.to(head.dtype)
    torch.mm(grad_CV, head, out=grad_hidden_CD)
    if head.dtype == torch.float32:
        grad_head.addmm_(grad_CV.T, hidden_CD)
    else:
        grad_head += grad_CV.T @ hidden_CD


def token_logprobs(
    hidden: Tensor, head: Tensor, targets: Tensor, chunk: int = CHUNK
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target and entropy of each distribution, in nats.

    Args:
        hidden: [N, D], only tokens with loss.
        head: [V, D].
        targets: [N] int64.
        chunk: Tokens whose logits exist at once.

    Returns:
        logprobs [N] float32, differentiable; entropy [N] float32, not differentiable.
    """
    found: tuple[Tensor, Tensor] = _TokenLogprobs.apply(  # type: ignore[no-untyped-call]
        hidden, head, targets, chunk
    )
    return found
