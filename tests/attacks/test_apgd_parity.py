"""APGD against the authors' code, iterate for iterate, in float64 from the same start points."""

from __future__ import annotations

import math

import pytest
import torch
from networks import Recorded

from pyadv.attacks import APGD, TargetedAPGD

pytestmark = [pytest.mark.peers, pytest.mark.usefixtures("float64")]
official = pytest.importorskip("pyautoattack.autopgd_base", reason="pyautoattack is not installed")

EPS = {"Linf": 0.125, "L2": 0.5, "L1": 2.5}


def iterates(run, net):
    model = Recorded(net)
    run(model)
    return torch.stack(model.inputs)


def start_point(x, norm, eps):
    attack = official.APGDAttack(None, norm=norm, eps=eps, device="cpu")
    attack.init_hyperparam(x)
    t = 2 * torch.rand_like(x) - 1 if norm == "Linf" else torch.randn_like(x)
    if norm == "L1":
        return (x + t + official.L1_projection(x, t, eps)).clamp(0, 1)
    return (x + eps * attack.normalize(t)).clamp(0, 1)


SETTINGS = dict(grad_mode="autograd", best="loss", zero_first_check=True, count_held=True)


@pytest.mark.parametrize("norm", EPS)
@pytest.mark.parametrize("loss", ["ce", "dlr"])
@pytest.mark.parametrize("steps, eot", [(30, 1), (100, 1), (7, 2)])
def test_iterates(norm, loss, steps, eot, problem):
    net, x, y = problem
    eps = EPS[norm]
    begin = start_point(x, norm, eps)

    def theirs(model):
        attack = official.APGDAttack(
            model, n_iter=steps, norm=norm, eps=eps, loss=loss, eot_iter=eot, device="cpu"
        )
        attack.init_hyperparam(x)
        theirs.best, *_ = attack.attack_single_run(x, y, x_init=begin)

    def ours(model):
        attack = APGD(
            model,
            norm=norm,
            eps=eps,
            steps=steps,
            loss=loss,
            eot=eot,
            start=lambda x: begin,
            multi_eps=False,
            **SETTINGS,
        )
        ours.best = attack(x, y)

    expected = iterates(theirs, net)
    got = iterates(ours, net)
    assert expected.shape == got.shape == ((steps + 1) * eot, *x.shape)
    torch.testing.assert_close(got, expected, atol=1e-9, rtol=0)
    torch.testing.assert_close(ours.best, theirs.best, atol=1e-9, rtol=0)


@pytest.mark.parametrize("norm", EPS)
def test_iterates_towards_a_target(norm, problem):
    net, x, y = problem
    eps, steps = EPS[norm], 30
    begin = start_point(x, norm, eps)

    def theirs(model):
        attack = official.APGDAttack_targeted(model, n_iter=steps, norm=norm, eps=eps, device="cpu")
        attack.init_hyperparam(x)
        attack.y_target = model(x).sort(dim=1)[1][:, -2]
        attack.attack_single_run(x, y, x_init=begin)

    def ours(model):
        settings = dict(SETTINGS, norm=norm, eps=eps, steps=steps, multi_eps=False)
        TargetedAPGD(model, targets=1, start=lambda x: begin, **settings)(x, y)

    # In L2 they add 1e-12 to the norm of a gradient, which 30 steps amplify.
    atol = 1e-6 if norm == "L2" else 1e-9
    torch.testing.assert_close(iterates(ours, net), iterates(theirs, net), atol=atol, rtol=0)


@pytest.mark.parametrize("steps", [10, 33])
def test_iterates_of_the_radius_schedule(steps, problem, monkeypatch):
    """With the start drawn by each from torch's generator. Their projection leaves rounding errors
    where nothing should change, and counts them as changed coordinates; not here."""
    monkeypatch.setattr(official, "L0_norm", lambda d: (d.abs() > 1e-12).flatten(1).sum(1))
    net, x, y = problem
    early = math.ceil(0.3 * steps)

    def theirs(model):
        attack = official.APGDAttack(model, n_iter=steps, norm="L1", eps=2.5, device="cpu")
        attack.init_hyperparam(x)
        torch.manual_seed(7)
        attack.decr_eps_pgd(x, y, [7.5, 5.0, 2.5], [early, early, steps - 2 * early])

    def ours(model):
        torch.manual_seed(7)
        APGD(model, norm="L1", eps=2.5, steps=steps, start="generator", **SETTINGS)(x, y)

    torch.testing.assert_close(iterates(ours, net), iterates(theirs, net), atol=1e-9, rtol=0)


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("loss", ["ce", "dlr"])
def test_verdicts_from_the_same_seed(norm, loss, problem):
    """The default of ours leaves at the first fooled iterate; theirs goes on to the end."""
    net, _, _ = problem
    x = torch.rand(40, 2, 6, 6)
    y = net(x).argmax(1)
    eps = EPS[norm]
    theirs = official.APGDAttack(
        net, n_iter=20, norm=norm, eps=eps, seed=3, loss=loss, device="cpu"
    )
    broken = net(theirs.perturb(x, y)).argmax(1) != y
    torch.manual_seed(3)
    settings = dict(grad_mode="autograd", zero_first_check=True, start="generator")
    ours = APGD(net, norm=norm, eps=eps, steps=20, loss=loss, **settings).run(x, y)
    assert torch.equal(~ours.correct, broken)
    assert 0 < broken.sum() < 40
