"""Accuracy is the same however answers are spread over ranks."""

import pytest

from marco_train.evaluation.accuracy import accuracy_by_category
from tests.helpers.ranks import run_on_ranks


def grades_of_rank() -> dict[str, float]:
    import torch.distributed as dist

    mine = [[("a", True), ("a", True), ("b", False)], [("a", False)]][dist.get_rank()]
    return accuracy_by_category(mine)


def test_accuracy_weighs_every_answer_of_every_rank_alike() -> None:
    expected = {"a": pytest.approx(100 * 2 / 3), "all": pytest.approx(50.0), "b": 0.0}
    assert run_on_ranks(2, grades_of_rank) == [expected, expected]
