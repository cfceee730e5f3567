"""A weighted mixture in which sample i is a pure function of the seed and i.

Every block of 1,000 samples holds each source's share exactly, in a shuffled order, and each
source is walked through in an order that is shuffled anew every epoch. Nothing is carried from
sample to sample: a run resumes at any i.
"""

import random
from functools import lru_cache

import torch

BLOCK = 1000


class Mixture:
    """Says which row of which source sample i is."""

    def __init__(self, sizes: dict[str, int], weights: dict[str, float], seed: int) -> None:
        self._sizes = sizes
        self._seed = seed
        self.quotas = block_quotas(weights)
        self._block = lru_cache(maxsize=4)(self._shuffled_block)
        self._order = lru_cache(maxsize=2 * len(sizes))(self._shuffled_rows)

    def sample(self, index: int) -> tuple[str, int]:
        """Source and row of sample `index`."""
        block, slot = divmod(index, BLOCK)
        source, draw_in_block = self._block(block)[slot]
        epoch, place = divmod(self._draw(block, source, draw_in_block), self._sizes[source])
        return source, self._order(source, epoch)[place]

    @property
    def num_samples_of_all(self) -> int:
        """Samples after which every row of every source that is drawn at all has been drawn."""
        passes = [
            -(-size // self.quotas[source])
            for source, size in self._sizes.items()
            if self.quotas[source]
        ]
        return BLOCK * max(passes)

    def epochs(self, index: int) -> dict[str, float]:
        """How often each source has been walked through before sample `index`, about."""
        return {
            source: index / BLOCK * self.quotas[source] / size
            for source, size in self._sizes.items()
        }

    def _draw(self, block: int, source: str, draw_in_block: int) -> int:
        return block * self.quotas[source] + draw_in_block

    def _shuffled_block(self, block: int) -> list[tuple[str, int]]:
        order = [source for source, quota in self.quotas.items() for _ in range(quota)]
        random.Random(f"{self._seed}/block/{block}").shuffle(order)
        drawn = dict.fromkeys(self.quotas, -1)
        slots = []
        for source in order:
            drawn[source] += 1
            slots.append((source, drawn[source]))
        return slots

    def _shuffled_rows(self, source: str, epoch: int) -> list[int]:
        number = random.Random(f"{self._seed}/rows/{source}/{epoch}").getrandbits(63)
        generator = torch.Generator().manual_seed(number)
        order: list[int] = torch.randperm(self._sizes[source], generator=generator).tolist()
        return order


def block_quotas(weights: dict[str, float]) -> dict[str, int]:
    """Share out a block of samples by weight, the largest remainders first."""
    exact = {source: weight * BLOCK for source, weight in weights.items()}
    quotas = {source: int(share + 1e-9) for source, share in exact.items()}
    by_remainder = sorted(exact, key=lambda source: (quotas[source] - exact[source], source))
    for source in by_remainder[: BLOCK - sum(quotas.values())]:
        quotas[source] += 1
    return quotas
