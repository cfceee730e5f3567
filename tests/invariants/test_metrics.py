"""Sums over tokens, in all and by group, over ranks."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from marco_train.evaluation.signatures import language_signatures
from marco_train.metrics import MetricSums, check_names
from marco_train.models import load_model, save_model
from marco_train.models.weights import random_model
from marco_train.rollout.base import summarize
from marco_train.types import (
    FinishReason,
    LossOutput,
    Microbatch,
    Prompt,
    Rollout,
    no_experts,
)
from tests.helpers.models import architecture
from tests.helpers.ranks import run_on_ranks


def microbatch(groups: tuple[str, ...], ids: list[list[int]]) -> Microbatch:
    count = len(ids)
    return Microbatch(
        input_ids=torch.zeros(1, count, dtype=torch.int64),
        position_ids=torch.arange(count)[None],
        targets=torch.zeros(count, dtype=torch.int64),
        loss_places=torch.arange(count),
        num_tokens=count,
        num_loss_tokens=count,
        groups=groups,
        group_ids=torch.tensor(ids, dtype=torch.int64).view(count, 2 if ids else 0),
        routed_experts=no_experts().long(),
    )


def output(values: list[float], advantages: list[float]) -> LossOutput:
    kl, advantage = torch.tensor(values), torch.tensor(advantages)
    return LossOutput(kl.sum(), {"kl/reverse": kl}, {"kl/advantage": advantage})


def measured() -> dict[str, float]:
    """Rank 0 has math and code, rank 1 math and poetry; with one rank, all of it."""
    sums = MetricSums()
    first = microbatch(("category_code", "category_math", "language_en"), [[1, 2], [0, 2], [1, 2]])
    second = microbatch(("category_math", "category_poetry", "language_de"), [[0, 2], [1, 2]])
    both = dist.get_world_size() == 1
    if both or dist.get_rank() == 0:
        sums.add(output([1.0, 2.0, 3.0], [-1.0, 0.0, 1.0]), first)
        sums.add(output([5.0], [2.0]), microbatch(("category_math", "language_en"), [[0, 1]]))
    if both or dist.get_rank() == 1:
        sums.add(output([7.0, 11.0], [3.0, -99.0]), second)
        sums.add(output([], []), microbatch((), []))
    return sums.mean(num_tokens=6)


def test_groups_have_their_own_means_over_all_ranks() -> None:
    (alone,) = run_on_ranks(1, measured)
    assert alone["kl/reverse"] == pytest.approx(29 / 6)
    assert alone["kl/reverse/category_math"] == pytest.approx((1 + 3 + 5 + 7) / 4)
    assert alone["kl/reverse/category_code"] == 2
    assert alone["kl/reverse/category_poetry"] == 11
    assert alone["kl/reverse/language_en"] == pytest.approx(11 / 4)
    assert alone["kl/reverse/language_de"] == 9
    assert alone["kl/advantage/p05"] == pytest.approx(-20, abs=0.01)  # the bound stands for more
    assert alone["kl/advantage/p50"] == pytest.approx(0, abs=0.01)
    assert alone["kl/advantage/p95"] == pytest.approx(3, abs=0.01)
    check_names(alone)
    for found in run_on_ranks(2, measured):
        assert found == pytest.approx(alone)


def test_names_with_other_endings_are_refused() -> None:
    check_names(["kl/reverse/category_math", "kl/advantage/p95", "moe/max_violation/layer_3"])
    for name in ("kl/reverse/rank_3", "kl/reverse/category_", "kl/unknown/language_en"):
        with pytest.raises(AssertionError, match="does not list"):
            check_names([name])


def responses() -> dict[str, float]:
    def rollout(category: str, language: str, length: int, reason: FinishReason) -> Rollout:
        prompt = Prompt(0, [1], "s", category, language)
        return Rollout(prompt, 0, [5] * length, [-1.0] * length, [[]] * length, reason, 0)

    made = [
        rollout("math", "en", 4, FinishReason.length),
        rollout("math", "de", 1, FinishReason.stop),
        rollout("code", "en", 7, FinishReason.stop),
        rollout("code", "en", 0, FinishReason.stop),
    ]
    return summarize(made[dist.get_rank() :: dist.get_world_size()])


def test_responses_are_described_by_category_and_language() -> None:
    (alone,) = run_on_ranks(1, responses)
    assert alone["rollout/response_length"] == 3
    assert alone["rollout/truncated"] == 0.25
    assert alone["rollout/empty"] == 0.5  # a stop token alone, or nothing at all
    assert alone["rollout/response_length/category_math"] == 2.5
    assert alone["rollout/truncated/category_math"] == 0.5
    assert alone["rollout/empty/language_en"] == pytest.approx(1 / 3)
    assert alone["rollout/response_length/language_de"] == 1
    check_names(alone)
    for found in run_on_ranks(3, responses):
        assert found == pytest.approx(alone)


def texts_of_rank(path: Path) -> dict[str, list[float]]:
    texts = [("en", list(range(9))), ("de", [5, 6]), ("en", list(range(40))), ("en", [7])]
    mine = texts[dist.get_rank() :: dist.get_world_size()]
    found = language_signatures(load_model(path, torch.float32), mine, max_tokens=12)
    return dict(zip(found.languages, found.loads()[:, 0].tolist(), strict=True))


def test_signatures_add_up_over_texts_and_ranks(tmp_path: Path) -> None:
    save_model(random_model(architecture(), torch.float32, seed=0), tmp_path / "model")
    (alone,) = run_on_ranks(1, texts_of_rank, tmp_path / "model")
    top_k = 2  # of `architecture`
    assert {language: sum(load) for language, load in alone.items()} == {
        "de": 2 * top_k,
        "en": 50 * top_k,
    }
    assert run_on_ranks(3, texts_of_rank, tmp_path / "model") == [alone] * 3
