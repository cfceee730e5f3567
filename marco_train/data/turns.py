"""Turns of a chat, as many datasets write them, to messages.

A turn is {role, content} or {from, value}. Roles go by many names, an answer may call tools in the
words of OpenAI, of NeMo-Gym or of Dolci, and may say that it is not to be learnt.
"""

import ast
import json
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from marco_train.config.data import ROLES
from marco_train.types import Message

# In lower case; `SourceConfig.roles` adds to them.
ROLE_NAMES = {
    **{role: role for role in ROLES},
    "developer": "system",
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "chatbot": "assistant",
    "environment": "tool",
    "function": "tool",
    "observation": "tool",
    "ipython": "tool",
    "tool_response": "tool",
    "function_response": "tool",
    "tool_call": "assistant",
    "function_call": "assistant",
}
CALLING_ROLES = {"tool_call", "function_call"}  # their content is a call
TEXT_PARTS = {"text", "input_text", "output_text", "reasoning_text", "summary_text", "refusal"}
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
# Flags of a turn that exempt it from the loss where they are false or 0.
LEARNT_FLAGS = ("weight", "train", "trainable", "loss", "loss_mask", "training")
FLAG_WORDS = {
    "true": 1,
    "yes": 1,
    "1": 1,
    "1.0": 1,
    "false": 0,
    "no": 0,
    "0": 0,
    "0.0": 0,
    "": None,
}
# Characters of a row that a message or the quarantine shows.
MOST_SHOWN = 200
# Thinking in the text of an answer; where a prompt opened it, only its end stands there, on a line
# of its own, as words about it do not.
THINKING = re.compile(
    r"\s*<think>(?P<whole>.*?)</think>\s*"
    r"|(?P<ended>(?:(?!<think>).)*?)^[ \t]*</think>[ \t]*$\s*"
    r"|\s*<think>(?P<open>.*)",
    re.DOTALL | re.MULTILINE,
)


class RowError(ValueError):
    """Why a row cannot be read.

    Args:
        kind: Of the fault, in a few words.
        reason: A sentence about this row.
        begins: What a row that cannot be parsed begins with.
    """

    def __init__(self, kind: str, reason: str, begins: str = "") -> None:
        super().__init__(reason)
        self.kind, self.begins = kind, begins


def shown(value: Any) -> str:
    """Show a value in a message, shortened."""
    text = repr(value)
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]} ..."


def read_turns(turns: Any, roles: Mapping[str, str]) -> tuple[Message, ...]:
    """Read the turns of a chat.

    Args:
        turns: A list of turns, JSON of one, or the text of one question.
        roles: Names of roles beyond those that are known, in lower case, and what they are.

    Raises:
        RowError: Says which turn is at fault, and how.
    """
    if isinstance(turns, str):
        turns = parsed_turns(turns) or [{"role": "user", "content": turns}]
    if not isinstance(turns, list):
        raise RowError("no list of turns", f"the chat is {shown(turns)}, not a list of turns")
    messages: list[Message] = []
    thought = ""  # of an item of its own, before the answer that it belongs to
    for turn in turns:
        kind = turn.get("type") if isinstance(turn, Mapping) else None
        if kind == "reasoning":
            thought += _reasoning_of_item(turn)
            continue
        message = _read_item(turn, kind, roles)
        if thought and message.role == "assistant" and not message.reasoning_content:
            message, thought = replace(message, reasoning_content=thought), ""
        follows_answer = bool(messages) and messages[-1].role == message.role == "assistant"
        if _is_call(turn) and follows_answer:
            before = messages.pop()  # what was said and what is called are one turn
            thoughts = filter(None, (before.reasoning_content, message.reasoning_content))
            message = replace(
                before,
                content="\n".join(filter(None, (before.content, message.content))),
                tool_calls=before.tool_calls + message.tool_calls,
                reasoning_content="\n".join(thoughts),
                is_learnt=before.is_learnt and message.is_learnt,
            )
        messages.append(message)
    if not messages:
        raise RowError("empty chat", "the chat is empty: there is no turn in it")
    return tuple(messages)


def split_thinking(content: str) -> tuple[str, str] | None:
    """Split an answer into its thinking, without white space around it, and the rest.

    None where there is no thinking, not even an empty one.
    """
    if "think>" not in content:  # most have none, and it takes long to find that out
        return None
    found = THINKING.match(content)
    if found is None:
        return None
    return next(filter(None, found.groups()), "").strip(), content[found.end() :]


def _is_call(turn: Mapping[str, Any]) -> bool:
    """Whether a turn is nothing but a call, and so part of the turn before it."""
    role = _either(turn, "role", "from")
    is_role = isinstance(role, str) and role.strip().lower() in CALLING_ROLES
    return is_role or turn.get("type") == "function_call"


def tools_in_turns(turns: Any) -> Any:
    """Find the functions that a system turn lists in a key of its own, as Dolci's do."""
    found = (
        turn.get("functions") or turn.get("tools") for turn in turns if isinstance(turn, Mapping)
    )
    return next(filter(None, found), None)


