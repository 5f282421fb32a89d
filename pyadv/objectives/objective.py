"""The loss of one training step, composed of parts:

    objective = Objective(attack, base, weighting) + regulariser + ...
    loss = objective(model, x, y, epoch=e)

`base(step)` returns one loss per sample (B,), `weighting` one weight per sample with mean 1 (see
`weighting.py`), a regulariser one number that is added. The methods of the papers in `methods.py`
are such combinations.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyadv.attacks import FriendlyPGD
from pyadv.engine.attack import Attack
from pyadv.objectives.step import Schedule, Step, at_epoch, kept_buffers, process_group
from pyadv.objectives.terms import Term, cross_entropy
from pyadv.objectives.weighting import Weighting, batch_weights


class Objective:
    """mean_b(weight_b * base_b) + the regularisers.

    `objective(model, x, y, epoch=e, ids=None)` returns the scalar to call `.backward()` on. The
    model is in train mode, as in any training step; attacks set and restore the modes they need.
    `ids` (B,) int64 are the samples' indices in the training set: with them, keyed noise follows
    the sample. `objective + regulariser` is a new objective.

    Each attack runs once per step, before the first forward pass in train mode. A part that needs
    an attack besides the objective's own has a method `attacks(epoch)`, which returns a tuple of
    the attacks it needs in that epoch, and reads the result from `step.perturb(attack)`.

    Weights have mean 1 over the whole batch: over micro-batches in `prepare`, and over the batches
    of all processes that train the model. Their group is that of a DDP or FSDP wrapper in or around
    the model, compiled or not; where none is seen, as in a module that Lightning wraps from
    outside, it is the default group of torch.distributed once that is initialised. `group=` in a
    call names another one, and group=False keeps to this process. Unweighted terms are means over a
    process's batch, which DDP averages, so processes should have batches of equal size.

    Args:
        attack: the attack that makes the adversarial examples; None trains on x.
        base: one loss per sample.
        weighting: one weight per sample; None weighs all samples equally.
        tau: of a `FriendlyPGD`, a number or a function of the epoch; None keeps the attack's own.
        clean_first: always make the clean forward pass, and make it first, as most official codes
            do. The order of passes shows in BatchNorm's running statistics.
        ignore_index: label of samples that have none. They need an attack with loss="kl", whose
            loss does not read labels.

    Attributes:
        last: detached parts of the last step: x_adv, kappa (B,), logits, logits_adv, weights (B,),
            losses (B,) of the base, and loss; None for a part that the objective did not compute.
    """

    def __init__(
        self,
        attack: Attack | None,
        base: Term = cross_entropy,
        weighting: Weighting | None = None,
        *,
        tau: Schedule | None = None,
        clean_first: bool = False,
        ignore_index: int | None = None,
    ):
        if attack is not None and not isinstance(attack, Attack):
            raise TypeError(f"attack must be a pyadv attack, got {type(attack).__name__}")
        if weighting is not None and not hasattr(weighting, "values"):
            raise TypeError(
                "weighting must have the methods values(step) and weights(values, step), "
                f"got {type(weighting).__name__}"
            )
        if tau is not None and not isinstance(attack, FriendlyPGD):
            raise TypeError(f"tau is for a FriendlyPGD, got {type(attack).__name__}")
        if ignore_index is not None and not ascends_kl(attack):
            raise ValueError('ignore_index needs an attack with loss="kl"')
        self.attack = attack
        self.base = base
        self.weighting = weighting
        self.tau = tau
        self.clean_first = clean_first
        self.ignore_index = ignore_index
        self.regularisers: tuple[Callable[[Step], Tensor], ...] = ()
        self.last: dict[str, Any] = {}

    def __add__(self, regulariser: Callable[[Step], Tensor]) -> Objective:
        if not callable(regulariser) or isinstance(regulariser, (Objective, nn.Module)):
            raise TypeError(
                "an objective adds regularisers such as EMR(lam=...), "
                f"got {type(regulariser).__name__}"
            )
        total = copy.copy(self)
        total.regularisers = (*self.regularisers, regulariser)
        return total

    def __call__(
        self,
        model: Callable[..., Any],
        x: Tensor,
        y: Tensor,
        epoch: int = 1,
        ids: Tensor | None = None,
        *,
        group: Any = None,
    ) -> Tensor:
        return self.evaluate(self._step(model, x, y, epoch, ids, group=group))

    def attacks(self, epoch: int) -> tuple[Attack, ...]:
        """Return the attacks of a step in `epoch`, in the order in which they run: the objective's
        own, then those that its parts declare."""
        found = [] if self.attack is None else [self.attack]
        for part in self._parts().values():
            if part is not self.attack and hasattr(part, "attacks"):
                found += part.attacks(epoch)
        return tuple(dict.fromkeys(found))

    def prepare(
        self,
        model: Callable[..., Any],
        batches: Iterable[Sequence[Tensor]],
        epoch: int = 1,
        *,
        group: Any = None,
    ) -> MicroBatches:
        """Return a batch in parts, for gradient accumulation:

            parts = objective.prepare(model, [(x0, y0), (x1, y1), ...], epoch=e)
            for i in range(len(parts)):
                parts.loss(i).backward()

        The losses and gradients add up to those of the whole batch, instance weights included. Two
        things still see single micro-batches: BatchNorm layers in train mode, and AWP. The attacks
        run here. Weights that depend on the logits of the step (MAIL's) cost one more forward pass.

        Args:
            batches: (x, y) or (x, y, ids), at least one.
            group: as in a call.
        """
        batches = list(batches)
        total = sum(len(batch[0]) for batch in batches)
        steps = [
            self._step(model, x, y, epoch, ids, total=total, group=group)
            for x, y, ids in (_batch(*batch) for batch in batches)
        ]
        if not steps:
            raise ValueError("prepare: batches must not be empty")
        for attack in self.attacks(epoch):  # one draw of the noise, as for one batch
            draw = attack.draw
            for step in steps:
                step.perturb(attack, draw)
            attack.draw += 1
        everywhere = steps[0].samples_everywhere  # now: processes may have unequal numbers of parts
        for step in steps:
            step.samples_everywhere = everywhere
        if self.weighting is not None:
            with torch.no_grad(), kept_buffers(model):
                values = [self.weighting.values(step.again()) for step in steps]
            given = [v for v in values if v is not None]
            if values[0] is not None:
                weights = batch_weights(self.weighting, torch.cat(given), steps[0])
                for step, part in zip(steps, weights.split([len(v) for v in given]), strict=True):
                    step.weights = part
        return MicroBatches(self, steps)

    def evaluate(self, step: Step) -> Tensor:
        """Return the loss of a step; for a micro-batch, its part of the whole batch's loss."""
        self.run_attacks(step)
        if self.clean_first:
            step.need("logits")
        losses = self.base(step)
        weights = self._weights(step)
        loss = losses.mean() if weights is None else (weights * losses).mean()
        for regulariser in self.regularisers:
            loss = loss + regulariser(step)
        loss = loss * (len(step.x) / step.samples)
        self.last = {
            "x_adv": None if step.attack is None else step.x_train,
            "kappa": step.kappa,
            "logits": _detached(step.made("logits")),
            "logits_adv": _detached(step.made("logits_adv")),
            "weights": weights,
            "losses": losses.detach(),
            "loss": loss.detach(),
        }
        return loss

    def run_attacks(self, step: Step) -> None:
        """Run the attacks that the objective and its parts declare, unless they ran already."""
        for attack in self.attacks(step.epoch):
            step.perturb(attack)

    def state_dict(self) -> dict[str, Any]:
        """Return the states of the parts that have one: the attacks' draw counters, the vectors of
        power iterations."""
        return {name: part.state_dict() for name, part in self._stateful().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        for name, part in self._stateful().items():
            part.load_state_dict(state[name])

    def _parts(self) -> dict[str, Any]:
        parts = {"attack": self.attack, "base": self.base, "weighting": self.weighting}
        return parts | {f"regulariser{i}": r for i, r in enumerate(self.regularisers)}

    def _stateful(self) -> dict[str, Any]:
        return {name: part for name, part in self._parts().items() if hasattr(part, "state_dict")}

    def _step(
        self,
        model: Callable[..., Any],
        x: Tensor,
        y: Tensor,
        epoch: int,
        ids: Tensor | None = None,
        total: int | None = None,
        group: Any = None,
    ) -> Step:
        if isinstance(epoch, bool) or not isinstance(epoch, int) or epoch < 1:
            raise ValueError(f"epoch must be an integer >= 1, got {epoch!r}")
        _check_labels_fit(x, y)
        if self.tau is not None and isinstance(self.attack, FriendlyPGD):
            self.attack.tau = at_epoch(self.tau, epoch)
        step = Step(
            model,
            x,
            y,
            epoch,
            ids,
            self.attack,
            None if self.attack is None else self.attack.settings.output,
            self.ignore_index,
            total,
            group=process_group(model, group),
        )
        step.check_labels()
        return step

    def _weights(self, step: Step) -> Tensor | None:
        if self.weighting is None or step.weights is not None:
            return step.weights
        values = self.weighting.values(step)
        return None if values is None else batch_weights(self.weighting, values, step)


class MicroBatches:
    """A batch in parts, as `Objective.prepare` returns it. Call `loss(i)` once for each part."""

    def __init__(self, objective: Objective, steps: list[Step]):
        self.objective, self.steps = objective, steps

    def __len__(self) -> int:
        return len(self.steps)

    def loss(self, i: int) -> Tensor:
        """Return part i of the whole batch's loss, to call `.backward()` on."""
        return self.objective.evaluate(self.steps[i].again())  # forward passes are not kept


def ascends_kl(attack: Attack | None) -> bool:
    """Return whether the attack maximises the divergence from the natural prediction, as TRADES'
    does."""
    return attack is not None and attack.settings.loss.needs_reference_logits


def _batch(x: Tensor, y: Tensor, ids: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
    return x, y, ids


def _check_labels_fit(x: Tensor, y: Tensor) -> None:
    """Raise an error unless y has one int64 label or one row of probabilities per sample."""
    for name, value in (("x", x), ("y", y)):
        if not isinstance(value, Tensor):
            raise TypeError(f"objective: {name} must be a tensor, got {type(value).__name__}")
    if not x.dim():
        raise ValueError("objective: x must have a batch dimension, got a 0-dim tensor")
    soft = y.is_floating_point() and y.dim() == 2
    if not soft and y.dtype != torch.int64:
        raise TypeError(f"objective: y must be an int64 tensor, got {y.dtype}")
    if len(y.shape) != 1 + soft or len(y) != len(x):
        raise ValueError(
            f"objective: y must have shape [{len(x)}], one label per sample of x, "
            f"got {list(y.shape)}"
        )


def _detached(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.detach()
