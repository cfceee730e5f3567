"""The random generators of a process, as tensors of a checkpoint."""

import json
import random

import torch
from torch import Tensor


def generator_tensors() -> dict[str, Tensor]:
    """State of this process's random generators."""
    version, words, gauss = random.getstate()
    python = json.dumps([version, list(words), gauss]).encode()
    tensors = {
        "generator.torch": torch.get_rng_state(),
        "generator.python": torch.frombuffer(bytearray(python), dtype=torch.uint8),
    }
    if torch.cuda.is_available():
        tensors["generator.cuda"] = torch.cuda.get_rng_state()
    return tensors


def load_generators(tensors: dict[str, Tensor]) -> None:
    """Put back what `generator_tensors` gave."""
    torch.set_rng_state(tensors["generator.torch"])
    version, words, gauss = json.loads(bytes(tensors["generator.python"].tolist()))
    random.setstate((version, tuple(words), gauss))
    if "generator.cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["generator.cuda"])
