"""A dense Qwen3 into a fine-grained mixture: Marco-MoE section 2.2 (arXiv 2604.25578).

Every MLP is cut along its inner dimension into N slices of one expert's width, each slice is
scaled and copied M times, and part of every copy is drawn anew (Drop-Upcycling, arXiv 2502.19261)
so that copies can grow apart. Everything else is copied.

Stated by the paper: the cut, the scale N^(1/3) of all three matrices, re-drawing from a normal
distribution with the statistics of the dropped weights, a router of zeros. Not stated, and chosen
here: one set of dropped indices for the three matrices of an expert, statistics of the dropped
weights after scaling, experts ordered slice by slice.

Legend: I inner width of the dense MLP, N slices, M copies, E = N M experts, W = I / N their width,
D width.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from marco_train.architecture import ArchitectureConfig, InputError, read_architecture, require
from marco_train.models.hf_io import INDEX, WEIGHTS, write_directory


class Scaling(Enum):
    """What makes up for the split.

    paper: all three matrices by N^(1/3). The gate's share is approximate, as SiLU is not
    homogeneous. exact: up and down by N^(1/2), the gate not at all; with nothing dropped and one
    copy of each slice active the mixture then equals the dense layer.
    """

    paper = "paper"
    exact = "exact"


@dataclass(frozen=True, kw_only=True)
class UpcycleConfig:
    """How a dense model is made into a mixture."""

    num_experts: int
    expert_width: int
    top_k: int
    drop_ratio: float
    """Share of each expert's inner width that is drawn anew."""
    scaling: Scaling
    router_std: float
    """Spread of the router's weights; 0 is the paper's, and sends every token to the first
    top_k experts until training breaks the tie."""
    seed: int


def moe_architecture(dense: ArchitectureConfig, cfg: UpcycleConfig) -> ArchitectureConfig:
    """Shape of the mixture.

    Raises:
        InputError: Names the number that does not fit.
    """
    require(not dense.is_moe, "the model to upcycle is a mixture already")
    require(
        dense.intermediate_size % cfg.expert_width == 0,
        f"expert_width {cfg.expert_width} does not divide the dense inner width "
        f"{dense.intermediate_size}",
    )
    num_slices = dense.intermediate_size // cfg.expert_width
    require(
        cfg.num_experts % num_slices == 0,
        f"num_experts {cfg.num_experts} is not a multiple of the {num_slices} slices",
    )
    require(0 <= cfg.drop_ratio < 1, f"drop_ratio is {cfg.drop_ratio}, and must lie in [0, 1)")
    return replace(
        dense,
        num_experts=cfg.num_experts,
        num_experts_per_tok=cfg.top_k,
        moe_intermediate_size=cfg.expert_width,
        norm_topk_prob=True,
    )


def upcycle(
    dense_path: Path,
    out_path: Path,
    cfg: UpcycleConfig,
    tokenizer_dir: Path | None = None,
    on_layer: Callable[[int, int], None] = lambda done, total: None,
) -> ArchitectureConfig:
    """Write the mixture's Hugging Face directory; one layer is in memory at a time.

    Args:
        dense_path: Hugging Face directory of a dense Qwen3.
        out_path: Where the mixture goes.
        cfg: How.
        tokenizer_dir: Where tokenizer files are copied from, if at all.
        on_layer: Told (layers done, layers in all).
    """
    dense = read_architecture(dense_path)
    architecture = moe_architecture(dense, cfg)
    read = _reader(dense_path)
    weights = _mixture_weights(dense, cfg, read, on_layer)
    dtype = read("model.norm.weight").dtype
    write_directory(out_path, architecture, dtype, weights, tokenizer_dir)
    return architecture


def _reader(path: Path) -> Callable[[str], Tensor]:
    """Read one tensor of a Hugging Face directory by its name."""
    index = path / INDEX
    files = json.loads(index.read_text())["weight_map"] if index.is_file() else {}

    def read(name: str) -> Tensor:
        with safe_open(path / files.get(name, WEIGHTS), framework="pt") as tensors:
            if name not in tensors.keys():  # noqa: SIM118 - not a dictionary
                raise InputError(f"{path} has no weight {name}")
            found: Tensor = tensors.get_tensor(name)
        return found

    return read


def _mixture_weights(
    dense: ArchitectureConfig,
    cfg: UpcycleConfig,
    read: Callable[[str], Tensor],
    on_layer: Callable[[int, int], None],
) -> Iterator[tuple[str, Tensor]]:
    yield "model.embed_tokens.weight", read("model.embed_tokens.weight")
    for layer in range(dense.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        for name in [
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "self_attn.o_proj",
            "self_attn.q_norm",
            "self_attn.k_norm",
            "input_layernorm",
            "post_attention_layernorm",
        ]:
            yield f"{prefix}.{name}.weight", read(f"{prefix}.{name}.weight")
        generator = torch.Generator().manual_seed(cfg.seed * 10_007 + layer)
        router = torch.empty(cfg.num_experts, dense.hidden_size)
        router.normal_(std=cfg.router_std, generator=generator)
        gate, up, down = (read(f"{prefix}.mlp.{m}_proj.weight") for m in ("gate", "up", "down"))
        yield f"{prefix}.mlp.gate.weight", router.to(gate.dtype)
        experts = upcycle_mlp(gate, up, down, cfg, generator)
        for expert, matrices in enumerate(experts):
            for matrix, weight in zip(("gate", "up", "down"), matrices, strict=True):
                yield f"{prefix}.mlp.experts.{expert}.{matrix}_proj.weight", weight
        on_layer(layer + 1, dense.num_hidden_layers)
    yield "model.norm.weight", read("model.norm.weight")
    if not dense.tie_word_embeddings:
        yield "lm_head.weight", read("lm_head.weight")


def upcycle_mlp(
    gate: Tensor, up: Tensor, down: Tensor, cfg: UpcycleConfig, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield the experts of one layer, slice by slice, the copies of a slice together.

    Args:
        gate: [I, D] of the dense MLP, as up.
        up: [I, D].
        down: [D, I].
        cfg: How.
        generator: Draws indices and weights.

    Yields:
        gate [W, D], up [W, D] and down [D, W] of each expert.
    """
    num_slices = gate.shape[0] // cfg.expert_width
    cube, square = num_slices ** (1 / 3), num_slices**0.5
    scales = (cube, cube, cube) if cfg.scaling is Scaling.paper else (1.0, square, square)
    num_dropped = round(cfg.drop_ratio * cfg.expert_width)
    for start in range(0, gate.shape[0], cfg.expert_width):
        part = slice(start, start + cfg.expert_width)
        # All three with the inner dimension first, so that one index drops a neuron.
        sliced = [
            matrix.float() * scale
            for matrix, scale in zip((gate[part], up[part], down[:, part].T), scales, strict=True)
        ]
        for _ in range(cfg.num_experts // num_slices):
            dropped = torch.randperm(cfg.expert_width, generator=generator)[:num_dropped]
            gate_e, up_e, down_e = (_redraw(m, dropped, generator).to(gate.dtype) for m in sliced)
            yield gate_e, up_e, down_e.T.contiguous()


def _redraw(matrix: Tensor, dropped: Tensor, generator: torch.Generator) -> Tensor:
    """Draw the dropped rows anew from a normal with their own mean and deviation."""
    out = matrix.clone()
    if len(dropped) > 0:
        old = matrix[dropped]
        mean, std = float(old.mean()), float(old.std(correction=0))
        out[dropped] = torch.empty_like(old).normal_(mean, std, generator=generator)
    return out
