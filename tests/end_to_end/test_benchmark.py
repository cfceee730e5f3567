"""The card's benchmarks as a user runs them: on made-up items, killed, elsewhere, and compared."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from marco_train.config.benchmark import BENCHMARK_DIR, card_rows
from marco_train.evaluation.benchmark.aggregate import Corpora
from marco_train.evaluation.benchmark.grading import Translated
from marco_train.models import save_model
from marco_train.models.weights import random_model
from tests.helpers.models import architecture
from tests.helpers.processes import REPOSITORY, launch, soon

pytestmark = pytest.mark.slow

ROW = {
    *("metric", "score", "std", "ci95", "n_items", "n_samples"),
    *("extraction_failures", "truncated", "languages"),
}


MIRROR = f"stage.data_dir={BENCHMARK_DIR / 'fixture'}"


@pytest.fixture(autouse=True)
def without_a_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with the quickstart's tokenizer and positions, and random weights."""
    path = tmp_path_factory.mktemp("quickstart")
    prepare = str(REPOSITORY / "recipes" / "quickstart" / "prepare.py")
    made = [sys.executable, prepare, "--out", str(path / "data"), "--rows", "1000"]
    subprocess.run(made, check=True, capture_output=True)
    shape = architecture(vocab_size=1536, max_position_embeddings=256)
    save_model(random_model(shape, torch.float32, 0), path / "model", path / "data" / "tokenizer")
    return path / "model"


def benchmark(model: Path, out: Path, suite: str, *overrides: str) -> list[str]:
    return [
        "experiment=benchmark",
        f"model.path={model}",
        "model.dtype=float32",
        f"stage.suite='{suite}'",
        f"output_dir={out}",
        *overrides,
    ]


def read(file: Path) -> Any:
    return json.loads(file.read_text())


def test_all_rows_of_the_card_are_asked_on_made_up_items(model: Path, tmp_path: Path) -> None:
    given = benchmark(model, tmp_path, "fixture")
    done = launch(*given)
    assert done.returncode == 0, done.stderr
    assert (
        "questions of up to 200 tokens are asked, and responses end at 56, where 8192"
        in done.stdout
    )
    found, details = read(tmp_path / "benchmark.json"), read(tmp_path / "details.json")
    assert set(found) == {"model", "suite", "rows", "means"}
    assert (found["model"], found["suite"]) == (str(model), "fixture")
    assert list(found["rows"]) == [row.name for row in card_rows().values()]
    for task, card in card_rows().items():
        row, more = found["rows"][card.name], details[card.name]
        assert set(row) == ROW
        responses = 1 if task in {"global_mmlu", "mmmlu"} else 8
        assert row["n_samples"] == responses * row["n_items"]
        assert row["metric"] == card.metric
        assert row["ci95"][0] <= row["score"] <= row["ci95"][1]
        assert more["questions_too_long"] == more["verifier_errors"] == 0
        samples = (tmp_path / "lm_eval" / f"samples_{task}.jsonl").read_text().splitlines()
        assert len(samples) == row["n_items"]
    assert set(found["means"]) == {"english", "multilingual", "cultural"}
    results = read(tmp_path / "lm_eval" / "results_mgsm.json")["results"]["marco_mgsm"]
    assert 100 * results["avg_at_k,all"] == pytest.approx(found["rows"]["MGSM"]["score"], abs=1e-3)
    assert "| KazakhMMLU | kk " in (tmp_path / "benchmark.md").read_text()
    assert "GreekMMLU" in (tmp_path / "benchmark.html").read_text()
    again = launch(*given)
    assert "already finished" in again.stdout


def answers_in(out: Path) -> list[str]:
    return [
        line
        for file in sorted(out.glob("answers/*.jsonl"))
        for line in file.read_text().splitlines()
    ]


