"""Causal attention over packed sequences, and over a key-value cache while sampling.

Legend: T packed tokens, B sequences, L longest sequence of a group, H query heads, G key-value
heads, d head width.
"""

import inspect
from copy import copy
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Tokens for which a cache of keys grows at a time.
GROWTH = 256
# Sequences up to this length share one padded group; above it, groups double in length, so that
# padding costs less than a factor of two in rows and four in scores.
SHORTEST_GROUP = 64


@dataclass(frozen=True)
class _Group:
    """Sequences of similar length, padded to one rectangle of num_rows x length."""

    tokens: Tensor  # [n] int64, positions of the group's tokens in the packed sequence
    cells: Tensor  # [n] int64, where each lies in the flattened rectangle
    num_rows: int
    length: int


# Devices whose packed sequences need no padding; the planner's stand-in for a GPU joins them.
PACKED_DEVICES = {"cuda"}


def takes_packed(q: Tensor, k: Tensor) -> bool:
    """Whether q [T, H, d] and k [T, G, d] attend as they are packed, by flash attention's kernel.

    Others are padded: what is not on a GPU, float32, and shared keys where torch's function for
    packed sequences does not take them.
    """
    if q.device.type not in PACKED_DEVICES or q.dtype not in (torch.bfloat16, torch.float16):
        return False
    return q.is_meta or _kernel_takes(q, k)


def _kernel_takes(q: Tensor, k: Tensor) -> bool:
    fits = q.shape[2] % 8 == 0 and q.shape[2] <= 256
    fits = fits and torch.cuda.get_device_capability(q.device) >= (8, 0)
    known = _varlen_arguments()
    return fits and "window_size" in known and (q.shape[1] == k.shape[1] or "enable_gqa" in known)


@cache
def _varlen_arguments() -> frozenset[str]:
    """Names of the arguments of torch's `varlen_attn`, which differ from torch 2.11 to 2.13."""
    # Its import takes seconds, for a compiler.
    from torch.nn.attention.varlen import varlen_attn

    return frozenset(inspect.signature(varlen_attn).parameters)


