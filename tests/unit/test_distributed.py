"""Ranks and the GPUs of a node."""

import pytest

from marco_train.distributed import check_gpus
from marco_train.errors import InputError


def test_more_ranks_than_visible_gpus_are_refused() -> None:
    check_gpus(num_ranks=4, num_gpus=4)
    check_gpus(num_ranks=1, num_gpus=8)
    said = "8 ranks were launched on a node where 4 GPUs are visible: launch NPROC=4"
    with pytest.raises(InputError, match=said):
        check_gpus(num_ranks=8, num_gpus=4)
