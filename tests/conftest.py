"""A small world on disk: tokenizer, conversations, and models of the family with random weights."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from marco_train.config import TrainConfig, to_run
from marco_train.config.architecture import ArchitectureConfig
from marco_train.config.model import ChatTemplate, DType, ModelConfig
from marco_train.config.opd import Objective, TopKSource
from marco_train.config.teacher import (
    HFTeacherConfig,
    NativeTeacherConfig,
    TeacherBackend,
    TeacherConfig,
    VLLMServerTeacherConfig,
    VLLMTeacherConfig,
)
from marco_train.data.chat import CHATML, load_tokenizer
from marco_train.data.chat import Tokenizer as ChatTokenizer
from marco_train.models.hf_io import save_model
from marco_train.models.weights import random_model
from marco_train.teachers.base import ScoreSpec
from marco_train.train import CONFIG_DIR

os.environ["TOKENIZERS_PARALLELISM"] = "false"
torch.set_num_threads(1)

CATEGORIES = ["instruction_following", "knowledge_reasoning", "alignment", "math", "multilingual"]
VOCAB_SIZE = 320


def architecture(**changes: Any) -> ArchitectureConfig:
    """A mixture of two layers and eight experts, or what the changes make of it."""
    fields: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "intermediate_size": 64,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e4,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
    }
    return ArchitectureConfig(**fields | changes)


DENSE = {"num_experts": None, "num_experts_per_tok": None, "moe_intermediate_size": None}


def make_tokenizer(path: Path, corpus: list[str], vocab_size: int = VOCAB_SIZE) -> None:
    """Train a byte-level tokenizer with the ChatML template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d| ?[^\s\d]+|\s+"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=specials,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    fast.chat_template = CHATML.read_text()
    fast.save_pretrained(path)


@dataclass(frozen=True)
class World:
    """Where everything lies."""

    root: Path

    def path(self, *parts: str) -> str:
        """A path under the root."""
        return str(self.root.joinpath(*parts))


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep what launches would find again apart from what the machine's user keeps."""
    os.environ["MARCO_TRAIN_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("world")
    numbers = ["one", "two", "three", "vier", "cinq", "seis"]
    for split in ("train", "development", "test"):
        (root / "data" / split).mkdir(parents=True)
        for category in CATEGORIES:
            rows = [
                {
                    "messages": [
                        {"role": "user", "content": f"{split} {category} {n}?"},
                        {"role": "assistant", "content": f"{word} {n}"},
                    ],
                    "category": category,
                    "language": "en",
                    "verifier": {"name": "exact"},
                }
                for n in range(12)
                for word in [numbers[n % len(numbers)]]
            ]
            file = root / "data" / split / f"{category}.jsonl"
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    corpus = [
        f"{split} {c} {w}" for split in ("train", "test") for c in CATEGORIES for w in numbers
    ]
    tokenizer = root / "data" / "tokenizer"
    make_tokenizer(tokenizer, corpus)
    shapes = {
        "student": architecture(),
        "sft/export": architecture(),
        "teacher_first/export": architecture(**DENSE),
        "teacher_second/export": architecture(**DENSE, hidden_size=48, head_dim=16),
    }
    for seed, (name, shape) in enumerate(shapes.items()):
        save_model(random_model(shape, torch.float32, seed), root / name, tokenizer)
    return World(root)


def wanted_of(
    objective: Objective,
    top_k: int = 0,
    top_k_source: TopKSource = TopKSource.sampler,
    vocab_size: int = VOCAB_SIZE,
) -> ScoreSpec:
    """What a run of the world's student needs of a teacher; its turns end with token 2."""
    return ScoreSpec(objective, top_k, top_k_source, vocab_size, max_length=200, stop_id=2)


TEACHERS: dict[TeacherBackend, tuple[type[TeacherConfig], dict[str, Any]]] = {
    TeacherBackend.hf: (HFTeacherConfig, {"max_tokens_per_batch": 4096}),
    TeacherBackend.native: (
        NativeTeacherConfig,
        {"max_tokens_per_batch": 4096, "expert_parallel_size": 1},
    ),
    TeacherBackend.vllm: (
        VLLMTeacherConfig,
        {"max_tokens_per_batch": 4096, "kv_cache_gib": 0.0625},
    ),
    TeacherBackend.vllm_server: (VLLMServerTeacherConfig, {}),
}


def teacher_config(path: str, backend: TeacherBackend, **changes: Any) -> TeacherConfig:
    """A teacher in float32, or what the changes make of it."""
    kind, own = TEACHERS[backend]
    return kind(**{"path": path, "dtype": DType.float32} | own | changes)


def tokenizer_of(
    path: str | Path, template: ChatTemplate = ChatTemplate.tokenizer, **template_kwargs: Any
) -> ChatTokenizer:
    """A run's tokenizer, without a run."""
    cfg = ModelConfig(
        path="weights",
        tokenizer=str(path),
        chat_template=template,
        chat_template_kwargs=template_kwargs,
        dtype=DType.float32,
    )
    return load_tokenizer(cfg)


Compose = Callable[..., TrainConfig]


def compose_config(experiment: str, *overrides: str) -> TrainConfig:
    """Compose and check a config as the command line does."""
    with initialize_config_dir(version_base="1.3", config_dir=str(CONFIG_DIR)):
        composed = compose("train", overrides=[f"experiment={experiment}", *overrides])
    return to_run(composed)


def launch(*overrides: str) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "marco_train.train", *overrides],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[1],
        env={k: v for k, v in os.environ.items() if k not in {"RANK", "WORLD_SIZE"}},
    )


# What makes AdamW plain gradient descent with rate 1: Adam's own scaling would hide a gradient
# that is wrong by a factor. m = g, v = g^2, and g / (|g| + eps) * eps = g for a large eps.
GRADIENT_DESCENT = [
    "optim.learning_rate=1e6",
    "optim.min_learning_rate=1e6",
    "optim.schedule=constant",
    "optim.warmup_steps=0",
    "optim.eps=1e6",
    "optim.beta1=0.0",
    "optim.beta2=0.0",
    "optim.weight_decay=0.0",
    "optim.clip_norm=1e9",
]
