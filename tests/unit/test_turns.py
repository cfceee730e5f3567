"""A turn keeps its calls, its tools, its thinking and its flags, however they are spelt."""

import json
from typing import Any

import pytest

from marco_train.data.turns import RowError, read_tools, read_turns
from marco_train.types import Message

QUESTION = {"role": "user", "content": "Weather in Paris?"}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}
WRITTEN = '{"city": "Paris"}'


def answer(turn: dict[str, Any], **roles: str) -> Message:
    (_, found) = read_turns([QUESTION, turn], roles)
    return found


def openai(function: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "tool_calls": [{"function": function, **more}]}


BARE = {"name": "weather", "arguments": {"city": "Paris"}}
# One call of weather(city="Paris"), whose arguments are an object.
SPELLINGS: dict[str, dict[str, Any]] = {
    "OpenAI's": openai(BARE, type="function"),
    "without its type": openai(BARE),
    "beside no words": openai(BARE) | {"content": ""},
    "beside null": openai(BARE) | {"content": None},
    "bare": {"role": "assistant", "tool_calls": [BARE]},
    "with parameters": openai({"name": "weather", "parameters": {"city": "Paris"}}),
    "filled up with nulls": openai(
        {"name": "weather", "arguments": {"city": "Paris", "day": None}}, type="function"
    ),
    "JSON of the list": {"role": "assistant", "tool_calls": json.dumps([CALL])},
    "one, not in a list": {"role": "assistant", "tool_calls": CALL},
    "OpenAI's of old": {"role": "assistant", "content": None, "function_call": BARE},
    "JSON of one, as of old": {"role": "assistant", "function_call": json.dumps(BARE)},
    "Dolci's": {"role": "assistant", "content": None, "function_calls": 'weather(city="Paris")'},
    "Dolci's in a list": {"role": "assistant", "function_calls": "[weather(city='Paris')]"},
    "Dolci's in JSON": {"role": "assistant", "function_calls": json.dumps([BARE])},
    "a list of calls": {"role": "assistant", "function_calls": [BARE]},
    "a role of its own": {"from": "function_call", "value": json.dumps(BARE)},
    "another role of its own": {"role": "tool_call", "content": json.dumps(BARE)},
    "an item of NeMo-Gym": {"type": "function_call", **BARE},
}


@pytest.mark.parametrize("turn", SPELLINGS.values(), ids=SPELLINGS.keys())
def test_a_call_is_read_in_every_spelling(turn: dict[str, Any]) -> None:
    assert answer(turn) == Message("assistant", "", tool_calls=(CALL,))


