"""Whether a run can write its checkpoints, asked before it loads anything."""

import os
import shutil
from pathlib import Path

from marco_train.config.manifest import fault_of, read_manifest
from marco_train.config.resumption import complete_checkpoints
from marco_train.distributed import is_main, rank, sharing_errors
from marco_train.errors import InputError, require

GIB = 2**30


def check_writable(directory: Path) -> None:
    """Write a file to where checkpoints go to be, and delete it; all ranks take part.

    Raises:
        InputError: On all ranks, where one cannot.
    """
    probe = directory / f".write_test_{rank():03d}"
    with sharing_errors(InputError, OSError):
        if is_main():
            directory.mkdir(parents=True, exist_ok=True)
    with sharing_errors(InputError, OSError):
        try:
            probe.write_bytes(os.urandom(4096))
            with probe.open("rb") as written:
                os.fsync(written.fileno())
        finally:
            probe.unlink(missing_ok=True)


def check_room(directory: Path, checkpoint_bytes: int, num_checkpoints: int, others: int) -> None:
    """Refuse a file system that has no room for a run's checkpoints.

    Args:
        directory: Where they go to be; it exists, or a directory above it does.
        checkpoint_bytes: Of one, as far as it is known; that of one that lies there counts more.
        num_checkpoints: That lie there at a time, the one that is being written included.
        others: Bytes of what else the run writes there.

    Raises:
        InputError: Gives what is needed and what is free.
    """
    there = [path for path in complete_checkpoints(directory) if fault_of(path) is None]
    if there:
        files = read_manifest(there[0])["files"]
        checkpoint_bytes = sum(entry["bytes"] for entry in files.values())
    coming = max(1, num_checkpoints - len(there))
    place = directory.absolute()
    while not place.exists():
        place = place.parent
    total, _, free = shutil.disk_usage(place)
    needed = coming * checkpoint_bytes + others
    require(
        needed <= free or total == 0,  # a file system that does not know its size
        f"{place} has {free / GIB:.2f} GiB free, and the run needs {needed / GIB:.2f}: "
        f"{coming} checkpoints of {checkpoint_bytes / GIB:.2f} GiB (checkpoint.keep_last, kept "
        f"ends of phases, and the one that is being written) and {others / GIB:.2f} of exports. "
        "Make room, keep fewer, or choose another output_dir",
    )
