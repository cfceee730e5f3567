"""The plan as a user asks for it, and its tables in the recipes' READMEs."""

import json
import re
import subprocess
from pathlib import Path

import pytest

from marco_train.commands.plan import FIELDS, answer
from marco_train.planning.memory import COMPONENTS
from marco_train.planning.seconds import NAMES
from tests.helpers.processes import REPOSITORY, run_script

READMES = sorted(REPOSITORY.glob("recipes/*/README.md"))
COMMAND = "python scripts/plan.py "


def plan(*words: str) -> subprocess.CompletedProcess[str]:
    return run_script("plan.py", *words)


@pytest.mark.slow
def test_a_plan_is_written_as_json(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    done = plan("experiment=marco_mini_opd", "gpus=8", "gpu=h200-141", "--json", str(file))
    assert done.returncode == 0, done.stderr
    found = json.loads(file.read_text())
    assert list(found) == [
        "gpus",
        "gpu",
        "capacity_gib",
        "phases",
        "peak_gib",
        "peak_phase",
        "fits",
        "lack_of_keys",
        "host_gib",
        "disk_gib",
        "step_seconds",
        "run_hours",
        "gpu_hours",
        "basis",
        "assumptions",
        "advice",
    ]
    assert list(found["phases"]) == ["sync", "sample", "score", "train", "checkpoint"]
    for phase in found["phases"].values():
        assert list(phase) == ["total_gib", "components_gib", "seconds"]
        assert list(phase["components_gib"]) == list(COMPONENTS)
    assert found["run_hours"] == pytest.approx(3800 * found["step_seconds"] / 3600, rel=0.01)
    assert found["gpu_hours"] == pytest.approx(8 * found["run_hours"], rel=0.01)


@pytest.mark.slow
def test_a_run_that_does_not_fit_ends_with_1_and_says_what_would() -> None:
    words = ["experiment=marco_mini_sft", "data.max_tokens_per_microbatch=65536"]
    done = plan(*words, "parallel.recompute=none")
    assert done.returncode == 1
    assert "does not fit" in done.stdout and "makes it fit" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["experiment=marco_mini_sft", "gpu=h900"], "gpu is 'h900', and known cards are h100-80"),
        (["experiment=marco_mini_sft", "gpus=eight"], "gpus is 'eight', and must be a number"),
        (["experiment=marco_mini_sft", "gpus=12"], "does not divide it"),
        (["experiment=marco_mini_sft", "training_efficiency=-1"], "training_efficiency is -1.0"),
        (["experiment=marco_mini_sft", "optim.learning_rat=1"], "learning_rat"),
        (
            ["stage=sft", "stage.num_steps=1", "data=marco_sft", "optim.learning_rate=1"],
            "no architecture is known: give model.path=",
        ),
    ],
)
def test_what_cannot_be_planned_ends_with_2_and_a_sentence(words: list[str], says: str) -> None:
    done = plan(*words)
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr


OWN = ["model=marco_mini", "data=own", "data.held_out.share=0.1", "parallel.zero_stage=2"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "num_steps"),
    [
        (["experiment=sft", "stage.num_epochs=2"], 6),  # 180 samples of 90 rows, 32 a step
        (["experiment=opd", "teacher.path=Qwen3-4B"], 3),
    ],
)
def test_the_rows_of_an_epoch_are_counted_where_they_lie(
    words: list[str], num_steps: int, tmp_path: Path
) -> None:
    file, plan = tmp_path / "rows.jsonl", tmp_path / "plan.json"
    file.write_text("".join(json.dumps({"prompt": f"{n}?"}) + "\n" for n in range(100)))
    _, said = answer([*OWN, *words, f"data.path={file}", "--json", str(plan)])
    found = json.loads(plan.read_text())
    assert found["basis"].startswith(f"{num_steps} steps; an epoch has ")
    assert found["run_hours"] == pytest.approx(
        num_steps * found["step_seconds"] / 3600, rel=0.01, abs=0.002
    )
    assert f" minutes, {found['gpu_hours']:.1f} GPU-hours\n" in said


def test_rows_that_are_not_here_are_named_and_not_fetched() -> None:
    _, said = answer([*OWN, "experiment=sft", "data.path=org/name"])
    assert (
        "the rows of an epoch were not counted, as those of data.sources.own (org/name) are no "
        "files of this machine"
    ) in said


def test_every_assumption_is_a_field_of_the_command() -> None:
    assert set(NAMES) < FIELDS


def tables(readme: Path) -> list[tuple[str, str]]:
    """Commands that plan, each with the table that stands under it."""
    text = readme.read_text().replace(" \\\n  ", " ")
    found = re.findall(rf"```bash\n{COMMAND}(.*)\n```\n\n((?:\|.*\n)+)", text)
    return [(words, table.rstrip("\n")) for words, table in found]


@pytest.mark.slow
@pytest.mark.parametrize("readme", READMES, ids=lambda path: path.parent.name)
def test_tables_are_what_their_commands_print(readme: Path) -> None:
    found = tables(readme)
    assert len(found) == readme.read_text().count(COMMAND)
    for words, table in found:
        assert answer(words.split())[1] == table, words
