"""A run on data with rows at fault ends well, the same on any ranks and after a resumption."""

import json
from pathlib import Path

import pytest

from marco_train.config import TrainConfig
from marco_train.config.data import SourceConfig
from marco_train.data.loader import held_out_questions
from marco_train.data.stream import ConversationStream
from tests.helpers.configs import compose_config
from tests.helpers.ranks import run_on_ranks
from tests.helpers.runs import losses, overrides, run
from tests.helpers.tokenizers import tokenizer_of
from tests.helpers.world import World

pytestmark = pytest.mark.slow


def rows(tmp_path: Path) -> Path:
    """Of eight rows two are fit; the others are no chats, or too long."""
    found: list[object] = []
    for n in range(4):
        asked = {"role": "user", "content": f"question {n}"}
        too_long = {"role": "user", "content": "far too long " * 60}
        answer = {"role": "assistant", "content": f"answer {n}"}
        found += [
            {"messages": [asked, answer], "language": "en"},
            {"messages": [{"role": "user", "content": None}]},
            {"messages": [too_long, answer]},
            ["no object"],
        ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in found))
    return file


def config(stage: str, world: World, tmp_path: Path, name: str, num_ranks: int) -> TrainConfig:
    given = [
        *overrides(stage, world, tmp_path / name, num_ranks),
        "data=quickstart_text",
        f"data.sources.text.path={rows(tmp_path)}",
        "data.max_tokens_per_microbatch=128",
        "data.max_lost_rows=0.75",
        "stage.global_batch_size=2",
    ]
    if stage == "sft":
        given.append("stage.eval_every=null")
    return compose_config(f"quickstart_{stage}", *given)


@pytest.mark.parametrize("stage", ["sft", "opd"])
def test_rows_at_fault_end_no_run(stage: str, world: World, tmp_path: Path) -> None:
    for name, num_ranks, crash_at in (("whole", 1, None), ("parts", 1, 5), ("two", 2, None)):
        cfg = config(stage, world, tmp_path, name, num_ranks)
        run_on_ranks(num_ranks, run, cfg, stage, crash_at)
        if crash_at is not None:
            run_on_ranks(num_ranks, run, cfg, stage, None)
        assert (tmp_path / name / "finished.json").is_file()
    whole, parts, two = (losses(tmp_path / name) for name in ("whole", "parts", "two"))
    assert [line["step"] for line in whole] == [1, 2, 3, 4, 5, 6]
    assert sum(line["data/dropped_malformed"] for line in whole) > 0
    assert min(line["data/num_sequences"] for line in whole) > 0
    drawn = [
        sum(value for name, value in line.items() if name.startswith("data/dropped_"))
        + line["data/num_sequences"]
        for line in whole
    ]
    assert max(drawn) > min(drawn) == 2  # a step passed over a batch without a row
    assert whole == parts
    exports = [tmp_path / name / "export" / "model.safetensors" for name in ("whole", "parts")]
    assert exports[0].read_bytes() == exports[1].read_bytes()
    of_data = [
        [{k: v for k, v in line.items() if k.startswith("data/")} for line in found]
        for found in (whole, two)
    ]
    assert of_data[0] == of_data[1]


def test_ranks_ask_the_same_questions(world: World, tmp_path: Path) -> None:
    tokenizer = tokenizer_of(world.path("data", "tokenizer"))
    source = ConversationStream({"held_out": SourceConfig(path=str(rows(tmp_path)))}, None, 0)
    found = held_out_questions(source, 16, 64, tokenizer)
    assert len(found) == 4
    assert run_on_ranks(2, held_out_questions, source, 16, 64, tokenizer) == [found, found]
