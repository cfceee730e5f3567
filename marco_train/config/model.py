"""Which model learns: weights to start from, tokenizer and template."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from omegaconf import II, MISSING

from marco_train.config.architecture import ArchitectureConfig
from marco_train.errors import require


class DType(Enum):
    """Type of the weights that compute; masters and reductions are float32."""

    float32 = "float32"
    bfloat16 = "bfloat16"

    @property
    def num_bytes(self) -> int:
        """Of one number."""
        return 4 if self is DType.float32 else 2


class ChatTemplate(Enum):
    """Which template renders a conversation."""

    tokenizer = "tokenizer"
    chatml = "chatml"


@dataclass(kw_only=True)
class ModelConfig:
    """The student: which weights to start from."""

    path: str | None = MISSING
    """Hugging Face directory to start from, or org/name[@revision] of the hub. None: random weights
    of `architecture`."""
    tokenizer: str = II("model.path")
    """Hugging Face directory of the tokenizer and its chat template, or org/name[@revision] of the
    hub. Not given: the model's own."""
    chat_template: ChatTemplate = ChatTemplate.tokenizer
    """tokenizer: the tokenizer's own. Where it does not mark the assistant's tokens with
    {% generation %}, SFT learns the answers whose prompts the whole conversation holds as sampling
    would ask them. chatml: ours (`data/chat_template.jinja`). Exports carry the one in use."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Arguments of the template, of the student's and of the teachers' alike, by the names it
    reads, as `enable_thinking: false`."""
    architecture: ArchitectureConfig | None = None
    """What config.json under `path` has to say, or the shape to initialise at random.
    None: whatever config.json says."""
    dtype: DType = DType.bfloat16

    def __post_init__(self) -> None:
        require(
            self.path is not None or self.architecture is not None,
            "model.path and model.architecture are both null: give weights to start from, or a "
            "shape to initialise at random",
        )
        taken = sorted(TAKEN_BY_RENDERING & self.chat_template_kwargs.keys())
        require(
            not taken,
            f"model.chat_template_kwargs has {', '.join(taken)}, which every rendering sets "
            "itself: give only what the template reads beside the turns",
        )


# Arguments of `apply_chat_template` in transformers, and the name of the turns in templates.
TAKEN_BY_RENDERING = {
    "add_generation_prompt",
    "chat_template",
    "continue_final_message",
    "conversation",
    "conversations",
    "documents",
    "max_length",
    "messages",
    "padding",
    "return_assistant_tokens_mask",
    "return_dict",
    "return_tensors",
    "tokenize",
    "tokenizer_kwargs",
    "tools",
    "truncation",
}
