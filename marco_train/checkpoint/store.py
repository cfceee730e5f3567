"""What a run can be resumed from: a directory that appears when it is complete.

    checkpoints/step_000300/
        rank_000.safetensors   this rank's weights, masters, moments and generators
        state.json             updates made, data cursor, phase of the cascade, the run's config
        manifest.json          size and SHA-256 of every file; written last

Beside them may lie `.partial_*`, which is being written, `.trash_*`, which is being deleted, and
`damaged_step_*`, which was set aside. safetensors and JSON only. A checkpoint resumes on as many
ranks as saved it.
"""

import json
import shutil
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from marco_train.config.manifest import MANIFEST, STATE, digest_of, fault_of, read_manifest
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
from marco_train.files import replace_directory, sync_to_disk
from marco_train.tracking import log_line

# A save that takes longer is said to, by rank: a storage that hangs says nothing itself.
SECONDS_UNTIL_SLOW = 120.0


def save_checkpoint(
    directory: Path,
    step: int,
    tensors: dict[str, Tensor],
    state: dict[str, Any],
    keep_last: int,
    kept: Collection[int] = (),
    keep_every: int | None = None,
) -> None:
    """Write a checkpoint of `step` updates; all ranks take part.

    Args:
        directory: Holds the checkpoints of a run.
        step: Updates made.
        tensors: This rank's.
        state: The same on every rank; JSON.
        keep_last: Sound checkpoints to keep, this one included.
        kept: Updates of others to keep.
        keep_every: Those of a multiple of so many updates are kept too.

    Raises:
        CheckpointError: On all ranks, where one could not write; what was written is removed.
    """
    partial = directory / f".partial_{step:06d}"
    try:
        with said_if_slow(partial):
            _write(partial, step, tensors, state)
            with sharing_errors(CheckpointError, OSError):
                if is_main():
                    _publish(checkpoint_path(directory, step), partial)
    except CheckpointError as error:
        if is_main():
            shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(
            f"the checkpoint of step {step} was not saved ({error}); those before it are intact"
        ) from error
    if is_main():
        _retire(directory, keep_last, kept, keep_every)
    barrier()


def _write(partial: Path, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    with sharing_errors(CheckpointError, OSError):
        if is_main():
            shutil.rmtree(partial, ignore_errors=True)
            is_first = not partial.parent.is_dir()
            partial.mkdir(parents=True, exist_ok=True)
            if is_first:
                sync_to_disk(partial.parent.parent)
    shard = partial / f"rank_{rank():03d}.safetensors"
    entry: dict[str, Any] = {}
    with sharing_errors(CheckpointError, OSError, SafetensorError):
        save_file(
            {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()},
            shard,
        )
        entry = _entry(shard)
    entries = dict(gather_objects((shard.name, entry)))
    with sharing_errors(CheckpointError, OSError):
        if is_main():
            state_file = partial / STATE
            state_file.write_text(json.dumps(state, indent=2, sort_keys=True))
            entries[state_file.name] = _entry(state_file)
            manifest = {"step": step, "world_size": world_size(), "files": entries}
            (partial / MANIFEST).write_text(json.dumps(manifest, indent=2, sort_keys=True))


def _publish(path: Path, partial: Path) -> None:
    """Let a complete directory appear; one of the same step is there until then."""
    trash = _into_trash(path) if path.exists() else None
    replace_directory(path, partial)
    if trash is not None:
        shutil.rmtree(trash, ignore_errors=True)


def _retire(directory: Path, keep_last: int, kept: Collection[int], keep_every: int | None) -> None:
    """Delete older checkpoints; one that is damaged counts for none that is kept.

    What cannot be deleted stays, and is said.
    """
    sound = [path for path in complete_checkpoints(directory) if fault_of(path) is None]
    for path in sound[keep_last:]:
        step = step_of(path)
        if step in kept or (keep_every is not None and step % keep_every == 0):
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


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read this rank's tensors and the state of a checkpoint that `verify` found sound.

    Raises:
        InputError: Another number of ranks saved it, or its state is not what was written.
    """
    manifest = read_manifest(path)
    if manifest["world_size"] != world_size():
        raise InputError(
            f"{path} was saved by {manifest['world_size']} ranks and this launch has "
            f"{world_size()}; launch with --nproc_per_node={manifest['world_size']}"
        )
    return load_file(path / f"rank_{rank():03d}.safetensors"), read_state(path)


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
    return {"bytes": file.stat().st_size, "sha256": digest_of(file)}
