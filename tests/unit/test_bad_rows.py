"""A row at fault is dropped, counted and named; it never ends a run."""

import gzip
import json
import os
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from marco_train.config import TrainConfig
from marco_train.config.data import SourceConfig, SourceKind
from marco_train.data.loader import MOST_NAMED, PromptLoader, SFTLoader, held_out_questions
from marco_train.data.sources import BadRow, Source, read_messages
from marco_train.errors import InputError
from marco_train.types import Conversation, Message
from tests.conftest import World, compose_config, tokenizer_of
from tests.ranks import run_on_ranks

LOADERS = {"sft": SFTLoader, "opd": PromptLoader}


def chat(text: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "no"}]}


GOOD = [json.dumps(chat(f"question {n}")) for n in range(3)]


def turns(*found: Any) -> str:
    return json.dumps({"messages": list(found)})


# What stands in a file, and what is said of it.
BAD = {
    "content null": (turns({"role": "user", "content": None}), "is not text"),
    "content a number": (turns({"role": "user", "content": 3}), "is not text"),
    "content an object": (turns({"role": "user", "content": {"text": "x"}}), "is not text"),
    "a part that is no text": (
        turns({"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}),
        "is not text",
    ),
    "no parts": (turns({"role": "user", "content": []}), "is not text"),
    "a call of a tool": (
        turns(
            {"role": "user", "content": "x"},
            {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]},
        ),
        "holds tool_calls",
    ),
    "a call of a tool beside no words": (
        turns(
            {"role": "user", "content": "x"},
            {"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]},
        ),
        "holds tool_calls",
    ),
    "a call in the card's words": (
        turns(
            {"role": "user", "content": "x"},
            {"role": "assistant", "content": "", "function_calls": "f()", "functions": None},
        ),
        "holds function_calls",
    ),
    "text that is no JSON": ('{"messages": "hello"}', "neither a list nor JSON of one"),
    "an unknown role": (turns({"role": "robot", "content": "x"}), "has no role among"),
    "a role that is a list": (turns({"role": ["user"], "content": "x"}), "has no role among"),
    "a turn without a role": (turns({"from": "human", "value": "x"}), "has no role among"),
    "a turn that is text": (turns("x"), "has no role among"),
    "no turns": (turns(), "the chat is empty"),
    "null turns": ('{"messages": null, "prompt": null}', "the chat is empty"),
    "null parameters": ('{"responses_create_params": null}', "the chat is empty"),
    "parameters that are text": ('{"responses_create_params": "x"}', "dictionary"),
    "a chat that is a number": ('{"messages": 3}', "not a list of turns"),
    "a chat that is an object": ('{"messages": {"role": "user"}}', "not a list of turns"),
    "another column": ('{"text": "hello"}', "no column messages"),
    "no column": ("{}", "no column messages"),
    "a list": ("[1, 2]", "not an object"),
    "text": ('"hello"', "not an object"),
    "a number": ("3", "not an object"),
    "nothing": ("null", "not an object"),
    "half of a surrogate pair": (turns({"role": "user", "content": "a\ud800"}), "surrogate"),
    "half of a pair in a role": (turns({"role": "\udfff", "content": "a"}), "has no role among"),
}


def config(stage: str, world: World, file: Path, *more: str) -> TrainConfig:
    """A run on one source alone."""
    overrides = [f"root={world.root}", "data=quickstart_text", f"data.sources.text.path={file}"]
    return compose_config(f"quickstart_{stage}", *overrides, *more)


def loader_of(
    stage: str, world: World, file: Path, *more: str, template: str | None = None
) -> SFTLoader | PromptLoader:
    cfg = config(stage, world, file, *more)
    tokenizer = cfg.model.tokenizer
    if template is not None:
        shutil.copytree(tokenizer, file.parent / "tokenizer")
        tokenizer = str(file.parent / "tokenizer")
        Path(tokenizer, "chat_template.jinja").write_text(template)
    loader: SFTLoader | PromptLoader = LOADERS[stage](
        cfg.data, cfg.stage, tokenizer_of(tokenizer), cfg.seed
    )
    return loader


def write(tmp_path: Path, *lines: str) -> Path:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(line + "\n" for line in lines))
    return file


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
    loader = loader_of(stage, world, file, "stage.global_batch_size=4")
    next(loader)
    found = loader.metrics()
    assert (found["data/num_sequences"], found["data/dropped_malformed"]) == (3, 1)
    (said,) = capsys.readouterr().out.splitlines()
    assert said.startswith("dropped source 'text', row 1 (from 0): ")
    assert reason in said


REFUSES_SYSTEM = """\
{%- for m in messages %}{%- if m.role == 'system' %}{{ raise_exception('no system turns here') }}
{%- elif m.role == 'tool' %}{{ 'a' + 1 }}{%- endif %}
{{- m.role + ': ' }}{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{% endfor %}"""


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
    loader = loader_of(stage, world, file, "stage.global_batch_size=5", template=REFUSES_SYSTEM)
    next(loader)
    found = loader.metrics()
    assert (found["data/num_sequences"], found["data/dropped_malformed"]) == (3, 2)
    said = sorted(capsys.readouterr().out.splitlines())
    assert "row 3 (from 0): the chat template cannot render it" in said[0]
    assert "TemplateError: no system turns here" in said[0]
    assert "row 4" in said[1]
    assert "TypeError" in said[1]


def test_a_prompt_of_no_tokens_is_at_fault(world: World, tmp_path: Path) -> None:
    # This template opens no turn, and leaves out what the row holds.
    nothing = (
        "{% for m in messages %}{% if m.content != 'x' %}{{ m.content }}{% endif %}{% endfor %}"
    )
    file = write(tmp_path, GOOD[0], json.dumps({"prompt": "x"}))
    loader = loader_of("opd", world, file, "stage.global_batch_size=2", template=nothing)
    next(loader)
    assert loader.metrics()["data/dropped_malformed"] == 1


def test_each_row_at_fault_is_named_once_and_no_more_than_a_few(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path, GOOD[0], "{}")
    loader = loader_of("sft", world, file, "stage.global_batch_size=2")
    for _ in range(4):  # four epochs
        next(loader)
        assert loader.metrics()["data/dropped_malformed"] == 1
    assert len(capsys.readouterr().out.splitlines()) == 1

    file = write(tmp_path, GOOD[0], *["{}"] * 30)
    loader = loader_of("sft", world, file, "stage.global_batch_size=31")
    next(loader)
    assert loader.metrics()["data/dropped_malformed"] == 30
    *named, last = capsys.readouterr().out.splitlines()
    assert len(named) == MOST_NAMED
    assert last == "further rows at fault are not named; data/dropped_malformed counts them"


def source(tmp_path: Path, *rows: Any, **changes: Any) -> Source:
    file = write(tmp_path, *(json.dumps(row) for row in rows))
    fields = {"kind": SourceKind.jsonl, "path": str(file), "category": "math", "weight": 1.0}
    return Source("fixture", SourceConfig(**(fields | changes)))


def test_distinct_prompts_are_told_among_rows_at_fault(tmp_path: Path) -> None:
    rows = [{"prompt": "a"}, {"text": "?"}, {"prompt": "a"}, 7, {"prompt": "b"}]
    found = source(tmp_path, *rows, unique_prompts=True)
    kept = [found[i] for i in range(len(found))]
    # A row at fault is kept, to be counted where it is drawn.
    assert [item.row for item in kept] == [0, 1, 3, 4]
    assert [isinstance(item, BadRow) for item in kept] == [False, True, True, False]


# A value, and the label that it gives; None and "" are the source's own category, or no language.
LABELS = [
    ("algebra", "algebra"),
    ("zh/en", "zh/en"),
    ("数学 🧮", "数学 🧮"),
    (["science", "history"], "science+history"),
    (["science", None, ["deep"]], "science+deep"),
    ([], ""),
    (None, ""),
    ("", ""),
    (3, "3"),
    (0, "0"),
    (0.5, "0.5"),
    (True, "True"),
    ({"a": 1}, "{'a': 1}"),
    ("half \ud800", "half ?"),
]


@pytest.mark.parametrize(("value", "label"), LABELS)
def test_a_label_of_any_type_is_text(value: Any, label: str, tmp_path: Path) -> None:
    found = source(tmp_path, {"prompt": "x", "category": value, "language": value}, "bad row")
    conversation = found[0]
    assert isinstance(conversation, Conversation)
    assert conversation.category == (label or "math")
    assert conversation.language == label
    assert found.values("category") == {label or "math"}
    assert found.values("language") == {label}


def test_labels_of_a_parquet_column_may_be_lists(tmp_path: Path) -> None:
    import datasets

    rows = [{"prompt": "x", "category": ["a", "b"]}, {"prompt": "y", "category": None}]
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "rows.parquet"))
    kind = {"kind": SourceKind.parquet, "path": str(tmp_path / "rows.parquet")}
    found = source(tmp_path, **kind)
    assert found.values("category") == {"a+b", "math"}
    assert found.values("language") == {""}
    assert [found[i].category for i in range(2)] == ["a+b", "math"]


