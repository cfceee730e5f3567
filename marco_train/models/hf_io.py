"""Hugging Face directories in and out; a rank reads and writes its own experts only."""

import json
import math
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from marco_train.architecture import ArchitectureConfig, read_architecture
from marco_train.distributed import gather_objects, is_main, rank, world_size
from marco_train.errors import InputError
from marco_train.models.qwen3_moe import Qwen3Moe
from marco_train.models.safetensors_io import (
    DTYPES,
    ShardFile,
    StoredTensor,
    read,
    read_header,
    read_into,
)
from marco_train.models.weights import (
    FUSED,
    empty_model,
    local_weights,
    meta_model,
    name_first,
    weight_shapes,
)
from marco_train.resumption import field_difference

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

    Raises:
        InputError: Another architecture, or weights that do not fit it; see `stored_weights`.
    """
    architecture = read_architecture(path)
    stored = stored_weights(path, architecture)
    model = empty_model(architecture, dtype, ep_group)
    for name, weight in local_weights(model):
        read_into(stored[name], weight)
    return model


def stored_weights(path: str | Path, architecture: ArchitectureConfig) -> dict[str, StoredTensor]:
    """Find every weight of a checkpoint, and check them all by the files' headers.

    Experts may be stored each on its own or fused as transformers v5 holds them in memory
    (`mlp.experts.gate_up_proj`), which is cut into views of single experts.

    Raises:
        InputError: A file is absent or cut short, or weights are missing, doubled, unknown,
            misshapen or of a type other than float32, bfloat16 and float16; the first ten of each
            are named.
    """
    path = Path(path)
    found: list[tuple[str, StoredTensor]] = []
    for file in _weight_files(path):
        for name, tensor in read_header(file).items():
            if FUSED.match(name) and tensor.dtype in DTYPES and len(tensor.shape) == 3:
                found += _split_stored(name, tensor)
            elif name != "lm_head.weight" or not architecture.tie_word_embeddings:
                found.append((name, tensor))  # a tied head is a copy of the embeddings
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


# Keys of config.json under which a model's logits are more than hidden states times head.
LOGIT_TRANSFORMS = ("final_logit_softcapping", "logit_scale", "logits_scaling")


def read_head(path: str | Path) -> Tensor:
    """Read the output head [V, D] of any causal language model, in the type it is stored in.

    Raises:
        InputError: It has none, or its logits are more than hidden states times head.
    """
    path = Path(path)
    config = json.loads((path / "config.json").read_text())
    stored = {name: t for file in _weight_files(path) for name, t in read_header(file).items()}
    more = [key for key in LOGIT_TRANSFORMS if config.get(key) not in {None, 1}]
    more += [name for name in stored if name == "lm_head.bias"]
    if more:
        raise InputError(f"{path} transforms its logits ({', '.join(more)}), unsupported here")
    names = ["lm_head.weight", "model.embed_tokens.weight"]  # the latter, where both are tied
    found = [stored[name] for name in names if name in stored]
    if not found:
        raise InputError(f"{path} has neither of the weights {' and '.join(names)}")
    return read(found[0])


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


def _weight_files(path: Path) -> list[Path]:
    index = path / INDEX
    names = [WEIGHTS]
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError) as error:
            raise InputError(f"{index} is no index of weights: {error}") from error
    absent = [name for name in names if not (path / name).is_file()]
    if absent:
        raise InputError(f"{path} lacks the weight files {name_first(absent)}")
    return [path / name for name in names]


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
) -> None:
    """Write a complete Hugging Face directory; an interrupted write leaves none under `path`.

    Every rank takes part and writes its own `weights`, all into the same files: the directory is
    the same, byte for byte, from any number of ranks.

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
            if path.exists():
                shutil.rmtree(path)
            partial.rename(path)


@contextmanager
def _told_by_any_rank(partial: Path) -> Iterator[None]:
    """Raise on every rank what went wrong on one; else the others would wait for it."""
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
    tokenizer = json.loads((Path(tokenizer_dir) / "tokenizer.json").read_text())
    added = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
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
