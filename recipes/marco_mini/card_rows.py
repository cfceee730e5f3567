"""Rows in the columns of the datasets that the model card names, with content of our own.

As they come: hardly any has a language, some have a category of their own, Arrow pads with nulls.
"""

import json
from typing import Any

Row = dict[str, Any]
WORDS = ["river", "lamp", "stone", "cloud", "paper", "wheel", "garden", "bridge"]


def _chat(question: str, answer: str, **more: Any) -> list[dict[str, Any]]:
    return [
        {"role": "user", "content": question, **more},
        {"role": "assistant", "content": answer, **more},
    ]


def dolci(n: int, word: str) -> Row:
    """allenai/Dolci-Instruct-SFT: `functions` and `function_calls` are null without tools."""
    calls = {"function_calls": None, "functions": None}
    return {
        "id": f"dolci-{n}",
        "messages": _chat(f"Name a {word}.", f"A {word}.", **calls),
        "source_dataset": "made",
        "domain": "chat",
    }


def dolci_tools(n: int) -> Row:
    """The same set: a row that names functions and calls one, in its own spelling."""
    city = WORDS[n]
    functions = [{"name": "weather", "parameters": {"city": {"type": "str"}}}]
    turns = [
        ("system", "You may call functions.", {"functions": json.dumps(functions)}),
        ("user", f"Weather in {city}?", {}),
        ("assistant", None, {"function_calls": f'weather(city="{city}")'}),
        ("environment", '{"degrees": 20}', {}),
        ("assistant", "It is 20 degrees.", {}),
    ]
    empty = {"function_calls": None, "functions": None}
    return {
        "id": f"dolci-tools-{n}",
        "messages": [
            {"role": role, "content": said, **empty, **more} for role, said, more in turns
        ],
        "source_dataset": "made",
        "domain": "tool",
    }


def cascade_sft(n: int, word: str) -> Row:
    """nvidia/Nemotron-Cascade-2-SFT-Data: a system turn first, traces of thought in the answer."""
    system = {"role": "system", "content": "Be brief."}
    answer = f"<think>\nOne {word}.\n</think>\n\n{n + 1}"
    return {
        "messages": [system, *_chat(f"Count {word}s: {n}+1?", answer)],
        "domain": "science",
        "source": "made",
        "generator": "made",
    }


def instruction_following(n: int, word: str) -> Row:
    """nvidia/Nemotron-RL-instruction_following: the prompt twice, some `kwargs` null."""
    text = f"Write {n + 2} words on a {word}."
    return {
        "id": n,
        "instruction_id_list": ["length_constraints:number_words", "punctuation:no_comma"],
        "prompt": text,
        "kwargs": [{"num_words": n + 2, "relation": "at least"}, None],
        "responses_create_params": {
            "input": [{"role": "user", "content": text}],
            "tools": [],
            "parallel_tool_calls": False,
        },
    }


def structured_outputs(n: int, word: str) -> Row:
    """Its set of structured outputs: a system turn, the schema as text."""
    turns = [
        {"role": "system", "content": "Answer in JSON."},
        {"role": "user", "content": f"{word}, {n}."},
    ]
    return {
        "responses_create_params": {"input": turns},
        "schema_str": '{"type":"object","required":["name"]}',
        "schema_type": "json",
        "schema_fields_count": 1,
    }


def reasoning_gym(n: int, word: str) -> Row:
    """nvidia/Nemotron-RL-ReasoningGym-v1: another `metadata` for each task, an answer or null."""
    question = f"Letters of {word}?"
    return {
        "responses_create_params": {"input": [{"role": "user", "content": question}]},
        "question": question,
        "answer": str(len(word)) if n % 2 else None,
        "metadata": {"source_dataset": "made", "difficulty": {"n": n}},
        "uuid": f"00000000-0000-4000-8000-{n:012d}",
        "license": "cc-by-4.0",
    }


def knowledge_mcqa(n: int, word: str) -> Row:
    """nvidia/Nemotron-RL-knowledge-mcqa: options padded with nulls."""
    text = f"Which is a {word}?\nA: {word}\nB: no"
    return {
        "responses_create_params": {"input": [{"role": "user", "content": text}]},
        "options": [{"A": word, "B": None}, {"A": None, "B": "no"}],
        "expected_answer": "A",
        "grading_mode": "strict_single_letter_boxed",
        "uuid": f"00000000-0000-4000-8000-{n:012d}",
    }


def rlhf(n: int, word: str) -> Row:
    """nvidia/Nemotron-Cascade-RL-RLHF: one message, and a category of its own."""
    return {
        "prompt": [{"role": "user", "content": f"Plan a {word}, {n}."}],
        "data_source": "made",
        "category": "Business/Finance" if n % 2 else "chat",
    }


def dapo(n: int, word: str) -> Row:
    """BytedTsinghua-SIA/DAPO-Math-17k: every question several times."""
    question = f"Solve it.\n\n{n // 2} {WORDS[n // 2]}s + 1?\n\nEnd with Answer:"
    return {
        "data_source": "math_dapo",
        "prompt": [{"content": question, "role": "user"}],
        "ability": "MATH",
        "reward_model": {"ground_truth": str(n // 2 + 1), "style": "rule"},
        "extra_info": {"index": f"a{n}"},
    }


def skywork(n: int, word: str) -> Row:
    """Skywork/Skywork-OR1-RL-Data: the answer is a list in text."""
    return {
        "data_source": "made",
        "prompt": [{"content": f"{n} + {len(word)}?", "role": "user"}],
        "ability": "math",
        "reward_model": {"ground_truth": f'["{n + len(word)}"]', "style": "rule"},
        "extra_info": {"index": n, "model_difficulty": {"made-7B": n}},
    }


def multilingual(n: int, word: str) -> Row:
    """nvidia/Nemotron-SFT-Multilingual-v1: reasoning in English beside the answer."""
    question, answer = _chat(f"Was ist {n}+2?", str(n + 2))
    return {
        "uuid": f"{n}",
        "messages": [question, answer | {"reasoning_content": f"Add two {word}s."}],
        "license": "cc-by-4.0",
        "tools": None,
    }


SHAPES = {
    shape.__name__: [shape(n, word) for n, word in enumerate(WORDS)]
    for shape in (
        dolci,
        cascade_sft,
        instruction_following,
        structured_outputs,
        reasoning_gym,
        knowledge_mcqa,
        rlhf,
        dapo,
        skywork,
        multilingual,
    )
}

# The rows of each source of configs/data/marco_{sft,opd}.yaml, by the name of their shape.
SFT = {
    "general": "dolci",
    "instruction_following": "cascade_sft",
    "science": "cascade_sft",
    "translation": "multilingual",
    "culture": "multilingual",
}
OPD = {
    "instruction_following": "instruction_following",
    "structured_outputs": "structured_outputs",
    "reasoning_gym": "reasoning_gym",
    "knowledge_mcqa": "knowledge_mcqa",
    "alignment": "rlhf",
    "dapo_math": "dapo",
    "skywork_math": "skywork",
    "translation": "multilingual",
    "culture": "multilingual",
    "nemotron_multilingual": "multilingual",
}
