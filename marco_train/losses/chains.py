"""What is computed of a tile of logits between two products, element by element.

    logits [N, B] -> chain -> sums [N], or gradients [N, B]

Each operation of a chain reads and writes the tile once, which on a GPU takes longer than the
products. `compile_chains` has torch make one pass of each chain: its numbers are the same up to
rounding. A chain may overwrite the tiles that it is given, and does nothing else but to return.

Legend: N tokens with loss, B entries of the vocabulary in a tile.
"""

import os
from collections.abc import Callable
from functools import cache, wraps
from importlib.util import find_spec
from shutil import which
from typing import ClassVar, ParamSpec, TypeVar

import torch
from torch import Tensor

from marco_train.errors import require

P = ParamSpec("P")
T = TypeVar("T")


class Chains:
    """How this process computes chains."""

    are_compiled: ClassVar[bool] = False


def compile_chains(asked: bool) -> None:
    """Choose for this process; a chain is compiled when it is first computed.

    Raises:
        InputError: What compiles is not installed.
    """
    if asked and torch.cuda.is_available():
        require(
            find_spec("triton") is not None,
            "compile_losses needs triton on a GPU: install it, or leave compile_losses out",
        )
    elif asked:
        compiler = os.environ.get("CXX", "g++")
        require(
            which(compiler) is not None,
            f"compile_losses needs a C++ compiler on a CPU, and there is no {compiler!r}: install "
            "g++, name another in $CXX, or leave compile_losses out",
        )
    Chains.are_compiled = asked


def chain(eager: Callable[P, T]) -> Callable[P, T]:
    """Let a function of tiles be compiled where that is asked for."""

    @cache
    def compiled() -> Callable[P, T]:
        return torch.compile(eager, dynamic=True)  # which imports the compiler

    @wraps(eager)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        made = compiled() if Chains.are_compiled else eager
        return made(*args, **kwargs)

    return call


@chain
def block_softmax(logits_NB: Tensor, *values_NB: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Sum up a block under its own softmax.

    Returns:
        The largest logit, the sum of exp(logit - largest), and of each of the values its sum with
        these weights, [N] each.
    """
    top = logits_NB.amax(1, keepdim=True)
    p_NB = (logits_NB - top).exp_()
    return top[:, 0], p_NB.sum(1), [(p_NB * value_NB).sum(1) for value_NB in values_NB]


@chain
def softmax_gradient(logits_NB: Tensor, logsumexp: Tensor, weight: Tensor) -> Tensor:
    """Give p times a weight [N, 1], in place of the logits."""
    return logits_NB.sub_(logsumexp[:, None]).exp_().mul_(weight)


@chain
def kl_gradient(
    policy_NB: Tensor, teacher_NB: Tensor, logsumexp: Tensor, gap: Tensor, grad: Tensor
) -> Tensor:
    """Give that of the reverse KL for the policy's logits.

    d KL / d logits = p (log p - log q - KL), in which both logsumexps cancel.

    Args:
        policy_NB: Overwritten.
        teacher_NB: Logits.
        logsumexp: [N], the policy's.
        gap: [N], mean of policy - teacher under the policy's softmax.
        grad: [N], that of the KL.
    """
    gap_NB = (policy_NB - teacher_NB).sub_(gap[:, None])
    p_NB = policy_NB.sub_(logsumexp[:, None]).exp_()
    return gap_NB.mul_(p_NB).mul_(grad[:, None])
