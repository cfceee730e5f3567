"""Rows of every shape become the same turns, whatever their columns are called."""

import json
from typing import Any

import pytest

from marco_train.data.formats import Format, Reading, ignored_columns
from marco_train.data.turns import RowError
from marco_train.types import Message

ASKED, ANSWERED = Message("user", "two?"), Message("assistant", "2")
SYSTEM = Message("system", "Be brief.")
OPENAI = [{"role": "user", "content": "two?"}, {"role": "assistant", "content": "2"}]
SHAREGPT = [{"from": "human", "value": "two?"}, {"from": "gpt", "value": "2"}]
SYSTEM_TURN = {"role": "system", "content": "Be brief."}


def read(row: Any, columns: dict[str, str] | None = None, **roles: str) -> Reading:
    return Format(columns or {}, roles).read(row)


def said(reading: Reading) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in reading.messages]


# A row, and the shape that is told; the turns are ASKED and ANSWERED.
ANSWERED_ROWS: dict[str, tuple[dict[str, Any], str]] = {
    "messages": ({"messages": OPENAI}, "messages"),
    "messages in the words of sharegpt": ({"messages": SHAREGPT}, "sharegpt"),
    "conversations": ({"conversations": SHAREGPT}, "sharegpt"),
    "conversations in the words of OpenAI": ({"conversations": OPENAI}, "messages"),
    "conversation": ({"conversation": OPENAI}, "messages"),
    "dialogue": ({"dialogue": SHAREGPT}, "sharegpt"),
    "JSON of messages": ({"messages": json.dumps(OPENAI)}, "messages"),
    "JSON over lines": ({"messages": json.dumps(OPENAI, indent=2)}, "messages"),
    "JSON of conversations": ({"conversations": json.dumps(SHAREGPT)}, "sharegpt"),
    "turns that null fills up": (
        {"messages": [turn | {"name": None, "tool_calls": None} for turn in OPENAI]},
        "messages",
    ),
    "prompt and completion": ({"prompt": "two?", "completion": "2"}, "prompt+completion"),
    "prompt and completion as chats": (
        {"prompt": OPENAI[:1], "completion": OPENAI[1:]},
        "prompt+completion",
    ),
    "prompt and response": ({"prompt": "two?", "response": "2"}, "prompt+response"),
    "a chat as prompt, text as response": (
        {"prompt": OPENAI[:1], "response": "2"},
        "prompt+response",
    ),
    "JSON of a chat as prompt": (
        {"prompt": json.dumps(OPENAI[:1]), "response": json.dumps(OPENAI[1:])},
        "prompt+response",
    ),
    "alpaca": ({"instruction": "two?", "output": "2"}, "alpaca"),
    "alpaca without an input": ({"instruction": "two?", "input": "", "output": "2"}, "alpaca"),
    "dolly": ({"instruction": "two?", "context": "", "response": "2"}, "alpaca"),
    "question and answer": ({"question": "two?", "answer": "2"}, "question+answer"),
    "responses of NeMo-Gym": (
        {"responses_create_params": {"input": OPENAI}},
        "responses_create_params",
    ),
    "JSON of them": (
        {"responses_create_params": json.dumps({"input": OPENAI})},
        "responses_create_params",
    ),
    "chat and prompt that agree": ({"prompt": "two?", "messages": OPENAI}, "messages"),
    "chat and prompt that agree but for a system turn": (
        {"messages": OPENAI, "prompt": [SYSTEM_TURN, OPENAI[0]]},
        "messages",
    ),
    # What a source keeps beside a whole chat is not asked.
    "a whole chat beside another question": ({"messages": OPENAI, "prompt": "x"}, "messages"),
    "an empty chat beside a prompt": (
        {"messages": [], "prompt": "two?", "response": "2"},
        "prompt+response",
    ),
}


@pytest.mark.parametrize(("row", "shape"), ANSWERED_ROWS.values(), ids=ANSWERED_ROWS.keys())
def test_rows_of_every_shape_are_the_same_turns(row: dict[str, Any], shape: str) -> None:
    reading = read(row)
    assert reading.messages == (ASKED, ANSWERED)
    assert reading.shape == shape


