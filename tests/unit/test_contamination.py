"""What benchmarks ask is found in rows of five scripts, and nothing is found in clean ones."""

import random
from itertools import count, islice

import pytest

from marco_train.data.contamination import Benchmarks, Hit
from marco_train.errors import InputError
from marco_train.types import Conversation, Message, PlainText, TokenRow

# Each of more than 13 words, or 30 characters.
QUESTIONS = {
    "latin": "A farmer has 17 sheep and all but 9 of them run away during a storm at night. How "
    "many sheep does the farmer have left in the morning?",
    "cyrillic": "Поезд выходит из города в восемь часов утра и едет со скоростью шестьдесят "
    "километров в час. Когда он прибудет в соседний город?",
    "arabic": "اشترى أحمد ثلاثة كتب وخمسة أقلام من المكتبة ودفع عشرين دينارا، فكم دينارا بقي معه "
    "من خمسين دينارا كانت في جيبه؟",
    "han": "小明有三十五个苹果，他把其中的十二个分给了同学，"
    "又从果园里摘了二十个，请问他现在一共有多少个苹果？",
    "thai": "สมชายมีเงินห้าร้อยบาท ซื้อหนังสือสองเล่มราคาเล่มละหนึ่งร้อยยี่สิบบาท เขาจะเหลือเงินกี่บาท",
    "devanagari": "राम के पास पचास रुपये थे और उसने बाज़ार से बीस रुपये के फल और दस रुपये की सब्ज़ी "
    "खरीदी, उसके पास कितने रुपये बचे?",
}
ALL = Benchmarks(QUESTIONS.items())


def chat(*turns: str, row: int = 0) -> Conversation:
    roles = ["user", "assistant"] * len(turns)
    messages = tuple(Message(role, text) for role, text in zip(roles, turns, strict=False))
    return Conversation("s", "c", "en", row, messages)


def kinds(benchmarks: Benchmarks, *turns: str) -> dict[str, str]:
    return {hit.benchmark: hit.kind for hit in benchmarks.hits(chat(*turns))}


def middle(text: str, words: int, characters: int) -> str:
    """A part of a text, from its second unit on."""
    if " " in text[:12]:
        return " ".join(text.split()[1 : 1 + words])
    return text[1 : 1 + characters]


@pytest.mark.parametrize("script", QUESTIONS)
def test_a_question_is_found_in_what_is_asked_and_in_what_is_answered(script: str) -> None:
    question = QUESTIONS[script]
    assert kinds(ALL, question, "Yes.") == {script: "hash"}
    assert kinds(ALL, "What was it?", f"It was: {question} Think!") == {script: "ngram"}
    assert ALL.hits(PlainText("s", "c", "en", 5, question)) == [Hit(5, script, "hash")]
    thought = Message("assistant", "9", reasoning_content=f"So... {question}")
    row = Conversation("s", "c", "en", 7, (Message("user", "?"), thought))
    assert ALL.hits(row) == [Hit(7, script, "ngram")]


@pytest.mark.parametrize("script", ["latin", "cyrillic", "arabic", "han", "devanagari"])
def test_a_run_of_13_words_or_30_characters_is_found_and_a_shorter_one_is_not(script: str) -> None:
    question = QUESTIONS[script].replace("，", "")  # 30 characters without marks between them
    assert kinds(ALL, f"x {middle(question, 13, 30)} y") == {script: "ngram"}
    assert kinds(ALL, f"x {middle(question, 12, 29)} y") == {}


def test_case_width_digits_and_punctuation_do_not_count() -> None:
    question = QUESTIONS["latin"].upper().replace(",", "").replace("?", " ...")
    assert kinds(ALL, f"**{question}**") == {"latin": "hash"}
    assert kinds(ALL, QUESTIONS["latin"].replace("17", "１７").replace("9", "٩")) == {
        "latin": "hash"
    }
    assert kinds(ALL, QUESTIONS["han"].replace("，", ",\n")) == {"han": "hash"}
    marked = QUESTIONS["arabic"].replace("دينارا", "دينا\u200fرا")
    assert kinds(ALL, "\u200f" + marked) == {"arabic": "hash"}


def test_a_run_does_not_go_over_from_one_turn_to_the_next() -> None:
    words = QUESTIONS["latin"].split()
    assert kinds(ALL, " ".join(words[:12]), " ".join(words[12:24]), " ".join(words[24:])) == {}


