"""Which languages are near each other by the experts that they use, from one command."""

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from marco_train.commands.signatures import main
from marco_train.evaluation.signature_page import signature_page
from tests.helpers.pages import shown_text, tags_of
from tests.helpers.rows import chat
from tests.helpers.world import World


def rows(file: Path, column: str = "language", languages: str = "en de zh") -> Path:
    """English and German say the same, Chinese something else; one row has no language."""
    said = {"en": "train math one", "de": "train math one", "zh": "test alignment vier seis"}
    lines = [
        json.dumps(chat(f"{said[language]} {n}?", said[language]) | {column: language})
        for language in languages.split()
        for n in range(4)
    ]
    file.write_text("\n".join([*lines, json.dumps(chat("two?", "two")), "no row"]) + "\n")
    return file


def asked(world: World, tmp_path: Path, *more: str, model: str = "student") -> int:
    words = [world.path(model), "--data", str(tmp_path / "rows.jsonl")]
    return main([*words, "--output", str(tmp_path / "out"), "--dtype", "float32", *more])


def test_languages_that_use_the_same_experts_are_a_family(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows(tmp_path / "rows.jsonl")
    assert asked(world, tmp_path, "--rows", "3") == 0
    said = capsys.readouterr()
    assert said.out.splitlines() == ["zh", "de, en", str(tmp_path / "out" / "signatures.html")]
    assert said.err.strip() == "rows left out: 1 without a language, 1 malformed"
    found = json.loads((tmp_path / "out" / "signatures.json").read_text())
    assert found["families"] == [["zh"], ["de", "en"]]
    assert found["num_rows"] == {"de": 3, "en": 3, "zh": 3}
    (first, second, apart, size), last = found["linkage"]
    assert (first, second, size) == (0, 1, 2) and apart == pytest.approx(0, abs=1e-9)
    assert last[2] == pytest.approx((found["distances"][0][2] + found["distances"][1][2]) / 2)
    layers = found["expert_shares"][0]
    assert [len(layer) for layer in layers] == [8, 8]
    assert [sum(layer) for layer in layers] == pytest.approx([1, 1])
    ElementTree.parse(tmp_path / "out" / "signatures.svg")
    page = (tmp_path / "out" / "signatures.html").read_text()
    assert [tag for tag, _ in tags_of(page)].count("img") == 3
    assert "1 - Pearson correlation" in shown_text(page)


def test_a_column_of_another_name_is_taken(world: World, tmp_path: Path) -> None:
    rows(tmp_path / "rows.jsonl", "lang")
    assert asked(world, tmp_path, "--columns", "language=lang") == 0


@pytest.mark.parametrize(
    ("column", "languages", "model", "says"),
    [
        ("lang", "en de zh", "student", "no usable row has one; 13 rows are left out: without"),
        ("language", "en", "student", "all usable rows are of 'en'; 1 rows are left out: without"),
        ("language", "en de", "teacher_first/export", "is dense, and has no experts to choose"),
    ],
)
def test_what_is_missing_is_said(
    column: str,
    languages: str,
    model: str,
    says: str,
    world: World,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows(tmp_path / "rows.jsonl", column, languages)
    assert asked(world, tmp_path, model=model) == 1
    assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_names_of_strangers_stay_texts() -> None:
    found = {
        "model": "<b>m</b>",
        "data": "d",
        "languages": ["<i>", "de"],
        "num_rows": {"<i>": 1, "de": 1},
        "num_tokens": {"<i>": 4, "de": 4},
        "expert_shares": [[[1.0, 0.0]], [[0.0, 1.0]]],
        "distances": [[0.0, 2.0], [2.0, 0.0]],
        "cut": 1.4,
        "families": [["<i>"], ["de"]],
    }
    assert not {"b", "i"} & {tag for tag, _ in tags_of(signature_page(found))}
