"""What the loop of the engine carries along: settings, one row for each sample still attacked, and
the best iterate so far."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from pyadv.engine.graphs import Graphs
from pyadv.engine.losses import Loss
from pyadv.engine.starts import Noise, Start, start
from pyadv.ops.steps import unchecked_keep_best_
from pyadv.passes.borrow import Output

Parameter = float | Tensor
# From rows, logits and the input they belong to: the direction, and its number of backward passes.
Direction = Callable[["Rows", Tensor, Tensor], tuple[Tensor, int]]
BESTS = ("last", "loss", "fooled")


class StepRule(Protocol):
    """From one iterate to the next. What it remembers has one row per sample, as `PerRow` has."""

    def begin(self, rows: Rows) -> StepRule:
        """The rule with its memory for these rows."""

    def observe(self, rows: Rows, k: int, loss: Tensor, grad: Tensor | None) -> Tensor | None:
        """Iterate k was seen. The gradient to step with; the rule may move the rows elsewhere."""

    def step(self, rows: Rows, grad: Tensor | None, k: int, active: Tensor | None) -> None:
        """Replaces rows.x_adv, except for rows that are not active."""

    def select(self, kept: Tensor) -> StepRule: ...


@dataclass(frozen=True)
class Settings:
    """What a gradient attack is; the public classes fill it in and document it."""

    norm: str
    eps: Parameter
    alpha: Parameter
    steps: int
    loss: Loss
    start: Start
    lo: Parameter | None
    hi: Parameter | None
    compact: bool | str
    output: Output
    validate: bool | str
    rule: StepRule
    patience: int  # fooled iterates a sample may have before it is released
    start_from: Callable[..., Tensor] = start  # what the name `start` means
    best: str = "last"  # which iterate is the result; "nearest": of those that fool the model
    eot: int = 1  # gradients averaged at each iterate
    by_gradient: bool = True  # False: a search without backward passes
    direction: Direction | None = None  # where steps go, if not along the gradient of the loss
    bn: str = "eval"
    update_stats: bool = False
    keep: Parameter = 0.2  # share of the coordinates an L1 step moves
    omega: float = 0.0  # standard deviation of the noise added after each step
    speed: str = "exact"  # what stands for the model during the search, see `_fast`
    graphs: Graphs = field(default=Graphs(False), compare=False)  # of the steps

    @property
    def parameters(self) -> dict[str, Parameter | None]:
        """What may hold one value per sample."""
        return {k: getattr(self, k) for k in ("eps", "alpha", "lo", "hi", "keep")}

    def checks_values(self, x: Tensor) -> bool:
        """Whether to read values of tensors, for which a GPU would have to be waited for."""
        return self.validate is True or (self.validate == "auto" and x.device.type == "cpu")

    def select(self, kept: Tensor, x: Tensor) -> Settings:
        """For the rows `kept` of x: per-sample parameters follow their rows."""
        return replace(self, **{k: _select(v, kept, x) for k, v in self.parameters.items()})


_Self = TypeVar("_Self", bound="PerRow")


class PerRow:
    """A dataclass whose tensors all have one row per sample."""

    def select(self: _Self, kept: Tensor) -> _Self:
        tensors = ((f.name, getattr(self, f.name)) for f in fields(self))
        return replace(self, **{k: v[kept] for k, v in tensors if isinstance(v, Tensor)})


@dataclass
class Best(PerRow):
    """The iterate of highest loss so far; NaN counts as lowest."""

    x_adv: Tensor
    loss: Tensor
    grad: Tensor | None

    @classmethod
    def first(cls, x_adv: Tensor, loss: Tensor, grad: Tensor | None) -> Best:
        own = None if grad is None else torch.empty_like(x_adv).copy_(grad)
        return cls(x_adv.clone(), torch.where(loss.isnan(), -torch.inf, loss), own)

    def update(self, x_adv: Tensor, loss: Tensor, grad: Tensor | None) -> None:
        """`grad` is None at the last iterate, from which no step goes out, and in a search without
        gradients."""
        grad_best = None if grad is None else self.grad
        unchecked_keep_best_(loss, x_adv, grad, self.loss, self.x_adv, grad_best)


@dataclass
class Rows(PerRow):
    """The samples still attacked: all that the loop carries along, one row each."""

    x: Tensor
    x_adv: Tensor
    y: Tensor
    kappa: Tensor
    active: Tensor
    patience: Tensor
    reference_logits: Tensor | None
    target: Tensor | None  # of a loss that leads to a class
    group: Tensor | None  # rows of one group leave when one of them is fooled
    noise: Noise
    settings: Settings  # its per-sample parameters have these rows
    rule: StepRule
    looks: Tensor  # at the model, and steps, that each row has had
    steps: Tensor
    index: Tensor | None = None  # their places in the batch; None: all of it
    best: Best | None = None
    still: Tensor | None = None  # classified as y at this iterate
    stepper: Callable[..., None] | None = None  # of these very rows, see `ops.steps`

    def select(self, kept: Tensor) -> Rows:
        return replace(
            super().select(kept),
            noise=replace(self.noise, ids=self.noise.ids[kept]),
            settings=self.settings.select(kept, self.x),
            rule=self.rule.select(kept),
            best=self.best and self.best.select(kept),
            stepper=None,
            index=kept if self.index is None else self.index[kept],
        )


def _select(value: Any, kept: Tensor, x: Tensor) -> Any:
    """Per-sample parameters follow their rows; others (per channel, scalar) stay."""
    per_sample = (
        isinstance(value, Tensor)
        and value.dim() in (1, x.dim())
        and value.shape[0] == x.shape[0]
        and value.numel() > 1
    )
    return value[kept] if per_sample else value
