"""Training from Python with own networks, loaders, optimizers, callbacks and trackers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from pyadv import training
from pyadv.data import ImageData
from pyadv.models import Normalized
from pyadv.training import (
    Callback,
    Config,
    Display,
    Diverged,
    Interrupted,
    Trainer,
    checkpoint,
    load_model,
)
from pyadv.training.records import trackers

QUIET = Display(quiet=True)
PLACE: dict[str, Any] = {"device": "cpu", "display": QUIET}
FAST: dict[str, Any] = {"epochs": 2, "steps": 1, "eps": 0.1, "log_with": "none"}
X = torch.randint(256, (24, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
Y = X.float().mean((1, 2, 3)).gt(127).long()


class Net(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 2))


def net() -> Net:
    torch.manual_seed(1)
    return Net()


def loader(shuffle: bool = True, **settings: Any) -> DataLoader:
    return DataLoader(TensorDataset(X, Y), 8, shuffle=shuffle, **settings)


class Watch(Callback):
    """A callback that counts, stops after `last` epochs, and is part of the checkpoint."""

    def __init__(self, last: int | None = None) -> None:
        self.seen: list[str] = []
        self.steps, self.last = 0, last

    def on_start(self, trainer: Trainer) -> None:
        self.seen.append("start")

    def on_step(self, trainer: Trainer, loss: Tensor) -> None:
        assert loss.shape == () and not loss.requires_grad
        self.steps += 1

    def on_epoch(self, trainer: Trainer, record: dict[str, Any]) -> None:
        record["steps_so_far"] = self.steps
        self.seen.append(f"epoch {record['epoch']}")
        if record["epoch"] == self.last:
            trainer.stop()

    def on_end(self, trainer: Trainer) -> None:
        self.seen.append("end")

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]


def test_everything_of_ones_own(tmp_path: Path) -> None:
    model, watch = net(), Watch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    first = model[1].weight.clone()
    parts = {"model": model, "train": loader(), "val": loader(False), "callbacks": [watch]}
    parts |= {"optimizer": optimizer, "scheduler": scheduler}
    report = training.train(Config(**FAST), tmp_path / "run", **parts, **PLACE)
    assert report is not None and report.n == 24
    assert watch.seen == ["start", "epoch 1", "epoch 2", "end"] and watch.steps == 6
    assert not torch.equal(model[1].weight, first)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [r["steps_so_far"] for r in records] == [3, 6]
    assert [r["lr"] for r in records] == [0.01, 0.005]
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert saved["optimizer"] == "torch.optim.adamw.AdamW" and saved["lr"] is None
    assert records[0]["val_robust"] is not None and records[0]["train_clean"] is None
    with pytest.raises(
        ValueError, match=r"Net that it was given: load_model\(path, model=\.\.\.\)"
    ):
        load_model(tmp_path / "run")
    restored = load_model(tmp_path / "run", model=Net())
    assert torch.equal(restored.model(X / 255), model.eval()(X / 255))


def test_without_a_folder_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    trainer = Trainer(Config(**{**FAST, "log_with": None}), model=net(), train=loader(), **PLACE)
    trainer.fit()
    assert len(trainer.records) == 2 and not list(tmp_path.iterdir())


@pytest.mark.parametrize(("every", "workers"), [("step", 0), ("epoch", 1)])
def test_own_parts_resume_exactly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: str, workers: int
) -> None:
    class Stop(Callback):
        def on_step(self, trainer: Trainer, loss: Tensor) -> None:
            if (trainer.epoch, trainer.step) == (2, 2):
                import signal

                signal.raise_signal(signal.SIGINT)

    def parts(*callbacks: Callback) -> dict[str, Any]:
        return {
            "model": net(),
            "train": loader(num_workers=workers),
            "val": loader(False),
            "optimizer": lambda params: torch.optim.Adam(params, lr=0.01),
            "scheduler": lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [1, 4], gamma=0.5),
            "scheduler_every": every,
            "callbacks": [Watch(), *callbacks],
            **PLACE,
        }

    config = Config(**FAST)
    whole = training.train(config, tmp_path / "whole", **parts())
    with pytest.raises(Interrupted, match="epoch 2 after step 2"):
        training.train(config, tmp_path / "cut", **parts(Stop()))
    torch.manual_seed(77)
    resumed = training.resume(tmp_path / "cut", **parts(Callback()))
    assert resumed.to_dict() == whole.to_dict()
    states = [checkpoint.load(tmp_path / f / "checkpoint.pt") for f in ("whole", "cut")]
    for name, value in states[0]["model"].items():
        assert torch.equal(states[1]["model"][name], value)
    assert states[0]["scheduler"] == states[1]["scheduler"]
    assert states[0]["callbacks"][0] == states[1]["callbacks"][0] == {"steps": 6}


def test_a_callback_stops_the_run(tmp_path: Path) -> None:
    watch = Watch(last=1)
    Trainer(Config(**FAST), model=net(), train=loader(), callbacks=[watch], **PLACE).fit()
    assert watch.seen == ["start", "epoch 1", "end"]


class Records(Callback):
    """A callback that adds `values` to each record and keeps `state`."""

    def __init__(self, values: dict[str, Any], state: Any = ()) -> None:
        self.values, self.state = values, state

    def on_epoch(self, trainer: Trainer, record: dict[str, Any]) -> None:
        record |= self.values

    def state_dict(self) -> dict[str, Any]:
        return {"state": self.state}


def test_numbers_of_other_libraries_are_recorded(tmp_path: Path) -> None:
    values = {"a": np.float64(0.1), "b": np.int64(3), "c": torch.tensor(0.5), "d": [np.float32(2)]}
    parts = {"model": net(), "train": loader(), "callbacks": [Records(values)]}
    training.train(Config(**FAST), tmp_path / "run", **parts, **PLACE)
    for records in (
        [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()],
        checkpoint.load(tmp_path / "run" / "checkpoint.pt")["records"],
    ):
        found = {name: records[-1][name] for name in values}
        assert found == {"a": 0.1, "b": 3, "c": 0.5, "d": [2.0]}
        assert [type(v) for v in found.values()] == [float, int, float, list]


def test_what_no_record_can_hold_is_named() -> None:
    parts = {"model": net(), "train": loader(), "callbacks": [Records({"many": torch.zeros(2)})]}
    with pytest.raises(ValueError, match=r"record\['many'\] must be a number.*a Tensor is none"):
        Trainer(Config(**FAST), **parts, **PLACE).fit()


@pytest.mark.parametrize("state", [np.float64(0.5), Path("file"), lambda: 3])
def test_states_that_no_checkpoint_can_hold_are_refused_before_work(
    tmp_path: Path, state: Any
) -> None:
    parts = {"model": net(), "train": loader(), "callbacks": [Watch(), Records({}, state)]}
    with pytest.raises(ValueError, match="state_dict of callback Records must hold plain values"):
        training.train(Config(**FAST), tmp_path / "run", **parts, **PLACE)
    assert not (tmp_path / "run").exists()
    parts["callbacks"][1].state = {"kept": torch.zeros(3), "best": [0.5, None, "x"]}
    Trainer(Config(**FAST), folder=tmp_path, **parts, **PLACE)


def test_ids_and_dicts_reach_the_objective() -> None:
    batches = [{"pixel_values": X, "labels": Y, "ids": torch.arange(24) + 5}]
    trainer = Trainer(Config(**FAST, mean=(0.5,), std=(0.5,)), model=net(), train=batches, **PLACE)
    assert isinstance(trainer.network, Normalized)
    seen: list[Any] = []

    class Ids(Callback):
        def on_step(self, trainer: Trainer, loss: Tensor) -> None:
            seen.append(trainer.objective.last["kappa"].shape)

    trainer.callbacks = [Ids()]
    call = type(trainer.objective).__call__

    def spy(self: Any, model: Any, x: Tensor, *args: Any, ids: Tensor, **more: Any) -> Tensor:
        assert torch.equal(ids, torch.arange(24) + 5) and torch.equal(x, X / 255)
        return call(self, model, x, *args, ids=ids, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(trainer.objective), "__call__", spy)
        trainer.fit()
    assert seen == [(24,)] * 2


def weights(small: ImageData, folder: Path, **settings: Any) -> dict[str, Tensor]:
    given = {"method": "standard", "epochs": 1, "batch_size": 50, "log_with": "none", **settings}
    training.train(Config(**given), folder, data=small, **PLACE)
    return checkpoint.load(folder / "checkpoint.pt")["model"]


def test_parts_of_a_batch_add_up(small: ImageData, tmp_path: Path) -> None:
    whole = weights(small, tmp_path / "whole")
    parts = weights(small, tmp_path / "parts", accumulate=3)
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-4, atol=1e-6)
    records = [
        checkpoint.load(tmp_path / f / "checkpoint.pt")["records"] for f in ("whole", "parts")
    ]
    assert records[1][0]["loss"] == pytest.approx(records[0][0]["loss"], rel=1e-4)


def test_clipping_bounds_the_update(small: ImageData, tmp_path: Path) -> None:
    torch.manual_seed(0)
    from pyadv.models import create

    first = create("small-cnn", in_channels=1, image_size=(28, 28)).state_dict()
    settings = {"clip": 1e-3, "schedule": "constant", "lr": 0.1, "weight_decay": 0.0}
    after = weights(small, tmp_path / "run", batch_size=100, **settings)
    moved = sum((after[n] - v).square().sum() for n, v in first.items()).sqrt()
    assert moved.item() == pytest.approx(0.1 * 1e-3, rel=0.01)


def test_adamw(small: ImageData, tmp_path: Path) -> None:
    config = Config(optimizer="adamw", **FAST).resolve(small)
    assert config.lr == 1e-3
    trainer = Trainer(config, small, tmp_path, **PLACE)
    assert isinstance(trainer.optimizer.optimizer, torch.optim.AdamW)


def test_a_run_is_extended(small: ImageData, tmp_path: Path) -> None:
    settings = {"epochs": 1, "steps": 1, "log_with": "none", "batch_size": 50}
    training.train(Config(**settings), tmp_path, data=small, **PLACE)
    training.resume(tmp_path, epochs=2, data=small, **PLACE)
    state = checkpoint.load(tmp_path / "checkpoint.pt")
    assert state["epoch"] == 3 and state["config"]["epochs"] == 2
    assert json.loads((tmp_path / "config.json").read_text())["epochs"] == 2
    with pytest.raises(ValueError, match="epochs must be >= 2, which have begun, got 1"):
        training.resume(tmp_path, epochs=1, data=small, **PLACE)


def test_checkpoints_of_before_resume(small: ImageData, tmp_path: Path) -> None:
    """A checkpoint without the settings and states that came later."""
    training.train(Config(**FAST, batch_size=50), tmp_path, data=small, **PLACE)
    state = checkpoint.load(tmp_path / "checkpoint.pt")
    for name in ("scheduler", "callbacks", "parts"):
        del state[name]
    later = ("model_args", "weights", "mean", "std", "image_size", "stream", "workers", "transform")
    for name in (*later, "accumulate", "optimizer", "clip", "log_with"):
        del state["config"][name]
    checkpoint.save(tmp_path / "checkpoint.pt", state)
    (tmp_path / "best.pt").unlink(missing_ok=True)
    report = training.resume(tmp_path, data=small, **PLACE)
    assert report is not None and report.n == 40


def test_tensorboard_is_written_by_accelerate(small: ImageData, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    config = Config(**{**FAST, "log_with": None, "epochs": 1}, batch_size=50, method="standard")
    training.train(config, tmp_path, data=small, **PLACE)
    assert list((tmp_path / "tensorboard" / "pyadv").glob("events*"))


def test_trackers_get_the_numbers_of_each_epoch(
    small: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from accelerate import tracking

    class Tracker(tracking.GeneralTracker):
        name, requires_logging_directory = "wandb", False
        logged: list[Any] = []

        def __init__(self, run_name: str, **_: Any) -> None:
            super().__init__()
            self.logged.append(run_name)

        tracker = property(lambda self: self)

        def store_init_configuration(self, values: dict) -> None:
            self.logged.append(values)

        def log(self, values: dict, step: int | None = None, **_: Any) -> None:
            self.logged.append((step, values))

        def finish(self) -> None:
            self.logged.append("finished")

    available = [*tracking.get_available_trackers(), tracking.LoggerType.WANDB]
    monkeypatch.setattr(tracking, "_available_trackers", available)
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "wandb", Tracker)
    config = Config(**{**FAST, "log_with": "wandb"}, batch_size=50)
    training.train(config, tmp_path, data=small, **PLACE)
    name, settings, *steps, end = Tracker.logged
    assert name == "pyadv" and settings["eps"] == 0.1 and end == "finished"
    assert [step for step, _ in steps] == [1, 2]
    assert {"loss", "lr", "train_clean", "train_robust"} <= steps[0][1].keys()


def test_trackers_that_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="log_with must be none or of .*wandb, got 'paper'"):
        trackers("paper", tmp_path)
    with pytest.raises(ValueError, match="did you mean 'tensorboard'"):
        trackers("tensorbord", tmp_path)
    monkeypatch.setattr("accelerate.tracking._available_trackers", [])
    with pytest.raises(ImportError, match="pip install wandb"):
        trackers("wandb", tmp_path)
    assert trackers("none", tmp_path) == [] and trackers(None, None) == []


PLATEAU = torch.optim.lr_scheduler.ReduceLROnPlateau


def adam(params: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, lr=0.01)


@pytest.fixture
def parts() -> Iterator[dict[str, Any]]:
    yield {"model": net(), "train": loader()}


@pytest.mark.parametrize(
    ("settings", "changes", "message"),
    [
        ({}, {"train": None}, "needs data or train, and not both"),
        ({}, {"train": iter([])}, "train must be a loader with a length"),
        ({}, {"train": []}, "train must have at least one batch"),
        ({}, {"train": [X]}, r"must be \(x, y\), \(x, y, ids\) or a dict .* got a Tensor"),
        ({}, {"train": [{"pic": X}]}, "got a dict of pic"),
        ({}, {"train": [(X[0], Y)]}, r"must have x \(B, C, H, W\) and y \(B,\) int64"),
        ({}, {"train": [(X, Y.float())]}, r"y \(24,\) torch.float32"),
        ({}, {"train": [(X, Y, Y[:3])]}, r"ids of train must be int64 \(24,\)"),
        ({}, {"model": None}, "does not tell the number of classes"),
        ({"model": "small-cnn"}, {}, "config.model names a network: drop it, or model"),
        ({"val": 3}, {}, "config.val is for data sets"),
        ({"lr": 0.1}, {"optimizer": torch.optim.Adam}, "config.lr is for the optimizer of pyadv"),
        ({}, {"scheduler": lambda o: o}, "scheduler needs an optimizer of your own"),
        ({}, {"scheduler_every": "batch"}, "scheduler_every must be 'epoch' or 'step'"),
        ({}, {"optimizer": list}, "optimizer must be a torch Optimizer, got a list"),
        (
            {},
            {"optimizer": torch.optim.SGD([nn.Parameter(X.float())], lr=1.0)},
            "optimizer must have the parameters of model alone",
        ),
        ({}, {"model": nn.Flatten(2)}, "must return logits"),
        (
            {},
            {"optimizer": adam, "scheduler": PLATEAU, "scheduler_every": "step"},
            "scheduler_every must be 'epoch' for ReduceLROnPlateau",
        ),
        (
            {},
            {"optimizer": adam, "scheduler": PLATEAU(adam([nn.Parameter(X.float())]))},
            "scheduler must be a scheduler of the optimizer that is given",
        ),
        ({"optimizer": "lbfgs"}, {}, "optimizer must be one of sgd, adamw"),
        ({"accumulate": 0}, {}, "accumulate must be >= 1"),
        ({"clip": -1.0}, {}, "clip must be finite and >= 0"),
    ],
)
def test_what_is_refused_before_work(
    parts: dict[str, Any], settings: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Trainer(Config(**{**FAST, **settings}), **{**parts, **changes}, **PLACE)


@pytest.mark.parametrize("method", ["at", "gairat"])
def test_accumulation_is_the_whole_batch(method: str) -> None:
    """The parts share the draw of the attack's noise and the normalisation of the weights."""

    def trained(accumulate: int) -> Tensor:
        settings = {"begin_epoch": 1} if method == "gairat" else {}
        config = Config(**FAST | settings, method=method, lr=0.05, accumulate=accumulate)
        config.schedule, config.speed = "constant", "exact"
        batches = [(X, Y, torch.arange(24))]
        trainer = Trainer(config, model=net(), train=batches, **PLACE)
        trainer.fit()
        return trainer.network[1].weight.detach()

    torch.testing.assert_close(trained(4), trained(1), rtol=0, atol=1e-6)
    assert (trained(1) - net()[1].weight).abs().max() > 1e-4


