"""The shape of a dense Qwen3 or a Qwen3-MoE decoder, and what is refused about it.

config.json is read as transformers reads it: `model_type` decides the class, and a field that is
left out has that class's default. Imports no tensor library: a run is refused before one is loaded.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from marco_train.errors import InputError, require, require_positive


@dataclass(kw_only=True)
class ArchitectureConfig:
    """Shape of a dense Qwen3 or a Qwen3-MoE decoder, under transformers' field names."""

    vocab_size: int = MISSING
    hidden_size: int = MISSING
    num_hidden_layers: int = MISSING
    num_attention_heads: int = MISSING
    num_key_value_heads: int = MISSING
    head_dim: int = MISSING
    # Width of the dense MLP; in a mixture, only what config.json says of it.
    intermediate_size: int = MISSING
    # None: a dense model; the next two are then None as well.
    num_experts: int | None = None
    num_experts_per_tok: int | None = None
    moe_intermediate_size: int | None = None
    norm_topk_prob: bool = True
    rms_norm_eps: float = MISSING
    rope_theta: float = MISSING
    max_position_embeddings: int = MISSING
    tie_word_embeddings: bool = MISSING

    @property
    def is_moe(self) -> bool:
        """Whether every layer holds experts instead of one MLP."""
        return self.num_experts is not None

    def __post_init__(self) -> None:
        sizes = {
            name: value
            for name, value in asdict(self).items()
            if not isinstance(value, bool) and isinstance(value, int | float)
        }
        require_positive("model.architecture", **sizes)
        require(
            self.num_attention_heads % self.num_key_value_heads == 0,
            f"num_attention_heads {self.num_attention_heads} is not a multiple of "
            f"num_key_value_heads {self.num_key_value_heads}",
        )
        require(
            self.head_dim % 2 == 0,
            f"head_dim is {self.head_dim}, and must be even: rotary embeddings turn pairs",
        )
        moe = (self.num_experts, self.num_experts_per_tok, self.moe_intermediate_size)
        require(
            all(value is None for value in moe) or all(value is not None for value in moe),
            f"num_experts, num_experts_per_tok and moe_intermediate_size are {moe}; give all "
            "three (a mixture) or none (a dense model)",
        )
        if self.num_experts is not None and self.num_experts_per_tok is not None:
            for name in ("hidden_size", "moe_intermediate_size"):
                require(
                    getattr(self, name) % 8 == 0,
                    f"{name} {getattr(self, name)} is not a multiple of 8, which grouped matrix "
                    "products of bfloat16 need (rows of 16 bytes)",
                )
            require(
                self.num_experts_per_tok <= self.num_experts,
                f"num_experts_per_tok is {self.num_experts_per_tok}, more than the "
                f"{self.num_experts} experts",
            )


def check_expert_parallel(architecture: ArchitectureConfig, expert_parallel_size: int) -> None:
    """Refuse experts that cannot be shared evenly; a dense model has nothing to share."""
    if architecture.num_experts is None:
        require(
            expert_parallel_size == 1,
            f"parallel.expert_parallel_size is {expert_parallel_size}, but the model is dense and "
            "has no experts to share: set it to 1",
        )
        return
    divisors = [n for n in range(1, 65) if architecture.num_experts % n == 0]
    require(
        architecture.num_experts % expert_parallel_size == 0,
        f"parallel.expert_parallel_size {expert_parallel_size} does not divide the "
        f"{architecture.num_experts} experts; sizes that do: {divisors}",
    )


# transformers 5.19.0 (and 5.16.1): models/qwen3/configuration_qwen3.py and
# models/qwen3_moe/configuration_qwen3_moe.py. A mixture has no default of head_dim: its attention
# takes hidden_size // num_attention_heads.
_SHARED: dict[str, Any] = {
    "vocab_size": 151936,
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "use_sliding_window": False,
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "qwen3": _SHARED
    | {
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "intermediate_size": 22016,
        "max_window_layers": 28,
    },
    "qwen3_moe": _SHARED
    | {
        "hidden_size": 2048,
        "num_hidden_layers": 24,
        "num_key_value_heads": 4,
        "intermediate_size": 6144,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "norm_topk_prob": False,
        "decoder_sparse_step": 1,
    },
}
"""What a field that config.json leaves out stands at, by model_type."""
CLASSES = {"qwen3": "Qwen3ForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM"}
SLIDING_WINDOW = 4096  # both classes; null means that there is none
ROPE_THETA = 10_000.0  # modeling_rope_utils.py, RotaryEmbeddingConfigMixin
TYPES: dict[type, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
}


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        InputError: The file cannot be read, or holds something else.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file} is not JSON ({error}); fetch it again") from error
    require(isinstance(found, dict), f"{file} holds no JSON object; fetch it again")
    return dict(found)


