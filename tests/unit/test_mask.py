"""What is learnt of a chat: whole tokens of its answers, behind a prompt that sampling can ask."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from marco_train.config.data import DataConfig, Overlong, Thinking
from marco_train.config.sft import LossTokens
from marco_train.data.chat import (
    CHATML,
    Tokenizer,
    render_example,
    render_prompt,
    stretches,
    with_thinking,
)
from marco_train.data.render import ExampleRenderer, PromptRenderer
from marco_train.data.turns import read_turns
from marco_train.errors import InputError
from marco_train.types import Conversation, Example, Message, PlainText, TokenRow
from tests.helpers.qwen_like import UNMARKED, write_tokenizer
from tests.helpers.tokenizers import make_tokenizer, tokenizer_of

Turn = dict[str, Any]
LABELS: dict[str, Any] = {"source": "source", "category": "math", "language": "en", "row": 0}
# Words that a template may put around a turn; the last opens an answer with a space at its end.
PLAIN = """\
{%- for m in messages %}{{- m.role + ': ' }}
{%- if m.role == 'assistant' %}
{%- generation %}{{- m.content + '<|im_end|>' }}{% endgeneration %}
{%- else %}{{- m.content + '<|im_end|>' }}{% endif %}
{{- '\\n' }}{% endfor %}{% if add_generation_prompt %}{{- 'assistant: ' }}{% endif %}"""


def joined_line_breaks(path: Path) -> None:
    """The tokenizer of the tests' world, which joins any white space."""
    make_tokenizer(path, ["a\n\n\n\nb", "two  words", "\n yes"] * 4)


TOKENIZERS: dict[str, Callable[[Path], Any]] = {
    "chatml": lambda path: write_tokenizer(path, CHATML.read_text()),
    "chatml, trimmed": lambda path: write_tokenizer(path, CHATML.read_text(), trim_offsets=True),
    "qwen3": write_tokenizer,
    "qwen3 without marks": lambda path: write_tokenizer(path, UNMARKED),
    "qwen3, trimmed": lambda path: write_tokenizer(path, trim_offsets=True),
    "a space before the answer": lambda path: write_tokenizer(path, PLAIN),
    "a space, trimmed": lambda path: write_tokenizer(path, PLAIN, trim_offsets=True),
    "any white space joined": joined_line_breaks,
}


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    found = {}
    for name, make in TOKENIZERS.items():
        path = tmp_path_factory.mktemp("tokenizer")
        make(path)
        found[name] = tokenizer_of(path)
    return found


@pytest.fixture(scope="module")
def qwen3(tokenizers: dict[str, Tokenizer]) -> Tokenizer:
    return tokenizers["qwen3"]


@pytest.fixture(scope="module")
def chatml(tokenizers: dict[str, Tokenizer]) -> Tokenizer:
    return tokenizers["chatml"]


def conversation(*turns: Turn) -> Conversation:
    return Conversation(**LABELS, messages=read_turns(list(turns), {}))


def user(content: str) -> Turn:
    return {"role": "user", "content": content}


def assistant(content: str, **more: Any) -> Turn:
    return {"role": "assistant", "content": content, **more}


def learnt(tokenizer: Tokenizer, example: Example) -> list[str]:
    return [tokenizer.decode(ids) for ids in stretches(example)]


ANSWERS = [
    "yes",
    "",
    " ",
    " yes",
    "   three spaces",
    "\nyes",
    "\n\nyes",
    "\n\n\n\nyes",
    "\n \n yes",
    "\n",
    "\r\n\r\nyes",
    "\tyes",
    "yes\n\n",
    "yes  ",
    "\u3000yes",
    "\u00a0yes",
    "e\u0301",
    "\u0301e",
    "是",
    " 是",
    "  是",
    "🙂",
    "مرحبا",
    "'s",
    "1",
    "...\n\n",
    "<tool_call>\n{}\n</tool_call>",
]


