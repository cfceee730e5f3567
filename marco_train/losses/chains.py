"""What is computed of a tile of logits between two products, element by element.

    logits [n, B] -> chain -> sums [n], or gradients [n, B]

Each operation of a chain reads and writes the tile once, which on a GPU takes longer than the
products. `compile_chains` has torch make one pass of each chain: its numbers are the same up to
rounding. A chain may overwrite the tiles that it is given, and does nothing else but to return.

Legend: n tokens with loss and B entries of the vocabulary in a tile.
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
def block_softmax(logits_nB: Tensor, *values_nB: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Sum up a block under its own softmax.

    Returns:
        The largest logit, the sum of exp(logit - largest), and of each of the values its sum with
        these weights, [n] each.
    """
    top = logits_nB.amax(1, keepdim=True)
    p_nB = (logits_nB - top).exp_()
    return top[:, 0], p_nB.sum(1), [(p_nB * value_nB).sum(1) for value_nB in values_nB]


@chain
def softmax_gradient(logits_nB: Tensor, logsumexp: Tensor, weight: Tensor) -> Tensor:
    """Give p times a weight [n, 1], in place of the logits."""
    return logits_nB.sub_(logsumexp[:, None]).exp_().mul_(weight)


@chain
def kl_gradient(
    policy_nB: Tensor, teacher_nB: Tensor, logsumexp: Tensor, gap: Tensor, grad: Tensor
) -> Tensor:
    """Give that of the reverse KL for the policy's logits.

    d KL / d logits = p (log p - log q - KL), in which both logsumexps cancel.

    Args:
        policy_nB: Overwritten.
        teacher_nB: Logits.
        logsumexp: [n], the policy's.
        gap: [n], mean of policy - teacher under the policy's softmax.
        grad: [n], that of the KL.
    """
    gap_nB = (policy_nB - teacher_nB).sub_(gap[:, None])
    p_nB = policy_nB.sub_(logsumexp[:, None]).exp_()
    return gap_nB.mul_(p_nB).mul_(grad[:, None])
