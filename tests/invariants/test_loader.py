"""Which samples a step draws, and what of the data a checkpoint knows."""

import json
import re
import shutil
from collections import Counter
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import pytest

from marco_train.data.loader import PromptLoader
from marco_train.errors import InputError
from tests.helpers.configs import compose_config
from tests.helpers.ranks import run_on_ranks
from tests.helpers.rows import LOADERS, chat, config, loader_of, turns, write
from tests.helpers.tokenizers import tokenizer_of
from tests.helpers.world import World

GOOD = [json.dumps(chat(f"question {n}")) for n in range(3)]
# Three of four prompts are over the limit, so that some batches of two hold nothing else.
LONG = [json.dumps(chat("far too long " * 60)) for _ in range(15)]
SHORT = [json.dumps(chat(f"short {n}")) for n in range(5)]
SMALL_STEPS = ["stage.global_batch_size=2", "seed=1", "data.max_lost_rows=1"]


def drawn_by_rank(
    world: World, file: Path, num_steps: int, resumed: tuple[int, dict[str, Any]] | None = None
) -> tuple[list[list[int]], list[dict[str, float]], list[dict[str, Any]]]:
    """Indices of the prompts of each step, its metrics, and the state before it."""
    loader = loader_of("opd", world, file, *SMALL_STEPS)
    first = 0
    if resumed is not None:
        first = resumed[0]
        loader.resume(first, json.loads(json.dumps(resumed[1])))
    prompts, metrics, states = [], [], []
    for step in range(first, num_steps):
        states.append(loader.state_at(step))
        prompts.append([prompt.index for prompt in next(loader)])
        metrics.append(loader.metrics())
    return prompts, metrics, states


