"""EMR: closed forms, its variants, and its three derivatives against each other."""

from __future__ import annotations

import copy

import pytest
import torch
from objective_parts import attack, gradients
from torch import nn

from pyadv.objectives import AT, EMR, TRADES, Standard
from pyadv.objectives.step import Step


class TestClosedForms:
    W = [[1.0, -2.0, 0.5], [0.0, 1.0, 1.0], [0.3, -0.4, 2.0]]
    X = [[0.2, 0.1, -0.3], [0.7, 0.4, 0.5]]

    def linear(self, device):
        model = nn.Linear(3, 3, bias=False, device=device, dtype=torch.float64)
        with torch.no_grad():
            model.weight.copy_(torch.tensor(self.W))
        return model

    def batch(self, device):
        x = torch.tensor(self.X, device=device, dtype=torch.float64)
        return x, torch.zeros(2, dtype=torch.int64, device=device)

    @pytest.mark.parametrize("t, r", [(0.1, 1.25089437), (1.0, 0.88268587), (40.0, 0.88199705)])
    def test_closed_form_of_a_linear_model(self, t, r, device):
        """R = 1/B^2 sum_b ||W^T p_b||^2 and dR/dW = 2/B^2 sum_b p_b p_b^T W, p held fixed."""
        model, (x, y) = self.linear(device), self.batch(device)
        base = Standard()(model, x, y)
        penalty = (Standard() + EMR(1.0, t, reduction="official"))(model, x, y) - base
        torch.testing.assert_close(float(penalty.detach()), r, atol=1e-7, rtol=0)
        model.zero_grad()
        penalty.backward()
        p = (model(x) / t).softmax(1).detach()
        torch.testing.assert_close(model.weight.grad, 2 / 4 * p.T @ p @ model.weight.detach())

    def test_does_not_depend_on_the_batch_size(self, net, batch):
        x, y = batch[0].double(), batch[1]
        twice = (torch.cat([x, x]), torch.cat([y, y]))
        net.double().eval()
        objectives = [Standard() + EMR(1.0, reduction=r) for r in ("mean", "official")]
        (mean, mean2), (official, official2) = [
            [float((o(net, *b) - Standard()(net, *b)).detach()) for b in ((x, y), twice)]
            for o in objectives
        ]
        assert mean == pytest.approx(mean2, rel=1e-9)
        assert official == pytest.approx(2 * official2, rel=1e-9)
        assert mean == pytest.approx(24 * official, rel=1e-9)

    def test_grows_with_the_square_of_the_scale(self, device):
        model, (x, y) = self.linear(device), self.batch(device)

        def penalty(temperature):
            total = (Standard() + EMR(1.0, temperature))(model, x, y)
            return float((total - Standard()(model, x, y)).detach())

        one = penalty(1.0)
        with torch.no_grad():
            model.weight *= 3
        assert penalty(3.0) == pytest.approx(9 * one, rel=1e-9)

    def test_centre_ignores_what_is_common_to_all_logits(self, device):
        model, (x, y) = self.linear(device), self.batch(device)
        shifted = copy.deepcopy(model)
        with torch.no_grad():
            shifted.weight += torch.tensor([5.0, -3.0, 1.0], device=device)

        def penalty(m, center):
            total = (Standard() + EMR(1.0, center=center))(m, x, y)
            return float((total - Standard()(m, x, y)).detach())

        assert penalty(model, True) == pytest.approx(penalty(shifted, True), rel=1e-9)
        assert penalty(model, False) != pytest.approx(penalty(shifted, False), rel=1e-2)

    def test_runs_in_eval_mode_and_puts_it_back(self, net, batch):
        x, y = batch
        objective = AT(attack()) + EMR(0.5)
        objective(net, x, y)
        once = net[1].num_batches_tracked.clone()
        assert int(once) == 1  # only the forward pass in train mode counts
        assert net.training


def value_and_gradients(emr, net, batch):
    x, y = batch
    penalties = emr.per_sample(Step(net, x, y, 1))
    (net.eval()(x).sum() * 0 + penalties.mean()).backward()  # gives every parameter a gradient
    grads = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    return penalties.detach(), grads


def smooth_net(device):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.Softplus(), nn.Flatten(), nn.Linear(96, 4)
    ).to(device)


@pytest.mark.parametrize("smooth", [True, False])
@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 2.0},
        {"center": True},
        {"of": "pairwise"},
        {"of": "pairwise", "samples": 2},
        {"of": "jacobian", "samples": 3},
        {"of": "jacobian"},
    ],
)
@pytest.mark.parametrize("derivative", ["tangent", "difference"])
def test_the_derivatives_agree(derivative, settings, smooth, net, batch, device):
    net = (smooth_net(device) if smooth else net).double()
    net[1].running_mean.uniform_(-0.1, 0.1)
    batch = batch[0].double(), batch[1]
    torch.manual_seed(1)
    penalties, exact = value_and_gradients(EMR(1.0, derivative="double", **settings), net, batch)
    torch.manual_seed(1)
    same, grads = value_and_gradients(EMR(1.0, derivative=derivative, **settings), net, batch)
    torch.testing.assert_close(same, penalties)
    close = {} if derivative == "tangent" else {"rtol": 1e-4, "atol": 1e-6}
    for a, b in zip(grads, exact, strict=True):
        torch.testing.assert_close(a, b, **close)


