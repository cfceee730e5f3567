"""The loss mask covers the assistant's words and stop tokens, and nothing else."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from marco_train.config.model import ChatTemplate
from marco_train.config.sft import LossTokens
from marco_train.data.chat import (
    Tokenizer,
    holds_control_tokens,
    render_example,
    render_prompt,
)
from marco_train.data.loader import PromptLoader, SFTLoader, held_out_questions, held_out_stream
from marco_train.errors import InputError
from marco_train.types import Conversation, Message
from tests.helpers.configs import compose_config
from tests.helpers.tokenizers import tokenizer_of
from tests.helpers.world import World


@pytest.fixture(scope="module")
def tokenizer(world: World) -> Tokenizer:
    return tokenizer_of(world.path("data", "tokenizer"))


def chat(*turns: tuple[str, str]) -> Conversation:
    return Conversation("source", "math", "en", 0, tuple(Message(*turn) for turn in turns))


# (turns, the rendered text, what of it is learnt), with | between learnt stretches.
GOLDEN = {
    "english": (
        [("user", "Hello?"), ("assistant", "Hi, there!")],
        "<|im_start|>user\nHello?<|im_end|>\n<|im_start|>assistant\nHi, there!<|im_end|>\n",
        "Hi, there!<|im_end|>",
    ),
    "two turns and a system": (
        [
            ("system", "Be brief."),
            ("user", "1"),
            ("assistant", "one"),
            ("user", "2"),
            ("assistant", "two"),
        ],
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n1<|im_end|>\n"
        "<|im_start|>assistant\none<|im_end|>\n<|im_start|>user\n2<|im_end|>\n"
        "<|im_start|>assistant\ntwo<|im_end|>\n",
        "one<|im_end|>|two<|im_end|>",
    ),
    "arabic": (
        [("user", "ما اسمك؟"), ("assistant", "اسمي ماركو.")],
        "<|im_start|>user\nما اسمك؟<|im_end|>\n<|im_start|>assistant\nاسمي ماركو.<|im_end|>\n",
        "اسمي ماركو.<|im_end|>",
    ),
    "chinese": (
        [("user", "你好吗?"), ("assistant", "很好,谢谢。")],
        "<|im_start|>user\n你好吗?<|im_end|>\n<|im_start|>assistant\n很好,谢谢。<|im_end|>\n",
        "很好,谢谢。<|im_end|>",
    ),
    "thai, nothing but spaces between": (
        [("user", "เดือน"), ("assistant", " มกราคม ")],
        "<|im_start|>user\nเดือน<|im_end|>\n<|im_start|>assistant\n มกราคม <|im_end|>\n",
        " มกราคม <|im_end|>",
    ),
    "an answer that starts with a line break": (
        [("user", "x"), ("assistant", "\n\nyes")],
        "<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n\n\nyes<|im_end|>\n",
        "\n\nyes<|im_end|>",
    ),
    "an empty answer": (
        [("user", "x"), ("assistant", "")],
        "<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n<|im_end|>\n",
        "<|im_end|>",
    ),
}


@pytest.mark.parametrize(("turns", "text", "learnt"), GOLDEN.values(), ids=GOLDEN.keys())
def test_the_mask_covers_exactly_what_the_assistant_says(
    turns: list[tuple[str, str]], text: str, learnt: str, tokenizer: Tokenizer
) -> None:
    example = render_example(tokenizer, chat(*turns), LossTokens.assistant)
    assert tokenizer.decode(example.input_ids) == text
    stretches: list[list[int]] = []
    for place, (token, is_learnt) in enumerate(
        zip(example.input_ids, example.loss_mask, strict=True)
    ):
        if is_learnt and (place == 0 or not example.loss_mask[place - 1]):
            stretches.append([])
        if is_learnt:
            stretches[-1].append(token)
    assert "|".join(tokenizer.decode(ids) for ids in stretches) == learnt


def test_every_token_is_learnt_where_the_stage_says_so(tokenizer: Tokenizer) -> None:
    example = render_example(tokenizer, chat(("user", "only a prompt")), LossTokens.all)
    assert all(example.loss_mask)


def test_a_prompt_is_the_beginning_of_its_example(tokenizer: Tokenizer) -> None:
    conversation = chat(("user", "What is 3?"), ("assistant", "three"))
    prompt = render_prompt(tokenizer, conversation)
    example = render_example(tokenizer, conversation, LossTokens.assistant)
    assert example.input_ids[: len(prompt)] == prompt
    assert not any(example.loss_mask[: len(prompt)])
    assert example.loss_mask[len(prompt)]


def test_chatml_replaces_a_template_that_marks_nothing(world: World) -> None:
    from marco_train.data.chat import CHATML

    tokenizer = tokenizer_of(world.path("data", "tokenizer"), ChatTemplate.chatml)
    assert tokenizer.chat_template == CHATML.read_text()


# Turns as `role: words<|im_end|>`, then what the answers are marked with.
PLAIN = """\
{%- for m in messages %}{{- m.role + ': ' }}
{%- if m.role == 'assistant' %}ANSWER{% else %}{{- m.content + '<|im_end|>' }}{% endif %}
{{- '\\n' }}{% endfor %}{% if add_generation_prompt %}{{- 'assistant: ' }}{% endif %}"""
MARKED = "{% generation %}{{- m.content + '<|im_end|>' }}{% endgeneration %}"
ARGUED = PLAIN.replace("{%- for m", "{{- 'mood ' ~ mood ~ '\\n' }}{%- for m", 1)


def with_template(world: World, tmp_path: Path, template: str) -> Path:
    """The world's tokenizer with another template."""
    shutil.copytree(world.path("data", "tokenizer"), tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "chat_template.jinja").write_text(template)
    return tmp_path / "tokenizer"


