"""Digests of weights in memory, made on their device, of many equal ones at once."""

from collections.abc import Iterable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from marco_train.models.weights import ALL_EXPERTS, ExpertShare, checkpoint_names

WORD_BYTES = 8
# Positions are weighed, so that a transposed or shifted weight changes its checksum.
POSITION_PERIOD = 65_521
CHECKSUM_CHUNK = 2**18  # words of one weight that are summed together
# Words multiplied at once: few enough for a cache, or enough to keep a GPU busy in 128 MiB.
BLOCK_WORDS = {"cpu": CHECKSUM_CHUNK, "cuda": 2**24}


class Checksums:
    """Digests of a stream of weights, made as they pass; copied to the host once, at the end."""

    def __init__(self, share: ExpertShare = ALL_EXPERTS) -> None:
        """Expect the experts of `share`."""
        self._share = share
        self.num_bytes: dict[str, int] = {}  # by checkpoint name
        self._rows: list[Tensor] = []  # [N] each, of as many names

    def add(self, name: str, weight: Tensor) -> None:
        """Take one weight of a stream of `named_weights`."""
        names = checkpoint_names(name, weight.shape, self._share)
        self.num_bytes |= dict.fromkeys(names, weight.nbytes // len(names))
        self._rows.append(checksums(weight.detach().reshape(len(names), -1)))

    def by_name(self) -> dict[str, int]:
        """All digests under checkpoint names, after one copy to the host."""
        found: list[int] = torch.cat(self._rows).tolist() if self._rows else []
        return dict(zip(self.num_bytes, found, strict=True))


def checksums_of(
    weights: Iterable[tuple[str, Tensor]], share: ExpertShare = ALL_EXPERTS
) -> dict[str, int]:
    """Digest a stream of `named_weights` of `share`, under checkpoint names."""
    found = Checksums(share)
    for name, weight in weights:
        found.add(name, weight)
    return found.by_name()


def checksum(weight: Tensor) -> int:
    """Digest the bits and the order of a weight on its device, modulo 2**64."""
    return int(checksums(weight.detach().reshape(1, -1)))


def checksums(weights: Tensor) -> Tensor:
    """Digest each row of [N, n] as `checksum` does, into [N] int64 on the same device."""
    rows = weights.contiguous()
    if rows.storage_offset() * rows.element_size() % WORD_BYTES:
        rows = rows.clone()
    row_bytes = rows.shape[1] * rows.element_size()
    if row_bytes % WORD_BYTES:
        rows = F.pad(rows, (0, (-row_bytes % WORD_BYTES) // rows.element_size()))
    return _word_checksums(rows.view(torch.int64))


def _word_checksums(words: Tensor) -> Tensor:
    """Digest each row of [N, w] int64 into [N]; of a long row, the digests of its parts."""
    length = words.shape[1]
    places = _places(words.device)
    if length <= CHECKSUM_CHUNK:
        height = max(1, BLOCK_WORDS[words.device.type] // max(1, length))
        sums = [(block * places[:length]).sum(1) for block in torch.split(words, height)]
        return torch.cat(sums) if len(sums) > 1 else sums[0]
    whole = length // CHECKSUM_CHUNK
    parts = [
        _word_checksums(row[: whole * CHECKSUM_CHUNK].view(whole, CHECKSUM_CHUNK)) for row in words
    ]
    sums_NP = torch.stack(parts)
    if length % CHECKSUM_CHUNK:
        rest = words[:, whole * CHECKSUM_CHUNK :]
        sums_NP = torch.cat([sums_NP, (rest * places[: rest.shape[1]]).sum(1, keepdim=True)], 1)
    return _word_checksums(sums_NP)


@cache
def _places(device: torch.device) -> Tensor:
    """Odd numbers: a product with one is 0 modulo 2**64 for no word but 0."""
    return torch.arange(CHECKSUM_CHUNK, device=device) % POSITION_PERIOD * 2 + 1
