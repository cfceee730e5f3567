"""What a run can be resumed from: a directory that appears when it is complete.

    checkpoints/step_000300/
        rank_000.safetensors   what rank 0 updates: masters and moments, and its generators
        index.json             where the pieces of each parameter lie, see `shards`
        state.json             updates made, data cursor, phase of the cascade, the run's config
        manifest.json          size and digest of every file; written last

Beside them may lie `.partial_*`, which is being written, `.trash_*`, which is being deleted, and
`damaged_step_*`, which was set aside. safetensors and JSON only. A checkpoint resumes on any number
of ranks.
"""

import json
import math
import shutil
import sys
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from marco_train.checkpoint.shards import (
    INDEX,
    KINDS,
    Piece,
    StoredState,
    TrainingState,
    build_index,
    write_shard,
)
from marco_train.config.manifest import MANIFEST, STATE, fault_of, read_manifest
from marco_train.config.resumption import complete_checkpoints, step_of
from marco_train.distributed import (
    barrier,
    gather_objects,
    is_main,
    rank,
    sharing_errors,
    world_size,
)
from marco_train.errors import CheckpointError, InputError
from marco_train.files import digest_of, replace_directory, sync_to_disk
from marco_train.tracking import log_line

# A save that takes longer is said to, by rank: a storage that hangs says nothing itself.
SECONDS_UNTIL_SLOW = 120.0


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay when a new one has appeared."""

    keep_last: int
    """Sound ones, the new one included."""
    kept: Collection[int] = ()
    """Updates of others that stay."""
    keep_every: int | None = None
    """Those of a multiple of so many updates stay too."""
    best: Sequence[int] = ()
    """Updates from the best on downwards: the first of which there is a sound one stays."""


def save_checkpoint(
    directory: Path,
    step: int,
    training: TrainingState,
    generators: Mapping[str, Tensor],
    state: dict[str, Any],
    retention: Retention,
) -> None:
    """Write a checkpoint of `step` updates; all ranks take part.

    Args:
        directory: Holds the checkpoints of a run.
        step: Updates made.
        training: This rank's.
        generators: This rank's.
        state: The same on every rank; JSON.
        retention: What becomes of older ones.

    Raises:
        CheckpointError: On all ranks, where one could not write; what was written is removed.
    """
    partial = partial_path(directory, step)
    with removing_what_failed(directory, step), said_if_slow(partial):
        begin_checkpoint(directory, step)
        shard: dict[str, Any] = {}
        with sharing_errors(CheckpointError, OSError):
            shard = write_shard(partial, rank(), training, generators)
        shards = gather_objects(shard)
        with sharing_errors(CheckpointError, OSError):
            if is_main():
                publish_checkpoint(directory, step, shards, state, retention)
    barrier()


@contextmanager
def removing_what_failed(directory: Path, step: int) -> Iterator[None]:
    """Remove what was written of a checkpoint that failed, and say that it was not saved."""
    try:
        yield
    except CheckpointError as error:
        if is_main():
            shutil.rmtree(partial_path(directory, step), ignore_errors=True)
        raise CheckpointError(
            f"the checkpoint of step {step} was not saved ({error}); those before it are intact"
        ) from error


def begin_checkpoint(directory: Path, step: int) -> None:
    """Make the directory that ranks write into; all ranks take part."""
    partial = partial_path(directory, step)
    with sharing_errors(CheckpointError, OSError):
        if is_main():
            shutil.rmtree(partial, ignore_errors=True)
            is_first = not directory.is_dir()
            partial.mkdir(parents=True, exist_ok=True)
            if is_first:
                sync_to_disk(directory.parent)


def publish_checkpoint(
    directory: Path,
    step: int,
    shards: Sequence[dict[str, Any]],
    state: dict[str, Any],
    retention: Retention,
) -> None:
    """Let a checkpoint appear, once every rank has written its shard; the main rank does.

    Args:
        directory: Holds the checkpoints of a run.
        step: Updates made.
        shards: What `write_shard` says of each rank's.
        state: JSON.
        retention: What becomes of older ones.
    """
    partial = partial_path(directory, step)
    entries = {each["name"]: {k: each[k] for k in ("bytes", "digest")} for each in shards}
    for name, content in ((STATE, state), (INDEX, build_index(shards))):
        (partial / name).write_text(json.dumps(content, indent=2, sort_keys=True))
        entries[name] = _entry(partial / name)
    manifest = {"step": step, "world_size": len(shards), "files": entries}
    (partial / MANIFEST).write_text(json.dumps(manifest, indent=2, sort_keys=True))
    path = checkpoint_path(directory, step)
    # One of the same step is there until then.
    trash = _into_trash(path) if path.exists() else None
    replace_directory(path, partial)
    if trash is not None:
        shutil.rmtree(trash, ignore_errors=True)
    _retire(directory, retention)


def _retire(directory: Path, retention: Retention) -> None:
    """Delete older checkpoints; one that is damaged counts for none that is kept.

    What cannot be deleted stays, and is said.
    """
    sound = [path for path in complete_checkpoints(directory) if fault_of(path) is None]
    there = set(map(step_of, sound))
    best = next((step for step in retention.best if step in there), None)
    for path in sound[retention.keep_last :]:
        step, every = step_of(path), retention.keep_every
        if step in (*retention.kept, best) or (every is not None and step % every == 0):
            continue
        try:
            shutil.rmtree(_into_trash(path))
        except OSError as error:
            log_line(f"{path} could not be deleted ({error})")


def _into_trash(path: Path) -> Path:
    """Take a checkpoint's name away at once: it takes time to delete, and may be interrupted."""
    trash = path.with_name(f".trash_{path.name}")
    shutil.rmtree(trash, ignore_errors=True)
    path.rename(trash)
    sync_to_disk(path.parent)
    return trash