# A row that only asks.
ASKING_ROWS: dict[str, dict[str, Any]] = {
    "prompt": {"prompt": "two?"},
    "prompt without its answer": {"prompt": "two?", "completion": None},
    "question": {"question": "two?", "answer": None},
    "instruction": {"instruction": "two?", "input": None, "output": None},
    "verl": {
        "data_source": "math",
        "prompt": [{"content": "two?", "role": "user"}],
        "ability": "MATH",
        "reward_model": {"ground_truth": "2", "style": "rule"},
    },
    "input as text": {"responses_create_params": {"input": "two?"}},
    "input as parts": {
        "responses_create_params": {
            "input": [
                {
                    "role": "user",
                    "content": [
                        {"type": "input_text", "text": "tw"},
                        {"type": "text", "text": "o"},
                        {"type": "output_text", "text": "?"},
                    ],
                }
            ]
        }
    },
    # What stands beside them is the same again, or what a verifier needs.
    "input beside a prompt": {"prompt": "other", "responses_create_params": {"input": "two?"}},
    "input beside a question": {
        "question": "other",
        "answer": "2",
        "responses_create_params": {"input": "two?"},
    },
    "null input beside a prompt": {"responses_create_params": None, "prompt": "two?"},
    "two answers that are rated": {"prompt": "two?", "chosen": "2", "rejected": "3"},
    "two chats that are rated": {
        "chosen": OPENAI,
        "rejected": [OPENAI[0], {"role": "assistant", "content": "3"}],
    },
    "JSON of a chat": {"messages": json.dumps(OPENAI[:1])},
}


@pytest.mark.parametrize("row", ASKING_ROWS.values(), ids=ASKING_ROWS.keys())
def test_rows_that_only_ask_are_one_question(row: dict[str, Any]) -> None:
    assert read(row).messages == (ASKED,)


def test_rated_answers_are_told() -> None:
    assert read(ASKING_ROWS["two answers that are rated"]).shape == "preference"
    assert read(ASKING_ROWS["two chats that are rated"]).shape == "preference"
    chosen = {"chosen": OPENAI, "rejected": OPENAI}
    assert read(chosen, {"messages": "chosen"}).messages == (ASKED, ANSWERED)


def test_an_input_is_added_to_the_instruction() -> None:
    row = {"instruction": "add", "input": "2 2", "output": "four"}
    assert said(read(row)) == [("user", "add\n\n2 2"), ("assistant", "four")]
    row = {"instruction": "add", "context": "2 2", "response": "four"}
    assert said(read(row)) == [("user", "add\n\n2 2"), ("assistant", "four")]


# A system turn in a place of its own.
SYSTEMS: dict[str, dict[str, Any]] = {
    "system": {"system": "Be brief.", "messages": OPENAI},
    "system_prompt": {"system_prompt": "Be brief.", "conversations": SHAREGPT},
    "beside a prompt": {"system": "Be brief.", "prompt": "two?", "completion": "2"},
    "beside an instruction": {"system": "Be brief.", "instruction": "two?", "output": "2"},
    "beside a question": {"system_prompt": "Be brief.", "question": "two?", "response": "2"},
    "instructions": {
        "responses_create_params": {"instructions": "Be brief.", "input": OPENAI},
    },
    "a developer": {
        "responses_create_params": {
            "input": [{"role": "developer", "content": "Be brief."}, *OPENAI]
        }
    },
    "twice the same": {"system": "Be brief. ", "messages": [SYSTEM_TURN, *OPENAI]},
}


@pytest.mark.parametrize("row", SYSTEMS.values(), ids=SYSTEMS.keys())
def test_a_system_turn_comes_first_wherever_it_stands(row: dict[str, Any]) -> None:
    reading = read(row)
    assert reading.messages == (SYSTEM, ASKED, ANSWERED)
    assert not ignored_columns(row, reading.used)


