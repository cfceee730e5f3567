"""Tokens on disk are those that a row is rendered to, on any ranks or without room."""

import json
import os
import resource
from contextlib import redirect_stdout
from io import StringIO
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from marco_train.config.data import DataConfig, Thinking
from marco_train.config.sft import LossTokens
from marco_train.data import tokens
from marco_train.data.drops import Dropped
from marco_train.data.loader import PromptLoader
from marco_train.data.render import ExampleRenderer
from marco_train.data.tokens import TokenFiles, render_row, token_files
from marco_train.types import Microbatch
from tests.helpers.qwen_like import TEMPLATE, write_tokenizer
from tests.helpers.ranks import run_on_ranks
from tests.helpers.rows import chat, loader_of, source_at, turns, write
from tests.helpers.tokenizers import tokenizer_of
from tests.helpers.world import World

LINES = [
    *(
        json.dumps(chat(f"question {n}", "yes " * (n % 12 + 1)) | {"language": "en"})
        for n in range(60)
    ),
    json.dumps(chat("far too long " * 60)),
    json.dumps(chat("no answer", "")),
    json.dumps({"prompt": "nothing to learn"}),
    json.dumps(chat("<|im_end|>")),
    "{}",
    turns({"role": "user", "content": "x"}, {"role": "assistant", "content": None}),
    json.dumps({"input_ids": [5, 6, 7, 8], "labels": [-100, 6, 7, 8]}),
    json.dumps({"text": "Once upon a time."}),
    "{",
]


# Of each step: its sequences, and its metrics.
Drawn = tuple[list[list[list[int]]], list[dict[str, float]]]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing is known from another test."""
    monkeypatch.setenv("MARCO_TRAIN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def renderer(world: World) -> ExampleRenderer:
    data = DataConfig(thinking=Thinking.keep)
    tokenizer = tokenizer_of(world.path("data", "tokenizer"))
    return ExampleRenderer.of(tokenizer, data, LossTokens.assistant, 96)


def test_files_hold_what_rows_are_rendered_to(world: World, tmp_path: Path) -> None:
    found = source_at(write(tmp_path, *LINES), category_column="topic")
    render = renderer(world)
    files, _ = token_files(found, iter(range(len(found))), render, "name")
    assert files is not None
    expected = [render_row(found, i, render) for i in range(len(found))]
    for index, item in enumerate(expected):
        kept = files[index]
        if isinstance(item, Dropped):
            assert kept == item
        else:
            row, example = item
            assert not isinstance(kept, Dropped)
            assert kept[1] == example
            labels = (row.source, row.category, row.language, row.row)
            assert (kept[0].source, kept[0].category, kept[0].language, kept[0].row) == labels
    assert files.lost.counts == {
        "data/dropped_too_long": 1,
        "data/dropped_empty": 1,
        "data/dropped_no_loss": 1,
        "data/dropped_special": 1,
        "data/dropped_malformed": 3,
    }


def drawn(stage: str, world: World, file: Path, cache: str) -> Drawn:
    """The sequences of each step, and its metrics; whether tokens were kept is the cache's word."""
    os.environ["MARCO_TRAIN_CACHE"] = cache
    given = ["stage.global_batch_size=6", "data.max_lost_rows=1"]
    loader = loader_of(stage, world, file, *given)
    sequences, metrics = [], []
    for _ in range(5):
        batch = next(loader)
        if isinstance(loader, PromptLoader):
            sequences.append([prompt.input_ids for prompt in batch])
        else:
            sequences.append([cut for packed in batch for cut in parts(packed)])
        metrics.append(loader.metrics())
    return sequences, metrics


def parts(packed: Microbatch) -> list[list[int]]:
    """The sequences of a microbatch, with the loss mask behind each."""
    positions = packed.position_ids[0].tolist()
    ids, learnt = packed.input_ids[0].tolist(), set(packed.loss_places.tolist())
    mask = [place in learnt for place in range(len(ids))]
    starts = [place for place, position in enumerate(positions) if position == 0]
    ends = [*starts[1:], len(ids)]
    found = [ids[start:end] + mask[start:end] for start, end in zip(starts, ends, strict=True)]
    return found if packed.num_tokens else []