def convert_checkpoint(path: Path, directory: Path, num_files: int) -> Path:
    """Write a checkpoint anew as so many ranks would have saved it, in host memory one at a time.

    Args:
        path: Of a sound checkpoint.
        directory: Where the new one appears, under its step.
        num_files: Of masters and moments, of equal size up to one element a parameter.

    Returns:
        Of the new one.

    Raises:
        InputError: There is one already.
        OSError: It cannot be written.
    """
    stored, state = load_checkpoint(path)
    step = int(state["num_updates"])
    made = checkpoint_path(directory, step)
    if made.exists():
        raise InputError(f"there is {made} already: name another directory")
    begin_checkpoint(directory, step)
    shards = []
    for number in range(num_files):
        pieces = []
        for name, shape in stored.shapes.items():
            size = math.prod(shape)
            start, stop = size * number // num_files, size * (number + 1) // num_files
            if start < stop:
                tensors = {kind: torch.empty(stop - start) for kind in KINDS}
                dtype = str(stored.dtype(name)).removeprefix("torch.")
                pieces.append(Piece(name, dtype, shape, start, tensors))
                stored.fill(pieces[-1])
        training = TrainingState(pieces, stored.optimizer_steps)
        partial = partial_path(directory, step)
        shards.append(write_shard(partial, number, training, stored.generators(number)))
    publish_checkpoint(directory, step, shards, state, Retention(keep_last=sys.maxsize))
    return made


def sweep(directory: Path) -> None:
    """Delete what launches that were killed left half written or half deleted, and say so.

    Whoever calls it holds the run's directory.
    """
    for left in sorted([*directory.glob(".partial_*"), *directory.glob(".trash_*")]):
        shutil.rmtree(left, ignore_errors=True)
        log_line(f"removed {left}, which an earlier launch left incomplete")


@contextmanager
def said_if_slow(path: Path) -> Iterator[None]:
    """Say which rank has been writing for long; others wait for it until their time-out."""
    says = (
        f"rank {rank()} has been writing {path} for {SECONDS_UNTIL_SLOW:.0f} s: the storage may "
        "hang. Other ranks wait for it, parallel.timeout_seconds at most"
    )
    timer = threading.Timer(SECONDS_UNTIL_SLOW, log_line, [says])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def partial_path(directory: Path, step: int) -> Path:
    """Where the checkpoint of `step` updates lies until it is complete."""
    return directory / f".partial_{step:06d}"


def checkpoint_path(directory: Path, step: int) -> Path:
    """Where the checkpoint of `step` updates lies."""
    return directory / f"step_{step:06d}"


def set_aside_newer(directory: Path, step: int) -> None:
    """Move complete checkpoints of more than `step` updates out of the way, and keep them.

    This run makes those steps anew, and a later `resume=auto` would choose the old ones.
    """
    newer = [path for path in complete_checkpoints(directory) if step_of(path) > step]
    if newer:
        number = len(list(directory.parent.glob("checkpoints.old-*")))
        aside = directory.parent / f"checkpoints.old-{number}"
        aside.mkdir()
        for path in newer:
            path.rename(aside / path.name)


def set_aside_damaged(path: Path) -> Path:
    """Take a checkpoint out of those that are resumed from, and keep it; gives its new place."""
    number = len(list(path.parent.glob(f"damaged_{path.name}*")))
    aside = path.with_name(f"damaged_{path.name}" + (f"-{number}" if number else ""))
    path.rename(aside)
    sync_to_disk(path.parent)
    return aside


def verify(checkpoint: Path) -> str | None:
    """Digest all files of a checkpoint, shared by all ranks; says what is wrong, on each of them.

    None: it is what was written.
    """
    fault = fault_of(checkpoint)
    if fault is None:
        files = read_manifest(checkpoint)["files"]
        largest_first = sorted(files, key=lambda name: (-files[name]["bytes"], name))
        fault = fault_of(checkpoint, largest_first[rank() :: world_size()])
    return next((each for each in gather_objects(fault) if each is not None), None)


def load_checkpoint(path: Path) -> tuple[StoredState, dict[str, Any]]:
    """Open the tensors and read the state of a checkpoint that `verify` found sound.

    Raises:
        InputError: Its tensors are stored otherwise, or its state is not what was written.
    """
    return StoredState(path), read_state(path)


def read_state(path: Path) -> dict[str, Any]:
    """Read the state of a checkpoint, after checking its size and digest.

    Raises:
        InputError: It is not what was written.
    """
    fault = fault_of(path)
    if fault is not None:
        raise InputError(f"{fault}; resume from another checkpoint with resume=<path>")
    return dict(json.loads((path / STATE).read_text()))


def _entry(file: Path) -> dict[str, Any]:
    sync_to_disk(file)
    return {"bytes": file.stat().st_size, "digest": digest_of(file)}
