"""A model as vLLM lays it out on a GPU, without its kernels: plain modules that hold tensors."""

from collections.abc import Iterable, Sequence
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from marco_train.inference.layout import kept_weights
from marco_train.models.checksums import checksums_of
from marco_train.models.qwen3_moe import Qwen3Moe
from marco_train.models.weights import joined_shapes
from marco_train.rollout.base import Sampler

PADDING = 64  # of the rows of embeddings and head


class UnquantizedLinearMethod:
    """Named as vLLM's."""


class UnquantizedEmbeddingMethod:
    """Named as vLLM's."""


def moe_method(backend: str) -> object:
    """What experts are computed with."""
    return SimpleNamespace(unquantized_backend=SimpleNamespace(name=backend))


def holder(weight: Tensor, method: object = None, name: str = "weight") -> nn.Module:
    """A module with one parameter."""
    module = nn.Module()
    module.register_parameter(name, nn.Parameter(weight.clone(), requires_grad=False))
    if method is not None:
        module.quant_method = method  # type: ignore[assignment]
    return module


def tree(modules: dict[str, nn.Module]) -> nn.Module:
    """Modules under dotted names."""
    root = nn.Module()
    for path, module in modules.items():
        *parents, last = path.split(".")
        place = root
        for parent in parents:
            if not hasattr(place, parent):
                place.add_module(parent, nn.Module())
            place = getattr(place, parent)
        place.add_module(last, module)
    return root


def padded(weight: Tensor) -> Tensor:
    """With rows of other values below, up to a multiple of 64."""
    return torch.cat([weight, torch.full((-len(weight) % PADDING, weight.shape[1]), 7.0)])


def laid_out(weights: dict[str, Tensor], num_layers: int, backend: str = "TRITON") -> nn.Module:
    """Weights of ours, experts joined, in vLLM's modules of Qwen3MoeForCausalLM 0.32.0."""
    linear, embedding = UnquantizedLinearMethod(), UnquantizedEmbeddingMethod()
    found = {"model.embed_tokens": holder(padded(weights["model.embed_tokens.weight"]), embedding)}
    for number in range(num_layers):
        ours = f"model.layers.{number}."
        attention = ours + "self_attn."
        qkv = [weights[f"{attention}{part}_proj.weight"] for part in "qkv"]
        found[attention + "qkv_proj"] = holder(torch.cat(qkv), linear)
        found[attention + "o_proj"] = holder(weights[attention + "o_proj.weight"], linear)
        norms = ["self_attn.q_norm", "self_attn.k_norm", "input_layernorm"]
        for norm in [*norms, "post_attention_layernorm"]:
            found[ours + norm] = holder(weights[f"{ours}{norm}.weight"])
        if ours + "mlp.gate.weight" not in weights:
            both = [weights[f"{ours}mlp.{part}_proj.weight"] for part in ("gate", "up")]
            found[ours + "mlp.gate_up_proj"] = holder(torch.cat(both), linear)
            found[ours + "mlp.down_proj"] = holder(weights[ours + "mlp.down_proj.weight"], linear)
            continue
        gate = holder(weights[ours + "mlp.gate.weight"], linear)
        experts = ours + "mlp.experts."
        gate_up, down = weights[experts + "gate_up_proj"], weights[experts + "down_proj"].clone()
        routed = holder(gate_up, moe_method(backend), "w13_weight")
        routed.register_parameter("w2_weight", nn.Parameter(down, requires_grad=False))
        found |= {ours + "mlp.gate": gate, experts + "gate": gate}
        found[experts + "routed_experts"] = routed
    found["model.norm"] = holder(weights["model.norm.weight"])
    head = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])
    found["lm_head"] = holder(padded(head), embedding)
    return tree(found)


class FakeEngineSampler(Sampler):
    """Holds the policy's weights as vLLM does on a GPU, after a fault; its canary sees nothing."""

    def __init__(self, policy: Qwen3Moe, fault: str = "", backend: str = "TRITON") -> None:
        self._policy = policy
        self._fault = fault
        self._backend = backend
        self._held: dict[str, Tensor] = {}

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        came = {name: weight.clone() for name, weight in weights}
        first = ".layers.1.mlp.experts."
        match self._fault:
            case "two experts swapped":
                for name in (n for n in came if first in n):
                    came[name][[2, 5]] = came[name][[5, 2]]
            case "gate and up swapped":
                gate_up = came[f"model{first}gate_up_proj"]
                gate_up[3] = torch.cat(gate_up[3].chunk(2)[::-1])
            case "a stale layer":
                stale = {n: w for n, w in self._held.items() if ".layers.1." in n}
                came |= stale
            case "one norm off":
                came["model.layers.0.self_attn.k_norm.weight"][4] += 1e-6
            case "a row of k lost":
                came["model.layers.0.self_attn.k_proj.weight"][-1] = 0
        self._held = came

    def checksums(self) -> list[dict[str, int]]:
        engine = laid_out(self._held, self._policy.architecture.num_hidden_layers, self._backend)
        shapes = joined_shapes(self._policy, self.share)
        return [checksums_of(kept_weights(engine, shapes, torch.float32, "cuda"), self.share)]

    def score(self, sequences: Sequence[list[int]]) -> Tensor:
        return torch.zeros(sum(len(ids) - 1 for ids in sequences))
