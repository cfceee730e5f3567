"""What files hold, told from where they lie and when they were written.

Imports no tensor library, as a launch asks for it first.
"""

import glob
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any

Content = dict[str, Any]
"""`files`: size in bytes and time of change in ns of each, by name; `digest`: of what they hold, or
None where it was not made. JSON."""

# Of a model's directory: what decides its numbers and tokens.
WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".gguf"}
# Of a directory of rows, packed or not.
ROWS = {".jsonl", ".json", ".ndjson", ".parquet", ".arrow"}
TEXTS = {
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
    "model.safetensors.index.json",
}


def look(path: str | Path) -> dict[str, list[int]]:
    """Note size and time of a file, or of a directory's of a model or of rows; reads none."""
    stats = {_name(file, path): file.stat() for file in _files(Path(path))}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}


def digest(path: str | Path) -> str | None:
    """Digest what a file or a model's directory holds; None: it is not on this machine.

    JSON in another spelling (order of keys, white space) holds the same.
    """
    files = _files(Path(path))
    if not files:
        return None
    with ThreadPoolExecutor() as pool:  # digests of large files leave Python to other threads
        digests = list(pool.map(digest_file, files))
    if Path(path).is_file():
        return digests[0]
    named = [f"{_name(file, path)}/{found}" for file, found in zip(files, digests, strict=True)]
    return sha256("\n".join(named).encode()).hexdigest()


def digest_file(file: Path) -> str:
    """Digest a file: its bytes, or what its JSON says."""
    if file.name in TEXTS and file.suffix == ".json":
        try:
            text = json.dumps(json.loads(file.read_text(encoding="utf-8")), sort_keys=True)
        except ValueError:
            pass  # whoever opens it says so
        else:
            return sha256(text.encode()).hexdigest()
    with file.open("rb") as content:
        return file_digest(content, "sha256").hexdigest()


def is_same(noted: Content, path: str | Path) -> bool:
    """Whether a path holds what was noted; its files are read only where they look otherwise."""
    seen = look(path)
    if seen and seen == noted["files"]:
        return True
    return noted["digest"] is not None and noted["digest"] == digest(path)


def with_digests(noted: Mapping[str, Content], paths: Mapping[str, str]) -> dict[str, Content]:
    """Make the digests that are missing; none of what was written since it was noted."""
    made: dict[Path, str | None] = {}
    found = {}
    for name, content in noted.items():
        where = Path(paths[name]).resolve()
        known = content["digest"]
        if known is None and look(where) == content["files"]:
            if where not in made:
                made[where] = digest(where)
            known = made[where]
        found[name] = content | {"digest": known}
    return found


def _name(file: Path, path: str | Path) -> str:
    """A file's name below a directory."""
    return (
        str(file.relative_to(path))
        if file.is_relative_to(path) and file != Path(path)
        else file.name
    )


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if glob.has_magic(str(path)):
        return sorted(f for f in map(Path, glob.glob(str(path), recursive=True)) if f.is_file())
    if not path.is_dir():
        return []
    of_model = [f for f in path.iterdir() if f.suffix in WEIGHTS or f.name in TEXTS]
    found = of_model or [f for f in path.rglob("*") if ROWS & set(f.suffixes)]
    return sorted(f for f in found if f.is_file())
