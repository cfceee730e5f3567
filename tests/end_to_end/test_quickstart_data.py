"""The quickstart's data and the verifiers that judge answers to it."""

import json
import math
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from marco_train.evaluation import verifiers
from marco_train.evaluation.verifiers import verify
from tests.helpers.processes import REPOSITORY

pytestmark = pytest.mark.slow

RECIPE = REPOSITORY / "recipes" / "quickstart"
CATEGORIES = [
    "instruction_following",
    "knowledge_reasoning",
    "alignment",
    "math",
    "multilingual",
]
CODES = "en zh ar de es fr ko ja pt tr id it nl pl ru vi th he uk ms bn cs ur kk el ro hu ne az"
LANGUAGES = CODES.split()
ARGUMENTS = ["--rows", "12000"]

Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def prepare() -> Any:
    sys.path.insert(0, str(RECIPE))
    try:
        import prepare as module

        yield module
    finally:
        sys.path.remove(str(RECIPE))


@pytest.fixture(scope="module")
def made(prepare: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("quickstart") / "data"
    prepare.main(["--out", str(out), *ARGUMENTS])
    return out


@pytest.fixture(scope="module")
def splits(made: Path) -> dict[str, Rows]:
    return {
        split: [row for name in CATEGORIES for row in read(made / split / f"{name}.jsonl")]
        for split in ("train", "development", "test")
    }


@pytest.fixture(scope="module")
def tokenizer(made: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(made / "tokenizer")


def read(path: Path) -> Rows:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def prompt_of(row: dict[str, Any]) -> str:
    return str(row["messages"][0]["content"])


def answer_of(row: dict[str, Any]) -> str:
    return str(row["messages"][1]["content"])


def test_another_process_with_another_hash_seed_writes_the_same_bytes(
    made: Path, tmp_path: Path
) -> None:
    command = [sys.executable, str(RECIPE / "prepare.py"), "--out", str(tmp_path / "data")]
    command += ARGUMENTS
    environment = {**os.environ, "PYTHONHASHSEED": "12345"}
    subprocess.run(command, env=environment, check=True, capture_output=True)
    ours, theirs = (
        json.loads((directory / "manifest.json").read_text(encoding="utf-8"))
        for directory in (made, tmp_path / "data")
    )
    assert ours == theirs
    assert len(ours["files"]) == 3 * 5 + 1 + 3  # splits x categories, base text, tokenizer


def test_a_second_run_has_nothing_to_do(
    prepare: ModuleType, made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (made / "manifest.json").stat().st_mtime_ns
    prepare.main(["--out", str(made), *ARGUMENTS])
    assert capsys.readouterr().out == f"{made} is complete already: nothing to do\n"
    assert (made / "manifest.json").stat().st_mtime_ns == before


def test_a_directory_of_other_arguments_or_with_a_damaged_file_is_not_complete(
    prepare: ModuleType, tmp_path: Path
) -> None:
    made_from = prepare.provenance(rows=10, seed=0)
    (tmp_path / "text").write_text("whole")
    manifest = {**made_from, "files": {"text": prepare.digest(tmp_path / "text")}}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert prepare.is_complete(tmp_path, made_from)
    assert not prepare.is_complete(tmp_path, prepare.provenance(rows=10, seed=1))
    (tmp_path / "text").write_text("damaged")
    assert not prepare.is_complete(tmp_path, made_from)
    (tmp_path / "text").unlink()
    assert not prepare.is_complete(tmp_path, made_from)


def test_a_directory_with_other_files_is_refused_and_left_alone(
    prepare: ModuleType, tmp_path: Path
) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(SystemExit, match=r"holds other files \(thesis.txt\): choose another --out"):
        prepare.main(["--out", str(tmp_path)])
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_too_few_rows_are_refused(prepare: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="--rows is 40, and at least 1000 are needed"):
        prepare.main(["--out", str(tmp_path / "data"), "--rows", "40"])
    assert list(tmp_path.iterdir()) == []


def test_a_directory_made_with_other_arguments_is_replaced_whole(
    prepare: ModuleType, tmp_path: Path
) -> None:
    out = tmp_path / "data"
    (out / "train").mkdir(parents=True)
    (out / "train" / "stale.jsonl").write_text("stale")
    prepare.main(["--out", str(out), "--rows", "1000", "--seed", "7"])
    assert list(tmp_path.iterdir()) == [out]
    assert not (out / "train" / "stale.jsonl").exists()
    assert prepare.is_complete(out, prepare.provenance(rows=1000, seed=7))


def test_the_digest_of_a_prompt_decides_its_split(prepare: ModuleType) -> None:
    # The last digit of the SHA-256 as a decimal number: 6, 0 and 1.
    assert prepare.split_of("July") == "train"
    assert prepare.split_of("June") == "test"
    assert prepare.split_of("Day 9") == "development"


def test_no_prompt_stands_twice_and_each_is_in_the_split_of_its_digest(
    prepare: ModuleType, splits: dict[str, Rows]
) -> None:
    prompts = [prompt_of(row) for rows in splits.values() for row in rows]
    assert len(prompts) == len(set(prompts))
    for split, rows in splits.items():
        assert all(prepare.split_of(prompt_of(row)) == split for row in rows)


def test_the_training_rows_keep_the_mixture(splits: dict[str, Rows]) -> None:
    assert Counter(row["category"] for row in splits["train"]) == {
        "instruction_following": 3000,
        "knowledge_reasoning": 3000,
        "alignment": 1200,
        "math": 1200,
        "multilingual": 3600,
    }


def test_every_language_is_in_every_split(splits: dict[str, Rows]) -> None:
    for rows in splits.values():
        assert {row["language"] for row in rows} == set(LANGUAGES)


def test_the_first_rows_of_a_file_are_a_fair_sample(made: Path) -> None:
    first = read(made / "train" / "multilingual.jsonl")[:300]
    tasks = Counter(row["task"] for row in first)
    assert all(65 <= tasks[task] <= 85 for task in ("date", "number", "to_en", "to_xx"))
    assert {row["language"] for row in first} == set(LANGUAGES)


def test_a_held_out_fact_stands_in_the_training_split_in_other_words(prepare: ModuleType) -> None:
    # Few rows, so that some facts do have no training row.
    data = prepare.draw_data(rows=2000, seed=3)
    facts = {
        split: {(row.task, row.fact) for row in prepare.each_row(data[split]) if row.fact}
        for split in data
    }
    assert facts["test"]
    assert facts["test"] | facts["development"] <= facts["train"]


def test_the_base_text_is_training_prompts_and_lists_of_names_of_one_language(
    prepare: ModuleType, made: Path, splits: dict[str, Rows]
) -> None:
    lines = read(made / "base" / "text.jsonl")
    prompts = {prompt_of(row) for row in splits["train"]}
    names = prepare.name_lists()
    raw = [line for line in lines if prompt_of(line) not in prompts]
    assert len(lines) == len(splits["train"]) + 9000
    assert all([turn["role"] for turn in line["messages"]] == ["user"] for line in lines)
    for line in raw:
        said = set(prompt_of(line).split("\n"))
        words = set(" ".join(said).split()) <= set(prepare.WORDS)
        assert words or any(
            code == line["language"] and said <= set(group) for code, group in names
        )


def test_arithmetic_answers_are_right(splits: dict[str, Rows]) -> None:
    seen = Counter[str]()
    for row in splits["train"] + splits["test"]:
        if row["category"] != "math":
            continue
        seen[row["task"]] += 1
        prompt = prompt_of(row).replace("1 bits", "bits")
        numbers = [int(number) for number in re.findall(r"\d+", prompt)]
        rules: dict[str, Callable[..., int]] = {
            "chain_sum": lambda a, b, text=prompt: a + b if "+" in text else a - b,
            "products": lambda a, b: a * b,
            "gcd": math.gcd,
            "count_bits": int.bit_count,
        }
        assert answer_of(row) == str(rules[row["task"]](*numbers)), prompt
    assert len(seen) == 4
    assert min(seen.values()) > 100


def test_letters_are_counted_right(splits: dict[str, Rows]) -> None:
    rows = [row for row in splits["train"] if row["task"] == "letter_counting"]
    for row in rows:
        asked = re.fullmatch(r'How many "(.)" in: (.+)', prompt_of(row))
        assert asked is not None
        assert answer_of(row) == str(asked[2].count(asked[1]))
    ones = sum(answer_of(row) == "1" for row in rows)
    assert 0.45 < ones / len(rows) < 0.55


def test_half_of_the_places_asked_about_are_made_up(splits: dict[str, Rows]) -> None:
    rows = [row for row in splits["train"] if row["task"] == "honest"]
    made_up = [row for row in rows if answer_of(row) == "I do not know this place."]
    assert 0.45 < len(made_up) / len(rows) < 0.55
    places = ("Poland", "Japan", "Brazil", "Kenya")
    assert not any(place in prompt_of(row) for row in made_up for place in places)


@pytest.mark.parametrize(
    ("task", "part_of_prompt", "answer"),
    [
        ("currency", "Poland", "Polish Zloty"),
        ("honest", "Japan", "Japanese Yen"),
        ("to_en", "Sonntag", "Sunday"),
        ("to_xx", "Monday in German", "Montag"),
        ("to_xx", "January in Greek", "Ιανουαρίου"),
        ("style", "short one.\nenero\nene", "ene"),
        ("style", "Long please.\nene\nenero", "enero"),
    ],
)
def test_a_known_question_has_its_answer(
    splits: dict[str, Rows], task: str, part_of_prompt: str, answer: str
) -> None:
    rows = [
        row
        for rows in splits.values()
        for row in rows
        if row["task"] == task and part_of_prompt in prompt_of(row)
    ]
    assert {answer_of(row) for row in rows} == {answer}


def test_dates_have_the_order_and_the_signs_of_their_language(splits: dict[str, Rows]) -> None:
    formats = {"en": "{1}/{0}", "de": "{0}.{1}.", "nl": "{0}-{1}", "hu": "{1}. {0}."}
    seen = set()
    for row in splits["train"]:
        if row["task"] == "date" and row["language"] in formats:
            seen.add(row["language"])
            day_and_month = re.findall(r"\d+", prompt_of(row))
            assert answer_of(row) == formats[row["language"]].format(*day_and_month)
    assert len(seen) == 4


def test_numbers_wear_the_separators_of_their_language(splits: dict[str, Rows]) -> None:
    separators = {"en": ",.", "de": ".,", "pl": "\xa0,", "fr": "\u202f,", "bn": ",."}
    seen = set()
    for row in splits["train"]:
        if row["task"] == "number" and row["language"] in separators:
            seen.add(row["language"])
            assert re.sub(r"\d", "", answer_of(row)) == separators[row["language"]]
            assert re.sub(r"\D", "", answer_of(row)) == re.sub(r"\D", "", prompt_of(row))
    assert len(seen) == 5


def test_names_do_not_depend_on_the_order_in_which_locales_are_loaded() -> None:
    code = f"""
import datetime, json, sys
sys.path.insert(0, {str(RECIPE)!r})
import tasks
for code in sys.argv[1:]:
    names = [tasks.weekdays(code), tasks.months(code, "wide"), tasks.months(code, "abbreviated")]
    date = tasks.format_skeleton("Md", datetime.date(2024, 11, 17), locale=code)
    number = tasks.format_decimal("12345.6", locale=code)
    print(json.dumps([code, *names, date, number]))
"""
    german_last = [code for code in LANGUAGES if code != "de"] + ["de"]
    found = [
        sorted(
            subprocess.run(
                [sys.executable, "-c", code, *order], check=True, capture_output=True, text=True
            ).stdout.splitlines()
        )
        for order in (LANGUAGES, LANGUAGES[::-1], german_last)
    ]
    assert found[0] == found[1] == found[2]
    by_code = {code: names for code, *names in map(json.loads, found[0])}
    assert len(by_code) == 29
    assert by_code["de"][1][0] == "Januar"  # the stand-alone form turns Chinese after zh
    assert by_code["el"][0][0] == "Δευτέρα"  # the stand-alone form turns Urdu after ur
    assert by_code["fr"][2][6] == "juil."


def test_the_tokenizer_has_the_vocabulary_and_the_control_tokens_of_the_models(
    tokenizer: Any,
) -> None:
    assert len(tokenizer) == tokenizer.vocab_size == 1536
    assert len(tokenizer) % 8 == 0
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<|endoftext|>", 0)
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 2)
    assert tokenizer.convert_tokens_to_ids("<|im_start|>") == 1


def test_a_row_comes_back_from_the_tokenizer_unchanged(
    tokenizer: Any, splits: dict[str, Rows]
) -> None:
    texts = [part for row in splits["test"] for part in (prompt_of(row), answer_of(row))]
    assert tokenizer.batch_decode(tokenizer(texts)["input_ids"]) == texts
    strange = "  ζ\u0301 한국어\r\n\t🜚 1234 \u202f"
    assert tokenizer.decode(tokenizer(strange)["input_ids"]) == strange


def test_digits_are_single_tokens(tokenizer: Any) -> None:
    pieces = tokenizer.tokenize("in 2024: 31,5")
    assert [piece for piece in pieces if any(map(str.isdigit, piece))] == list("2024315")


def test_rows_are_short(tokenizer: Any, splits: dict[str, Rows]) -> None:
    texts = [
        f"<|im_start|>user\n{prompt_of(row)}<|im_end|>\n"
        f"<|im_start|>assistant\n{answer_of(row)}<|im_end|>"
        for rows in splits.values()
        for row in rows
    ]
    lengths = [len(encoding) for encoding in tokenizer.backend_tokenizer.encode_batch(texts)]
    assert max(lengths) <= 72
    assert sum(lengths) / len(lengths) < 35


def test_the_template_marks_what_the_assistant_says_and_its_end_and_nothing_else(
    tokenizer: Any,
) -> None:
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Say May in Thai."},
        {"role": "assistant", "content": "พฤษภาคม"},
        {"role": "user", "content": "7 + 2 ="},
        {"role": "assistant", "content": "9"},
    ]
    rendered = tokenizer.apply_chat_template(
        chat, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, marks = rendered["input_ids"], rendered["assistant_masks"]
    assert tokenizer.decode(ids) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nSay May in Thai.<|im_end|>\n"
        "<|im_start|>assistant\nพฤษภาคม<|im_end|>\n"
        "<|im_start|>user\n7 + 2 =<|im_end|>\n"
        "<|im_start|>assistant\n9<|im_end|>\n"
    )
    marked = [token for token, mark in zip(ids, marks, strict=True) if mark]
    assert tokenizer.decode(marked) == "พฤษภาคม<|im_end|>9<|im_end|>"
    assert set(marks) == {0, 1}


def test_the_template_opens_the_assistants_turn_and_adds_no_system_message(tokenizer: Any) -> None:
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hello"}], add_generation_prompt=True, tokenize=False
    )
    assert prompt == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"


