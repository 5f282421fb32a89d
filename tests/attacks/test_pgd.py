"""PGD: known optima, side effects, refused arguments."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from networks import ConvNet, RowLinear
from torch import nn

from pyadv.attacks import PGD, FriendlyPGD, PGDPlus, Square, pgd


@pytest.fixture
def batch(device):
    generator = torch.Generator().manual_seed(3)
    x = 0.2 + 0.6 * torch.rand(6, 3, 5, 5, generator=generator)
    return x.to(device), (torch.arange(6) % 4).to(device)


@pytest.fixture
def net(device):
    torch.manual_seed(0)
    return ConvNet().to(device)


def linear_batch(device, n=40, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(5, n, generator=generator, dtype=dtype).to(device)
    return x, torch.tensor([0, 1, 0, 1, 1], device=device)


DUAL = {"Linf": 1, "L2": 2, "L1": torch.inf}


@pytest.mark.parametrize("norm", DUAL)
@pytest.mark.parametrize("loss", ["ce", "margin", "slm"])
def test_linear_optimum_without_a_box(norm, loss, device):
    """With two linear classes the worst point lowers the margin by eps ||w||_q, where q is dual to
    the norm."""
    x, y = linear_batch(device)
    model = RowLinear(40, classes=2).to(device)
    eps, keep = 0.3, 1 / 40
    attack = PGD(
        model, norm=norm, eps=eps, alpha=0.1, steps=40, loss=loss, lo=None, hi=None, keep=keep
    )
    w = model.weight.detach()
    w = w[y] - w[1 - y]
    clean = (w * x).sum(1)
    expected = clean - eps * torch.linalg.vector_norm(w, DUAL[norm], dim=1)
    x_adv = attack(x, y)
    torch.testing.assert_close((w * x_adv).sum(1), expected, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("lo, hi", [(0.0, 1.0), (-0.5, 0.75), (None, 0.9)])
def test_linear_optimum_linf_in_a_box(lo, hi, device):
    x, y = linear_batch(device)
    x = x.clamp(-1 if lo is None else lo, hi)
    model = RowLinear(40, classes=2).to(device)
    x_adv = PGD(model, eps=0.3, alpha=0.1, steps=10, lo=lo, hi=hi)(x, y)
    w = model.weight.detach()
    worst = (x - 0.3 * (w[y] - w[1 - y]).sign()).clamp(lo, hi)
    torch.testing.assert_close(x_adv, worst)


def test_one_step_from_x_is_fgsm(net, batch):
    x, y = batch
    net.eval()
    x_adv = PGD(net, eps=0.1, alpha=0.1, steps=1, start="none")(x, y)
    leaf = x.clone().requires_grad_()
    F.cross_entropy(net(leaf), y, reduction="sum").backward()
    assert torch.equal(x_adv, (x + 0.1 * leaf.grad.sign()).clamp(0, 1))


def test_same_iterates_as_the_plain_loop(net, batch):
    """grad_mode="autograd" with a start from the generator gives the iterates of a hand-written
    loop."""
    x, y = batch
    net.eval()
    torch.manual_seed(5)
    ours = PGD(net, eps=0.1, alpha=0.03, steps=7, start="uniform", grad_mode="autograd")(x, y)
    torch.manual_seed(5)
    x_adv = (x + torch.empty_like(x).uniform_(-0.1, 0.1)).clamp(0, 1)
    for _ in range(7):
        leaf = x_adv.detach().requires_grad_()
        (g,) = torch.autograd.grad(F.cross_entropy(net(leaf), y, reduction="sum"), leaf)
        x_adv = torch.min(torch.max(x_adv + 0.03 * g.sign(), x - 0.1), x + 0.1).clamp(0, 1)
    assert torch.equal(ours, x_adv)


def test_trades_attack_is_the_official_one(net, batch):
    x, y = batch
    net.eval()
    attack = PGD(
        net, eps=0.1, alpha=0.03, steps=4, loss="kl", start="normal_small", grad_mode="autograd"
    )
    torch.manual_seed(5)
    ours = attack(x, y)
    torch.manual_seed(5)
    x_adv = x + 0.001 * torch.randn(x.shape).to(x)
    for _ in range(4):
        leaf = x_adv.detach().requires_grad_()
        q = F.softmax(net(x), dim=1)
        loss = F.kl_div(F.log_softmax(net(leaf), dim=1), q, reduction="sum")
        (g,) = torch.autograd.grad(loss, leaf)
        x_adv = torch.min(torch.max(x_adv + 0.03 * g.sign(), x - 0.1), x + 0.1).clamp(0, 1)
    torch.testing.assert_close(ours, x_adv, atol=1e-6, rtol=0)


@pytest.mark.parametrize("norm", ["Linf", "L2", "L1"])
@pytest.mark.parametrize("start", ["keyed", "uniform"])
def test_start_fills_the_ball_uniformly(norm, start, device):
    """(radius / eps)^n is uniform on [0, 1] for a point uniform in the ball."""
    scipy_stats = pytest.importorskip("scipy.stats")
    n, eps = 12, 0.25
    x = torch.full((4000, n), 0.5, device=device, dtype=torch.float64)
    x += 1e-9 * torch.arange(4000, device=device)[:, None]  # each row gets its own id
    y = torch.zeros(4000, dtype=torch.int64, device=device)
    model = RowLinear(n, dtype=torch.float64).to(device)
    x_adv = PGD(model, norm=norm, eps=eps, steps=0, start=start, lo=None, hi=None)(x, y)
    p = {"Linf": torch.inf, "L2": 2, "L1": 1}[norm]
    share = (torch.linalg.vector_norm(x_adv - x, p, dim=1) / eps) ** n
    assert share.max() <= 1 + 1e-6
    assert scipy_stats.kstest(share.cpu().numpy(), "uniform").pvalue > 1e-3
    assert (x_adv - x).mean(0).abs().max() < 0.02


@pytest.mark.parametrize("norm, eps", [("Linf", 0.1), ("L2", 0.8), ("L1", 3.0)])
@pytest.mark.parametrize("loss", ["ce", "margin", "dlr", "kl", "slm"])
def test_stays_in_ball_and_box(norm, eps, loss, net, batch):
    x, y = batch
    x = x.clone()
    x[0, :, 0] = 0.0
    x[1, :, 0] = 1.0
    result = PGD(net, norm=norm, eps=eps, alpha=eps / 4, steps=5, loss=loss).run(x, y)
    assert result.x_adv.min() >= 0 and result.x_adv.max() <= 1
    p = {"Linf": torch.inf, "L2": 2, "L1": 1}[norm]
    distance = torch.linalg.vector_norm((result.x_adv - x).flatten(1).double(), p, dim=1)
    assert (distance <= eps * (1 + 1e-5)).all()
    assert result.loss.shape == (6,) and result.logits.shape == (6, 4)
    assert torch.equal(result.correct, result.logits.argmax(1) == y)


def test_counts_its_passes(net, batch):
    x, y = batch
    calls = {"forward": 0, "backward": 0}

    def model(inputs):
        calls["forward"] += 1
        logits = net(inputs)
        if logits.requires_grad:
            logits.register_hook(lambda g: calls.__setitem__("backward", calls["backward"] + 1))
        return logits

    PGD(model, steps=5)(x, y)
    assert calls == {"forward": 5, "backward": 5}
    result = PGD(model, steps=5).run(x, y)
    assert calls == {"forward": 11, "backward": 10}
    assert result.queries.tolist() == [6] * 6 and result.steps.tolist() == [5] * 6
    assert result.gradients.tolist() == [5] * 6


class TestLeavesNothingBehind:
    def snapshot(self, model):
        return (
            {k: v.clone() for k, v in model.state_dict().items()},
            [m.training for m in model.modules()],
            [p.grad for p in model.parameters()],
            [p.requires_grad for p in model.parameters()],
            torch.get_rng_state(),
        )

    def assert_same(self, before, after):
        assert all(torch.equal(before[0][k], after[0][k]) for k in before[0])
        assert before[1] == after[1] and before[3] == after[3]
        assert all(a is b for a, b in zip(before[2], after[2], strict=True))
        assert torch.equal(before[4], after[4])

    @pytest.mark.parametrize("bn", ["eval", "train"])
    @pytest.mark.parametrize("fails", [False, True])
    def test_model_and_rng(self, net, batch, bn, fails):
        x, y = batch
        net.train()
        net.body[1].eval()  # a frozen BatchNorm in a model in train mode
        net.head.weight.requires_grad_(False)
        before = self.snapshot(net)
        calls = []

        def model_hook(module, args, output):
            calls.append(1)
            if fails and len(calls) == 3:
                raise RuntimeError("the model failed")

        handle = net.register_forward_hook(model_hook)
        attack = PGD(net, steps=4, bn=bn, seed=1)
        if fails:
            with pytest.raises(RuntimeError, match="the model failed"):
                attack.run(x, y)
        else:
            attack.run(x, y)
        handle.remove()
        self.assert_same(before, self.snapshot(net))

    def test_bn_train_uses_batch_statistics_and_may_keep_them(self, net, batch):
        x, y = batch
        torch.nn.init.normal_(net.body[1].running_mean)
        settings = dict(eps=0.1, alpha=0.03, steps=3, start="none")
        in_eval = PGD(net, **settings)(x, y)
        in_train = PGD(net, bn="train", **settings)(x, y)
        assert not torch.equal(in_eval, in_train)
        before = net.body[1].running_mean.clone()
        PGD(net, bn="train", update_stats=True, **settings)(x, y)
        assert not torch.equal(before, net.body[1].running_mean)

    def test_x_is_not_touched(self, net, batch):
        x, y = batch
        x = x.requires_grad_()
        before = x.detach().clone()
        x_adv = PGD(net, steps=2)(x, y)
        assert torch.equal(x.detach(), before) and x.grad is None and not x_adv.requires_grad


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("grad_mode", ["fused", "autograd"])
def test_inside_no_grad_and_inference_mode(net, batch, context, grad_mode):
    x, y = batch
    attack = PGD(net, steps=3, seed=0, grad_mode=grad_mode)
    expected = attack.run(x, y, draw=0)
    with context():
        got = attack.run(x.clone(), y.clone(), draw=0)
    assert torch.equal(expected.x_adv, got.x_adv)
    assert torch.equal(expected.correct, got.correct)


@pytest.mark.parametrize("norm, eps", [("Linf", 0.1), ("L2", 0.8), ("L1", 3.0)])
def test_does_not_depend_on_the_batch(norm, eps, batch):
    x, y = batch
    model = RowLinear(75, classes=4).to(x.device)
    attack = PGD(model, norm=norm, eps=eps, alpha=eps / 3, steps=4, seed=7)
    whole = attack.run(x, y, draw=3).x_adv
    alone = torch.cat([attack.run(x[i : i + 1], y[i : i + 1], draw=3).x_adv for i in range(6)])
    order = torch.tensor([4, 2, 0, 5, 1, 3], device=x.device)
    shuffled = attack.run(x[order], y[order], draw=3).x_adv
    assert torch.equal(whole, alone)
    assert torch.equal(whole[order], shuffled)


def test_draws_and_seeds(net, batch):
    x, y = batch
    settings = dict(steps=0, eps=0.1)
    attack = PGD(net, seed=1, **settings)
    first, second = attack(x, y), attack(x, y)
    assert not torch.equal(first, second)
    assert torch.equal(first, attack.run(x, y, draw=0).x_adv)
    assert attack.state_dict() == {"draw": 2}
    resumed = PGD(net, seed=1, **settings)
    resumed.load_state_dict({"draw": 1})
    assert torch.equal(second, resumed(x, y))
    assert not torch.equal(first, PGD(net, seed=2, **settings)(x, y))
    ids = torch.arange(6, device=x.device)
    noise = [PGD(net, seed=1, lo=None, hi=None, **settings)(v, y, ids) - v for v in (x, 0.9 * x)]
    torch.testing.assert_close(*noise, atol=1e-6, rtol=0)  # the noise depends on the id, not on x
    assert torch.equal(pgd(net, x, y, seed=1, **settings), first)


def test_restarts_are_one_batch_and_keep_the_best(net, batch):
    x, y = batch
    attack = PGD(net, eps=0.1, alpha=0.03, steps=2, restarts=4, seed=0)
    single = PGD(net, eps=0.1, alpha=0.03, steps=2, seed=0)
    result, one = attack.run(x, y), single.run(x, y)
    broken = ~one.correct
    assert (~result.correct[broken]).all()
    same = result.correct == one.correct
    assert (result.loss[same] >= one.loss[same] - 1e-6).all()
    assert result.queries.tolist() == [12] * 6 and result.gradients.tolist() == [8] * 6
    assert torch.equal(attack.run(x, y, draw=9).x_adv, attack.run(x, y, draw=9).x_adv)


@pytest.mark.parametrize("best", ["last", "fooled"])
def test_restarts_one_by_one_where_memory_is_short(best, batch):
    x, y = batch
    inner = RowLinear(75, classes=4).to(x.device)
    y = inner(x).argmax(1)

    def small(v):
        if len(v) > 6:
            raise torch.OutOfMemoryError
        return inner(v)

    settings = dict(eps=0.03, alpha=0.01, steps=4, restarts=3, seed=0, best=best)
    whole, parts = PGD(inner, **settings).run(x, y), PGD(small, **settings).run(x, y)
    assert torch.equal(whole.correct, parts.correct)
    robust = whole.correct
    assert 0 < robust.sum() < 6
    kept = robust if best == "fooled" else torch.ones_like(robust)
    assert torch.equal(whole.x_adv[kept], parts.x_adv[kept])


def test_per_sample_radius_and_step(batch):
    x, y = batch
    model = RowLinear(75, classes=4).to(x.device)
    eps = torch.linspace(0, 0.2, 6, device=x.device)
    together = PGD(model, eps=eps, alpha=eps / 4, steps=5, seed=0).run(x, y, draw=0).x_adv
    for i in range(6):
        settings = dict(eps=float(eps[i]), alpha=float(eps[i]) / 4, steps=5, seed=0)
        alone = PGD(model, **settings).run(x[i : i + 1], y[i : i + 1], draw=0).x_adv
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-6, rtol=0)


def test_per_channel_box_of_normalised_inputs(net, batch):
    x, y = batch
    mean = torch.tensor([0.4, 0.5, 0.6], device=x.device).view(1, 3, 1, 1)
    std = torch.tensor([0.2, 0.3, 0.25], device=x.device).view(1, 3, 1, 1)
    z = (x - mean) / std
    inside = PGD(
        lambda v: net(v * std + mean),
        eps=0.1 / std,
        alpha=0.03 / std,
        steps=3,
        start="none",
        lo=(0 - mean) / std,
        hi=(1 - mean) / std,
    )
    plain = PGD(net, eps=0.1, alpha=0.03, steps=3, start="none")
    net.eval()
    torch.testing.assert_close(inside(z, y) * std + mean, plain(x, y), atol=1e-5, rtol=0)


def test_targeted_lowers_the_loss_of_its_target(net, batch):
    x, y = batch
    net.eval()
    target = (y + 1) % 4
    result = PGD(net, eps=0.3, alpha=0.05, steps=20, targeted=True, seed=0).run(x, target)
    before = F.cross_entropy(net(x), target, reduction="none")
    after = F.cross_entropy(result.logits, target, reduction="none")
    assert (after < before).all()
    assert torch.equal(result.correct, result.logits.argmax(1) != target)


def test_callable_loss(net, batch):
    x, y = batch
    own = PGD(
        net,
        steps=3,
        seed=0,
        loss=lambda z, labels: F.cross_entropy(z, labels, reduction="none"),
    )
    built_in = PGD(net, steps=3, seed=0)
    torch.testing.assert_close(own.run(x, y, draw=0).x_adv, built_in.run(x, y, draw=0).x_adv)
    with pytest.raises(ValueError, match="one value per sample"):
        PGD(net, loss=F.cross_entropy, steps=1)(x, y)


def test_attacks_confident_samples_too(device):
    """The plain cross-entropy gradient points the wrong way above a logit margin of about 17."""
    x, y = linear_batch(device)
    model = RowLinear(40, classes=2).to(device)
    w = model.weight.detach()
    expected = x - 0.3 * (w[y] - w[1 - y]).sign()
    for scale in (1.0, 10.0, 100.0):
        scaled = PGD(
            lambda v, s=scale: s * model(v), eps=0.3, alpha=0.1, steps=10, lo=None, hi=None
        )
        torch.testing.assert_close(scaled(x, y), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype, device):
    x, y = linear_batch(device, dtype=torch.float32)
    model = RowLinear(40, classes=3).to(device, dtype)
    result = PGD(model, steps=3, eps=0.1, alpha=0.05).run(x.to(dtype), y)
    assert result.x_adv.dtype == dtype
    assert result.loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert (result.loss > PGD(model, steps=0, start="none").run(x.to(dtype), y).loss).all()


@pytest.mark.parametrize("size", [0, 1])
def test_empty_and_single_batches(net, batch, size):
    x, y = batch
    result = PGD(net, steps=2, restarts=2).run(x[:size], y[:size])
    assert result.x_adv.shape == x[:size].shape and result.correct.shape == (size,)


def test_outputs_of_all_shapes(net, batch):
    x, y = batch
    net.eval()

    class WithLogits:
        def __init__(self, logits):
            self.logits = logits
            self.scores = logits

    settings = dict(steps=2, seed=0)
    expected = PGD(net, **settings).run(x, y, draw=0).x_adv
    models = [
        (lambda v: (net(v), None), None),
        (lambda v: {"logits": net(v)}, None),
        (lambda v: WithLogits(net(v)), None),
        (lambda v: (None, net(v)), 1),
        (lambda v: {"out": net(v)}, "out"),
        (lambda v: WithLogits(net(v)), "scores"),
        (lambda v: [net(v)], lambda r: r[0]),
    ]
    for model, output in models:
        got = PGD(model, output=output, **settings).run(x, y, draw=0).x_adv
        assert torch.equal(got, expected)


def test_layouts(net, batch):
    x, y = batch
    attack = PGD(net, steps=2, seed=0)
    expected = attack.run(x, y, draw=0).x_adv
    x_adv = attack.run(x.to(memory_format=torch.channels_last), y, draw=0).x_adv
    assert x_adv.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(x_adv, expected)


def test_under_autocast(net, batch):
    x, y = batch
    with torch.autocast(x.device.type, torch.bfloat16):
        result = PGD(net, steps=3).run(x, y)
    assert result.x_adv.dtype == torch.float32 and result.loss.dtype == torch.float32


def test_passes_without_gradients_may_write_into_their_input(net, batch):
    """`x.sub_(mean)` in a model works in passes without gradients; with gradients autograd refuses
    it."""
    x, y = batch
    net.eval()  # an attack on a function cannot set modes

    def shifting(v):
        if v.requires_grad:
            return net(v - 0.5)
        return net(v.sub_(0.5))

    kept = x.clone()
    for attack in (PGD(shifting, loss="kl", steps=2, seed=0), Square(shifting, queries=3, seed=0)):
        expected = copy.copy(attack)
        expected.model = lambda v: net(v - 0.5)
        assert torch.equal(attack.run(x, y, draw=0).x_adv, expected.run(x, y, draw=0).x_adv)
        assert torch.equal(x, kept)


class TestRefuses:
    @pytest.mark.parametrize(
        "settings, message",
        [
            (dict(eps=-0.1), "eps must be a finite number >= 0, got -0.1"),
            (dict(alpha=float("nan")), "alpha must be"),
            (dict(steps=2.5), "steps must be an integer >= 0, got 2.5"),
            (dict(norm="L3"), "norm must be Linf, L2 or L1"),
            (dict(loss="hinge"), "loss must be one of ce, margin"),
            (dict(start="gauss"), "start must be one of keyed"),
            (dict(bn="frozen"), "bn must be one of eval, train"),
            (dict(restarts=0), "restarts must be an integer >= 1"),
            (dict(loss="kl", start="none"), "exactly zero at x"),
            (dict(bn="train", scale="unit"), "rows mix"),
            (dict(best="first"), "best must be one of last, loss, fooled"),
            (dict(eot=0), "eot must be an integer >= 1"),
            (dict(eot=2, scale="unit"), "gradients of one scale"),
            (dict(eps=8), r"eps must be in units of x, whose box \[0.0, 1.0\] is only 1.0 wide"),
            (dict(lo=1.0, hi=0.0), "lo must not be above hi"),
        ],
    )
    def test_settings(self, settings, message):
        with pytest.raises(ValueError, match=message):
            PGD(None, **settings)

    def test_values(self, net, batch):
        x, y = batch
        attack = PGD(net, steps=1, validate=True)
        with pytest.raises(ValueError, match=r"x must lie in the box .* range from 0.* to 2"):
            attack((2 / x.max()) * x, y)
        bad = x.clone()
        bad[0, 0, 0, 0] = float("nan")
        with pytest.raises(ValueError, match="x has NaN"):
            attack(bad, y)
        with pytest.raises(ValueError, match=r"labels 0\.\.3 .* got values from 0 to 9"):
            attack(x, torch.where(y == 3, 9, y))
        with pytest.raises(ValueError, match="eps must be >= 0"):
            PGD(net, eps=torch.full((6,), -1.0, device=x.device), validate=True)(x, y)

    def test_shapes_and_types(self, net, batch):
        x, y = batch
        attack = PGD(net, steps=1)
        with pytest.raises(ValueError, match=r"y must have shape \[6\]"):
            attack(x, y[:5])
        with pytest.raises(TypeError, match="y must be an int64"):
            attack(x, y.float())
        with pytest.raises(TypeError, match="ids must be an int64 tensor, got list"):
            attack(x, y, ids=[0, 1, 2, 3, 4, 5])
        with pytest.raises(TypeError, match="x must be float16"):
            attack((255 * x).to(torch.uint8), y)
        with pytest.raises(ValueError, match="a 1-D eps holds one value per sample"):
            PGD(net, eps=torch.full((5,), 0.1, device=x.device))(x, y)
        with pytest.raises(ValueError, match="no model"):
            PGD()(x, y)

    def test_models(self, batch):
        x, y = batch
        two = RowLinear(75, classes=2).to(x.device)
        with pytest.raises(ValueError, match="carry no gradient"):
            PGD(lambda v: torch.zeros(len(v), 4, device=v.device), steps=1)(x, y)
        with pytest.raises(ValueError, match="must not detach"):
            PGD(lambda v: two(v.detach()), steps=1)(x, y % 2)
        with pytest.raises(ValueError, match=r"logits of shape \[batch, classes\], got \[6\]"):
            PGD(lambda v: v.flatten(1).sum(1), steps=1)(x, y)
        with pytest.raises(TypeError, match="say with output="):
            PGD(lambda v: object(), steps=1)(x, y)
        with pytest.raises(ValueError, match="dlr"):
            PGD(two, loss="dlr", steps=1)(x, y % 2)


class Scripted(nn.Module):
    """A model that classifies sample i correctly at its k-th forward pass if script[i][k] is 1.

    The first element of a sample gives its number, which an eps of 0 preserves.
    """

    def __init__(self, script):
        super().__init__()
        self.script = torch.tensor(script)
        self.at = torch.zeros(len(script), dtype=torch.int64)

    def forward(self, x):
        rows = (x[:, 0] * len(self.script)).round().long().cpu()
        right = self.script[rows, self.at[rows].clamp_max(self.script.shape[1] - 1)]
        self.at[rows] += 1
        right = right.to(x)
        return torch.stack([2 * right - 1, torch.zeros_like(right)], 1) + 0 * x.sum(1, keepdim=True)


SCRIPT = [
    [1, 1, 0, 1, 1, 1],  # correct again after it was fooled
    [1, 1, 1, 1, 1, 1],  # never fooled
    [0, 0, 0, 0, 0, 0],  # fooled at once
    [1, 0, 1, 0, 1, 0],
]
# kappa and steps of the four samples for K = 6, by tau.
FRIENDLY = {
    0: ([2, 6, 0, 1], [2, 6, 0, 1]),
    1: ([5, 6, 0, 2], [6, 6, 1, 3]),
    6: ([5, 6, 0, 3], [6, 6, 6, 6]),
}


@pytest.mark.parametrize("compact", [True, False])
@pytest.mark.parametrize("tau", FRIENDLY)
def test_friendly_release_by_script(tau, compact, device):
    x = (torch.arange(4.0, device=device) / 4)[:, None].repeat(1, 3)
    y = torch.zeros(4, dtype=torch.int64, device=device)
    attack = FriendlyPGD(Scripted(SCRIPT), tau=tau, eps=0.0, steps=6, compact=compact)
    found = attack.perturb(x, y)
    kappa, steps = FRIENDLY[tau]
    assert found.kappa.tolist() == kappa
    assert found.steps.tolist() == steps


@pytest.mark.parametrize("tau", [0, 1, 3])
@pytest.mark.parametrize("omega", [0.0, 0.01])
def test_friendly_compact_equals_masked(tau, omega, batch):
    x, y = batch
    x, y = x.repeat(5, 1, 1, 1) + 0.01 * torch.rand(30, 1, 1, 1, device=x.device), y.repeat(5)
    model = RowLinear(75, classes=4).to(x.device)
    eps = torch.linspace(0.01, 0.1, 30, device=x.device)
    settings = dict(tau=tau, omega=omega, eps=eps, alpha=0.01, steps=8, seed=0)
    masked = FriendlyPGD(model, compact=False, **settings).run(x, y, draw=0)
    compacted = FriendlyPGD(model, compact=True, **settings).run(x, y, draw=0)
    for name in ("x_adv", "kappa", "steps", "queries", "correct"):
        assert torch.equal(getattr(masked, name), getattr(compacted, name)), name
    assert 0 < masked.steps.sum() < 30 * 8


def test_friendly_with_full_patience_is_pgd(net, batch):
    x, y = batch
    settings = dict(eps=0.1, alpha=0.03, steps=5, seed=0)
    friendly = FriendlyPGD(net, tau=5, **settings).run(x, y, draw=0)
    plain = PGD(net, **settings).run(x, y, draw=0)
    assert torch.equal(friendly.x_adv, plain.x_adv)
    assert torch.equal(friendly.kappa, plain.kappa)


def test_friendly_returns_the_first_fooled_iterate(batch):
    x, y = batch
    model = RowLinear(75, classes=4).to(x.device)
    y = model(x).argmax(1)
    result = FriendlyPGD(model, tau=0, eps=0.3, alpha=0.02, steps=30, start="none").run(x, y)
    assert not result.correct.any()
    assert torch.equal(result.steps, result.kappa)
    for i in range(6):  # one step fewer does not fool the model
        before = PGD(model, eps=0.3, alpha=0.02, steps=int(result.steps[i]) - 1, start="none")
        assert before.run(x[i : i + 1], y[i : i + 1]).correct.all()


def test_compaction_shrinks_the_batch(batch):
    x, y = batch
    inner = RowLinear(75, classes=4).to(x.device)
    y = inner(x).argmax(1)
    sizes = []

    def model(v):
        sizes.append(len(v))
        return inner(v)

    FriendlyPGD(model, tau=0, eps=0.3, alpha=0.02, steps=30, compact=True)(x, y)
    assert sizes[0] == 6 and sizes[-1] < 6 and sizes == sorted(sizes, reverse=True)


def test_friendly_refuses_another_result():
    with pytest.raises(ValueError, match="best must be \"last\", got 'loss'"):
        FriendlyPGD(best="loss")


class TestBest:
    def test_highest_loss_of_all_iterates(self, net, batch):
        """The last iterate counts, and judging it takes no step away."""
        x, y = batch
        settings = dict(eps=0.2, alpha=0.15, start="none")  # these steps overshoot
        result = PGD(net, steps=5, best="loss", **settings).run(x, y)
        losses = torch.stack([PGD(net, steps=k, **settings).run(x, y).loss for k in range(6)])
        torch.testing.assert_close(result.loss, losses.amax(0))
        assert (losses.argmax(0) < 5).any(), "no test of best if the last is always the best"
        assert result.queries.tolist() == [7] * 6 and result.steps.tolist() == [5] * 6
        one = PGD(net, steps=1, best="loss", **settings)(x, y)
        assert torch.equal(one, PGD(net, steps=1, **settings)(x, y))

    @pytest.mark.parametrize("compact", [True, False])
    def test_first_fooled_iterate_else_highest_loss(self, batch, compact):
        x, y = batch
        model = RowLinear(75, classes=4).to(x.device)
        y = model(x).argmax(1)
        eps = torch.tensor([0.3, 0.3, 0.3, 1e-5, 1e-5, 0.3], device=x.device)
        settings = dict(eps=eps, alpha=0.02, steps=30, start="none", compact=compact)
        result = PGD(model, best="fooled", **settings).run(x, y)
        friendly = FriendlyPGD(model, tau=0, **settings).run(x, y)
        broken = ~friendly.correct
        assert result.correct.tolist() == [False] * 3 + [True] * 2 + [False]
        assert torch.equal(result.x_adv[broken], friendly.x_adv[broken])
        assert torch.equal(result.steps, friendly.steps)
        highest = PGD(model, best="loss", **settings).run(x, y)
        assert torch.equal(result.x_adv[~broken], highest.x_adv[~broken])

    def test_nan_loss_is_never_the_best(self, batch):
        x, y = batch
        inner = RowLinear(75, classes=4).to(x.device)
        calls = []

        def model(v):
            calls.append(1)
            return inner(v) * (float("nan") if len(calls) > 2 else 1.0)

        x_adv = PGD(model, best="loss", eps=0.1, alpha=0.05, steps=4, start="none")(x, y)
        assert torch.equal(x_adv, PGD(inner, eps=0.1, alpha=0.05, steps=1, start="none")(x, y))


class TestPGDPlus:
    def test_every_iterate_of_every_restart_counts(self, device):
        torch.manual_seed(2)
        rough = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 4)).to(device)
        with torch.no_grad():
            rough[0].weight *= 60
        x = torch.rand(40, 20, device=device)
        y = rough(x).argmax(1)
        settings = dict(eps=0.05, alpha=0.1, seed=0, restarts=2)
        result = PGDPlus(rough, steps=6, **settings).run(x, y, draw=0)
        ends = [PGD(rough, steps=k, **settings).run(x, y, draw=0).correct for k in range(7)]
        assert torch.equal(result.correct, torch.stack(ends).all(0))
        assert 0 < result.correct.sum() < ends[-1].sum(), "nothing to tell the two rules apart"

    def test_defaults(self):
        s = PGDPlus().settings
        assert (s.eps, s.alpha, s.steps, PGDPlus().restarts) == (0.031, 0.01, 40, 5)

    def test_a_sample_leaves_with_all_its_restarts(self, batch):
        x, y = batch
        inner = RowLinear(75, classes=4).to(x.device)
        y = inner(x).argmax(1)
        sizes = []

        def model(v):
            sizes.append(len(v))
            return inner(v)

        result = PGDPlus(model, eps=0.3, steps=30, seed=0, compact=True).run(x, y)
        assert not result.correct.any()
        # the last pass gives the verdict
        assert sizes[0] == 30 and min(sizes) % 5 == 0 and sizes[-1] == 30
        masked = PGDPlus(inner, eps=0.3, steps=30, seed=0, compact=False).run(x, y)
        assert torch.equal(masked.x_adv, result.x_adv)
        assert torch.equal(masked.queries, result.queries)


class Noisy(nn.Module):
    """A model that adds random noise to the logits."""

    def __init__(self, inner, size):
        super().__init__()
        self.inner, self.size = inner, size

    def forward(self, x):
        return self.inner(x + self.size * torch.randn_like(x))


def test_eot_averages_gradients(batch):
    x, y = batch
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Flatten(), nn.Linear(75, 30), nn.Tanh(), nn.Linear(30, 4)).to(x.device)
    clean = PGD(inner, eps=0.1, alpha=0.1, steps=1, start="none")(x, y)
    noisy = Noisy(inner, 0.3)
    settings = dict(eps=0.1, alpha=0.1, steps=1, start="none")
    agreement = [
        (PGD(noisy, eot=n, **settings)(x, y) == clean).float().mean().item() for n in (1, 100)
    ]
    assert agreement[1] > max(agreement[0], 0.9)
    result = PGD(noisy, eot=5, **settings).run(x, y)
    assert result.queries.tolist() == [6] * 6 and result.gradients.tolist() == [5] * 6


def test_a_start_of_the_callers_own_is_taken_as_it_is(net, batch):
    x, y = batch
    begin = x + 0.5  # outside the ball and the box
    none = PGD(net, steps=0, start=lambda x: begin)(x, y)
    assert torch.equal(none, begin) and none.data_ptr() != begin.data_ptr()
    before = begin.clone()
    x_adv = PGD(net, eps=0.1, steps=2, start=lambda x: begin)(x, y)
    assert torch.equal(begin, before)  # steps are taken in place on a copy
    assert float((x_adv - x).abs().max()) <= 0.1 + 1e-6
    with pytest.raises(ValueError, match=r"start must return the shape of x, .* got \[1"):
        PGD(net, start=lambda x: x[:1])(x, y)


def test_attacks_the_module_inside_compiled_and_parallel_wrappers(net):
    from pyadv.passes.borrow import unwrap

    parallel = nn.DataParallel(net)
    compiled = torch.compile(parallel)  # torch.compile compiles at the first call
    plain = torch.compile(net)
    assert unwrap(parallel) is net and unwrap(compiled) is net
    assert unwrap(plain) is plain and unwrap(net) is net


@pytest.mark.parametrize("grad_mode", ["fused", "autograd"])
def test_an_attack_without_steps_checks_the_labels(grad_mode, device):
    net, x = RowLinear(4).to(device), torch.rand(3, 4, device=device)
    attack = PGD(net, steps=0, grad_mode=grad_mode, validate=True)
    with pytest.raises(ValueError, match=r"y must hold labels 0\.\.2 .*got values from 0 to 3"):
        attack.run(x, torch.tensor([0, 3, 1], device=device))
