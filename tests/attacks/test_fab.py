"""FAB finds the nearest point that fools the model. `test_fab_parity` compares it with the authors'
code."""

from __future__ import annotations

import itertools
import math
import sys

import pytest
import torch
from networks import ConvNet, Recorded, RowLinear
from torch import nn

from pyadv.attacks import FAB, PGD, MinimumNormResult, TargetedFAB, fab, targeted_fab
from pyadv.reference.hyperplane import offset_to_hyperplane

P = {"Linf": math.inf, "L2": 2, "L1": 1}
DUAL = {"Linf": 1, "L2": 2, "L1": math.inf}
BARELY = 1 + 1e-9  # an eta that goes just beyond the hyperplane

norms = pytest.mark.parametrize("norm", P)
attacks = pytest.mark.parametrize("attack", [FAB, TargetedFAB])


def distance(a, b, norm):
    return torch.linalg.vector_norm((a - b).flatten(1), P[norm], dim=1)


@pytest.fixture
def problem(device):
    torch.manual_seed(2)
    net = nn.Sequential(nn.Flatten(), nn.Linear(27, 12), nn.Tanh(), nn.Linear(12, 5)).to(device)
    x = torch.rand(6, 3, 3, 3, device=device)
    return net, x, net(x).argmax(1)


# ---- the step to the hyperplane


def shortest(room, slope, need, norm):
    """Return the least norm of lengths in [0, room] with <slope, length> = need, by another
    method."""
    if norm == "L1":  # at a vertex of the polytope all coordinates but one are at an end
        best = math.inf
        for i in range(len(room)):
            others = [j for j in range(len(room)) if j != i]
            for ends in itertools.product((0.0, 1.0), repeat=len(others)):
                t = torch.zeros_like(room)
                t[others] = torch.tensor(ends, dtype=t.dtype) * room[others]
                t[i] = (need - slope @ t) / slope[i]
                if -1e-12 <= t[i] <= room[i] + 1e-12:
                    best = min(best, t.sum().item())
        return best
    low, high = 0.0, 1e6
    for _ in range(200):
        t = (low + high) / 2
        length = torch.minimum(t * (slope if norm == "L2" else torch.ones_like(slope)), room)
        low, high = (t, high) if slope @ length < need else (low, t)
    return torch.linalg.vector_norm(length, P[norm]).item()


@norms
@pytest.mark.parametrize("box", [(0.0, 1.0), (-0.5, None), (None, None)])
def test_offset_is_the_shortest(norm, box):
    torch.manual_seed(0)
    lo, hi = box
    x, w = torch.rand(40, 5).double(), torch.randn(40, 5).double()
    reach = torch.where(w > 0, 1 - x, x).mul(w.abs()).sum(1)
    back = torch.where(w > 0, x, 1 - x).mul(w.abs()).sum(1)
    share = torch.rand(40).double()
    value = torch.where(torch.rand(40) < 0.5, -share * reach, share * back)
    d = offset_to_hyperplane(x, w, value, norm, lo, hi)
    torch.testing.assert_close((w * d).sum(1), -value)
    far = torch.full_like(x, 1e3)
    low, high = (far if lo is None else x - lo), (far if hi is None else hi - x)
    assert (d <= high + 1e-12).all() and (-d <= low + 1e-12).all()
    room = torch.where(w * value[:, None] > 0, low, high)
    for i in range(40):
        expected = shortest(room[i], w[i].abs(), value[i].abs().item(), norm)
        assert distance(d[i : i + 1], 0, norm).item() == pytest.approx(expected, rel=1e-9)


