"""Packed sequences are as good as alone."""

import torch

from marco_train.data.packing import pack_examples
from marco_train.models.weights import random_model
from marco_train.types import Example
from tests.helpers.models import architecture
from tests.helpers.ranks import run_on_ranks

LENGTHS = (3, 64, 65, 1, 200, 17)


def test_packed_sequences_give_the_outputs_and_gradients_of_each_alone() -> None:
    model = random_model(architecture(), torch.float32, seed=3)
    generator = torch.Generator().manual_seed(0)
    sequences = [torch.randint(0, 320, (n,), generator=generator) for n in LENGTHS]
    weights = torch.randn(sum(LENGTHS), 32, generator=generator)

    packed = model(torch.cat(sequences)[None], torch.cat([torch.arange(n) for n in LENGTHS])[None])
    (packed * weights).sum().backward()
    packed_gradients = {name: p.grad.clone() for name, p in model.named_parameters()}  # type: ignore[union-attr]

    model.zero_grad()
    alone = [model(ids[None], torch.arange(len(ids))[None]) for ids in sequences]
    torch.testing.assert_close(packed, torch.cat(alone), rtol=1e-5, atol=1e-5)
    (torch.cat(alone) * weights).sum().backward()
    for name, parameter in model.named_parameters():
        bound = 1e-5 * float(packed_gradients[name].abs().max())
        torch.testing.assert_close(parameter.grad, packed_gradients[name], rtol=1e-4, atol=bound)


def test_a_token_does_not_see_its_neighbour_sequence() -> None:
    model = random_model(architecture(), torch.float32, seed=3)
    positions = torch.tensor([[0, 1, 2, 0, 1]])
    one = model(torch.tensor([[5, 6, 7, 8, 9]]), positions)
    other = model(torch.tensor([[50, 60, 70, 8, 9]]), positions)
    torch.testing.assert_close(one[3:], other[3:], rtol=1e-6, atol=1e-6)
    assert (one[:3] - other[:3]).abs().max() > 0.1


def pack_uneven() -> list[tuple[list[list[int]], int]]:
    import torch.distributed as dist

    count = [3, 0][dist.get_rank()]
    batches = pack_examples([Example([1, 2, 3], [True] * 3)] * count, max_tokens=2)
    return [(batch.input_ids.tolist(), batch.num_loss_tokens) for batch in batches]


def test_every_rank_gets_as_many_microbatches_the_empty_ones_without_loss() -> None:
    full, empty = run_on_ranks(2, pack_uneven)
    assert full == [([[1, 2]], 2)] * 3
    assert empty == [([[0]], 0)] * 3
