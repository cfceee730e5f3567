"""Responses that end in a loop are told from those that do not."""

import pytest
import torch

from marco_train.errors import InputError
from marco_train.metrics import check_names
from marco_train.rollout.base import summarize
from marco_train.rollout.loops import ends_in_loop, without_loops
from marco_train.types import FinishReason, Prompt, Rollout, ScoredRollout, TokenScores

STOP = 2
WORDS = list(range(100, 180))  # all different


def cut(ids: list[int], language: str = "en", index: int = 0) -> Rollout:
    """A response that was cut at the limit."""
    prompt = Prompt(index, [1], "s", "c", language)
    return Rollout(prompt, 0, ids, [-1.0] * len(ids), [[]] * len(ids), FinishReason.length, 0)


def stopped(ids: list[int]) -> Rollout:
    prompt, ids = Prompt(0, [1], "s", "c", "en"), [*ids, STOP]
    return Rollout(prompt, 0, ids, [-1.0] * len(ids), [[]] * len(ids), FinishReason.stop, 0)


LOOPS = {
    "one token": [7] * 32,
    "one token after other text": WORDS + [7] * 32,
    "two in turn": WORDS + [7, 8] * 16,
    "twenty, four times": WORDS + list(range(20)) * 4,
    "cut within a repetition": WORDS + list(range(20)) * 4 + [0, 1, 2],
    "with a loop inside": WORDS + [5, 5, 5, 6, 7, 8, 9, 10] * 4,
    "a whole paragraph": list(range(500)) * 4,
}
OTHERS = {
    "nothing": [],
    "one token fewer": WORDS + [7] * 31,
    "twenty, three times": WORDS + list(range(20)) * 3,
    "another token at the end": list(range(20)) * 4 + [0, 1, 2, 99],
    "a loop that was left": [7] * 200 + WORDS[:1],
    "a number that counts": [n for i in range(40) for n in (7, 100 + i)],
    "text": WORDS,
}


@pytest.mark.parametrize("ids", LOOPS.values(), ids=LOOPS.keys())
def test_an_ngram_that_is_repeated_to_the_end_is_a_loop(ids: list[int]) -> None:
    assert ends_in_loop(cut(ids))
    assert ends_in_loop(stopped(ids))


@pytest.mark.parametrize("ids", OTHERS.values(), ids=OTHERS.keys())
def test_other_responses_are_no_loops(ids: list[int]) -> None:
    assert not ends_in_loop(cut(ids))
    assert not ends_in_loop(stopped(ids))


def by_definition(ids: list[int]) -> bool:
    """The same, by trying every n and every beginning of the loop."""
    return any(
        len(tail) >= 32 and len(tail) >= 4 * n and tail[n:] == tail[:-n]
        for start in range(len(ids))
        for tail in [ids[start:]]
        for n in range(1, len(tail) // 4 + 1)
    )


def test_loops_are_those_of_the_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(400):
        size, n, times = torch.randint(1, 13, (3,), generator=generator).tolist()
        before, loop, after = (
            torch.randint(0, 3, (k,), generator=generator).tolist() for k in (size, n, size % 3)
        )
        ids = before + loop * times + after
        found.append(ends_in_loop(cut(ids)))
        assert found[-1] == by_definition(ids), ids
    assert 50 < sum(found) < 350, "both kinds should be there"


def test_the_summary_tells_the_share_of_loops_by_language() -> None:
    found = summarize([cut([7] * 40, "de"), cut(WORDS, "de"), cut(WORDS, "en"), stopped([])])
    assert found["rollout/repetition"] == 0.25
    assert found["rollout/repetition/language_de"] == 0.5
    assert found["rollout/repetition/language_en"] == 0
    check_names(found)


def scored(*rollouts: Rollout) -> list[ScoredRollout]:
    return [ScoredRollout(r, TokenScores(torch.zeros(len(r.response_ids)))) for r in rollouts]


def test_loops_are_left_out_and_counted_where_that_is_asked_for() -> None:
    made = scored(cut(WORDS, index=0), cut([7] * 40, index=1), cut(WORDS, index=2))
    kept, metrics = without_loops(made, 3, are_dropped=True)
    assert [each.rollout.prompt.index for each in kept] == [0, 2]
    assert metrics == {"rollout/dropped_repetitive": 1}
    check_names(metrics)
    assert without_loops(made, 3, are_dropped=False) == (made, {})


def test_a_step_of_loops_alone_ends_the_run_in_a_sentence() -> None:
    with pytest.raises(InputError, match=r"step 3: all 2 responses end in a loop.*resume=<path>"):
        without_loops(scored(cut([7] * 40), cut([7, 8] * 20)), 3, are_dropped=True)
    # Without any score the teacher is at fault, of which the update tells.
    assert without_loops([], 3, are_dropped=True)[0] == []
