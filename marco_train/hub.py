"""Models of the hub: `org/name[@revision]` becomes a directory of huggingface_hub's cache.

Rank 0 asks the hub which commit it is, once a launch; every node then has that commit. From there
on a run knows directories alone, and `hub` in its config says which commits they are.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from marco_train.config import TrainConfig, to_run
from marco_train.config.compose import compose
from marco_train.config.teacher import TeacherBackend
from marco_train.errors import InputError, require

HUB_ID = re.compile(r"(?P<name>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[\w./-]+))?")
# Of a repository: what a tokenizer and a config are read from, and the weights. No pickles.
TEXTS = ["*.json", "*.jinja", "*.txt", "*.model"]
WEIGHTS = ["*.safetensors"]
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Wanted:
    """A model of the hub that a field names."""

    hub_id: str
    weights: bool
    """Whether more is read of it than its config and its tokenizer."""


def is_hub_id(path: object) -> bool:
    """Whether a path names a model of the hub; a directory of that name comes first."""
    named = isinstance(path, str) and HUB_ID.fullmatch(path) is not None
    return named and not Path(str(path)).exists()


def read_settled(words: Sequence[str]) -> TrainConfig:
    """Compose and check a run, with its models of the hub on this machine; all ranks take part.

    Raises:
        InputError: The run is refused, or a model can be had neither from the hub nor its cache.
    """
    composed = compose(words)
    cfg = to_run(composed)  # what is wrong with it is refused before anything is fetched
    wanted = hub_ids(composed)
    if not wanted:
        return cfg
    # Heavy libraries are imported from here on.
    from marco_train import distributed

    distributed.start(cfg.parallel.timeout_seconds, deterministic=cfg.deterministic)
    by_id: dict[str, bool] = {}
    for each in wanted.values():
        by_id[each.hub_id] = by_id.get(each.hub_id, False) or each.weights
    found = {} if not distributed.is_main() else by_id
    paths = _agreed(found)
    commits = {hub_id: Path(path).name for hub_id, path in paths.items()}
    # Another node has a cache of its own: one of its ranks fetches what that lacks.
    lacking = {
        _at(hub_id, commits[hub_id]): weights
        for hub_id, weights in by_id.items()
        if not Path(paths[hub_id]).is_dir() and os.environ.get("LOCAL_RANK", "0") == "0"
    }
    _agreed(lacking)
    here = {
        hub_id: path if Path(path).is_dir() else str(fetch(_at(hub_id, commits[hub_id]), weights))
        for (hub_id, path), weights in zip(paths.items(), by_id.values(), strict=True)
    }
    return to_run(with_directories(composed, wanted, here))


def _at(hub_id: str, commit: str) -> str:
    return f"{hub_id.partition('@')[0]}@{commit}"


def _agreed(by_id: Mapping[str, bool]) -> dict[str, str]:
    """Fetch what this rank is to fetch; gives rank 0's directories to all of them.

    Raises:
        InputError: On every rank, what went wrong on one.
    """
    from marco_train.distributed import gather_objects

    said: str | None = None
    found: dict[str, str] = {}
    try:
        found = {hub_id: str(fetch(hub_id, weights)) for hub_id, weights in by_id.items()}
    except InputError as error:
        said = str(error)
    failures = [failure for failure in gather_objects(said) if failure is not None]
    require(not failures, "; ".join(dict.fromkeys(failures)))
    return gather_objects(found)[0]


def with_those_here(composed: DictConfig) -> DictConfig:
    """Put directories in place of those models of the hub that are in the cache, without weights.

    Nothing is fetched, and the others keep their names.
    """
    from huggingface_hub.constants import HF_HUB_CACHE

    wanted, found = hub_ids(composed), {}
    for hub_id in {each.hub_id for each in wanted.values()}:
        name, _, revision = hub_id.partition("@")
        if not Path(HF_HUB_CACHE, f"models--{name.replace('/', '--')}").is_dir():
            continue
        from huggingface_hub import snapshot_download  # takes a quarter of a second to import
        from huggingface_hub.errors import HFValidationError

        try:
            found[hub_id] = snapshot_download(
                name, revision=revision or None, local_files_only=True
            )
        except (HFValidationError, OSError):
            continue
    here = {field: each for field, each in wanted.items() if each.hub_id in found}
    return with_directories(composed, here, found)


FIELDS = (
    "model.path",
    "model.tokenizer",
    "teacher.path",
    "stage.models.*",
    "stage.teachers.*.path",
    "stage.cascade.*.teacher.path",
    "stage.cascade.*.teachers_by_group.*.path",
)
"""That may name a model of the hub; a field comes behind those that it may be taken from."""


def hub_ids(composed: DictConfig) -> dict[str, Wanted]:
    """Find the models of the hub that a run names, by field."""
    found = {}
    for field in (name for pattern in FIELDS for name in _fields(composed, pattern.split("."))):
        try:
            value = OmegaConf.select(composed, field)
        except OmegaConfBaseException:  # it is not given, or what it is taken from is not
            continue
        if is_hub_id(value):
            found[field] = Wanted(value, weights=_reads_weights(composed, field))
    return found


def _fields(node: Any, parts: list[str], above: str = "") -> Iterator[str]:
    """Fields of a config that a pattern names."""
    if not isinstance(node, DictConfig) or node._is_none() or node._is_missing():
        return
    for name in list(node) if parts[0] == "*" else [parts[0]]:
        if name not in list(node):
            continue
        if len(parts) == 1:
            yield f"{above}{name}"
        elif not OmegaConf.is_missing(node, name):
            yield from _fields(node[name], parts[1:], f"{above}{name}.")


def _reads_weights(composed: DictConfig, field: str) -> bool:
    if field == "model.tokenizer":
        return False
    owner = OmegaConf.select(composed, field.rpartition(".")[0])
    backend = owner.get("backend") if isinstance(owner, DictConfig) else None
    return backend is not TeacherBackend.vllm_server


def with_directories(
    composed: DictConfig, wanted: Mapping[str, Wanted], directories: Mapping[str, str]
) -> DictConfig:
    """Put directories in place of models of the hub, and note which commits they are.

    Args:
        composed: As Hydra composed it; it is not changed.
        wanted: Models of the hub, by field.
        directories: Of each of them, by id.
    """
    settled = composed.copy()
    with open_dict(settled):
        settled.hub = {
            field: _at(each.hub_id, Path(directories[each.hub_id]).name)
            for field, each in wanted.items()
        }
        for field, each in wanted.items():
            # Of a field that is taken from another, that one was set before.
            if OmegaConf.select(settled, field) == each.hub_id:
                OmegaConf.update(settled, field, directories[each.hub_id])
    return settled


def fetch(hub_id: str, weights: bool = True) -> Path:
    """Find a model of the hub in huggingface_hub's cache, or fetch what it lacks.

    Args:
        hub_id: `org/name`, with `@` and a branch, tag or commit if it is not the newest.
        weights: Whether the weights are needed.

    Returns:
        A directory whose name is the commit.

    Raises:
        InputError: Names the files that cannot be had, and the command that fetches them.
    """
    # Half a second to import.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    named = HUB_ID.fullmatch(hub_id)
    require(named is not None, f"{hub_id!r} is no org/name[@revision] of the hub")
    assert named is not None
    name, revision = named["name"], named["revision"]
    command = f"hf download {name}" + (f" --revision {revision}" if revision else "")
    wanted = [*TEXTS, *WEIGHTS] if weights else TEXTS
    neither = f"there is no directory {hub_id!r}, and "
    try:
        found = Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
    except GatedRepoError as error:
        raise InputError(
            f"{name} of the hub asks for its licence to be accepted: do so on its page, then run "
            "`hf auth login` on this machine"
        ) from error
    except RevisionNotFoundError as error:
        raise InputError(f"{name} of the hub has no revision {revision!r}") from error
    except RepositoryNotFoundError as error:
        raise InputError(
            f"{neither}the hub has no model {name!r} for this user: mend the name, or, if it is "
            "private, run `hf auth login`"
        ) from error
    except HFValidationError as error:
        raise InputError(f"{neither}{name!r} is no name of the hub: {error}") from error
    except (LocalEntryNotFoundError, OSError) as error:
        raise InputError(
            f"{neither}the hub's {name} is not in the cache, which {_offline(error)}: run "
            f"`{command}` where the hub is reached, and set HF_HOME to that cache here"
        ) from error
    missing = missing_files(found, weights)
    require(
        not missing,
        f"{hub_id} is in the cache ({found}) without {', '.join(missing[:5])}"
        f"{f' and {len(missing) - 5} more files' if len(missing) > 5 else ''}: run `{command}` "
        "where the hub is reached",
    )
    return found


def _offline(error: Exception) -> str:
    if os.environ.get("HF_HUB_OFFLINE", "0").upper() in {"1", "ON", "YES", "TRUE"}:
        return "is all that may be read (HF_HUB_OFFLINE)"
    return f"is all there is, as the hub is not reached ({type(error).__name__})"


def missing_files(directory: Path, weights: bool) -> list[str]:
    """Name the files without which a model of the hub cannot be read."""
    needed = ["config.json"]
    if weights and (directory / INDEX).is_file():
        try:
            shards = json.loads((directory / INDEX).read_text())["weight_map"].values()
            needed += sorted(set(map(str, shards)))
        except (ValueError, LookupError, AttributeError):
            return [f"a whole {INDEX}"]
    elif weights:
        needed.append("model.safetensors")
    return [name for name in needed if not (directory / name).is_file()]
