"""A dense Qwen3 into a fine-grained mixture: Marco-MoE section 2.2 (arXiv 2604.25578).

Every MLP is cut along its inner dimension into N slices of one expert's width, each slice is
scaled and copied M times, and part of every copy is drawn anew (Drop-Upcycling, arXiv 2502.19261)
so that copies can grow apart. Everything else is copied.

Stated by the paper: the cut, the scale N^(1/3) of all three matrices, re-drawing from a normal
distribution with the statistics of the dropped weights, a router of zeros. Not stated, and chosen
by config: the ratio (0.5 was best in Drop-Upcycling), whether the three matrices of an expert lose
the same indices, the seed. Not stated, and chosen here: statistics of the dropped weights after
scaling, experts ordered slice by slice.

Legend: I inner width of the dense MLP, N slices, M copies, E = N M experts, W = I / N their width,
D width.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from marco_train.config.architecture import ArchitectureConfig, read_architecture
from marco_train.content import digest
from marco_train.errors import require
from marco_train.models.hf_io import stored_weights, write_directory
from marco_train.safetensors_io import DTYPES, read

UPCYCLING = "upcycling.json"
"""Beside the weights: which model was upcycled, and how."""


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
    share_indices: bool
    """Whether an expert's three matrices lose the same inner neurons, or each its own."""
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


@dataclass(frozen=True)
class Upcycled:
    """What was written."""

    architecture: ArchitectureConfig
    split_errors: dict[Scaling, list[float]]
    """Of each layer, for the scaling that was chosen and the other; see `split_error`."""


def upcycle(
    dense_path: Path,
    out_path: Path,
    cfg: UpcycleConfig,
    tokenizer_dir: Path | None = None,
    on_layer: Callable[[int, int], None] = lambda done, total: None,
    dense_name: str | None = None,
) -> Upcycled:
    """Write the mixture's Hugging Face directory; one dense layer is in memory at a time.

    Args:
        dense_path: Hugging Face directory of a dense Qwen3.
        out_path: Where the mixture goes.
        cfg: How.
        tokenizer_dir: Where tokenizer files are copied from, if at all.
        on_layer: Told (layers done, layers in all).
        dense_name: What the note beside the weights calls the dense model. None: its path.

    Raises:
        InputError: Sizes that do not fit, or weights that are not those of a dense Qwen3.
    """
    dense = read_architecture(dense_path)
    architecture = moe_architecture(dense, cfg)
    stored = stored_weights(dense_path, dense)
    errors: dict[Scaling, list[float]] = {scaling: [] for scaling in Scaling}

    def weights() -> Iterator[tuple[str, Tensor]]:
        for name in stored:
            if ".layers." not in name:
                yield name, read(stored[name])
        for layer in range(dense.num_hidden_layers):
            prefix = f"model.layers.{layer}."
            tensors = {
                name.removeprefix(prefix): read(where)
                for name, where in stored.items()
                if name.startswith(prefix)
            }
            gate, up, down = (tensors.pop(f"mlp.{m}_proj.weight") for m in ("gate", "up", "down"))
            for name, tensor in tensors.items():
                yield prefix + name, tensor
            norm = tensors["post_attention_layernorm.weight"]
            for scaling, found in errors.items():
                found.append(split_error(gate, up, down, norm, cfg.expert_width, scaling))
            for name, tensor in _sparse_mlp(gate, up, down, cfg, layer):
                yield f"{prefix}mlp.{name}.weight", tensor
            on_layer(layer + 1, dense.num_hidden_layers)

    dtype = DTYPES[stored["model.norm.weight"].dtype]
    note = {"dense": dense_name or str(dense_path), "digest": digest(dense_path), **_settings(cfg)}
    notes = {UPCYCLING: note}
    write_directory(out_path, architecture, dtype, weights(), tokenizer_dir, notes=notes)
    return Upcycled(architecture, errors)


def _settings(cfg: UpcycleConfig) -> dict[str, Any]:
    return asdict(cfg) | {"scaling": cfg.scaling.value}


