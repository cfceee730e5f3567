"""Scores on disk: found again, checked, bounded."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from marco_train.config.opd import Objective, ScoreCacheConfig
from marco_train.teachers.cache import ScoreCache
from marco_train.types import Rollout, ScoredRollout
from tests.helpers.score_cache import CountingTeacher, cache, rollout, wanted_for


def values(scored: Sequence[ScoredRollout]) -> list[list[torch.Tensor]]:
    return [list(vars(s.scores).values()) for s in scored]


@pytest.mark.parametrize("objective", Objective, ids=lambda objective: objective.value)
def test_a_second_run_asks_no_teacher_and_has_the_same_scores(
    objective: Objective, tmp_path: Path
) -> None:
    asked = [rollout(0), rollout(1, num_response=0), rollout(2), rollout(3, num_response=1)]
    first, teacher = cache(tmp_path, objective)
    found = first.score(asked[:2])
    found += first.score([*asked[:2], *asked[2:]])[2:]
    assert teacher.asked == [[0, 1], [2, 3]]
    assert first.take_counts() == Counter(cache_asked=6, cache_found=2, rejected=1)
    assert first.take_counts() == Counter(rejected=1)

    second, unasked = cache(tmp_path, objective)
    again = second.score(asked[::-1])[::-1]
    assert unasked.asked == []
    assert second.take_counts() == Counter(cache_asked=4, cache_found=4, rejected=1)
    assert [s.rollout for s in again] == asked
    for ours, wanted in zip(values(again), values(found), strict=True):
        for one, other in zip(ours, wanted, strict=True):
            assert one.dtype == other.dtype and torch.equal(one, other)


def test_another_teacher_kind_response_or_set_of_tokens_is_another_entry(tmp_path: Path) -> None:
    first, _ = cache(tmp_path, Objective.topk)
    first.score([rollout(0)])
    same, teacher = cache(tmp_path, Objective.topk)
    same.score([rollout(0)])
    assert teacher.asked == []

    other_tokens = rollout(0)
    other_tokens.topk_ids[1] = [0, 1, 2]
    other_response = rollout(0)
    other_response.response_ids[2] += 1
    for asked in (other_tokens, other_response):
        same.score([asked])
        assert teacher.asked.pop() == [0]
    for changed in (cache(tmp_path, identity="x"), cache(tmp_path, Objective.full)):
        changed[0].score([rollout(0)])
        assert changed[1].asked == [[0]]


def test_the_same_rollout_twice_is_asked_once(tmp_path: Path) -> None:
    found, teacher = cache(tmp_path)
    scored = found.score([rollout(0), rollout(0)])
    assert teacher.asked == [[0]]
    assert torch.equal(values(scored)[0][0], values(scored)[1][0])


@pytest.mark.parametrize("fault", ["a bit", "cut short", "no file", "not its kind"])
def test_what_is_broken_on_disk_is_computed_again(fault: str, tmp_path: Path) -> None:
    first, _ = cache(tmp_path)
    expected = values(first.score([rollout(0)]))[0][0]
    (file,) = tmp_path.glob("*.safetensors")
    opened, teacher = cache(tmp_path)
    content = bytearray(file.read_bytes())
    if fault == "a bit":
        content[-3] ^= 1
        file.write_bytes(content)
    elif fault == "cut short":
        file.write_bytes(content[:-2])
    elif fault == "not its kind":
        file.write_bytes(b"no safetensors at all")
    else:
        file.unlink()
    assert torch.equal(values(opened.score([rollout(0)]))[0][0], expected)
    assert teacher.asked == [[0]]
    broken = opened.take_counts()["cache_corrupt"]
    assert broken == (0 if fault == "no file" else 1)
    later, unasked = cache(tmp_path)  # and what was computed again is found
    assert torch.equal(values(later.score([rollout(0)]))[0][0], expected)
    assert unasked.asked == []


def test_the_oldest_scores_make_room(tmp_path: Path) -> None:
    probe, _ = cache(tmp_path / "probe", Objective.full)
    probe.score([rollout(0)])
    (file,) = (tmp_path / "probe").glob("*.safetensors")
    bound = 3.5 * file.stat().st_size
    bounded, teacher = cache(tmp_path / "bounded", Objective.full, max_gib=bound / 2**30)
    for index in range(6):
        bounded.score([rollout(index)])
        files = (tmp_path / "bounded").glob("*.safetensors")
        assert sum(f.stat().st_size for f in files) <= bound
    teacher.asked.clear()
    bounded.score([rollout(index) for index in range(6)])
    assert teacher.asked == [[0, 1, 2]]
    assert bounded.take_counts()["cache_corrupt"] == 0


def test_scores_of_a_server_with_other_weights_are_not_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, _ = cache(tmp_path)
    first.score([rollout(0)])
    again, unasked = cache(tmp_path, said=(-1.09, -2.0))  # rounded otherwise
    again.score([rollout(0)])
    assert unasked.asked == [] and capsys.readouterr().out == ""
    other, asked = cache(tmp_path, said=(-1.2, -2.0))
    other.score([rollout(0)])
    assert asked.asked == [[0]]
    assert "teacher that answers otherwise under the same name" in capsys.readouterr().out
    for said in ((-1.0, -2.0), (-1.2, -2.0)):  # each finds its own again
        later, unasked = cache(tmp_path, said=said)
        later.score([rollout(0)])
        assert unasked.asked == []


class Forgetful(CountingTeacher):
    """Leaves out every second rollout, and does not know a token of the first."""

    def score(self, rollouts: Sequence[Rollout]) -> list[ScoredRollout]:
        scored = super().score(rollouts)
        scored[0].scores.teacher_logprobs[1] = float("nan")  # type: ignore[union-attr]
        return scored[::2]


def test_what_the_teacher_left_out_is_left_out_and_asked_again(tmp_path: Path) -> None:
    teacher = Forgetful(wanted_for(Objective.sampled))
    teacher.identity = {"weights": "teacher"}
    cfg, wanted = ScoreCacheConfig(path=str(tmp_path), max_gib=1.0), wanted_for(Objective.sampled)
    found = ScoreCache(teacher, wanted, cfg, [], lambda _: True)
    scored = found.score([rollout(index) for index in range(4)])
    assert [s.rollout.prompt.index for s in scored] == [0, 2]
    found.score([rollout(index) for index in range(4)])
    assert teacher.asked == [[0, 1, 2, 3], [0, 1, 3]]
