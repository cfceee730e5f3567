"""Weights from this process to the workers of a server, by vLLM's weight transfer over NCCL.

    this process                          server
    join a group, as its first rank  <->  /init_weight_transfer_engine
                                          /start_weight_update
    broadcast each weight             ->  /update_weights, told of names, types and shapes
                                          /finish_weight_update

Each server has a group of its own: one that is lost does not hold up the others. Written after vLLM
0.32.0: entrypoints/rl/online/api_router.py for the routes; distributed/weight_transfer/
nccl_common.py, worker_init_process_group, for how workers meet this process, and nccl_engine.py,
NCCLWeightTransferEngine.receive_weights without `packed`, for what they receive. Not run over NCCL.
"""

import asyncio
import socket
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from threading import Thread
from typing import Protocol, TypeVar
from urllib.parse import urlsplit

import torch
from torch import Tensor

from marco_train.distributed import address_towards, device
from marco_train.inference.pool import Server, ServerPool

T = TypeVar("T")

# In which this process and the workers of a server that is up have to meet.
OPEN_SECONDS = 120.0


class Communicator(Protocol):
    """A group of this process, rank 0, and the workers of one server."""

    def broadcast(self, tensor: Tensor, src: int) -> object:
        """Give all others the tensor of rank `src`."""

    def destroy(self) -> None:
        """Leave the group, and whatever is under way in it."""


Join = Callable[[socket.socket, int], Communicator]
"""Meets so many workers, who come to a socket that listens, and makes a group with them."""


def join_over_nccl(listening: socket.socket, num_workers: int) -> Communicator:
    """Make a group over NCCL.

    Raises:
        RuntimeError: NCCL is not there, or the workers did not come.
    """
    from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator
    from vllm.distributed.utils import StatelessProcessGroup
    from vllm.utils.nccl import unpinned_nccl_env

    host, port = listening.getsockname()
    group = StatelessProcessGroup.create(
        host,
        port,
        rank=0,
        world_size=1 + num_workers,
        store_timeout=int(OPEN_SECONDS),
        listen_socket=listening,
    )
    with unpinned_nccl_env():
        communicator: PyNcclCommunicator = PyNcclCommunicator(group, device())
    if not communicator.available:
        raise RuntimeError("there is no NCCL library")
    return communicator  # type: ignore[no-any-return]


class Transfer:
    """The way of weights to one server."""

    def __init__(self, pool: ServerPool, server: Server, communicator: Communicator) -> None:
        self._ask = partial(pool.ask, server)
        self._communicator = communicator
        self.is_open = True

    @classmethod
    async def open(cls, pool: ServerPool, server: Server, join: Join) -> "Transfer":
        """Meet the workers of a server.

        Raises:
            InputError, TransientError, OSError, RuntimeError: They cannot be met.
            TimeoutError: They did not come in `OPEN_SECONDS`.
        """
        ask = partial(pool.ask, server)
        num_workers = int((await ask("/get_world_size"))["world_size"])
        await ask("/shutdown_weight_transfer_engine", {})  # what a former run may have left there
        listening = socket.create_server((address_towards(urlsplit(server.url).hostname), 0))
        host, port = listening.getsockname()
        meeting = {"master_address": host, "master_port": port, "packed": False}
        given = meeting | {"rank_offset": 1, "world_size": 1 + num_workers}
        async with asyncio.timeout(OPEN_SECONDS):
            communicator, _ = await asyncio.gather(
                _in_thread(partial(join, listening, num_workers)),
                ask("/init_weight_transfer_engine", {"init_info": given}),
            )
        return cls(pool, server, communicator)

    async def receive(self, shapes: Mapping[str, Sequence[int]], dtype: torch.dtype) -> None:
        """Have the server take weights of these names and shapes, in their order, as they are sent.

        Where it cannot, the transfer is closed, so that nobody waits for it.

        Raises:
            InputError, TransientError: It has a part of them.
        """
        wanted = {
            "names": list(shapes),
            "shapes": [list(shape) for shape in shapes.values()],
            "dtype_names": [str(dtype).removeprefix("torch.")] * len(shapes),
        }
        try:
            await self._ask("/start_weight_update", {})
            await self._ask("/update_weights", {"update_info": wanted})
            await self._ask("/finish_weight_update", {})
        except BaseException:
            self.close()
            raise

    def send(self, weight: Tensor) -> None:
        """Send the next weight; nothing where the transfer was closed."""
        if not self.is_open:
            return
        try:
            self._communicator.broadcast(weight.contiguous(), 0)
        except RuntimeError:  # the server left; `receive` tells
            self.close()

    def close(self) -> None:
        """Leave the group, also in the middle of a weight."""
        if self.is_open:
            self.is_open = False
            self._communicator.destroy()


async def _in_thread(function: Callable[[], T]) -> T:
    """Call a function that may never return, in a thread that then holds up nobody."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def finish(value: T | None, error: Exception | None) -> None:
        if future.done():  # nobody waits any more
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(value)  # type: ignore[arg-type]

    def work() -> None:
        value: T | None = None
        error: Exception | None = None
        try:
            value = function()
        except (OSError, RuntimeError, ValueError) as caught:
            error = caught
        if not loop.is_closed():
            loop.call_soon_threadsafe(finish, value, error)

    Thread(target=work, daemon=True, name="meets a server's workers").start()
    return await future
