"""What every test of servers that misbehave needs."""

import pytest

from marco_train import server_pool


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ask again at once."""
    monkeypatch.setattr(server_pool, "FIRST_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(server_pool, "LONGEST_PAUSE_SECONDS", 0.05)
    monkeypatch.setattr(server_pool, "PASSED_OVER_SECONDS", 0.05)