@pytest.mark.parametrize("value", ["exact", ["exact"], 3])
def test_a_verifier_that_is_no_object_is_a_name(value: Any, tmp_path: Path) -> None:
    found = source(tmp_path, {"prompt": "x", "verifier": value})[0]
    assert isinstance(found, Conversation)
    assert found.verifier == {"name": "3" if value == 3 else "exact"}


PARTS = {
    "parts of a responses api": (
        {"responses_create_params": {"input": [{"role": "user", "content": [
            {"type": "input_text", "text": "a "}, {"type": "text", "text": "b"},
            {"type": "output_text", "text": " c"}]}]}},
        "a b c",
    ),
    "null messages": ({"messages": None, "prompt": "a"}, "a"),
    "empty messages": ({"messages": [], "prompt": "a"}, "a"),
    "a chat as JSON": ({"messages": '[{"role": "user", "content": "a"}]'}, "a"),
    "empty text": ({"messages": "", "prompt": [{"role": "user", "content": "a"}]}, "a"),
    "null parameters": ({"responses_create_params": None, "prompt": "a"}, "a"),
    "null input": ({"responses_create_params": {"input": None}, "prompt": "a"}, "a"),
    "input as text": ({"responses_create_params": {"input": "a"}, "prompt": None}, "a"),
    "both": ({"responses_create_params": {"input": "a"}, "prompt": "b"}, "a"),
}  # fmt: skip


