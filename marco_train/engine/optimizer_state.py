"""The optimizer's state on this rank: saved, put back, and off the device between updates.

masters    its partition of each parameter group, which the optimizer updates
moments    of the masters
gradients  a buffer that only stage 1 in bfloat16 keeps from update to update, zero between them
"""

import threading
import time
from typing import Any

import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from torch import Tensor

from marco_train.checkpoint import KINDS, Piece, StateSource, TrainingState, host_memory
from marco_train.metrics import Metrics
from marco_train.models.qwen3_moe import Qwen3Moe
from marco_train.models.weights import held_ranges


class OptimizerState:
    """What DeepSpeed's optimizer around a fused AdamW holds, and whose elements they are."""

    def __init__(self, optimizer: Any, offload: bool) -> None:
        """Give the masters their moments, and take all of it off the device.

        Args:
            optimizer: DeepSpeed's, before its first update.
            offload: Whether it stays on the device only for an update; else it never leaves.
        """
        self.lock = threading.Lock()
        """Held by an update, and by whoever reads what is here beside training."""
        self._optimizer = optimizer
        self._moments = optimizer.optimizer.state
        # DeepSpeed has a class of its own for bfloat16 weights in stage 1.
        own_class = isinstance(optimizer, BF16_Optimizer)
        self._masters: list[Tensor] = (
            optimizer.fp32_groups_flat_partition
            if own_class
            else optimizer.single_partition_of_fp32_groups
        )
        self._gradients: list[Tensor] = optimizer.fp32_groups_gradients_flat if own_class else []
        for master in self._masters:
            # As AdamW would at the first update, by when the sampler has measured what is free.
            self._moments[master] = {
                "step": torch.zeros((), device=master.device),
                "exp_avg": torch.zeros_like(master, requires_grad=False),
                "exp_avg_sq": torch.zeros_like(master, requires_grad=False),
            }
        self._offload = offload
        self._away = False
        self._copies: dict[str, Tensor] = {}  # on the host, by name
        self._seconds = 0.0
        self.offload()

    def state(self, model: Qwen3Moe) -> TrainingState:
        """Name what this rank holds; its tensors are on the host while they are away."""
        held = self._copies if self._away else self._on_device()
        ranges = held_ranges(model)
        pieces = []
        for name, parameter in model.named_parameters():
            mapping = parameter._hp_mapping  # type: ignore[attr-defined]
            if mapping is None:
                continue  # others update all of it
            shape, first = ranges[name]
            place = mapping.hp_fragment_address
            tensors = {
                kind: held[f"{kind}.{mapping.param_group_index}"].narrow(
                    0, place.start, place.numel
                )
                for kind in KINDS
            }
            dtype = str(parameter.dtype).removeprefix("torch.")
            start = first + mapping.lp_fragment_address.start
            pieces.append(Piece(name, dtype, shape, start, tensors))
        (steps,) = {int(moments["step"]) for moments in self._moments.values()}
        return TrainingState(pieces, steps, self.lock)

    @torch.no_grad()
    def load(self, model: Qwen3Moe, source: StateSource) -> None:
        """Fill masters, moments and weights; all ranks take part."""
        for piece in self.state(model).pieces:
            source.fill(piece)
        self.reload()
        for moments in self._moments.values():
            moments["step"].fill_(source.optimizer_steps)
        self._optimizer.update_lp_params()
        self.offload()

    @torch.no_grad()
    def offload(self) -> Metrics:
        """Copy everything to the host and free its memory, if it may leave.

        The tensors keep their shapes and are not to be read until `reload`.

        Returns:
            The memory that was freed, and the seconds that leaving and the return before it took.
        """
        if not self._offload:
            return {}
        start = time.perf_counter()
        found = self._on_device()
        self._copies = self._copies or _host_copies(found)
        for name, tensor in found.items():
            self._copies[name].copy_(tensor)
        freed = [*found.values(), *self._gradients]
        for tensor in freed:
            # DeepSpeed has views of these tensors, which keep storages alive, but share them.
            tensor.untyped_storage().resize_(0)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # the memory of an engine of vLLM is not torch's
        self._away = True
        seconds = self._seconds + time.perf_counter() - start
        self._seconds = 0.0
        gib = sum(tensor.nbytes for tensor in freed) / 2**30
        return {"time/offload": seconds, "perf/offloaded_gib": gib}

    @torch.no_grad()
    def reload_gradients(self) -> None:
        """Make room for gradients again, before the first backward pass of an update."""
        for gradients in self._gradients if self._away else ():
            gradients.untyped_storage().resize_(gradients.nbytes)
            gradients.zero_()

    @torch.no_grad()
    def reload(self) -> None:
        """Bring masters and moments back for an update, which is when activations are gone."""
        if not self._away:
            return
        start = time.perf_counter()
        for name, tensor in self._on_device().items():
            tensor.untyped_storage().resize_(tensor.nbytes)
            tensor.copy_(self._copies[name])
        self._away = False
        self._seconds = time.perf_counter() - start

    def _on_device(self) -> dict[str, Tensor]:
        found = {}
        for group, master in enumerate(self._masters):
            moments = self._moments[master]
            found[f"master.{group}"] = master.detach()
            for kind in KINDS[1:]:
                found[f"{kind}.{group}"] = moments[kind]
        return found


def _host_copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Memory for copies of float32 tensors."""
    sizes = [tensor.numel() for tensor in tensors.values()]
    parts = torch.split(host_memory(sum(sizes)), sizes)
    return dict(zip(tensors, parts, strict=True))