@pytest.mark.parametrize("answer", ANSWERS, ids=map(ascii, ANSWERS))
@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_prompt_is_the_beginning_of_its_example_whatever_the_answer(
    name: str, answer: str, tokenizers: dict[str, Tokenizer]
) -> None:
    tokenizer = tokenizers[name]
    for earlier in ([], [user("a"), assistant(answer), user("b\n"), assistant("no")]):
        row = conversation(*earlier, user("c"), assistant(answer))
        prompt = render_prompt(tokenizer, row)
        example = render_example(tokenizer, row, LossTokens.assistant)
        assert example.input_ids[: len(prompt)] == prompt
        assert not example.loss_mask[len(prompt) - 1]
        assert example.loss_mask[len(prompt)]
        # The words of the answer are learnt to their end, and no more.
        *before, last = learnt(tokenizer, example)
        shown = f"<think>\n\n</think>\n\n{answer.lstrip(chr(10))}" if "qwen3" in name else answer
        assert last == normalised(tokenizer, shown) + "<|im_end|>"
        if earlier:
            assert before == [normalised(tokenizer, answer) + "<|im_end|>", "no<|im_end|>"]


def normalised(tokenizer: Tokenizer, text: str) -> str:
    """What a tokenizer makes of a text before it cuts it into tokens."""
    rules = tokenizer.of_transformers.backend_tokenizer.normalizer
    return text if rules is None else rules.normalize_str(text)


def test_the_words_of_a_question_are_never_learnt(chatml: Tokenizer) -> None:
    row = conversation(
        {"role": "system", "content": "Be brief."},
        user("assistant"),
        assistant("user"),
        {"role": "tool", "content": "20"},
        user("<think>\nx\n</think>"),
        assistant("yes"),
    )
    example = render_example(chatml, row, LossTokens.assistant)
    assert learnt(chatml, example) == ["user<|im_end|>", "yes<|im_end|>"]


def test_an_argument_of_the_template_that_closes_thinking_is_part_of_the_prompt(
    tmp_path: Path,
) -> None:
    tokenizer = tokenizer_of(write_tokenizer(tmp_path / "tokenizer"), enable_thinking=False)
    row = conversation(user("a"), assistant("b"))
    prompt = render_prompt(tokenizer, row)
    opened = "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert tokenizer.decode(prompt) == f"<|im_start|>user\na<|im_end|>\n{opened}"
    example = render_example(tokenizer, row, LossTokens.assistant)
    assert example.input_ids[: len(prompt)] == prompt


OPENS_THINKING = PLAIN.replace("'assistant: '", "'assistant: <think>\\n'").replace(
    "{%- generation %}{{- m.content", "{%- generation %}{{- '<think>\\n' + m.content"
)


@pytest.mark.parametrize("answer", ["a\n</think>\n\nb", "\n\n</think>b", "\n", " a"])
def test_a_prompt_may_open_the_thinking_of_its_answer(answer: str, tmp_path: Path) -> None:
    tokenizer = tokenizer_of(write_tokenizer(tmp_path / "tokenizer", OPENS_THINKING))
    row = conversation(user("a"), assistant(answer))
    prompt = render_prompt(tokenizer, row)
    assert tokenizer.decode(prompt) == "user: a<|im_end|>\nassistant: <think>\n"
    example = render_example(tokenizer, row, LossTokens.assistant)
    assert example.input_ids[: len(prompt)] == prompt
    assert tokenizer.decode(example.input_ids[len(prompt) :]) == f"{answer}<|im_end|>\n"


# A template that asks otherwise than the example goes on.
ASKS_OTHERWISE = PLAIN.replace("'assistant: '", "'Assistant: '")
GIVES_SYSTEM = "{%- if add_generation_prompt %}{{- 'Think.\\n' }}{% endif %}" + PLAIN


@pytest.mark.parametrize("template", [ASKS_OTHERWISE, GIVES_SYSTEM])
def test_a_prompt_that_the_example_does_not_begin_with_is_refused(
    template: str, tmp_path: Path
) -> None:
    tokenizer = tokenizer_of(write_tokenizer(tmp_path / "tokenizer", template))
    with pytest.raises(InputError, match="the model would be asked otherwise than it learnt"):
        render_example(tokenizer, conversation(user("a"), assistant("b")), LossTokens.assistant)


