"""foolbox's attacks, as far as pyadv has them. A class that it does not have can be imported, and
says when it is constructed which of ours is nearest."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from pyadv import attacks, ops
from pyadv.attacks.deepfool import BoundaryNorm
from pyadv.compat._missing import missing_classes
from pyadv.compat.foolbox.criteria import Criterion, Misclassification, TargetedMisclassification
from pyadv.compat.foolbox.models import PyTorchModel, unwrapped
from pyadv.engine import checks
from pyadv.engine.attack import Attack as NativeAttack
from pyadv.engine.loop import predict
from pyadv.engine.norms import distance
from pyadv.engine.starts import Start
from pyadv.menus import AnyNorm
from pyadv.tensors import per_row

_ALL_CLASSES = 10**6  # more classes than a model has


class Attack:
    """The base of attacks.

    `attack(model, inputs, criterion, epsilons=...)` returns (raw, clipped, success): what the
    attack found, the same moved into the ball of radius epsilon, and which clipped inputs are
    adversarial (B,) bool. With a list of K epsilons these are two lists and (K, B).
    """

    norm: AnyNorm
    times = 1

    def __call__(
        self,
        model: PyTorchModel,
        inputs: Any,
        criterion: Criterion | Any,
        *,
        epsilons: Iterable[float | None] | float | None,
    ) -> tuple[Any, Any, Any]:
        """Attack inputs in the model's bounds.

        Args:
            criterion: labels (B,), `Misclassification` or `TargetedMisclassification`.
            epsilons: one radius or several. None, for minimum-norm attacks, means any.
        """
        x, wrap = unwrapped(inputs)
        if not isinstance(criterion, Criterion):
            criterion = Misclassification(criterion)
        if isinstance(criterion, Misclassification):
            y, targeted = criterion.labels, False
        elif isinstance(criterion, TargetedMisclassification):
            y, targeted = criterion.target_classes, True
        else:
            raise ValueError(
                "criterion must be labels, Misclassification or TargetedMisclassification, got "
                f"{type(criterion).__name__}"
            )
        several = isinstance(epsilons, Iterable)
        radii = list(epsilons) if isinstance(epsilons, Iterable) else [epsilons]
        best: list[tuple[Tensor, Tensor, Tensor]] = []
        for _ in range(self.times):
            found = self._found(model, x, y, targeted, criterion, radii)
            best = (
                found
                if not best
                else [
                    _better(x, self.norm, eps, before, now)
                    for eps, before, now in zip(radii, best, found, strict=True)
                ]
            )
        raw, clipped, success = zip(*best, strict=True)
        if several:
            return [*map(wrap, raw)], [*map(wrap, clipped)], wrap(torch.stack(success))
        return wrap(raw[0]), wrap(clipped[0]), wrap(success[0])

    def repeat(self, times: int) -> Attack:
        """Return an attack that runs so often, and keeps the best result of each sample."""
        repeated = copy.copy(self)
        repeated.times = self.times * checks.count("times", times, 1)
        return repeated

    def _found(
        self,
        model: PyTorchModel,
        x: Tensor,
        y: Tensor,
        targeted: bool,
        criterion: Criterion,
        radii: list[float | None],
    ) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Return (raw, clipped, success) for each radius."""
        raise NotImplementedError

    def _judged(
        self,
        attack: NativeAttack,
        model: PyTorchModel,
        x: Tensor,
        raw: Tensor,
        eps: float | None,
        criterion: Criterion,
    ) -> tuple[Tensor, Tensor, Tensor]:
        clipped = raw if eps is None else _clipped(raw, x, eps, self.norm, model)
        return raw, clipped, criterion(clipped, predict(model, clipped, attack.settings))

    def __repr__(self) -> str:
        settings = ", ".join(f"{k}={v}" for k, v in vars(self).items())
        return f"{type(self).__name__}({settings})"


