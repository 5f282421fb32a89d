"""How fast are the kernels, compared with the usual ways to write the same operations?

`reference` is pyadv's own specification in plain PyTorch. `eager` is the expression that people
write, if it differs; `compile` is torch.compile of it. Losses are timed with their gradient. GB/s
counts the least traffic that the op needs, and its share of `copy_` is relative to the same case.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from harness import Case, Goal, Options, Provider, close
from torch import Tensor

TITLE = "Ops"
LAYOUT = "matrix"
THREADS = "one and all"

EPS, ALPHA = 8 / 255, 2 / 255
SMALL, MEDIUM, LARGE = (32, 1, 28, 28), (128, 3, 32, 32), (64, 3, 224, 224)
LOGITS = (128, 10), (1024, 1000)


def _case(op: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> str:
    return f"{op}, {'x'.join(map(str, shape))}, {str(dtype).removeprefix('torch.')}"


# Convolutions of a ResNet-18 on 32x32 and, with batch 8, of a WRN-34-10: B, C, N, side, stride.
CONVOLUTIONS = (
    (32, 64, 64, 32, 1),
    (32, 128, 128, 16, 1),
    (32, 256, 256, 8, 1),
    (32, 512, 512, 4, 1),
    (32, 128, 256, 16, 2),
    (8, 160, 160, 32, 1),
)


def _convolution(what: str, shape: tuple[int, ...]) -> str:
    b, c, n, side, stride = shape
    return f"3x3 convolution, {what}, {b}x{c}x{side}x{side} to {n} channels, stride {stride}"


_LINF, _L2 = "linf_step in place", "l2_step in place"
_WRN = "log_norm_product of WRN-34-10, forward and backward"

GOALS = [
    Goal("Linf step in place, 32x32: 2.2 times copy_", _case(_LINF, MEDIUM), "copy_", at_most=2.2),
    Goal("Linf step in place, 224x224: 1.6 times copy_", _case(_LINF, LARGE), "copy_", at_most=1.6),
    Goal("Linf step, 32x32: 4 times eager", _case(_LINF, MEDIUM), "eager", at_least=4.0),
    Goal("Linf step, 224x224: 4 times eager", _case(_LINF, LARGE), "eager", at_least=4.0),
    Goal(
        "Linf step, 32x32: 2.5 times torch.compile", _case(_LINF, MEDIUM), "compile", at_least=2.5
    ),
    Goal("Linf step, 224x224: torch.compile", _case(_LINF, LARGE), "compile", at_least=1.0),
    Goal(
        "L2 step, 32x32: 1.6 times the Linf step",
        _case(_L2, MEDIUM),
        "linf_step",
        at_most=1.6,
    ),
    Goal(
        "L2 step, 224x224: 1.45 times the Linf step",
        _case(_L2, LARGE),
        "linf_step",
        at_most=1.45,
    ),
    *(
        Goal(
            f"attack_loss at {shape}: {least} times eager forward and backward",
            _case("attack_loss ce", shape),
            "eager",
            at_least=least,
        )
        for shape, least in zip(LOGITS, (5.0, 1.8), strict=True)
    ),
    *(
        Goal(
            f"{op} at {shape}: {least} times eager forward and backward",
            _case(op, shape),
            "eager",
            at_least=least,
        )
        for op in ("weighted_cross_entropy", "trades_kl", "mart_bce", "mart_kl")
        for shape, least in zip(LOGITS, (1.0, 1.8), strict=True)
    ),
    *(
        Goal(
            f"Winograd's {_convolution(what, shape)}: {least} times oneDNN",
            _convolution(what, shape),
            "conv2d",
            at_least=least,
        )
        for what in ("forward", "input gradient")
        for shape, least in zip(CONVOLUTIONS, (2.0, 2.5, 2.5, 2.5, 1.3, 2.5), strict=True)
    ),
    Goal("Norm product of a WRN-34-10: 2 times a loop of norms", _WRN, "loop", at_least=2.0),
]


def cases(options: Options) -> Iterator[Case]:
    torch.manual_seed(0)
    shapes = [(2, 3, 8, 8)] if options.quick else [SMALL, MEDIUM, LARGE]
    one = shapes[-1] if options.quick else MEDIUM
    logits = [(4, 10)] if options.quick else LOGITS
    compiled = not options.quick
    for shape in shapes:
        yield linf_case(shape, torch.float32, options, compiled)
        yield _l2(shape, torch.float32, options, compiled)
    for dtype in (torch.bfloat16, torch.float64):
        yield linf_case(one, dtype, options, False)
        yield _l2(one, dtype, options, False)
    yield from _other_steps(one, options)
    yield from _projections(one, options)
    for shape in logits:
        yield from _losses(shape, torch.float32, options, compiled)
    for dtype in (torch.bfloat16, torch.float64):
        yield attack_loss_case(logits[0], dtype, options, False)
    for rows in (logits[0][0], 4096):
        yield from _rows(rows, options)
    yield from _norms(options)
    yield from _noise(one, options)
    yield _masked_sum((2, 16, 4, 4) if options.quick else (128, 64, 32, 32), options)
    if options.device.type == "cpu":
        for shape in [(2, 16, 16, 8, 1)] if options.quick else CONVOLUTIONS:
            yield from _convolutions(shape)


def _compile(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return torch.compile of a function, compiled for one shape only."""
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False)