def flags(*is_learnt: int) -> Conversation:
    turns = []
    for n, flag in enumerate(is_learnt):
        turns += [user(f"question {n}"), assistant(f"answer {n}", weight=flag)]
    return conversation(*turns)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_an_answer_that_is_exempt_is_not_learnt(
    name: str, tokenizers: dict[str, Tokenizer]
) -> None:
    tokenizer = tokenizers[name]
    for chosen in ((0, 1, 1), (1, 0, 1), (1, 1, 0), (0, 0, 1)):
        example = render_example(tokenizer, flags(*chosen), LossTokens.assistant)
        words = [
            text.removeprefix("<think>\n\n</think>\n\n") for text in learnt(tokenizer, example)
        ]
        assert words == [f"answer {n}<|im_end|>" for n, flag in enumerate(chosen) if flag]


def test_an_answer_that_is_exempt_is_not_learnt_among_all_tokens(chatml: Tokenizer) -> None:
    example = render_example(chatml, flags(0, 1), LossTokens.all)
    exempt = [i for i, is_learnt in zip(example.input_ids, example.loss_mask, strict=True)
              if not is_learnt]  # fmt: skip
    assert chatml.decode(exempt) == "answer 0<|im_end|>"


def test_a_row_without_an_answer_to_learn_is_dropped(chatml: Tokenizer) -> None:
    render = renderer(chatml)
    assert render(flags(0, 0)) == "data/dropped_no_loss"
    assert render(conversation(user("a"))) == "data/dropped_no_loss"


def test_answers_that_cannot_be_told_apart_are_refused_where_one_is_exempt(
    tmp_path: Path,
) -> None:
    twice = PLAIN.replace(
        "{%- generation %}",
        "{%- generation %}{{- '<|im_end|>' }}{% endgeneration %}.{% generation %}",
    )
    tokenizer = tokenizer_of(write_tokenizer(tmp_path / "tokenizer", twice))
    assert render_example(tokenizer, flags(1, 1), LossTokens.assistant)
    with pytest.raises(InputError, match="marks 4 stretches for 2 answers"):
        render_example(tokenizer, flags(0, 1), LossTokens.assistant)


def renderer(
    tokenizer: Tokenizer, thinking: Thinking = Thinking.keep, **changes: Any
) -> ExampleRenderer:
    data = DataConfig(thinking=thinking, **changes)
    return ExampleRenderer.of(tokenizer, data, LossTokens.assistant, 1000)


def prompts(
    tokenizer: Tokenizer, max_length: int, thinking: Thinking = Thinking.keep
) -> PromptRenderer:
    return PromptRenderer(tokenizer, max_length, thinking, Overlong.drop)


def thought(text: str) -> str:
    return f"<think>\n{text}\n</think>\n\n"


# The thought of an answer stands in its words too.
TWO_THOUGHTS = [user("a"), assistant(thought("one") + "answer one"), user("b"),
                assistant(thought("two") + "answer two")]  # fmt: skip
TWO_FIELDS = [
    user("a"),
    assistant("answer one", reasoning_content="one"),
    user("b"),
    assistant("answer two", reasoning_content="two"),
]
FIRST, LAST = f"{thought('one')}answer one<|im_end|>", f"{thought('two')}answer two<|im_end|>"
BARE_LAST = "answer two<|im_end|>"
# What is learnt, and what a prompt holds of the first answer.
LEARNT = {
    ("chatml", Thinking.keep): ([FIRST, LAST], FIRST),
    ("chatml", Thinking.last): ([LAST], "answer one<|im_end|>"),
    ("chatml", Thinking.strip): (["answer one<|im_end|>", BARE_LAST], "answer one<|im_end|>"),
    # This template shows no thinking in history, and an answer without it was not given so.
    ("qwen3", Thinking.keep): ([LAST], "answer one<|im_end|>"),
    ("qwen3", Thinking.last): ([LAST], "answer one<|im_end|>"),
    ("qwen3", Thinking.strip): (
        ["answer one<|im_end|>", thought("") + BARE_LAST],
        "answer one<|im_end|>",
    ),
}