def _clipped(raw: Tensor, x: Tensor, eps: float, norm: AnyNorm, model: PyTorchModel) -> Tensor:
    """Return `raw` moved towards x into the ball. An L0 perturbation cannot be made smaller, so x
    takes the place of one that is too large."""
    if norm == "Linf":
        return ops.linf_project(raw, x, eps, *model.bounds)
    size = distance(raw, x, norm)
    if norm == "L0":
        return torch.where(per_row(size <= eps, x), raw, x)
    factor = eps / size.clamp_min(torch.finfo(size.dtype).tiny)
    nearer = x + (raw - x) * per_row(factor, x).to(x.dtype)
    return torch.where(per_row(size <= eps, x), raw, nearer)


def _better(
    x: Tensor,
    norm: AnyNorm,
    eps: float | None,
    before: tuple[Tensor, Tensor, Tensor],
    now: tuple[Tensor, Tensor, Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the result that is a success, without a radius the nearer one."""
    take = now[2] & ~before[2]
    if eps is None:
        take |= now[2] & (distance(now[0], x, norm) < distance(before[0], x, norm))
    rows = per_row(take, x)
    raw, clipped = (torch.where(rows, b, a) for a, b in zip(before[:2], now[:2], strict=True))
    return raw, clipped, before[2] | now[2]


# --- attacks in a ball of given radius


class _Descent(Attack):
    """The base of attacks that make steps of rel_stepsize * epsilon, or of abs_stepsize.

    Args:
        rel_stepsize: step size in units of epsilon.
        abs_stepsize: step size in units of the inputs, if given.
        steps: number of steps.
        random_start: begin at a random point of the ball, from torch's generator.
    """

    rel_stepsize = 0.025
    steps = 50
    random_start = True

    def __init__(
        self,
        *,
        rel_stepsize: float | None = None,
        abs_stepsize: float | None = None,
        steps: int | None = None,
        random_start: bool | None = None,
    ):
        kind = type(self)
        self.rel_stepsize = kind.rel_stepsize if rel_stepsize is None else rel_stepsize
        self.abs_stepsize = abs_stepsize
        self.steps = kind.steps if steps is None else steps
        self.random_start = kind.random_start if random_start is None else random_start

    def _found(
        self,
        model: PyTorchModel,
        x: Tensor,
        y: Tensor,
        targeted: bool,
        criterion: Criterion,
        radii: list[float | None],
    ) -> list[tuple[Tensor, Tensor, Tensor]]:
        given = [eps for eps in radii if eps is not None]
        if len(given) < len(radii):
            raise ValueError(
                f"{type(self).__name__} needs a radius, got epsilons={radii}; minimum-norm attacks "
                "take None"
            )
        lower, upper = model.bounds
        found = []
        for eps in given:
            alpha = self.rel_stepsize * eps if self.abs_stepsize is None else self.abs_stepsize
            attack = self._native(
                model,
                norm=self.norm,
                eps=eps,
                alpha=alpha,
                steps=self.steps,
                start=self._start(eps, lower, upper) if self.random_start else "none",
                targeted=targeted,
                lo=lower,
                hi=upper,
                grad_mode="autograd",
                scale="exact",
            )
            found.append(self._judged(attack, model, x, attack(x, y), eps, criterion))
        return found

    def _native(self, model: PyTorchModel, **settings: Any) -> NativeAttack:
        return attacks.PGD(model, **settings)

    def _start(self, eps: float, lower: float, upper: float) -> Start:
        """Return foolbox's random start, with its draws."""

        def start(x: Tensor) -> Tensor:
            like: dict[str, Any] = {"dtype": x.dtype, "device": x.device}
            if self.norm == "Linf":
                return (x + (torch.rand(x.shape, **like) * 2 * eps - eps)).clamp(lower, upper)
            b, n = x.flatten(1).shape
            if self.norm == "L2":
                normal = torch.randn(b, n + 2, **like)
                unit = (normal / normal.norm(dim=1, keepdim=True))[:, :n]
            else:
                ordered = torch.rand(b, n, **like).sort(1).values
                gaps = ordered.diff(dim=1, prepend=torch.zeros(b, 1, **like))
                unit = torch.sign(torch.rand(b, n, **like) * 2 - 1) * gaps
            return (x + eps * unit.view(x.shape)).clamp(lower, upper)

        return start


class LinfProjectedGradientDescentAttack(_Descent):
    """PGD in Linf."""

    norm, rel_stepsize, steps = "Linf", 0.01 / 0.3, 40


class L2ProjectedGradientDescentAttack(_Descent):
    """PGD in L2."""

    norm = "L2"


class L1ProjectedGradientDescentAttack(_Descent):
    """PGD in L1, whose steps move the coordinates with the largest gradients; foolbox moves all."""

    norm = "L1"


class LinfBasicIterativeAttack(_Descent):
    """PGD in Linf from the inputs."""

    norm: AnyNorm = "Linf"
    rel_stepsize, steps, random_start = 0.2, 10, False


class L2BasicIterativeAttack(LinfBasicIterativeAttack):
    """PGD in L2 from the inputs."""

    norm = "L2"


class L1BasicIterativeAttack(LinfBasicIterativeAttack):
    """PGD in L1 from the inputs, with the steps of `L1ProjectedGradientDescentAttack`."""

    norm = "L1"


class LinfFastGradientAttack(_Descent):
    """One step of size epsilon in Linf: FGSM."""

    norm: AnyNorm = "Linf"

    def __init__(self, *, random_start: bool = False):
        super().__init__(rel_stepsize=1.0, steps=1, random_start=random_start)


class L2FastGradientAttack(LinfFastGradientAttack):
    """One step of size epsilon in L2."""

    norm = "L2"


class L1FastGradientAttack(LinfFastGradientAttack):
    """One step of size epsilon in L1."""

    norm = "L1"


class LinfMomentumIterativeFastGradientMethod(LinfBasicIterativeAttack):
    """MI-FGSM: steps along the decaying sum of gradients, each divided by its mean magnitude as in
    the paper; foolbox sums their signs.

    Args:
        momentum: the decay.
    """

    def __init__(self, *, momentum: float = 1.0, **settings: Any):
        self.momentum = momentum
        super().__init__(**settings)

    def _native(self, model: PyTorchModel, **settings: Any) -> NativeAttack:
        return attacks.MIFGSM(model, decay=self.momentum, **settings)


class L2MomentumIterativeFastGradientMethod(LinfMomentumIterativeFastGradientMethod):
    """MI-FGSM in L2."""

    norm = "L2"


class L1MomentumIterativeFastGradientMethod(LinfMomentumIterativeFastGradientMethod):
    """MI-FGSM in L1."""

    norm = "L1"


# --- attacks that look for the nearest point


class _Minimum(Attack):
    """The base of attacks that look for the nearest point."""

    def _found(
        self,
        model: PyTorchModel,
        x: Tensor,
        y: Tensor,
        targeted: bool,
        criterion: Criterion,
        radii: list[float | None],
    ) -> list[tuple[Tensor, Tensor, Tensor]]:
        lower, upper = model.bounds
        settings = {"targeted": True} if targeted else {}
        attack = self._native(model, lo=lower, hi=upper, **settings)
        raw = attack(x, y)
        return [self._judged(attack, model, x, raw, eps, criterion) for eps in radii]

    def _native(self, model: PyTorchModel, **settings: Any) -> NativeAttack:
        raise NotImplementedError


class L2CarliniWagnerAttack(_Minimum):
    """Carlini and Wagner's attack in L2."""

    norm = "L2"

    def __init__(
        self,
        binary_search_steps: int = 9,
        steps: int = 10_000,
        stepsize: float = 1e-2,
        confidence: float = 0,
        initial_const: float = 1e-3,
        abort_early: bool = True,
    ):
        self.binary_search_steps, self.steps, self.stepsize = binary_search_steps, steps, stepsize
        self.confidence, self.initial_const = confidence, initial_const
        self.abort_early = abort_early

    def _native(self, model: PyTorchModel, **settings: Any) -> NativeAttack:
        return attacks.CW(
            model,
            searches=self.binary_search_steps,
            steps=self.steps,
            lr=self.stepsize,
            confidence=self.confidence,
            c=self.initial_const,
            abort_early=self.abort_early,
            **settings,
        )


class L2DeepFoolAttack(_Minimum):
    """DeepFool in L2.

    Args:
        candidates: how many classes to look at, those that the model ranks highest; None for all.
        loss: must be "logits".
    """

    norm: BoundaryNorm = "L2"

    def __init__(
        self,
        *,
        steps: int = 50,
        candidates: int | None = 10,
        overshoot: float = 0.02,
        loss: str = "logits",
    ):
        checks.choice("loss", loss, ("logits",))
        self.steps, self.candidates, self.overshoot, self.loss = steps, candidates, overshoot, loss

    def _native(self, model: PyTorchModel, **settings: Any) -> NativeAttack:
        if "targeted" in settings:
            raise ValueError("DeepFool takes the nearest boundary: criterion must be labels")
        classes = _ALL_CLASSES if self.candidates is None else self.candidates
        return attacks.DeepFool(
            model,
            norm=self.norm,
            steps=self.steps,
            overshoot=self.overshoot,
            classes=classes,
            **settings,
        )


class LinfDeepFoolAttack(L2DeepFoolAttack):
    """DeepFool in Linf."""

    norm = "Linf"


class DDNAttack(_Minimum):
    """DDN in L2."""

    norm = "L2"

    def __init__(self, *, init_epsilon: float = 1.0, steps: int = 100, gamma: float = 0.05):
        self.init_epsilon, self.steps, self.gamma = init_epsilon, steps, gamma

    def _native(self, model: PyTorchModel, **settings: Any) -> NativeAttack:
        return attacks.DDN(
            model, start_radius=self.init_epsilon, steps=self.steps, gamma=self.gamma, **settings
        )


class LInfFMNAttack(_Minimum):
    """FMN in Linf.

    Args:
        max_stepsize: the first step size; pyadv's default for the norm by default.
    """

    norm: AnyNorm = "Linf"

    def __init__(self, *, steps: int = 100, max_stepsize: float | None = None, gamma: float = 0.05):
        self.steps, self.max_stepsize, self.gamma = steps, max_stepsize, gamma

    def _native(self, model: PyTorchModel, **settings: Any) -> NativeAttack:
        return attacks.FMN(
            model,
            norm=self.norm,
            steps=self.steps,
            alpha=self.max_stepsize,
            gamma=self.gamma,
            **settings,
        )


class L2FMNAttack(LInfFMNAttack):
    """FMN in L2."""

    norm = "L2"


class L1FMNAttack(LInfFMNAttack):
    """FMN in L1."""

    norm = "L1"


class L0FMNAttack(LInfFMNAttack):
    """FMN in L0."""

    norm = "L0"


FGM = L2FastGradientAttack
FGSM = LinfFastGradientAttack
L1PGD = L1ProjectedGradientDescentAttack
L2PGD = L2ProjectedGradientDescentAttack
LinfPGD = LinfProjectedGradientDescentAttack
PGD = LinfPGD
MIFGSM = LinfMomentumIterativeFastGradientMethod

_NO_GRADIENTS = "pyadv.attacks.Square, which needs no gradients either"
_NEAREST = {
    "BoundaryAttack": _NO_GRADIENTS,
    "HopSkipJumpAttack": _NO_GRADIENTS,
    "GenAttack": _NO_GRADIENTS,
    "PointwiseAttack": _NO_GRADIENTS,
    "SpatialAttack": _NO_GRADIENTS,
    "SaltAndPepperNoiseAttack": "pyadv.attacks.SigmaZero, an attack in L0",
    "L0BrendelBethgeAttack": "L0FMNAttack",
    "L1BrendelBethgeAttack": "L1FMNAttack",
    "L2BrendelBethgeAttack": "L2FMNAttack",
    "LinfinityBrendelBethgeAttack": "LInfFMNAttack",
    "EADAttack": "L1FMNAttack",
    "NewtonFoolAttack": "L2DeepFoolAttack",
    "SparseL1DescentAttack": "L1ProjectedGradientDescentAttack, whose steps are sparse",
    "VirtualAdversarialAttack": 'pyadv.attacks.PGD(norm="L2", loss="kl")',
}
for _norm in ("L1", "L2", "Linf"):
    for _kind in ("ProjectedGradientDescent", "BasicIterative"):
        _NEAREST[f"{_norm}Adam{_kind}Attack"] = f"{_norm}{_kind}Attack"
    _NEAREST[f"{_norm}AdamPGD"] = f"{_norm}PGD"


__getattr__ = missing_classes(__name__, _NEAREST)
