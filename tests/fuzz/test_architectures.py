"""Fast views of odd architectures: the model's logits and input gradients, or the model itself."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn

from pyadv.attacks import fast_view
from pyadv.passes.borrow import footprint, pick_logits, same_footprint
from pyadv.passes.view import FastView
from tests.fuzz.architectures import ARCHITECTURES, Architecture


def built(a: Architecture) -> tuple[nn.Module, torch.Tensor]:
    """Return the network, with statistics as after training, and five inputs."""
    torch.manual_seed(0)
    x = torch.rand(5, *a.shape)
    model = a.make().eval()
    model(x)  # lazy layers
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, nn.modules.batchnorm._NormBase) and m.running_mean is not None:
                m.running_mean.normal_(0, 0.3)
                m.running_var.uniform_(0.5, 2)
                if m.affine:
                    nn.init.uniform_(m.weight, 0.5, 1.5)
                    nn.init.normal_(m.bias, 0, 0.3)
    return model.to(a.dtype).eval(), x.to(a.dtype)


def look(network, x, output):
    leaf = x.clone().requires_grad_()
    logits = pick_logits(network(leaf), output)
    weights = torch.linspace(-1, 2, logits.numel()).view(logits.shape).to(logits)
    weights[~logits.isfinite()] = 0
    if not logits.requires_grad:
        return logits.detach(), None
    (gradient,) = torch.autograd.grad(logits, leaf, weights, allow_unused=True)
    return logits.detach(), gradient


def test_there_are_enough():
    assert len({a.name for a in ARCHITECTURES}) == len(ARCHITECTURES) >= 90


@pytest.mark.parametrize("a", ARCHITECTURES, ids=[a.name for a in ARCHITECTURES])
def test_a_view_is_the_model_in_logits_and_input_gradients(a):
    model, x = built(a)
    random.seed(1)
    np.random.seed(1)
    states = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
    values = copy.deepcopy(dict(model.state_dict())) if "weight norm" not in a.name else {}
    before = footprint(model)
    view = fast_view(model, x, output=a.output)
    if view is model:
        assert a.expected != "view"
    else:
        assert isinstance(view, FastView) and a.expected != "model"
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), str(np.random.get_state())) == states[1:]
    if a.name not in ("counts", "counts in a list", "counts in a record", "keeps features"):
        assert same_footprint(footprint(model), before)
    for name, value in values.items():
        assert torch.equal(model.state_dict()[name], value)
    if view is model:
        return
    unit = torch.finfo(a.dtype).eps
    for ours, theirs in zip(look(view, x, a.output), look(model, x, a.output), strict=True):
        assert (ours is None) == (theirs is None)
        if theirs is not None:
            off = (ours.double() - theirs.double()).nan_to_num(0, 0, 0).abs().max()
            assert off <= 50 * unit * theirs.double().nan_to_num(0, 0, 0).abs().max()
            assert torch.equal(ours.isfinite(), theirs.isfinite())
    with torch.no_grad():
        ours, theirs = (pick_logits(m(x.clone()), a.output) for m in (view, model))
    assert torch.equal(ours.argmax(1), theirs.argmax(1)) or a.dtype.itemsize == 2
