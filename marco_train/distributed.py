"""Facts of this rank, reductions and groups; correct with one process and no launcher.

Tensors cross the default group: NCCL on GPUs, gloo on CPUs. What ranks agree on, numbers and small
objects of the host, crosses a gloo group of its own: a rank may wait there while another asks
servers or writes files, without a GPU that waits with it.
"""

import fcntl
import os
import random
import resource
import socket
import struct
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore, Store

from marco_train.config.parallel import TIMEOUT_SECONDS
from marco_train.encoding import from_bytes, to_bytes
from marco_train.errors import InputError, RunError, require

T = TypeVar("T")

STATUS = Path("/proc/self/status")  # of this process, where the system is Linux

# Read once, when a process makes its first matrix product: for torch's deterministic algorithms a
# cuBLAS workspace of a fixed size, and the two values with which no product is split over its inner
# dimension, which depends on the number of rows. vLLM sets the same, too late in the trainer's
# process.
# Source: vLLM 0.32.0, model_executor/determinism/batch_invariant.py, enable_batch_invariant_mode.
UNSPLIT_PRODUCTS = {"CUBLAS_WORKSPACE_CONFIG": ":16:8", "CUBLASLT_WORKSPACE_SIZE": "1"}
# Read at vLLM's import. Not set on a CPU: there vLLM would put kernels for GPUs in place of this
# process's softmax, mean and batched product.
BATCH_INVARIANCE = {"VLLM_BATCH_INVARIANT": "1"}

# Of what ranks tell each other in one exchange, and of its size in front.
GATHERED_AT_ONCE = 2**14
LENGTH_BYTES = 8

# The request of Linux for an interface's address; see netdevice(7).
SIOCGIFADDR = 0x8915


class Groups:
    """Groups beside the default one."""

    agreements: dist.ProcessGroup | None = None
    """Of all ranks over gloo, after `start`; None is the default group."""
    expert_parallel: ClassVar[dict[int, dist.ProcessGroup]] = {}
    """This rank's, by size."""
    timeout: timedelta | None = None
    """Of each; None is torch's."""


class Progress:
    """How far this rank has come, for who watches it."""

    num_collectives: ClassVar[int] = 0
    """Of this module, that have ended."""


def start(timeout_seconds: float = TIMEOUT_SECONDS, *, deterministic: bool = False) -> None:
    """Join the process group of torchrun, or form a group of one.

    Args:
        timeout_seconds: Longest that a rank waits for another one, in any group.
        deterministic: Whether torch, and vLLM on GPUs, are to repeat their numbers.

    Raises:
        InputError: This node has fewer GPUs than ranks.
    """
    if deterministic:
        compute_deterministically()
    if dist.is_initialized():
        return
    os.environ.setdefault("LOCAL_RANK", "0")
    on_gpus = torch.cuda.is_available()
    if on_gpus:
        check_gpus(int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count())
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    meeting: dict[str, Any] = {}
    if "WORLD_SIZE" in os.environ:
        name_interface()
    else:
        # DeepSpeed reads these even where the group already exists.
        os.environ.update(RANK="0", WORLD_SIZE="1")
        meeting = {"store": HashStore(), "rank": 0, "world_size": 1}
    timeout = Groups.timeout = timedelta(seconds=timeout_seconds)
    dist.init_process_group(
        "nccl" if on_gpus else "gloo",
        timeout=timeout,
        device_id=device() if on_gpus else None,
        **meeting,
    )
    Groups.agreements = dist.new_group(backend="gloo", timeout=timeout)


def limit_waits() -> None:
    """Give the groups that a library has formed the timeout of `start`, of which it does not know.

    Left to itself torch lets such a group wait for half an hour over gloo, 10 minutes over NCCL.
    """
    if Groups.timeout is not None:
        for group in dist.distributed_c10d._world.pg_map:
            dist.distributed_c10d._set_pg_timeout(Groups.timeout, group)


