"""Log-probabilities tile by tile, against the whole distribution in float64."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import marco_train.losses.ahead as ahead_module
import marco_train.losses.logprobs as logprobs_module
from marco_train.errors import InputError
from marco_train.losses.ahead import summed_logprobs
from marco_train.losses.chains import compile_chains
from marco_train.losses.logprobs import (
    gather_logprobs,
    sequence_logprobs,
    tiles,
    token_logprobs,
    topk_logprobs,
)

TOKENS, WIDTH, VOCAB, ASKED = 11, 6, 23, 4


@pytest.fixture(
    params=[(11, 1), (11, 4), (4, 4), (1, 23), (64, 64)],
    ids=lambda sizes: "tiles of {} x {}".format(*sizes),
)
def _tile(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, block = request.param
    monkeypatch.setattr(logprobs_module, "TILE_ROWS", {"cpu": rows})
    monkeypatch.setattr(logprobs_module, "TILE_ELEMENTS", {"cpu": rows * block})
    monkeypatch.setattr(ahead_module, "KEPT_TILE_ELEMENTS", rows * block)
    monkeypatch.setattr(logprobs_module, "MIN_BLOCK", 1)


def draw(dtype: torch.dtype, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, WIDTH, generator=g, dtype=torch.float64) * scale
    head = torch.randn(VOCAB, WIDTH, generator=g, dtype=torch.float64)
    ids = torch.randint(0, VOCAB, (TOKENS, ASKED), generator=g)
    return hidden.to(dtype).requires_grad_(), head.to(dtype).requires_grad_(), ids


# A large scale makes logits of +-100, whose exponentials overflow unless the largest is taken off.
@pytest.mark.usefixtures("_tile")
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_given_tokens_and_entropy_equal_the_whole_distribution(scale: float) -> None:
    hidden, head, ids = draw(torch.float32, scale)
    hidden64, head64 = (x.detach().double().requires_grad_() for x in (hidden, head))
    weights = torch.arange(1.0, TOKENS * ASKED + 1).view(TOKENS, ASKED)
    found, entropy = gather_logprobs(hidden, head, ids)
    logp = F.linear(hidden64, head64).log_softmax(-1)
    torch.testing.assert_close(found.double(), logp.gather(1, ids), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        entropy.double(), -(logp.exp() * logp).sum(1), rtol=1e-5, atol=2e-5 * scale
    )
    (found * weights).sum().backward()
    (logp.gather(1, ids) * weights).sum().backward()
    for ours, wanted in ((hidden, hidden64), (head, head64)):
        assert ours.grad is not None and wanted.grad is not None
        bound = 1e-5 * float(wanted.grad.abs().max())
        torch.testing.assert_close(ours.grad.double(), wanted.grad, rtol=1e-4, atol=bound)


@pytest.fixture(params=[1, 3, 64], ids=lambda rows: f"pieces of {rows}")
def _ahead(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every sum of so narrow a model is learnt ahead, in pieces of so many tokens."""
    monkeypatch.setattr(ahead_module, "AHEAD_WIDTH", WIDTH)
    monkeypatch.setattr(ahead_module, "PIECE_ELEMENTS", {"cpu": request.param * VOCAB + 1})