LEARNT |= {("qwen3 without marks", thinking): LEARNT["qwen3", thinking] for thinking in Thinking}


@pytest.mark.parametrize("turns", [TWO_THOUGHTS, TWO_FIELDS], ids=["in the text", "in a field"])
@pytest.mark.parametrize(("name", "thinking"), LEARNT)
def test_thinking_is_learnt_where_it_is_wanted_and_shown(
    name: str, thinking: Thinking, turns: list[Turn], tokenizers: dict[str, Tokenizer]
) -> None:
    tokenizer = tokenizers[name]
    words, history = LEARNT[name, thinking]
    example = renderer(tokenizer, thinking)(conversation(*turns))
    assert isinstance(example, Example)
    assert learnt(tokenizer, example) == words
    prompt = prompts(tokenizer, 1000, thinking)(conversation(*turns))
    assert isinstance(prompt, Example)
    assert example.input_ids[: len(prompt.input_ids)] == prompt.input_ids
    assert tokenizer.decode(prompt.input_ids) == (
        f"<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n{history}\n"
        "<|im_start|>user\nb<|im_end|>\n<|im_start|>assistant\n"
    )


def test_thinking_of_the_last_exchange_stays_over_calls_of_tools(chatml: Tokenizer) -> None:
    call = {"function": {"name": "f", "arguments": "{}"}}
    turns = [
        user("a"),
        assistant("first", reasoning_content="zero"),
        user("b"),
        assistant("", reasoning_content="one", tool_calls=[call]),
        {"role": "tool", "content": "20"},
        assistant("second", reasoning_content="two"),
    ]
    example = renderer(chatml, Thinking.last)(conversation(*turns))
    assert isinstance(example, Example)
    called = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call><|im_end|>'
    assert learnt(chatml, example) == [
        thought("one") + called,
        f"{thought('two')}second<|im_end|>",
    ]


# How an answer holds its thinking, and what is left of it.
THOUGHTS = {
    "at its start": ("<think>\none\n</think>\n\nanswer", "answer"),
    "behind white space": ("\n <think>one</think>answer", "answer"),
    "opened by the prompt": ("one\n</think>\n\nanswer", "answer"),
    "never ended": ("<think>\none two", ""),
    "twice": ("<think>one</think><think>two</think>answer", "<think>two</think>answer"),
    "none": ("answer", "answer"),
    "in its midst": ("see <think> and </think>", "see <think> and </think>"),
}


@pytest.mark.parametrize(("content", "rest"), THOUGHTS.values(), ids=THOUGHTS.keys())
def test_thinking_is_stripped(content: str, rest: str, chatml: Tokenizer) -> None:
    row = conversation(user("a"), assistant(content))
    assert with_thinking(chatml, row, Thinking.strip).messages[1] == Message("assistant", rest)
    assert with_thinking(chatml, row, Thinking.keep).messages[1].content == content


def test_a_field_of_thinking_is_shown_by_any_template(
    tokenizers: dict[str, Tokenizer], tmp_path: Path
) -> None:
    row = conversation(user("a"), assistant("two", reasoning_content="\nthe user asks two\n"))
    expected = [thought("the user asks two") + "two<|im_end|>"]
    for name in ("chatml", "qwen3", "a space before the answer"):
        example = renderer(tokenizers[name])(row)
        assert isinstance(example, Example)
        assert learnt(tokenizers[name], example) == expected


NO_WORDS = {
    "none": assistant(""),
    "white space": assistant("  \n"),
    "thinking that is stripped": assistant(thought("one")),
}


