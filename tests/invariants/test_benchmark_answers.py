"""A benchmark's answers do not depend on ranks, engines, or what else is asked."""

import json
from pathlib import Path
from typing import Any

import pytest

from marco_train.config import TrainConfig
from marco_train.config.benchmark import BENCHMARK_DIR
from marco_train.stages.benchmark import run_benchmark
from tests.helpers.configs import compose_config
from tests.helpers.fake_sampler import fake_samplers
from tests.helpers.ranks import run_on_ranks
from tests.helpers.vllm_runs import IN_PROCESS
from tests.helpers.world import World


def config(world: World, out: Path, suite: str, *overrides: str) -> TrainConfig:
    return compose_config(
        "benchmark",
        f"model.path={world.path('sft', 'export')}",
        "model.dtype=float32",
        f"stage.suite='{suite}'",
        f"stage.data_dir={BENCHMARK_DIR / 'fixture'}",
        "stage.max_response_length=8",
        "stage.responses_per_prompt=3",
        "stage.identify_languages=false",
        f"output_dir={out}",
        *overrides,
    )


def answers(out: Path) -> dict[tuple[str, str, int], str]:
    found = {}
    for file in out.glob("answers/*.jsonl"):
        for answer in map(json.loads, file.read_text().splitlines()):
            found[file.name.split(".")[0], answer["item"], answer["response"]] = answer["text"]
    return found


def rows(out: Path) -> Any:
    return json.loads((out / "benchmark.json").read_text())["rows"]


@pytest.mark.slow
def test_ranks_share_the_items_and_give_the_report_of_one(world: World, tmp_path: Path) -> None:
    suite = "mmlu,gsm8k,gpqa_diamond"
    for num_ranks in (1, 2, 4):  # of four, some have no item
        out = tmp_path / str(num_ranks)
        run_on_ranks(num_ranks, run_benchmark, config(world, out, suite))
        assert answers(out) == answers(tmp_path / "1")
        assert rows(out) == rows(tmp_path / "1")
    assert {file.name for file in (tmp_path / "2" / "answers").glob("gsm8k.*")} == {
        "gsm8k.0.jsonl",
        "gsm8k.1.jsonl",
    }
    assert len(answers(tmp_path / "1")) == 3 * (3 + 2 + 2)


@pytest.mark.slow
def test_answers_are_the_same_beside_other_tasks(world: World, tmp_path: Path) -> None:
    for name, suite in (("alone", "gsm8k"), ("beside", "mmlu,gsm8k")):
        run_on_ranks(1, run_benchmark, config(world, tmp_path / name, suite))
    alone, beside = answers(tmp_path / "alone"), answers(tmp_path / "beside")
    assert alone == {key: text for key, text in beside.items() if key[0] == "gsm8k"}
    assert len(set(alone.values())) == len(alone)  # each response has a seed of its own


@pytest.mark.slow
def test_questions_that_are_too_long_are_not_asked_and_count_as_wrong(
    world: World, tmp_path: Path
) -> None:
    short = "stage.max_prompt_length=20"
    run_on_ranks(1, run_benchmark, config(world, tmp_path, "gsm8k", short))
    details = json.loads((tmp_path / "details.json").read_text())["GSM8K"]
    assert (details["questions_too_long"], details["mean_tokens"]) == (2, None)
    row = rows(tmp_path)["GSM8K"]
    assert (row["score"], row["extraction_failures"], row["n_samples"]) == (0, 1, 6)


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.long
def test_an_engine_of_vllm_answers_and_goes_on_where_it_was(
    wide_world: World, tmp_path: Path
) -> None:
    cfg = config(wide_world, tmp_path, "gsm8k", *IN_PROCESS)
    run_on_ranks(1, run_benchmark, cfg)
    first = answers(tmp_path)
    assert len(first) == 6 and rows(tmp_path)["GSM8K"]["n_samples"] == 6
    file = tmp_path / "answers" / "gsm8k.0.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:2]))
    run_on_ranks(1, run_benchmark, cfg)
    assert answers(tmp_path) == first


@pytest.mark.slow
def test_servers_answer_as_any_sampler(world: World, tmp_path: Path) -> None:
    with fake_samplers(2) as servers:
        given = [
            "rollout@stage.rollout=vllm_server",
            f"stage.rollout.servers.urls=[{','.join(server.url for server in servers)}]",
            f"stage.rollout.sync_path={tmp_path / 'sync'}",
        ]
        cfg = config(world, tmp_path, "gsm8k", *given)
        run_on_ranks(1, run_benchmark, cfg)
    assert len(answers(tmp_path)) == 6
    assert not list((tmp_path / "sync").glob("*"))  # the weights are gone again
