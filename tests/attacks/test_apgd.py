"""APGD: known optima, the rule of the step size, targets, results that do not depend on the batch.

`test_apgd_parity` holds it against the authors' code."""

from __future__ import annotations

import pytest
import torch
from networks import ConvNet, Recorded, RowLinear
from torch import nn

from pyadv.attacks import APGD, PGD, TargetedAPGD, apgd, targeted_apgd
from pyadv.engine.rules import HalvingRule
from pyadv.engine.state import Best

DUAL = {"Linf": 1, "L2": 2, "L1": torch.inf}
P = {"Linf": torch.inf, "L2": 2, "L1": 1}
EPS = {"Linf": 0.1, "L2": 0.8, "L1": 3.0}


@pytest.fixture
def net(device):
    torch.manual_seed(0)
    return ConvNet(classes=5).to(device)


@pytest.fixture
def batch(device):
    x = 0.2 + 0.6 * torch.rand(6, 3, 5, 5, generator=torch.Generator().manual_seed(3))
    return x.to(device), (torch.arange(6) % 4).to(device)


@pytest.mark.parametrize("norm", DUAL)
@pytest.mark.parametrize("loss", ["ce", "margin", "slm"])
def test_linear_optimum_without_a_box(norm, loss, device):
    """On two linear classes the worst point lowers the margin by eps ||w||_q, q dual to the
    norm."""
    x = torch.rand(5, 40, device=device)
    y = torch.tensor([0, 1, 0, 1, 1], device=device)
    model = RowLinear(40, classes=2).to(device)
    w = model.weight.detach()[y] - model.weight.detach()[1 - y]
    attack = APGD(model, norm=norm, eps=0.3, loss=loss, best="loss", lo=None, hi=None)
    most = 0.3 * torch.linalg.vector_norm(w, DUAL[norm], dim=1)
    assert_reaches((w * (x - attack(x, y))).sum(1), most, norm)


def assert_reaches(gain, most, norm):
    """In the box, L2-APGD projects onto the ball and then the box, which is not the projection onto
    both."""
    least = {"Linf": 0.9999, "L2": 0.99, "L1": 0.98}[norm]
    assert (gain <= most * (1 + 1e-5)).all() and (gain >= least * most).all(), gain / most


@pytest.mark.parametrize("n", [12, 20, 30, 300])
@pytest.mark.parametrize("eps", [0.3, 2.0, 6.0])
@pytest.mark.parametrize("bounded", [True, False])
def test_few_coordinates_in_l1(n, eps, bounded, device):
    """Coordinates that the box holds take nothing from the share that moves, and one coordinate may
    be enough; as the authors count, up to a fifth and more of the gain is missing."""
    x = torch.rand(20, n, device=device, dtype=torch.float64)
    y = torch.arange(20, device=device) % 2
    model = RowLinear(n, classes=2, seed=n, dtype=torch.float64).to(device)
    w = model.weight.detach()[y] - model.weight.detach()[1 - y]
    bounds = dict(lo=0.0, hi=1.0) if bounded else dict(lo=None, hi=None)
    room = torch.where(w > 0, x, 1 - x) if bounded else torch.full_like(x, torch.inf)
    best_first = room.gather(1, w.abs().argsort(1, descending=True)).clamp(max=eps)
    left = (eps - (best_first.cumsum(1) - best_first)).clamp_min(0)
    sizes = w.abs().sort(1, descending=True).values
    most = (sizes * torch.minimum(best_first, left)).sum(1)

    def share(held):
        attack = APGD(model, norm="L1", eps=eps, best="loss", seed=0, count_held=held, **bounds)
        return (w * (x - attack(x, y))).sum(1) / most

    ours, theirs = share(False), share(True)
    assert (ours >= 0.9).all() and ours.median() >= 0.98 and ours.mean() >= theirs.mean() - 1e-3


