"""Our decoder and transformers' own classes, on random small configs in float32."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from marco_train.config.architecture import ArchitectureConfig
from marco_train.models import Qwen3Moe, load_model, save_model
from marco_train.models.weights import random_model
from tests.helpers.models import DENSE, architecture

SHAPES = {
    "moe, tied": architecture(),
    "moe, untied": architecture(tie_word_embeddings=False),
    "moe, weights not normalised": architecture(norm_topk_prob=False, num_experts_per_tok=3),
    "moe, one key-value head": architecture(num_key_value_heads=1, rope_theta=1e6),
    "moe, all experts active": architecture(num_experts_per_tok=8),
    "dense, tied": architecture(**DENSE),
    "dense, untied": architecture(**DENSE, tie_word_embeddings=False, head_dim=16),
}


@pytest.fixture(params=list(SHAPES.values()), ids=list(SHAPES))
def shape(request: pytest.FixtureRequest) -> ArchitectureConfig:
    found: ArchitectureConfig = request.param
    return found


def pair(shape: ArchitectureConfig, path: Path) -> tuple[Qwen3Moe, torch.nn.Module]:
    model = random_model(shape, torch.float32, seed=1)
    # Norm weights of one would hide a norm that is applied twice or to the wrong tensor.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5)
    save_model(model, path)
    return model, AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def sequences() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 320, (n,), generator=generator) for n in (1, 7, 70, 33, 130, 2)]


def test_logits_and_gradients_equal_those_of_transformers(
    shape: ArchitectureConfig, tmp_path: Path
) -> None:
    ours, theirs = pair(shape, tmp_path / "model")
    ids = sequences()
    packed = torch.cat(ids)[None]
    positions = torch.cat([torch.arange(len(i)) for i in ids])[None]

    logits = ours.logits(ours(packed, positions))
    expected = torch.cat([theirs(i[None]).logits[0] for i in ids])
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)

    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
    (logits * weights).mean().backward()
    (expected * weights).mean().backward()
    theirs_by_name = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None, name
        found, wanted = parameter.grad, theirs_by_name[name].grad
        assert wanted is not None, name
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


def test_a_directory_written_by_transformers_loads(
    shape: ArchitectureConfig, tmp_path: Path
) -> None:
    _, theirs = pair(shape, tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")  # type: ignore[operator]
    ours = load_model(tmp_path / "theirs", torch.float32)
    ids = torch.arange(20)[None] * 7 % 320
    torch.testing.assert_close(
        ours.logits(ours(ids, torch.arange(20)[None])), theirs(ids).logits[0], rtol=1e-5, atol=1e-5
    )
