"""The card of a model says what its runs wrote, and what they did not is not known."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from marco_train.commands.card import main
from marco_train.content import look
from tests.helpers.run_directory import write_run

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def write(file: Path, content: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))


def export(directory: Path, text: str = "weights") -> None:
    """A model's files, of which a card looks at no tensor."""
    write(directory / "config.json", {"architectures": ["Qwen3MoeForCausalLM"]})
    (directory / "model.safetensors").write_text(text)


def write_sft(directory: Path) -> None:
    """A finished SFT of a model of the hub, on a set of the hub and a file."""
    sources = {
        "general": {
            "kind": "hub",
            "path": "allenai/Dolci-Instruct-SFT",
            "revision": COMMIT,
            "split": "train",
            "licence": "odc-by",
            "weight": 0.9,
        },
        "own": {"kind": "jsonl", "path": "/home/somebody/own.jsonl", "weight": 0.1},
    }
    config = {
        "name": "sft",
        "stage": {"kind": "sft"},
        "model": {"path": "/cache/base"},
        "hub": {"model.path": f"AIDC-AI/Marco-Mini-Base@{COMMIT}"},
        "data": {"sources": sources},
        "export": {"licence": "apache-2.0"},
    }
    write(directory / "config.json", config)
    header = {
        "num_steps": 2,
        "batch": "512 conversations",
        "length": "8192 tokens",
        "objective": "cross-entropy of assistant tokens",
        "optimizer": "learning rate 1e-05 (cosine)",
        "rows": 1000,
        "rows_judged": 1000,
        "rows_lost": {"data/dropped_too_long": 3},
        "source_rows": {"general": 900, "own": 100},
        "ranks": 8,
        "device": "NVIDIA H100",
        "dtype": "bfloat16",
    }
    write(directory / "header.json", header)
    steps = [
        {"step": n, "loss/cross_entropy": 2.0 / n, "time/step": 1800.0, "memory/peak_gib": 60.5}
        | {"data/share/language_zh-Hans": 0.25, "data/share/language_de": 0.75}
        for n in (1, 2)
    ]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(s) + "\n" for s in steps))
    content = {"data.sources.own.path": {"digest": "ab" * 32, "files": {}}}
    write(directory / "finished.json", {"content": content})
    export(directory / "export")


def write_opd(directory: Path, student: Path) -> None:
    """A finished distillation from two teachers, one of them on servers."""
    teachers = {
        "first": {"backend": "native", "path": "/models/teacher"},
        "second": {"backend": "vllm_server", "path": "/models/other"},
    }
    cascade = {n: {"num_steps": 3, "teacher": teacher} for n, teacher in teachers.items()}
    config = {
        "name": "opd",
        "stage": {"kind": "opd", "cascade": cascade},
        "model": {"path": str(student)},
        "data": {"sources": {}},
        "hub": {"stage.cascade.first.teacher.path": f"Qwen/Qwen3-30B@{COMMIT}"},
    }
    write(directory / "config.json", config)
    write(directory / "header.json", {"num_steps": 6, "parameters": 17, "experts": None})
    names = ("model.path", "stage.cascade.second.teacher.path")
    content = {n: {"digest": "cd" * 32, "files": look(student)} for n in names}
    write(directory / "finished.json", {"content": content, "phases": ["first", "second"]})
    export(directory / "export")


def write_benchmark(directory: Path, model: Path, suite: str = "card") -> None:
    row = {"metric": "avg@8", "score": 61.25, "ci95": [58.0, 64.5], "n_items": 1319}
    found = {"model": str(model), "suite": suite, "rows": {"GSM8K": row}}
    write(directory / "benchmark.json", found | {"means": {"english": 61.25}})
    write(directory / "details.json", {"GSM8K": {"revision": "e53f", "licence": "mit"}})
    content = {"model.path": {"files": look(model), "digest": None}}
    write(directory / "finished.json", {"content": content})


def card_of(directory: Path, *words: str) -> str:
    assert main([str(directory), *words]) == 0
    return (directory / "export" / "README.md").read_text()


