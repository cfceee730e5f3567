"""Hugging Face directories in and out; a rank reads and writes its own experts only."""

import json
import math
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from marco_train.config import TrainConfig
from marco_train.config.architecture import (
    DEFAULTS,
    POSITIONS,
    ArchitectureConfig,
    max_positions,
    read_architecture,
    read_config,
    read_json,
    refuse_adapter,
    refuse_kind,
    steady_positions,
    text_config,
)
from marco_train.config.lengths import check_positions, longest_sequence
from marco_train.config.resumption import field_difference
from marco_train.config.stage import StageConfig
from marco_train.config.teacher import TeacherBackend, TeacherConfig
from marco_train.distributed import gather_objects, is_main, rank, world_size
from marco_train.errors import InputError, require
from marco_train.files import replace_directory
from marco_train.models.qwen3_moe import Qwen3Moe
from marco_train.models.tokenizer_files import read_tokenizer
from marco_train.models.weights import (
    FUSED,
    empty_model,
    local_weights,
    meta_model,
    name_first,
    refuse_broken,
    weight_shapes,
)
from marco_train.safetensors_io import (
    DTYPES,
    ShardFile,
    StoredTensor,
    read,
    read_header,
    read_into,
)

SHARD_BYTES = 4 * 2**30
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
TOKENIZER_FILES = [
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
]
PER_EXPERT = re.compile(r".*\.mlp\.experts\.(\d+)\.(?:gate|up|down)_proj\.weight$")
LAYER = re.compile(r"model\.layers\.(\d+)\.")


def load_model(
    path: str | Path, dtype: torch.dtype, ep_group: dist.ProcessGroup | None = None
) -> Qwen3Moe:
    """Read this rank's share of a Hugging Face directory, each tensor into its place.

    Every rank takes part.

    Raises:
        InputError: Another architecture, or weights that do not fit it (see `stored_weights`), or
            that are not finite.
    """
    architecture = read_architecture(path)
    stored = stored_weights(path, architecture)
    model = empty_model(architecture, dtype, ep_group)
    broken = []
    for name, weight in local_weights(model):
        read_into(stored[name], weight)
        if not weight.isfinite().all():
            broken.append(name)
    refuse_broken(broken, path, str(dtype).removeprefix("torch."))
    return model


def student_architecture(cfg: TrainConfig) -> ArchitectureConfig:
    """Shape of the student, from its files or from the config.

    Raises:
        InputError: Its files hold no such model, or it has too few positions for the stage.
    """
    if cfg.model.path is None:
        assert cfg.model.architecture is not None
        return cfg.model.architecture  # whose positions the config has compared
    found = read_architecture(cfg.model.path)
    stored_weights(cfg.model.path, found)
    check_positions(cfg.stage, found.max_position_embeddings, f"the student ({cfg.model.path})")
    return found


def stored_weights(path: str | Path, architecture: ArchitectureConfig) -> dict[str, StoredTensor]:
    """Find every weight of a checkpoint, and check them all by the files' headers.

    Experts may be stored each on its own or fused as transformers v5 holds them in memory
    (`mlp.experts.gate_up_proj`), which is cut into views of single experts.

    Raises:
        InputError: A file is absent or cut short, it holds no weights of ours (see
            `check_checkpoint`), or weights are missing, doubled, unknown, misshapen or of a type
            other than float32, bfloat16 and float16; the first ten of each are named.
    """
    path = Path(path)
    check_checkpoint(path, TeacherBackend.native)
    found: list[tuple[str, StoredTensor]] = []
    for file in _weight_files(path):
        for name, tensor in read_header(file).items():
            if _is_fused(name, tensor):
                found += _split_stored(name, tensor)
            else:
                found.append((name, tensor))
    if architecture.tie_word_embeddings:
        found = _tied(found, path)
    stored = dict(found)
    shapes = weight_shapes(meta_model(architecture))
    mistakes = {
        "come twice": [name for name, times in Counter(n for n, _ in found).items() if times > 1],
        "are missing": [name for name in shapes if name not in stored],
        "are not of this model": [name for name in stored if name not in shapes],
        "have another shape than config.json says": [
            f"{name} {list(stored[name].shape)}, not {list(shape)}"
            for name, shape in shapes.items()
            if name in stored and stored[name].shape != shape
        ],
        f"are not stored as one of {', '.join(DTYPES)}": [
            f"{name} {tensor.dtype}" for name, tensor in found if tensor.dtype not in DTYPES
        ],
    }
    said = [f"{len(bad)} {what}: {name_first(bad)}" for what, bad in mistakes.items() if bad]
    if said:
        raise InputError(f"weights under {path} do not fit its config.json; {'; '.join(said)}")
    return stored