def compute_deterministically() -> None:
    """Have torch and vLLM repeat their numbers; comes before the first product and vLLM's import.

    An operation that has no deterministic form goes on, with a warning that names it.
    """
    os.environ.update(UNSPLIT_PRODUCTS)
    if torch.cuda.is_available():
        os.environ.update(BATCH_INVARIANCE)
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Would fill all new memory with NaN, for programs that read what nobody wrote.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def name_interface() -> None:
    """With several nodes, have gloo use the interface that reaches the first of them.

    Left to itself gloo takes the address that this host's name stands for, which on many machines
    is 127.0.0.1, where no other node listens. GLOO_SOCKET_IFNAME overrules this.
    """
    environment = os.environ
    if environment["WORLD_SIZE"] != environment.get("LOCAL_WORLD_SIZE", "1"):
        found = interface_to(environment["MASTER_ADDR"])
        if found is not None:
            environment.setdefault("GLOO_SOCKET_IFNAME", found)


def address_towards(host: str | None) -> str:
    """This machine's address on the way to an IPv4 host.

    Raises:
        OSError: There is no way.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host or "localhost", 9))  # sends nothing
        return str(probe.getsockname()[0])


def interface_to(host: str) -> str | None:
    """Name of the network interface from which an IPv4 host is reached; None if there is none."""
    try:
        own = address_towards(host)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            for _, name in socket.if_nameindex():
                asked = struct.pack("256s", name.encode())
                with suppress(OSError):  # one without an address
                    answer = fcntl.ioctl(probe, SIOCGIFADDR, asked)
                    if socket.inet_ntoa(answer[20:24]) == own:
                        return name
    except OSError:  # gloo is left to itself
        pass
    return None


def check_gpus(num_ranks: int, num_gpus: int) -> None:
    """Refuse more ranks on this node than it has GPUs.

    Raises:
        InputError: Gives both numbers.
    """
    require(
        num_ranks <= num_gpus,
        f"{num_ranks} ranks were launched on a node where {num_gpus} GPUs are visible: launch "
        f"NPROC={num_gpus}, or see what CUDA_VISIBLE_DEVICES hides",
    )


def stop() -> None:
    """Leave the process groups."""
    Groups.agreements = None
    Groups.expert_parallel.clear()
    if dist.is_initialized():
        dist.destroy_process_group()


def shared_store() -> Store | None:
    """A connection of its own to what all ranks may write down for each other; None for one rank.

    A thread may use it while the main one waits.
    """
    if world_size() == 1:
        return None
    default: Any = dist.distributed_c10d._get_default_store()
    cloned: Store = default.clone()  # of which torch's types do not tell
    return cloned


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


def peak_bytes() -> int:
    """Most memory that this rank has held since its start: on its GPU, or in all without one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if STATUS.is_file():
        (peak_kib,) = (
            line.split()[1] for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:")
        )
        return int(peak_kib) * 1024
    # On Linux it would be at least what the parent held when it began this process.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def barrier() -> None:
    """Wait for every rank."""
    if world_size() > 1:
        dist.barrier(Groups.agreements)
    Progress.num_collectives += 1


def reduce_sums(values: Sequence[float]) -> list[float]:
    """Sum each value over all ranks, in float64, in one call."""
    if world_size() == 1:
        return list(values)
    total = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(total, group=Groups.agreements)
    Progress.num_collectives += 1
    return [float(value) for value in total.tolist()]


def all_reduce_sum(values: Tensor) -> Tensor:
    """Sum a tensor over all ranks, into a new one."""
    total = values.clone()
    if world_size() > 1:
        dist.all_reduce(total)
    Progress.num_collectives += 1
    return total


def reduce_max(value: int) -> int:
    """Largest value over all ranks."""
    return reduce_maxima([value])[0]


def reduce_maxima(values: Sequence[int]) -> list[int]:
    """Largest of each value over all ranks, in one call."""
    if world_size() == 1:
        return list(values)
    total = torch.tensor(values, dtype=torch.int64)
    dist.all_reduce(total, op=dist.ReduceOp.MAX, group=Groups.agreements)
    Progress.num_collectives += 1
    return [int(value) for value in total.tolist()]


