"""What others make of our weights: transformers, DeepSpeed AutoEP and plain autograd."""

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from harness import OURS
from torch import Tensor

from marco_train import distributed
from marco_train.models import Qwen3Moe
from marco_train.models.hf_io import hf_config
from marco_train.models.moe import SparseMLP


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
