"""The package on a GPU that is not there: shapes, types and devices of every path that CUDA takes.

What cannot be walked so: what the host reads of tokens that were drawn (`NativeSampler.sample`),
checksums, compiled chains (they run as they are written), DeepSpeed and vLLM.
"""

import functools
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from threading import Thread
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import TCPStore  # torch exports it without a type
from torch.nn.attention.varlen import varlen_attn

from marco_train import checkpoint, distributed
from marco_train.config.architecture import ArchitectureConfig
from marco_train.config.opd import Objective
from marco_train.config.parallel import Dispatch, Recompute
from marco_train.data.packing import pack_examples, pack_rollouts
from marco_train.inference import engine
from marco_train.inference.transfer import join_over_nccl
from marco_train.losses.balance import balance_loss, router_z_loss
from marco_train.losses.cross_entropy import cross_entropy
from marco_train.losses.distillation import FullReverseKL, SampledReverseKL, TopKReverseKL
from marco_train.losses.logprobs import sequence_logprobs, topk_logprobs
from marco_train.metrics import MetricSums
from marco_train.models import attention
from marco_train.models.attention import KVCache, PackedSequences
from marco_train.models.dispatch import dispatch
from marco_train.models.qwen3_moe import Linear, Qwen3Moe
from marco_train.models.routing import Routing
from marco_train.models.weights import (
    joined_shapes,
    local_weights,
    meta_model,
    named_weights,
    weight_shapes,
)
from marco_train.rollout.native import draw_tokens
from marco_train.types import (
    Example,
    HiddenScores,
    LossFn,
    LossOutput,
    Microbatch,
    PolicyOutput,
    ScoredRollout,
    Scores,
    TokenScores,
    TopKScores,
)
from tests.helpers.configs import compose_config
from tests.helpers.fake_cuda import BLACKWELL, HOPPER, FakeGPU, aten, fake_cuda, fake_group
from tests.helpers.models import sparse_mlps
from tests.helpers.rollouts import rollouts

pytestmark = pytest.mark.slow

GPU = torch.device("cuda", 0)
RANK, RANKS = 3, 8
TEACHER_WIDTH, TOP_K = 64, 5


@pytest.fixture(scope="module")
def gpu() -> Iterator[FakeGPU]:
    made = FakeGPU()
    yield made
    made.close()


@functools.cache
def mini() -> ArchitectureConfig:
    """Marco-Mini with one layer."""
    found = compose_config("marco_mini_sft", "model.path=none").model.architecture
    assert found is not None
    return replace(found, num_hidden_layers=1)


