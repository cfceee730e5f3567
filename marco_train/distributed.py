"""Facts of this rank, reductions and groups; correct with one process and no launcher."""

import os
import random
from collections.abc import Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore

from marco_train.errors import InputError

T = TypeVar("T")


def start() -> None:
    """Join the process group of torchrun, or form a group of one."""
    if dist.is_initialized():
        return
    os.environ.setdefault("LOCAL_RANK", "0")
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if "WORLD_SIZE" in os.environ:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group(backend)
    else:
        # DeepSpeed reads these even where the group already exists.
        os.environ.update(RANK="0", WORLD_SIZE="1")
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)


def stop() -> None:
    """Leave the process group."""
    _EXPERT_PARALLEL_GROUPS.clear()
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """Position of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process writes and prints."""
    return rank() == 0


def device() -> torch.device:
    """Where this rank computes."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def barrier() -> None:
    """Wait for every rank."""
    if world_size() > 1:
        dist.barrier()


def reduce_sums(values: Sequence[float]) -> list[float]:
    """Sum each value over all ranks, in float64, in one call."""
    if world_size() == 1:
        return list(values)
    total = torch.tensor(values, dtype=torch.float64, device=device())
    dist.all_reduce(total)
    return [float(value) for value in total.tolist()]


def all_reduce_sum(values: Tensor) -> Tensor:
    """Sum a tensor over all ranks, into a new one."""
    total = values.clone()
    if world_size() > 1:
        dist.all_reduce(total)
    return total


def reduce_max(value: int) -> int:
    """Largest value over all ranks."""
    if world_size() == 1:
        return value
    total = torch.tensor(value, dtype=torch.int64, device=device())
    dist.all_reduce(total, op=dist.ReduceOp.MAX)
    return int(total.item())


def gather_objects(value: T) -> list[T]:
    """Collect one picklable value of each rank, in the order of ranks."""
    if world_size() == 1:
        return [value]
    found: list[T] = [value] * world_size()
    dist.all_gather_object(found, value)
    return found


_EXPERT_PARALLEL_GROUPS: dict[int, dist.ProcessGroup] = {}


def expert_parallel_group(size: int) -> dist.ProcessGroup | None:
    """Form groups of `size` neighbouring ranks, once, and return this rank's; None for size 1.

    Raises:
        InputError: The number of ranks is not a multiple of `size`.
    """
    if size == 1:
        return None
    if world_size() % size:
        raise InputError(
            f"parallel.expert_parallel_size is {size}, which does not divide the "
            f"{world_size()} ranks of this launch"
        )
    if size not in _EXPERT_PARALLEL_GROUPS:
        groups = [
            dist.new_group(list(range(first, first + size)))
            for first in range(0, world_size(), size)
        ]
        _EXPERT_PARALLEL_GROUPS[size] = groups[rank() // size]
    return _EXPERT_PARALLEL_GROUPS[size]


def seed_everything(seed: int) -> None:
    """Seed the generators of this process; all ranks alike."""
    random.seed(seed)
    torch.manual_seed(seed)
