"""Rows of a pipeline that hold what a benchmark asks are dropped and counted, and no others."""

import json
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from marco_train.commands import decontaminate
from marco_train.config.curation import DecontaminationConfig, EmbeddingConfig
from marco_train.curation.choices import turns
from marco_train.curation.decontamination import (
    Decontaminated,
    NearBenchmarks,
    conversation_of,
)
from marco_train.curation.frame import Row
from marco_train.data.contamination import Hit
from tests.helpers.curation import Given, ran

# Of five scripts, the last two without spaces.
QUESTIONS = {
    "en": "A farmer has 17 sheep and all but 9 of them run away during a storm at night. How many "
    "sheep does the farmer have left in the morning?",
    "ru": "Поезд выходит из города в восемь часов утра и едет со скоростью шестьдесят километров "
    "в час. Когда он прибудет в соседний город?",
    "ar": "اشترى أحمد ثلاثة كتب وخمسة أقلام من المكتبة ودفع عشرين دينارا، فكم دينارا بقي معه "
    "من خمسين دينارا كانت في جيبه؟",
    "zh": "小明有三十五个苹果，他把其中的十二个分给了同学，又从果园里摘了二十个，"
    "请问他现在一共有多少个苹果？",
    "th": "สมชายมีเงินห้าร้อยบาท ซื้อหนังสือสองเล่มราคาเล่มละหนึ่งร้อยยี่สิบบาท เขาจะเหลือเงินกี่บาท",
}
WORDS = {
    "en": "river lamp stone cloud paper wheel garden bridge old new small runs under over",
    "ru": "река лампа камень облако бумага колесо сад мост старый новый малый под",
    "ar": "نهر مصباح حجر سحابة ورق عجلة حديقة جسر قديم جديد صغير تحت فوق",
    "zh": "河 灯 石 云 纸 轮 园 桥 旧 新 小 下 上 人 山 水 火 木 金 土",
    "th": "น้ำ ไฟ หิน เมฆ กระดาษ ล้อ สวน สะพาน เก่า ใหม่ เล็ก ใต้ บน คน",
}


@pytest.fixture
def benchmarks(tmp_path: Path) -> DecontaminationConfig:
    directory = tmp_path / "benchmarks"
    directory.mkdir()
    for language, question in QUESTIONS.items():
        line = json.dumps({"question": question}) + "\n"
        (directory / f"{language}.jsonl").write_text(line)
    return DecontaminationConfig(against=str(directory))


@pytest.mark.long
def test_none_of_10_000_clean_rows_is_dropped_and_all_planted_ones_are(
    benchmarks: DecontaminationConfig, tmp_path: Path
) -> None:
    draw = random.Random(0)
    planted = dict(zip(range(700, 10_000, 2_000), QUESTIONS, strict=True))
    rows: list[Row] = []
    for n in range(10_000):
        language = planted.get(n, draw.choice(list(WORDS)))
        space = "" if language in ("zh", "th") else " "
        asked, answered = (
            space.join(draw.choices(WORDS[language].split(), k=40)) for _ in range(2)
        )
        if n in planted:  # in what is asked and in what is answered, with more around it or alone
            question = QUESTIONS[language]
            asked, answered = (f"x {question} x", "y") if n % 4_000 == 700 else ("x", question)
        rows.append({"id": str(n), "language": language, "messages": turns(asked, answered)})
    found = ran(Given(rows), [Decontaminated(benchmarks, EmbeddingConfig())], tmp_path, 5_000)
    kept = {row["id"] for row in found.shards.rows()}
    assert {int(row["id"]) for row in rows} - set(map(int, kept)) == set(planted)
    counts = found.counts[-1]
    assert counts.whole.dropped == {"holds a text of a benchmark": 5}
    assert counts.whole.counted == {
        "ngram of en": 1, "hash of ru": 1, "ngram of ar": 1, "hash of zh": 1, "ngram of th": 1
    }  # fmt: skip
    assert all(counts.of(language).dropped.total() == 1 for language in QUESTIONS)


def letters(texts: Sequence[str]) -> NDArray[np.float32]:
    """Embed texts by the letters that they have, [N, 26]."""
    counts = [[text.lower().count(chr(97 + n)) for n in range(26)] for text in texts]
    found = np.array(counts, np.float32).reshape(-1, 26)
    lengths: NDArray[np.float32] = np.linalg.norm(found, axis=1, keepdims=True)
    return found / lengths


def test_a_turn_that_is_near_a_question_is_found_once_for_each_benchmark() -> None:
    texts = [("a", "a farmer has sheep"), ("a", "farmer: a sheep has"), ("b", "zzz qqq")]
    near = NearBenchmarks(texts, letters, 0.95)
    rows = [
        conversation_of({"messages": turns("clouds over the lake", "sheep has a farmer")}, 3),
        conversation_of({"messages": turns("qqzzqz", "a farmer has sheep!")}, 4),
        conversation_of({"messages": turns("no such thing", "indeed")}, 5),
    ]
    assert near.hits(rows) == [Hit(3, "a", "near"), Hit(4, "a", "near"), Hit(4, "b", "near")]
    assert near.hits([]) == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--against", "fixture", "--data-dir", "no"], "--data-dir: there is no directory 'no'"),
        (["--against", "fixture", "--similarity", "2"], "--similarity is 2.0, and must be above 0"),
        (["--against", "card"], "and give --data-dir, a directory that has them in its folder"),
    ],
)
def test_the_command_names_its_own_options(words: list[str], said: str, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "response": "b"}\n')
    with pytest.raises(SystemExit) as refused:
        decontaminate.main([str(rows), *words])
    assert said in str(refused.value) and "stage." not in str(refused.value)