def fake_model(group: dist.ProcessGroup | None = None, num_layers: int = 1) -> Qwen3Moe:
    """Weights of Mini's width in bfloat16 on the GPU."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        with GPU:
            return Qwen3Moe(replace(mini(), num_hidden_layers=num_layers), group)
    finally:
        torch.set_default_dtype(torch.float32)


def examples() -> Microbatch:
    """Sequences of many lengths, two thirds of each to be learnt."""
    rows = [Example(list(range(n)), [i >= n // 3 for i in range(n)]) for n in (40, 300, 130, 9)]
    (packed,) = pack_examples(rows, 512)
    return packed


def run(model: Qwen3Moe, batch: Microbatch, loss_fn: LossFn, routing: Routing) -> LossOutput:
    """A forward and backward pass; every gradient is what its weight is."""
    layout, on_device = PackedSequences(batch.position_ids).to(GPU), batch.to(GPU)
    hidden = model(on_device.input_ids, on_device.position_ids, layout=layout, routing=routing)
    assert (hidden.dtype, hidden.device) == (torch.bfloat16, GPU)
    found = loss_fn(PolicyOutput(hidden, model.head), on_device)
    assert (found.loss.dtype, found.loss.device, found.loss.shape) == (torch.float32, GPU, ())
    routers = balance_loss(routing.load, routing.probability, batch.num_tokens)
    (found.loss + routers + router_z_loss(routing.squared_logsumexp, batch.num_tokens)).backward()
    for name, weight in model.named_parameters():
        assert weight.grad is not None, name
        kinds = [(x.dtype, x.device, x.shape) for x in (weight, weight.grad)]
        assert kinds[0] == kinds[1] and kinds[0][:2] == (torch.bfloat16, GPU), name
    return found


def check_model(recompute: Recompute, capability: tuple[int, int]) -> int:
    with fake_cuda(capability) as seen:
        model = fake_model()
        model.recompute = recompute
        run(model, examples(), cross_entropy, Routing())
    return seen.calls.count(aten._grouped_mm.default)


# Two grouped products forward, four backward; with `layer` backward makes the forward again.
@pytest.mark.parametrize(
    ("recompute", "capability", "num_products"),
    [
        (Recompute.none, HOPPER, 6),
        (Recompute.none, BLACKWELL, 6),
        (Recompute.attention, HOPPER, 6),
        (Recompute.layer, HOPPER, 8),
    ],
)
def test_a_model_of_minis_width_is_trained(
    recompute: Recompute, capability: tuple[int, int], num_products: int, gpu: FakeGPU
) -> None:
    assert gpu.call(check_model, recompute, capability) == num_products


def scores_of(objective: Objective, length: int) -> Scores:
    ones = torch.ones(length)
    match objective:
        case Objective.sampled:
            return TokenScores(-ones)
        case Objective.topk:
            ids = torch.arange(TOP_K).repeat(length, 1)
            return TopKScores(ids, -torch.ones(length, TOP_K), ones)
        case Objective.full:
            return HiddenScores(torch.ones(length, TEACHER_WIDTH, dtype=torch.bfloat16))


def check_objective(objective: Objective, with_rollouts: bool) -> int:
    """Tiles of logits whose float32 sums are kept."""
    given = rollouts() if with_rollouts else []
    scored = [ScoredRollout(r, scores_of(objective, len(r.response_ids))) for r in given]
    (batch,) = pack_rollouts(scored, objective, 512)
    with fake_cuda() as seen:
        head = torch.zeros(mini().vocab_size, TEACHER_WIDTH, dtype=torch.bfloat16, device=GPU)
        loss_fns: dict[Objective, LossFn] = {
            Objective.sampled: SampledReverseKL(2.0, 5.0),
            Objective.topk: TopKReverseKL(),
            Objective.full: FullReverseKL(head),
        }
        found = run(fake_model(), batch, loss_fns[objective], Routing())
        totals = MetricSums()
        totals.add(found, batch.to(GPU))
    assert all((x.dtype, x.device) == (torch.float32, GPU) for x in found.values.values())
    return seen.calls.count(aten.mm.dtype)


@pytest.mark.parametrize("with_rollouts", [True, False], ids=["rollouts", "an empty share"])
@pytest.mark.parametrize("objective", Objective, ids=lambda objective: objective.value)
def test_every_objective_is_trained(
    objective: Objective, with_rollouts: bool, gpu: FakeGPU
) -> None:
    # One tile is the whole vocabulary: once forward and once backward, and a teacher's beside it.
    num_tiles = 4 if objective is Objective.full else 2
    assert gpu.call(check_objective, objective, with_rollouts) == num_tiles


def experts_to_take(num_tokens: int) -> Tensor:
    """Eight experts of each token of one layer [1, T, 8], spread over all ranks."""
    token, slot = torch.arange(num_tokens)[:, None], torch.arange(8)
    return ((token * 7 + slot * 31) % 256)[None]


def check_dispatch(kind: Dispatch) -> tuple[list[int], list[int]]:
    """Tokens and pairs that reach this rank, to which every other sends what it sends itself."""
    batch = examples()
    taken = experts_to_take(batch.num_tokens)
    here = taken[0] // 32 == RANK
    num_pairs = RANKS * int(here.sum())
    num_tokens = RANKS * int(here.any(1).sum())
    expected = [num_tokens if kind is Dispatch.deduplicated else num_pairs, num_pairs]
    with fake_group(RANK, RANKS) as group, fake_cuda():
        hidden = torch.zeros(batch.num_tokens, 64, dtype=torch.bfloat16, device=GPU)
        weights = torch.zeros(batch.num_tokens, 8, device=GPU)
        arrived = dispatch(hidden, weights, taken[0].to(GPU), 256, group, kind)
        found = [len(arrived.tokens), len(arrived.rows.token_of_row)]
        assert arrived.bring_back(arrived.tokens).shape == hidden.shape
        model = fake_model(group=group)
        model.set_dispatch(kind)
        assert [len(p) for p in model.parameters() if p.dim() == 3] == [32, 32]
        run(model, batch, cross_entropy, Routing(taken.to(GPU)))
    return found, expected


@pytest.mark.parametrize("kind", Dispatch, ids=lambda kind: kind.value)
def test_experts_over_eight_ranks_are_trained(kind: Dispatch, gpu: FakeGPU) -> None:
    found, expected = gpu.call(check_dispatch, kind)
    assert found == expected


def check_waits(over_ranks: bool, kind: Dispatch) -> list[str]:
    """For what the host waits in a pass over three layers; their tokens go to all ranks."""
    batch = examples()
    taken = experts_to_take(batch.num_tokens).repeat(3, 1, 1)
    with fake_group(RANK, RANKS) as group, fake_cuda() as seen:
        model = fake_model(group if over_ranks else None, num_layers=3)
        model.set_dispatch(kind)
        run(model, batch, cross_entropy, Routing(taken.to(GPU)))
    return [str(func) for func in seen.waits]


@pytest.mark.parametrize("kind", Dispatch, ids=lambda kind: kind.value)
@pytest.mark.parametrize("over_ranks", [False, True], ids=["experts here", "over eight ranks"])
def test_the_host_waits_once_a_layer_and_only_for_numbers_of_rows(
    over_ranks: bool, kind: Dispatch, gpu: FakeGPU
) -> None:
    waits = gpu.call(check_waits, over_ranks, kind)
    # One list a layer, of which a fake tensor gives each number by itself: rows to each rank, from
    # each, and pairs where rows are not pairs. `tests/gpu` counts the waits of a real exchange.
    numbers = RANKS * (3 if kind is Dispatch.deduplicated else 2)
    assert waits == ["aten._local_scalar_dense.default"] * (3 * numbers * over_ranks)


def check_attention(dtype: torch.dtype, heads: int, varlen: bool) -> tuple[list[Any], list[str]]:
    """Arguments of the kernel for packed sequences, and the names of attention's operations."""
    lengths = torch.tensor([5, 70, 9])
    positions = torch.cat([torch.arange(n) for n in lengths.tolist()])[None]
    asked: list[Any] = []

    def noted(*args: Any, **kwargs: Any) -> Tensor:
        asked.append((*(x.tolist() for x in args[3:5]), *args[5:], kwargs))
        return varlen_attn(*args, **kwargs)  # type: ignore[return-value]

    known = frozenset({"window_size", "enable_gqa"} if varlen else {"is_causal"})
    with (
        fake_cuda() as seen,
        mock.patch.object(torch.nn.attention.varlen, "varlen_attn", noted),
        mock.patch.object(attention, "_varlen_arguments", return_value=known),
    ):
        packed = PackedSequences(positions).to(GPU)
        q, k, v = (
            torch.zeros(84, n, 64, dtype=dtype, device=GPU, requires_grad=True)
            for n in (heads, 2, 2)
        )
        out = packed.attend(0, q, k, v)
        assert (out.shape, out.dtype, out.device) == (q.shape, dtype, GPU)
        out.sum().backward()
        for x in (q, k, v):
            assert x.grad is not None and (x.grad.dtype, x.grad.device) == (dtype, GPU)
    names = [str(func) for func in seen.calls]
    return asked, sorted({name for name in names if "attn" in name or "attention" in name})