@pytest.mark.parametrize("norm", DUAL)
def test_linear_optimum_in_the_box(norm, device):
    x = torch.rand(5, 40, device=device, dtype=torch.float64)
    y = torch.tensor([0, 1, 0, 1, 1], device=device)
    model = RowLinear(40, classes=2, dtype=torch.float64).to(device)
    w = model.weight.detach()[y] - model.weight.detach()[1 - y]
    eps = {"Linf": 0.3, "L2": 1.0, "L1": 2.0}[norm]
    gain = (w * (x - APGD(model, norm=norm, eps=eps, best="loss")(x, y))).sum(1)
    room = torch.where(w > 0, x, 1 - x)  # toward the other class
    if norm == "Linf":
        most = (w.abs() * room.clamp_max(eps)).sum(1)
    elif norm == "L1":  # the coordinates of largest |w| first, each to the box
        order = w.abs().argsort(1, descending=True)
        best_first = room.gather(1, order)
        left = (eps - (best_first.cumsum(1) - best_first)).clamp_min(0)
        most = (w.abs().gather(1, order) * torch.minimum(best_first, left)).sum(1)
    else:  # min(t |w|, room) with the t that spends eps
        low, high = torch.zeros(5, 1).to(w), torch.full((5, 1), 100.0).to(w)
        for _ in range(100):
            t = (low + high) / 2
            inside = torch.minimum(t * w.abs(), room).norm(dim=1, keepdim=True) < eps
            low, high = torch.where(inside, t, low), torch.where(inside, high, t)
        most = (w.abs() * torch.minimum(low * w.abs(), room)).sum(1)
    assert_reaches(gain, most, norm)


@pytest.mark.parametrize("norm", EPS)
@pytest.mark.parametrize("loss", ["ce", "dlr"])
@pytest.mark.parametrize("best", ["fooled", "loss"])
def test_stays_in_ball_and_box(norm, loss, best, net, batch):
    x, y = batch
    x = x.clone()
    x[0, :, 0], x[1, :, 0] = 0.0, 1.0
    result = APGD(net, norm=norm, eps=EPS[norm], loss=loss, steps=20, best=best).run(x, y)
    assert result.x_adv.min() >= 0 and result.x_adv.max() <= 1
    distance = torch.linalg.vector_norm((result.x_adv - x).flatten(1).double(), P[norm], dim=1)
    assert (distance <= EPS[norm] * (1 + 1e-5)).all()
    assert torch.equal(result.correct, result.logits.argmax(1) == y)


@pytest.mark.parametrize("norm", EPS)
def test_beats_pgd_with_as_many_steps(norm, net, batch):
    x, y = batch
    eps = EPS[norm]
    settings = dict(norm=norm, eps=eps, steps=30, seed=0)
    ours = APGD(net, best="loss", multi_eps=False, **settings).run(x, y).loss
    theirs = PGD(net, alpha=eps / 4, **settings).run(x, y).loss
    assert ours.mean() > theirs.mean() - 1e-4


@pytest.mark.parametrize("norm", EPS)
def test_start_is_on_the_sphere(norm, batch):
    x, y = batch
    model = RowLinear(75, classes=5).to(x.device)
    for kind in ("keyed", "generator"):
        first = Recorded(model)
        attack = APGD(first, norm=norm, eps=EPS[norm], steps=1, start=kind, lo=None, hi=None)
        attack(x, y)
        radius = 3 * EPS[norm] if norm == "L1" else EPS[norm]
        distance = torch.linalg.vector_norm((first.inputs[0] - x).flatten(1), P[norm], dim=1)
        torch.testing.assert_close(distance, torch.full_like(distance, radius))


@pytest.mark.parametrize("attack", [APGD, TargetedAPGD])
@pytest.mark.parametrize("norm", EPS)
def test_does_not_depend_on_the_batch(attack, norm, batch):
    x, y = batch
    model = RowLinear(75, classes=5).to(x.device)
    y = model(x).argmax(1)
    a = attack(model, norm=norm, eps=EPS[norm] / 3, steps=12, restarts=2, seed=7)
    whole = a.run(x, y, draw=3)
    alone = torch.cat([a.run(x[i : i + 1], y[i : i + 1], draw=3).x_adv for i in range(6)])
    order = torch.tensor([4, 2, 0, 5, 1, 3], device=x.device)
    assert torch.equal(whole.x_adv, alone)
    assert torch.equal(whole.x_adv[order], a.run(x[order], y[order], draw=3).x_adv)
    assert 0 < whole.correct.sum() < 6


