"""Ranks tell each other values of any length."""

from typing import Any

import pytest
import torch

from marco_train.distributed import gather_objects, rank
from tests.helpers.ranks import run_on_ranks


def gathered() -> list[Any]:
    return gather_objects(["long" * 1000 if rank() else "short", rank(), torch.tensor([rank()])])


@pytest.mark.slow
def test_ranks_tell_each_other_values_of_any_length() -> None:
    for found in run_on_ranks(2, gathered):
        (short, zero, first), (long, one, second) = found
        assert (short, zero, long, one) == ("short", 0, "long" * 1000, 1)
        assert [first.item(), second.item()] == [0, 1]
