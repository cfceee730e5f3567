"""Scores kept on disk by what was scored, so that no teacher is asked twice.

An entry is found by a digest of everything its scores depend on: the teacher, the token ids and the
kind of score. On a CPU a resumed run samples the steps since its checkpoint anew, and the same, and
a second run of the same seed repeats all of the first; on GPUs both need `deterministic`, which has
not run there, and responses that differ are scored anew. Each call writes one safetensors file; an
entry whose bytes are not those that were written is computed again; the oldest files go when the
bound is reached.
"""

import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import fields
from hashlib import blake2b
from pathlib import Path
from uuid import uuid4

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from marco_train.config.opd import Objective, ScoreCacheConfig, TopKSource
from marco_train.distributed import is_main
from marco_train.files import replaces
from marco_train.teachers.base import ScoreSpec, Submitted, Teacher
from marco_train.tracking import log_line
from marco_train.types import (
    HiddenScores,
    Rollout,
    ScoredRollout,
    Scores,
    TokenScores,
    TopKScores,
    known_places,
)

KINDS: dict[Objective, type[Scores]] = {
    Objective.sampled: TokenScores,
    Objective.topk: TopKScores,
    Objective.full: HiddenScores,
}


class ScoreCache(Teacher):
    """A teacher that looks on disk first."""

    def __init__(
        self,
        teacher: Teacher,
        spec: ScoreSpec,
        cfg: ScoreCacheConfig,
        probe_logprobs: list[float],
        same: Callable[[list[float]], bool],
    ) -> None:
        """Open the entries of a teacher.

        Args:
            teacher: Scores what is not there.
            spec: Which kind of scores.
            cfg: Where, and how many.
            probe_logprobs: What the teacher says of the probe sentences.
            same: Whether the log-probabilities of an earlier run are this teacher's.
        """
        self._teacher = teacher
        self.head, self.identity = teacher.head, teacher.identity
        self._spec = spec
        assert cfg.path is not None
        self._directory = Path(cfg.path)
        self._directory.mkdir(parents=True, exist_ok=True)
        kind = f"{spec.objective.value}/{spec.top_k}/{spec.top_k_source.value}"
        named = f"{json.dumps(teacher.identity, sort_keys=True)}/{kind}"
        self._asked_of = self._find_same(named, probe_logprobs, same)
        self._max_bytes = int(cfg.max_gib * 2**30)
        self._file_of_key: dict[str, Path] = {}
        for file in self._files():
            self._learn(file)
        self._counts: Counter[str] = Counter()

    def score(self, rollouts: Sequence[Rollout]) -> list[ScoredRollout]:
        """Score this rank's rollouts, in their order; every rank takes part."""
        return self.collect(self.submit(rollouts))

    def submit(self, rollouts: Iterable[Rollout]) -> Submitted:
        """Hand on those that are not on disk, as they come."""
        keys: list[str] = []
        taken: list[Rollout] = []
        known: dict[str, Scores] = {}

        def without_scores() -> Iterator[Rollout]:
            asked = set()
            for rollout in rollouts:
                key = self._key(rollout)
                keys.append(key)
                taken.append(rollout)
                scores = known.get(key) or self._read(key)
                if scores is not None:
                    known[key] = scores
                elif key not in asked:
                    asked.add(key)
                    yield rollout

        missing = self._teacher.submit(without_scores())
        return Submitted(taken, (keys, known, missing))

    def collect(self, submitted: Submitted) -> list[ScoredRollout]:
        """Join what is on disk with what the teacher says, and keep the latter."""
        keys, known, missing = submitted.asked or self.submit(submitted.rollouts).asked
        self._counts["cache_asked"] += len(keys)
        self._counts["cache_found"] += sum(key in known for key in keys)
        fresh = {self._key(s.rollout): s.scores for s in self._teacher.collect(missing)}
        self._write(fresh)
        known |= fresh
        pairs = zip(keys, submitted.rollouts, strict=True)
        return [ScoredRollout(rollout, known[key]) for key, rollout in pairs if key in known]

    def take_counts(self) -> Counter[str]:
        """Rollouts asked for, those found and broken entries, beside the teacher's counts."""
        counts, self._counts = self._counts, Counter()
        return counts + self._teacher.take_counts()

    def close(self) -> None:
        """Close the teacher; the scores stay."""
        self._teacher.close()

    def _find_same(
        self, named: str, probe_logprobs: list[float], same: Callable[[list[float]], bool]
    ) -> str:
        """Name the entries of this teacher, told from others of its name by what it answers.

        Servers may serve other weights under one name, which no file tells. The entries of the
        other teacher stay.
        """
        number = 0
        while True:
            asked_of = f"{named}/{number}"
            digest = blake2b(asked_of.encode(), digest_size=16).hexdigest()
            file = self._directory / f"{digest}.json"
            if not file.is_file():
                with replaces(file) as partial:
                    partial.write_text(json.dumps(probe_logprobs))
                return asked_of
            if same(json.loads(file.read_text())):
                return asked_of
            if is_main():
                log_line(
                    f"score cache: the scores of {file.name} are of a teacher that answers "
                    "otherwise under the same name, and are not used"
                )
            number += 1

    def _key(self, rollout: Rollout) -> str:
        """Digest what the scores of a rollout depend on."""
        asked = [rollout.prompt.input_ids, rollout.response_ids]
        likeliest: list[list[int]] = []
        if self._spec.objective is Objective.topk and self._spec.top_k_source is TopKSource.sampler:
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
            log_line(f"score cache: {file.name} cannot be read and is left out: {error}")
            return
        self._file_of_key |= dict.fromkeys(keys, file)

    def _read(self, key: str) -> Scores | None:
        """Find an entry; None where there is none or its bytes are not those written."""
        file = self._file_of_key.get(key)
        if file is None:
            return None
        kind = KINDS[self._spec.objective]
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
            self._counts["cache_corrupt"] += 1
        del self._file_of_key[key]
        return None

    def _write(self, entries: dict[str, Scores]) -> None:
        tensors: dict[str, Tensor] = {}
        digests: dict[str, str] = {}
        for key, scores in entries.items():
            if not known_places(scores).all():
                continue  # another time the teacher may know all of them
            values = {name: value.contiguous() for name, value in vars(scores).items()}
            tensors |= {f"{key}.{name}": value for name, value in values.items()}
            digests[key] = _digest(list(values.values()))
        if not tensors:
            return
        file = self._directory / f"{time.time_ns():020d}-{uuid4().hex}.safetensors"
        with replaces(file) as partial:
            save_file(tensors, partial, metadata=digests)
        self._file_of_key |= dict.fromkeys(digests, file)
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


def _digest(tensors: Sequence[Tensor]) -> str:
    """Digest types, shapes and bytes."""
    digest = blake2b(digest_size=16)
    for tensor in tensors:
        digest.update(f"{tensor.dtype}/{tuple(tensor.shape)}/".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
