"""What a run can be resumed from: directories, tensors and generators."""

from marco_train.checkpoint.generators import generator_tensors, load_generators
from marco_train.checkpoint.store import (
    checkpoint_path,
    load_checkpoint,
    read_state,
    save_checkpoint,
    set_aside_newer,
)

__all__ = [
    "checkpoint_path",
    "generator_tensors",
    "load_checkpoint",
    "load_generators",
    "read_state",
    "save_checkpoint",
    "set_aside_newer",
]