@pytest.mark.long
def test_a_run_that_is_killed_goes_on_with_the_answers_that_it_has(
    model: Path, tmp_path: Path
) -> None:
    few = [MIRROR, "stage.responses_per_prompt=40", "stage.rollout.batch_size=4"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert launch(*benchmark(model, whole, "mmlu,gsm8k", *few)).returncode == 0
    given = benchmark(model, cut, "mmlu,gsm8k", *few)
    process = subprocess.Popen(
        [sys.executable, "-m", "marco_train.train", *given],
        cwd=REPOSITORY,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    soon(lambda: len(answers_in(cut)) > 8)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = answers_in(cut)
    assert 8 < len(kept) < (3 + 2) * 40
    done = launch(*given)
    assert done.returncode == 0, done.stderr
    lines = answers_in(cut)
    whole_lines = [line for line in kept if line.endswith("}")]
    assert set(whole_lines) <= set(lines)  # none was asked again
    keys = [(item["item"], item["response"]) for item in map(json.loads, sorted(lines))]
    assert len(set(keys)) == len(keys) == (3 + 2) * 40
    assert sorted(lines) == sorted(answers_in(whole))
    assert read(cut / "benchmark.json")["rows"] == read(whole / "benchmark.json")["rows"]
    (cut / "finished.json").unlink()
    refused = launch(*given, "seed=7")
    assert refused.returncode == 1
    assert "holds answers that something else made (then -> now): seed: 0 -> 7" in refused.stderr


def test_the_recipe_takes_suites_and_says_the_plan(model: Path, tmp_path: Path) -> None:
    recipe = [str(REPOSITORY / "recipes" / "benchmark.sh"), f"model.path={model}"]
    planned = ["plan=true", "plan_gpu=h100-80", "plan_gpus=8", "languages=[en]"]
    done = subprocess.run(
        [
            *recipe,
            "suite=mmlu,mgsm",
            MIRROR.removeprefix("stage."),
            *planned,
            f"output_dir={tmp_path / 'out'}",
        ],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"NPROC": "1"},
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[:3] for line in lines if line.startswith(("MMLU", "MGSM"))] == [
        ["MMLU", "3", "24"],
        ["MGSM", "1", "8"],
    ]
    assert lines[-1].startswith("plan: 2 rows, 4 prompts, 32 responses, ")
    assert lines[-1].endswith(" h on 8 x h100-80")
    assert not (tmp_path / "out").exists()


def test_own_rows_are_asked_by_one_command_and_a_verifier_that_raises_is_shown(
    model: Path, tmp_path: Path
) -> None:
    rows = [{"question": f"{n} + {n}?", "answer": f"Add them.\n#### {n}"} for n in range(5)]
    lines = [json.dumps(row) + "\n" for row in [*rows, {"question": "5 + 5?", "answer": None}]]
    (tmp_path / "my.jsonl").write_text("".join(lines))
    (tmp_path / "mine.py").write_text(
        "def right(response, reference):\n    return reference[-1:] < '3' or 1 / 0\n"
    )
    own = ["benchmark=own", f"own.path={tmp_path / 'my.jsonl'}", "own.verifier=python:mine.right"]
    more = ["own.prompt=Add: {{question}}", "model.dtype=float32", f"output_dir={tmp_path}/out"]
    done = subprocess.run(
        [str(REPOSITORY / "recipes" / "benchmark.sh"), f"model.path={model}", *own, *more],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"NPROC": "1", "PYTHONPATH": f"{REPOSITORY}:{tmp_path}"},
    )
    assert done.returncode == 0, done.stderr
    found, details = read(tmp_path / "out" / "benchmark.json"), read(tmp_path / "out/details.json")
    row, more_of_row = found["rows"]["own"], details["own"]
    assert (row["n_items"], row["n_samples"], row["languages"].keys()) == (5, 40, {"und"})
    num_empty = round(row["extraction_failures"] * 40)
    assert more_of_row["verifier_errors"] > 0
    assert round(row["score"] * 0.4) == 40 - num_empty - more_of_row["verifier_errors"]
    assert more_of_row["first_verifier_errors"][0] == "ZeroDivisionError: division by zero"
    assert found["means"] == {"own": row["score"]}
    for report in ("benchmark.md", "benchmark.html"):
        shown = (tmp_path / "out" / report).read_text()
        assert "ZeroDivisionError: division by zero" in shown
        assert "own: 1 of 6 rows left out: 1 as row 5 has no answer" in shown
    assert "own: 1 of 6 rows left out: 1 as row 5 has no answer" in done.stdout
    assert "verifier errors, as ZeroDivisionError" in done.stdout


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["stage.suite=gsm9k"], "error: stage.suite names 'gsm9k', which is no suite and no task"),
        (["stage.suite=cmmlu"], "error: CMMLU: lmlmcat/cmmlu on the hub is a program that makes"),
        (["stage.suite=mmlu"], "error: source \"MMLU, subset 'all', split 'test'\": 'cais/mmlu'"),
        (["stage.suite=fixture", "stage.data_dir=x"], "error: stage.suite is fixture, whose items"),
        (
            ["stage.suite=fixture", "model.path=none/here"],
            "error: there is no directory 'none/here'",
        ),
    ],
)
def test_what_cannot_be_asked_is_refused_in_a_sentence(
    overrides: list[str], said: str, model: Path, tmp_path: Path
) -> None:
    done = launch(*benchmark(model, tmp_path, "fixture"), *overrides)
    assert done.returncode == 1
    assert said in done.stderr and "Traceback" not in done.stderr