HEADS = ("lm_head.weight", "language_model.lm_head.weight")
EMBEDDINGS = (
    "model.embed_tokens.weight",
    "model.language_model.embed_tokens.weight",
    "language_model.model.embed_tokens.weight",
)


def _tied(found: list[tuple[str, StoredTensor]], path: Path) -> list[tuple[str, StoredTensor]]:
    """Leave one of two copies, where a checkpoint holds both sides of a tied head.

    Raises:
        InputError: They differ: transformers then takes both, and vLLM the embeddings.
    """
    head = [tensor for name, tensor in found if name == HEADS[0]]
    rest = [(name, tensor) for name, tensor in found if name != HEADS[0]]
    embeddings = [tensor for name, tensor in rest if name == EMBEDDINGS[0]]
    if not head:
        return found
    if not embeddings:
        return [*rest, (EMBEDDINGS[0], head[0])]
    _refuse_other_head(head[0], embeddings[0], path)
    return rest


def _refuse_other_head(head: StoredTensor, embeddings: StoredTensor, path: Path) -> None:
    """Refuse a head that is stored beside the embeddings, tied to them, and another."""
    known = head.dtype in DTYPES and embeddings.dtype in DTYPES
    same = known and head.shape == embeddings.shape
    if same:
        one, other = read(head), read(embeddings)
        both = torch.promote_types(one.dtype, other.dtype)
        same = torch.equal(one.to(both), other.to(both))
    require(
        same,
        f"{path} ties its head to the embeddings (tie_word_embeddings), and holds a head that "
        "differs from them: set tie_word_embeddings to false in its config.json, or take "
        "lm_head.weight out of its weights",
    )


# Keys of config.json under which a model's logits are more than hidden states times head.
LOGIT_TRANSFORMS = (
    "final_logit_softcapping",
    "logit_scale",
    "logits_scaling",
    "lm_head_multiplier",
)
# Fields of any causal language model that are read here, and may be left to the class's default.
_READ = ("vocab_size", "tie_word_embeddings", "eos_token_id", *POSITIONS, *LOGIT_TRANSFORMS)


def decoder_config(path: str | Path) -> dict[str, Any]:
    """Read what the config.json of any causal language model says of its decoder.

    Where it leaves a field out that is read here, transformers' default stands for it, if
    transformers knows the class.

    Raises:
        InputError: There is none, or it is no JSON object.
    """
    config = read_config(path)
    decoder = text_config(config)
    kind = str(decoder.get("model_type", config.get("model_type")))
    tied = {name: value for name, value in config.items() if name == "tie_word_embeddings"}
    return _class_defaults(kind) | {"model_type": kind} | tied | decoder


def _class_defaults(kind: str) -> dict[str, Any]:
    if kind in DEFAULTS:
        return DEFAULTS[kind]
    # A second to import.
    from transformers import CONFIG_MAPPING

    if kind not in CONFIG_MAPPING:
        return {}
    known = CONFIG_MAPPING[kind]
    names = {name: known.attribute_map.get(name, name) for name in _READ}
    found = {name: getattr(known, attribute, None) for name, attribute in names.items()}
    return {n: v for n, v in found.items() if isinstance(v, int | float | list)}


