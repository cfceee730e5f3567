"""vLLM's weight transfer as servers have it, with a socket in place of NCCL."""

import socket
from typing import Any

import torch
from torch import Tensor

from marco_train.models.weights import random_model, receive_weights
from tests.helpers.fake_sampler import FakeSampler
from tests.helpers.models import architecture

SECONDS_TO_MEET = 10.0
HEAD, EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"


class Wire:
    """A group of two: rank 0 sends, rank 1 receives."""

    def __init__(self, connection: socket.socket, rank: int) -> None:
        self._connection, self._rank = connection, rank

    def broadcast(self, tensor: Tensor, src: int) -> None:
        """As NCCL's, but that it waits."""
        assert src == 0 and tensor.is_contiguous()
        content = memoryview(tensor.detach().view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        try:
            if self._rank == src:
                self._connection.sendall(content)
            while self._rank != src and content:
                count = self._connection.recv_into(content)
                if count == 0:
                    raise RuntimeError("the other side left")
                content = content[count:]
        except OSError as error:
            raise RuntimeError(f"NCCL error: {error}") from error

    def destroy(self) -> None:
        """Leave."""
        self._connection.close()


def join_by_wire(listening: socket.socket, num_workers: int) -> Wire:
    """Meet one worker, in the place of `join_over_nccl`."""
    assert num_workers == 1
    with listening:
        listening.settimeout(SECONDS_TO_MEET)
        connection, _ = listening.accept()
    connection.settimeout(None)
    return Wire(connection, 0)


def meet_by_wire(address: str, port: int) -> Wire:
    """The worker's side of it."""
    return Wire(socket.create_connection((address, port)), 1)


class TransferSampler(FakeSampler):
    """Takes weights by transfer too, as one worker of vLLM 0.32.0 does."""

    def __init__(self) -> None:
        self.is_configured = True  # by --weight-transfer-config
        self.group: Wire | None = None
        self.is_active = False
        self.num_taken = 0
        self.leave_after: int | None = None  # weights, of the next update
        super().__init__()

    def begin_anew(self) -> None:
        """Be a new process."""
        super().begin_anew()
        self._leave()
        self.is_active = False

    def _leave(self) -> None:
        if self.group is not None:
            self.group.destroy()
            self.group = None

    def tell(self, path: str) -> dict[str, Any]:
        """What the server says of itself."""
        return {"world_size": 1} if path == "/get_world_size" else super().tell(path)

    def respond(self, path: str, body: dict[str, Any], fault: str) -> tuple[int, Any]:
        """Status and content of an answer."""
        match path:
            case "/shutdown_weight_transfer_engine":
                self._leave()
            case "/init_weight_transfer_engine":
                return self._meet(**body["init_info"])
            case "/start_weight_update":
                if self.is_active:
                    return 500, {"error": "already active"}
                self.is_active = True
            case "/update_weights":
                return self._take(**body["update_info"])
            case "/finish_weight_update":
                assert self.is_active
                self.is_active = False
            case "/collective_rpc" if body["method"] == "note_transfer":
                self.loads.append(body["kwargs"]["version"])
                return 200, {"results": [None]}
            case _:
                return super().respond(path, body, fault)
        return 200, {}

    def _meet(
        self, master_address: str, master_port: int, packed: bool, rank_offset: int, world_size: int
    ) -> tuple[int, Any]:
        if not self.is_configured:
            return 500, {"error": "Weight transfer not configured."}
        assert (packed, rank_offset, world_size) == (False, 1, 2)
        self.group = meet_by_wire(master_address, master_port)
        return 200, {}

    def _take(
        self, names: list[str], shapes: list[list[int]], dtype_names: list[str]
    ) -> tuple[int, Any]:
        assert self.is_active
        if self.group is None:
            self.is_active = False
            return 500, {"error": "NCCL weight transfer not initialized."}
        found: dict[str, Tensor] = {}
        for name, shape, dtype in zip(names, shapes, dtype_names, strict=True):
            if len(found) == self.leave_after:
                self.leave_after = None
                self.begin_anew()
                return 500, {"error": "EngineCore encountered an issue."}
            weight = torch.empty(shape, dtype=getattr(torch, dtype))
            try:
                self.group.broadcast(weight, 0)
            except RuntimeError as error:
                self.is_active = False
                return 500, {"error": str(error)}
            found[name] = weight
        assert torch.equal(found[HEAD], found[EMBEDDINGS])
        if not self.deaf:
            model = random_model(architecture(), torch.float32, seed=0)
            receive_weights(model, ((n, w) for n, w in found.items() if n != HEAD))
            self.spoil(model)
            self._shown = model
        self.num_taken += 1
        return 200, {}
