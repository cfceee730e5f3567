"""Our MoE block, training step and log-probabilities beside those of others, in one run.

    python scripts/bench/model.py --device cpu --json bench.json

The others are transformers (eager and grouped_mm experts), DeepSpeed AutoEP and plain autograd.
All sides of a case share their weights and inputs, are first compared by numbers, and are then
timed in turn, round by round; a side whose numbers differ is reported as wrong and not timed.
Ratios are another side's time over ours within a round, as median and range. CPU runs are float32,
CUDA runs bfloat16, weights and tokens are random.

Legend: T tokens, D width, E experts, K experts a token, I expert width, N rows or tokens with loss,
V vocabulary, H heads, d head width, L layers.
"""

import argparse
import ctypes
import gc
import importlib
import json
import math
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import cached_property, partial
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor
from torch._C._distributed_c10d import FileStore

from marco_train import distributed
from marco_train.config.architecture import ArchitectureConfig
from marco_train.config.parallel import Dispatch, Recompute
from marco_train.losses.logprobs import token_logprobs
from marco_train.models import Qwen3Moe, load_model, save_model
from marco_train.models.grouped_swiglu import grouped_swiglu
from marco_train.models.hf_io import hf_config
from marco_train.models.moe import SparseMLP
from marco_train.models.rows import group_rows
from marco_train.models.weights import empty_model


def architecture(
    vocab: int,
    layers: int,
    heads: int,
    head_dim: int,
    width: int,
    experts: int,
    top_k: int,
    expert_width: int,
) -> ArchitectureConfig:
    """Shape of a mixture of the family, with two query heads to each key-value head."""
    return ArchitectureConfig(
        vocab_size=vocab,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        head_dim=head_dim,
        intermediate_size=3 * width,
        num_experts=experts,
        num_experts_per_tok=top_k,
        moe_intermediate_size=expert_width,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
        max_position_embeddings=32_768,
        tie_word_embeddings=True,
    )


# The quickstart's student, something in between, and Marco-Mini, of which a run takes a few layers.
QUICKSTART = architecture(1536, 2, 2, 32, width=64, experts=16, top_k=4, expert_width=48)
MEDIUM = architecture(1536, 4, 8, 32, width=256, experts=64, top_k=8, expert_width=128)
MINI = architecture(151_936, 28, 16, 128, width=1024, experts=256, top_k=8, expert_width=768)
SHAPES = {"quickstart": QUICKSTART, "medium": MEDIUM, "mini": MINI}
MINI_LAYERS = {"cpu": 2, "cuda": 4}

OURS = "ours"
ORACLE = "transformers grouped_mm"
# Relative error of outputs and gradients, and of the loss of a step, at which a side is wrong.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
LOSS_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-3}
WARM_UPS = {"cpu": 1, "cuda": 3}
REPEATS = {"cpu": 5, "cuda": 20}
DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}
MIB = 2**20
FORWARD, BOTH = "forward", "forward+backward"


@dataclass
class Bench:
    """Settings of a run, and what it found."""

    device: torch.device
    repeats: int
    shapes: list[str] = field(default_factory=lambda: list(SHAPES))
    trial_tokens: int | None = None
    scratch: Path | None = None
    bandwidth: float = 300e9
    """Bytes a second between two GPUs, for the extrapolation."""
    parts: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    notes: dict[str, list[str]] = field(default_factory=dict)

    @property
    def dtype(self) -> torch.dtype:
        """What the device computes in."""
        return DTYPES[self.device.type]

    def tokens(self, usual: int) -> int:
        """Tokens of a case: its own number, or that of a trial."""
        return usual if self.trial_tokens is None else self.trial_tokens

    def shape(self, name: str) -> ArchitectureConfig:
        """Architecture of a shape, with as many layers as the device is given."""
        found = SHAPES[name]
        if found is not MINI:
            return found
        return replace(found, num_hidden_layers=MINI_LAYERS[self.device.type])

    @cached_property
    def peak_flops(self) -> float:
        """Fastest square matrix product of random numbers, operations a second."""
        found = 0.0
        for size in (1024, 2048, 4096) if self.device.type == "cpu" else (4096, 8192, 16384):
            a, b = (torch.randn(size, size, device=self.device, dtype=self.dtype) for _ in "ab")
            times = self.in_turn({"matmul": partial(torch.mm, a, b)})["matmul"]
            rate = 2 * size**3 / median(times)
            self.add("peak", {"matmul": size, "TFLOP/s": rate / 1e12}, times)
            found = max(found, rate)
        return found

    def in_turn(
        self, calls: Mapping[str, Callable[[], object]], clear: Callable[[], object] = int
    ) -> dict[str, list[float]]:
        """Time all calls once in each round, in seconds; `clear` runs untimed before each."""
        for call in calls.values():
            for _ in range(WARM_UPS[self.device.type]):
                clear()
                call()
        times: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(self.repeats):
            for name, call in calls.items():
                clear()
                times[name].append(timed(call, self.device))
        return times

    def rates(self, seconds: list[float], flops: float) -> dict[str, float]:
        """Columns of a number of operations done in the median time."""
        rate = flops / median(seconds)
        return {"TFLOP/s": rate / 1e12, "MFU %": 100 * rate / self.peak_flops}

    def add(self, part: str, cells: dict[str, Any], raw: object = None) -> None:
        """Take a row of a part's table, with the raw numbers behind it."""
        self.parts.setdefault(part, []).append(cells | {"raw": raw})
        texts = (f"{name} {show(value)}" for name, value in cells.items() if value is not None)
        print(f"{part}: {', '.join(texts)}", file=sys.stderr, flush=True)

    def note(self, part: str, text: str) -> None:
        """Take a line to stand under a part's table."""
        self.notes.setdefault(part, []).append(text)


