"""An evaluation that was killed goes on with what is missing, on any number of ranks."""

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
def test_an_evaluation_that_was_killed_goes_on_with_other_ranks(
    world: World, tmp_path: Path
) -> None:
    cfg = evaluation(world, tmp_path)
    run_on_ranks(1, run_evaluate, cfg)
    before, answers_before = report(tmp_path), answers(tmp_path, "sft")
    (tmp_path / "finished.json").unlink()
    questions = checked_questions(cfg, load_tokenizer(cfg.model))
    question_of = {str(question.prompt.index): question for question in questions}

    def asked(answer: dict[str, Any]) -> Question:
        return question_of[answer["item"].rpartition("/")[2]]

    # As if the first three had been answered as their rows are; of the rest 18 are missing.
    file = tmp_path / "sft" / "answers" / "held_out.0.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    assert len(lines) == NUM_QUESTIONS * 4
    known = [json.loads(line) for line in lines[:3]]
    right = [answer | {"text": asked(answer).reference} for answer in known]
    kept = [json.dumps(answer) + "\n" for answer in right] + lines[3:30]
    file.write_text("".join(kept) + lines[30][:20])  # torn
    run_on_ranks(2, run_evaluate, cfg)

    answers_after = answers(tmp_path, "sft")
    assert answers_after == answers_before | {
        (answer["item"], answer["response"]): answer for answer in right
    }
    accepted = [
        verify(answer["text"], asked(answer).reference, asked(answer).verifier)
        for answer in answers_after.values()
    ]
    assert sum(accepted) >= 3
    after = report(tmp_path)
    expected = pytest.approx(100 * sum(accepted) / len(accepted))
    assert after["models"]["sft"]["avg_at_n"]["all"] == expected
    assert after["teachers"] == before["teachers"]
    distances = [found["models"]["sft"]["reverse_kl"] for found in (before, after)]
    assert distances[1] == pytest.approx(distances[0], rel=1e-5)  # summed in another order
