"""What an evaluation measures."""

import re
from dataclasses import dataclass, field

from omegaconf import II, MISSING

from marco_train.config.rollout import TEMPERATURE, RolloutConfig, SamplerBackend, VLLMRolloutConfig
from marco_train.config.stage import UntrainedStageConfig
from marco_train.config.teacher import TeacherConfig
from marco_train.errors import require, require_positive

NAME = re.compile(r"[\w-]+")


@dataclass(kw_only=True)
class EvaluateConfig(UntrainedStageConfig):
    """Sampled accuracy and reverse KL of exported models on held-out prompts."""

    models: dict[str, str] = field(default_factory=dict)
    """Hugging Face directories of students, or org/name[@revision] of the hub, by name: accuracy
    and KL to each teacher."""
    teachers: dict[str, TeacherConfig] = field(default_factory=dict)
    """Accuracy only, and the yardsticks of the KL."""
    num_prompts: int = MISSING
    """Held-out prompts, shared among the categories by the mixture's weights."""
    responses_per_prompt: int = MISSING
    """Answers to each prompt, over which accuracy is the mean: the n of avg@n."""
    max_prompt_length: int = MISSING
    """Tokens; longer prompts are dropped and counted."""
    max_response_length: int = MISSING
    """Tokens; a longer answer is cut."""
    num_kl_responses: int = II("stage.responses_per_prompt")
    """How many of a prompt's responses the teachers score for the KL."""
    num_examples_shown: int = 5
    """Prompts whose answers are written out for a reader."""
    signatures: bool = False
    """Whether signatures.json tells which experts each language's prompts and answers used, over
    the responses that the teachers score."""
    temperature: float = TEMPERATURE
    """Of the answers. avg@n is measured at 1."""
    rollout: RolloutConfig = MISSING

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(
            "stage",
            num_prompts=self.num_prompts,
            responses_per_prompt=self.responses_per_prompt,
            max_prompt_length=self.max_prompt_length,
            max_response_length=self.max_response_length,
        )
        require(
            self.temperature == TEMPERATURE,
            f"stage.temperature is {self.temperature}; avg@n is measured at "
            "temperature 1.0 (Marco-MoE section 4.3): set it to 1.0",
        )
        require(
            self.rollout.backend is not SamplerBackend.vllm_server,
            "stage.rollout.backend is vllm_server, and a server is of one shape, where an "
            "evaluation measures models of several: choose rollout@stage.rollout=native or vllm, "
            "which sample in its own process",
        )
        require(
            not self.rollout.replay_routing,
            "stage.rollout.replay_routing is true, and an evaluation makes no update that could "
            "take the sampler's experts: set it to false",
        )
        require(
            not (isinstance(self.rollout, VLLMRolloutConfig) and self.rollout.expert_parallel),
            "stage.rollout.expert_parallel is true, and in an evaluation each rank samples alone: "
            "set it to false",
        )
        for name in (*self.models, *self.teachers):
            require(
                NAME.fullmatch(name) is not None,
                f"stage.models or stage.teachers names {name!r}, and its answers are kept in a "
                "directory of that name: take letters, digits, - and _",
            )
        both = sorted(self.models.keys() & self.teachers.keys())
        require(
            not both,
            f"stage.models and stage.teachers both name {', '.join(both)}: the report tells models "
            "apart by their names, so give each its own",
        )
        require(
            0 < self.num_kl_responses <= self.responses_per_prompt,
            f"stage.num_kl_responses is {self.num_kl_responses}, and must lie between 1 and "
            f"stage.responses_per_prompt {self.responses_per_prompt}",
        )

    @property
    def num_sampler_topk(self) -> int:
        """How many likeliest tokens the sampler has to name in each place: none are scored."""
        return 0
