"""Hugging Face directories in and out, and the stream of named weights both are made of.

A stream is pairs of (checkpoint name, tensor) with one 2-D tensor per expert matrix, as the hub
stores them: `model.layers.0.mlp.experts.7.gate_proj.weight`. Export, load and the hand-over of
weights to a sampler all go through it.
"""

import json
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from marco_train.architecture import ArchitectureConfig, InputError, read_architecture
from marco_train.config import field_difference
from marco_train.distributed import barrier, device, is_main
from marco_train.models.qwen3_moe import Qwen3Moe

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
FUSED = re.compile(r"(.*\.mlp\.experts)\.(gate_up_proj|down_proj)$")
PER_EXPERT = re.compile(r"(.*\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.weight$")


def named_weights(model: Qwen3Moe) -> Iterator[tuple[str, Tensor]]:
    """Stream the whole model under checkpoint names; every rank of the group takes part.

    At most one layer's experts of one matrix are gathered at a time. A tied head is absent.
    """
    for name, parameter in model.named_parameters():
        weight = parameter.detach()
        fused = FUSED.match(name)
        if fused is None:
            yield name, weight
            continue
        prefix, matrix = fused.groups()
        for expert, whole in enumerate(_gather_experts(weight, model.ep_group)):
            if matrix == "down_proj":
                yield f"{prefix}.{expert}.down_proj.weight", whole
            else:
                gate, up = whole.chunk(2)
                yield f"{prefix}.{expert}.gate_proj.weight", gate
                yield f"{prefix}.{expert}.up_proj.weight", up


def _gather_experts(local: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Join every rank's experts, [e, ...] -> [E, ...]."""
    if group is None:
        return local
    parts = [torch.empty_like(local) for _ in range(group.size())]
    dist.all_gather(parts, local.contiguous(), group=group)
    return torch.cat(parts)


class WeightReceiver:
    """Copies a stream of named weights into a model and accounts for every one of them."""

    def __init__(self, model: Qwen3Moe) -> None:
        self._targets = dict(model.named_parameters())
        cfg = model.architecture
        self._num_experts = cfg.num_experts or 0
        ep_size = 1 if model.ep_group is None else model.ep_group.size()
        ep_rank = 0 if model.ep_group is None else model.ep_group.rank()
        num_local = self._num_experts // ep_size
        self._mine = range(ep_rank * num_local, (ep_rank + 1) * num_local)
        self._tied = cfg.tie_word_embeddings
        self._waiting = set(self.expected_names())

    def expected_names(self) -> Iterator[str]:
        """List the names of a complete stream."""
        for name in self._targets:
            fused = FUSED.match(name)
            if fused is None:
                yield name
                continue
            matrices = ("down",) if fused[2] == "down_proj" else ("gate", "up")
            for expert in range(self._num_experts):
                for matrix in matrices:
                    yield f"{fused[1]}.{expert}.{matrix}_proj.weight"

    def wants(self, name: str) -> bool:
        """Whether this rank keeps the tensor; other ranks' experts need not be read."""
        found = PER_EXPERT.match(name)
        return found is None or int(found[2]) in self._mine

    def skip(self, name: str) -> None:
        """Account for a tensor that this rank does not keep."""
        self._account(name)

    def receive(self, name: str, tensor: Tensor) -> None:
        """Copy one tensor to its place.

        Raises:
            InputError: The name is unknown or came before, or the shape differs.
        """
        if self._tied and name == "lm_head.weight":
            return  # a copy of the embeddings
        fused = FUSED.match(name)
        if fused is not None:  # transformers v5 in memory: all experts in one tensor
            self._receive_fused(fused[1], fused[2], tensor)
            return
        self._account(name)
        if not self.wants(name):
            return
        target = self._target(name)
        if target.shape != tensor.shape:
            raise InputError(
                f"{name} has shape {tuple(tensor.shape)}, and the model expects "
                f"{tuple(target.shape)}"
            )
        target.copy_(tensor)

    def finish(self) -> None:
        """Refuse a stream that ended early.

        Raises:
            InputError: Weights are missing; the first ten are named.
        """
        if self._waiting:
            missing = sorted(self._waiting)
            raise InputError(f"{len(missing)} weights are missing: {', '.join(missing[:10])}")

    def _account(self, name: str) -> None:
        if name not in self._waiting:
            raise InputError(f"{name} is not a weight of this model, or came twice")
        self._waiting.remove(name)

    def _target(self, name: str) -> Tensor:
        found = PER_EXPERT.match(name)
        if found is None:
            return self._targets[name].detach()
        prefix, expert, matrix = found[1], int(found[2]) - self._mine.start, found[3]
        if matrix == "down":
            return self._targets[f"{prefix}.down_proj"].detach()[expert]
        gate, up = self._targets[f"{prefix}.gate_up_proj"].detach()[expert].chunk(2)
        return gate if matrix == "gate" else up

    def _receive_fused(self, prefix: str, matrix: str, tensor: Tensor) -> None:
        for expert, whole in enumerate(tensor):
            if matrix == "down_proj":
                self.receive(f"{prefix}.{expert}.down_proj.weight", whole)
            else:
                gate, up = whole.chunk(2)
                self.receive(f"{prefix}.{expert}.gate_proj.weight", gate)
                self.receive(f"{prefix}.{expert}.up_proj.weight", up)


def receive_weights(model: Qwen3Moe, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Fill a model from a complete stream; see `WeightReceiver`."""
    receiver = WeightReceiver(model)
    for name, tensor in weights:
        receiver.receive(name, tensor)
    receiver.finish()


def empty_model(
    architecture: ArchitectureConfig, dtype: torch.dtype, ep_group: dist.ProcessGroup | None
) -> Qwen3Moe:
    """Allocate this rank's share of a model on its device, uninitialised."""
    with torch.device("meta"):
        model = Qwen3Moe(architecture, ep_group).to(dtype)
    return model.to_empty(device=device())


def load_model(
    path: str | Path, dtype: torch.dtype, ep_group: dist.ProcessGroup | None = None
) -> Qwen3Moe:
    """Read this rank's share of a Hugging Face directory, one tensor at a time.

    Raises:
        InputError: Another architecture, or weights that are missing, unknown or misshapen.
    """
    path = Path(path)
    model = empty_model(read_architecture(path), dtype, ep_group)
    receiver = WeightReceiver(model)
    for file in _weight_files(path):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a dictionary
                if receiver.wants(name):
                    receiver.receive(name, tensors.get_tensor(name))
                else:
                    receiver.skip(name)
    receiver.finish()
    return model


def _weight_files(path: Path) -> list[Path]:
    index = path / INDEX
    names = [WEIGHTS]
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    absent = [name for name in names if not (path / name).is_file()]
    if absent:
        raise InputError(f"{path} lacks the weight files {', '.join(absent[:10])}")
    return [path / name for name in names]


# Spread of the embeddings and gain of the layers that write to the residual stream, found to
# start a two-layer model's copying about a third sooner than a uniform 0.02.
EMBEDDING_STD = 0.1
RESIDUAL_GAIN = 0.4


def random_model(
    architecture: ArchitectureConfig,
    dtype: torch.dtype,
    seed: int,
    ep_group: dist.ProcessGroup | None = None,
) -> Qwen3Moe:
    """Initialise a model at random: matrices N(0, 1 / fan-in); the same on any number of ranks."""
    generator = torch.Generator().manual_seed(seed)
    whole = Qwen3Moe(architecture)
    for name, parameter in whole.named_parameters():
        if parameter.dim() == 1:
            nn.init.ones_(parameter)
        elif "embed_tokens" in name:
            nn.init.normal_(parameter, std=EMBEDDING_STD, generator=generator)
        else:
            gain = RESIDUAL_GAIN if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
            gain = RESIDUAL_GAIN if name.endswith("experts.down_proj") else gain
            std = gain * parameter.shape[-1] ** -0.5
            nn.init.normal_(parameter, std=std, generator=generator)
    model = empty_model(architecture, dtype, ep_group)
    receive_weights(model, named_weights(whole))
    return model


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


class ShardWriter:
    """Collects a stream into safetensors shards of bounded size and writes their index."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._shards: list[list[str]] = []
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._total_bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Take one tensor; write a shard when enough came."""
        if self._pending_bytes + tensor.nbytes > SHARD_BYTES and self._pending:
            self._flush()
        self._pending[name] = tensor.to("cpu", copy=True).contiguous()
        self._pending_bytes += tensor.nbytes
        self._total_bytes += tensor.nbytes

    def close(self) -> None:
        """Write what is left, give the shards their final names, and write the index."""
        self._flush()
        count = len(self._shards)
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self._shards):
            final = WEIGHTS if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"
            (self._directory / f"shard-{number}").rename(self._directory / final)
            weight_map |= dict.fromkeys(names, final)
        if count > 1:
            index = {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map}
            (self._directory / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True))

    def _flush(self) -> None:
        shard = self._directory / f"shard-{len(self._shards)}"
        save_file(self._pending, shard, metadata={"format": "pt"})
        self._shards.append(list(self._pending))
        self._pending, self._pending_bytes = {}, 0


