"""Second derivatives of the tangent sweep against autograd's, and the work that it saves."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from pyadv.objectives import EMR
from pyadv.objectives.step import Step
from pyadv.passes.tangent import TangentSweep

COLOUR, LINE, VOLUME = (3, 3, 9, 8), (3, 2, 12), (2, 1, 5, 6, 7)


class Call(nn.Module):
    """A function of x and of layers, as a module."""

    def __init__(self, function, *layers):
        super().__init__()
        self.function, self.layers = function, nn.ModuleList(layers)

    def forward(self, x):
        return self.function(x, *self.layers)


def moved(norm):
    """Return the BatchNorm with statistics, weights and biases as after training."""
    for t in (norm.running_mean, *norm.parameters()):
        t.data.uniform_(-0.5, 0.5)
    norm.running_var.uniform_(0.5, 2)
    return norm


def in_place_and_used_again(x):
    y, z = x * 1, x * 3
    torch.relu_(y)
    z[:, 1:].relu_()
    return y + z + F.relu_(x * 2)


def weights_from_the_input(x, layer):
    return F.conv2d(x, layer.weight * x.mean())


def two_results(x, conv):
    pooled, index = F.max_pool2d(conv(x), 2, return_indices=True)
    return pooled + 0 * index


LAYERS = {
    "narrow": (COLOUR, lambda: [nn.Conv2d(3, 6, 3, stride=2, padding=1, dilation=2), nn.ReLU()]),
    "wide": (COLOUR, lambda: [nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Conv2d(5, 4, 3, bias=False)]),
    "groups": (COLOUR, lambda: [nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3, padding=1, groups=6)]),
    "same": (COLOUR, lambda: [nn.Conv2d(3, 6, 3, padding="same")]),
    "reflect": (COLOUR, lambda: [nn.Conv2d(3, 6, 3, padding=1, padding_mode="reflect")]),
    "line": (LINE, lambda: [nn.Conv1d(2, 4, 3, 2), nn.ReLU(inplace=True), nn.AvgPool1d(2)]),
    "volume": (VOLUME, lambda: [nn.Conv3d(1, 3, 3), moved(nn.BatchNorm3d(3)), nn.MaxPool3d(2)]),
    "transposed": (COLOUR, lambda: [nn.ConvTranspose2d(3, 4, 3), nn.LeakyReLU(0.1)]),
    "frozen": (COLOUR, lambda: [nn.Conv2d(3, 4, 3).requires_grad_(False), nn.ReLU()]),
    "norm first": (COLOUR, lambda: [moved(nn.BatchNorm2d(3)), nn.LeakyReLU(0.1, inplace=True)]),
    "bare norm": (COLOUR, lambda: [nn.BatchNorm2d(3, affine=False), nn.LeakyReLU(-0.5)]),
    "no statistics": (COLOUR, lambda: [nn.BatchNorm2d(3, track_running_stats=False), nn.Tanh()]),
    "pools": (COLOUR, lambda: [nn.Conv2d(3, 4, 1), nn.MaxPool2d(3, 2), nn.AvgPool2d(2, padding=1)]),
    "adaptive": (COLOUR, lambda: [nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(2), nn.Softplus()]),
    "in place": (COLOUR, lambda: [nn.Conv2d(3, 4, 3), Call(in_place_and_used_again), nn.GELU()]),
    "hyper": (COLOUR, lambda: [Call(weights_from_the_input, nn.Conv2d(3, 4, 3)), nn.ReLU()]),
    "indices": (COLOUR, lambda: [Call(two_results, nn.Conv2d(3, 4, 3))]),
    "checkpoint": (
        COLOUR,
        lambda: [
            Call(
                lambda x, conv: checkpoint(lambda x: F.relu(conv(x)), x, use_reentrant=False),
                nn.Conv2d(3, 4, 3),
            )
        ],
    ),
}


def net_and_batch(name, device, dtype=torch.float64):
    torch.manual_seed(0)
    shape, layers = LAYERS[name]
    x = torch.rand(shape)
    body = nn.Sequential(*layers(), nn.Flatten()).eval()
    net = nn.Sequential(body, nn.Linear(body(x).shape[1], 4))
    y = torch.arange(len(x)) % 4
    return net.to(device, dtype), x.to(device, dtype), y.to(device)


def rows_and_gradients(derivative, net, x, y, **settings):
    emr = EMR(1.0, derivative=derivative, **settings)
    rows = emr.per_sample(Step(net, x, y, 1))
    parameters = [p for p in net.parameters() if p.requires_grad]
    grads = torch.autograd.grad(rows.sum(), parameters, allow_unused=True, materialize_grads=True)
    return rows.detach(), grads


@pytest.mark.parametrize("name", LAYERS)
def test_second_derivatives_are_those_of_autograd(name, device):
    net, x, y = net_and_batch(name, device)
    for settings in ({}, {"of": "pairwise"}):
        rows, grads = rows_and_gradients("tangent", net, x, y, **settings)
        expected, exact = rows_and_gradients("double", net, x, y, **settings)
        torch.testing.assert_close(rows, expected)
        torch.testing.assert_close(grads, exact)


@pytest.mark.parametrize("name", ["wide", "norm first", "in place", "pools"])
def test_values_and_first_derivatives_are_the_networks_own(name, device):
    net, x, _ = net_and_batch(name, device)
    with TangentSweep():
        logits = net(x)
    torch.testing.assert_close(logits, net(x))
    mine, own = (
        torch.autograd.grad(z.exp().sum(), list(net.parameters())) for z in (logits, net(x))
    )
    torch.testing.assert_close(mine, own)


@pytest.mark.parametrize("name", ["narrow", "wide", "line", "norm first", "pools", "volume"])
def test_nothing_goes_back_through_a_network_that_is_linear_in_pieces(name, device):
    """The penalty of a piecewise linear network does not depend on its activations."""
    net, x, y = net_and_batch(name, device)
    seen = []
    for module in net[0]:
        module.register_forward_hook(lambda module, args, result: seen.append(result))
    rows = EMR(1.0).per_sample(Step(net, x, y, 1))
    assert len(seen) >= 3
    assert set(torch.autograd.grad(rows.sum(), seen, allow_unused=True)) == {None}


class Convolutions(TorchDispatchMode):
    """Records which gradients (input, weight, bias) each convolution's backward pass computes."""

    def __init__(self):
        super().__init__()
        self.asked = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.convolution_backward.default:
            self.asked.append(tuple(args[-1]))
        return func(*args, **(kwargs or {}))


