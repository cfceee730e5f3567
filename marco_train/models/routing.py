"""Which experts a token goes to, and what the routers of a forward pass did.

Legend: T tokens, D width, E experts, K experts a token, L layers.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LayerRouting(NamedTuple):
    """What one router did, summed over tokens; the two sums of losses carry a gradient."""

    expert_ids: Tensor  # [T, K] int64
    load: Tensor  # [E] float32, pairs of token and expert
    probability: Tensor  # [E] float32, sum of the softmax over all experts; differentiable
    squared_logsumexp: Tensor  # scalar float32; differentiable
    entropy: Tensor  # scalar float32, of the softmax over all experts, nats
    replayed: Tensor  # [2] float32: pairs given, and those that are not the router's own choice


class Router(nn.Module):
    """Choose K experts for each token and weigh them."""

    def __init__(self, width: int, num_experts: int, top_k: int, norm_topk_prob: bool) -> None:
        super().__init__()
        self.top_k = top_k
        self.norm_topk_prob = norm_topk_prob
        self.weight = nn.Parameter(torch.empty(num_experts, width))

    def forward(
        self, hidden: Tensor, given: Tensor | None, observe: bool
    ) -> tuple[Tensor, Tensor, LayerRouting | None]:
        """Route tokens.

        Args:
            hidden: [T, D].
            given: Experts [T, K] int64 to take instead of the router's own choice, in any order;
                their weights are still the router's. None: its own choice.
            observe: Whether to sum up what happened.

        Returns:
            Weights [T, K] float32, experts [T, K] int64, and the sums where asked for.
        """
        # float32: a tie broken by rounding would send a token to another expert.
        logits = F.linear(hidden, self.weight).float()
        probabilities = logits.softmax(-1)
        if given is None:
            weights, expert_ids = probabilities.topk(self.top_k, dim=-1)
        else:
            weights, expert_ids = probabilities.gather(1, given), given
        if self.norm_topk_prob:
            weights = weights / weights.sum(-1, keepdim=True)
        if not observe:
            return weights, expert_ids, None
        load = torch.zeros(len(self.weight), device=hidden.device)
        load.scatter_add_(0, expert_ids.flatten(), torch.ones_like(weights).flatten())
        logsumexp = logits.logsumexp(-1)
        entropy = (logsumexp - torch.linalg.vecdot(probabilities, logits)).sum().detach()
        seen = LayerRouting(
            expert_ids,
            load,
            probabilities.sum(0),
            logsumexp.square().sum(),
            entropy,
            self._replayed(probabilities, given),
        )
        return weights, expert_ids, seen

    @torch.no_grad()
    def _replayed(self, probabilities: Tensor, given: Tensor | None) -> Tensor:
        """Count the pairs of token and expert that were given, and the foreign ones, [2]."""
        if given is None:
            return probabilities.new_zeros(2)
        own = probabilities.topk(self.top_k, dim=-1).indices
        foreign = (given[:, :, None] != own[:, None]).all(-1)  # [T, K], as a set: in any order
        return torch.stack([torch.ones_like(foreign).sum(), foreign.sum()]).float()


class Routing:
    """The routing of one forward pass: given to it, or observed in it.

    Pass one to the model to have it filled, layer by layer; with `expert_ids` the routers take
    those experts, [L, T, K] int64, as a sampler chose them (routing replay).
    """

    def __init__(self, expert_ids: Tensor | None = None) -> None:
        self._given = expert_ids
        self._layers: list[LayerRouting] = []

    def given(self, layer: int) -> Tensor | None:
        """Experts [T, K] that the layer has to take. None: its own choice."""
        return None if self._given is None else self._given[layer]

    def add(self, seen: LayerRouting) -> None:
        """Take what the next layer did."""
        self._layers.append(seen)

    @property
    def is_empty(self) -> bool:
        """Whether no router ran: the model is dense."""
        return not self._layers

    @property
    def expert_ids(self) -> Tensor:
        """[L, T, K] int64."""
        return torch.stack([layer.expert_ids for layer in self._layers])

    @property
    def load(self) -> Tensor:
        """[L, E] float32, pairs of token and expert."""
        return torch.stack([layer.load for layer in self._layers])

    @property
    def probability(self) -> Tensor:
        """[L, E] float32, summed over tokens; differentiable."""
        return torch.stack([layer.probability for layer in self._layers])

    @property
    def squared_logsumexp(self) -> Tensor:
        """[L] float32, summed over tokens; differentiable."""
        return torch.stack([layer.squared_logsumexp for layer in self._layers])

    @property
    def entropy(self) -> Tensor:
        """[L] float32, nats, summed over tokens."""
        return torch.stack([layer.entropy for layer in self._layers])

    @property
    def replayed(self) -> Tensor:
        """[L, 2] float32: pairs given, and those that are not the router's own choice."""
        return torch.stack([layer.replayed for layer in self._layers])


@dataclass(frozen=True)
class LoadSummary:
    """How evenly a layer's tokens fell on its experts."""

    max_violation: float  # (largest load - mean load) / mean load, arXiv 2408.15664
    entropy: float  # of the routers' softmax, mean over tokens, nats
    num_dead: int  # experts that no token reached


def summarize_load(load: Tensor, entropy: Tensor, num_tokens: float) -> list[LoadSummary]:
    """Summarise each layer from sums over all ranks: load [L, E] and entropy [L]."""
    mean = load.mean(1).clamp(min=1e-30)
    violation = (load.amax(1) - mean) / mean
    dead = (load == 0).sum(1)
    means = entropy / num_tokens
    return [
        LoadSummary(*found)
        for found in zip(violation.tolist(), means.tolist(), dead.tolist(), strict=True)
    ]


class LanguageSignatures:
    """How often each expert is taken, by language (Marco-MoE figures 9 and 10).

    The signature of a language is the share of its pairs of token and expert that each expert of
    each layer got, [L, E], every layer summing to 1.
    """

    def __init__(self) -> None:
        self._loads: dict[str, Tensor] = {}

    def add(self, language: str, load: Tensor) -> None:
        """Add the loads [L, E] of some tokens of a language."""
        load = load.double().cpu()
        self._loads[language] = self._loads.get(language, torch.zeros_like(load)) + load

    @property
    def languages(self) -> list[str]:
        """Languages seen, sorted."""
        return sorted(self._loads)

    def loads(self) -> Tensor:
        """[languages, L, E] float64, counts."""
        if not self._loads:
            return torch.zeros(0, 0, 0, dtype=torch.float64)
        return torch.stack([self._loads[language] for language in self.languages])

    def shares(self) -> Tensor:
        """[languages, L, E] float64."""
        loads = self.loads()
        return loads / loads.sum(-1, keepdim=True).clamp(min=1)

    def distances(self) -> Tensor:
        """1 - Pearson correlation of the flattened signatures, [languages, languages].

        1 where a signature is the same for all experts, and correlates with none.
        """
        correlations = torch.corrcoef(self.shares().flatten(1)).view(2 * (len(self._loads),))
        return 1 - correlations.nan_to_num(nan=0.0)
