"""The routers of one update: their losses, and how evenly the experts were loaded.

Legend: L layers, E experts.
"""

import torch
from torch import Tensor

from marco_train.config.optim import BalanceScope, OptimConfig
from marco_train.distributed import all_reduce_sum
from marco_train.losses.balance import balance_loss, router_z_loss
from marco_train.metrics import Metrics
from marco_train.models.routing import Routing, summarize_load


class UpdateRouting:
    """Sums over the microbatches of one update; a dense model leaves it empty."""

    def __init__(self, optim: OptimConfig, num_tokens: float) -> None:
        """Begin an update of `num_tokens` tokens, over all ranks."""
        self._optim = optim
        self._num_tokens = num_tokens
        # Of this rank: load and probability [L, E], entropy and squared logsumexp [L], pairs
        # replayed [L, 2].
        self._sums: tuple[Tensor, ...] | None = None
        self._load_of_all: Tensor | None = None  # [L, E], of all ranks so far

    def loss(self, routing: Routing, num_tokens: int) -> Tensor | float:
        """Add a microbatch; returns this rank's part of the router losses of the whole update.

        Every rank takes part. A microbatch without a real token (`num_tokens` 0) counts nothing.
        """
        if routing.is_empty:
            return 0.0
        is_real = float(num_tokens > 0)
        load = routing.load * is_real
        load_of_scope = self._load_of_scope(load)
        sums = (
            load,
            routing.probability,
            routing.entropy,
            routing.squared_logsumexp,
            routing.replayed,
        )
        seen = tuple(x.detach() * is_real for x in sums)
        if self._sums is not None:
            seen = tuple(a + b for a, b in zip(self._sums, seen, strict=True))
        self._sums = seen
        if num_tokens == 0:
            return 0.0
        balance = balance_loss(load_of_scope, routing.probability, num_tokens)
        router_z = router_z_loss(routing.squared_logsumexp, num_tokens)
        weighted = (
            self._optim.balance_coefficient * balance + self._optim.router_z_coefficient * router_z
        )
        return weighted * (num_tokens / self._num_tokens)

    def _load_of_scope(self, load: Tensor) -> Tensor:
        """Load [L, E] that the balance loss takes its shares from."""
        is_global = self._optim.balance_scope is BalanceScope.global_batch
        if self._optim.balance_coefficient == 0 or not is_global:
            return load
        load = all_reduce_sum(load)
        self._load_of_all = load if self._load_of_all is None else self._load_of_all + load
        return self._load_of_all

    @property
    def sums(self) -> Tensor | None:
        """Of this rank's microbatches, [2 L E + 4 L]; None: no router ran."""
        if self._sums is None:
            return None
        return torch.cat([x.flatten() for x in self._sums])

    def metrics(self, total: Tensor | None) -> Metrics:
        """Losses and loads of the whole update, in all and by layer; `total` is all ranks' sums."""
        if self._sums is None or total is None:
            return {}
        sizes = [x.numel() for x in self._sums]
        parts = torch.split(total, sizes)
        load, probability, entropy, squared_logsumexp, replayed = (
            x.view_as(like) for x, like in zip(parts, self._sums, strict=True)
        )
        num_tokens, num_layers = round(self._num_tokens), len(load)
        layers = summarize_load(load, entropy, num_tokens)
        metrics = {
            "loss/balance": float(balance_loss(load, probability, num_tokens)) / num_layers,
            "loss/router_z": float(router_z_loss(squared_logsumexp, num_tokens)) / num_layers,
            "moe/max_violation": max(layer.max_violation for layer in layers),
            "moe/router_entropy": sum(layer.entropy for layer in layers) / num_layers,
            "moe/dead_experts": float(sum(layer.num_dead for layer in layers)),
        }
        for number, layer in enumerate(layers):
            metrics[f"moe/max_violation/layer_{number}"] = layer.max_violation
            metrics[f"moe/router_entropy/layer_{number}"] = layer.entropy
            metrics[f"moe/dead_experts/layer_{number}"] = float(layer.num_dead)
        if replayed.any():
            shares = (replayed[:, 1] / replayed[:, 0]).tolist()
            metrics["moe/replay_mismatch"] = sum(shares) / num_layers
            for number, share in enumerate(shares):
                metrics[f"moe/replay_mismatch/layer_{number}"] = share
        return metrics