def check_teacher_positions(stage: StageConfig, cfg: TeacherConfig, name: str) -> None:
    """Refuse a teacher that cannot take the longest sequence of a stage."""
    # vLLM makes a token after each sequence that it scores.
    num_extra = int(cfg.backend in {TeacherBackend.vllm, TeacherBackend.vllm_server})
    limit = max_positions(decoder_config(cfg.path))
    check_positions(stage, limit, f"{name} ({cfg.path})", num_extra)
    steady = steady_positions(decoder_config(cfg.path))
    longest = longest_sequence(stage)
    require(
        cfg.backend is not TeacherBackend.hf or steady is None or longest <= steady,
        f"{name} ({cfg.path}) has rotary embeddings that change once a sequence of the batch is "
        f"longer than {steady} tokens, and the stage allows {longest}: scores would depend on what "
        f"else is scored. Set the stage's lengths to {steady} or less in all, or take the backend "
        "vllm or vllm_server",
    )


def read_head(path: str | Path) -> Tensor:
    """Read the output head [V, D] of any causal language model, in the type it is stored in.

    Raises:
        InputError: It has none, or its logits are more than hidden states times head.
    """
    path = Path(path)
    config = decoder_config(path)
    stored = _read_headers(path)
    more = [key for key in LOGIT_TRANSFORMS if config.get(key) not in (None, 1)]
    more += [name for name in stored if name == "lm_head.bias"]
    if more:
        raise InputError(f"{path} transforms its logits ({', '.join(more)}), unsupported here")
    heads = [stored[name] for name in HEADS if name in stored]
    embeddings = [stored[name] for name in EMBEDDINGS if name in stored]
    if config.get("tie_word_embeddings"):
        if heads and embeddings:
            _refuse_other_head(heads[0], embeddings[0], path)
        heads += embeddings
    require(
        len(heads) > 0,
        f"{path} has no output head that is read here: none of the weights {', '.join(HEADS)}"
        + (
            f", nor, as it ties them, {', '.join(EMBEDDINGS)}"
            if config.get("tie_word_embeddings")
            else ""
        ),
    )
    head = heads[0]
    require(
        head.dtype in DTYPES,
        f"{path} stores its output head as {head.dtype}; read here are {', '.join(DTYPES)}: take "
        "stage.objective=sampled, or a teacher whose head is not quantised",
    )
    require(
        len(head.shape) == 2 and head.shape[0] == config.get("vocab_size"),
        f"{path} has an output head of {list(head.shape)}, and {config.get('vocab_size')} tokens "
        "(vocab_size) by its config.json",
    )
    found = read(head)
    require(
        bool(found.isfinite().all()),
        f"{path} has an output head with values that are not finite: the weights are broken",
    )
    return found


def _is_fused(name: str, tensor: StoredTensor) -> bool:
    """Whether a tensor holds the matrices of all experts, and can be cut into them."""
    found = FUSED.match(name)
    if found is None or tensor.dtype not in DTYPES or len(tensor.shape) != 3:
        return False
    return tensor.shape[0] > 0 and (found[2] == "down_proj" or tensor.shape[1] % 2 == 0)


def _split_stored(name: str, fused: StoredTensor) -> Iterator[tuple[str, StoredTensor]]:
    """Single experts' matrices of a fused tensor [E, ...]; the counterpart of `_split_experts`."""
    found = FUSED.match(name)
    assert found is not None
    prefix, matrix = found.groups()
    for expert in range(fused.shape[0]):
        whole = fused.part(expert, fused.shape[0]).without_first_dimension()
        if matrix == "down_proj":
            yield f"{prefix}.{expert}.down_proj.weight", whole
        else:
            yield f"{prefix}.{expert}.gate_proj.weight", whole.part(0, 2)
            yield f"{prefix}.{expert}.up_proj.weight", whole.part(1, 2)


PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}
OTHER_FORMATS = {".gguf", ".h5", ".msgpack", ".onnx", ".npz"}
# What training leaves beside a model, and nobody takes for its weights.
NO_WEIGHTS = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state).*")