@pytest.mark.parametrize(("row", "text"), PARTS.values(), ids=PARTS.keys())
def test_parts_are_joined_and_empty_columns_passed_over(row: dict[str, Any], text: str) -> None:
    assert read_messages(row) == (Message("user", text),)


def test_columns_that_null_fills_up_are_read_from_parquet(tmp_path: Path) -> None:
    import datasets

    rows = [
        {"prompt": "a", "responses_create_params": None},
        {"prompt": None, "responses_create_params": {"input": [{"role": "user", "content": "b"}]}},
    ]
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "rows.parquet"))
    found = source(tmp_path, kind=SourceKind.parquet, path=str(tmp_path / "rows.parquet"))
    assert [found[i].messages for i in range(2)] == [(Message("user", t),) for t in "ab"]


def held_out_of(stage: str, world: World, file: Path, rows: Path) -> int:
    """How many held-out rows a loader keeps."""
    cfg = config(stage, world, file)
    cfg.data.held_out = one_source(rows)
    tokenizer = tokenizer_of(cfg.model.tokenizer)
    if stage == "opd":
        return len(PromptLoader(cfg.data, cfg.stage, tokenizer, cfg.seed).held_out(3))
    cfg.stage.num_eval_examples = 3
    packed = SFTLoader(cfg.data, cfg.stage, tokenizer, cfg.seed).held_out()
    return sum(int((batch.position_ids == 0).sum()) for batch in packed)


def one_source(file: Path) -> dict[str, SourceConfig]:
    cfg = SourceConfig(kind=SourceKind.jsonl, path=str(file), category="math", weight=1.0)
    return {"text": cfg}


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