def test_arguments_reach_the_template(world: World, tmp_path: Path) -> None:
    path = with_template(world, tmp_path, ARGUED.replace("ANSWER", MARKED))
    conversation = chat(("user", "x"), ("assistant", "y"))
    for mood in ("good", "bad"):
        tokenizer = tokenizer_of(path, mood=mood)
        prompt = tokenizer.decode(render_prompt(tokenizer, conversation))
        assert prompt == f"mood {mood}\nuser: x<|im_end|>\nassistant: "
        for loss_tokens in LossTokens:
            example = render_example(tokenizer, conversation, loss_tokens)
            assert tokenizer.decode(example.input_ids) == f"{prompt}y<|im_end|>\n"


def test_an_argument_that_the_template_never_reads_is_refused(world: World) -> None:
    path = world.path("data", "tokenizer")
    cfg = compose_config("quickstart_sft", f"root={world.root}")
    tokenizer = tokenizer_of(path, thinking=True)
    unread = r"chat_template_kwargs has 'thinking', which no chat template of this run reads"
    with pytest.raises(InputError, match=unread):
        SFTLoader(cfg.data, cfg.stage, tokenizer, cfg.seed)
    with pytest.raises(InputError, match=unread):
        held_out_questions(held_out_stream(cfg.data), 3, 64, tokenizer)
    with pytest.raises(InputError, match="chat_template_kwargs has messages, tokenize, which ever"):
        tokenizer_of(path, tokenize=False, messages=[])


@pytest.mark.parametrize(
    "override",
    [
        "model.chat_template_kwargs.enable_thinking=false",
        "+model.chat_template_kwargs.enable_thinking=false",
        "model.chat_template_kwargs={enable_thinking: false}",
    ],
)
def test_arguments_are_given_on_the_command_line(override: str) -> None:
    cfg = compose_config("quickstart_sft", override)
    assert cfg.model.chat_template_kwargs == {"enable_thinking": False}
    assert compose_config("quickstart_sft").model.chat_template_kwargs == {}


