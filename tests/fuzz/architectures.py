"""Small networks of about ninety kinds, on which a fast view could go wrong.

Each case says whether a view is expected: "view", "model" (the model must be attacked as it is) or
"either" where both are right. Inputs are (B, 3, 8, 8) in [0, 1] unless the case names a shape.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

CLASSES = 5


@dataclass(frozen=True)
class Architecture:
    """A network, the shape of one of its inputs, and what `fast_view` is to return for it."""

    name: str
    make: Callable[[], nn.Module]
    expected: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    output: Any


ARCHITECTURES: list[Architecture] = []


def case(
    name: str,
    make: Callable[[], nn.Module],
    expected: str = "view",
    shape: tuple[int, ...] = (3, 8, 8),
    dtype: torch.dtype = torch.float32,
    output: Any = None,
) -> None:
    ARCHITECTURES.append(Architecture(name, make, expected, shape, dtype, output))


class Call(nn.Module):
    """A function of (module, x) as a network, with layers and attributes by name."""

    def __init__(self, function: Callable[..., Any], **held: Any):
        super().__init__()
        self.function = function
        for name, value in held.items():
            setattr(self, name, value)

    def forward(self, x):
        return self.function(self, x)


def head(channels: int = 8) -> nn.Module:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, CLASSES))


def conv(inp: int = 3, out: int = 8, kernel: Any = 3, **more: Any) -> nn.Conv2d:
    return nn.Conv2d(inp, out, kernel, **{"padding": 1, **more})


def stack(*layers: nn.Module, channels: int = 8) -> nn.Module:
    return nn.Sequential(*layers, head(channels))


def function(f: Callable[..., Any], channels: int = 8, **held: Any) -> nn.Module:
    """`f(self, h)` on features h (B, 8, 8, 8), between a convolution and a linear head."""
    body = nn.Sequential(conv(), nn.BatchNorm2d(8))
    return nn.Sequential(body, Call(f, **held), head(channels))


# Convolutions, paddings, strides and groups
case("plain", lambda: stack(conv(), nn.ReLU()))
case("bias and norm", lambda: stack(conv(), nn.BatchNorm2d(8), nn.ReLU()))
case("two norms", lambda: stack(conv(bias=False), nn.BatchNorm2d(8), nn.BatchNorm2d(8), nn.ReLU()))
case("grouped", lambda: stack(conv(), nn.ReLU(), conv(8, 8, groups=4), nn.BatchNorm2d(8)))
case("depthwise", lambda: stack(conv(), conv(8, 8, groups=8), nn.BatchNorm2d(8), nn.ReLU6()))
case("grouped first", lambda: stack(conv(3, 9, groups=3), nn.BatchNorm2d(9), channels=9))
case("dilated", lambda: stack(conv(3, 8, dilation=2, padding=2), nn.ReLU(inplace=True)))
case("asymmetric", lambda: stack(conv(3, 8, (3, 2), stride=(2, 1), padding=(0, 1)), nn.ELU()))
case("same", lambda: stack(conv(padding="same"), nn.BatchNorm2d(8), nn.ReLU()))
case("same, even", lambda: stack(conv(3, 8, 4, padding="same"), nn.ReLU()))
case("valid", lambda: stack(conv(padding="valid"), nn.ReLU()))
for mode in ("reflect", "replicate", "circular"):
    case(f"padding {mode}", lambda mode=mode: stack(conv(padding_mode=mode), nn.BatchNorm2d(8)))
case("padded apart", lambda: stack(nn.ZeroPad2d((1, 0, 2, 1)), conv(padding=0), nn.ReLU()))
case("stride 2", lambda: stack(conv(stride=2), nn.BatchNorm2d(8), nn.ReLU()))
case("stride 4, kernel 4", lambda: stack(conv(3, 8, 4, stride=4, padding=0), nn.GELU()))
case("pointwise", lambda: stack(conv(3, 8, 1, padding=0), nn.ReLU(), conv(8, 8, 1, padding=0)))
case("transposed", lambda: stack(nn.ConvTranspose2d(3, 8, 3, stride=2), nn.BatchNorm2d(8)))
case(
    "line",
    lambda: nn.Sequential(
        nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8), nn.ReLU(), nn.Flatten(), nn.LazyLinear(CLASSES)
    ),
    shape=(3, 12),
)
case(
    "volume",
    lambda: nn.Sequential(
        nn.Conv3d(2, 8, 3),
        nn.BatchNorm3d(8),
        nn.ReLU(),
        nn.AdaptiveMaxPool3d(1),
        nn.Flatten(),
        nn.Linear(8, CLASSES),
    ),
    shape=(2, 5, 6, 7),
)
case("linear", lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, CLASSES)))
case(
    "perceptron",
    lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(192, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, CLASSES)
    ),
)
case("bare linear", lambda: nn.Linear(7, CLASSES), shape=(7,))
case(
    "deep, narrow",
    lambda: stack(
        *[
            m
            for _ in range(6)
            for m in (nn.LazyConv2d(8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        ]
    ),
)


def wide(width: int = 64, **more: Any) -> nn.Module:
    layers = [conv(3, width), nn.ReLU(), conv(width, width, **more), nn.BatchNorm2d(width)]
    return stack(*layers, nn.ReLU(), conv(width, width), nn.ReLU(), channels=width)


case("wide", wide)
case("wide, stride 2", lambda: wide(stride=2), shape=(3, 16, 16))
case("wide, no padding", lambda: wide(padding=0))
case("wide, odd sides", wide, shape=(3, 9, 13))
case("wide, 3 pixels", wide, shape=(3, 3, 3))
case("wide, odd channels", lambda: wide(67))


# Joins
class Residual(nn.Module):
    """A block of residual networks; `form` says where its sum and ReLUs are."""

    def __init__(self, form: str, width: int = 8, stride: int = 1):
        super().__init__()
        self.form = form
        self.stem = conv(3, width)
        self.c1, self.c2 = conv(width, width, stride=stride, bias=False), conv(width, width)
        self.n1, self.n2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.short = nn.Conv2d(width, width, 1, stride) if stride > 1 else nn.Identity()
        self.gate = nn.Parameter(torch.tensor(0.5))
        self.relu = nn.ReLU(inplace=True)
        self.head = head(width)

    def forward(self, x):
        x = self.stem(x)
        if self.form == "pre":
            h = F.relu(self.n1(x))
            return self.head(self.c2(F.relu(self.n2(self.c1(h)))) + self.short(x))
        h = self.n2(self.c2(F.relu(self.n1(self.c1(x)))))
        if self.form == "post":
            return self.head(F.relu(h + self.short(x)))
        if self.form == "in place":
            h += self.short(x)
            return self.head(self.relu(h))
        if self.form == "add":
            return self.head(torch.add(self.short(x), h, alpha=0.3).relu())
        if self.form == "gated":
            return self.head(F.relu(self.gate * h + (1 - self.gate) * x))
        if self.form == "twice":
            return self.head(F.relu(h + x) + F.relu(h + x + h))
        return self.head(F.relu(h + h))  # "itself"


for form in ("pre", "post", "in place", "add", "gated", "twice", "itself"):
    case(f"residual, {form}", lambda form=form: Residual(form))
    if form != "gated":
        case(f"wide residual, {form}", lambda form=form: Residual(form, 64))
case("residual, stride 2", lambda: Residual("post", 8, 2))
case("wide residual, stride 2", lambda: Residual("pre", 64, 2))


class Dense(nn.Module):
    """A block of DenseNet."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(conv(3 + 4 * i, 4) for i in range(4))
        self.norms = nn.ModuleList(nn.BatchNorm2d(3 + 4 * i) for i in range(4))
        self.head = head(19)

    def forward(self, x):
        features = [x]
        for norm, layer in zip(self.norms, self.convs, strict=True):
            features.append(layer(F.relu(norm(torch.cat(features, 1)))))
        return self.head(torch.cat(features, 1))