@norms
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_offset_on_awkward_rows(norm, dtype):
    """The rows: a plane out of reach, a point on the plane, a zero normal, a tie, a coordinate
    without room, and a tiny normal."""
    x = torch.tensor([[0.25, 0.5], [0.25, 0.5], [0.25, 0.5], [0.5, 0.5], [1.0, 0.5], [0.5, 0.5]])
    w = torch.tensor([[1.0, -2.0], [1.0, 0.0], [0.0, 0.0], [1.0, 1.0], [1.0, 1.0], [1e-30, 2e-30]])
    value = torch.tensor([-50.0, 0.0, 3.0, 0.5, -0.25, 1e-30])
    d = offset_to_hyperplane(x.to(dtype), w.to(dtype), value.to(dtype), norm, 0.0, 1.0)
    assert d.dtype == (dtype if dtype == torch.float64 else torch.float32)
    same = {"Linf": [-1 / 3, -1 / 3], "L2": [-0.2, -0.4], "L1": [0.0, -0.5]}[norm]
    torch.testing.assert_close(d[0].tolist(), [0.75, -0.5])  # the corner nearest to it
    assert d[1].tolist() == d[2].tolist() == [0, 0]
    assert d[3].sum().item() == pytest.approx(-0.5)
    torch.testing.assert_close(d[4].tolist(), [0.0, 0.25])
    torch.testing.assert_close(d[5].double(), torch.tensor(same).double(), atol=2e-2, rtol=0)