def timed(call: Callable[[], object], device: torch.device) -> float:
    """Seconds that a call takes on the device."""
    if device.type == "cpu":
        began = time.perf_counter()
        call()
        return time.perf_counter() - began
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    start.record()
    call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def linux_bytes(name: str, file: str = "/proc/self/status") -> int:
    """Read a size of this process, or of the machine, as Linux counts it."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path(file).read_text())
    assert found is not None
    return int(found[1]) * 1024


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """Most memory held during a call, over what was held just before it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    # What the allocator keeps for later would hide growth.
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = linux_bytes("VmRSS")
    call()
    return linux_bytes("VmHWM") - before


def free_bytes(device: torch.device) -> int:
    """Memory that the device could still give."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info()[0]
    return linux_bytes("MemAvailable", "/proc/meminfo")


def largest_errors(
    names: Iterable[str], oracle: str, results: Callable[[str], list[Tensor]]
) -> dict[str, float]:
    """Largest relative error ||x - y|| / ||y|| of each side's tensors against the oracle's."""
    wanted = results(oracle)

    def error(x: Tensor, y: Tensor) -> float:
        return float((x.float() - y.float()).norm() / y.float().norm())

    return {
        name: max(error(x, y) for x, y in zip(results(name), wanted, strict=True)) for name in names
    }


def passes(run: Callable[[], Tensor], grad: Tensor) -> dict[str, Callable[[], None]]:
    """Forward alone, without recording it, and forward and backward."""

    def forward() -> None:
        with torch.no_grad():
            run()

    def both() -> None:
        run().backward(grad)  # type: ignore[no-untyped-call]

    return {FORWARD: forward, BOTH: both}


def span(values: Iterable[float]) -> str:
    """Smallest and largest value."""
    values = list(values)
    return f"{show(min(values))}-{show(max(values))}"


def compared(times: Mapping[str, list[float]], name: str, base: str = OURS) -> dict[str, Any]:
    """Columns of a side's times, alone and over those of `base` in the same rounds."""
    own = times[name]
    cells: dict[str, Any] = {"ms": 1e3 * median(own), "ms range": span(1e3 * t for t in own)}
    if base in times:
        ratios = [t / reference for t, reference in zip(own, times[base], strict=True)]
        cells |= {f"time / {base}": median(ratios), "ratio range": span(ratios)}
    return cells


def run_ranks(job: str, arguments: dict[str, Any], ranks: int, threads: int | None) -> list[Any]:
    """Run a job of `JOBS` on the CPU in fresh processes and return what each rank gave."""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    with tempfile.TemporaryDirectory() as directory:
        children = []
        for rank in range(ranks):
            task = {"job": job, "rank": rank, "ranks": ranks, "directory": directory}
            command = [sys.executable, __file__, "--job", json.dumps(task | {"args": arguments})]
            children.append(subprocess.Popen(command, env=environment, stdout=sys.stderr))
        # One that fails leaves the others waiting for it.
        while not any(codes := [child.poll() for child in children]) and None in codes:
            time.sleep(0.1)
        for child in children:
            child.terminate()
        if any(codes):
            raise RuntimeError(f"the job {job} {arguments} left with the codes {codes}")
        return [json.loads((Path(directory) / f"{rank}.json").read_text()) for rank in range(ranks)]


def work(task: dict[str, Any]) -> None:
    """Do one rank's share of a job; see `run_ranks`."""
    directory, rank, ranks = Path(task["directory"]), task["rank"], task["ranks"]
    if ranks > 1:
        store = FileStore(str(directory / "store"), ranks)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    result = JOBS[task["job"]](**task["args"])
    (directory / f"{rank}.json").write_text(json.dumps(result))
    distributed.stop()


def isolated(bench: Bench, job: str, **arguments: Any) -> Any:
    """Run a job that measures memory: in a fresh process on the CPU, here on a GPU."""
    arguments["device"] = bench.device.type
    if bench.device.type == "cpu":
        return run_ranks(job, arguments, ranks=1, threads=None)[0]
    result = JOBS[job](**arguments)
    release(bench.device)
    return result


def release(device: torch.device) -> None:
    """Give unused memory back."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


@torch.no_grad()
def new_model(
    architecture: ArchitectureConfig, dtype: torch.dtype, group: dist.ProcessGroup | None = None
) -> Qwen3Moe:
    """Draw a model: matrices N(0, 1 / fan-in), norms of one."""
    torch.manual_seed(0)
    model = empty_model(architecture, dtype, group)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.fill_(1.0)
        else:
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return model


def transformers_model(ours: Qwen3Moe, experts: str) -> Any:
    """Put our parameters, the very same tensors, into transformers' class."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    head = ours.head
    config = Qwen3MoeConfig(**hf_config(ours.architecture, head.dtype))
    with torch.device("meta"):
        theirs = Qwen3MoeForCausalLM._from_config(
            config, attn_implementation="sdpa", experts_implementation=experts, dtype=head.dtype
        )
    for name, parameter in ours.named_parameters():
        module, _, leaf = name.rpartition(".")
        setattr(theirs.get_submodule(module), leaf, parameter)
    theirs.lm_head.weight = head
    theirs.model.rotary_emb = type(theirs.model.rotary_emb)(theirs.config).to(head.device)
    return theirs


@dataclass(frozen=True)
class Batch:
    """Random tokens of sequences of one length; every token has loss."""

    input_ids: Tensor  # [1, T] int64
    position_ids: Tensor  # [1, T] int64
    targets: Tensor  # [T] int64

    @classmethod
    def random(cls, vocab: int, tokens: int, length: int, device: torch.device) -> "Batch":
        """Draw T tokens in sequences of `length`, or in one if there are fewer."""
        ids, targets = torch.randint(0, vocab, (2, tokens), device=device)
        positions = torch.arange(tokens, device=device) % min(length, tokens)
        return cls(ids[None], positions[None], targets)