def test_plain_text_and_tokens_are_shapes_of_their_own() -> None:
    assert read({"text": "Once."}) == Reading("text", text="Once.", used=frozenset({"text"}))
    # Where there are turns, the text is the same again.
    assert read({"text": "...", "messages": OPENAI}).messages == (ASKED, ANSWERED)
    ids = {"input_ids": [5, 6, 7]}
    assert read(ids).input_ids == (5, 6, 7)
    assert read(ids).loss_mask == (True, True, True)
    labelled = read(ids | {"labels": [-100, 6, 7]})
    assert labelled.loss_mask == (False, True, True)
    for name in ("loss_mask", "assistant_masks", "completion_mask"):
        assert read(ids | {name: [0, 0, 1]}).loss_mask == (False, False, True)
    padded = read(ids | {"labels": [-100, 6, -100], "attention_mask": [1, 1, 0]})
    assert (padded.input_ids, padded.loss_mask) == ((5, 6), (False, True))


TOOL = {"name": "weather", "parameters": {"type": "object"}}
TOOL_ROWS: dict[str, dict[str, Any]] = {
    "tools": {"messages": OPENAI, "tools": [TOOL]},
    "tools in JSON": {"conversations": SHAREGPT, "tools": json.dumps([TOOL])},
    "functions": {"prompt": "two?", "completion": "2", "functions": [TOOL]},
    "of NeMo-Gym": {
        "responses_create_params": {"input": OPENAI, "tools": [{"type": "function", **TOOL}]}
    },
    # Dolci's stand in a turn.
    "in a turn": {
        "messages": [
            {**OPENAI[0], "functions": json.dumps([TOOL]), "function_calls": None},
            {**OPENAI[1], "functions": None, "function_calls": None},
        ]
    },
}


@pytest.mark.parametrize("row", TOOL_ROWS.values(), ids=TOOL_ROWS.keys())
def test_tools_are_found_wherever_they_stand(row: dict[str, Any]) -> None:
    reading = read(row)
    assert reading.messages == (ASKED, ANSWERED)
    assert reading.tools == ({"type": "function", "function": TOOL},)
    assert not ignored_columns(row, reading.used)


# A row, the kind of its fault, and what is said of it.
REFUSED: dict[str, tuple[Any, str, str]] = {
    "two chats": (
        {"messages": OPENAI, "conversations": [*SHAREGPT[:1], {"from": "gpt", "value": "3"}]},
        "two shapes",
        "of two shapes, messages and sharegpt, which say different things: choose with "
        "data.sources.<name>.columns.<standard name>=<own name>",
    ),
    "prompt and question": (
        {"prompt": "two?", "question": "three?"},
        "two shapes",
        "of two shapes, prompt and question",
    ),
    "prompt and instruction": (
        {"prompt": "two?", "instruction": "Write a poem.", "output": "2"},
        "two shapes",
        "of two shapes, prompt and alpaca",
    ),
    "translation": (
        {"translation": {"eng_Latn": "Hello."}, "laser_score": 1.2},
        "unknown columns",
        "among ['laser_score', 'translation']; "
        "data.sources.<name>.columns.messages=<own name> maps others",
    ),
    "nothing in it": (
        {"messages": None, "prompt": "", "id": 3},
        "empty chat",
        "there is nothing in messages, prompt",
    ),
    "systems that differ": (
        {"system": "Be long.", "messages": [SYSTEM_TURN, *OPENAI]},
        "two system turns",
        "the column system and the system turn of the chat differ",
    ),
    "images": ({"messages": OPENAI, "images": ["x"]}, "images or sound", "the row has images"),
    "sound": ({"prompt": "x", "audio": {"path": "x"}}, "images or sound", "the row has audio"),
    "several answers": (
        {"prompt": "two?", "response": ["2", "two"]},
        "several answers",
        "the answer ['2', 'two'] is a list of texts",
    ),
    "text as a number": ({"text": 3}, "content that is not text", "text is 3"),
    "ids as text": ({"input_ids": "1 2"}, "tokens at fault", "not a list of token ids"),
    "ids in a batch": ({"input_ids": [[1, 2]]}, "tokens at fault", "not a list of token ids"),
    "negative ids": ({"input_ids": [1, -100]}, "tokens at fault", "not a list of token ids"),
    "labels of another length": (
        {"input_ids": [1, 2], "labels": [1]},
        "tokens at fault",
        "labels and input_ids differ in length",
    ),
    "labels that are shifted": (
        {"input_ids": [1, 2, 3], "labels": [2, 3, -100]},
        "tokens at fault",
        "labels differ from input_ids: give them unshifted",
    ),
    "a mask of another length": (
        {"input_ids": [1, 2], "loss_mask": [1]},
        "tokens at fault",
        "loss_mask and input_ids differ in length",
    ),
}


