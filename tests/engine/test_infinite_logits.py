"""Infinite logits: a class at -inf is out of play, and a row with NaN or +inf has no answer."""

from __future__ import annotations

import math

import pytest
import torch
from networks import RowLinear
from torch import nn

import pyadv
from pyadv import attacks
from pyadv.attacks import PGD
from pyadv.engine.attack import Attack
from pyadv.engine.losses import Loss, ranked_targets

KEPT = torch.tensor([1, 2, 4, 5])  # classes in play, out of seven
CLASSES = [
    value
    for value in vars(attacks).values()
    if isinstance(value, type) and issubclass(value, Attack)
]


class Masked(nn.Module):
    """A model with seven classes, three of which are at -inf."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        z = self.model(x)
        full = z.new_full((len(z), 7), -math.inf)
        return full.index_copy(1, KEPT, z)


def problem(n=60, flips=6):
    """Return a linear model of four classes, images, and its predictions with a few wrong
    labels."""
    torch.manual_seed(3)
    model, x = RowLinear(27, classes=4), torch.rand(n, 3, 3, 3)
    with torch.no_grad():
        # so that every class is predicted for some image
        model.weight -= model.weight.mean(1, keepdim=True)
        y = model(x).argmax(1)
    y[:flips] = (y[:flips] + 1) % 4
    return model, x, y


@pytest.mark.parametrize("grad_mode", ["fused", "autograd"])
@pytest.mark.parametrize("loss", ["ce", "margin", "dlr", "kl", "slm"])
@pytest.mark.parametrize("norm", ["Linf", "L2", "L1"])
def test_pgd_attacks_a_masked_model_as_the_model_itself(norm, loss, grad_mode):
    model, x, y = problem()
    eps = {"Linf": 0.03, "L2": 0.1, "L1": 0.4}[norm]
    settings = {"norm": norm, "eps": eps, "alpha": eps / 3, "steps": 5, "seed": 0}
    settings |= {"loss": loss, "grad_mode": grad_mode}
    plain = PGD(model, **settings).run(x, y)
    masked = PGD(Masked(model), **settings).run(x, KEPT[y])
    assert torch.equal(masked.correct, plain.correct)
    assert 0 < plain.robust_accuracy < 0.9 and masked.robust_accuracy == plain.robust_accuracy
    torch.testing.assert_close(masked.x_adv, plain.x_adv)
    torch.testing.assert_close(masked.loss, plain.loss, rtol=1e-4, atol=1e-4)
    assert not masked.non_finite.any()


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_every_attack_judges_a_masked_model_as_the_model_itself(kind):
    model, x, y = problem(24, 3)
    settings = {"queries": 30} if kind is attacks.Square else {"steps": 8}
    if kind is attacks.CW:
        settings |= {"searches": 2}
    if kind is attacks.FGSM:
        settings = {}
    if kind is attacks.Admix:
        settings |= {"images": x}
    settings |= {"eps": 3 if kind is attacks.PGD0 else 0.05}
    plain = kind(model, **settings)
    masked = kind(Masked(model), **settings)
    for attack in (plain, masked):
        attack.seed = 0
    expected, found = plain.run(x, y), masked.run(x, KEPT[y])
    assert torch.equal(found.correct, expected.correct)
    assert not found.correct[:3].any() and found.logits[:, KEPT].isfinite().all()


def test_ranked_targets_never_hold_the_label():
    z = torch.full((4, 6), -math.inf)
    z[:, 1], z[2, 3], z[3, 0] = 2.0, 1.0, math.nan
    y = torch.tensor([1, 4, 3, 5])
    for n in (1, 5, 9):
        targets = ranked_targets(z, y, n).T
        assert targets.shape == (4, min(n, 5)) and not (targets == y[:, None]).any()
        assert all(len(set(row)) == len(row) for row in targets.tolist())
        assert targets[1, 0] == 1 and targets[2, 0] == 1


@pytest.mark.parametrize("attack", ["pgd20", "autoattack"])
def test_evaluate_gives_a_masked_model_its_accuracy(attack):
    model, x, y = problem(40, 4)
    settings = {"eps": 0.02, "attacks": attack, "progress": None}
    plain = pyadv.evaluate(model, x, y, **settings)
    masked = pyadv.evaluate(Masked(model), x, KEPT[y], **settings)
    assert plain.rows[0].correct.sum() == 36
    for ours, theirs in zip(masked.rows, plain.rows, strict=True):
        assert torch.equal(ours.correct, theirs.correct), ours.name


def test_overflow_to_minus_infinity_keeps_the_verdicts():
    """Verdicts do not change if large logits overflow in float16, which puts other classes at
    -inf."""
    model, x, y = problem()

    def overflows(x):
        z = model(x)
        return (1e6 * (z - z.amax(1, keepdim=True)) + 1).half()

    assert overflows(x).isneginf().any()
    plain = PGD(model, eps=0.03, alpha=0.01, steps=5, loss="margin", seed=0).run(x, y)
    half = PGD(overflows, eps=0.03, alpha=0.01, steps=0, start=lambda _: plain.x_adv).run(x, y)
    assert torch.equal(half.correct, plain.correct) and not half.non_finite.any()
    clean = PGD(overflows, steps=0, start="none").run(x, y)
    assert clean.correct.sum() == 54


class Overflow(nn.Module):
    """A model whose logit of class 0 is +inf (or NaN) for inputs with a mean above a limit."""

    def __init__(self, model, limit, value=math.inf):
        super().__init__()
        self.model, self.limit, self.value = model, limit, value

    def forward(self, x):
        z = self.model(x)
        over = (x.flatten(1).mean(1) > self.limit)[:, None] & (torch.arange(z.shape[1]) == 0)
        return torch.where(over, self.value, z)


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_clean_logits_without_an_answer_are_an_error(value):
    model, x, y = problem()
    limit = x.flatten(1).mean(1).sort().values[-6]  # five samples exceed it
    broken = Overflow(model, limit, value)
    with pytest.raises(ValueError, match="no NaN, no .inf.* but 5 of 60 samples"):
        PGD(broken, start="none").run(x, y)
    with pytest.raises(ValueError, match="no NaN, no .inf.* but 5 of 60 samples"):
        pyadv.evaluate(broken, x, y, eps=0.01, progress=None)
    result = PGD(broken, eps=0.0, steps=1, start="none", validate=False).run(x, y)
    assert result.non_finite.sum() == 5 and not result.correct[result.non_finite].any()


@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("grad_mode", ["fused", "autograd"])
@pytest.mark.parametrize("targeted", [False, True])
def test_adversarial_logits_without_an_answer_are_counted(value, grad_mode, targeted):
    model, x, y = problem()
    limit = x.flatten(1).mean(1).max() + 1e-6
    broken = Overflow(model, limit, value)
    settings = {"grad_mode": grad_mode, "targeted": targeted, "eps": 1.0, "steps": 0}
    above = x.clone()
    above[::4] = 1.0
    result = PGD(broken, start=lambda _: above, **settings).run(x, y)
    expected = torch.zeros(len(x), dtype=torch.bool)
    expected[::4] = True
    assert torch.equal(result.non_finite, expected)
    assert result.loss[expected].isnan().all() and result.loss[~expected].isfinite().all()
    right = model(x).argmax(1) == y
    assert torch.equal(result.correct, ~(right & ~expected) if targeted else right & ~expected)
    assert result.robust_accuracy == result.correct.float().mean().item()


def test_non_finite_survives_restarts():
    model, x, y = problem()
    broken = Overflow(model, x.flatten(1).mean(1).max() + 1e-6)
    result = PGD(broken, eps=1.0, alpha=0.5, steps=3, restarts=2, seed=0, validate=False).run(x, y)
    assert torch.equal(result.non_finite, result.logits.isposinf().any(1))


@pytest.mark.parametrize("loss", ["ce", "margin", "dlr", "kl", "slm"])
@pytest.mark.parametrize("targeted", [False, True])
def test_autograd_follows_the_rules_of_the_op(loss, targeted):
    if loss == "kl" and targeted:
        pytest.skip("kl has no target")
    z = torch.randn(7, 5)
    y = torch.full((7,), 2)
    z[1, 0] = -math.inf
    z[2, 2] = -math.inf  # the label is out of play
    z[3], z[3, 2] = -math.inf, 0.5  # all classes but the label are out of play
    z[4, 1], z[5, 1], z[6] = math.nan, math.inf, -math.inf
    natural = torch.randn(7, 5)
    natural[1, 0] = natural[3, [0, 1, 3, 4]] = -math.inf
    reference_logits = natural if loss == "kl" else None
    results = [
        Loss(loss, targeted, mode, "exact").at(z, y, reference_logits)
        for mode in ("fused", "autograd")
    ]
    for fused, plain in zip(*results, strict=True):
        torch.testing.assert_close(fused, plain, equal_nan=True, rtol=1e-4, atol=1e-5)


def test_a_callable_loss_gets_no_gradient_where_the_logits_have_no_answer():
    z = torch.randn(3, 5)
    z[1, 0], z[2, 3] = math.inf, -math.inf
    y = torch.tensor([1, 1, 1])
    loss = Loss(lambda z, y: z.square().nan_to_num(0, 0, 0).sum(1), False, "fused", "unit")
    rows, grad, still = loss.at(z, y, None)
    assert rows.isnan().tolist() == [False, True, False]
    assert grad[1].count_nonzero() == 0 and not still[1]
    assert grad[0].count_nonzero() == 5