# How a template marks an answer, and what SFT says of it; None: it is fit.
MARKS: dict[str, tuple[str, str | None]] = {
    "with its stop": (MARKED, None),
    "in two stretches that both end with a stop": (
        "{% generation %}{{- 'A<|im_end|>' }}{% endgeneration %}{{- 'B' }}" + MARKED,
        None,
    ),
    "without its stop": (
        "{% generation %}{{- m.content }}{% endgeneration %}{{- '<|im_end|>' }}",
        r"marks 'Fine, thank you.' as the .* ends with '.*\.', and a turn with '<\|im_end\|>'",
    ),
    "beyond its stop": (
        "{% generation %}{{- m.content + '<|im_end|>\\n' }}{% endgeneration %}",
        r"marks 'Fine, thank you.<\|im_end\|>\\n' as .* it ends with '\\n', and",
    ),
    "not, and answers are found by their prompts": ("{{- m.content + '<|im_end|>' }}", None),
    "not, and without a stop": (
        "{{- m.content }}",
        r"does not mark answers, and .* none is found .*stop token.*; set model.chat_template=chat",
    ),
    "in no plain answer": (
        "{% if '<call>' in m.content %}" + MARKED + "{% else %}{{- m.content }}{% endif %}",
        "does not mark a plain answer with the {% generation %} that it has",
    ),
    "not where the rows call a tool": (
        "{% if '<call>' in m.content %}{{- m.content + '<|im_end|>' }}{% else %}"
        + MARKED
        + "{% endif %}",
        "marks no token of the assistant in any of the first 64 conversations with an answer",
    ),
    "with words that cannot be added": ("{{ 'a' + 1 }}", "cannot render it .TypeError"),
    "with a loop that does not end": ("{% for %}", "cannot render it .TemplateSyntaxError"),
    "with a refusal": ("{{ raise_exception('never') }}", "cannot render it .TemplateError: never"),
}


