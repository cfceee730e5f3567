"""The values that flow through a run; each station takes one and returns the next.

    SFT  Conversation -> Example -> Microbatch
    OPD  Conversation -> Prompt -> Rollout -> ScoredRollout -> SampledMicrobatch | TopKMicrobatch |
                                                           FullMicrobatch

Legend: T packed tokens, S tokens of prompt and response, R tokens of a response, K likeliest
tokens, V vocabulary, D width of the teacher, L layers, k experts a token.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from enum import Enum
from hashlib import blake2b
from typing import Any, Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class Message:
    """One turn of a chat."""

    role: str
    """`system`, `user`, `assistant` or `tool`."""
    content: str
    reasoning_content: str = ""
    """What an assistant thought before its answer, where the row keeps it apart."""
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    """What an assistant calls, each {type: function, function: {name, arguments}}."""
    name: str | None = None
    """Of a speaker, or of the tool that answers."""
    tool_call_id: str | None = None
    """Which call a tool answers."""
    is_learnt: bool = True
    """Whether an answer has loss; a row may exempt single answers."""

    def as_turn(self) -> dict[str, Any]:
        """What chat templates take: the keys that this turn has."""
        turn: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.reasoning_content:
            turn["reasoning_content"] = self.reasoning_content
        if self.tool_calls:
            turn["tool_calls"] = list(self.tool_calls)
        if self.name is not None:
            turn["name"] = self.name
        if self.tool_call_id is not None:
            turn["tool_call_id"] = self.tool_call_id
        return turn


@dataclass(frozen=True)
class Row:
    """What is known of any usable row of a dataset."""

    source: str
    category: str
    language: str
    row: int
    """Its place among the rows of the source, from 0."""


@dataclass(frozen=True)
class Conversation(Row):
    """A chat as its dataset gives it."""

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    """Functions that the assistant may call, each {type: function, function: {name, ...}}."""
    verifier: Mapping[str, Any] = field(default_factory=dict)
    """How an answer is checked; see `evaluation/verifiers.py`. Empty: it is not."""
    is_preference: bool = False
    """Whether the row rates two answers; these are the turns before them."""

    @property
    def asked(self) -> tuple[Message, ...]:
        """The turns of a prompt: those that stand before the last answer."""
        end = len(self.messages)
        while end and self.messages[end - 1].role == "assistant":
            end -= 1
        return self.messages[:end]


@dataclass(frozen=True)
class PlainText(Row):
    """Text without turns; all of it is learnt, in SFT."""

    text: str


@dataclass(frozen=True)
class TokenRow(Row):
    """A row that somebody tokenised before; only SFT can use it."""

    input_ids: list[int]
    loss_mask: list[bool]


UsableRow = Conversation | PlainText | TokenRow


@dataclass(frozen=True)
class Example:
    """A rendered conversation: `loss_mask[i]` says whether token i is learnt."""

    input_ids: list[int]
    loss_mask: list[bool]
    is_truncated: bool = False
    """Whether a part of the conversation is left out, as all of it is too long."""


@dataclass(frozen=True)
class Prompt:
    """Token ids that await a response."""

    index: int
    """Position in the run's stream of prompts: the same on any number of ranks."""
    input_ids: list[int]
    source: str
    category: str
    language: str


class FinishReason(Enum):
    """Why a response ended."""

    stop = "stop"
    length = "length"


def no_experts() -> Tensor:
    """What stands for the experts of tokens where routing is not replayed, [0, 0, 0] int16."""
    return torch.zeros(0, 0, 0, dtype=torch.int16)


@dataclass(frozen=True)
class Rollout:
    """One sampled response."""

    prompt: Prompt
    sample_index: int
    response_ids: list[int]
    """Includes the stop token, where the response ended with one."""
    sampler_logprobs: list[float]
    """Log-probability of each response token when it was sampled, in nats."""
    topk_ids: list[list[int]]
    """The sampler's K likeliest tokens in each place, for the objective `topk`; else K is 0."""
    finish_reason: FinishReason
    weight_version: int
    """The policy's step whose weights sampled it."""
    routed_experts: Tensor = field(default_factory=no_experts, compare=False)
    """[S - 1, L, k] int16, the experts that prompt and response took while they were sampled, for
    routing replay; the last token was never computed. Tensors have no `==` of one truth value, so
    it has no part in a rollout's."""

    @property
    def input_ids(self) -> list[int]:
        """Prompt and response as one sequence."""
        return self.prompt.input_ids + self.response_ids

    @property
    def predicting(self) -> slice:
        """The places of `input_ids` whose hidden states predict the response: each is one early."""
        first = len(self.prompt.input_ids) - 1
        return slice(first, first + len(self.response_ids))

    @property
    def order(self) -> tuple[int, int]:
        """What rollouts are sorted by, so that it does not matter which of them ended first."""
        return self.prompt.index, self.sample_index


GROUPED_BY = ("category", "language")
"""What the diagnostics of rollouts are told apart by."""
MAX_GROUP_LENGTH = 64  # characters of a group's name
UNSAFE_IN_NAMES = re.compile(r"[/\x00-\x1f\x7f\u2028\u2029\ud800-\udfff]")


