"""What share of the bandwidth of a copy does each CUDA kernel reach?

Twenty calls are recorded as one CUDA graph, so that the card is timed and not the Python before it.
GB/s counts the least traffic that the op needs; `copy_` moves a tensor too large for the cache, and
`launch` is a kernel on one number. On another device the calls are simply made.
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
LOGITS = (128, 10), (4096, 1000), (256, 21841)
_COPIED = 2 * 4 * math.prod(IMAGES[torch.float32])  # bytes that `copy_` moves


@dataclass(frozen=True)
class Kernel:
    """An op on tensors of one shape, `moved` of which it has to read or write. It is to reach
    `share` of the copy's bandwidth, or to take at most `launches` times as long as a launch."""

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
    for dtype, shape in IMAGES.items():
        make = functools.partial(Kernel, shape=(3, 3, 7, 5) if quick else shape, dtype=dtype)
        for op, moved, share in (
            ("linf_step", 4, 0.9),
            ("linf_momentum_step", 5, 0.9),
            ("l2_step", 4, 0.9),
            ("l1_step", 4, None),  # a selection in every row
            ("keep_rows_", 4, 0.9),
        ):
            yield make("Steps", op, moved=moved, share=share)
        for op, moved, share in (("linf", 3, 0.9), ("l2", 3, 0.9), ("l1", 3, None)):
            yield make("Projections", f"{op}_project", moved=moved, share=share)
        for op in ("keyed_uniform", "keyed_normal", "row_hash"):  # they compute more than they move
            yield make("Noise", op, moved=1)
    for shape in [(3, 7)] if quick else LOGITS:
        small = shape == LOGITS[0]
        bound = {"launches": 1.3} if small else {"share": 0.8}
        for dtype in (torch.float32,) if small else (torch.float32, torch.bfloat16):
            make = functools.partial(Kernel, "Losses", shape=shape, dtype=dtype, **bound)
            for loss, moved in (("ce", 2), ("margin", 2), ("dlr", 2), ("kl", 3)):
                yield make("attack_loss", moved=moved, settings=(loss,))
            for op, moved in (
                ("weighted_cross_entropy", 1),
                ("trades_kl", 2),
                ("trades_kl_backward", 4),
                ("mart_bce", 1),
                ("row_stats", 1),
                ("softmax_cotangent", 2),
                ("row_square_sum", 1),
            ):
                yield make(op, moved=moved)
    for op, bytes_of_row in (("track", 19), ("gairat_weights", 12), ("mail_weights", 8)):
        for n in (5,) if quick else (128, 4096):
            launches = 1.3 if n == 128 else None
            moved = bytes_of_row / 4
            yield Kernel("Rows", op, (n,), torch.float32, moved, launches=launches)


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
            runs=(10, 30),
            budget_s=0.5,
            peak=False,
        )
    yield from _norms(options, big, times)


def repeated(call: Callable[[], Any], device: torch.device, times: int) -> Callable[[], Any]:
    """So many calls as one: on a GPU the replay of a graph."""

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


def calls(kernel: Kernel, device: torch.device) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """The op and its reference on the same tensors; what changes its arguments gives them."""
    from pyadv import ops, reference
    from pyadv.reference import losses

    generator = torch.Generator(device).manual_seed(0)

    def random(normal: bool = True, dtype: torch.dtype = kernel.dtype) -> Tensor:
        draw = torch.randn if normal else torch.rand
        return draw(kernel.shape, generator=generator, device=device).to(dtype)

    n = kernel.shape[0]
    name, settings = kernel.op, dict[str, Any]()
    of = (getattr(ops, name, None), getattr(reference, name, None))
    ids = torch.arange(n, device=device)
    if kernel.group == "Steps":
        x_adv, grad, x = random(False), random(), random(False)
        arguments = (x_adv, grad, x, ALPHA, EPS)
        if name == "linf_momentum_step":
            alpha = torch.full((n,), ALPHA, device=device)
            arguments = (x_adv, random(False), grad, x, alpha, EPS, 0.75)
        if name == "keep_rows_":
            best = torch.empty_like(x), torch.empty_like(x)
            mask = torch.ones(n, dtype=torch.bool, device=device)

            def kept(keep: Callable[..., None]) -> Callable[[], Any]:
                return lambda: (keep(mask, x, grad, *best), best)[1]

            return kept(of[0]), lambda: (x, grad)
        out = torch.empty_like(x)
        return lambda: of[0](*arguments, out=out), lambda: of[1](*arguments)
    if kernel.group == "Projections":
        arguments = (random(), random(False), EPS)
    elif kernel.group == "Noise":
        arguments = (random(),) if name == "row_hash" else (random(), ids, 0, 0)
    elif kernel.group == "Losses":
        z, other = 3 * random(), 3 * random()
        y = torch.randint(kernel.shape[1], (n,), generator=generator, device=device)
        cotangent = torch.rand(n, generator=generator, device=device)
        if name == "trades_kl_backward":
            of = torch.ops.pyadv.trades_kl_backward.default, losses.trades_kl_backward
        arguments = {
            "attack_loss": (z, y, *kernel.settings),
            "trades_kl": (z, other),
            "trades_kl_backward": (cotangent, z, other),
            "softmax_cotangent": (z, 40.0),
            "row_square_sum": (z,),
        }.get(name, (z, y))
        if kernel.settings == ("kl",):
            settings = {"reference_logits": other}
    elif name == "track":
        kappa, patience = torch.zeros_like(ids), torch.full_like(ids, 2**40)
        mask = torch.ones(n, dtype=torch.bool, device=device)
        off = torch.zeros_like(mask)  # nobody is active, so that nothing changes
        ops.track(mask, kappa, off, patience)
        return lambda: (ops.track(mask, kappa, off, patience), kappa)[1], lambda: kappa.clone()
    elif name == "gairat_weights":
        arguments = (ids % 11, 10)
    else:
        arguments = (random(), 10.0, -0.5)
    ours, theirs = (functools.partial(f, *arguments, **settings) for f in of)
    return torch.no_grad()(ours), torch.no_grad()(theirs)


def _norms(options: Options, big: Tensor, times: int) -> Iterator[Case]:
    from pyadv import models, ops, reference

    model = models.create("small-cnn" if options.quick else "wrn-34-10")
    weights = [p.detach().to(options.device) for p in model.parameters() if p.dim() > 1]
    moved = sum(w.nbytes for w in weights)
    target = torch.empty_like(big)
    copied = repeated(lambda: target.copy_(big), options.device, times)
    norms = repeated(lambda: ops.norms(weights), options.device, times)
    yield Case(
        "norms of " + ("SmallCNN" if options.quick else "WRN-34-10"),
        {
            "pyadv": Provider(norms, moved * times),
            "copy_": Provider(copied, 2 * big.nbytes * times, yardstick=True),
        },
        close(reference.norms(weights), rtol=1e-5),
        group=f"Norms, {times} calls",
        images=len(weights),
        budget_s=0.5,
        peak=False,
    )
