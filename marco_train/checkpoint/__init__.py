"""What a run can be resumed from: directories, tensors and generators, and who may write them."""

from marco_train.checkpoint.choice import settle_checkpoint
from marco_train.checkpoint.generators import generator_tensors, load_generators
from marco_train.checkpoint.lock import held
from marco_train.checkpoint.room import check_room, check_writable
from marco_train.checkpoint.store import (
    checkpoint_path,
    load_checkpoint,
    read_state,
    save_checkpoint,
    set_aside_newer,
    sweep,
)

__all__ = [
    "check_room",
    "check_writable",
    "checkpoint_path",
    "generator_tensors",
    "held",
    "load_checkpoint",
    "load_generators",
    "read_state",
    "save_checkpoint",
    "set_aside_newer",
    "settle_checkpoint",
    "sweep",
]
