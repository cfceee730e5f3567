"""A checkpoint that is copied to the host and written while training goes on.

The next update, which changes what is copied, waits for the copy; what comes before it in a step,
samples, scores and gradients, does not.

Threads that write take part in no collective: whether all have written, and what failed, ranks ask
each other between steps, in the thread that trains. Then the main rank publishes, in a thread too.
"""

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from marco_train.checkpoint.shards import TrainingState, write_shard
from marco_train.checkpoint.snapshot import Snapshot, stream_beside_training
from marco_train.checkpoint.store import (
    Retention,
    begin_checkpoint,
    partial_path,
    publish_checkpoint,
    removing_what_failed,
    said_if_slow,
)
from marco_train.distributed import gather_objects, is_main, rank, sharing_errors
from marco_train.errors import CheckpointError


@dataclass
class Pending:
    """A checkpoint that is being written, and then published."""

    step: int
    state: dict[str, Any]
    retention: Retention
    shard: Future[Any]
    """What `write_shard` says of this rank's."""
    published: Future[Any] | None = None
    """By the main rank, once all shards are written."""


class BackgroundSaves:
    """Saves of a run, one at a time; all ranks take part in each call."""

    def __init__(self, directory: Path) -> None:
        """Take `save_checkpoint`'s directory."""
        self._directory = directory
        self._snapshot: Snapshot | None = None
        self._pending: Pending | None = None

    def start(
        self,
        step: int,
        training: TrainingState,
        generators: Mapping[str, Tensor],
        state: dict[str, Any],
        retention: Retention,
    ) -> None:
        """Begin to copy what is to be saved, and to write it; the last one was published before.

        Raises:
            CheckpointError: On all ranks, where there is no place to write to.
        """
        assert self._pending is None
        partial = partial_path(self._directory, step)
        with removing_what_failed(self._directory, step):
            begin_checkpoint(self._directory, step)
        training.lock.acquire()  # before the next update can

        def write() -> dict[str, Any]:
            try:
                copied = self._copy(training)
            finally:
                training.lock.release()
            with said_if_slow(partial):
                return write_shard(partial, rank(), copied, generators)

        self._pending = Pending(step, state, retention, _beside(write))

    def _copy(self, training: TrainingState) -> TrainingState:
        """Copy into memory that is kept for the next one: its pages need not be made anew."""
        with stream_beside_training():
            if self._snapshot is None:
                self._snapshot = Snapshot(training)
            else:
                self._snapshot.take(training)
        return self._snapshot.state

    def publish(self, wait: bool) -> int | None:
        """Let the checkpoint appear that is being written, once all ranks have written it.

        Args:
            wait: Whether to wait for that. Else a later call sees to what is not done yet.

        Returns:
            The updates of one that appeared.

        Raises:
            CheckpointError: On all ranks, where one could not write; what was written is removed.
        """
        pending = self._pending
        if pending is None:
            return None
        try:
            with removing_what_failed(self._directory, pending.step):
                if pending.published is None and _is_due(pending.shard, wait):
                    pending.published = self._publish(pending)
                if pending.published is None or not _is_due(pending.published, wait):
                    return None
                with sharing_errors(CheckpointError, OSError):
                    pending.published.result()
        except CheckpointError:
            self._pending = None
            raise
        self._pending = None
        return pending.step

    def _publish(self, pending: Pending) -> Future[Any]:
        with sharing_errors(CheckpointError, OSError):
            shard = pending.shard.result()
        shards = gather_objects(shard)
        given = self._directory, pending.step, shards, pending.state, pending.retention
        return _beside(lambda: publish_checkpoint(*given) if is_main() else None)


def _is_due(future: Future[Any], wait: bool) -> bool:
    """Whether to look at what every rank does: to wait for it, or as it is done on all of them."""
    return wait or all(gather_objects(future.done()))


def _beside(work: Callable[[], Any]) -> Future[Any]:
    """Do some work in a thread, for which a process that ends by an error does not wait."""
    done: Future[Any] = Future()

    def do() -> None:
        try:
            done.set_result(work())
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=do, daemon=True).start()
    return done
