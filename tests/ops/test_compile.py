"""torch.compile makes one graph of model and ops and does not recompile for new parameter
values."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pyadv import ops

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Counter:
    """A compiler backend that counts the graphs it is given."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, example_inputs):
        self.graphs += 1
        return graph.forward


def model_of(device):
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 16), nn.ReLU(), nn.Linear(16, 5)).to(device)


def batch_of(device):
    x = torch.rand(4, 3, 4, 4, generator=torch.Generator().manual_seed(1)).to(device)
    return x, torch.arange(4, device=device)


def attack_step(model, x_adv, x, y, eps):
    """Do everything that an attack does in one iteration. The input gradient comes from the
    transpose of a linear model, which every version of torch can trace."""
    logits = model(x_adv)
    loss, grad_logits, correct = ops.attack_loss(logits, y, "ce")
    weight = model[3].weight @ model[1].weight
    grad = (grad_logits @ weight).view_as(x)
    moved = ops.linf_step(x_adv, grad, x, 0.01, eps)
    moved = ops.l2_step(moved, grad, x, 0.01, eps, 0.0, 1.0, correct)
    return ops.linf_project(moved, x, eps), loss


def training_loss(model, x_adv, x, y):
    logits, logits_adv = model(x), model(x_adv)
    weights = ops.mail_weights(ops.probabilistic_margin(logits_adv.detach(), y), 10.0, -0.1)
    rows = ops.weighted_cross_entropy(logits, y) + 6 * ops.trades_kl(logits_adv, logits)
    rows = rows + ops.mart_bce(logits_adv, y) + ops.mart_kl(logits_adv, logits, y)
    penalty = ops.log_norm_product([model[1].weight, model[3].weight])
    return (weights * rows).mean() + 1e-3 * penalty


def test_attack_step_is_one_graph(device):
    model, (x, y) = model_of(device), batch_of(device)
    eps = torch.tensor(0.05, device=device)
    with torch.no_grad():
        expected = attack_step(model, x, x, y, eps)
        got = torch.compile(attack_step, fullgraph=True)(model, x, x, y, eps)
    torch.testing.assert_close(got, expected)


def test_training_loss_and_its_gradients_are_one_graph(device):
    model, (x, y) = model_of(device), batch_of(device)
    x_adv = (x + 0.03).clamp(0, 1)
    expected = training_loss(model, x_adv, x, y)
    wanted = torch.autograd.grad(expected, list(model.parameters()))
    got = torch.compile(training_loss, fullgraph=True)(model, x_adv, x, y)
    torch.testing.assert_close(got, expected)
    grads = torch.autograd.grad(got, list(model.parameters()))
    for g, w in zip(grads, wanted, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-6)


def test_no_graph_breaks(device):
    model, (x, y) = model_of(device), batch_of(device)
    with torch.no_grad():
        report = torch._dynamo.explain(attack_step)(model, x, x, y, torch.tensor(0.05))
    assert report.graph_count == 1 and report.graph_break_count == 0, report.break_reasons


def test_twelve_radii_compile_once(device):
    x, _ = batch_of(device)
    grad = torch.randn_like(x)
    counter = Counter()
    step = torch.compile(
        lambda x_adv, g, c, eps: ops.linf_step(x_adv, g, c, 0.1, eps),
        backend=counter,
        fullgraph=True,
    )
    for k in range(12):
        eps = torch.tensor(0.01 * k, device=device)
        assert torch.equal(step(x, grad, x, eps), ops.linf_step(x, grad, x, 0.1, eps))
    assert counter.graphs == 1


@pytest.mark.parametrize("in_place", [True, False])
def test_writing_ops_in_a_graph(in_place, device):
    x, _ = batch_of(device)
    grad = torch.randn_like(x)

    def run(x_adv, g, c):
        x_adv = x_adv.clone()
        out = x_adv if in_place else torch.empty_like(x_adv)
        ops.linf_step(x_adv, g, c, 0.1, 0.2, out=out)
        return ops.linf_step(out, g, c, 0.1, 0.15, out=out) + 0

    assert torch.equal(torch.compile(run, fullgraph=True)(x, grad, x), run(x, grad, x))
