"""Views as they are rewritten for a GPU, run on the CPU: cuDNN's fused convolutions are replaced by
PyTorch's separate functions behind the same two operators."""

from __future__ import annotations

import copy
import logging
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from pyadv import ops
from pyadv.attacks import PGD, fast_view
from pyadv.models import Normalized, PreActResNet18, ResNet18, SmallCNN, WideResNet
from pyadv.models.resnet import BasicBlock
from pyadv.passes import fused, layers
from pyadv.passes import view as views
from pyadv.passes.view import FastView
from tests.fuzz.architectures import ARCHITECTURES
from tests.fuzz.test_architectures import built
from tests.passes.test_view import Fused, Odd, blocks, gradient, inputs, settled

aten = torch.ops.aten


@pytest.fixture(scope="module", autouse=True)
def cudnn():
    """Give the two cuDNN operators a kernel on the CPU, and rewrite views there as on a GPU."""
    library = torch.library.Library("aten", "IMPL")
    library.impl("cudnn_convolution_relu", fused.STAND_IN.relu, "CPU")
    library.impl("cudnn_convolution_add_relu", fused.STAND_IN.add_relu, "CPU")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(fused.CONVOLUTIONS, "cpu", fused.CUDNN)
        yield
    library._destroy()


def thin(model):
    """Return the network with an eighth of its channels."""
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, nn.Conv2d):
                sizes = -(-layer.in_channels // 8), layer.out_channels // 8
                if layer.in_channels == 3:
                    sizes = 3, sizes[1]
                window = layer.kernel_size, layer.stride, layer.padding
                setattr(parent, name, nn.Conv2d(*sizes, *window, bias=layer.bias is not None))
            elif isinstance(layer, nn.BatchNorm2d):
                setattr(parent, name, nn.BatchNorm2d(layer.num_features // 8))
            elif isinstance(layer, nn.Linear):
                setattr(parent, name, nn.Linear(layer.in_features // 8, layer.out_features))
    return model


def layers_of_all_kinds():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, groups=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(8 * 64, 20, bias=False),
        nn.ReLU(),
        nn.Dropout(),
        nn.Linear(20, 20),
        nn.LeakyReLU(0.1),
        nn.Linear(20, 5),
    )


class Branches(nn.Module):
    """A network with sums and BatchNorms in every order, and results that are read three times."""

    def __init__(self):
        super().__init__()
        self.stem, self.one = nn.Conv2d(3, 8, 3, 2), nn.Conv2d(8, 8, 7)
        self.a, self.b, self.c = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(3))
        self.same = nn.Conv2d(8, 8, 3, padding="same")
        self.bn1, self.bn2, self.bn3 = (nn.BatchNorm2d(8) for _ in range(3))
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = F.relu(self.stem(x))
        y = F.relu(self.a(x) + self.b(x))  # two convolutions, of which one adds both biases
        y = F.leaky_relu(self.c(y) + y, 0.2) + x
        z = F.relu(self.bn1(y)) + F.leaky_relu(self.bn2(y), 0.1) + self.bn3(y)
        z = F.relu(self.a(z) + self.one(x))  # one pixel is added to all
        z = F.relu(x + z) + self.same(z)
        return self.head(z.mean([2, 3]) + z.amax((2, 3)))


class BiasOfTheShortcut(nn.Module):
    """A sum of two convolutions, of which the one that is added has the only bias."""

    def __init__(self):
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.shortcut, self.head = nn.Conv2d(8, 8, 1), nn.Linear(8, 5)

    def forward(self, x):
        x = F.relu(self.stem(x))
        shortcut = self.shortcut(x)
        return self.head(F.relu(self.conv(x) + shortcut).mean((2, 3)))


NETWORKS = {
    "ResNet-18": (lambda: thin(ResNet18()), (3, 8, 8)),
    "PreActResNet-18": (lambda: thin(PreActResNet18()), (3, 8, 8)),
    "WRN": (lambda: WideResNet(16, 2), (3, 8, 8)),
    "WRN, leaky": (lambda: WideResNet(10, 2, slope=0.1, shortcut="pad"), (3, 8, 8)),
    "SmallCNN": (lambda: SmallCNN(3, 10, (16, 16)), (3, 16, 16)),
    "normalised": (lambda: Normalized(blocks(BasicBlock), 0.5, (0.2, 0.3, 0.4)), (3, 16, 16)),
    "linear layers": (layers_of_all_kinds, (3, 16, 16)),
    "branches": (Branches, (3, 16, 16)),
    "bias of the shortcut": (BiasOfTheShortcut, (3, 16, 16)),
    "odd": (Odd, (3, 16, 16)),
}


def network(name, dtype=torch.float64, rows=3):
    """Return the network, and inputs for it."""
    make, shape = NETWORKS[name]
    return settled(make(), dtype), inputs(shape, rows, dtype)


def fused_view(model, x, dtype=None):
    view = fast_view(model, x, dtype=dtype)
    assert isinstance(view, FastView) and view.fused
    return view


def distances(ours, theirs):
    """Return the relative L2 distance of each row."""
    off, size = (ours.double() - theirs).flatten(1), theirs.flatten(1)
    return off.norm(dim=1) / size.norm(dim=1)


@pytest.mark.parametrize("name", NETWORKS)
def test_logits_and_input_gradients_are_the_models(name):
    model, x = network(name)
    exact = gradient(model, x)
    for ours, theirs in zip(gradient(fused_view(model, x), x), exact, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)
        assert ours.stride() == theirs.stride()
    single = copy.deepcopy(model).float()
    for ours, theirs in zip(gradient(fused_view(single, x.float()), x.float()), exact, strict=True):
        assert ours.dtype == torch.float32 and distances(ours, theirs).max() < 1e-5
    with torch.no_grad():
        torch.testing.assert_close(fused_view(model, x)(x), model(x), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_sixteen_bits(name, dtype):
    """Rounding decides single ReLUs otherwise, each of which moves a gradient by a few percent."""
    model, x = network(name, torch.float32, 8)
    exact = gradient(copy.deepcopy(model).double(), x.double())
    logits, grad = gradient(fused_view(model, x, dtype), x)
    assert logits.dtype == grad.dtype == torch.float32
    root = torch.finfo(dtype).eps ** 0.5
    assert distances(logits, exact[0]).max() <= root / 2
    assert distances(grad, exact[1]).median() <= 3 * root


class Watch(TorchDispatchMode):
    """Counts operations, apart from those that only make a view; checks the tensors of
    convolutions."""

    FREE = (
        *(aten.detach, aten.view, aten.t, aten.permute, aten.expand, aten._unsafe_view),
        *(aten.unsqueeze, aten.squeeze, aten.alias, aten.slice, aten.select, aten.as_strided),
        *(aten.transpose, aten.empty, aten.empty_like, aten.lift_fresh, aten._reshape_alias),
    )

    def __init__(self, dtype):
        super().__init__()
        self.dtype, self.counts = dtype, Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket not in self.FREE:
            self.counts[func.overloadpacket._qualified_op_name.split("::")[1]] += 1
            if "convolution" in str(func):
                images = [a for a in args if isinstance(a, torch.Tensor) and a.dim() == 4]
                assert all(a.dtype == self.dtype for a in images)
                assert all(a.is_contiguous(memory_format=torch.channels_last) for a in images)
        return func(*args, **(kwargs or {}))


def operations_of_a_step(model, x, dtype):
    """Return how often a step of PGD calls each operation."""
    view, y = fused_view(model, x, dtype), torch.zeros(len(x), dtype=torch.long)
    leaf = x.clone().requires_grad_()
    with Watch(dtype or torch.float32) as watch:
        logits = view(leaf)
        _, cotangent, _ = ops.attack_loss(logits, y, "ce")
        (grad,) = torch.autograd.grad(logits, leaf, cotangent)
        ops.linf_step(leaf.detach(), grad, x, 0.1, 0.2)
    return watch.counts


# What a step calls beside convolutions and what surrounds them: conversions of x and of its
# gradient, pooling, the head, loss and step. In 16 bits, also conversions of logits.
BESIDE = Counter(["_to_copy", "_to_copy", "attack_loss", "linf_step"])


def beside(dtype, **more):
    return BESIDE + Counter(_to_copy=0 if dtype is None else 2) + Counter(more)


POOLED = {"mean": 1, "div": 1, "addmm": 1, "mm": 1}


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_operations_of_a_step_on_resnet18(dtype):
    """Three for each convolution (forward pass, mask and sum, input gradient), two without a
    ReLU."""
    x = inputs((3, 8, 8), dtype=torch.float32)
    counts = operations_of_a_step(settled(ResNet18(), torch.float32), x, dtype)
    own = {"cudnn_convolution_relu": 9, "cudnn_convolution_add_relu": 8, "convolution": 3}
    own |= {"affine_relu_backward": 17, "convolution_backward": 20}
    assert counts == beside(dtype, **own, **POOLED)


# Calls of a step on networks with other layers.
CALLS = {
    # BatchNorm and ReLU, with the sum before them, are one call; so is a convolution with those
    # after it.
    "PreActResNet-18": {
        **{"cudnn_convolution_relu": 8, "convolution": 12, "affine_relu": 9},
        **{"affine_relu_backward": 17, "convolution_backward": 20, **POOLED},
    },
    "WRN": {
        **{"cudnn_convolution_relu": 7, "convolution": 9, "affine_relu": 6},
        **{"affine_relu_backward": 13, "convolution_backward": 16, **POOLED},
    },
    # cuDNN has no LeakyReLU; the shortcuts pool and pad.
    "WRN, leaky": {
        **{"convolution": 7, "affine_relu": 7, "affine_relu_backward": 7},
        **{"convolution_backward": 7, "avg_pool2d": 3, "avg_pool2d_backward": 3},
        **{"constant_pad_nd": 6, **POOLED},
    },
    # `flatten` costs nothing.
    "SmallCNN": {
        **{"cudnn_convolution_relu": 2, "affine_relu_backward": 3, "convolution_backward": 2},
        **{"_addmm_activation": 1, "addmm": 1, "mm": 2},
    },
}


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_no_bias_mask_or_sum_has_a_call_of_its_own(name, dtype):
    counts = operations_of_a_step(*network(name, torch.float32), dtype)
    assert counts == beside(dtype, **CALLS[name])


def test_views_follow_the_model_at_the_same_addresses():
    """Recorded graphs read the weights where they were."""
    for name in ("ResNet-18", "PreActResNet-18", "SmallCNN"):
        model, x = network(name)
        view = fused_view(model, x)
        old, places = view(x), [t.data_ptr() for t in tensors_of(view)]
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.01)
            for m in model.modules():
                if isinstance(m, nn.BatchNorm2d):
                    m.running_var.mul_(2)
                    m.running_mean.add_(0.1)
        view.refresh()
        assert [t.data_ptr() for t in tensors_of(view)] == places
        for ours, theirs in zip(gradient(view, x), gradient(model, x), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)
        assert not torch.allclose(view(x), old)


@pytest.mark.parametrize("name", NETWORKS)
def test_refreshes_do_not_write_to_weights_that_the_model_held_before(name):
    """An exponential moving average swaps the data of parameters and puts it back later."""
    model, x = network(name)
    fused_view(model, x)
    held = [(p.data, p.data.clone()) for p in model.parameters()]
    versions = [p._version for p in model.parameters()]
    for p in model.parameters():
        p.data = p.data * 1.01
    view = fused_view(model, x)
    for now, before in held:
        assert torch.equal(now, before)
    assert [p._version for p in model.parameters()] == versions
    torch.testing.assert_close(view(x), model(x), rtol=1e-9, atol=1e-11)


def tensors_of(view):
    held = [t for p in view._parts for t in vars(p).values() if isinstance(t, torch.Tensor)]
    return [t for t in held if t.numel()]


def test_what_cudnn_cannot_fuse_is_computed_apart(monkeypatch, caplog):
    calls = Counter()

    def failing(*args):
        calls["failed"] += 1
        raise RuntimeError("GET was unable to find an engine to execute this computation")

    monkeypatch.setitem(fused.CONVOLUTIONS, "cpu", fused.Convolutions(failing, failing))
    model, x = network("ResNet-18", torch.float32)
    with caplog.at_level(logging.INFO, "pyadv"):
        view = fused_view(model, x)
    assert "unable to find an engine" in caplog.text and calls["failed"] == 17  # once a layer
    exact = gradient(copy.deepcopy(model).double(), x.double())
    for ours, theirs in zip(gradient(view, x), exact, strict=True):
        assert distances(ours, theirs).max() < 1e-5
    assert calls["failed"] == 17


def full(*args, **more):
    raise torch.OutOfMemoryError("CUDA out of memory")


class NeedsMemory(nn.Module):
    """A network that asks for more memory than there is: while it is read, or when it is copied."""

    def __init__(self, copied):
        super().__init__()
        self.body, self.copied = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), copied
        self.extra = torch.zeros(3)

    def forward(self, x):
        return self.body(x) if self.copied else full()


@pytest.mark.parametrize("fused_form", [True, False])
@pytest.mark.parametrize("where", ["reading", "copying", "folding", "comparing"])
def test_a_lack_of_memory_is_not_taken_for_a_model_without_a_view(where, fused_form, monkeypatch):
    if not fused_form:
        monkeypatch.delitem(fused.CONVOLUTIONS, "cpu")
    model, x = NeedsMemory(copied=where != "reading").eval(), torch.rand(4, 3, 2, 2)
    if where == "copying":
        monkeypatch.setattr(torch.Tensor, "clone", full)
    elif where == "folding":
        monkeypatch.setattr(fused if fused_form else layers, "renew", full)
    elif where == "comparing":
        monkeypatch.setattr(views, "_Look", full)
    with pytest.raises(torch.OutOfMemoryError):
        fast_view(model, x)
    monkeypatch.undo()
    if where != "reading":
        assert isinstance(fast_view(model, x), FastView)


def test_a_broken_graph_is_not_taken_for_weights_that_cannot_be_folded(monkeypatch):
    """fx finds a mistake of the rewriting, which must not end as a slower view."""
    model, x = network("SmallCNN", torch.float32)

    def broken(graph):
        raise RuntimeError("Argument 'x' of Node 'y' was used before it has been defined")

    monkeypatch.setattr(torch.fx.Graph, "lint", broken)
    with pytest.raises(RuntimeError, match="used before it has been defined"):
        fast_view(model, x)


def test_a_lack_of_memory_is_not_taken_for_a_lack_of_kernels(monkeypatch):
    model, x = network("SmallCNN", torch.float32)
    view = fused_view(model, x)

    for part in view._parts[:2]:
        part.convolutions = fused.Convolutions(full, full)
    with pytest.raises(torch.OutOfMemoryError):
        view(x)
    assert view._parts[0].convolutions is not None


def test_deterministic_algorithms_are_respected(monkeypatch):
    model, x = network("ResNet-18", torch.float32)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    counts = operations_of_a_step(model, x, None)
    assert counts["cudnn_convolution_relu"] == counts["cudnn_convolution_add_relu"] == 0
    assert counts["convolution"] == 20 and counts["affine_relu"] == 17


class Mixed(nn.Module):
    """A network with a product of a weight that no layer holds, in the model's dtype."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
        self.weight = nn.Parameter(torch.randn(8, 5))

    def forward(self, x):
        return torch.matmul(self.body(x).mean((2, 3)), self.weight)


def test_a_network_that_does_not_run_in_one_dtype_gets_the_plain_view(caplog):
    model, x = settled(Mixed(), torch.float32), inputs(dtype=torch.float32)
    assert fused_view(model, x)
    with caplog.at_level(logging.INFO, "pyadv"):
        view = fast_view(model, x, dtype=torch.bfloat16)
    assert isinstance(view, FastView) and not view.fused
    assert "is not fused: it fails on 3 samples" in caplog.text


def test_writes_in_place_between_fused_layers_are_respected():
    model, x = Fused(in_place=True).eval(), inputs(dtype=torch.float32)
    view = FastView(model, None, fused.CUDNN)
    with torch.no_grad():
        torch.testing.assert_close(view(x), model(x))
    model, x = settled(Fused(), torch.float64), inputs()
    for ours, theirs in zip(gradient(fused_view(model, x), x), gradient(model, x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


def test_under_autocast_the_fast_view_has_its_dtype():
    model, x = network("SmallCNN", torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        view = fused_view(model, x)
        with Watch(torch.bfloat16) as watch:
            assert view(x).dtype == torch.float32
    assert watch.counts["cudnn_convolution_relu"] == 2
    view = fused_view(model, x)
    with Watch(torch.float32):
        view(x)


@pytest.mark.parametrize("speed", ["fast", "bfloat16"])
def test_attacks_find_the_points_of_the_exact_attack(speed):
    model, x = network("PreActResNet-18", torch.float32)
    y = model(x).argmax(1)
    exact, fast = (
        PGD(model, eps=0.03, steps=5, seed=0, speed=s).run(x, y) for s in ("exact", speed)
    )
    same = (fast.x_adv == exact.x_adv).double().mean()
    assert same > (0.99 if speed == "fast" else 0.8)
    torch.testing.assert_close(fast.logits, model(fast.x_adv))  # the verdict is the model's


@pytest.mark.parametrize("dims", [(2, 3), [-1, -2]], ids=str)
@pytest.mark.parametrize("keepdim", [False, True])
def test_means_over_pixels_of_other_shapes(dims, keepdim):
    class Mean(nn.Module):
        def forward(self, x):
            return x.mean(dims, keepdim=keepdim).flatten(1)

    for shape in ((3, 4, 5), (2, 3, 4, 5)):
        model, x = Mean().eval(), inputs(shape)
        for ours, theirs in zip(gradient(fused_view(model, x), x), gradient(model, x), strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_on_a_card(name, dtype):
    """Views are the models, and cuDNN fuses the convolutions of the usual networks."""
    model, x = network(name, torch.float32, 8)
    exact = gradient(copy.deepcopy(model).double(), x.double())
    model, x = model.cuda(), x.cuda()
    view = fused_view(model, x, dtype)
    logits, grad = (t.cpu() for t in gradient(view, x))
    assert logits.dtype == grad.dtype == torch.float32
    root = max(torch.finfo(dtype or torch.float32).eps, 2**-10) ** 0.5  # float32 is TF32 there
    assert distances(logits, exact[0]).max() <= root / 2
    assert distances(grad, exact[1]).median() <= 3 * root
    if name in CALLS or name == "ResNet-18":
        convolutions = [p for p in view._parts if isinstance(p, fused.FusedConv)]
        assert all(p.convolutions is not None for p in convolutions)


EITHER_FORM = {"multi-head", "transformer layer", "complex", "local response", "PReLU"}
EITHER_FORM |= {"weight of another layer", "weight norm", "spectral norm", "orthogonal"}


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_architectures(dtype):
    """Networks of every kind are fused, too, apart from some that do not run in 16 bits. The view
    is compared with the model when it is made."""
    for a in ARCHITECTURES[:: 2 if dtype is None else 3]:
        if a.expected == "view" and (dtype is None or a.dtype == torch.float32):
            model, x = built(a)
            view = fast_view(model, x, dtype=dtype, output=a.output)
            if a.name == "volume" and dtype:  # no kernel of the CPU has this gradient in 16 bits
                continue
            assert view.fused or (dtype and a.name in EITHER_FORM), a.name
