"""Lipschitz bounds are at least the dense singular values, close to them, and refused if
unknown."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import pyadv
from pyadv.evaluation import NotCovered, lipschitz_bound
from pyadv.models import Normalized, PreActResNet18, SmallCNN


def jacobian_norm(model: nn.Module, shape: tuple[int, ...]) -> float:
    """Return the Lipschitz constant of an affine model from its dense matrix."""
    eye = torch.eye(math.prod(shape), dtype=torch.float64).view(-1, *shape)
    with torch.no_grad():
        matrix = (model(eye) - model(torch.zeros_like(eye[:1]))).flatten(1)
    return torch.linalg.matrix_norm(matrix, 2).item()


LAYERS = {
    "linear": (lambda: nn.Linear(7, 5), (7,), 1.001),
    "same": (lambda: nn.Conv2d(3, 4, 3, padding="same"), (3, 8, 8), 1.1),
    "strided groups": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), (4, 7, 6), 1.1),
    "unequal": (lambda: nn.Conv2d(2, 3, (2, 4), (3, 2), (0, 3)), (2, 9, 8), 1.3),
    "dilated": (lambda: nn.Conv1d(2, 3, 5, stride=3, dilation=2), (2, 17), 1.1),
    "kernel beyond input": (lambda: nn.Conv2d(2, 3, 5, padding=2), (2, 3, 3), 1.7),
    "volume": (lambda: nn.Conv3d(1, 2, (1, 3, 2), padding="valid"), (1, 3, 4, 3), 1.3),
    "batch norm": (lambda: nn.BatchNorm2d(3), (3, 4, 4), 1.001),
    "average": (lambda: nn.AvgPool2d(3, 2, padding=1), (2, 7, 7), 6.1),
    "global average": (lambda: nn.AdaptiveAvgPool2d(1), (2, 4, 5), 1.001),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_against_their_dense_matrix(name: str) -> None:
    make, shape, slack = LAYERS[name]
    layer = make().double().eval()
    if name == "batch norm":
        layer.running_var.copy_(torch.tensor([0.1, 2.0, 3.0]))
        nn.init.normal_(layer.weight)
    true = jacobian_norm(layer, shape)
    bound = lipschitz_bound(nn.Sequential(layer), shape).logits
    assert true <= bound <= slack * true


@pytest.mark.parametrize(
    "module",
    [
        nn.MaxPool1d(3, 2), nn.MaxPool1d(2, 3), nn.MaxPool1d(3, 1, 1, 2), nn.AvgPool1d(4, 3),
        nn.GELU(), nn.GELU("tanh"), nn.SiLU(), nn.ELU(2.0), nn.LeakyReLU(-1.5), nn.Sigmoid(),
        nn.Tanh(), nn.Softplus(), nn.ReLU6(),
    ],
    ids=repr,
)  # fmt: skip
def test_no_pair_of_points_is_farther_apart_afterwards(module: nn.Module) -> None:
    a = 3 * torch.randn(4000, 2, 9, dtype=torch.float64)
    b = a + torch.randn_like(a) * 10.0 ** torch.randint(-4, 1, (4000, 1, 1))
    stretch = (module(a) - module(b)).flatten(1).norm(dim=1) / (a - b).flatten(1).norm(dim=1)
    bound = lipschitz_bound(nn.Sequential(module), (2, 9)).logits
    assert stretch.max() <= bound * (1 + 1e-9)


def test_the_chain_multiplies_and_the_head_compares_classes() -> None:
    model = nn.Sequential(Normalized(SmallCNN(3, 5, (8, 8)), 0.5, [0.5, 0.25, 1.0]))
    model.train()
    bound = lipschitz_bound(model, (3, 8, 8))
    assert all(m.training for m in model.modules())
    product = pyadv.ops.NormProduct(model, (3, 8, 8), "spectral", "operator").eval()
    product.iterate(300)
    # a std of 0.25 stretches by 4
    assert 4 * product().exp() <= bound.logits <= 5.5 * product().exp()
    head = model[0].model[-1].weight.detach().double()
    assert torch.equal(bound.head, head)
    z, y = torch.tensor([[3.0, 1.0, 0.5, 0.0, -1.0]] * 3), torch.tensor([0, 1, 4])
    gaps = torch.tensor([2.0, 2.5, 3.0, 4.0], dtype=torch.float64)
    radius = (gaps / (bound.body * (head[0] - head[1:]).norm(dim=1))).min()
    torch.testing.assert_close(
        bound.certified_radius(z, y), torch.stack([radius, *[radius * 0] * 2])
    )
    without = lipschitz_bound(nn.Sequential(model, nn.Identity()), (3, 8, 8))
    assert without.head is None and without.body == pytest.approx(bound.logits)
    expected = torch.tensor([2.0, 0.0, 0.0], dtype=torch.float64) / (math.sqrt(2) * without.body)
    torch.testing.assert_close(without.certified_radius(z, y), expected)


def test_a_layer_used_twice_counts_twice() -> None:
    layer = nn.Linear(4, 4)
    once, twice = (lipschitz_bound(nn.Sequential(*[layer] * n), (4,)).logits for n in (1, 2))
    assert twice == pytest.approx(once**2)


def test_equal_classes_are_told_apart_by_nothing_but_their_bias() -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    nn.init.ones_(model[0].weight)
    bound = lipschitz_bound(model, (3,))
    z, y = torch.tensor([[2.0, 1.0], [1.0, 1.0]]), torch.tensor([0, 0])
    assert bound.certified_radius(z, y).tolist() == [math.inf, 0.0]


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def hooked() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 2))
    model[0].register_forward_hook(lambda module, args, out: 9 * out)
    return model


@pytest.mark.parametrize(
    ("model", "shape", "message"),
    [
        (nn.Sequential(nn.Sequential(Doubled(3, 2))), (3,), r"for 0\.0 \(Doubled\)"),
        (hooked(), (3,), "0 has forward hooks"),
        (PreActResNet18(1), (1, 8, 8), r"for the model \(PreActResNet18\)"),
        (nn.Sequential(nn.LayerNorm(3)), (3,), "LayerNorm"),
        (nn.Sequential(nn.Conv1d(1, 1, 3, padding=1, padding_mode="circular")), (1, 9), "Conv1d"),
        (nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False)), (3, 4), "BatchNorm1d"),
        (nn.Sequential(nn.AvgPool2d(2, divisor_override=1)), (1, 4, 4), "AvgPool2d"),
        (nn.Sequential(nn.AdaptiveAvgPool2d(3)), (1, 4, 4), "AdaptiveAvgPool2d"),
    ],
)
def test_refuses_what_it_does_not_know(
    model: nn.Module, shape: tuple[int, ...], message: str
) -> None:
    model.train()
    with pytest.raises(NotCovered, match=message):
        lipschitz_bound(model, shape)
    assert all(m.training for m in model.modules())