def write_directory(
    path: Path,
    architecture: ArchitectureConfig,
    dtype: torch.dtype,
    weights: Iterable[tuple[str, Tensor]],
    tokenizer_dir: Path | None,
    chat_template: str | None = None,
) -> None:
    """Write a complete Hugging Face directory; an interrupted write leaves none under `path`."""
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    writer = ShardWriter(partial)
    for name, tensor in weights:
        writer.add(name, tensor)
    writer.close()
    (partial / "config.json").write_text(json.dumps(hf_config(architecture, dtype), indent=2))
    if tokenizer_dir is not None:
        for name in TOKENIZER_FILES:
            if (tokenizer_dir / name).is_file():
                shutil.copyfile(tokenizer_dir / name, partial / name)
        if chat_template is not None:
            _replace_chat_template(partial, chat_template)
        generation = _generation_config(tokenizer_dir)
        (partial / "generation_config.json").write_text(json.dumps(generation, indent=2))
    if path.exists():
        shutil.rmtree(path)
    partial.rename(path)


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
    """Write a Hugging Face directory; all ranks take part.

    Args:
        model: Its weights, gathered over the expert-parallel group.
        path: Where; replaced if it exists, once the new one is complete.
        tokenizer_dir: Where tokenizer files are copied from. None: there will be none.
        chat_template: Replaces the tokenizer's. None: its own.
    """
    weights = named_weights(model)
    if is_main():
        tokenizer = None if tokenizer_dir is None else Path(tokenizer_dir)
        dtype = next(model.parameters()).dtype
        write_directory(Path(path), model.architecture, dtype, weights, tokenizer, chat_template)
    else:
        for _ in weights:
            pass
    barrier()


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