def test_a_layers_weight_gradient_is_made_once(device):
    net = nn.Sequential(nn.Conv2d(5, 6, 3), nn.ReLU(), nn.Conv2d(6, 7, 3), nn.Flatten()).to(device)
    x, y = torch.rand(2, 5, 6, 6, device=device), torch.zeros(2, dtype=torch.int64, device=device)
    with Convolutions() as seen:
        EMR(1.0).per_sample(Step(net, x, y, 1)).sum().backward()
    of_input, of_weight = (True, False, False), (False, True, False)
    assert sorted(seen.asked) == 2 * [of_weight] + 2 * [of_input]


@pytest.mark.parametrize("name", ["wide", "volume", "norm first"])
def test_under_autocast(name, device):
    net, x, y = net_and_batch(name, device, torch.float32)
    with torch.autocast(device.type, torch.bfloat16):
        rows, grads = rows_and_gradients("tangent", net, x, y)
        expected, exact = rows_and_gradients("double", net, x, y)
    torch.testing.assert_close(rows, expected, rtol=0.05, atol=1e-3)
    a, b = (torch.cat([g.flatten() for g in gs]) for gs in (grads, exact))
    assert float((a - b).norm() / b.norm()) < 0.05


def test_third_derivatives_are_refused(device):
    net, x, y = net_and_batch("wide", device)
    rows = EMR(1.0).per_sample(Step(net, x, y, 1))
    weight = net[0][0].weight
    (grad,) = torch.autograd.grad(rows.sum(), weight, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
