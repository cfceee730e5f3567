"""Token-weighted sums, reduced over ranks once a step, and the list of metric names."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from marco_train.distributed import gather_objects
from marco_train.types import LossOutput, Microbatch

Metrics = dict[str, float]

NAMES = {
    "loss/cross_entropy": "nats a token",
    "loss/entropy": "of the policy, nats a token",
    "loss/objective": "what the gradient is of, a token",
    "eval/cross_entropy": "held-out, nats a token",
    "kl/reverse": "policy against teacher, nats a token",
    "kl/forward": "teacher against policy, over the same places and support, nats a token",
    "kl/policy_mass": "of the tokens that topk tells apart, mean",
    "kl/teacher_mass": "of the tokens that topk tells apart, mean",
    "kl/topk_overlap": "share of the policy's K likeliest tokens among the teacher's K",
    "kl/teacher_entropy": "nats a token",
    "kl/advantage": "log teacher - log sampler of the sampled tokens; quantiles, nats",
    "kl/ratio_truncated": "share of tokens whose weight policy/sampler was above the cap",
    "kl/sampler_mismatch": "mean |log policy - log sampler| of the sampled tokens, nats",
    "kl/sampler": "sampler against policy, estimated from the sampled tokens, nats a token",
    "eval/reverse_kl": "on held-out prompts, nats a token; of eval_every after this step, else "
    "before it, where a phase may end early",
    "eval/score": "of stage.eval.suite after this step, per cent or BLEU; mean of its tasks, and "
    "by task",
    "eval/no_answer": "share of the suite's responses in which no answer was found",
    "eval/truncated": "share of the suite's responses cut at the limit",
    "eval/response_length": "of the suite's responses, mean, tokens",
    "eval/verifier_errors": "answers of the suite that a verifier failed on; they count as wrong",
    "teacher/rejected": "rollouts of this step left out, as no usable score came",
    "teacher/missing_tokens": "tokens of this step left out, as their score was no number",
    "teacher/repeated_requests": "of this step, after an error, a time-out or an unusable answer",
    "teacher/seconds": "from the first request of this step to the last answer, mean over ranks",
    "teacher/cache_hits": "share of rollouts whose scores were on disk",
    "teacher/cache_corrupt": "scores on disk that were broken, and were computed again",
    "rollout/sync_gib_per_s": "weights to the sampler on this rank, without the canary",
    "rollout/sync_proved": "share of the weights' bytes that the sampler holds bit for bit, by "
    "checksums on this rank; others are proved by the canary alone",
    "rollout/staleness": "updates that the policy is ahead of the weights that sampled",
    "rollout/response_length": "mean, tokens",
    "rollout/truncated": "share of responses cut at the limit",
    "rollout/empty": "share of responses that are a stop token alone",
    "rollout/repetition": "share of responses that end in a loop, see rollout/loops.py",
    "rollout/lang_match": "share of judged responses that are in the language of their prompt, see "
    "evaluation/languages.py",
    "rollout/lang_judged": "share of responses whose language could be told and compared",
    "rollout/dropped_repetitive": "responses of this step left out of the loss, as they do",
    "loss/balance": "of the routers, mean over layers; 1 is even, see losses/balance.py",
    "loss/router_z": "mean squared logsumexp of the routers' logits, mean over layers",
    "moe/max_violation": "(largest load - mean) / mean of the experts; worst layer, and by layer",
    "moe/router_entropy": "nats a token; mean over layers, and by layer",
    "moe/dead_experts": "that no token of the step reached; sum over layers, and by layer",
    "moe/replay_mismatch": "share of the sampler's pairs of token and expert that the policy's "
    "routers would not choose; with routing replay; mean over layers, and by layer",
    "optim/grad_norm": "before clipping",
    "optim/lr": "",
    "optim/skipped_non_finite": "1 where the update was not made, as its loss or gradient is not "
    "finite; what was measured and is not finite is left out then",
    "optim/skipped_spike": "1 where the update was not made, see optim.spike_factor",
    "data/num_sequences": "of this step",
    "data/num_loss_tokens": "of this step",
    "data/num_tokens": "of this step, prompts included",
    "data/dropped_too_long": "rows over the length limit, of this step",
    "data/dropped_no_loss": "rows without a token to learn or a prompt to answer, of this step",
    "data/dropped_special": "rows whose text holds control tokens, of this step",
    "data/dropped_empty": "rows with an answer that says nothing, of this step",
    "data/dropped_malformed": "rows that are no chat, or none for the template, of this step",
    "data/truncated": "rows that were cut to the length limit and used, of this step",
    "data/epoch": "of the source that has been repeated most",
    "data/share": "of the sequences used since the run began, by source, category and language",
    "perf/tokens_per_second": "tokens trained on, all ranks, over the whole step",
    "perf/tokens_per_second_per_gpu": "tokens trained on by a rank, over the whole step",
    "perf/mfu": "share of the GPUs' peak that an update's products reach; on known GPUs",
    "perf/offloaded_gib": "of this rank's device, without the optimizer's state and gradients",
    "checkpoint/failures": "saves of this launch that failed",
    "memory/peak_gib": "most that a rank has held since its start: of its GPU, or in all",
    "time/step": "seconds",
    "time/sync": "seconds",
    "time/sample": "seconds",
    "time/score": "seconds",
    "time/train": "seconds",
    "time/offload": "seconds of time/train; the optimizer's state to the host and back",
    "time/evaluate": "seconds",
    "cascade/phase": "position in the cascade, from 0",
}
"""Every metric and its unit.