def read_config(path: str | Path) -> dict[str, Any]:
    """Read the config.json of a model's directory.

    Raises:
        InputError: There is none, it is no JSON object, or the directory is a run's.
    """
    file, export = Path(path) / "config.json", Path(path) / "export"
    is_run = (export / "config.json").is_file() and not any(Path(path).glob("*.safetensors"))
    require(
        not is_run,
        f"{path} is the directory of a run and has no weights: did you mean {export}?",
    )
    if not file.is_file():
        refuse_adapter(path)
        raise InputError(f"no model at {str(path)!r}: {file} does not exist")
    config = read_json(file)
    for name in ("configuration_files", "transformers_weights"):
        require(
            config.get(name) is None,
            f"{file} sends its readers to other files ({name}), which not all of them follow: make "
            "them config.json and model.safetensors, and take that line out",
        )
    return config


def refuse_adapter(path: str | Path) -> None:
    """Refuse a directory that changes another model instead of holding one."""
    path = Path(path)
    require(
        not (path / "adapter_config.json").is_file(),
        f"{path} holds an adapter (adapter_config.json), no whole model: merge it into its base "
        'model first, with: python -c "from peft import AutoPeftModelForCausalLM as M; '
        f"M.from_pretrained('{path}', dtype='auto').merge_and_unload()"
        f".save_pretrained('{path}-merged')\", and copy the tokenizer's files there",
    )


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """Find the decoder's part of a config.json, as transformers' `get_text_config` does.

    Raises:
        InputError: There are several.
    """
    names = ("text_encoder", "decoder", "generator", "text_config")
    found = [name for name in names if isinstance(config.get(name), dict)]
    require(
        len(found) <= 1,
        f"config.json describes several language models ({', '.join(found)}): take a model of one",
    )
    part: dict[str, Any] = config[found[0]] if found else config
    return part


# A part of a config.json that describes an encoder of something else than text.
OTHER_SENSES = re.compile(r"vision|visual|image|video|audio|speech|thinker|talker")


def refuse_kind(config: dict[str, Any], file: Path) -> None:
    """Refuse a model that is quantised, or that reads more than text.

    Raises:
        InputError: Says what it is and what to take instead.
    """
    for part in (config, text_config(config)):
        for name in ("quantization_config", "compression_config"):
            found = part.get(name)
            if found is not None:
                method = found.get("quant_method") if isinstance(found, dict) else found
                raise InputError(
                    f"{file} describes quantised weights ({name}: {method or 'of no name'}), which "
                    "are not read here: take the model in bfloat16, or, as a teacher, the backend "
                    "vllm or vllm_server"
                )
    other = [
        name for name, v in config.items() if isinstance(v, dict) and OTHER_SENSES.search(name)
    ]
    other += [name for name in _classes(config) if name.endswith("ForConditionalGeneration")]
    require(
        not other,
        f"{file} describes a model that reads more than text or has an encoder "
        f"({', '.join(other)}), which is not read here: take a causal language model of text, or, "
        "as a teacher, the backend vllm or vllm_server",
    )


def read_architecture(path: str | Path) -> ArchitectureConfig:
    """Read the shape of a Qwen3 or Qwen3-MoE model from the config.json of its directory.

    Raises:
        InputError: There is none, or it asks for something that our model does not do.
    """
    file = Path(path) / "config.json"
    whole = read_config(path)
    refuse_kind(whole, file)
    config = text_config(whole)
    kind = _model_type(whole, config, file)
    found = {name: _field(config, name, kind, file) for name in DEFAULTS[kind]}
    is_moe = kind == "qwen3_moe"
    if is_moe:
        width = found["hidden_size"] // max(1, found["num_attention_heads"])
        found["head_dim"] = _typed(config.get("head_dim", width), int, f"{file}: head_dim")
    _refuse_unknown_layers(config, found, is_moe, file)
    found["rope_theta"] = _rope_theta(config, file)
    ours = {field.name for field in fields(ArchitectureConfig)}
    try:
        return ArchitectureConfig(**{name: v for name, v in found.items() if name in ours})
    except InputError as error:
        raise InputError(f"{file}: {error}") from error


