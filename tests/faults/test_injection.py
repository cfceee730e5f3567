"""Runs that faults strike: what each leaves, and that the next launch goes on as if it had not."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from marco_train.checkpoint.store import verify
from marco_train.config.resumption import complete_checkpoints
from tests.helpers.faults import Fault, launch
from tests.helpers.runs import losses, overrides, saved_steps
from tests.helpers.world import World

pytestmark = pytest.mark.slow

NUM_RANKS = 2


def run(world: World, out: Path, *faults: Fault) -> tuple[int, str]:
    """Exit status and output of one launch."""
    given = [
        "experiment=quickstart_sft",
        *overrides("sft", world, out, NUM_RANKS),
        "checkpoint.save_every=1",
    ]
    process = launch(given, faults, out / "struck", NUM_RANKS)
    output, _ = process.communicate(timeout=240)
    return process.returncode, output


def weights(out: Path) -> bytes:
    return (out / "export" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def calm(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What nothing strikes."""
    out = tmp_path_factory.mktemp("calm")
    code, output = run(world, out)
    assert code == 0, output
    return out


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (Fault("train_step", "kill", step=3, rank=1), "Signal 9 (SIGKILL)"),
        pytest.param(
            Fault("save", "kill", step=3, rank=0),
            "Signal 9 (SIGKILL)",
            marks=pytest.mark.long,
        ),
        pytest.param(
            Fault("publish", "kill", step=3, rank=0),
            "Signal 9 (SIGKILL)",
            marks=pytest.mark.long,
        ),
        pytest.param(
            Fault("train_step", "raise", step=3, rank=1), "FaultError", marks=pytest.mark.long
        ),
        pytest.param(Fault("export", "raise"), "FaultError", marks=pytest.mark.long),
    ],
    ids=str,
)
def test_the_launch_after_a_fault_ends_where_a_calm_one_does(
    fault: Fault, says: str, world: World, tmp_path: Path, calm: Path
) -> None:
    code, output = run(world, tmp_path, fault)
    assert code != 0 and says in output
    assert not (tmp_path / "export").exists()
    code, output = run(world, tmp_path, fault)  # which has struck
    assert code == 0 and "resumed from" in output, output
    assert weights(tmp_path) == weights(calm) and losses(tmp_path) == losses(calm)


@pytest.mark.long
def test_a_loss_that_is_no_number_costs_one_update(
    world: World, tmp_path: Path, calm: Path
) -> None:
    code, output = run(world, tmp_path, Fault("train_step", "nan", step=2, rank=1))
    assert code == 0, output
    skipped = [line["optim/skipped_non_finite"] for line in losses(tmp_path)]
    assert skipped == [0, 0, 1, 0, 0, 0]
    assert weights(tmp_path) != weights(calm)
    shards = [load_file(out / "export" / "model.safetensors") for out in (tmp_path, calm)]
    assert shards[0].keys() == shards[1].keys()
    assert (tmp_path / "quarantine.jsonl").read_text().count("update 2: the loss is not") > 0


@pytest.mark.parametrize(
    "point",
    ["train_step", pytest.param("publish", marks=pytest.mark.long)],  # in the midst of a save
)
def test_a_run_that_is_told_to_end_is_saved(point: str, world: World, tmp_path: Path) -> None:
    code, _ = run(world, tmp_path, Fault(point, "end", step=2, rank=0))
    assert code != 0
    status = json.loads((tmp_path / "exit_status.json").read_text())
    assert (status["code"], status["reason"], status["step"]) == (143, "SIGTERM", 3)
    assert {2, 3} <= {*saved_steps(tmp_path)}
    assert all(verify(path) is None for path in complete_checkpoints(tmp_path / "checkpoints"))


@pytest.mark.long
def test_a_disk_without_room_is_no_room_for_a_checkpoint(
    world: World, tmp_path: Path, calm: Path
) -> None:
    _, output = run(world, tmp_path, Fault("save", "full_disk", step=3))
    assert "fault on rank" in output
    assert 3 not in saved_steps(tmp_path)
    code, output = run(world, tmp_path)
    assert code == 0, output
    assert weights(tmp_path) == weights(calm)
