"""Token-weighted sums, reduced over ranks once a step, and the list of metric names."""

import re
from collections.abc import Iterable

from torch import Tensor

from marco_train.distributed import reduce_sums
from marco_train.types import LossOutput

Metrics = dict[str, float]

NAMES = {
    "loss/cross_entropy": "nats a token",
    "loss/entropy": "of the policy, nats a token",
    "loss/objective": "what the gradient is of, a token",
    "eval/cross_entropy": "held-out, nats a token",
    "kl/reverse": "policy against teacher, nats a token",
    "kl/policy_mass": "of the tokens that topk tells apart, mean",
    "kl/teacher_mass": "of the tokens that topk tells apart, mean",
    "kl/sampler_mismatch": "mean |log policy - log sampler| of the sampled tokens, nats",
    "teacher/cache_hits": "share of rollouts whose scores were on disk",
    "teacher/cache_corrupt": "scores on disk that were broken, and were computed again",
    "rollout/response_length": "mean, tokens",
    "rollout/truncated": "share of responses cut at the limit",
    "rollout/empty": "share of responses that are a stop token alone",
    "loss/balance": "of the routers, mean over layers; 1 is even, see losses/balance.py",
    "loss/router_z": "mean squared logsumexp of the routers' logits, mean over layers",
    "moe/max_violation": "(largest load - mean) / mean of the experts; worst layer, and by layer",
    "moe/router_entropy": "nats a token; mean over layers, and by layer",
    "moe/dead_experts": "that no token of the step reached; sum over layers, and by layer",
    "optim/grad_norm": "before clipping",
    "optim/lr": "",
    "data/num_sequences": "of this step",
    "data/num_loss_tokens": "of this step",
    "data/num_tokens": "of this step, prompts included",
    "data/dropped_too_long": "rows over the length limit, of this step",
    "data/dropped_no_loss": "rows without a token to learn or a prompt to answer, of this step",
    "data/dropped_special": "rows whose text holds control tokens, of this step",
    "data/epoch": "of the source that has been repeated most",
    "perf/tokens_per_second": "tokens trained on, all ranks, over the whole step",
    "time/step": "seconds",
    "time/sync": "seconds",
    "time/sample": "seconds",
    "time/score": "seconds",
    "time/train": "seconds",
    "cascade/phase": "position in the cascade, from 0",
}
"""Every metric and its unit; `moe/` metrics also come as `<name>/layer_<number>`."""

LAYER = re.compile(r"/layer_\d+$")


def check_names(names: Iterable[str]) -> None:
    """Refuse a metric that is not in the list."""
    unknown = [name for name in names if LAYER.sub("", name) not in NAMES]
    assert not unknown, f"metrics that metrics.py does not list: {unknown}"


class MetricSums:
    """Sums over the tokens of a step's microbatches."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, output: LossOutput) -> None:
        """Add the sums of one microbatch; stays on its device."""
        for name, value in output.sums.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value

    def mean(self, num_tokens: float) -> Metrics:
        """Divide by the global number of tokens, once, after one reduction over ranks."""
        totals = reduce_sums([float(value) for value in self._sums.values()])
        return {name: total / num_tokens for name, total in zip(self._sums, totals, strict=True)}
