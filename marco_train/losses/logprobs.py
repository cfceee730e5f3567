"""Log-probabilities from hidden states, tile by tile of the logits: [N, V] never exists.

A tile has n of the tokens and a block of the vocabulary, a fixed number of elements at most, so
that memory depends on neither N nor V. Backward computes each tile again; `losses/ahead.py` says
where it need not.

Legend: N tokens with loss, n of them in a tile, M tokens asked for in each place, V vocabulary, B
of its entries in a tile, D width.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from marco_train.losses.chains import block_softmax, softmax_gradient
from marco_train.types import Microbatch, PolicyOutput

# Logits that exist at once: on a CPU a tile should stay in the cache (4 MiB in float32), on a GPU
# it should keep the matrix units busy (256 MiB).
TILE_ELEMENTS = {"cpu": 2**20, "cuda": 2**26}
# Tokens of a tile at most. A CPU multiplies few of them by many entries faster; a GPU takes all.
TILE_ROWS = {"cpu": 256}
MIN_BLOCK = 256


def block_width(num_tokens: int, most_elements: int) -> int:
    """Entries of the vocabulary for a tile of that many tokens, whose elements are bounded."""
    return max(MIN_BLOCK, most_elements // max(1, num_tokens))


def vocabulary_blocks(num_tokens: int, vocab_size: int, most_elements: int) -> Iterator[slice]:
    """Cut the vocabulary in blocks of that width; the last one may be narrower."""
    width = block_width(num_tokens, most_elements)
    for start in range(0, vocab_size, width):
        yield slice(start, min(start + width, vocab_size))


def tiles(hidden: Tensor, head: Tensor) -> Iterator[tuple[slice, slice]]:
    """Cut the logits of hidden states [N, D] and head [V, D].

    Yields:
        Tokens and entries of the vocabulary of a tile: for each block of the vocabulary, all tokens
        from the first to the last. In half precision a tile has all of them: its sums over tokens
        would be rounded between two products.
    """
    N = len(hidden)
    n = min(N, TILE_ROWS.get(hidden.device.type, N)) if head.dtype == torch.float32 else N
    for block in vocabulary_blocks(n, len(head), TILE_ELEMENTS[hidden.device.type]):
        for start in range(0, max(1, N), max(1, n)):
            yield slice(start, min(start + n, N)), block


def float32_logits(hidden: Tensor, head: Tensor) -> Tensor:
    """Multiply hidden states [n, D] and rows of the head [B, D] to logits [n, B] float32.

    A product sums in float32. A GPU gives the sums as they are, and no gradient: torch has none for
    such a product. A CPU rounds them to the type of the weights.
    """
    if hidden.is_cuda:
        return torch.mm(hidden, head.T, out_dtype=torch.float32)
    return F.linear(hidden, head).float()


class RunningSoftmax:
    """Logsumexp of logits that come tile by tile, and means under their softmax."""

    def __init__(self, num_tokens: int, num_means: int, device: torch.device) -> None:
        self.logsumexp = torch.full((num_tokens,), -torch.inf, device=device)  # [N] float32
        self.means = torch.zeros(num_means, num_tokens, device=device)  # float32

    def add(self, rows: slice, logits_nB: Tensor, *values_nB: Tensor) -> None:
        """Take a tile of logits and, for each mean, the values to average; all float32."""
        self.add_sums(rows, *block_softmax(logits_nB, *values_nB))

    def add_sums(self, rows: slice, top: Tensor, mass: Tensor, *sums: Tensor) -> None:
        """Take what `block_softmax` finds in a tile."""
        block = top + mass.log()
        logsumexp, means = self.logsumexp[rows], self.means[:, rows]
        joint = torch.logaddexp(logsumexp, block)
        means *= (logsumexp - joint).exp_()
        share = (block - joint).exp_() / mass
        for number, of_values in enumerate(sums):
            means[number] += of_values * share
        logsumexp.copy_(joint)


def pick(logits_nB: Tensor, ids: Tensor, block: slice, into: Tensor) -> None:
    """Copy the logits of those ids [n, M] that lie in the block."""
    local = ids - block.start
    inside = (local >= 0) & (local < logits_nB.shape[1])
    found = logits_nB.gather(1, local.clamp(0, logits_nB.shape[1] - 1))
    torch.where(inside, found, into, out=into)


class HeadGradient:
    """Carries gradients of logits, tile by tile, to the hidden states and the head."""

    def __init__(self, hidden: Tensor, head: Tensor) -> None:
        self._hidden = hidden
        self._head = head
        self._grad_hidden = torch.zeros_like(hidden, dtype=torch.float32)
        self._grad_head = torch.empty_like(head)

    def add(self, grad_nB: Tensor, rows: slice, block: slice) -> None:
        """Take the gradient of a tile's logits, float32, in the order of `tiles`."""
        grad_nB = grad_nB.to(self._head.dtype)
        if rows.start == 0:
            torch.mm(grad_nB.T, self._hidden[rows], out=self._grad_head[block])
        else:
            self._grad_head[block].addmm_(grad_nB.T, self._hidden[rows])
        if self._head.dtype == torch.float32:
            self._grad_hidden[rows].addmm_(grad_nB, self._head[block])
        else:
            self._grad_hidden[rows] += grad_nB @ self._head[block]

    def add_targets(self, ids: Tensor) -> None:
        """Take a gradient of 1 of the logit of one id in each place, [N]; after all tiles."""
        self._grad_hidden += self._head[ids]
        self._grad_head.index_add_(0, ids, self._hidden)

    def gradients(self) -> tuple[Tensor, Tensor]:
        """Return those of hidden [N, D] and head [V, D], in their types."""
        return self._grad_hidden.to(self._hidden.dtype), self._grad_head


