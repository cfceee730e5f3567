"""What a run can be resumed from: a directory that appears when it is complete.

    checkpoints/step_000300/
        rank_000.safetensors   this rank's weights, masters, moments and generators
        state.json             updates made, data cursor, phase of the cascade, the run's config
        manifest.json          size and SHA-256 of every file; written last

safetensors and JSON only. A checkpoint resumes on as many ranks as saved it.
"""

import json
import shutil
from hashlib import file_digest
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from marco_train.config.resumption import MANIFEST, STATE, complete_checkpoints
from marco_train.distributed import barrier, gather_objects, is_main, rank, world_size
from marco_train.errors import InputError
from marco_train.files import replace_directory, sync_to_disk


def save_checkpoint(
    directory: Path, step: int, tensors: dict[str, Tensor], state: dict[str, Any], keep_last: int
) -> None:
    """Write a checkpoint of `step` updates; all ranks take part.

    Args:
        directory: Holds the checkpoints of a run.
        step: Updates made.
        tensors: This rank's.
        state: The same on every rank; JSON.
        keep_last: Complete checkpoints to keep, this one included.
    """
    partial = directory / f".partial_{step:06d}"
    if is_main():
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    barrier()
    shard = partial / f"rank_{rank():03d}.safetensors"
    save_file(
        {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}, shard
    )
    entries: dict[str, dict[str, Any]] = dict(gather_objects((shard.name, _entry(shard))))
    if is_main():
        state_file = partial / STATE
        state_file.write_text(json.dumps(state, indent=2, sort_keys=True))
        entries[state_file.name] = _entry(state_file)
        manifest = {"step": step, "world_size": world_size(), "files": entries}
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=2, sort_keys=True))
        replace_directory(checkpoint_path(directory, step), partial)
        for old in complete_checkpoints(directory)[keep_last:]:
            shutil.rmtree(old)
    barrier()


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


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read this rank's tensors and the state, after checking every file's size and digest.

    Raises:
        InputError: Another number of ranks saved it, or a file is not what was written.
    """
    manifest = json.loads((path / MANIFEST).read_text())
    if manifest["world_size"] != world_size():
        raise InputError(
            f"{path} was saved by {manifest['world_size']} ranks and this launch has "
            f"{world_size()}; launch with --nproc_per_node={manifest['world_size']}"
        )
    mine = f"rank_{rank():03d}.safetensors"
    _verify(path / mine, manifest["files"][mine])
    return load_file(path / mine), read_state(path)


def read_state(path: Path) -> dict[str, Any]:
    """Read the state of a checkpoint, after checking its size and digest.

    Raises:
        InputError: It is not what was written.
    """
    manifest = json.loads((path / MANIFEST).read_text())
    _verify(path / STATE, manifest["files"][STATE])
    return dict(json.loads((path / STATE).read_text()))


def _verify(file: Path, expected: dict[str, Any]) -> None:
    found: dict[str, Any] = {"bytes": 0, "sha256": "absent"}
    if file.is_file():
        found = _entry(file)
    if found != expected:
        raise InputError(
            f"{file} is damaged: {found['bytes']} bytes, digest {found['sha256'][:12]}, where "
            f"{expected['bytes']} bytes, digest {expected['sha256'][:12]} were written; resume "
            "from another checkpoint with resume=<path>"
        )


def _entry(file: Path) -> dict[str, Any]:
    sync_to_disk(file)
    with file.open("rb") as content:
        digest = file_digest(content, "sha256").hexdigest()
    return {"bytes": file.stat().st_size, "sha256": digest}