case("DenseNet", Dense)
case(
    "two branches",
    lambda: function(
        lambda self, h: torch.cat([self.a(h).relu(), self.b(h)], 1),
        16,
        a=conv(8, 8),
        b=conv(8, 8, 1, padding=0),
    ),
)
case(
    "squeeze and excite",
    lambda: function(
        lambda self, h: (
            h * torch.sigmoid(self.up(F.relu(self.down(h.mean((2, 3)))))).view(-1, 8, 1, 1)
        ),
        down=nn.Linear(8, 4),
        up=nn.Linear(4, 8),
    ),
)
case(
    "split and shuffle",
    lambda: function(
        lambda self, h: (
            torch.cat([self.a(h.chunk(2, 1)[0]), h[:, 4:]], 1)
            .unflatten(1, (2, 4))
            .transpose(1, 2)
            .flatten(1, 2)
        ),
        a=conv(4, 4),
    ),
)


def attention(self, h):
    tokens = h.flatten(2).transpose(1, 2)
    q, k, v = self.qkv(tokens).chunk(3, -1)
    weights = (q @ k.transpose(1, 2) / math.sqrt(8)).softmax(-1)
    return (tokens + weights @ v).transpose(1, 2).unflatten(2, (8, 8))


case("attention", lambda: function(attention, qkv=nn.Linear(8, 24)))
case("fused attention", lambda: function(lambda self, h: F.scaled_dot_product_attention(h, h, h)))
case(
    "multi-head",
    lambda: function(
        lambda self, h: (
            self.a(h.flatten(2).transpose(1, 2), *2 * [h.flatten(2).transpose(1, 2)])[0]
            .transpose(1, 2)
            .unflatten(2, (8, 8))
        ),
        a=nn.MultiheadAttention(8, 2, batch_first=True),
    ),
    "either",
)
case(
    "transformer layer",
    lambda: function(
        lambda self, h: self.a(h.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, (8, 8)),
        a=nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
    ),
    "either",
)
case(
    "bilinear", lambda: function(lambda self, h: F.interpolate(h, scale_factor=2, mode="bilinear"))
)
case("max pooling", lambda: stack(conv(), nn.MaxPool2d(2), nn.ReLU(), nn.MaxPool2d(3, 1, 1)))
case("complex", lambda: function(lambda self, h: torch.fft.rfft2(h).abs()))