@pytest.mark.parametrize(("row", "kind", "reason"), REFUSED.values(), ids=REFUSED.keys())
def test_rows_of_no_shape_or_of_two_are_at_fault(row: Any, kind: str, reason: str) -> None:
    with pytest.raises(RowError) as fault:
        read(row)
    assert fault.value.kind == kind
    assert reason in str(fault.value)


# A row, the source's `columns`, and what is read of it.
MAPPED: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "another name": ({"chat": OPENAI}, {"messages": "chat"}),
    "two of them": ({"q": "two?", "a": "2"}, {"prompt": "q", "response": "a"}),
    "of sharegpt": ({"talk": SHAREGPT}, {"conversations": "talk"}),
    "names change places": (
        {"response": "two?", "prompt": "2"},
        {"prompt": "response", "response": "prompt"},
    ),
    "one of two shapes": (
        {"messages": [{"role": "user", "content": "three?"}], "chat": OPENAI},
        {"messages": "chat"},
    ),
    "one of two shapes by its own name": (
        {"conversations": [{"from": "human", "value": "three?"}], "messages": OPENAI},
        {"messages": "messages"},
    ),
    "one column of two shapes": (
        {"prompt": "three?", "question": "two?", "answer": "2"},
        {"question": "question"},
    ),
}


@pytest.mark.parametrize(("row", "columns"), MAPPED.values(), ids=MAPPED.keys())
def test_columns_are_mapped_and_choose_a_shape(
    row: dict[str, Any], columns: dict[str, str]
) -> None:
    assert read(row, columns).messages == (ASKED, ANSWERED)


def test_a_mapped_column_that_is_not_there_is_named() -> None:
    with pytest.raises(RowError, match=r"no column 'chat' among \['messages'\], which data.sourc"):
        read({"messages": OPENAI}, {"messages": "chat"})


# A row, and its columns that look like content and are not read.
IGNORED: dict[str, tuple[dict[str, Any], set[str]]] = {
    "none": ({"messages": OPENAI, "id": 1, "source": "x", "domain": "math"}, set()),
    "a second answer": ({"prompt": "two?", "completion": "2", "response": "two"}, {"response"}),
    "rated answers": (
        {"messages": OPENAI, "chosen": "2", "rejected": "3"},
        {"chosen", "rejected"},
    ),
    "an answer that is rated": ({"prompt": "two?", "completion": "3", "label": False}, set()),
    "an answer of a class": ({"prompt": "two?", "completion": "2", "label": "sum"}, {"label"}),
    "text": ({"instruction": "two?", "output": "2", "text": "two? 2"}, {"text"}),
    "thoughts": ({"question": "two?", "answer": "2", "reasoning": "1 + 1"}, {"reasoning"}),
    "empty ones": ({"messages": OPENAI, "system": "", "tools": [], "response": None}, set()),
    "another question": ({"messages": OPENAI, "prompt": "x"}, {"prompt"}),
    "a passage": (
        {"question": "two?", "answer": "2", "passage": "One and one is two."},
        {"passage"},
    ),
    "a passage without spaces": (
        {"question": "two?", "answer": "2", "passage": "一加一等于二，二加二等于四。"},
        {"passage"},
    ),
    "passages": (
        {"question": "two?", "answer": "2", "notes": [{"text": "One and one is two."}]},
        {"notes"},
    ),
    "labels of rows": (
        {"messages": OPENAI, "topics": ["Machine Learning"], "license": {"name": "Apache 2.0"}},
        set(),
    ),
    "what a verifier needs": (
        {"messages": OPENAI, "verifier": {"kind": "a verifier of four words"}},
        set(),
    ),
    "a name that no terminal takes": (
        {"messages": OPENAI, "a\x1b\ud800": "text of some more words"},
        {"a\ufffd\ufffd"},
    ),
    "tools": ({"messages": OPENAI, "tools": [{"name": "f"}]}, set()),
    "of NeMo-Gym": (
        {"responses_create_params": {"input": "two?"}, "question": "two?", "answer": "2"},
        {"question", "answer"},
    ),
}


