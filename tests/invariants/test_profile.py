"""A profiled run leaves a trace and a table of exactly the steps that were asked for."""

import gzip
import json
from pathlib import Path

import pytest

from tests.helpers.configs import compose_config
from tests.helpers.ranks import run_on_ranks
from tests.helpers.runs import losses, overrides, run
from tests.helpers.world import World

pytestmark = pytest.mark.slow

PARTS = {"sft": set[str](), "opd": {"sync", "sample", "score", "train"}}


def names_of(trace: Path, category: str) -> list[str]:
    """Names of all events of a category in a trace."""
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    return [event["name"] for event in events if event.get("cat") == category]


def marks_of(trace: Path) -> list[str]:
    """Names of the marked stretches of a trace, steps and their parts."""
    marks = names_of(trace, "user_annotation")
    return [name for name in marks if name.startswith("step ") or name in PARTS["opd"]]


@pytest.mark.parametrize("stage", ["sft", pytest.param("opd", marks=pytest.mark.long)])
def test_each_rank_leaves_a_trace_and_a_table_of_the_chosen_steps(
    stage: str, world: World, tmp_path: Path
) -> None:
    given = overrides(stage, world, tmp_path, 2)
    cfg = compose_config(f"quickstart_{stage}", *given, "profile.steps=2-3")
    run_on_ranks(2, run, cfg, stage, None)
    directory = tmp_path / "profile"
    assert sorted(file.name for file in directory.iterdir()) == [
        *("rank_0.json.gz", "rank_0.txt", "rank_1.json.gz", "rank_1.txt"),
    ]
    for rank in range(2):
        trace = directory / f"rank_{rank}.json.gz"
        marks = marks_of(trace)
        assert {name for name in marks if name.startswith("step ")} == {"step 2", "step 3"}
        assert set(marks) - {"step 2", "step 3"} == PARTS[stage]
        # Of the experts themselves so little time is spent that the table may leave them out.
        assert "aten::_grouped_mm" in names_of(trace, "cpu_op")
        assert "aten::mm" in (directory / f"rank_{rank}.txt").read_text()


@pytest.mark.long
def test_a_profile_changes_no_number_and_ends_with_its_run(world: World, tmp_path: Path) -> None:
    for name, more in (("plain", []), ("profiled", ["profile.steps=5-6"])):
        given = [*overrides("sft", world, tmp_path / name, 1), *more]
        # The profiled run crashes in the middle of what is recorded, and goes on within it.
        for crash_at in [5, None] if more else [None]:
            run_on_ranks(1, run, compose_config("quickstart_sft", *given), "sft", crash_at)
    assert losses(tmp_path / "plain") == losses(tmp_path / "profiled")
    assert not (tmp_path / "plain" / "profile").exists()
    marks = marks_of(tmp_path / "profiled" / "profile" / "rank_0.json.gz")
    assert [name for name in marks if name.startswith("step ")] == ["step 5", "step 6"]
