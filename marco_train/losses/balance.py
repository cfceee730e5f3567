"""Losses on the routers: an even load, and small logits. Off by default, as in the paper.

Balance, for one layer (Switch Transformer, arXiv 2101.03961, equations 4 to 6, with the pairs of a
token counted evenly for top-k):

    E * sum_e f_e P_e     f_e: share of the pairs that go to expert e, no gradient
                          P_e: mean router probability of expert e

It is 1 for an even load and grows to E. `f` is of this rank's microbatch, or of all ranks'
microbatches of the update so far (arXiv 2501.11873): what is even over a batch need not be so in
each sequence, and experts may specialise. transformers' router_aux_loss is K times this.

Under routing replay `f` counts the experts that were taken, which are the sampler's: they computed
and learn from these tokens. `P` and the z-loss are of the policy's own routers, which they move.

z-loss, for one layer (ST-MoE, arXiv 2202.08906, equation 5): the mean of logsumexp(logits)^2.

Both are summed over layers. Legend: L layers, E experts.
"""

import torch
from torch import Tensor


def balance_loss(load: Tensor, probability: Tensor, num_tokens: int) -> Tensor:
    """Sum over layers of the balance loss.

    Args:
        load: [L, E] pairs of token and expert, of the scope f is taken over.
        probability: [L, E] float32 router probabilities, summed over the microbatch's tokens.
        num_tokens: Of the microbatch.

    Returns:
        Scalar float32, differentiable in `probability`.
    """
    shares = load / load.sum(-1, keepdim=True)
    return load.shape[-1] * torch.sum(shares * probability / num_tokens)


def router_z_loss(squared_logsumexp: Tensor, num_tokens: int) -> Tensor:
    """Sum over layers of the mean squared logsumexp; [L] sums over tokens -> scalar float32."""
    return squared_logsumexp.sum() / num_tokens
