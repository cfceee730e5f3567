"""What of a config nobody else may read."""

from typing import Any

import pytest

from marco_train.config.secrets import without_secrets


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("api_key", "abc", "***"),
        ("hf_token", "abc", "***"),
        ("PASSWORD", "abc", "***"),
        ("api_key", "", ""),
        ("max_tokens", 8192, 8192),
        ("stop_token", 5, 5),
        ("loss_tokens", "assistant", "assistant"),
        ("url", "http://host:8000/v1", "http://host:8000/v1"),
        ("url", "https://me:secret@host:8000/v1", "https://***@host:8000/v1"),
        ("urls", ["http://me@host", "http://host"], ["http://***@host", "http://host"]),
        ("keys", {"key": ["a", None]}, {"key": ["***", None]}),
    ],
)
def test_secrets_are_hidden_and_nothing_else(name: str, value: Any, shown: Any) -> None:
    assert without_secrets({"part": {name: value}}) == {"part": {name: shown}}
