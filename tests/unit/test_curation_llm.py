"""Questions to an LLM are asked many at a time, none twice, and bad answers do no harm."""

import json
import threading
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from marco_train.config.curation import LLMConfig
from marco_train.curation import llm as llm_module
from marco_train.curation.frame import Cost, Dropped, Outcome, Pipeline, Row, run, unfinished
from marco_train.curation.llm import LLM, Answer, Ask, AskStep, Prompt, check_endpoint
from marco_train.errors import InputError, ServersUnavailable
from tests.helpers.fake_chat import FakeChat, fake_chat

SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer"}},
    "required": ["n"],
    "additionalProperties": False,
}


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llm_module, "MOST_SECONDS", 0.01)


@pytest.fixture
def server() -> Iterator[FakeChat]:
    with fake_chat() as running:
        yield running


def asked(server: FakeChat, cache: Path, *asks: Ask, **changed: object) -> list[Answer]:
    cfg = LLMConfig(base_url=server.base_url, concurrency=4, max_tries=3, timeout_seconds=1.0)
    with closing(LLM(replace(cfg, **changed), cache)) as llm:  # type: ignore[arg-type]
        return list(llm.answers(asks))


def ask(text: str, **given: object) -> Ask:
    return Ask("test@1", [{"role": "user", "content": text}], **given)  # type: ignore[arg-type]


def test_answers_come_in_the_order_of_the_questions(server: FakeChat, tmp_path: Path) -> None:
    server.slowness = 0.02
    questions = [ask(f"question {n}") for n in range(40)]
    answers = asked(server, tmp_path, *questions)
    assert [answer.text for answer in answers] == [f"question {n}" for n in range(40)]
    assert all(answer.is_usable and answer.model == "llm" for answer in answers)
    assert server.most_open == 4


def test_a_known_answer_is_not_asked_for_again(server: FakeChat, tmp_path: Path) -> None:
    first = asked(server, tmp_path, ask("a"), ask("b"))
    assert asked(server, tmp_path, ask("a"), ask("b")) == first and len(server.bodies) == 2
    other = [
        replace(ask("a"), prompt="test@2"),
        ask("a", sample=1),
        ask("a", temperature=0.0),
        ask("a", schema={"type": "string"}),
    ]
    asked(server, tmp_path, *other, num_reasks=0)
    asked(server, tmp_path, ask("a"), seed=7)
    server.model = "another"
    asked(server, tmp_path, ask("a"))
    assert len(server.bodies) == 8
    assert {body["seed"] for body in server.bodies} == {42, 43, 7}


def test_a_server_that_is_slow_cut_wrong_or_away_is_asked_again(
    server: FakeChat, tmp_path: Path
) -> None:
    server.script = ["500", "dies mid-answer", "no JSON", "no choices", "429", "hangs"]
    questions = [ask(f"question {n}") for n in range(8)]
    answers = asked(server, tmp_path, *questions, max_tries=7)  # all six may meet one question
    assert [answer.text for answer in answers] == [f"question {n}" for n in range(8)]
    assert len(server.bodies) == 14


def test_a_server_that_stays_away_ends_it_and_loses_nothing(
    server: FakeChat, tmp_path: Path
) -> None:
    asked(server, tmp_path, ask("a"))
    server.script = ["500"] * 3
    with pytest.raises(ServersUnavailable, match="gave no answer in 3 tries, at last: Error code"):
        asked(server, tmp_path, ask("a"), ask("b"), concurrency=1)
    answers = asked(server, tmp_path, ask("a"), ask("b"))
    assert [answer.text for answer in answers] == ["a", "b"] and len(server.bodies) == 5
    server.stop()
    with pytest.raises(ServersUnavailable, match="is away"):
        asked(server, tmp_path, ask("a"))


