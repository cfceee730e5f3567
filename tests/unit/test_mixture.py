"""Sample i of a mixture is a function of the seed and i."""

from collections import Counter

import pytest

from marco_train.data.mixture import BLOCK, Mixture, block_quotas

WEIGHTS = {"if": 0.25, "kr": 0.25, "al": 0.10, "ma": 0.10, "ml": 0.30}
SIZES = {"if": 7500, "kr": 700, "al": 130, "ma": 3, "ml": 9000}


def test_every_block_holds_the_papers_shares_exactly() -> None:
    mixture = Mixture(SIZES, WEIGHTS, seed=0)
    for block in (0, 1, 7):
        found = Counter(mixture.sample(block * BLOCK + i)[0] for i in range(BLOCK))
        assert found == {"if": 250, "kr": 250, "al": 100, "ma": 100, "ml": 300}


def test_a_batch_is_mixed_and_not_sorted() -> None:
    mixture = Mixture(SIZES, WEIGHTS, seed=0)
    batches = [Counter(mixture.sample(b * 64 + i)[0] for i in range(64)) for b in range(10)]
    assert all(len(batch) >= 4 for batch in batches)


def test_samples_do_not_depend_on_what_was_asked_before() -> None:
    in_order = [Mixture(SIZES, WEIGHTS, seed=3).sample(i) for i in range(3000)]
    mixture = Mixture(SIZES, WEIGHTS, seed=3)
    backwards = [mixture.sample(i) for i in reversed(range(3000))]
    assert in_order == backwards[::-1]


def test_another_seed_gives_another_order() -> None:
    one, other = Mixture(SIZES, WEIGHTS, seed=0), Mixture(SIZES, WEIGHTS, seed=1)
    assert [one.sample(i) for i in range(50)] != [other.sample(i) for i in range(50)]


def test_a_source_is_walked_through_once_an_epoch_in_a_new_order() -> None:
    mixture = Mixture(SIZES, WEIGHTS, seed=0)
    rows = [row for source, row in map(mixture.sample, range(30 * BLOCK)) if source == "al"]
    first, second = rows[:130], rows[130:260]
    assert sorted(first) == sorted(second) == list(range(130))
    assert first != second


def test_a_golden_sample_pins_the_order_across_versions() -> None:
    # A checkpoint's cursor means nothing if this changes.
    mixture = Mixture(SIZES, WEIGHTS, seed=0)
    assert [mixture.sample(i) for i in range(4)] == GOLDEN


GOLDEN = [("ml", 4369), ("kr", 116), ("kr", 686), ("if", 2700)]


@pytest.mark.parametrize(
    ("weights", "quotas"),
    [
        ({"a": 0.5, "b": 0.5}, {"a": 500, "b": 500}),
        ({"a": 1 / 3, "b": 1 / 3, "c": 1 / 3}, {"a": 334, "b": 333, "c": 333}),
        ({"a": 0.9996, "b": 0.0004}, {"a": 1000, "b": 0}),
    ],
)
def test_quotas_share_out_a_block(weights: dict[str, float], quotas: dict[str, int]) -> None:
    assert block_quotas(weights) == quotas


def test_epochs_say_how_often_a_small_source_was_repeated() -> None:
    found = Mixture(SIZES, WEIGHTS, seed=0).epochs(3 * BLOCK)
    assert found["ma"] == pytest.approx(100.0)
    assert found["if"] == pytest.approx(0.1)