`moe/` metrics also come as `<name>/layer_<number>`; `kl/`, `loss/` and `rollout/` metrics of OPD as
`<name>/category_<...>` and `<name>/language_<...>`; `data/share` only so, and as
`data/share/source_<...>`.
"""


@dataclass(frozen=True)
class StepWork:
    """Floating-point operations of matrix products that the tokens of a step need, all ranks'."""

    per_token: float
    per_loss_token: float
    per_token_and_key: float
    """Of attention, for each token that a token of its sequence may see."""
    peak: float
    """Operations that all ranks' cards can make in a second."""

    def utilization(self, metrics: Metrics, seconds: float) -> float:
        """Share of the peak, of a step with these metrics, whose update took so long.

        Sequences count as if all were of the mean length, which is the least work.
        """
        num_tokens = metrics["data/num_tokens"]
        mean_length = num_tokens / max(1.0, metrics["data/num_sequences"])
        work = num_tokens * (self.per_token + self.per_token_and_key * mean_length)
        work += metrics["data/num_loss_tokens"] * self.per_loss_token
        return work / seconds / self.peak


PART = re.compile(r"/(layer_\d+|(source|category|language|task)_[^/]+|p\d\d)$")
QUANTILES = (0.05, 0.5, 0.95)
# Quantiles are read off counts over this range, in nats, which add up over ranks.
SPREAD_BOUND = 20.0
SPREAD_BINS = 4000


def check_names(names: Iterable[str]) -> None:
    """Refuse a metric that is not in the list."""
    unknown = [name for name in names if PART.sub("", name) not in NAMES]
    assert not unknown, f"metrics that metrics.py does not list: {unknown}"