@pytest.mark.parametrize(
    ("dtype", "heads", "varlen", "is_packed"),
    [
        (torch.bfloat16, 4, True, True),
        (torch.bfloat16, 2, True, True),
        (torch.bfloat16, 4, False, False),  # torch 2.11's, which knows no shared keys
        (torch.float32, 4, True, False),
    ],
)
def test_packed_sequences_attend_without_padding_where_a_kernel_takes_them(
    dtype: torch.dtype, heads: int, varlen: bool, is_packed: bool, gpu: FakeGPU
) -> None:
    asked, names = gpu.call(check_attention, dtype, heads, varlen)
    if not is_packed:
        assert asked == [] and not any("varlen" in name for name in names)
        return
    ends = [0, 5, 75, 84]
    shared = {"enable_gqa": True} if heads > 2 else {}
    assert asked == [(ends, ends, 70, 70, {"window_size": (-1, 0), **shared})]
    assert names == [
        "torch_attn._varlen_attn.default",
        "torch_attn._varlen_attn_backward.default",
    ]


def check_shares() -> list[str]:
    """Names of the experts' weights of all ranks, one after another."""
    names = []
    for rank in range(RANKS):
        with fake_group(rank, RANKS) as group:
            model = meta_model(mini(), group)
            names += [name for name, _ in local_weights(model) if ".experts." in name]
    with fake_group(RANK, RANKS) as group, fake_cuda():
        streamed = {n: tuple(w.shape) for n, w in named_weights(fake_model(group=group))}
    assert streamed == joined_shapes(meta_model(mini()))
    return names


