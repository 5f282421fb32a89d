"""A borrowed model comes back as it was, and a model that changes itself meanwhile is refused."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pyadv.attacks import FAB, PGD, Square
from pyadv.objectives import EMR
from pyadv.objectives.step import Step
from pyadv.passes.borrow import borrowed, footprint, has_hooks, same_footprint
from tests.networks import ConvNet

REMEDY = r"compat\.emr\.official\(model\) passes _eval=True"


class Willful(nn.Module):
    """A network that decides on its mode itself, in a way named by `how`."""

    def __init__(self, how):
        super().__init__()
        self.how, self.net = how, ConvNet()
        self.register_buffer("mean", torch.zeros(3, 1, 1))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x, _eval=False):
        if self.how == "official":  # as the networks of EMR's official code
            self.eval() if _eval else self.train()
        elif self.how == "for the pass":
            self.net.body.train()
        elif self.how == "dropout":
            self.net.body[3].train()
        elif self.how == "own statistics":
            self.mean.mul_(0.9).add_(x.detach().mean((0, 2, 3))[:, None, None])
        elif self.how == "new tensor":
            self.mean = 0.9 * self.mean
        elif self.how == "batch statistics":
            x = F.batch_norm(x, self.net.body[1].running_mean[:3], torch.ones(3), training=True)
        self.calls += 1
        logits = self.net(x - self.mean)
        if self.how == "for the pass":
            self.net.body.eval()
        return logits


def settled(how):
    torch.manual_seed(0)
    model = Willful(how).eval()
    model.net.body[1].running_mean.normal_()
    return model, torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 2, 3])


WILLFUL = (
    "official",
    "for the pass",
    "dropout",
    "own statistics",
    "new tensor",
    "batch statistics",
)


@pytest.mark.parametrize("speed", ["exact", "fast"])
@pytest.mark.parametrize("how", WILLFUL)
def test_a_model_that_changes_its_mode_or_statistics_is_refused_and_restored(how, speed):
    model, x, y = settled(how)
    before = copy.deepcopy(model.state_dict())
    buffers = dict(model.named_buffers())
    with pytest.raises(RuntimeError, match=REMEDY):
        PGD(model, steps=2, speed=speed)(x, y)
    assert not any(m.training for m in model.modules())
    after = dict(model.named_buffers())
    for name in before:
        if name != "calls":
            assert torch.equal(model.state_dict()[name], before[name]), name
            assert name not in after or after[name] is buffers[name]


@pytest.mark.parametrize("attack", [FAB(steps=1), Square(queries=3)], ids=["FAB", "Square"])
def test_all_passes_notice(attack):
    model, x, y = settled("official")
    with pytest.raises(RuntimeError, match="sets training mode"):
        attack.run(x, y, model=model)
    with pytest.raises(RuntimeError, match="sets training mode"):
        EMR(1.0)(Step(model, x, y, 1))


def test_the_remedies_work():
    model, x, y = settled("official")

    class Official(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            return self.model(x, _eval=True)

    wrapped = Official().eval()
    PGD(wrapped, steps=2)(x, y)
    PGD(model, steps=2, bn="as_is")(x, y)
    assert model.training


def test_modes_as_the_user_left_them_are_put_back_after_a_refusal():
    model, x, y = settled("official")
    model.train()
    model.net.head.eval()
    modes = [m.training for m in model.modules()]
    with pytest.raises(RuntimeError, match=REMEDY):
        PGD(model, steps=1)(x, y)
    assert [m.training for m in model.modules()] == modes


def test_an_error_of_the_model_is_not_hidden():
    model, x, y = settled("official")
    with pytest.raises(ZeroDivisionError), borrowed(model):
        model(x)
        raise ZeroDivisionError
    assert not model.training and int(model.net.body[1].num_batches_tracked) == 0


def test_counters_may_move():
    model, x, y = settled("nothing")
    PGD(model, steps=2)(x, y)
    assert int(model.calls) == 2
    PGD(model, steps=2, bn="train", update_stats=True)(x, y)
    assert int(model.net.body[1].num_batches_tracked) == 2
    PGD(model, steps=2, bn="train")(x, y)
    assert int(model.net.body[1].num_batches_tracked) == 2


@pytest.mark.parametrize("change", ["number", "list", "nested", "record", "class", "buffer"])
def test_a_footprint_sees_what_a_forward_pass_may_read(change):
    class Other(nn.ReLU):
        pass

    model = ConvNet()
    model.scale, model.widths, model.sizes = 0.5, [1, 2], {"a": [1.5]}
    model.config = type("Config", (), {})()
    model.config.slope = 0.1
    model.around, model.act = [model], model.forward
    before = footprint(model)
    assert same_footprint(footprint(model), before) and not has_hooks(model)
    if change == "number":
        model.scale = 0.6
    elif change == "list":
        model.widths.append(3)
    elif change == "nested":
        model.sizes["a"][0] = 2.5
    elif change == "record":
        model.config.slope = 0.2
    elif change == "class":
        model.body[2].__class__ = Other
    else:
        model.body[1].running_mean = torch.zeros(6)
    assert not same_footprint(footprint(model), before)


def scripted(model, x):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        script, traced = torch.jit.script(model), torch.jit.trace(model, x)
        return {
            "script": script,
            "trace": traced,
            "frozen script": torch.jit.freeze(script),
            "frozen trace": torch.jit.freeze(traced),
            "within": nn.Sequential(torch.jit.freeze(script)).eval(),
            "for inference": torch.jit.optimize_for_inference(torch.jit.script(model)),
        }


@pytest.mark.parametrize("speed", ["exact", "fast", "bfloat16"])
def test_scripted_and_frozen_models_are_attacked_as_they_are(speed):
    torch.manual_seed(0)
    model, x = ConvNet().eval(), torch.rand(4, 3, 8, 8)
    y = model(x).argmax(1)
    expected = PGD(model, steps=3, seed=0)(x, y)
    for name, net in scripted(model, x).items():
        attack = PGD(net, steps=3, seed=0, speed=speed)
        if name == "for inference":  # whose operations have no derivatives
            with pytest.raises(ValueError, match="carry no gradient"):
                attack(x, y)
        else:
            torch.testing.assert_close(attack(x, y), expected)