@norms
@pytest.mark.parametrize("box", [(0.0, 1.0), (0.0, None)])
def test_offset_in_float32_and_from_many_points(norm, box, device):
    """float32 suffices for points that share normals, with slopes and distances of many sizes."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(2, 40, 3, 16, 16, generator=generator).mul(1.5).sub(0.5).clamp(0, 1)
    w = torch.randn(40, 3, 16, 16, generator=generator) ** 5  # slopes of many sizes
    reach = torch.where(w > 0, x, 1 - x).mul(w.abs()).flatten(2).sum(2)
    value = reach * torch.linspace(0, 0.99, 40)
    x, w, value = x.to(device), w.to(device), value.to(device)
    got = offset_to_hyperplane(x, w, value, norm, *box)
    assert got.dtype == torch.float32
    exact = offset_to_hyperplane(x.double(), w.double(), value.double(), norm, *box)
    torch.testing.assert_close((w * exact).flatten(2).sum(2), -value.double())
    torch.testing.assert_close((w * got).flatten(2).sum(2), -value, atol=0, rtol=1e-5)
    for i in range(2):
        lengths = distance(got[i], 0, norm), distance(exact[i], 0, norm).float()
        torch.testing.assert_close(*lengths, atol=0, rtol=1e-5)
        assert torch.equal(got[i], offset_to_hyperplane(x[i], w, value[i], norm, *box))


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_offset_with_a_knot_at_every_step(norm):
    """Rooms and slopes are geometric series, so that each Newton step stops only few
    coordinates."""
    k = torch.arange(28).double()
    room, w = 4.0**k, 0.25**k
    value = 0.9 * (w * room).sum()
    d = -offset_to_hyperplane(room[None], w[None], value[None], norm, 0.0, None)[0]
    assert (w @ d).item() == pytest.approx(value.item(), rel=1e-12)
    speed = w if norm == "L2" else torch.ones_like(w)
    t = (d / speed).max()
    assert 4.0**20 < t < (room / speed).max()
    torch.testing.assert_close(d, torch.minimum(t * speed, room), rtol=1e-12, atol=0)


# ---- known optima


@norms
@attacks
@pytest.mark.parametrize("classes", [2, 3, 12])
def test_linear_distance(norm, attack, classes, device):
    """The distance found is |margin| / ||w||_q of the nearest class."""
    net = RowLinear(30, classes, dtype=torch.float64).to(device)
    x = torch.rand(7, 30, dtype=torch.float64, device=device)
    z = net(x)
    y = z.argmax(1)
    gaps = z.gather(1, y[:, None]) - z
    w = net.weight[:, None] - net.weight
    slopes = torch.linalg.vector_norm(w, DUAL[norm], dim=2).T[y]
    gaps[torch.arange(7), y] = math.inf
    exact = (gaps / slopes.clamp(min=1e-9)).amin(1).detach()
    free = dict(norm=norm, lo=None, hi=None, steps=20)
    result = attack(net, **free, eta=BARELY).run(x, y)
    assert not result.correct.any()
    torch.testing.assert_close(result.distances, exact, rtol=1e-6, atol=0)
    torch.testing.assert_close(result.distances, distance(result.x_adv, x, norm))
    usual = attack(net, **free).run(x, y).distances
    assert ((usual >= exact) & (usual <= 1.01 * exact)).all()


@norms
def test_linear_distance_in_the_box(norm, device):
    """The box binds, and the nearest point is the exact projection of x."""
    torch.manual_seed(1)
    x, w = torch.rand(9, 8).double().to(device), torch.randn(8).double().to(device)
    reach = torch.where(w > 0, 1 - x, x).mul(w.abs()).sum(1)

    def model(v):  # predicts class 0 up to 80 % of the way that the box allows
        value = (v - x).flatten(1) @ w - 0.8 * reach
        return torch.stack([-value, value], 1)

    y = torch.zeros(9, dtype=torch.int64, device=device)
    attack = FAB(model, norm=norm, steps=60, eta=BARELY)
    d = offset_to_hyperplane(x, w.expand_as(x), -0.8 * reach, norm, 0.0, 1.0)
    result = attack.run(x, y)
    assert not result.correct.any() and result.x_adv.min() >= 0 and result.x_adv.max() <= 1
    torch.testing.assert_close(result.distances, distance(d, 0 * d, norm), rtol=1e-5, atol=0)


@norms
@attacks
def test_finds_the_nearest_point(norm, attack, problem):
    net, x, y = problem
    result = attack(net, norm=norm, steps=30).run(x, y)
    assert isinstance(result, MinimumNormResult)
    assert not result.correct.any() and (net(result.x_adv).argmax(1) != y).all()
    radius = 0.9 * result.distances  # an attack of fixed radius finds nothing in a smaller ball
    pgd = PGD(net, norm=norm, eps=radius, alpha=radius / 8, steps=100, loss="margin")
    assert pgd.run(x, y).correct.all()


# ---- results


def test_eps_decides_the_verdict_only(problem):
    net, x, y = problem
    free = FAB(net, steps=20).run(x, y)
    eps = free.distances.sort().values[2:4].mean().item()
    for radius in (eps, torch.full((6,), eps, device=x.device)):
        result = FAB(net, steps=20, eps=radius).run(x, y)
        assert torch.equal(result.x_adv, free.x_adv)
        assert torch.equal(result.distances, free.distances)
        assert torch.equal(result.correct, free.distances > eps)
        assert result.robust_accuracy == 0.5
    assert not free.correct.any()


@norms
@attacks
@pytest.mark.parametrize("compact", [True, False])
def test_early_stop(norm, attack, compact, problem, monkeypatch):
    """Early stop gives the same verdicts, stops at the first point within eps and counts every
    pass.

    Batches hold 4 attempts at three samples. Some samples are wrong at x, some are broken soon,
    some later, and some are robust.
    """
    monkeypatch.setattr(sys.modules[FAB.__module__], "_CPU_ROWS", 12)
    net, x, y = problem
    y = y.clone()
    y[1] = (y[1] + 1) % 5
    more = dict(targets=2, restarts=2) if attack is TargetedFAB else dict(restarts=4)
    settings = dict(norm=norm, steps=12, seed=0, compact=compact, **more)
    free = attack(net, eps=0.1, **settings).run(x, y, draw=0)
    ranks = free.distances.sort().values
    eps = torch.full((6,), (ranks[3] + ranks[4]).item() / 2, device=x.device)
    full = attack(net, eps=eps, **settings).run(x, y, draw=0)
    model = Recorded(net)
    result = attack(model, eps=eps, early_stop=True, **settings).run(x, y, draw=0)

    assert torch.equal(result.correct, full.correct) and 1 < result.correct.sum() < 4
    assert torch.equal(result.correct, result.distances > eps)
    assert (result.distances >= full.distances).all()
    assert torch.equal(result.x_adv[result.correct], full.x_adv[result.correct])
    assert (result.queries[result.correct] == 2 + 2 * 12 * 4).all()
    assert (result.queries[~result.correct] < 60).all() and result.queries[1] == 2
    assert ((result.queries > 2) == (result.gradients > 0)).all()
    classes = 1 if attack is TargetedFAB else 4
    assert torch.equal(result.gradients, classes * (result.queries - 2) // 2)
    if compact:
        assert sum(len(v) for v in model.inputs) <= 1.1 * result.queries.sum()
        alone = [
            attack(net, eps=eps[i].item(), early_stop=True, **settings).run(
                x[i : i + 1], y[i : i + 1], draw=0
            )
            for i in range(6)
        ]
        assert [r.queries.item() for r in alone] == result.queries.tolist()


@attacks
@pytest.mark.parametrize("compact", [True, False])
def test_wrong_and_unreachable_samples(attack, compact, problem):
    net, x, y = problem
    y = y.clone()
    y[1] = (y[1] + 1) % 5

    result = attack(net, steps=10, compact=compact).run(x, y)
    assert result.distances[1] == 0 and torch.equal(result.x_adv[1], x[1])
    assert not result.correct[1] and result.kappa[1] == 0
    others = attack(net, steps=10, compact=compact)(x[2:], y[2:])
    torch.testing.assert_close(result.x_adv[2:], others)

    constant = nn.Linear(27, 5).to(x.device)
    constant.weight.data.zero_()
    constant.bias.data = torch.arange(5.0, device=x.device)
    y = torch.full((6,), 4, device=x.device)
    result = attack(nn.Sequential(nn.Flatten(), constant), steps=3, compact=compact).run(x, y)
    assert torch.equal(result.x_adv, x) and result.correct.all()
    assert torch.equal(result.distances, torch.full((6,), math.inf, device=x.device))
    assert (result.kappa == 4).all()


@pytest.mark.parametrize("restarts", [1, 3])
def test_cost(problem, restarts):
    net, x, y = problem
    for attack, tries in ((FAB, restarts), (TargetedFAB, restarts * 2)):
        more = {"targets": 2} if attack is TargetedFAB else {}
        model = Recorded(net)
        result = attack(model, steps=4, restarts=restarts, **more).run(x, y)
        assert len(model.inputs) == 1 + 2 * 4 + 1
        assert [len(v) for v in model.inputs] == [6] + [6 * tries] * 8 + [6]
        assert (result.queries == 2 + 8 * tries).all() and (result.steps == 4).all()
        classes = 1 if attack is TargetedFAB else net(x).shape[1] - 1
        assert (result.gradients == 4 * tries * classes).all()


@norms
@attacks
def test_restarts_are_keyed_and_leave_plateaus(norm, attack, problem):
    _, x, y = problem

    def model(v):  # constant around x
        way = (v - x.repeat(len(v) // len(x), 1, 1, 1)).flatten(1).abs().mean(1)
        return torch.stack([torch.ones_like(way), 40 * (way - 0.02).relu()], 1)

    y = torch.zeros_like(y)
    once = attack(model, norm=norm, steps=8).run(x, y)
    assert once.correct.all() and torch.equal(once.x_adv, x)
    state = torch.get_rng_state()
    often = attack(model, norm=norm, steps=8, restarts=3, seed=3)
    result = often.run(x, y, draw=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert not result.correct.any() and result.distances.isfinite().all()
    assert torch.equal(often.run(x, y, draw=1).x_adv, result.x_adv)
    assert not torch.equal(often.run(x, y, draw=2).x_adv, result.x_adv)


@norms
@attacks
def test_batch_does_not_matter(norm, attack):
    net, x = RowLinear(12, 4), torch.rand(5, 12)
    y = net(x).argmax(1)
    run = attack(net, norm=norm, steps=6, restarts=2, seed=1, eps=0.2)
    whole = run.run(x, y, draw=0)
    for i in range(5):
        one = run.run(x[i : i + 1], y[i : i + 1], draw=0)
        assert torch.equal(one.x_adv[0], whole.x_adv[i])
        assert torch.equal(one.distances[0], whole.distances[i])


@attacks
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_leaves_no_trace(attack, mode):
    torch.manual_seed(0)
    net = ConvNet().train()
    net.head.weight.requires_grad_(False)
    net.body[1].eval()
    x = torch.rand(4, 3, 5, 5).contiguous(memory_format=torch.channels_last)
    y = net.eval()(x).argmax(1)
    net.train().body[1].eval()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with mode():
        result = attack(net, steps=5).run(x, y)
    assert net.training and net.body[3].training and not net.body[1].training
    assert all(p.grad is None for p in net.parameters()) and not net.head.weight.requires_grad
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert result.x_adv.stride() == x.stride() and not result.x_adv.requires_grad
    torch.testing.assert_close(attack(net, steps=5)(x, y), result.x_adv)


@attacks
@norms
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(attack, norm, dtype, problem):
    net, x, y = problem
    net, x = net.to(dtype), x.to(dtype)
    y = net(x).argmax(1)
    result = attack(net, norm=norm, steps=15).run(x, y)
    assert result.x_adv.dtype == dtype and not result.correct.any()
    assert result.x_adv.min() >= 0 and result.x_adv.max() <= 1
    torch.testing.assert_close(
        result.distances.double(), distance(result.x_adv.double(), x.double(), norm)
    )


@attacks
@pytest.mark.parametrize("restarts", [1, 2])
def test_empty_batch(attack, restarts, problem):
    net, x, y = problem
    result = attack(net, steps=3, restarts=restarts).run(x[:0], y[:0])
    assert result.x_adv.shape == x[:0].shape and result.distances.shape == (0,)


def test_functions(problem):
    net, x, y = problem
    assert torch.equal(fab(net, x, y, norm=2, steps=4), FAB(net, norm=2, steps=4)(x, y))
    expected = TargetedFAB(net, targets=3, steps=4)(x, y)
    assert torch.equal(targeted_fab(net, x, y, targets=3, steps=4), expected)


@pytest.mark.parametrize("width", [0.1, 255.0])
def test_other_boxes(width, problem):
    """Distances are in units of x, and the radius of restarts without an eps scales with the
    box."""
    net, x, y = problem
    expected = FAB(net, steps=8, restarts=2, seed=0).run(x, y, ids=y).distances
    attack = FAB(lambda v: net(v / width), lo=0.0, hi=width, steps=8, restarts=2, seed=0)
    distances = attack.run(x * width, y, ids=y).distances
    torch.testing.assert_close(distances, expected * width, rtol=1e-3, atol=0)


def test_a_gradient_that_is_not_finite_is_no_hyperplane(problem):
    net, x, y = problem

    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx, v):
            return v.clone()

        @staticmethod
        def backward(ctx, grad):
            grad = grad.clone()
            grad[0], grad[1] = math.inf, math.nan
            return grad

    result = FAB(lambda v: net(Broken.apply(v)), steps=8).run(x, y)
    assert torch.equal(result.x_adv[:2], x[:2]) and result.x_adv.isfinite().all()
    torch.testing.assert_close(result.x_adv[2:], FAB(net, steps=8)(x[2:], y[2:]))


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(norm="L0"), "norm must be"),
        (dict(eps=-1.0), "eps must be"),
        (dict(eps=torch.ones(1, 3)), r"eps must be one radius .* \[1, 3\]"),
        (dict(alpha_max=1.5), "alpha_max must be"),
        (dict(early_stop=True), "early_stop=True .* needs eps"),
        (dict(eta=0.5), "eta must be"),
        (dict(beta=1.0), "beta must be a share in"),
        (dict(steps=-1), "steps must be"),
        (dict(restarts=0), "restarts must be"),
    ],
)
def test_refuses_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        FAB(None, **settings)


@attacks
def test_refuses_inputs(attack, problem):
    net, x, y = problem
    with pytest.raises(ValueError, match="two classes or more, got 1"):
        attack(lambda v: v.flatten(1)[:, :1])(x, 0 * y)
    with pytest.raises(ValueError, match="must lie in the box"):
        attack(net)(x + 1, y)
    with pytest.raises(ValueError, match="y must hold labels"):
        attack(net)(x, y + 5)
    with pytest.raises(ValueError, match="carry no gradient"):
        attack(lambda v: net(v.detach()).detach())(x, y)
    with pytest.raises(ValueError, match="targets must be"):
        TargetedFAB(net, targets=0)
