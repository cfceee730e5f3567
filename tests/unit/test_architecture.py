"""config.json is read as transformers reads it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from marco_train.config.architecture import max_positions, read_architecture, text_config
from marco_train.errors import InputError
from marco_train.models import load_model

COMMON: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 24,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-3,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_theta": 50.0, "rope_type": "default"},
    "attention_bias": False,
    "use_sliding_window": False,
    "sliding_window": None,
}
KINDS: dict[str, dict[str, Any]] = {
    "qwen3": COMMON
    | {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "max_window_layers": 2,
        "layer_types": ["full_attention", "full_attention"],
    },
    "qwen3_moe": COMMON
    | {
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "num_experts": 16,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 8,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
}
# What else has to change for a model that takes the default: heads are shared evenly, each layer
# has its type.
BESIDE: dict[tuple[str, str], dict[str, Any]] = {
    ("qwen3", "num_key_value_heads"): {"num_attention_heads": 32},
    ("qwen3", "num_hidden_layers"): {
        "layer_types": None,
        "hidden_size": 8,
        "max_window_layers": 32,
    },
    ("qwen3_moe", "num_experts"): {"num_experts_per_tok": 8},
}
CHANGES: list[tuple[str, str, dict[str, Any]]] = [
    ("qwen3", "num_key_value_heads null", {"num_key_value_heads": None}),
    ("qwen3", "a window that no layer uses", {"use_sliding_window": True, "sliding_window": 2}),
    ("qwen3", "older name of a layer", {"layer_types": ["attention"] * 2}),
    ("qwen3_moe", "num_local_experts beside", {"num_local_experts": 8}),
    ("qwen3_moe", "a window of none", {"use_sliding_window": True}),
    ("qwen3_moe", "dense layers beyond the last", {"mlp_only_layers": [7]}),
    ("qwen3_moe", "mlp_only_layers null", {"mlp_only_layers": None}),
]
SPELLINGS: dict[str, dict[str, Any]] = {
    "older rope_theta beside": {"rope_theta": 3.0},
    "rope_theta alone": {"rope_parameters": None, "rope_theta": 300.0},
    "rope_scaling null": {"rope_scaling": None},
    "rope_scaling empty": {"rope_scaling": {}, "rope_theta": 300.0},
    "rope_scaling of type default": {"rope_scaling": {"type": "default"}, "rope_theta": 300.0},
    "rope_scaling wins": {"rope_scaling": {"rope_type": "default", "rope_theta": 9.0}},
    "rope_parameters without a base": {"rope_parameters": {"rope_type": "default"}},
    "the whole head turned": {"partial_rotary_factor": 1.0},
    "another name of silu": {"hidden_act": "swish"},
    "keys that nobody knows": {"trained_by": "someone", "rope_interleave": None},
}
CHANGES += [(kind, name, change) for kind in KINDS for name, change in SPELLINGS.items()]
LEFT_OUT = [
    (kind, name) for kind, fields in KINDS.items() for name in fields if name != "model_type"
]


def write(path: Path, config: dict[str, Any]) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    return path


def check_alike(path: Path, config: dict[str, Any]) -> None:
    """Compare fields and log-probabilities of ours with those of transformers."""
    write(path, config)
    theirs = AutoConfig.from_pretrained(path)
    ours = read_architecture(path)
    heads, width = theirs.num_attention_heads, theirs.hidden_size
    expected = {
        name: getattr(theirs, name)
        for name in (
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "intermediate_size",
            "rms_norm_eps",
            "max_position_embeddings",
            "tie_word_embeddings",
        )
    } | {
        "head_dim": getattr(theirs, "head_dim", width // heads),
        "rope_theta": theirs.rope_parameters["rope_theta"],
    }
    if theirs.model_type == "qwen3_moe":
        sparse = ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob")
        expected |= {name: getattr(theirs, name) for name in sparse}
    else:
        assert not ours.is_moe
    assert {name: getattr(ours, name) for name in expected} == expected

    model = AutoModelForCausalLM.from_config(theirs, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5, generator=generator)
            else:
                parameter.normal_(0, parameter.shape[-1] ** -0.5, generator=generator)
    model.save_pretrained(path)
    write(path, config)  # as it was: the one that was just written leaves nothing out
    loaded = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    own = load_model(path, torch.float32)
    ids = torch.arange(24)[None] * 7 % 96
    with torch.no_grad():
        found = own.logits(own(ids, torch.arange(24)[None])).log_softmax(-1)
        wanted = loaded(ids).logits[0].log_softmax(-1)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("kind", "name"), LEFT_OUT)
def test_a_field_that_is_left_out_has_transformers_default(
    kind: str, name: str, tmp_path: Path
) -> None:
    config = KINDS[kind] | BESIDE.get((kind, name), {})
    del config[name]
    check_alike(tmp_path / "model", config)


@pytest.mark.parametrize(
    ("kind", "change"),
    [(kind, c) for kind, _, c in CHANGES],
    ids=[f"{k} {n}" for k, n, _ in CHANGES],
)
def test_other_spellings_are_read_as_transformers_does(
    kind: str, change: dict[str, Any], tmp_path: Path
) -> None:
    check_alike(tmp_path / "model", KINDS[kind] | change)


def test_a_mixture_without_head_dim_shares_the_width_among_the_heads(tmp_path: Path) -> None:
    config = {k: v for k, v in KINDS["qwen3_moe"].items() if k != "head_dim"}
    found = read_architecture(write(tmp_path, config | {"hidden_size": 64}))
    assert found.head_dim == 16


BOTH = "qwen3 qwen3_moe"
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    (BOTH, {"attention_bias": True}, "attention_bias"),
    (BOTH, {"hidden_act": "gelu"}, "activation gelu"),
    (BOTH, {"rope_scaling": {"type": "yarn", "factor": 2.0}}, r"scaled rotary .*rope_type yarn"),
    (BOTH, {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "rope_type linear"),
    (BOTH, {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type dynamic"),
    (BOTH, {"rope_parameters": {"full_attention": {"rope_theta": 3.0}}}, "by kinds of layers"),
    (BOTH, {"rope_parameters": None, "rope_theta": None}, "rope_theta is null"),
    (BOTH, {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
    (BOTH, {"head_dim": None}, "head_dim is null, and must be a whole number, or left out"),
    (BOTH, {"head_dim": 7}, "head_dim is 7, and must be even"),
    (BOTH, {"vocab_size": None}, "vocab_size is null"),
    (BOTH, {"vocab_size": 96.0}, "vocab_size is 96.0"),
    (BOTH, {"hidden_size": "16"}, 'hidden_size is "16"'),
    (BOTH, {"tie_word_embeddings": None}, "tie_word_embeddings is null, and must be true or false"),
    (BOTH, {"num_hidden_layers": True}, "num_hidden_layers is true"),
    (BOTH, {"num_hidden_layers": 0, "layer_types": None}, "num_hidden_layers is 0"),
    (BOTH, {"layer_types": ["full_attention"]}, "must name all 2 layers"),
    (BOTH, {"layer_types": ["full_attention", "sliding_attention"]}, "layers of sliding_attention"),
    (BOTH, {"layer_types": ["linear_attention"] * 2}, "layers of linear_attention"),
    (BOTH, {"per_layer_config": {"0": {"head_dim": 4}}}, "per_layer_config"),
    (BOTH, {"architectures": ["LlamaForCausalLM"]}, "LlamaForCausalLM, and its model_type is qwen"),
    (BOTH, {"model_type": "llama"}, "model_type llama"),
    (BOTH, {"model_type": None}, "does not say its model_type"),
    (BOTH, {"transformers_weights": "other.safetensors"}, "transformers_weights"),
    (BOTH, {"quantization_config": {"quant_method": "fp8"}}, "quantised weights .*: fp8"),
    (BOTH, {"vision_config": {"depth": 2}}, "more than text .*vision_config"),
    (BOTH, {"text_config": {}, "decoder": {}}, "several language models"),
    (
        "qwen3",
        {
            "use_sliding_window": True,
            "sliding_window": 4,
            "layer_types": None,
            "max_window_layers": 1,
        },
        "sliding-window attention .*4",
    ),
    (
        "qwen3_moe",
        {"use_sliding_window": True, "sliding_window": 4},
        "sliding-window attention .*4",
    ),
    ("qwen3_moe", {"num_key_value_heads": None}, "num_key_value_heads is null"),
    ("qwen3_moe", {"norm_topk_prob": None}, "norm_topk_prob is null"),
    ("qwen3_moe", {"num_experts": 0}, "num_experts is 0"),
    ("qwen3_moe", {"num_experts_per_tok": 17}, "17, more than the 16"),
    ("qwen3_moe", {"mlp_only_layers": [1]}, r"mixes dense and sparse .*\[1\]"),
    ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step 2"),
    ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step is 0"),
    ("qwen3_moe", {"shared_expert_intermediate_size": 8}, "shared_expert_intermediate_size 8"),
]


@pytest.mark.parametrize(
    ("kind", "change", "names"),
    [(kind, change, names) for kinds, change, names in REFUSED for kind in kinds.split()],
)
def test_what_our_model_does_not_do_is_refused_by_name(
    kind: str, change: dict[str, Any], names: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=names):
        read_architecture(write(tmp_path, KINDS[kind] | change))


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"7", b"\xff\xfe{}"])
def test_a_config_that_is_no_json_object_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(InputError, match=r"config.json (is not JSON|holds no JSON object)"):
        read_architecture(tmp_path)


def test_a_decoder_under_text_config_is_found(tmp_path: Path) -> None:
    whole = {"model_type": "wrapper", "text_config": KINDS["qwen3_moe"]}
    plain = read_architecture(write(tmp_path / "plain", KINDS["qwen3_moe"]))
    assert read_architecture(write(tmp_path / "wrapped", whole)) == plain
    assert text_config(whole) is whole["text_config"]
    assert text_config({"vocab_size": 9, "generator": "someone"})["vocab_size"] == 9
    config = AutoConfig.for_model("gemma3")  # one with a part for text and one for images
    assert text_config(config.to_dict())["vocab_size"] == config.get_text_config().vocab_size


POSITIONS: list[tuple[dict[str, Any], int | None]] = [
    ({"max_position_embeddings": 100}, 100),
    ({}, None),
    ({"model_type": "qwen3"}, 32768),
    ({"model_type": "qwen3_moe", "max_position_embeddings": 100}, 100),
    ({"n_positions": 100}, 100),
    ({"max_position_embeddings": 100, "seq_length": 50}, 50),
    ({"max_position_embeddings": 100, "model_max_length": 500}, 500),
    ({"model_type": "outer", "text_config": {"max_position_embeddings": 100}}, 100),
    ({"max_position_embeddings": 100, "rope_scaling": {"type": "linear", "factor": 2.0}}, 200),
    (
        {"max_position_embeddings": 100, "rope_parameters": {"rope_type": "dynamic", "factor": 2}},
        200,
    ),
    ({"max_position_embeddings": 100, "rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, 100),
    ({"max_position_embeddings": 100, "rope_scaling": {"rope_type": "longrope", "factor": 2}}, 100),
    ({"max_position_embeddings": 100, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, 100),
    ({"max_position_embeddings": 100, "rope_scaling": {"type": "linear", "factor": None}}, 100),
    (
        {
            "max_position_embeddings": 100,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0},
                "sliding_attention": {"rope_type": "default"},
            },
        },
        800,
    ),
    (
        {
            "model_type": "gemma3",
            "text_config": {
                "model_type": "gemma3_text",
                "max_position_embeddings": 100,
                "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            },
        },
        100,
    ),
]


@pytest.mark.parametrize(("config", "expected"), POSITIONS)
def test_positions_are_counted_as_vllm_does(config: dict[str, Any], expected: int | None) -> None:
    assert max_positions(config) == expected


def test_the_directory_of_a_run_is_refused_and_its_export_asked_for(tmp_path: Path) -> None:
    write(tmp_path, {"name": "own", "stage": {}})  # as a run writes its own
    (tmp_path / "export").mkdir()
    write(tmp_path / "export", KINDS["qwen3"])
    with pytest.raises(InputError) as refusal:
        read_architecture(tmp_path)
    assert str(refusal.value) == (
        f"{tmp_path} is the directory of a run and has no weights: did you mean "
        f"{tmp_path / 'export'}?"
    )
    (tmp_path / "config.json").unlink()
    with pytest.raises(InputError, match="did you mean"):
        read_architecture(tmp_path)
    read_architecture(tmp_path / "export")
