"""The sampler's cache of keys and values."""

import pytest
import torch

from marco_train.models import attention
from marco_train.models.attention import KVCache
from marco_train.models.qwen3_moe import Qwen3Moe
from marco_train.models.weights import random_model
from tests.helpers.models import architecture

PROMPTS = ([3, 4, 5, 6, 7, 8, 9], [11, 12, 13])


def fed(model: Qwen3Moe, tokens: list[list[int]], drop_at: int) -> list[torch.Tensor]:
    """Hidden states of the first sequence's tokens, the second's leaving after so many."""
    cache = KVCache(model.architecture.num_hidden_layers)
    positions = torch.cat([torch.arange(len(ids)) for ids in PROMPTS])[None]
    cache.start(positions)
    ids = torch.tensor([[token for prompt in PROMPTS for token in prompt]])
    hidden = model(ids, positions, cache)
    states = [hidden[len(PROMPTS[0]) - 1]]
    for place, new in enumerate(tokens):
        if place == drop_at:
            cache.keep(torch.tensor([0]))
        running = new[:1] if place >= drop_at else new
        states.append(model(torch.tensor([running]), cache.advance(), cache)[0])
    return states


@pytest.mark.parametrize("growth", [1, 4, 256])
@torch.inference_mode()
def test_a_cache_that_grows_gives_what_whole_sequences_give(
    growth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "GROWTH", growth)
    model = random_model(architecture(), torch.float32, seed=0)
    tokens = torch.randint(20, 300, (30, 2), generator=torch.Generator().manual_seed(0)).tolist()
    whole = [*PROMPTS[0], *(first for first, _ in tokens)]
    expected = model(torch.tensor([whole]), torch.arange(len(whole))[None])
    for found, wanted in zip(
        fed(model, tokens, drop_at=11), expected[len(PROMPTS[0]) - 1 :], strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_no_room_is_reserved_for_tokens_that_may_never_come() -> None:
    model = random_model(architecture(), torch.float32, seed=0)
    cache = KVCache(model.architecture.num_hidden_layers)
    positions = torch.arange(700)[None]
    cache.start(positions)
    model(torch.full((1, 700), 5), positions, cache)
    keys = cache._keys[0]
    assert keys is not None and keys.shape[2] == 700 + attention.GROWTH
    for _ in range(attention.GROWTH + 1):
        model(torch.tensor([[6]]), cache.advance(), cache)
    keys = cache._keys[0]
    assert keys is not None and keys.shape[2] == 700 + 2 * attention.GROWTH
