"""Our MoE block, training step and log-probabilities beside those of others, in one run.

    python scripts/bench/model.py --device cpu --json bench.json

The others are transformers (eager and grouped_mm experts), DeepSpeed AutoEP and plain autograd.
All sides of a case share their weights and inputs, are first compared by numbers, and are then
timed in turn; a side whose numbers differ is reported as wrong and not timed. CPU runs are float32,
CUDA runs bfloat16, weights and tokens are random. What measures memory does so in a fresh process.

Legend: T tokens, N tokens with loss, D width, E experts, K experts a token, V vocabulary, P ranks.
"""

import math
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cached_property, partial
from statistics import median
from types import SimpleNamespace
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from harness import (
    MIB,
    OURS,
    Bench,
    compared,
    do_job,
    free_bytes,
    in_turn,
    largest_errors,
    parser_of,
    peak_bytes,
    release,
    run_job,
    span,
)
from others import block_sides, clear_gradients, transformers_model
from shapes import MEDIUM, MINI, QUICKSTART, layer_parameters, num_parameters, step_flops
from torch import Tensor

from marco_train import distributed
from marco_train.config.architecture import ArchitectureConfig
from marco_train.config.parallel import Dispatch, Recompute
from marco_train.content import digest
from marco_train.losses.chains import compile_chains
from marco_train.losses.logprobs import token_logprobs
from marco_train.models import Qwen3Moe, load_model, save_model
from marco_train.models.grouped_swiglu import grouped_swiglu
from marco_train.models.rows import group_rows
from marco_train.models.weights import random_model

# The quickstart's student, something in between, and Marco-Mini, of which a run takes a few layers.
SHAPES = {"quickstart": QUICKSTART, "medium": MEDIUM, "mini": MINI}
MINI_LAYERS = {"cpu": 2, "cuda": 4}

ORACLE = "transformers grouped_mm"
# Relative error of outputs and gradients, and of the loss of a step, at which a side is wrong.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
LOSS_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-3}
DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}
# Bytes a second that a GPU is taken to exchange with others of its node.
BANDWIDTH = 300e9
FORWARD, BOTH = "forward", "forward+backward"


class ModelBench(Bench):
    """What a device takes, and what it could do."""

    @property
    def dtype(self) -> torch.dtype:
        """What the device computes in."""
        return DTYPES[self.device.type]

    def tokens(self, usual: int) -> int:
        """Tokens of a case: its own number, or that of a trial."""
        return int(self.args.tokens or usual)

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

    def rates(self, seconds: list[float], flops: float) -> dict[str, float]:
        """Columns of a number of operations done in the median time."""
        rate = flops / median(seconds)
        return {"TFLOP/s": rate / 1e12, "MFU %": 100 * rate / self.peak_flops}


def draw(*size: int, std: float = 1.0) -> Tensor:
    """Draw a leaf N(0, std^2) on the device, in what it computes in."""
    device = distributed.device()
    return (torch.randn(*size, device=device, dtype=DTYPES[device.type]) * std).requires_grad_()


def passes(run: Callable[[], Tensor], grad: Tensor) -> dict[str, Callable[[], None]]:
    """Forward alone, without recording it, and forward and backward."""

    def forward() -> None:
        with torch.no_grad():
            run()

    def both() -> None:
        run().backward(grad)  # type: ignore[no-untyped-call]

    return {FORWARD: forward, BOTH: both}


Batch = tuple[Tensor, Tensor, Tensor]  # input ids [1, T], position ids [1, T], targets [T]; int64


def random_batch(vocab: int, tokens: int, length: int) -> Batch:
    """Draw T tokens in sequences of `length`, or in one if there are fewer; all have loss."""
    device = distributed.device()
    ids, targets = torch.randint(0, vocab, (2, tokens), device=device)
    positions = torch.arange(tokens, device=device) % min(length, tokens)
    return ids[None], positions[None], targets


def our_loss(model: Qwen3Moe, batch: Batch) -> Tensor:
    """Mean cross-entropy through our own functions."""
    input_ids, position_ids, targets = batch
    return -token_logprobs(model(input_ids, position_ids), model.head, targets)[0].mean()


