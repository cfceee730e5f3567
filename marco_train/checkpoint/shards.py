"""The tensors of a checkpoint: a rank writes what it updates, and any rank finds what it needs.

    rank_000.safetensors   masters and moments of the pieces of rank 0, and its generators
    index.json             of each parameter its type, its shape and its pieces

A piece is a range of a flattened parameter, which has all experts of its layer. So a checkpoint is
read by any number of ranks, with any size of their expert-parallel groups and any stage of ZeRO.
Weights are not stored: they are the masters, rounded to their type.
"""

import json
import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from marco_train.errors import InputError
from marco_train.files import sync_to_disk
from marco_train.safetensors_io import StoredTensor, read, read_header, read_into, write_tensors

INDEX = "index.json"
KINDS = ("master", "exp_avg", "exp_avg_sq")
"""Of a parameter's elements, what its optimizer keeps of each."""
GENERATORS = "generator."
NUM_NAMED = 10
"""Tensors that differ from those of a checkpoint and are named."""


@dataclass(frozen=True)
class Piece:
    """Consecutive elements of a parameter that one rank updates, with what it keeps of them."""

    parameter: str
    dtype: str
    """Of the weight, as torch names it."""
    shape: tuple[int, ...]
    """Of the parameter with all experts."""
    start: int
    """Of the first element in the flattened parameter."""
    tensors: Mapping[str, Tensor]
    """By the names of `KINDS`, [n] float32 each."""

    @property
    def stop(self) -> int:
        """After the last element."""
        return self.start + self.tensors[KINDS[0]].numel()


@dataclass(frozen=True)
class TrainingState:
    """What a rank's share of the optimizer holds; its tensors are those of the optimizer."""

    pieces: list[Piece]
    optimizer_steps: int
    lock: threading.Lock = field(default_factory=threading.Lock)
    """Held by an update, and by whoever reads the tensors beside training."""


class StateSource(Protocol):
    """Where a training state comes from."""

    @property
    def optimizer_steps(self) -> int:
        """Updates that made the moments."""

    def fill(self, piece: Piece) -> None:
        """Write the elements of a piece into its tensors."""


def shard_name(rank: int) -> str:
    """The file of a rank."""
    return f"rank_{rank:03d}.safetensors"


def write_shard(
    directory: Path, rank: int, state: TrainingState, generators: Mapping[str, Tensor]
) -> dict[str, Any]:
    """Write a rank's file, tensor by tensor from where it lies.

    Returns:
        What `build_index` and the manifest say of it; JSON.
    """
    tensors = {
        f"{kind}.{piece.parameter}": piece.tensors[kind] for kind in KINDS for piece in state.pieces
    }
    assert len(tensors) == len(KINDS) * len(state.pieces), "two pieces of one parameter"
    file = directory / shard_name(rank)
    digest = write_tensors(file, tensors | dict(generators))  # bytes, of any number, last
    sync_to_disk(file)
    return {
        "name": file.name,
        "bytes": file.stat().st_size,
        "digest": digest,
        "optimizer_steps": state.optimizer_steps,
        "pieces": [[p.parameter, p.dtype, list(p.shape), p.start, p.stop] for p in state.pieces],
    }


