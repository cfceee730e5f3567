"""Answers on disk: what a later launch finds of them."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from marco_train.errors import InputError
from marco_train.evaluation.benchmark.store import Answer, AnswerStore, digest_of

MADE_BY = {"model": {"model.safetensors": [1, 2]}, "seed": 0}
ANSWER = Answer("en/x/test/0", 3, digest_of("2 + 2 = ?"), "4\n\u2028", 2, "stop")


def opened(directory: Path, *, anew: bool = False, **changes: object) -> AnswerStore:
    return AnswerStore(directory, MADE_BY | changes, anew=anew)


def test_answers_of_any_number_of_ranks_are_found_again(tmp_path: Path) -> None:
    store = opened(tmp_path)
    store.append("mmlu", ANSWER)
    store.append("mgsm", replace(ANSWER, response=1))
    other = tmp_path / "answers" / "mmlu.7.jsonl"
    other.write_text(json.dumps(vars(replace(ANSWER, response=5))) + "\n")
    found = opened(tmp_path).read("mmlu")
    assert found == {(ANSWER.item, n, ANSWER.prompt): replace(ANSWER, response=n) for n in (3, 5)}


def test_a_torn_line_is_left_out_and_does_not_spoil_the_next(tmp_path: Path) -> None:
    store = opened(tmp_path)
    store.append("mmlu", ANSWER)
    store.close()
    file = tmp_path / "answers" / "mmlu.0.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole + whole[:-9])
    again = opened(tmp_path)
    again.append("mmlu", replace(ANSWER, response=4))
    assert [key[1] for key in again.read("mmlu")] == [3, 4]


def test_answers_of_another_model_or_seed_are_not_mixed_in(tmp_path: Path) -> None:
    opened(tmp_path).append("mmlu", ANSWER)
    with pytest.raises(InputError, match=r"made \(then -> now\): seed: 0 -> 1; choose another out"):
        opened(tmp_path, seed=1)
    with pytest.raises(InputError, match=r"model.model.safetensors: \[1, 2\] -> \[1, 3\]"):
        opened(tmp_path, model={"model.safetensors": [1, 3]})
    assert opened(tmp_path, anew=True, seed=1).read("mmlu") == {}


def test_an_answer_counts_for_the_question_that_was_asked_alone(tmp_path: Path) -> None:
    opened(tmp_path).append("mmlu", ANSWER)
    found = opened(tmp_path).read("mmlu")
    assert (ANSWER.item, 3, digest_of("2 + 2 = ?")) in found
    assert (ANSWER.item, 3, digest_of("2 + 3 = ?")) not in found
