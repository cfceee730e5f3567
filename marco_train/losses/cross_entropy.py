"""The SFT loss."""

from marco_train.losses.ahead import summed_logprobs
from marco_train.losses.logprobs import at_loss_tokens
from marco_train.types import LossOutput, Microbatch, PolicyOutput


def cross_entropy(output: PolicyOutput, microbatch: Microbatch) -> LossOutput:
    """Sum -log p(target) over the tokens with loss; the caller divides by their global number."""
    total, logprobs, entropy = summed_logprobs(*at_loss_tokens(output, microbatch))
    values = {"loss/cross_entropy": -logprobs, "loss/entropy": entropy}
    return LossOutput(-total, values, spreads={})
