"""Every exported attack handles awkward models and inputs."""

from __future__ import annotations

import inspect

import pytest
import torch
from networks import ConvNet, RowLinear
from torch import nn

from pyadv import attacks
from pyadv.engine.attack import Attack

CLASSES = [
    value
    for value in vars(attacks).values()
    if isinstance(value, type) and issubclass(value, Attack)
]
every = pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)


def parameters(kind):
    """Return the names of the settings of this kind of attack."""
    names = set()
    for owner in (c for c in kind.__mro__ if "__init__" in vars(c)):
        own = inspect.signature(owner.__init__).parameters.values()
        names |= {p.name for p in own}
        # no arguments are passed to the base class
        if all(p.kind is not p.VAR_KEYWORD for p in own):
            break
    return names - ({"steps"} if kind is attacks.FGSM else set())


def make(kind, model, **settings):
    """Return a short attack of this kind, without the settings that it does not have."""
    short = {"steps": 3, "queries": 6, "eps": 0.1, "seed": 0}
    search = {"searches": 2, "lr": 0.3, "c": 10.0} if kind is attacks.CW else {}
    mixed = {"images": images()[0]} if kind is attacks.Admix else {}
    settings = {**short, **search, **mixed, **settings}
    if kind is attacks.PGD0 and settings["eps"] > 0:
        settings["eps"] = 5  # entries
    return kind(model, **{k: v for k, v in settings.items() if k in parameters(kind)})


def images(n=5, lo=0.0, hi=1.0, dtype=torch.float32):
    x = torch.rand(n, 3, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return (lo + (hi - lo) * x).to(dtype), torch.arange(n) % 3


def linear(classes=3, dtype=torch.float32):
    return RowLinear(48, classes, dtype=dtype)


@every
def test_a_sample_does_not_depend_on_its_batch(kind):
    (x, y), attack = images(), make(kind, linear())
    whole = attack.perturb(x, y, draw=0).x_adv
    assert not torch.equal(whole, x)
    for i in range(len(x)):
        alone = attack.perturb(x[i : i + 1], y[i : i + 1], draw=0).x_adv[0]
        assert torch.equal(alone, whole[i])


@every
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(kind, dtype):
    x, y = images(dtype=dtype)
    result = make(kind, linear(dtype=dtype)).run(x, y)
    assert result.x_adv.dtype == dtype and result.x_adv.isfinite().all()
    assert result.x_adv.min() >= 0 and result.x_adv.max() <= 1


@every
@pytest.mark.parametrize("classes", [1, 2, 3])
def test_few_classes(kind, classes):
    x, _ = images()
    y = torch.arange(5) % classes
    attack = make(kind, linear(classes))
    if classes > 1:
        assert attack(x, y).isfinite().all()
        return
    try:
        x_adv = attack(x, y)
    except ValueError as refusal:
        assert "class" in str(refusal)
    else:  # with one class no point fools the model
        assert (x_adv - x).abs().max() <= 0.1 + 1e-6


@every
@pytest.mark.parametrize("shape", [(48,), (2, 3, 2, 2, 2)])
def test_inputs_that_are_no_images(kind, shape):
    x, y = images()
    pictures, x = x, x.reshape(5, *shape)
    mixed = {"images": x} if kind is attacks.Admix else {}
    attack = make(kind, linear(), **mixed)
    if kind in (attacks.Square, attacks.DIFGSM, attacks.TIFGSM):
        with pytest.raises(ValueError, match=r"needs images \(B, C, H, W\)"):
            attack(x, y)
    else:
        assert torch.equal(attack(x, y), make(kind, linear())(pictures, y).view_as(x))


@every
def test_other_boxes(kind):
    x, y = images(lo=-2.0, hi=3.0)
    x_adv = make(kind, linear(), lo=-2.0, hi=3.0, eps=0.7)(x, y)
    assert x_adv.min() >= -2 and x_adv.max() <= 3 and not torch.equal(x_adv, x)
    assert x_adv.min() < 0 and x_adv.max() > 1
    unbounded = make(kind, linear(), lo=None, hi=None)(x, y)
    assert unbounded.isfinite().all() and not torch.equal(unbounded, x)


@every
def test_empty_and_single(kind):
    x, y = images()
    attack = make(kind, linear())
    for n in (0, 1):
        result = attack.run(x[:n], y[:n])
        assert result.x_adv.shape == (n, 3, 4, 4) and result.correct.shape == (n,)
        assert result.queries.shape == result.gradients.shape == (n,)


@every
def test_inside_no_grad_and_inference_mode(kind):
    x, y = images()
    for settings in ({}, {"grad_mode": "autograd"}):
        attack = make(kind, linear(), **settings)
        plain = attack.perturb(x, y, draw=0).x_adv
        for context in (torch.no_grad, torch.inference_mode):
            with context():
                found = attack.perturb(x.clone(), y.clone(), draw=0).x_adv
            assert torch.equal(found, plain) and not found.requires_grad


class Failing(nn.Module):
    """A network that raises at its third forward pass."""

    def __init__(self):
        super().__init__()
        self.net, self.calls = ConvNet(3), 0

    def forward(self, x):
        self.calls += 1
        if self.calls == 3:
            raise RuntimeError("out of luck")
        return self.net(x)


@every
def test_everything_is_put_back(kind):
    x, y = images()
    for model in (ConvNet(3), Failing()):
        model.train()
        frozen = next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d)).eval()
        next(model.parameters()).requires_grad_(False)
        needs = [p.requires_grad for p in model.parameters()]
        modes = [m.training for m in model.modules()]
        state = {k: v.clone() for k, v in model.state_dict().items()}
        inputs, rng = x.clone(), torch.get_rng_state()
        attack = make(kind, model, steps=4)
        if isinstance(model, Failing) and kind is not attacks.FGSM:
            with pytest.raises(RuntimeError, match="out of luck"):
                attack.run(inputs, y)
        else:
            attack.run(inputs, y)
        assert [m.training for m in model.modules()] == modes and not frozen.training
        assert [p.requires_grad for p in model.parameters()] == needs
        assert all(p.grad is None for p in model.parameters())
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
        assert torch.equal(inputs, x) and torch.equal(torch.get_rng_state(), rng)


@every
def test_bad_input_is_named(kind):
    (x, y), attack = images(), make(kind, linear())
    hole = x.clone()
    hole[2, 0, 0, 0] = torch.nan
    for bad, error, message in (
        ((x + 2, y), ValueError, r"must lie in the box \[lo, hi\] = \[0.0, 1.0\]"),
        ((hole, y), ValueError, "x has NaN or infinite values"),
        ((x, y + 2), ValueError, r"labels 0..2 .* got values from 2 to 4"),
        ((x, y - 1), ValueError, "labels 0..2"),
        ((x, y.float()), TypeError, "y must be an int64 tensor, got torch.float32"),
        ((x, y[:4]), ValueError, r"y must have shape \[5\]"),
        ((x.long(), y), TypeError, "x"),
    ):
        with pytest.raises(error, match=message):
            attack(*bad)
    with pytest.raises(ValueError, match="no model"):
        make(kind, None)(x, y)
    for name, value in {"eps": -0.1, "steps": -1, "queries": -1, "lo": 2.0}.items():
        if name in parameters(kind):
            with pytest.raises(ValueError, match=name):
                make(kind, linear(), **{name: value})