@pytest.mark.parametrize("attack", [APGD, TargetedAPGD])
@pytest.mark.parametrize("norm", EPS)
def test_compact_equals_masked(attack, norm, batch):
    """All that the rules remember follows its sample."""
    x, y = batch
    model = RowLinear(75, classes=5).to(x.device)
    y = model(x).argmax(1)
    eps = EPS[norm] * torch.linspace(0.05, 1, 6, device=x.device)
    settings = dict(norm=norm, eps=eps, steps=15, restarts=2, seed=0)
    masked = attack(model, compact=False, **settings).run(x, y)
    compacted = attack(model, compact=True, **settings).run(x, y)
    for name in ("x_adv", "kappa", "steps", "queries", "correct"):
        assert torch.equal(getattr(masked, name), getattr(compacted, name)), name
    assert 0 < masked.correct.sum() < 6


def test_fooled_samples_leave(batch):
    x, y = batch
    model = RowLinear(75, classes=5).to(x.device)
    y = model(x).argmax(1)
    recorded = Recorded(model)
    result = APGD(recorded, eps=0.3, compact=True).run(x, y)
    assert not result.correct.any()
    assert len(recorded.inputs) < 20
    at_once = APGD(model, eps=0.3).run(x, (y + 1) % 5)
    assert at_once.queries.tolist() == [2] * 6 and at_once.steps.tolist() == [0] * 6


def test_counts_its_passes(net, batch):
    x, y = batch
    net.eval()
    y = net(x).argmax(1)
    recorded = Recorded(net)
    result = APGD(recorded, eps=1e-4, steps=10).run(x, y)
    assert len(recorded.inputs) == 12 and result.queries.tolist() == [12] * 6
    assert result.steps.tolist() == [10] * 6 and result.correct.all()
    l1 = APGD(net, norm="L1", eps=1e-3, steps=10).run(x, y)
    assert l1.steps.tolist() == [10] * 6 and l1.queries.tolist() == [14] * 6
    targets = TargetedAPGD(net, eps=1e-4, steps=10, restarts=2).run(x, y)
    assert targets.queries.tolist() == [1 + 4 * 2 * 12] * 6
    assert targets.gradients.tolist() == [4 * 2 * 10] * 6