def test_eight_ranks_hold_every_expert_once(gpu: FakeGPU) -> None:
    names = gpu.call(check_shares)
    assert len(names) == 256 * 3
    assert sorted(names) == sorted(n for n in weight_shapes(meta_model(mini())) if ".experts." in n)


def check_sampling() -> None:
    with fake_cuda(), torch.no_grad():
        model = fake_model()
        cache = KVCache(1)
        positions = torch.cat([torch.arange(n) for n in (5, 70, 9)])[None].to(GPU)
        cache.start(positions)
        hidden = model(torch.zeros_like(positions), positions, cache, Routing())
        logits = model.logits(hidden[(cache.lengths.cumsum(0) - 1)])
        assert (logits.shape, logits.dtype) == ((3, mini().vocab_size), torch.float32)
        tokens, logprobs = draw_tokens(logits, torch.zeros(3, dtype=torch.float64, device=GPU))
        assert (logprobs.dtype, tokens.device) == (torch.float32, GPU)
        cache.keep(torch.tensor([0, 2], device=GPU))
        hidden = model(tokens[None, :2], cache.advance(), cache)
        assert (hidden.shape, hidden.dtype) == ((2, 1024), torch.bfloat16)
        assert topk_logprobs(hidden, model.head, 7)[1].shape == (2, 7)
        assert sequence_logprobs(model, model.head, [[1, 2, 3], [4], [5, 6]]).shape == (3,)


def test_a_batch_is_sampled_and_scored(gpu: FakeGPU) -> None:
    gpu.call(check_sampling)


def check_planted(plant: Callable[[Qwen3Moe], None]) -> str:
    """What a training pass says of a fault."""
    with fake_cuda():
        model = fake_model()
        plant(model)
        try:
            run(model, examples(), cross_entropy, Routing())
        except RuntimeError as error:
            return str(error)
    return "nothing"


def norm_on_the_cpu(model: Qwen3Moe) -> None:
    model.model.norm.weight = torch.nn.Parameter(torch.ones(1024, dtype=torch.bfloat16))


def rope_on_the_cpu(model: Qwen3Moe) -> None:
    plain = model.forward

    def forward(input_ids: Tensor, position_ids: Tensor, **more: Any) -> Tensor:
        return plain(input_ids, position_ids.cpu(), **more)

    model.forward = forward  # type: ignore[method-assign,assignment]


def in_float32(module: torch.nn.Module, name: str) -> None:
    setattr(module, name, torch.nn.Parameter(getattr(module, name).detach().float()))


