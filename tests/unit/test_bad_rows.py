"""A row at fault is dropped, counted and named; it never ends a run."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from marco_train.config.data import HeldOutConfig, SourceConfig
from marco_train.data.loader import PromptLoader, SFTLoader, held_out_questions
from marco_train.data.stream import MOST_NAMED, ConversationStream
from marco_train.errors import InputError
from tests.helpers.rows import LOADERS, chat, config, loader_of, turns, write
from tests.helpers.tokenizers import tokenizer_of
from tests.helpers.world import World

GOOD = [json.dumps(chat(f"question {n}")) for n in range(3)]


def answer(**keys: Any) -> str:
    """A line with an answer of these keys."""
    asked = {"role": "user", "content": "x"}
    return turns(asked, {"role": "assistant", "content": None, **keys})


# What stands in a line of a file, and what is said of it.
BAD = {
    "content null": (turns({"role": "user", "content": None}), "is not text"),
    "content a number": (turns({"role": "user", "content": 3}), "is not text"),
    "content an object": (turns({"role": "user", "content": {"text": "x"}}), "is not text"),
    "an image": (
        turns({"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}),
        "a part of the type 'image_url'",
    ),
    "a column of images": ('{"prompt": "x", "images": ["a.png"]}', "the row has images"),
    "no parts": (turns({"role": "user", "content": []}), "is not text"),
    "no answer and no call": (answer(tool_calls=[]), "is not text"),
    "a call that names nothing": (answer(tool_calls=[{"id": "1"}]), "names no function"),
    "a call of a number": (answer(tool_calls=3), "are no list"),
    "a nameless tool": (
        json.dumps({"prompt": "x", "tools": [{"description": "weather"}]}),
        "is no function with a name",
    ),
    "tools that are no JSON": ('{"prompt": "x", "tools": "weather"}', "tools is 'weather'"),
    "text that is no JSON": ('{"messages": "hello"}', "neither a list nor JSON of one"),
    "an unknown role": (turns({"role": "robot", "content": "x"}), "has no role among"),
    "a role that is a list": (turns({"role": ["user"], "content": "x"}), "has no role among"),
    "a turn without a role": (turns({"content": "x"}), "has no role among"),
    "a turn that is text": (turns("x"), "has no role among"),
    "no turns": (turns(), "the chat is empty"),
    "null turns": ('{"messages": null, "prompt": null}', "the chat is empty"),
    "null parameters": ('{"responses_create_params": null}', "the chat is empty"),
    "no input": ('{"responses_create_params": {"input": []}}', "the chat is empty"),
    "parameters that are text": ('{"responses_create_params": "x"}', "no object"),
    "a chat that is a number": ('{"messages": 3}', "not a list of turns"),
    "a chat that is an object": ('{"messages": {"role": "user"}}', "not a list of turns"),
    "a weight of a half": (
        answer(content="y", weight=0.5),
        "a turn is learnt (1) or not (0)",
    ),
    "another column": ('{"translation": {"eng_Latn": "x"}}', "no column messages"),
    "no column": ("{}", "no column messages"),
    "two chats that differ": (
        json.dumps(chat("a") | {"conversations": chat("b")["messages"]}), "two shapes, messages"
    ),
    "two system turns that differ": (
        json.dumps({"system": "a", "messages": [{"role": "system", "content": "b"}]}),
        "the system turn of the chat differ",
    ),
    "several answers": ('{"question": "x", "answer": ["a", "b"]}', "choose one"),
    "a list": ("[1, 2]", "not an object"),
    "text": ('"hello"', "not an object"),
    "a number": ("3", "not an object"),
    "nothing": ("null", "not an object"),
    "half of a surrogate pair": (turns({"role": "user", "content": "a\ud800"}), "surrogate"),
    "half of a pair in a role": (turns({"role": "\udfff", "content": "a"}), "has no role among"),
    "a line that is cut off": ('{"messages": [{"role": "us', "line 2: not JSON"),
    "a key that stands twice": ('{"prompt": "a", "prompt": "b"}', "'prompt' stands twice"),
    "too deep": ("[" * 100_000, "line 2: not JSON"),
    "a number of 5,000 digits": ('{"prompt": 1' + "0" * 5000 + "}", "line 2: not JSON"),
}  # fmt: skip


@pytest.mark.parametrize("stage", LOADERS)
@pytest.mark.parametrize(("line", "reason"), BAD.values(), ids=BAD.keys())
def test_a_row_at_fault_is_dropped_counted_and_named(
    line: str,
    reason: str,
    stage: str,
    world: World,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = write(tmp_path, GOOD[0], line, *GOOD[1:])
    quarantine = tmp_path / "run" / "quarantine.jsonl"
    loader = loader_of(stage, world, file, "stage.global_batch_size=4", quarantine=quarantine)
    (judged,) = capsys.readouterr().out.splitlines()
    assert judged.startswith("source 'text': 4 rows, shape messages; at fault: ")
    (kept,) = map(json.loads, quarantine.read_text().splitlines())
    assert (kept["source"], kept["row"]) == ("text", 1)
    assert reason in kept["reason"]
    assert len(kept["begins"]) <= 200

    next(loader)
    found = loader.metrics()
    assert (found["data/num_sequences"], found["data/dropped_malformed"]) == (3, 1)
    (said,) = capsys.readouterr().out.splitlines()
    assert said.startswith("dropped source 'text', row 1 (from 0): ")
    assert reason in said


SURROGATE = {"function": {"name": "f", "arguments": {"text": "\ud800"}}}
NAMED_TOOL = {"name": "f", "description": "\ud800"}
# Rows that end a run.
ENDING = {
    "half of a pair in a call": ("sft", answer(tool_calls=[SURROGATE])),
    "half of a pair in a tool": (
        "opd", json.dumps({"prompt": "x", "completion": "y", "tools": [NAMED_TOOL]})
    ),
    "thinking and no turn": ("opd", turns({"type": "reasoning", "content": "x"})),
    "nothing but padding": ("opd", '{"input_ids": [1, 2], "attention_mask": [0, 0]}'),
    "tools that are a number": ("opd", '{"prompt": "x", "tools": 3}'),
}  # fmt: skip


@pytest.mark.parametrize(("stage", "line"), ENDING.values(), ids=ENDING.keys())
def test_a_row_at_fault_ends_no_run(stage: str, line: str, world: World, tmp_path: Path) -> None:
    file = write(tmp_path, GOOD[0], line, *GOOD[1:])
    loader = loader_of(stage, world, file, "stage.global_batch_size=4")
    next(loader)
    assert loader.metrics()["data/dropped_malformed"] == 1


REFUSES_SYSTEM = """\
{%- for m in messages %}{%- if m.role == 'system' %}{{ raise_exception('no system turns here') }}
{%- elif m.role == 'tool' %}{{ 'a' + 1 }}{%- endif %}
{{- m.role + ': ' }}
{%- if m.role == 'assistant' %}
{%- generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}
{%- else %}{{ m.content + '<|im_end|>' }}{% endif %}
{%- endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"""


def with_template(world: World, directory: Path, template: str) -> Path:
    """The world's tokenizer with another template."""
    path = directory / "tokenizer"
    shutil.copytree(world.path("data", "tokenizer"), path)
    (path / "chat_template.jinja").write_text(template)
    return path


@pytest.mark.parametrize("stage", LOADERS)
def test_a_row_that_the_template_cannot_render_is_one_at_fault(
    stage: str, world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = {"role": "user", "content": "x"}
    bad = [
        turns({"role": "system", "content": "x"}, asked),
        turns(asked, {"role": "tool", "content": "x"}),
    ]
    file = write(tmp_path, *GOOD, *bad)
    tokenizer = with_template(world, tmp_path, REFUSES_SYSTEM)
    loader = loader_of(stage, world, file, "stage.global_batch_size=5", tokenizer=tokenizer)
    (judged,) = capsys.readouterr().out.splitlines()
    assert judged == "source 'text': 5 rows, shape messages; 2 data/dropped_malformed"
    next(loader)
    found = loader.metrics()
    assert (found["data/num_sequences"], found["data/dropped_malformed"]) == (3, 2)
    said = sorted(capsys.readouterr().out.splitlines())
    assert "row 3 (from 0): the chat template cannot render it" in said[0]
    assert "TemplateError: no system turns here" in said[0]
    assert "row 4" in said[1]
    assert "TypeError" in said[1]


def test_a_row_that_the_template_cannot_render_is_written_down(
    world: World, tmp_path: Path
) -> None:
    file = write(tmp_path, *GOOD, turns({"role": "system", "content": "x"}))
    tokenizer = with_template(world, tmp_path, REFUSES_SYSTEM)
    quarantine = tmp_path / "quarantine.jsonl"
    loader_of("sft", world, file, tokenizer=tokenizer, quarantine=quarantine)
    (kept,) = map(json.loads, quarantine.read_text().splitlines())
    assert "no system turns here" in kept["reason"]


def test_a_prompt_of_no_tokens_is_at_fault(world: World, tmp_path: Path) -> None:
    # This template opens no turn, and leaves out what the row holds.
    nothing = (
        "{% for m in messages %}{% if m.content != 'x' %}{{ m.content }}{% endif %}{% endfor %}"
    )
    file = write(tmp_path, GOOD[0], json.dumps({"prompt": "x"}))
    tokenizer = with_template(world, tmp_path, nothing)
    loader = loader_of("opd", world, file, "stage.global_batch_size=2", tokenizer=tokenizer)
    next(loader)
    assert loader.metrics()["data/dropped_malformed"] == 1


def test_each_row_at_fault_is_named_once_and_no_more_than_a_few(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path, GOOD[0], "{}")
    loader = loader_of("sft", world, file, "stage.global_batch_size=2")
    capsys.readouterr()
    for _ in range(4):  # four epochs
        next(loader)
        assert loader.metrics()["data/dropped_malformed"] == 1
    assert len(capsys.readouterr().out.splitlines()) == 1

    file = write(tmp_path, GOOD[0], *["{}"] * 30)
    any_share = ["data.max_bad_rows=1", "data.max_lost_rows=1"]
    loader = loader_of("sft", world, file, "stage.global_batch_size=31", *any_share)
    capsys.readouterr()
    next(loader)
    assert loader.metrics()["data/dropped_malformed"] == 30
    *named, last = capsys.readouterr().out.splitlines()
    assert len(named) == MOST_NAMED
    assert last == "further rows at fault are not named; data/dropped_malformed counts them"


def held_out_of(stage: str, world: World, file: Path, rows: Path) -> int:
    """How many held-out rows a loader keeps."""
    cfg = config(stage, world, file)
    cfg.data.held_out = HeldOutConfig(sources=one_source(rows))
    tokenizer = tokenizer_of(cfg.model.tokenizer)
    if stage == "opd":
        return len(PromptLoader(cfg.data, cfg.stage, tokenizer, cfg.seed).held_out(3))
    cfg.stage.num_eval_examples = 3
    packed = SFTLoader(cfg.data, cfg.stage, tokenizer, cfg.seed).held_out()
    return sum(int((batch.position_ids == 0).sum()) for batch in packed)


def one_source(file: Path) -> dict[str, SourceConfig]:
    return {"text": SourceConfig(path=str(file), category="math", weight=1.0)}


@pytest.mark.parametrize("stage", LOADERS)
def test_held_out_rows_at_fault_are_dropped_and_none_left_is_refused(
    stage: str, world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "held").mkdir()
    train = write(tmp_path, *GOOD)
    rows = write(tmp_path / "held", GOOD[0], "{}", turns({"role": "user", "content": None}))
    assert held_out_of(stage, world, train, rows) == 1
    said = capsys.readouterr().out
    assert "row 1 (from 0): no column messages" in said
    assert "row 2 (from 0): the content of" in said
    assert "held-out: dropped 2 of 3 rows (2 data/dropped_malformed)" in said
    write(tmp_path / "held", "{}", "[]")
    with pytest.raises(InputError, match=r"none of 3 held-out rows can be used .*malformed"):
        held_out_of(stage, world, train, rows)


@pytest.mark.parametrize(
    ("stage", "limit"), [("sft", "stage.max_length=96"), ("opd", "stage.max_prompt_length=72")]
)
def test_held_out_rows_that_are_too_long_are_said_with_the_limit(
    stage: str, limit: str, world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "held").mkdir()
    train = write(tmp_path, *GOOD)
    rows = write(tmp_path / "held", *GOOD[:2], json.dumps(chat("question " * 500)))
    assert held_out_of(stage, world, train, rows) == 2
    assert (
        f"held-out: dropped 1 of 3 rows (1 data/dropped_too_long over {limit})\n"
        in capsys.readouterr().out
    )


def test_questions_at_fault_are_dropped_and_none_left_is_refused(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    no_answer = turns({"role": "user", "content": "x"})
    rows = write(tmp_path, GOOD[0], "{}", no_answer, GOOD[1])
    tokenizer = tokenizer_of(world.path("data", "tokenizer"))
    found = held_out_questions(ConversationStream(one_source(rows), None, 0), 4, 64, tokenizer)
    assert {(one.text, one.reference) for one in found} == {
        ("question 0", "no"),
        ("question 1", "no"),
    }
    said = capsys.readouterr().out
    assert "row 1 (from 0): no column messages" in said
    assert "row 2 (from 0): the row is no question with its answer" in said
    write(tmp_path, "{}", no_answer)
    with pytest.raises(InputError, match=r"none of 2 held-out rows can be used .*malformed"):
        held_out_questions(ConversationStream(one_source(rows), None, 0), 2, 64, tokenizer)
