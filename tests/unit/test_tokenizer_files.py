"""One tokenizer in several spellings is one tokenizer; another is another."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from marco_train.errors import InputError
from marco_train.models.tokenizer_files import load_fast_tokenizer, tokenizer_digest
from marco_train.teachers.vocab import check_vocabulary
from tests.helpers.world import World


def spelled(world: World, target: Path, change: Callable[[dict[str, Any]], Any], **how: Any) -> str:
    """The world's tokenizer, changed and written anew."""
    content = json.loads(Path(world.path("data", "tokenizer", "tokenizer.json")).read_text())
    change(content)
    target.mkdir(exist_ok=True)
    (target / "tokenizer.json").write_text(json.dumps(content, **how))
    return str(target)


def merges_as_text(content: dict[str, Any]) -> None:
    content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]


def options_of_an_older_version(content: dict[str, Any]) -> None:
    for name in ("ignore_merges", "byte_fallback", "dropout"):
        content["model"].pop(name, None)


def added_tokens_in_another_order(content: dict[str, Any]) -> None:
    content["added_tokens"].reverse()


def padding(content: dict[str, Any]) -> None:
    content["padding"] = {"strategy": "BatchLongest", "pad_id": 0}


@pytest.mark.parametrize(
    ("change", "how"),
    [
        (merges_as_text, {}),
        (options_of_an_older_version, {}),
        (added_tokens_in_another_order, {}),
        (padding, {}),
        (lambda content: None, {"sort_keys": True}),
        (lambda content: None, {"indent": 3, "ensure_ascii": False}),
    ],
)
def test_another_spelling_is_the_same_tokenizer(
    change: Callable[[dict[str, Any]], Any], how: dict[str, Any], world: World, tmp_path: Path
) -> None:
    plain = world.path("data", "tokenizer")
    other = spelled(world, tmp_path / "t", change, **how)
    check_vocabulary(plain, other, "teacher 'first'")
    assert tokenizer_digest(plain, "one") == tokenizer_digest(other, "other")


def two_merges_swapped(content: dict[str, Any]) -> None:
    merges = content["model"]["merges"]
    merges[0], merges[1] = merges[1], merges[0]


def another_text_of_a_token(content: dict[str, Any]) -> None:
    content["added_tokens"][0]["content"] = "<|end|>"


def options_that_matter(content: dict[str, Any]) -> None:
    content["model"]["ignore_merges"] = True


def an_id_of_zero(content: dict[str, Any]) -> None:
    content["model"]["unk_id"] = 0


def another_split(content: dict[str, Any]) -> None:
    content["pre_tokenizer"] = {"type": "Whitespace"}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (two_merges_swapped, "model.merges.0"),
        (another_text_of_a_token, "added_tokens.0.content: <|endoftext|> -> <|end|>"),
        (options_that_matter, "model.ignore_merges"),
        (an_id_of_zero, "model.unk_id: None -> 0"),
        (another_split, "pre_tokenizer"),
    ],
)
def test_another_meaning_is_another_tokenizer(
    change: Callable[[dict[str, Any]], Any], named: str, world: World, tmp_path: Path
) -> None:
    plain = world.path("data", "tokenizer")
    other = spelled(world, tmp_path / "t", change)
    with pytest.raises(InputError, match="is not the student's") as refused:
        check_vocabulary(plain, other, "teacher 'first'")
    assert named in str(refused.value)
    assert tokenizer_digest(plain, "one") != tokenizer_digest(other, "other")


@pytest.mark.parametrize("content", ["{", "[]", '{"version": "1.0"}'])
def test_a_file_that_is_no_tokenizer_is_named(content: str, world: World, tmp_path: Path) -> None:
    shutil.copytree(world.path("data", "tokenizer"), tmp_path / "t")
    (tmp_path / "t" / "tokenizer.json").write_text(content)
    with pytest.raises(InputError, match=r"the teacher: .*tokenizer\.json .*fetch it again"):
        tokenizer_digest(tmp_path / "t", "the teacher")


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer_config.json", "{"),
        ("tokenizer_config.json", "[]"),
        ("special_tokens_map.json", '{"eos_token": 5}'),
        ("tokenizer.json", '{"model": {"type": "BPE", "vocab": {}}}'),
    ],
)
def test_files_that_cannot_be_opened_are_said_in_a_sentence(
    file: str, content: str, world: World, tmp_path: Path
) -> None:
    shutil.copytree(world.path("data", "tokenizer"), tmp_path / "t")
    (tmp_path / "t" / file).write_text(content)
    with pytest.raises(InputError, match=r"the teacher: the tokenizer in .* cannot be opened"):
        load_fast_tokenizer(tmp_path / "t", "the teacher")