def group_name(name: str) -> str:
    """Make a group's name, as `category_math`, fit to be the last part of a metric's name.

    Any text is accepted. A "/" and control characters become `%` and their code; what is longer
    than 64 characters keeps its beginning and gets a digest of the whole. A name that is fit stays
    as it is.
    """
    safe = UNSAFE_IN_NAMES.sub(lambda found: f"%{ord(found[0]):02X}", name)
    if len(safe) <= MAX_GROUP_LENGTH:
        return safe
    digest = blake2b(safe.encode(), digest_size=4).hexdigest()
    return f"{safe[: MAX_GROUP_LENGTH - len(digest) - 1]}~{digest}"


def prompt_groups(category: str, language: str) -> list[str]:
    """Name the groups of a prompt and its rollouts; an empty text makes none."""
    values = zip(GROUPED_BY, (category, language), strict=True)
    return [group_name(f"{kind}_{value}") for kind, value in values if value]


def rollout_groups(rollout: Rollout) -> list[str]:
    """Name the groups of a rollout, of which there are at most as many as kinds."""
    return prompt_groups(rollout.prompt.category, rollout.prompt.language)


@dataclass(frozen=True)
class TokenScores:
    """The teacher's log-probability of each response token."""

    teacher_logprobs: Tensor  # [R] float32


@dataclass(frozen=True)
class TopKScores:
    """The teacher's log-probabilities of K tokens in each place."""

    topk_ids: Tensor  # [R, K] int64, the sampler's likeliest tokens or the teacher's
    teacher_topk_logprobs: Tensor  # [R, K] float32
    topk_overlap: Tensor  # [R] float32, share of them among the teacher's K likeliest


@dataclass(frozen=True)
class HiddenScores:
    """The teacher's last hidden states, after its final norm, where it predicts the response."""

    teacher_hidden: Tensor  # [R, D]


Scores = TokenScores | TopKScores | HiddenScores


def known_places(scores: Scores) -> Tensor:
    """Where a teacher's scores are numbers, [R] bool; other places teach nothing."""
    values = [value if value.dim() > 1 else value[:, None] for value in vars(scores).values()]
    return torch.stack([value.isfinite().all(1) for value in values]).all(0)


@dataclass(frozen=True)
class ScoredRollout:
    """A rollout with the teacher's view of it."""

    rollout: Rollout
    scores: Scores


@dataclass(frozen=True)
class Microbatch:
    """The packed tensors of one forward pass."""

    input_ids: Tensor  # [1, T] int64
    position_ids: Tensor  # [1, T] int64, restarts with every sequence
    targets: Tensor  # [T] int64, the next token of the same sequence
    loss_places: Tensor  # [N] int64, of the tokens with loss: those whose target is learnt
    num_tokens: int  # T, or 0 where a token only stands in for a rank without sequences
    num_loss_tokens: int
    groups: tuple[str, ...]
    """Names of the groups that metrics are told apart by, as `category_math`."""
    group_ids: Tensor  # [N, G] int64, of each loss token; len(groups) stands for no group
    routed_experts: Tensor  # [L, T, k] int64, to be taken; empty where the routers choose
    samples: tuple[int, ...] = field(default=(), kw_only=True)
    """Positions of its sequences in the run's stream of samples; none where nobody is to be told
    which rows an update was of."""

    def to(self, device: torch.device) -> Self:
        """Move the tensors to a device."""
        tensors = {
            field.name: value.to(device, non_blocking=True)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return replace(self, **tensors)  # type: ignore[arg-type]


@dataclass(frozen=True)
class SampledMicrobatch(Microbatch):
    """For the sampled-token objective."""

    sampler_logprobs: Tensor  # [N] float32, of the targets at the N loss tokens, in order
    teacher_logprobs: Tensor  # [N] float32


@dataclass(frozen=True)
class TopKMicrobatch(Microbatch):
    """For the top-k objective."""

    sampler_logprobs: Tensor  # [N] float32, of the targets at the N loss tokens, in order
    topk_ids: Tensor  # [N, K] int64
    teacher_topk_logprobs: Tensor  # [N, K] float32
    topk_overlap: Tensor  # [N] float32


@dataclass(frozen=True)
class FullMicrobatch(Microbatch):
    """For the full-vocabulary objective."""

    sampler_logprobs: Tensor  # [N] float32, of the targets at the N loss tokens, in order
    teacher_hidden: Tensor  # [N, D]


@dataclass(frozen=True)
class PolicyOutput:
    """What a loss needs of a forward pass."""

    hidden: Tensor  # [T, D]
    head: Tensor  # [V, D], the weights of the output head


@dataclass(frozen=True)
class LossOutput:
    """A loss and its diagnostics at the N loss tokens of a microbatch."""

    loss: Tensor  # scalar float32, a sum over the tokens
    values: dict[str, Tensor]  # metric name -> [N] float32, without gradient
    spreads: dict[str, Tensor]  # as `values`, of which quantiles are reported


LossFn = Callable[[PolicyOutput, Any], LossOutput]
