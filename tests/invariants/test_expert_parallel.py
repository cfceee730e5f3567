"""Experts over two ranks give what all experts on one rank give."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from marco_train.models import load_model, save_model
from marco_train.models.hf_io import named_weights, random_model
from tests.conftest import architecture
from tests.ranks import run_on_ranks

# Tokens of each rank: alike, uneven, and one rank with a single token.
SHARES = [(12, 12), (30, 5), (1, 40)]


def probe(hidden: torch.Tensor) -> torch.Tensor:
    """A loss that is not blind to the scale, as the final norm makes a plain square."""
    places = torch.arange(hidden.numel()).view_as(hidden)
    return (hidden * torch.sin(places.float())).sum()


def reference(tokens: int, path: Path) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model = load_model(path, torch.float32)
    hidden = model(torch.arange(tokens)[None] * 11 % 320, torch.arange(tokens)[None])
    probe(hidden).backward()
    return hidden.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def on_rank(shares: tuple[int, int], path: Path) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    group = dist.new_group([0, 1])
    model = load_model(path, torch.float32, group)
    tokens = shares[dist.get_rank()]
    hidden = model(torch.arange(tokens)[None] * 11 % 320, torch.arange(tokens)[None])
    probe(hidden).backward()
    return hidden.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("shares", SHARES)
def test_two_ranks_of_experts_equal_one(shares: tuple[int, int], tmp_path: Path) -> None:
    path = tmp_path / "model"
    save_model(random_model(architecture(), torch.float32, seed=5), path)
    found = run_on_ranks(2, on_rank, shares, path)
    expected = [reference(tokens, path) for tokens in shares]
    for (hidden, _), (wanted, _) in zip(found, expected, strict=True):
        torch.testing.assert_close(hidden, wanted, rtol=1e-5, atol=1e-5)
    for name in expected[0][1]:
        wanted = sum(gradients[name] for _, gradients in expected)
        if ".experts." in name:
            # A rank's experts have the gradient of every rank's tokens already.
            gradient = torch.cat([gradients[name] for _, gradients in found])
        else:
            gradient = sum(gradients[name] for _, gradients in found)
        torch.testing.assert_close(
            gradient, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max())
        )


def save_sharded(path: Path, out: Path) -> None:
    model = load_model(path, torch.float32, dist.new_group([0, 1]))
    assert model.model.layers[0].mlp.experts.down_proj.shape[0] == 4
    save_model(model, out)


def test_a_model_saved_from_two_ranks_is_the_model_bit_for_bit(tmp_path: Path) -> None:
    original = random_model(architecture(), torch.float32, seed=5)
    save_model(original, tmp_path / "one")
    run_on_ranks(2, save_sharded, tmp_path / "one", tmp_path / "two")
    again = dict(named_weights(load_model(tmp_path / "two", torch.float32)))
    for name, weight in named_weights(original):
        assert torch.equal(weight, again[name]), name
