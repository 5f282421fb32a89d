"""`speed="fast"`: views compute what their models do, and are used only where they do."""

from __future__ import annotations

import copy
import functools
import gc
import logging
import random
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pyadv.attacks import APGD, FAB, PGD, AutoAttack, PGDPlus, Square, fast_view
from pyadv.models import Normalized, SmallCNN, WideResNet
from pyadv.models.resnet import BasicBlock, PreActBlock
from pyadv.ops.registry import has_kernel
from pyadv.passes import layers
from pyadv.passes import view as views
from pyadv.passes.borrow import footprint, same_footprint
from pyadv.passes.trace import Refused, trace
from pyadv.passes.view import FastView
from tests.networks import ConvNet


class Odd(nn.Module):
    """A network on which folding could go wrong.

    It has a convolution with a bias before a BatchNorm without one, a convolution whose output is
    read twice, BatchNorms in a row and side by side, groups, dilation, uneven windows and in-place
    ReLUs.
    """

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, (3, 2), (2, 1), (1, 0), (2, 1))
        self.bn1 = nn.BatchNorm2d(8, affine=False)
        self.grouped = nn.Conv2d(8, 8, 3, padding="same", groups=4, padding_mode="reflect")
        self.bn2, self.bn3, self.bn4, self.bn6 = (nn.BatchNorm2d(8) for _ in range(4))
        self.head = nn.Linear(8, 5)
        self.bn5 = nn.BatchNorm1d(8)
        self.scale = nn.Parameter(torch.tensor(0.7))

    def forward(self, x):
        a = torch.relu(self.bn6(self.bn1(self.first(x))))
        b = self.grouped(a)
        c = F.relu(self.bn2(b) + self.bn3(self.grouped(a)).relu_(), inplace=True) + b
        c = self.bn4(c * self.scale).tanh() + F.relu(a)
        return self.head(self.bn5(F.dropout(c, 0.5, self.training).mean((2, 3))))


def settled(model, dtype=torch.float64):
    """Return the model in evaluation mode, with statistics and parameters as after training."""
    torch.manual_seed(0)
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            m.running_mean.normal_(0, 0.3)
            m.running_var.uniform_(0.5, 2)
            if m.affine:
                nn.init.uniform_(m.weight, 0.5, 1.5)
                nn.init.normal_(m.bias, 0, 0.3)
    return model.to(dtype).eval()


def inputs(shape=(3, 16, 16), rows=3, dtype=torch.float64):
    torch.manual_seed(1)
    return torch.rand(rows, *shape, dtype=dtype)


def gradient(model, x):
    leaf = x.clone().requires_grad_()
    logits = model(leaf)
    return logits.detach(), *torch.autograd.grad(logits.square().sum(), leaf)


def blocks(block):
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(72, 4))
    return nn.Sequential(nn.Conv2d(3, 8, 3), block(8, 72, 2), block(72, 72, 1), *head)


