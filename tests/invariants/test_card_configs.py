"""The configs of the card's data run on rows with the columns of its datasets, in both stages."""

import json
from pathlib import Path

import pytest

from marco_train.config import TrainConfig
from marco_train.stages.opd import run_opd
from marco_train.stages.sft import run_sft
from tests.helpers.card_rows import OPD, SFT, SHAPES, dolci_tools
from tests.helpers.configs import compose_config
from tests.helpers.ranks import run_on_ranks
from tests.helpers.rows import loader_of
from tests.helpers.tokenizers import tokenizer_of
from tests.helpers.world import World

pytestmark = pytest.mark.slow


def on_files(cfg: TrainConfig, shapes: dict[str, str], directory: Path) -> TrainConfig:
    """Put files of rows where the sets of the hub would be."""
    assert cfg.data.sources.keys() == shapes.keys()
    for name, shape in shapes.items():
        file = directory / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in SHAPES[shape]))
        source = cfg.data.sources[name]
        source.path, source.kind = str(file), type(source.kind)["jsonl"]
    return cfg


def common(world: World, directory: Path) -> list[str]:
    """Overrides of both stages."""
    run = ["parallel=one_rank", "checkpoint=none", "stage.global_batch_size=20"]
    return [f"root={world.root}", f"output_dir={directory / 'run'}", *run]


def logged(directory: Path) -> list[dict[str, float]]:
    lines = (directory / "run" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_fine_tuning_runs_on_the_cards_data(world: World, tmp_path: Path) -> None:
    cfg = compose_config(
        "quickstart_sft",
        "data=marco_sft",
        *common(world, tmp_path),
        "stage.max_length=256",
        "stage.num_steps=6",
        "stage.eval_every=null",
    )
    run_on_ranks(1, run_sft, on_files(cfg, SFT, tmp_path))
    lines = logged(tmp_path)
    assert sum(line["data/num_sequences"] for line in lines) == 6 * 20  # none was dropped
    shares = {name for name in lines[-1] if name.startswith("data/share/source_")}
    assert shares == {f"data/share/source_{name}" for name in SFT}
    assert not (tmp_path / "run" / "quarantine.jsonl").exists()


def test_distillation_runs_on_the_cards_data(world: World, tmp_path: Path) -> None:
    cfg = compose_config(
        "quickstart_opd",
        "data=marco_opd",
        *common(world, tmp_path),
        "stage.responses_per_prompt=1",
        "stage.max_prompt_length=160",
        "stage.max_response_length=6",
        "stage.cascade.first.num_steps=2",
        "stage.cascade.second.num_steps=2",
        "optim.warmup_steps=0",
    )
    run_on_ranks(1, run_opd, on_files(cfg, OPD, tmp_path))
    lines = logged(tmp_path)
    assert sum(line["data/num_sequences"] for line in lines) == 4 * 20  # none was dropped
    # Categories are the config's, whatever a row's own column says.
    groups = {name.split("category_")[1] for name in lines[-1] if "share/category_" in name}
    assert groups == {
        "instruction_following",
        "knowledge_reasoning",
        "alignment",
        "math",
        "multilingual",
    }


def test_rows_that_call_functions_are_rendered_with_them(world: World, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(dolci_tools(n)) + "\n" for n in range(4)))
    loader = loader_of("sft", world, file, "stage.max_length=1024", "stage.global_batch_size=4")
    (batch,) = next(loader)
    assert loader.metrics()["data/num_sequences"] == 4
    text = tokenizer_of(world.path("data", "tokenizer")).decode(batch.targets[batch.loss_places])
    assert text.count('<tool_call>\n{"name": "weather", "arguments": {"city": "') == 4
    assert text.count("It is 20 degrees.<|im_end|>") == 4
    assert "You may call" not in text


SETS = [
    "dolci_instruct",
    "nemotron_cascade_2",
    "nemotron_if",
    "nemotron_structured_outputs",
    "reasoning_gym",
    "nemotron_mcqa",
    "nemotron_rlhf",
    "dapo_math",
    "skywork_math",
    "nemotron_multilingual",
]

# The sources beside it.
OTHERS = ["math", "multilingual", "alignment", "instruction_following", "knowledge_reasoning"]


@pytest.mark.parametrize("name", SETS)
def test_each_set_is_a_source_by_its_name(name: str) -> None:
    cfg = compose_config(
        "quickstart_sft",
        f"+source@data.sources.mine={name}",
        "data.sources.mine.weight=0.5",
        *(["data.sources.mine.subset=math"] if name == "nemotron_cascade_2" else []),
        *(f"data.sources.{other}.weight=0.1" for other in OTHERS),
    )
    mine = cfg.data.sources["mine"]
    assert mine.kind.value == "hub"
    assert mine.unique_prompts is (name == "dapo_math")
