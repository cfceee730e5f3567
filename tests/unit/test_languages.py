"""Responses in the language of their prompt are told from others."""

import sys

import pytest

from marco_train.data.chat import Tokenizer
from marco_train.errors import InputError
from marco_train.evaluation.languages import CANDIDATES, LanguageJudge
from marco_train.metrics import check_names
from marco_train.rollout.base import summarize
from marco_train.types import FinishReason, Prompt, Rollout
from tests.helpers.tokenizers import make_tokenizer, tokenizer_of

pytestmark = pytest.mark.slow  # the identifier takes seconds to load

# One sentence of each language of the card, as an answer might begin.
ANSWERS = {
    "ar": "يمكنك شراء التذاكر من المحطة أو عبر الإنترنت قبل السفر.",
    "az": "Biletləri səfərdən əvvəl stansiyadan və ya internetdən ala bilərsiniz.",
    "bn": "আপনি ভ্রমণের আগে স্টেশন থেকে টিকিট কিনতে পারেন।",
    "cs": "Jízdenky si můžete koupit na nádraží nebo předem na internetu.",
    "de": "Die Fahrkarten können Sie am Bahnhof oder vorab im Internet kaufen.",
    "el": "Μπορείτε να αγοράσετε τα εισιτήρια στον σταθμό πριν από το ταξίδι.",
    "en": "You can buy the tickets at the station or online before you travel.",
    "es": "Puedes comprar los billetes en la estación o por internet antes de viajar.",
    "fr": "Vous pouvez acheter les billets à la gare ou en ligne avant le voyage.",
    "he": "אפשר לקנות את הכרטיסים בתחנה או באינטרנט לפני הנסיעה.",
    "hu": "A jegyeket az állomáson vagy az utazás előtt az interneten veheti meg.",
    "id": "Anda bisa membeli tiket di stasiun atau secara daring sebelum bepergian.",
    "it": "Puoi comprare i biglietti alla stazione o su internet prima del viaggio.",
    "ja": "切符は駅で買うか、出発前にインターネットで買うことができます。",
    "kk": "Билеттерді вокзалдан немесе сапар алдында интернеттен сатып алуға болады.",
    "ko": "표는 역에서 사거나 여행 전에 인터넷으로 살 수 있습니다.",
    "ms": "Anda boleh membeli tiket di stesen atau dalam talian sebelum perjalanan.",
    "nl": "Je kunt de kaartjes op het station of vooraf op internet kopen.",
    "pl": "Bilety można kupić na dworcu lub przed podróżą przez internet.",
    "pt": "Você pode comprar as passagens na estação ou pela internet antes da viagem.",
    "ro": "Puteți cumpăra biletele din gară sau pe internet înainte de călătorie.",
    "ru": "Билеты можно купить на вокзале или заранее через интернет.",
    "th": "คุณสามารถซื้อตั๋วที่สถานีหรือทางออนไลน์ก่อนเดินทางได้",
    "tr": "Biletleri istasyondan ya da yolculuktan önce internetten alabilirsiniz.",
    "uk": "Квитки можна купити на вокзалі або заздалегідь через інтернет.",
    "ur": "آپ سفر سے پہلے اسٹیشن سے یا انٹرنیٹ پر ٹکٹ خرید سکتے ہیں۔",
    "vi": "Bạn có thể mua vé tại nhà ga hoặc trên mạng trước khi đi.",
    "zh": "您可以在车站购票，也可以在出发前上网购买。",
}
SWEDISH = "Du kan köpa biljetterna på stationen eller på nätet före resan."


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(path, ["one two three"])
    return tokenizer_of(path)


@pytest.fixture(scope="module")
def judge(tokenizer: Tokenizer) -> LanguageJudge:
    return LanguageJudge(tokenizer, ["en", ""])


def answered(tokenizer: Tokenizer, language: str, text: str, asked: str = "?") -> Rollout:
    ids, _ = tokenizer.encoder.encode(f"{text}<|im_end|>")
    prompt = Prompt(0, tokenizer.encoder.encode(asked)[0], "s", "c", language)
    size = len(ids)
    return Rollout(prompt, 0, ids, [-1.0] * size, [[]] * size, FinishReason.stop, 0)


@pytest.mark.long
def test_the_card_s_languages_but_nepali_are_identified(
    tokenizer: Tokenizer, judge: LanguageJudge
) -> None:
    assert set(ANSWERS) == set(CANDIDATES) and len(CANDIDATES) == 28
    missed = [code for code, text in ANSWERS.items() if not judge(answered(tokenizer, code, text))]
    assert missed == []
    taken = [
        (asked, given)
        for asked in ANSWERS
        for given, text in ANSWERS.items()
        if asked != given and judge(answered(tokenizer, asked, text)) is not False
    ]
    assert taken == []


