"""Sums over tokens whose gradient is computed in the forward pass, where that saves a product.

    hidden -product-> tiles of logits -> sums
                        in their place: what the gradient needs
    sums of a whole piece -> gradient of each tile -> products -> gradients of hidden and head

A piece of the tokens keeps all its tiles until their logsumexp is known, so that no tile is
multiplied again. This holds for a sum alone, whose terms all have the same gradient.

Legend: N tokens with loss, n of them in a piece, V vocabulary, B of its entries in a tile, D width.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from marco_train.losses import logprobs
from marco_train.losses.logprobs import HeadGradient, token_logprobs

# Logits of a piece, all of which are kept until their gradient is known (256 MiB).
PIECE_ELEMENTS = {"cpu": 2**26}
# Of a tile: with what is computed of it, it should stay in a core's own cache.
KEPT_TILE_ELEMENTS = 2**16
# Width from which it takes longer to multiply a tile again than to write it and read it.
AHEAD_WIDTH = 128


def learns_ahead(hidden: Tensor, head: Tensor) -> bool:
    """Whether the forward pass of a sum over tokens computes its gradient, too.

    A piece's share of the head's gradient is added to that of the pieces before: in half precision
    it would be rounded between two.
    """
    learns = torch.is_grad_enabled() and hidden.requires_grad
    pays = hidden.device.type in PIECE_ELEMENTS and hidden.shape[1] >= AHEAD_WIDTH
    return learns and pays and head.dtype == torch.float32


class KeptTiles:
    """Room for all tiles of a piece, of one model or of several, used for one piece after another.

    Legend: M models.
    """

    def __init__(self, hidden: Sequence[Tensor], heads: Sequence[Tensor]) -> None:
        """Take hidden states [N, D] and head [V, D] of each model, whose widths D may differ."""
        self._models = list(zip(hidden, heads, strict=True))
        self._num_tokens, self._vocab_size, M = len(hidden[0]), len(heads[0]), len(heads)
        fitting = PIECE_ELEMENTS[hidden[0].device.type] // (M * self._vocab_size)
        self._num_rows = min(self._num_tokens, max(1, fitting))
        self._room = hidden[0].new_empty(self._num_rows * M * self._vocab_size)
        width = logprobs.block_width(M * self._num_rows, KEPT_TILE_ELEMENTS)
        # Of one tile: memory that is new each time would cost more than the exponentials in it.
        self._spare = hidden[0].new_empty(self._num_rows * M * min(width, self._vocab_size))

    def pieces(self) -> Iterator[slice]:
        """Cut the tokens."""
        for start in range(0, max(1, self._num_tokens), max(1, self._num_rows)):
            yield slice(start, min(start + self._num_rows, self._num_tokens))

    def blocks(self) -> Iterator[slice]:
        """Cut the vocabulary for a piece's tiles."""
        rows = len(self._models) * self._num_rows
        return logprobs.vocabulary_blocks(rows, self._vocab_size, KEPT_TILE_ELEMENTS)

    def tile(self, rows: slice, block: slice) -> Tensor:
        """Room of a tile, [n, M, B]."""
        n, M, B = rows.stop - rows.start, len(self._models), block.stop - block.start
        return self._room[n * M * block.start : n * M * block.stop].view(n, M, B)

    def logits(self, rows: slice, block: slice) -> Tensor:
        """Compute a tile, [n, M, B]."""
        tile = self.tile(rows, block)
        for number, (hidden, head) in enumerate(self._models):
            torch.mm(hidden[rows], head[block].T, out=tile[:, number])
        return tile

    def exponentials(self, tile: Tensor) -> tuple[Tensor, "TileSums"]:
        """Compute exp(logit - largest) of a tile [n, M, B], which lasts until the next call."""
        top = tile.amax(2)
        found = self._spare[: tile.numel()].view(tile.shape)
        torch.sub(tile, top[:, :, None], out=found).exp_()
        return found, TileSums(top, found.sum(2), found @ tile.mT)


class TileSums(NamedTuple):
    """What a tile adds to the sums over the vocabulary."""

    top: Tensor  # [n, M], its largest logits
    mass: Tensor  # [n, M], sums of exp(logit - top)
    weighted: Tensor  # [n, M, M], sums of exp(logit - top) of one model times logits of another


class Softmaxes(NamedTuple):
    """What the tiles of a piece say together."""

    logsumexp: Tensor  # [n, M]
    means: Tensor  # [n, M, M], of another model's logits under the softmax of one
    shares: Tensor  # [number of blocks, n, M], softmax over the exp(logit - top) of each block


def joined(sums: Sequence[TileSums]) -> Softmaxes:
    """Join the sums of all tiles of a piece, in their order."""
    top, mass, weighted = (torch.stack(of_tiles) for of_tiles in zip(*sums, strict=True))
    logsumexp = (top + mass.log()).logsumexp(0)
    shares = (top - logsumexp).exp_()
    return Softmaxes(logsumexp, (weighted * shares[..., None]).sum(0), shares)


class LearntAhead(torch.autograd.Function):
    """A sum whose forward pass leaves its gradients in `ctx.carried`, for any factor of the sum."""

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor, *_: Tensor) -> Any:
        """Scale them; once, as they are not copied."""
        carried = vars(ctx).pop("carried", None)
        if carried is None:
            raise RuntimeError("gradients that were computed ahead are given away once")
        of_hidden, of_head = carried.gradients()
        others = (None for _ in ctx.needs_input_grad[2:])  # type: ignore[attr-defined]
        return of_hidden.mul_(grad), of_head.mul_(grad), *others


class _SumLogprobs(LearntAhead):
    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, hidden: Tensor, head: Tensor, targets: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        carried, kept = HeadGradient(hidden, head), KeptTiles([hidden], [head])
        logsumexp, mean = (torch.empty(len(hidden), device=hidden.device) for _ in range(2))
        for rows in kept.pieces():
            sums = []
            for block in kept.blocks():
                tile = kept.logits(rows, block)
                exponentials, of_tile = kept.exponentials(tile)
                sums.append(of_tile)
                tile.copy_(exponentials)
            softmax = joined(sums)
            logsumexp[rows], mean[rows] = softmax.logsumexp[:, 0], softmax.means[:, 0, 0]
            for block, shares in zip(kept.blocks(), softmax.shares, strict=True):
                grad_nB = kept.tile(rows, block)[:, 0].mul_(-shares)
                carried.add(grad_nB, rows, block)
        carried.add_targets(targets)
        ctx.carried = carried  # type: ignore[attr-defined]
        terms, entropy = (hidden * head[targets]).sum(1) - logsumexp, logsumexp - mean
        ctx.mark_non_differentiable(terms, entropy)
        return terms.sum(), terms, entropy


def summed_logprobs(hidden: Tensor, head: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sum `token_logprobs`: the sum, which alone is differentiable, the terms, and entropy [N]."""
    if learns_ahead(hidden, head):
        found: tuple[Tensor, Tensor, Tensor]
        found = _SumLogprobs.apply(hidden, head, targets)  # type: ignore[no-untyped-call]
        return found
    terms, entropy = token_logprobs(hidden, head, targets)
    return terms.sum(), terms.detach(), entropy
