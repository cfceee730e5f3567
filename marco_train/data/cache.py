"""Kept from launch to launch: digests of files, distinct rows, and what the gate found.

It lies under $MARCO_TRAIN_CACHE, else ~/.cache/marco_train, and can be deleted at any time.
"""

import json
import os
from functools import cache
from hashlib import file_digest, sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

from marco_train.files import replaces

# What decides tokens beside the modules of this folder.
DECIDING_MODELS = ("chat_template", "tokenizer_files", "hf_io")
DECIDING_LIBRARIES = ("jinja2", "tokenizers", "transformers")


def cache_directory() -> Path:
    """Where everything lies; made where it is not there."""
    given = os.environ.get("MARCO_TRAIN_CACHE")
    directory = Path(given) if given else Path.home() / ".cache" / "marco_train"
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def read_json(name: str) -> Any:
    """Read what was kept under a name; None where nothing was, or it cannot be read."""
    try:
        return json.loads((cache_directory() / f"{name}.json").read_text())
    except (OSError, ValueError):
        return None


def write_json(name: str, content: Any) -> None:
    """Keep something under a name, where there is room and right to."""
    try:
        with replaces(cache_directory() / f"{name}.json") as partial:
            partial.write_text(json.dumps(content))
    except OSError:
        return  # it is worked out again


def digest_of_file(file: Path) -> str:
    """Digest the bytes of a file; they are read once, until they are written anew.

    The time at which the system saw it change last is part of what it is known by: a file keeps the
    time of its content where somebody sets that back.
    """
    stat = file.stat()
    seen = [str(file.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
    name = f"digest-{sha256(json.dumps(seen).encode()).hexdigest()}"
    known = read_json(name)
    if isinstance(known, str):
        return known
    with file.open("rb") as content:
        found = file_digest(content, "sha256").hexdigest()
    write_json(name, found)
    return found


def digest_of(*parts: Any) -> str:
    """Digest what something is a function of, beside the code of this package."""
    said = json.dumps([_code_digest(), *parts], sort_keys=True, default=str)
    return sha256(said.encode()).hexdigest()


@cache
def _code_digest() -> str:
    """Of the modules that decide what is kept: what another version kept is of no use."""
    package = Path(__file__).parents[1]
    models = (package / "models" / f"{name}.py" for name in DECIDING_MODELS)
    files = [*sorted(package.glob("data/*.py")), package / "types.py", *models]
    versions = [f"{name} {version(name)}" for name in DECIDING_LIBRARIES]
    code = b"".join(file.read_bytes() for file in files)
    return sha256(code + " ".join(versions).encode()).hexdigest()
