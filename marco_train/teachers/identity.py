"""A digest of everything that determines a teacher's scores, apart from the tokens it scores.

Of a model in this process the weights are digested as they lie in memory, where they compute: what
did not arrive, or arrived otherwise on another rank, is another teacher. vLLM packs its weights, so
there the files are digested, whole. A server's weights are elsewhere: it is known by its name, and
by what it says of fixed sentences (`Cascade`, `ScoreCache`).
"""

import json
from collections.abc import Iterable
from hashlib import blake2b, file_digest
from pathlib import Path
from typing import Any

from torch import Tensor

from marco_train.config.architecture import read_config, read_json
from marco_train.config.teacher import TeacherConfig
from marco_train.distributed import gather_objects
from marco_train.errors import InputError
from marco_train.models.checksums import checksum
from marco_train.models.tokenizer_files import load_fast_tokenizer, tokenizer_digest
from marco_train.models.weights import name_first, refuse_broken

Identity = dict[str, Any]
"""Digests by what they are of, as `weights`; JSON. Of several teachers, by their group."""

# Keys of a config.json that change no score: who wrote it, and how it is loaded.
UNDECISIVE = {"transformers_version", "_name_or_path", "dtype", "torch_dtype", "use_cache"}
# Files beside the weights that change no score, or are digested by what they mean.
NOT_DIGESTED = {
    "config.json",
    "generation_config.json",  # every field of it is sent
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "added_tokens.json",
    "chat_template.json",
}
DIGESTED = {".json", ".safetensors", ".bin", ".pt", ".pth", ".gguf"}


def memory_identity(cfg: TeacherConfig, weights: Iterable[tuple[str, Tensor]]) -> Identity:
    """Digest a model in this process; every rank takes part.

    Args:
        cfg: Where it came from.
        weights: This rank's, by name. Ranks may hold parts of a model, or copies.

    Returns:
        The same on every rank, and for any number of ranks that share the model.

    Raises:
        InputError: On every rank, where weights are not finite or copies of one differ; the first
            ten are named.
    """
    held: dict[str, Any] = {}
    broken = []
    for name, weight in weights:
        held[name] = str(weight.dtype), tuple(weight.shape), checksum(weight)
        if weight.is_floating_point() and not weight.isfinite().all():
            broken.append(name)
    refuse_broken(broken, cfg.path, cfg.dtype.value)
    whole: dict[str, Any] = {}
    for number, of_rank in enumerate(gather_objects(held)):
        differing = [n for n, found in of_rank.items() if whole.setdefault(n, found) != found]
        if differing:
            raise InputError(
                f"teacher {cfg.path}: rank {number} holds other values than the ranks before it in "
                f"{len(differing)} weights: {name_first(differing)}; give every machine one model"
            )
    return _agreed(cfg, _digest(whole), served_as=None)


def files_identity(cfg: TeacherConfig, served_as: str | None) -> Identity:
    """Digest all files that a model's scores come from, whole; every rank takes part.

    Args:
        cfg: Where they are.
        served_as: What servers call the model, which have weights of their own: what lies here
            beside config and tokenizer says nothing of them. None: vLLM in this process.

    Raises:
        InputError: On every rank, where two of them read other content.
    """
    digest = blake2b(digest_size=16)
    for file in sorted(Path(cfg.path).iterdir()) if served_as is None else ():
        if not file.is_file() or file.suffix not in DIGESTED or file.name in NOT_DIGESTED:
            continue
        digest.update(f"{file.name}/".encode())
        if file.suffix == ".json":
            digest.update(_digest(_decisive(read_json(file))).encode())
            continue
        with file.open("rb") as content:
            digest.update(file_digest(content, blake2b).digest())
    return _agreed(cfg, digest.hexdigest(), served_as)


def _agreed(cfg: TeacherConfig, weights: str, served_as: str | None) -> Identity:
    """Add what else decides a score, and see that all ranks found the same."""
    path = Path(cfg.path)
    config = read_config(path)
    config["architectures"] = sorted(config.get("architectures") or [])
    identity = {
        "weights": weights,
        "config": _digest(_decisive(config)),
        "tokenizer": None,
        "template": None,
        "dtype": cfg.dtype.value,
        "stop_id": cfg.stop_id,
        "served_as": served_as,
    }
    if (path / "tokenizer.json").is_file():
        template = load_fast_tokenizer(path, f"teacher {path}").chat_template
        identity["tokenizer"] = tokenizer_digest(path, f"teacher {path}")
        identity["template"] = _digest(template)
    first, *others = gather_objects(identity)
    for number, other in enumerate(others, 1):
        differing = [key for key in first if other[key] != first[key]]
        if differing:
            raise InputError(
                f"teacher {path}: rank {number} read another {', '.join(differing)} than rank 0; "
                "give every machine the same files"
            )
    return identity


def _decisive(value: Any) -> Any:
    """What JSON says that changes scores, in one spelling."""
    if isinstance(value, dict):
        found = {key: _decisive(item) for key, item in value.items() if key not in UNDECISIVE}
        return {key: item for key, item in found.items() if item is not None}
    if isinstance(value, list):
        return [_decisive(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _digest(value: Any) -> str:
    """Digest a value of JSON; the order of keys is nothing."""
    return blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).hexdigest()
