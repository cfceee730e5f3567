"""What a stage that trains measures of its model meanwhile."""

from dataclasses import dataclass, field

from marco_train.config.benchmark import SuiteConfig, tasks_of
from marco_train.config.rollout import RolloutConfig
from marco_train.config.stage import StageConfig
from marco_train.errors import require, require_positive


@dataclass(kw_only=True)
class EvalConfig(SuiteConfig):
    """Questions that the model is asked while it is trained."""

    suite: str | None = None
    """own, fixture, card_lite, or any other suite or tasks of stage=benchmark, asked every
    `eval_every` steps by the run's own sampler. None: no question is asked."""
    responses_per_prompt: int | None = 1
    greedy: bool = True
    max_response_length: int | None = None
    """Tokens of an answer in SFT, where a question may have what `stage.max_length` leaves. None:
    half of that. OPD has its own `stage.max_response_length`."""
    num_examples_shown: int = 8
    """Answers of each measure that are logged to be read, with their references."""

    def __post_init__(self) -> None:
        require_positive(
            "stage.eval",
            num_examples_shown=self.num_examples_shown,
            max_response_length=self.max_response_length,
        )
        if self.suite is not None:
            self.check_suite(self.suite)


@dataclass(frozen=True)
class AnsweredStage:
    """What a sampler has to know of a stage that samples to measure alone."""

    rollout: RolloutConfig
    max_prompt_length: int
    """Tokens."""
    max_response_length: int
    """Tokens."""
    num_sampler_topk: int = 0
    """Likeliest tokens that the sampler has to name in each place."""


@dataclass(kw_only=True)
class TrainedStageConfig(StageConfig):
    """A stage that makes updates."""

    eval_every: int | None = None
    """Steps between two measures of the model: of the loss, or in OPD of the reverse KL to the
    phase's teacher, on held-out rows where there are any, and of the answers to `eval.suite`.
    None: off."""
    num_eval_examples: int = 512
    """Held-out conversations or prompts of one measure."""
    eval: EvalConfig = field(default_factory=EvalConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(
            "stage", eval_every=self.eval_every, num_eval_examples=self.num_eval_examples
        )
        require(
            self.eval.suite is None or self.eval_every is not None,
            f"stage.eval.suite is {self.eval.suite}, and stage.eval_every is null: say after how "
            "many steps it is asked each time",
        )

    @property
    def loss_metric(self) -> str:
        """What is measured on held-out rows."""
        raise NotImplementedError

    def eval_metrics(self, *, has_held_out: bool) -> list[str]:
        """Names of what is measured every `eval_every` steps, by which a checkpoint may be best."""
        if self.eval_every is None:
            return []
        names = [self.loss_metric] if has_held_out else []
        if self.eval.suite is not None:
            names += [SCORE, *(f"{SCORE}/task_{task}" for task in tasks_of(self.eval.suite))]
        return names


SCORE = "eval/score"
"""Of a suite, the larger the better; of held-out losses the smaller."""