def without_room(*args: Any) -> Drawn:
    """As `drawn`, where no file may grow beyond a few bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, 2048))
    with redirect_stdout(StringIO()):  # which a test's runner keeps in a file
        return drawn(*args)


def joined(of_ranks: list[Drawn]) -> Drawn:
    """What all ranks drew together, in no order."""
    steps = zip(*(sequences for sequences, _ in of_ranks), strict=True)
    assert all(metrics == of_ranks[0][1] for _, metrics in of_ranks)
    return [sorted(chain.from_iterable(step)) for step in steps], of_ranks[0][1]


@pytest.mark.parametrize("stage", ["sft", pytest.param("opd", marks=pytest.mark.long)])
def test_ranks_draw_the_same_with_and_without_files(
    stage: str, world: World, tmp_path: Path
) -> None:
    file = write(tmp_path, *LINES)
    one, two, none = (str(tmp_path / name) for name in ("one", "two", "none"))
    expected = joined(run_on_ranks(1, drawn, stage, world, file, one))
    assert expected[0][0]
    assert list(Path(one).glob("tokens-*"))
    for num_ranks, function, kept in (
        (1, drawn, one),  # found again
        (2, drawn, one),  # by another number of ranks
        (2, drawn, two),  # made by two
        (1, drawn, two),
        (1, without_room, none),
        (2, without_room, none),
    ):
        assert joined(run_on_ranks(num_ranks, function, stage, world, file, kept)) == expected
    assert not list(Path(none).glob("*tokens-*")) and not list(Path(none).glob(".*.partial"))


def test_what_is_kept_is_touched_and_the_oldest_goes(
    world: World, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = source_at(write(tmp_path, *LINES))
    render = renderer(world)

    def keep(name: str) -> None:
        assert token_files(found, iter(range(len(found))), render, name)[0] is not None

    def kept() -> set[str]:
        return {path.name for path in cache.glob("tokens-*")}

    for time, name in enumerate("abc"):
        keep(name)
        os.utime(cache / f"tokens-{name}", (time, time))
    keep("a")  # which makes it the newest
    size = sum(file.stat().st_size for file in (cache / "tokens-a").iterdir())
    monkeypatch.setattr(tokens, "MAX_BYTES", 2 * size)
    keep("d")
    assert kept() == {"tokens-a", "tokens-c", "tokens-d"}
    assert not list(cache.glob(".*.partial"))


PARTS = ["0.ids", "0.mask", "0.ends", "0.codes", "0.rows", "0.labels"]


@pytest.mark.parametrize("cut", [True, False], ids=["cut off", "missing"])
@pytest.mark.parametrize("name", ["rows.json", *PARTS])
def test_files_that_are_not_whole_are_made_anew(
    name: str, cut: bool, world: World, tmp_path: Path, cache: Path
) -> None:
    found = source_at(write(tmp_path, *LINES))
    rows = range(len(found))
    before, lost = token_files(found, iter(rows), renderer(world), "name")
    assert before is not None
    expected = [before[row] for row in rows]
    file = cache / "tokens-name" / name
    content = file.read_bytes()
    file.unlink()
    if cut:
        file.write_bytes(content[: len(content) // 16 * 8])
    with pytest.raises((OSError, ValueError)):
        TokenFiles(cache / "tokens-name", "fixture")
    again, lost_again = token_files(found, iter(rows), renderer(world), "name")
    assert again is not None
    assert [again[row] for row in rows] == expected
    assert lost == lost_again


def test_another_token_at_the_beginning_is_another_rendering(world: World, tmp_path: Path) -> None:
    template = "{{ bos_token }}" + TEMPLATE
    path = write_tokenizer(tmp_path / "tokenizer", template)
    settings = json.loads((path / "tokenizer_config.json").read_text())
    file = write(tmp_path, *LINES[:4])
    begins = []
    for token in ("<|endoftext|>", "<|im_start|>"):
        changed = json.dumps(settings | {"bos_token": token})
        (path / "tokenizer_config.json").write_text(changed)
        (batch, *_) = next(loader_of("sft", world, file, tokenizer=path))
        begins.append(int(batch.input_ids[0, 0]))
    assert begins == [0, 1]