def test_what_an_answer_lacks_is_named(server: FakeChat, tmp_path: Path) -> None:
    server.script = ["refuses", "is cut at its length", "says nothing", "422"]
    answers = asked(server, tmp_path, *(ask(f"text {n}") for n in range(5)), concurrency=1)
    assert [answer.problem for answer in answers] == [
        "refused",
        "truncated",
        "empty",
        "rejected",
        "",
    ]
    assert answers[1].text == "tex"


def test_an_answer_that_is_not_by_its_schema_is_asked_for_twice_more(
    server: FakeChat, tmp_path: Path
) -> None:
    server.reply = lambda body: '```json\n{"n": 3}\n```'
    server.script = ["nonsense"]
    (mended,) = asked(server, tmp_path / "mended", ask("a", schema=SCHEMA))
    assert mended.value == {"n": 3} and mended.is_usable
    assert (mended.num_reasks, mended.prompt_tokens, mended.completion_tokens) == (1, 20, 10)
    again = server.bodies[1]["messages"]
    assert [message["role"] for message in again] == ["user", "assistant", "user"]
    assert (
        again[1]["content"] == "{'a': nonsense" and "Expecting property name" in again[2]["content"]
    )
    assert server.bodies[0]["response_format"]["json_schema"]["schema"] == SCHEMA

    server.reply = lambda body: '{"n": "three"}'
    (wrong,) = asked(server, tmp_path / "wrong", ask("a", schema=SCHEMA))
    assert (wrong.problem, wrong.num_reasks) == ("not by its schema", 2)
    assert wrong.value is None and len(server.bodies) == 5


def test_thinking_is_no_part_of_an_answer(server: FakeChat, tmp_path: Path) -> None:
    server.reply = lambda body: "<think>\nWell, {n}\n</think>\n\nfine"
    assert asked(server, tmp_path, ask("a"))[0].text == "fine"


