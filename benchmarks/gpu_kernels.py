"""What share of the bandwidth of a copy does each CUDA kernel reach?

Twenty calls are recorded as one CUDA graph, so that the card is timed and not Python's launches.
GB/s counts the least traffic that the op needs. `copy_` moves a tensor too large for the cache, and
`launch` is a kernel on one number. Other devices run the calls without a graph.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from harness import Case, Goal, Options, Provider, close
from torch import Tensor

TITLE = "CUDA kernels"
LAYOUT = "matrix"
CALLS = 20

EPS, ALPHA = 8 / 255, 2 / 255
IMAGES = {torch.float32: (128, 3, 224, 224), torch.bfloat16: (256, 3, 224, 224)}  # 73 MiB
FEATURES = {torch.float32: (256, 64, 32, 32), torch.bfloat16: (512, 64, 32, 32)}  # 64 MiB
LOGITS = (128, 10), (4096, 1000), (256, 21841)
_COPIED = 2 * 4 * math.prod(IMAGES[torch.float32])  # bytes that `copy_` moves


@dataclass(frozen=True)
class Kernel:
    """An op on tensors of one shape. It must read or write `moved` tensors of that size. Its goal
    is `share` of the copy's bandwidth, or at most `launches` times the time of a launch."""

    group: str
    op: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    moved: float
    share: float | None = None
    launches: float | None = None
    settings: tuple[Any, ...] = ()

    @property
    def name(self) -> str:
        what = " ".join([self.op, *(str(s) for s in self.settings if isinstance(s, str))])
        size = "x".join(map(str, self.shape))
        return f"{what}, {size}, {str(self.dtype).removeprefix('torch.')}"

    @property
    def bytes(self) -> int:
        return int(self.moved * math.prod(self.shape) * self.dtype.itemsize)

    def goals(self) -> Iterator[Goal]:
        if self.share is not None:
            text = f"{self.name}: {self.share:.0%} of the copy's bandwidth (time of copy_)"
            at_most = round(self.bytes / _COPIED / self.share, 3)
            yield Goal(text, self.name, "copy_", at_most=at_most)
        if self.launches is not None:
            text = f"{self.name}: {self.launches} times a launch"
            yield Goal(text, self.name, "launch", at_most=self.launches)


def kernels(quick: bool) -> Iterator[Kernel]:
    """Yield every op with a CUDA kernel; `quick` asks for small shapes, with and without a tail
    that does not fill a vector."""
    for dtype, large in IMAGES.items():
        for shape in [(3, 3, 7, 5), (2, 3, 8, 8)] if quick else [large]:
            make = functools.partial(Kernel, shape=shape, dtype=dtype)
            for op, moved, share in (
                ("linf_step", 4, 0.9),
                ("linf_momentum_step", 5, 0.9),
                ("l2_step", 4, 0.9),
                ("l2_momentum_step", 5, 0.9),
                ("l1_step", 4, None),  # a selection in every row
                ("linf_boundary_step", 4, None),  # a search for a hyperplane
                ("l2_boundary_step", 4, None),
                ("square_step", 2, None),
                ("keep_rows_", 4, 0.9),
                ("keep_best_", 4, 0.9),
            ):
                yield make("Steps", op, moved=moved, share=share)
            for op, moved, share in (("linf", 3, 0.9), ("l2", 3, 0.9), ("l1", 3, None)):
                yield make("Projections", f"{op}_project", moved=moved, share=share)
            for op in ("keyed_uniform", "keyed_normal", "row_hash"):  # more work than traffic
                yield make("Noise", op, moved=1)
    for dtype, large in FEATURES.items():  # channels-last, as between two convolutions
        for shape in [(3, 3, 7, 5), (2, 8, 4, 4)] if quick else [large]:
            for op in ("affine_relu", "affine_relu_backward"):
                yield Kernel("Activation", op, shape, dtype, 4, 0.9)
    if not quick:  # rows that fit the shared memory of one block
        for op, group, moved in (("l2_step", "Steps", 4), ("l2_project", "Projections", 3)):
            yield Kernel(group, op, (8192, 3, 32, 32), torch.float32, moved, 0.9)
    for shape in [(3, 7), (5, 2056)] if quick else LOGITS:
        small = shape == LOGITS[0]
        bound = {"launches": 1.3} if small else {"share": 0.8}
        for dtype in (torch.float32, torch.bfloat16) if shape == LOGITS[1] else (torch.float32,):
            make = functools.partial(Kernel, "Losses", shape=shape, dtype=dtype, **bound)
            for loss, moved in (("ce", 2), ("margin", 2), ("dlr", 2), ("kl", 3)):
                yield make("attack_loss", moved=moved, settings=(loss,))
            for op, inputs in _DIFFERENTIABLE.items():
                yield make(op, moved=inputs)
                yield make(f"{op}_backward", moved=2 * inputs)
                if op != "row_square_sum":
                    yield make(f"{op}_and_gradient", moved=2 * inputs)
            yield make("row_stats", moved=1)
            yield make("softmax_cotangent", moved=2)
    for op, bytes_of_row in (("track", 19), ("gairat_weights", 12), ("mail_weights", 8)):
        for n in (5,) if quick else (128, 4096):
            launches = 1.3 if n == 128 else None
            moved = bytes_of_row / 4
            yield Kernel("Rows", op, (n,), torch.float32, moved, launches=launches)