class PackedSequences:
    """Packed tokens that attend causally within their own sequence and never across."""

    def __init__(self, position_ids: Tensor) -> None:
        """Read the sequences off their positions, [1, T], which restart at 0.

        The host reads them: of positions on a GPU it has to wait for it, so that those that are
        known on the host are laid out there, and brought to the GPU with `to`.
        """
        positions = position_ids[0]
        starts = (positions == 0).nonzero()[:, 0]
        sequence_of_token = (positions == 0).cumsum(0) - 1
        self.lengths: Tensor = torch.diff(
            starts, append=starts.new_full((1,), positions.shape[0])
        )  # [B]
        self._groups: list[_Group] = []
        lengths = self.lengths.tolist()
        self._longest = max(lengths, default=0)
        self._ends = F.pad(self.lengths.cumsum(0), (1, 0)).to(torch.int32)  # [B + 1], from 0
        sizes = [SHORTEST_GROUP << max(0, (n - 1) // SHORTEST_GROUP).bit_length() for n in lengths]
        for size in sorted(set(sizes)):
            members = [row for row, s in enumerate(sizes) if s == size]
            length = max(lengths[row] for row in members)
            row_of_sequence = torch.full_like(starts, -1)
            row_of_sequence[members] = torch.arange(len(members), device=starts.device)
            row_of_token = row_of_sequence[sequence_of_token]
            tokens = (row_of_token >= 0).nonzero()[:, 0]
            cells = row_of_token[tokens] * length + positions[tokens]
            self._groups.append(_Group(tokens, cells, len(members), length))

    def to(self, device: torch.device) -> "PackedSequences":
        """Lay the same sequences out on a device, without reading them there."""

        def move(x: Tensor) -> Tensor:
            return x.to(device, non_blocking=True)

        there = copy(self)
        there.lengths, there._ends = move(self.lengths), move(self._ends)
        there._groups = [
            replace(group, tokens=move(group.tokens), cells=move(group.cells))
            for group in self._groups
        ]
        return there

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend; q [T, H, d], k and v [T, G, d] -> [T, H, d]."""
        if self._groups and takes_packed(q, k):
            return self.attend_packed(q, k, v)
        return self.attend_padded(q, k, v)

    def attend_packed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend without padding; shapes as in `attend`."""
        from torch.nn.attention.varlen import varlen_attn

        shared: dict[str, Any] = {"enable_gqa": True} if q.shape[1] != k.shape[1] else {}
        ends, longest = self._ends, self._longest
        # No token sees one to its right, and each sees all to its left.
        found = varlen_attn(q, k, v, ends, ends, longest, longest, window_size=(-1, 0), **shared)
        assert isinstance(found, Tensor)
        return found

    @property
    def num_pairs(self) -> int:
        """Pairs of two tokens that padded attention computes, whether one sees the other or not."""
        return sum(group.num_rows * group.length**2 for group in self._groups)

    def attend_padded(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend in groups of sequences of similar length, padded; shapes as in `attend`."""
        if len(self._groups) == 1:
            return self._attend_group(self._groups[0], q, k, v)
        if not self._groups:
            return q + k.sum() + v.sum()  # no token; keep the graph whole
        out = torch.empty_like(q)
        for group in self._groups:
            part = (x.index_select(0, group.tokens) for x in (q, k, v))
            out = out.index_copy(0, group.tokens, self._attend_group(group, *part))
        return out

    @staticmethod
    def _attend_group(group: _Group, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        def pad(x: Tensor) -> Tensor:  # [n, heads, d] -> [B, heads, L, d]
            cells = x.new_zeros(group.num_rows * group.length, *x.shape[1:])
            cells = cells.index_copy(0, group.cells, x)
            return cells.view(group.num_rows, group.length, *x.shape[1:]).transpose(1, 2)

        # Padding stands to the right, so a causal mask alone hides it from every real token.
        out = F.scaled_dot_product_attention(
            pad(q), pad(k), pad(v), is_causal=True, enable_gqa=q.shape[1] != k.shape[1]
        )
        return out.transpose(1, 2).flatten(0, 1).index_select(0, group.cells)


class KVCache:
    """Keys and values of a batch that is being sampled.

    The first forward pass takes the packed prompts; each later one takes one new token of every
    sequence. Room is made as the longest sequence grows, and is not reserved for what may come.
    """

    def __init__(self, num_layers: int) -> None:
        self._prompts: PackedSequences | None = None
        self._keys: list[Tensor | None] = [None] * num_layers  # each [B, G, L, d]
        self._values: list[Tensor | None] = [None] * num_layers
        self.lengths = torch.zeros(0, dtype=torch.int64)  # [B]
        self._longest = 0

    def start(self, position_ids: Tensor) -> None:
        """Announce the packed prompts' positions, [1, T]."""
        self._prompts = PackedSequences(position_ids)
        self.lengths = self._prompts.lengths
        self._longest = int(self.lengths.max())

    def advance(self) -> Tensor:
        """Announce one new token of every sequence and return their positions, [1, B]."""
        self._prompts = None
        positions = self.lengths
        self.lengths = self.lengths + 1
        self._longest += 1
        return positions[None]

    def keep(self, rows: Tensor) -> None:
        """Forget all sequences but these."""
        self.lengths = self.lengths[rows]
        self._longest = int(self.lengths.max())
        self._keys = [None if k is None else k[rows] for k in self._keys]
        self._values = [None if v is None else v[rows] for v in self._values]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store k and v, then attend; shapes as in `PackedSequences.attend`."""
        if self._prompts is not None:
            self._keys[layer] = self._fill(k)
            self._values[layer] = self._fill(v)
            return self._prompts.attend(layer, q, k, v)
        keys, values = self._with_room(self._keys, layer), self._with_room(self._values, layer)
        rows = torch.arange(q.shape[0], device=q.device)
        keys[rows, :, self.lengths - 1] = k
        values[rows, :, self.lengths - 1] = v
        cells = torch.arange(self._longest, device=q.device)
        visible = cells[None] < self.lengths[:, None]  # [B, L]
        # The heads that share keys stand as if they were so many queries, which attention kernels
        # with a mask can take.
        grouped = q.view(q.shape[0], k.shape[1], -1, q.shape[2])  # [B, G, H / G, d]
        out = F.scaled_dot_product_attention(
            grouped,
            keys[:, :, : self._longest],
            values[:, :, : self._longest],
            attn_mask=visible[:, None, None],
        )
        return out.flatten(1, 2)

    def _with_room(self, cells: list[Tensor | None], layer: int) -> Tensor:
        """Give a layer's cells, [B, G, L, d], with room for the new token of the longest."""
        found = cells[layer]
        assert found is not None
        if found.shape[2] < self._longest:
            found = F.pad(found, (0, 0, 0, GROWTH))
            cells[layer] = found
        return found

    def _fill(self, x: Tensor) -> Tensor:
        """Spread packed [T, G, d] over a fresh [B, G, L, d] with room for new tokens."""
        assert self._prompts is not None
        ends = self.lengths.cumsum(0)
        rows = torch.repeat_interleave(
            torch.arange(len(self.lengths), device=x.device), self.lengths
        )
        columns = torch.arange(x.shape[0], device=x.device) - (ends - self.lengths)[rows]
        cells = x.new_zeros(len(self.lengths), x.shape[1], self._longest + GROWTH, x.shape[2])
        cells[rows, :, columns] = x
        return cells
