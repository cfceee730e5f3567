"""The decoder of Qwen3-MoE and dense Qwen3, with the parameter names of transformers v5.

Legend: T packed tokens, D width, H query heads, G key-value heads, d head width, V vocabulary.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from marco_train.config.architecture import ArchitectureConfig, check_expert_parallel
from marco_train.config.parallel import Dispatch, Recompute
from marco_train.losses.logprobs import float32_logits
from marco_train.models.attention import PackedSequences
from marco_train.models.moe import SparseMLP
from marco_train.models.routing import LayerRouting, Routing


class Attend(Protocol):
    """How tokens see each other: packed sequences, or a key-value cache."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend; q [T, H, d], k and v [T, G, d] -> [T, H, d]."""


class Linear(nn.Module):
    """A matrix, uninitialised: weights are loaded, or drawn by `hf_io.random_model`."""

    def __init__(self, num_inputs: int, num_outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_outputs, num_inputs))

    def forward(self, x: Tensor) -> Tensor:
        """Multiply the last dimension."""
        return F.linear(x, self.weight)


class Embedding(nn.Module):
    """One vector for each token, uninitialised."""

    def __init__(self, vocab_size: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, width))

    def forward(self, input_ids: Tensor) -> Tensor:
        """Map ids [T] to [T, D]."""
        return F.embedding(input_ids, self.weight)