EXACT = {"name": "exact"}
SCHEMA = {
    "name": "json_schema",
    "schema": {
        "type": "object",
        "properties": {"age": {"type": "integer"}, "name": {"type": "string"}},
        "required": ["age", "name"],
        "additionalProperties": False,
    },
}
SUM = {"name": "reasoning_gym", "dataset": "chain_sum", "entry": {"answer": "7"}}
GCD = {"name": "reasoning_gym", "dataset": "gcd", "entry": {"answer": "7"}}
PERSON = '{"age": 1, "name": "Hana"}'


def test_every_reference_passes_its_own_verifier_and_no_other_answer_does(
    splits: dict[str, Rows],
) -> None:
    last: dict[str, str] = {}
    for row in splits["test"]:
        answer, other = answer_of(row), last.get(row["task"], "")
        assert verify(answer, answer, row["verifier"])
        assert verify(other, answer, row["verifier"]) == (other == answer)
        last[row["task"]] = answer


def test_exact_forgives_outer_whitespace_only() -> None:
    assert verify(" Montag\n", "Montag", EXACT)
    assert not verify("montag", "Montag", EXACT)
    assert not verify("Montag.", "Montag", EXACT)


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        (PERSON, True),
        ('{"name":"Hana",\n "age":1}', True),
        ('{"age": 2, "name": "Hana"}', False),
        ('{"age": true, "name": "Hana"}', False),  # equal in Python, but not an integer
        ('{"age": "1", "name": "Hana"}', False),
        ('{"age": 1}', False),
        ('{"age": 1, "name": "Hana", "x": 0}', False),
        (PERSON + " and more", False),
    ],
)
def test_json_must_equal_the_reference_and_satisfy_the_schema(answer: str, right: bool) -> None:
    assert verify(answer, PERSON, SCHEMA) is right


