"""What all minimum-norm attacks keep that the engine runs; each one's own is in its own file."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from networks import ConvNet, Recorded, RowLinear
from torch import nn

from pyadv.attacks import (
    CW,
    DDN,
    FMN,
    DeepFool,
    MinimumNormResult,
    SigmaZero,
    cw,
    ddn,
    deepfool,
    fmn,
)
from pyadv.attacks.minimum_norm import CLASSES

P = {"Linf": math.inf, "L2": 2, "L1": 1, "L0": 0}
FEW = partial(CW, steps=40, searches=3, lr=0.05, c=1.0)
ATTACKS = {
    "CW": FEW,
    "DDN": partial(DDN, steps=25),
    **{f"FMN-{norm}": partial(FMN, norm=norm, steps=25) for norm in P},
    **{f"DeepFool-{norm}": partial(DeepFool, norm=norm) for norm in ("L2", "Linf")},
    "DeepFool-super": partial(DeepFool, variant="super"),
    "SigmaZero": partial(SigmaZero, steps=60),
}
attacks = pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
with_targets = pytest.mark.parametrize("attack", list(ATTACKS.values())[:6], ids=list(ATTACKS)[:6])


def distance(a, b, norm):
    return torch.linalg.vector_norm((a - b).flatten(1), P[norm], dim=1)


@pytest.fixture
def problem(device):
    torch.manual_seed(2)
    net = nn.Sequential(nn.Flatten(), nn.Linear(27, 12), nn.Tanh(), nn.Linear(12, 5)).to(device)
    x = torch.rand(6, 3, 3, 3, device=device)
    return net, x, net(x).argmax(1)


@attacks
def test_result(attack, problem):
    net, x, y = problem
    attack = attack(net)
    result = attack.run(x, y)
    assert isinstance(result, MinimumNormResult)
    assert not result.correct.any() and (net(result.x_adv).argmax(1) != y).all()
    assert result.x_adv.min() >= 0 and result.x_adv.max() <= 1
    torch.testing.assert_close(result.logits, net(result.x_adv))
    norm = attack.settings.norm
    torch.testing.assert_close(result.distances, distance(result.x_adv, x, norm))
    assert (result.distances > 0).all()
    assert torch.equal(attack(x, y), result.x_adv)
    assert norm in attack.describe() and "steps" in attack.describe()


@attacks
def test_eps_decides_the_verdict_only(attack, problem):
    net, x, y = problem
    free = attack(net).run(x, y)
    eps = free.distances.sort().values[2:4].mean()
    result = attack(net, eps=eps.expand(6), hi=1.0).run(x, y)
    assert torch.equal(result.x_adv, free.x_adv)
    assert torch.equal(result.correct, free.distances > eps)


@attacks
@pytest.mark.parametrize("compact", [True, False])
def test_wrong_and_unreachable_samples(attack, compact, problem):
    net, x, y = problem
    y = y.clone()
    y[1] = (y[1] + 1) % 5
    result = attack(net, compact=compact).run(x, y)
    assert result.distances[1] == 0 and torch.equal(result.x_adv[1], x[1])
    assert not result.correct[1] and result.kappa[1] == 0
    assert (result.queries[1], result.gradients[1], result.steps[1]) == (2, 0, 0)
    others = attack(net, compact=not compact).run(x, y)
    torch.testing.assert_close(result.x_adv, others.x_adv)
    assert torch.equal(result.queries, others.queries)

    constant = nn.Linear(27, 5).to(x.device)
    constant.weight.data.zero_()
    constant.bias.data = torch.arange(5.0, device=x.device)
    y = torch.full((6,), 4, device=x.device)
    result = attack(nn.Sequential(nn.Flatten(), constant), compact=compact).run(x, y)
    assert torch.equal(result.x_adv, x) and result.correct.all()
    assert torch.equal(result.distances, torch.full((6,), math.inf, device=x.device))
    assert torch.equal(result.kappa, result.steps)


@attacks
def test_cost(attack, problem):
    net, x, y = problem
    model = Recorded(net)
    attack = attack(model, compact=False)
    result = attack.run(x, y)
    steps = attack.settings.steps
    bisections = 10 * (attack.settings.rule.__class__.__name__ == "NormalRule")
    assert len(model.inputs) == steps + 2 + bisections
    name = type(attack)
    more = 3 * (name in (DDN, FMN, CW))  # classes beside y and one, where the nearest is chosen
    if name in (DDN, FMN, SigmaZero):
        assert (result.queries == steps + 2).all() and (result.gradients == steps + more).all()
    each = (4 + (bisections > 0)) if name is DeepFool else 1  # classes other than y
    # DeepFool looks once more at the point that fools; a search of CW may end before its steps do.
    assert torch.equal(result.gradients, each * result.steps + more)
    assert (result.queries <= result.steps + 2 + (name is CW) + bisections).all()


@attacks
def test_one_step_is_looked_at(attack, device):
    """A convex margin: already the first step, which takes it as linear, goes beyond the root."""

    def model(v):
        way = v.flatten(1).square().sum(1) - 3.2
        return torch.stack([-way, way], 1)

    x, y = torch.full((2, 12), 0.5, device=device), torch.zeros(2, dtype=torch.int64, device=device)
    steps = dict(steps=1, searches=1) if attack is FEW else dict(steps=1)
    result = attack(model, **steps).run(x, y)
    assert not result.correct.any() and (result.distances > 0).all()
    assert (result.steps == 1).all()


@attacks
def test_batch_does_not_matter(attack):
    net, x = RowLinear(12, 4), torch.rand(5, 12)
    y = net(x).argmax(1)
    whole = attack(net).run(x, y)
    assert not whole.correct.any()
    for i in range(5):
        one = attack(net).run(x[i : i + 1], y[i : i + 1])
        assert torch.equal(one.x_adv[0], whole.x_adv[i])
        assert torch.equal(one.queries[0], whole.queries[i])


@with_targets
def test_targeted(attack, problem):
    net, x, y = problem
    target = (y + 1) % 5
    target[2] = y[2]  # reached already
    result = attack(net, targeted=True, steps=60).run(x, target)
    reached = net(result.x_adv).argmax(1) == target
    assert torch.equal(~result.correct, reached) and reached.sum() >= 5
    assert result.distances[2] == 0 and torch.equal(result.x_adv[2], x[2])
    assert torch.equal(result.distances.isfinite(), reached)


@attacks
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_leaves_no_trace(attack, mode):
    torch.manual_seed(0)
    net = ConvNet().train()
    net.head.weight.requires_grad_(False)
    net.body[1].eval()
    x = torch.rand(4, 3, 5, 5).contiguous(memory_format=torch.channels_last)
    y = net.eval()(x).argmax(1)
    net.train().body[1].eval()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    state = torch.get_rng_state()
    with mode():
        result = attack(net).run(x, y)
    assert net.training and net.body[3].training and not net.body[1].training
    assert all(p.grad is None for p in net.parameters()) and not net.head.weight.requires_grad
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert result.x_adv.stride() == x.stride() and not result.x_adv.requires_grad
    torch.testing.assert_close(attack(net)(x, y), result.x_adv)


@attacks
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(attack, dtype, problem):
    net, x, y = problem
    net, x = net.to(dtype), x.to(dtype)
    y = net(x).argmax(1)
    result = attack(net).run(x, y)
    assert result.x_adv.dtype == dtype and not result.correct.any()
    assert result.x_adv.min() >= 0 and result.x_adv.max() <= 1
    norm = attack(net).settings.norm
    expected = distance(result.x_adv.double(), x.double(), norm)
    torch.testing.assert_close(result.distances.double(), expected)


@attacks
def test_other_boxes(attack, problem):
    """Distances are in units of x, and published settings follow the width of the box."""
    net, x, y = problem
    expected = attack(net).run(x, y).distances
    result = attack(lambda v: net(v / 255), lo=0.0, hi=255.0).run(x * 255, y)
    scale = 1 if attack(net).settings.norm == "L0" else 255
    torch.testing.assert_close(result.distances, expected * scale, rtol=2e-2, atol=0)

    lo = torch.tensor([0.0, -1.0, 2.0], device=x.device).view(1, 3, 1, 1)
    width = torch.tensor([1.0, 0.0, 3.0], device=x.device).view(1, 3, 1, 1)
    bounds = dict(lo=lo, hi=lo + width)
    result = attack(lambda v: net((v - lo) / width.clamp(min=1)), **bounds).run(x * width + lo, y)
    assert (result.x_adv >= lo).all() and (result.x_adv <= lo + width).all()
    assert torch.equal(result.distances.isfinite(), ~result.correct) and not result.correct.all()

    half_open = attack(net, hi=None).run(x, y)
    assert not half_open.correct.any() and half_open.x_adv.min() >= 0


@attacks
def test_a_gradient_that_is_not_finite_moves_nothing(attack, problem):
    net, x, y = problem

    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx, v):
            return v.clone()

        @staticmethod
        def backward(ctx, grad):
            grad = grad.clone()
            grad[0], grad[1, 0, 0, 0] = math.inf, math.nan
            return grad

    result = attack(lambda v: net(Broken.apply(v)), compact=False).run(x, y)
    assert torch.equal(result.x_adv[:2], x[:2]) and result.x_adv.isfinite().all()
    torch.testing.assert_close(result.x_adv[2:], attack(net)(x[2:], y[2:]))


@attacks
def test_fast_view(attack):
    torch.manual_seed(0)
    head = nn.Sequential(nn.Flatten(), nn.Linear(150, 5))
    net = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), head).eval()
    x = torch.rand(4, 3, 5, 5)
    y = net(x).argmax(1)
    result = attack(net, speed="fast").run(x, y)
    assert not result.correct.any()
    expected = attack(net).run(x, y).distances
    torch.testing.assert_close(result.distances, expected, rtol=2e-2, atol=1e-3)


@attacks
def test_empty_batch(attack, problem):
    net, x, y = problem
    result = attack(net).run(x[:0], y[:0])
    assert result.x_adv.shape == x[:0].shape and result.distances.shape == (0,)


def test_functions(problem):
    net, x, y = problem
    for function, attack in ((cw, CW), (ddn, DDN), (fmn, FMN), (deepfool, DeepFool)):
        settings = dict(steps=4, eps=0.1)
        assert torch.equal(function(net, x, y, **settings), attack(net, **settings)(x, y))


@pytest.mark.parametrize(
    "attack, settings, message",
    [
        (CW, dict(steps=0), "steps must be"),
        (CW, dict(searches=0), "searches must be"),
        (CW, dict(confidence=-1.0), "confidence must be"),
        (CW, dict(c=math.nan), "c must be"),
        (DDN, dict(gamma=1.0), "gamma must be a share in"),
        (DDN, dict(alpha=-1.0), "alpha must be"),
        (DDN, dict(start_radius=-1.0), "start_radius must be"),
        (FMN, dict(norm=3), "norm must be Linf, L2, L1 or L0"),
        (FMN, dict(gamma_final=0.0), "gamma_final must be a share in"),
        (DeepFool, dict(norm="L1"), "norm must be Linf or L2"),
        (DeepFool, dict(overshoot=-0.1), "overshoot must be"),
        (DeepFool, dict(classes=1), "classes must be"),
        (DDN, dict(eps=torch.ones(1, 3)), r"eps must be one radius .* \[1, 3\]"),
        (DDN, dict(lo=1.0, hi=0.0), "lo must not be above hi"),
    ],
)
def test_refuses_settings(attack, settings, message):
    with pytest.raises(ValueError, match=message):
        attack(None, **settings)


@attacks
def test_refuses_inputs(attack, problem):
    net, x, y = problem
    with pytest.raises(ValueError, match="needs at least 2 classes, got C = 1"):
        attack(lambda v: v.flatten(1)[:, :1])(x, 0 * y)
    with pytest.raises(ValueError, match="must lie in the box"):
        attack(net)(x + 1, y)
    with pytest.raises(ValueError, match="y must hold labels"):
        attack(net)(x, y + 5)
    with pytest.raises(ValueError, match="carry no gradient"):
        attack(lambda v: net(v.detach()).detach())(x, y)


P_DUAL = {"L2": 2, "Linf": 1, "L1": math.inf}
FOLLOWERS = {
    "DDN": partial(DDN),
    "CW": partial(CW, steps=200, searches=6),
    **{f"FMN-{norm}": partial(FMN, norm=norm) for norm in P_DUAL},
}


def linear(classes=5):
    """A linear model whose rows differ in length, so that the runner-up is often not the nearest
    class, with inputs far from the box's walls; and the distances in closed form."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(40, classes)).double()
    with torch.no_grad():
        net[1].weight.mul_(torch.tensor([1.0, 0.2, 3.0, 0.5, 2.0]).repeat(2)[:classes, None])
    x = 0.35 + 0.3 * torch.rand(30, 1, 5, 8).double()
    z, w = net(x).detach(), net[1].weight.detach()
    y = z.argmax(1)
    others = torch.ones_like(z, dtype=torch.bool).scatter_(1, y[:, None], False)

    def best(norm):
        slopes = torch.linalg.vector_norm(w - w[y][:, None], P_DUAL[norm], dim=2)
        ways = (z.gather(1, y[:, None]) - z) / slopes
        return ways.masked_fill(~others, math.inf)

    return net, x, y, best