class MetricSums:
    """Sums over the loss tokens of a step's microbatches, in all and by group."""

    def __init__(self) -> None:
        self._sums: dict[str, dict[str, Tensor]] = {}  # group, "" for all -> metric -> scalar
        self._counts: dict[str, Tensor] = {}  # metric -> [SPREAD_BINS]

    def add(self, output: LossOutput, microbatch: Microbatch) -> None:
        """Add one microbatch; stays on its device."""
        if not output.values:
            return
        values = torch.stack(list(output.values.values())).double()  # [metrics, N]
        self._add_group("", output.values, values.sum(1))
        rows = torch.cat([values, torch.ones_like(values[:1])])  # the last counts tokens
        by_group = rows.new_zeros(len(rows), len(microbatch.groups) + 1)  # the last: no group
        for ids in microbatch.group_ids.T:
            by_group.index_add_(1, ids, rows)
        for group, sums in zip(microbatch.groups, by_group.T[:-1], strict=True):
            self._add_group(group, [*output.values, COUNT], sums)
        for name, value in output.spreads.items():
            counts = torch.histc(value, SPREAD_BINS, -SPREAD_BOUND, SPREAD_BOUND)
            outside = value.clamp(-SPREAD_BOUND, SPREAD_BOUND).abs() == SPREAD_BOUND
            counts[0] += (outside & (value < -SPREAD_BOUND)).sum()
            counts[-1] += (outside & (value > SPREAD_BOUND)).sum()
            self._counts[name] = self._counts.get(name, 0) + counts.double()

    def _add_group(self, group: str, names: Iterable[str], sums: Tensor) -> None:
        known = self._sums.setdefault(group, {})
        for name, value in zip(names, sums, strict=True):
            known[name] = known[name] + value if name in known else value

    def mean(self, num_tokens: float) -> Metrics:
        """Divide by numbers of tokens, once, after one exchange between the ranks."""
        return self.mean_beside(num_tokens, None)[0]

    def mean_beside(
        self, num_tokens: float, beside: Tensor | None
    ) -> tuple[Metrics, Tensor | None]:
        """`mean`, and in the same exchange the sum over all ranks of a tensor of each, on the host.

        Args:
            num_tokens: Of all ranks.
            beside: Of one shape on all ranks, or on all of them None.
        """
        sums = self._on_host()
        counts = {name: found.cpu() for name, found in self._counts.items()}
        totals: dict[str, dict[str, float]] = {}
        spreads: dict[str, Tensor] = {}
        of_ranks = gather_objects((sums, counts, None if beside is None else beside.cpu()))
        others = [other for *_, other in of_ranks if other is not None]
        joint = torch.stack(others).sum(0) if others else None
        for sums_of_rank, counts_of_rank, _ in of_ranks:
            for group, found in sums_of_rank.items():
                known = totals.setdefault(group, {})
                for name, value in found.items():
                    known[name] = known.get(name, 0.0) + value
            for name, bins in counts_of_rank.items():
                spreads[name] = spreads.get(name, 0) + bins
        metrics = {name: value / num_tokens for name, value in totals.pop("", {}).items()}
        for group, of_group in sorted(totals.items()):
            count = of_group.pop(COUNT)
            if count:  # no token of it may have loss
                metrics |= {f"{name}/{group}": value / count for name, value in of_group.items()}
        for name, bins in spreads.items():
            for share, value in zip(QUANTILES, _quantiles(bins), strict=True):
                metrics[f"{name}/p{round(100 * share):02d}"] = value
        return metrics, joint

    def _on_host(self) -> dict[str, dict[str, float]]:
        """The sums as numbers, for which a GPU is waited for once."""
        scalars = [value for found in self._sums.values() for value in found.values()]
        values = iter(torch.stack(scalars).tolist() if scalars else [])
        return {
            group: {name: next(values) for name in found} for group, found in self._sums.items()
        }


COUNT = "tokens"


def _quantiles(counts: Tensor) -> list[float]:
    """Middle of the bins in which the quantiles lie; counts is [SPREAD_BINS]."""
    shares = counts.cumsum(0) / counts.sum()
    bins = torch.searchsorted(shares, torch.tensor(QUANTILES, dtype=shares.dtype))
    width = 2 * SPREAD_BOUND / SPREAD_BINS
    found: list[float] = (-SPREAD_BOUND + width * (bins + 0.5)).tolist()
    return found