@pytest.mark.parametrize(("row", "names"), IGNORED.values(), ids=IGNORED.keys())
def test_columns_that_look_like_content_and_are_not_read_are_named(
    row: dict[str, Any], names: set[str]
) -> None:
    assert ignored_columns(row, read(row).used) == names


def test_a_column_that_is_nested_deep_is_no_content() -> None:
    nested: Any = "text of some more words"
    for _ in range(900):
        nested = [nested]
    assert ignored_columns({"messages": OPENAI, "tree": nested}, frozenset({"messages"})) == set()


def test_columns_of_a_question_and_its_answer_are_named_in_the_refusal() -> None:
    with pytest.raises(RowError, match=r"as .prompt and .response do a question and its answer"):
        read({"input": "two?", "output": "2"})
    mapped = read({"input": "two?", "output": "2"}, {"prompt": "input", "response": "output"})
    assert mapped.messages == (ASKED, ANSWERED)


def test_mapped_columns_are_read() -> None:
    row = {"chat": OPENAI, "prompt": "three?"}
    assert ignored_columns(row, read(row, {"messages": "chat"}).used) == {"prompt"}


# What rows call a role, and what it is.
ROLES = {
    "user": "user",
    "User": "user",
    " USER ": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "Bot": "assistant",
    "chatbot": "assistant",
    "system": "system",
    "developer": "system",
    "tool": "tool",
    "environment": "tool",
    "function": "tool",
    "observation": "tool",
    "ipython": "tool",
    "tool_response": "tool",
    "function_response": "tool",
}


@pytest.mark.parametrize(("name", "role"), ROLES.items())
@pytest.mark.parametrize("keys", [("role", "content"), ("from", "value")])
def test_roles_go_by_many_names(name: str, role: str, keys: tuple[str, str]) -> None:
    row = {"messages": [{keys[0]: name, keys[1]: "x"}]}
    assert read(row).messages == (Message(role, "x"),)


def test_a_map_of_roles_adds_to_them_and_goes_before_them() -> None:
    row = {"messages": [{"role": "Speaker_1", "content": "x"}, {"role": "model", "content": "y"}]}
    assert said(read(row, speaker_1="user", model="tool")) == [("user", "x"), ("tool", "y")]
    with pytest.raises(
        RowError, match=r"has no role among .*data.sources.<name>.roles.<own name>=user maps"
    ):
        read(row)


def test_a_mapped_column_that_adds_to_others_may_be_absent() -> None:
    columns = {"system": "persona", "language": "lang"}
    assert read({"messages": OPENAI}, columns).messages == (ASKED, ANSWERED)


def test_columns_that_hold_something_are_not_called_empty() -> None:
    with pytest.raises(RowError) as fault:
        read({"riddle": "two?", "response": "2"})
    assert "empty" not in str(fault.value)


def test_a_chat_in_json_with_spaces_is_a_chat() -> None:
    spaced = json.dumps(OPENAI[:1]).replace("[{", "[ {")
    assert read({"prompt": spaced}).messages == (ASKED,)


DEEP = json.loads("[" * 900 + "]" * 900)
TOO_DEEP: list[dict[str, Any]] = [
    {"role": "assistant", "tool_calls": [{"name": "f", "arguments": DEEP}]},
    {"role": "assistant", "content": "x", "function_call": {"name": "f", "arguments": DEEP}},
]


@pytest.mark.parametrize("turn", TOO_DEEP)
def test_values_that_are_nested_too_deep_are_at_fault(turn: dict[str, Any]) -> None:
    with pytest.raises(RowError, match="nested too deep"):
        Format({}, {}).read({"messages": [{"role": "user", "content": "x"}, turn]})