def test_questions_at_fault_are_dropped_and_none_left_is_refused(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    no_answer = turns({"role": "user", "content": "x"})
    rows = write(tmp_path, GOOD[0], "{}", no_answer, GOOD[1])
    tokenizer = tokenizer_of(world.path("data", "tokenizer"))
    found = held_out_questions(one_source(rows), 4, 64, tokenizer)
    assert {(one.text, one.reference) for one in found} == {
        ("question 0", "no"),
        ("question 1", "no"),
    }
    said = capsys.readouterr().out
    assert "row 1 (from 0): no column messages" in said
    assert "row 2 (from 0): the row is no question with its answer" in said
    of_ranks = run_on_ranks(2, held_out_questions, one_source(rows), 4, 64, tokenizer)
    assert of_ranks == [found, found]
    write(tmp_path, "{}", no_answer)
    with pytest.raises(InputError, match=r"none of 2 held-out rows can be used .*malformed"):
        held_out_questions(one_source(rows), 2, 64, tokenizer)


# Three of four prompts are over the limit, so that some batches of two hold nothing else.
LONG = [json.dumps(chat("far too long " * 60)) for _ in range(15)]
SHORT = [json.dumps(chat(f"short {n}")) for n in range(5)]
SMALL_STEPS = ["stage.global_batch_size=2", "seed=1"]


def drawn_by_rank(
    world: World, file: Path, num_steps: int, resumed: tuple[int, dict[str, Any]] | None = None
) -> tuple[list[list[int]], list[dict[str, float]], list[dict[str, Any]]]:
    """Indices of the prompts of each step, its metrics, and the state before it."""
    loader = loader_of("opd", world, file, *SMALL_STEPS)
    first = 0
    if resumed is not None:
        first = resumed[0]
        loader.resume(first, json.loads(json.dumps(resumed[1])))
    prompts, metrics, states = [], [], []
    for step in range(first, num_steps):
        states.append(loader.state_at(step))
        prompts.append([prompt.index for prompt in next(loader)])
        metrics.append(loader.metrics())
    return prompts, metrics, states


def test_a_step_without_a_prompt_draws_the_next_ones_on_any_number_of_ranks(
    world: World, tmp_path: Path
) -> None:
    file = write(tmp_path, *LONG, *SHORT)
    prompts, metrics, states = drawn_by_rank(world, file, 12)
    assert all(prompts)
    begins = [state["cursor"] for state in states]
    batches = [(after - before) // 2 for before, after in pairwise(begins)]
    assert min(batches) == 1
    assert max(batches) > 1
    # Every sample is of one step, the prompts of a step are of its last batch, and what was passed
    # over is counted.
    for step, number in enumerate(batches):
        end = begins[step + 1]
        assert all(end - 2 <= index < end for index in prompts[step])
        dropped = metrics[step]["data/dropped_too_long"]
        assert dropped + metrics[step]["data/num_sequences"] == 2 * number
        assert metrics[step]["data/epoch"] == pytest.approx(end / 20)

    of_ranks = run_on_ranks(2, drawn_by_rank, world, file, 12)
    joined = [
        sorted(one + other) for one, other in zip(of_ranks[0][0], of_ranks[1][0], strict=True)
    ]
    assert joined == prompts
    for _, metrics_of_rank, states_of_rank in of_ranks:
        assert metrics_of_rank == metrics
        assert states_of_rank == states

    for step in (3, 7):
        assert drawn_by_rank(world, file, 12, (step, states[step])) == (
            prompts[step:],
            metrics[step:],
            states[step:],
        )


def test_prompts_drawn_ahead_do_not_move_the_cursor_of_a_checkpoint(
    world: World, tmp_path: Path
) -> None:
    file = write(tmp_path, *LONG, *SHORT)
    prompts, _, states = drawn_by_rank(world, file, 12)
    ahead = loader_of("opd", world, file, *SMALL_STEPS)
    next(ahead)
    for step in range(1, 11):
        next(ahead)  # of the step after this one
        # Saved before a step, while it waits for servers, and after it.
        assert [ahead.state_at(step - 1), ahead.state_at(step)] == states[step - 1 : step + 1]
    again = loader_of("opd", world, file, *SMALL_STEPS)
    again.resume(6, states[6])
    assert [prompt.index for prompt in next(again)] == prompts[6]


@pytest.mark.parametrize("stage", LOADERS)
def test_data_of_which_nothing_can_be_used_are_refused_with_the_counts(
    stage: str, world: World, tmp_path: Path
) -> None:
    file = write(tmp_path, *LONG[:6], "{}", turns())
    loader = loader_of(stage, world, file, "stage.global_batch_size=2")
    with pytest.raises(InputError) as refusal:
        next(loader)
    said = str(refusal.value)
    # In 1,000 samples each of the eight rows has come 125 times.
    assert said.startswith("none of 1000 samples in a row can be used (")
    assert "250 data/dropped_malformed in 'text'" in said
    assert "750 data/dropped_too_long in 'text'" in said
    assert "source 'text', row " in said

    both = run_on_ranks(2, refusal_of_rank, stage, world, file)
    assert both[0] == both[1]
    assert both[0].split(";")[:2] == said.split(";")[:2]  # the example is any rank's


def refusal_of_rank(stage: str, world: World, file: Path) -> str:
    try:
        next(loader_of(stage, world, file, "stage.global_batch_size=2"))
    except InputError as error:
        return str(error)
    raise AssertionError("not refused")


def test_the_one_row_that_can_be_used_is_found_in_a_small_source(
    world: World, tmp_path: Path
) -> None:
    bad, good = tmp_path / "bad.jsonl", tmp_path / "good.jsonl"
    bad.write_text("{}\n" * 3)
    good.write_text(GOOD[0] + "\n")
    cfg = compose_config("quickstart_opd", f"root={world.root}", "stage.global_batch_size=1")
    for source in cfg.data.sources.values():
        source.path = str(bad)
    cfg.data.sources["math"].path = str(good)  # of weight 0.1
    tokenizer = tokenizer_of(world.path("data", "tokenizer"))
    loader = PromptLoader(cfg.data, cfg.stage, tokenizer, cfg.seed)
    for _ in range(20):
        (prompt,) = next(loader)
        assert prompt.source == "math"


def test_a_file_that_is_no_utf8_is_refused_with_the_line(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    text = '{"prompt": "a"}\n{"prompt": "caf\u00e9"}\n'
    for before in (b"", b"\xef\xbb\xbf"):
        file.write_bytes(before + text.encode("latin-1"))
        cfg = SourceConfig(kind=SourceKind.jsonl, path=str(file), category="c", weight=1.0)
        with pytest.raises(InputError, match=r"rows.jsonl, line 2: not UTF-8 .*byte 0xe9"):
            Source("fixture", cfg)


def test_packed_files_and_arrays_are_read_as_lines_are(tmp_path: Path) -> None:
    rows = [{"prompt": "a"}, {"prompt": "b"}]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    contents = {
        "lines": lines,
        "lines.gz": gzip.compress(lines),
        "packed without saying so": gzip.compress(lines, mtime=5),
        "array": json.dumps(rows).encode(),
        "array over lines": json.dumps(rows, indent=1).encode(),
        "array.gz": gzip.compress(json.dumps(rows).encode()),
    }
    digests = {}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        path = str(tmp_path / name)
        cfg = SourceConfig(kind=SourceKind.jsonl, path=path, category="c", weight=1.0)
        found = Source("fixture", cfg)
        assert [found[i].messages[0].content for i in range(len(found))] == ["a", "b"]
        digests[name] = found.fingerprint
    assert digests["lines"] == digests["lines.gz"] == digests["packed without saying so"]
    (tmp_path / "cut.gz").write_bytes(contents["lines.gz"][:-9])
    path = str(tmp_path / "cut.gz")
    cfg = SourceConfig(kind=SourceKind.jsonl, path=path, category="c", weight=1.0)
    with pytest.raises(InputError, match=r"cut.gz is no whole gzip file"):
        Source("fixture", cfg)


@pytest.mark.parametrize("line", ['{"prompt": ', "[" * 100_000, '{"prompt": 1' + "0" * 5000 + "}"])
def test_a_line_that_python_cannot_parse_is_named(line: str, tmp_path: Path) -> None:
    file = write(tmp_path, GOOD[0], line)
    cfg = SourceConfig(kind=SourceKind.jsonl, path=str(file), category="c", weight=1.0)
    with pytest.raises(InputError, match=r"rows.jsonl, line 2: not JSON"):
        Source("fixture", cfg)


def parquet(path: Path, *texts: str) -> Path:
    import datasets

    rows = [{"messages": [{"role": "user", "content": text}]} for text in texts]
    datasets.Dataset.from_list(rows).to_parquet(str(path))
    return path


def test_a_parquet_file_is_known_by_its_content(tmp_path: Path) -> None:
    def opened(path: Path) -> tuple[str, str]:
        found = source(tmp_path, kind=SourceKind.parquet, path=str(path))
        return found.fingerprint, found[0].messages[0].content

    file = parquet(tmp_path / "rows.parquet", "a", "b")
    os.utime(file, (1000, 1000))
    before = opened(file)
    os.utime(file, (2000, 2000))
    assert opened(file) == before
    shutil.copy(file, tmp_path / "moved.parquet")
    assert opened(tmp_path / "moved.parquet") == before
    parquet(file, "c", "d")
    os.utime(file, (1000, 1000))
    after = opened(file)
    assert after[0] != before[0]
    assert after[1] == "c"


def test_a_dataset_of_the_hub_is_known_by_what_its_rows_say(tmp_path: Path) -> None:
    def fingerprint(name: str) -> str:
        return source(tmp_path, kind=SourceKind.hub, path=str(tmp_path / name)).fingerprint

    texts = [str(n) for n in range(2500)]
    for name in ("whole", "parts", "other"):
        (tmp_path / name).mkdir()
    parquet(tmp_path / "whole" / "train.parquet", *texts)
    parquet(tmp_path / "parts" / "train-0.parquet", *texts[:7])
    parquet(tmp_path / "parts" / "train-1.parquet", *texts[7:])
    parquet(tmp_path / "other" / "train.parquet", *texts[:-1], "2500")
    assert fingerprint("whole") == fingerprint("parts")
    assert fingerprint("whole") != fingerprint("other")


CHANGES = {
    "rows": r"rows\.text: ",
    "mixture": r"mixture\.text\.rows: 3 -> 4",
    "tokenizer": "tokenizer: ",
    "template": "template: ",
    "kwargs": "template: ",
}


@pytest.mark.parametrize(("change", "names"), CHANGES.items())
def test_a_resumption_names_what_changed_of_the_data(
    change: str, names: str, world: World, tmp_path: Path
) -> None:
    shutil.copytree(world.path("data", "tokenizer"), tmp_path / "tokenizer")
    template = tmp_path / "tokenizer" / "chat_template.jinja"
    template.write_text("{# verbose #}" + template.read_text())
    file = write(tmp_path, *GOOD)
    cfg = config("opd", world, file)

    def opened(**kwargs: Any) -> PromptLoader:
        tokenizer = tokenizer_of(tmp_path / "tokenizer", **kwargs)
        return PromptLoader(cfg.data, cfg.stage, tokenizer, cfg.seed)

    state = json.loads(json.dumps(opened().state_at(0))) | {"cursor": 24}
    same = opened()
    same.resume(3, state)
    assert same.state_at(3)["cursor"] == 24

    match change:
        case "rows":
            write(tmp_path, *GOOD[:2], GOOD[2].replace("no", "yes"))
        case "mixture":
            write(tmp_path, *GOOD, GOOD[0])
        case "tokenizer":
            meaning = tmp_path / "tokenizer" / "tokenizer.json"
            content = json.loads(meaning.read_text())
            vocabulary = content["model"]["vocab"]
            vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
            meaning.write_text(json.dumps(content))
        case "template":
            template.write_text(template.read_text() + "{# #}")
    loader = opened(verbose=1) if change == "kwargs" else opened()
    with pytest.raises(InputError, match=rf"the data changed since .*{names}") as refusal:
        loader.resume(3, state)
    assert "on_resume.allow=[data]" in str(refusal.value)


def test_a_tokenizer_in_another_spelling_is_no_change_of_the_data(
    world: World, tmp_path: Path
) -> None:
    shutil.copytree(world.path("data", "tokenizer"), tmp_path / "tokenizer")
    meaning = tmp_path / "tokenizer" / "tokenizer.json"
    meaning.write_text(json.dumps(json.loads(meaning.read_text()), sort_keys=True, indent=3))
    cfg = config("opd", world, write(tmp_path, *GOOD))
    one, other = (
        PromptLoader(cfg.data, cfg.stage, tokenizer_of(path), cfg.seed)
        for path in (world.path("data", "tokenizer"), tmp_path / "tokenizer")
    )
    other.resume(0, one.state_at(0))


def test_a_checkpoint_that_counted_steps_is_refused(world: World, tmp_path: Path) -> None:
    loader = loader_of("sft", world, write(tmp_path, *GOOD))
    with pytest.raises(InputError, match=r"saved by an earlier version.*start with resume=never"):
        loader.resume(3, {"cursor": 3, "mixture": "0123456789abcdef"})
