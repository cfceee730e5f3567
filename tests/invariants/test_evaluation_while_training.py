"""What a run measures of its model meanwhile, and the checkpoint that it keeps as the best."""

import json
from pathlib import Path
from typing import Any

import pytest

from marco_train.config import TrainConfig
from marco_train.stages.benchmark import run_benchmark
from tests.helpers.configs import compose_config
from tests.helpers.ranks import run_on_ranks
from tests.helpers.runs import losses, overrides, run
from tests.helpers.world import World

pytestmark = pytest.mark.slow


def own_rows(tmp_path: Path) -> list[str]:
    """Questions that the world's models have tokens for."""
    file = tmp_path / "own.jsonl"
    rows = [{"question": f"test math {n}?", "answer": n} for n in ("one", "two", "three")]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [f"own.path={file}", "own.verifier=exact"]


def config(stage: str, world: World, tmp_path: Path, name: str, *more: str) -> TrainConfig:
    given = [
        *overrides(stage, world, tmp_path / name, 1),
        "stage.eval_every=2",
        "stage.num_eval_examples=8",
        "stage.eval.suite=own",
        *(f"stage.eval.{each}" for each in own_rows(tmp_path)),
        f"stage.{'eval.' if stage == 'sft' else ''}max_response_length=8",
        "checkpoint.save_every=3",
        "checkpoint.keep_last=1",
    ]
    return compose_config(f"quickstart_{stage}", *given, *more)


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def steps_there(out: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step_")) for path in out.glob("checkpoints/step_*"))


NUM_RANKS = {"sft": 1, "opd": 2}
LOSS = {"sft": "eval/cross_entropy", "opd": "eval/reverse_kl"}


@pytest.mark.parametrize("stage", LOSS)
def test_a_run_scores_its_suite_as_the_benchmark_scores_its_export(
    stage: str, world: World, tmp_path: Path
) -> None:
    # Weights that are an update older answer otherwise.
    rate = ["optim.learning_rate=0.05", "optim.min_learning_rate=0.05", "optim.schedule=constant"]
    cfg = config(stage, world, tmp_path, "run", *rate)
    run_on_ranks(NUM_RANKS[stage], run, cfg, stage, None)
    out = tmp_path / "run"
    measured = [line for line in lines(out / "metrics.jsonl") if "eval/score" in line]
    assert [line["step"] for line in measured] == [2, 4, 6]
    assert all(line["eval/score"] == line["eval/score/task_own"] for line in measured)
    assert all(line[LOSS[stage]] > 0 for line in measured)
    answers = [each for each in lines(out / "samples.jsonl") if "reference" in each]
    assert [each["step"] for each in answers] == [2] * 3 + [4] * 3 + [6] * 3
    assert {each["reference"] for each in answers} == {"one", "two", "three"}

    benchmark = compose_config(
        "benchmark",
        f"model.path={out / 'export'}",
        "model.dtype=float32",
        "stage.suite=own",
        *(f"stage.{each}" for each in own_rows(tmp_path)),
        "stage.greedy=true",
        "stage.max_response_length=8",
        f"output_dir={tmp_path / 'benchmark'}",
    )
    run_on_ranks(1, run_benchmark, benchmark)
    row = json.loads((tmp_path / "benchmark" / "benchmark.json").read_text())["rows"]["own"]
    assert row["score"] == round(measured[-1]["eval/score"], 4)
    asked = lines(tmp_path / "benchmark" / "answers" / "own.0.jsonl")
    texts = {each["item"]: each["text"] for each in asked}
    assert [texts[f"und/own/{n}"] for n in range(3)] == [e["tokens"][0] for e in answers[-3:]]


@pytest.mark.long
def test_a_measure_changes_nothing_of_what_is_learnt_also_over_a_resumption(
    world: World, tmp_path: Path
) -> None:
    plain = ["stage.eval_every=null", "stage.eval.suite=null"]
    run_on_ranks(1, run, config("opd", world, tmp_path, "plain", *plain), "opd", None)
    for crash_at in (5, None):
        run_on_ranks(1, run, config("opd", world, tmp_path, "measured"), "opd", crash_at)
    found, wanted = (losses(tmp_path / name) for name in ("measured", "plain"))
    without = [{k: v for k, v in line.items() if not k.startswith("eval/")} for line in found]
    assert without == wanted
    files = [tmp_path / name / "export" / "model.safetensors" for name in ("measured", "plain")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_the_best_checkpoint_stays_is_exported_and_is_known_after_a_resumption(
    world: World, tmp_path: Path
) -> None:
    # A rate at which the loss falls, and rises again at the end, after the resumption.
    more = ["checkpoint.best.metric=eval/cross_entropy", "checkpoint.best.export=true"]
    more += ["stage.eval.suite=null", "stage.eval_every=1", "checkpoint.save_every=1"]
    more += ["optim.learning_rate=0.05", "optim.min_learning_rate=0.05", "stage.num_steps=6"]
    more += ["optim.schedule=constant"]
    out = tmp_path / "run"
    run_on_ranks(1, run, config("sft", world, tmp_path, "run", *more), "sft", 5)
    run_on_ranks(1, run, config("sft", world, tmp_path, "run", *more), "sft", None)
    values = {line["step"]: line["eval/cross_entropy"] for line in lines(out / "metrics.jsonl")}
    best = min(values, key=lambda step: values[step])
    assert 1 < best < 6, values
    assert steps_there(out) == [best, 6]
    state = json.loads((out / "checkpoints" / "step_000006" / "state.json").read_text())
    assert state["best"]["found"][-1] == [best, values[best]]
    whole = config("sft", world, tmp_path, "whole", *more, f"stage.max_steps={best}")
    run_on_ranks(1, run, whole, "sft", None)
    exported = [out / "export-best", tmp_path / "whole" / "export"]
    files = [(path / "model.safetensors").read_bytes() for path in exported]
    assert files[0] == files[1]
    assert (out / "export" / "model.safetensors").read_bytes() != files[0]
