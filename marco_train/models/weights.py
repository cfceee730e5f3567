"""Weights by name, in streams, and fresh ones; in the order of the model, without a tied head.

A checkpoint has one 2-D tensor per expert matrix, as the hub stores them:
`model.layers.0.mlp.experts.7.gate_proj.weight`. In memory, and in streams between policy and
sampler, the experts of a layer are joined: `model.layers.0.mlp.experts.gate_up_proj` [E, 2 I, D],
`experts.down_proj` [E, D, I].
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from marco_train.config.architecture import ArchitectureConfig
from marco_train.config.model import DType
from marco_train.distributed import device, gather_objects
from marco_train.errors import InputError, require
from marco_train.models.qwen3_moe import Qwen3Moe

NUM_NAMED = 10  # how many of many mistakes are named
FUSED = re.compile(r"(.*\.mlp\.experts)\.(gate_up_proj|down_proj)$")


class ExpertShare(NamedTuple):
    """One of equal parts of the experts of each layer, which are cut in their order."""

    number: int
    num_shares: int


ALL_EXPERTS = ExpertShare(0, 1)


def _split_experts(name: str, fused: Tensor, first: int) -> Iterator[tuple[str, Tensor]]:
    """Views of one fused matrix [e, ...] under checkpoint names, from expert number `first`."""
    found = FUSED.match(name)
    assert found is not None
    prefix, matrix = found.groups()
    for expert, whole in enumerate(fused, first):
        if matrix == "down_proj":
            yield f"{prefix}.{expert}.down_proj.weight", whole
        else:
            gate, up = whole.chunk(2)
            yield f"{prefix}.{expert}.gate_proj.weight", gate
            yield f"{prefix}.{expert}.up_proj.weight", up


def checkpoint_names(
    name: str, shape: Sequence[int], share: ExpertShare = ALL_EXPERTS
) -> list[str]:
    """Name the checkpoint's weights in a tensor of this name and shape, in the order of memory.

    Joined experts are those of `share`.
    """
    found = FUSED.match(name)
    if found is None:
        return [name]
    prefix, matrix = found.groups()
    kinds = ("down_proj",) if matrix == "down_proj" else ("gate_proj", "up_proj")
    first = share.number * shape[0]
    experts = range(first, first + shape[0])
    return [f"{prefix}.{expert}.{kind}.weight" for expert in experts for kind in kinds]


def torch_dtype(dtype: DType) -> torch.dtype:
    """The type of torch that a config names."""
    named: torch.dtype = getattr(torch, dtype.value)
    return named


def _held_share(group: dist.ProcessGroup | None) -> ExpertShare:
    """The experts that this rank has of a model over a group."""
    return ALL_EXPERTS if group is None else ExpertShare(group.rank(), group.size())


def local_weights(model: Qwen3Moe) -> Iterator[tuple[str, Tensor]]:
    """This rank's weights under checkpoint names; a tied head is absent."""
    held = ((name, parameter.detach()) for name, parameter in model.named_parameters())
    return single_experts(held, _held_share(model.ep_group))


def single_experts(
    weights: Iterable[tuple[str, Tensor]], share: ExpertShare
) -> Iterator[tuple[str, Tensor]]:
    """Pass on a stream of `named_weights` with each expert under its names in the checkpoint."""
    for name, weight in weights:
        if FUSED.match(name):
            yield from _split_experts(name, weight, first=share.number * len(weight))
        else:
            yield name, weight


def named_weights(
    model: Qwen3Moe, share: ExpertShare = ALL_EXPERTS
) -> Iterator[tuple[str, Tensor]]:
    """Stream the model with the experts of `share`, joined; every rank of the group takes part.

    At most one layer's experts of one matrix are gathered at a time, and none where each rank asks
    for those that it holds.
    """
    for name, parameter in model.named_parameters():
        weight = parameter.detach()
        yield name, _experts_of(share, weight, model.ep_group) if FUSED.match(name) else weight


def _experts_of(share: ExpertShare, local: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    if share == _held_share(group):
        return local
    return _gather_experts(local, group).chunk(share.num_shares)[share.number]


# Its name from torch 2.13 on, which warns of the former one.
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)


