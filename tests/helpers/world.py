"""A small world on disk: tokenizer, conversations, and models of the family with random weights."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from marco_train.models.hf_io import save_model
from marco_train.models.weights import random_model
from tests.helpers.models import DENSE, WIDE, architecture
from tests.helpers.tokenizers import make_tokenizer

CATEGORIES = ["instruction_following", "knowledge_reasoning", "alignment", "math", "multilingual"]


@dataclass(frozen=True)
class World:
    """Where everything lies."""

    root: Path

    def path(self, *parts: str) -> str:
        """A path under the root."""
        return str(self.root.joinpath(*parts))


def make_world(root: Path) -> World:
    """Fill a directory with data, a student and two teachers."""
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


def make_wide_world(world: World, root: Path) -> World:
    """The same data with models that vLLM runs on a CPU, into another directory."""
    shutil.copytree(world.path("data"), root / "data")
    shapes = {"sft": WIDE, "teacher_first": WIDE | DENSE, "teacher_second": WIDE | DENSE}
    for seed, (name, changes) in enumerate(shapes.items()):
        model = random_model(architecture(**changes), torch.float32, seed)
        save_model(model, root / name / "export", root / "data" / "tokenizer")
    return World(root)
