"""A training state in the host's memory, apart from the optimizer that goes on."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from marco_train.checkpoint.shards import Piece, TrainingState
from marco_train.distributed import device


class Snapshot:
    """A copy of a rank's training state, in memory that is used again by the next one."""

    def __init__(self, state: TrainingState) -> None:
        """Copy a state."""
        self._sizes = [t.numel() for piece in state.pieces for t in piece.tensors.values()]
        self._parts = torch.split(host_memory(sum(self._sizes)), self._sizes)
        self.take(state)

    @torch.no_grad()
    def take(self, state: TrainingState) -> None:
        """Copy another state of the same pieces over this one."""
        parts = iter(self._parts)
        pieces = []
        for piece in state.pieces:
            copies = {
                kind: next(parts).copy_(tensor, non_blocking=True)
                for kind, tensor in piece.tensors.items()
            }
            pieces.append(replace(piece, tensors=copies))
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()
        self.state = TrainingState(pieces, state.optimizer_steps)
        self._by_parameter = {piece.parameter: piece for piece in pieces}

    @property
    def optimizer_steps(self) -> int:
        """Updates that made the moments."""
        return self.state.optimizer_steps

    @torch.no_grad()
    def fill(self, piece: Piece) -> None:
        """Copy back into the tensors of a piece that was copied."""
        copied = self._by_parameter[piece.parameter]
        assert (copied.start, copied.stop) == (piece.start, piece.stop), piece.parameter
        for kind, target in piece.tensors.items():
            target.copy_(copied.tensors[kind])


@contextmanager
def stream_beside_training() -> Iterator[None]:
    """Let a thread's copies wait for what this rank's GPU was asked for before, and for no more."""
    if not torch.cuda.is_available():
        yield
        return
    stream = torch.cuda.Stream(device())  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.default_stream(device()))
    with torch.cuda.stream(stream):  # of this rank's GPU: a new thread begins on the first one
        yield


def host_memory(num_elements: int) -> Tensor:
    """Float32 memory of the host in one piece, [n]; pinned where there is a GPU."""
    buffer = torch.empty(num_elements, dtype=torch.float32)
    if torch.cuda.is_available():
        # torch's own pinned memory is rounded up to a power of two, to twice as much at worst.
        runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        torch.cuda.check_error(runtime.cudaHostRegister(buffer.data_ptr(), buffer.nbytes, 0))
    return buffer
