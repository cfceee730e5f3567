"""Faults of texts are told in every language, and templates are whole sentences in each."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from marco_train.config.curation import CARD_LANGUAGES, QualityConfig
from marco_train.curation.frame import Cost, Dropped, Pipeline, Row, run
from marco_train.curation.quality import Quality, _refusals, faults_of, is_in_language, repeats
from marco_train.curation.templates import LAYOUTS, templates_of
from marco_train.curation.translation import FastText, judge_languages
from marco_train.errors import InputError
from marco_train.evaluation.languages import Identifier
from tests.helpers.nllb_lines import ENGLISH, OTHERS

CODES = [code for code in CARD_LANGUAGES if code != "en"]
REFUSALS = {
    "en": "I'm sorry, but I can't help with that.",
    "zh": "作为一个人工智能，我没有自己的看法。",
    "ar": "عذرًا، لا أستطيع مساعدتك في هذا.",
    "de": "Als KI habe ich dazu keine Meinung.",
    "es": "Lo siento, pero no puedo ayudarte.",
    "fr": "En tant qu'IA, je n'ai pas d'avis.",
    "ko": "AI로서 저는 의견이 없습니다.",
    "ja": "申し訳ありませんが、お手伝いできません。",
    "pt": "Como uma IA, não tenho opinião.",
    "tr": "Bir yapay zeka olarak fikrim yok.",
    "id": "Maaf, saya tidak bisa membantu.",
    "it": "Mi dispiace, ma non posso aiutarti.",
    "nl": "Als AI heb ik daar geen mening over.",
    "pl": "Jako model językowy nie mam zdania.",
    "ru": "Как языковая модель, я не имею мнения.",
    "vi": "Xin lỗi, tôi không thể giúp.",
    "th": "ในฐานะปัญญาประดิษฐ์ ฉันไม่มีความเห็น",
    "he": "כמודל שפה אין לי דעה.",
    "uk": "Як мовна модель, я не маю думки.",
    "ms": "Maaf, saya tidak dapat membantu.",
    "bn": "একটি এআই হিসেবে আমার কোনো মত নেই।",
    "cs": "Jako umělá inteligence nemám názor.",
    "ur": "مصنوعی ذہانت کے طور پر میری کوئی رائے نہیں۔",
    "kk": "Тілдік модель ретінде менің пікірім жоқ.",
    "el": "Λυπάμαι, δεν μπορώ να βοηθήσω.",
    "ro": "Îmi pare rău, dar nu pot ajuta.",
    "hu": "Sajnálom, de nem tudok segíteni.",
    "ne": "माफ गर्नुहोस्, म यसमा मद्दत गर्न सक्दिनँ।",
    "az": "Süni intellekt kimi fikrim yoxdur.",
}


def faults(text: str, code: str = "en", **bounds: int) -> set[str]:
    return set(faults_of(text, code, QualityConfig(**bounds), None))  # type: ignore[arg-type]


@pytest.mark.parametrize("code", CARD_LANGUAGES)
def test_a_refusal_is_told_in_its_language_and_a_plain_text_is_none(code: str) -> None:
    assert set(_refusals()) == set(CARD_LANGUAGES)
    assert faults(REFUSALS[code], code) == {"refusal"}
    for text in ENGLISH if code == "en" else OTHERS[code]:
        assert faults(text, code) == set()


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("Write to anna.b+c@mail.example.org today.", "personal"),
        ("Call +49 30 1234 5678 today.", "personal"),
        ("Pay to DE89 3704 0044 0532 0130 00 today.", "personal"),
        ("The card is 4111 1111 1111 1111 today.", "personal"),
        ("Dear [Your name], thank you.", "template"),
        ("This is {{name}} of the town.", "template"),
        ("It ends here.<|im_end|>", "template"),
        ("Sure! Here is the text.", "template"),
        ("yes " * 40, "repetition"),
        ("の話" * 40, "repetition"),
    ],
)
def test_a_fault_is_named(text: str, fault: str) -> None:
    assert faults(text) == {fault}


@pytest.mark.parametrize(
    "text",
    [
        "In 1989 about 25,000 people stood on 12 squares.",
        "x = {1, 2}; f(x)[0] = 10 + 20",
        "The sum of 4,111 and 1,111 is 5,222.",
        "yes " * 10,
        "Assistants help. They are here.",
    ],
)
def test_plain_texts_have_no_fault(text: str) -> None:
    assert faults(text) == set()


def test_lengths_have_bounds() -> None:
    assert faults("  ") == {"length"}
    assert faults("abc", min_characters=4) == faults("abcdef", max_characters=5) == {"length"}
    with pytest.raises(InputError, match="min_characters is 9, and must be at most"):
        QualityConfig(min_characters=9, max_characters=8)


def test_a_loop_that_was_left_again_is_none() -> None:
    assert repeats("so it goes on and on " * 8) and not repeats("so it goes " * 8 + "and it ends.")


@dataclass
class Answers:
    """Rows of one answer each."""

    texts: list[str]
    name: str = "answers"

    def identity(self) -> Any:
        return self.texts

    def plan(self) -> Cost:
        return Cost(len(self.texts))

    def read(self, skip: int) -> Iterator[Row | Dropped]:
        for text in self.texts[skip:]:
            turns = [{"role": "user", "content": "+49 30 1234 5678"}]
            yield {"language": "de", "messages": [*turns, {"role": "assistant", "content": text}]}


def test_faults_are_counted_and_dropped_by_their_rules(tmp_path: Path) -> None:
    texts = ["Gut.", "ja " * 40, "An a@b.de und c@d.de.", "[Insert name] a@b.de", ""]
    cfg = QualityConfig(language=False, personal=False)
    for number, (rules, out) in enumerate(((cfg, 2), (replace(cfg, personal=True), 1))):
        steps = [Quality(rules)]
        pipeline = Pipeline("answers", Answers(texts), steps, [], {}, lambda counts: [])
        counts = run(pipeline, tmp_path / str(number), 10).counts[1].languages["de"]
        assert counts.rows_out == out
        assert counts.counted == {
            "fault length": 1,
            "fault personal": 2,
            "fault repetition": 1,
            "fault template": 1,
        }
        dropped = {"quality: length": 1, "quality: repetition": 1, "quality: template": 1}
        assert counts.dropped == dropped | ({"quality: personal": 1} if rules.personal else {})


@pytest.mark.slow  # the identifier takes seconds to load
def test_an_answer_is_in_its_language_or_at_least_in_its_script() -> None:
    identifier = Identifier([], "a test")
    assert [c for c in OTHERS if not is_in_language(OTHERS[c][1], c, identifier)] == []
    assert not is_in_language(OTHERS["de"][1], "fr", identifier)
    assert not is_in_language(OTHERS["de"][1], "ne", identifier)  # which it does not know
    assert is_in_language("42", "ne", identifier) and is_in_language("Ja.", "fr", identifier)


class Labels:
    """A fastText model that says one label."""

    def __init__(self, label: str) -> None:
        self._label = label

    def predict(self, text: str) -> tuple[tuple[str, ...], Any]:
        assert "\n" not in text
        return (f"__label__{self._label}",), None


@pytest.mark.parametrize(
    ("label", "code", "is_it"),
    [
        ("deu_Latn", "de", True),
        ("de", "de", True),
        ("nld_Latn", "de", False),
        ("cmn_Hani", "zh", True),
        ("zho_Hans", "zh", True),
        ("jpn_Jpan", "zh", False),
        ("npi_Deva", "ne", True),
        ("hin_Deva", "ne", False),
        ("ara_Arab", "ar", True),
    ],
)
def test_labels_of_fasttext_models_are_languages_of_the_card(
    label: str, code: str, is_it: bool
) -> None:
    assert FastText(Labels(label)).matches("one\ntwo", code) is is_it


def test_a_language_model_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="language_model: there is no file"):
        FastText.load(str(tmp_path / "no"))
    (tmp_path / "model.bin").write_bytes(b"no model")
    with pytest.raises(InputError, match="is no fastText model"):
        FastText.load(str(tmp_path / "model.bin"))


class Silent:
    """Tells nothing."""

    def matches(self, text: str, code: str) -> bool | None:
        return None


@pytest.mark.parametrize(
    ("change", "dropped"),
    [
        ({}, None),
        ({"english_lid": 0.4}, "English is in another language"),
        ({"other_lid": 0.4}, "the other side is in another language"),
        ({"other": "Not in Devanagari"}, "the other side is in another language"),
    ],
)
def test_where_nothing_tells_a_language_its_column_and_script_do(
    change: dict[str, Any], dropped: str | None
) -> None:
    row = {"language": "ne", "english": ENGLISH[0], "other": OTHERS["ne"][0]}
    row |= {"english_lid": 0.9, "other_lid": 0.9} | change
    *_, last = judge_languages(row, Silent())
    assert (last.reason if isinstance(last, Dropped) else None) == dropped


@pytest.mark.parametrize("code", CODES)
def test_there_are_thirty_templates_each_way_in_both_languages(code: str) -> None:
    for written_in in ("en", code):
        templates = templates_of(written_in, code)
        for from_english in (True, False):
            filled = {
                templates.fill(n, "SOME {TEXT}", from_english=from_english)
                for n in range(templates.count)
            }
            assert len(filled) == 30 and all(text.count("SOME {TEXT}") == 1 for text in filled)
            assert not any("LANGUAGE" in text for text in filled)
        ways = (*templates.from_english, *templates.to_english)
        assert len(set(ways)) == 10 and not any(way.endswith((".", ":", "。")) for way in ways)
    assert len(LAYOUTS) == 6
    assert CARD_LANGUAGES[code][1] in templates_of("en", code).from_english[0]


def test_a_language_without_templates_is_refused() -> None:
    with pytest.raises(InputError, match="there are no templates of 'sv'"):
        templates_of("sv", "de")