class RMSNorm(nn.Module):
    """Scale to unit root mean square."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def rotary_angles(position_ids: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the rotary angles of positions [1, T], each [T, 1, d] float32."""
    exponents = torch.arange(0, head_dim, 2, device=position_ids.device).float() / head_dim
    angles = position_ids[0, :, None].float() * theta**-exponents  # [T, d/2]
    angles = torch.cat([angles, angles], -1)[:, None]
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary positions to heads [T, heads, d]."""
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-second, first], -1) * sin).to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention with normalised queries and keys."""

    def __init__(self, cfg: ArchitectureConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = cfg.head_dim
        width, heads, kv_heads = cfg.hidden_size, cfg.num_attention_heads, cfg.num_key_value_heads
        self.q_proj = Linear(width, heads * cfg.head_dim)
        self.k_proj = Linear(width, kv_heads * cfg.head_dim)
        self.v_proj = Linear(width, kv_heads * cfg.head_dim)
        self.o_proj = Linear(heads * cfg.head_dim, width)
        self.q_norm = RMSNorm(cfg.head_dim, cfg.rms_norm_eps)
        self.k_norm = RMSNorm(cfg.head_dim, cfg.rms_norm_eps)

    def forward(self, hidden: Tensor, rope: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        """Map [T, D] to [T, D]."""
        heads = (-1, self.head_dim)
        q = rotate(self.q_norm(self.q_proj(hidden).unflatten(1, heads)), *rope)
        k = rotate(self.k_norm(self.k_proj(hidden).unflatten(1, heads)), *rope)
        v = self.v_proj(hidden).unflatten(1, heads)
        out: Tensor = self.o_proj(attend.attend(self.layer, q, k, v).flatten(1))
        return out


class DenseMLP(nn.Module):
    """SwiGLU MLP."""

    def __init__(self, width: int, inner_width: int) -> None:
        super().__init__()
        self.gate_proj = Linear(width, inner_width)
        self.up_proj = Linear(width, inner_width)
        self.down_proj = Linear(inner_width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map [T, D] to [T, D]."""
        out: Tensor = self.down_proj(F.silu(self.gate_proj(hidden)) * self.up_proj(hidden))
        return out


class DecoderLayer(nn.Module):
    """Attention and MLP, each behind a norm and added to its input."""

    def __init__(
        self, cfg: ArchitectureConfig, layer: int, ep_group: dist.ProcessGroup | None
    ) -> None:
        super().__init__()
        self.self_attn = Attention(cfg, layer)
        self.mlp: nn.Module
        if cfg.num_experts is None:
            self.mlp = DenseMLP(cfg.hidden_size, cfg.intermediate_size)
        else:
            assert cfg.moe_intermediate_size is not None and cfg.num_experts_per_tok is not None
            self.mlp = SparseMLP(
                cfg.hidden_size,
                cfg.moe_intermediate_size,
                cfg.num_experts,
                cfg.num_experts_per_tok,
                cfg.norm_topk_prob,
                ep_group,
            )
        self.input_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)

    def forward(
        self,
        hidden: Tensor,
        rope: tuple[Tensor, Tensor],
        attend: Attend,
        given: Tensor | None,
        observe: bool,
        recompute: Recompute,
    ) -> tuple[Tensor, LayerRouting | None]:
        """Map [T, D] to [T, D]; `given` and `observe` are the router's."""
        arguments = (hidden, rope, attend, given, observe)
        if recompute is Recompute.layer:
            found: tuple[Tensor, LayerRouting | None] = _recomputed(self._layer, *arguments)
            return found
        return self._layer(*arguments, recompute is Recompute.attention)

    def _layer(
        self,
        hidden: Tensor,
        rope: tuple[Tensor, Tensor],
        attend: Attend,
        given: Tensor | None,
        observe: bool,
        recompute_attention: bool = False,
    ) -> tuple[Tensor, LayerRouting | None]:
        if recompute_attention:
            hidden = _recomputed(self._attention, hidden, rope, attend)
        else:
            hidden = self._attention(hidden, rope, attend)
        normed = self.post_attention_layernorm(hidden)
        if isinstance(self.mlp, SparseMLP):
            out, seen = self.mlp(normed, given, observe)
            return hidden + out, seen
        return hidden + self.mlp(normed), None

    def _attention(self, hidden: Tensor, rope: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        out: Tensor = hidden + self.self_attn(self.input_layernorm(hidden), rope, attend)
        return out


def _recomputed(function: Callable[..., Any], *arguments: Any) -> Any:
    """Keep only the arguments of a call; backward makes it again, whose results are dropped."""
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)


class Decoder(nn.Module):
    """Embeddings, layers and the final norm."""

    def __init__(self, cfg: ArchitectureConfig, ep_group: dist.ProcessGroup | None) -> None:
        super().__init__()
        self.embed_tokens = Embedding(cfg.vocab_size, cfg.hidden_size)
        self.layers = nn.ModuleList(
            DecoderLayer(cfg, layer, ep_group) for layer in range(cfg.num_hidden_layers)
        )
        self.norm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)


class Qwen3Moe(nn.Module):
    """Qwen3-MoE, or dense Qwen3 where the architecture names no experts.

    With an expert-parallel group this rank holds its share of every layer's experts, and every
    forward and backward pass is one of the whole group's.
    """

    def __init__(
        self, architecture: ArchitectureConfig, ep_group: dist.ProcessGroup | None = None
    ) -> None:
        super().__init__()
        check_expert_parallel(architecture, 1 if ep_group is None else ep_group.size())
        self.architecture = architecture
        self.ep_group = ep_group
        self.recompute = Recompute.none
        """What backward computes again instead of keeping it."""
        self.model = Decoder(architecture, ep_group)
        self.lm_head: Linear | None = None
        if not architecture.tie_word_embeddings:
            self.lm_head = Linear(architecture.hidden_size, architecture.vocab_size)

    def set_dispatch(self, kind: Dispatch) -> None:
        """Choose how tokens cross the expert-parallel group."""
        for module in self.modules():
            if isinstance(module, SparseMLP):
                module.dispatch = kind

    @property
    def head(self) -> Tensor:
        """Weights of the output head, [V, D]."""
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        layout: Attend | None = None,
        routing: Routing | None = None,
    ) -> Tensor:
        """Compute the last hidden states of packed sequences.

        Args:
            input_ids: [1, T] int64.
            position_ids: [1, T] int64, restarts at 0 with every sequence.
            layout: Where sampling keeps keys and values, or sequences that are laid out already.
                None: T is whole sequences, read off their positions.
            routing: Gives the experts to take, or is filled with what the routers did.

        Returns:
            [T, D], after the final norm.
        """
        attend: Attend = PackedSequences(position_ids) if layout is None else layout
        cfg = self.architecture
        rope = rotary_angles(position_ids, cfg.head_dim, cfg.rope_theta)
        hidden = self.model.embed_tokens(input_ids[0])
        recompute = self.recompute if torch.is_grad_enabled() else Recompute.none
        for number, layer in enumerate(self.model.layers):
            given = None if routing is None else routing.given(number)
            hidden, seen = layer(hidden, rope, attend, given, routing is not None, recompute)
            if routing is not None and seen is not None:
                routing.add(seen)
        out: Tensor = self.model.norm(hidden)
        return out

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [T, V] float32 of hidden states [T, D], whole; see also `DecodingHead`."""
        return float32_logits(hidden, self.head)