@pytest.mark.parametrize("code", ["zh-Hans", "zho_Hant", "cmn_Hans", "ZH"])
def test_codes_of_any_spelling_are_read(
    code: str, tokenizer: Tokenizer, judge: LanguageJudge
) -> None:
    assert judge(answered(tokenizer, code, ANSWERS["zh"])) is True
    assert judge(answered(tokenizer, code, ANSWERS["ja"])) is False


@pytest.mark.parametrize("code", ["", "ne", "npi_Deva", "sv", "xx"])
def test_prompts_without_a_language_that_is_known_are_not_judged(
    code: str, tokenizer: Tokenizer, judge: LanguageJudge
) -> None:
    assert judge(answered(tokenizer, code, ANSWERS["en"])) is None


@pytest.mark.parametrize("text", ["", "42", "Ja.", "Tokyo, 1998", "東京です。", "$x^2$ " * 40])
def test_answers_too_short_to_tell_are_not_judged(
    text: str, tokenizer: Tokenizer, judge: LanguageJudge
) -> None:
    assert judge(answered(tokenizer, "de", text)) is None


def test_a_language_of_the_run_is_a_candidate_beside_the_card_s(tokenizer: Tokenizer) -> None:
    with_swedish = LanguageJudge(tokenizer, ["sv", "en"])
    assert with_swedish(answered(tokenizer, "sv", SWEDISH)) is True
    assert with_swedish(answered(tokenizer, "sv", ANSWERS["de"])) is False
    assert with_swedish(answered(tokenizer, "en", SWEDISH)) is False


def test_thinking_code_and_formulas_have_no_say(tokenizer: Tokenizer, judge: LanguageJudge) -> None:
    english, german = ANSWERS["en"] * 9, ANSWERS["de"]
    beside = {
        f"<think>\n{english}\n</think>\n\n{german}": True,
        f"<think>\n{english * 2}": None,  # cut before the answer
        f"{german}\n```python\nprint('{english}')\n```": True,
        f"{german}\n```python\nprint('{english}')": True,
        f"{german} $$\\text{{{english}}}$$ \\(\\text{{{english}}}\\)": True,
        f"{german} https://example.org/{english.replace(' ', '-')}": True,
        f"<think>\n{german * 9}\n</think>\n\n{ANSWERS['en']}": False,
    }
    found = {text: judge(answered(tokenizer, "de", text)) for text in beside}
    assert found == beside


def test_thinking_that_the_prompt_opened_has_no_say(
    tokenizer: Tokenizer, judge: LanguageJudge
) -> None:
    opened = "<|im_start|>assistant\n<think>\n"
    english, german = ANSWERS["en"], ANSWERS["de"]
    whole = answered(tokenizer, "de", f"{english}</think>\n\n{german}", opened)
    cut = answered(tokenizer, "de", english, opened)
    assert (judge(whole), judge(cut)) == (True, None)


def test_the_summary_tells_the_share_that_matches_of_those_judged_by_language(
    tokenizer: Tokenizer, judge: LanguageJudge
) -> None:
    made = [
        answered(tokenizer, "de", ANSWERS["de"]),
        answered(tokenizer, "de", ANSWERS["en"]),
        answered(tokenizer, "de", "Ja."),
        answered(tokenizer, "fr", ANSWERS["fr"]),
        answered(tokenizer, "ne", ANSWERS["en"]),
    ]
    found = summarize(made, judge)
    assert found["rollout/lang_match"] == pytest.approx(2 / 3)
    assert found["rollout/lang_judged"] == pytest.approx(3 / 5)
    assert found["rollout/lang_match/language_de"] == 1 / 2
    assert found["rollout/lang_judged/language_de"] == pytest.approx(2 / 3)
    assert found["rollout/lang_match/language_fr"] == 1
    assert found["rollout/lang_judged/language_ne"] == 0
    assert "rollout/lang_match/language_ne" not in found
    check_names(found)
    assert not any("lang_" in name for name in summarize(made))
    none = summarize(made[-1:], judge)
    assert none["rollout/lang_judged"] == 0 and "rollout/lang_match" not in none


def test_a_missing_package_is_named_with_the_extra_that_brings_it(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lingua", None)  # makes its import fail
    with pytest.raises(InputError, match=r"lingua-language-detector: .*marco-train\[languages\]"):
        LanguageJudge(tokenizer, ["de"])
