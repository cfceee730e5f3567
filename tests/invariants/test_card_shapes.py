"""Distillation runs on rows as the card's datasets have them."""

import json
from pathlib import Path
from typing import Any

import pytest

from marco_train.config import TrainConfig
from marco_train.config.data import SourceConfig, SourceKind
from marco_train.stages.opd import run_opd
from tests.helpers.card_rows import SHAPES
from tests.helpers.configs import compose_config
from tests.helpers.ranks import run_on_ranks
from tests.helpers.world import World

pytestmark = pytest.mark.slow

NUM_STEPS = 6
OBJECTIVES = {"sampled": [], "full": [], "topk": ["stage.top_k=8"]}


def sources(shapes: dict[str, list[dict[str, Any]]], directory: Path) -> dict[str, SourceConfig]:
    """Each shape as a source of its own, all of one weight."""
    found = {}
    for name, rows in shapes.items():
        file = directory / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        found[name] = SourceConfig(
            kind=SourceKind.jsonl,
            path=str(file),
            category=f"of_{name}",
            weight=1 / len(shapes),
            unique_prompts=name == "dapo",
        )
    return found


def opd_config(
    world: World, tmp_path: Path, objective: str, shapes: dict[str, list[dict[str, Any]]]
) -> TrainConfig:
    """Six updates over both phases, on prompts of these shapes."""
    cfg = compose_config(
        "quickstart_opd",
        f"root={world.root}",
        f"output_dir={tmp_path / 'run'}",
        f"stage.objective={objective}",
        *OBJECTIVES[objective],
        "stage.global_batch_size=20",
        "stage.responses_per_prompt=1",
        "stage.max_prompt_length=160",
        "stage.max_response_length=6",
        "stage.cascade.first.num_steps=4",
        "stage.cascade.second.num_steps=2",
        "parallel.expert_parallel_size=1",
        "optim.warmup_steps=0",
        "checkpoint.save_every=null",
    )
    cfg.data.sources = sources(shapes, tmp_path)
    return cfg


def logged(tmp_path: Path) -> list[dict[str, float]]:
    return [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_distillation_runs_on_rows_of_every_shape_of_the_card(
    num_ranks: int, objective: str, world: World, tmp_path: Path
) -> None:
    cfg = opd_config(world, tmp_path, objective, SHAPES)
    run_on_ranks(num_ranks, run_opd, cfg)
    lines = logged(tmp_path)
    assert [line["step"] for line in lines] == list(range(1, NUM_STEPS + 1))
    assert (tmp_path / "run" / "finished.json").is_file()
    assert sum(line["data/num_sequences"] for line in lines) == NUM_STEPS * 20  # none was dropped
    grouped = {name for line in lines for name in line if name.startswith("kl/reverse/")}
    # A category of a row's own names no group: the source's does.
    assert grouped == {f"kl/reverse/category_of_{name}" for name in SHAPES}
    assert not any("language" in name for line in lines for name in line)


@pytest.mark.parametrize("shape", ["rlhf", "dapo", "multilingual"])
def test_distillation_runs_on_rows_of_one_shape(shape: str, world: World, tmp_path: Path) -> None:
    cfg = opd_config(world, tmp_path, "sampled", {shape: SHAPES[shape]})
    run_on_ranks(1, run_opd, cfg)
    assert [line["step"] for line in logged(tmp_path)] == list(range(1, NUM_STEPS + 1))
