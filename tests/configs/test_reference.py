"""The list of all keys is current, and says what each is."""

import re

import pytest
from omegaconf import DictConfig

from marco_train.commands.config_reference import documented, keys, main, reference
from marco_train.config.compose import compose
from marco_train.config.optim import OptimConfig
from marco_train.config.paths import CONFIG_DIR
from marco_train.config.run import TrainConfig


def test_the_reference_is_current(monkeypatch: pytest.MonkeyPatch) -> None:
    main(["--check"])
    monkeypatch.setattr("marco_train.commands.config_reference.HEAD", "# Other words")
    with pytest.raises(SystemExit, match="is not current: run python"):
        main(["--check"])


def test_every_key_has_a_meaning() -> None:
    rows = [line for line in reference().splitlines() if line.startswith("| `")]
    assert len(rows) > 100
    assert [row for row in rows if row.endswith("|  |")] == []


def test_a_key_is_told_of_as_the_schema_has_it() -> None:
    found = {key: rest for key, *rest in keys(OptimConfig, "optim.")}
    assert found["optim.schedule"][:2] == ["`cosine`, `linear`, `constant`", "`constant`"]
    assert found["optim.learning_rate"][:2] == ["number", "`???`"]
    assert found["optim.warmup_share"][:2] == ["number or null", "`null`"]
    assert documented(OptimConfig)["clip_norm"] == "Bound on the global gradient norm."
    whole = {key for key, *_ in keys(TrainConfig, "", ("stage", "optim", "teacher"))}
    assert {"data.sources.<name>.path", "data.held_out.share", "on_resume.allow"} <= whole


def paths(node: DictConfig, above: str = "") -> set[str]:
    """The keys of a composed run, but those that a user names."""
    found = set()
    for name in map(str, node):
        inner = node._get_node(name)
        if isinstance(inner, DictConfig) and not inner._is_none() and not inner._is_interpolation():
            found |= paths(inner, f"{above}{name}.")
        else:
            found.add(f"{above}{name}")
    return found


def test_every_key_of_a_run_is_in_it() -> None:
    text = (CONFIG_DIR / "README.md").read_text()
    for words in (["experiment=sft"], ["experiment=opd", "teacher.path=x"]):
        for key in paths(compose([*words, "model.path=x", "data=own", "data.path=x"])):
            if key.startswith("teacher"):
                continue  # as stage.cascade.<name>.teacher
            general = re.sub(r"\b(sources|cascade)\.own\.", r"\1.<name>.", key)
            assert f"`{general}`" in text, key