MODELS = {
    "odd": Odd,
    "post-activation": lambda: blocks(BasicBlock),
    "pre-activation": lambda: Normalized(blocks(PreActBlock), 0.5, (0.2, 0.3, 0.4)),
    "leaky": lambda: WideResNet(10, 1, slope=0.1, shortcut="pad"),
    "no BatchNorm": lambda: SmallCNN(3, 10, (16, 16)),
}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_logits_and_input_gradients_are_the_models(make):
    model, x = settled(make()), inputs()
    view = fast_view(model, x)
    assert isinstance(view, FastView)
    for ours, theirs in zip(gradient(view, x), gradient(model, x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)
    with torch.no_grad():
        torch.testing.assert_close(view(x), model(x), rtol=1e-9, atol=1e-11)


@pytest.fixture
def calls(monkeypatch):
    """Record the heights of images and gradients that Winograd's convolutions were given."""
    if not has_kernel("winograd", torch.device("cpu")):
        pytest.skip("the reference is slower than oneDNN's convolution")
    sizes = []

    def counted(op):
        def call(x, *args, **more):
            sizes.append(x.shape[2])
            return op(x, *args, **more)

        return call

    for name in ("winograd_conv2d", "winograd_conv2d_input"):
        monkeypatch.setattr(layers.ops, name, counted(getattr(layers.ops, name)))
    return sizes


def convolutions():
    """Return convolutions of all kinds; Winograd's takes the second, third and fourth."""
    return nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(64, 64, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(64, 40, 3, padding=2, bias=False),
        nn.BatchNorm2d(40),
        nn.ReLU(),
        nn.Conv2d(40, 24, 3),
        nn.Conv2d(24, 24, 1),
        nn.Conv2d(24, 24, 3, padding=1, groups=2),
        nn.Conv2d(24, 24, 3, padding=2, dilation=2),
        nn.Conv2d(24, 24, 3, padding=1, padding_mode="circular"),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(24, 5),
    )


def test_winograds_convolution_where_it_pays(calls):
    model = settled(convolutions(), torch.float32)
    x = inputs(dtype=torch.float32)
    view = fast_view(model, x)
    assert isinstance(view, FastView) and calls[:6] == [16, 8, 10, 8, 10, 8]
    exact = gradient(copy.deepcopy(model).double(), x.double())
    calls.clear()
    for ours, theirs in zip(gradient(view, x), exact, strict=True):
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    assert calls == [16, 8, 10, 8, 10, 8]
    calls.clear()
    with torch.autocast("cpu", torch.bfloat16):
        view(x)
    assert not calls
    flat = x[..., :2, :]  # too low for tiles: the outputs have one, three and one line
    for dtype, points in ((torch.bfloat16, x), (None, x.double()), (None, flat)):
        view = fast_view(model.to(points.dtype), points, dtype=dtype)
        assert isinstance(view, FastView)
        calls.clear()
        gradient(view, points)
        assert not calls


class Fused(nn.Module):
    """A network with sums and ReLUs around Winograd's convolutions.

    Some may be fused with the convolutions; others may not, because their input is read twice,
    added to itself, broadcast or written in place.
    """

    def __init__(self, in_place=False):
        super().__init__()
        self.in_place = in_place
        self.stem = nn.Conv2d(3, 64, 3)
        conv = functools.partial(nn.Conv2d, 64, 64, 3, padding=1)
        self.a, self.b, self.c, self.d, self.e, self.f = (conv() for _ in range(6))
        self.g, self.h = conv(stride=2), nn.Conv2d(64, 64, 1, 2)
        self.one = nn.Conv2d(64, 64, 14)
        self.head = nn.Linear(64, 5)

    def forward(self, x):
        x = F.relu(self.stem(x))
        y = F.relu(self.a(x))  # read by a convolution alone
        y = F.relu(self.b(y) + x)
        z = F.relu(self.c(y))  # read by a sum, too
        z = self.d(z) + z
        w = self.e(z) + self.one(z)  # one pixel is added to all
        v = self.f(w)
        if self.in_place:  # after the convolution has read it, before the sum
            w.mul_(0.5)
        w = F.relu(F.relu(v + w))
        w = F.relu(self.g(w) + self.h(w))
        return self.head(w.mean((2, 3)))


def test_what_is_fused_with_winograds_convolution(calls):
    model = settled(Fused(), torch.float32)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2)  # so that signal reaches the end
    x = inputs(dtype=torch.float32)
    view = fast_view(model, x)
    assert isinstance(view, FastView)
    assert view.module.code.count(" + ") + view.module.code.count("torch.relu_(") < 8
    exact = gradient(copy.deepcopy(model).double(), x.double())
    calls.clear()
    for ours, theirs in zip(gradient(view, x), exact, strict=True):
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    assert len(calls) == 12  # all but the one with the pixel
    calls.clear()
    wide = fast_view(model.double(), x.double())  # the same graph, without Winograd's convolution
    for ours, theirs in zip(gradient(wide, x.double()), exact, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert not calls
    model = Fused(in_place=True).eval()  # it has no gradients, so `fast_view` would refuse it
    with torch.no_grad():
        torch.testing.assert_close(FastView(model, None)(x), model(x))
    assert calls


@pytest.mark.parametrize("lines", [5, 7])
def test_fused_layers_of_which_some_have_too_few_pixels(lines, calls):
    model = nn.Sequential(
        nn.Conv2d(3, 64, 1),
        nn.Conv2d(64, 64, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(64, 64, 3),
        nn.ReLU(),
        nn.Conv2d(64, 64, 3, padding=2),
        nn.ReLU(),
        nn.Conv2d(64, 64, 3, padding=1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 5),
    )
    model, x = settled(model, torch.float32), inputs((3, lines, 9), dtype=torch.float32)
    view = fast_view(model, x)
    assert isinstance(view, FastView)
    calls.clear()
    exact = gradient(copy.deepcopy(model).double(), x.double())
    for ours, theirs in zip(gradient(view, x), exact, strict=True):
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    assert len(calls) == (6 if lines == 5 else 8)


def test_winograds_weights_follow_the_model(calls):
    model, x = settled(convolutions(), torch.float32), inputs(dtype=torch.float32)
    view = fast_view(model, x)
    old = gradient(view, x)
    points = [dict(p.points) for p in view._parts if isinstance(p, layers.WeightedLayer)]
    assert sum(map(len, points)) == 6
    view.refresh()  # changes nothing, so the transformed weights are kept
    for part, kept in zip(view._parts, points, strict=False):
        assert all(part.points[k] is kept[k] for k in kept)
    with torch.no_grad():
        model[4].weight.mul_(1.5)
        model[7].weight.mul_(-1)
    assert all(map(torch.equal, gradient(view, x), old))
    view.refresh()
    for ours, theirs in zip(gradient(view, x), gradient(model, x), strict=True):
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_batch_norms_are_folded():
    view = fast_view(settled(blocks(BasicBlock)), inputs())
    assert not any(
        isinstance(m, (nn.BatchNorm2d, layers.AffineLayer)) for m in view.module.modules()
    )


def test_the_model_is_left_as_it_was():
    model, x = settled(Odd(), torch.float32).train(), inputs(dtype=torch.float32)
    model.bn4.eval()
    before = copy.deepcopy(model)
    attributes = {name: dict(vars(m)) for name, m in model.named_modules()}
    state = torch.get_rng_state()
    PGD(model, steps=2, speed="bfloat16", seed=0)(x, torch.tensor([0, 1, 2]))
    assert torch.equal(torch.get_rng_state(), state)
    for name, m in model.named_modules():
        assert vars(m).keys() == attributes[name].keys()
        assert all(vars(m)[k] is v for k, v in attributes[name].items())
        assert m.training == before.get_submodule(name).training
    for ours, theirs in zip(model.parameters(), before.parameters(), strict=True):
        assert torch.equal(ours, theirs) and ours.stride() == theirs.stride()
        assert ours.requires_grad and ours.grad is None


def test_changes_of_the_model_are_seen():
    model, x = settled(blocks(BasicBlock)), inputs()
    view = fast_view(model, x)
    old = view(x)
    with torch.no_grad():
        model[1].conv1.weight.mul_(1.01)
        model[1].bn1.running_var.mul_(2)
    assert torch.equal(view(x), old)
    view.refresh()
    torch.testing.assert_close(view(x), model(x), rtol=1e-9, atol=1e-11)
    model[2] = nn.Identity().eval()  # traced anew
    torch.testing.assert_close(fast_view(model, x)(x), model(x), rtol=1e-9, atol=1e-11)


class Wrapped(nn.Module):
    def __init__(self, forward):
        super().__init__()
        self.inside, self.calls, self.function = settled(ConvNet()), 0, forward

    def forward(self, x):
        return self.function(self, x)


def counting(self, x):
    self.calls += 1
    return self.inside(x)


STRANGE = {
    "branches on values": lambda self, x: self.inside(x) if x.sum() > 0 else -self.inside(x),
    "asks for tensors": lambda self, x: self.inside(2 * x if isinstance(x, torch.Tensor) else x),
    "is random": lambda self, x: self.inside(x + 0.1 * torch.randn_like(x)),
    "has fixed noise": lambda self, x: self.inside(x + 0.1 * torch.rand(3, 16, 16)),
    "counts": counting,
}
SPEEDS = ("exact", "fast")


@pytest.mark.parametrize("forward", STRANGE.values(), ids=STRANGE)
def test_a_model_that_cannot_be_read_is_attacked_as_it_is(forward):
    model, x = Wrapped(forward).eval(), inputs()
    state = torch.get_rng_state()
    assert fast_view(model, x) is model
    assert model.calls == 0 and torch.equal(torch.get_rng_state(), state)


def test_a_model_without_a_view_is_read_once(monkeypatch):
    reads, trace = [], views.trace
    monkeypatch.setattr(views, "trace", lambda *args: reads.append(1) or trace(*args))
    model, x = Wrapped(STRANGE["branches on values"]).eval(), inputs()
    for _ in range(3):
        assert fast_view(model, x) is model
    assert len(reads) == 1
    fast_view(model, inputs((3, 8, 8)))
    assert len(reads) == 2
    model.function = lambda self, x: self.inside(x)
    assert isinstance(fast_view(model, x), FastView)


class Distorted(FastView):
    """A view with the model's logits and another gradient on some samples."""

    share = 1.0

    def __call__(self, x):
        logits = super().__call__(x)
        wrong = (x.detach().flatten(1)[:, 0] < self.share).to(logits)[:, None]
        return logits + wrong * (logits - logits.detach())


def test_a_view_with_another_gradient_is_not_used(monkeypatch, caplog):
    model, x = settled(ConvNet()), inputs()
    monkeypatch.setattr(views, "FastView", Distorted)
    with caplog.at_level(logging.INFO, "pyadv"):
        assert fast_view(model, x) is model
    assert "input gradient of its graph differs" in caplog.text


def test_a_deviation_on_some_samples_is_found_within_some_refreshes(monkeypatch, caplog):
    model, x = settled(ConvNet()), inputs(rows=64)
    x[:, 0, 0, 0] = torch.linspace(0.5, 1, 64)  # no sample deviates at first
    monkeypatch.setattr(views, "FastView", Distorted)
    monkeypatch.setattr(Distorted, "share", 0.2)
    assert isinstance(fast_view(model, x), FastView)
    x[20:40, 0, 0, 0] = 0.1
    with caplog.at_level(logging.WARNING, "pyadv"):
        found = [fast_view(model, x) is model for _ in range(24)]
    assert not found[0]
    assert found[-1] and "agreed with the model before" in caplog.text


def test_the_samples_compared_change_and_are_the_same_in_every_process(monkeypatch):
    model, x = settled(ConvNet()), inputs(rows=64)
    seen = []
    look = views._Look
    monkeypatch.setattr(
        views, "_Look", lambda net, points, *rest: seen.append(points) or look(net, points, *rest)
    )
    for _ in range(2):
        views._views.clear()
        for _ in range(3):
            fast_view(model, x)
    assert [len(points) for points in seen[:8:2]] == [8, 8, 2, 2]
    assert not torch.equal(seen[4], seen[6])
    assert all(map(torch.equal, seen[:8], seen[8:]))
    assert all((p >= 0).all() and (p <= 1).all() for p in seen)


def test_rounding_that_decides_a_maximum_otherwise_costs_no_view():
    """Flat images: each pooling window holds equal values, which Winograd's convolution rounds."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(64, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * 64, 5),
    ).eval()
    x = torch.linspace(0.1, 0.9, 9)[:, None, None, None].expand(9, 3, 16, 16).contiguous()
    for _ in range(5):
        assert isinstance(fast_view(model, x), FastView)


class Settings(nn.Module):
    """A network whose forward pass reads attributes of all kinds."""

    def __init__(self):
        super().__init__()
        self.inside, self.scale, self.on = settled(ConvNet()), 2.0, True
        self.widths, self.tensor = [1.0], torch.tensor(1.0, dtype=torch.float64)
        self.config = SimpleNamespace(shift=0.5)

    def forward(self, x):
        logits = self.inside(x) * self.scale * self.widths[0] * self.tensor.item()
        return logits + self.config.shift if self.on else logits


CHANGES = {
    "a number": lambda m: setattr(m, "scale", 3.0),
    "a flag": lambda m: setattr(m, "on", False),
    "a list": lambda m: m.widths.__setitem__(0, 5.0),
    "a record": lambda m: setattr(m.config, "shift", 7.0),
    "a tensor": lambda m: m.tensor.mul_(3),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_changed_attribute_is_noticed_without_a_comparison(change, monkeypatch):
    monkeypatch.setattr(views, "_difference", lambda *args: None)
    model, x = Settings().eval(), inputs()
    view = fast_view(model, x)
    assert isinstance(view, FastView) and fast_view(model, x) is view
    change(model)
    torch.testing.assert_close(fast_view(model, x)(x), model(x))


class Messy(nn.Module):
    """A network that keeps what it computes."""

    def __init__(self):
        super().__init__()
        self.inside, self.seen, self.calls = settled(ConvNet()), [], 0
        self.state = SimpleNamespace(last=None)
        self.register_buffer("total", torch.zeros((), dtype=torch.float64))

    def forward(self, x):
        self.calls += 1
        self.seen.append(x)
        self.state.last = x
        self.total = self.total + 1.0
        return self.inside(x)


def test_reading_runs_no_code_on_the_users_modules():
    model, x = Messy().eval(), inputs()
    before = footprint(model)
    with pytest.raises(Refused):
        trace(model)
    assert same_footprint(footprint(model), before)
    assert (model.calls, model.seen, model.state.last, float(model.total)) == (0, [], None, 0)
    assert fast_view(model, x) is model and model.calls == 0


def test_a_model_that_changes_its_attributes_is_read_once(monkeypatch):
    reads = []
    monkeypatch.setattr(views, "trace", lambda model: reads.append(1) or trace(model))
    model, x = Wrapped(counting).eval(), inputs()
    for _ in range(3):
        assert fast_view(model, x) is model
        model(x)
    assert len(reads) == 1


def test_views_go_with_their_models_at_once():
    def parts():
        for make in (ConvNet, lambda: blocks(BasicBlock), lambda: Wrapped(counting), Settings):
            model, x = settled(make(), torch.float32), inputs(dtype=torch.float32)
            view, wide = (fast_view(model, x, dtype=d) for d in (None, torch.bfloat16))
            yield weakref.ref(model)
            yield from map(weakref.ref, model.parameters())
            if view is not model:
                yield weakref.ref(view)
                yield from map(weakref.ref, view.module.modules())
                yield from map(weakref.ref, wide.module.buffers())
            gradient(view, x)

    gc.collect()
    known = len(views._views), len(views._refused)
    gc.disable()
    try:
        assert not [r() for r in list(parts()) if r() is not None]
        assert (len(views._views), len(views._refused)) == known
    finally:
        gc.enable()


def test_threads_build_views_side_by_side():
    call, x, failed = nn.Module.__call__, inputs(), []
    apply = torch.autograd.Function.apply.__func__
    models = [[settled(blocks(BasicBlock)) for _ in range(15)] for _ in range(3)]
    busy, stop = settled(blocks(BasicBlock)), threading.Event()
    expected = busy(x)

    def build():
        try:
            for model in models.pop():
                assert isinstance(fast_view(model, x), FastView)
        except BaseException as error:
            failed.append(error)

    def run():
        try:
            while not stop.is_set():
                assert torch.equal(busy(x), expected)
        except BaseException as error:
            failed.append(error)

    builders = [threading.Thread(target=build) for _ in range(3)]
    other = threading.Thread(target=run)
    for t in (*builders, other):
        t.start()
    for t in builders:
        t.join()
    stop.set()
    other.join()
    assert not failed
    assert nn.Module.__call__ is call and torch.autograd.Function.apply.__func__ is apply
    assert nn.Linear(2, 3)(torch.rand(4, 2)).shape == (4, 3)


@pytest.mark.parametrize(
    "window", [(3, 1, 1), (3, 2, 1), ((5, 2), (2, 3), (4, 0)), (3, 1, (2, 3), 2), (1, 2)], ids=str
)
def test_the_shape_of_a_convolution_is_known_beforehand(window):
    layer = nn.Conv2d(3, 5, *window)
    for size in ((9, 8), (12, 7)):
        x = torch.rand(2, 3, *size)
        assert layers.output_shape(x, layer) == layer(x).shape


class Rounded(torch.autograd.Function):
    """Rounding to a coarse grid, with the gradient of the identity."""

    @staticmethod
    def forward(ctx, x):
        return torch.round(8 * x) / 8

    @staticmethod
    def backward(ctx, grad):
        return grad


def in_thread(work):
    """Return what `work` returns when another thread calls it."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result(60)


def test_a_thread_may_leave_the_wrappers_of_fx_after_the_trace():
    """A thread that called a module, read an attribute or applied a Function while fx had replaced
    these may run fx's replacement to the end when the trace is over."""
    kept, layer, x = [], nn.Linear(3, 2), torch.rand(4, 3)

    def forward(self, x):
        found = nn.Module.__call__, nn.Module.__getattr__, torch.autograd.Function.apply.__func__
        kept.append(found)
        return self.inside(x)

    trace(Wrapped(forward).eval())
    ((call, getattr_, apply),) = kept
    assert call is not nn.Module.__call__ and getattr_ is not nn.Module.__getattr__
    expected = layer(x)
    assert torch.equal(in_thread(lambda: call(layer, x)), expected)
    assert in_thread(lambda: getattr_(layer, "weight")) is layer.weight
    assert torch.equal(in_thread(lambda: apply(Rounded, x)), torch.round(8 * x) / 8)


def test_a_thread_does_not_see_the_draws_of_another(monkeypatch):
    """While one thread compares a view with its model, another asks for a view of a network that
    draws random numbers, and has drawn but not put the generator back."""
    x, drawn, finished = inputs(), threading.Event(), threading.Event()
    threads, look = [], views._Look
    random_model = Wrapped(lambda self, x: self.inside(x + draw())).eval()
    found = {}

    def draw():
        number = torch.rand((), dtype=x.dtype)
        drawn.set()
        finished.wait(10)
        return number

    def other():
        found["random"] = fast_view(random_model, x)

    def slow_look(*args):
        if not threads:
            threads.append(threading.Thread(target=other))
            threads[0].start()
            drawn.wait(0.5)
        return look(*args)

    monkeypatch.setattr(views, "_Look", slow_look)
    state = torch.get_rng_state()
    view = fast_view(settled(ConvNet()), x)
    finished.set()
    threads[0].join()
    assert isinstance(view, FastView)
    assert found["random"] is random_model and drawn.is_set()
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("speed", ["fast", "bfloat16"])
def test_attacks_keep_a_straight_through_gradient(speed):
    model, x = Wrapped(lambda self, x: self.inside(Rounded.apply(x))).eval(), inputs(rows=20)
    y = model(x).argmax(1)
    exact, fast = (
        PGD(model, eps=0.2, steps=5, seed=0, speed=s).run(x, y) for s in ("exact", speed)
    )
    start = PGD(model, eps=0.2, steps=0, seed=0)(x, y)
    assert (exact.x_adv != start).double().mean() > 0.5
    assert torch.equal(fast.x_adv, exact.x_adv)


@pytest.mark.parametrize("coin", [random.random, np.random.rand], ids=["Python", "NumPy"])
def test_a_model_that_tosses_coins_is_not_frozen_at_one_throw(coin):
    random.seed(0), np.random.seed(0)
    model = Wrapped(lambda self, x: self.inside(x) if coin() < 0.5 else self.inside(x.flip(3)))
    states = random.getstate(), str(np.random.get_state())
    for _ in range(5):
        assert fast_view(model.eval(), inputs()) is model
        views._refused.clear()
    assert (random.getstate(), str(np.random.get_state())) == states


@pytest.mark.parametrize("readable", [True, False])
def test_a_view_keeps_no_model_alive(readable):
    model, x = settled(ConvNet()), inputs()
    model.act, model.around = model.forward, [model]
    if not readable:
        model.forward = model.act
    assert isinstance(fast_view(model, x), FastView) == readable
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_a_layer_that_refers_to_its_model_does_not_keep_it_alive():
    model = nn.Sequential(nn.Flatten(), nn.LayerNorm(12), nn.Linear(12, 3)).eval()
    model[1].owner, x = [model], torch.rand(4, 3, 2, 2)
    assert fast_view(model, x) is model
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


class Opaque(torch.Tensor):
    """A weight that only linear layers can read, as those of quantisation libraries."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is F.linear:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        if func is torch.Tensor.to:
            raise NotImplementedError("Opaque")
        return super().__torch_function__(func, types, args, kwargs)


def test_a_model_whose_weights_cannot_be_copied_is_attacked_as_it_is():
    model, x = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).eval(), torch.rand(4, 3, 2, 2)
    opaque = torch.randn(3, 12).as_subclass(Opaque)
    model[1].weight = nn.Parameter(opaque, requires_grad=False)
    assert fast_view(model, x) is model


def test_a_model_for_whole_batches_only():
    def forward(self, x):
        return self.inside(x.reshape(3, 3, 16, 16))

    model, x = Wrapped(forward).eval(), inputs()
    exact, fast = (PGD(model, steps=2, seed=0, speed=s)(x, torch.tensor([0, 1, 2])) for s in SPEEDS)
    assert torch.equal(fast, exact)


def test_hooks_and_replaced_forwards_are_respected():
    model, x = settled(ConvNet()), inputs()
    handle = model.head.register_forward_hook(lambda m, args, out: 2 * out)
    assert fast_view(model, x) is model
    handle.remove()
    assert isinstance(fast_view(model, x), FastView)
    model.body[0].forward = lambda x: x[:, [0, 1, 2, 0, 1, 2]]
    assert fast_view(model, x) is model
    assert fast_view(function := (lambda x: x), x) is function
    assert fast_view(model, x[:0]) is model
    with pytest.raises(ValueError, match="evaluation mode"):
        fast_view(ConvNet(), x)


ATTACKS = {
    "PGD": lambda **k: PGD(steps=5, **k),
    "targets": lambda **k: PGD(steps=3, targeted=True, restarts=2, **k),
    "PGD+": lambda **k: PGDPlus(eps=0.03, alpha=0.01, steps=6, restarts=2, **k),
    "APGD": lambda **k: APGD(norm="L2", eps=0.5, steps=10, **k),
    "Square": lambda **k: Square(eps=0.03, queries=25, **k),
    "FAB": lambda **k: FAB(steps=8, **k),
}


def problem(rows=5):
    model, x = settled(ConvNet()), inputs((3, 8, 8), rows)
    return model, x, model(x).argmax(1)


@pytest.mark.parametrize("make", ATTACKS.values(), ids=ATTACKS)
def test_attacks_find_the_same_points(make):
    model, x, y = problem()
    exact, fast = (make(seed=0, speed=s).run(x, y, model=model) for s in SPEEDS)
    torch.testing.assert_close(fast.x_adv, exact.x_adv, rtol=0, atol=1e-6)
    torch.testing.assert_close(fast.logits, model(fast.x_adv))
    assert torch.equal(fast.correct, exact.correct)


@pytest.mark.parametrize("name", ["PGD+", "APGD", "Square", "FAB"])
def test_who_fools_the_view_alone_is_searched_again(name, monkeypatch):
    model, x, y = problem()

    class Gullible(FastView):
        def __call__(self, x):
            logits = super().__call__(x)
            return logits - 10 * F.one_hot(y[:1], logits.shape[1]).to(logits)

    monkeypatch.setattr(views, "FastView", Gullible)
    monkeypatch.setattr(views, "_difference", lambda *args: None)
    exact, misled = (ATTACKS[name](seed=0, speed=s).run(x, y, model=model) for s in SPEEDS)
    again = y == y[0]
    assert again.any()
    assert torch.equal(misled.correct[again], exact.correct[again])
    assert (misled.queries[again] > exact.queries[again]).all()


def test_sixteen_bits():
    model, x, y = problem()
    model, x = model.float(), x.float()
    view = fast_view(model, x, dtype=torch.bfloat16)
    assert isinstance(view, FastView) and view(x).dtype == torch.bfloat16
    result = PGD(model, eps=0.03, steps=5, seed=0, speed="bfloat16").run(x, y)
    exact = PGD(model, eps=0.03, steps=5, seed=0).run(x, y)
    assert (result.x_adv - x).abs().max() <= 0.03 + 1e-6
    torch.testing.assert_close(result.logits, model(result.x_adv))
    torch.testing.assert_close(result.loss, exact.loss, rtol=0.05, atol=0.05)


def test_the_ensemble_at_speed():
    model, x, y = problem()
    runs = [
        AutoAttack(model, eps=0.03, version="custom", attacks=["apgd-ce", "fab-t"], seed=0, **k)
        for k in ({"progress": None}, {"progress": None, "speed": "fast"})
    ]
    for run in runs:
        run.plan["apgd-ce"].steps = run.plan["fab-t"].steps = 5
    exact, fast = (run.run(x, y) for run in runs)
    assert torch.equal(fast.correct, exact.correct)


def test_speed_is_one_of_three():
    with pytest.raises(ValueError, match="speed must be one of"):
        PGD(speed="faster")


def test_a_view_does_not_follow_the_default_device():
    model, x = settled(ConvNet(), torch.float32), inputs(dtype=torch.float32)
    torch.set_default_device("meta")
    try:
        view = fast_view(model, x)
    finally:
        torch.set_default_device(None)
    assert isinstance(view, FastView)