def lines_with(text: str, *parts: str) -> list[str]:
    return [line for line in text.splitlines() if all(part in line for part in parts)]


def test_a_card_tells_all_stages_up_to_the_base(tmp_path: Path) -> None:
    write_sft(tmp_path / "sft")
    write_opd(tmp_path / "opd", tmp_path / "sft" / "export")
    write_benchmark(tmp_path / "measured", tmp_path / "opd" / "export")
    words = ["--benchmark", str(tmp_path / "measured"), "--licence", "mit"]
    text = card_of(tmp_path / "opd", *words)
    assert yaml.safe_load(text.split("---\n")[1]) == ModelCard(text).data.to_dict()
    assert ModelCard(text).data.to_dict() == {
        "license": "mit",
        "language": ["de", "zh"],
        "base_model": ["AIDC-AI/Marco-Mini-Base"],
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "datasets": ["allenai/Dolci-Instruct-SFT"],
        "tags": ["marco-train", "supervised-fine-tuning", "on-policy-distillation"],
    }
    assert lines_with(text, "| `sft` | sft | the start above |", "| 2 | 512 conversations |")
    assert lines_with(text, "| `opd` | opd | `export` of `sft` | sha256 `cdcdcdcdcdcd` |")
    link = f"[Qwen/Qwen3-30B](https://huggingface.co/Qwen/Qwen3-30B), revision `{COMMIT[:12]}`"
    assert lines_with(text, f"| first | all | {link} | native |")
    assert lines_with(text, "| second |", "weights were not seen", "sha256 `cdcdcdcdcdcd`")
    assert lines_with(text, "| general |", f"`{COMMIT[:12]}` | odc-by | 900 | 0.9 |")
    assert lines_with(text, "| own | `own.jsonl` | sha256 `abababababab` | not known | 100 |")
    assert "Trained by supervised fine-tuning, then on-policy distillation, with" in text
    assert lines_with(
        text, "`sft`: 1000 rows, 1000 of them judged; not used: 3 data/dropped_too_long"
    )
    assert lines_with(text, "| `sft` | 8 x NVIDIA H100 | bfloat16 |", "| 1 | 8 | 60.5 |")
    assert lines_with(text, "| GSM8K | avg@8 | 61.2 | 58.0 to 64.5 | 1,319 | e53f | mit |")
    assert lines_with(text, "- Rows of own: not known.")
    assert "somebody" not in text and "made up" not in text


def test_the_cards_licence_is_that_of_the_runs_config(tmp_path: Path) -> None:
    write_sft(tmp_path / "sft")
    assert ModelCard(card_of(tmp_path / "sft")).data.get("license") == "apache-2.0"


def test_what_no_file_tells_is_not_known(tmp_path: Path) -> None:
    write_sft(tmp_path / "sft")
    for name in ("header.json", "metrics.jsonl", "finished.json"):
        (tmp_path / "sft" / name).unlink()
    text = card_of(tmp_path / "sft")
    assert "language" not in ModelCard(text).data.to_dict()
    assert "**The run `sft` is not finished**: step 0 of not known." in text
    assert "Parameters: not known." in text and "No step was logged." in text
    assert lines_with(text, "| own | `own.jsonl` | digest not known | not known | not known |")
    assert "Benchmarks" not in text


def test_made_up_items_are_called_so(tmp_path: Path) -> None:
    write_sft(tmp_path / "sft")
    write_benchmark(tmp_path / "sft" / "benchmark", tmp_path / "sft" / "export", "fixture")
    text = card_of(tmp_path / "sft")
    assert "The items are made up" in text
    assert lines_with(text, "| GSM8K |", "| made up | made up |")