def rows_file(tmp_path: Path, *rows: Any) -> Path:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def row(*turns: tuple[str, str]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


@pytest.mark.parametrize(("marks", "says"), MARKS.values(), ids=MARKS.keys())
def test_sft_refuses_a_template_that_does_not_teach_to_stop(
    marks: str, says: str | None, world: World, tmp_path: Path
) -> None:
    path = with_template(world, tmp_path, PLAIN.replace("ANSWER", marks))
    file = rows_file(tmp_path, row(("user", "x"), ("assistant", "<call>"), ("tool", "y")))
    data = [f"root={world.root}", "data=quickstart_text", f"data.sources.text.path={file}"]
    cfg = compose_config("quickstart_sft", *data)
    tokenizer = tokenizer_of(path)
    if says is None:
        SFTLoader(cfg.data, cfg.stage, tokenizer, cfg.seed)
        return
    with pytest.raises(InputError, match=says):
        SFTLoader(cfg.data, cfg.stage, tokenizer, cfg.seed)


def test_the_marks_of_a_runs_own_rows_are_looked_at(world: World, tmp_path: Path) -> None:
    # Fit on a plain exchange; the first answer of several is cut off before its stop.
    marks = (
        "{% if loop.last %}" + MARKED + "{% else %}{% generation %}{{- m.content }}"
        "{% endgeneration %}{{- '<|im_end|>' }}{% endif %}"
    )
    path = with_template(world, tmp_path, PLAIN.replace("ANSWER", marks))
    good = [row(("user", f"{n}"), ("assistant", "yes")) for n in range(40)]
    turns = [("user", "x"), ("assistant", "one"), ("user", "y"), ("assistant", "two")]
    file = rows_file(tmp_path, *good, "no row", row(*turns))
    data = [f"root={world.root}", "data=quickstart_text", f"data.sources.text.path={file}"]
    cfg = compose_config("quickstart_sft", *data)
    with pytest.raises(InputError, match=r"marks 'one' as the assistant's \(text, row 41\)"):
        SFTLoader(cfg.data, cfg.stage, tokenizer_of(path), cfg.seed)


def test_a_template_is_not_blamed_for_rows_of_which_nothing_is_learnt(
    world: World, tmp_path: Path
) -> None:
    path = with_template(world, tmp_path, PLAIN.replace("ANSWER", MARKED))
    exempt = row(("user", "x"), ("assistant", "y"))
    exempt["messages"][1]["weight"] = 0
    cases = {
        "0 of 1 rows.*1 data/dropped_no_loss": exempt,
        r"leaves out tools \('f'\)": row(("user", "x"), ("assistant", "y"))
        | {"tools": [{"name": "f"}]},
    }
    for says, found in cases.items():
        file = rows_file(tmp_path, found)
        data = [f"root={world.root}", "data=quickstart_text", f"data.sources.text.path={file}"]
        cfg = compose_config("quickstart_sft", *data)
        with pytest.raises(InputError, match=rf"source 'text': .*({says})"):
            SFTLoader(cfg.data, cfg.stage, tokenizer_of(path), cfg.seed)


def test_the_answers_that_are_found_without_marks_are_counted_at_the_start(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = with_template(
        world, tmp_path, PLAIN.replace("ANSWER", "{{- m.content + '<|im_end|>' }}")
    )
    first = row(("assistant", "Hello."), ("user", "x"), ("assistant", "y"))
    file = rows_file(tmp_path, first, row(("user", "x"), ("assistant", "y")))
    data = [f"root={world.root}", "data=quickstart_text", f"data.sources.text.path={file}"]
    cfg = compose_config("quickstart_sft", *data)
    SFTLoader(cfg.data, cfg.stage, tokenizer_of(path), cfg.seed)
    # The two rows are drawn again and again; an answer that nobody asks for is not learnt.
    assert "64 of 96 in the first 64 conversations are learnt" in capsys.readouterr().out


def test_only_a_loss_mask_needs_marks(world: World, tmp_path: Path) -> None:
    path = with_template(world, tmp_path, PLAIN.replace("ANSWER", "{{- m.content }}"))
    file = rows_file(tmp_path, row(("user", "x"), ("assistant", "y")))
    data = [f"root={world.root}", "data=quickstart_text", f"data.sources.text.path={file}"]
    tokenizer = tokenizer_of(path)
    cfg = compose_config("quickstart_opd", *data)
    (prompt, *_) = next(PromptLoader(cfg.data, cfg.stage, tokenizer, cfg.seed))
    assert tokenizer.decode(prompt.input_ids) == "user: x<|im_end|>\nassistant: "
    cfg = compose_config("quickstart_sft", *data, "stage.loss_tokens=all")
    (batch, *_) = next(SFTLoader(cfg.data, cfg.stage, tokenizer, cfg.seed))
    assert batch.num_loss_tokens == batch.num_tokens


def test_a_tokenizer_without_a_template_is_refused(world: World, tmp_path: Path) -> None:
    path = with_template(world, tmp_path, "")
    (path / "chat_template.jinja").unlink()
    with pytest.raises(InputError, match=r"has no chat template; set model.chat_template=chatml"):
        tokenizer_of(path)
    assert tokenizer_of(path, ChatTemplate.chatml).chat_template


def test_of_several_templates_the_default_is_taken(world: World, tmp_path: Path) -> None:
    path = with_template(world, tmp_path, PLAIN.replace("ANSWER", MARKED))
    (path / "additional_chat_templates").mkdir()
    (path / "additional_chat_templates" / "tool_use.jinja").write_text("{{ 'tools' }}")
    assert tokenizer_of(path).chat_template == PLAIN.replace("ANSWER", MARKED)


def test_a_control_token_is_one_by_the_word_of_tokenizer_json(world: World, tmp_path: Path) -> None:
    path = with_template(world, tmp_path, PLAIN.replace("ANSWER", MARKED))
    file = path / "tokenizer_config.json"
    config = json.loads(file.read_text())
    kept = {k: v for k, v in config.items() if "special" not in k and k != "added_tokens_decoder"}
    file.write_text(json.dumps(kept))
    tokenizer = tokenizer_of(path)
    assert holds_control_tokens(tokenizer, chat(("user", "x <|im_start|> y")))
    assert not holds_control_tokens(tokenizer, chat(("user", "x <think> y")))