def our_loss(model: Qwen3Moe, batch: Batch) -> Tensor:
    """Mean cross-entropy through our own functions."""
    hidden = model(batch.input_ids, batch.position_ids)
    return -token_logprobs(hidden, model.head, batch.targets)[0].mean()


def forward_backward(model: Qwen3Moe, batch: Batch) -> None:
    """Compute all gradients; those of before are dropped."""
    model.zero_grad()
    our_loss(model, batch).backward()  # type: ignore[no-untyped-call]


def layer_parameters(arch: ArchitectureConfig) -> tuple[int, int]:
    """Matrix weights of a layer: those every token uses, and those of one expert."""
    assert arch.num_experts is not None and arch.moe_intermediate_size is not None
    heads = 2 * (arch.num_attention_heads + arch.num_key_value_heads)  # q and o, k and v
    dense = arch.hidden_size * (heads * arch.head_dim + arch.num_experts)
    return dense, 3 * arch.hidden_size * arch.moe_intermediate_size


def num_parameters(arch: ArchitectureConfig) -> int:
    """Matrix weights of a model with a tied head."""
    dense, expert = layer_parameters(arch)
    head = arch.vocab_size * arch.hidden_size
    return arch.num_hidden_layers * (dense + (arch.num_experts or 0) * expert) + head


def step_flops(arch: ArchitectureConfig, tokens: int, length: int) -> float:
    """Operations of a step: 6 N_active T, and causal attention; nothing computed twice."""
    dense, expert = layer_parameters(arch)
    layer = dense + (arch.num_experts_per_tok or 0) * expert
    active = arch.num_hidden_layers * layer + arch.vocab_size * arch.hidden_size
    attention = 2 * tokens * min(length, tokens) * arch.num_attention_heads * arch.head_dim
    return 6.0 * active * tokens + 3.0 * arch.num_hidden_layers * attention


@dataclass(frozen=True)
class Side:
    """One implementation of the block."""

    name: str
    run: Callable[[Tensor], Tensor]  # [T, D] -> [T, D]
    parameters: list[Tensor]
    gradients: Callable[[], list[Tensor]]  # of the router, of gate and up, of down


def plain_block(block: SparseMLP, hidden: Tensor) -> Tensor:
    """Compute our block with autograd's own functions."""
    top_k = block.gate.top_k
    probabilities = F.linear(hidden, block.gate.weight).float().softmax(-1)
    weights, expert_ids = probabilities.topk(top_k, dim=-1)
    weights = (weights / weights.sum(-1, keepdim=True)).to(hidden.dtype)
    order = expert_ids.flatten().argsort(stable=True)
    counts = torch.zeros(block.num_experts, dtype=torch.int32, device=hidden.device)
    ones = torch.ones_like(order, dtype=torch.int32)
    offsets = counts.scatter_add(0, expert_ids.flatten(), ones).cumsum(0).to(torch.int32)
    rows = hidden.index_select(0, order // top_k)
    gate_up = F.grouped_mm(rows, block.experts.gate_up_proj.transpose(1, 2), offs=offsets)
    gate, up = gate_up.chunk(2, dim=1)
    out = F.grouped_mm(F.silu(gate) * up, block.experts.down_proj.transpose(1, 2), offs=offsets)
    out = out.index_select(0, order.argsort()).view(len(hidden), top_k, -1)
    return (out * weights[:, :, None]).sum(1)


def autoep_block(model: Qwen3Moe) -> Any:
    """Have DeepSpeed convert the transformers model of one layer, and take its block."""
    importlib.import_module("marco_train.engine")  # sets what DeepSpeed reads at its import
    import deepspeed

    distributed.start()
    autoep = {"enabled": True, "autoep_size": 1, "preset_model": "qwen3_moe"}
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 0},
        "expert_parallel": autoep,
    }
    engine, *_ = deepspeed.initialize(
        model=transformers_model(model, "grouped_mm"), config=config, dist_init_required=False
    )
    return engine.module.model.layers[0].mlp


def run_batched(block: Any, hidden: Tensor) -> Tensor:
    """Run a block that takes and gives [B, S, D]."""
    return cast(Tensor, block(hidden[None])[0])


def block_sides(model: Qwen3Moe, eager: bool) -> list[Side]:
    """All implementations over the weights of the model's only layer, eager if asked for."""
    block = cast(SparseMLP, cast(Any, model.model.layers[0]).mlp)
    experts = block.experts
    shared: list[Tensor] = [block.gate.weight, experts.gate_up_proj, experts.down_proj]

    def of_shared() -> list[Tensor]:
        return [cast(Tensor, parameter.grad) for parameter in shared]

    runs: dict[str, Callable[[Tensor], Tensor]] = {
        OURS: lambda hidden: block(hidden)[0],
        "plain autograd": partial(plain_block, block),
    }
    for kind in ("eager", "grouped_mm") if eager else ("grouped_mm",):
        theirs = transformers_model(model, kind).model.layers[0].mlp
        runs[f"transformers {kind}"] = partial(run_batched, theirs)
    sides = [Side(name, run, shared, of_shared) for name, run in runs.items()]
    try:
        converted = autoep_block(model)
    except ImportError as error:
        print(f"DeepSpeed AutoEP is left out: {error}", file=sys.stderr)
        return sides

    def of_converted() -> list[Tensor]:
        w1, w2, w3 = (getattr(converted.experts, name).grad for name in ("w1", "w2", "w3"))
        return [converted.router.gate.weight.grad, torch.cat([w1, w3], 1), w2]

    run, parameters = partial(run_batched, converted), list(converted.parameters())
    return [*sides, Side("DeepSpeed AutoEP", run, parameters, of_converted)]


