"""The tasks of the model card: what they read, what they ask, and what they refuse."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from marco_train.commands import benchmark, pin_benchmarks
from marco_train.commands.pin_benchmarks import pin
from marco_train.config.benchmark import (
    BENCHMARK_DIR,
    card_rows,
    sections,
    suites,
    tasks_of,
)
from marco_train.errors import InputError
from marco_train.evaluation.benchmark.tasks import (
    LANGUAGES,
    Kind,
    TaskSet,
    check_access,
    check_languages,
    load,
    prompt_text,
    questions_of,
    render,
    task_set_of,
    where_of,
)

FIXTURE = where_of("fixture")
# What each set is asked in of the card's 29 languages; of others English or their own.
NUM_LANGUAGES = {
    "global_mmlu": 24,
    "mmmlu": 11,
    "mmlu_prox_lite": 19,
    "mgpqa": 14,
    "flores_en_xx": 26,
    "flores_xx_en": 26,
    "wmt24pp_en_xx": 24,
    "wmt24pp_xx_en": 24,
    "mgsm": 9,
    "polymath": 16,
    "include": 25,
    "global_piqa": 29,
    "kazakh_mmlu": 2,
}


def items_of(task: str, **where: Any) -> list[dict[str, Any]]:
    """Items of a task, of the fixture unless others are given."""
    return load(set=task_set_of(task), **(where or FIXTURE))["test"]


def test_the_card_has_28_rows_of_three_sections_and_a_task_for_each() -> None:
    assert [len(names) for names in sections().values()] == [7, 10, 11]
    files = {file.stem for file in (BENCHMARK_DIR / "tasks").glob("[!_]*.yaml")}
    assert files == {*card_rows(), "own", "held_out"}
    for task, row in card_rows().items():
        assert task_set_of(task)["row"] == row.name


@pytest.mark.parametrize("task", card_rows())
def test_a_task_says_what_it_reads_and_in_which_of_the_29_languages(task: str) -> None:
    task_set = TaskSet.of(task_set_of(task))
    assert len(task_set.subsets) == NUM_LANGUAGES.get(task, 1)
    assert set(task_set.subsets) <= set(LANGUAGES)
    assert task_set.licence
    assert prompt_text(task_set.prompt)
    metric = {"Acc": {Kind.choice}, "EM": {Kind.number, Kind.formula}, "BLEU": {Kind.translation}}
    assert task_set.kind in metric[card_rows()[task].metric]


@pytest.mark.parametrize("task", card_rows())
def test_the_fixture_of_a_task_has_two_to_four_items(task: str) -> None:
    items = items_of(task)
    assert 2 <= len(items) <= 4
    assert len({item["id"] for item in items}) == len(items)
    assert all(item["gold"] and item["prompt"] for item in items)


def test_languages_are_those_of_the_card() -> None:
    card = "en zh ar de es fr ko ja pt tr id it nl pl ru vi th he uk ms bn cs ur kk el ro hu ne az"
    assert set(LANGUAGES) == set(card.split())


CHOICE = "Think step by step. Then put the letter of your choice into \\boxed{}, as in \\boxed{C}."
ANSWER = "Think step by step. Then put your final answer into \\boxed{}."


def test_prompts_are_these_to_the_byte() -> None:
    asked = {
        (task, item["id"]): item["prompt"]
        for task in ("mmlu", "agieval", "gsm8k", "global_piqa", "flores_xx_en", "indo_culture")
        for item in items_of(task)
    }
    assert asked["mmlu", "en/all/test/0"] == (
        f"Which has four legs?\nA. cow\nB. hen\nC. eel\nD. ant\n\n{CHOICE}"
    )
    assert asked["agieval", "en/aqua_rat/train/0"] == f"1 + 1 = ?\nA. 1\nB. 2\nC. 3\n\n{CHOICE}"
    assert asked["agieval", "en/sat-en/train/0"] == (
        f"Ann has a red hat.\nWhat is red?\nA. hat\nB. Ann\nC. sky\n\n{CHOICE}"
    )
    assert asked["gsm8k", "en/main/test/0"] == (
        f"Ann has 3 pens and buys 4. How many has she?\n\n{ANSWER}"
    )
    assert asked["global_piqa", "zh/cmn_hans/test/0"] == (
        "喝汤用\nA. 刀。\nB. 勺。\n\n"
        "One of the two is right. Think step by step. Then put its letter into \\boxed{}."
    )
    assert asked["flores_xx_en", "de/deu_Latn/devtest/0"] == (
        "Translate this from German into English. Write nothing but the translation.\n\n"
        "Die Katze schläft."
    )
    assert asked["indo_culture", "id/default/test/0"] == (
        "How does this go on in Bali, Indonesia?\nAni lapar. Dia ...\n"
        f"A. makan.\nB. tidur.\nC. lari.\n\n{CHOICE}"
    )


def test_what_stands_in_a_question_is_no_placeholder() -> None:
    asked = {"question": "What is {{options}}?", "options": "A. {{question}}"}
    assert (
        render("choice_v1", asked) == f"What is {{{{options}}}}?\nA. {{{{question}}}}\n\n{CHOICE}"
    )


def test_references_are_those_of_the_rows() -> None:
    golds = {(task, i["id"]): i["gold"] for task in card_rows() for i in items_of(task)}
    assert golds["gsm8k", "en/main/test/1"] == "2000"
    assert golds["math", "en/prealgebra/test/0"] == r"\frac{3}{4}"
    assert golds["polymath", "en/en/top/0"] == "x"
    assert golds["mmlu_pro", "en/default/test/0"] == "C"
    assert golds["include", "tr/Turkish/test/0"] == "B"
    assert golds["indo_mmlu", "id/IndoMMLU/test/1"] == "B"
    assert golds["wmt24pp_en_xx", "fr/en-fr_FR/train/0"] == "Je vois un chien."
    assert golds["wmt24pp_xx_en", "fr/en-fr_FR/train/0"] == "I see a dog."


def test_the_order_of_choices_that_are_shuffled_is_the_items_own() -> None:
    first, again = items_of("gpqa_diamond"), items_of("gpqa_diamond")
    assert first == again
    for item, right in zip(first, ["iron", "9"], strict=True):
        assert item["choices"]["ABCD".index(item["gold"])] == right
    assert {item["gold"] for item in items_of("mgpqa") + first} != {"A"}


def test_levels_have_weights_and_choices_that_a_row_lacks_are_left_out() -> None:
    assert {item["group"]: item["weight"] for item in items_of("polymath")} == {
        "low": 1,
        "medium": 2,
        "high": 4,
        "top": 8,
    }
    sizes = {item["id"]: len(item["choices"]) for item in items_of("mmlu_prox_lite")}
    assert sizes == {"fr/fr/test/0": 3, "th/th/test/0": 4}


def test_rows_that_a_set_marks_are_left_out() -> None:
    assert [i["question"] for i in items_of("wmt24pp_en_xx")] == ["I see a dog.", "Good morning."]
    assert len(items_of("indo_mmlu")) == 2  # and an example for prompts


def write_sets(directory: Path, rows: list[dict[str, Any]]) -> None:
    """CMMLU in three layouts that mirrors have, a subject in each."""
    (directory / "anatomy").mkdir(parents=True)
    pq.write_table(
        pa.Table.from_pylist(rows), directory / "anatomy" / "test-00000-of-00001.parquet"
    )
    (directory / "data" / "test").mkdir(parents=True)
    with (directory / "data" / "test" / "arts.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    (directory / "law_test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (directory / "law_dev.jsonl").write_text(json.dumps(rows[0]) + "\n")


CMMLU_ROW = {"Question": "3 + 3 = ?", "A": "5", "B": "6", "C": "7", "D": "8", "Answer": "B"}


def test_a_local_mirror_may_be_parquet_csv_or_json_lines(tmp_path: Path) -> None:
    write_sets(tmp_path, [CMMLU_ROW, CMMLU_ROW])
    places: tuple[dict[str, Any], ...] = (
        {"data_dirs": {"cmmlu": str(tmp_path)}},
        {"data_dir": str(tmp_path.parent)},
    )
    for where in places:
        if "data_dir" in where:
            tmp_path.rename(tmp_path.parent / "cmmlu")
        ids = [item["id"] for item in items_of("cmmlu", **where)]
        assert ids == [f"zh/{name}/test/{n}" for name in ("anatomy", "arts", "law") for n in (0, 1)]


def test_a_share_of_a_subset_does_not_depend_on_others(tmp_path: Path) -> None:
    rows = [{**CMMLU_ROW, "Question": f"{n}?"} for n in range(100)]
    write_sets(tmp_path, rows)
    where: dict[str, Any] = {
        "set": task_set_of("cmmlu"),
        "data_dirs": {"cmmlu": str(tmp_path)},
        "share": 0.05,
    }
    before = [item["id"] for item in load(**where)["test"] if "law" not in item["id"]]
    assert len(before) == 2 * 5
    (tmp_path / "law_test.jsonl").unlink()
    (tmp_path / "law_dev.jsonl").unlink()
    assert [item["id"] for item in load(**where)["test"]] == before


@pytest.mark.parametrize(
    ("tasks", "languages", "said"),
    [
        (
            ["gsm8k", "mgsm", "cmmlu"],
            ["de", "ja"],
            "is de, ja, and gsm8k, cmmlu have no items in them: choose suite=mgsm",
        ),
        (["gsm8k"], ["fr"], "is fr, and gsm8k has no items in them: choose another suite"),
        (["mgsm"], ["de", "zhh"], "'zhh', which is none of the card's: did you mean zh. Known"),
    ],
)
def test_languages_that_tasks_have_not_are_refused_before_rows_are_read(
    tasks: list[str], languages: list[str], said: str
) -> None:
    with pytest.raises(InputError, match=said):
        check_languages(tasks, languages)
    check_languages(["mgsm", "polymath"], ["de", "ko"])  # each has one of them


def test_a_directory_of_sets_that_is_not_there_is_refused(tmp_path: Path) -> None:
    absent = str(tmp_path / "none")
    with pytest.raises(InputError, match=r"stage\.data_dir: there is no directory '.*none'"):
        check_access(["gsm8k"], where_of("gsm8k", absent))


def test_languages_are_chosen_by_their_codes() -> None:
    chosen = load(set=task_set_of("mgsm"), languages=["bn"], **FIXTURE)["test"]
    assert [item["language"] for item in chosen] == ["bn"]
    with pytest.raises(
        InputError, match="MGSM has no items in the languages xx: its languages are"
    ):
        load(set=task_set_of("mgsm"), languages=["xx"], **FIXTURE)


def test_a_set_that_only_a_program_makes_is_refused_with_the_command_that_fetches_it() -> None:
    with pytest.raises(InputError) as refused:
        items_of("cmmlu", data_dir=None)
    assert str(refused.value) == (
        "CMMLU: lmlmcat/cmmlu on the hub is a program that makes rows, which is not run: fetch its "
        "files with `hf download lmlmcat/cmmlu --repo-type dataset --local-dir DIR` and give "
        "stage.data_dirs.cmmlu=DIR, or stage.data_dir of a directory that has them in its folder "
        "cmmlu; expected are DIR/<subset>/test.parquet, .jsonl or .csv, or DIR/<subset>.parquet "
        "where there is one split, with the columns Question, A, B, C, D, Answer"
    )


def test_all_sets_that_are_not_there_are_named_at_once() -> None:
    with pytest.raises(InputError) as refused:
        list(questions_of("card"))
    assert "CMMLU: " in str(refused.value) and "IndoMMLU: " in str(refused.value)


def test_the_terms_of_a_gated_set_are_part_of_the_way_to_it(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="FLORES-200 En-Xx: there is no directory") as refused:
        items_of("flores_en_xx", data_dirs={"flores": str(tmp_path / "none")})
    said = str(refused.value)
    assert (
        "accept the terms at https://huggingface.co/datasets/openlanguagedata/flores_plus" in said
    )
    assert "DIR/arb_Arab/devtest.parquet" in said


def test_a_column_that_is_absent_is_named(tmp_path: Path) -> None:
    row = {key: value for key, value in CMMLU_ROW.items() if key != "Answer"}
    write_sets(tmp_path, [row])
    with pytest.raises(InputError, match=r"subset 'anatomy'.*: row 0 has no column 'Answer', but"):
        items_of("cmmlu", data_dirs={"cmmlu": str(tmp_path)})


def test_labels_that_are_not_published_are_not_taken_for_wrong_keys(tmp_path: Path) -> None:
    row = {"id": 0, "question": "?", "A": "1", "B": "2", "C": "3", "D": "4", "answer": ""}
    (tmp_path / "law").mkdir()
    (tmp_path / "law" / "val.jsonl").write_text((json.dumps(row) + "\n") * 20)
    with pytest.raises(
        InputError, match=r"C-Eval: no row of 'law', split val, has an answer: the "
    ):
        items_of("ceval", data_dirs={"ceval": str(tmp_path)})


def test_a_few_keys_that_point_nowhere_are_left_out_and_counted_and_many_are_refused(
    tmp_path: Path,
) -> None:
    source = BENCHMARK_DIR / "fixture" / "indo_mmlu" / "IndoMMLU.csv"
    file = tmp_path / "IndoMMLU.csv"
    shutil.copy(source, file)
    faulty = '9,X,SD,Apa?,"A. ya\nB. tidak",E,0\n'
    file.write_text(source.read_text(encoding="utf-8") + 2 * faulty, encoding="utf-8")
    found = load(set=task_set_of("indo_mmlu"), data_dirs={"indo_mmlu": str(tmp_path)})["test"]
    assert (len(found), found.num_faulty) == (2, 2)
    assert found.left_out.startswith("2 of 4 rows left out: their key points to no choice")
    file.write_text(source.read_text(encoding="utf-8") + 11 * faulty, encoding="utf-8")
    with pytest.raises(InputError, match="IndoMMLU: the key of 11 of 13 rows of 'IndoMMLU' points"):
        items_of("indo_mmlu", data_dirs={"indo_mmlu": str(tmp_path)})


def test_sides_of_a_translation_have_as_many_sentences(tmp_path: Path) -> None:
    for code, count in (("eng_Latn", 3), ("deu_Latn", 2)):
        (tmp_path / f"{code}.jsonl").write_text('{"text": "x"}\n' * count)
    where = {"data_dirs": {"flores": str(tmp_path)}, "languages": ["de"]}
    with pytest.raises(InputError, match="'eng_Latn' has 3 sentences and 'deu_Latn' has 2"):
        items_of("flores_en_xx", **where)


def test_a_suite_is_a_section_or_tasks_and_a_typing_error_is_told_from_what_is_meant() -> None:
    assert len(tasks_of("card")) == len(tasks_of("fixture")) == len(tasks_of("card_lite")) == 28
    assert suites()["english"][0] == "mmlu"
    assert tasks_of("mgsm,marco_gsm8k") == ["gsm8k", "mgsm"]  # in the card's order
    with pytest.raises(
        InputError, match=r"'gsm9k', which is no suite and no task: did you mean gsm8k\?"
    ):
        tasks_of("mmlu,gsm9k")
    with pytest.raises(InputError, match=r"did you mean multilingual\?"):
        tasks_of("multilingua")


def test_published_figures_are_the_cards() -> None:
    rows = card_rows()
    assert rows["mmlu"].published["Marco-Mini-Instruct"] == 83.4
    assert rows["polymath"].published["Qwen3-4B-Instruct"] == 47.2
    assert rows["indo_culture"].published["LFM2-24B-A2B"] == 44.2
    assert [len(row.published) for row in rows.values()] == [6] * 28


def test_revisions_are_written_where_none_stands(tmp_path: Path) -> None:
    for task in ("mgsm", "gsm8k"):
        shutil.copy(BENCHMARK_DIR / "tasks" / f"{task}.yaml", tmp_path)
    shutil.copy(BENCHMARK_DIR / "tasks" / "_avg_at_8.yaml", tmp_path)
    before = (tmp_path / "mgsm.yaml").read_text()
    assert pin(tmp_path, lambda path: f"of-{path}", again=False) == {"mgsm": "of-juletxara/mgsm"}
    expected = before.replace("    revision: null\n", "    revision: of-juletxara/mgsm\n")
    assert (tmp_path / "mgsm.yaml").read_text() == expected
    assert list(pin(tmp_path, lambda path: "new", again=True)) == ["gsm8k", "mgsm"]


def test_a_benchmark_is_pinned_by_a_word_of_its_verb(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pin_benchmarks, "pin", lambda *_, again: {"mgsm": f"again={again}"})
    benchmark.main(["pin", "--again"])
    assert capsys.readouterr().out == "mgsm: again=True\n"