def check_checkpoint(path: str | Path, backend: TeacherBackend) -> None:
    """Refuse, from the files alone, a directory whose model cannot be loaded as what it is.

    Args:
        path: Hugging Face directory.
        backend: What reads it; `native` is our own model. vLLM serves quantised models and models
            of images by itself, and `vllm_server` needs no weights here.

    Raises:
        InputError: An adapter, quantised weights, a model of more than text, weights as pickles or
            in another format, or none; says what it is and what to do.
    """
    path = Path(path)
    config = read_config(path)
    if backend is TeacherBackend.vllm_server:
        return
    refuse_adapter(path)
    if backend is not TeacherBackend.vllm:
        refuse_kind(config, path / "config.json")
    stored = _read_headers(path)
    if backend is TeacherBackend.vllm:
        _check_read_alike(path)
        return
    quantised = [
        f"{name} {tensor.dtype}"
        for name, tensor in stored.items()
        if tensor.dtype.startswith(("F8_", "F4", "F6_"))
        or ("weight" in name.rsplit(".", 1)[-1] and tensor.dtype not in {*DTYPES, "F64"})
    ]
    require(
        not quantised,
        f"weights under {path} are quantised: {len(quantised)} are not stored as one of "
        f"{', '.join(DTYPES)}: {name_first(quantised)}; take the model in bfloat16, or, as a "
        "teacher, the backend vllm or vllm_server",
    )
    if backend is TeacherBackend.hf:
        heads, embeddings = (
            [stored[n] for n in known if n in stored] for known in (HEADS, EMBEDDINGS)
        )
        if decoder_config(path).get("tie_word_embeddings") and heads and embeddings:
            _refuse_other_head(heads[0], embeddings[0], path)
        _check_read_by_transformers(path)


def _check_read_by_transformers(path: Path) -> None:
    """Refuse a config.json, or an index, at which transformers would fail."""
    # A second to import.
    from huggingface_hub.errors import StrictDataclassError
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    file = path / "config.json"
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (KeyError, OSError, TypeError, ValueError, StrictDataclassError) as error:
        said = " ".join(str(error).split())
        raise InputError(f"transformers cannot read {file}: {said}") from error
    require(
        type(config) in MODEL_FOR_CAUSAL_LM_MAPPING,
        f"{file} describes a {config.model_type}, which transformers has no causal language model "
        "for: take another teacher, or the backend vllm or vllm_server",
    )
    index = path / INDEX
    if not (path / WEIGHTS).is_file():
        require(
            isinstance(read_json(index).get("metadata"), dict),
            f'{index} has no "metadata", which transformers asks for: add "metadata": {{}}',
        )


def _read_headers(path: Path) -> dict[str, StoredTensor]:
    found = [pair for file in _weight_files(path) for pair in read_header(file).items()]
    doubled = [name for name, times in Counter(name for name, _ in found).items() if times > 1]
    require(
        not doubled,
        f"{len(doubled)} weights under {path} stand in several of its files: "
        f"{name_first(doubled)}; fetch the model again",
    )
    return dict(found)


def _weight_files(path: Path) -> list[Path]:
    """The files that hold the weights; a single file wins over an index, as in transformers.

    Source: transformers 5.19.0, modeling_utils.py, _get_resolved_checkpoint_files.
    """
    names = [WEIGHTS]
    if not (path / WEIGHTS).is_file():
        if not (path / INDEX).is_file():
            _refuse_other_formats(path)
        names = _indexed_files(path / INDEX)
    absent = [name for name in names if not (path / name).is_file()]
    if absent:
        raise InputError(f"{path} lacks the weight files {name_first(absent)}")
    return [path / name for name in names]