def test_a_call_keeps_its_id_its_words_and_its_arguments_as_text() -> None:
    turn = openai({"name": "weather", "arguments": WRITTEN}, id="c1") | {"content": "I look."}
    function = {"name": "weather", "arguments": WRITTEN}
    called = {"type": "function", "function": function, "id": "c1"}
    assert answer(turn) == Message("assistant", "I look.", tool_calls=(called,))
    item = {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": WRITTEN}
    assert answer(item).tool_calls == (called,)


def test_several_calls_keep_their_order() -> None:
    other = {"type": "function", "function": {"name": "time.now", "arguments": {"n": [1, True]}}}
    for calls in (
        'weather(city="Paris")\ntime.now(n=[1, True])',
        '[weather(city="Paris"), time.now(n=[1, True])]',
    ):
        turn = {"role": "assistant", "function_calls": calls}
        assert answer(turn).tool_calls == (CALL, other)
    assert answer({"role": "assistant", "tool_calls": [CALL, other]}).tool_calls == (CALL, other)


VERBATIM = [
    "weather('Paris')",
    "look up the weather",
    "weather(city=Paris)",
    '{"city": "Paris"}',
    "x = weather(city='Paris')",
]


@pytest.mark.parametrize("text", VERBATIM)
def test_a_call_in_no_known_spelling_stays_as_text(text: str) -> None:
    found = answer({"role": "assistant", "content": None, "function_calls": text})
    assert found == Message("assistant", f"<tool_call>\n{text}\n</tool_call>")
    found = answer({"role": "assistant", "content": "I look.", "function_calls": text})
    assert found.content == f"I look.\n<tool_call>\n{text}\n</tool_call>"
    assert answer({"role": "tool_call", "content": text}) == Message(
        "assistant", f"<tool_call>\n{text}\n</tool_call>"
    )


@pytest.mark.parametrize("nothing", [None, "", "  ", [], {}])
def test_no_call_is_none(nothing: Any) -> None:
    turn = {"role": "assistant", "content": "x", "function_calls": nothing, "tool_calls": None}
    assert answer(turn) == Message("assistant", "x")
    with pytest.raises(RowError, match="is not text"):
        answer(turn | {"content": None})


def test_a_role_that_the_source_maps_calls_nothing() -> None:
    turn = {"role": "tool_call", "content": "x"}
    assert answer(turn, tool_call="assistant") == Message("assistant", "x")


def test_what_a_tool_answers_is_a_turn() -> None:
    turn = {"role": "tool", "content": "20", "tool_call_id": "c1", "name": "weather"}
    assert answer(turn) == Message("tool", "20", name="weather", tool_call_id="c1")
    item = {"type": "function_call_output", "call_id": "c1", "output": "20"}
    assert answer(item) == Message("tool", "20", tool_call_id="c1")
    assert answer({"role": "environment", "content": "20", "tool_call_id": None}) == Message(
        "tool", "20"
    )
    assert answer({"from": "observation", "value": "20"}) == Message("tool", "20")


TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
PLAIN_TOOL = {"name": "weather", "parameters": {"type": "object"}}
TOOLS: dict[str, Any] = {
    "OpenAI's": [TOOL],
    "bare": [PLAIN_TOOL],
    "of the responses api": [{"type": "function", **PLAIN_TOOL}],
    "JSON": json.dumps([TOOL]),
    "JSON of one": json.dumps(PLAIN_TOOL),
    "a list of JSON": [json.dumps(PLAIN_TOOL)],
    "one": TOOL,
    "filled up with nulls": [TOOL | {"function": PLAIN_TOOL | {"strict": None}, "name": None}],
}


@pytest.mark.parametrize("tools", TOOLS.values(), ids=TOOLS.keys())
def test_tools_are_read_in_every_spelling(tools: Any) -> None:
    assert read_tools(tools) == (TOOL,)


@pytest.mark.parametrize("nothing", [None, [], "", "  ", "[]"])
def test_no_tools_are_none(nothing: Any) -> None:
    assert read_tools(nothing) == ()


BAD_TOOLS = ["weather", [{"description": "x"}], [3], ["weather"], [{"name": 3}], [None]]
NO_TOOLS = [3, True, "3", ['{"name": ']]


@pytest.mark.parametrize("tools", [*BAD_TOOLS, *NO_TOOLS])
def test_tools_without_a_name_are_at_fault(tools: Any) -> None:
    with pytest.raises(RowError) as fault:
        read_tools(tools)
    assert fault.value.kind == "tools at fault"


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_thinking_in_a_field_of_its_own_is_kept(key: str) -> None:
    turn = {"role": "assistant", "content": "4", key: "2 and 2"}
    assert answer(turn) == Message("assistant", "4", reasoning_content="2 and 2")
    assert answer(turn | {key: None}) == answer(turn | {key: ""}) == Message("assistant", "4")
    # Of a question it is nothing that is learnt.
    assert answer(turn | {"role": "user"}) == Message("user", "4")


def test_an_item_of_thinking_belongs_to_the_answer_behind_it() -> None:
    thought = {"type": "reasoning", "summary": [{"type": "summary_text", "text": "2 and 2"}]}
    said = {"type": "message", "role": "assistant", "content": "4"}
    call = {"type": "function_call", **BARE}
    assert read_turns([QUESTION, thought, said], {})[1] == Message(
        "assistant", "4", reasoning_content="2 and 2"
    )
    assert read_turns([QUESTION, thought, call], {})[1] == Message(
        "assistant", "", reasoning_content="2 and 2", tool_calls=(CALL,)
    )


def test_items_of_one_answer_are_one_turn() -> None:
    said = {"role": "assistant", "content": [{"type": "output_text", "text": "I look."}]}
    call, output = {"type": "function_call", **BARE}, {"type": "function_call_output", "output": ""}
    found = read_turns([QUESTION, said, call, call, output, output, said], {})
    assert found == (
        Message("user", "Weather in Paris?"),
        Message("assistant", "I look.", tool_calls=(CALL, CALL)),
        Message("tool", ""),
        Message("tool", ""),
        Message("assistant", "I look."),
    )


# What a content is, and its text.
CONTENTS: list[tuple[Any, str]] = [
    ("a", "a"),
    ("", ""),
    (" \n a \n", " \n a \n"),
    ("مرحبا 🙂 e\u0301", "مرحبا 🙂 e\u0301"),
    ([{"type": "text", "text": "a "}, {"type": "text", "text": "b"}], "a b"),
    ([{"type": "input_text", "text": "a"}, {"type": "output_text", "text": "b"}], "ab"),
    (["a", "b"], "ab"),
    ([{"type": "refusal", "text": "No."}], "No."),
]


@pytest.mark.parametrize(("content", "text"), CONTENTS)
def test_parts_of_a_content_are_joined(content: Any, text: str) -> None:
    assert answer({"role": "assistant", "content": content}).content == text


NO_TEXT = {
    "an image": ([{"type": "image_url", "image_url": {"url": "x"}}], "the type 'image_url'"),
    "an image beside text": (
        [{"type": "text", "text": "a"}, {"type": "image", "text": "b"}],
        "the type 'image'",
    ),
    "a part without a type": ([{"text": "a"}], "the type None"),
    "a part of null": ([{"type": "text", "text": None}], "the type 'text'"),
    "a number": (3, "is not text"),
    "null": (None, "is not text"),
    "no parts": ([], "is not text"),
}


@pytest.mark.parametrize(("content", "reason"), NO_TEXT.values(), ids=NO_TEXT.keys())
def test_a_content_that_is_no_text_is_at_fault(content: Any, reason: str) -> None:
    with pytest.raises(RowError) as fault:
        answer({"role": "assistant", "content": content})
    assert fault.value.kind == "content that is not text"
    assert reason in str(fault.value)


# A flag of a turn, and whether it is learnt.
FLAGS: list[tuple[Any, bool]] = [
    (0, False),
    (False, False),
    (0.0, False),
    ("false", False),
    ("0", False),
    (1, True),
    (True, True),
    ("True", True),
    (None, True),
    ([0, 1], True),  # a mask of tokens, of another tokenizer
    ("yes", True),
    ("0.0", False),
]


@pytest.mark.parametrize(("flag", "is_learnt"), FLAGS)
@pytest.mark.parametrize("key", ["weight", "train", "trainable", "loss", "loss_mask", "training"])
def test_a_flag_exempts_a_turn(key: str, flag: Any, is_learnt: bool) -> None:
    assert answer({"role": "assistant", "content": "x", key: flag}).is_learnt is is_learnt


@pytest.mark.parametrize("weight", [0.5, 2, -1, "high", "0.5"])
def test_a_weight_that_would_be_lost_is_at_fault(weight: float | str) -> None:
    turn = {"role": "assistant", "content": "x", "weight": weight}
    with pytest.raises(RowError, match=rf"is {weight!r}: a turn is learnt \(1\) or not \(0\)"):
        answer(turn)


NO_TURNS = {
    "a number": 3,
    "an object": {"role": "user", "content": "x"},
    "text among turns": [QUESTION, "x"],
    "null among turns": [None],
    "a list among turns": [[]],
}


@pytest.mark.parametrize("turns", NO_TURNS.values(), ids=NO_TURNS.keys())
def test_what_is_no_list_of_turns_is_at_fault(turns: Any) -> None:
    with pytest.raises(RowError):
        read_turns(turns, {})


def test_calls_of_another_kind_are_at_fault() -> None:
    with pytest.raises(RowError):
        answer({"role": "assistant", "content": "x", "function_calls": 3})


@pytest.mark.parametrize("key", ["function_calls", "content"])
def test_one_call_that_is_an_object_is_read(key: str) -> None:
    role = "assistant" if key == "function_calls" else "function_call"
    assert answer({"role": role, key: BARE}).tool_calls == (CALL,)


def test_arguments_that_are_unpacked_are_kept() -> None:
    found = answer({"role": "assistant", "function_calls": "weather(**{'city': 'Paris'})"})
    assert "Paris" in repr(found)


def test_thinking_between_words_and_a_call_is_kept() -> None:
    said = {"role": "assistant", "content": "I look."}
    thought = {"type": "reasoning", "content": "now"}
    (_, found) = read_turns([QUESTION, said, thought, {"type": "function_call", **BARE}], {})
    assert found.reasoning_content == "now"


def test_an_item_of_thinking_holds_parts_of_thinking() -> None:
    thought = {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "2 and 2"}]}
    said = {"role": "assistant", "content": "4"}
    assert read_turns([QUESTION, thought, said], {})[1].reasoning_content == "2 and 2"
