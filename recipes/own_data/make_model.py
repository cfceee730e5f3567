"""Make a model small enough for a trial: 0.1 M random parameters, and a tokenizer of bytes."""

import argparse
import tempfile
from pathlib import Path

import torch

from marco_train.commands.inspect_data import write_byte_tokenizer
from marco_train.config.architecture import ArchitectureConfig
from marco_train.models.hf_io import save_model
from marco_train.models.weights import random_model

SHAPE = ArchitectureConfig(
    vocab_size=264,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=32,
    intermediate_size=192,
    rms_norm_eps=1e-6,
    rope_theta=1e4,
    max_position_embeddings=256,
    tie_word_embeddings=True,
)


def main() -> None:
    """Write a Hugging Face directory."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("outputs/own_data/model"))
    out: Path = parser.parse_args().out
    with tempfile.TemporaryDirectory() as tokenizer:
        write_byte_tokenizer(Path(tokenizer))
        out.parent.mkdir(parents=True, exist_ok=True)
        save_model(random_model(SHAPE, torch.float32, seed=0), out, tokenizer)
    print(out)


if __name__ == "__main__":
    main()