def gather_objects(value: T) -> list[T]:
    """Collect one value of each rank, in the order of ranks.

    It crosses as JSON, so nothing that a rank sends is run by another; see `encoding`. In one
    exchange where no rank's is larger than `GATHERED_AT_ONCE` bytes; else a second one takes what
    is over.

    Raises:
        TypeError: It is no data.
    """
    if world_size() == 1:
        return [value]
    mine = to_bytes(value)
    length = len(mine).to_bytes(LENGTH_BYTES, "little")
    first = _gather_bytes(length + mine[:GATHERED_AT_ONCE], LENGTH_BYTES + GATHERED_AT_ONCE)
    lengths = [int.from_bytes(part[:LENGTH_BYTES], "little") for part in first]
    longest = max(lengths)
    rest = [b""] * world_size()
    if longest > GATHERED_AT_ONCE:
        rest = _gather_bytes(mine[GATHERED_AT_ONCE:], longest - GATHERED_AT_ONCE)
    whole = (a[LENGTH_BYTES:] + b for a, b in zip(first, rest, strict=True))
    found = [from_bytes(part[:n]) for part, n in zip(whole, lengths, strict=True)]
    Progress.num_collectives += 1
    return found


def exchange_objects(outgoing: Mapping[int, T], senders: Sequence[int]) -> dict[int, T]:
    """Send a value to each of some ranks, and take one of each of some; as JSON, see `encoding`.

    Args:
        outgoing: By the rank that takes it.
        senders: Ranks that send one here.

    Returns:
        What came, by the rank that sent it.

    Raises:
        TypeError: Something is no data.
    """
    group = Groups.agreements
    sent = {there: _as_bytes(to_bytes(value)) for there, value in outgoing.items()}
    lengths = {here: torch.zeros(1, dtype=torch.int64) for here in senders}
    on_their_way = [
        dist.isend(torch.tensor([len(content)]), there, group=group)
        for there, content in sent.items()
    ]
    for here, length in lengths.items():
        dist.recv(length, here, group=group)
    on_their_way += [dist.isend(content, there, group=group) for there, content in sent.items()]
    found = {here: torch.empty(int(length), dtype=torch.uint8) for here, length in lengths.items()}
    for here, content in found.items():
        dist.recv(content, here, group=group)
    for message in on_their_way:
        assert message is not None  # of a rank that is none of the group
        message.wait()
    Progress.num_collectives += 1
    return {here: from_bytes(content.numpy().tobytes()) for here, content in found.items()}


def _gather_bytes(mine: bytes, size: int) -> list[bytes]:
    """Collect bytes of each rank, filled up to a size that is the same on all."""
    sent = _as_bytes(mine.ljust(size, b"\0"))
    found = [torch.empty_like(sent) for _ in range(world_size())]
    dist.all_gather(found, sent, group=Groups.agreements)
    return [part.numpy().tobytes() for part in found]


def _as_bytes(content: bytes) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


@contextmanager
def sharing_errors(raised: type[RunError], *caught: type[Exception]) -> Iterator[None]:
    """Raise on every rank what went wrong on one: the others would wait for it.

    All ranks enter and leave the block; inside, none waits for another.

    Args:
        raised: By all of them, with what the first rank that failed has to say.
        *caught: What may go wrong.
    """
    said = None
    try:
        yield
    except caught as error:
        said = f"rank {rank()}: {error}" if world_size() > 1 else str(error)
    for of_rank in gather_objects(said):
        if of_rank is not None:
            raise raised(of_rank)


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
    if size not in Groups.expert_parallel:
        groups = [
            dist.new_group(list(range(first, first + size)), timeout=Groups.timeout)
            for first in range(0, world_size(), size)
        ]
        Groups.expert_parallel[size] = groups[rank() // size]
    return Groups.expert_parallel[size]


def seed_everything(seed: int) -> None:
    """Seed the generators of this process; all ranks alike."""
    random.seed(seed)
    torch.manual_seed(seed)
