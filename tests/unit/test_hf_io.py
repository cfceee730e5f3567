"""Hugging Face directories in and out."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from marco_train.architecture import InputError, read_architecture
from marco_train.models import hf_io, load_model, save_model
from marco_train.models.hf_io import check_architecture, named_weights, random_model, stop_token_ids
from tests.conftest import DENSE, World, architecture


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_model(random_model(architecture(), torch.float32, seed=0), tmp_path / "model")
    return tmp_path / "model"


def rewrite(path: Path, change: dict[str, object]) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | change))


@pytest.mark.parametrize("shape", [architecture(), architecture(**DENSE)], ids=["moe", "dense"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_round_trip_changes_no_bit(
    shape: hf_io.ArchitectureConfig, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = random_model(shape, dtype, seed=0)
    save_model(model, tmp_path / "model")
    again = dict(named_weights(load_model(tmp_path / "model", dtype)))
    for name, weight in named_weights(model):
        assert torch.equal(weight, again[name]), name
    assert read_architecture(tmp_path / "model") == shape


def test_several_shards_have_an_index_and_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hf_io, "SHARD_BYTES", 30_000)
    model = random_model(architecture(), torch.float32, seed=0)
    save_model(model, tmp_path / "model")
    index = json.loads((tmp_path / "model" / hf_io.INDEX).read_text())
    files = set(index["weight_map"].values())
    assert len(files) > 2
    assert files == {p.name for p in (tmp_path / "model").glob("*.safetensors")}
    again = dict(named_weights(load_model(tmp_path / "model", torch.float32)))
    assert all(torch.equal(weight, again[name]) for name, weight in named_weights(model))


def test_the_files_say_what_other_readers_look_for(world: World) -> None:
    directory = Path(world.path("student"))
    config = json.loads((directory / "config.json").read_text())
    assert config["num_experts"] == config["num_local_experts"] == 8
    names = load_file(directory / "model.safetensors").keys()
    assert "model.layers.1.mlp.experts.7.gate_proj.weight" in names
    assert "lm_head.weight" not in names
    generation = json.loads((directory / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [2, 0]
    assert stop_token_ids(directory) == [2, 0]


def test_an_export_carries_the_chat_template_in_use(world: World, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    own = tmp_path / "tokenizer"
    shutil.copytree(world.path("data", "tokenizer"), own)
    (own / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((own / "tokenizer_config.json").read_text())
    config["chat_template"] = "the tokenizer's own"
    (own / "tokenizer_config.json").write_text(json.dumps(config))
    model = random_model(architecture(), torch.float32, seed=0)
    for name, template in (("kept", None), ("replaced", "{{ messages[0].content }}")):
        save_model(model, tmp_path / name, own, template)
        found = AutoTokenizer.from_pretrained(tmp_path / name).chat_template
        assert found == (template or "the tokenizer's own")


def test_a_missing_weight_is_named(saved: Path) -> None:
    weights = load_file(saved / "model.safetensors")
    del weights["model.layers.0.mlp.experts.3.up_proj.weight"]
    save_file(weights, saved / "model.safetensors")
    with pytest.raises(InputError, match=r"1 weights are missing: .*layers.0.mlp.experts.3.up"):
        load_model(saved, torch.float32)


def test_an_unknown_weight_is_named(saved: Path) -> None:
    weights = load_file(saved / "model.safetensors") | {"model.bias": torch.zeros(2)}
    save_file(weights, saved / "model.safetensors")
    with pytest.raises(InputError, match=r"model.bias is not a weight of this model"):
        load_model(saved, torch.float32)


def test_a_misshapen_weight_is_named(saved: Path) -> None:
    weights = load_file(saved / "model.safetensors")
    weights["model.norm.weight"] = torch.zeros(31)
    save_file(weights, saved / "model.safetensors")
    with pytest.raises(InputError, match=r"model.norm.weight has shape \(31,\).*\(32,\)"):
        load_model(saved, torch.float32)


def test_a_missing_file_is_named(saved: Path) -> None:
    (saved / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"lacks the weight files model.safetensors"):
        load_model(saved, torch.float32)


UNSUPPORTED = [
    ({"architectures": ["LlamaForCausalLM"]}, "LlamaForCausalLM"),
    ({"use_sliding_window": True}, "sliding-window"),
    ({"rope_parameters": {"rope_theta": 1e4, "rope_type": "yarn"}}, "scaled rotary"),
    ({"mlp_only_layers": [0]}, "mixes dense and sparse"),
]


@pytest.mark.parametrize(("change", "names"), UNSUPPORTED)
def test_another_kind_of_model_is_refused(
    change: dict[str, object], names: str, saved: Path
) -> None:
    rewrite(saved, change)
    with pytest.raises(InputError, match=names):
        load_model(saved, torch.float32)


def test_a_model_other_than_the_config_describes_is_refused(saved: Path) -> None:
    with pytest.raises(InputError, match=r"num_experts: 16 -> 8"):
        check_architecture(saved, architecture(num_experts=16))


def test_an_interrupted_save_leaves_nothing_that_looks_complete(tmp_path: Path) -> None:
    def broken() -> object:
        yield from list(named_weights(random_model(architecture(), torch.float32, 0)))[:5]
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="disk is full"):
        hf_io.write_directory(
            tmp_path / "model",
            architecture(),
            torch.float32,
            broken(),
            None,  # type: ignore[arg-type]
        )
    assert not (tmp_path / "model").exists()
