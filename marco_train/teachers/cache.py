"""Scores kept on disk by what was scored, so that no teacher is asked twice.

An entry is found by a digest of everything its scores depend on: the teacher, the token ids and the
kind of score. A resumed run samples the steps since its checkpoint anew, and the same; a second run
of the same seed repeats all of the first. Each call writes one safetensors file; an entry whose
bytes are not those that were written is computed again; the oldest files go when the bound is
reached.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import fields
from hashlib import blake2b, sha256
from pathlib import Path
from uuid import uuid4

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from marco_train.config import Objective, ScoreCacheConfig, TopKFrom
from marco_train.distributed import reduce_sums
from marco_train.metrics import Metrics
from marco_train.teachers.base import Teacher, Wanted
from marco_train.tracking import say
from marco_train.types import HiddenScores, Rollout, ScoredRollout, TokenScores, TopKScores

Scores = TokenScores | TopKScores | HiddenScores
KINDS: dict[Objective, type[Scores]] = {
    Objective.sampled: TokenScores,
    Objective.topk: TopKScores,
    Objective.full: HiddenScores,
}
SAMPLE_BYTES = 2**16
NUM_SAMPLES = 16


def teacher_identity(path: str | Path) -> str:
    """Digest a teacher's directory: its small files whole, its weights by size and samples."""
    digest = sha256()
    for file in sorted(Path(path).iterdir()):
        if not file.is_file() or file.suffix not in {".json", ".safetensors", ".txt", ".jinja"}:
            continue
        size = file.stat().st_size
        digest.update(f"{file.name}/{size}/".encode())
        with file.open("rb") as content:
            if size <= SAMPLE_BYTES * NUM_SAMPLES:
                digest.update(content.read())
                continue
            for number in range(NUM_SAMPLES):  # the first is the header's beginning
                content.seek((size - SAMPLE_BYTES) * number // (NUM_SAMPLES - 1))
                digest.update(content.read(SAMPLE_BYTES))
    return digest.hexdigest()


class ScoreCache:
    """A teacher that looks on disk first."""

    def __init__(
        self, teacher: Teacher, identity: str, wanted: Wanted, cfg: ScoreCacheConfig
    ) -> None:
        self._teacher = teacher
        self._wanted = wanted
        kind = f"{wanted.objective.value}/{wanted.top_k}/{wanted.top_k_from.value}"
        self._asked_of = f"{identity}/{kind}"
        self._directory = Path(cfg.path)
        self._directory.mkdir(parents=True, exist_ok=True)
        self._max_bytes = int(cfg.max_gib * 2**30)
        self._file_of_key: dict[str, Path] = {}
        for file in self._files():
            self._learn(file)
        self._asked = self._found = self._corrupt = 0

    @property
    def head(self) -> Tensor:
        """Weights of the teacher's output head, [V, D]."""
        return self._teacher.head

    def score(self, rollouts: Sequence[Rollout]) -> list[ScoredRollout]:
        """Score this rank's rollouts, in their order; every rank takes part."""
        keys = [self._key(rollout) for rollout in rollouts]
        known = {key: scores for key in set(keys) if (scores := self._read(key)) is not None}
        missing = {key: r for key, r in zip(keys, rollouts, strict=True) if key not in known}
        self._asked += len(keys)
        self._found += sum(key in known for key in keys)
        (missing_anywhere,) = reduce_sums([len(missing)])
        if missing_anywhere > 0:  # a teacher's ranks may need each other
            scored = self._teacher.score(list(missing.values()))
            fresh = {key: s.scores for key, s in zip(missing, scored, strict=True)}
            self._write(fresh)
            known |= fresh
        return [ScoredRollout(r, known[key]) for key, r in zip(keys, rollouts, strict=True)]

    def take_counts(self) -> list[int]:
        """Rollouts asked for, those found, and broken entries, on this rank since last taken."""
        counts = [self._asked, self._found, self._corrupt]
        self._asked = self._found = self._corrupt = 0
        return counts

    def _key(self, rollout: Rollout) -> str:
        """Digest what the scores of a rollout depend on."""
        asked = [rollout.prompt.input_ids, rollout.response_ids]
        likeliest: list[list[int]] = []
        if self._wanted.objective is Objective.topk and self._wanted.top_k_from is TopKFrom.sampler:
            likeliest = rollout.topk_ids
        text = json.dumps([self._asked_of, *asked, likeliest])
        return blake2b(text.encode(), digest_size=16).hexdigest()

    def _files(self) -> list[Path]:
        """Files of the cache, oldest first: their names begin with the time."""
        return sorted(self._directory.glob("*.safetensors"))

    def _learn(self, file: Path) -> None:
        try:
            with safe_open(file, framework="pt") as content:
                keys = content.metadata() or {}
        except (OSError, SafetensorError) as error:
            say(f"score cache: {file.name} cannot be read and is left out: {error}")
            return
        self._file_of_key |= dict.fromkeys(keys, file)

    def _read(self, key: str) -> Scores | None:
        """Find an entry; None where there is none or its bytes are not those written."""
        file = self._file_of_key.get(key)
        if file is None:
            return None
        kind = KINDS[self._wanted.objective]
        try:
            with safe_open(file, framework="pt") as content:
                expected = content.metadata()[key]
                tensors = [content.get_tensor(f"{key}.{field.name}") for field in fields(kind)]
        except FileNotFoundError:
            tensors = None  # another rank made room
        except (OSError, SafetensorError):
            tensors = []
        if tensors and _digest(tensors) == expected:
            return kind(*tensors)
        if tensors is not None:
            self._corrupt += 1
        del self._file_of_key[key]
        return None

    def _write(self, entries: dict[str, Scores]) -> None:
        if not entries:
            return
        tensors: dict[str, Tensor] = {}
        digests: dict[str, str] = {}
        for key, scores in entries.items():
            values = {name: value.contiguous() for name, value in vars(scores).items()}
            tensors |= {f"{key}.{name}": value for name, value in values.items()}
            digests[key] = _digest(list(values.values()))
        name = f"{time.time_ns():020d}-{uuid4().hex}"
        partial = self._directory / f".{name}.partial"
        save_file(tensors, partial, metadata=digests)
        file = self._directory / f"{name}.safetensors"
        partial.rename(file)
        self._file_of_key |= dict.fromkeys(entries, file)
        self._make_room()

    def _make_room(self) -> None:
        """Delete the oldest files until the rest is within the bound."""
        sizes = {}
        for file in self._files():
            try:
                sizes[file] = file.stat().st_size
            except FileNotFoundError:
                continue
        excess = sum(sizes.values()) - self._max_bytes
        for file, size in sizes.items():
            if excess <= 0:
                return
            file.unlink(missing_ok=True)
            excess -= size


def cache_metrics(caches: Sequence[ScoreCache]) -> Metrics:
    """What the caches of a step were worth, over all of them and all ranks."""
    if not caches:
        return {}
    counts = [cache.take_counts() for cache in caches]
    asked, found, corrupt = reduce_sums([sum(column) for column in zip(*counts, strict=True)])
    return {"teacher/cache_hits": found / max(1.0, asked), "teacher/cache_corrupt": corrupt}


def _digest(tensors: Sequence[Tensor]) -> str:
    """Digest types, shapes and bytes."""
    digest = blake2b(digest_size=16)
    for tensor in tensors:
        digest.update(f"{tensor.dtype}/{tuple(tensor.shape)}/".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