def build_index(shards: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Say where the pieces of each parameter lie, from what `write_shard` gave on every rank."""
    parameters: dict[str, dict[str, Any]] = {}
    for shard in shards:
        for name, dtype, shape, start, stop in shard["pieces"]:
            entry = parameters.setdefault(name, {"dtype": dtype, "shape": shape, "pieces": []})
            assert (entry["dtype"], entry["shape"]) == (dtype, shape), name
            entry["pieces"].append({"file": shard["name"], "start": start, "stop": stop})
    for name, entry in parameters.items():
        entry["pieces"].sort(key=lambda piece: piece["start"])
        fault = _gap(entry)
        assert fault is None, f"{name}: {fault}"
    (steps,) = {shard["optimizer_steps"] for shard in shards}
    return {"optimizer_steps": steps, "kinds": list(KINDS), "parameters": parameters}


def _gap(entry: Mapping[str, Any]) -> str | None:
    """Where pieces leave elements out or hold them twice."""
    end = 0
    for piece in entry["pieces"]:
        if piece["start"] != end or piece["stop"] <= end:
            return f"a piece of {piece['file']} begins at {piece['start']}, and {end} is expected"
        end = piece["stop"]
    size = math.prod(entry["shape"])
    return None if end == size else f"the pieces end at {end} of {size} elements"


class StoredState:
    """The tensors of a checkpoint, read range by range into their places."""

    def __init__(self, path: Path) -> None:
        """Read the index.

        Args:
            path: Of the checkpoint.

        Raises:
            InputError: Its tensors are stored otherwise, or the index leaves elements out.
        """
        self._path = path
        if not (path / INDEX).is_file():
            raise InputError(
                f"{path} has no {INDEX}: an earlier version of marco_train saved it, which alone "
                "can go on from it; start with resume=never"
            )
        index = json.loads((path / INDEX).read_text())
        self.optimizer_steps = int(index["optimizer_steps"])
        self._parameters: dict[str, dict[str, Any]] = index["parameters"]
        for name, entry in self._parameters.items():
            if fault := _gap(entry):
                raise InputError(f"{path / INDEX} is damaged: {name}: {fault}")

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of each parameter with all experts, by its name."""
        return {name: tuple(entry["shape"]) for name, entry in self._parameters.items()}

    def dtype(self, name: str) -> torch.dtype:
        """Of a parameter's weights."""
        found: torch.dtype = getattr(torch, self._parameters[name]["dtype"])
        return found

    def files(self, name: str) -> list[str]:
        """That hold pieces of a parameter, in their order."""
        return [piece["file"] for piece in self._parameters[name]["pieces"]]

    @cached_property
    def _files(self) -> dict[str, dict[str, StoredTensor]]:
        names = {piece["file"] for e in self._parameters.values() for piece in e["pieces"]}
        return {name: read_header(self._path / name) for name in names}

    def fill(self, piece: Piece) -> None:
        """Read the elements of a piece into its tensors, from all pieces that hold some."""
        for kind, target in piece.tensors.items():
            self._read(piece.parameter, kind, piece.start, target)

    def weight(self, name: str) -> Tensor:
        """Read a parameter's weights in their type."""
        entry = self._parameters[name]
        whole = torch.empty(math.prod(entry["shape"]), dtype=self.dtype(name))
        self._read(name, KINDS[0], 0, whole)
        return whole.view(entry["shape"])

    def _read(self, name: str, kind: str, start: int, target: Tensor) -> None:
        stop = start + target.numel()
        for piece in self._parameters[name]["pieces"]:
            first, last = max(start, piece["start"]), min(stop, piece["stop"])
            if first < last:
                stored = self._files[piece["file"]][f"{kind}.{name}"]
                part = stored.elements(first - piece["start"], last - piece["start"])
                read_into(part, target[first - start : last - start])

    def generators(self, rank: int) -> dict[str, Tensor]:
        """Random generators of a rank; empty where there was none of this number."""
        file = self._path / shard_name(rank)
        if not file.is_file():
            return {}
        stored = read_header(file)
        return {name: read(stored[name]) for name in stored if name.startswith(GENERATORS)}


def refuse_other_shapes(path: Path, stored: StoredState, state: TrainingState) -> None:
    """Refuse a checkpoint of another model than the one in training.

    Raises:
        InputError: Names the first tensors of this rank that differ, and how many do.
    """
    there = stored.shapes
    shapes = {piece.parameter: piece.shape for piece in state.pieces}
    others = {name: shape for name, shape in shapes.items() if there.get(name) != shape}
    if not others:
        return
    differ = [
        f"{name} is {list(there[name]) if name in there else 'absent'} there and {list(shape)} here"
        for name, shape in islice(others.items(), NUM_NAMED)
    ]
    unnamed = len(others) - len(differ)
    more = f"; and {unnamed} more differ" if unnamed else ""
    raise InputError(
        f"{path} is of another model: {'; '.join(differ)}{more}; bring back its model.path, or "
        "start with resume=never"
    )