# number of logit tensors that each op reads
_DIFFERENTIABLE = {
    "weighted_cross_entropy": 1,
    "trades_kl": 2,
    "mart_bce": 1,
    "mart_kl": 2,
    "row_square_sum": 1,
}


GOALS = [goal for kernel in kernels(quick=False) for goal in kernel.goals()]


def cases(options: Options) -> Iterator[Case]:
    big = torch.rand((5, 5) if options.quick else IMAGES[torch.float32]).to(options.device)
    one = torch.zeros(1, device=options.device)
    times = 2 if options.quick else CALLS
    for kernel in kernels(options.quick):
        call, reference = calls(kernel, options.device)
        copied = 2 * big.nbytes * times
        target = torch.empty_like(big)
        yardsticks = {"copy_": (functools.partial(target.copy_, big), copied)}
        yardsticks["launch"] = (functools.partial(one.add_, 1), None)
        providers = {"pyadv": Provider(repeated(call, options.device, times), kernel.bytes * times)}
        for name, (what, moved) in yardsticks.items():
            again = repeated(what, options.device, times)
            providers[name] = Provider(again, moved, yardstick=True)
        loose = 1e-4 if kernel.dtype == torch.float32 else 2e-2
        yield Case(
            kernel.name,
            providers,
            close(reference(), rtol=loose, atol=loose / 10),
            group=f"{kernel.group}, {times} calls",
            images=kernel.shape[0],
            runs=(10, 20),
            budget_s=0.25,
            peak=False,
        )
    yield from _norms(options, big, times)


def repeated(call: Callable[[], Any], device: torch.device, times: int) -> Callable[[], Any]:
    """Return one call that makes `times` calls; on a GPU it replays a graph."""

    def plain() -> Any:
        for _ in range(times):
            result = call()
        return result

    return plain if device.type == "cpu" else recorded(plain)


def recorded(call: Callable[[], Any]) -> Callable[[], Any]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()

    def replay() -> Any:
        graph.replay()
        return result

    return replay


Calls = tuple[Callable[[], Any], Callable[[], Any]]


def calls(kernel: Kernel, device: torch.device) -> Calls:
    """Return the op and its reference on the same tensors."""
    makers = {"Steps": _step, "Losses": _loss, "Rows": _rows, "Activation": _features}
    torch.manual_seed(0)
    ours, theirs = makers.get(kernel.group, _plain)(kernel, device)
    return torch.no_grad()(ours), torch.no_grad()(theirs)


def _random(kernel: Kernel, device: torch.device, draw: Callable[..., Tensor]) -> Tensor:
    return draw(kernel.shape, device=device).to(kernel.dtype)