# Normalisation
case("norm first", lambda: stack(nn.BatchNorm2d(3), conv(), nn.ReLU()))
case("norm without affine", lambda: stack(conv(), nn.BatchNorm2d(8, affine=False), nn.ReLU()))
case("norm without statistics", lambda: stack(conv(), nn.BatchNorm2d(8, track_running_stats=False)))
case("norm of another eps", lambda: stack(conv(), nn.BatchNorm2d(8, eps=0.3, momentum=None)))
case("norm before ReLU before norm", lambda: stack(conv(), nn.ReLU(), nn.BatchNorm2d(8), nn.ReLU()))
case("instance norm", lambda: stack(conv(), nn.InstanceNorm2d(8), nn.ReLU()))
case(
    "instance norm with statistics",
    lambda: stack(conv(), nn.InstanceNorm2d(8, affine=True, track_running_stats=True), nn.ReLU()),
)
case("group norm", lambda: stack(conv(), nn.GroupNorm(2, 8), nn.ReLU(inplace=True)))
case("layer norm", lambda: stack(conv(), nn.LayerNorm([8, 8, 8]), nn.ReLU()))
case("local response", lambda: stack(conv(), nn.ReLU(), nn.LocalResponseNorm(3)))
case("synchronised norm", lambda: stack(conv(), nn.SyncBatchNorm(8), nn.ReLU()), "either")
case(
    "functional norm",
    lambda: function(
        lambda self, h: F.batch_norm(
            h, self.n.running_mean, self.n.running_var, self.n.weight, self.n.bias
        ),
        n=nn.BatchNorm2d(8),
    ),
)
case("norm on the head", lambda: nn.Sequential(stack(conv()), nn.BatchNorm1d(CLASSES)))

# Sharing and parametrizations


def shared(self, h):
    return self.norm(self.conv(self.norm(self.conv(h)).relu()))


