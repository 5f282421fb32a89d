"""Square Attack (Andriushchenko, Croce, Flammarion and Hein, "Square Attack: a query-efficient
black-box adversarial attack via random search", ECCV 2020), and its L1 form (Croce and Hein, "Mind
the Box", ICML 2021)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from pyadv.engine import checks
from pyadv.engine.attack import Attack, Plan, functional
from pyadv.engine.losses import Loss
from pyadv.engine.rules import StepRule
from pyadv.engine.settable import Setting
from pyadv.engine.starts import PROJECT, Noise
from pyadv.engine.state import State
from pyadv.engine.task import FloatOrTensor, LoopSettings, Model, Task, memory, radius
from pyadv.menus import AnyNorm, Auto, Norm, Speed
from pyadv.ops.steps import square_stepper
from pyadv.passes.borrow import Output
from pyadv.tensors import broadcastable, compute_dtype, widen

Draws: TypeAlias = Literal["keyed", "official"]
DRAWS: tuple[Draws, ...] = get_args(Draws)
_SHRINK_AFTER = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)  # queries
_TINY = 1e-12
_SLACK = 1e-6  # that the authors leave to the L1 ball


class Square(Attack):
    """A random search without gradients: each query changes a square of the image, and the change
    stays where it lowers the margin z_y - max_{j != y} z_j. It finds points that misleading
    gradients hide.

    In Linf a square moves to the border of the ball, with one sign per channel. In L2 and L1 the
    mass in two windows moves into one of them. A sample leaves at the first point that fools the
    model; `attack(x, y)` costs at most `queries + 1` forward passes and no backward pass.

    Args:
        model: anything that maps x to logits (B, C); may be None when every call names a model.
        norm: "Linf", "L2" or "L1" (or inf, 2, 1).
        eps: radius of the ball around x, in units of x; float or per sample (B,). The default,
            8/255, is for Linf.
        queries: number of proposals.
        p: share of the image that the first squares cover; it halves after 10, 50, 200, 500, 1000,
            2000, 4000, 6000 and 8000 queries.
        restarts: independent searches, run as one batch.
        targeted: y is the class to reach.
        draws: "keyed", a function of seed and sample; or "official", from torch's generator in the
            order of the authors' code: positions (in Linf signs too) are then shared by the batch,
            and the last position is never drawn.
        lo, hi, seed, compact, output, validate, speed: as in `PGD`.

    Raises:
        ValueError, TypeError: at construction for settings, at the call for x, y and the model's
            logits; x must be images (B, C, H, W).
    """

    settings: LoopSettings

    queries = Setting("settings.steps")
    draws = Setting("settings.start")
    p = Setting("settings.rule.p")

    def __init__(
        self,
        model: Model | None = None,
        *,
        norm: Norm | float = "Linf",
        eps: FloatOrTensor | None = None,
        queries: int = 5000,
        p: float = 0.8,
        restarts: int = 1,
        targeted: bool = False,
        draws: Draws = "keyed",
        lo: FloatOrTensor | None = 0.0,
        hi: FloatOrTensor | None = 1.0,
        seed: int | None = None,
        compact: Auto = "auto",
        output: Output = None,
        validate: Auto = "auto",
        speed: Speed = "exact",
    ):
        norm = checks.canonical_norm(norm)
        checks.count("queries", queries, 0)
        checks.choice("draws", draws, DRAWS)
        checks.share("p", p, one=True)
        settings = LoopSettings(
            norm=norm,
            eps=radius(eps, norm),
            steps=queries,
            loss=Loss("margin", targeted, "fused", "exact"),
            start=draws,
            lo=lo,
            hi=hi,
            compact=compact,
            output=output,
            validate=validate,
            speed=speed,
            rule=SquareRule(p),
            patience=0,
            start_from=_start,
            best="fooled",
        )
        super().__init__(model, settings, restarts, seed)

    def _search_words(self) -> list[str]:
        return [f"{self.settings.steps} queries"]

    def _plan(self, task: Task) -> Plan:
        if task.x.dim() != 4:
            got = list(task.x.shape)
            raise ValueError(f"Square needs images (B, C, H, W), got x of shape {got}")
        return super()._plan(task)


@dataclass
class SquareRule(StepRule):
    """The rule that makes the next proposal from the best point so far. The kind of a step is how
    often the squares have shrunk."""

    p: float
    number: Tensor = memory()  # of the proposal, which the draws depend on

    by_gradient = False

    def begin(self, state: State) -> SquareRule:
        return replace(self, number=torch.zeros((), dtype=torch.int64, device=state.x.device))

    def kind(self, k: int, steps: int) -> int:
        return sum(k > n for n in _SHRINK_AFTER)

    def schedule(self, state: State, k: int) -> None:
        self.number.fill_(k + 1)

    def step(self, state: State, kind: int, grad: None, active: Tensor | None) -> None:
        b, c, h, w = state.x.shape
        s = state.settings
        side = round(math.sqrt(self.p / 2**kind * h * w))
        linf = s.norm == "Linf"
        words = c + (2 if linf else 5)
        draws = _draws(s.start, state.noise, state.x, self.number, words, state.active)
        if linf:
            side = min(max(side, 1), h, w)
            if state.stepper is None:
                state.stepper = square_stepper(state.x, s.eps, s.lo, s.hi)
            u = draws.square(h - side, w - side, c)
            state.stepper(state.x_adv, state.best.x_adv, u, side, active)
        else:
            side = max(side, 3)
            new = self._move_mass(state, draws, min(side + (side + 1) % 2, h, w))
            state.x_adv.copy_(torch.where(state.active.view(b, 1, 1, 1), new, state.x_adv))

    @staticmethod
    def _move_mass(state: State, draws: _Keyed | _Official, side: int) -> Tensor:
        """Empty two windows; add to the old direction of the first a pattern that has the mass of
        both, and the mass that the whole sample is short of eps."""
        s, c, x = state.settings, state.x.shape[1], widen(state.x)
        order = 2 if s.norm == "L2" else 1
        delta = widen(state.best.x_adv) - x
        first, second = _Window(draws, side, x), _Window(draws, side, x)
        eps = broadcastable(s.eps, x)
        short = (eps**order - _norm(delta, order, (1, 2, 3)) ** order).clamp_min(0)
        mask = second.mask()
        held = _norm(delta * torch.maximum(first.mask(), mask), order, (2, 3))
        old = first.cut(delta)
        pattern = _pattern(draws, side, order, c, x)
        new = pattern + old / (_TINY + _norm(old, order, (2, 3)))
        mass = (short / c + held**order) ** (1 / order) * (c if order == 1 else 1)
        new = new / (_TINY + _norm(new, order, (2, 3))) * mass
        delta = first.paste(new, delta * (1 - mask))
        return _inside(state.x, delta, s.norm, eps, s.lo, s.hi)


def _start(
    kind: str,
    norm: AnyNorm,
    x: Tensor,
    eps: FloatOrTensor,
    lo: FloatOrTensor | None,
    hi: FloatOrTensor | None,
    noise: Noise,
) -> Tensor:
    """Return the first iterate: stripes of -eps and eps in Linf; in L2 and L1 five by five patterns
    of random sign."""
    b, c, h, w = x.shape
    side = max(h // 5, 1)
    first = max((h - side * 5) // 2, 0)
    tops, lefts = range(first, h - side + 1, side), range(first, w - side + 1, side)
    active = torch.ones(b, dtype=torch.bool, device=x.device)
    words = c * w if norm == "Linf" else len(tops) * len(lefts) * (c + 1)
    draws = _draws(kind, noise, x, 0, words, active)
    wide = widen(x)
    radius = broadcastable(eps, wide)
    if norm == "Linf":
        point = wide + radius * draws.signs(c, 1, w)
        return PROJECT["Linf"](point.to(x.dtype), x, eps, lo, hi)
    delta, order = torch.zeros_like(wide), 2 if norm == "L2" else 1
    for top in tops:
        for left in lefts:
            tile = _pattern(draws, side, order, c, wide)
            delta[:, :, top : top + side, left : left + side] = tile
    return _inside(x, delta, norm, radius, lo, hi)


def _inside(
    x: Tensor,
    delta: Tensor,
    norm: AnyNorm,
    eps: Tensor,
    lo: FloatOrTensor | None,
    hi: FloatOrTensor | None,
) -> Tensor:
    """Return x + delta scaled to the sphere and clipped to the box (L2), or projected (L1)."""
    wide = widen(x)
    if norm == "L1":
        eps = eps * (1 - _SLACK)
    else:
        delta = delta / (_norm(delta, 2, (1, 2, 3)) + _TINY) * eps
    return PROJECT[norm]((wide + delta).to(x.dtype), x, eps, lo, hi)


def _norm(t: Tensor, order: int, dims: tuple[int, ...]) -> Tensor:
    return torch.linalg.vector_norm(t, order, dim=dims, keepdim=True)


class _Window:
    """A square at one place per sample."""

    def __init__(self, draws: _Keyed | _Official, side: int, x: Tensor):
        self.x, self.side = x, side
        h, w = x.shape[2:]
        i = torch.arange(max(h, w), device=x.device)
        self.i, self.j = i[:h].view(1, 1, h, 1), i[:w].view(1, 1, 1, w)
        self.top, self.left = (draws.integer(n - side).view(-1, 1, 1, 1) for n in (h, w))

    def mask(self) -> Tensor:
        """Return (B, 1, H, W): 1 inside the square, 0 outside."""
        rows, columns = (
            ((n >= first) & (n < first + self.side)).to(self.x.dtype)
            for n, first in ((self.i, self.top), (self.j, self.left))
        )
        return rows * columns

    def cut(self, image: Tensor) -> Tensor:
        """Return the part of the image inside, (B, C, s, s)."""
        return image.flatten(2).gather(2, self._index()).unflatten(2, (self.side, self.side))

    def paste(self, piece: Tensor, image: Tensor) -> Tensor:
        """Return the image with the piece in place of the square."""
        flat = image.flatten(2).scatter(2, self._index(), piece.flatten(2))
        return flat.view(image.shape)

    def _index(self) -> Tensor:
        """Return the places of its elements in (B, C, H W)."""
        i, j = self.i[:, :, : self.side], self.j[..., : self.side]
        index = (self.top + i) * self.x.shape[3] + self.left + j
        return index.flatten(2).expand(-1, self.x.shape[1], -1)


def _pattern(
    draws: _Keyed | _Official, side: int, order: int, channels: int, like: Tensor
) -> Tensor:
    """Return (B, C, s, s): two halves of opposite sign, side by side or one above the other."""
    above = _halves(side, order).to(like)
    turned = draws.coin().view(-1, 1, 1, 1)
    return torch.where(turned, above.T, above) * draws.signs(channels, 1, 1)


@lru_cache
def _halves(side: int, order: int) -> Tensor:
    upper, lower = _pyramid(side // 2, side, order), _pyramid(side - side // 2, side, order)
    both = torch.cat([upper, -lower])
    return both / torch.linalg.vector_norm(both, order)


def _pyramid(height: int, width: int, order: int) -> Tensor:
    """Return nested squares around the middle with weights 1 / k^2 (L2) or 1 / k^4 (L1), scaled to
    norm 1."""
    values = torch.zeros(height, width, dtype=torch.float64, device="cpu")
    for k in range(max(height // 2, width // 2) + 1):
        top, left = height // 2 - k, width // 2 - k
        rows, columns = slice(max(top, 0), top + 2 * k + 1), slice(max(left, 0), left + 2 * k + 1)
        values[rows, columns] += 1 / (k + 1) ** (4 / order)
    return values / torch.linalg.vector_norm(values, order)


def _draws(
    kind: str, noise: Noise, x: Tensor, step: int | Tensor, words: int, active: Tensor
) -> _Keyed | _Official:
    return _Keyed(noise, x, step, words) if kind == "keyed" else _Official(x, active)


class _Keyed:
    """Keyed random numbers for one proposal, different for each sample."""

    def __init__(self, noise: Noise, x: Tensor, step: int | Tensor, words: int):
        like = x.new_empty((x.shape[0], words), dtype=torch.float32)
        self.words, self.used = noise.uniform(like, step), 0

    def square(self, rows: int, columns: int, channels: int) -> Tensor:
        """Return the argument u of `square_step`: (B, 2 + channels) numbers in [0, 1)."""
        return self._take(2 + channels)

    def integer(self, most: int) -> Tensor:
        """Return (B,) integers in 0 .. most."""
        return (self._take(1)[:, 0] * (most + 1)).long()

    def coin(self) -> Tensor:
        return self._take(1)[:, 0] >= 0.5

    def signs(self, *shape: int) -> Tensor:
        """Return (B, *shape) of -1 and 1."""
        return (2.0 * (self._take(math.prod(shape)) >= 0.5) - 1).view(-1, *shape)

    def _take(self, n: int) -> Tensor:
        self.used += n
        return self.words[:, self.used - n : self.used]


def _rand(*shape: int) -> Tensor:
    return torch.rand(shape, device="cpu")


class _Official:
    """Random numbers for one proposal from torch's generator for the CPU, in the order of the
    authors' code."""

    def __init__(self, x: Tensor, active: Tensor):
        self.active, self.x = active, x

    def square(self, rows: int, columns: int, channels: int) -> Tensor:
        corner = [((most * _rand(1)).long() + 0.5) / (most + 1) for most in (rows, columns)]
        up = 0.5 * (_rand(channels) > 0.5)
        return torch.cat([*corner, up]).to(self.x.device, torch.float32).expand(self.x.shape[0], -1)

    def integer(self, most: int) -> Tensor:
        return (most * _rand(1)).long().to(self.x.device).expand(self.x.shape[0])

    def coin(self) -> Tensor:
        return (_rand(1) > 0.5).to(self.x.device).expand(self.x.shape[0])

    def signs(self, *shape: int) -> Tensor:
        signs = self.x.new_ones((self.x.shape[0], *shape), dtype=compute_dtype(self.x.dtype))
        drawn = torch.sign(2 * _rand(int(self.active.sum()), *shape) - 1)
        signs[self.active] = drawn.to(signs)
        return signs


square = functional("square", Square)
