"""What one training step minimises, put together from parts:

    objective = Objective(attack, base, weighting) + regulariser + ...
    loss = objective(model, x, y, epoch=e)

`base(step)` gives one loss per sample (B,), `weighting` one weight per sample with mean 1 (see
`weighting.py`), a regulariser one number that is added. The methods of the papers are such
combinations, see `methods.py`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyadv.attacks import FriendlyPGD
from pyadv.engine.attack import GradientAttack
from pyadv.objectives.rows import Rows, cross_entropy
from pyadv.objectives.step import Schedule, Step, at_epoch, kept_buffers, process_group
from pyadv.objectives.weighting import Weighting, batch_weights


class Objective:
    """mean_b(weight_b * base_b) + the regularisers.

    `objective(model, x, y, epoch=e, ids=None)` returns the scalar to call `.backward()` on. The
    model is in train mode, as for any training step; the attack sets and restores the modes it
    needs. `ids` (B,) int64 are the samples' indices in the training set: with them, keyed noise
    follows the sample. `objective + regulariser` is a new objective.

    Weights have mean 1 over the whole batch: over the batches of all processes where the model is
    a DistributedDataParallel one, and over micro-batches by `prepare`. Terms without weights are
    means over a process's batch, which DDP averages: they want batches of one size.

    Args:
        attack: what makes the adversarial examples; None trains on x.
        base: one loss per sample.
        weighting: one weight per sample; None weighs all the same.
        tau: of a `FriendlyPGD`, a number or a function of the epoch; None keeps the attack's own.
        clean_first: the clean forward pass comes first and always, as in the official codes: the
            order shows in the running statistics of BatchNorm.
        ignore_index: label of samples that have none. They need an attack with loss="kl", which
            does not look at labels.

    Attributes:
        last: detached parts of the last step: x_adv, kappa (B,), logits, logits_adv, weights (B,),
            rows (B,), loss; None for what the objective did not need.
    """

    def __init__(
        self,
        attack: GradientAttack | None,
        base: Rows = cross_entropy,
        weighting: Weighting | None = None,
        *,
        tau: Schedule | None = None,
        clean_first: bool = False,
        ignore_index: int | None = None,
    ):
        if attack is not None and not isinstance(attack, GradientAttack):
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
    ) -> Tensor:
        return self.evaluate(self._step(model, x, y, epoch, ids))

    def prepare(
        self, model: Callable[..., Any], batches: Iterable[Sequence[Tensor]], epoch: int = 1
    ) -> MicroBatches:
        """A batch in parts, for gradient accumulation:

            parts = objective.prepare(model, [(x0, y0), (x1, y1), ...], epoch=e)
            for i in range(len(parts)):
                parts.loss(i).backward()

        The losses and gradients add up to those of the whole batch, instance weights included
        (BatchNorm layers in train mode and AWP still see the micro-batches). The attacks run here.
        Weights that depend on the network's output of the step (MAIL's) cost one forward pass more.

        Args:
            batches: (x, y) or (x, y, ids), not empty.
        """
        batches = list(batches)
        total = sum(len(batch[0]) for batch in batches)
        steps = [self._step(model, *batch[:2], epoch, *batch[2:], total=total) for batch in batches]
        if not steps:
            raise ValueError("prepare: batches must not be empty")
        if self.attack is not None:  # one draw of the noise, as for one batch
            for step in steps:
                step.draw = self.attack.draw
                step.need("perturbed")
            self.attack.draw += 1
        if self.weighting is not None:
            with torch.no_grad(), kept_buffers(model):
                values = [self.weighting.values(step.again()) for step in steps]
            if values[0] is not None:
                weights = batch_weights(self.weighting, torch.cat(values), steps[0])
                for step, part in zip(steps, weights.split([len(v) for v in values]), strict=True):
                    step.weights = part
        return MicroBatches(self, steps)

    def evaluate(self, step: Step) -> Tensor:
        """The loss of a step; of a part of a batch, its part of the whole batch's loss."""
        step.need("perturbed")  # before a pass in train mode moves the running statistics
        if self.clean_first:
            step.need("logits")
        rows = self.base(step)
        weights = self._weights(step)
        loss = rows.mean() if weights is None else (weights * rows).mean()
        for regulariser in self.regularisers:
            loss = loss + regulariser(step)
        loss = loss * (len(step.x) / step.samples)
        self.last = {
            "x_adv": None if step.attack is None else step.x_train,
            "kappa": step.kappa,
            "logits": _detached(step.made("logits")),
            "logits_adv": _detached(step.made("logits_adv")),
            "weights": weights,
            "rows": rows.detach(),
            "loss": loss.detach(),
        }
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Of the parts that have one: attacks' draw counters, vectors of power iteration."""
        return {name: part.state_dict() for name, part in self._stateful().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, part in self._stateful().items():
            part.load_state_dict(state[name])

    def _stateful(self) -> dict[str, Any]:
        parts = {"attack": self.attack, "base": self.base, "weighting": self.weighting}
        parts |= {f"regulariser{i}": r for i, r in enumerate(self.regularisers)}
        return {name: part for name, part in parts.items() if hasattr(part, "state_dict")}

    def _step(
        self,
        model: Callable[..., Any],
        x: Tensor,
        y: Tensor,
        epoch: int,
        ids: Tensor | None = None,
        total: int | None = None,
    ) -> Step:
        if isinstance(epoch, bool) or not isinstance(epoch, int) or epoch < 1:
            raise ValueError(f"epoch counts from 1, got {epoch!r}")
        if self.tau is not None:
            self.attack.tau = at_epoch(self.tau, epoch)
        output = None if self.attack is None else self.attack.settings.output
        return Step(
            model,
            x,
            y,
            epoch,
            ids,
            self.attack,
            output,
            self.ignore_index,
            total,
            group=process_group(model),
        )

    def _weights(self, step: Step) -> Tensor | None:
        if self.weighting is None or step.weights is not None:
            return step.weights
        values = self.weighting.values(step)
        return None if values is None else batch_weights(self.weighting, values, step)


class MicroBatches:
    """What `Objective.prepare` returns: `loss(i)` of each part, once each."""

    def __init__(self, objective: Objective, steps: list[Step]):
        self.objective, self.steps = objective, steps

    def __len__(self) -> int:
        return len(self.steps)

    def loss(self, i: int) -> Tensor:
        """Part i of the whole batch's loss, to call `.backward()` on."""
        return self.objective.evaluate(self.steps[i].again())  # forward passes are not kept


def ascends_kl(attack: GradientAttack | None) -> bool:
    """Whether the attack leads away from the natural prediction, as TRADES' does."""
    return attack is not None and attack.settings.loss.needs_reference_logits


def _detached(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.detach()
