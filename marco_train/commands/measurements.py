"""What `gpu_check` measures: the package's own parts on one device, at Mini's width.

Each check notes its figures as it finds them, with their units in the names: ms, us, gb (of 1e9
bytes), kb, gb_s, nats. What has to hold is asserted, and fails the check. Weights and tokens are
random; a layer has the 32 experts that one of 8 ranks would hold.

Legend: T tokens, D width, V vocabulary, H query heads, G key-value heads, d head width.
"""

import gc
import hashlib
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from functools import partial
from io import StringIO
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from marco_train.checkpoint import Snapshot
from marco_train.config.architecture import ArchitectureConfig
from marco_train.config.compose import read_run
from marco_train.config.parallel import Recompute
from marco_train.data.chat import CHATML
from marco_train.data.packing import pack_examples
from marco_train.losses import logprobs
from marco_train.losses.cross_entropy import cross_entropy
from marco_train.models.attention import PackedSequences, takes_packed
from marco_train.models.hf_io import hf_config, save_model
from marco_train.models.qwen3_moe import Qwen3Moe
from marco_train.models.weights import (
    EMBEDDING_STD,
    RESIDUAL_GAIN,
    empty_model,
    named_weights,
    random_model,
)
from marco_train.types import Example, Microbatch, Prompt, Rollout

Figures = dict[str, float | str]
GB = 1e9
BF16 = torch.bfloat16


