"""Who scores the responses: one dataclass a backend, chosen by teacher@<place>=<backend>."""

from dataclasses import dataclass
from enum import Enum

from omegaconf import MISSING

from marco_train.config.model import DType
from marco_train.config.servers import TeacherServersConfig
from marco_train.errors import require, require_positive


class TeacherBackend(Enum):
    """Who scores the rollouts.

    hf: any causal language model of transformers, whole on every rank; native: Qwen3-MoE or dense
    Qwen3 in our own model, experts shared over ranks; vllm: an engine of vLLM in each rank's
    process; vllm_server: servers of vLLM over HTTP.
    """

    hf = "hf"
    native = "native"
    vllm = "vllm"
    vllm_server = "vllm_server"


@dataclass(kw_only=True)
class TeacherConfig:
    """A frozen model that scores tokens; what all of them share."""

    backend: TeacherBackend = MISSING
    """What the group teacher@<place> was set to."""
    path: str = MISSING
    """Hugging Face directory, or org/name[@revision] of the hub; of `vllm_server`, its tokenizer
    and config are enough."""
    dtype: DType = DType.bfloat16
    """Of `vllm_server`, what the servers were started with."""
    stop_id: int | None = None
    """The token with which the teacher ends a turn, where the student does with another: the two
    trade places in every score. None: both end with the same."""

    def __post_init__(self) -> None:
        require(
            self.backend is type(self).backend,
            f"teacher.backend is {self.backend.value}, and its other fields are not that "
            f"teacher's: choose teacher@stage.cascade.<phase>.teacher={self.backend.value} instead",
        )


@dataclass(kw_only=True)
class HFTeacherConfig(TeacherConfig):
    """Any causal language model of transformers, whole on every rank."""

    backend: TeacherBackend = TeacherBackend.hf
    dtype: DType = DType.float32
    max_tokens_per_batch: int = 8192
    """Tokens of one forward pass on one rank, with padding."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive("teacher", max_tokens_per_batch=self.max_tokens_per_batch)


@dataclass(kw_only=True)
class NativeTeacherConfig(TeacherConfig):
    """Qwen3-MoE or dense Qwen3 in our own model."""

    backend: TeacherBackend = TeacherBackend.native
    max_tokens_per_batch: int = 16384
    """Tokens of one forward pass on one rank."""
    expert_parallel_size: int = 8
    """Ranks that share the experts, within a node. 1: every rank holds all of them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(
            "teacher",
            max_tokens_per_batch=self.max_tokens_per_batch,
            expert_parallel_size=self.expert_parallel_size,
        )


@dataclass(kw_only=True)
class VLLMTeacherConfig(TeacherConfig):
    """Any model that vLLM serves, in each rank's process."""

    backend: TeacherBackend = TeacherBackend.vllm
    max_tokens_per_batch: int = 16384
    """Tokens of one forward pass on one rank; no sequence may be longer."""
    kv_cache_gib: float = 4
    """Memory for keys and values on one rank."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(
            "teacher",
            max_tokens_per_batch=self.max_tokens_per_batch,
            kv_cache_gib=self.kv_cache_gib,
        )


@dataclass(kw_only=True)
class VLLMServerTeacherConfig(TeacherConfig):
    """Servers of vLLM, as recipes/serve_teacher.sh starts them: a large teacher elsewhere."""

    backend: TeacherBackend = TeacherBackend.vllm_server
    servers: TeacherServersConfig = MISSING
