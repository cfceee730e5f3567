"""Keys and passwords stay out of what is written and said, and names stay under the root."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from marco_train.config.resumption import saved_config
from marco_train.config.secrets import Secrets, note_secrets, redacted
from marco_train.errors import InputError
from tests.helpers.configs import compose_config


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Secrets, "known", {})


def test_values_of_the_environment_stand_under_their_names(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MY_KEY", "planted-1234")
    monkeypatch.setenv("MY_PIN", "12")
    monkeypatch.setenv("MY_DIRECTORY", str(tmp_path))
    monkeypatch.setenv("NOT_NAMED", "free text")
    note_secrets(
        OmegaConf.create(
            {"a": "x-${oc.env:MY_KEY}", "b": ["${oc.env:MY_PIN,0}"], "c": "${oc.env:MY_DIRECTORY}"}
        )
    )
    assert redacted("x-planted-1234") == "x-${oc.env:MY_KEY}"
    assert redacted({"b": ["12", "112", 12]}) == {"b": ["${oc.env:MY_PIN}", "112", 12]}
    assert redacted(f"{tmp_path}/free text") == f"{tmp_path}/free text"


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("no answer from http://me:pass@host:1/v1", "no answer from http://<redacted>@host:1/v1"),
        ("https://token@host", "https://<redacted>@host"),
        ("http://host/@home and me@host", "http://host/@home and me@host"),
    ],
)
def test_passwords_in_urls_are_left_out(text: str, wanted: str) -> None:
    assert redacted(text) == wanted


def test_fields_of_keys_are_left_out() -> None:
    given = {"api_key": "k", "servers": [{"API_KEY": 3, "password": None}], "tokenizer": "t"}
    left = {"api_key": "<redacted>", "servers": [{"API_KEY": "<redacted>", "password": None}]}
    assert redacted(given) == left | {"tokenizer": "t"}


def test_a_saved_config_has_no_key_and_the_run_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "planted-1234")
    cfg = compose_config("quickstart_opd", "rollout@stage.rollout=vllm_server")
    assert cfg.stage.rollout.servers.api_key == "planted-1234"
    assert "planted" not in str(saved_config(cfg))


@pytest.mark.parametrize("name", ["././x", "../x", "a/b", "", ".hidden", "..", "a\nb"])
def test_a_name_that_leaves_the_root_is_refused(name: str) -> None:
    with pytest.raises(InputError, match=r"name is .*, and names files"):
        compose_config("quickstart_sft", f"name='{name}'")


@pytest.mark.parametrize("name", ["run", "run-1.5+b=2", "übung_3"])
def test_plain_names_are_taken(name: str) -> None:
    assert compose_config("quickstart_sft", f"name='{name}'").name == name