@pytest.mark.parametrize("turn", NO_WORDS.values(), ids=NO_WORDS.keys())
def test_an_answer_without_a_word_is_dropped_unless_asked_for(
    turn: Turn, chatml: Tokenizer
) -> None:
    for turns in ([user("a"), turn], [user("a"), turn, user("b"), assistant("c")]):
        row = conversation(*turns)
        assert renderer(chatml, Thinking.strip)(row) == "data/dropped_empty"
        kept = renderer(chatml, Thinking.strip, keep_empty_answers=True)(row)
        assert isinstance(kept, Example)
        assert learnt(chatml, kept)[0].strip() == "<|im_end|>"
    # One that is not to be learnt does no harm, and is no reason to drop the others.
    exempt = conversation(user("a"), turn | {"train": False}, user("b"), assistant("c"))
    example = renderer(chatml, Thinking.strip)(exempt)
    assert isinstance(example, Example)
    assert learnt(chatml, example) == ["c<|im_end|>"]


def test_a_call_is_an_answer_without_words(chatml: Tokenizer) -> None:
    call = {"function": {"name": "weather", "arguments": {"city": "Paris"}}}
    example = renderer(chatml)(conversation(user("a"), assistant("", tool_calls=[call])))
    assert isinstance(example, Example)
    written = '{"name": "weather", "arguments": {"city": "Paris"}}'
    assert learnt(chatml, example) == [f"<tool_call>\n{written}\n</tool_call><|im_end|>"]


