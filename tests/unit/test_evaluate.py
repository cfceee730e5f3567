"""What an evaluation opens is closed, however it ends."""

from types import SimpleNamespace
from typing import Any

import pytest

from marco_train.errors import InputError
from marco_train.stages import evaluate
from marco_train.stages.checks import Checks


def test_open_teachers_are_closed_where_another_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[str] = []

    def opened(cfg: Any, vocab_size: int, name: str) -> Any:
        if name == "second":
            raise InputError("it cannot be trusted")
        return SimpleNamespace(close=lambda: closed.append(name))

    monkeypatch.setattr(evaluate, "open_teacher", opened)
    cfg: Any = SimpleNamespace(stage=SimpleNamespace(teachers={"first": 1, "second": 2}))
    prepared: Any = SimpleNamespace(measured=[], vocab_size=8)
    with pytest.raises(InputError, match="cannot be trusted"):
        evaluate.open_teachers(cfg, prepared, Checks())
    assert closed == ["first"]
