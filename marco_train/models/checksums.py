"""Digests of weights in memory, made on their device."""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

WORD_BYTES = 8
# Positions are weighed, so that a transposed or shifted weight changes its checksum.
POSITION_PERIOD = 65_521
CHECKSUM_CHUNK = 2**18  # words multiplied at once, few enough for a cache


def checksum(weight: Tensor) -> int:
    """Digest the bits and the order of a weight on its device, modulo 2**64."""
    flat = weight.detach().contiguous().flatten()
    if flat.storage_offset() * flat.element_size() % WORD_BYTES:
        flat = flat.clone()
    if flat.nbytes % WORD_BYTES:
        flat = F.pad(flat, (0, (-flat.nbytes % WORD_BYTES) // flat.element_size()))
    words, places = flat.view(torch.int64), _places(flat.device)
    if len(words) <= CHECKSUM_CHUNK:  # most are small and many
        return int((words * places[: len(words)]).sum())
    parts = torch.split(words, CHECKSUM_CHUNK)
    sums = torch.stack([(part * places[: len(part)]).sum() for part in parts])
    return int((sums * places[: len(sums)]).sum())


@cache
def _places(device: torch.device) -> Tensor:
    """Odd numbers: a product with one is 0 modulo 2**64 for no word but 0."""
    return torch.arange(CHECKSUM_CHUNK, device=device) % POSITION_PERIOD * 2 + 1