def parsed_turns(text: str) -> list[Any] | None:
    """Read JSON of a list of turns; None for any other text."""
    if not re.match(r"\s*\[\s*\{", text):
        return None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    is_chat = isinstance(found, list) and all(
        isinstance(turn, Mapping) and ("role" in turn or "from" in turn) for turn in found
    )
    return found if is_chat and found else None


def read_tools(tools: Any) -> tuple[Mapping[str, Any], ...]:
    """Read the functions that may be called, from a list or JSON of one.

    Both {type, function: {name, ...}} and {name, ...} are accepted; keys that are null are left
    out, as columnar files fill them up.

    Raises:
        RowError: It is no list of functions with names.
    """
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else []
        except (ValueError, RecursionError) as error:
            raise RowError(
                "tools at fault", f"tools is {shown(tools)}, neither a list nor JSON of one"
            ) from error
    if isinstance(tools, Mapping):
        tools = [tools]
    if tools is not None and not isinstance(tools, list):
        raise RowError("tools at fault", f"tools is {shown(tools)}, not a list of functions")
    found = []
    for item in tools or ():
        tool = _parsed(item) if isinstance(item, str) else item
        function = tool.get("function") if isinstance(tool, Mapping) else None
        function = function if isinstance(function, Mapping) else tool
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise RowError("tools at fault", f"the tool {shown(tool)} is no function with a name")
        bare = {key: value for key, value in function.items() if key != "type"}
        found.append({"type": "function", "function": without_nulls(bare)})
    _check_text(found, "tools", "tools at fault")
    return tuple(found)


def without_nulls(value: Any) -> Any:
    """Leave out the keys that are null, at every depth."""
    if isinstance(value, Mapping):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def _read_item(turn: Any, kind: Any, roles: Mapping[str, str]) -> Message:
    """Read a turn, or one of the items that stand for turns in NeMo-Gym's rows."""
    if kind == "function_call":
        return Message("assistant", "", tool_calls=(_call(turn, turn),))
    if kind == "function_call_output":
        call = turn.get("call_id")
        content = _text(turn.get("output"), turn)
        return Message("tool", content, tool_call_id=None if call is None else str(call))
    return _read_turn(turn, roles)


def _read_turn(turn: Any, roles: Mapping[str, str]) -> Message:
    said = _either(turn, "role", "from") if isinstance(turn, Mapping) else None
    said = said.strip().lower() if isinstance(said, str) else None
    known = {**ROLE_NAMES, **roles}
    role = known.get(said or "")
    if role is None:
        raise RowError(
            "unknown role",
            f"the turn {shown(turn)} has no role among {sorted(known)}; "
            "data.sources.<name>.roles.<own name>=user maps others",
        )
    content = _either(turn, "content", "value")
    calls: tuple[Mapping[str, Any], ...] = ()
    verbatim = ""
    if role == "assistant":
        is_call = said in CALLING_ROLES and said not in roles
        split = split_thinking(content) if is_call and isinstance(content, str) else None
        if split is not None:
            turn, content = {**turn, "reasoning_content": split[0]}, split[1]
        calls, verbatim = _read_calls({"function_calls": content} if is_call else turn)
        content = None if is_call else content
    text = "" if content is None and (calls or verbatim) else _text(content, turn)
    name, call_id = turn.get("name"), turn.get("tool_call_id")
    return Message(
        role,
        "\n".join(filter(None, (text, verbatim))) if verbatim else text,
        reasoning_content=_reasoning_of(turn) if role == "assistant" else "",
        tool_calls=calls,
        name=name if isinstance(name, str) and name else None,
        tool_call_id=call_id if isinstance(call_id, str) and call_id else None,
        is_learnt=_is_learnt(turn),
    )


def _either(turn: Mapping[str, Any], *keys: str) -> Any:
    """What the first of the keys that is not null holds."""
    return next((turn[key] for key in keys if turn.get(key) is not None), None)


def _text(content: Any, turn: Any) -> str:
    """Text of a content, which may be a list of parts of text."""
    if isinstance(content, list):
        content = "".join(_parts(content, turn)) if content else None
    if not isinstance(content, str):
        raise RowError("content that is not text", f"the content of {shown(turn)} is not text")
    try:
        content.encode()
    except UnicodeEncodeError as error:
        raise RowError(
            "half of a surrogate pair",
            f"the content of {shown(turn)} holds half of a surrogate pair",
        ) from error
    return content


def _parts(parts: Sequence[Any], turn: Any) -> Iterator[str]:
    for part in parts:
        kind = part.get("type") if isinstance(part, Mapping) else None
        text = part if isinstance(part, str) else part.get("text") if kind in TEXT_PARTS else None
        if not isinstance(text, str):
            raise RowError(
                "content that is not text",
                f"the content of {shown(turn)} is not text: it holds a part of the type {kind!r}, "
                "and only text is learnt here",
            )
        yield text


