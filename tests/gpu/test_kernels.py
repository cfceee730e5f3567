"""What only a GPU shows: its grouped GEMM, fused elementwise chains, and waits for the device."""

import os
import warnings
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from marco_train.config.parallel import Dispatch
from marco_train.losses.logprobs import token_logprobs
from marco_train.models.attention import PackedSequences
from marco_train.models.moe import SparseMLP

pytestmark = pytest.mark.gpu
TOKENS, WIDTH, EXPERT_WIDTH, EXPERTS, TOP_K = 512, 256, 128, 16, 4


def sparse_mlp(group: dist.ProcessGroup | None, dtype: torch.dtype) -> SparseMLP:
    g = torch.Generator().manual_seed(0)
    block = SparseMLP(WIDTH, EXPERT_WIDTH, EXPERTS, TOP_K, True, group)
    with torch.no_grad():
        for parameter in block.parameters():
            spread = parameter.shape[-1] ** -0.5
            parameter.copy_(torch.randn(parameter.shape, generator=g) * spread)
    return block.to("cuda", dtype)


def loop(block: SparseMLP, hidden: Tensor, expert_ids: Tensor) -> Tensor:
    """The block over given experts, one expert at a time, in the type of its weights."""
    probabilities = F.linear(hidden, block.gate.weight).softmax(-1).gather(1, expert_ids)
    weights = probabilities / probabilities.sum(1, keepdim=True)
    out = torch.zeros_like(hidden)
    for expert in range(EXPERTS):
        token, slot = (expert_ids == expert).nonzero(as_tuple=True)
        gate, up = F.linear(hidden[token], block.experts.gate_up_proj[expert]).chunk(2, 1)
        inner = F.silu(gate) * up * weights[token, slot][:, None]
        out = out.index_add(0, token, F.linear(inner, block.experts.down_proj[expert]))
    return out


def relative_error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-3), (torch.bfloat16, 1e-2)])
def test_a_block_on_the_gpu_equals_a_loop_in_float64(dtype: torch.dtype, bound: float) -> None:
    # float32 may compute in tf32 on the matrix units: its bound is that type's.
    block = sparse_mlp(None, dtype)
    hidden = torch.randn(TOKENS, WIDTH, device="cuda").to(dtype).requires_grad_()
    given = torch.rand(TOKENS, EXPERTS - 1, device="cuda").topk(TOP_K).indices  # one stays empty
    upstream = torch.randn(TOKENS, WIDTH, device="cuda").to(dtype)
    out, _ = block(hidden, given)
    out.backward(upstream)

    exact = sparse_mlp(None, dtype).double()
    hidden64 = hidden.detach().double().requires_grad_()
    wanted = loop(exact, hidden64, given)
    wanted.backward(upstream.double())
    assert relative_error(out.detach(), wanted.detach()) <= bound
    assert hidden.grad is not None and hidden64.grad is not None
    assert relative_error(hidden.grad, hidden64.grad) <= bound
    by_name = dict(exact.named_parameters())
    for name, parameter in block.named_parameters():
        found, expected = parameter.grad, by_name[name].grad
        assert found is not None and expected is not None
        assert relative_error(found, expected) <= bound, name
    gradient = block.experts.down_proj.grad
    assert gradient is not None and not gradient[-1].any()


def test_log_probabilities_on_the_gpu_equal_those_in_float64() -> None:
    hidden = torch.randn(300, WIDTH, device="cuda", dtype=torch.bfloat16)
    head = (torch.randn(5000, WIDTH, device="cuda") * WIDTH**-0.5).bfloat16()
    targets = torch.randint(0, 5000, (300,), device="cuda")
    found, _ = token_logprobs(hidden, head, targets)
    wanted = F.linear(hidden.double(), head.double()).log_softmax(-1)
    wanted = wanted.gather(1, targets[:, None])[:, 0]
    assert float((found.double() - wanted).abs().max()) <= 0.05


@pytest.fixture
def group() -> Iterator[dist.ProcessGroup]:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29577")
    dist.init_process_group("nccl", rank=0, world_size=1)
    assert dist.group.WORLD is not None
    yield dist.group.WORLD
    dist.destroy_process_group()


def count_waits(block: SparseMLP, hidden: Tensor) -> int:
    """How often the host waits for the device in a forward pass."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        block(hidden)
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(warning.message) for warning in caught)


def test_local_experts_never_wait_for_the_device() -> None:
    block = sparse_mlp(None, torch.bfloat16)
    hidden = torch.randn(TOKENS, WIDTH, device="cuda", dtype=torch.bfloat16)
    block(hidden)  # compiles
    assert count_waits(block, hidden) == 0


@pytest.mark.parametrize("kind", Dispatch, ids=lambda kind: kind.value)
def test_an_exchange_waits_for_the_device_once(kind: Dispatch, group: dist.ProcessGroup) -> None:
    block = sparse_mlp(group, torch.bfloat16)
    block.dispatch = kind
    hidden = torch.randn(TOKENS, WIDTH, device="cuda", dtype=torch.bfloat16)
    block(hidden)
    assert count_waits(block, hidden) == 1


def test_packed_sequences_attend_like_each_alone_in_float64() -> None:
    lengths = [5, 70, 300, 9]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    packed = PackedSequences(positions).to(torch.device("cuda"))
    q, k, v = (torch.randn(sum(lengths), n, 64, device="cuda").bfloat16() for n in (4, 2, 2))
    upstream = torch.randn_like(q)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    packed.attend(0, *leaves).backward(upstream)
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    parts = [x.transpose(0, 1).split(lengths, 1) for x in exact]
    outs = [
        F.scaled_dot_product_attention(q64, k64, v64, is_causal=True, enable_gqa=True)
        for q64, k64, v64 in zip(*parts, strict=True)
    ]
    wanted = torch.cat(outs, 1).transpose(0, 1)
    wanted.backward(upstream.double())
    assert relative_error(packed.attend(0, q, k, v), wanted.detach()) <= 1e-2
    for leaf, expected in zip(leaves, exact, strict=True):
        assert leaf.grad is not None and expected.grad is not None
        assert relative_error(leaf.grad, expected.grad) <= 1e-2
