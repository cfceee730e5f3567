"""The benchmarks run on a CPU, and every side computes the same."""

import gzip
import json
import subprocess
from pathlib import Path

import pytest

from tests.helpers.processes import run_script

pytestmark = pytest.mark.slow


def bench(*arguments: str, script: str = "model.py") -> subprocess.CompletedProcess[str]:
    return run_script(f"bench/{script}", *arguments)


@pytest.mark.long
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


@pytest.mark.long
def test_objectives_take_the_same_steps_and_the_share_of_a_run_is_read(tmp_path: Path) -> None:
    file, run = tmp_path / "bench.json", tmp_path / "run"
    run.mkdir()
    times = {"time/sync": 1, "time/sample": 1, "time/score": 1, "time/train": 1, "time/step": 4}
    lines = [json.dumps(times | {"cascade/phase": phase}) for phase in (0, 0, 0, 1, 1)]
    (run / "metrics.jsonl").write_text("\n".join(lines))
    done = bench(
        *("--shapes", "quickstart", "--tokens", "16", "--repeats", "1", "--steps", "1"),
        *("--run", str(run), "--json", str(file)),
        script="opd.py",
    )
    assert done.returncode == 0, done.stderr
    parts = json.loads(file.read_text())["parts"]
    assert [row["objective"] for row in parts["objectives"]] == ["sampled", "topk", "full"]
    assert all(row["ms"] > 0 and row["error"] < 1e-5 for row in parts["objectives"])
    assert len(parts["memory"]) == 12
    assert [row["score / step"] for row in parts["teacher_share"]] == [0.25, 0.25]
    assert "time / sampled" in done.stdout


def test_the_wait_for_servers_is_read_and_a_phase_of_one_step_is_left_out(tmp_path: Path) -> None:
    file, run = tmp_path / "bench.json", tmp_path / "run"
    run.mkdir()
    times = {"time/sync": 1, "time/sample": 1, "time/train": 1, "time/step": 4}
    servers = {"cascade/phase": 0, "teacher/seconds": 4}
    lines = [times | servers | {"time/score": score} for score in (4, 1, 3, 2)]
    lines += [times | {"cascade/phase": 1, "time/score": 1}]
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    done = bench(
        *("--only", "teacher_share", "--run", str(run), "--json", str(file)),
        script="opd.py",
    )
    assert done.returncode == 0, done.stderr
    behind_servers, short = json.loads(file.read_text())["parts"]["teacher_share"]
    assert behind_servers["wait / scoring"] == 0.5
    assert short["note"] == "only its first step, left out" and short["note"] in done.stdout


def test_each_moment_of_a_recorded_step_counts_once(tmp_path: Path) -> None:
    def event(kind: str, name: str, begin: int, end: int) -> dict[str, object]:
        return {"ph": "X", "cat": kind, "name": name, "ts": begin, "dur": end - begin}

    trace = [
        event("user_annotation", "step 7", 1000, 2000),
        event("cpu_op", "aten::linear", 900, 1400),  # 400 of the step, of which 300 a product
        event("cpu_op", "aten::mm", 1050, 1350),
        event("user_annotation", "gloo:all_reduce", 1300, 1600),  # 200 of which nothing else
        event("cpu_op", "c10d::allreduce_", 1300, 1310),
        event("cpu_op", "aten::add", 1900, 2500),
    ]
    (tmp_path / "profile").mkdir()
    packed = gzip.compress(json.dumps({"traceEvents": trace}).encode())
    (tmp_path / "profile" / "rank_0.json.gz").write_bytes(packed)
    step = {"time/step": 0.5, "data/num_tokens": 100}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(step))
    file = tmp_path / "bench.json"
    done = bench("--run", str(tmp_path), "--json", str(file), script="where.py")
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(file.read_text())["parts"]["run"]
    shares = [row[f"{name} %"] for name in ("products", "traffic", "messages", "Python")]
    assert shares == pytest.approx([30, 20, 20, 30])
    assert row["tokens/s"] == 200 and row["bound tokens/s"] == pytest.approx(200 / 0.3)


def test_a_comparison_without_its_interpreter_is_refused(tmp_path: Path) -> None:
    done = bench("--only", "trl", "--json", str(tmp_path / "b.json"), script="opd.py")
    assert done.returncode == 2
    assert "--trl-python" in done.stderr.splitlines()[-1]


def test_a_mistyped_shape_is_refused_with_those_there_are(tmp_path: Path) -> None:
    done = bench("--device", "cpu", "--shapes", "minni", "--json", str(tmp_path / "b.json"))
    assert done.returncode == 2
    assert "minni is none of quickstart, medium, mini" in done.stderr.splitlines()[-1]


@pytest.mark.vllm
def test_scores_cross_http_as_arrays_and_as_json(tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    done = bench("--repeats", "1", "--shapes", "mean", "--json", str(file), script="scores.py")
    assert done.returncode == 0, done.stderr
    array, as_json = json.loads(file.read_text())["parts"]["scores"]
    assert array["bytes a token"] < as_json["bytes a token"]


def test_a_sync_of_as_many_weights_as_mini_has_is_timed_beside_its_copies() -> None:
    done = bench("--repeats", "1", script="sync.py")
    assert done.returncode == 0, done.stderr
    first, *times = done.stdout.splitlines()
    assert first == "21758 weights in 310 tensors; microseconds a weight"
    assert [line.partition(":")[0] for line in times] == [
        *("sync", "of it copies", "of it checksums of one side"),
    ]


def test_the_cost_of_saves_is_measured(tmp_path: Path) -> None:
    given = ("--gigabytes", "0.01", "--repeats", "1", "--directory", str(tmp_path))
    done = bench(*given, script="saves.py")
    assert done.returncode == 0, done.stderr
    figures = dict(line.rsplit(": ", 1) for line in done.stdout.splitlines()[1:])
    assert float(figures["blocking save, s"].split()[0]) > 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.long
def test_entities_are_read_packed_and_not(tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    given = ("--repeats", "1", "--lines", "1000", "--only", "lines", "--json", str(file))
    done = bench(*given, script="entities.py")
    assert done.returncode == 0, done.stderr
    lines = json.loads(file.read_text())["parts"]["lines"]
    assert [(row["packed"], row["kept"]) for row in lines] == [
        ("plain", 0.2),
        ("gzip", 0.2),
        ("bzip2", 0.2),
    ]
