"""What a run says of itself before its first step."""

import json
from pathlib import Path

import pytest

from marco_train.models.weights import meta_model
from marco_train.stages.header import amount, header_lines, header_of, say_header
from tests.helpers.models import DENSE, architecture
from tests.helpers.rows import chat, config, loader_of, write
from tests.helpers.world import World

ROWS = [
    json.dumps(chat("one?", "two")),
    json.dumps(chat("three?", "four")),
    json.dumps(chat("long? " * 80)),
    "no row",
]
LOST = {"data/dropped_malformed": 1, "data/dropped_too_long": 1}
BATCH = ["stage.global_batch_size=3", "data.max_lost_rows=0.6"]


def test_a_header_counts_rows_samples_and_tokens(world: World, tmp_path: Path) -> None:
    loader = loader_of("sft", world, write(tmp_path, *ROWS), *BATCH)
    found = loader.header(4)
    assert (found["rows"], found["rows_judged"], found["rows_lost"]) == (4, 4, LOST)
    assert (found["num_steps"], found["samples"], found["epochs"]) == (4, 12, 3.0)
    lengths = [len(loader._render(loader._stream.sources["text"][n]).input_ids) for n in (0, 1)]
    assert found["tokens"] == 12 * sum(lengths) / 2
    assert found["example"].count("»") == 1
    assert "»two<|im_end|>«" in found["example"] or "»four<|im_end|>«" in found["example"]


def test_a_header_counts_the_parameters_that_a_token_meets(world: World, tmp_path: Path) -> None:
    cfg = config("sft", world, write(tmp_path, *ROWS), *BATCH)
    moe, dense = architecture(), architecture(**DENSE)
    found = header_of(cfg, moe, {}, 4, None)
    total = sum(parameter.numel() for parameter in meta_model(moe).parameters())
    one_expert = 3 * moe.hidden_size * 16
    assert found["parameters"] == total
    assert found["active_parameters"] == total - 2 * (8 - 2) * one_expert
    found = header_of(cfg, dense, {}, 4, None)
    assert found["active_parameters"] == found["parameters"]


def test_a_header_is_a_few_lines_and_a_file(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path, *ROWS)
    cfg = config("sft", world, file, *BATCH, f"output_dir={tmp_path}", "optim.warmup_steps=2")
    data = loader_of("sft", world, file, *BATCH).header(4)
    capsys.readouterr()
    say_header(cfg, architecture(), data, 4, 0.0123)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:-1] == [
        f"quickstart_sft: sft in {tmp_path}",
        "  model      41.7 k parameters, 23.2 k active, 2 of 8 experts a token, float32",
        "  ranks      1, experts over 2, ZeRO 1, 0.012 GiB a rank by plan",
        "  data       4 rows: 2 kept, 1 data/dropped_malformed, 1 data/dropped_too_long",
        "  steps      4 of 3 conversations, at most 96 tokens",
        f"  in all     12 samples, 3 epochs, about {data['tokens']} tokens",
        "  learning   cross-entropy of assistant tokens; learning rate 0.004 to 0.0004 (cosine), "
        "warm-up of 2 steps",
    ]
    assert lines[-1].startswith("  example    <|im_start|>user⏎")
    kept = json.loads((tmp_path / "header.json").read_text())
    assert (kept["parameters"], kept["rows_lost"], kept["plan_gib"]) == (41_664, LOST, 0.012)


def test_a_header_counts_the_steps_of_a_warm_up_that_is_given_as_a_share(
    world: World, tmp_path: Path
) -> None:
    share = ["optim.warmup_steps=0", "optim.warmup_share=0.1"]
    cfg = config("sft", world, write(tmp_path, *ROWS), *BATCH, *share)
    found = header_of(cfg, architecture(), {}, 37, None)["optimizer"]
    assert found == "learning rate 0.004 to 0.0004 (cosine), warm-up of 4 steps"
    assert cfg.optim.rate_at(2, 37) == cfg.optim.learning_rate * 3 / 4  # as the schedule has it


def test_the_header_of_a_distillation_names_its_phases(world: World, tmp_path: Path) -> None:
    phases = ["stage.cascade.first.num_steps=5", "stage.cascade.second.num_steps=3"]
    file = write(tmp_path, *ROWS[:2])
    cfg = config("opd", world, file, *BATCH, *phases, "stage.max_steps=4")
    data = loader_of("opd", world, file, *BATCH).header(7)
    lines = header_lines(header_of(cfg, architecture(**DENSE), data, 4, None))
    expected = (
        "  steps      7 (first 4, then second 3) of 3 prompts x 2 responses, at most prompts of "
    )
    assert lines[4] == expected + "72 tokens, responses of 24"
    assert lines[-1].endswith("<|im_start|>assistant⏎»…«")


def test_an_example_moves_no_cursor_of_a_terminal(world: World, tmp_path: Path) -> None:
    file = write(tmp_path, json.dumps(chat("one?", "\x1b[2J\u202etwo" + "x" * 9)))
    cfg = config("sft", world, file, *BATCH)
    data = loader_of("sft", world, file, *BATCH).header(4)
    last = header_lines(header_of(cfg, architecture(), data, 4, None))[-1]
    assert last.isprintable() and "[2J" in last


@pytest.mark.parametrize(
    ("count", "written"),
    [(17_300_000_000, "17.3 B"), (420_000, "420 k"), (8_000_000, "8 M"), (999, "999")],
)
def test_a_large_number_is_short(count: int, written: str) -> None:
    assert amount(count) == written