def test_a_template_that_leaves_out_a_call_or_its_tools_is_no_use(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(write_tokenizer(tmp_path / "tokenizer", PLAIN))
    call = {"function": {"name": "weather", "arguments": {}}}
    row = conversation(user("a"), assistant("I look.", tool_calls=[call]))
    with pytest.raises(InputError, match=r"leaves out calls of tools \('weather'\): .*chatml"):
        renderer(tokenizer)(row)
    tool = {"type": "function", "function": {"name": "clock"}}
    row = Conversation(**LABELS, messages=row.messages[:1], tools=(tool,))
    with pytest.raises(InputError, match=r"leaves out tools \('clock'\)"):
        prompts(tokenizer, 1000)(row)


def test_control_tokens_in_any_text_drop_the_row(chatml: Tokenizer) -> None:
    control = "x<|im_end|>"
    call = {"function": {"name": "f", "arguments": {"text": control}}}
    tool = {"type": "function", "function": {"name": "f", "description": control}}
    rows: list[Conversation | PlainText] = [
        conversation(user(control), assistant("b")),
        conversation(user("a"), assistant(control)),
        conversation(user("a"), assistant("b", reasoning_content=control)),
        conversation(user("a"), assistant("b", tool_calls=[call])),
        conversation(user("a"), {"role": "tool", "content": control}, assistant("b")),
        Conversation(**LABELS, messages=conversation(user("a"), assistant("b")).messages,
                     tools=(tool,)),
        PlainText(**LABELS, text=control),
    ]  # fmt: skip
    assert [renderer(chatml)(row) for row in rows] == ["data/dropped_special"] * len(rows)
    # What a model may say is no control token.
    assert isinstance(renderer(chatml)(conversation(user("<think>"), assistant("b"))), Example)


def test_a_token_that_only_tokenizer_json_calls_special_is_a_control_token(
    tmp_path: Path,
) -> None:
    path = write_tokenizer(tmp_path / "tokenizer", CHATML.read_text())
    content = json.loads((path / "tokenizer.json").read_text())
    for number, text in enumerate(("<|eot_id|>", "<|start_header_id|>")):
        token = content["added_tokens"][0] | {"id": 500 + number, "content": text}
        content["added_tokens"].append(token)
    (path / "tokenizer.json").write_text(json.dumps(content))
    settings = json.loads((path / "tokenizer_config.json").read_text())
    for name in ("added_tokens_decoder", "additional_special_tokens", "extra_special_tokens"):
        settings.pop(name, None)
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    render = renderer(tokenizer_of(path))
    for text in ("<|eot_id|>", "<|start_header_id|>", "<|im_start|>"):
        row = conversation(user(f"hi {text}assistant"), assistant("no"))
        assert render(row) == "data/dropped_special"


def test_plain_text_is_learnt_whole_and_ends(chatml: Tokenizer) -> None:
    example = renderer(chatml)(PlainText(**LABELS, text="Once upon a time."))
    assert isinstance(example, Example)
    assert chatml.decode(example.input_ids) == "Once upon a time.<|im_end|>"
    assert all(example.loss_mask)


def test_tokens_of_a_row_stay_as_they_are(chatml: Tokenizer) -> None:
    row = TokenRow(**LABELS, input_ids=[7, 8, 9], loss_mask=[False, True, True])
    assert renderer(chatml)(row) == Example([7, 8, 9], [False, True, True])
    beyond = TokenRow(**LABELS, input_ids=[7, 100_000], loss_mask=[True, True])
    with pytest.raises(InputError, match=r"the token id 100000, .* tokenised for another model"):
        renderer(chatml)(beyond)
    with pytest.raises(InputError, match="the row has no turns, so nothing can be asked"):
        prompts(chatml, 1000)(row)


def test_rated_answers_are_refused_in_sft_and_asked_in_distillation(chatml: Tokenizer) -> None:
    row = Conversation(**LABELS, messages=(Message("user", "a"),), is_preference=True)
    with pytest.raises(InputError, match="holds answers that are rated, and SFT would"):
        renderer(chatml)(row)
    prompt = prompts(chatml, 1000)(row)
    assert isinstance(prompt, Example)
    assert chatml.decode(prompt.input_ids).endswith("a<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize("num_tokens", [9, 10, 11])
def test_a_row_over_the_limit_is_dropped(num_tokens: int, chatml: Tokenizer) -> None:
    row = TokenRow(**LABELS, input_ids=[7] * num_tokens, loss_mask=[True] * num_tokens)
    render = ExampleRenderer.of(chatml, DataConfig(), LossTokens.assistant, 10)
    assert (render(row) == "data/dropped_too_long") is (num_tokens > 10)


def test_a_chat_that_an_answer_begins_is_no_prompt(chatml: Tokenizer) -> None:
    row = conversation(assistant("Hello."), user("a"), assistant("b"))
    assert prompts(chatml, 1000)(row) == "data/dropped_no_loss"
    example = renderer(chatml)(row)
    assert isinstance(example, Example)
    assert learnt(chatml, example) == ["Hello.<|im_end|>", "b<|im_end|>"]


def test_thinking_of_nothing_is_stripped(chatml: Tokenizer) -> None:
    row = conversation(user("a"), assistant(thought("") + "answer"))
    assert with_thinking(chatml, row, Thinking.strip).messages[1] == Message("assistant", "answer")


def test_a_prompt_with_two_spaces_at_its_end_is_the_beginning_of_its_example(
    tmp_path: Path,
) -> None:
    tokenizer = tokenizer_of(write_tokenizer(tmp_path / "tokenizer", PLAIN.replace(": ", ":  ")))
    row = conversation(user("a"), assistant("是"))
    prompt = render_prompt(tokenizer, row)
    example = render_example(tokenizer, row, LossTokens.assistant)
    assert example.input_ids[: len(prompt)] == prompt


def test_an_answer_whose_prompt_is_otherwise_in_history_is_not_learnt_without_marks(
    tokenizers: dict[str, Tokenizer],
) -> None:
    """The thinking beside a call is gone once a question follows, and sampling would see it."""
    call = {"function": {"name": "f", "arguments": {}}}
    row = conversation(
        user("a"),
        assistant("", reasoning_content="one", tool_calls=[call]),
        {"role": "tool", "content": "20"},
        assistant("It is 20."),
        user("b"),
        assistant("c"),
    )
    tokenizer = tokenizers["qwen3 without marks"]
    example = render_example(tokenizer, row, LossTokens.assistant)
    assert learnt(tokenizer, example) == [thought("") + "c<|im_end|>"]
    # Nor is an answer with which a chat begins, as nobody asks for it.
    first = conversation(assistant("Hello."), user("a"), assistant("b"))
    example = render_example(tokenizer, first, LossTokens.assistant)
    assert learnt(tokenizer, example) == [thought("") + "b<|im_end|>"]
    exempt = conversation(assistant("Hello.", weight=0), user("a"), assistant("b"))
    with pytest.raises(InputError, match="not to be learnt cannot be told apart"):
        render_example(tokenizer, exempt, LossTokens.all)


def test_a_prompt_that_closes_thinking_is_no_part_of_an_answer_without_marks(
    tmp_path: Path,
) -> None:
    path = write_tokenizer(tmp_path / "tokenizer", UNMARKED)
    tokenizer = tokenizer_of(path, enable_thinking=False)
    row = conversation(user("a"), assistant("b"), user("c"), assistant("d"))
    # In history the first answer stands without what its prompt had, so it is not learnt.
    example = render_example(tokenizer, row, LossTokens.assistant)
    assert learnt(tokenizer, example) == ["d<|im_end|>"]


BARE = re.sub(r"\{%-? ?(end)?generation ?%\}", "", PLAIN)
# What a template writes otherwise of an answer once others follow it.
OTHERWISE = {
    "its header": (
        "{{- m.role + ': ' }}",
        "{{- ('Assistant:' if m.role == 'assistant' and not loop.last else m.role + ':') + ' ' }}",
    ),
    "its words": ("{{- m.content +", "{{- (m.content if loop.last else m.content | upper) +"),
}


@pytest.mark.parametrize(("old", "new"), OTHERWISE.values(), ids=OTHERWISE.keys())
def test_an_answer_that_is_rewritten_in_history_is_not_learnt_without_marks(
    old: str, new: str, tmp_path: Path
) -> None:
    assert old in BARE
    row = conversation(user("a"), assistant("b"), {"role": "tool", "content": "C"}, assistant("d"))
    same, otherwise = (
        tokenizer_of(write_tokenizer(tmp_path / name, template))
        for name, template in (("same", BARE), ("otherwise", BARE.replace(old, new, 1)))
    )
    example = render_example(same, row, LossTokens.assistant)
    assert learnt(same, example) == ["b<|im_end|>", "d<|im_end|>"]
    example = render_example(otherwise, row, LossTokens.assistant)
    assert learnt(otherwise, example) == ["d<|im_end|>"]


def test_an_answer_ends_with_its_first_stop_without_marks(tmp_path: Path) -> None:
    """Sampling ends there, whatever a template writes behind a chat."""
    ended = BARE + "{% if not add_generation_prompt %}{{- '<|endoftext|>' }}{% endif %}"
    tokenizer = tokenizer_of(write_tokenizer(tmp_path / "tokenizer", ended))
    row = conversation(user("a"), assistant("b"), user("c"), assistant("d"))
    example = render_example(tokenizer, row, LossTokens.assistant)
    assert learnt(tokenizer, example) == ["b<|im_end|>", "d<|im_end|>"]
    assert tokenizer.decode(example.input_ids).endswith("d<|im_end|>\n<|endoftext|>")


def test_a_result_of_a_tool_may_be_written_as_json(tmp_path: Path) -> None:
    """As Llama 3.1's template writes all of them."""
    quoted = PLAIN.replace(
        "{%- else %}{{- m.content +",
        "{%- else %}{{- (m.content | tojson if m.role == 'tool' else m.content) +",
    )
    tokenizer = tokenizer_of(write_tokenizer(tmp_path / "tokenizer", quoted))
    found = {"role": "tool", "content": '{"city": "Köln"}\n20'}
    row = conversation(user("a"), assistant("b"), found, assistant("d"))
    example = render_example(tokenizer, row, LossTokens.assistant)
    assert learnt(tokenizer, example) == ["b<|im_end|>", "d<|im_end|>"]
    assert '"{\\"city\\": \\"Köln\\"}\\n20"' in tokenizer.decode(example.input_ids)
