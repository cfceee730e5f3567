"""From graded items to the rows of a report, and what a comparison of two reports says."""

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import pytest
from sacrebleu import corpus_bleu

from marco_train.config.benchmark import card_rows, sections
from marco_train.errors import InputError
from marco_train.evaluation.benchmark.aggregate import (
    Corpora,
    avg_at_k,
    extraction_failures,
    maj_at_k,
    mean_bleu,
    pass_at_k,
    row_score,
    section_means,
    weighted_avg_at_k,
)
from marco_train.evaluation.benchmark.compare import compare
from marco_train.evaluation.benchmark.grading import Graded, Translated


def graded(
    right: str, language: str = "en", group: str = "", weight: float = 1.0, answers: str = ""
) -> Graded:
    """An item whose responses are right where there is a 1."""
    answers = answers or right
    read = tuple(None if answer == "-" else answer for answer in answers)
    marks = tuple(mark == "1" for mark in right)
    return Graded(f"{language}/{group}/{right}", language, group, marks, read, (), weight)


def test_three_of_eight_are_three_eighths() -> None:
    item = graded("11100000")
    assert avg_at_k([item]) == 0.375
    assert row_score([item]).score == 37.5
    assert row_score([item]).num_samples == 8


def test_a_row_is_the_mean_of_its_languages_means() -> None:
    items = [graded("1", "de"), graded("0", "de"), graded("0", "de"), graded("1", "ja")]
    score = row_score(items)
    assert score.score == pytest.approx(100 * (1 / 3 + 1) / 2)
    assert score.languages == {"de": pytest.approx(100 / 3), "ja": 100.0}
    assert score.num_items == 4


def test_a_majority_counts_what_was_read_and_of_equally_many_the_first() -> None:
    assert maj_at_k([graded("1100", answers="aabb")]) == 1
    assert maj_at_k([graded("1100", answers="aabc")]) == 1
    assert maj_at_k([graded("1000", answers="abb-")]) == 0
    assert maj_at_k([graded("1000", answers="a---")]) == 1
    assert maj_at_k([graded("0000", answers="----")]) == 0


def test_one_right_response_passes() -> None:
    items = [graded("00000001"), graded("00000000")]
    assert pass_at_k(items) == 0.5
    assert row_score(items).also["pass_at_k"] == 50


def test_failures_to_answer_are_a_share_of_all_responses() -> None:
    items = [graded("10", "de", answers="a-"), graded("00", "ja", answers="--")]
    assert extraction_failures(items) == 0.75
    assert row_score(items).extraction_failures == 0.75


def test_polymath_has_a_plain_mean_and_one_by_its_levels_weights() -> None:
    weights = {"low": 1.0, "medium": 2.0, "high": 4.0, "top": 8.0}
    right = {"low": "1111", "medium": "1100", "high": "1000", "top": "0000"}
    items = [graded(right[level], "en", level, weight) for level, weight in weights.items()]
    assert avg_at_k(items) == pytest.approx((1 + 0.5 + 0.25 + 0) / 4)
    assert weighted_avg_at_k(items) == pytest.approx((1 * 1 + 2 * 0.5 + 4 * 0.25 + 8 * 0) / 15)
    score = row_score(items)
    assert score.score == pytest.approx(43.75)
    assert score.also["weighted_avg_at_k"] == pytest.approx(20.0)


def test_runs_spread_by_their_scores_and_not_by_their_items() -> None:
    items = [graded("10"), graded("10"), graded("11")]
    score = row_score(items)
    assert score.runs == pytest.approx([100, 100 / 3])
    assert score.std == pytest.approx((100 - 100 / 3) / 2**0.5)  # of two runs
    assert row_score([graded("1")]).std == 0


def test_an_interval_is_over_items_and_the_same_each_time() -> None:
    items = [graded("1" if n % 4 else "0") for n in range(400)]
    score = row_score(items, seed=3)
    low, high = score.ci95
    # Of a share of 3/4 over 400 items: 1.96 * sqrt(0.75 * 0.25 / 400) is 4.2 %.
    assert low == pytest.approx(75 - 4.2, abs=0.8) and high == pytest.approx(75 + 4.2, abs=0.8)
    assert row_score(items, seed=3).ci95 == (low, high)


PAIRS = {
    "de": [("Die Katze schläft.", "Die Katze schlief."), ("Heute regnet es.", "Heute regnet es.")],
    "zh": [("猫在睡觉。", "猫在睡。"), ("今天下雨了。", "今天下雨。")],
    "ja": [("おはようございます。", "おはよう。"), ("猫が寝ています。", "猫が寝ている。")],
    "ko": [("고양이가 잔다.", "고양이가 자고 있다."), ("오늘 비가 온다.", "오늘은 비가 온다.")],
}
TOKENIZERS = {"de": "13a", "zh": "zh", "ja": "ja-mecab", "ko": "ko-mecab"}


def translated(runs: int = 2) -> list[Translated]:
    """Sentences of four languages; the first run is a translation, others lack their last sign."""
    return [
        Translated(f"{code}/{n}", code, code, reference, (text, *[text[:-1]] * (runs - 1)))
        for code, pairs in PAIRS.items()
        for n, (reference, text) in enumerate(pairs)
    ]