def clear_gradients(sides: list[Side], hidden: Tensor) -> None:
    """Set every gradient of every side to None."""
    for tensor in (hidden, *(parameter for side in sides for parameter in side.parameters)):
        tensor.grad = None


def bench_block(bench: Bench) -> None:
    """Time the block, forward alone (without gradients) and forward and backward."""
    for shape in bench.shapes:
        arch = replace(SHAPES[shape], num_hidden_layers=1, vocab_size=64)
        tokens = bench.tokens(2048 if (shape, bench.device.type) == ("mini", "cpu") else 8192)
        block_case(bench, shape, arch, tokens)
        release(bench.device)
    if bench.device.type == "cuda":
        for top_k in (1, 8):
            grouped_swiglu_case(bench, num_experts=32, rows_per_expert=2048, top_k=top_k)


def block_case(bench: Bench, shape: str, arch: ArchitectureConfig, tokens: int) -> None:
    """Check and time all sides of one shape."""
    # Eager's backward writes the gradient of all experts once for each expert.
    eager = bench.device.type == "cuda" or shape != "mini"
    if not eager:
        bench.note("block", f"transformers eager is left out of {shape}: minutes a pass on a CPU")
    sides = block_sides(new_model(arch, bench.dtype), eager)
    hidden = torch.randn(tokens, arch.hidden_size, device=bench.device, dtype=bench.dtype)
    grad = torch.randn_like(hidden)
    hidden.requires_grad_()
    by_name = {side.name: side for side in sides}
    clear = partial(clear_gradients, sides, hidden)

    def results(name: str) -> list[Tensor]:
        clear()
        out = by_name[name].run(hidden)
        out.backward(grad)  # type: ignore[no-untyped-call]
        return [out.detach(), cast(Tensor, hidden.grad), *by_name[name].gradients()]

    errors = largest_errors(by_name, ORACLE, results)
    right = [name for name in by_name if errors[name] <= TOLERANCE[bench.dtype]]
    calls = {name: passes(partial(by_name[name].run, hidden), grad) for name in right}
    flops = 2.0 * tokens * cast(int, arch.num_experts_per_tok) * layer_parameters(arch)[1]
    for kind, factor in ((FORWARD, 1), (BOTH, 3)):
        times = bench.in_turn({name: calls[name][kind] for name in right}, clear)
        for name in by_name:
            cells: dict[str, Any] = {"shape": shape, "tokens": tokens, "pass": kind}
            cells |= {"side": name, "error": errors[name]}
            if name not in right:
                bench.add("block", cells | {"note": "wrong, not timed"})
                continue
            cells |= compared(times, name) | bench.rates(times[name], factor * flops)
            clear()
            cells["peak MiB"] = peak_bytes(calls[name][kind], bench.device) / MIB
            bench.add("block", cells, times[name])
    clear()


