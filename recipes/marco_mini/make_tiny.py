"""Make what the rehearsal is given: rows as the card's data sets have them, a base, two teachers.

    python recipes/marco_mini/make_tiny.py --out outputs/marco_tiny/given

Models are dense, with random weights and a tokenizer of bytes. A directory that is there is whole.
"""

import argparse
import json
import shutil
from dataclasses import replace
from pathlib import Path

import torch
from card_rows import OPD, SFT, SHAPES

from marco_train.commands.inspect_data import write_byte_tokenizer
from marco_train.config.architecture import ArchitectureConfig
from marco_train.models.hf_io import save_model
from marco_train.models.weights import random_model

BASE = ArchitectureConfig(
    vocab_size=264,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=32,
    intermediate_size=192,
    rms_norm_eps=1e-6,
    rope_theta=1e4,
    max_position_embeddings=2048,
    tie_word_embeddings=True,
)
MODELS = {
    "base": BASE,
    "teacher_first": BASE,
    "teacher_second": replace(BASE, hidden_size=96, intermediate_size=256),
}


def main() -> None:
    """Write the directory, unless it is there."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    out: Path = parser.parse_args().out
    if not out.is_dir():
        partial = out.with_name(f".{out.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        make(partial)
        partial.rename(out)
    print(out)


def make(directory: Path) -> None:
    """Write rows and models."""
    for stage, shapes in (("sft", SFT), ("opd", OPD)):
        (directory / stage).mkdir(parents=True)
        for source, shape in shapes.items():
            lines = (json.dumps(row) + "\n" for row in SHAPES[shape])
            (directory / stage / f"{source}.jsonl").write_text("".join(lines))
    tokenizer = directory / "tokenizer"
    write_byte_tokenizer(tokenizer)
    for seed, (name, architecture) in enumerate(MODELS.items()):
        save_model(random_model(architecture, torch.float32, seed), directory / name, tokenizer)


if __name__ == "__main__":
    main()
