"""Files and directories that are complete or not there, whenever a process or the power fails."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from xxhash import xxh3_128

CHUNK_BYTES = 2**22  # digested while they are in a processor's cache


@contextmanager
def replaces(path: Path) -> Iterator[Path]:
    """Give a path to write a file to, which takes the place of `path` when the block ends.

    An error in the block leaves `path` as it was. Several processes may write one path at a time;
    the last one counts.
    """
    partial = path.with_name(f".{path.name}.{uuid4().hex}.partial")
    try:
        yield partial
        sync_to_disk(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    sync_to_disk(path.parent)


def replace_directory(path: Path, complete: Path) -> None:
    """Let a complete directory of files take the place of `path`, if that exists."""
    for written in (*complete.iterdir(), complete):
        sync_to_disk(written)
    if path.is_symlink():
        path.unlink()
    shutil.rmtree(path, ignore_errors=True)
    complete.rename(path)
    sync_to_disk(path.parent)


def link_directory(link: Path, target: Path) -> None:
    """Let `link` stand for a directory beside it, in place of whatever has that name."""
    partial = link.with_name(f".{link.name}.partial")
    partial.unlink(missing_ok=True)
    partial.symlink_to(target.name, target_is_directory=True)
    if not link.is_symlink():
        shutil.rmtree(link, ignore_errors=True)
    partial.replace(link)
    sync_to_disk(link.parent)


def sync_to_disk(path: Path) -> None:
    """Wait until what was written to a file, or the names in a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def digest_of(file: Path) -> str:
    """Digest what a file holds: xxh3 of 128 bits, which finds every accident and no malice."""
    digest = xxh3_128()
    chunk = memoryview(bytearray(CHUNK_BYTES))
    with file.open("rb", buffering=0) as content:
        while count := content.readinto(chunk):
            digest.update(chunk[:count])
    return digest.hexdigest()
