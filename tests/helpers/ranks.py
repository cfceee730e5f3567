"""Run a function on several ranks over gloo, in forked processes."""

import multiprocessing
import os
import pickle
import tempfile
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import FileStore  # torch exports it without a type

SECONDS_TO_MEET = 20


def run_on_ranks(num_ranks: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Call `function(*args)` on every rank and return what each gave.

    Raises:
        AssertionError: A rank failed; holds its traceback.
    """
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as directory:
        children, pipes = [], []
        for rank in range(num_ranks):
            here, there = context.Pipe()
            child = context.Process(
                target=_work, args=(rank, num_ranks, Path(directory), there, function, args)
            )
            child.start()
            there.close()
            children.append(child)
            pipes.append(here)
        outcomes = [_receive(pipe) for pipe in pipes]
        for pipe, (ok, _) in zip(pipes, outcomes, strict=True):
            if ok:
                with suppress(OSError):  # it has waited long enough, and left
                    pipe.send_bytes(b"all of you may leave")
        failures = [text for ok, text in outcomes if not ok]
        for child in children:
            if failures:
                child.terminate()
            child.join()
    assert not failures, "\n".join(failures)
    return [value for _, value in outcomes]


def _receive(pipe: Connection) -> tuple[bool, Any]:
    try:
        ok, value = pickle.loads(pipe.recv_bytes())
        return bool(ok), value
    except (EOFError, ConnectionResetError):
        return False, "a rank died without a word"


class Rank:
    """A rank of its own in a forked process, which keeps what it makes from call to call.

    For what is dear to make, such as an engine of vLLM: a function that makes it is cached there.
    """

    def __init__(self) -> None:
        context = multiprocessing.get_context("fork")
        self._directory = tempfile.TemporaryDirectory()
        self._pipe, there = context.Pipe()
        self._process = context.Process(target=_serve, args=(Path(self._directory.name), there))
        self._process.start()
        there.close()

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call a module's function there and return what it gave.

        Raises:
            AssertionError: It failed; holds its traceback.
        """
        self._pipe.send_bytes(pickle.dumps((function, args)))
        ok, value = _receive(self._pipe)
        assert ok, value
        return value

    def close(self) -> None:
        """End the process."""
        with suppress(OSError):  # it died with the last call
            self._pipe.send_bytes(b"")
        self._process.join()
        self._directory.cleanup()


def _serve(directory: Path, pipe: Connection) -> None:
    _join(0, 1, directory)
    while asked := pipe.recv_bytes():
        function, args = pickle.loads(asked)
        try:
            outcome = (True, function(*args))
        except BaseException:
            outcome = (False, traceback.format_exc())
        pipe.send_bytes(pickle.dumps(outcome))  # as below
    os._exit(0)


def _join(rank: int, num_ranks: int, directory: Path) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(num_ranks))
    store = FileStore(str(directory / "store"), num_ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks)


def _work(
    rank: int,
    num_ranks: int,
    directory: Path,
    pipe: Connection,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    _join(rank, num_ranks, directory)
    try:
        outcome = (True, function(*args))
    except BaseException:
        outcome = (False, f"rank {rank}:\n{traceback.format_exc()}")
    pipe.send_bytes(pickle.dumps(outcome))  # not send: it would share tensors, and we leave
    if outcome[0]:
        pipe.poll(SECONDS_TO_MEET)  # others may still be connecting to this rank
    pipe.close()
    # Leave without running the parent's exit handlers.
    os._exit(0 if outcome[0] else 1)