@pytest.mark.usefixtures("_tile", "_ahead")
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_a_sum_that_is_learnt_ahead_equals_the_whole_distribution(scale: float) -> None:
    hidden, head, ids = draw(torch.float32, scale)
    hidden64, head64 = (x.detach().double().requires_grad_() for x in (hidden, head))
    total, terms, entropy = summed_logprobs(hidden, head, ids[:, 2])
    assert total.grad_fn is not None and total.grad_fn.name() == "_SumLogprobsBackward"
    assert not terms.requires_grad and not entropy.requires_grad
    logp = F.linear(hidden64, head64).log_softmax(-1)
    wanted = logp.gather(1, ids[:, 2:3])[:, 0]
    torch.testing.assert_close(terms.double(), wanted.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(total, terms.sum())
    torch.testing.assert_close(
        entropy.double(), -(logp.exp() * logp).sum(1), rtol=1e-5, atol=2e-5 * scale
    )
    (total * -0.25).backward()
    (wanted.sum() * -0.25).backward()
    for ours, expected in ((hidden, hidden64), (head, head64)):
        assert ours.grad is not None and expected.grad is not None
        bound = 1e-5 * float(expected.grad.abs().max())
        torch.testing.assert_close(ours.grad.double(), expected.grad, rtol=1e-4, atol=bound)


@pytest.mark.usefixtures("_ahead")
def test_a_sum_is_learnt_ahead_in_float32_alone_and_not_where_nothing_is_learnt() -> None:
    hidden, head, ids = draw(torch.float32)
    with torch.no_grad():
        total, *_ = summed_logprobs(hidden, head, ids[:, 0])
    assert not total.requires_grad
    total, *_ = summed_logprobs(hidden.detach(), head, ids[:, 0])
    assert total.grad_fn is not None and total.grad_fn.name() == "SumBackward0"
    hidden, head, _ = draw(torch.bfloat16)
    total, *_ = summed_logprobs(hidden, head, ids[:, 0])
    assert total.grad_fn is not None and total.grad_fn.name() == "SumBackward0"


@pytest.mark.usefixtures("_ahead")
def test_a_sum_over_no_token_is_zero_with_a_zero_gradient_and_gives_it_once() -> None:
    hidden, head, ids = draw(torch.float32)
    total, terms, entropy = summed_logprobs(hidden[:0], head, ids[:0, 0])
    assert float(total.detach()) == 0 and terms.shape == entropy.shape == (0,)
    total.backward(retain_graph=True)
    assert head.grad is not None and not head.grad.any()
    assert hidden.grad is not None and not hidden.grad.any()
    with pytest.raises(RuntimeError, match="given away once"):
        total.backward()


@pytest.mark.usefixtures("_tile")
def test_the_target_is_the_given_token() -> None:
    hidden, head, ids = draw(torch.float32)
    logprobs, entropy = token_logprobs(hidden, head, ids[:, 2])
    several, same = gather_logprobs(hidden, head, ids)
    assert torch.equal(logprobs, several[:, 2]) and torch.equal(entropy, same)


@pytest.mark.usefixtures("_tile")
@pytest.mark.parametrize("k", [1, 5, VOCAB])
def test_the_likeliest_tokens_come_in_order(k: int) -> None:
    hidden, head, _ = draw(torch.float32)
    logprobs, ids = topk_logprobs(hidden, head, k)
    wanted = F.linear(hidden.double(), head.double()).log_softmax(-1).topk(k, dim=1)
    assert torch.equal(ids, wanted.indices)
    assert not logprobs.requires_grad
    torch.testing.assert_close(logprobs.double(), wanted.values.detach(), rtol=1e-5, atol=1e-5)


def test_packed_sequences_are_scored_each_on_its_own() -> None:
    hidden, head, _ = draw(torch.float64)
    sequences = [[3, 1, 4, 1], [5], [9, 2, 6]]
    seen: list[list[int]] = []

    def forward(ids: Tensor, positions: Tensor) -> Tensor:
        seen.extend([ids[0].tolist(), positions[0].tolist()])
        return hidden[: ids.shape[1]]

    found = sequence_logprobs(forward, head, sequences)
    assert seen == [[3, 1, 4, 1, 5, 9, 2, 6], [0, 1, 2, 3, 0, 0, 1, 2]]
    whole = F.linear(hidden, head).log_softmax(-1)
    places = [(0, 1), (1, 4), (2, 1), (5, 2), (6, 6)]  # a state and the token that follows it
    wanted = torch.stack([whole[place, token] for place, token in places])
    torch.testing.assert_close(found.double(), wanted.detach(), rtol=1e-5, atol=1e-5)
    assert not found.requires_grad


def test_bfloat16_gradients_of_the_head_are_summed_in_float32() -> None:
    # 4,096 equal tokens: a sum kept in bfloat16 would stop growing after a few hundred.
    hidden = torch.full((4096, 8), 0.5, dtype=torch.bfloat16, requires_grad=True)
    head = torch.zeros(16, 8, dtype=torch.bfloat16, requires_grad=True)
    logprobs, _ = token_logprobs(hidden, head, torch.zeros(4096, dtype=torch.int64))
    logprobs.sum().backward()
    assert head.grad is not None
    expected = torch.full((16, 8), -4096 * 0.5 / 16)
    expected[0] += 4096 * 0.5
    torch.testing.assert_close(head.grad.float(), expected, rtol=2**-8, atol=0)


def test_no_token_gives_no_value_and_a_zero_gradient() -> None:
    hidden, head, ids = draw(torch.float32)
    logprobs, entropy = token_logprobs(hidden[:0], head, ids[:0, 0])
    assert logprobs.shape == entropy.shape == (0,)
    logprobs.sum().backward()
    assert head.grad is not None and not head.grad.any()


@pytest.mark.parametrize("num_tokens", [1, 500, 8192, 100_000])
@pytest.mark.parametrize("vocab_size", [300, 151_936])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tiles_are_bounded_and_cover_every_logit_once(
    num_tokens: int, vocab_size: int, dtype: torch.dtype
) -> None:
    hidden, head = torch.empty(num_tokens, 1, dtype=dtype), torch.empty(vocab_size, 1, dtype=dtype)
    found = list(tiles(hidden, head))
    blocks = list(dict.fromkeys((block.start, block.stop) for _, block in found))
    rows = list(dict.fromkeys((rows.start, rows.stop) for rows, _ in found))
    assert found == [(slice(*r), slice(*block)) for block in blocks for r in rows]
    for cuts, size in ((blocks, vocab_size), (rows, num_tokens)):
        assert (cuts[0][0], cuts[-1][1]) == (0, size)
        assert all(one[1] == other[0] for one, other in pairwise(cuts))
    if dtype is torch.bfloat16:
        assert len(rows) == 1
    most = max(stop - start for start, stop in rows)
    bound = max(logprobs_module.TILE_ELEMENTS["cpu"], most * logprobs_module.MIN_BLOCK)
    assert most * max(stop - start for start, stop in blocks) <= bound


def test_losses_are_not_compiled_where_no_compiler_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(InputError, match=r"needs a C\+\+ compiler .* no 'no-such-compiler'"):
        compile_chains(True)
    compile_chains(False)
