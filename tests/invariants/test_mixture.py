"""Sample i of a mixture is a function of the seed and i."""

import random
from collections import Counter
from fractions import Fraction

import pytest
import torch

from marco_train.data.mixture import BLOCK, Mixture, exact_weights


def shares(weights: dict[str, float]) -> dict[str, Fraction]:
    """Weights that are no function of sizes."""
    return exact_weights(weights, {})


WEIGHTS = shares({"if": 0.25, "kr": 0.25, "al": 0.10, "ma": 0.10, "ml": 0.30})
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


def thousandths_reference(quotas: dict[str, int], seed: int, index: int) -> tuple[str, int]:
    """The rule where every block holds the same samples of each source, written out."""
    block, slot = divmod(index, 1000)
    order = [source for source, quota in quotas.items() for _ in range(quota)]
    random.Random(f"{seed}/block/{block}").shuffle(order)
    source = order[slot]
    draw = block * quotas[source] + order[:slot].count(source)
    epoch, place = divmod(draw, SIZES[source])
    number = random.Random(f"{seed}/rows/{source}/{epoch}").getrandbits(63)
    rows = torch.randperm(SIZES[source], generator=torch.Generator().manual_seed(number))
    return source, int(rows[place])


@pytest.mark.parametrize("seed", [0, 7])
def test_weights_in_thousandths_have_the_same_samples_in_every_block(seed: int) -> None:
    quotas = {"if": 249, "kr": 1, "al": 350, "ma": 100, "ml": 300}
    weights = shares({source: quota / 1000 for source, quota in quotas.items()})
    mixture = Mixture(SIZES, weights, seed)
    rng = random.Random(seed)
    for index in [*range(40), *(rng.randrange(500_000) for _ in range(300))]:
        assert mixture.sample(index) == thousandths_reference(quotas, seed, index)


ODD = {
    "small": {"a": 0.9996, "b": 0.0004},
    "thirds": {"a": 1 / 3, "b": 1 / 3, "c": 1 / 3},
    "below a millionth": {"a": 0.3, "b": 0.69999925, "c": 0.00000075},
    "rounded": {"a": 0.142857, "b": 0.285714, "c": 0.571429},
}


@pytest.mark.parametrize("given", ODD.values(), ids=ODD.keys())
def test_odd_weights_are_kept_exactly_in_the_long_run(given: dict[str, float]) -> None:
    weights = shares(given)
    assert sum(weights.values()) == 1
    num_rows = dict.fromkeys(given, 10**6)  # no row comes twice
    mixture = Mixture(num_rows, weights, seed=0)
    samples = [mixture.sample(index) for index in range(200_000)]
    assert len(set(samples)) == 200_000

    # Block by block: halves are rounded up, from the start of the run and not of the block.
    begin, drawn = 0, dict.fromkeys(given, 0)
    for block in range(199):
        should = {s: int((block + 1) * 1000 * w + Fraction(1, 2)) for s, w in weights.items()}
        end = sum(should.values())
        for source, _ in samples[begin:end]:
            drawn[source] += 1
        assert drawn == should
        assert all(abs(n - 1000 * (block + 1) * weights[s]) <= 0.5 for s, n in drawn.items())
        begin = end


def test_a_weight_of_4_in_10000_is_20_of_50000_samples() -> None:
    weights = shares({"big": 0.9996, "small": 0.0004})
    mixture = Mixture({"big": 100, "small": 5}, weights, seed=0)
    found = Counter(mixture.sample(index)[0] for index in range(50_000))
    assert found == {"big": 49_980, "small": 20}


def test_a_weight_that_no_thousandth_is_draws_every_row_in_turn() -> None:
    weights = shares({"big": 0.9996, "small": 0.0004})
    mixture = Mixture({"big": 100, "small": 5}, weights, seed=0)
    found = [mixture.sample(index) for index in range(50_000)]
    rows = [row for source, row in found if source == "small"]
    assert [sorted(rows[n : n + 5]) for n in range(0, 20, 5)] == [[0, 1, 2, 3, 4]] * 4
    # 12 blocks hold 4.8 draws, which are 5; the last row of 100 of the big source comes sooner.
    assert mixture.num_samples_of_all == 12 * 1000


def test_a_sample_far_along_is_found_by_looking_at_the_blocks_beside_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weights = shares({f"s{n}": 1 / 7 for n in range(7)})
    looked_at = []
    before = Mixture._samples_before

    def samples_before(self: Mixture, block: int) -> int:
        looked_at.append(block)
        return before(self, block)

    monkeypatch.setattr(Mixture, "_samples_before", samples_before)
    mixture = Mixture(dict.fromkeys(weights, 100), weights, seed=0)
    mixture.sample(10**12)
    assert 0 < len(looked_at) <= 4
    assert all(abs(block - 10**9) <= 2 for block in looked_at)


def test_more_sources_than_a_block_has_samples_leave_blocks_empty_and_none_out() -> None:
    weights = shares({f"s{n:04}": 1 / 2500 for n in range(2500)})
    mixture = Mixture(dict.fromkeys(weights, 2), weights, seed=0)
    # A source is drawn where block * 0.4 passes a half: in blocks 1, 3, 6, 8, 11, ..., from 0.
    assert [draws_per_block(mixture, block) for block in range(6)] == [0, 1, 0, 1, 0, 0]
    found = Counter(source for source, _ in map(mixture.sample, range(5000)))
    assert found == dict.fromkeys(weights, 2)


def draws_per_block(mixture: Mixture, block: int) -> float:
    begin, end = (mixture._samples_before(n) for n in (block, block + 1))
    return (end - begin) / 2500


def test_epochs_say_how_often_a_small_source_was_repeated() -> None:
    found = Mixture(SIZES, WEIGHTS, seed=0).epochs(3 * BLOCK)
    assert found["ma"] == pytest.approx(100.0)
    assert found["if"] == pytest.approx(0.1)


def test_sources_without_a_weight_share_the_rest_by_their_rows() -> None:
    sizes = {"a": 30, "b": 10, "c": 500}
    by_rows = exact_weights({"a": "auto", "b": "auto", "c": "auto"}, sizes)
    assert by_rows == {"a": Fraction(3, 54), "b": Fraction(1, 54), "c": Fraction(50, 54)}
    rest = exact_weights({"a": "auto", "b": "auto", "c": 0.9}, sizes)
    assert rest == {"a": Fraction(3, 40), "b": Fraction(1, 40), "c": Fraction(9, 10)}
