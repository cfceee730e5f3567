"""The half of a sampler's server that runs in vLLM's workers; see `scripts/serve_sampler.sh`.

vLLM mixes `Receiver` into its worker class (`--worker-extension-cls`), and its methods are then
called over HTTP.
"""

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

from marco_train.errors import require
from marco_train.inference.engine import checksums_kept, replace_weights, with_tied_head
from marco_train.safetensors_io import DTYPES, read, read_header

# The process whose end ends the server.
OWNER_VARIABLE = "MARCO_TRAIN_OWNER"
WATCH_SECONDS = 1.0


class Held(NamedTuple):
    """What the weights in a worker are."""

    version: str
    shapes: dict[str, tuple[int, ...]]
    """By checkpoint names, experts joined."""
    dtype: torch.dtype
    """In which they came."""


class Receiver:
    """Takes weights from a checkpoint, and says what it holds."""

    model_runner: Any  # the worker's, as are all attributes
    vllm_config: Any
    held: Held

    def load_checkpoint(self, path: str, num_weights: str) -> None:
        """Replace all weights by the `num_weights` of a safetensors file, experts joined.

        Raises:
            InputError: The file is cut short or another; nothing was touched.
            RuntimeError: The model has weights that the file did not reach.
        """
        file = Path(path)
        stored = read_header(file)
        require(
            len(stored) == int(num_weights),
            f"{path} has {len(stored)} weights, and the trainer wrote {num_weights}",
        )
        weights = ((name, read(place)) for name, place in stored.items())
        replace_weights(
            self.model_runner.get_model(),
            with_tied_head(weights, stored),
            self.vllm_config,
        )
        (dtype,) = {DTYPES[place.dtype] for place in stored.values()}
        shapes = {name: place.shape for name, place in stored.items()}
        self.held = Held(file.stem, shapes, dtype)

    def note_transfer(self, version: str, shapes: str, dtype: str) -> None:
        """Note what came by vLLM's weight transfer: the version, shapes as JSON, and type."""
        named = {name: tuple(shape) for name, shape in json.loads(shapes).items()}
        self.held = Held(version, named, getattr(torch, dtype))

    def checksums(self) -> dict[str, Any]:
        """Digest the weights that are kept as they came; some have to have come.

        Returns:
            `version`, and `weights` by checkpoint names.
        """
        held = self.held
        found = checksums_kept(self.model_runner.get_model(), held.shapes, held.dtype)
        return {"version": held.version, "weights": found}


def end_with_owner() -> None:
    """End this server's processes once its owner, or the process that leads them, is gone.

    A server that is killed leaves its engine and workers behind, which ignore SIGTERM.
    """
    if OWNER_VARIABLE not in os.environ:
        return
    group = os.getpgrp()
    watched = {int(os.environ[OWNER_VARIABLE]), group}

    def watch() -> None:
        while all(_is_alive(process) for process in watched):
            time.sleep(WATCH_SECONDS)
        os.killpg(group, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def _is_alive(process: int) -> bool:
    """Whether a process runs; one that ended and waits for its parent does not."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


end_with_owner()