def grouped_swiglu_case(bench: Bench, num_experts: int, rows_per_expert: int, top_k: int) -> None:
    """Time the grouped MLP alone, as a rank of eight sees it: 8,192 tokens each, 256 experts."""
    arch = MINI
    width, inner = arch.hidden_size, cast(int, arch.moe_intermediate_size)
    num_rows = num_experts * rows_per_expert
    tokens = num_rows // top_k

    def draw(*size: int, std: float = 1.0) -> Tensor:
        tensor = torch.randn(*size, device=bench.device, dtype=bench.dtype) * std
        return tensor.requires_grad_()

    first = torch.randperm(tokens, device=bench.device)[:, None]
    step = torch.arange(top_k, device=bench.device) * (num_experts // top_k)
    rows = group_rows((first + step) % num_experts, num_experts, num_rows)
    hidden, grad = draw(tokens, width), draw(tokens, width).detach()
    weights = torch.rand(tokens, top_k, device=bench.device).requires_grad_()
    gate_up = draw(num_experts, 2 * inner, width, std=width**-0.5)
    down = draw(num_experts, width, inner, std=inner**-0.5)
    inputs = (hidden, weights, gate_up, down)

    def clear() -> None:
        for tensor in inputs:
            tensor.grad = None

    case = f"{num_experts} experts x {rows_per_expert} rows, {tokens} tokens x {top_k}"
    flops = 2.0 * num_rows * 3 * inner * width
    calls = passes(partial(grouped_swiglu, *inputs, rows), grad)
    for kind, factor, goal in ((FORWARD, 1, 400), (BOTH, 3, 320)):
        times = bench.in_turn({OURS: calls[kind]}, clear)
        cells = {"case": case, "pass": kind} | compared(times, OURS, base="")
        cells |= bench.rates(times[OURS], factor * flops) | {"goal TFLOP/s": goal}
        bench.add("grouped_swiglu", cells, times[OURS])


TRANSFORMERS = "transformers"
SIDES = (OURS, TRANSFORMERS)
Losses = dict[str, Callable[[], Tensor]]


def step_sides(
    arch: ArchitectureConfig, tokens: int, length: int, device: torch.device
) -> tuple[Losses, torch.optim.Optimizer]:
    """Both sides' loss of the same tokens and weights, and the optimizer of those weights."""
    model = new_model(arch, DTYPES[device.type])
    theirs = transformers_model(model, "grouped_mm")
    batch = Batch.random(arch.vocab_size, tokens, length, device)
    ids, targets = (x.view(-1, min(length, tokens)) for x in (batch.input_ids, batch.targets))

    def their_loss() -> Tensor:
        # `shift_labels` are the targets as they stand, so that the last token has loss too.
        out = theirs(input_ids=ids, labels=ids, shift_labels=targets, use_cache=False)
        return cast(Tensor, out.loss)

    losses: Losses = {OURS: partial(our_loss, model, batch), TRANSFORMERS: their_loss}
    return losses, torch.optim.AdamW(model.parameters(), lr=1e-6)


def update(loss: Callable[[], Tensor], optimizer: torch.optim.Optimizer) -> None:
    """Make one whole step."""
    optimizer.zero_grad()
    loss().backward()  # type: ignore[no-untyped-call]
    optimizer.step()


def step_peak(arch: dict[str, Any], tokens: int, length: int, side: str, device: str) -> int | None:
    """Job: peak memory of a side's step over its weights and moments; None: out of memory."""
    try:
        losses, optimizer = step_sides(
            ArchitectureConfig(**arch), tokens, length, torch.device(device)
        )
        update(losses[side], optimizer)
        optimizer.zero_grad()
        return peak_bytes(partial(update, losses[side], optimizer), torch.device(device))
    except torch.OutOfMemoryError:
        return None


def bench_step(bench: Bench) -> None:
    """Time whole training steps of both sides, with the real vocabulary."""
    bench.note("step", "every token has loss on both sides; both update with torch.optim.AdamW")
    on_gpu = bench.device.type == "cuda"
    for shape in bench.shapes:
        arch = replace(bench.shape(shape), vocab_size=MINI.vocab_size)
        if shape == "mini" and not on_gpu:
            size = 16 * num_parameters(arch) / 2**30
            note = f"not run: weights, gradients and moments in float32 are {size:.0f} GiB"
            bench.add("step", {"shape": shape, "note": note})
            continue
        for usual, length in ((8192, 8192), (16384, 8192)) if shape == "mini" else ((4096, 512),):
            step_case(bench, shape, arch, bench.tokens(usual), length)
    if on_gpu and "mini" in bench.shapes:
        for usual in (8192, 16384):
            extrapolate(bench, bench.shape("mini"), bench.tokens(usual), 8192)
            release(bench.device)


def step_case(bench: Bench, shape: str, arch: ArchitectureConfig, tokens: int, length: int) -> None:
    """Check and time both sides of one shape."""
    size = {"arch": asdict(arch), "tokens": tokens, "length": length}
    peaks = {side: isolated(bench, "step_peak", side=side, **size) for side in SIDES}
    losses, optimizer = step_sides(arch, tokens, length, bench.device)
    fitting = {side: loss for side, loss in losses.items() if peaks[side] is not None}
    with torch.no_grad():
        values = {side: float(loss()) for side, loss in fitting.items()}
    right = {
        side: loss
        for side, loss in fitting.items()
        if abs(values[side] / values[OURS] - 1) <= LOSS_TOLERANCE[bench.dtype]
    }
    calls = {side: partial(update, loss, optimizer) for side, loss in right.items()}
    times = bench.in_turn(calls, optimizer.zero_grad)
    for side in losses:
        cells: dict[str, Any] = {"shape": shape, "layers": arch.num_hidden_layers}
        cells |= {"tokens": tokens, "side": side}
        if side not in times:
            note = "out of memory" if side not in values else f"wrong: loss {values[side]}"
            bench.add("step", cells | {"note": note})
            continue
        cells |= {"loss": values[side], "tokens/s": tokens / median(times[side])}
        cells |= compared(times, side)
        cells |= bench.rates(times[side], step_flops(arch, tokens, length))
        cells["peak MiB"] = cast(int, peaks[side]) / MIB
        bench.add("step", cells, times[side])
    release(bench.device)


def extrapolate(bench: Bench, arch: ArchitectureConfig, tokens: int, length: int) -> None:
    """Reckon tokens a second of all layers over eight ranks from a few layers on one."""
    model = new_model(arch, bench.dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    batch = Batch.random(arch.vocab_size, tokens, length, bench.device)
    hidden = torch.randn(tokens, arch.hidden_size, device=bench.device, dtype=bench.dtype)
    hidden.requires_grad_()

    def head_alone() -> None:
        token_logprobs(hidden, model.head, batch.targets)[0].mean().backward()  # type: ignore[no-untyped-call]

    def seconds(call: Callable[[], object], clear: Callable[[], object] = int) -> float:
        return median(bench.in_turn({"": call}, clear)[""])

    layers, few, ranks = arch.num_hidden_layers, arch.num_hidden_layers // 2, 8
    head = seconds(head_alone, model.zero_grad)
    deep = seconds(partial(forward_backward, model, batch))
    adamw = seconds(optimizer.step)  # with the gradients of the pass before
    model.zero_grad()
    model.model.layers = model.model.layers[:few]
    shallow = seconds(partial(forward_backward, model, batch))

    full, experts = MINI.num_hidden_layers, cast(int, arch.num_experts)
    layer = (deep - shallow) / (layers - few)
    other = shallow - few * layer
    top_k = cast(int, arch.num_experts_per_tok)
    missed = math.comb(experts - experts // ranks, top_k) / math.comb(experts, top_k)
    crossing = (ranks - 1) * (1 - missed)
    sent = 4 * tokens * crossing * arch.hidden_size * 2
    exchange = full * sent / bench.bandwidth
    dense, expert = layer_parameters(arch)
    held = full * (dense + experts // ranks * expert) + arch.vocab_size * arch.hidden_size
    updating = adamw * held / num_parameters(arch)
    total = full * layer + other + exchange + updating
    for line in (
        f"reckoned for {full} layers over P = {ranks} ranks, T = {tokens} tokens a rank:",
        f"  layer = (t[{layers}] - t[{few}]) / {layers - few} = ({1e3 * deep:.1f} - "
        f"{1e3 * shallow:.1f}) / {layers - few} = {1e3 * layer:.2f} ms, forward and backward",
        f"  other = t[{few}] - {few} layer = {1e3 * other:.1f} ms, of which the head, measured "
        f"alone, {1e3 * head:.1f} ms",
        f"  rows = (P - 1) (1 - C(E - E/P, K) / C(E, K)) = {crossing:.2f} a token to other ranks",
        f"  bytes = 4 ways x T x rows x D x 2 = {sent / 1e6:.0f} MB a layer; exchange = "
        f"{full} x bytes / {bench.bandwidth / 1e9:.0f} GB/s = {1e3 * exchange:.1f} ms",
        f"  AdamW = {1e3 * adamw:.1f} ms x {held / 1e9:.2f} G weights of a rank / "
        f"{num_parameters(arch) / 1e9:.2f} G = {1e3 * updating:.1f} ms, nothing sharded",
        f"  t = {full} layer + other + exchange + AdamW = {1e3 * total:.0f} ms: "
        f"{tokens / total:,.0f} tokens/s a rank, {ranks * tokens / total:,.0f} in all",
        "  left out: gradient reduction, uneven loads, overlap; the layer was timed with all "
        f"{experts} experts' weights, of which a rank of {ranks} holds {experts // ranks}",
    ):
        bench.note("step", line)


def plain_logprobs(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """Sum of log-probabilities by autograd."""
    logprobs = F.linear(hidden, head).float().log_softmax(-1)
    return logprobs.gather(1, targets[:, None]).sum()


def fused_logprobs(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """Sum of log-probabilities by torch's cross-entropy, as transformers takes its loss."""
    return -F.cross_entropy(F.linear(hidden, head).float(), targets, reduction="sum")


LOGPROBS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    OURS: lambda *inputs: token_logprobs(*inputs)[0].sum(),
    "plain autograd": plain_logprobs,
    "cross_entropy": fused_logprobs,
}


def logprob_inputs(
    tokens: int, vocab: int, width: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw hidden states [N, D], a head [V, D] and targets [N]."""
    torch.manual_seed(0)
    dtype = DTYPES[device.type]
    hidden = torch.randn(tokens, width, device=device, dtype=dtype).requires_grad_()
    head = (torch.randn(vocab, width, device=device, dtype=dtype) * width**-0.5).requires_grad_()
    return hidden, head, torch.randint(0, vocab, (tokens,), device=device)


def logprobs_pass(side: str, inputs: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Forward and backward of a side; returns the sum."""
    total = LOGPROBS[side](*inputs)
    total.backward()  # type: ignore[no-untyped-call]
    return total.detach()


def logprobs_peak(tokens: int, vocab: int, width: int, side: str, device: str) -> int:
    """Job: peak memory of a side over its inputs and their gradients."""
    warm = logprob_inputs(min(tokens, 64), vocab, width, torch.device(device))
    logprobs_pass(side, warm)
    del warm
    inputs = logprob_inputs(tokens, vocab, width, torch.device(device))
    peak = peak_bytes(partial(logprobs_pass, side, inputs), torch.device(device))
    return peak - inputs[0].nbytes - inputs[1].nbytes


def bench_logprobs(bench: Bench) -> None:
    """Time log-probabilities and their gradients, and measure what they need beside them."""
    bench.note("logprobs", "ours also gives each distribution's entropy; the others do not")
    small, large = QUICKSTART.vocab_size, MINI.vocab_size
    for usual, vocab in ((2048, small), (4096, large), (8192, large)):
        for width in (64, 256) if bench.device.type == "cpu" else (1024,):
            logprobs_case(bench, bench.tokens(usual), vocab, width)
            release(bench.device)


def logprobs_case(bench: Bench, tokens: int, vocab: int, width: int) -> None:
    """Check, time and weigh all sides of one size."""
    # The others hold log p, its gradient and that of the logits in float32 at once.
    needed = 3 * 4 * tokens * vocab
    sides = list(LOGPROBS) if needed <= free_bytes(bench.device) / 2 else [OURS]
    inputs = logprob_inputs(tokens, vocab, width, bench.device)

    def clear() -> None:
        inputs[0].grad = inputs[1].grad = None

    def results(side: str) -> list[Tensor]:
        clear()
        total = logprobs_pass(side, inputs)
        return [total, cast(Tensor, inputs[0].grad), cast(Tensor, inputs[1].grad)]

    errors = largest_errors(sides, sides[-1], results)
    right = [side for side in sides if errors[side] <= TOLERANCE[bench.dtype]]
    times = bench.in_turn({side: partial(logprobs_pass, side, inputs) for side in right}, clear)
    for side in LOGPROBS:
        cells: dict[str, Any] = {"T": tokens, "V": vocab, "D": width, "side": side}
        if side not in sides:
            note = "computed, not measured: over half of the free memory"
            bench.add("logprobs", cells | {"extra MiB": needed / MIB, "note": note})
            continue
        cells["error"] = errors[side] if len(sides) > 1 else None
        if side not in right:
            bench.add("logprobs", cells | {"note": "wrong, not timed"})
            continue
        size = {"tokens": tokens, "vocab": vocab, "width": width}
        extra = isolated(bench, "logprobs_peak", side=side, **size)
        cells |= compared(times, side) | {"extra MiB": extra / MIB}
        bench.add("logprobs", cells, times[side])


def load_share(path: str, rank: int, ranks: int, device: str) -> dict[str, int]:
    """Job: load one rank's share of a model; its bytes and the peak memory while loading."""
    group = cast(dist.ProcessGroup, SimpleNamespace(size=lambda: ranks, rank=lambda: rank))
    held = []
    load = partial(load_model, path, torch.bfloat16, group)
    peak = peak_bytes(lambda: held.append(load()), torch.device(device))
    share = sum(parameter.nbytes for parameter in held[0].parameters())
    return {"share": share, "peak": peak}


def export_share(path: str, out: str) -> None:
    """Job: load this rank's share and take part in writing the whole model."""
    save_model(load_model(path, torch.bfloat16, dist.group.WORLD), out)


def tensor_files(path: Path) -> dict[str, Path]:
    """The file of each tensor of a model's directory."""
    found: dict[str, Path] = {}
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            found |= dict.fromkeys(tensors.keys(), file)
    return found


def same_bits(one: Path, other: Path) -> bool:
    """Whether two directories hold the same tensors, bit for bit."""
    files, others = tensor_files(one), tensor_files(other)
    if files.keys() != others.keys():
        return False
    for name, file in files.items():
        with safe_open(file, "pt") as a, safe_open(others[name], "pt") as b:
            x, y = (tensors.get_tensor(name) for tensors in (a, b))
        if x.dtype != y.dtype or not torch.equal(x.view(torch.int16), y.view(torch.int16)):
            return False
    return True


def bench_load(bench: Bench) -> None:
    """Weigh the loading of a rank's share of two layers of Mini, and check the way back."""
    ranks = 4
    with tempfile.TemporaryDirectory(dir=bench.scratch) as directory:
        original, exported = Path(directory) / "original", Path(directory) / "exported"
        save_model(new_model(replace(MINI, num_hidden_layers=2), torch.bfloat16), original)
        release(bench.device)
        for rank in range(ranks):
            found = isolated(bench, "load_share", path=str(original), rank=rank, ranks=ranks)
            cells = {"rank": f"{rank} of {ranks}", "share MiB": found["share"] / MIB}
            cells |= {"peak / share": found["peak"] / found["share"], "goal": 1.3}
            bench.add("load", cells, found)
        arguments = {"path": str(original), "out": str(exported)}
        run_ranks("export_share", arguments, ranks, threads=1)
        equal = same_bits(original, exported)
        bench.add("load", {"rank": f"export of {ranks}", "bit for bit": str(equal)})


ALONE = "one rank"


def scaling_ranks(arch: dict[str, Any], tokens: int, repeats: int) -> dict[str, list[float]]:
    """Job: time one rank alone, then all ranks with the experts shared, in turn."""
    architecture, device = ArchitectureConfig(**arch), torch.device("cpu")
    alone = new_model(architecture, torch.float32)
    shared = new_model(architecture, torch.float32, dist.group.WORLD)
    torch.manual_seed(1 + dist.get_rank())
    batch = Batch.random(architecture.vocab_size, tokens, 512, device)

    def run_alone() -> None:
        if dist.get_rank() == 0:
            forward_backward(alone, batch)
        dist.barrier()

    def run_shared(kind: Dispatch) -> None:
        shared.set_dispatch(kind)
        forward_backward(shared, batch)
        dist.barrier()

    calls = {ALONE: run_alone} | {kind.value: partial(run_shared, kind) for kind in Dispatch}
    return Bench(device, repeats).in_turn(calls, dist.barrier)


def sweep(
    arch: dict[str, Any], sizes: list[int], repeats: int, device: str
) -> dict[str, list[float]]:
    """Job: time forward and backward of different numbers of tokens."""
    architecture, where = ArchitectureConfig(**arch), torch.device(device)
    model = new_model(architecture, DTYPES[where.type])
    calls = {
        str(tokens): partial(
            forward_backward, model, Batch.random(architecture.vocab_size, tokens, 512, where)
        )
        for tokens in sizes
    }
    return Bench(where, repeats).in_turn(calls)


def bench_scaling(bench: Bench) -> None:
    """Time two ranks against one, and one rank over numbers of tokens."""
    if bench.device.type == "cpu":
        tokens = bench.tokens(4096)
        arguments = {"arch": asdict(MEDIUM), "tokens": tokens, "repeats": bench.repeats}
        times = run_ranks("scaling_ranks", arguments, ranks=2, threads=1)[0]
        for case, seconds in times.items():
            ranks = 1 if case == ALONE else 2
            pairs = zip(times[ALONE], seconds, strict=True)
            gains = [ranks * one / own for one, own in pairs]
            cells = {"shape": "medium", "ranks": ranks, "case": case, "tokens a rank": tokens}
            cells |= {"ms": 1e3 * median(seconds), "tokens/s": ranks * tokens / median(seconds)}
            cells |= {"tokens/s ratio": median(gains), "range": span(gains)}
            cells["goal"] = None if ranks == 1 else 1.7
            bench.add("scaling", cells, seconds)
        bench.note("scaling", "forward and backward; one thread a rank; the dense parameters'")
        bench.note("scaling", "gradients are not reduced over ranks, which a training step would")
    shape = "medium" if bench.device.type == "cpu" else "mini"
    sizes = [bench.tokens(8192) * share // 8 for share in (1, 2, 4, 8)]
    arguments = {"arch": asdict(bench.shape(shape)), "sizes": sizes, "repeats": bench.repeats}
    if bench.device.type == "cpu":
        times = run_ranks("sweep", arguments | {"device": "cpu"}, ranks=1, threads=1)[0]
    else:
        times = isolated(bench, "sweep", **arguments)
    for tokens in sizes:
        seconds = times[str(tokens)]
        cells = {"shape": shape, "tokens": tokens, "ms": 1e3 * median(seconds)}
        cells["ms range"] = span(1e3 * t for t in seconds)
        cells["ms / 1k tokens"] = 1e6 * median(seconds) / tokens
        bench.add("scaling_tokens", cells, seconds)


def recompute_peak(arch: dict[str, Any], tokens: int, length: int, policy: str, device: str) -> int:
    """Job: peak memory of forward and backward under a policy, over the weights."""
    architecture, where = ArchitectureConfig(**arch), torch.device(device)
    model = new_model(architecture, DTYPES[where.type])
    model.recompute = Recompute(policy)
    batch = Batch.random(architecture.vocab_size, tokens, length, where)
    forward_backward(model, batch)
    model.zero_grad()
    return peak_bytes(partial(forward_backward, model, batch), where)


def bench_recompute(bench: Bench) -> None:
    """Time and weigh forward and backward under each policy of recomputing."""
    shape, tokens, length = (
        ("medium", bench.tokens(4096), 512)
        if bench.device.type == "cpu"
        else ("mini", bench.tokens(8192), 8192)
    )
    arch = bench.shape(shape)
    size = {"arch": asdict(arch), "tokens": tokens, "length": length}
    peaks = {
        kind: isolated(bench, "recompute_peak", policy=kind.value, **size) for kind in Recompute
    }
    model = new_model(arch, bench.dtype)
    batch = Batch.random(arch.vocab_size, tokens, length, bench.device)

    def run(policy: Recompute) -> None:
        model.recompute = policy
        forward_backward(model, batch)

    times = bench.in_turn({kind.value: partial(run, kind) for kind in Recompute}, model.zero_grad)
    gradients = sum(parameter.nbytes for parameter in model.parameters())
    for kind, peak in peaks.items():
        cells: dict[str, Any] = {"shape": shape, "layers": arch.num_hidden_layers}
        cells |= {"tokens": tokens, "recompute": kind.value}
        cells |= compared(times, kind.value, base=Recompute.none.value)
        cells |= {"peak MiB": peak / MIB, "of which gradients MiB": gradients / MIB}
        bench.add("recompute", cells, times[kind.value])


JOBS: dict[str, Callable[..., Any]] = {
    job.__name__: job
    for job in (
        step_peak,
        logprobs_peak,
        load_share,
        export_share,
        scaling_ranks,
        sweep,
        recompute_peak,
    )
}
PARTS: dict[str, Callable[[Bench], None]] = {
    "block": bench_block,
    "step": bench_step,
    "logprobs": bench_logprobs,
    "load": bench_load,
    "scaling": bench_scaling,
    "recompute": bench_recompute,
}


def show(value: object) -> str:
    """Three figures of a number, all of a large one."""
    if not isinstance(value, float):
        return "" if value is None else str(value)
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.1e}" if 0 < abs(value) < 1e-3 else f"{value:.3g}"


def table(rows: list[dict[str, Any]]) -> str:
    """Aligned columns of all keys but the raw numbers."""
    names = list(dict.fromkeys(name for row in rows for name in row if name != "raw"))
    lines = [names, *([show(row.get(name)) for name in names] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = (
        [text.rjust(width) for text, width in zip(line, widths, strict=True)] for line in lines
    )
    return "\n".join("  ".join(line) for line in aligned)


def machine(device: torch.device) -> str:
    """What computes."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    found = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    name = platform.processor() if found is None else found[1]
    return f"{name}, {torch.get_num_threads()} threads"


def write(bench: Bench, path: Path) -> None:
    """Write everything found so far."""
    about = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "torch": torch.__version__,
        "machine": machine(bench.device),
        "dtype": str(bench.dtype).removeprefix("torch."),
        "command": sys.argv,
        "repeats": bench.repeats,
    }
    path.write_text(json.dumps(about | {"parts": bench.parts, "notes": bench.notes}, indent=1))


def report(bench: Bench) -> None:
    """Print a table of each part, with its notes."""
    print(f"{machine(bench.device)}, torch {torch.__version__}, {bench.repeats} repeats")
    for part, rows in bench.parts.items():
        print("", part, table(rows), *bench.notes.get(part, []), sep="\n")


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], required=True)
    for option, allowed in (("--shapes", SHAPES), ("--only", PARTS)):
        help_text = f"some of {','.join(allowed)}; default all"
        parser.add_argument(option, default=",".join(allowed), help=help_text)
    parser.add_argument("--json", type=Path, required=True, help="where all numbers go")
    parser.add_argument("--repeats", type=int, help=f"rounds; default {REPEATS} by device")
    parser.add_argument("--tokens", type=int, help="of every case, a power of two, for trials")
    parser.add_argument("--scratch", type=Path, help="where 6 GB of weights lie for a while")
    parser.add_argument("--bandwidth", type=float, default=300.0, help="GB/s between two GPUs")
    args = parser.parse_args()
    for option, allowed in (("shapes", SHAPES), ("only", PARTS)):
        names = getattr(args, option).split(",")
        setattr(args, option, names)
        if unknown := [name for name in names if name not in allowed]:
            parser.error(f"--{option}: {', '.join(unknown)} is none of {', '.join(allowed)}")
    return args


def main() -> None:
    """Run the parts asked for; print tables and write the numbers."""
    if sys.argv[1:2] == ["--job"]:
        work(json.loads(sys.argv[2]))
        return
    args = parse_arguments()
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif not torch.cuda.is_available():
        sys.exit("error: --device cuda was asked for, and torch finds no CUDA device here")
    bench = Bench(
        device=distributed.device(),
        repeats=args.repeats or REPEATS[args.device],
        shapes=args.shapes,
        trial_tokens=args.tokens,
        scratch=args.scratch,
        bandwidth=args.bandwidth * 1e9,
    )
    for part in args.only:
        PARTS[part](bench)
        release(bench.device)
        write(bench, args.json)
    report(bench)
    distributed.stop()


if __name__ == "__main__":
    main()
