"""The head as a sampler needs it: multiplied by few tokens, again and again, by weights that rest.

On a CPU, BLAS reads a large head for few tokens at a fraction of the memory's rate. oneDNN copies
it once, in the order in which its kernels read it.
"""

import platform

import torch
from torch import Tensor

from marco_train.losses.logprobs import float32_logits

# Elements of a head from which on a copy pays, and tokens of one product with it.
LARGE_HEAD, MOST_TOKENS = 2**22, 32


def is_laid_out(num_elements: int, dtype: torch.dtype, on_cpu: bool) -> bool:
    """Whether a sampler copies a head of so many elements, which takes as much memory again."""
    has_kernels = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    has_kernels = has_kernels and platform.machine() == "x86_64"
    return on_cpu and has_kernels and dtype == torch.float32 and num_elements >= LARGE_HEAD


class DecodingHead:
    """Gives logits of few tokens at a time, while the weights stay as they are."""

    def __init__(self, head: Tensor) -> None:
        """Take the head, [V, D]."""
        self._head = head
        self._laid_out: Tensor | None = None
        self._room: Tensor | None = None
        if is_laid_out(head.numel(), head.dtype, on_cpu=head.device.type == "cpu"):
            operators = torch.ops.mkldnn  # those that torch's own compiler puts in a frozen model
            self._laid_out = operators._reorder_linear_weight(head.detach(), MOST_TOKENS)

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [n, V] float32 of hidden states [n, D], which may last until the next call."""
        if self._laid_out is None:
            return float32_logits(hidden, self._head)
        parts: list[Tensor] = [
            torch.ops.mkldnn._linear_pointwise(part, self._laid_out, None, "none", [], "")
            for part in torch.split(hidden, MOST_TOKENS)
        ]
        if len(parts) == 1:
            return parts[0]
        if self._room is None or len(self._room) < len(hidden):
            # Kept: memory that is new each time would cost more than a softmax of it.
            self._room = hidden.new_empty(len(hidden), len(self._head))
        return torch.cat(parts, out=self._room[: len(hidden)])