case("shared layers", lambda: function(shared, conv=conv(8, 8), norm=nn.BatchNorm2d(8)))
case(
    "one layer, two norms",
    lambda: function(
        lambda self, h: self.a(self.conv(h)).relu() + self.b(self.conv(h)),
        conv=conv(8, 8),
        a=nn.BatchNorm2d(8),
        b=nn.BatchNorm2d(8),
    ),
)


def tied() -> nn.Module:
    net = stack(conv(), nn.ReLU(), conv(8, 8), conv(8, 8), nn.ReLU())
    net[3].weight = net[2].weight
    return net


case("tied weights", tied)
case(
    "weight of another layer",
    lambda: function(lambda self, h: F.conv2d(h, self.a.weight.flip(3), padding=1), a=conv(8, 8)),
)
case(
    "weight norm",
    lambda: stack(conv(), parametrizations.weight_norm(conv(8, 8)), nn.BatchNorm2d(8)),
)
case("old weight norm", lambda: stack(conv(), torch.nn.utils.weight_norm(conv(8, 8))), "model")
case("spectral norm", lambda: stack(conv(), parametrizations.spectral_norm(conv(8, 8)), nn.ReLU()))
case(
    "orthogonal",
    lambda: (
        stack(conv(), head(), channels=8)[:1]
        .append(nn.Flatten())
        .append(parametrizations.orthogonal(nn.Linear(512, CLASSES)))
    ),
)
case(
    "unregistered parameter",
    lambda: function(
        lambda self, h: h * (2 * self.held[0]), held=[nn.Parameter(torch.tensor(0.3))]
    ),
    "model",
)
case("buffer", lambda: Call(lambda self, x: self.net((x - self.net.mean) / 0.3), net=buffered()))
case(
    "tensor attribute", lambda: function(lambda self, h: h * self.scale, scale=torch.rand(8, 1, 1))
)
case("own convolution class", lambda: stack(Standardised(3, 8, 3, padding=1), nn.BatchNorm2d(8)))
case("own norm class", lambda: stack(conv(), Loud(8), nn.ReLU()), "either")


def buffered() -> nn.Module:
    net = stack(conv(), nn.ReLU())
    net.register_buffer("mean", torch.rand(3, 1, 1))
    return net


class Standardised(nn.Conv2d):
    """A convolution with standardised weights."""

    def forward(self, x):
        w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, w, self.bias)


class Loud(nn.BatchNorm2d):
    """A BatchNorm of a subclass, which computes something else."""

    def forward(self, x):
        return 2 * super().forward(x)


# Writing in place
case("in-place scaling", lambda: function(lambda self, h: h.mul_(2).relu()))
case("read before written", lambda: function(lambda self, h: (h * 1).relu_() + h))
case(
    "written after read",
    lambda: function(lambda self, h: self.conv(h) + h.clone().add_(1).relu_(), conv=conv(8, 8)),
)
case("slice written", lambda: function(zeroed), "either")
case("ReLU in place", lambda: stack(conv(), nn.ReLU(True), conv(8, 8), nn.ReLU(True)))
case(
    "ReLU of a view",
    lambda: function(
        lambda self, h: F.relu(self.conv(h).flatten(1), True).unflatten(1, (8, 8, 8)),
        conv=conv(8, 8),
    ),
)


def zeroed(self, h):
    h = h * 1
    h[:, 0] = 0
    return h.relu()


# Gradients of one's own


class Straight(torch.autograd.Function):
    """Rounding whose gradient is passed on."""

    @staticmethod
    def forward(ctx, h):
        return torch.round(4 * h) / 4

    @staticmethod
    def backward(ctx, grad):
        return grad


class Reversed(torch.autograd.Function):
    """The identity with a negative gradient; its forward pass runs no operation."""

    @staticmethod
    def forward(ctx, h):
        return h

    @staticmethod
    def backward(ctx, grad):
        return -grad


class Clipped(torch.autograd.Function):
    """The identity with a gradient that is clipped, on some samples."""

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def forward(h):
        return h.view_as(h)

    @staticmethod
    def backward(ctx, grad):
        (h,) = ctx.saved_tensors
        return torch.where(h.flatten(1).mean(1).view(-1, 1, 1, 1) > 0, grad, 0)


