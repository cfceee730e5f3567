"""Two nodes of a run, rehearsed on this machine."""

import subprocess
from pathlib import Path

import pytest

from tests.helpers.processes import REPOSITORY


@pytest.mark.long
@pytest.mark.netns
def test_two_nodes_learn_what_one_does_though_a_wire_is_cut_and_a_node_is_lost(
    tmp_path: Path,
) -> None:
    done = subprocess.run(
        ["scripts/rehearse_nodes", str(tmp_path)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    said = [line for line in done.stdout.splitlines() if "as on one node" in line]
    assert len(said) == 3, done.stdout