def _indexed_files(index: Path) -> list[str]:
    """Names of the files that an index spreads the weights over."""
    files = read_json(index).get("weight_map")
    require(
        isinstance(files, dict) and len(files) > 0,
        f"{index} is no index of weights: it has no weight_map; fetch it again",
    )
    assert isinstance(files, dict)
    names = sorted({str(name) for name in files.values()})
    strange = [
        name
        for name in names
        if Path(name).suffix != ".safetensors"
        or Path(name).is_absolute()
        or ".." in Path(name).parts
    ]
    require(
        not strange,
        f"{index} is no index of weights: it names {name_first(strange)}, and has to name "
        "safetensors files below its directory; fetch it again",
    )
    return names


def _refuse_other_formats(path: Path) -> None:
    """Say what a directory without safetensors files of a known name holds instead."""
    names = sorted(file.name for file in path.iterdir() if file.is_file())
    left = [name for name in names if not NO_WEIGHTS.fullmatch(name)]
    adapters = [name for name in left if name.startswith("adapter_model.")]
    require(
        not adapters,
        f"{path} holds an adapter ({', '.join(adapters)}), no whole "
        "model: merge it into its base model first",
    )
    shards = [name for name in left if name.endswith(".safetensors")]
    require(
        not shards,
        f"{path} holds {name_first(shards)}, and neither {WEIGHTS} nor {INDEX}, by which they are "
        "found: fetch the index, or rename a single file",
    )
    pickles = [name for name in left if Path(name).suffix in PICKLES]
    if any(name.startswith("pytorch_model") for name in pickles):
        raise InputError(
            f"{path} holds its weights as {name_first(pickles)}, and no pickle is loaded here, as "
            "it can run any program. If you trust it, write safetensors beside it, with: python -c "
            f'"from transformers import AutoModelForCausalLM as M; '
            f"M.from_pretrained('{path}', dtype='auto').save_pretrained('{path}')\""
        )
    require(
        not pickles,
        f"{path} holds its weights as {name_first(pickles)}, and no pickle is loaded here, as it "
        f"can run any program: convert it to a Hugging Face directory with {WEIGHTS}",
    )
    other = [name for name in left if Path(name).suffix in OTHER_FORMATS]
    require(
        not other,
        f"{path} holds its weights as {name_first(other)}, which is not read here: take the "
        "model's safetensors files, in bfloat16",
    )
    raise InputError(f"{path} has no weights: it lacks the weight files {WEIGHTS} or {INDEX}")


def _check_read_alike(path: Path) -> None:
    """Refuse a directory in which vLLM reads other files than transformers does.

    Source: vLLM 0.32.0, model_executor/model_loader: default_loader.py, _prepare_weights, and
    weight_utils.py, filter_duplicate_safetensors_files.
    """
    single, index = path / WEIGHTS, path / INDEX
    require(
        not (single.is_file() and index.is_file()),
        f"{path} holds {WEIGHTS} and {INDEX}: transformers takes the single file, and vLLM those "
        f"of the index: if the single file is the one you mean, delete {INDEX} and what it names, "
        f"else delete {WEIGHTS}",
    )
    files = set(_weight_files(path))
    theirs = set(path.glob("consolidated*.safetensors"))
    if not theirs:
        theirs = set(path.glob("*.safetensors"))
        theirs = theirs & files if index.is_file() else theirs
    other = sorted(str(file.relative_to(path)) for file in files ^ theirs)
    require(
        not other,
        f"vLLM and transformers do not read the same weights under {path}: delete "
        f"{name_first(other)}, or, if it is of the model, move it to where its other files lie",
    )


def hf_config(architecture: ArchitectureConfig, dtype: torch.dtype) -> dict[str, Any]:
    """Build the config.json of an architecture."""
    fields = asdict(architecture)
    theta = fields.pop("rope_theta")
    common = {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "dtype": str(dtype).removeprefix("torch."),
        "hidden_act": "silu",
        "rope_parameters": {"rope_theta": theta, "rope_type": "default"},
        "rope_theta": theta,
        "use_cache": True,
        "use_sliding_window": False,
    }
    if not architecture.is_moe:
        moe_only = ["num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob"]
        dense = {name: value for name, value in fields.items() if name not in moe_only}
        return dense | common | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
    # Some readers know num_experts, others num_local_experts, and each falls back to 128.
    return (
        fields
        | common
        | {
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            "num_local_experts": architecture.num_experts,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "router_aux_loss_coef": 0.001,  # the class default; no such loss is trained here
        }
    )