def _classes(config: Mapping[str, Any]) -> list[str]:
    """Names of the classes that a checkpoint was written by."""
    found = config.get("architectures") or []
    return [str(name) for name in (found if isinstance(found, list) else [found])]


def _model_type(whole: Mapping[str, Any], config: Mapping[str, Any], file: Path) -> str:
    """Name the class of a model; as in transformers, `model_type` alone decides."""
    kind = config.get("model_type", whole.get("model_type"))
    classes = ", ".join(_classes(whole))
    supported = " and ".join(CLASSES.values())
    require(
        kind is not None,
        f"{file} does not say its model_type, by which it is read: add "
        f"{' or '.join(json.dumps(name) for name in CLASSES)}",
    )
    require(
        isinstance(kind, str) and kind in CLASSES,
        f"{file} describes {classes or 'a model'} of the model_type "
        f"{kind}; supported are {supported} (model_type {' and '.join(CLASSES)})",
    )
    # Others read `architectures` instead: a file that says both has to mean one thing.
    require(
        not classes or whole is not config or CLASSES[kind] in _classes(whole),
        f"{file} describes {classes}, and its model_type is {kind}; supported are {supported}",
    )
    return str(kind)


def _typed(value: Any, expected: type, owner: str) -> Any:
    """Pass on a value of a type; null is none, and true is no number."""
    fits = isinstance(value, int | float if expected is float else expected)
    require(
        fits and (expected is bool or not isinstance(value, bool)),
        f"{owner} is {json.dumps(value)}, and must be {TYPES[expected]}, or left out for "
        "transformers' default",
    )
    return value


def _field(config: Mapping[str, Any], name: str, kind: str, file: Path) -> Any:
    """A field, or the default of its class."""
    default = DEFAULTS[kind][name]
    if name == "num_experts" and "num_local_experts" in config:
        name = "num_local_experts"  # where both are given, the latter wins
    if name == "num_key_value_heads" and kind == "qwen3" and config.get(name, default) is None:
        return _field(config, "num_attention_heads", kind, file)
    return _typed(config.get(name, default), type(default), f"{file}: {name}")


def _refuse_unknown_layers(
    config: Mapping[str, Any], found: Mapping[str, Any], is_moe: bool, file: Path
) -> None:
    """Refuse layers that our model does not have."""
    require(
        found["hidden_act"] in {"silu", "swish"},  # two names of one function
        f"{file} asks for the activation {found['hidden_act']}; supported is silu",
    )
    require(not found["attention_bias"], f"{file} asks for attention_bias, which is not supported")
    require(
        not config.get("per_layer_config"),
        f"{file} asks for layers that differ (per_layer_config), which is not supported",
    )
    num_layers = found["num_hidden_layers"]
    kinds = config.get("layer_types")
    require(
        kinds is None or (isinstance(kinds, list) and len(kinds) == num_layers),
        f"{file}: layer_types is {json.dumps(kinds)}, and must name all {num_layers} layers",
    )
    other = sorted({str(name) for name in kinds or []} - {"full_attention", "attention"})
    require(
        not other,
        f"{file} asks for layers of {', '.join(other)} (layer_types); supported is full_attention",
    )
    window = config.get("sliding_window", SLIDING_WINDOW) if found["use_sliding_window"] else None
    # A dense model slides from a layer on, unless layer_types says otherwise; a mixture everywhere.
    slides = is_moe or (kinds is None and found["max_window_layers"] < num_layers)
    require(
        window is None or not slides,
        f"{file} asks for sliding-window attention (sliding_window {window}), which is not "
        "supported",
    )
    if is_moe:
        _refuse_unknown_experts(config, found, file)