def forward_backward(model: Qwen3Moe, batch: Batch) -> None:
    """Compute all gradients; those of before are dropped."""
    model.zero_grad()
    our_loss(model, batch).backward()  # type: ignore[no-untyped-call]


def bench_block(bench: ModelBench) -> None:
    """Time the block, forward alone (without gradients) and forward and backward."""
    for shape in bench.args.shapes:
        arch = replace(SHAPES[shape], num_hidden_layers=1, vocab_size=64)
        tokens = bench.tokens(2048 if (shape, bench.device.type) == ("mini", "cpu") else 8192)
        block_case(bench, shape, arch, tokens)
        release(bench.device)
    if bench.device.type == "cuda":
        for top_k in (1, 8):
            grouped_swiglu_case(bench, top_k)


def block_case(bench: ModelBench, shape: str, arch: ArchitectureConfig, tokens: int) -> None:
    """Check and time all sides of one shape."""
    # Eager's backward writes the gradient of all experts once for each expert.
    eager = bench.device.type == "cuda" or shape != "mini"
    if not eager:
        bench.note("block", f"transformers eager is left out of {shape}: minutes a pass on a CPU")
    sides = block_sides(random_model(arch, bench.dtype, seed=0), eager)
    hidden, grad = draw(tokens, arch.hidden_size), draw(tokens, arch.hidden_size).detach()
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
            bench.add("block", cells, times[name])
    clear()


def grouped_swiglu_case(bench: ModelBench, top_k: int) -> None:
    """Time the grouped MLP alone, as a rank of eight sees it: 8,192 tokens each, 256 experts."""
    width, inner = MINI.hidden_size, cast(int, MINI.moe_intermediate_size)
    num_experts, rows_per_expert = 32, 2048
    num_rows = num_experts * rows_per_expert
    tokens = num_rows // top_k
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
    arch: ArchitectureConfig, tokens: int, length: int
) -> tuple[Losses, torch.optim.Optimizer]:
    """Both sides' loss of the same tokens and weights, and the optimizer of those weights."""
    device = distributed.device()
    model = random_model(arch, DTYPES[device.type], seed=0)
    theirs = transformers_model(model, "grouped_mm")
    batch = random_batch(arch.vocab_size, tokens, length)
    ids, targets = (x.view(-1, min(length, tokens)) for x in (batch[0], batch[2]))

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


def step_peak(arch: dict[str, Any], tokens: int, length: int, side: str) -> int | None:
    """Job: peak memory of a side's step over its weights and moments; None: out of memory."""
    try:
        losses, optimizer = step_sides(ArchitectureConfig(**arch), tokens, length)
        update(losses[side], optimizer)
        optimizer.zero_grad()
        return peak_bytes(partial(update, losses[side], optimizer), distributed.device())
    except torch.OutOfMemoryError:
        return None


def bench_step(bench: ModelBench) -> None:
    """Time whole training steps of both sides, with the real vocabulary."""
    bench.note("step", "every token has loss on both sides; both update with torch.optim.AdamW")
    on_gpu = bench.device.type == "cuda"
    for shape in bench.args.shapes:
        arch = replace(bench.shape(shape), vocab_size=MINI.vocab_size)
        if shape == "mini" and not on_gpu:
            size = 16 * num_parameters(arch) / 2**30
            note = f"not run: weights, gradients and moments in float32 are {size:.0f} GiB"
            bench.add("step", {"shape": shape, "note": note})
            continue
        for usual, length in ((8192, 8192), (16384, 8192)) if shape == "mini" else ((4096, 512),):
            step_case(bench, shape, arch, bench.tokens(usual), length)
            release(bench.device)
    if on_gpu and "mini" in bench.args.shapes:
        for usual in (8192, 16384):
            extrapolate(bench, bench.tokens(usual))
            release(bench.device)


def step_case(
    bench: ModelBench, shape: str, arch: ArchitectureConfig, tokens: int, length: int
) -> None:
    """Check and time both sides of one shape."""
    size = {"arch": asdict(arch), "tokens": tokens, "length": length}
    peaks = {side: run_job(__file__, "step_peak", size | {"side": side}) for side in SIDES}
    losses, optimizer = step_sides(arch, tokens, length)
    with torch.no_grad():
        values = {side: float(loss()) for side, loss in losses.items() if peaks[side] is not None}
    bound = LOSS_TOLERANCE[bench.dtype]
    right = [side for side, value in values.items() if abs(value / values[OURS] - 1) <= bound]
    calls = {side: partial(update, losses[side], optimizer) for side in right}
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


