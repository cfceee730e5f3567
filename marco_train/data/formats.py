"""The shapes of rows: which columns hold a chat, and how its turns are found there.

A row's shape is told by its columns that are not empty, as files of several datasets fill the
columns of the others with null. A row of two shapes that do not say the same is refused.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from marco_train.data.turns import (
    MOST_SHOWN,
    RowError,
    parsed_turns,
    read_tools,
    read_turns,
    shown,
    tools_in_turns,
)
from marco_train.types import Message

CHATS = ("messages", "conversations", "conversation", "dialogue", "dialog")
SYSTEM_COLUMNS = ("system", "system_prompt")
MASKS = ("loss_mask", "assistant_masks", "assistant_mask", "completion_mask")
MEDIA = ("images", "image", "videos", "video", "audio", "audios")
NO_LOSS = -100  # of a label
# Columns that look like content; where a shape does not use one, the user hears of it.
CONTENT_COLUMNS = {
    *CHATS,
    *SYSTEM_COLUMNS,
    *("prompt", "completion", "response", "responses", "output", "answer", "chosen", "rejected"),
    *("instruction", "input", "context", "question", "text", "input_ids", "labels"),
    *("tools", "functions", "reasoning_content", "reasoning", "thinking", "solution", "problem"),
    *("query", "answers", "history", "choices", "options", "documents", "chat_template_kwargs"),
    *("label", *MASKS),
    "responses_create_params",
}

MOST_NESTED = 3  # lists and objects in which text of a column is looked for
# Read beside the content.
NO_CONTENT = {"language", "verifier", "attention_mask"}
STANDARD_COLUMNS = CONTENT_COLUMNS | NO_CONTENT
"""Names that `SourceConfig.columns` gives to columns of other names."""


@dataclass(frozen=True)
class Reading:
    """What a row says."""

    shape: str
    messages: tuple[Message, ...] = ()
    tools: tuple[Mapping[str, Any], ...] = ()
    text: str = ""
    """Of a row without turns."""
    input_ids: tuple[int, ...] = ()
    """Of a row that was tokenised before."""
    loss_mask: tuple[bool, ...] = ()
    used: frozenset[str] = frozenset()
    """Columns that went into it."""


@dataclass(frozen=True)
class Format:
    """How the rows of a source are read."""

    columns: Mapping[str, str]
    """A column's own name, by its standard one."""
    roles: Mapping[str, str]
    """What a role is, by its own name in lower case."""

    def read(self, row: Any) -> Reading:
        """Read a row of any shape.

        Raises:
            RowError: It is of no shape, of two that differ, or its content is at fault.
        """
        try:
            return self._read(row)
        except RecursionError as error:
            raise RowError("nested too deep", "the row's values are nested too deep") from error

    def _read(self, row: Any) -> Reading:
        if not isinstance(row, Mapping):
            raise RowError("no object", f"the row is {shown(row)}, not an object with columns")
        named = self._named(row)
        media = next((name for name in MEDIA if _holds(named, name)), None)
        if media is not None:
            raise RowError("images or sound", f"the row has {media}, and only text is learnt here")
        shapes = _shapes_of(named)
        if self.columns:
            wanted = [shape for shape in shapes if KEY_COLUMNS[shape] & self.columns.keys()]
            shapes = wanted or shapes
        if not shapes:
            known = sorted(CONTENT_COLUMNS & row.keys())
            if known and not any(_holds(row, name) for name in known):
                raise RowError(
                    "empty chat", f"the chat is empty: there is nothing in {', '.join(known)}"
                )
            raise RowError(
                "unknown columns",
                f"no column messages, prompt, instruction, question, text or another that is "
                f"known among {sorted(map(str, row))}; "
                "data.sources.<name>.columns.messages=<own name> maps others, as .prompt and "
                ".response do a question and its answer",
            )
        first, *others = (READERS[shape](named, self.roles) for shape in shapes)
        for other in others:
            first = _one_of(first, other)
        if first.messages and isinstance(named.get("label"), bool):  # an answer that is rated
            first = replace(first, shape="preference", used=first.used | {"label"})
        used = {self.columns.get(name, name) for name in first.used}
        return replace(first, used=frozenset(used))

    def _named(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        """The row with standard names of columns."""
        if not self.columns:
            return row
        absent = [own for own in self.columns.values() if own not in row]
        deciding = {own for name, own in self.columns.items() if name in KEY_NAMES}
        if absent and deciding and not deciding & row.keys():
            raise RowError(
                "unknown columns",
                f"no column {absent[0]!r} among {sorted(map(str, row))}, which "
                "data.sources.<name>.columns names",
            )
        others = {name: value for name, value in row.items() if name not in self.columns.values()}
        return others | {name: row[own] for name, own in self.columns.items() if own in row}


def ignored_columns(row: Mapping[str, Any], used: frozenset[str]) -> set[str]:
    """Columns of a row that look like content, by their name or their text, and were not used."""
    return {
        _printable(name)
        for name in row.keys() - used - NO_CONTENT
        if (name in CONTENT_COLUMNS and _holds(row, name)) or _is_prose(row[name])
    }


def _printable(name: str) -> str:
    """A name as it can be shown in a line, whatever a row calls its columns."""
    return "".join(c if c.isprintable() else "\ufffd" for c in name[:MOST_SHOWN])


def _is_prose(value: Any, depth: int = MOST_NESTED) -> bool:
    """Whether a value, or one of a list's or an object's, is text of several words."""
    if isinstance(value, str):
        # Some scripts put no spaces between words.
        return len(value.split(None, 3)) > 3 or (len(value) > 12 and not value.isascii())
    if isinstance(value, Mapping):
        value = [*value.values()]
    return isinstance(value, list) and depth > 0 and any(_is_prose(v, depth - 1) for v in value)


def _holds(row: Mapping[str, Any], name: str) -> bool:
    value = row.get(name)
    return value is not None and not (isinstance(value, list | str | dict) and not value)


def _shapes_of(row: Mapping[str, Any]) -> list[str]:
    """The shapes that a row's columns allow, the likeliest first."""
    found = [name for name in CHATS if _holds(row, name)]
    if _holds(row, "responses_create_params"):
        # The columns beside it are parts of it again, and what a verifier needs.
        return [*found, "responses_create_params"]
    if _holds(row, "chosen") and _holds(row, "rejected"):
        return found or ["preference"]
    for name in ("prompt", "instruction", "question", "query", "problem"):
        if _holds(row, name):
            found.append(name)
    if found:
        return found
    return [name for name in ("input_ids", "text") if _holds(row, name)][:1]


def _one_of(first: Reading, second: Reading) -> Reading:
    """Choose between two readings of a row: the longer one of two that say the same.

    A whole chat goes before a question beside it, which its source keeps for itself.

    Raises:
        RowError: They differ.
    """
    spoken = [
        [(m.role, m.content.strip()) for m in reading.messages if m.role != "system"]
        for reading in (first, second)
    ]
    common = min(map(len, spoken))
    if spoken[0][:common] == spoken[1][:common]:
        return second if len(second.messages) > len(first.messages) else first
    answered = [any(role == "assistant" for role, _ in turns) for turns in spoken]
    chats = [bool(reading.used & set(CHATS)) for reading in (first, second)]
    if answered == chats == [True, False]:
        return first
    raise RowError(
        "two shapes",
        f"the row is of two shapes, {first.shape} and {second.shape}, which say different things: "
        "choose with data.sources.<name>.columns.<standard name>=<own name>",
    )


def _read_chat(column: str) -> Callable[[Mapping[str, Any], Mapping[str, str]], Reading]:
    def read(row: Mapping[str, Any], roles: Mapping[str, str]) -> Reading:
        turns = row[column]
        if isinstance(turns, str):
            parsed = parsed_turns(turns)
            if parsed is None:
                raise RowError(
                    "no list of turns",
                    f"{column} is {shown(turns)}, neither a list nor JSON of one",
                )
            turns = parsed
        messages = read_turns(turns, roles)
        is_sharegpt = isinstance(turns[0], Mapping) and turns[0].get("from") is not None
        used = {column}
        messages = _with_system(row, messages, used)
        tools = _tools_of(row, tools_in_turns(turns), used)
        shape = "sharegpt" if is_sharegpt else "messages"
        return Reading(shape, messages, tools, used=frozenset(used))

    return read


def _with_system(
    row: Mapping[str, Any], messages: tuple[Message, ...], used: set[str]
) -> tuple[Message, ...]:
    """Put the text of a column of its own before the turns, unless they begin with it."""
    for name in SYSTEM_COLUMNS:
        if not _holds(row, name):
            continue
        (system,) = read_turns([{"role": "system", "content": row[name]}], {})
        used.add(name)
        if messages and messages[0].role == "system":
            if messages[0].content.strip() != system.content.strip():
                raise RowError(
                    "two system turns", f"the column {name} and the system turn of the chat differ"
                )
            return messages
        return (system, *messages)
    return messages


def _tools_of(
    row: Mapping[str, Any], in_turns: Any, used: set[str]
) -> tuple[Mapping[str, Any], ...]:
    for name in ("tools", "functions"):
        if _holds(row, name):
            used.add(name)
            return read_tools(row[name])
    return read_tools(in_turns)


def _read_responses(row: Mapping[str, Any], roles: Mapping[str, str]) -> Reading:
    """Read what NeMo-Gym sends to a model: https://github.com/NVIDIA-NeMo/Gym."""
    asked = row["responses_create_params"]
    if isinstance(asked, str):
        try:
            asked = json.loads(asked)
        except (ValueError, RecursionError) as error:
            raise RowError(
                "no list of turns", f"responses_create_params is {shown(asked)}, no object"
            ) from error
    if not isinstance(asked, Mapping):
        raise RowError("no list of turns", f"responses_create_params is {shown(asked)}, no object")
    if not _holds(asked, "input"):
        raise RowError(
            "empty chat", "the chat is empty: there is no turn in responses_create_params.input"
        )
    messages = read_turns(asked["input"], roles)
    messages = _with_system({"system": asked.get("instructions")}, messages, set())
    used = frozenset({"responses_create_params"})
    return Reading("responses_create_params", messages, read_tools(asked.get("tools")), used=used)


def _read_answered(
    question: str, answers: tuple[str, ...], shape: str, extra: tuple[str, ...] = ()
) -> Callable[[Mapping[str, Any], Mapping[str, str]], Reading]:
    """Read a question and its answer, of two columns; further columns add to the question."""

    def read(row: Mapping[str, Any], roles: Mapping[str, str]) -> Reading:
        messages = read_turns(row[question], roles)
        used = {question}
        for name in extra:
            if _holds(row, name):
                last = messages[-1]
                (added,) = read_turns([{"role": last.role, "content": row[name]}], {})
                more = Message(last.role, f"{last.content}\n\n{added.content}")
                messages = (*messages[:-1], more)
                used.add(name)
        if _holds(row, "history"):
            messages = (*_read_history(row["history"], roles), *messages)
            used.add("history")
        given = [name for name in answers if row.get(name) is not None]
        answer = next((name for name in given if row[name] != ""), next(iter(given), None))
        if answer is not None:
            used.add(answer)
            messages += _read_answer(answer, row[answer], roles)
        messages = _with_system(row, messages, used)
        tools = _tools_of(row, None, used)
        name = shape if shape == "alpaca" or answer is None else f"{question}+{answer}"
        return Reading(name, messages, tools, used=frozenset(used))

    return read


def _read_history(history: Any, roles: Mapping[str, str]) -> tuple[Message, ...]:
    """Read what was said before: pairs of a question and its answer, or turns."""
    turns: list[Any] = []
    for each in history if isinstance(history, list) else [history]:
        if isinstance(each, list) and len(each) == 2:
            turns += [
                {"role": "user", "content": each[0]},
                {"role": "assistant", "content": each[1]},
            ]
        else:
            turns.append(each)
    return read_turns(turns, roles)


def _read_answer(column: str, answer: Any, roles: Mapping[str, str]) -> tuple[Message, ...]:
    if not isinstance(answer, str | list):
        raise RowError("content that is not text", f"{column} is {shown(answer)}, not text")
    if isinstance(answer, list) and answer and isinstance(answer[0], str):
        raise RowError(
            "several answers", f"the answer {shown(answer)} is a list of texts: choose one"
        )
    if isinstance(answer, str) and parsed_turns(answer) is None:
        answer = [{"role": "assistant", "content": answer}]
    return read_turns(answer, roles)


def _read_preference(row: Mapping[str, Any], roles: Mapping[str, str]) -> Reading:
    """Read the question of two rated answers; neither is what a model should learn by itself."""
    asked = [name for name in ("prompt", "question", "instruction") if _holds(row, name)]
    used = {"chosen", "rejected", *asked[:1]}
    if asked:
        messages = read_turns(row[asked[0]], roles)
    elif isinstance(row["chosen"], str) and parsed_turns(row["chosen"]) is None:
        raise RowError(
            "no question", "chosen is text without a question: no column prompt stands beside it"
        )
    else:
        chosen = read_turns(row["chosen"], roles)
        messages = chosen[:-1] if len(chosen) > 1 else chosen
    messages = _with_system(row, messages, used)
    return Reading("preference", messages, _tools_of(row, None, used), used=frozenset(used))


def _read_text(row: Mapping[str, Any], _: Mapping[str, str]) -> Reading:
    if isinstance(row.get("role"), str):
        raise RowError(
            "one turn of a chat",
            "text and role are one turn of a conversation: join its turns first",
        )
    if not isinstance(row["text"], str):
        raise RowError("content that is not text", f"text is {shown(row['text'])}, not text")
    (said,) = read_turns([{"role": "user", "content": row["text"]}], {})
    return Reading("text", text=said.content, used=frozenset({"text"}))


def _read_tokens(row: Mapping[str, Any], _: Mapping[str, str]) -> Reading:
    """Read ids with labels or a mask; without either all of them are learnt."""
    ids = row["input_ids"]
    if not isinstance(ids, list) or not all(type(i) is int and i >= 0 for i in ids):
        raise RowError("tokens at fault", f"input_ids is {shown(ids)}, not a list of token ids")
    mask, used = [True] * len(ids), {"input_ids"}
    labels = row.get("labels")
    if labels is not None:
        used.add("labels")
        if not isinstance(labels, list) or len(labels) != len(ids):
            raise RowError("tokens at fault", "labels and input_ids differ in length")
        mask = [label != NO_LOSS for label in labels]
        if any(m and label != i for i, label, m in zip(ids, labels, mask, strict=True)):
            raise RowError(
                "tokens at fault",
                "labels differ from input_ids: give them unshifted, -100 where no loss is",
            )
    given = next((name for name in MASKS if row.get(name) is not None), None)
    if given is not None and labels is None:
        used.add(given)
        if not isinstance(row[given], list) or len(row[given]) != len(ids):
            raise RowError("tokens at fault", f"{given} and input_ids differ in length")
        if not all(flag in (0, 1) for flag in row[given]):
            raise RowError("tokens at fault", f"{given} holds other values than 0 and 1")
        mask = [bool(flag) for flag in row[given]]
    attended = row.get("attention_mask")
    if isinstance(attended, list) and len(attended) == len(ids):  # padding is no token
        ids, mask = (
            [v for v, a in zip(values, attended, strict=True) if a] for values in (ids, mask)
        )
    if not ids:
        raise RowError("tokens at fault", "input_ids holds no token that is attended to")
    return Reading("input_ids", input_ids=tuple(ids), loss_mask=tuple(mask), used=frozenset(used))


Reader = Callable[[Mapping[str, Any], Mapping[str, str]], Reading]
READERS: dict[str, Reader] = {
    **{name: _read_chat(name) for name in CHATS},
    "responses_create_params": _read_responses,
    "preference": _read_preference,
    "prompt": _read_answered("prompt", ("completion", "response"), "prompt"),
    "instruction": _read_answered(
        "instruction",
        ("output", "response", "completion", "answer"),
        "alpaca",
        ("input", "context"),
    ),
    "question": _read_answered(
        "question", ("answer", "response", "output"), "question", extra=("context",)
    ),
    "query": _read_answered("query", ("response", "answer"), "query"),
    "problem": _read_answered("problem", ("solution",), "problem"),
    "input_ids": _read_tokens,
    "text": _read_text,
}
# Of each shape: the columns by which a user's map chooses it.
KEY_COLUMNS: dict[str, set[str]] = {
    **{name: {name} for name in CHATS},
    "responses_create_params": {"responses_create_params"},
    "preference": {"chosen", "rejected"},
    "prompt": {"prompt", "completion", "response"},
    "instruction": {"instruction", "output", "input"},
    "question": {"question", "answer"},
    "query": {"query"},
    "problem": {"problem", "solution"},
    "input_ids": {"input_ids", "labels", *MASKS},
    "text": {"text"},
}
KEY_NAMES = set().union(*KEY_COLUMNS.values())
