"""One training step, as the parts of an objective see it.

A `Step` holds the batch and computes adversarial examples and logits when a part first asks for
them. Each of them is computed once and shared by all parts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pyadv.attacks import Perturbed
from pyadv.engine.attack import Attack
from pyadv.engine.loop import predict
from pyadv.engine.task import LoopSettings
from pyadv.passes.borrow import Output, pick_logits

Schedule = float | Callable[[int], float]


def at_epoch(value: Schedule, epoch: int) -> float:
    """Return `value`, or `value(epoch)` if it is a function of the epoch (counted from 1)."""
    return value(epoch) if callable(value) else value


@dataclass
class Step:
    """The batch of one training step, with what the objective has computed for it so far.

    `perturbed`, `logits` and `logits_adv` are computed at their first use and kept. Attacks come
    before forward passes: a pass in train mode moves the running statistics of BatchNorm, so an
    attack after it would attack another model. `perturb` raises an error in that case. `Objective`
    runs all attacks that its parts declare before it calls the parts.

    Args:
        model: the model that is trained, in train mode.
        x: (B, ...) inputs.
        y: (B,) int64 labels.
        epoch: counted from 1.
        ids: (B,) int64, the samples' indices in the training set, for keyed noise.
        attack: the objective's attack; None trains on x itself.
        output: how to find the logits in what the model returns.
        ignore_index: label of samples that have none; None if all have one.
        total: number of samples of the batch that x is a part of; None if x is the whole batch.
        weights: (B,) instance weights, if they are known before the step.
        group: group of the processes that train the model together; None for a single process.
    """

    model: Callable[..., Any]
    x: Tensor
    y: Tensor
    epoch: int
    ids: Tensor | None = None
    attack: Attack | None = None
    output: Output = None
    ignore_index: int | None = None
    total: int | None = None
    weights: Tensor | None = None
    group: Any = None
    _found: dict[Attack, Perturbed] = field(default_factory=dict, init=False, repr=False)
    _passed: bool = field(default=False, init=False, repr=False)

    def perturb(self, attack: Attack, draw: int | None = None) -> Perturbed:
        """Return what `attack` finds for this batch. The attack runs at the first call only.

        Samples without a label are attacked at the model's natural prediction; their kappa is 0.

        Args:
            draw: draw of the keyed noise; None takes the attack's own counter and advances it.

        Raises:
            RuntimeError: the attack has not run and the step has made a forward pass already.
        """
        if attack not in self._found:
            if self._passed:
                raise RuntimeError(
                    "an attack must run before the first forward pass of its step, which moves the "
                    "running statistics of BatchNorm; give the part of the objective that needs "
                    "it a method attacks(epoch) that returns the attack"
                )
            y = self._labels_for(attack)
            found = attack.perturb(self.x, y, self.ids, draw, self.model)
            if self.ignore_index is not None:
                found = replace(found, kappa=found.kappa.where(self.labelled, 0))
            self._found[attack] = found
        return self._found[attack]

    @property
    def perturbed(self) -> Perturbed | None:
        """What the objective's attack found; None without an attack."""
        return None if self.attack is None else self.perturb(self.attack)

    @property
    def x_train(self) -> Tensor:
        """The inputs to train on: the adversarial examples, or x without an attack."""
        return self.x if self.perturbed is None else self.perturbed.x_adv

    @property
    def kappa(self) -> Tensor | None:
        """(B,) int64 geometry values; None without an attack."""
        return None if self.perturbed is None else self.perturbed.kappa

    @property
    def labelled(self) -> Tensor:
        """(B,) bool: the samples that have a label."""
        if self.ignore_index is None:
            return torch.ones_like(self.y, dtype=torch.bool)
        return self.y != self.ignore_index

    @cached_property
    def logits(self) -> Tensor:
        """Logits of x, in the model's own mode."""
        return self.forward(self.x)

    @cached_property
    def logits_adv(self) -> Tensor:
        """Logits of `x_train`, in the model's own mode."""
        return self.logits if self.attack is None else self.forward(self.x_train)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of one forward pass in the model's own mode.

        Raises:
            ValueError: a label is not a class of the model (read on the CPU only).
        """
        self._passed = True
        logits = pick_logits(self.model(x), self.output, len(x))
        self.check_labels(logits.shape[1])
        return logits

    @property
    def samples(self) -> int:
        """Number of samples of the whole batch of this process."""
        return len(self.x) if self.total is None else self.total

    @cached_property
    def samples_everywhere(self) -> int:
        """Number of samples of the whole batches of all processes, by one all-reduce."""
        if self.group is None:
            return self.samples
        total = torch.tensor(self.samples, device=self.x.device)
        dist.all_reduce(total, group=self.group)
        return int(total)

    def need(self, name: str) -> None:
        """Compute `name` now, so that it comes before the passes that follow."""
        getattr(self, name)

    def made(self, name: str) -> Any:
        """Return `logits` or `logits_adv` if it has been computed, else None."""
        return self.__dict__.get(name)

    def again(self, model: Callable[..., Any] | None = None) -> Step:
        """Return a step with the same adversarial examples, found or still to be found, and no
        forward pass yet."""
        step = replace(self, model=self.model if model is None else model)
        step._found = self._found
        if "samples_everywhere" in self.__dict__:
            step.__dict__["samples_everywhere"] = self.samples_everywhere
        return step

    def check_labels(self, classes: int | None = None) -> None:
        """Raise ValueError if a label is negative or not below `classes`.

        Samples without a label pass. Values are read on the CPU only: on a GPU that would wait for
        the device at each step.
        """
        y = self.y
        if y.is_floating_point() or y.device.type != "cpu" or torch.compiler.is_compiling():
            return
        labels = y[self.labelled]
        if labels.numel() == 0:
            return
        low, high = map(int, labels.aminmax())
        if classes is not None and not 0 <= low <= high < classes:
            raise ValueError(
                f"objective: y must hold labels 0..{classes - 1} (the model has {classes} "
                f"classes), got values from {low} to {high}"
            )
        if low < 0:
            besides = f" or {self.ignore_index} for none" if self.ignore_index is not None else ""
            raise ValueError(
                f"objective: y must hold labels >= 0{besides}, got values from {low} to {high}"
            )

    def _labels_for(self, attack: Attack) -> Tensor:
        """Return labels for an attack: where there is none, the model's natural prediction if the
        result of the attack depends on labels."""
        if self.ignore_index is None:
            return self.y
        labelled = self.labelled
        if not _follows_labels(attack) or bool(labelled.all()):
            return self.y.where(labelled, 0)
        natural = predict(self.model, self.x, attack.settings).argmax(1)
        return self.y.where(labelled, natural)


def _follows_labels(attack: Attack) -> bool:
    """Return whether the attack's examples depend on y: through its loss, by releasing samples that
    are misclassified, or by choosing among iterates or restarts by the verdict."""
    s = attack.settings
    if not s.loss.needs_reference_logits:
        return True
    if not isinstance(s, LoopSettings):
        return True
    return s.releases or s.best == "fooled" or attack.restarts > 1


@contextlib.contextmanager
def kept_buffers(model: Callable[..., Any]) -> Iterator[None]:
    """Restore the model's buffers, such as running statistics, at the end of the context."""
    buffers = list(model.buffers()) if isinstance(model, nn.Module) else []
    saved = [b.clone() for b in buffers]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in zip(buffers, saved, strict=True):
                buffer.copy_(value)


def process_group(model: Callable[..., Any], group: Any = None) -> Any:
    """Return the group of processes over which weights are normalised; None for this process alone.

    Args:
        group: a process group, or False for this process alone. By default the group of the first
            data-parallel wrapper (DDP, FSDP) in or around the model; without one, as in a module
            that Lightning wraps from outside, the default group of torch.distributed if it is
            initialised.
    """
    if group is False or not (dist.is_available() and dist.is_initialized()):
        return None
    if group is None:
        group = _group_of_wrapper(model) or dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None


def _group_of_wrapper(model: Callable[..., Any]) -> Any:
    """Return the process group of the first data-parallel wrapper in the model, else None."""
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel  # slow to import

    wrappers = (nn.parallel.DistributedDataParallel, FullyShardedDataParallel)
    for module in model.modules() if isinstance(model, nn.Module) else ():
        if isinstance(module, wrappers):
            return module.process_group
        if isinstance(module, FSDPModule):
            meshes = (getattr(p, "device_mesh", None) for p in module.parameters())
            return next((m.get_group() for m in meshes if m is not None and m.ndim == 1), None)
    return None