def test_cards_of_sets_that_were_built_lie_beside_the_models(tmp_path: Path) -> None:
    built = tmp_path / "data" / "culture"
    built.mkdir(parents=True)
    (built / "culture.jsonl").touch()
    (built / "DATA_CARD.md").write_text("# How it was built\n")
    (tmp_path / "data" / "culture.jsonl").symlink_to("culture/culture.jsonl")
    run = tmp_path / "sft"
    write_sft(run)
    config = json.loads((run / "config.json").read_text())
    path = str(tmp_path / "data" / "culture.jsonl")
    config["data"]["sources"]["my/set"] = {"kind": "auto", "path": path}
    write(run / "config.json", config)
    text = card_of(run)
    assert "that nobody released: [DATA_CARD_my_set.md](DATA_CARD_my_set.md)." in text
    copied = run / "export" / "DATA_CARD_my_set.md"
    assert copied.read_text() == "# How it was built\n"


def test_files_have_no_revision(tmp_path: Path) -> None:
    write_sft(tmp_path / "sft")
    write_benchmark(tmp_path / "sft" / "benchmark", tmp_path / "sft" / "export")
    stage = {"kind": "benchmark", "data_dir": "mirror"}
    write(tmp_path / "sft" / "benchmark" / "config.json", {"stage": stage})
    text = card_of(tmp_path / "sft")
    assert "Sets were read from files" in text
    assert lines_with(text, "| GSM8K |", "| not known | mit |")


@pytest.mark.parametrize(
    ("made", "says"),
    [
        ("of another", "give a benchmark of that, or leave it out"),
        ("before", "was measured before"),
        ("torn", "holds no benchmark.json"),
    ],
)
def test_a_benchmark_of_another_model_is_refused(
    made: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_sft(tmp_path / "sft")
    model = tmp_path / "sft" / "export"
    if made == "of another":
        model = tmp_path / "other"
        export(model)
    write_benchmark(tmp_path / "measured", model)
    if made == "before":
        export(model, "other weights")
    if made == "torn":
        (tmp_path / "measured" / "benchmark.json").write_text('{"model": ')
    assert main([str(tmp_path / "sft"), "--benchmark", str(tmp_path / "measured")]) == 1
    assert says in capsys.readouterr().err
    assert not (tmp_path / "sft" / "export" / "README.md").exists()


def test_a_run_that_trained_nothing_has_no_card(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "config.json", {"stage": {"kind": "benchmark"}})
    assert main([str(tmp_path)]) == 1
    assert "(its stage is benchmark)" in capsys.readouterr().err


def test_an_export_that_was_made_anew_is_told_of(tmp_path: Path) -> None:
    write_sft(tmp_path / "sft")
    write_opd(tmp_path / "opd", tmp_path / "sft" / "export")
    export(tmp_path / "sft" / "export", "other weights")
    assert "**The export of `sft` was made anew**" in card_of(tmp_path / "opd")


def test_a_card_holds_no_secret_and_no_markup_of_strangers(tmp_path: Path) -> None:
    write_run(tmp_path / "run", 10)
    assert main([str(tmp_path / "run"), "--output", str(tmp_path / "card.md")]) == 0
    text = (tmp_path / "card.md").read_text()
    assert "me:pw" not in text
    assert '# &lt;script>alert("x")&lt;/script>&amp;' in text


def test_the_licence_of_what_a_run_began_with_is_that_of_its_own_card(tmp_path: Path) -> None:
    write_sft(tmp_path / "sft")
    config = json.loads((tmp_path / "sft" / "config.json").read_text())
    base = tmp_path / "base"
    export(base)
    (base / "README.md").write_text("---\nlicense: mit\n---\n# base\n")
    write(tmp_path / "sft" / "config.json", config | {"model": {"path": str(base)}, "hub": {}})
    text = card_of(tmp_path / "sft")
    assert lines_with(text, "- What it began with (`base`", "): mit.")
    assert "base_model" not in ModelCard(text).data.to_dict()
    note = {"dense": f"Qwen/Qwen3-0.6B-Base@{COMMIT}", "num_experts": 256, "expert_width": 768}
    write(base / "upcycling.json", note | {"top_k": 8, "drop_ratio": 0.5})
    text = card_of(tmp_path / "sft")
    assert ModelCard(text).data.get("base_model") == ["Qwen/Qwen3-0.6B-Base"]
    assert "upcycled to 256 experts of width 768, top-8, 0.5 of each drawn anew" in text
