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


def _work(
    rank: int,
    num_ranks: int,
    directory: Path,
    pipe: Connection,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(num_ranks))
    store = FileStore(str(directory / "store"), num_ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks)
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
