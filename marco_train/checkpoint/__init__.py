"""What a run can be resumed from: directories, tensors and generators."""

from marco_train.checkpoint.background import BackgroundSaves
from marco_train.checkpoint.generators import generator_tensors, load_generators
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
    checkpoint_path,
    faults_of,
    load_checkpoint,
    read_state,
    save_checkpoint,
    set_aside_newer,
)

__all__ = [
    "KINDS",
    "BackgroundSaves",
    "Piece",
    "Snapshot",
    "StateSource",
    "StoredState",
    "TrainingState",
    "checkpoint_path",
    "faults_of",
    "generator_tensors",
    "host_memory",
    "load_checkpoint",
    "load_generators",
    "read_state",
    "refuse_other_shapes",
    "save_checkpoint",
    "set_aside_newer",
]
