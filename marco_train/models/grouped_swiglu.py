"""The experts' MLP as grouped matrix products, with its own backward.

    tokens -gather-> rows -gate, up-> SiLU(gate) * up * weight -down-> rows -add up-> tokens

Routing weights multiply the inner activations, so that neither the rows that come in nor those
that go out are kept for backward: it gathers them again from the tokens and their gradient. What
is kept is one [N, 2 I] tensor.

Legend: R tokens, k experts a token has here at most, N rows (pairs of token and expert), e experts,
D width, I width of one expert.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from marco_train.models.few_rows import few_rows_swiglu
from marco_train.models.rows import RowMap, add_up, gather

# Elements of one tensor that a chain takes at once on a CPU: temporaries then stay in the cache.
SLICE_ELEMENTS = 2**18


def _activate(gate_up: Tensor, weights: Tensor, out: Tensor) -> None:
    """Write SiLU(gate) * up * weight, computed in float32, to `out`.

    Args:
        gate_up: [N, 2 I].
        weights: [N] float32.
        out: [N, I].
    """
    gate, up = gate_up.float().chunk(2, dim=1)
    out.copy_(F.silu(gate).mul_(up).mul_(weights[:, None]))


def _activate_backward(
    gate_up: Tensor, weights: Tensor, grad: Tensor, grad_weights: Tensor
) -> None:
    """Turn inputs into gradients and the gradient into activations, each in its place.

    Args:
        gate_up: [N, 2 I] of `_activate`; becomes its gradient.
        weights: [N] float32.
        grad: [N, I], of the activations; becomes the activations.
        grad_weights: [N] float32, is written.
    """
    gate, up = (half.float().contiguous() for half in gate_up.chunk(2, dim=1))
    silu = F.silu(gate)
    product = silu * up
    upstream = grad.float()
    grad_weights.copy_((upstream * product).sum(1))
    weighted = upstream * weights[:, None]
    grad_up = silu.mul_(weighted)
    grad_gate = torch.ops.aten.silu_backward(weighted.mul_(up), gate)
    # Only now may the inputs go: of a single row, `gate` and `up` are views of them and no copies.
    grad.copy_(product.mul_(weights[:, None]))
    of_gate, of_up = gate_up.chunk(2, dim=1)
    of_gate.copy_(grad_gate)
    of_up.copy_(grad_up)


Chain = Callable[..., None]
_COMPILED: dict[Chain, Chain] = {}


def _run(chain: Chain, *tensors: Tensor) -> None:
    """Run a chain of elementwise operations on rows [N, ...]: as one kernel, or slice by slice."""
    if tensors[0].is_meta:
        return  # it allocates nothing
    if tensors[0].is_cuda:
        if chain not in _COMPILED:
            _COMPILED[chain] = torch.compile(chain, dynamic=True)
        _COMPILED[chain](*tensors)
        return
    step = max(1, SLICE_ELEMENTS // tensors[0].shape[1])
    for parts in zip(*(torch.split(tensor, step) for tensor in tensors), strict=True):
        chain(*parts)


def _clear_empty(grad: Tensor, rows: RowMap) -> Tensor:
    """Zero the weight gradients of experts without rows."""
    # Blackwell's kernel leaves them unwritten; all others write zeros.
    if grad.is_cuda and torch.cuda.get_device_capability(grad.device) >= (10, 0):
        grad.masked_fill_((rows.rows_per_group == 0)[:, None, None], 0)
    return grad


class _GroupedSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        tokens: Tensor,
        weights: Tensor,
        gate_up_proj: Tensor,
        down_proj: Tensor,
        rows: RowMap,
    ) -> Tensor:
        ctx.rows = rows  # type: ignore[attr-defined]
        num_rows = len(rows.token_of_row)
        if num_rows == 0:
            ctx.save_for_backward(tokens, weights, gate_up_proj, down_proj)
            return torch.zeros_like(tokens)
        # Rows past the last offset would stay uninitialised: the offsets end exactly at N.
        offsets = rows.rows_per_group.cumsum(0).to(torch.int32)
        row_weights = weights.flatten()[rows.cell_of_row]
        gate_up = F.grouped_mm(gather(tokens, rows), gate_up_proj.transpose(1, 2), offs=offsets)
        activations = gate_up.new_empty(num_rows, gate_up.shape[1] // 2)
        _run(_activate, gate_up, row_weights, activations)
        ctx.save_for_backward(tokens, weights, gate_up_proj, down_proj, gate_up)
        return add_up(F.grouped_mm(activations, down_proj.transpose(1, 2), offs=offsets), rows)

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, grad: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
        tokens, weights, gate_up_proj, down_proj, *kept = ctx.saved_tensors  # type: ignore[attr-defined]
        rows: RowMap = ctx.rows  # type: ignore[attr-defined]
        if not kept:
            zeros = (torch.zeros_like(x) for x in (tokens, weights, gate_up_proj, down_proj))
            return (*zeros, None)  # type: ignore[return-value]
        offsets = rows.rows_per_group.cumsum(0).to(torch.int32)
        row_weights = weights.flatten()[rows.cell_of_row]
        grad_rows = gather(grad, rows)
        # Both are overwritten: a second backward over one forward is refused by autograd's own
        # version check.
        activations = F.grouped_mm(grad_rows, down_proj, offs=offsets)
        grad_gate_up = kept[0]
        grad_row_weights = torch.empty_like(row_weights)
        _run(_activate_backward, grad_gate_up, row_weights, activations, grad_row_weights)
        grad_down = F.grouped_mm(grad_rows.T, activations, offs=offsets)
        del activations
        arrived = torch.index_select(tokens, 0, rows.token_of_row, out=grad_rows)
        grad_gate_up_proj = F.grouped_mm(grad_gate_up.T, arrived, offs=offsets)
        grad_tokens = add_up(F.grouped_mm(grad_gate_up, gate_up_proj, offs=offsets), rows)
        grad_weights = torch.zeros_like(weights)
        grad_weights.view(-1)[rows.cell_of_row] = grad_row_weights
        return (
            grad_tokens,
            grad_weights,
            _clear_empty(grad_gate_up_proj, rows),
            _clear_empty(grad_down, rows),
            None,
        )


def grouped_swiglu(
    tokens: Tensor, weights: Tensor, gate_up_proj: Tensor, down_proj: Tensor, rows: RowMap
) -> Tensor:
    """Sum over each token's experts here of weight * down(silu(gate(x)) * up(x)).

    Args:
        tokens: [R, D].
        weights: [R, k] float32, of each token's experts.
        gate_up_proj: [e, 2 I, D], the gate's rows first, as transformers v5 stores them.
        down_proj: [e, D, I].
        rows: The cells of [R, k] that are pairs of this rank, sorted by expert.

    Returns:
        [R, D]; zero for a token without experts here.
    """
    if not torch.is_grad_enabled():
        of_few = few_rows_swiglu(tokens, weights, gate_up_proj, down_proj, rows)
        if of_few is not None:
            return of_few
    found: Tensor = _GroupedSwiGLU.apply(  # type: ignore[no-untyped-call]
        tokens, weights, gate_up_proj, down_proj, rows
    )
    return found
