"""What a run can be resumed from: directories, tensors and generators, and who may write them."""

from marco_train.checkpoint.background import BackgroundSaves
from marco_train.checkpoint.best import BestSoFar
from marco_train.checkpoint.choice import settle_checkpoint
from marco_train.checkpoint.generators import generator_tensors, load_generators
from marco_train.checkpoint.lock import held
from marco_train.checkpoint.room import check_room, check_writable
from marco_train.checkpoint.shards import (
    KINDS,
    Piece,
    StateSource,
    StoredState,
    TrainingState,
    refuse_other_shapes,
)
from marco_train.checkpoint.snapshot import Snapshot, host_memory
from marco_train.checkpoint.store import (
    Retention,
    checkpoint_path,
    convert_checkpoint,
    load_checkpoint,
    read_state,
    save_checkpoint,
    set_aside_newer,
    sweep,
    verify,
)

__all__ = [
    "KINDS",
    "BackgroundSaves",
    "BestSoFar",
    "Piece",
    "Retention",
    "Snapshot",
    "StateSource",
    "StoredState",
    "TrainingState",
    "check_room",
    "check_writable",
    "checkpoint_path",
    "convert_checkpoint",
    "generator_tensors",
    "held",
    "host_memory",
    "load_checkpoint",
    "load_generators",
    "read_state",
    "refuse_other_shapes",
    "save_checkpoint",
    "set_aside_newer",
    "settle_checkpoint",
    "sweep",
    "verify",
]
