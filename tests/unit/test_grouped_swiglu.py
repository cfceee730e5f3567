"""The experts' MLP and its backward, against a loop over experts in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import marco_train.models.grouped_swiglu as grouped_swiglu_module
from marco_train.models import few_rows
from marco_train.models.grouped_swiglu import grouped_swiglu
from marco_train.models.rows import add_up, gather, group_rows

WIDTH, EXPERT_WIDTH, EXPERTS = 64, 32, 6
NOWHERE = EXPERTS  # marks a cell that is no pair of this rank

# Experts of each token; what must not matter: experts without rows, tokens without experts.
ROUTES = {
    "two each": [[0, 1], [2, 3], [4, 5], [1, 0], [5, 2]],
    "empty experts": [[1, 4], [4, 1], [1, 4]],
    "one expert has all": [[3, NOWHERE]] * 7,
    "tokens without experts": [[NOWHERE, NOWHERE], [2, NOWHERE], [NOWHERE, 2], [0, 5]],
    "one row": [[NOWHERE, 2]],
    "no pair at all": [[NOWHERE, NOWHERE]] * 3,
    "no token": [],
}


def route(name: str) -> Tensor:
    return torch.tensor(ROUTES[name], dtype=torch.int64).view(-1, 2)


def draw(num_tokens: int, dtype: torch.dtype) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = {
        "tokens": (num_tokens, WIDTH),
        "weights": (num_tokens, 2),
        "gate_up_proj": (EXPERTS, 2 * EXPERT_WIDTH, WIDTH),
        "down_proj": (EXPERTS, WIDTH, EXPERT_WIDTH),
        "probe": (num_tokens, WIDTH),
    }
    values = {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}
    for name in ("gate_up_proj", "down_proj"):  # the usual spread: activations stay near one
        values[name] *= values[name].shape[-1] ** -0.5
    # Both sides start from the same rounded numbers; routing weights are always float32.
    return {n: v if n == "weights" else v.to(dtype) for n, v in values.items()}


def loop(
    tokens: Tensor, weights: Tensor, gate_up_proj: Tensor, down_proj: Tensor, ids: Tensor
) -> Tensor:
    rows = []
    for token, row_weights, experts in zip(tokens, weights, ids.tolist(), strict=True):
        out = token * 0
        for weight, expert in zip(row_weights, experts, strict=True):
            if expert != NOWHERE:
                gate, up = (gate_up_proj[expert] @ token).chunk(2)
                out = out + weight * (down_proj[expert] @ (F.silu(gate) * up))
        rows.append(out)
    return torch.stack(rows) if rows else tokens * 0


def relative_error(found: Tensor, wanted: Tensor) -> float:
    if not wanted.numel() or not wanted.any():
        return float(found.detach().abs().sum())
    return float((found.detach().double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("name", ROUTES)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 5e-3)])
def test_outputs_and_gradients_equal_a_loop_over_experts(
    name: str, dtype: torch.dtype, bound: float
) -> None:
    ids = route(name)
    if dtype == torch.bfloat16:
        ids = ids.repeat(16, 1)  # enough rows for rounding errors to reach their mean
    values = draw(len(ids), dtype)
    probe = values.pop("probe")
    ours = {n: v.clone().requires_grad_() for n, v in values.items()}
    wanted = {n: v.double().requires_grad_() for n, v in values.items()}
    rows = group_rows(ids, EXPERTS, int((ids != NOWHERE).sum()))

    found = grouped_swiglu(**ours, rows=rows)
    expected = loop(**wanted, ids=ids)
    assert relative_error(found, expected.detach()) <= bound
    found.backward(probe)
    if ids.numel():
        expected.backward(probe.double())
    for n, leaf in ours.items():
        assert leaf.grad is not None and leaf.grad.is_contiguous(), n
        reference = wanted[n].grad
        reference = torch.zeros_like(wanted[n]) if reference is None else reference
        assert relative_error(leaf.grad, reference) <= bound, n


@pytest.mark.parametrize("name", ROUTES)
def test_rows_taken_one_at_a_time_give_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # A single row's halves are contiguous views of it, where those of several rows are not.
    monkeypatch.setattr(grouped_swiglu_module, "SLICE_ELEMENTS", 1)
    test_outputs_and_gradients_equal_a_loop_over_experts(name, torch.float32, 1e-6)


@pytest.mark.parametrize("most_padding", [0, 1000], ids=["left factors", "padded"])
@pytest.mark.parametrize("name", ROUTES)
def test_few_rows_without_a_gradient_equal_a_loop_over_experts(
    name: str, most_padding: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(few_rows, "LARGE_EXPERT", 0)
    monkeypatch.setattr(few_rows, "MIN_PADDED_ROWS_OF_LARGE", 0)
    monkeypatch.setattr(few_rows, "MOST_PADDING", most_padding)
    ids = route(name)
    values = draw(len(ids), torch.float32)
    del values["probe"]
    rows = group_rows(ids, EXPERTS, int((ids != NOWHERE).sum()))
    with torch.no_grad():
        found = grouped_swiglu(**values, rows=rows)
    wanted = loop(**{n: v.double() for n, v in values.items()}, ids=ids)
    assert found.shape == wanted.shape
    assert relative_error(found, wanted) <= 1e-6


@pytest.mark.parametrize(
    ("smallest_large_expert", "num_tokens", "num_of_one", "is_padded"),
    [
        (2**14, 6, 0, True),
        (2**14, 5, 0, False),
        (0, 18, 0, True),
        (0, 17, 0, False),
        (2**14, 6, 40, False),
        (2**14, 192, 0, True),
        (2**14, 198, 0, False),
    ],
    ids=[
        *("two rows an expert", "fewer", "six of a large one", "fewer of it"),
        *("one expert has most", "64 an expert", "more"),
    ],
)
def test_rows_are_padded_where_they_are_few_and_even(
    smallest_large_expert: int,
    num_tokens: int,
    num_of_one: int,
    is_padded: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(few_rows, "LARGE_EXPERT", smallest_large_expert)
    products = []
    plain = torch.bmm

    def noted(*factors: Tensor) -> Tensor:
        products.append(factors)
        return plain(*factors)

    monkeypatch.setattr(torch, "bmm", noted)
    even = torch.arange(2 * num_tokens).view(-1, 2) % EXPERTS
    ids = torch.cat([even, torch.zeros(num_of_one, 2, dtype=torch.int64)])
    ids[num_tokens:, 1] = NOWHERE
    values = draw(len(ids), torch.float32)
    del values["probe"]
    rows = group_rows(ids, EXPERTS, int((ids != NOWHERE).sum()))
    grouped_swiglu(**values, rows=rows)  # which could be learnt from
    assert not products
    with torch.no_grad():
        grouped_swiglu(**values, rows=rows)
    assert bool(products) == is_padded


@pytest.mark.parametrize(
    ("smallest", "num_tokens", "is_left"),
    [
        (WIDTH * EXPERT_WIDTH, 96, True),
        (WIDTH * EXPERT_WIDTH, 97, False),
        (WIDTH * EXPERT_WIDTH + 1, 96, False),
    ],
    ids=["32 rows an expert", "more", "small experts"],
)
def test_large_experts_are_left_factors_where_rows_are_few(
    smallest: int, num_tokens: int, is_left: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = []
    plain = F.grouped_mm

    def noted(first: Tensor, second: Tensor, offs: Tensor) -> Tensor:
        left.append(first.dim() == 3)
        return plain(first, second, offs=offs)

    monkeypatch.setattr(few_rows, "LARGE_EXPERT", smallest)
    monkeypatch.setattr(few_rows, "MOST_PADDING", 0)
    monkeypatch.setattr(F, "grouped_mm", noted)
    ids = torch.arange(2 * num_tokens).view(-1, 2) % EXPERTS
    values = draw(len(ids), torch.float32)
    del values["probe"]
    rows = group_rows(ids, EXPERTS, ids.numel())
    grouped_swiglu(**values, rows=rows)  # which could be learnt from
    assert left == [False] * 2
    with torch.no_grad():
        grouped_swiglu(**values, rows=rows)
    assert any(left[2:]) == is_left


def test_a_gradient_with_strides_is_the_same_gradient() -> None:
    ids = route("two each")
    values = draw(len(ids), torch.float32)
    probe = values.pop("probe")
    rows = group_rows(ids, EXPERTS, ids.numel())
    gradients = []
    for upstream in (probe, probe.T.contiguous().T, probe[:, :1].expand_as(probe)):
        leaves = {n: v.clone().requires_grad_() for n, v in values.items()}
        grouped_swiglu(**leaves, rows=rows).backward(upstream)
        gradients.append({n: leaf.grad for n, leaf in leaves.items()})
    for n, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][n])
    found, wanted = gradients[2]["tokens"], gradients[0]["tokens"]
    assert found is not None and wanted is not None
    assert relative_error(found, wanted.double()) > 0.1


def test_a_second_backward_over_one_forward_is_refused() -> None:
    ids = route("two each")
    values = draw(len(ids), torch.float32)
    probe = values.pop("probe")
    leaves = {n: v.requires_grad_() for n, v in values.items()}
    out = grouped_swiglu(**leaves, rows=group_rows(ids, EXPERTS, ids.numel()))
    out.backward(probe, retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward(probe)


def test_neither_rows_nor_outputs_are_kept_for_backward() -> None:
    ids = route("two each")
    values = draw(len(ids), torch.float32)
    del values["probe"]
    leaves = {n: v.requires_grad_() for n, v in values.items()}
    kept: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        kept.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        grouped_swiglu(**leaves, rows=group_rows(ids, EXPERTS, ids.numel()))
    inputs = {leaf.data_ptr() for leaf in leaves.values()}
    assert [tuple(x.shape) for x in kept if x.data_ptr() not in inputs] == [
        (ids.numel(), 2 * EXPERT_WIDTH)
    ]


@pytest.mark.parametrize("name", ROUTES)
def test_rows_are_sorted_by_group_and_find_their_way_back(name: str) -> None:
    ids = route(name)
    pairs = [(e, t) for t, row in enumerate(ids.tolist()) for e in row if e != NOWHERE]
    rows = group_rows(ids, EXPERTS, len(pairs))
    ordered = sorted(pairs, key=lambda pair: pair[0])  # stable: tokens stay in order
    assert rows.token_of_row.tolist() == [token for _, token in ordered]
    assert rows.rows_per_group.tolist() == [
        sum(expert == e for e, _ in pairs) for expert in range(EXPERTS)
    ]
    tokens = torch.arange(1.0, len(ids) + 1)[:, None].repeat(1, 3)
    counts = (ids != NOWHERE).sum(1, keepdim=True)
    assert torch.equal(add_up(gather(tokens, rows), rows), tokens * counts)
