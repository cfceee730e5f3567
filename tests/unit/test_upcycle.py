"""Dense to sparse."""

from pathlib import Path

import pytest
import torch

from marco_train.errors import InputError
from marco_train.models import load_model, save_model
from marco_train.models.qwen3_moe import DecoderLayer
from marco_train.models.upcycle import Scaling, UpcycleConfig, upcycle, upcycle_mlp
from marco_train.models.weights import random_model
from tests.helpers.models import DENSE, architecture, sparse_mlps


def config(**changes: object) -> UpcycleConfig:
    fields: dict[str, object] = {
        "num_experts": 8,
        "expert_width": 16,
        "top_k": 4,
        "drop_ratio": 0.0,
        "share_indices": True,
        "scaling": Scaling.exact,
        "router_std": 0.0,
        "seed": 0,
    }
    return UpcycleConfig(**(fields | changes))  # type: ignore[arg-type]


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    save_model(random_model(architecture(**DENSE), torch.float32, 0), tmp_path / "dense")
    return tmp_path / "dense"


def outputs(path: Path) -> torch.Tensor:
    model = load_model(path, torch.float32)
    hidden: torch.Tensor = model(torch.arange(40)[None] * 7 % 320, torch.arange(40)[None])
    return hidden.detach()


def test_with_every_slice_active_the_exact_variant_is_the_dense_model(
    dense: Path, tmp_path: Path
) -> None:
    # 4 slices of 16, one copy of each, all active with equal weights.
    upcycle(dense, tmp_path / "moe", config(num_experts=4))
    torch.testing.assert_close(outputs(tmp_path / "moe"), outputs(dense), rtol=1e-5, atol=1e-5)


def test_the_papers_variant_is_off_by_what_is_reported(dense: Path, tmp_path: Path) -> None:
    found = upcycle(dense, tmp_path / "moe", config(num_experts=4, scaling=Scaling.paper))
    assert found.architecture.num_experts == 4
    paper, exact = (found.split_errors[s] for s in (Scaling.paper, Scaling.exact))
    assert len(paper) == len(exact) == 2  # layers
    assert max(exact) < 1e-6
    assert all(0.02 < error < 0.5 for error in paper)

    # The reported error is that of the written experts, run by the model's own code.
    mixture, plain = load_model(tmp_path / "moe", torch.float32), load_model(dense, torch.float32)
    for layer in range(2):
        block = plain.model.layers[layer]
        assert isinstance(block, DecoderLayer)
        x = torch.randn(2000, 32, generator=torch.Generator().manual_seed(1))
        x = x * block.post_attention_layernorm.weight
        with torch.no_grad():
            wanted = block.mlp(x)
            out, _ = sparse_mlps(mixture)[layer](x)
        error = float((out - wanted).norm() / wanted.norm())
        assert error == pytest.approx(paper[layer], rel=0.15)  # of other random inputs


def matrices() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    gate, up, down = (torch.randn(shape, generator=g) for shape in [(64, 32), (64, 32), (32, 64)])
    return gate, up, down


def test_without_dropping_each_expert_is_a_scaled_slice() -> None:
    gate, up, down = matrices()
    cfg = config(scaling=Scaling.paper)
    experts = list(upcycle_mlp(gate, up, down, cfg, torch.Generator().manual_seed(0)))
    assert len(experts) == 8
    for number, (gate_e, up_e, down_e) in enumerate(experts):
        part = slice(16 * (number // 2), 16 * (number // 2) + 16)  # two copies of each slice
        torch.testing.assert_close(gate_e, gate[part] * 4 ** (1 / 3))
        torch.testing.assert_close(up_e, up[part] * 4 ** (1 / 3))
        torch.testing.assert_close(down_e, down[:, part] * 4 ** (1 / 3))


def test_the_dropped_neurons_are_drawn_anew_in_all_three_matrices() -> None:
    gate, up, down = matrices()
    cfg = config(drop_ratio=0.25, scaling=Scaling.paper)
    for number, (gate_e, up_e, down_e) in enumerate(
        upcycle_mlp(gate, up, down, cfg, torch.Generator().manual_seed(0))
    ):
        part = slice(16 * (number // 2), 16 * (number // 2) + 16)
        scale = 4 ** (1 / 3)
        changed = [
            (gate_e != gate[part] * scale).all(1),
            (up_e != up[part] * scale).all(1),
            (down_e != down[:, part] * scale).all(0),
        ]
        assert [int(rows.sum()) for rows in changed] == [4, 4, 4]
        assert torch.equal(changed[0], changed[1])
        assert torch.equal(changed[0], changed[2])
        dropped = gate[part][changed[0]] * scale
        assert float(gate_e[changed[0]].std()) == pytest.approx(float(dropped.std()), rel=0.3)


def test_indices_of_an_expert_can_be_drawn_for_each_matrix() -> None:
    gate, up, down = matrices()
    cfg = config(drop_ratio=0.25, share_indices=False)
    same = 0
    for number, (gate_e, up_e, down_e) in enumerate(
        upcycle_mlp(gate, up, down, cfg, torch.Generator().manual_seed(0))
    ):
        part = slice(16 * (number // 2), 16 * (number // 2) + 16)
        changed = [
            (gate_e != gate[part]).all(1),
            (up_e != up[part] * 2).all(1),
            (down_e != down[:, part] * 2).all(0),
        ]
        assert [int(rows.sum()) for rows in changed] == [4, 4, 4]
        same += torch.equal(changed[0], changed[1]) + torch.equal(changed[0], changed[2])
    assert same == 0


def test_the_same_seed_gives_the_same_mixture(dense: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        upcycle(dense, tmp_path / name, config(drop_ratio=0.5, seed=seed, router_std=0.1))
    assert torch.equal(outputs(tmp_path / "a"), outputs(tmp_path / "b"))
    assert not torch.equal(outputs(tmp_path / "a"), outputs(tmp_path / "c"))


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"expert_width": 24}, "expert_width 24 does not divide the dense inner width 64"),
        ({"num_experts": 6}, "num_experts 6 is not a multiple of the 4 slices"),
        ({"drop_ratio": 1.0}, "drop_ratio is 1.0"),
        ({"top_k": 9}, "9, more than the 8 experts"),
    ],
)
def test_numbers_that_do_not_fit_are_named(
    changes: dict[str, object], names: str, dense: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=names):
        upcycle(dense, tmp_path / "moe", config(**changes))
    assert not (tmp_path / "moe").exists()