_kept = Reversed.apply


def quietly(self, h):
    with torch.no_grad():
        scale = h.abs().amax((1, 2, 3), keepdim=True) + 0.1
    return h / scale


@torch.no_grad()
def _decorated(h):
    return h.sigmoid()


def switched(self, h):
    before = torch.is_grad_enabled()
    torch.set_grad_enabled(False)
    gate = torch.sigmoid(h)
    torch.set_grad_enabled(before)
    return gate * h


def inferred(self, h):
    with torch.inference_mode():
        gate = torch.sigmoid(h.clone())
    return h + 0 * gate.sum().item()


def caught(self, h):
    try:
        return Straight.apply(h)
    except Exception:
        return torch.round(4 * h) / 4


def without_autocast(self, h):
    with torch.autocast("cpu", enabled=False):
        return self.conv(h)


def packed(self, h):
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        return self.conv(h).sigmoid()


case("straight-through function", lambda: function(lambda self, h: Straight.apply(h)), "model")
case("straight-through, caught", lambda: function(caught), "model")
case("gradient reversal", lambda: function(lambda self, h: Reversed.apply(h)), "model")
case("gradient reversal by a kept name", lambda: function(lambda self, h: _kept(h)), "model")
case("gradient of some samples", lambda: function(lambda self, h: Clipped.apply(h)), "model")
case(
    "function on weights",
    lambda: function(
        lambda self, h: F.conv2d(h, Straight.apply(self.c.weight), padding=1), c=conv(8, 8)
    ),
    "model",
)
case(
    "straight-through by detach",
    lambda: function(lambda self, h: h + (torch.round(4 * h) / 4 - h).detach()),
)
case(
    "detached branch",
    lambda: function(lambda self, h: h + 3 * self.conv(h.detach()), conv=conv(8, 8)),
)
case("detached input", lambda: function(lambda self, h: h.detach()))
case("rounding", lambda: function(lambda self, h: torch.round(4 * h) / 4))
case("no_grad block", lambda: function(quietly), "model")
case("no_grad function", lambda: function(lambda self, h: h * _decorated(h)), "model")
case("set_grad_enabled", lambda: function(switched), "model")
case("inference_mode block", lambda: function(inferred), "model")
case("autocast turned off", lambda: function(without_autocast, conv=conv(8, 8)), "either")
case("saved-tensor hooks", lambda: function(packed, conv=conv(8, 8)), "model")
case(
    "gradient hook",
    lambda: function(lambda self, h: (h.register_hook(lambda g: 2 * g), h * 1)[1]),
    "model",
)
case("clamp", lambda: Call(lambda self, x: self.net(x.clamp(0.2, 0.7)), net=stack(conv())))
for reentrant in (True, False):
    case(
        f"checkpoint, reentrant={reentrant}",
        lambda reentrant=reentrant: function(
            lambda self, h: checkpoint(self.conv, h, use_reentrant=reentrant), conv=conv(8, 8)
        ),
        "model",
    )

# Python at work
case("branches on values", lambda: function(lambda self, h: h if h.sum() > 0 else -h), "model")
case("branches on shapes", lambda: function(lambda self, h: h if h.shape[1] > 4 else -h), "either")
case("branches on a flag", lambda: function(lambda self, h: h.relu() if self.on else h, on=True))
case(
    "branches on the batch", lambda: function(lambda self, h: h if len(h) > 1 else 2 * h), "either"
)
case(
    "asks for tensors",
    lambda: function(lambda self, h: 2 * h if isinstance(h, Tensor) else h),
    "model",
)
case(
    "asks for gradients",
    lambda: function(lambda self, h: h if torch.is_grad_enabled() else 2 * h),
    "model",
)
case(
    "loops",
    lambda: function(lambda self, h: [h := self.c(h).relu() for _ in range(3)][-1], c=conv(8, 8)),
)
case("counts", lambda: function(counted, calls=0), "model")
case(
    "counts in a list",
    lambda: function(lambda self, h: (self.log.append(1), h)[1], log=[]),
    "model",
)
case("counts in a record", lambda: function(recorded, state=SimpleNamespace(calls=0)), "model")
case("keeps features", lambda: function(kept, features=None), "model")
case("alternates", lambda: function(alternating, calls=[0]), "model")
case("hook", lambda: hooked(), "model")
case("forward of its own", lambda: replaced(), "model")
case("refers to itself", lambda: circular())
case(
    "settings in a record",
    lambda: function(lambda self, h: h * self.settings.scale, settings=SimpleNamespace(scale=0.3)),
)