def test_the_difference_in_float32(net, batch):
    _, exact = value_and_gradients(EMR(1.0, derivative="double"), net, batch)
    _, grads = value_and_gradients(EMR(1.0, derivative="difference"), net, batch)
    a, b = (torch.cat([g.flatten() for g in gs]) for gs in (grads, exact))
    assert float((a - b).norm() / b.norm()) < 0.02


class _OnceDifferentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.clamp_min(0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return grad * (ctx.saved_tensors[0] > 0)


class OneDerivative(nn.Module):
    def forward(self, x):
        return _OnceDifferentiable.apply(x)


def test_the_difference_needs_one_derivative(net, batch):
    other = copy.deepcopy(net)
    other[2] = OneDerivative()
    _, expected = value_and_gradients(EMR(1.0, derivative="difference"), net, batch)
    _, grads = value_and_gradients(EMR(1.0, derivative="difference"), other, batch)
    for a, b in zip(grads, expected, strict=True):
        torch.testing.assert_close(a, b)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        value_and_gradients(EMR(1.0), other, batch)


def test_variants_are_sums_over_the_jacobian(batch, device):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(36, 4)).to(device).double()
    x, y = batch[0].double(), batch[1]
    w, z = net[1].weight.detach(), net(x).detach()
    penalties = EMR(1.0, of="jacobian").per_sample(Step(net, x, y, 1))
    torch.testing.assert_close(penalties, w.square().sum().expand(24))
    q = z.scatter(1, y[:, None], -torch.inf).softmax(1)
    pairs = (w[y][:, None] - w).square().sum(2)
    penalties = EMR(1.0, of="pairwise").per_sample(Step(net, x, y, 1))
    torch.testing.assert_close(penalties, (q * pairs).sum(1))


@pytest.mark.parametrize("of", ["pairwise", "jacobian"])
def test_samples_estimate_the_sum(of, net, batch):
    net = net.double()
    step = Step(net, batch[0].double(), batch[1], 1)
    exact = EMR(1.0, of=of).per_sample(step).mean()
    drawn = EMR(1.0, of=of, samples=200).per_sample(step).mean()
    assert float(drawn) == pytest.approx(float(exact), rel=0.03)


@pytest.mark.slow
@pytest.mark.parametrize("derivative", ["double", "tangent", "difference"])
def test_with_a_compiled_model(derivative, net, batch):
    x, y = batch
    twin = copy.deepcopy(net)
    loss = (AT(attack()) + EMR(0.5))(twin, x, y)
    compiled = (AT(attack()) + EMR(0.5, derivative=derivative))(torch.compile(net), x, y)
    torch.testing.assert_close(compiled, loss, rtol=1e-4, atol=1e-5)
    for a, b in zip(gradients(net, compiled), gradients(twin, loss), strict=True):
        torch.testing.assert_close(a, b, rtol=0.05, atol=1e-4)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: EMR(-1.0), "lam must be"),
        (lambda: EMR(1.0, temperature=0.0), "temperature must be > 0"),
        (lambda: EMR(1.0, reduction="sum"), "reduction must be one of mean, official"),
        (lambda: EMR(1.0, of="hessian"), "of must be one of softmax, pairwise, jacobian"),
        (lambda: EMR(1.0, derivative="x"), "derivative must be one of tangent, double"),
        (lambda: EMR(1.0, samples=0), "samples must be an integer >= 1, got 0"),
        (lambda: EMR(1.0, radius=0.0), "radius must be > 0"),
    ],
)
def test_refuses_bad_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("name", ["temperature", "radius"])
@pytest.mark.parametrize(
    "value, got",
    [
        (torch.ones(24), r"a tensor of shape \[24\]"),
        ("40", "'40'"),
        (None, "None"),
        (True, "True"),
    ],
)
def test_refuses_what_is_no_number(name, value, got):
    if name == "radius" and value is None:
        return  # the default
    with pytest.raises(TypeError, match=f"{name} must be a number > 0, got {got}"):
        EMR(1.0, **{name: value})


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), torch.tensor(0.0)])
def test_refuses_a_temperature_that_is_not_positive(bad):
    with pytest.raises(ValueError, match="temperature must be > 0"):
        EMR(1.0, temperature=bad)


def test_a_temperature_may_be_a_tensor_of_one_element(net, batch):
    step = Step(net, *batch, 1)
    expected = EMR(1.0, temperature=2.0).per_sample(step)
    for t in (torch.tensor(2.0), torch.tensor([2.0])):
        torch.testing.assert_close(EMR(1.0, temperature=t).per_sample(step), expected)


def test_pairs_need_labels(net, batch):
    objective = TRADES(attack(loss="kl"), ignore_index=-1) + EMR(1.0, of="pairwise")
    with pytest.raises(ValueError, match="needs a label for every sample"):
        objective(net, *batch)
