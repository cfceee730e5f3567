"""Talking to a model in the terminal."""

import io
import json
import shutil
from pathlib import Path

import pytest
import torch

from marco_train.commands.chat import main
from tests.helpers.world import World

pytestmark = pytest.mark.slow

GREEDY = ["--temperature", "0", "--max-tokens", "12", "--dtype", "float32"]


def test_the_likeliest_answer_is_that_of_transformers(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = world.path("sft", "export")
    assert main([path, "--prompt", "test math 1?", *GREEDY]) == 0
    said = capsys.readouterr().out

    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    turns = [{"role": "user", "content": "test math 1?"}]
    asked = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt")
    ids = asked["input_ids"]
    made = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    assert said == tokenizer.decode(made, skip_special_tokens=True) + "\n"


def test_lines_are_one_chat_until_an_empty_one_begins_anew(
    world: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def answers(lines: str, *more: str) -> list[str]:
        typed = io.TextIOWrapper(io.BytesIO(lines.encode("latin-1")), "utf-8")
        monkeypatch.setattr("sys.stdin", typed)
        words = ["--max-tokens", "1", "--dtype", "float32", *more]
        assert main([world.path("sft", "export"), *words]) == 0
        return capsys.readouterr().out.splitlines()

    first, second, third = answers("one\none\n\none\n")
    assert first == third
    assert len(answers("é\n")) == 1  # which is not UTF-8 here
    assert answers("one\none\n\none\n") == [first, second, third]  # the same by the seed
    drawn = [answers("one\none\n", "--seed", str(seed)) for seed in range(4)]
    assert len({tuple(each) for each in drawn}) > 1
    cold = [answers("one\n", "--seed", str(seed), "--temperature", "1e-4") for seed in range(4)]
    assert cold == [answers("one\n", "--temperature", "0")] * 4


def test_what_cannot_be_asked_is_a_sentence(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = world.path("sft", "export")

    def refusal(*words: str) -> str:
        assert main([*words, *([] if "--prompt" in words else ["--prompt", "one?"])]) == 1
        return capsys.readouterr().err

    assert refusal("nowhere") == (
        "error: there is no directory 'nowhere': name a model, as an export/\n"
    )
    assert "--prompt is empty" in refusal(path, "--prompt", " ")
    assert "--max-tokens is 0, and must be greater" in refusal(path, "--max-tokens", "0")
    assert "--temperature is -1.0, and must be 0" in refusal(path, "--temperature", "-1")
    assert "ask in fewer words, or begin anew" in refusal(path, "--prompt", "one " * 5000)
    bare = tmp_path / "bare"
    shutil.copytree(path, bare)
    (bare / "chat_template.jinja").unlink(missing_ok=True)
    settings = json.loads((bare / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (bare / "tokenizer_config.json").write_text(json.dumps(settings))
    assert "has no chat template; set --chat-template chatml, or give it one" in refusal(str(bare))