def test_the_key_comes_from_the_environment_and_stays_there(
    server: FakeChat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.key = "planted-key-1234"
    with pytest.raises(InputError, match=r"refuses the key of \$MY_KEY \(401\): set that variable"):
        asked(server, tmp_path, ask("a"), key_variable="MY_KEY")
    with pytest.raises(InputError, match=r"refuses the key of \$MY_KEY \(401\): set that variable"):
        asked(server, tmp_path, ask("a"), key_variable="MY_KEY", model="llm")
    monkeypatch.setenv("MY_KEY", server.key)
    assert asked(server, tmp_path, ask("a"), key_variable="MY_KEY")[0].text == "a"
    for file in tmp_path.rglob("*"):
        assert server.key.encode() not in file.read_bytes()


def test_a_server_that_takes_no_request_is_a_wrong_setting(
    server: FakeChat, tmp_path: Path
) -> None:
    server.script = ["400"] * 20
    with pytest.raises(InputError, match=r"takes no request: .*status 400"):
        asked(server, tmp_path, *(ask(f"text {n}") for n in range(20)))


def test_without_an_endpoint_or_with_many_models_it_is_said_what_to_set(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"give llm\.base_url="):
        LLM(LLMConfig(), tmp_path)
    with fake_chat() as server:
        both = {"data": [{"id": "a"}, {"id": "b"}]}
        server.tell = lambda path: both  # type: ignore[method-assign]
        with pytest.raises(InputError, match=r"several models or none \(a, b\): set llm.model"):
            asked(server, tmp_path)


def test_a_prompt_is_known_by_its_words_and_takes_values_as_they_are() -> None:
    prompt = Prompt("describe_v1", "Describe {{name}} of {{place}}.\n")
    assert prompt.fill(name="{{place}}", place="Bonn") == "Describe {{place}} of Bonn."
    assert prompt.version == "describe_v1@" + prompt.digest
    assert Prompt("describe_v1", "Describe {{name}}.").digest != prompt.digest


class Words:
    """Four rows."""

    name = "words"

    def identity(self) -> object:
        return "words"

    def plan(self) -> Cost:
        return Cost(4)

    def read(self, skip: int) -> Iterator[Row | Dropped]:
        yield from [{"word": f"w{n}", "language": "de"} for n in range(skip, 4)]


def words(server: FakeChat, cache: Path, **changed: object) -> Pipeline:
    def take(row: Row, answers: list[Answer]) -> Outcome:
        (answer,) = answers
        return row | {"said": answer.text} if answer.is_usable else Dropped(row, answer.problem)

    cfg = LLMConfig(base_url=server.base_url, max_tries=2, concurrency=1)
    cfg = replace(cfg, **changed)  # type: ignore[arg-type]
    step = AskStep("say", cfg, cache, lambda row: [ask(row["word"])], take, {"say_v1": "abc"})
    return Pipeline("words", Words(), [step], [], {}, lambda counts: [])


def test_what_is_finished_needs_no_endpoint(server: FakeChat, tmp_path: Path) -> None:
    pipeline, work = words(server, tmp_path / "cache"), tmp_path / "work"
    assert unfinished(pipeline, work, 2) == pipeline.steps
    run(pipeline, work, 2)
    assert unfinished(pipeline, work, 2) == []
    other = words(server, tmp_path / "cache", temperature=0.1)
    assert unfinished(other, work, 2) == other.steps
    check_endpoint(other.steps)
    server.leave()
    with pytest.raises(ServersUnavailable, match="is away"):
        check_endpoint(other.steps)


def test_a_step_that_asks_counts_what_it_took(server: FakeChat, tmp_path: Path) -> None:
    server.script = ["", "refuses"]
    ran = run(words(server, tmp_path / "cache"), tmp_path / "work", 2)
    assert [row["said"] for row in ran.shards.rows()] == ["w0", "w2", "w3"]
    assert ran.counts[1].whole.as_json() == {
        "in": 4,
        "out": 3,
        "dropped": {"refused": 1},
        "counted": {
            "answered by llm": 4,
            "answers refused": 1,
            "completion tokens": 20,
            "llm calls": 4,
            "prompt tokens": 40,
        },
    }


def test_a_step_goes_on_when_the_server_is_back(server: FakeChat, tmp_path: Path) -> None:
    server.script = ["", "", "", "500", "500"]
    with pytest.raises(ServersUnavailable):
        run(words(server, tmp_path / "cache"), tmp_path / "work", 2)
    ran = run(words(server, tmp_path / "cache"), tmp_path / "work", 2)
    assert [row["said"] for row in ran.shards.rows()] == ["w0", "w1", "w2", "w3"]
    said = [json.dumps(body["messages"]) for body in server.bodies]
    assert len(said) == 6 and len(set(said)) == 4  # of w3 three tries


def test_rows_are_not_answered_by_two_models(server: FakeChat, tmp_path: Path) -> None:
    server.script = ["", "", "500", "500"]
    with pytest.raises(ServersUnavailable):
        run(words(server, tmp_path / "cache"), tmp_path / "work", 2)
    server.model = "other"
    with pytest.raises(InputError, match=r"earlier rows of say were answered by 'llm': set"):
        run(words(server, tmp_path / "cache"), tmp_path / "work", 2)
    ran = run(words(server, tmp_path / "cache", model="other"), tmp_path / "work", 2)
    assert ran.counts[1].whole.counted["answered by other"] == 4


def test_an_asking_that_is_ended_keeps_what_is_on_its_way_and_leaves_no_thread(
    server: FakeChat, tmp_path: Path
) -> None:
    server.slowness = 0.05
    questions = [ask(f"question {n}") for n in range(100)]
    cfg = LLMConfig(base_url=server.base_url, concurrency=4)
    with closing(LLM(cfg, tmp_path)) as llm:
        next(llm.answers(questions))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ask")]
    begun = len(server.bodies)
    assert 1 < begun < 20
    server.slowness = 0
    assert len(asked(server, tmp_path, *questions)) == len(server.bodies) == 100
