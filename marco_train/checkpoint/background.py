"""A checkpoint that is written while training goes on; training stops for a copy to the host only.

The thread that writes takes part in no collective: what ranks have to agree on, that all have
written and what failed, they ask each other between steps, in the thread that trains.
"""

import shutil
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from marco_train.checkpoint.shards import TrainingState, write_shard
from marco_train.checkpoint.snapshot import Snapshot
from marco_train.checkpoint.store import begin_checkpoint, partial_path, publish_checkpoint
from marco_train.distributed import gather_objects, is_main, rank, sharing_errors
from marco_train.errors import CheckpointError


@dataclass(frozen=True)
class Pending:
    """A checkpoint that this rank writes its shard of."""

    step: int
    state: dict[str, Any]
    shard: Future[dict[str, Any]]


class BackgroundSaves:
    """Saves of a run, one at a time; all ranks take part in each call."""

    def __init__(self, directory: Path, keep_last: int) -> None:
        """Take `save_checkpoint`'s directory and retention."""
        self._directory = directory
        self._keep_last = keep_last
        self._snapshot: Snapshot | None = None
        self._pending: Pending | None = None

    def start(
        self,
        step: int,
        training: TrainingState,
        generators: Mapping[str, Tensor],
        state: dict[str, Any],
    ) -> None:
        """Copy what is to be saved, and begin to write it; the last one was published before."""
        assert self._pending is None
        partial = begin_checkpoint(self._directory, step)
        if self._snapshot is None:
            self._snapshot = Snapshot(training)
        else:
            self._snapshot.take(training)
        shard: Future[dict[str, Any]] = Future()
        given = partial, rank(), self._snapshot.state, generators
        # A daemon: a process that ends by an error does not wait for its disk.
        threading.Thread(target=_write, args=(shard, *given), daemon=True).start()
        self._pending = Pending(step, state, shard)

    def publish(self, wait: bool) -> int | None:
        """Let the checkpoint appear that is being written, once all ranks have written it.

        Args:
            wait: Whether to wait for that. Else it is left for a later call.

        Returns:
            The updates of one that appeared.

        Raises:
            CheckpointError: On all ranks, where one could not write; what was written is removed.
        """
        pending = self._pending
        if pending is None or not (wait or all(gather_objects(pending.shard.done()))):
            return None
        self._pending = None
        try:
            with sharing_errors(CheckpointError, OSError):
                shard = pending.shard.result()
        except CheckpointError as error:
            if is_main():
                shutil.rmtree(partial_path(self._directory, pending.step), ignore_errors=True)
            raise CheckpointError(
                f"the checkpoint of step {pending.step} was not saved ({error}); those before it "
                "are intact"
            ) from error
        publish_checkpoint(self._directory, pending.step, shard, pending.state, self._keep_last)
        return pending.step


def _write(shard: Future[dict[str, Any]], *given: Any) -> None:
    try:
        shard.set_result(write_shard(*given))
    except BaseException as error:
        shard.set_exception(error)