class TestHalvingRule:
    """The rule alone, on a loss that is told."""

    def halved_after(self, losses, zero_first_check=False, rho=0.75, steps=100):
        """For each told loss history of one sample: the factors of its step size over time."""

        class Said(nn.Module):
            k = 0

            def forward(self, x):
                value = losses[min(self.k, len(losses) - 1)]
                self.k += 1
                return x.sum(1, keepdim=True) * torch.tensor([[0.0, 0.0]]) + torch.tensor(
                    [[-value, 0.0]]
                )

        factors = []

        class Spy(HalvingRule):
            def step(self, state, kind, grad, active):
                factors.append(float(self.factor[0]))
                super().step(state, kind, grad, active)

        attack = APGD(Said(), eps=0.1, steps=steps, loss="margin", best="loss", rho=rho)
        object.__setattr__(attack.settings, "rule", Spy(rho, zero_first_check))
        attack(torch.full((1, 4), 0.5), torch.tensor([0]))
        return factors

    def test_steady_progress_keeps_the_step(self):
        assert set(self.halved_after([0.01 * k for k in range(101)])) == {1.0}

    def test_checkpoints_of_a_hundred_steps(self):
        factors = self.halved_after([0.0] * 101)
        halvings = [k for k in range(1, 100) if factors[k] < factors[k - 1]]
        # 22, 41, 57, 70, 80, 87, 93, 99, as in the paper; never rising means halved at each.
        assert halvings == [22, 41, 57, 70, 80, 87, 93, 99]
        assert factors[-1] == 2.0**-8

    def test_no_new_best_halves_once_and_then_not_twice_in_a_row(self):
        """17 rises of 22 are enough, but without a new best since a check that did not halve, the
        step is halved."""
        saw = [0.0, 50.0] + [0.1 * k for k in range(1, 101)]
        factors = self.halved_after(saw)
        assert factors[22] == 1.0  # no reason at the first check
        assert factors[41] == 0.5  # the best is still 50
        assert factors[57] == 0.5  # halved at the last check, and rising
        assert factors[70] == 0.25

    def test_the_first_comparison(self):
        """16 rises of 22 with rho = 16.5 / 22 say halve. The authors' code counts one more where
        the first loss is above 0 and below that of the start."""
        falls, rises = [2.0, 1.5, 1.4, 1.3, 1.2, 1.1, 1.0], [1.0 + 0.1 * k for k in range(1, 101)]
        history = falls + rises  # 6 falls, then rises: 16 of the first 22
        assert self.halved_after(history, rho=16.5 / 22)[22] == 0.5
        assert self.halved_after(history, rho=16.5 / 22, zero_first_check=True)[22] == 1.0


def test_best_so_far_ignores_nan():
    best = Best.first(torch.zeros(3, 1), torch.tensor([float("nan"), 1.0, 1.0]), torch.zeros(3, 1))
    best.update(torch.ones(3, 1), torch.tensor([0.0, float("nan"), 2.0]), torch.ones(3, 1))
    assert best.x_adv[:, 0].tolist() == [1.0, 0.0, 1.0] == best.grad[:, 0].tolist()
    assert best.loss.tolist() == [0.0, 1.0, 2.0]


class TestTargets:
    def test_ranks_of_the_clean_prediction(self, batch):
        x, y = batch
        model = RowLinear(75, classes=6).to(x.device)
        y = model(x).argmax(1)
        attack = TargetedAPGD(model, targets=3, restarts=2)
        plan = attack._plan(attack._task(x, y, None, None, None))
        order = model(x).argsort(1, descending=True)
        expected = order[:, 1:4].T.repeat_interleave(2, 0).flatten()
        assert torch.equal(plan.targets, expected) and plan.attempts == 6

    def test_label_is_never_a_target(self, batch):
        x, _ = batch
        model = RowLinear(75, classes=4).to(x.device)
        y = model(x).argsort(1)[:, 1]  # misclassified
        attack = TargetedAPGD(model)
        plan = attack._plan(attack._task(x, y, None, None, None))
        targets = plan.targets.view(3, 6)
        assert (targets != y).all()
        assert torch.equal(targets.sort(0).values.sum(0) + y, torch.full_like(y, 6))

    @pytest.mark.parametrize("classes", [2, 3, 5])
    def test_few_classes(self, classes, batch):
        x, _ = batch
        model = RowLinear(75, classes=classes).to(x.device)
        y = model(x).argmax(1)
        assert not TargetedAPGD(model, eps=0.3, steps=10).run(x, y).correct.any()
        if classes == 2:
            w = model.weight.detach()
            margins = (w[y] - w[1 - y]).mul(x.flatten(1)).sum(1)
            worst = margins / (w[0] - w[1]).abs().sum()  # the radius that breaks, without a box
            for factor, robust in ((0.98, True), (1.02, False)):
                eps = factor * worst
                result = TargetedAPGD(model, eps=eps, lo=None, hi=None).run(x, y)
                assert (result.correct == robust).all()

    def test_one_class(self, batch):
        x, y = batch
        with pytest.raises(ValueError, match="two classes or more, got 1"):
            TargetedAPGD(RowLinear(75, classes=1).to(x.device))(x, 0 * y)

    def test_reaches_what_the_untargeted_misses(self, device):
        """The runner-up at x has a gradient that vanishes further on; the third class does not."""

        def model(v):
            s = v[:, :1]
            return torch.cat([1 - 0 * s, 0.5 + (0.3 * (10 * s).sin()), 2 * s - 0.9, -9 + 0 * s], 1)

        x = torch.tensor([[0.15]], device=device)
        y = torch.zeros(1, dtype=torch.int64, device=device)
        assert model(x).argsort(1, descending=True)[0].tolist() == [0, 1, 2, 3]
        result = TargetedAPGD(model, eps=0.9, steps=40, start="none").run(x, y)
        assert not result.correct.any()


