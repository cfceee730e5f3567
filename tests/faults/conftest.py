"""What every test of servers that misbehave needs."""

import pytest

from marco_train.inference import pool


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ask again at once."""
    monkeypatch.setattr(pool, "FIRST_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(pool, "LONGEST_PAUSE_SECONDS", 0.05)
    monkeypatch.setattr(pool, "COOL_DOWN_SECONDS", 0.05)
