"""What a run can be resumed from: a directory that appears when it is complete.

    checkpoints/step_000300/
        rank_000.safetensors   what rank 0 updates: masters and moments, and its generators
        index.json             where the pieces of each parameter lie, see `shards`
        state.json             updates made, data cursor, phase of the cascade, the run's config
        manifest.json          size and digest of every file; written last

safetensors and JSON only. A checkpoint resumes on any number of ranks.
"""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from marco_train.checkpoint.shards import (
    INDEX,
    StoredState,
    TrainingState,
    build_index,
    write_shard,
)
from marco_train.config.resumption import MANIFEST, STATE, complete_checkpoints
from marco_train.distributed import barrier, gather_objects, is_main, rank, world_size
from marco_train.errors import InputError
from marco_train.files import digest_of, replace_directory


def save_checkpoint(
    directory: Path,
    step: int,
    training: TrainingState,
    generators: Mapping[str, Tensor],
    state: dict[str, Any],
    keep_last: int,
) -> None:
    """Write a checkpoint of `step` updates; all ranks take part.

    Args:
        directory: Holds the checkpoints of a run.
        step: Updates made.
        training: This rank's.
        generators: This rank's.
        state: The same on every rank; JSON.
        keep_last: Complete checkpoints to keep, this one included.
    """
    partial = begin_checkpoint(directory, step)
    shards = gather_objects(write_shard(partial, rank(), training, generators))
    if is_main():
        publish_checkpoint(directory, step, shards, state, keep_last)
    barrier()


def begin_checkpoint(directory: Path, step: int) -> Path:
    """Make the directory that ranks write into; all ranks take part."""
    partial = partial_path(directory, step)
    if is_main():
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    barrier()
    return partial


def publish_checkpoint(
    directory: Path,
    step: int,
    shards: Sequence[dict[str, Any]],
    state: dict[str, Any],
    keep_last: int,
) -> None:
    """Let a checkpoint appear, once every rank has written its shard; the main rank does.

    Args:
        directory: Holds the checkpoints of a run.
        step: Updates made.
        shards: What `write_shard` says of each rank's.
        state: JSON.
        keep_last: Complete checkpoints to keep, this one included.
    """
    partial = partial_path(directory, step)
    entries = {each["name"]: {k: each[k] for k in ("bytes", "digest")} for each in shards}
    for name, content in ((STATE, state), (INDEX, build_index(shards))):
        (partial / name).write_text(json.dumps(content, indent=2, sort_keys=True))
        entries[name] = _entry(partial / name)
    manifest = {"step": step, "world_size": world_size(), "files": entries}
    (partial / MANIFEST).write_text(json.dumps(manifest, indent=2, sort_keys=True))
    replace_directory(checkpoint_path(directory, step), partial)
    for old in complete_checkpoints(directory)[keep_last:]:
        shutil.rmtree(old)


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
    newer = [p for p in complete_checkpoints(directory) if int(p.name.split("_")[1]) > step]
    if newer:
        number = len(list(directory.parent.glob("checkpoints.old-*")))
        aside = directory.parent / f"checkpoints.old-{number}"
        aside.mkdir()
        for path in newer:
            path.rename(aside / path.name)


def load_checkpoint(path: Path) -> tuple[StoredState, dict[str, Any]]:
    """Open the tensors and read the state, after checking every file; all ranks take part.

    Raises:
        InputError: A file is not what was written, on every rank.
    """
    faults = gather_objects(next(faults_of(path, rank(), world_size()), None))
    fault = next((each for each in faults if each is not None), None)
    if fault is not None:
        raise InputError(f"{fault}; resume from another checkpoint with resume=<path>")
    return StoredState(path), read_state(path)


def faults_of(
    path: Path, number: int = 0, num_shares: int = 1, *, sizes_only: bool = False
) -> Iterator[str]:
    """Say which files of a checkpoint are not what was written, looking at a share of them."""
    files = json.loads((path / MANIFEST).read_text())["files"]
    for name in sorted(files)[number::num_shares]:
        fault = _fault(path / name, files[name], sizes_only)
        if fault is not None:
            yield fault


def read_state(path: Path) -> dict[str, Any]:
    """Read the state of a checkpoint, after checking its size and digest.

    Raises:
        InputError: It is not what was written.
    """
    manifest = json.loads((path / MANIFEST).read_text())
    fault = _fault(path / STATE, manifest["files"][STATE])
    if fault is not None:
        raise InputError(f"{fault}; resume from another checkpoint with resume=<path>")
    return dict(json.loads((path / STATE).read_text()))


def _fault(file: Path, expected: dict[str, Any], sizes_only: bool = False) -> str | None:
    if not file.is_file():
        return f"{file} is missing"
    if sizes_only and file.stat().st_size == expected["bytes"]:
        return None
    found = _entry(file)
    if found == expected:
        return None
    return (
        f"{file} is damaged: {found['bytes']} bytes, digest {found['digest'][:12]}, where "
        f"{expected['bytes']} bytes, digest {expected['digest'][:12]} were written"
    )


def _entry(file: Path) -> dict[str, Any]:
    return {"bytes": file.stat().st_size, "digest": digest_of(file)}