def expected(code: str, texts: Sequence[str]) -> float:
    references = [reference for reference, _ in PAIRS[code]]
    return float(corpus_bleu(texts, [references], tokenize=TOKENIZERS[code]).score)


def test_bleu_is_sacrebleus_of_each_runs_corpus_with_the_tokenizer_of_the_language() -> None:
    items = translated()
    runs = Corpora(items).runs
    for code, pairs in PAIRS.items():
        texts = [text for _, text in pairs]
        assert runs[code] == [
            pytest.approx(expected(code, texts)),
            pytest.approx(expected(code, [text[:-1] for text in texts])),
        ]
    by_hand = fmean(fmean(scores) for scores in runs.values())
    assert mean_bleu(items) == pytest.approx(by_hand)
    score = row_score(items)
    assert score.score == pytest.approx(by_hand)
    assert score.also["signatures"] == [
        f"nrefs:1|case:mixed|eff:no|tok:{name}|smooth:exp|version:2.6.0"
        for name in ("13a", "ja-mecab-0.996-IPA", "ko-mecab-0.996/ko-0.9.2-KO", "zh")
    ]


def test_a_translation_into_english_is_cut_as_english() -> None:
    item = Translated("ja/0", "ja", "en", "Good morning.", ("Good morning.",))
    assert row_score([item, item]).also["signatures"] == [
        "nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:2.6.0"
    ]


def test_empty_translations_score_nothing_and_are_counted() -> None:
    score = row_score([Translated("de/0", "de", "de", "Ja.", ("", "Ja."))])
    assert score.extraction_failures == 0.5
    assert score.languages["de"] == pytest.approx(fmean(score.runs))


def test_means_are_over_rows_and_of_the_published_ones_the_cards_own() -> None:
    card = card_rows().values()
    printed = {"english": 75.5, "multilingual": 50.8, "cultural": 71.0}
    scores = {row.name: row.published["Marco-Mini-Instruct"] for row in card}
    means = section_means(scores, sections())
    assert {name: round(mean or 0, 1) for name, mean in means.items()} == printed
    assert section_means({"MMLU": 1.0}, sections()) == {
        "english": 1.0,
        "multilingual": None,
        "cultural": None,
    }


def report(directory: Path, items: dict[str, list[Graded] | list[Translated]]) -> Path:
    directory.mkdir()
    lines = [
        json.dumps({"row": row, **item})
        for row, graded_items in items.items()
        for item in row_score(graded_items).items
    ]
    (directory / "items.jsonl").write_text("\n".join(lines) + "\n")
    return directory


def numbered(rights: list[str]) -> list[Graded]:
    return [
        Graded(f"en/{n}", "en", "", tuple(mark == "1" for mark in right), tuple(right))
        for n, right in enumerate(rights)
    ]


def test_a_difference_that_all_items_share_is_seen_where_the_rows_intervals_overlap(
    tmp_path: Path,
) -> None:
    hard, easy = ["0000"] * 60, ["1111"] * 60
    first = report(tmp_path / "a", {"MMLU": numbered(hard + easy + ["1000"] * 20)})
    second = report(tmp_path / "b", {"MMLU": numbered(hard + easy + ["1100"] * 20)})
    (moved,) = compare(first, second)
    assert moved.difference == pytest.approx(100 * 20 * 0.25 / 140)
    assert moved.is_beyond_noise
    assert moved.ci95[0] > 1
    same = compare(first, first)[0]
    assert same.difference == 0 and same.ci95 == (0, 0) and not same.is_beyond_noise


def test_a_comparison_is_over_the_items_of_both_and_counts_the_others(tmp_path: Path) -> None:
    first = report(tmp_path / "a", {"MMLU": numbered(["1", "1", "0"]), "MATH": numbered(["1"])})
    second = report(tmp_path / "b", {"MMLU": numbered(["1", "0"]), "GSM8K": numbered(["1"])})
    (moved,) = compare(first, second)
    assert (moved.row, moved.first, moved.second) == ("MMLU", 100, 50)
    assert (moved.num_items, moved.num_unpaired) == (2, 1)


def test_translations_and_means_are_compared_too(tmp_path: Path) -> None:
    row, other = "FLORES-200 En-Xx", "WMT24++ En-Xx"
    first = report(tmp_path / "a", {row: translated(1), other: translated(1)})
    second = report(tmp_path / "b", {row: translated(2), other: translated(2)})
    moved = {each.row: each for each in compare(first, second)}
    assert moved[row].first == pytest.approx(mean_bleu(translated(1)))
    assert moved[row].second == pytest.approx(mean_bleu(translated(2)))
    mean = moved["mean of multilingual"]
    assert mean.difference == pytest.approx(moved[row].difference)


def test_what_holds_no_report_is_refused(tmp_path: Path) -> None:
    whole = report(tmp_path / "a", {"MMLU": numbered(["1"])})
    with pytest.raises(InputError, match="holds no report of a benchmark"):
        compare(whole, tmp_path)
    with pytest.raises(InputError, match="have no item in common"):
        compare(whole, report(tmp_path / "b", {"MATH": numbered(["1"])}))
    torn = report(tmp_path / "c", {"MMLU": numbered(["1"])}) / "items.jsonl"
    torn.write_text(torn.read_text()[:20])
    with pytest.raises(InputError, match="line 1 is torn"):
        compare(whole, torn.parent)
