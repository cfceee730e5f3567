"""An evaluation says the same on any number of ranks, and where it was killed and goes on."""

import json
from pathlib import Path
from typing import Any

import pytest

from marco_train.config import TrainConfig
from marco_train.data.chat import load_tokenizer
from marco_train.data.loader import Question
from marco_train.evaluation.answers import checked_questions
from marco_train.evaluation.verifiers import verify
from marco_train.stages.evaluate import run_evaluate
from tests.helpers.configs import compose_config
from tests.helpers.ranks import run_on_ranks
from tests.helpers.world import World

NUM_QUESTIONS = 12


def evaluation(world: World, out: Path) -> TrainConfig:
    return compose_config(
        "quickstart_evaluate",
        f"root={world.root}",
        f"output_dir={out}",
        *("~stage.models.opd_first", "~stage.models.opd_second"),
        *(f"stage.num_prompts={NUM_QUESTIONS}", "stage.responses_per_prompt=4"),
        *("stage.num_kl_responses=2", "stage.max_response_length=8"),
    )


def report(out: Path) -> dict[str, Any]:
    return dict(json.loads((out / "evaluation.json").read_text()))


def answers(out: Path, model: str) -> dict[tuple[str, int], dict[str, Any]]:
    files = (out / model / "answers").glob("held_out.*.jsonl")
    lines = [line for file in files for line in file.read_text().splitlines()]
    found = [json.loads(line) for line in lines if line.endswith("}")]  # but for torn ones
    return {(answer["item"], answer["response"]): answer for answer in found}


@pytest.mark.slow
def test_an_evaluation_is_the_same_on_two_ranks_and_after_a_kill(
    world: World, tmp_path: Path
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    cfg = evaluation(world, one)
    run_on_ranks(1, run_evaluate, cfg)
    run_on_ranks(2, run_evaluate, evaluation(world, two))
    before = report(one)
    for model in ("sft", "first", "second"):
        assert len(answers(one, model)) == NUM_QUESTIONS * 4
        assert answers(one, model) == answers(two, model)

    file = one / "sft" / "answers" / "held_out.0.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    questions = checked_questions(cfg, load_tokenizer(cfg.model))
    question_of = {str(question.prompt.index): question for question in questions}

    def asked(answer: dict[str, Any]) -> Question:
        return question_of[answer["item"].rpartition("/")[2]]

    # As if the first three had been answered as their rows are; of the rest 18 are missing.
    known = [json.loads(line) for line in lines[:3]]
    kept = [json.dumps(answer | {"text": asked(answer).reference}) + "\n" for answer in known]
    file.write_text("".join([*kept, *lines[3:30]]) + lines[30][:20])  # torn
    (one / "finished.json").unlink()
    run_on_ranks(1, run_evaluate, cfg)
    assert len(file.read_text().splitlines()) == 30 + 1 + 18
    after = report(one)["models"]["sft"]
    right = [
        verify(answer["text"], asked(answer).reference, asked(answer).verifier)
        for answer in answers(one, "sft").values()
    ]
    assert sum(right) >= 3
    assert after["avg_at_n"]["all"] == pytest.approx(100 * sum(right) / (NUM_QUESTIONS * 4))
    assert after["reverse_kl"] == before["models"]["sft"]["reverse_kl"]

    for kind in ("models", "teachers"):
        for name, found in report(two)[kind].items():
            assert found.pop("reverse_kl", {}) == pytest.approx(
                before[kind][name].pop("reverse_kl", {}), rel=1e-5
            )
            assert found == before[kind][name]
