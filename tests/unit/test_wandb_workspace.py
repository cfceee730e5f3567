"""The view of a project on W&B, made without an account or a network."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from marco_train.commands.wandb_workspace import SECTIONS, main
from marco_train.metrics import NAMES

GOLDEN = Path(__file__).parent / "golden" / "wandb_workspace.json"
needs_library = pytest.mark.skipif(
    find_spec("wandb_workspaces") is None, reason="needs wandb-workspaces"
)


@needs_library
def test_the_view_is_the_one_that_was_looked_at(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["marco", "--entity", "someone"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(GOLDEN.read_text())


@needs_library
def test_a_view_that_cannot_be_saved_is_a_sentence(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "not a key")
    assert main(["marco", "--save"]) == 1
    assert capsys.readouterr().err.startswith("error: the view is not saved (")


def test_without_the_library_the_command_says_what_to_install(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("marco_train.commands.wandb_workspace.find_spec", lambda name: None)
    assert main(["marco"]) == 1
    assert "pip install 'marco-train[workspaces]'" in capsys.readouterr().err


def test_every_panel_is_of_metrics_that_are_logged() -> None:
    wanted = {m for panels in SECTIONS.values() for metrics in panels.values() for m in metrics}
    whole = {metric for metric in wanted if not metric.endswith(".*")}
    assert whole <= NAMES.keys()
    for pattern in wanted - whole:
        begin = pattern.removesuffix(".*")
        of_parts = begin.rpartition("/")[0] in NAMES
        assert of_parts or any(name.startswith(begin) for name in NAMES), pattern
