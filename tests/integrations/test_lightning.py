"""The Lightning callback and module: with Lightning where it is installed, and with a stand-in."""

from __future__ import annotations

import importlib
import sys
import types

import pytest
import torch
from objective_parts import make_batch, make_net
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pyadv.attacks import PGD
from pyadv.objectives import AT

NAME = "pyadv.integrations.lightning"


def attack():
    return PGD(eps=0.05, alpha=0.02, steps=3, seed=0)


def optimizers(parameters):
    return torch.optim.SGD(parameters, 0.1)


class Module(nn.Module):
    """What the integration uses of LightningModule."""

    current_epoch = 0

    def __init__(self):
        super().__init__()
        self.logged = {}

    def log(self, name, value, **settings):
        self.logged[name] = float(torch.as_tensor(value).detach())


@pytest.fixture
def stand_in(monkeypatch):
    pytorch = types.ModuleType("lightning.pytorch")
    pytorch.Callback, pytorch.LightningModule = object, Module
    package = types.ModuleType("lightning")
    package.pytorch = pytorch
    monkeypatch.setitem(sys.modules, "lightning", package)
    monkeypatch.setitem(sys.modules, "lightning.pytorch", pytorch)
    sys.modules.pop(NAME, None)
    yield importlib.import_module(NAME)
    sys.modules.pop(NAME, None)


def test_training_step_and_checkpoints(stand_in):
    x, y = make_batch(8)
    module = stand_in.ObjectiveModule(make_net(), AT(attack()), optimizers)
    module.train()
    module.current_epoch = 2
    loss = module.training_step((x, y), 0)
    expected = AT(attack())(make_net(), x, y, epoch=3)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert module.logged["train_loss"] == pytest.approx(loss.item())
    optimiser = module.configure_optimizers()
    assert sum(len(g["params"]) for g in optimiser.param_groups) == 6
    module.eval()
    module.validation_step((x, y, torch.arange(8)), 0)
    accuracy = (module(x).argmax(1) == y).float().mean().item()
    assert module.logged["val_acc"] == pytest.approx(accuracy)
    checkpoint = {}
    module.on_save_checkpoint(checkpoint)
    other = stand_in.ObjectiveModule(make_net(), AT(attack()), optimizers)
    other.on_load_checkpoint(checkpoint)
    assert other.objective.attack.draw == module.objective.attack.draw == 1
    with pytest.raises(TypeError, match="objective must be one of"):
        stand_in.ObjectiveModule(make_net(), lambda *_: 0, optimizers)


def test_callback(stand_in):
    x, y = make_batch(16)
    module = stand_in.ObjectiveModule(make_net().eval(), AT(attack()), optimizers)
    module.eval()
    trainer = types.SimpleNamespace(sanity_checking=False, current_epoch=0)

    def epoch(callback, number, sanity=False):
        trainer.current_epoch, trainer.sanity_checking = number - 1, sanity
        module.logged.clear()
        callback.on_validation_epoch_start(trainer, module)
        for i, part in enumerate(torch.arange(16).split(8)):
            callback.on_validation_batch_end(trainer, module, None, (x[part], y[part]), i)
        callback.on_validation_epoch_end(trainer, module)
        return module.logged.get("val_robust_acc")

    clean = module(x).argmax(1) == y
    robust = clean & attack().run(x, y, draw=0, model=module.model).correct
    second = stand_in.RobustAccuracyCallback(attack(), every_n_epochs=2)
    assert epoch(second, 1) is None and epoch(second, 2, sanity=True) is None
    assert epoch(second, 2) == pytest.approx(robust.float().mean().item())
    assert epoch(second, 4) == pytest.approx(robust.float().mean().item())
    few = stand_in.RobustAccuracyCallback(attack(), batches=1, model="model")
    assert epoch(few, 1) == pytest.approx(robust[:8].float().mean().item())
    with pytest.raises(ValueError, match="every_n_epochs must be"):
        stand_in.RobustAccuracyCallback(attack(), every_n_epochs=0)


def test_a_run_of_lightning(tmp_path):
    sys.modules.pop(NAME, None)
    pytest.importorskip("lightning.pytorch")
    lightning = importlib.import_module("lightning.pytorch")
    ours = importlib.import_module(NAME)
    x, y = make_batch(32)
    loader = DataLoader(TensorDataset(x, y), batch_size=8)
    module = ours.ObjectiveModule(make_net(), AT(attack()), optimizers)
    seen = []

    class Watch(lightning.Callback):
        def on_validation_end(self, trainer, pl_module):
            if not trainer.sanity_checking:
                seen.append(dict(trainer.callback_metrics))

    trainer = lightning.Trainer(
        max_epochs=4,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        callbacks=[ours.RobustAccuracyCallback(attack(), every_n_epochs=2), Watch()],
    )
    trainer.fit(module, loader, loader)
    assert ["val_robust_acc" in metrics for metrics in seen][:2] == [False, True]
    last = seen[-1]
    net = module.model.eval()
    clean = net(x).argmax(1) == y
    robust = clean & attack().run(x, y, draw=0, model=net).correct
    assert float(last["val_robust_acc"]) == pytest.approx(robust.float().mean().item())
    assert float(last["val_acc"]) == pytest.approx(clean.float().mean().item())
    assert module.objective.attack.draw == 16
    path = tmp_path / "last.ckpt"
    trainer.save_checkpoint(path)
    assert torch.load(path, weights_only=True)["objective"]["attack"] == {"draw": 16}
