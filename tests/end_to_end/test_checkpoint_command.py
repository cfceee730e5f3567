"""What a person can ask of checkpoints, without a launcher."""

import json
import subprocess
from pathlib import Path

import pytest

from tests.helpers.checkpoints import same_state
from tests.helpers.configs import compose_config
from tests.helpers.processes import run_script
from tests.helpers.ranks import run_on_ranks
from tests.helpers.runs import overrides, run
from tests.helpers.world import World

pytestmark = pytest.mark.slow


def ask(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return run_script("checkpoint.py", *map(str, words))


@pytest.fixture(scope="module")
def trained(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out: Path = tmp_path_factory.mktemp("run")
    given = [*overrides("sft", world, out, 2), "model.dtype=bfloat16"]
    run_on_ranks(2, run, compose_config("quickstart_sft", *given), "sft", None)
    return out


def test_a_checkpoint_of_two_ranks_is_exported_as_the_run_exports(
    trained: Path, tmp_path: Path
) -> None:
    done = ask("export", trained / "checkpoints" / "step_000006", tmp_path / "model")
    assert done.returncode == 0, done.stderr
    exported = sorted((trained / "export").iterdir())
    assert [file.name for file in exported] == sorted(
        p.name for p in (tmp_path / "model").iterdir()
    )
    for file in exported:
        assert file.read_bytes() == (tmp_path / "model" / file.name).read_bytes(), file.name


def test_checkpoints_are_listed_and_their_parameters_shown(trained: Path) -> None:
    listed = ask("list", trained)
    assert listed.returncode == 0, listed.stderr
    header, newest, oldest = listed.stdout.splitlines()
    assert header.split() == ["updates", "saved", "MiB", "ranks", "phase"]
    assert newest.split()[0] == "000006" and oldest.split()[0] == "000003"
    assert newest.split()[-2:] == ["2", "complete"]
    shown = ask("show", trained / "checkpoints" / "step_000003")
    assert shown.returncode == 0, shown.stderr
    (experts,) = (line for line in shown.stdout.splitlines() if "1.mlp.experts.down_proj" in line)
    assert experts.split(maxsplit=1)[1].startswith("bfloat16  [8, 32, 16]  rank_000.safetensors, ")
    assert "3 updates" in shown.stdout


def test_a_flipped_bit_is_found_and_named(trained: Path) -> None:
    assert ask("verify", trained).returncode == 0
    shard = trained / "checkpoints" / "step_000003" / "rank_001.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:])
    found = ask("verify", trained)
    refused = ask("export", trained / "checkpoints" / "step_000003", trained / "never")
    shard.write_bytes(whole[:-5])
    listed = ask("list", trained)
    shard.write_bytes(whole)
    assert found.returncode == 1 and listed.returncode == 1
    assert "rank_001.safetensors is damaged" in found.stdout
    assert "step_000006 is what was written" in found.stdout
    assert "rank_001.safetensors is damaged" in listed.stdout.splitlines()[2]
    assert refused.returncode == 1 and refused.stderr.startswith("error: ")
    assert not (trained / "never").exists()


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_checkpoint_is_written_anew_as_of_other_ranks(
    ranks: int, trained: Path, tmp_path: Path
) -> None:
    path = trained / "checkpoints" / "step_000003"
    done = ask("convert", path, tmp_path, "--ranks", str(ranks))
    assert done.returncode == 0, done.stderr
    made = tmp_path / "step_000003"
    assert len(list(made.glob("rank_*.safetensors"))) == ranks
    same_state(path, made)
    assert ask("verify", made).returncode == 0
    there = [json.loads((each / "state.json").read_text()) for each in (path, made)]
    assert there[0] == there[1]
    again = ask("convert", path, tmp_path, "--ranks", str(ranks))
    assert again.returncode == 1
    assert again.stderr == f"error: there is {made} already: name another directory\n"


def test_a_run_goes_on_from_what_was_written_anew(
    trained: Path, world: World, tmp_path: Path
) -> None:
    assert ask("convert", trained / "checkpoints" / "step_000003", tmp_path).returncode == 0
    given = [*overrides("sft", world, tmp_path / "out", 2), "model.dtype=bfloat16"]
    cfg = compose_config("quickstart_sft", *given, f"resume={tmp_path / 'step_000003'}")
    run_on_ranks(2, run, cfg, "sft", None)
    weights = [out / "export" / "model.safetensors" for out in (trained, tmp_path / "out")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_a_directory_without_checkpoints_is_refused_in_a_sentence(tmp_path: Path) -> None:
    done = ask("list", tmp_path)
    assert done.returncode == 1
    assert done.stderr == (
        f"error: {tmp_path} holds no complete checkpoint (checkpoints/step_*/manifest.json)\n"
    )
