"""What a checkpoint says of its own files, and whether they still are as they were written.

Imports no tensor library, as these are among the first questions of a launch.
"""

import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from marco_train.errors import InputError
from marco_train.files import digest_of

MANIFEST = "manifest.json"
"""Written last into a checkpoint's directory: with it, the checkpoint is complete."""
STATE = "state.json"


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """Read what a checkpoint consists of: `files`, by name, with the `bytes` and `digest` of each.

    Raises:
        InputError: It is absent, torn, or says something else.
    """
    file = checkpoint / MANIFEST
    try:
        found = dict(json.loads(file.read_bytes()))
        entries = {
            name: (entry["bytes"], entry["digest"]) for name, entry in found["files"].items()
        }
    except (OSError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise InputError(f"{file} is damaged ({type(error).__name__}: {error})") from error
    if STATE not in entries:
        raise InputError(f"{file} is damaged (it names no {STATE})")
    return found


def fault_of(checkpoint: Path, digested: Collection[str] = (STATE,)) -> str | None:
    """Say what is wrong first with a checkpoint; None: nothing is. See `faults_of`."""
    return next(faults_of(checkpoint, digested), None)


def faults_of(checkpoint: Path, digested: Collection[str] | None = None) -> Iterator[str]:
    """Say what is wrong with a checkpoint.

    Args:
        checkpoint: Its directory.
        digested: Files whose content is digested; of the others only the sizes are looked at. None:
            all.
    """
    try:
        files = read_manifest(checkpoint)["files"]
    except InputError as error:
        yield str(error)
        return
    for name, written in files.items():
        fault = _fault_of_file(checkpoint / name, written, digested is None or name in digested)
        if fault is not None:
            yield fault


def _fault_of_file(file: Path, written: dict[str, Any], is_digested: bool) -> str | None:
    try:
        size = file.stat().st_size
        if size != written["bytes"]:
            return f"{file} is damaged: {size} bytes, where {written['bytes']} were written"
        if is_digested and (found := digest_of(file)) != written["digest"]:
            return (
                f"{file} is damaged: digest {found[:12]}, where {written['digest'][:12]} was "
                "written"
            )
    except FileNotFoundError:
        return f"{file} is missing"
    except OSError as error:
        return f"{file} cannot be read ({error.strerror})"
    return None