SHORT = {
    "twelve": "Which of these rivers is the longest one in all of Asia?",  # 12 words
    "eight": "Which planet is the third from the sun?",
    "seven": "Which planet is third from the sun?",
    "four": "Who painted these sunflowers?",
    "three": "Who painted it?",
    "twenty": "世界上最长的河流是哪一条请从四个选项中选",  # 20 characters
    "nineteen": "世界上最高的山峰是哪一座请从选项中选出",
}
SHORT_ONES = Benchmarks(SHORT.items())


def test_a_question_shorter_than_a_run_is_found_whole() -> None:
    for name in ("twelve", "eight", "twenty"):
        assert kinds(SHORT_ONES, SHORT[name]) == {name: "hash"}
        assert kinds(SHORT_ONES, f"Please tell me: {SHORT[name]} Thanks.") == {name: "ngram"}
    assert kinds(SHORT_ONES, "Which of these rivers is the longest one in all of") == {}


def test_a_still_shorter_one_is_found_only_as_a_whole_turn() -> None:
    for name in ("seven", "four", "nineteen"):
        assert kinds(SHORT_ONES, SHORT[name]) == {name: "hash"}
        assert kinds(SHORT_ONES, f"Please tell me: {SHORT[name]} Thanks.") == {}


def test_a_text_of_a_few_words_is_not_looked_for_and_is_counted() -> None:
    assert kinds(SHORT_ONES, SHORT["three"]) == {}
    assert (SHORT_ONES.num_texts, SHORT_ONES.num_short) == (7, 1)
    with pytest.raises(InputError, match="none of the benchmarks' 2 texts is long enough"):
        Benchmarks([("a", "yes"), ("a", "")])


def test_sums_of_other_signs_are_other_questions() -> None:
    sums = Benchmarks([("sums", "What is 3 + 5?")])
    assert kinds(sums, "what is 3 + 5") == {"sums": "hash"}
    assert kinds(sums, "What is 3 - 5?") == kinds(sums, "What is 3 * 5?") == {}


def test_a_text_of_two_benchmarks_is_a_hit_of_both_and_each_is_named_once() -> None:
    question = QUESTIONS["latin"]
    both = Benchmarks([("b", question), ("a", f"{question} Explain."), ("b", question)])
    hits = both.hits(chat(question, question, question))
    assert hits == [Hit(0, "b", "hash"), Hit(0, "a", "ngram")]


def test_a_row_that_was_tokenised_before_is_not_read() -> None:
    assert ALL.hits(TokenRow("s", "c", "en", 0, [1, 2], [True, True])) == []


WORDS = {
    "latin": "river lamp stone cloud paper wheel garden bridge old new small runs under over",
    "cyrillic": "река лампа камень облако бумага колесо сад мост старый новый малый под",
    "arabic": "نهر مصباح حجر سحابة ورق عجلة حديقة جسر قديم جديد صغير تحت فوق",
    "han": "河 灯 石 云 纸 轮 园 桥 旧 新 小 下 上 人 山 水 火 木 金 土",
    "thai": "น้ำ ไฟ หิน เมฆ กระดาษ ล้อ สวน สะพาน เก่า ใหม่ เล็ก ใต้ บน คน",
    "devanagari": "नदी दीपक पत्थर बादल कागज पहिया बाग पुल पुराना नया छोटा नीचे ऊपर",
}


def test_none_of_10_000_clean_rows_is_found_and_all_planted_ones_are() -> None:
    draw = random.Random(0)
    planted = dict(zip(range(100, 9_100, 1_500), QUESTIONS, strict=True))
    found = []
    for n in range(10_000):
        script = draw.choice(list(WORDS))
        space = "" if script in ("han", "thai") else " "
        turns = [space.join(draw.choices(WORDS[script].split(), k=60)) for _ in range(2)]
        if n in planted:
            question = QUESTIONS[planted[n]]
            turns[n % 2] = f"{turns[0][:20]} {question} {turns[1][-20:]}"
        found += ALL.hits(chat(*turns, row=n))
    assert found == [Hit(n, script, "ngram") for n, script in planted.items()]


def test_rows_are_looked_at_one_by_one_and_none_is_kept() -> None:
    endless = (chat(QUESTIONS["thai"], row=n) for n in count())
    hits = (hit for row in endless for hit in ALL.hits(row))
    assert [hit.row for hit in islice(hits, 3)] == [0, 1, 2]