def test_a_step_without_a_prompt_draws_the_next_ones_on_any_number_of_ranks(
    world: World, tmp_path: Path
) -> None:
    file = write(tmp_path, *LONG, *SHORT)
    prompts, metrics, states = drawn_by_rank(world, file, 12)
    assert all(prompts)
    begins = [state["cursor"] for state in states]
    batches = [(after - before) // 2 for before, after in pairwise(begins)]
    assert min(batches) == 1
    assert max(batches) > 1
    # Every sample is of one step, the prompts of a step are of its last batch, and what was passed
    # over is counted.
    for step, number in enumerate(batches):
        end = begins[step + 1]
        assert all(end - 2 <= index < end for index in prompts[step])
        dropped = metrics[step]["data/dropped_too_long"]
        assert dropped + metrics[step]["data/num_sequences"] == 2 * number
        assert metrics[step]["data/epoch"] == pytest.approx(end / 20)

    of_ranks = run_on_ranks(2, drawn_by_rank, world, file, 12)
    joined = [
        sorted(one + other) for one, other in zip(of_ranks[0][0], of_ranks[1][0], strict=True)
    ]
    assert joined == prompts
    for _, metrics_of_rank, states_of_rank in of_ranks:
        assert metrics_of_rank == metrics
        assert states_of_rank == states

    for step in (3, 7):
        assert drawn_by_rank(world, file, 12, (step, states[step])) == (
            prompts[step:],
            metrics[step:],
            states[step:],
        )


def test_prompts_drawn_ahead_do_not_move_the_cursor_of_a_checkpoint(
    world: World, tmp_path: Path
) -> None:
    file = write(tmp_path, *LONG, *SHORT)
    prompts, _, states = drawn_by_rank(world, file, 12)
    ahead = loader_of("opd", world, file, *SMALL_STEPS)
    next(ahead)
    for step in range(1, 11):
        next(ahead)  # of the step after this one
        # Saved before a step, while it waits for servers, and after it.
        assert [ahead.state_at(step - 1), ahead.state_at(step)] == states[step - 1 : step + 1]
    again = loader_of("opd", world, file, *SMALL_STEPS)
    again.resume(6, states[6])
    assert [prompt.index for prompt in next(again)] == prompts[6]


def epochs_drawn(
    world: World, file: Path, num_epochs: float, resumed: tuple[int, dict[str, Any]] | None = None
) -> tuple[list[list[str]], list[float], list[dict[str, Any]]]:
    """What this rank trains on in each step of so many epochs, its sequences, and the states."""
    epochs = ["stage.num_steps=null", f"stage.num_epochs={num_epochs}"]
    loader = loader_of("sft", world, file, *epochs, "stage.global_batch_size=64")
    first = 0
    if resumed is not None:
        first = resumed[0]
        loader.resume(first, json.loads(json.dumps(resumed[1])))
    tokenizer = tokenizer_of(world.path("data", "tokenizer"))
    trained, numbers, states = [], [], [loader.state_at(first)]
    for step in range(first, loader.num_steps):
        texts = (tokenizer.decode(batch.input_ids[0].tolist()) for batch in next(loader))
        trained.append(re.findall(r"question \d+", "".join(texts)))
        numbers.append(loader.metrics()["data/num_sequences"])
        states.append(loader.state_at(step + 1))
    return trained, numbers, states


def test_a_run_of_epochs_sees_every_row_as_often_on_any_number_of_ranks(
    world: World, tmp_path: Path
) -> None:
    file = write(tmp_path, *(json.dumps(chat(f"question {n}")) for n in range(40)))
    trained, numbers, states = epochs_drawn(world, file, 2)
    assert numbers == [64, 16]
    assert Counter(chain(*trained)) == Counter({f"question {n}": 2 for n in range(40)})
    # Half an epoch is not a whole batch, and the last sample of all may be of one rank alone.
    assert epochs_drawn(world, file, 0.5)[1] == [20]
    assert epochs_drawn(world, file, 1.61)[1] == [64, 1]
    assert epochs_drawn(world, file, 3.2)[1] == [64, 64]
    assert epochs_drawn(world, file, 2, (1, states[1])) == (trained[1:], numbers[1:], states[1:])
    for num_epochs in (2, 1.61):
        one = epochs_drawn(world, file, num_epochs)
        two = run_on_ranks(2, epochs_drawn, world, file, num_epochs)
        for step, expected in enumerate(one[0]):
            assert sorted(two[0][0][step] + two[1][0][step]) == sorted(expected)
        assert [found[1:] for found in two] == [one[1:]] * 2


def test_the_plan_of_a_run_of_epochs_is_what_it_makes(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path, *(json.dumps(chat(f"question {n}")) for n in range(40)))
    loader = loader_of(
        "sft",
        world,
        file,
        *("stage.num_steps=null", "stage.num_epochs=2", "stage.global_batch_size=64"),
    )
    loader.log_plan(loader.num_steps)
    for _ in range(loader.num_steps):
        next(loader)
    loader.log_end()
    said = capsys.readouterr().out
    for when in ("in 2 steps", "made in 2 steps"):
        assert f"source 'text': 40 rows, weight 1, 2 epochs {when}" in said


def test_a_plan_that_goes_beyond_the_epochs_counts_whole_batches_behind_them(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path, *(json.dumps(chat(f"question {n}")) for n in range(40)))
    length = ["stage.num_steps=null", "stage.num_epochs=2", "stage.global_batch_size=64"]
    loader = loader_of("sft", world, file, *length)
    capsys.readouterr()
    for num_steps, num_samples in ((1, 64), (2, 80), (3, 144), (10**15, 64 * 10**15 - 48)):
        loader.log_plan(num_steps)
        said = capsys.readouterr().out
        assert f"{num_samples / 40:.3g} epochs in {num_steps} steps" in said
    next(loader)
    next(loader)
    loader.log_plan(4)  # two batches behind the 80 samples
    assert f"{(80 + 128) / 40:.3g} epochs in 4 steps" in capsys.readouterr().out


ANY_SHARE = ["data.max_bad_rows=1", "data.max_lost_rows=1", "stage.global_batch_size=2"]


@pytest.mark.parametrize("stage", LOADERS)
def test_data_of_which_nothing_can_be_used_are_refused_with_the_counts(
    stage: str, world: World, tmp_path: Path
) -> None:
    file = write(tmp_path, *LONG[:6], "{}", turns())
    loader = loader_of(stage, world, file, *ANY_SHARE)
    with pytest.raises(InputError) as refusal:
        next(loader)
    said = str(refusal.value)
    # In 1,000 samples each of the eight rows has come 125 times.
    assert said.startswith("none of 1000 samples in a row can be used (")
    assert "2 data/dropped_malformed in 'text', drawn 250 times" in said
    limit = "max_length=96" if stage == "sft" else "max_prompt_length=72"
    assert f"6 data/dropped_too_long in 'text' over stage.{limit}, drawn 750 times" in said
    assert "source 'text', row " in said

    both = run_on_ranks(2, refusal_of_rank, stage, world, file)
    assert both[0] == both[1]
    assert both[0].split(";")[:2] == said.split(";")[:2]  # the example is any rank's


def refusal_of_rank(stage: str, world: World, file: Path) -> str:
    loader = loader_of(stage, world, file, *ANY_SHARE)
    try:
        next(loader)
    except InputError as error:
        return str(error)
    raise AssertionError("not refused")


def test_the_one_row_that_can_be_used_is_found_in_a_small_source(
    world: World, tmp_path: Path
) -> None:
    bad, good = tmp_path / "bad.jsonl", tmp_path / "good.jsonl"
    bad.write_text("{}\n" * 3)
    good.write_text(GOOD[0] + "\n")
    any_share = ["data.max_bad_rows=1", "data.max_lost_rows=1", "stage.global_batch_size=1"]
    cfg = compose_config("quickstart_opd", f"root={world.root}", *any_share)
    for source in cfg.data.sources.values():
        source.path = str(bad)
    cfg.data.sources["math"].path = str(good)  # of weight 0.1
    tokenizer = tokenizer_of(world.path("data", "tokenizer"))
    loader = PromptLoader(cfg.data, cfg.stage, tokenizer, cfg.seed)
    for _ in range(20):
        (prompt,) = next(loader)
        assert prompt.source == "math"


CHANGES = {
    "rows": r"rows\.text: ",
    "mixture": r"mixture\.text\.rows: 3 -> 4",
    "tokenizer": "tokenizer: ",
    "template": "template: ",
    "kwargs": "template: ",
}


@pytest.mark.parametrize(("change", "names"), CHANGES.items())
def test_a_resumption_names_what_changed_of_the_data(
    change: str, names: str, world: World, tmp_path: Path
) -> None:
    shutil.copytree(world.path("data", "tokenizer"), tmp_path / "tokenizer")
    template = tmp_path / "tokenizer" / "chat_template.jinja"
    template.write_text("{# verbose #}" + template.read_text())
    file = write(tmp_path, *GOOD)
    cfg = config("opd", world, file)

    def opened(**kwargs: Any) -> PromptLoader:
        tokenizer = tokenizer_of(tmp_path / "tokenizer", **kwargs)
        return PromptLoader(cfg.data, cfg.stage, tokenizer, cfg.seed)

    state = json.loads(json.dumps(opened().state_at(0))) | {"cursor": 24}
    same = opened()
    same.resume(3, state)
    assert same.state_at(3)["cursor"] == 24

    match change:
        case "rows":
            write(tmp_path, *GOOD[:2], GOOD[2].replace("no", "yes"))
        case "mixture":
            write(tmp_path, *GOOD, GOOD[0])
        case "tokenizer":
            meaning = tmp_path / "tokenizer" / "tokenizer.json"
            content = json.loads(meaning.read_text())
            vocabulary = content["model"]["vocab"]
            vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
            meaning.write_text(json.dumps(content))
        case "template":
            template.write_text(template.read_text() + "{# #}")
    loader = opened(verbose=1) if change == "kwargs" else opened()
    with pytest.raises(InputError, match=rf"the data changed since .*{names}") as refusal:
        loader.resume(3, state)
    assert "on_resume.allow=[data]" in str(refusal.value)


def test_a_run_goes_on_with_mended_rows_where_it_may(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path, *GOOD, turns({"role": "user", "content": None}))

    def opened(*more: str) -> Any:
        return loader_of("opd", world, file, "data.on_change=continue", *more)

    state = json.loads(json.dumps(opened().state_at(0))) | {"cursor": 4}
    write(tmp_path, *GOOD, turns({"role": "user", "content": "mended"}))
    mended = opened()
    capsys.readouterr()
    mended.resume(2, state)
    assert mended.state_at(2)["cursor"] == 4
    said = capsys.readouterr().out
    assert "the data changed since the checkpoint was saved (rows.text: " in said
    assert "as data.on_change=continue allows" in said
    write(tmp_path, *GOOD)  # the row at fault is removed
    removed = opened()
    removed.resume(2, state)
    assert "mixture.text.rows: 4 -> 3" in capsys.readouterr().out
    # What is asked of the rows may not change by this, and without it nothing may.
    second = ["+source@data.sources.more=files", f"data.sources.more.path={file}"]
    other = opened(*second, "data.sources.text.weight=0.5")
    with pytest.raises(InputError, match=r"mixture.text.weight: 1.0 -> 0.5"):
        other.resume(2, state)
    with pytest.raises(InputError, match=r"with mended rows .* data.on_change=continue"):
        loader_of("opd", world, file).resume(2, state)


def test_rows_may_be_removed_from_sources_that_weigh_by_their_rows(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.jsonl"
    file = write(tmp_path, *GOOD)
    other.write_text("".join(f"{line}\n" for line in GOOD))
    weights = ["data.sources.text.weight=auto", "data.on_change=continue"]
    more = ["+source@data.sources.more=files", f"data.sources.more.path={other}", *weights]
    state = json.loads(json.dumps(loader_of("opd", world, file, *more).state_at(0)))
    other.write_text(GOOD[0] + "\n")
    loader_of("opd", world, file, *more).resume(0, state)
    assert "mixture.more.rows: 3 -> 1" in capsys.readouterr().out


def test_a_tokenizer_in_another_spelling_is_no_change_of_the_data(
    world: World, tmp_path: Path
) -> None:
    shutil.copytree(world.path("data", "tokenizer"), tmp_path / "tokenizer")
    meaning = tmp_path / "tokenizer" / "tokenizer.json"
    meaning.write_text(json.dumps(json.loads(meaning.read_text()), sort_keys=True, indent=3))
    cfg = config("opd", world, write(tmp_path, *GOOD))
    one, other = (
        PromptLoader(cfg.data, cfg.stage, tokenizer_of(path), cfg.seed)
        for path in (world.path("data", "tokenizer"), tmp_path / "tokenizer")
    )
    other.resume(0, one.state_at(0))


def test_a_checkpoint_that_counted_steps_is_refused(world: World, tmp_path: Path) -> None:
    loader = loader_of("sft", world, write(tmp_path, *GOOD))
    with pytest.raises(InputError, match=r"saved by an earlier version.*start with resume=never"):
        loader.resume(3, {"cursor": 3, "mixture": "0123456789abcdef"})
