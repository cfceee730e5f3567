"""Where vLLM keeps a model's weights as a checkpoint has them, so that they can be compared.

vLLM joins some matrices, one below the other, and repacks others for its kernels. A weight counts
as kept where its tensor is what the kernels read, unchanged in order; a table of platforms, read in
the sources of vLLM 0.32.0, says which are:

cuda    all weights, `layers/linear.py` and `layers/vocab_parallel_embedding.py`; the experts with
        Triton's kernels, as on Hopper, `layers/fused_moe/oracle/unquantized.py`. Not run there yet.
cpu     norms and embeddings; linear layers, the output head and experts are packed elsewhere,
        `layers/utils.py` and `layers/fused_moe/experts/cpu_moe.py`.
"""

from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

# Matrices that vLLM joins, in their order.
JOINED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
# Experts' matrices, of which the first holds gate and up of each expert, as ours does.
EXPERTS = {"routed_experts.w13_weight": "gate_up_proj", "routed_experts.w2_weight": "down_proj"}
# Their rows are followed by others, up to a multiple of 64.
PADDED = ("embed_tokens.weight", "lm_head.weight")
KEPT_ON_CPU = ("norm.weight", "embed_tokens.weight")
# Kernels for experts that read them as they were loaded.
READ_AS_LOADED = {"TRITON", "BATCHED_TRITON"}
PLAIN_METHODS = {"UnquantizedLinearMethod", "UnquantizedEmbeddingMethod", "NoneType"}


def kept_weights(
    model: nn.Module, shapes: Mapping[str, Sequence[int]], dtype: torch.dtype, platform: str
) -> Iterator[tuple[str, Tensor]]:
    """Find the weights of a model of vLLM that are kept as a checkpoint has them.

    Args:
        model: Of vLLM.
        shapes: Of all weights of the model, or of a share of its experts where the engine holds
            one, joined; see `models/weights.py`.
        dtype: In which they were sent. A weight that vLLM holds in another is left out.
        platform: cuda or cpu.

    Yields:
        Weights by the names in `shapes`, views of the engine's memory. A weight of which a process
        holds a part only is left out.
    """
    for prefix, module in model.named_modules():
        for key, tensor in module.named_parameters(prefix, recurse=False):
            if tensor.dtype == dtype and _is_kept(key, module, platform):
                yield from _parts(key, tensor.detach(), shapes)


def _is_kept(name: str, module: nn.Module, platform: str) -> bool:
    """Whether the kernels of a platform read this tensor itself."""
    if platform == "cpu":
        return name.endswith(KEPT_ON_CPU)
    method: Any = getattr(module, "quant_method", None)
    if name.endswith(tuple(EXPERTS)):
        return method.unquantized_backend.name in READ_AS_LOADED
    return type(method).__name__ in PLAIN_METHODS


def _parts(
    name: str, tensor: Tensor, shapes: Mapping[str, Sequence[int]]
) -> Iterator[tuple[str, Tensor]]:
    """Cut a tensor of vLLM into the weights that it is joined from."""
    names = _names(name)
    if not all(each in shapes for each in names):
        return  # a tied head, or a router that is known under another name too
    rows = [shapes[each][0] for each in names]
    if name.endswith(PADDED):
        tensor = tensor[: sum(rows)]
    if tensor.numel() != sum(prod(shapes[each]) for each in names):
        return  # on a CPU emptied, elsewhere one process's part of it
    yield from zip(names, torch.split(tensor, rows), strict=True)


def _names(name: str) -> list[str]:
    """Our names of the weights in a tensor of vLLM."""
    for theirs, ours in EXPERTS.items():
        if name.endswith(theirs):
            return [name.replace(theirs, ours)]
    for joined, parts in JOINED.items():
        if name.endswith(f".{joined}.weight"):
            return [name.replace(joined, part) for part in parts]
    return [name]