def extrapolate(bench: ModelBench, tokens: int) -> None:
    """Reckon tokens a second of Mini's layers over eight ranks from a few layers on one."""
    arch = bench.shape("mini")
    model = random_model(arch, bench.dtype, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    batch = random_batch(arch.vocab_size, tokens, 8192)

    def seconds(call: Callable[[], object]) -> float:
        return median(bench.in_turn({"": call})[""])

    layers, few, ranks = arch.num_hidden_layers, arch.num_hidden_layers // 2, 8
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
    sent = 4 * tokens * (ranks - 1) * (1 - missed) * arch.hidden_size * 2
    exchange = full * sent / BANDWIDTH
    dense, expert = layer_parameters(arch)
    held = full * (dense + experts // ranks * expert) + arch.vocab_size * arch.hidden_size
    updating = adamw * held / num_parameters(arch)
    total = full * layer + other + exchange + updating
    cells: dict[str, Any] = {"layers": full, "ranks": ranks, "tokens a rank": tokens}
    parts = {f"{layers} layers": deep, f"{few} layers": shallow, "layer": layer, "other": other}
    parts |= {"exchange": exchange, "AdamW": updating, "step": total}
    cells |= {f"{name} ms": 1e3 * seconds for name, seconds in parts.items()}
    bench.add("extrapolation", cells | {"tokens/s a rank": tokens / total})
    bench.note(
        "extrapolation",
        "reckoned: layer from the difference of both depths; other is what is left; exchange = 4",
        f"ways x T x rows x D x 2 bytes a layer at {BANDWIDTH / 1e9:.0f} GB/s, with rows = (P - 1)",
        "(1 - C(E - E/P, K) / C(E, K)) a token; AdamW by a rank's weights, nothing sharded; left",
        "out: gradient reduction, uneven loads, overlap; the timed layers held all experts",
    )


def plain_logprobs(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """Sum of log-probabilities by autograd."""
    return F.linear(hidden, head).float().log_softmax(-1).gather(1, targets[:, None]).sum()


COMPILED = "ours, compile_losses"
LOGPROBS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    OURS: lambda *inputs: token_logprobs(*inputs)[0].sum(),
    COMPILED: lambda *inputs: token_logprobs(*inputs)[0].sum(),
    "plain autograd": plain_logprobs,
}


def logprob_inputs(tokens: int, vocab: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draw hidden states [N, D], a head [V, D] and targets [N]."""
    hidden, head = draw(tokens, width), draw(vocab, width, std=width**-0.5)
    return hidden, head, torch.randint(0, vocab, (tokens,), device=hidden.device)


def logprobs_pass(side: str, inputs: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Forward and backward of a side; returns the sum."""
    compile_chains(side == COMPILED)
    total = LOGPROBS[side](*inputs)
    total.backward()  # type: ignore[no-untyped-call]
    return total.detach()


def logprobs_peak(tokens: int, vocab: int, width: int, side: str) -> int:
    """Job: peak memory of a side over its inputs and their gradients."""
    logprobs_pass(side, logprob_inputs(min(tokens, 64), vocab, width))  # warms up
    inputs = logprob_inputs(tokens, vocab, width)
    peak = peak_bytes(partial(logprobs_pass, side, inputs), distributed.device())
    return peak - inputs[0].nbytes - inputs[1].nbytes


def bench_logprobs(bench: ModelBench) -> None:
    """Time log-probabilities and their gradients, and measure what they need beside them."""
    bench.note("logprobs", "ours also gives each distribution's entropy; the others do not")
    small, large = QUICKSTART.vocab_size, MINI.vocab_size
    for usual, vocab in ((2048, small), (4096, large), (8192, large)):
        for width in (64, 256) if bench.device.type == "cpu" else (1024,):
            logprobs_case(bench, bench.tokens(usual), vocab, width)
            release(bench.device)


def logprobs_case(bench: ModelBench, tokens: int, vocab: int, width: int) -> None:
    """Check, time and weigh all sides of one size."""
    # The others hold log p, its gradient and that of the logits in float32 at once.
    needed = 3 * 4 * tokens * vocab
    sides = list(LOGPROBS) if needed <= free_bytes(bench.device) / 2 else [OURS, COMPILED]
    inputs = logprob_inputs(tokens, vocab, width)

    def clear() -> None:
        inputs[0].grad = inputs[1].grad = None

    def results(side: str) -> list[Tensor]:
        clear()
        total = logprobs_pass(side, inputs)
        return [total, cast(Tensor, inputs[0].grad), cast(Tensor, inputs[1].grad)]

    errors = largest_errors(sides, sides[-1], results)
    right = [side for side in sides if errors[side] <= TOLERANCE[bench.dtype]]
    times = bench.in_turn({side: partial(logprobs_pass, side, inputs) for side in right}, clear)
    release(bench.device)
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
        size = {"tokens": tokens, "vocab": vocab, "width": width, "side": side}
        extra = run_job(__file__, "logprobs_peak", size)
        cells |= compared(times, side) | {"extra MiB": extra / MIB}
        bench.add("logprobs", cells, times[side])


def load_share(path: str, rank: int, of: int) -> dict[str, int]:
    """Job: load one rank's share of a model; its bytes and the peak memory while loading."""
    group = cast(dist.ProcessGroup, SimpleNamespace(size=lambda: of, rank=lambda: rank))
    held = []
    load = partial(load_model, path, torch.bfloat16, group)
    peak = peak_bytes(lambda: held.append(load()), distributed.device())
    share = sum(parameter.nbytes for parameter in held[0].parameters())
    return {"share": share, "peak": peak}


def export_share(path: str, out: str) -> None:
    """Job: load this rank's share and take part in writing the whole model."""
    distributed.start()
    save_model(load_model(path, torch.bfloat16, dist.group.WORLD), out)


def bench_load(bench: ModelBench) -> None:
    """Weigh the loading of a rank's share of two layers of Mini, and check the way back."""
    ranks, arch = 4, replace(MINI, num_hidden_layers=2)
    with tempfile.TemporaryDirectory() as directory:
        original, exported = f"{directory}/original", f"{directory}/exported"
        save_model(random_model(arch, torch.bfloat16, 0), original)
        release(bench.device)
        for rank in range(ranks):
            found = run_job(__file__, "load_share", {"path": original, "rank": rank, "of": ranks})
            cells = {"rank": f"{rank} of {ranks}", "share MiB": found["share"] / MIB}
            cells |= {"peak / share": found["peak"] / found["share"], "goal": 1.3}
            bench.add("load", cells, found)
        run_job(__file__, "export_share", {"path": original, "out": exported}, ranks=ranks)
        equal = digest(original) == digest(exported)
        bench.add("load", {"rank": f"export of {ranks}", "bit for bit": str(equal)})


ALONE = "one rank"


def scaling_ranks(arch: dict[str, Any], tokens: int, repeats: int) -> dict[str, list[float]]:
    """Job: time one rank alone, then all ranks with the experts shared, in turn."""
    distributed.start()
    architecture, device = ArchitectureConfig(**arch), torch.device("cpu")
    alone = random_model(architecture, torch.float32, 0)
    shared = random_model(architecture, torch.float32, 0, dist.group.WORLD)
    torch.manual_seed(1 + dist.get_rank())
    batch = random_batch(architecture.vocab_size, tokens, 512)

    def run_alone() -> None:
        if dist.get_rank() == 0:
            forward_backward(alone, batch)
        dist.barrier()

    def run_shared(kind: Dispatch) -> None:
        shared.set_dispatch(kind)
        forward_backward(shared, batch)
        dist.barrier()

    calls = {ALONE: run_alone} | {kind.value: partial(run_shared, kind) for kind in Dispatch}
    return in_turn(calls, repeats, device, dist.barrier)


def sweep(arch: dict[str, Any], sizes: list[int], repeats: int) -> dict[str, list[float]]:
    """Job: time forward and backward of different numbers of tokens."""
    architecture, device = ArchitectureConfig(**arch), distributed.device()
    model = random_model(architecture, DTYPES[device.type], 0)
    batches = {str(n): random_batch(architecture.vocab_size, n, 512) for n in sizes}
    calls = {name: partial(forward_backward, model, batch) for name, batch in batches.items()}
    return in_turn(calls, repeats, device)


def bench_scaling(bench: ModelBench) -> None:
    """Time two ranks against one, and one rank over numbers of tokens."""
    one_thread = {"OMP_NUM_THREADS": "1"}
    shape = {"cpu": "medium", "cuda": "mini"}[bench.device.type]
    size = {"arch": asdict(bench.shape(shape)), "repeats": bench.repeats}
    if bench.device.type == "cpu":
        tokens = bench.tokens(4096)
        job = partial(run_job, __file__, "scaling_ranks", ranks=2, settings=one_thread)
        times = job(size | {"tokens": tokens})
        for case, seconds in times.items():
            ranks = 1 if case == ALONE else 2
            gains = [ranks * one / own for one, own in zip(times[ALONE], seconds, strict=True)]
            cells = {"shape": shape, "ranks": ranks, "case": case, "tokens a rank": tokens}
            cells |= {"ms": 1e3 * median(seconds), "tokens/s": ranks * tokens / median(seconds)}
            cells |= {"tokens/s ratio": median(gains), "range": span(gains)}
            bench.add("scaling", cells | {"goal": None if ranks == 1 else 1.7}, seconds)
        bench.note("scaling", "forward and backward; one thread a rank; gradients of dense")
        bench.note("scaling", "parameters are not reduced over ranks, which a training step would")
    sizes = [bench.tokens(8192) * share // 8 for share in (1, 2, 4, 8)]
    times = run_job(__file__, "sweep", size | {"sizes": sizes}, settings=one_thread)
    for tokens in sizes:
        seconds = times[str(tokens)]
        cells = {"shape": shape, "tokens": tokens} | compared({OURS: seconds}, OURS, base="")
        cells["ms / 1k tokens"] = 1e6 * median(seconds) / tokens
        bench.add("scaling_tokens", cells, seconds)


def recompute_peak(arch: dict[str, Any], tokens: int, length: int, policy: str) -> int:
    """Job: peak memory of forward and backward under a policy, over the weights."""
    architecture, device = ArchitectureConfig(**arch), distributed.device()
    model = random_model(architecture, DTYPES[device.type], 0)
    model.recompute = Recompute(policy)
    batch = random_batch(architecture.vocab_size, tokens, length)
    forward_backward(model, batch)
    model.zero_grad()
    return peak_bytes(partial(forward_backward, model, batch), device)


def bench_recompute(bench: ModelBench) -> None:
    """Time and weigh forward and backward under each policy of recomputing."""
    cases = {"cpu": ("medium", 4096, 512), "cuda": ("mini", 8192, 8192)}
    shape, usual, length = cases[bench.device.type]
    arch, tokens = bench.shape(shape), bench.tokens(usual)
    size = {"arch": asdict(arch), "tokens": tokens, "length": length}
    peaks = {
        kind: run_job(__file__, "recompute_peak", size | {"policy": kind.value})
        for kind in Recompute
    }
    model = random_model(arch, bench.dtype, seed=0)
    batch = random_batch(arch.vocab_size, tokens, length)

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


PARTS: dict[str, Callable[[ModelBench], None]] = {
    "block": bench_block,
    "step": bench_step,
    "logprobs": bench_logprobs,
    "load": bench_load,
    "scaling": bench_scaling,
    "recompute": bench_recompute,
}


def main() -> None:
    """Run the parts asked for; print tables and write the numbers."""
    jobs = (
        step_peak,
        logprobs_peak,
        load_share,
        export_share,
        scaling_ranks,
        sweep,
        recompute_peak,
    )
    if do_job({job.__name__: job for job in jobs}):
        return
    parser = parser_of(__doc__ or "", PARTS, SHAPES, usual_shapes=list(SHAPES))
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], required=True, help="Compute on a CPU or on one GPU."
    )
    parser.add_argument(
        "--tokens", type=int, help="Take so many tokens in every case, a power of two, as a trial."
    )
    args = parser.parse_args()
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif not torch.cuda.is_available():
        sys.exit("error: --device cuda was asked for, and torch finds no CUDA device here")
    ModelBench(args, distributed.device()).run(PARTS)
    distributed.stop()


if __name__ == "__main__":
    main()