def _reasoning_of(turn: Mapping[str, Any]) -> str:
    found = next(filter(None, map(turn.get, REASONING_KEYS)), None)
    return _text(found, turn) if found is not None else ""


def _reasoning_of_item(item: Mapping[str, Any]) -> str:
    return _text(item.get("content") or item.get("summary") or "", item)


def _is_learnt(turn: Mapping[str, Any]) -> bool:
    """Whether no flag of a turn exempts it.

    Raises:
        RowError: A flag is a weight between 0 and 1, which would be lost.
    """
    if turn.get("train_detail"):
        raise RowError("a part of a turn is exempt", "a turn is learnt whole here, or not at all")
    for key in LEARNT_FLAGS:
        flag = turn.get(key)
        if isinstance(flag, str):
            flag = FLAG_WORDS.get(flag.strip().lower(), flag)
        if flag is None or isinstance(flag, list):  # a mask of tokens is of another tokenizer
            continue
        if flag not in (0, 1):
            raise RowError(
                "a weight between 0 and 1",
                f"{key} of {shown(turn)} is {flag!r}: a turn is learnt (1) or not (0)",
            )
        if not flag:
            return False
    return True


def _parsed(text: str) -> Any:
    """What JSON says; None for any other text."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except RecursionError:  # nested too deep to be read here, and stays text
        return True
    except ValueError:
        return False
    return True


def _check_text(value: Any, what: str, kind: str) -> None:
    """Refuse halves of surrogate pairs in any text of a value.

    Raises:
        RowError: There is one.
    """
    try:
        json.dumps(value, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError as error:
        raise RowError(kind, f"{what} {shown(value)} holds half of a surrogate pair") from error


def _read_calls(turn: Mapping[str, Any]) -> tuple[tuple[Mapping[str, Any], ...], str]:
    """Read the calls of a turn; those of no known spelling come back as text."""
    calls = turn.get("tool_calls") or turn.get("function_call")
    calls = calls or turn.get("function_calls")
    if calls is None or calls in ([], {}):
        return (), ""
    if isinstance(calls, str):
        if calls.strip() in ("", "[]", "{}", "null"):
            return (), ""
        found = _calls_in_json(calls) or _calls_in_python(calls)
        if found is None:
            return (), f"<tool_call>\n{_text(calls, turn)}\n</tool_call>"
        calls = found
    calls = [calls] if isinstance(calls, Mapping) else calls
    if not isinstance(calls, list):
        raise RowError("calls at fault", f"the calls of {shown(turn)} are no list")
    return tuple(_call(call, turn) for call in calls), ""


def _call(call: Any, turn: Any) -> dict[str, Any]:
    """Bring a call into the shape that chat templates read; its arguments stay as they are.

    Raises:
        RowError: It names no function, or its arguments are text and not JSON.
    """
    function = call.get("function") or call if isinstance(call, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(name, str) or not name:
        raise RowError("calls at fault", f"a call of {shown(turn)} names no function")
    arguments = _either(function, "arguments", "parameters", "args", "input")
    arguments = {} if arguments == "" else arguments
    if isinstance(arguments, str) and not _is_json(arguments):
        raise RowError(
            "arguments of a call that are not JSON",
            f"the arguments {shown(arguments)} of a call of {name} are not JSON",
        )
    found: dict[str, Any] = {
        "type": "function",
        "function": {
            "name": name,
            "arguments": without_nulls({} if arguments is None else arguments),
        },
    }
    _check_text(found, "the call", "calls at fault")
    call_id = call.get("id", call.get("call_id"))
    return found if call_id is None else found | {"id": call_id}


def _calls_in_json(text: str) -> list[Any] | None:
    found = _parsed(text)
    calls = [found] if isinstance(found, Mapping) else found
    is_calls = isinstance(calls, list) and all(
        isinstance(call, Mapping) and ("name" in call or "function" in call) for call in calls
    )
    return calls if is_calls else None


def _calls_in_python(text: str) -> list[Any] | None:
    """Read calls like `weather(city="Paris")`, one or more; None for any other text."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # of text that is no code of ours
            warnings.simplefilter("ignore", DeprecationWarning)
            body = ast.parse(text.strip()).body
        statements = [node.value for node in body if isinstance(node, ast.Expr)]
        nodes = [
            each
            for node in statements
            for each in (node.elts if isinstance(node, ast.List | ast.Tuple) else [node])
        ]
        calls = [
            {
                "name": ast.unparse(node.func),
                "arguments": {str(k.arg): ast.literal_eval(k.value) for k in node.keywords},
            }
            for node in nodes
            if isinstance(node, ast.Call) and not node.args and all(k.arg for k in node.keywords)
        ]
        json.dumps(calls)  # a set, as in f({1, 2}), is no argument that JSON has
    except (SyntaxError, ValueError, RecursionError, MemoryError, TypeError):
        return None
    return calls if calls and len(calls) == len(nodes) and len(statements) == len(body) else None