def test_targeted_label(net, batch):
    """With targeted=True, y is where to go."""
    x, y = batch
    net.eval()
    target = net(x).argmin(1)
    result = APGD(net, eps=0.5, targeted=True, steps=50).run(x, target)
    before = PGD(net, steps=0, targeted=True, start="none").run(x, target)
    assert (result.loss > before.loss).all()
    assert torch.equal(result.correct, result.logits.argmax(1) != target)


def test_attacks_confident_samples_too(device):
    x = torch.rand(5, 40, device=device)
    y = torch.tensor([0, 1, 0, 1, 1], device=device)
    model = RowLinear(40, classes=2).to(device)
    w = model.weight.detach()
    expected = x - 0.3 * (w[y] - w[1 - y]).sign()
    for scale in (1.0, 10.0, 100.0):
        settings = dict(eps=0.3, steps=30, best="loss", loss="slm", lo=None, hi=None)
        scaled = APGD(lambda v, s=scale: s * model(v), **settings)
        torch.testing.assert_close(scaled(x, y), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("norm", EPS)
def test_dtypes_and_vectors(norm, dtype, device):
    x = torch.rand(4, 30, device=device).to(dtype)
    model = RowLinear(30, classes=5).to(device, dtype)
    y = model(x).argmax(1)
    result = APGD(model, norm=norm, eps=0.05, steps=10, best="loss").run(x, y)
    assert result.x_adv.dtype == dtype
    assert (result.loss > PGD(model, steps=0, start="none").run(x, y).loss).all()


@pytest.mark.parametrize("attack", [APGD, TargetedAPGD])
@pytest.mark.parametrize("size", [0, 1])
@pytest.mark.parametrize("norm", EPS)
def test_empty_and_single_batches(attack, size, norm, net, batch):
    x, y = batch
    result = attack(net, norm=norm, eps=EPS[norm], steps=6, restarts=2).run(x[:size], y[:size])
    assert result.x_adv.shape == x[:size].shape and result.correct.shape == (size,)


@pytest.mark.parametrize("steps", [0, 1, 2, 3])
@pytest.mark.parametrize("norm", EPS)
def test_few_steps(norm, steps, net, batch):
    x, y = batch
    attack = APGD(net, norm=norm, eps=EPS[norm], steps=steps, best="loss")
    assert attack.run(x, y).steps.tolist() == [steps] * 6


@pytest.mark.parametrize("norm", EPS)
def test_box_of_another_size(norm, net, batch):
    """Inputs in [-1, 1] with twice the radius are inputs in [0, 1]."""
    x, y = batch
    net.eval()
    settings = dict(norm=norm, steps=15, best="loss", start="none")
    plain = APGD(net, eps=EPS[norm], **settings).run(x, y)
    wide = APGD(lambda v: net((v + 1) / 2), eps=2 * EPS[norm], lo=-1.0, hi=1.0, **settings)
    torch.testing.assert_close(wide.run(2 * x - 1, y).loss, plain.loss, atol=2e-3, rtol=0)


def test_radius_per_channel(net, batch):
    """Normalised inputs: eps, lo and hi per channel; the step is halved per sample."""
    x, y = batch
    net.eval()
    mean = torch.tensor([0.4, 0.5, 0.6], device=x.device).view(1, 3, 1, 1)
    std = torch.tensor([0.2, 0.3, 0.25], device=x.device).view(1, 3, 1, 1)
    settings = dict(steps=30, best="loss", start="none")
    box = dict(eps=0.1 / std, lo=(0 - mean) / std, hi=(1 - mean) / std)
    inside = APGD(lambda v: net(v * std + mean), **box, **settings).run((x - mean) / std, y)
    plain = APGD(net, eps=0.1, **settings).run(x, y)
    torch.testing.assert_close(inside.loss, plain.loss, atol=1e-3, rtol=0)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("attack", [APGD, TargetedAPGD])
def test_leaves_nothing_behind(attack, context, net, batch):
    x, y = batch
    net.train()
    net.body[1].eval()
    state = {k: v.clone() for k, v in net.state_dict().items()}
    modes, generator = [m.training for m in net.modules()], torch.get_rng_state()
    a = attack(net, eps=0.05, steps=8, seed=0)
    with context():
        got = a.run(x.clone(), y.clone(), draw=0)
    assert torch.equal(got.x_adv, a.run(x, y, draw=0).x_adv)
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    assert [m.training for m in net.modules()] == modes
    assert all(p.grad is None for p in net.parameters())
    assert torch.equal(torch.get_rng_state(), generator)


def test_functions(net, batch):
    x, y = batch
    assert torch.equal(apgd(net, x, y, steps=5, seed=0), APGD(net, steps=5, seed=0)(x, y))
    other = targeted_apgd(net, x, y, steps=5, seed=0)
    assert torch.equal(other, TargetedAPGD(net, steps=5, seed=0)(x, y))


def test_gradients_that_share_memory(batch):
    """The gradient of a sum is one number seen everywhere; jumping back must not write to it."""
    x, _ = batch

    def model(v):
        total = v.flatten(1).sum(1)
        return torch.stack([total, 75 - total, 0 * total], 1)

    y = model(x).argmax(1)
    result = APGD(model, eps=0.01, steps=30, best="loss", loss="margin").run(x, y)
    toward = torch.where(y == 0, -0.01, 0.01)[:, None, None, None]
    torch.testing.assert_close(result.x_adv, (x + toward).clamp(0, 1), atol=1e-6, rtol=0)


class TestRefuses:
    @pytest.mark.parametrize(
        "settings, error, message",
        [
            (dict(eps=-0.1), ValueError, "eps must be a finite number >= 0"),
            (dict(eps="8/255"), TypeError, "eps must be a float or a Tensor"),
            (dict(rho=-1.0), ValueError, "rho must be"),
            (dict(eot=0), ValueError, "eot must be an integer >= 1"),
            (dict(best="last"), ValueError, "best must be one of fooled, loss"),
            (dict(start="uniform"), ValueError, "start must be one of keyed, generator, none"),
            (dict(loss="kl"), ValueError, "belongs to PGD"),
            (dict(loss="hinge"), ValueError, "loss must be one of ce"),
            (dict(multi_eps=True), ValueError, "L1 attack, got norm=Linf"),
        ],
    )
    def test_settings(self, settings, error, message):
        with pytest.raises(error, match=message):
            APGD(**settings)

    def test_targeted_settings(self):
        for name, value in (("loss", "ce"), ("targeted", True)):
            with pytest.raises(TypeError, match=f"no argument {name}"):
                TargetedAPGD(**{name: value})
        with pytest.raises(ValueError, match="targets must be an integer >= 1"):
            TargetedAPGD(targets=0)

    def test_dlr_of_two_classes(self, batch):
        x, y = batch
        with pytest.raises(ValueError, match="dlr"):
            APGD(RowLinear(75, classes=2).to(x.device), loss="dlr")(x, y % 2)

    def test_labels(self, batch):
        x, y = batch
        model = RowLinear(75, classes=5).to(x.device)
        for attack in (APGD(model, validate=True), TargetedAPGD(model, validate=True)):
            with pytest.raises(ValueError, match=r"labels 0\.\.4"):
                attack(x, y + 9)
