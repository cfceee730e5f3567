"""Packed sequences attend the same way with padding and without."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import varlen

from marco_train.models.attention import PackedSequences


def each_alone(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts_q: Tensor,
    starts_k: Tensor,
    longest_q: int,
    longest_k: int,
    *,
    window_size: tuple[int, int],
    enable_gqa: bool = False,
) -> Tensor:
    """What torch documents of `varlen_attn`, one sequence and one token at a time."""
    left, right = window_size
    outs = []
    for begin, end in zip(starts_q[:-1].tolist(), starts_q[1:].tolist(), strict=True):
        assert end - begin <= longest_q
        for token in range(begin, end):
            first = begin if left < 0 else max(begin, token - left)
            last = end if right < 0 else min(end, token + right + 1)
            heads = q.shape[1] // k.shape[1] if enable_gqa else 1
            keys, values = (x[first:last].repeat_interleave(heads, 1) for x in (k, v))
            scores = torch.einsum("hd,lhd->hl", q[token], keys) * q.shape[2] ** -0.5
            outs.append(torch.einsum("hl,lhd->hd", scores.softmax(-1), values))
    assert torch.equal(starts_q, starts_k) and longest_q == longest_k
    assert starts_q.dtype == torch.int32
    return torch.stack(outs)


@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize("lengths", [[3, 70, 9, 1], [5, 6]], ids=["two groups", "one group"])
def test_attention_without_padding_is_attention_with_it(
    lengths: list[int], kv_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(varlen, "varlen_attn", each_alone)
    torch.manual_seed(0)
    sequences = PackedSequences(torch.cat([torch.arange(n) for n in lengths])[None])
    inputs: list[Any] = [
        torch.randn(sum(lengths), n, 8, requires_grad=True) for n in (4, kv_heads, kv_heads)
    ]
    outs = [attend(*inputs) for attend in (sequences.attend_packed, sequences.attend_padded)]
    torch.testing.assert_close(outs[0], outs[1], rtol=1e-5, atol=1e-6)
    upstream = torch.randn_like(outs[0])
    found, wanted = (torch.autograd.grad(out, inputs, upstream) for out in outs)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def test_a_cpu_pads() -> None:
    sequences = PackedSequences(torch.arange(5)[None])
    q, k, v = (torch.randn(5, 2, 8).bfloat16() for _ in "qkv")
    assert torch.equal(sequences.attend(0, q, k, v), sequences.attend_padded(q, k, v))