def logprob_gradient(
    logits_nB: Tensor, logsumexp: Tensor, ids: Tensor, grad: Tensor, block: slice
) -> Tensor:
    """Turn a tile of logits into its gradient.

    d sum_m g_m log p[id_m] / d logits = sum_m g_m onehot(id_m) - p sum_m g_m

    Args:
        logits_nB: Is overwritten.
        logsumexp: [n].
        ids: [n, M], whose log-probabilities have the gradients.
        grad: [n, M].
        block: Of the vocabulary.
    """
    softmax_gradient(logits_nB, logsumexp, -grad.sum(1, keepdim=True))
    local = ids - block.start
    inside = (local >= 0) & (local < logits_nB.shape[1])
    local = local.clamp(0, logits_nB.shape[1] - 1)
    return logits_nB.scatter_add_(1, local, torch.where(inside, grad, 0.0))


class _GatherLogprobs(torch.autograd.Function):
    """Saves one logsumexp a token."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, hidden: Tensor, head: Tensor, ids: Tensor
    ) -> tuple[Tensor, Tensor]:
        running = RunningSoftmax(len(hidden), 1, hidden.device)
        logits = torch.empty(ids.shape, device=hidden.device)
        for rows, block in tiles(hidden, head):
            logits_nB = float32_logits(hidden[rows], head[block])
            running.add(rows, logits_nB, logits_nB)
            pick(logits_nB, ids[rows], block, into=logits[rows])
        ctx.save_for_backward(hidden, head, ids, running.logsumexp)
        entropy = running.logsumexp - running.means[0]
        ctx.mark_non_differentiable(entropy)
        return logits - running.logsumexp[:, None], entropy

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, grad: Tensor, _entropy: Tensor
    ) -> tuple[Tensor, Tensor, None]:
        hidden, head, ids, logsumexp = ctx.saved_tensors  # type: ignore[attr-defined]
        carried = HeadGradient(hidden, head)
        for rows, block in tiles(hidden, head):
            logits_nB = float32_logits(hidden[rows], head[block])
            grad_nB = logprob_gradient(logits_nB, logsumexp[rows], ids[rows], grad[rows], block)
            carried.add(grad_nB, rows, block)
        return (*carried.gradients(), None)


def gather_logprobs(hidden: Tensor, head: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of given tokens and entropy of each distribution, in nats.

    Args:
        hidden: [N, D], only tokens with loss.
        head: [V, D].
        ids: [N, M] int64.

    Returns:
        logprobs [N, M] float32, differentiable; entropy [N] float32, not differentiable.
    """
    found: tuple[Tensor, Tensor] = _GatherLogprobs.apply(hidden, head, ids)  # type: ignore[no-untyped-call]
    return found


def token_logprobs(hidden: Tensor, head: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """`gather_logprobs` of one token in each place: targets [N] -> logprobs [N], entropy [N]."""
    logprobs, entropy = gather_logprobs(hidden, head, targets[:, None])
    return logprobs[:, 0], entropy


def at_loss_tokens(output: PolicyOutput, microbatch: Microbatch) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states [N, D] of the tokens with loss, the head [V, D], and their targets [N]."""
    # By places and not by a mask: to count one, the host would wait for a GPU.
    hidden = output.hidden.index_select(0, microbatch.loss_places)
    return hidden, output.head, microbatch.targets.index_select(0, microbatch.loss_places)


@torch.no_grad()
def sequence_logprobs(
    forward: Callable[[Tensor, Tensor], Tensor], head: Tensor, sequences: Sequence[list[int]]
) -> Tensor:
    """Log-probability of each token of sequences given those before it in its own; no gradient.

    Args:
        forward: Hidden states [T, D] of packed ids [1, T] at positions [1, T].
        head: [V, D].
        sequences: Token ids.

    Returns:
        [T - number of sequences] float32, in order; the first token of each has none.
    """
    ids = torch.tensor([token for sequence in sequences for token in sequence], device=head.device)
    places = [place for sequence in sequences for place in range(len(sequence))]
    positions = torch.tensor(places, device=head.device)
    given = positions > 0
    predicting = torch.cat([given[1:], given.new_zeros(1)])
    hidden = forward(ids[None], positions[None])
    return token_logprobs(hidden[predicting], head, ids[given])[0]


@torch.no_grad()
def topk_logprobs(hidden: Tensor, head: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k likeliest tokens in each place, likeliest first; no gradient.

    Args:
        hidden: [N, D].
        head: [V, D].
        k: At most V.

    Returns:
        logprobs [N, k] float32 in nats, ids [N, k] int64.
    """
    running = RunningSoftmax(len(hidden), 0, hidden.device)
    logits = torch.full((len(hidden), k), -torch.inf, device=hidden.device)
    ids = torch.zeros(len(hidden), k, dtype=torch.int64, device=hidden.device)
    for rows, block in tiles(hidden, head):
        logits_nB = float32_logits(hidden[rows], head[block])
        running.add(rows, logits_nB)
        found = logits_nB.topk(min(k, logits_nB.shape[1]), dim=1)
        candidates = torch.cat([ids[rows], found.indices + block.start], 1)
        logits[rows], places = torch.cat([logits[rows], found.values], 1).topk(k, dim=1)
        ids[rows] = candidates.gather(1, places)
    return logits - running.logsumexp[:, None], ids