# Steps


def _batch(shape: tuple[int, ...], dtype: torch.dtype, options: Options) -> list[Tensor]:
    """Return x_adv inside the ball, a gradient and x, drawn on the CPU so that all devices
    agree."""
    x = torch.rand(shape)
    x_adv = (x + EPS * (2 * torch.rand(shape) - 1)).clamp(0, 1)
    return [t.to(options.device, dtype) for t in (x_adv, torch.randn(shape), x)]


def eager_linf(x_adv: Tensor, grad: Tensor, x: Tensor) -> Tensor:
    moved = x_adv + ALPHA * grad.sign()
    return torch.clamp(torch.min(torch.max(moved, x - EPS), x + EPS), 0, 1)


def eager_linf_(x_adv: Tensor, grad: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Return the step in place, with the bounds of the ball computed beforehand."""
    x_adv.add_(grad.sign(), alpha=ALPHA)
    torch.maximum(x_adv, low, out=x_adv)
    torch.minimum(x_adv, high, out=x_adv)
    return x_adv.clamp_(0, 1)


def _copy(x: Tensor) -> Provider:
    target = torch.empty_like(x)
    return Provider(lambda: target.copy_(x), bytes=2 * x.nbytes, yardstick=True)


def _no_grad(providers: dict[str, Provider]) -> dict[str, Provider]:
    for provider in providers.values():
        provider.call = torch.no_grad()(provider.call)
    return providers


def linf_case(shape: Any, dtype: torch.dtype, options: Options, compiled: bool) -> Case:
    from pyadv import ops, reference

    x_adv, grad, x = _batch(shape, dtype, options)
    traffic = 4 * x.nbytes
    low, high = x - EPS, x + EPS
    # In-place calls are checked at their first call only; each has its own x_adv.
    own, hand, mine = (x_adv.clone() for _ in range(3))
    providers = {
        "pyadv": Provider(lambda: ops.linf_step(own, grad, x, ALPHA, EPS, out=own), traffic),
        "pyadv, new tensor": Provider(lambda: ops.linf_step(x_adv, grad, x, ALPHA, EPS), traffic),
        "reference": Provider(lambda: reference.linf_step(x_adv, grad, x, ALPHA, EPS), traffic),
        "eager": Provider(lambda: eager_linf(x_adv, grad, x), traffic),
        "eager in place": Provider(lambda: eager_linf_(hand, grad, low, high), traffic),
        "copy_": _copy(x),
    }
    if compiled:
        new = _compile(eager_linf)
        in_place = torch.compile(lambda a, g, x: a.copy_(eager_linf(a, g, x)), dynamic=False)
        providers |= {
            "compile": Provider(lambda: in_place(mine, grad, x), traffic),
            "compile, new tensor": Provider(lambda: new(x_adv, grad, x), traffic),
        }
    # In bfloat16 the reference rounds once and the usual expression after every operation.
    loose = dict(atol=1e-2) if dtype == torch.bfloat16 else dict(atol=1e-7)
    expected = reference.linf_step(x_adv, grad, x, ALPHA, EPS)
    return Case(
        _case(_LINF, shape, dtype),
        _no_grad(providers),
        close(expected, **loose),
        group="Steps",
        images=shape[0],
        steps=1,
        series="linf_step",
        at=x.nbytes if dtype == torch.float32 else None,
    )


def eager_l2(x_adv: Tensor, grad: Tensor, x: Tensor) -> Tensor:
    """Return the L2 step as torchattacks and others write it."""
    norms = grad.flatten(1).norm(dim=1) + 1e-10
    delta = x_adv + ALPHA * grad / norms.view(-1, *(1,) * (x.dim() - 1)) - x
    sizes = delta.flatten(1).norm(dim=1)
    factor = torch.min(EPS / sizes, torch.ones_like(sizes))
    return torch.clamp(x + delta * factor.view(-1, *(1,) * (x.dim() - 1)), 0, 1)


def _l2(shape: Any, dtype: torch.dtype, options: Options, compiled: bool) -> Case:
    from pyadv import ops, reference

    x_adv, grad, x = _batch(shape, dtype, options)
    traffic = 4 * x.nbytes
    own, other = x_adv.clone(), x_adv.clone()
    linf_step = functools.partial(ops.linf_step, other, grad, x, ALPHA, EPS, out=other)
    providers = {
        "pyadv": Provider(lambda: ops.l2_step(own, grad, x, ALPHA, EPS, out=own), traffic),
        "pyadv, new tensor": Provider(lambda: ops.l2_step(x_adv, grad, x, ALPHA, EPS), traffic),
        "reference": Provider(lambda: reference.l2_step(x_adv, grad, x, ALPHA, EPS), traffic),
        "eager": Provider(lambda: eager_l2(x_adv, grad, x), traffic),
        "linf_step": Provider(linf_step, traffic, yardstick=True),
        "copy_": _copy(x),
    }
    if compiled:
        new = _compile(eager_l2)
        providers["compile, new tensor"] = Provider(lambda: new(x_adv, grad, x), traffic)
    loose = dict(atol=1e-2) if dtype == torch.bfloat16 else dict(atol=1e-6)
    return Case(
        _case(_L2, shape, dtype),
        _no_grad(providers),
        close(reference.l2_step(x_adv, grad, x, ALPHA, EPS), **loose),
        group="Steps",
        images=shape[0],
        steps=1,
        series="l2_step",
        at=x.nbytes if dtype == torch.float32 else None,
    )


def _against_reference(
    group: str, case: str, op: str, arguments: tuple[Any, ...], traffic: int, **settings: Any
) -> Case:
    """Return a case with the reference only, for an op without another usual form."""
    from pyadv import ops, reference

    calls = {
        "pyadv": Provider(lambda: getattr(ops, op)(*arguments, **settings), traffic),
        "reference": Provider(lambda: getattr(reference, op)(*arguments, **settings), traffic),
    }
    expected = getattr(reference, op)(*arguments, **settings)
    images = arguments[0].shape[0]
    check = close(expected, rtol=1e-4, atol=1e-6)
    return Case(case, _no_grad(calls), check, group=group, images=images)


def _other_steps(shape: tuple[int, ...], options: Options) -> Iterator[Case]:
    x_adv, grad, x = _batch(shape, torch.float32, options)
    alpha = torch.full((len(x),), 2 * EPS, device=x.device)
    yield _against_reference(
        "Steps",
        _case("linf_momentum_step", shape),
        "linf_momentum_step",
        (x_adv, x, grad, x, alpha, EPS, 0.75),
        5 * x.nbytes,
    )
    yield _against_reference(
        "Steps", _case("l1_step", shape), "l1_step", (x_adv, grad, x, 1.0, 12.0), 4 * x.nbytes
    )


def _projections(shape: tuple[int, ...], options: Options) -> Iterator[Case]:
    _, grad, x = _batch(shape, torch.float32, options)
    far = x + grad
    for op, eps in (("linf_project", EPS), ("l2_project", 0.5), ("l1_project", 12.0)):
        case = _case(op, shape)
        yield _against_reference("Projections", case, op, (far, x, eps), 3 * x.nbytes)


# Losses


def _losses(
    shape: tuple[int, int], dtype: torch.dtype, options: Options, compiled: bool
) -> Iterator[Case]:
    yield attack_loss_case(shape, dtype, options, compiled)
    z, z_adv, y = _logits(shape, dtype, options)
    weight = torch.rand(shape[0]).to(options.device)
    rows = torch.arange(shape[0], device=options.device)

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return F.kl_div(a.log_softmax(1), b.softmax(1), reduction="none").sum(1)

    def mart_bce(a: Tensor) -> Tensor:
        p = a.softmax(1)
        top = p.topk(2, dim=1).indices
        rival = torch.where(top[:, 0] == y, top[:, 1], top[:, 0])
        return F.cross_entropy(a, y, reduction="none") - torch.log(1.0001 - p[rows, rival] + 1e-12)

    def mart_kl(a: Tensor, b: Tensor) -> Tensor:
        p, q = a.softmax(1), b.softmax(1)
        values = F.kl_div(torch.log(p + 1e-12), q, reduction="none").sum(1)
        return values * (1.0000001 - q[rows, y])

    def weighted(a: Tensor) -> Tensor:
        return weight * F.cross_entropy(a, y, reduction="none")

    for op, eager, inputs, rest in (
        ("weighted_cross_entropy", weighted, (z,), (y, weight)),
        ("trades_kl", kl, (z_adv, z), ()),
        ("mart_bce", mart_bce, (z_adv,), (y,)),
        ("mart_kl", mart_kl, (z_adv, z), (y,)),
    ):
        yield _differentiable(op, eager, inputs, rest, options, compiled)


def _logits(
    shape: tuple[int, int], dtype: torch.dtype, options: Options
) -> tuple[Tensor, Tensor, Tensor]:
    z, z_adv = (3 * torch.randn(shape) for _ in range(2))
    y = torch.randint(shape[1], shape[:1])
    return z.to(options.device, dtype), z_adv.to(options.device, dtype), y.to(options.device)


def attack_loss_case(shape: Any, dtype: torch.dtype, options: Options, compiled: bool) -> Case:
    from pyadv import ops, reference

    z, _, y = _logits(shape, dtype, options)

    def eager(leaf: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        loss = F.cross_entropy(leaf, y, reduction="none")
        (grad,) = torch.autograd.grad(loss.sum(), leaf)
        return loss.detach(), grad, leaf.argmax(1) == y

    traffic = 2 * z.nbytes
    providers = {
        "pyadv": Provider(lambda: ops.attack_loss(z, y, "ce", scale="exact"), traffic),
        "reference": Provider(lambda: reference.attack_loss(z, y, "ce", scale="exact"), traffic),
        "eager": Provider(lambda: eager(z.detach().requires_grad_()), traffic),
    }
    if compiled:
        function = _compile(lambda z, y: reference.attack_loss(z, y, "ce", scale="exact"))
        providers["compile"] = Provider(lambda: function(z, y), traffic)
    loose = 2e-2 if dtype == torch.bfloat16 else 1e-4
    return Case(
        _case("attack_loss ce", shape, dtype),
        providers,
        close(reference.attack_loss(z, y, "ce", scale="exact"), rtol=loose, atol=loose / 10),
        group="Losses",
        images=shape[0],
    )


def _differentiable(
    op: str,
    eager: Callable[..., Tensor],
    inputs: tuple[Tensor, ...],
    rest: tuple[Any, ...],
    options: Options,
    compiled: bool,
) -> Case:
    """Return a call that runs the mean over rows forward and backward."""
    from pyadv import ops, reference

    leaves = [z.detach().requires_grad_() for z in inputs]
    share = 1 / len(inputs[0])

    def stepped(function: Callable[..., Tensor]) -> Callable[[], tuple[Tensor, ...]]:
        def call() -> tuple[Tensor, ...]:
            rows = function(*leaves)
            grads = torch.autograd.grad(rows, leaves, torch.full_like(rows, share))
            return rows.detach(), *grads

        return call

    forms = {
        "pyadv": lambda *z: getattr(ops, op)(*z, *rest),
        "reference": lambda *z: getattr(reference, op)(*z, *rest),
        "eager": eager,
    }
    if compiled:
        forms["compile"] = _compile(eager)
    traffic = 3 * sum(z.nbytes for z in inputs)
    providers = {name: Provider(stepped(form), traffic) for name, form in forms.items()}
    return Case(
        _case(op, tuple(inputs[0].shape)),
        providers,
        close(stepped(forms["reference"])(), rtol=1e-3, atol=1e-6),
        group="Losses",
        images=len(inputs[0]),
    )


# Geometry, weights, norms, noise


def _rows(n: int, options: Options) -> Iterator[Case]:
    from pyadv import ops, reference

    on = options.device
    correct = (torch.rand(n) < 0.7).to(on)

    def track(function: Callable[..., None]) -> Provider:
        kappa, active = torch.zeros(n, dtype=torch.int64, device=on), correct | True
        patience = torch.full((n,), 2**40, device=on)

        def call() -> Tensor:
            function(correct, kappa, active, patience)
            return kappa

        return Provider(call, bytes=n * 19)

    calls = {"pyadv": track(ops.track), "reference": track(reference.track)}
    yield Case(
        f"track, {n} samples", calls, close(correct.long()), group="Geometry and weights", images=n
    )
    kappa = torch.randint(11, (n,)).to(on)
    margin = (2 * torch.rand(n) - 1).to(on)
    for op, inputs, traffic in (
        ("gairat_weights", (kappa, 10), 12 * n),
        ("mail_weights", (margin, 10.0, -0.5), 8 * n),
    ):
        case = f"{op}, {n} samples"
        yield _against_reference("Geometry and weights", case, op, inputs, traffic)


def _norms(options: Options) -> Iterator[Case]:
    from pyadv import models, ops, reference

    model = models.create("small-cnn" if options.quick else "wrn-34-10")
    weights = [p.detach().to(options.device) for p in model.parameters() if p.dim() > 1]
    leaves = [w.requires_grad_() for w in weights]

    def stepped(function: Callable[..., Tensor]) -> Provider:
        def call() -> tuple[Tensor, ...]:
            value = function(leaves)
            return value.detach(), *torch.autograd.grad(value, leaves)

        return Provider(call, bytes=3 * sum(w.nbytes for w in weights))

    calls = {
        "pyadv": stepped(ops.log_norm_product),
        "reference": stepped(reference.log_norm_product),
        "loop": stepped(lambda ws: sum(w.norm().log() for w in ws)),
        "torch._foreach_norm": stepped(lambda ws: torch.stack(torch._foreach_norm(ws)).log().sum()),
    }
    expected = stepped(reference.log_norm_product).call()
    yield Case(
        _WRN if not options.quick else "log_norm_product of SmallCNN, forward and backward",
        calls,
        close(expected, rtol=1e-4, atol=1e-6),
        group="Norms",
        runs=(20, 30),
        budget_s=8.0,
    )


def _noise(shape: tuple[int, ...], options: Options) -> Iterator[Case]:
    like = torch.empty(shape, device=options.device)
    ids = torch.arange(shape[0], device=options.device)
    for op, rival in (("keyed_uniform", torch.rand_like), ("keyed_normal", torch.randn_like)):
        case = _against_reference("Noise", _case(op, shape), op, (like, ids, 0, 0), like.nbytes)
        name = f"torch.{rival.__name__}"
        case.providers[name] = Provider(
            lambda rival=rival: rival(like), bytes=like.nbytes, yardstick=True
        )
        yield case


# Convolutions


def _masked_sum(shape: tuple[int, ...], options: Options) -> Case:
    """Return a case of the gradient before a ReLU whose result has two readers."""
    from pyadv import ops, reference

    last = {"memory_format": torch.channels_last}
    y, grad, other = (torch.randn(shape, device=options.device).contiguous(**last) for _ in "ygo")
    calls = {
        "pyadv": lambda: ops.affine_relu_backward(y, grad, other),
        "reference": lambda: reference.affine_relu_backward(y, grad, other),
        "eager": lambda: torch.ops.aten.threshold_backward(grad + other, y, 0),
    }
    providers = {name: Provider(call, bytes=4 * y.nbytes) for name, call in calls.items()}
    target = torch.empty_like(y)
    copy = Provider(lambda: target.copy_(y), bytes=2 * y.nbytes, yardstick=True)
    return Case(
        _case("affine_relu_backward", shape),
        {**providers, "copy_": copy},
        close(calls["eager"](), rtol=0, atol=0),
        group="Convolutions",
        images=shape[0],
    )


def _convolutions(shape: tuple[int, ...]) -> Iterator[Case]:
    """Return a case of Winograd's convolution. The weights are transformed beforehand, as the fast
    view does once for many steps."""
    from pyadv import ops, reference

    b, c, n, side, stride = shape
    like = {"memory_format": torch.channels_last}
    x, weight = torch.randn(b, c, side, side).contiguous(**like), torch.randn(n, c, 3, 3) / c**0.5
    grad, bias = torch.randn_like(F.conv2d(x, weight, None, stride, 1)), torch.randn(n)
    weight = weight.contiguous(**like)
    points, turned = (ops.winograd_weight(weight, t, stride) for t in (False, True))
    traffic = x.nbytes + grad.nbytes + points.nbytes

    def input_gradient() -> Tensor:
        needed = [True, False, False]
        window = [stride] * 2, [1, 1], [1, 1], False, [0, 0], 1
        return torch.ops.aten.convolution_backward(grad, x, weight, None, *window, needed)[0]

    for what, calls in (
        (
            "forward",
            {
                "pyadv": lambda: ops.winograd_conv2d(x, points, bias, n, 1, stride),
                "reference": lambda: reference.winograd_conv2d(x, points, bias, n, 1, stride),
                "conv2d": lambda: F.conv2d(x, weight, bias, stride, 1),
            },
        ),
        (
            "input gradient",
            {
                "pyadv": lambda: ops.winograd_conv2d_input(grad, turned, x.shape, 1, stride),
                "conv2d": input_gradient,
            },
        ),
    ):
        yield Case(
            _convolution(what, shape),
            {k: Provider(call, bytes=traffic) for k, call in calls.items()},
            close(calls["conv2d"](), rtol=1e-4, atol=1e-4),
            group="Convolutions",
            images=b,
            runs=(10, 30),
        )
