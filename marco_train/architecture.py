"""The shape of a dense Qwen3 or a Qwen3-MoE decoder, and what is refused about it.

Imports no tensor library: a run is refused before one is loaded.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from omegaconf import MISSING

from marco_train.errors import InputError, require, require_positive


@dataclass(kw_only=True)
class ArchitectureConfig:
    """Shape of a dense Qwen3 or a Qwen3-MoE decoder, under transformers' field names."""

    vocab_size: int = MISSING
    hidden_size: int = MISSING
    num_hidden_layers: int = MISSING
    num_attention_heads: int = MISSING
    num_key_value_heads: int = MISSING
    head_dim: int = MISSING
    # Width of the dense MLP; in a mixture, only what config.json says of it.
    intermediate_size: int = MISSING
    # None: a dense model; the next two are then None as well.
    num_experts: int | None = None
    num_experts_per_tok: int | None = None
    moe_intermediate_size: int | None = None
    norm_topk_prob: bool = True
    rms_norm_eps: float = MISSING
    rope_theta: float = MISSING
    max_position_embeddings: int = MISSING
    tie_word_embeddings: bool = MISSING

    @property
    def is_moe(self) -> bool:
        """Whether every layer holds experts instead of one MLP."""
        return self.num_experts is not None

    def __post_init__(self) -> None:
        sizes = {
            name: value
            for name, value in asdict(self).items()
            if not isinstance(value, bool) and isinstance(value, int | float)
        }
        require_positive("model.architecture", **sizes)
        require(
            self.num_attention_heads % self.num_key_value_heads == 0,
            f"num_attention_heads {self.num_attention_heads} is not a multiple of "
            f"num_key_value_heads {self.num_key_value_heads}",
        )
        moe = (self.num_experts, self.num_experts_per_tok, self.moe_intermediate_size)
        require(
            all(value is None for value in moe) or all(value is not None for value in moe),
            f"num_experts, num_experts_per_tok and moe_intermediate_size are {moe}; give all "
            "three (a mixture) or none (a dense model)",
        )
        if self.num_experts is not None and self.num_experts_per_tok is not None:
            for name in ("hidden_size", "moe_intermediate_size"):
                require(
                    getattr(self, name) % 8 == 0,
                    f"{name} {getattr(self, name)} is not a multiple of 8, which grouped matrix "
                    "products of bfloat16 need (rows of 16 bytes)",
                )
            require(
                self.num_experts_per_tok <= self.num_experts,
                f"num_experts_per_tok is {self.num_experts_per_tok}, more than the "
                f"{self.num_experts} experts",
            )


def check_expert_parallel(architecture: ArchitectureConfig, expert_parallel_size: int) -> None:
    """Refuse experts that cannot be shared evenly; a dense model has nothing to share."""
    if architecture.num_experts is None:
        require(
            expert_parallel_size == 1,
            f"parallel.expert_parallel_size is {expert_parallel_size}, but the model is dense and "
            "has no experts to share: set it to 1",
        )
        return
    divisors = [n for n in range(1, 65) if architecture.num_experts % n == 0]
    require(
        architecture.num_experts % expert_parallel_size == 0,
        f"parallel.expert_parallel_size {expert_parallel_size} does not divide the "
        f"{architecture.num_experts} experts; sizes that do: {divisors}",
    )


def read_architecture(path: str | Path) -> ArchitectureConfig:
    """Read the shape of a Qwen3 or Qwen3-MoE model from the config.json of its directory.

    Raises:
        InputError: The directory or a field is missing, or the model is of another kind.
    """
    file = Path(path) / "config.json"
    if not file.is_file():
        raise InputError(f"no model at {str(path)!r}: {file} does not exist")
    found = json.loads(file.read_text())
    architecture = (found.get("architectures") or ["?"])[0]
    require(
        architecture in {"Qwen3ForCausalLM", "Qwen3MoeForCausalLM"},
        f"{file} describes {architecture}; supported are Qwen3ForCausalLM and Qwen3MoeForCausalLM",
    )
    is_moe = architecture == "Qwen3MoeForCausalLM"
    require(
        found.get("hidden_act", "silu") == "silu",
        f"{file} asks for the activation {found.get('hidden_act')}; supported is silu",
    )
    rope = found.get("rope_parameters") or {"rope_theta": found.get("rope_theta")}
    require(rope.get("rope_theta") is not None, f"{file} does not give rope_theta")
    require(
        rope.get("rope_type", "default") == "default" and found.get("rope_scaling") is None,
        f"{file} asks for scaled rotary embeddings, which are not supported",
    )
    require(not found.get("use_sliding_window"), f"{file} asks for sliding-window attention")
    if is_moe:
        require(
            found.get("decoder_sparse_step", 1) == 1 and not found.get("mlp_only_layers"),
            f"{file} mixes dense and sparse layers, which is not supported",
        )
        num_experts = found.get("num_experts", found.get("num_local_experts"))
        require(num_experts is not None, f"{file} does not give num_experts")
    plain = [
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "intermediate_size",
        "rms_norm_eps",
        "max_position_embeddings",
        "tie_word_embeddings",
    ]
    missing = [name for name in plain if name not in found]
    require(not missing, f"{file} does not give {', '.join(missing)}")
    return ArchitectureConfig(
        **{name: found[name] for name in plain},
        rope_theta=rope["rope_theta"],
        num_experts=num_experts if is_moe else None,
        num_experts_per_tok=found["num_experts_per_tok"] if is_moe else None,
        moe_intermediate_size=found["moe_intermediate_size"] if is_moe else None,
        norm_topk_prob=found.get("norm_topk_prob", True) if is_moe else True,
    )
