"""The doctor runs every check of a run without training."""

import shutil
import subprocess
import sys
from pathlib import Path

from tests.conftest import World

REPOSITORY = Path(__file__).parents[2]


def doctor(*overrides: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(REPOSITORY / "scripts" / "doctor.py"), *overrides]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_run_that_is_fit_passes_every_check(world: World) -> None:
    alone = "parallel.expert_parallel_size=1"
    for experiment, last in (("quickstart_opd", "teacher 'second'"), ("quickstart_sft", "data")):
        done = doctor(f"experiment={experiment}", f"root={world.root}", alone)
        assert done.returncode == 0, done.stdout + done.stderr
        lines = done.stdout.splitlines()
        assert lines[0].startswith("config ... fine, ")
        assert lines[-2].startswith(f"{last} ... fine, ")
        assert lines[-1].startswith("all is well, ")


def test_the_first_thing_that_is_wrong_is_said_in_a_sentence(world: World, tmp_path: Path) -> None:
    shutil.copytree(world.path("teacher_second", "export"), tmp_path / "teacher")
    (tmp_path / "teacher" / "generation_config.json").write_text('{"eos_token_id": 0}')
    path = f"stage.cascade.second.teacher.path={tmp_path / 'teacher'}"
    done = doctor("experiment=quickstart_opd", f"root={world.root}", path)
    assert done.returncode == 1
    assert "teacher 'second' stops at [0]" in done.stderr
    assert "Traceback" not in done.stderr
    typo = doctor("experiment=quickstart_opd", "stage.objectiv=full")
    assert typo.returncode == 1
    assert "objectiv" in typo.stderr
    assert "Traceback" not in typo.stderr