@pytest.mark.parametrize("name", FOLLOWERS)
def test_the_nearest_class_is_followed(name):
    """The optimum of a linear model is found; by the runner-up it is missed."""
    net, x, y, best = linear()
    attack = FOLLOWERS[name]
    ways = best(attack().settings.norm)
    off = {c: attack(net, classes=c).run(x, y).distances / ways.amin(1) for c in CLASSES}
    assert (ways.argsort(1)[:, 0] != net(x).argsort(1, descending=True)[:, 1]).any()
    assert off["nearest"].max() < (1.2 if name == "CW" else 1.1) and off["nearest"].median() < 1.06
    assert off["runner-up"].max() > 1.5


@pytest.mark.parametrize("name", FOLLOWERS)
def test_the_choice_costs_less_than_a_tenth(name):
    """At the default steps, with ten classes, in forward and backward passes together."""
    net, x, y, _ = linear(10)
    kind = CW if name == "CW" else FOLLOWERS[name]
    settings = dict(abort_early=False, steps=100) if name == "CW" else {}
    cost = {}
    for classes in CLASSES:
        result = kind(net, classes=classes, **settings).run(x[:4], y[:4])
        cost[classes] = (result.queries + result.gradients).sum().item()
    assert cost["runner-up"] < cost["nearest"] < 1.1 * cost["runner-up"]


