"""What is computed of a tile of logits between two products, element by element.

    logits [n, B] -> chain -> sums [n], or gradients [n, B]

Each operation of a chain reads and writes the tile once, which on a GPU takes longer than the
products. `compile_chains` has torch make one pass of each chain: its numbers are the same up to
rounding. A CPU takes some tokens of a tile at a time through a chain, so that they stay in its
cache. A chain computes every token by itself; it returns sums of each token, or overwrites its
first tile and returns (), and does nothing else.

Legend: n tokens with loss and B entries of the vocabulary in a tile.
"""

import os
from collections.abc import Callable
from functools import cache, wraps
from importlib.util import find_spec
from shutil import which
from typing import ClassVar

import torch
from torch import Tensor

from marco_train.errors import require

Chain = Callable[..., tuple[Tensor, ...]]

# Elements of a tile that an eager chain takes at once, where it does not take all.
SLICE_ELEMENTS = {"cpu": 2**17}


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


def chain(eager: Chain) -> Chain:
    """Let a function of tiles [n, B] and of numbers of their tokens [n, ...] be computed as chosen.

    It is compiled where that is asked for, or else takes the tokens slice by slice.
    """

    @cache
    def compiled() -> Chain:
        return torch.compile(eager, dynamic=True)  # which imports the compiler

    @wraps(eager)
    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        if Chains.are_compiled:
            return compiled()(*tensors)
        tile_nB = tensors[0]
        elements = SLICE_ELEMENTS.get(tile_nB.device.type)
        if elements is None or tile_nB.numel() <= elements:
            return eager(*tensors)
        step = max(1, elements // tile_nB.shape[1])
        slices = zip(*(torch.split(tensor, step) for tensor in tensors), strict=True)
        found = [eager(*each) for each in slices]
        return tuple(torch.cat(sums) for sums in zip(*found, strict=True))

    return call


def _softmax(logits_nB: Tensor, *values_nB: Tensor) -> tuple[Tensor, ...]:
    top = logits_nB.amax(1, keepdim=True)
    p_nB = (logits_nB - top).exp_()
    return top[:, 0], p_nB.sum(1), *((p_nB * value_nB).sum(1) for value_nB in values_nB)


@chain
def block_softmax(logits_nB: Tensor, *values_nB: Tensor) -> tuple[Tensor, ...]:
    """Sum up a block under its own softmax.

    Returns:
        The largest logit, the sum of exp(logit - largest), and of each of the values its sum with
        these weights, [n] each.
    """
    return _softmax(logits_nB, *values_nB)


@chain
def block_comparison(policy_nB: Tensor, teacher_nB: Tensor) -> tuple[Tensor, ...]:
    """Sum up a block of two models: `block_softmax` of the policy, and then of the teacher.

    The values of each are its own logits, and policy - teacher.
    """
    gap_nB = policy_nB - teacher_nB
    return *_softmax(policy_nB, policy_nB, gap_nB), *_softmax(teacher_nB, teacher_nB, gap_nB)


@chain
def softmax_gradient(logits_nB: Tensor, logsumexp: Tensor, weight: Tensor) -> tuple[()]:
    """Put p times a weight [n, 1] in place of the logits."""
    logits_nB.sub_(logsumexp[:, None]).exp_().mul_(weight)
    return ()


@chain
def kl_gradient(
    policy_nB: Tensor, teacher_nB: Tensor, logsumexp: Tensor, gap: Tensor, grad: Tensor
) -> tuple[()]:
    """Put the gradient of the reverse KL in place of the policy's logits.

    d KL / d logits = p (log p - log q - KL), in which both logsumexps cancel.

    Args:
        policy_nB: Logits.
        teacher_nB: Logits.
        logsumexp: [n], the policy's.
        gap: [n], mean of policy - teacher under the policy's softmax.
        grad: [n], that of the KL.
    """
    gap_nB = (policy_nB - teacher_nB).sub_(gap[:, None])
    policy_nB.sub_(logsumexp[:, None]).exp_().mul_(gap_nB).mul_(grad[:, None])
    return ()
