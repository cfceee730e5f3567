"""The benchmark runs on a CPU, and every side computes the same."""

import json
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(REPOSITORY / "scripts" / "bench_model.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_small_run_compares_all_sides_and_writes_what_it_found(tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    done = bench(
        *("--device", "cpu", "--shapes", "quickstart", "--only", "block,scaling,recompute"),
        *("--tokens", "256", "--repeats", "1", "--json", str(file)),
    )
    assert done.returncode == 0, done.stderr
    parts = json.loads(file.read_text())["parts"]
    sides = {row["side"] for row in parts["block"]}
    assert sides == {
        *("ours", "plain autograd", "transformers eager", "transformers grouped_mm"),
        "DeepSpeed AutoEP",
    }
    # A side that computes something else has a note and no time.
    assert all(row["ms"] > 0 and row["error"] < 1e-5 for row in parts["block"])
    assert {row["case"] for row in parts["scaling"]} == {"one rank", "all_to_all", "deduplicated"}
    assert {row["recompute"] for row in parts["recompute"]} == {"none", "attention", "layer"}
    assert "time / ours" in done.stdout


def test_a_gpu_that_is_not_there_is_said_in_one_sentence(tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        return
    done = bench("--device", "cuda", "--json", str(tmp_path / "bench.json"))
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1
