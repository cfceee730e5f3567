"""What a run draws from its sources: weights by rows, budgets, and how far it has come."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from marco_train.config.data import DataConfig, SourceConfig, SourceKind
from marco_train.config.stage import steps_of
from marco_train.data.loader import PromptLoader, SFTLoader
from marco_train.data.stream import ConversationStream
from marco_train.errors import InputError
from marco_train.metrics import Metrics, check_names
from marco_train.types import Conversation
from tests.helpers.configs import compose_config
from tests.helpers.ranks import run_on_ranks
from tests.helpers.tokenizers import tokenizer_of
from tests.helpers.world import World


def sources(directory: Path, **given: tuple[int, float | str]) -> dict[str, SourceConfig]:
    """Sources of so many rows and such a weight."""
    found = {}
    for name, (num_rows, weight) in given.items():
        rows = [{"prompt": f"{name} {n}"} for n in range(num_rows)]
        file = directory / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        found[name] = SourceConfig(
            kind=SourceKind.jsonl, path=str(file), category="c", weight=weight
        )
    return found


def drawn(stream: ConversationStream, count: int) -> Counter[str]:
    conversations = [stream[index] for index in range(count)]
    assert all(isinstance(found, Conversation) for found in conversations)
    return Counter(found.source for found in conversations)


def test_a_source_of_weight_auto_counts_as_many_times_as_it_has_rows(tmp_path: Path) -> None:
    given = sources(tmp_path, a=(60, "auto"), b=(20, "auto"), c=(7, 0.2))
    assert drawn(ConversationStream(given, None, 0), 5000) == {"a": 3000, "b": 1000, "c": 1000}


def test_repeated_prompts_that_are_left_out_do_not_count(tmp_path: Path) -> None:
    given = sources(tmp_path, a=(60, "auto"), b=(20, "auto"))
    Path(given["a"].path).write_text('{"prompt": "one"}\n{"prompt": "two"}\n' * 30)
    given["a"].unique_prompts = True
    assert drawn(ConversationStream(given, None, 0), 11_000) == {"a": 1000, "b": 10_000}


def test_a_budget_is_shared_by_all_rows_and_then_cut(tmp_path: Path) -> None:
    given = sources(tmp_path, a=(60, "auto"), b=(20, "auto"), c=(7, 0.2))
    stream = ConversationStream(given, 20, 0)
    # 0.6, 0.2 and 0.2 of 20 rows; the shares of the samples are the same as of all rows.
    assert {name: rows["rows"] for name, rows in stream.identity()["mixture"].items()} == {
        "a": 12,
        "b": 4,
        "c": 4,
    }
    assert drawn(stream, 5000) == {"a": 3000, "b": 1000, "c": 1000}
    rows = [stream[index] for index in range(1000)]
    found = {row.messages[0].content for row in rows if isinstance(row, Conversation)}
    assert {text for text in found if text[0] == "b"} == {"b 0", "b 1", "b 2", "b 3"}


def test_a_checkpoint_knows_small_weights_from_each_other(tmp_path: Path) -> None:
    one, other = (
        ConversationStream(sources(tmp_path, a=(9, 1 - small), b=(9, small)), None, 0).identity()
        for small in (0.0004, 0.0003)
    )
    assert one["mixture"]["b"] == {"rows": 9, "weight": 0.0004}
    assert other["mixture"]["b"] == {"rows": 9, "weight": 0.0003}


@pytest.mark.parametrize(
    ("weights", "says"),
    [
        ((0.5, 0.4), "the weights of data.sources sum to 0.9, and must sum to 1"),
        ((1, "auto"), "sum to 1, and must sum to less than 1: sources of weight auto get the rest"),
        ((1.2, "auto"), "sum to 1.2, and must sum to less than 1"),
        ((0.5, "0.5"), "weight is '0.5', and must be a share above 0, or auto"),
        ((0.5, -1), "weight is -1, and must be greater than 0"),
        ((0.5, float("nan")), "weight is nan"),
    ],
)
def test_weights_that_leave_no_share_are_refused(
    weights: tuple[float | str, float | str], says: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError) as refusal:
        DataConfig(sources=sources(tmp_path, a=(1, weights[0]), b=(1, weights[1])))
    assert says in str(refusal.value)


def test_tenths_that_floats_do_not_add_up_to_1_leave_nothing(tmp_path: Path) -> None:
    ten = {f"s{n}": (1, 0.1) for n in range(10)}
    assert sum(0.1 for _ in range(10)) < 1
    with pytest.raises(InputError, match="less than 1"):
        DataConfig(sources=sources(tmp_path, **ten, rest=(1, "auto")))


def test_steps_of_epochs_are_counted_in_the_decimals_that_were_written() -> None:
    counted = [
        steps_of(None, epochs, batch_size=10, epoch_rows=3000)
        for epochs in (1.0, 1.1, 0.7, 2.0001, 1e-9)
    ]
    assert 1.1 * 3000 / 10 > 330
    assert counted == [300, 330, 210, 601, 1]
    assert steps_of(7, None, batch_size=10, epoch_rows=None) == 7


LOADERS = {"sft": SFTLoader, "opd": PromptLoader}


def labelled(directory: Path) -> dict[str, SourceConfig]:
    """One source of two languages and categories, a second whose every other row is at fault."""
    given = sources(directory, a=(4, 0.5), b=(2, 0.5))
    given["a"].category_column = "category"
    rows: list[Any] = [
        *({"category": "m/n", "language": "de"}, {"language": "de"}, {"language": "fr"}, {}),
        *({"language": "fr"}, {"messages": 7}),
    ]
    said = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    lines = [json.dumps({"messages": said, **row}) + "\n" for row in rows]
    Path(given["a"].path).write_text("".join(lines[:4]))
    Path(given["b"].path).write_text("".join(lines[4:]))
    return given


def described(
    stage: str,
    world: World,
    given: dict[str, SourceConfig],
    until: int,
    resumed: tuple[int, str] | None = None,
) -> tuple[list[Metrics], str]:
    """Metrics of the steps from the first or a resumed one, and the state before the last."""
    root = f"root={world.root}"
    cfg = compose_config(f"quickstart_{stage}", root, "stage.global_batch_size=4")
    cfg.data.sources = given
    cfg.data.num_rows = None
    tokenizer = tokenizer_of(world.path("data", "tokenizer"))
    loader = LOADERS[stage](cfg.data, cfg.stage, tokenizer, cfg.seed)
    first = 0
    if resumed is not None:
        first = resumed[0]
        loader.resume(first, json.loads(resumed[1]))
    found = []
    for _ in range(first, until):
        next(loader)
        found.append(loader.metrics())
    return found, json.dumps(loader.state_at(until - 1))


@pytest.mark.parametrize("stage", LOADERS)
def test_shares_are_of_what_was_used_since_the_run_began(
    stage: str, world: World, tmp_path: Path
) -> None:
    given = labelled(tmp_path)
    found, state = described(stage, world, given, 250)
    last = found[-1]
    check_names(last)
    # Of 1,000 samples 500 are of `a`, 125 of each row, and 250 of `b` are used.
    expected = {
        "source_a": 500 / 750,
        "source_b": 250 / 750,
        "category_c": 625 / 750,
        "category_m%2Fn": 125 / 750,
        "language_de": 250 / 750,
        "language_fr": 375 / 750,
    }
    prefix = "data/share/"
    shares = {name.removeprefix(prefix): x for name, x in last.items() if name.startswith(prefix)}
    assert shares == pytest.approx(expected)
    assert sum(each["data/num_sequences"] for each in found) == 750
    assert sum(each["data/dropped_malformed"] for each in found) == 250

    _, middle = described(stage, world, given, 101)
    again = described(stage, world, given, 250, (100, middle))
    assert again == (found[100:], state)
    assert run_on_ranks(2, described, stage, world, given, 250) == [(found, state)] * 2
