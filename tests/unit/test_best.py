"""The best checkpoint by a measure: which it is, that it stays, and what is refused."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from marco_train.checkpoint import BestSoFar, Retention, TrainingState, save_checkpoint
from marco_train.config.compose import read_run
from marco_train.config.resumption import complete_checkpoints, step_of
from marco_train.errors import InputError

LOSS = "eval/cross_entropy"


def noted(values: dict[int, float], *, is_max: bool) -> BestSoFar:
    best = BestSoFar(LOSS, {}, is_max=is_max)
    for step, value in values.items():
        best.note(step, {LOSS: value})
    return best


def test_only_what_is_better_than_ever_is_the_best() -> None:
    values = {10: 3.0, 20: 2.0, 30: 2.0, 40: float("nan"), 50: 2.5, 60: 1.0}
    assert noted(values, is_max=False).steps == [60, 20, 10]
    assert noted(values, is_max=True).steps == [10]
    best = BestSoFar(LOSS, {}, is_max=False)
    assert not best.note(10, {"loss/cross_entropy": 1.0})
    assert best.note(20, {LOSS: 1.0}) and best.value == 1.0
    assert not BestSoFar(None, {}, is_max=False).note(10, {LOSS: 1.0})


def test_a_resumption_knows_the_best_unless_it_was_measured_otherwise() -> None:
    state = json.loads(json.dumps(noted({10: 3.0, 20: 2.0}, is_max=False).state()))
    again = BestSoFar(LOSS, {}, is_max=False)
    assert again.resume(state)
    assert not again.note(30, {LOSS: 2.5})
    assert again.note(40, {LOSS: 1.5}) and again.steps == [40, 20, 10]
    other = BestSoFar(LOSS, {"num_eval_examples": 4}, is_max=False)
    assert not other.resume(state)
    assert other.note(30, {LOSS: 2.5})
    nothing_lost = BestSoFar(None, {}, is_max=False).state()
    assert other.resume(nothing_lost)


def save(directory: Path, step: int, best: Sequence[int]) -> list[int]:
    """Save a checkpoint of a few bytes, and say of which steps there are some now."""
    nothing = TrainingState([], step)
    save_checkpoint(directory, step, nothing, {}, {}, Retention(1, best=best))
    return [step_of(path) for path in complete_checkpoints(directory)]


def test_the_best_stays_until_a_better_one_is_there(tmp_path: Path) -> None:
    assert save(tmp_path, 10, best=[10]) == [10]
    assert save(tmp_path, 20, best=[10]) == [20, 10]
    assert save(tmp_path, 30, best=[10]) == [30, 10]
    assert save(tmp_path, 40, best=[35, 10]) == [40, 10]  # 35 could not be saved
    assert save(tmp_path, 50, best=[50, 35, 10]) == [50]
    assert save(tmp_path, 60, best=[50, 35, 10]) == [60, 50]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["eval_cross_entropy"], "which this run does not measure: did you mean eval/cross_entro"),
        (["eval/reverse_kl"], "It measures eval/cross_entropy; stage.eval_every with"),
        (["eval/cross_entropy", "stage.eval_every=null"], "It measures nothing"),
        (["eval/score"], "which this run does not measure"),
        (["eval/cross_entropy", "checkpoint=none"], "checkpoint.save_every is null"),
        (["null", "checkpoint.best.export=true"], "nothing says which is the best"),
        (["null", "stage.eval_every=null", "stage.eval.suite=card_lite"], "say after how many"),
        (["null", "stage.eval.suite=own"], "no rows are named: give own.path=<file>"),
        (["null", "stage.eval.max_response_length=96"], "leaves a question no room"),
        (["null", "stage.eval.suite=gsm8"], "no suite and no task: did you mean gsm8k"),
        (
            ["null", "stage.eval.suite=fixture", "stage.eval.responses_per_prompt=4"],
            "greedy answers are all the same",
        ),
    ],
)
def test_what_is_not_measured_is_refused(words: list[str], said: str) -> None:
    metric, *more = words
    with pytest.raises(InputError) as refused:
        read_run(["experiment=quickstart_sft", f"checkpoint.best.metric={metric}", *more])
    assert said in str(refused.value)


def test_scores_are_best_where_they_are_largest() -> None:
    words = ["experiment=quickstart_sft", "stage.eval.suite='gsm8k,mmlu'"]
    for metric, is_max in (("eval/score", True), ("eval/score/task_mmlu", True), (LOSS, False)):
        cfg = read_run([*words, f"checkpoint.best.metric={metric}"])
        assert cfg.checkpoint.best.is_max is is_max
    cfg = read_run([*words, f"checkpoint.best.metric={LOSS}", "checkpoint.best.mode=max"])
    assert cfg.checkpoint.best.is_max
