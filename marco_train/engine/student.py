"""The model of a run as it stands: scored, measured and handed to a sampler."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from marco_train.config.architecture import check_expert_parallel, read_architecture
from marco_train.config.model import ModelConfig
from marco_train.config.parallel import ParallelConfig
from marco_train.distributed import device, expert_parallel_group, reduce_sums
from marco_train.losses.logprobs import sequence_logprobs
from marco_train.metrics import Metrics, MetricSums
from marco_train.models.attention import PackedSequences
from marco_train.models.hf_io import check_architecture, load_model
from marco_train.models.qwen3_moe import Qwen3Moe
from marco_train.models.routing import Routing
from marco_train.models.weights import (
    ALL_EXPERTS,
    ExpertShare,
    named_weights,
    random_model,
    torch_dtype,
)
from marco_train.types import LossFn, Microbatch, PolicyOutput


class Student:
    """A model without an optimizer; all ranks take part in every call."""

    def __init__(self, model: Qwen3Moe, module: nn.Module) -> None:
        """Use a model.

        Args:
            model: Has the weights.
            module: Computes what the model does: the model itself, or DeepSpeed's engine around it.
        """
        self.model = model
        self._module = module

    def forward(
        self, microbatch: Microbatch, layout: PackedSequences, routing: Routing | None = None
    ) -> PolicyOutput:
        """Compute hidden states [T, D] of a microbatch on this rank's device, laid out there."""
        hidden = self._module(
            microbatch.input_ids, microbatch.position_ids, layout=layout, routing=routing
        )
        return PolicyOutput(hidden=hidden, head=self.model.head)

    @torch.no_grad()
    def measure(self, microbatches: Sequence[Microbatch], loss_fn: LossFn) -> Metrics:
        """Mean of a loss's metrics over the microbatches of all ranks, without an update."""
        self._module.eval()
        (num_tokens,) = reduce_sums([sum(mb.num_loss_tokens for mb in microbatches)])
        totals = MetricSums()
        for microbatch in microbatches:
            layout, on_device = layout_of(microbatch), microbatch.to(device())
            output = loss_fn(self.forward(on_device, layout, routing_of(on_device)), on_device)
            totals.add(output, on_device)
        return totals.mean(max(1.0, num_tokens))

    @torch.no_grad()
    def score(self, sequences: Sequence[list[int]]) -> Tensor:
        """Log-probabilities of the tokens of sequences; see `sequence_logprobs`.

        A probe for what a sampler makes of the same weights.
        """
        self._module.eval()
        return sequence_logprobs(self._module, self.model.head, sequences)

    def named_weights(self, share: ExpertShare = ALL_EXPERTS) -> Iterator[tuple[str, Tensor]]:
        """Stream all weights, of the experts those of `share`, joined; every rank takes part."""
        return named_weights(self.model, share)


def layout_of(microbatch: Microbatch) -> PackedSequences:
    """Lay a microbatch's sequences out while it is on the host, which need not wait for a GPU."""
    return PackedSequences(microbatch.position_ids).to(device())


def routing_of(microbatch: Microbatch) -> Routing:
    """Let a forward pass take the experts of its microbatch, or the routers choose."""
    given = microbatch.routed_experts
    return Routing(given if given.numel() else None)


def load_student(model_cfg: ModelConfig, parallel: ParallelConfig, seed: int) -> Qwen3Moe:
    """Load this rank's share of the student, or draw it at random.

    Raises:
        InputError: The weights are not those the config describes, or cannot be shared over
            the ranks; before the model is built.
    """
    dtype = torch_dtype(model_cfg.dtype)
    ep_size = parallel.expert_parallel_size
    if model_cfg.path is None:
        assert model_cfg.architecture is not None
        check_expert_parallel(model_cfg.architecture, ep_size)
        return random_model(model_cfg.architecture, dtype, seed, expert_parallel_group(ep_size))
    check_expert_parallel(read_architecture(model_cfg.path), ep_size)
    if model_cfg.architecture is not None:
        check_architecture(model_cfg.path, model_cfg.architecture)
    return load_model(model_cfg.path, dtype, expert_parallel_group(ep_size))
