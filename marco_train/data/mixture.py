"""A weighted mixture in which sample i is a pure function of the seed and i.

Samples come in blocks. Before block b a source of weight w has been drawn 1000 * b * w times,
rounded, so that no source is ever a whole draw away from its share there; a block is of 1,000
samples, or of a few more or fewer where a weight is no multiple of 1/1000. The order within a block
is shuffled, and each source is walked through in an order that is shuffled anew every epoch.
Nothing is carried from sample to sample: a run resumes at any i.
"""

import random
from collections.abc import Mapping
from fractions import Fraction
from functools import lru_cache
from math import ceil, floor

import torch

from marco_train.config.data import AUTO

BLOCK = 1000


class Mixture:
    """Says which row of which source sample i is."""

    def __init__(
        self, sizes: Mapping[str, int], weights: Mapping[str, Fraction], seed: int
    ) -> None:
        """Mix sources.

        Args:
            sizes: Rows of each source.
            weights: Shares of the samples, of the same sources; they sum to 1.
            seed: Of all orders.
        """
        self.weights = weights
        self._sizes = sizes
        self._seed = seed
        self._begin = lru_cache(maxsize=4)(self._samples_before)
        self._block = lru_cache(maxsize=4)(self._shuffled_block)
        self._order = lru_cache(maxsize=2 * len(sizes))(self._shuffled_rows)

    def sample(self, index: int) -> tuple[str, int]:
        """Source and row of sample `index`."""
        block = self._block_of(index)
        source, draw = self._block(block)[index - self._begin(block)]
        epoch, place = divmod(draw, self._sizes[source])
        return source, self._order(source, epoch)[place]

    @property
    def num_samples_of_all(self) -> int:
        """Samples after which every row of every source has been drawn."""
        blocks = [
            ceil((size - Fraction(1, 2)) / (BLOCK * self.weights[source]))
            for source, size in self._sizes.items()
        ]
        return self._samples_before(max(blocks))

    def epochs(self, index: int) -> dict[str, float]:
        """How often each source has been walked through before sample `index`, about."""
        return {
            source: float(index * self.weights[source] / size)
            for source, size in self._sizes.items()
        }

    def _block_of(self, index: int) -> int:
        # A block begins no more than half a sample per source away from 1000 times its number.
        block = index // BLOCK
        while self._begin(block) > index:
            block -= 1
        while self._begin(block + 1) <= index:
            block += 1
        return block

    def _samples_before(self, block: int) -> int:
        return sum(draws_before(block, weight) for weight in self.weights.values())

    def _shuffled_block(self, block: int) -> list[tuple[str, int]]:
        """Source and draw of each sample of a block; a source's draws are counted from 0."""
        drawn = {source: draws_before(block, weight) for source, weight in self.weights.items()}
        order = [
            source
            for source, weight in self.weights.items()
            for _ in range(draws_before(block + 1, weight) - drawn[source])
        ]
        random.Random(f"{self._seed}/block/{block}").shuffle(order)
        slots = []
        for source in order:
            slots.append((source, drawn[source]))
            drawn[source] += 1
        return slots

    def _shuffled_rows(self, source: str, epoch: int) -> list[int]:
        number = random.Random(f"{self._seed}/rows/{source}/{epoch}").getrandbits(63)
        generator = torch.Generator().manual_seed(number)
        order: list[int] = torch.randperm(self._sizes[source], generator=generator).tolist()
        return order


def draws_before(block: int, weight: Fraction) -> int:
    """Count the draws of a source of a weight before a block, rounding halves up."""
    return floor(block * BLOCK * weight + Fraction(1, 2))


def exact_weights(
    weights: Mapping[str, float | str], sizes: Mapping[str, int]
) -> dict[str, Fraction]:
    """Make weights rational numbers that sum to exactly 1.

    A number counts as the decimal that it is written as: 0.1 is a tenth.

    Args:
        weights: Shares, or `auto`: such sources divide what the others leave by their sizes.
        sizes: Rows of each source.
    """
    given = {name: Fraction(str(weight)) for name, weight in weights.items() if weight != AUTO}
    left = 1 - sum(given.values(), Fraction(0))
    num_rows = sum(sizes[name] for name in weights if name not in given)
    exact = {
        name: given[name] if name in given else left * Fraction(sizes[name], num_rows)
        for name in weights
    }
    total = sum(exact.values(), Fraction(0))
    return {name: weight / total for name, weight in exact.items()}
