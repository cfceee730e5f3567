"""Chats become the token ids that `apply_chat_template` of transformers makes of them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from marco_train.config.data import Thinking
from marco_train.config.sft import LossTokens
from marco_train.data.chat import CHATML, Tokenizer, render_example, render_prompt, with_thinking
from marco_train.data.turns import read_tools, read_turns
from marco_train.types import Conversation, Example
from tests.helpers.qwen_like import TEMPLATE, UNMARKED, write_tokenizer
from tests.helpers.tokenizers import tokenizer_of

Turn = dict[str, Any]


@pytest.fixture(scope="module", params=["chatml", "qwen3"])
def tokenizer(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Tokenizer:
    template = {"chatml": CHATML.read_text(), "qwen3": TEMPLATE}[request.param]
    return tokenizer_of(write_tokenizer(tmp_path_factory.mktemp(request.param), template))


def user(content: str) -> Turn:
    return {"role": "user", "content": content}


def assistant(content: str, **more: Any) -> Turn:
    return {"role": "assistant", "content": content, **more}


def conversation(turns: Sequence[Turn], tools: Sequence[Mapping[str, Any]] = ()) -> Conversation:
    messages, known = read_turns(list(turns), {}), read_tools(list(tools))
    return Conversation("source", "math", "en", 0, messages, known)


def of_transformers(
    tokenizer: Tokenizer, turns: Sequence[Turn], tools: Sequence[Mapping[str, Any]] = ()
) -> Example:
    """What transformers makes of turns, and which of its tokens it says an assistant wrote."""
    made = tokenizer.of_transformers.apply_chat_template(
        list(turns), tools=list(tools) or None, return_dict=True, return_assistant_tokens_mask=True
    )
    return Example(made["input_ids"], [bool(flag) for flag in made["assistant_masks"]])


# "What is your name?" and "My name is Marco." in the 29 languages of the model card.
LANGUAGES = {
    "en": ("What is your name?", "My name is Marco."),
    "zh": ("你叫什么名字？", "我叫马可。"),
    "ar": ("ما اسمك؟", "اسمي ماركو."),
    "de": ("Wie heißt du?", "Ich heiße Marco."),
    "es": ("¿Cómo te llamas?", "Me llamo Marco."),
    "fr": ("Comment t’appelles-tu ?", "Je m’appelle Marco."),
    "ko": ("이름이 뭐예요?", "제 이름은 마르코예요."),
    "ja": ("お名前は何ですか？", "私の名前はマルコです。"),
    "pt": ("Qual é o seu nome?", "Meu nome é Marco."),
    "tr": ("Adın ne?", "Benim adım Marco."),
    "id": ("Siapa namamu?", "Nama saya Marco."),
    "it": ("Come ti chiami?", "Mi chiamo Marco."),
    "nl": ("Hoe heet je?", "Ik heet Marco."),
    "pl": ("Jak masz na imię?", "Mam na imię Marco."),
    "ru": ("Как тебя зовут?", "Меня зовут Марко."),
    "vi": ("Bạn tên là gì?", "Tôi tên là Marco."),
    "th": ("คุณชื่ออะไร", "ฉันชื่อมาร์โก"),
    "he": ("מה שמך?", "שמי מרקו."),
    "uk": ("Як тебе звати?", "Мене звати Марко."),
    "ms": ("Siapakah nama awak?", "Nama saya Marco."),
    "bn": ("তোমার নাম কী?", "আমার নাম মার্কো।"),
    "cs": ("Jak se jmenuješ?", "Jmenuji se Marco."),
    "ur": ("آپ کا نام کیا ہے؟", "میرا نام مارکو ہے۔"),
    "kk": ("Сенің атың кім?", "Менің атым Марко."),
    "el": ("Πώς σε λένε;", "Με λένε Μάρκο."),
    "ro": ("Cum te cheamă?", "Mă numesc Marco."),
    "hu": ("Hogy hívnak?", "Marcónak hívnak."),
    "ne": ("तिम्रो नाम के हो?", "मेरो नाम मार्को हो।"),
    "az": ("Adın nədir?", "Mənim adım Markodur."),
}
WRITINGS = {
    "emoji": ("👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽?", "🙂🙃 e\u0301 🇩🇪"),
    "both directions": ("שלום hello مرحبا 123 \u202eabc\u202c", "\u200fשלום\u200e, hello!"),
    "letters that are composed": ("e\u0301 a\u030a ö", "A\u0308 \u1e0b\u0323"),
    "signs of mathematics": ("∫₀¹ x² dx = ?", "$\\frac{1}{3}$ ≈ 0.333"),
    "code": ("def f(x):\n\treturn x  # \\n", "```python\nprint('x')\n\n\n```\n"),
    "line ends of Windows": ("a\r\nb", "c\r\n\r\nd"),
    "spaces": ("  a  b  ", "a \u00a0 b\u3000c  "),
    "nothing asked": ("", "x"),
    "many line breaks": ("a\n\n\nb\n\n", "a\n\n\nb\n\n\n"),
}


@pytest.mark.parametrize("name", [*LANGUAGES, *WRITINGS])
def test_every_writing_has_the_ids_of_transformers(name: str, tokenizer: Tokenizer) -> None:
    question, answer = (LANGUAGES | WRITINGS)[name]
    turns = [{"role": "system", "content": question}, user(question), assistant(answer)]
    turns += [user(answer), assistant(question + ".")]
    example = render_example(tokenizer, conversation(turns), LossTokens.assistant)
    assert example == of_transformers(tokenizer, turns)


WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "What it is like outside, in °C.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
CLOCK = {"type": "function", "function": {"name": "clock", "parameters": {}}}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "São Paulo"}}}
WRITTEN = {"type": "function", "function": {"name": "clock", "arguments": '{"zone":  "UTC"}'}}
THOUGHT = "<think>\nThe user asks a sum.\n</think>\n\n"
CHATS: dict[str, tuple[list[Turn], list[Mapping[str, Any]]]] = {
    "one exchange": ([user("a"), assistant("b")], []),
    "three of them": ([user("a"), assistant("b")] * 3, []),
    "a system turn": ([{"role": "system", "content": "Be brief."}, user("a"), assistant("b")], []),
    "two questions in a row": ([user("a"), user("b"), assistant("c")], []),
    "two answers in a row": ([user("a"), assistant("b"), assistant("c")], []),
    "a question at the end": ([user("a"), assistant("b"), user("c")], []),
    "thinking in the text": ([user("1+1?"), assistant(THOUGHT + "2")], []),
    "thinking in a field": (
        [user("1+1?"), assistant("2", reasoning_content="The user asks a sum.")],
        [],
    ),
    "thinking over lines": (
        [user("1+1?"), assistant("2", reasoning_content="\nOne.\n\n\nTwo.\n\n")],
        [],
    ),
    "thinking in history": (
        [user("1+1?"), assistant(THOUGHT + "2"), user("2+2?"), assistant(THOUGHT + "4")],
        [],
    ),
    "no thought": ([user("1+1?"), assistant("<think>\n\n</think>\n\n2")], []),
    "tools": ([user("a"), assistant("b")], [WEATHER, CLOCK]),
    "tools and a system turn": (
        [{"role": "system", "content": "Be brief."}, user("a"), assistant("b")],
        [WEATHER],
    ),
    "a call": ([user("a"), assistant("", tool_calls=[CALL])], [WEATHER]),
    "a call with words": ([user("a"), assistant("I look.", tool_calls=[CALL])], [WEATHER]),
    "two calls": ([user("a"), assistant("", tool_calls=[CALL, WRITTEN])], [WEATHER, CLOCK]),
    "a call without tools": ([user("a"), assistant("", tool_calls=[WRITTEN])], []),
    "calls, results and an answer": (
        [
            user("a"),
            assistant("", tool_calls=[CALL, WRITTEN], reasoning_content="I look."),
            {"role": "tool", "content": "20 °C", "name": "weather"},
            {"role": "tool", "content": '{"time": "12:00"}'},
            assistant("20 °C at noon.", reasoning_content="Both are there."),
        ],
        [WEATHER, CLOCK],
    ),
    "a second question behind calls": (
        [
            user("a"),
            assistant("I look.", tool_calls=[CALL]),
            {"role": "tool", "content": "20 °C"},
            assistant("It is 20 °C."),
            user("Thank you."),
            assistant("You are welcome.", reasoning_content="Be polite."),
        ],
        [WEATHER],
    ),
}


@pytest.mark.parametrize("name", CHATS)
def test_every_chat_has_the_ids_of_transformers(name: str, tokenizer: Tokenizer) -> None:
    turns, tools = CHATS[name]
    example = render_example(tokenizer, conversation(turns, tools), LossTokens.assistant)
    assert example.input_ids == of_transformers(tokenizer, turns, tools).input_ids


@pytest.mark.parametrize("name", CHATS)
def test_every_prompt_has_the_ids_of_transformers(name: str, tokenizer: Tokenizer) -> None:
    turns, tools = CHATS[name]
    found = conversation(turns, tools)
    asked = turns[: len(found.asked)]
    made = tokenizer.of_transformers.apply_chat_template(
        asked, tools=tools or None, add_generation_prompt=True, return_dict=False
    )
    assert render_prompt(tokenizer, found) == made


@pytest.fixture(scope="module")
def unmarked(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Qwen3's as it is published: its template does not mark answers."""
    return tokenizer_of(write_tokenizer(tmp_path_factory.mktemp("unmarked"), UNMARKED))