def test_a_model_without_a_template_is_refused(model: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in model.iterdir():
        if file.name != "chat_template.jinja":
            (bare / file.name).write_bytes(file.read_bytes())
    done = launch(*benchmark(bare, tmp_path / "out", "fixture"))
    assert done.returncode == 1
    assert "has no chat template; set model.chat_template=chatml" in done.stderr


def test_bleu_is_that_of_sacrebleus_command(tmp_path: Path) -> None:
    pairs = {
        "zh": ("zh", [("猫在睡觉。", "猫在睡。"), ("今天下雨了。", "今天下雨。")]),
        "de": ("13a", [("Die Katze schläft tief.", "Die Katze schläft."), ("Ja.", "Ja.")]),
    }
    for code, (tokenizer, sentences) in pairs.items():
        (tmp_path / "reference").write_text("".join(f"{one}\n" for one, _ in sentences))
        (tmp_path / "texts").write_text("".join(f"{two}\n" for _, two in sentences))
        files = [str(tmp_path / "reference"), "-i", str(tmp_path / "texts")]
        done = subprocess.run(
            [sys.executable, "-m", "sacrebleu", *files, "-tok", tokenizer, "-b", "-w", "10"],
            capture_output=True,
            text=True,
            check=True,
        )
        items = [Translated("", code, code, one, (two,)) for one, two in sentences]
        assert Corpora(items).score == pytest.approx(float(done.stdout), abs=1e-9)


def test_two_reports_are_compared_by_a_script(tmp_path: Path) -> None:
    for name, right in (("a", [1, 0]), ("b", [1, 1])):
        (tmp_path / name).mkdir()
        rows = [
            {"row": row, "id": f"en/{n}", "language": "en", "right": right}
            for row in ("MMLU", "GSM8K")
            for n in range(3)
        ]
        file = tmp_path / name / "items.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    script, figures = str(REPOSITORY / "scripts" / "compare_benchmarks.py"), tmp_path / "f.json"
    done = subprocess.run(
        [sys.executable, script, str(tmp_path / "a"), str(tmp_path / "b"), "--json", str(figures)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines() == [
        "row                  A      B  B - A  95 % of the difference",
        "MMLU              50.0  100.0  +50.0  +50.0 to +50.0, moved",
        "GSM8K             50.0  100.0  +50.0  +50.0 to +50.0, moved",
        "mean of english   50.0  100.0  +50.0  +50.0 to +50.0, moved",
    ]
    assert read(figures)["MMLU"] == {
        "a": 50.0,
        "b": 100.0,
        "difference": 50.0,
        "ci95": [50.0, 50.0],
        "beyond_noise": True,
        "n_items": 3,
        "n_unpaired": 0,
    }
    refused = subprocess.run(
        [sys.executable, script, str(tmp_path / "a"), str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert refused.returncode == 1 and "holds no report of a benchmark" in refused.stderr


@pytest.mark.long
def test_our_tasks_run_in_the_plain_harness(model: Path, tmp_path: Path) -> None:
    where = {"data_dir": str(BENCHMARK_DIR / "fixture"), "is_partial": True}
    command = [
        *(sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--device", "cpu"),
        *("--model_args", f"pretrained={model},dtype=float32", "--apply_chat_template"),
        *("--include_path", "configs/benchmark/tasks", "--metadata", json.dumps(where)),
        *("--tasks", "marco_gsm8k,marco_polymath,marco_wmt24pp_en_xx,marco_mmmlu"),
        *("--gen_kwargs", "max_gen_toks=8", "--output_path", str(tmp_path)),
    ]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        cwd=REPOSITORY,
    )
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.rglob("results_*.json")
    results = read(file)["results"]
    assert results["marco_gsm8k"]["sample_len"] == 2
    assert 0 <= results["marco_gsm8k"]["avg_at_k,all"] <= 1
    assert "weighted_avg_at_k,all" in results["marco_polymath"]
    assert "bleu,all" in results["marco_wmt24pp_en_xx"]
    assert "maj_at_k,all" in results["marco_mmmlu"]
