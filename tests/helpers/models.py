"""Small models of the family."""

from typing import Any

from marco_train.config.architecture import ArchitectureConfig
from marco_train.models.moe import SparseMLP
from marco_train.models.qwen3_moe import Qwen3Moe

VOCAB_SIZE = 320


def sparse_mlps(model: Qwen3Moe) -> list[SparseMLP]:
    """Router and experts of each layer."""
    return [module for module in model.modules() if isinstance(module, SparseMLP)]


def architecture(**changes: Any) -> ArchitectureConfig:
    """A mixture of two layers and eight experts, or what the changes make of it."""
    fields: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "intermediate_size": 64,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e4,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
    }
    return ArchitectureConfig(**fields | changes)


DENSE: dict[str, Any] = {
    "num_experts": None,
    "num_experts_per_tok": None,
    "moe_intermediate_size": None,
}

# What vLLM's kernels for CPUs take.
WIDE: dict[str, Any] = {"head_dim": 32, "moe_intermediate_size": 32}
