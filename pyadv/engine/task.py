"""The arguments of one search: the settings of the attack and the batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, overload

from torch import Tensor

from pyadv.engine import starts
from pyadv.engine.losses import Loss
from pyadv.engine.starts import AnyStart, Noise
from pyadv.menus import AnyBest, AnyNorm, Auto, BatchNormMode, Speed
from pyadv.passes.borrow import Output

if TYPE_CHECKING:
    from pyadv.engine.rules import StepRule

Model = Callable[..., Any]
FloatOrTensor = float | Tensor


def memory() -> Any:
    """Return the default of a dataclass field that is filled after construction, by `begin` of a
    step rule or by the loop, and only read from then on. It is None until then."""
    return field(default=None)


# The default step size, in eps: the length of all steps together, and the bounds of one step.
_WAY: dict[AnyNorm, float] = {"Linf": 2.5, "L2": 5.0, "L1": 10.0}
_LEAST, _MOST = 0.1, 1.0


@overload
def radius(eps: float | None, norm: AnyNorm, default: float = ...) -> float: ...
@overload
def radius(eps: FloatOrTensor | None, norm: AnyNorm, default: float = ...) -> FloatOrTensor: ...
def radius(eps: FloatOrTensor | None, norm: AnyNorm, default: float = 8 / 255) -> FloatOrTensor:
    """Return eps, or for None the default, which is a radius in Linf. Raise ValueError for None in
    another norm."""
    if eps is not None:
        return eps
    if norm != "Linf":
        raise ValueError(
            f"eps must be given for norm {norm}: its default, {default:.4g}, is in Linf"
        )
    return default


def step_size(eps: FloatOrTensor, norm: AnyNorm, steps: int) -> FloatOrTensor:
    """Return the step size of PGD where none is given.

    It is eps * c / steps with c = 2.5 in Linf, 5 in L2 and 10 in L1, but at least eps / 10 and at
    most eps. With 10 steps this is eps / 4 in Linf.

    For 5 to 100 steps on the embedded data, it is within 1 point of robust accuracy of the best of
    eps / 2, eps / 4 and eps / 10 in every norm; docs/attacks.md has the table.
    """
    return eps * min(max(_WAY[norm] / max(steps, 1), _LEAST), _MOST)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings that every attack has. The public classes document and fill the fields.

    `steps` counts iterations (queries, for Square), `start` names or computes the first iterate,
    and `start_from` is the function that `start` is an argument of. `speed` chooses the network
    that the search runs on, see `pyadv.passes.view`.
    """

    norm: AnyNorm
    eps: FloatOrTensor
    steps: int
    loss: Loss
    start: AnyStart
    lo: FloatOrTensor | None = 0.0
    hi: FloatOrTensor | None = 1.0
    compact: Auto = "auto"
    output: Output = None
    validate: Auto = "auto"
    start_from: Callable[..., Tensor] = starts.start
    bn: BatchNormMode = "eval"
    update_stats: bool = False
    speed: Speed = "exact"

    sizes: ClassVar[tuple[str, ...]] = ("eps",)  # radii and step sizes, all >= 0
    per_sample: ClassVar[tuple[str, ...]] = ("eps", "lo", "hi")  # may hold one value per sample

    @property
    def parameters(self) -> dict[str, FloatOrTensor | None]:
        """The settings that may hold one value per sample, by name."""
        return {name: getattr(self, name) for name in self.per_sample}

    def checks_values(self, x: Tensor) -> bool:
        """Return whether to read values of tensors, for which the host waits on a GPU."""
        return self.validate is True or (self.validate == "auto" and x.device.type == "cpu")

    def select(self, kept: Tensor, x: Tensor) -> Settings:
        """Return the settings of the rows `kept` of x: per-sample values follow their rows."""
        return replace(self, **{k: _select(v, kept, x) for k, v in self.parameters.items()})


@dataclass(frozen=True, kw_only=True)
class LoopSettings(Settings):
    """The settings that `pyadv.engine.loop` reads in addition.

    `patience` is the number of fooled iterates after which a sample is released, `best` the iterate
    that is the result ("nearest": the one nearest to x among those that fool the model), `eot` the
    number of forward passes, and gradients, averaged at each iterate.
    """

    rule: StepRule
    patience: int
    best: AnyBest = "last"
    eot: int = 1

    @property
    def releases(self) -> bool:
        """Whether samples can leave the attack before its end."""
        return self.patience < self.steps or self.best == "nearest"


@dataclass(frozen=True, kw_only=True)
class GradientSettings(LoopSettings):
    """The settings that rules with gradient steps read in addition: the step size `alpha`, and
    `keep`, the share of the coordinates that an L1 step moves."""

    alpha: FloatOrTensor
    keep: FloatOrTensor = 0.2

    sizes: ClassVar[tuple[str, ...]] = ("eps", "alpha")
    per_sample: ClassVar[tuple[str, ...]] = ("eps", "alpha", "lo", "hi", "keep")


@dataclass(frozen=True)
class Task:
    """One batch under attack.

    Attributes:
        model: what maps x to logits; the user's model, or the view of it that is searched.
        x, y: inputs (B, ...) and labels (B,) int64; the targets of a targeted attack.
        settings: those of the attack, with per-sample values for these rows.
        noise: the keyed noise of this call.
        target: (B,) classes, for a loss that leads to one.
        group: (B,) numbers in 0 .. B - 1. Rows with the same number are attempts at one sample:
            with best="fooled" all of them are released when one has fooled the model.
        first: (B, ...) the iterate that the search starts from, once it is drawn. The steps write
            into it.
    """

    model: Model
    x: Tensor
    y: Tensor
    settings: Any  # Settings, or the subclass that the search of the attack reads
    noise: Noise
    target: Tensor | None = None
    group: Tensor | None = None
    first: Tensor = memory()

    def select(self, kept: Tensor) -> Task:
        """Return the task of the rows `kept` (indices), which then stand alone: without groups."""
        return replace(
            self,
            x=self.x[kept],
            y=self.y[kept],
            settings=self.settings.select(kept, self.x),
            noise=replace(self.noise, ids=self.noise.ids[kept]),
            target=None if self.target is None else self.target[kept],
            group=None,
            first=None if self.first is None else self.first[kept],
        )


def _select(value: Any, kept: Tensor, x: Tensor) -> Any:
    """Return the rows `kept` of a per-sample value; other values (per channel, scalar) as they
    are."""
    per_sample = (
        isinstance(value, Tensor)
        and value.dim() in (1, x.dim())
        and value.shape[0] == x.shape[0]
        and value.numel() > 1
    )
    return value[kept] if per_sample else value
