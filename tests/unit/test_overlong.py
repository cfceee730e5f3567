"""What becomes of rows over the stage's limit: dropped or cut, and counted by language."""

import json
from pathlib import Path
from typing import Any

import pytest

from marco_train.config.data import DataConfig, Overlong, Thinking
from marco_train.config.sft import LossTokens
from marco_train.data.chat import Tokenizer, render_example, render_prompt
from marco_train.data.render import ExampleRenderer, PromptRenderer
from marco_train.types import Conversation, Example, Message, TokenRow
from tests.helpers.qwen_like import write_tokenizer
from tests.helpers.rows import LOADERS, chat, loader_of, write
from tests.helpers.tokenizers import tokenizer_of
from tests.helpers.world import World

LABELS: dict[str, Any] = {"source": "source", "category": "math", "language": "en", "row": 0}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return tokenizer_of(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def conversation(*turns: tuple[str, str]) -> Conversation:
    return Conversation(**LABELS, messages=tuple(Message(*turn) for turn in turns))


def sft(tokenizer: Tokenizer, limit: int, overlong: Overlong) -> ExampleRenderer:
    data = DataConfig(overlong=overlong)
    return ExampleRenderer.of(tokenizer, data, LossTokens.assistant, limit)


def test_sft_learns_the_first_tokens_of_a_row_that_is_too_long(tokenizer: Tokenizer) -> None:
    row = conversation(("user", "a"), ("assistant", "b c d"), ("user", "e"), ("assistant", "f g"))
    whole = render_example(tokenizer, row, LossTokens.assistant)
    size, first = len(whole.input_ids), whole.loss_mask.index(True)
    for limit in range(1, size + 2):
        assert (sft(tokenizer, limit, Overlong.drop)(row) == whole) is (limit >= size)
        found = sft(tokenizer, limit, Overlong.truncate)(row)
        if limit >= size:
            assert found == whole
        elif limit <= first:  # no answer has begun
            assert found == "data/dropped_too_long"
        else:
            expected = Example(whole.input_ids[:limit], whole.loss_mask[:limit], is_truncated=True)
            assert found == expected


def test_tokens_of_a_row_are_cut_as_well(tokenizer: Tokenizer) -> None:
    row = TokenRow(**LABELS, input_ids=[5, 6, 7, 8], loss_mask=[False, False, True, True])
    cut = sft(tokenizer, 3, Overlong.truncate)(row)
    assert cut == Example([5, 6, 7], [False, False, True], is_truncated=True)
    assert sft(tokenizer, 2, Overlong.truncate)(row) == "data/dropped_too_long"


SYSTEM, LONG = ("system", "Be brief."), "word " * 20
CHAT = [
    *(("user", f"one {LONG}"), ("assistant", "two")),
    *(("user", f"three {LONG}"), ("assistant", "four"), ("tool", "five"), ("assistant", "six")),
    *(("user", "seven"), ("assistant", "eight")),
]


@pytest.mark.parametrize("system", [[SYSTEM], []], ids=["a system turn", "none"])
def test_a_prompt_that_is_too_long_loses_as_few_of_its_oldest_turns_as_it_must(
    system: list[tuple[str, str]], tokenizer: Tokenizer
) -> None:
    row = conversation(*system, *CHAT)
    # Without the turns before each of its questions.
    candidates = [conversation(*system, *CHAT[place:]) for place in (0, 2, 6)]
    prompts = [render_prompt(tokenizer, each) for each in candidates]
    assert len(prompts[0]) > len(prompts[1]) > len(prompts[2])
    for limit in range(len(prompts[2]) - 1, len(prompts[0]) + 1):
        render = PromptRenderer(tokenizer, limit, Thinking.keep, Overlong.truncate)
        found = render(row)
        fitting = [n for n, prompt in enumerate(prompts) if len(prompt) <= limit]
        if not fitting:  # the last question is too long by itself
            assert found == "data/dropped_too_long"
            continue
        ids = prompts[fitting[0]]
        assert found == Example(ids, [False] * len(ids), is_truncated=fitting[0] > 0)
        assert render.prepared(row) == candidates[fitting[0]]
        dropped = PromptRenderer(tokenizer, limit, Thinking.keep, Overlong.drop)(row)
        assert (dropped == "data/dropped_too_long") is (fitting[0] > 0)


def test_a_question_that_stands_alone_is_not_cut(tokenizer: Tokenizer) -> None:
    render = PromptRenderer(tokenizer, 20, Thinking.keep, Overlong.truncate)
    for turns in ([("user", LONG)], [SYSTEM, ("user", LONG)], [("user", "a"), ("tool", LONG)]):
        assert render(conversation(*turns)) == "data/dropped_too_long"


@pytest.mark.parametrize("judge_rows", [100, 4], ids=["all are judged", "a sample is"])
@pytest.mark.parametrize("stage", LOADERS)
def test_rows_that_are_dropped_or_cut_are_counted_by_language(
    stage: str, judge_rows: int, world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    turns = [turn for n in range(20) for turn in chat(f"{n}", "yes")["messages"]]
    short, long = chat("x", "yes"), {"messages": turns}
    alone = chat("far too long " * 60, "yes")
    rows = [
        *(short | {"language": "de"} for _ in range(4)),
        *(long | {"language": "de"}, long | {"language": "ne"}, alone | {"language": "ne"}),
        *(long, alone),
    ]
    file = write(tmp_path, *map(json.dumps, rows))
    given = [f"data.judge_rows={judge_rows}", "data.overlong=truncate"]
    loader = loader_of(stage, world, file, *given, "stage.global_batch_size=9")
    judged = capsys.readouterr().out
    if judge_rows == 100:
        assert "2 data/dropped_too_long (none 1, ne 1)" in judged
        assert "3 data/truncated (none 1, de 1, ne 1)" in judged
    next(loader)
    metrics = loader.metrics()
    assert metrics["data/dropped_too_long"] == 2
    assert metrics["data/truncated"] == 3
    assert metrics["data/num_sequences"] == 7
    loader.log_end()
    assert capsys.readouterr().out.splitlines()[-1] == (
        "dropped or cut in this launch: 2 data/dropped_too_long in 'text' (none 1, ne 1) over "
        f"stage.{'max_length=96' if stage == 'sft' else 'max_prompt_length=72'}; "
        "3 data/truncated in 'text' (none 1, de 1, ne 1)"
    )


def test_a_source_of_which_too_much_is_lost_is_refused_by_language(
    world: World, tmp_path: Path
) -> None:
    rows = [chat("far too long " * 60) | {"language": language} for language in ("de", "ne", "ne")]
    with pytest.raises(ValueError, match=r"3 data/dropped_too_long \(de 1, ne 2\)"):
        loader_of("sft", world, write(tmp_path, *map(json.dumps, rows)))
