"""The check of a GPU, tried on a CPU: each check alone, a table, JSON."""

import json
import math
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from marco_train.commands import gpu_check
from tests.helpers.processes import REPOSITORY
from tests.helpers.ranks import run_on_ranks

CPU_CHECKS = ["training", "memory", "noise", "head", "attention", "profile"]
CPU_CHECKS += ["hand_over", "determinism", "sampler"]


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    script = str(REPOSITORY / "scripts" / "gpu_check")
    return subprocess.run([script, *arguments], capture_output=True, text=True, check=False)


@pytest.mark.long
def test_a_cpu_makes_every_check_that_needs_no_gpu(tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    done = command("--device", "cpu", "--tiny", "--json", str(file))
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(file.read_text())
    assert found.keys() == {"device", "torch", "checks"}
    assert (found["device"], found["torch"]) == ("cpu", torch.__version__)
    assert [check["name"] for check in found["checks"]] == CPU_CHECKS
    for check in found["checks"]:
        assert check.keys() == {"name", "ok", "seconds", "figures", "error"}
        assert check["ok"] is True and check["error"] is None
        assert len(check["figures"]) >= 4 and check["seconds"] > 0
        numbers = [value for value in check["figures"].values() if not isinstance(value, str)]
        assert all(math.isfinite(number) for number in numbers)
        assert f"\n{check['name']} " in f"\n{done.stdout}"


def test_the_limits_of_all_checks_are_less_than_eight_minutes() -> None:
    assert sum(gpu_check.SECONDS.values()) < 480


@pytest.mark.parametrize("name", ["hed", "tests"])  # mistyped; for a GPU only
def test_a_check_that_is_not_there_is_refused_with_those_that_are(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        gpu_check.main(["--device", "cpu", "--only", f"head,{name}"])
    assert ended.value.code == 2
    (said,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert said.endswith(f"--only: {name} is none of {', '.join(CPU_CHECKS)}")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_a_gpu_that_is_not_there_is_said_in_one_sentence() -> None:
    with pytest.raises(SystemExit, match=r"^error: torch finds no GPU here; [^\n]*$"):
        gpu_check.main(["--device", "cuda"])


def broken(_: object, figures: dict[str, float]) -> None:
    figures["seven"] = 7.0
    raise ValueError("7 is not 8")


def endless(_: object, figures: dict[str, float]) -> None:
    figures["seven"] = 7.0
    time.sleep(60)


def outcome_of(first: Callable[..., None], file: Path) -> tuple[Any, Any]:
    from marco_train.commands import measurements

    with (
        mock.patch.dict(measurements.CHECKS, {"head": first, "noise": lambda _, figures: None}),
        mock.patch.dict(gpu_check.SECONDS, {"head": 1}),
        pytest.raises(SystemExit) as ended,
    ):
        gpu_check.main(["--device", "cpu", "--only", "head,noise", "--json", str(file)])
    return ended.value.code, json.loads(file.read_text())["checks"]


@pytest.mark.parametrize(
    ("first", "error"),
    [
        (broken, "ValueError: 7 is not 8 (test_gpu_check.py:"),
        (endless, "TimeoutError: not done after 1 s ("),
    ],
)
def test_a_check_that_fails_is_a_row_and_not_the_end(
    first: Callable[..., None], error: str, tmp_path: Path
) -> None:
    ((code, (head, noise)),) = run_on_ranks(1, outcome_of, first, tmp_path / "found.json")
    assert code == "error: head failed"  # status 1
    assert not head["ok"] and head["figures"] == {"seven": 7.0} and head["error"].startswith(error)
    assert noise["ok"] and noise["figures"] == {} and noise["error"] is None