def experts_in_float32(model: Qwen3Moe) -> None:
    in_float32(sparse_mlps(model)[0].experts, "down_proj")


def router_in_float32(model: Qwen3Moe) -> None:
    in_float32(sparse_mlps(model)[0].gate, "weight")


def head_in_float32(model: Qwen3Moe) -> None:
    model.lm_head = Linear(1, 1)
    model.lm_head.weight = torch.nn.Parameter(model.model.embed_tokens.weight.detach().float())


@pytest.mark.parametrize(
    ("plant", "says"),
    [
        (norm_on_the_cpu, "two devices, cuda:0 and cpu"),
        (rope_on_the_cpu, "two devices, cpu and cuda:0|two devices, cuda:0 and cpu"),
        (experts_in_float32, "Expected inputs of BF16 type"),
        (router_in_float32, "a product of two types"),
        (head_in_float32, "a product of two types"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_wrong_type_or_device_is_seen(
    plant: Callable[[Qwen3Moe], None], says: str, gpu: FakeGPU
) -> None:
    assert re.search(says, gpu.call(check_planted, plant))


# What is asked of CUDA outside of tensors.
DEEPSPEED_READS = ("DS_ACCELERATOR", "TORCHDYNAMO_DISABLE")


def test_a_launch_with_gpus_takes_its_own_and_meets_over_nccl(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", calls.append)
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **_: calls.append(backend))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(dist, "new_group", lambda **_: None)
    for name, value in (("RANK", "5"), ("WORLD_SIZE", "8")):
        monkeypatch.setenv(name, value)
        monkeypatch.setenv(f"LOCAL_{name}", value)
    distributed.start()
    assert calls == [5, "nccl"]  # in this order: NCCL takes the device that is chosen
    assert distributed.device() == torch.device("cuda", 5)


def test_a_checkpoint_holds_the_generator_of_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    state = torch.arange(16, dtype=torch.uint8)
    restored: list[Tensor] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda: state)
    monkeypatch.setattr(torch.cuda, "set_rng_state", restored.append)
    tensors = checkpoint.generator_tensors()
    assert torch.equal(tensors["generator.cuda"], state)
    checkpoint.load_generators(tensors)
    assert len(restored) == 1 and torch.equal(restored[0], state)


def test_the_generators_of_gpus_are_put_back_after_an_engine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    restored: list[list[str]] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: ["first", "second"])
    monkeypatch.setattr(torch.cuda, "set_rng_state_all", restored.append)
    with engine._generators_left_alone():
        assert restored == []
    assert restored == [["first", "second"]]


SEEN_BY_DEEPSPEED = """
import os
import torch
torch.cuda.is_available = lambda: True
import marco_train.engine
import deepspeed
from deepspeed.accelerator import get_accelerator
assert get_accelerator()._name == "cuda"
assert "TORCHDYNAMO_DISABLE" not in os.environ  # it compiles what is compiled on GPUs
assert deepspeed.ops.__compatible_ops__  # its own kernels were looked for
"""


def test_deepspeed_takes_the_gpu_and_leaves_compilation_on() -> None:
    environment = {k: v for k, v in os.environ.items() if k not in DEEPSPEED_READS}
    subprocess.run([sys.executable, "-c", SEEN_BY_DEEPSPEED], check=True, env=environment)


def come_by_store(address: str, port: int) -> None:
    """Be the one worker that a rendezvous waits for."""
    store = TCPStore(address, port, 2, False)
    with suppress(RuntimeError):  # the other side leaves
        store.wait(["the other side's word"])


@pytest.mark.vllm
def test_without_nccl_its_group_is_refused_once_the_workers_have_come(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VLLM_NCCL_SO_PATH", "/nowhere/libnccl.so")
    listening = socket.create_server(("127.0.0.1", 0))
    worker = Thread(target=come_by_store, args=listening.getsockname(), daemon=True)
    worker.start()
    with pytest.raises(RuntimeError, match="there is no NCCL library"):
        join_over_nccl(listening, 1)