def test_a_targeted_attack_follows_its_target():
    net, x, y, _ = linear()
    target = (y + 1) % 5
    first, second = (DDN(net, targeted=True, classes=c).run(x, target) for c in CLASSES)
    assert torch.equal(first.x_adv, second.x_adv) and (net(first.x_adv).argmax(1) == target).all()
    with pytest.raises(ValueError, match="classes must be one of nearest, runner-up"):
        FMN(classes="second")


@pytest.mark.parametrize("steps", [20])
def test_large_images_are_fooled_in_l0(steps):
    """Thousands of 150,528 entries have to change, each by at most half the box: a ball that grows
    by an entry a step would not get there."""
    torch.manual_seed(0)
    x = 0.5 + 0.01 * torch.randn(2, 3, 224, 224)
    w = torch.sign(torch.randn(3 * 224 * 224))

    def model(v):
        way = 1e-3 * (v.flatten(1) - 0.5) @ w - 2.0  # 4,000 entries by a half each
        return torch.stack([-way, way], 1)

    y = torch.tensor([0, 0])
    result = FMN(model, norm="L0", steps=steps).run(x, y)
    assert not result.correct.any()
    assert (result.distances < 8000).all()


def test_super_deepfool_is_nearer(problem):
    net, x, y = problem
    plain, closer = (DeepFool(net, variant=v).run(x, y).distances for v in ("plain", "super"))
    assert (closer <= plain + 1e-5).all() and closer.sum() < 0.995 * plain.sum()
    with pytest.raises(ValueError, match="attack in L2"):
        DeepFool(norm="Linf", variant="super")


@pytest.mark.parametrize("kind", [DDN, FMN, DeepFool])
def test_infinite_bounds_are_no_bounds(kind):
    x, y = torch.rand(3, 1, 2, 2, dtype=torch.float64), torch.tensor([0, 1, 2])
    model = RowLinear(4, dtype=torch.float64)
    found = [
        kind(model, steps=3, lo=lo, hi=hi)(x, y) for lo, hi in ((None, None), (-math.inf, math.inf))
    ]
    assert torch.equal(*found)