def write_directory(
    path: Path,
    architecture: ArchitectureConfig,
    dtype: torch.dtype,
    weights: Iterable[tuple[str, Tensor]],
    tokenizer_dir: Path | None,
    chat_template: str | None = None,
    notes: Mapping[str, Any] | None = None,
) -> None:
    """Write a complete Hugging Face directory; an interrupted write leaves none under `path`.

    Every rank takes part and writes its own `weights`, all into the same files: the directory is
    the same, byte for byte, from any number of ranks. `notes` are files of JSON beside them.

    Raises:
        InputError: A rank could not write, or the ranks do not share a file system.
    """
    partial = path.with_name(f".{path.name}.partial")
    shards = _plan_shards(partial, architecture, dtype)
    file_of_name = {name: shard for shard, names in shards.items() for name in names}
    files = {shard: ShardFile(partial / shard, dtype, names) for shard, names in shards.items()}
    with _told_by_any_rank(partial):
        if is_main():
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            for file in files.values():
                file.create()
    written: set[str] = set()
    with _told_by_any_rank(partial):
        for name, tensor in weights:
            assert name not in written, f"{name} came twice"
            files[file_of_name[name]].write(name, tensor)
            written.add(name)
        for shard in {file_of_name[name] for name in written}:
            files[shard].sync()
    missing = set(file_of_name) - set().union(*gather_objects(written))
    assert not missing, f"no rank wrote {name_first(sorted(missing))}"
    with _told_by_any_rank(partial):
        if is_main():
            _write_json_files(partial, architecture, dtype, shards, tokenizer_dir, chat_template)
            for name, note in (notes or {}).items():
                (partial / name).write_text(json.dumps(note, indent=2), encoding="utf-8")
            replace_directory(path, partial)


@contextmanager
def _told_by_any_rank(partial: Path) -> Iterator[None]:
    """Raise on every rank what went wrong on one: the others would wait for it for ever."""
    said = None
    try:
        yield
    except OSError as error:
        said = f"rank {rank()} could not write {partial}: {error}"
        if world_size() > 1:
            said += " (all ranks write to one file system, which they have to share)"
    failures = [text for text in gather_objects(said) if text is not None]
    if failures:
        raise InputError(failures[0])


def _plan_shards(
    partial: Path, architecture: ArchitectureConfig, dtype: torch.dtype
) -> dict[str, dict[str, tuple[int, ...]]]:
    """Cut the weights, in their order, into shards of bounded size: file -> name -> shape."""
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for name, shape in weight_shapes(meta_model(architecture)).items():
        num_bytes = math.prod(shape) * dtype.itemsize
        if shards[-1] and filled + num_bytes > SHARD_BYTES:
            shards.append({})
            filled = 0
        shards[-1][name] = shape
        filled += num_bytes
    if len(shards) == 1:
        return {WEIGHTS: shards[0]}
    return {
        f"model-{number:05d}-of-{len(shards):05d}.safetensors": names
        for number, names in enumerate(shards, 1)
    }


def _write_json_files(
    partial: Path,
    architecture: ArchitectureConfig,
    dtype: torch.dtype,
    shards: dict[str, dict[str, tuple[int, ...]]],
    tokenizer_dir: Path | None,
    chat_template: str | None,
) -> None:
    """Write everything but the weights."""
    if len(shards) > 1:
        sizes = [math.prod(shape) for names in shards.values() for shape in names.values()]
        index = {
            "metadata": {"total_size": sum(sizes) * dtype.itemsize},
            "weight_map": {name: shard for shard, names in shards.items() for name in names},
        }
        (partial / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True))
    (partial / "config.json").write_text(json.dumps(hf_config(architecture, dtype), indent=2))
    if tokenizer_dir is None:
        return
    for name in TOKENIZER_FILES:
        if (tokenizer_dir / name).is_file():
            shutil.copyfile(tokenizer_dir / name, partial / name)
    if chat_template is not None:
        _replace_chat_template(partial, chat_template)
    generation = _generation_config(tokenizer_dir)
    (partial / "generation_config.json").write_text(json.dumps(generation, indent=2))


