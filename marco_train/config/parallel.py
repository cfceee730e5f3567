"""How a model is spread over the ranks."""

from dataclasses import dataclass
from enum import Enum

from omegaconf import MISSING

from marco_train.errors import require, require_positive

TIMEOUT_SECONDS = 1800.0
SHORTEST_TIMEOUT = 20.0
HANG_SECONDS = 1200.0
# Elements of one reduction; bounds the buffer that contiguous gradients are copied into.
REDUCE_BUCKET_ELEMENTS = 2**25


class Dispatch(Enum):
    """How tokens cross an expert-parallel group; see `models/dispatch.py`."""

    all_to_all = "all_to_all"
    deduplicated = "deduplicated"


class Recompute(Enum):
    """What backward computes again instead of keeping it.

    attention: each layer's attention with its norms; layer: whole layers, of which only the input
    is kept.
    """

    none = "none"
    attention = "attention"
    layer = "layer"


@dataclass(kw_only=True)
class ParallelConfig:
    """How the model and its optimizer are spread over the ranks."""

    expert_parallel_size: int = MISSING
    """Ranks that share the experts of a layer. 1: every rank holds all of them."""
    zero_stage: int = 1
    """1: optimizer state sharded over ranks; 2: gradients as well."""
    dispatch: Dispatch = Dispatch.deduplicated
    """Without effect where expert_parallel_size is 1."""
    recompute: Recompute = Recompute.none
    timeout_seconds: float = TIMEOUT_SECONDS
    """Longest that a rank waits for another one, after which the run ends; it can be resumed.

    Servers that are away are waited for by all ranks together, in turns far shorter than this."""
    hang_seconds: float = HANG_SECONDS
    """Without getting on, after which the rank at fault is named with its stack and the run ends;
    it can be resumed. Waiting for servers is getting on. Longer than any one operation takes."""
    offload_while_sampling: bool = False
    """Whether the optimizer's float32 state lies in the host's memory except during an update, for
    12 bytes a parameter of this rank's partition (pinned, on a GPU), and with zero_stage 1 in
    bfloat16 4 bytes of gradient are freed for each parameter while responses are sampled."""

    def __post_init__(self) -> None:
        require_positive(
            "parallel",
            expert_parallel_size=self.expert_parallel_size,
            hang_seconds=self.hang_seconds,
        )
        require(
            self.zero_stage in {1, 2},
            f"parallel.zero_stage is {self.zero_stage}, and must be 1 or 2",
        )
        require(
            self.timeout_seconds >= SHORTEST_TIMEOUT,
            f"parallel.timeout_seconds is {self.timeout_seconds:g}, and must be at least "
            f"{SHORTEST_TIMEOUT:g}: ranks may be that far apart without a fault",
        )
