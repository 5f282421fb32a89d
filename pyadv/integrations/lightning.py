"""Lightning: robust accuracy during training, and pyadv's objectives as `training_step`.

module = ObjectiveModule(model, TRADES(PGD(loss="kl")), lambda p: torch.optim.SGD(p, 0.1))
Trainer(callbacks=[RobustAccuracyCallback(PGD(eps=8/255, steps=20), every_n_epochs=5)]).fit(module)

It needs `lightning`, or `pytorch_lightning`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from pyadv.attacks.ensemble import AttackLike
from pyadv.engine import checks
from pyadv.integrations.metrics import RobustAccuracy
from pyadv.objectives import Objective

try:
    from lightning.pytorch import Callback, LightningModule
except ImportError:
    from pytorch_lightning import Callback, LightningModule


class RobustAccuracyCallback(Callback):
    """A callback that logs the robust accuracy on the validation batches.

    Args:
        attack: any untargeted attack of pyadv.
        every_n_epochs: attack in epochs n, 2n, 3n, ...
        name: what is logged.
        batches: how many validation batches to attack; None for all.
        model: the attribute of the LightningModule that maps x to logits; None for the module
            itself, by its `forward`.
    """

    def __init__(
        self,
        attack: AttackLike,
        every_n_epochs: int = 1,
        name: str = "val_robust_acc",
        batches: int | None = None,
        model: str | None = None,
    ):
        self.every_n_epochs = checks.count("every_n_epochs", every_n_epochs, 1)
        self.batches = None if batches is None else checks.count("batches", batches, 1)
        self.name, self.model = name, model
        self.metric = RobustAccuracy(attack)

    def _due(self, trainer: Any) -> bool:
        return (
            not trainer.sanity_checking and (trainer.current_epoch + 1) % self.every_n_epochs == 0
        )

    def on_validation_epoch_start(self, trainer: Any, pl_module: LightningModule) -> None:
        self.metric.reset()

    def on_validation_batch_end(
        self,
        trainer: Any,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if not self._due(trainer) or (self.batches is not None and batch_idx >= self.batches):
            return
        network = pl_module if self.model is None else getattr(pl_module, self.model)
        self.metric.to(batch[0].device).update(network, batch[0], batch[1])

    def on_validation_epoch_end(self, trainer: Any, pl_module: LightningModule) -> None:
        if self._due(trainer):
            pl_module.log(self.name, self.metric.compute().float())


class ObjectiveModule(LightningModule):
    """A LightningModule that trains a network by an objective.

    Batches are (x, y) or (x, y, ids), ids being the samples' indices in the training set. It logs
    train_loss, val_loss and val_acc; the state of the objective is part of the checkpoints.

    Args:
        model: maps x to logits.
        objective: of `pyadv.objectives`.
        optimizers: from the parameters to what `configure_optimizers` returns.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        optimizers: Callable[[Iterable[nn.Parameter]], Any],
    ):
        super().__init__()
        if not isinstance(objective, Objective):
            raise TypeError(
                f"objective must be one of pyadv.objectives, got {type(objective).__name__}"
            )
        self.model, self.objective, self.optimizers_of = model, objective, optimizers

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        return self.model(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the objective's loss of a batch; epochs count from 1."""
        x, y, *ids = batch
        loss = self.objective(self.model, x, y, self.current_epoch + 1, *ids)
        self.log("train_loss", loss.detach())
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Log the clean loss and accuracy of a batch."""
        x, y = batch[:2]
        logits = self.model(x)
        self.log("val_loss", F.cross_entropy(logits, y), batch_size=len(y))
        self.log("val_acc", (logits.argmax(1) == y).float().mean(), batch_size=len(y))

    def configure_optimizers(self) -> Any:
        """Return what `optimizers` makes of the network's parameters."""
        return self.optimizers_of(self.model.parameters())

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["objective"] = self.objective.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.objective.load_state_dict(checkpoint["objective"])