def _replace_chat_template(directory: Path, chat_template: str) -> None:
    (directory / "chat_template.jinja").write_text(chat_template, encoding="utf-8")
    file = directory / "tokenizer_config.json"
    if file.is_file():
        config = json.loads(file.read_text(encoding="utf-8"))
        if config.pop("chat_template", None) is not None:
            file.write_text(json.dumps(config, indent=2, ensure_ascii=False), encoding="utf-8")


def stop_token_ids(tokenizer_dir: str | Path) -> list[int]:
    """Ids that end a response: `<|im_end|>` ends a turn, `<|endoftext|>` a document.

    A student that stops on one beside a teacher that stops on the other makes responses grow
    without end.

    Raises:
        InputError: The tokenizer has neither.
    """
    tokenizer = read_tokenizer(tokenizer_dir, "the tokenizer")
    added = {token["content"]: token["id"] for token in tokenizer.get("added_tokens") or []}
    found = [added[text] for text in ("<|im_end|>", "<|endoftext|>") if text in added]
    if not found:
        raise InputError(f"{tokenizer_dir} has neither <|im_end|> nor <|endoftext|> to stop at")
    return found


def _generation_config(tokenizer_dir: Path) -> dict[str, Any]:
    stop_ids = stop_token_ids(tokenizer_dir)
    return {
        "do_sample": True,
        "temperature": 1.0,
        "top_p": 1.0,
        "eos_token_id": stop_ids,
        "pad_token_id": stop_ids[-1],
    }


def save_model(
    model: Qwen3Moe,
    path: str | Path,
    tokenizer_dir: str | Path | None = None,
    chat_template: str | None = None,
) -> None:
    """Write a Hugging Face directory; all ranks take part, each writing some of its weights.

    Args:
        model: The same on every rank, or on every expert-parallel group.
        path: Where; replaced if it exists, once the new one is complete.
        tokenizer_dir: Where tokenizer files are copied from. None: there will be none.
        chat_template: Replaces the tokenizer's. None: its own.

    Raises:
        InputError: A rank could not write.
    """
    tokenizer = None if tokenizer_dir is None else Path(tokenizer_dir)
    dtype = next(model.parameters()).dtype
    mine = (pair for pair in local_weights(model) if _writer(model, pair[0]) == rank())
    write_directory(Path(path), model.architecture, dtype, mine, tokenizer, chat_template)


def _writer(model: Qwen3Moe, name: str) -> int:
    """The rank that writes a weight: layers take turns over all that hold it."""
    ep_size = 1 if model.ep_group is None else model.ep_group.size()
    found = LAYER.match(name)
    layer = 0 if found is None else int(found[1])
    replica = layer % max(1, world_size() // ep_size)  # groups are of neighbouring ranks
    expert = PER_EXPERT.match(name)
    if expert is None:
        return replica * ep_size + layer % ep_size
    assert model.architecture.num_experts is not None
    return replica * ep_size + int(expert[1]) * ep_size // model.architecture.num_experts


def check_architecture(path: str | Path, expected: ArchitectureConfig) -> None:
    """Refuse a directory whose config.json differs from what the run's config says.

    Raises:
        InputError: Names each field that differs.
    """
    differences = field_difference(asdict(expected), asdict(read_architecture(path)))
    if differences:
        raise InputError(
            f"the model at {str(path)!r} is not the one the config describes "
            f"(config -> model): {'; '.join(differences)}"
        )