def test_accumulation_tells_a_network_that_diverged() -> None:
    broken = net()
    trainer = Trainer(Config(**FAST, accumulate=3), model=broken, train=[(X, Y)], **PLACE)
    with torch.no_grad():
        broken[1].weight.fill_(float("nan"))
    with pytest.raises(Diverged, match="the network's output is not finite"):
        trainer.fit()


@pytest.fixture(scope="module")
def own_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run on parts of one's own."""
    folder = tmp_path_factory.mktemp("run") / "own"
    training.train(Config(**FAST), folder, **own_parts(), **PLACE)
    return folder


def own_parts() -> dict[str, Any]:
    return {
        "model": net(),
        "train": loader(),
        "val": loader(False),
        "optimizer": lambda params: torch.optim.Adam(params, lr=0.01),
        "scheduler": lambda o: torch.optim.lr_scheduler.StepLR(o, 1),
        "scheduler_every": "step",
        "callbacks": [Watch()],
    }


@pytest.mark.parametrize(
    ("forgotten", "message"),
    [
        (("train", "val"), "another train "),
        (("val",), "another val "),
        (("optimizer", "scheduler"), r"another optimizer \(then: Adam, now: None\)"),
        (("scheduler",), "another scheduler "),
        (("scheduler_every",), r"another scheduler_every \(then: step, now: epoch\)"),
        (("callbacks",), r"another callbacks \(then: 1, now: 0\)"),
    ],
)
def test_a_part_that_resume_is_not_given_is_named(
    own_run: Path, forgotten: tuple[str, ...], message: str
) -> None:
    before = (own_run / "checkpoint.pt").read_bytes()
    parts = {name: part for name, part in own_parts().items() if name not in forgotten}
    with pytest.raises(ValueError, match=f"{message}.*give resume what train was given"):
        training.resume(own_run, epochs=3, **parts, **PLACE)
    assert (own_run / "checkpoint.pt").read_bytes() == before


def test_another_optimizer_is_named(own_run: Path) -> None:
    parts = own_parts() | {"optimizer": lambda params: torch.optim.SGD(params, lr=0.01)}
    with pytest.raises(ValueError, match=r"another optimizer \(then: Adam, now: SGD\)"):
        training.resume(own_run, **parts, **PLACE)