@dataclass(frozen=True)
class Bench:
    """Where it is measured, and at what size."""

    device: torch.device
    tiny: bool

    @property
    def is_cuda(self) -> bool:
        """Whether memory and kernels of a GPU are there to be measured."""
        return self.device.type == "cuda"

    def architecture(self, num_layers: int, num_experts: int = 32) -> ArchitectureConfig:
        """Mini's shape with some of its layers and experts; a small one in a tiny run."""
        mini = read_run(["experiment=marco_mini_sft", "model.path=none"]).model.architecture
        assert mini is not None
        if not self.tiny:
            return replace(mini, num_hidden_layers=num_layers, num_experts=num_experts)
        return replace(
            mini,
            vocab_size=1536,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=32,
            num_experts=16,
            num_experts_per_tok=4,
            moe_intermediate_size=48,
        )

    def random(self, *shape: int) -> Tensor:
        """Normal numbers in bfloat16."""
        return torch.randn(shape, device=self.device, dtype=BF16)

    def wait(self) -> None:
        """Wait for the device."""
        if self.is_cuda:
            torch.cuda.synchronize()

    def ms(self, call: Callable[[], object], repeats: int = 5) -> float:
        """Median time of a call, from an idle device to an idle device, once it is warm."""
        times = []
        for _ in range(2 if self.tiny else 2 + repeats):
            self.wait()
            start = time.perf_counter()
            call()
            self.wait()
            times.append(1e3 * (time.perf_counter() - start))
        return median(times[1:] if self.tiny else times[2:])

    def peak_gb(self, call: Callable[[], object]) -> Figures:
        """Most memory held during a call, on a GPU: in all, and over what is held before it."""
        if not self.is_cuda:
            call()
            return {}
        self.wait()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        self.wait()
        peak = torch.cuda.max_memory_allocated()
        return {"peak_gb": peak / GB, "extra_gb": (peak - before) / GB}

    def held_gb(self) -> Figures:
        """Memory that tensors hold, on a GPU."""
        return {"held_gb": torch.cuda.memory_allocated() / GB} if self.is_cuda else {}

    def release(self) -> None:
        """Give unused memory back."""
        gc.collect()
        if self.is_cuda:
            torch.cuda.empty_cache()

    @torch.no_grad()
    def model(self, architecture: ArchitectureConfig, dtype: torch.dtype = BF16) -> Qwen3Moe:
        """Draw weights as `random_model` does, but on the device."""
        torch.manual_seed(0)
        model = empty_model(architecture, dtype, None)
        for name, parameter in model.named_parameters():
            gain = RESIDUAL_GAIN if "o_proj" in name or "down_proj" in name else 1.0
            embeds = "embed_tokens" in name
            std = EMBEDDING_STD if embeds else gain * parameter.shape[-1] ** -0.5
            _ = parameter.fill_(1.0) if parameter.dim() == 1 else parameter.normal_(std=std)
        return model

    @contextmanager
    def policy(self, num_layers: int, zero_stage: int = 1) -> Iterator[Any]:
        """A policy as Mini's SFT builds it, on one rank; its memory is free afterwards."""
        from marco_train.engine.policy import Policy

        cfg = read_run(
            [
                *("experiment=marco_mini_sft", "model.path=none", "parallel=one_rank"),
                f"parallel.zero_stage={zero_stage}",
            ]
        )
        model = self.model(self.architecture(num_layers))
        with redirect_stdout(StringIO()):  # DeepSpeed prints the memory in use
            policy = Policy(model, cfg.model, cfg.optim, cfg.parallel, 1000, chat_template="")
        try:
            yield policy
        finally:
            policy._engine.destroy()
            for parameter in model.parameters():
                # DeepSpeed's hooks keep them, and they keep views of its buffers.
                vars(parameter).clear()
                parameter.grad = None
                parameter.data = parameter.new_empty(0)
            del policy, model
            self.release()

    def lengths(self, num_tokens: int, mean: int, most: int) -> list[int]:
        """Lengths of sequences with a long tail, as data have, of at least so many tokens."""
        draw, found = random.Random(mean), list[int]()
        while sum(found) < num_tokens:
            length = int(min(max(draw.lognormvariate(math.log(mean) - 0.25, 0.7), 32), most))
            found.append(max(4, length // 32) if self.tiny else length)
        return found

    def microbatches(self, count: int, num_tokens: int = 16_384) -> list[Microbatch]:
        """Random conversations, two thirds of each to be learnt, packed as a run packs them."""
        budget = 512 if self.tiny else num_tokens
        draw, vocab_size = random.Random(0), self.architecture(1).vocab_size
        rows = [
            Example([draw.randrange(vocab_size) for _ in range(n)], [i >= n // 3 for i in range(n)])
            for n in self.lengths(budget * (count + 1), mean=970, most=4096)
        ]
        return sorted(pack_examples(rows, budget), key=lambda mb: -mb.num_tokens)[:count]


def check_tests(_: Bench, figures: Figures) -> None:
    """The tests of kernels, of waits for the device and of empty experts."""
    tests = Path(__file__).parents[2] / "tests" / "gpu"
    assert tests.is_dir(), f"{tests} is not there: run this in a checkout of the repository"
    command = [sys.executable, "-m", "pytest", str(tests), "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=_alone(), cwd=tests.parents[1]
    )
    figures["pytest"] = done.stdout.strip().splitlines()[-1]
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-500:]


def check_memory(bench: Bench, figures: Figures) -> None:
    """What an update of 20 layers holds and takes, by ZeRO stage and what is recomputed."""
    batch = bench.microbatches(2)
    small = bench.microbatches(1, num_tokens=512)
    for zero_stage in (1, 2):
        with bench.policy(20, zero_stage) as policy:
            policy.train_step(small, cross_entropy)  # makes the optimizer's state
            figures |= _named(f"zero_{zero_stage}", bench.held_gb())
            for recompute in reversed(Recompute):  # what needs most memory last
                policy.model.recompute = recompute
                name = f"zero_{zero_stage}_{recompute.value}"
                try:
                    policy.train_step(batch[:1], cross_entropy)  # compiles, fills the allocator
                    start = time.perf_counter()
                    peak = bench.peak_gb(partial(policy.train_step, batch, cross_entropy))
                except torch.OutOfMemoryError:
                    figures[name] = "out of memory"
                    break
                figures[f"{name}_ms_a_microbatch"] = 1e3 * (time.perf_counter() - start) / 2
                figures |= _named(name, peak)
                if zero_stage == 1:
                    kb = _saved_kb(policy, batch[0]) / policy.model.architecture.num_hidden_layers
                    figures[f"{recompute.value}_kb_a_token_layer"] = kb / batch[0].num_tokens


def _named(name: str, figures: Figures) -> Figures:
    return {f"{name}_{key}": value for key, value in figures.items()}


def _saved_kb(policy: Any, batch: Microbatch) -> float:
    """What a forward pass keeps for backward, but for weights."""
    sizes = {}
    weights = {p.untyped_storage().data_ptr() for p in policy.model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    on_device = batch.to(next(policy.model.parameters()).device)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        kept = policy.model(on_device.input_ids, on_device.position_ids)
    del kept
    return sum(sizes.values()) / 1e3


def check_profile(bench: Bench, figures: Figures) -> None:
    """Which kernels an update of 8 layers spends its time in, and how long the device waits."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * bench.is_cuda
    batch = bench.microbatches(1)
    with bench.policy(8) as policy:
        for _ in range(2):
            policy.train_step(batch, cross_entropy)
        with profile(activities=activities) as seen:
            start = time.perf_counter()
            policy.train_step(batch, cross_entropy)
            bench.wait()
            wall_ms = 1e3 * (time.perf_counter() - start)
    events = [e for e in seen.key_averages() if e.device_type.name == bench.device.type.upper()]
    kind = "self_device_time_total" if bench.is_cuda else "self_cpu_time_total"
    totals = {event.key[:60]: getattr(event, kind) / 1e3 for event in events}
    busy_ms = sum(totals.values())
    figures |= {"update_ms": wall_ms, "busy_ms": busy_ms}
    if bench.is_cuda:
        waits = [e.count for e in seen.key_averages() if e.key == "cudaStreamSynchronize"]
        figures |= {"idle_share": 1 - busy_ms / wall_ms, "stream_synchronize_calls": sum(waits)}
    slowest = sorted(totals, key=lambda name: -totals[name])[:15]
    figures |= {f"{name}_ms": totals[name] for name in slowest}


def check_attention(bench: Bench, figures: Figures) -> None:
    """Attention of packed sequences, packed and padded, against each alone; what SDPA takes."""
    arch = bench.architecture(1)
    heads, kv_heads, width = arch.num_attention_heads, arch.num_key_value_heads, arch.head_dim
    (batch,) = bench.microbatches(1)
    packed = PackedSequences(batch.position_ids).to(bench.device)
    lengths = packed.lengths.tolist()
    q, k, v = (bench.random(sum(lengths), n, width) for n in (heads, kv_heads, kv_heads))
    upstream = bench.random(sum(lengths), heads, width)
    ways: dict[str, Callable[..., Tensor]] = {"padded": packed.attend_padded}
    if takes_packed(q, k):
        ways["packed"] = packed.attend_packed
    ways["alone"] = partial(_each_alone, lengths)
    figures |= {"sequences": len(lengths), "tokens": sum(lengths)}
    found: dict[str, list[Tensor]] = {}
    for name, attend in ways.items():
        leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]

        def both(attend: Any = attend, leaves: Any = leaves) -> list[Tensor]:
            for leaf in leaves:
                leaf.grad = None
            out = attend(*leaves)
            out.backward(upstream)
            return [out.detach(), *(leaf.grad for leaf in leaves)]

        found[name] = both()
        figures[f"{name}_forward_ms"] = bench.ms(partial(attend, q, k, v))
        figures[f"{name}_both_passes_ms"] = bench.ms(both)
    for name in ways:
        error = max(_error(a, b) for a, b in zip(found[name], found["alone"], strict=True))
        figures[f"{name}_error"] = error
        assert error < 0.02, f"{name} differs from each sequence alone by {error:.3g}"
    q, k, v = (x.transpose(0, 1)[None, :, :64] for x in (q, k, v))
    mask = torch.ones(1, 1, 1, 64, dtype=torch.bool, device=bench.device)
    figures["causal_takes"] = _backend(q, k, v, None)
    figures["mask_takes"] = _backend(q[:, :, :1], k, v, mask)


def _each_alone(lengths: list[int], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    parts = [torch.split(x.transpose(0, 1)[None], lengths, 2) for x in (q, k, v)]
    outs = [
        F.scaled_dot_product_attention(*qkv, is_causal=True, enable_gqa=True)  # type: ignore[misc]
        for qkv in zip(*parts, strict=True)
    ]
    return torch.cat(outs, 2)[0].transpose(0, 1)


def _backend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> str:
    from torch.nn.attention import SDPBackend

    number = torch._fused_sdp_choice(q, k, v, mask, 0.0, mask is None, enable_gqa=True)
    kinds: Any = SDPBackend.__members__.items()
    return next((name for name, kind in kinds if int(kind) == number), str(number))


def _error(found: Tensor, wanted: Tensor) -> float:
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


def check_head(bench: Bench, figures: Figures) -> None:
    """Tiles of logits in both passes: time, memory, and the error against float64."""
    arch, num_tokens, num_exact = bench.architecture(1), 256 if bench.tiny else 16_384, 64
    hidden = F.rms_norm(bench.random(num_tokens, arch.hidden_size), (arch.hidden_size,))
    head = bench.random(arch.vocab_size, arch.hidden_size) * EMBEDDING_STD
    targets = torch.randint(arch.vocab_size, (num_tokens,), device=bench.device)
    wanted = F.linear(hidden[:num_exact].double(), head.double()).log_softmax(-1)
    wanted = wanted.gather(1, targets[:num_exact, None])[:, 0]
    leaves = [hidden.requires_grad_(), head.requires_grad_()]

    def both() -> Tensor:
        for leaf in leaves:
            leaf.grad = None
        found, _ = logprobs.token_logprobs(hidden, head, targets)
        found.sum().backward()  # type: ignore[no-untyped-call]
        return found.detach()

    usual = logprobs.TILE_ELEMENTS[bench.device.type]
    figures["usual_tile_elements"] = usual
    for factor in (1 / 4, 1 / 2, 1, 2, 4):
        tile = int(usual * factor / (2**8 if bench.tiny else 1))
        with mock.patch.dict(logprobs.TILE_ELEMENTS, {bench.device.type: tile}):
            figures[f"usual_x{factor:g}_ms"] = bench.ms(both, 3)
            figures |= _named(f"usual_x{factor:g}", bench.peak_gb(both))
    errors = (both()[:num_exact].double() - wanted).abs()
    figures |= {"mean_error_nats": float(errors.mean()), "max_error_nats": float(errors.max())}
    assert errors.max() < 0.1, f"log-probabilities are off by {float(errors.max()):.3g} nats"


@torch.no_grad()
def check_noise(bench: Bench, figures: Figures) -> None:
    """How far right implementations differ in bfloat16 over the canary: the floor of any bound."""
    from marco_train.rollout.sync import canary_sequences

    arch = bench.architecture(28)
    model = bench.model(arch)
    sequences = canary_sequences(arch.vocab_size, 4096)
    ids = torch.tensor([t for s in sequences for t in s], device=bench.device)
    places = torch.cat([torch.arange(len(s)) for s in sequences]).to(bench.device)
    given = places > 0

    def ours(model: Qwen3Moe = model, num_others: int = 0) -> Tensor:
        others = torch.arange(num_others, device=bench.device)
        packed = torch.cat([ids, others % arch.vocab_size])[None]
        hidden = model(packed, torch.cat([places, others % 700])[None])[: len(ids)]
        return of_logits(model.logits(hidden))

    def of_logits(logits: Tensor) -> Tensor:
        """Log-probabilities of the canary's tokens, but for the first of each sequence."""
        predicting = torch.cat([given[1:], given.new_zeros(1)])
        return logits[predicting].float().log_softmax(-1).gather(1, ids[given][:, None])[:, 0]

    usual = ours()
    ways: dict[str, Callable[[], Tensor]] = {
        "again": ours,
        "packed_with_others": partial(ours, num_others=500 if bench.tiny else 16_000),
        "float32": lambda: ours(bench.model(arch, torch.float32)),
        "transformers": lambda: of_logits(_transformers_logits(model, ids, places)),
    }
    for name, call in ways.items():
        gap = (call() - usual).abs()
        marks = torch.quantile(gap, gap.new_tensor([0.5, 0.9, 0.99])).tolist()
        figures |= _named(f"{name}_nats", {"mean": float(gap.mean()), "max": float(gap.max())})
        figures |= _named(f"{name}_nats", dict(zip(("p50", "p90", "p99"), marks, strict=True)))
        assert gap.mean() < 0.5, f"{name} differs by {float(gap.mean()):.3g} nats in the mean"
        bench.release()


def _transformers_logits(model: Qwen3Moe, ids: Tensor, places: Tensor) -> Tensor:
    """Logits [T, V] of transformers' class over the same weights, a sequence at a time."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**hf_config(model.architecture, BF16))
    with ids.device:
        other = AutoModelForCausalLM.from_config(config, dtype=BF16).eval()
    weights = dict(model.state_dict())
    other.load_state_dict(weights | {"lm_head.weight": model.head.detach()})
    starts = [*(places == 0).nonzero()[:, 0].tolist(), len(ids)]
    parts = [ids[a:b][None] for a, b in pairwise(starts)]
    return torch.cat([other(input_ids=part, use_cache=False).logits[0] for part in parts])


def check_determinism(bench: Bench, figures: Figures) -> None:
    """Whether an update repeats bit for bit, and which operations say that they do not."""
    batch = bench.microbatches(1)
    with bench.policy(4) as policy:
        policy.train_step(batch, cross_entropy)
        start = Snapshot(policy.state())

        def update() -> dict[str, Tensor]:
            policy.load_state(start, 1)
            policy.train_step(batch, cross_entropy)
            pieces = Snapshot(policy.state()).state.pieces
            return {f"{kind}.{p.parameter}": t for p in pieces for kind, t in p.tensors.items()}

        for name, is_asked in (("as_it_is", False), ("deterministic", True)):
            torch.use_deterministic_algorithms(is_asked, warn_only=True)
            try:
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    one = update()
                    began = time.perf_counter()
                    two = update()
                    took = time.perf_counter() - began
            finally:
                torch.use_deterministic_algorithms(False)
            differing = sum(not torch.equal(one[n], two[n]) for n in one)
            figures |= _named(name, {"tensors_differing": differing, "update_ms": 1e3 * took})
            texts = [str(w.message) for w in caught]
        said = {text.split(" does not")[0] for text in texts if "determin" in text}
        figures |= {"tensors": len(one), "not_deterministic": ", ".join(sorted(said))}
    assert bench.is_cuda or not figures["as_it_is_tensors_differing"], "a CPU repeats an update"


def check_sampler(bench: Bench, figures: Figures) -> None:
    """The native sampler at 4 layers: a token's time, its memory, and its log-probabilities."""
    arch = bench.architecture(4)
    model = bench.model(arch)
    for length in (8, 64) if bench.tiny else (128, 2048, 8192):
        rows = 4 if bench.tiny else min(64, 2**17 // length)
        ids = torch.randint(arch.vocab_size, (rows, length)).tolist()
        prompts = [Prompt(n, given, "", "", "") for n, given in enumerate(ids)]
        one, nine = (_sampler_of(model, max_response_length=n) for n in (1, 9))
        prefill = bench.ms(partial(_all_of, one, prompts), 2)
        whole = partial(_all_of, nine, prompts)
        name = f"{rows}_rows_of_{length}"
        figures |= {f"{name}_prefill_ms": prefill}
        figures |= {f"{name}_ms_a_token": (bench.ms(whole, 2) - prefill) / 8}
        figures |= _named(name, bench.peak_gb(whole))
    rollouts = whole()
    scored = nine.score([r.input_ids for r in rollouts]).view(rows, -1)[:, -9:]
    sampled = torch.tensor([r.sampler_logprobs for r in rollouts], device=bench.device)
    mismatch = figures["mismatch_nats"] = float((scored - sampled).abs().mean())
    assert mismatch < 0.1, f"sampled and scored tokens differ by {mismatch:.3g} nats in the mean"


def _all_of(sampler: Any, prompts: list[Prompt]) -> list[Rollout]:
    return list(sampler.sample(prompts, 1))


def _sampler_of(model: Qwen3Moe, max_response_length: int = 1) -> Any:
    from marco_train.config.rollout import NativeRolloutConfig
    from marco_train.rollout.native import NativeSampler

    cfg = NativeRolloutConfig()
    return NativeSampler(cfg, model, (), max_response_length, num_topk=0, seed=0, weight_version=0)


def check_hand_over(bench: Bench, figures: Figures) -> None:
    """A sync's cost by tensor, and rates to the host and to disk."""
    arch = bench.architecture(4, num_experts=256)
    source = bench.model(arch)
    sampler = _sampler_of(empty_model(arch, BF16, None))
    count = sum(1 for _ in named_weights(source))
    receive = bench.ms(lambda: sampler.load_weights(named_weights(source), version=0), 2)
    digests = bench.ms(sampler.checksums, 2)
    figures |= {
        "tensors": count,
        "gb": sum(p.nbytes for p in source.parameters()) / GB,
        "receive_us_a_tensor": 1e3 * receive / count,
        "checksum_us_a_tensor": 1e3 * digests / count,
    }
    arrived = sampler.checksums() == _sampler_of(source).checksums()
    assert arrived, "the weights that arrived are not those that were sent"
    figures |= _rates(bench)


def _rates(bench: Bench) -> Figures:
    """How fast bytes leave the device, are digested and are written."""
    from safetensors.torch import save_file

    big = torch.zeros((8 if bench.tiny else 1024) << 20, dtype=torch.uint8, device=bench.device)
    host = torch.zeros_like(big, device="cpu")
    calls: dict[str, Callable[[], object]] = {"to_host": partial(host.copy_, big)}
    if bench.is_cuda:
        pinned = torch.empty_like(host, pin_memory=True)
        calls["to_pinned"] = partial(pinned.copy_, big)
        calls["from_pinned"] = partial(big.copy_, pinned)
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "weights.safetensors"

        def save() -> None:
            save_file({"weights": host}, file)
            with file.open("rb") as written:
                os.fsync(written)

        calls["sha256"] = partial(_sha256, host)
        calls["save"] = save
        calls["load"] = partial(_read_all, file)
        return {f"{n}_gb_s": big.nbytes / GB / bench.ms(call, 1) * 1e3 for n, call in calls.items()}


def _sha256(host: Tensor) -> None:
    hashlib.sha256(host.numpy())  # type: ignore[arg-type]


def _read_all(file: Path) -> None:
    from safetensors.torch import load_file

    load_file(file)["weights"].max()  # until then the file is only mapped


STEPS = 20


def check_training(bench: Bench, figures: Figures) -> None:
    """Twenty updates of SFT, from a config to an export: float32 and bfloat16, and on a CPU."""
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        _write_small_world(root, replace(bench, tiny=True).architecture(2))
        losses = {dtype: _losses(root, dtype) for dtype in ("float32", "bfloat16")}
    for dtype, found in losses.items():
        figures |= {f"{dtype}_loss_{step}": found[step - 1] for step in (1, STEPS)}
    exact = _losses_on_a_cpu() if bench.is_cuda else figures
    for step, bounds in ((1, (1e-4, 0.02)), (STEPS, (0.02, 0.1))):
        for dtype, bound in zip(losses, bounds, strict=True):
            gap = abs(float(figures[f"{dtype}_loss_{step}"]) - float(exact[f"float32_loss_{step}"]))
            assert gap <= bound, f"the loss of step {step} in {dtype} is off by {gap:.3g} nats"


def _losses_on_a_cpu() -> Figures:
    """Make the check `training` in a process without a GPU."""
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "found.json"
        command = [sys.executable, "-m", "marco_train.commands.gpu_check", "--device", "cpu"]
        command += ["--only", "training", "--json", str(file)]
        subprocess.run(command, env=_alone(), stdout=subprocess.DEVNULL, check=True)
        found: Figures = json.loads(file.read_text())["checks"][0]["figures"]
        return found


def _alone() -> dict[str, str]:
    """The environment without this process's group of one, which a child would take for its."""
    group = {"RANK", "LOCAL_RANK", "WORLD_SIZE"}
    return {name: value for name, value in os.environ.items() if name not in group}


def _losses(root: Path, dtype: str) -> list[float]:
    """Train in this process; gives the loss of each update."""
    from marco_train.stages.sft import run_sft

    choices = [
        *("experiment=quickstart_sft", "parallel=one_rank", "data.num_rows=null"),
        *(
            f"stage.num_steps={STEPS}",
            "stage.global_batch_size=16",
            "stage.eval_every=20",
            "optim.warmup_steps=5",
        ),
        *(f"root={root}", f"output_dir={root / dtype}", f"model.dtype={dtype}"),
    ]
    with redirect_stdout(StringIO()):
        run_sft(read_run(choices))
    lines = (root / dtype / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss/cross_entropy"] for line in lines]


def _write_small_world(root: Path, shape: ArchitectureConfig) -> None:
    """Write a tokenizer of bytes, conversations and a student; the same everywhere."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokens = [*specials, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    bpe = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, []))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens(specials)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    fast.chat_template = CHATML.read_text()
    fast.save_pretrained(root / "data" / "tokenizer")
    words = ["one", "two", "three", "vier", "cinq", "seis"]
    for split in ("train", "development"):
        (root / "data" / split).mkdir(parents=True)
        for category in read_run(["experiment=quickstart_sft", "root=none"]).data.sources:
            rows = [
                {
                    "messages": [
                        {"role": "user", "content": f"{category[:8]} {n % 40}?"},
                        {"role": "assistant", "content": f"{words[n % 6]} {n % 7}"},
                    ],
                    "category": category,
                    "language": "en",
                }
                for n in range(60)
            ]
            file = root / "data" / split / f"{category}.jsonl"
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    student = random_model(replace(shape, vocab_size=320), torch.float32, seed=0)
    save_model(student, root / "student", root / "data" / "tokenizer")


Check = Callable[[Bench, Figures], None]
CHECKS: dict[str, Check] = {
    "training": check_training,
    "memory": check_memory,
    "noise": check_noise,
    "head": check_head,
    "attention": check_attention,
    "profile": check_profile,
    "hand_over": check_hand_over,
    "determinism": check_determinism,
    "sampler": check_sampler,
    "tests": check_tests,
}