def _refuse_unknown_experts(
    config: Mapping[str, Any], found: Mapping[str, Any], file: Path
) -> None:
    """Refuse a mixture with layers or experts that our model does not have."""
    for name in ("shared_expert_intermediate_size", "n_shared_experts", "num_shared_experts"):
        require(
            not config.get(name),
            f"{file} asks for shared experts ({name} {config.get(name)}), which are not supported",
        )
    step, only = found["decoder_sparse_step"], config.get("mlp_only_layers") or []
    require(
        step > 0 and isinstance(only, list),
        f"{file}: decoder_sparse_step is {step} and mlp_only_layers {json.dumps(only)}; give a "
        "number from 1 on, and a list",
    )
    layers = range(found["num_hidden_layers"])
    dense = [layer for layer in layers if layer in only or (layer + 1) % step != 0]
    require(
        not dense,
        f"{file} mixes dense and sparse layers (decoder_sparse_step {step}, mlp_only_layers "
        f"{only}), which is not supported",
    )


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a config says of its rotary embeddings; the older name wins."""
    found = config.get("rope_scaling") or config.get("rope_parameters") or {}
    return dict(found) if isinstance(found, dict) else {"rope_type": found}


def _rope_type(rope: Mapping[str, Any]) -> str:
    return str(rope.get("rope_type", rope.get("type")) or "default")


def _rope_theta(config: Mapping[str, Any], file: Path) -> float:
    """Base of plain rotary embeddings; any others are refused."""
    rope = _rope(config)
    nested = [name for name, value in rope.items() if isinstance(value, dict)]
    require(
        not nested,
        f"{file} gives rotary embeddings by kinds of layers ({', '.join(nested)}), which is not "
        "supported",
    )
    require(
        _rope_type(rope) == "default",
        f"{file} asks for scaled rotary embeddings (rope_type {_rope_type(rope)}), which are not "
        "supported: without them the model has the positions that it was trained with",
    )
    name = "partial_rotary_factor"
    part = rope.get(name, config.get(name))
    require(part in (None, 1), f"{file} turns a part of each head ({name} {part}): unsupported")
    theta = rope.get("rope_theta", config.get("rope_theta", ROPE_THETA))
    return float(_typed(theta, float, f"{file}: rope_theta"))


# vLLM 0.32.0, transformers_utils/model_arch_config_convertor.py: the smallest of these counts,
POSITIONS = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "seq_length",
    "model_max_length",
    "max_target_positions",
    "max_sequence_length",
    "max_seq_length",
    "seq_len",
)
# and config/model.py, _get_and_verify_max_len: what these kinds of scaling bring is in it already.
EXTENDED = {"su", "longrope", "llama3", "yarn", "deepseek_yarn", "deepseek_llama_scaling"}


def max_positions(config: dict[str, Any]) -> int | None:
    """Tokens of the longest sequence that a model can take, as vLLM counts them.

    Args:
        config: A config.json. What it leaves out is known of our own classes only.

    Returns:
        None where it does not say.
    """
    decoder = text_config(config)
    kind = str(decoder.get("model_type", config.get("model_type")))
    decoder = DEFAULTS.get(kind, {}) | decoder
    known = [decoder[name] for name in POSITIONS if isinstance(decoder.get(name), int | float)]
    if not known:
        return None
    limit = decoder.get("model_max_length") or min(known)
    rope = _rope(decoder)
    by_layer = [value for value in rope.values() if isinstance(value, dict)]
    factor = 1.0
    for each in by_layer or [rope]:
        if _rope_type(each) not in EXTENDED and isinstance(each.get("factor"), int | float):
            factor = each["factor"]
    return int(limit if "gemma3" in kind else limit * factor)


# Types of rotary embeddings that transformers scales by the longest sequence of a batch
# (modeling_rope_utils.py, dynamic_rope_update).
BY_BATCH = {"dynamic", "longrope", "su"}


def steady_positions(config: dict[str, Any]) -> int | None:
    """Tokens up to which a decoder's rotary embeddings do not depend on the length of its batch.

    None: they never do.
    """
    decoder = text_config(config)
    rope = _rope(decoder)
    parts = [value for value in rope.values() if isinstance(value, dict)] or [rope]
    found = [
        each.get("original_max_position_embeddings")
        or decoder.get("original_max_position_embeddings")
        or decoder.get("max_position_embeddings", 0)
        for each in parts
        if _rope_type(each) in BY_BATCH
    ]
    return min(map(int, found), default=None)