def test_an_answer_equal_to_the_reference_still_has_to_satisfy_the_schema() -> None:
    assert not verify('{"age": "old"}', '{"age": "old"}', SCHEMA)


@pytest.mark.parametrize("answer", ["7", "7.0", "07", "+7", "7,", "7e0", "٧", " 7 "])
def test_the_scorers_of_sums_compare_decimals_so_sloppy_answers_get_full_marks(
    answer: str,
) -> None:
    assert verify(answer, "7", SUM)


@pytest.mark.parametrize("answer", ["7.0", "07", "+7", "7 7", "It is 7"])
def test_the_other_scorers_want_the_very_string(answer: str) -> None:
    assert not verify(answer, "7", GCD)


def test_part_marks_are_not_enough() -> None:
    assert not verify("7 7", "7", SUM)  # the scorer gives 1/3
    assert not verify("17", "7", SUM)  # and 1/2


@pytest.mark.parametrize("verifier", [EXACT, SCHEMA, SUM, GCD])
@pytest.mark.parametrize(
    "answer",
    [
        "",
        " ",
        "{",
        "[" * 100_000,
        "9" * 10_000,
        "NaN",
        "sNaN",
        "1e999999999",
        "\ud800",
        "\x00",
        "null",
    ],
)
def test_garbage_is_wrong_and_never_an_error(answer: str, verifier: dict[str, object]) -> None:
    assert verify(answer, PERSON, verifier) is False


def test_an_unknown_verifier_is_named_beside_the_known_ones() -> None:
    with pytest.raises(ValueError, match="'vibes'; known are exact, json_schema, reasoning_gym"):
        verify("a", "a", {"name": "vibes"})


@pytest.mark.parametrize(
    ("verifier", "module", "loader"),
    [(SCHEMA, "jsonschema", "_schema_class"), (SUM, "reasoning_gym", "_gym_scorer")],
)
def test_a_missing_package_is_named_with_the_extra_that_brings_it(
    monkeypatch: pytest.MonkeyPatch, verifier: dict[str, object], module: str, loader: str
) -> None:
    getattr(verifiers, loader).cache_clear()
    monkeypatch.setitem(sys.modules, module, None)  # makes its import fail
    with pytest.raises(ImportError, match=r"marco-train\[quickstart\]"):
        verify(PERSON, PERSON, verifier)