def is_upcycled(out_path: Path, dense_path: Path, cfg: UpcycleConfig) -> bool:
    """Whether a directory is what `upcycle` makes of a dense model, by the note in it."""
    try:
        note = json.loads((out_path / UPCYCLING).read_text(encoding="utf-8"))
        made = {name: note[name] for name in _settings(cfg)}
        return made == _settings(cfg) and note["digest"] == digest(dense_path)
    except (LookupError, OSError, TypeError, ValueError):
        return False


def _sparse_mlp(
    gate: Tensor, up: Tensor, down: Tensor, cfg: UpcycleConfig, layer: int
) -> Iterator[tuple[str, Tensor]]:
    """Router and experts of one layer, by name."""
    generator = torch.Generator().manual_seed(cfg.seed * 10_007 + layer)
    router = torch.empty(cfg.num_experts, gate.shape[1])
    router.normal_(std=cfg.router_std, generator=generator)
    yield "gate", router.to(gate.dtype)
    for expert, matrices in enumerate(upcycle_mlp(gate, up, down, cfg, generator)):
        for matrix, tensor in zip(("gate", "up", "down"), matrices, strict=True):
            yield f"experts.{expert}.{matrix}_proj", tensor


def _scales(scaling: Scaling, num_slices: int) -> tuple[float, float, float]:
    """Factors of gate, up and down."""
    cube, square = num_slices ** (1 / 3), num_slices**0.5
    return (cube, cube, cube) if scaling is Scaling.paper else (1.0, square, square)


def split_error(
    gate: Tensor, up: Tensor, down: Tensor, norm: Tensor, expert_width: int, scaling: Scaling
) -> float:
    """How far one copy of every slice, all active and nothing dropped, is from the dense MLP.

    Args:
        gate: [I, D], as up.
        up: [I, D].
        down: [D, I].
        norm: [D], of the layer norm before the MLP, which gives inputs their spread.
        expert_width: W.
        scaling: Which one to measure.

    Returns:
        |mixture - dense| / |dense| over 256 random normal inputs.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, gate.shape[1], generator=generator) * norm.float()
    gate_x, up_x = F.linear(x, gate.float()), F.linear(x, up.float())
    num_slices = gate.shape[0] // expert_width
    of_gate, of_up, of_down = _scales(scaling, num_slices)
    # With equal routing weights 1 / N, the slices' sum is one product over the whole inner width.
    inner = F.silu(of_gate * gate_x) * up_x * (of_up * of_down / num_slices)
    dense = F.linear(F.silu(gate_x) * up_x, down.float())
    return float((F.linear(inner, down.float()) - dense).norm() / dense.norm())


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
    scales = _scales(cfg.scaling, num_slices)
    num_dropped = round(cfg.drop_ratio * cfg.expert_width)
    for start in range(0, gate.shape[0], cfg.expert_width):
        part = slice(start, start + cfg.expert_width)
        # All three with the inner dimension first, so that one index drops a neuron.
        sliced = [
            matrix.float() * scale
            for matrix, scale in zip((gate[part], up[part], down[:, part].T), scales, strict=True)
        ]
        for _ in range(cfg.num_experts // num_slices):
            draws = [
                torch.randperm(cfg.expert_width, generator=generator)[:num_dropped]
                for _ in range(1 if cfg.share_indices else 3)
            ]
            gate_e, up_e, down_e = (
                _redraw(matrix, dropped, generator).to(gate.dtype)
                for matrix, dropped in zip(sliced, draws * (3 // len(draws)), strict=True)
            )
            yield gate_e, up_e, down_e.T.contiguous()


def _redraw(matrix: Tensor, dropped: Tensor, generator: torch.Generator) -> Tensor:
    """Draw the dropped rows anew from a normal with their own mean and deviation."""
    out = matrix.clone()
    if len(dropped) > 0:
        old = matrix[dropped]
        mean, std = float(old.mean()), float(old.std(correction=0))
        out[dropped] = torch.empty_like(old).normal_(mean, std, generator=generator)
    return out