def _step(kernel: Kernel, device: torch.device) -> Calls:
    from pyadv import ops, reference

    name, n = kernel.op, kernel.shape[0]
    x_adv, before, x = (_random(kernel, device, torch.rand) for _ in range(3))
    grad = _random(kernel, device, torch.randn)
    if name.startswith("keep"):
        best = torch.empty_like(x), torch.empty_like(x)
        chosen = torch.ones(n, dtype=torch.bool, device=device)
        loss, lowest = chosen.float(), torch.zeros(n, device=device)

        def keep() -> Any:
            if name == "keep_rows_":
                ops.keep_rows_(chosen, x, grad, *best)
            else:
                lowest.zero_()
                ops.keep_best_(loss, x, grad, lowest, *best)
            return best

        return keep, lambda: (x, grad)
    arguments: tuple[Any, ...] = (x_adv, grad, x, ALPHA, EPS)
    if name.endswith("momentum_step"):
        alpha = torch.full((n,), ALPHA, device=device)
        arguments = (x_adv, before, grad, x, alpha, EPS, 0.75)
    if name.endswith("boundary_step"):
        value = grad.float().flatten(1).norm(dim=1) / 10  # a tenth away in L2
        arguments = (x_adv, grad, x, value, 0.1, 1.05)
    if name == "square_step":
        u = torch.rand(n, 2 + kernel.shape[1], device=device)
        arguments = (x_adv, before, x, u, kernel.shape[2] // 2, EPS)
    out = torch.empty_like(x)
    ours = functools.partial(getattr(ops, name), *arguments, out=out)
    return ours, functools.partial(getattr(reference, name), *arguments)


def _plain(kernel: Kernel, device: torch.device) -> Calls:
    from pyadv import ops, reference

    x, other = _random(kernel, device, torch.randn), _random(kernel, device, torch.rand)
    ids = torch.arange(kernel.shape[0], device=device)
    arguments = {"row_hash": (x,), "keyed_uniform": (x, ids, 0, 0), "keyed_normal": (x, ids, 0, 0)}
    given = arguments.get(kernel.op, (x, other, EPS))
    ours, theirs = (getattr(module, kernel.op) for module in (ops, reference))
    return functools.partial(ours, *given), functools.partial(theirs, *given)


def _features(kernel: Kernel, device: torch.device) -> Calls:
    from pyadv import ops, reference

    make = functools.partial(_random, kernel, device, torch.randn)
    first, second, third = (make().contiguous(memory_format=torch.channels_last) for _ in range(3))
    if kernel.op == "affine_relu_backward":
        given, more = (first, second, third), {}
    else:
        scale, shift = (torch.randn(kernel.shape[1], device=device) for _ in range(2))
        given, more = (first, scale, shift), {"added": second, "keep_sum": True}
    ours, theirs = (getattr(module, kernel.op) for module in (ops, reference))
    return functools.partial(ours, *given, **more), functools.partial(theirs, *given, **more)


def _loss(kernel: Kernel, device: torch.device) -> Calls:
    from pyadv import ops, reference
    from pyadv.reference import losses

    z, other = (3 * _random(kernel, device, torch.randn) for _ in range(2))
    n, classes = kernel.shape
    y, cotangent = torch.randint(classes, (n,), device=device), torch.rand(n, device=device)
    name, _, gradient = kernel.op.partition("_and_gradient")
    base = name.removesuffix("_backward")
    if base not in _DIFFERENTIABLE:
        settings = {"reference_logits": other} if kernel.settings == ("kl",) else {}
        given = (z, 40.0) if base == "softmax_cotangent" else (z, y, *kernel.settings)
        ours, theirs = (getattr(module, base) for module in (ops, reference))
        return (functools.partial(f, *given, **settings) for f in (ours, theirs))
    op = getattr(torch.ops.pyadv, kernel.op).default
    inputs: dict[str, tuple[Any, ...]] = {
        "weighted_cross_entropy": (z, y, None, None),
        "trades_kl": (z, other),
        "mart_bce": (z, y, False),
        "mart_kl": (z, other, y, False, False),
        "row_square_sum": (z,),
    }
    given = inputs[base]
    value, backward = getattr(reference, base), getattr(losses, f"{base}_backward")
    if name != base:
        return lambda: op(cotangent, *given), lambda: backward(cotangent, *given)
    if kernel.op == base:
        return lambda: op(*given), lambda: value(*given)

    def both() -> list[Tensor]:
        grads = backward(torch.ones_like(cotangent), *given)
        return [value(*given), *([grads] if isinstance(grads, Tensor) else grads)]

    return lambda: op(*given), both


def _rows(kernel: Kernel, device: torch.device) -> Calls:
    from pyadv import ops, reference

    n = kernel.shape[0]
    kappa = torch.arange(n, device=device) % 11
    if kernel.op == "track":
        here = torch.ones(n, dtype=torch.bool, device=device)
        nobody, patience = torch.zeros_like(here), torch.full_like(kappa, 2**40)

        def track() -> Tensor:  # changes nothing, so that it can be repeated
            ops.track(here, kappa, nobody, patience)
            return kappa

        return track, kappa.clone
    margin = 2 * torch.rand(n, device=device) - 1
    given = (kappa, 10) if kernel.op == "gairat_weights" else (margin, 10.0, -0.5)
    ours, theirs = (getattr(module, kernel.op) for module in (ops, reference))
    return functools.partial(ours, *given), functools.partial(theirs, *given)


def norm_calls(
    device: torch.device, quick: bool
) -> Iterator[tuple[str, Callable[[], Any], Any, int]]:
    """Yield name, call, expected result and least traffic of the ops on all weights of a
    network."""
    from pyadv import models, ops, reference

    model = models.create("small-cnn" if quick else "wrn-34-10")
    weights = [p.detach().to(device) for p in model.parameters() if p.dim() > 1]
    moved, of = sum(w.nbytes for w in weights), "SmallCNN" if quick else "WRN-34-10"
    cotangent, values = torch.rand(len(weights), device=device), reference.norms(weights)
    yield f"norms of {of}", lambda: ops.norms(weights), values, moved
    expected = [c * w / v for c, w, v in zip(cotangent, weights, values, strict=True)]
    backward = torch.ops.pyadv.norms_backward.default
    call = functools.partial(backward, cotangent, weights, values)
    yield f"norms_backward of {of}", call, expected, 2 * moved


def _norms(options: Options, big: Tensor, times: int) -> Iterator[Case]:
    target = torch.empty_like(big)
    copied = repeated(lambda: target.copy_(big), options.device, times)
    for name, call, expected, traffic in norm_calls(options.device, options.quick):
        yield Case(
            name,
            {
                "pyadv": Provider(repeated(call, options.device, times), traffic * times),
                "copy_": Provider(copied, 2 * big.nbytes * times, yardstick=True),
            },
            close(expected, rtol=1e-5),
            group=f"Norms, {times} calls",
            images=1,
            budget_s=0.25,
            peak=False,
        )
