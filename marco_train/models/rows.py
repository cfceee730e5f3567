"""Which rows belong to which token: every grouping of tokens, and the way back.

A token has several rows: one for each of its experts here, or one for each rank that holds some
of them. Rows lie sorted by group (expert, rank), in the order of tokens within a group.

Legend: T tokens, C cells a token (its possible rows), G groups, M rows, D width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RowMap:
    """Rows sorted by group, and where each token's rows lie among them."""

    cell_of_row: Tensor  # [M] int64, in the flattened [T, C]
    token_of_row: Tensor  # [M] int64
    rows_of_tokens: Tensor  # [M] int64, row numbers, token by token
    first_of_token: Tensor  # [T] int64, where each token's begin in `rows_of_tokens`
    rows_per_group: Tensor  # [G] int64


def group_rows(groups: Tensor, num_groups: int, num_rows: int) -> RowMap:
    """Sort cells by group.

    Args:
        groups: [T, C] int64, group of each cell; `num_groups` where a cell is no row.
        num_groups: G.
        num_rows: How many cells are rows, known beforehand: nothing here waits for the device.
    """
    cells = groups.flatten()
    order = cells.argsort(stable=True)
    row_of_cell = torch.empty_like(order)
    row_of_cell[order] = torch.arange(len(order), device=order.device)
    present = groups < num_groups
    if num_rows == len(cells):
        rows_of_tokens = row_of_cell
    else:
        where = torch.nonzero_static(present.flatten(), size=num_rows)[:, 0]
        rows_of_tokens = row_of_cell[where]
    counts = torch.zeros(num_groups + 1, dtype=torch.int64, device=groups.device)
    counts.scatter_add_(0, cells, torch.ones_like(cells))  # bincount would wait for the device
    per_token = present.sum(1)
    cell_of_row = order[:num_rows]
    return RowMap(
        cell_of_row,
        cell_of_row // groups.shape[1],
        rows_of_tokens,
        per_token.cumsum(0) - per_token,
        counts[:num_groups],
    )


def gather(tokens: Tensor, rows: RowMap) -> Tensor:
    """Copy each token [T, D] to its rows [M, D]; no gradient."""
    return tokens.index_select(0, rows.token_of_row)


def add_up(values: Tensor, rows: RowMap) -> Tensor:
    """Sum each token's rows, [M, D] -> [T, D]; zero where it has none; no gradient."""
    num_tokens = len(rows.first_of_token)
    if values.shape[0] == 0:
        return values.new_zeros(num_tokens, values.shape[1])
    # One pass with sums in float32; an index_add would round, and on a GPU in any order.
    found: Tensor = torch.embedding_bag(values, rows.rows_of_tokens, rows.first_of_token)[0]
    return found


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, tokens: Tensor, rows: RowMap) -> Tensor:
        ctx.rows = rows  # type: ignore[attr-defined]
        return gather(tokens, rows)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        return add_up(grad.contiguous(), ctx.rows), None  # type: ignore[attr-defined]


class _AddUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, values: Tensor, rows: RowMap) -> Tensor:
        ctx.rows = rows  # type: ignore[attr-defined]
        return add_up(values, rows)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        return gather(grad, ctx.rows), None  # type: ignore[attr-defined]


def spread_tokens(tokens: Tensor, rows: RowMap) -> Tensor:
    """`gather` with a gradient: tokens [T, D] -> rows [M, D]."""
    found: Tensor = _Gather.apply(tokens, rows)  # type: ignore[no-untyped-call]
    return found


def sum_rows(values: Tensor, rows: RowMap) -> Tensor:
    """`add_up` with a gradient: rows [M, D] -> tokens [T, D]."""
    found: Tensor = _AddUp.apply(values, rows)  # type: ignore[no-untyped-call]
    return found
