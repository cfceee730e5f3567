"""Prompts that are alike, or nearly, count once where asked."""

from pathlib import Path

import pytest

from marco_train.config.data import SourceConfig
from marco_train.errors import InputError
from tests.helpers.rows import source

CAPITAL = "What is the capital of France, and how many people have lived there since {}?"
ROWS = [
    {"prompt": CAPITAL.format("1950")},
    {"prompt": CAPITAL.format("1951")},  # two of 75 strings of five characters differ
    {"prompt": "フランスの首都はどこですか。そこには何人が住んでいますか。"},
    {"prompt": "フランスの首都はどこですか。そこには何人が住んでいますか。"},
    {"prompt": "Was ist die Hauptstadt?"},
]


def kept(tmp_path: Path, **asked: object) -> list[int]:
    found = source(tmp_path, *ROWS, **asked)
    return [found[i].row for i in range(len(found))]


def test_near_duplicates_are_told_by_the_characters_that_they_share(tmp_path: Path) -> None:
    assert kept(tmp_path) == [0, 1, 2, 3, 4]
    assert kept(tmp_path, unique_prompts=True) == [0, 1, 2, 4]
    assert kept(tmp_path, near_duplicates=0.8) == [0, 2, 4]
    assert kept(tmp_path, near_duplicates=1.0) == [0, 1, 2, 4]


@pytest.mark.parametrize("share", [0.0, -0.5, 1.5])
def test_a_similarity_that_is_no_share_is_refused(share: float) -> None:
    with pytest.raises(InputError, match=rf"near_duplicates is {share}, and must be a share"):
        SourceConfig(path="rows", near_duplicates=share)
