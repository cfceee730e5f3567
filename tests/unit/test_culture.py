"""What an LLM wrote of an entity is kept where the facts bear it, and choices are balanced."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from marco_train.commands.curate import main
from marco_train.curation import culture, llm
from marco_train.curation.choices import Distractors, Lettered, texts_of_choices
from marco_train.curation.frame import Dropped, Row
from marco_train.curation.llm import Answer
from marco_train.errors import REFUSED, TRY_AGAIN_LATER
from tests.helpers.curation import Given, example, ran
from tests.helpers.fake_chat import FakeChat, fake_chat
from tests.helpers.scripted_author import write

BURG: Row = {
    "id": "Q1",
    "language": "de",
    "topic": "buildings and monuments",
    "country": "Q183",
    "classes": ["Q23413"],
    "num_articles": 9,
    "labels": {"de": "Burg Eltz", "en": "Eltz Castle"},
    "descriptions": {"en": "castle in Germany"},
    "facts": [["is a", "Burg"], ["located in", "Wierschem"], ["founded or begun", "1157"]],
    "form": "open",
    "others": [],
}
CHOICE = BURG | {"form": "choice", "others": ["Burg Trifels", "Burg Hohenzollern", "Wartburg"]}


def said(**value: str) -> list[Answer]:
    return [Answer("", value)]


def reason(outcome: Any) -> str:
    assert isinstance(outcome, Dropped)
    return outcome.reason


def test_an_llm_is_told_all_that_is_known_and_the_language() -> None:
    (ask,) = culture._ask_description(BURG)
    (message,) = ask.messages
    assert 'Describe "Burg Eltz" in German' in message["content"]
    for line in ("- in short: castle in Germany", "- in English: Eltz Castle", "- is a: Burg"):
        assert f"{line}\n" in message["content"]
    assert ask.schema is not None and ask.schema["required"] == ["description"]


def test_a_description_stays_with_the_facts() -> None:
    good = "Burg Eltz ist eine Burg in Wierschem aus dem Jahr 1157."
    assert culture._take_description(BURG, said(description=good)) == BURG | {"description": good}
    wrong = culture._take_description(BURG, said(description=good.replace("1157", "1268")))
    assert reason(wrong) == "the description says what the facts do not"
    assert isinstance(wrong, Dropped) and wrong.row["unsupported"] == ["1268"]
    nothing = culture._take_description(BURG, [Answer("", problem="refused")])
    assert reason(nothing) == "no description: refused"


def test_an_answer_stays_with_the_facts() -> None:
    row = BURG | {"request": "Was ist Burg Eltz?", "description": "Eine Burg."}
    found = culture._take_answer(row, said(answer="Eine Burg in Wierschem."))
    assert isinstance(found, dict)
    assert found["category"] == "buildings and monuments"
    assert [m["content"] for m in found["messages"]] == [
        "Was ist Burg Eltz?",
        "Eine Burg in Wierschem.",
    ]
    wrong = culture._take_answer(row, said(answer="Erbaut von Graf Rudolf Eltz im Tal."))
    assert reason(wrong) == "the answer says what the facts do not"


@pytest.mark.parametrize(
    ("question", "why", "wrong"),
    [
        ("Welche Burg steht in Wierschem?", "Es ist Burg Eltz.", ""),
        ("Wo steht Burg Eltz?", "Es ist Burg Eltz.", "the question names a choice"),
        ("Ist es die wartburg?", "Es ist Burg Eltz.", "the question names a choice"),
        ("Welche Burg?", "Das ist sie.", "the reason does not name the right choice"),
        ("Welche Burg von 1300?", "Es ist Burg Eltz.", "the question says what the facts do not"),
        ("Welche Burg?", "Burg Eltz, und nicht die Wartburg.", ""),
    ],
)
def test_a_question_with_choices_does_not_give_its_answer_away(
    question: str, why: str, wrong: str
) -> None:
    found = culture._take_request(CHOICE, said(question=question, reason=why))
    if wrong:
        assert reason(found) == wrong
    else:
        assert found == CHOICE | {"question": question, "reason": why}


def castle(number: int, **fields: Any) -> Row:
    return BURG | {"id": f"Q{number}", "labels": {"de": f"Burg {number}"}} | fields


def test_wrong_choices_are_of_the_same_class_country_and_language(tmp_path: Path) -> None:
    rows = [castle(n) for n in range(1, 6)]
    rows += [castle(n, country="Q40") for n in range(11, 16)]
    rows += [castle(n, classes=["Q4022"]) for n in range(21, 24)]  # too few
    found = ran(Given(rows), [Distractors(1.0, 0)], tmp_path)
    choices = {r["labels"]["de"]: r["others"] for r in found.shards.rows() if r["form"] == "choice"}
    assert len(choices) == 10
    for label, others in choices.items():
        assert len({label, *others}) == 4
        assert len({len(name) for name in (label, *others)}) == 1  # one country
    assert found.counts[-1].of("de").counted == {"too few like it for choices": 3}
    assert sum(row["form"] == "open" for row in found.shards.rows()) == 13


def test_a_share_of_the_entities_is_asked_for_with_choices(tmp_path: Path) -> None:
    rows = [castle(n) for n in range(100, 600)]
    found = list(ran(Given(rows), [Distractors(0.4, 0)], tmp_path).shards.rows())
    assert sum(row["form"] == "open" for row in found) == 500
    assert 170 <= sum(row["form"] == "choice" for row in found) <= 230


def test_each_letter_is_right_equally_often_in_each_language(tmp_path: Path) -> None:
    written = {"question": "Welche?", "reason": "Diese."}
    rows = [
        CHOICE | written | {"language": code, "labels": {code: f"{n}"}}
        for n in range(40)
        for code in ("de", "fr")
    ]
    found = list(ran(Given(rows), [Lettered(0)], tmp_path, 7).shards.rows())
    letters = Counter((row["language"], row["letter"]) for row in found)
    assert letters == {(code, letter): 10 for code in ("de", "fr") for letter in "ABCD"}
    for row in found:
        asked, answered = (turn["content"] for turn in row["messages"])
        assert f"\n{row['letter']}. {row['labels'][row['language']]}\n" in asked
        texts = texts_of_choices()[row["language"]]
        assert asked.endswith(texts["ask"])
        assert answered == f"Diese.\n\n{texts['answer'].format(letter=row['letter'])}"
    again = list(ran(Given(rows), [Lettered(0)], tmp_path / "other", 1000).shards.rows())
    assert again == found


def test_an_llm_that_is_not_given_or_away_is_said_before_anything_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "entities.json").write_text("[]\n")
    words = ["culture", f"input={tmp_path / 'entities.json'}", "languages=[de]"]
    words += [f"output_dir={tmp_path / 'out'}"]
    assert main(words) == REFUSED
    assert "this needs an LLM: give llm.base_url=http://" in capsys.readouterr().err
    with fake_chat() as server:
        url = server.base_url
        server.key = "planted-key-1234"
        assert main([*words, f"llm.base_url={url}", "llm.model=llm"]) == REFUSED
        assert "refuses the key of $OPENAI_API_KEY (401)" in capsys.readouterr().err
    for model in ([], ["llm.model=llm"]):
        assert main([*words, f"llm.base_url={url}", *model]) == TRY_AGAIN_LATER
        assert f"{url} is away" in capsys.readouterr().err
    assert main([*words, "plan=true"]) == 0
    assert not (tmp_path / "out").exists()


@pytest.mark.long
def test_a_build_whose_llm_goes_away_goes_on_and_comes_out_as_a_calm_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llm, "MOST_SECONDS", 0.01)
    example.main(tmp_path)
    words = ["culture", f"input={tmp_path / 'entities.json.bz2'}", "languages=[de]"]
    words += [
        "shard_rows=100",
        "entities_per_language=15",
        "quality.language=false",
        "llm.max_tries=1",
        "llm.concurrency=1",
    ]

    def built(server: FakeChat, out: str) -> int:
        return main([*words, f"llm.base_url={server.base_url}", f"output_dir={tmp_path / out}"])

    with fake_chat(write) as server:
        assert built(server, "calm") == 0
        num_questions = len(server.bodies)
    with fake_chat(write) as server:
        server.script = [""] * 20 + ["503"] * 100  # among the requests
        assert built(server, "left") == TRY_AGAIN_LATER
        server.script = []
        assert built(server, "left") == 0
        assert server.outcomes["fine"] == num_questions  # what was answered is not asked again
    calm, left = (tmp_path / out / "culture.jsonl" for out in ("calm", "left"))
    assert left.read_bytes() == calm.read_bytes() and calm.stat().st_size > 3_000
