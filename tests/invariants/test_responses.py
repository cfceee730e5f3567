"""What a run tells of its responses, and which it leaves out."""

from pathlib import Path
from typing import Any

import pytest

from marco_train.rollout import base, loops
from marco_train.stages import opd
from marco_train.types import Rollout
from tests.helpers.configs import compose_config
from tests.helpers.ranks import run_on_ranks
from tests.helpers.runs import losses, overrides, run
from tests.helpers.world import World

pytestmark = pytest.mark.slow


def is_odd(rollout: Rollout) -> bool:
    """Stands for a loop, which a student of random weights does not make in so few tokens."""
    return rollout.prompt.index % 2 == 1


def first_step(world: World, out: Path, num_ranks: int, *more: str) -> dict[str, float]:
    given = [*overrides("opd", world, out, 1), "stage.max_steps=1", *more]
    run_on_ranks(num_ranks, run, compose_config("quickstart_opd", *given), "opd", None)
    return losses(out)[0]


def test_what_is_left_out_has_no_loss_and_is_counted(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loops, "ends_in_loop", is_odd)
    monkeypatch.setattr(base, "ends_in_loop", is_odd)
    all_learnt = first_step(world, tmp_path / "all", 1)
    dropped = first_step(world, tmp_path / "one", 1, "stage.drop_repetitive=true")
    assert "rollout/dropped_repetitive" not in all_learnt
    assert all_learnt["rollout/repetition"] == dropped["rollout/repetition"] == 0.5
    assert dropped["rollout/dropped_repetitive"] == 6  # two responses to three of six prompts
    # Both have the same responses, of which the odd ones have no loss.
    assert dropped["rollout/response_length"] == all_learnt["rollout/response_length"]
    assert 0 < dropped["data/num_loss_tokens"] < all_learnt["data/num_loss_tokens"]
    # One of two ranks has nothing else than odd prompts, and takes part with none.
    on_two = first_step(world, tmp_path / "two", 2, "stage.drop_repetitive=true")
    assert on_two == pytest.approx(dropped, rel=1e-4, abs=1e-5)


def test_a_run_ends_where_all_is_left_out(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loops, "ends_in_loop", lambda _: True)
    with pytest.raises(AssertionError, match=r"step 0: all 12 responses end in a loop"):
        first_step(world, tmp_path / "none", 2, "stage.drop_repetitive=true")


class JudgeOfOdd:
    """Knows the language of the answers to odd prompts, of which none matches."""

    def __init__(self, _: Any, languages: set[str]) -> None:
        assert languages == {"en"}

    def __call__(self, rollout: Rollout) -> bool | None:
        return False if is_odd(rollout) else None


def test_a_run_tells_which_responses_are_in_the_language_of_their_prompts(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opd, "LanguageJudge", JudgeOfOdd)
    for num_ranks in (1, 2):
        out = tmp_path / str(num_ranks)
        found = first_step(world, out, num_ranks, "stage.identify_languages=true")
        assert found["rollout/lang_judged"] == 0.5
        assert found["rollout/lang_match"] == found["rollout/lang_match/language_en"] == 0
    silent = first_step(world, tmp_path / "silent", 1)
    assert not any("lang_" in name for name in silent)
