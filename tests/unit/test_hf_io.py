"""Hugging Face directories in and out."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from marco_train.config.architecture import ArchitectureConfig, read_architecture
from marco_train.errors import InputError
from marco_train.models import hf_io, load_model, save_model
from marco_train.models.hf_io import check_architecture, stop_token_ids
from marco_train.models.weights import local_weights, named_weights, random_model
from marco_train.safetensors_io import StoredTensor, read_into
from tests.helpers.models import DENSE, architecture
from tests.helpers.world import World


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
    shape: ArchitectureConfig, dtype: torch.dtype, tmp_path: Path
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


GATE_3 = "model.layers.0.mlp.experts.3.gate_proj.weight"


def change(path: Path, **changes: torch.Tensor | None) -> None:
    """Replace, add or (None) drop weights."""
    weights = load_file(path / "model.safetensors")
    for name, tensor in changes.items():
        if tensor is None:
            del weights[name]
        else:
            weights[name] = tensor
    save_file(weights, path / "model.safetensors")


def test_a_second_save_replaces_the_first(saved: Path) -> None:
    (saved / "left_over.txt").write_text("of the first")
    other = random_model(architecture(), torch.float32, seed=1)
    save_model(other, saved)
    again = dict(named_weights(load_model(saved, torch.float32)))
    assert all(torch.equal(weight, again[name]) for name, weight in named_weights(other))
    assert not (saved / "left_over.txt").exists()


BAD_WEIGHTS = {
    "missing": ({GATE_3: None}, rf"1 are missing: {GATE_3}"),
    "unknown": ({"model.bias": torch.zeros(2)}, "1 are not of this model: model.bias"),
    "misshapen": (
        {"model.norm.weight": torch.zeros(31)},
        r"1 have another shape than config.json says: model.norm.weight \[31\], not \[32\]",
    ),
    "transposed": ({GATE_3: torch.zeros(32, 16)}, rf"{GATE_3} \[32, 16\], not \[16, 32\]"),
    "of whole numbers": (
        {GATE_3: torch.zeros(16, 32, dtype=torch.int8)},
        rf"1 are not stored as one of F32, BF16, F16: {GATE_3} I8",
    ),
    "doubled, fused and apart": (
        {"model.layers.0.mlp.experts.down_proj": torch.zeros(8, 32, 16)},
        r"8 come twice: model.layers.0.mlp.experts.0.down_proj.weight, ",
    ),
}


@pytest.mark.parametrize(("changes", "names"), BAD_WEIGHTS.values(), ids=BAD_WEIGHTS.keys())
def test_bad_weights_are_named_before_any_memory_is_taken(
    changes: dict[str, torch.Tensor | None],
    names: str,
    saved: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def no_model(*_: object) -> None:
        raise AssertionError("a model was allocated")

    change(saved, **changes)
    monkeypatch.setattr(hf_io, "empty_model", no_model)
    with pytest.raises(InputError, match=names):
        load_model(saved, torch.float32)


def test_of_many_mistakes_the_first_ten_are_named(saved: Path) -> None:
    weights = load_file(saved / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if ".experts." not in name}
    save_file(kept, saved / "model.safetensors")
    with pytest.raises(InputError, match=r"48 are missing: .* and 38 more") as error:
        load_model(saved, torch.float32)
    assert str(error.value).count("experts") == 10


def test_a_missing_file_is_named(saved: Path) -> None:
    (saved / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"lacks the weight files model.safetensors"):
        load_model(saved, torch.float32)


def test_an_index_that_names_absent_files_is_refused(saved: Path) -> None:
    names = load_file(saved / "model.safetensors").keys()
    (saved / "model.safetensors").rename(saved / "model-00001-of-00002.safetensors")
    files = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(names)}
    (saved / hf_io.INDEX).write_text(json.dumps({"weight_map": files}))
    with pytest.raises(InputError, match="lacks the weight files model-00002-of-00002"):
        load_model(saved, torch.float32)


@pytest.mark.parametrize("kept", [3, 200, -1])
def test_a_shard_that_was_cut_short_is_refused(kept: int, saved: Path) -> None:
    file = saved / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(InputError, match="cut short"):
        load_model(saved, torch.float32)


def test_the_files_hold_the_format_that_safetensors_reads(saved: Path) -> None:
    model = random_model(architecture(), torch.float32, seed=0)
    read = load_file(saved / "model.safetensors")
    wanted = dict(local_weights(model))
    assert read.keys() == wanted.keys()
    assert all(torch.equal(read[name], weight) for name, weight in wanted.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_are_converted_where_another_type_is_asked_for(
    dtype: torch.dtype, saved: Path
) -> None:
    found = dict(named_weights(load_model(saved, dtype)))
    for name, weight in named_weights(random_model(architecture(), torch.float32, seed=0)):
        assert torch.equal(found[name], weight.to(dtype)), name


def test_experts_fused_in_memory_are_cut_into_single_ones(saved: Path, tmp_path: Path) -> None:
    weights = load_file(saved / "model.safetensors")
    for layer in range(2):
        prefix = f"model.layers.{layer}.mlp.experts"
        experts = [
            {m: weights.pop(f"{prefix}.{e}.{m}_proj.weight") for m in ("gate", "up", "down")}
            for e in range(8)
        ]
        weights[f"{prefix}.gate_up_proj"] = torch.stack(
            [torch.cat([e["gate"], e["up"]]) for e in experts]
        )
        weights[f"{prefix}.down_proj"] = torch.stack([e["down"] for e in experts])
    shutil.copytree(saved, tmp_path / "fused")
    save_file(weights, tmp_path / "fused" / "model.safetensors")
    again = dict(named_weights(load_model(tmp_path / "fused", torch.float32)))
    for name, weight in named_weights(load_model(saved, torch.float32)):
        assert torch.equal(weight, again[name]), name


class Rank:
    """One rank's view of a group; loading asks nothing else of it."""

    def __init__(self, rank: int, size: int) -> None:
        self._rank, self._size = rank, size

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._size


def test_a_rank_reads_its_own_experts_and_nothing_of_the_others(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names: list[str] = []
    stored = hf_io.stored_weights(saved, architecture())
    name_of = {(place.file, place.offset): name for name, place in stored.items()}

    def watched(place: StoredTensor, target: torch.Tensor) -> None:
        names.append(name_of[place.file, place.offset])
        read_into(place, target)

    monkeypatch.setattr(hf_io, "read_into", watched)
    load_model(saved, torch.float32, Rank(1, 4))  # type: ignore[arg-type]
    experts = {int(name.split(".experts.")[1].split(".")[0]) for name in names if "experts" in name}
    assert experts == {2, 3}
    assert len(names) == len(set(names)) == len(stored) - 2 * 6 * 3


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
    def broken() -> Iterator[tuple[str, torch.Tensor]]:
        yield from list(named_weights(random_model(architecture(), torch.float32, 0)))[:5]
        raise OSError("the disk is full")

    with pytest.raises(InputError, match=r"rank 0 could not write .*: the disk is full"):
        hf_io.write_directory(
            tmp_path / "model",
            architecture(),
            torch.float32,
            broken(),
            None,
        )
    assert not (tmp_path / "model").exists()
