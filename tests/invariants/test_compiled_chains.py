"""Losses whose chains are compiled give the numbers of those whose chains are not."""

import shutil
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from marco_train.losses import chains, logprobs
from marco_train.losses.distillation import full_reverse_kl
from marco_train.losses.logprobs import gather_logprobs

pytestmark = [
    pytest.mark.slow,
    pytest.mark.long,
    pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++ on a CPU"),
]

V, D = 2_000, 24


@pytest.fixture(autouse=True)
def eager_again(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # Several tiles both ways, the last ones shorter.
    monkeypatch.setattr(logprobs, "TILE_ELEMENTS", {"cpu": 5_000})
    monkeypatch.setattr(logprobs, "TILE_ROWS", {"cpu": 40})
    yield
    chains.compile_chains(False)


def found(num_tokens: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """What both losses give, with the gradients of what they take."""
    made = torch.Generator().manual_seed(num_tokens)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=made).to(dtype)

    hidden, head = drawn(num_tokens, D).requires_grad_(), drawn(V, D).requires_grad_()
    teacher_hidden, teacher_head = drawn(num_tokens, D), drawn(V, D)
    ids = torch.randint(V, (num_tokens, 3), generator=made)
    weights = torch.rand(num_tokens, generator=made)
    values: dict[str, Tensor] = {}
    values["logprobs"], values["entropy"] = gather_logprobs(hidden, head, ids)
    kl = full_reverse_kl(hidden, head, teacher_hidden, teacher_head, ids[:, 0])
    values |= kl._asdict()
    loss = (values["logprobs"] * weights[:, None]).sum() + (kl.reverse * weights).sum()
    loss.backward()
    assert hidden.grad is not None and head.grad is not None
    return values | {"d hidden": hidden.grad, "d head": head.grad}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled_chains_give_the_same_numbers(dtype: torch.dtype) -> None:
    for num_tokens in (0, 1, 7, 90):
        eager = found(num_tokens, dtype)
        chains.compile_chains(True)
        compiled = found(num_tokens, dtype)
        chains.compile_chains(False)
        for name, value in eager.items():
            bound = 2e-2 if value.dtype is torch.bfloat16 else 2e-5
            torch.testing.assert_close(compiled[name], value, rtol=bound, atol=bound, msg=name)


def test_compiled_chains_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    plain = torch.compile

    def compile_and_tell(function: object, **options: object) -> object:
        asked.append((getattr(function, "__name__", ""), options))
        return plain(function, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(torch, "compile", compile_and_tell)
    total = chains.chain(lambda tile_NB: (tile_NB.sum(1),))
    tile = torch.ones(3, 4)
    wanted = [4.0] * 3
    assert total(tile)[0].tolist() == wanted and not asked
    chains.compile_chains(True)
    assert total(tile)[0].tolist() == wanted and total(tile)[0].tolist() == wanted
    assert asked == [("<lambda>", {"dynamic": True})]


def test_slices_of_a_tile_give_the_numbers_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    policy, teacher = (torch.randn(37, 50, generator=generator) for _ in range(2))
    of_tokens = [torch.randn(37, generator=generator) for _ in range(3)]

    def numbers() -> list[Tensor]:
        gradient, of_softmax = policy.clone(), policy.clone()
        assert chains.kl_gradient(gradient, teacher.clone(), *of_tokens) == ()
        assert chains.softmax_gradient(of_softmax, of_tokens[0], of_tokens[1][:, None]) == ()
        return [*chains.block_comparison(policy, teacher), gradient, of_softmax]

    whole = numbers()
    assert [tuple(sums.shape) for sums in whole[:-2]] == [(37,)] * 8
    monkeypatch.setitem(chains.SLICE_ELEMENTS, "cpu", 4 * 50)
    for found, wanted in zip(numbers(), whole, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