def counted(self, h):
    self.calls += 1
    return h


def recorded(self, h):
    self.state.calls += 1
    return h


def kept(self, h):
    self.features = h
    return h.relu()


def alternating(self, h):
    self.calls[0] += 1
    return h if self.calls[0] % 2 else h.relu()


def hooked() -> nn.Module:
    net = stack(conv(), nn.ReLU())
    net[0].register_forward_hook(lambda m, args, out: 2 * out)
    return net


def replaced() -> nn.Module:
    net = stack(conv(), nn.ReLU())
    net[1].forward = lambda x: x.sigmoid()
    return net


def circular() -> nn.Module:
    net = stack(conv(), nn.ReLU())
    net.around, net.act = [net], net.forward
    return net


# Random numbers
case("dropout", lambda: stack(conv(), nn.Dropout(0.5), nn.Dropout2d(), nn.ReLU()))
case("dropout always on", lambda: function(lambda self, h: F.dropout(h, 0.5, True)), "model")
case("noise", lambda: function(lambda self, h: h + 1e-6 * torch.randn_like(h)), "model")
case(
    "noise without the input",
    lambda: function(lambda self, h: h + 1e-6 * torch.rand(8, 8, 8)),
    "model",
)
case(
    "Python's coin",
    lambda: function(lambda self, h: h.flip(3) if random.random() < 0.5 else h),
    "model",
)
case(
    "NumPy's coin", lambda: function(lambda self, h: h * float(np.random.rand() < 0.5) + h), "model"
)
case(
    "random start layer",
    lambda: nn.Sequential(Call(lambda self, x: x + random.gauss(0, 1e-6)), stack(conv())),
    "model",
)
case("randomised ReLU", lambda: stack(conv(), nn.RReLU()))

# Activations, outputs and dtypes
for act in (nn.LeakyReLU(0.1), nn.SiLU(), nn.Softplus(), nn.Hardswish(), nn.PReLU(8), nn.Tanh()):
    case(type(act).__name__, lambda act=act: stack(conv(), nn.BatchNorm2d(8), act, conv(8, 8)))
case("log-softmax", lambda: nn.Sequential(stack(conv(), nn.ReLU()), nn.LogSoftmax(1)))
case(
    "masked classes",
    lambda: Call(
        lambda self, x: self.net(x).masked_fill(torch.tensor([0, 0, 1, 0, 0]).bool(), -torch.inf),
        net=stack(conv()),
    ),
)
case("tuple", lambda: Call(lambda self, x: (self.net(x), x), net=stack(conv())))
case("dict", lambda: Call(lambda self, x: {"logits": self.net(x), "x": x}, net=stack(conv())))
case(
    "named output",
    lambda: Call(lambda self, x: {"aux": x, "z": self.net(x)}, net=stack(conv())),
    output="z",
)
case(
    "callable output",
    lambda: Call(lambda self, x: [x, self.net(x)], net=stack(conv())),
    output=lambda out: out[1],
)
for dtype in (torch.float64, torch.bfloat16, torch.float16):
    name = str(dtype).removeprefix("torch.")
    case(name, lambda: stack(conv(), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 8)), dtype=dtype)
    case(f"{name}, residual", lambda: Residual("post"), dtype=dtype)
case("wide float64", wide, dtype=torch.float64)
case("own dtype within", lambda: function(lambda self, h: h.double().sigmoid().to(h.dtype)))
case("scripted part", lambda: stack(torch.jit.script(conv()), nn.ReLU()), "model")
