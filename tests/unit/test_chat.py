"""The loss mask covers the assistant's words and stop tokens, and nothing else."""

import pytest

from marco_train.config import ChatTemplate, LossTokens
from marco_train.data.chat import Tokenizer, render_example, render_prompt
from marco_train.types import Conversation, Message
from tests.conftest import World, tokenizer_of


@pytest.fixture(scope="module")
def tokenizer(world: World) -> Tokenizer:
    return tokenizer_of(world.path("data", "tokenizer"))


def chat(*turns: tuple[str, str]) -> Conversation:
    return Conversation(tuple(Message(*turn) for turn in turns), "source", "math", "en", {}, 0)


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
