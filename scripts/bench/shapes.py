"""The shapes of models that the benches compare at."""

from dataclasses import replace

from marco_train.config.architecture import ArchitectureConfig
from marco_train.models.weights import meta_model


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
    """Shape of an MoE model of the family, with two query heads to each key-value head."""
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


def dense(arch: ArchitectureConfig) -> ArchitectureConfig:
    """The same shape with one MLP in place of the experts."""
    return replace(arch, num_experts=None, num_experts_per_tok=None, moe_intermediate_size=None)


QUICKSTART = architecture(1536, 2, 2, 32, width=64, experts=16, top_k=4, expert_width=48)
FIVE_MILLION = architecture(1536, 3, 4, 32, width=128, experts=32, top_k=4, expert_width=128)
MEDIUM = architecture(1536, 4, 8, 32, width=256, experts=64, top_k=8, expert_width=128)
MINI = architecture(151_936, 28, 16, 128, width=1024, experts=256, top_k=8, expert_width=768)


def layer_parameters(arch: ArchitectureConfig) -> tuple[int, int]:
    """Matrix weights of a layer: those every token uses, and those of one expert."""
    assert arch.num_experts is not None and arch.moe_intermediate_size is not None
    heads = 2 * (arch.num_attention_heads + arch.num_key_value_heads)  # q and o, k and v
    dense = arch.hidden_size * (heads * arch.head_dim + arch.num_experts)
    return dense, 3 * arch.hidden_size * arch.moe_intermediate_size


def num_parameters(arch: ArchitectureConfig) -> int:
    """Weights of a model."""
    return sum(parameter.numel() for parameter in meta_model(arch).parameters())


def step_flops(arch: ArchitectureConfig, tokens: int, length: int) -> float:
    """Operations of a step: 6 N_active T, and causal attention; nothing computed twice."""
    dense, expert = layer_parameters(arch)
    layer = dense + (arch.num_experts_per_tok or 0) * expert
    active = arch.num_hidden_layers * layer + arch.vocab_size * arch.hidden_size
    attention = 2 * tokens * min(length, tokens) * arch.num_attention_heads * arch.head_dim
    return 6.0 * active * tokens + 3.0 * arch.num_hidden_layers * attention