def _gather_experts(local: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Join every rank's experts, [e, ...] -> [E, ...]."""
    if group is None:
        return local
    whole = local.new_empty(group.size() * len(local), *local.shape[1:])
    _all_gather(whole, local.contiguous(), group=group)
    return whole


def weight_shapes(model: Qwen3Moe) -> dict[str, tuple[int, ...]]:
    """Shape of each weight of the complete checkpoint, by name and in its order."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, parameter in model.named_parameters():
        if FUSED.match(name):
            one = parameter.detach()[:1]  # every expert's are alike, and here is one of them
            for expert in range(model.architecture.num_experts or 0):
                shapes |= {n: tuple(w.shape) for n, w in _split_experts(name, one, expert)}
        else:
            shapes[name] = tuple(parameter.shape)
    return shapes


def joined_shapes(model: Qwen3Moe, share: ExpertShare = ALL_EXPERTS) -> dict[str, tuple[int, ...]]:
    """Shape of each weight of a stream of `named_weights`, by name and in its order."""
    num_experts = (model.architecture.num_experts or 0) // share.num_shares
    return {
        name: (num_experts, *parameter.shape[1:]) if FUSED.match(name) else tuple(parameter.shape)
        for name, parameter in model.named_parameters()
    }


def meta_model(
    architecture: ArchitectureConfig, ep_group: dist.ProcessGroup | None = None
) -> Qwen3Moe:
    """Build a model without memory, for its names and shapes."""
    with torch.device("meta"):
        return Qwen3Moe(architecture, ep_group)


def accounted(
    weights: Iterable[tuple[str, Tensor]], shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[str, Tensor]]:
    """Pass on a stream of exactly the weights of these shapes, in any order.

    Raises:
        InputError: A name is unknown, comes twice or never, or a shape differs.
    """
    missing = dict(shapes)
    for name, weight in weights:
        shape = missing.pop(name, None)
        if shape is None:
            state = "came twice" if name in shapes else "is not of this model"
            raise InputError(f"weight {name} {state}")
        if tuple(weight.shape) != tuple(shape):
            raise InputError(f"weight {name} is {list(weight.shape)}, not {list(shape)}")
        yield name, weight
    if missing:
        raise InputError(f"{len(missing)} weights are missing: {name_first(list(missing))}")


def held_ranges(model: Qwen3Moe) -> dict[str, tuple[tuple[int, ...], int]]:
    """Of each parameter, its shape with all experts, and where this rank's elements begin in it."""
    shapes = joined_shapes(model)
    held = _held_share(model.ep_group).number
    return {
        name: (shapes[name], held * parameter.numel() if FUSED.match(name) else 0)
        for name, parameter in model.named_parameters()
    }


def receive_weights(model: Qwen3Moe, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Fill this rank's share of a model from a complete stream of `named_weights`.

    Raises:
        InputError: A name is unknown, comes twice or never, or a shape differs.
    """
    ep_rank = 0 if model.ep_group is None else model.ep_group.rank()
    mine = {name: parameter.detach() for name, parameter in model.named_parameters()}
    for name, weight in accounted(weights, joined_shapes(model)):
        first = ep_rank * len(mine[name]) if FUSED.match(name) else 0
        mine[name].copy_(weight[first : first + len(mine[name])])


def name_first(names: Sequence[str]) -> str:
    """The first ten."""
    more = f" and {len(names) - NUM_NAMED} more" if len(names) > NUM_NAMED else ""
    return ", ".join(names[:NUM_NAMED]) + more


def refuse_broken(broken: Sequence[str], path: str | Path, dtype: str) -> None:
    """Refuse weights that are not finite on any rank; every rank takes part.

    Args:
        broken: Names of this rank's.
        path: Where they came from.
        dtype: In which they are held.

    Raises:
        InputError: On every rank, with the first ten names.
    """
    names = list(dict.fromkeys(name for of_rank in gather_objects(broken) for name in of_rank))
    require(
        not names,
        f"{len(names)} weights under {path} hold values that are not finite in {dtype}: "
        f"{name_first(names)}; fetch the model again, or take an earlier one",
    )


def empty_model(
    architecture: ArchitectureConfig, dtype: torch.dtype, ep_group: dist.ProcessGroup | None
) -> Qwen3Moe:
    """Allocate this rank's share of a model on its device, uninitialised."""
    return meta_model(architecture, ep_group).to(dtype).to_empty(device=device())


# Spread of the embeddings and gain of the layers that write to the residual stream, found to
# start a two-layer model's copying about a third sooner than a uniform 0.02.
EMBEDDING_STD = 0.1
RESIDUAL_GAIN = 0.4


def random_model(
    architecture: ArchitectureConfig,
    dtype: torch.dtype,
    seed: int,
    ep_group: dist.ProcessGroup | None = None,
) -> Qwen3Moe:
    """Initialise a model at random: matrices N(0, 1 / fan-in); the same on any number of ranks."""
    generator = torch.Generator().manual_seed(seed)
    whole = Qwen3Moe(architecture)
    for name, parameter in whole.named_parameters():
        if parameter.dim() == 1:
            nn.init.ones_(parameter)
        elif "embed_tokens" in name:
            nn.init.normal_(parameter, std=EMBEDDING_STD, generator=generator)
        else:
            gain = RESIDUAL_GAIN if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
            gain = RESIDUAL_GAIN if name.endswith("experts.down_proj") else gain
            std = gain * parameter.shape[-1] ** -0.5
            nn.init.normal_(parameter, std=std, generator=generator)
    model = empty_model(architecture, dtype, ep_group)
    receive_weights(model, named_weights(whole))
    return model