@pytest.fixture(scope="module")
def marked(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return tokenizer_of(write_tokenizer(tmp_path_factory.mktemp("marked"), TEMPLATE))


# A prompt for the second of two answers shows the first with the thinking of a last turn.
NO_PROMPT = {"two answers in a row"}


@pytest.mark.parametrize("thinking", Thinking)
@pytest.mark.parametrize("name", sorted(CHATS.keys() - NO_PROMPT))
def test_answers_without_marks_are_learnt_as_with_them(
    name: str, thinking: Thinking, unmarked: Tokenizer, marked: Tokenizer
) -> None:
    found = conversation(*CHATS[name])
    expected, example = (
        render_example(tokenizer, with_thinking(tokenizer, found, thinking), LossTokens.assistant)
        for tokenizer in (marked, unmarked)
    )
    assert any(expected.loss_mask)
    assert example == expected
    assert render_prompt(unmarked, found) == render_prompt(marked, found)


# How templates write the arguments of a call, beside those that take both objects and text.
TAKES_OBJECTS = {
    "quotes text once more": "{{- (given | tojson) + '}\\n</tool_call>' }}",
    "goes through objects": (
        "{{- '{' }}{%- for k, v in given.items() %}{{- (k | tojson) + ': ' + (v | tojson) }}"
        "{%- endfor %}{{- '}}\\n</tool_call>' }}"
    ),
}
TAKES_BOTH = "{{- (given if given is string else given | tojson) + '}\\n</tool_call>' }}"


@pytest.mark.parametrize("writes", TAKES_OBJECTS.values(), ids=TAKES_OBJECTS.keys())
def test_arguments_that_are_text_are_read_for_a_template_that_takes_objects(
    writes: str, tmp_path: Path
) -> None:
    assert TAKES_BOTH in TEMPLATE
    template = TEMPLATE.replace(TAKES_BOTH, writes)
    tokenizer = tokenizer_of(write_tokenizer(tmp_path / "tokenizer", template))

    def turns(arguments: Any) -> list[Turn]:
        call = {"type": "function", "function": {"name": "weather", "arguments": arguments}}
        result = {"role": "tool", "content": "20"}
        return [user("a"), assistant("", tool_calls=[call]), result, assistant("It is 20.")]

    expected = of_transformers(tokenizer, turns({"city": "São Paulo"}), [WEATHER])
    for written in ('{"city":   "São Paulo"}', '{"city": "S\\u00e3o Paulo"}'):
        row = conversation(turns(written), [WEATHER])
        assert render_example(tokenizer, row, LossTokens.assistant) == expected
    text = tokenizer.decode(expected.input_ids)
    assert '"arguments": {"city": "São Paulo"}}' in text


def test_arguments_that_are_json_of_no_object_stay_text(tmp_path: Path) -> None:
    writes = TAKES_OBJECTS["quotes text once more"]
    template = TEMPLATE.replace(TAKES_BOTH, writes)
    tokenizer = tokenizer_of(write_tokenizer(tmp_path / "tokenizer", template))
    call = {"type": "function", "function": {"name": "weather", "arguments": '"Paris"'}}
    turns = [user("a"), assistant("", tool_calls=[call])]
    example = render_example(tokenizer, conversation(turns), LossTokens.assistant)
    assert example == of_transformers(tokenizer, turns)
