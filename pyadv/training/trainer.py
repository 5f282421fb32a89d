"""The training loop."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.optim.swa_utils import AveragedModel

from pyadv import evaluation, models
from pyadv._host_copy import start_host_copy
from pyadv.attacks import PGD
from pyadv.data import Images, Plan
from pyadv.data.streams import SampleBatches
from pyadv.engine.task import GradientSettings
from pyadv.training import build, checkpoint, sharding
from pyadv.training.callbacks import Callback
from pyadv.training.config import PRECISIONS, Config
from pyadv.training.display import Display, percent
from pyadv.training.loaders import FloatBatches, Loader, LoaderBatches, Loaders
from pyadv.training.records import Records, trackers
from pyadv.training.schedules import lr_factor
from pyadv.training.stop import StopSignal

Every: TypeAlias = Literal["epoch", "step"]
EVERY: tuple[Every, ...] = get_args(Every)
_PROBE = 1000  # training images on which clean accuracy is measured after each epoch


# A split as the arguments of `evaluate` that come after the model.
_Samples = tuple[Tensor, Tensor] | tuple[SampleBatches] | tuple[FloatBatches]


class Interrupted(Exception):
    """A signal stopped the run; its state is saved."""


class Diverged(ArithmeticError):
    """The loss or the network's output is no longer finite."""


class Trainer:
    """A run: it trains, records, saves after every epoch and on a signal, and resumes.

    A step is `objective(model, x, y, epoch=e, ids=ids)` and an update by the optimizer. Learning
    rate, data order, augmentation and attack noise are functions of (config, epoch, step). A
    checkpoint therefore holds weights, momenta, the attack's draw counter and the states of torch's
    generators, and a resumed run gives the same bits as an uninterrupted one (in one process on
    the CPU).

    No step waits for the GPU: a training set that fits is stored on it, and the totals that are
    shown and the loss that is checked may be a few steps old.

    The network, the data and the optimizer are those that `config` names, or the user's own:

        Trainer(
            Config(method="trades", eps=8 / 255, epochs=10),
            folder="runs/mine",
            model=net,
            train=train_loader,
            val=val_loader,
            optimizer=torch.optim.AdamW(net.parameters()),
            callbacks=[MyCallback()],
        ).fit()

    `pyadv.training.train` and `resume` take the same arguments; they also lock the folder, resume,
    and report on the test set.

    Args:
        config: settings; those left None follow from the data and the method.
        data: the data set, in memory or streamed; or `train`.
        folder: the run folder, which must exist before the first save; receives checkpoint.pt,
            metrics.jsonl and, with held-out data, best.pt. Without a folder nothing is saved.
        model: a network that maps images in [0, 1] to logits, in place of `config.model`.
        train: batches to train on in place of `data`, see `Loaders`. Several processes divide the
            batches of a DataLoader, which must have no DistributedSampler.
        val: held-out batches that choose best.pt, with `train`.
        test: batches of the final report, with `train`; by default those of `val`.
        optimizer: an optimizer of the parameters of `model`, or a function that makes one of
            parameters, which `config.fsdp` requires. Its learning rate is its own, and that of
            `scheduler`.
        scheduler: a scheduler of the optimizer, or a function that makes one of the optimizer.
        scheduler_every: "epoch" or "step": after what `scheduler` steps.
        callbacks: hooks, see `Callback`.
        device: "cpu", "cuda", "cuda:1"; by default CUDA if available, and the process's own card
            in a distributed run.
        display: shows progress.
        fresh: whether the run begins, with the weights that `config` names; False if `restore`
            follows, which needs none.

    Raises:
        ValueError: for settings and arguments that are wrong or do not fit together, before any
            work.
    """

    def __init__(
        self,
        config: Config | None = None,
        data: Images | None = None,
        folder: str | Path | None = None,
        *,
        model: nn.Module | None = None,
        train: Loader | None = None,
        val: Loader | None = None,
        test: Loader | None = None,
        optimizer: Optimizer | Callable[..., Optimizer] | None = None,
        scheduler: LRScheduler | Callable[..., LRScheduler] | None = None,
        scheduler_every: Every = "epoch",
        callbacks: Sequence[Callback] = (),
        device: str | None = None,
        display: Display | None = None,
        fresh: bool = True,
    ) -> None:
        config = config or Config()
        self.folder = None if folder is None else Path(folder)
        self.data = _the_data(data, train, val, test, model)
        _check_parts(config if fresh else None, model, optimizer, scheduler, scheduler_every)
        if config.fsdp and isinstance(optimizer, Optimizer):
            raise ValueError("optimizer must be a function of the parameters, which fsdp replaces")
        self.config = config = config.resolve(self.data)
        if model is not None:
            config.model = _name(model)
        place = build.device(device)
        if place.index is not None:
            torch.cuda.set_device(place)
        places = None  # of the trackers
        if self.folder is not None:
            tensorboard = str(self.folder / "tensorboard")
            places = ProjectConfiguration(str(self.folder), logging_dir=tensorboard)
        self.accelerator = Accelerator(
            cpu=place.type == "cpu",
            mixed_precision=PRECISIONS[config.precision],
            log_with=trackers(config.log_with, self.folder) or None,
            project_config=places,
        )
        main = self.accelerator.is_main_process
        self.display = (display or Display()) if main else Display(quiet=True)
        torch.manual_seed(config.seed)
        self.architecture = build.architecture(config, self.data)
        if model is None:
            model = build.network(config, self.architecture, fresh=fresh)
        else:
            self.architecture |= {"name": None, "class": config.model}
            model = build.own_network(config, model, self.data)
        if config.channels_last:
            # The stub of `to` lacks the overload for a memory format.
            model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        on = self.accelerator.device
        self.average = _Average(model, config.ema, on) if config.ema else None
        self.own_optimizer = optimizer is not None
        self.sharded = config.fsdp and self.accelerator.num_processes > 1
        if self.sharded:
            without_ddp = {"device_placement": False, "evaluation_mode": True}
            model = self.accelerator.prepare_model(model, **without_ddp)
            sharding.shard(model, on.type)
        if optimizer is None:
            optimizer = build.optimizer(config, model)
        elif not isinstance(optimizer, Optimizer):
            optimizer = optimizer(model.parameters())
        _check_optimizer(optimizer, model)
        if self.own_optimizer:
            config.optimizer = _name(optimizer)
            config.lr = config.schedule = config.milestones = None
        self.scheduler = _scheduler(scheduler, optimizer)
        self.scheduler_every = scheduler_every
        _check_scheduler(self.scheduler, scheduler_every, optimizer)
        if self.sharded:
            self.model, self.optimizer = model, self.accelerator.prepare(optimizer)
        else:
            self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.network = self.accelerator.unwrap_model(self.model)
        self.emr_derivative = build.emr_derivative(self.network, self.data) if config.emr else None
        self.objective = build.objective(config, self.network, self.data, self.emr_derivative)
        if self.sharded:  # an attack that ends early would make fewer passes than the others
            for attack in {a for e in range(config.epochs) for a in self.objective.attacks(e + 1)}:
                attack.settings = replace(attack.settings, compact=False)
        self.callbacks = list(callbacks)
        self.parts = {
            "train": train is not None,
            "val": val is not None,
            "optimizer": type(optimizer).__name__ if self.own_optimizer else None,
            "scheduler": self.scheduler is not None,
            "scheduler_every": scheduler_every,
            "callbacks": len(self.callbacks),
        }

        self.chunk = build.chunk(self.data)
        self.probe: _Samples | None = None
        self.val: _Samples | None = None
        self.batches: Plan | LoaderBatches
        if isinstance(self.data, Loaders):
            if config.val:
                raise ValueError("config.val is for data sets: pass val, a loader of held-out data")
            self.val = self.data.samples("val")
            self.batches = LoaderBatches(self.data.train, self.accelerator, config.seed)
        else:
            kept, held = self.data.hold_out(config.val, config.seed)
            self.probe = self.data.samples("train", kept[:_PROBE])
            if len(held):
                self.val = self.data.samples("train", held)
            self.batches = build.batches(
                config,
                self.data,
                kept,
                device=self.accelerator.device,
                rank=self.accelerator.process_index,
                world=self.accelerator.num_processes,
            )
        self.epoch, self.step = 1, 0  # of the next step
        self.stopped = False
        self.totals = self._no_totals()
        self.known: list[float] = []  # totals that have reached the host
        self.underway: dict[str, Callable[[], Tensor | None]] = {}  # copies from the device
        self.records = Records(self.folder, self.accelerator, config.to_dict())
        self._judge()  # refuses settings of the evaluation before any work
        self._states_of_parts()  # and states that no checkpoint can hold

    # -- the loop ------------------------------------------------------------------------------

    def fit(self) -> None:
        """Train to the end.

        Raises:
            Interrupted: on SIGINT or SIGTERM, after saving.
            Diverged: if the loss is not finite.
            OSError: if a file cannot be written, with `errno` ENOSPC if the disk is full.
        """
        self.stopped = False
        try:
            with StopSignal(self.accelerator) as stop:
                self._call("on_start")
                while self.epoch <= self.config.epochs and not self.stopped:
                    started = time.perf_counter()
                    self._train_epoch(stop)
                    self._end_epoch(time.perf_counter() - started)
                self._call("on_end")
        finally:
            self.records.finish()

    def stop(self) -> None:
        """End the run after this epoch, as if it were the last. All processes must call this."""
        self.stopped = True

    def _call(self, hook: str, *arguments: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, hook)(self, *arguments)

    def _train_epoch(self, stop: StopSignal) -> None:
        self._warm_up()
        total = len(self.batches)
        with self.display.progress() as progress:
            task = progress.add_task(f"epoch {self.epoch}", total=total, text="")
            for x, y, ids in self.batches.epoch(self.epoch, self.step):
                self._train_step(x, y, ids)
                progress.update(task, completed=self.step, text=self._summary())
                if stop.requested():
                    self.save()
                    raise Interrupted(f"stopped in epoch {self.epoch} after step {self.step}")

    def _train_step(self, x: Tensor, y: Tensor, ids: Tensor | None) -> None:
        if self.config.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        if not self.own_optimizer:
            for group in self.optimizer.param_groups:
                group["lr"] = self.lr
        self.model.train()
        if self.sharded:
            sharding.share_buffers(self.network)
        loss = self._backward(x, y, ids)
        if self.config.clip:
            self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.clip)
        self.optimizer.step()
        if self.scheduler is not None and self.scheduler_every == "step":
            self.scheduler.step()
        if self.average is not None:
            self.average.update_parameters(self.network)
        self.step += 1
        self._call("on_step", loss)

    def _backward(self, x: Tensor, y: Tensor, ids: Tensor | None) -> Tensor:
        """Accumulate the gradient of a batch part by part, and return its loss."""
        columns = [t for t in (x, y, ids) if t is not None]
        parts = list(zip(*(t.chunk(self.config.accumulate) for t in columns), strict=True))
        if len(parts) > 1:
            with self._finite_output(x):
                made = self.objective.prepare(self.model, parts, epoch=self.epoch)
        totals: list[Tensor] = []  # of the loss, after each part
        for i, (part, labels, *_) in enumerate(parts):
            last = i + 1 == len(parts)
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.model):
                with self._finite_output(part):
                    if len(parts) > 1:
                        loss = made.loss(i)
                    else:
                        loss = self.objective(self.model, x, y, epoch=self.epoch, ids=ids)
                value = self._arrived("loss", loss)
                if value is not None:
                    self._check(value.item())
                if i == 0:
                    self.optimizer.zero_grad()
                self.accelerator.backward(loss)
            totals.append(loss.detach() + (totals[-1] if totals else 0.0))
            self._count(loss.detach() * len(y), labels)
        return totals[-1]

    @contextlib.contextmanager
    def _finite_output(self, x: Tensor) -> Iterator[None]:
        """Raise `Diverged` for a ValueError in the context if the network's output is not finite.

        Attacks raise ValueError for logits that are NaN.
        """
        try:
            yield
        except ValueError as error:
            if self.sharded:  # the other processes may not make the pass below
                raise
            with torch.no_grad():
                if self.network(x).isfinite().all():
                    raise
            self._diverged("the network's output", error)

    def _arrived(self, name: str, now: Tensor) -> Tensor | None:
        """Return the value of the copy called `name` if it has reached the host, else None.

        If no such copy is underway, start one of `now`.
        """
        if name not in self.underway:
            self.underway[name] = start_host_copy(now.detach())
        value = self.underway[name]()
        if value is not None:
            del self.underway[name]
        return value

    def _check(self, loss: float) -> None:
        if not math.isfinite(loss):
            self._diverged(f"the loss ({loss})")

    def _diverged(self, what: str, cause: Exception | None = None) -> None:
        saved = "no state saved, there is no run folder"
        try:
            if self.sharded:  # the other processes may not have diverged yet
                saved = "no state saved, the network is sharded"
            else:
                self.save("diverged.pt", self.totals)
            if self.folder is not None and not self.sharded:
                saved = f"state saved to {self.folder / 'diverged.pt'}"
        except OSError as error:
            saved = f"state not saved: {error}"
        raise Diverged(
            f"{what} is not finite at epoch {self.epoch}, step {self.step + 1} (learning rate "
            f"{self.lr:.3g}); {saved}. "
            "A lower lr or precision fp32 usually helps; checkpoint.pt holds an earlier state."
        ) from cause

    def _end_epoch(self, seconds: float) -> None:
        if self.sharded:
            sharding.share_buffers(self.network)
        record = self._record(seconds)
        if self.scheduler is not None and self.scheduler_every == "epoch":
            plateau = isinstance(self.scheduler, ReduceLROnPlateau)
            self.scheduler.step(*([record["loss"]] if plateau else []))
        self._call("on_epoch", record)
        best = self.records.is_best(record)
        self.records.append(record)
        self.epoch, self.step, self.totals = self.epoch + 1, 0, self._no_totals()
        self.known, self.underway = [], {}
        if best:
            # First, so that no checkpoint is ahead of it: `newest_state` resumes from either.
            self.save("best.pt", self.totals)
        self.save()
        self.display.epoch(record, self.config.epochs)

    # -- schedules -----------------------------------------------------------------------------

    @property
    def lr(self) -> float:
        """The learning rate of the next step."""
        c = self.config
        if self.own_optimizer or c.lr is None or c.schedule is None:
            return self.optimizer.param_groups[0]["lr"]
        done = (self.epoch - 1) * len(self.batches) + self.step
        progress = done / (c.epochs * len(self.batches))
        return c.lr * lr_factor(c.schedule, progress, c.milestones or (), c.factors)

    def _warm_up(self) -> None:
        """Set this epoch's eps and alpha, which grow over the first `eps_warmup` epochs.

        With a large radius from the start some networks learn nothing.
        """
        epochs = self.config.eps_warmup
        for attack in self.objective.attacks(self.epoch) if epochs else ():
            share = min(1.0, self.epoch / epochs)
            eps, alpha = share * self.config.eps, share * self.config.alpha
            settings = attack.settings
            if isinstance(settings, GradientSettings):
                attack.settings = replace(settings, eps=eps, alpha=alpha)
            else:
                attack.settings = replace(settings, eps=eps)

    # -- metrics -------------------------------------------------------------------------------

    @property
    def result(self) -> nn.Module:
        """The network to evaluate: the average of the weights if the run has one."""
        return self.model if self.average is None else self.average.module

    def _no_totals(self) -> Tensor:
        """Return zeros for [samples, summed loss, correct on x_adv, histogram of kappa]."""
        size = 3 + self.config.steps + 1
        return torch.zeros(size, dtype=torch.float64, device=self.accelerator.device)

    def _count(self, summed_loss: Tensor, y: Tensor) -> None:
        last = self.objective.last
        self.totals[0] += len(y)
        self.totals[1] += summed_loss.double()
        if last["logits_adv"] is not None:
            self.totals[2] += (last["logits_adv"].argmax(1) == y).sum()
        if last["kappa"] is not None:
            self.totals[3:].scatter_add_(0, last["kappa"], torch.ones_like(y, dtype=torch.float64))

    def _summary(self) -> str:
        totals = self._arrived("totals", self.totals[:3])
        if totals is not None:
            self.known = totals.tolist()
        if not self.known:
            return ""
        n, loss, correct = self.known
        robust = percent(correct / n) if self.objective.attack is not None else "-"
        clean = percent(self.records[-1]["train_clean"]) if self.records else "-"
        return f"loss {loss / n:.3f}  robust {robust}  clean {clean}"

    def _record(self, seconds: float) -> dict[str, Any]:
        n, loss, correct, *kappa = self.accelerator.reduce(self.totals, "sum").tolist()
        self._check(loss)
        attacked = self.objective.attack is not None
        record = {
            "epoch": self.epoch,
            "lr": self.optimizer.param_groups[0]["lr"],
            "loss": loss / n,
            "train_clean": None,
            "train_robust": correct / n if attacked else None,
            "kappa": [int(k) for k in kappa] if attacked else None,
            "val_clean": None,
            "val_robust": None,
            "seconds": seconds,
        }
        if self.probe is not None:
            record["train_clean"] = self._evaluate(self.probe, {})["clean"].accuracy
        if self.val is not None:
            report = self._evaluate(self.val, {"robust": self._judge()})
            record["val_clean"] = report["clean"].accuracy
            record["val_robust"] = report["robust"].accuracy
        return record

    def _evaluate(self, samples: _Samples, attacks: dict[str, PGD]) -> evaluation.Report:
        c = self.config
        return evaluation.evaluate(
            self.result,
            *samples,
            eps=c.eps,
            norm=c.norm,
            attacks=attacks,
            chunk=self.chunk,
            progress=None,
        )

    def _judge(self) -> PGD:
        """Return the attack that chooses best.pt.

        It ascends the margin, because reweighted training can look robust to cross-entropy alone.
        """
        c = self.config
        return PGD(norm=c.norm, eps=c.eps, alpha=c.alpha, steps=c.steps, loss="margin", seed=c.seed)

    # -- checkpoints ---------------------------------------------------------------------------

    def save(self, name: str = "checkpoint.pt", totals: Tensor | None = None) -> None:
        """Write the whole state to the file `name` of the run folder, in the main process.

        All processes must call this together, unless `totals` are given and the network is not
        sharded: then none waits for another, which matters where they may disagree (on divergence).
        """
        states = self._states_of_parts()
        if totals is None:
            totals = self.accelerator.reduce(self.totals, "sum")
        model, optimizer = self.network.state_dict(), self.optimizer.state_dict()
        if self.sharded:
            model, optimizer = sharding.whole(model), sharding.whole(optimizer)
        if not self.accelerator.is_main_process or self.folder is None:
            return
        scaler = self.accelerator.scaler
        state = {
            **states,
            "config": self.config.to_dict(),
            "architecture": self.architecture,
            "parts": self.parts,
            "epoch": self.epoch,
            "step": self.step,
            "model": model,
            "average": None if self.average is None else self.average.state_dict(),
            "optimizer": optimizer,
            "objective": self.objective.state_dict(),
            "scaler": scaler.state_dict() if scaler is not None else None,
            "rng": checkpoint.rng_state(),
            "totals": totals.cpu(),
            "records": list(self.records),
        }
        checkpoint.save(self.folder / name, state)

    def _states_of_parts(self) -> dict[str, Any]:
        """Return the states of the scheduler and of the callbacks.

        Raise ValueError for a state that could not be read back, which would lose the checkpoint.
        """
        scheduler = None if self.scheduler is None else self.scheduler.state_dict()
        callbacks = [callback.state_dict() for callback in self.callbacks]
        if self.folder is not None:
            checkpoint.check_readable(f"scheduler {type(self.scheduler).__name__}", scheduler)
            for callback, state in zip(self.callbacks, callbacks, strict=True):
                checkpoint.check_readable(f"callback {type(callback).__name__}", state)
        return {"scheduler": scheduler, "callbacks": callbacks}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a state that `save` wrote.

        Raises:
            ValueError: if the run had other data or other parts.
        """
        checkpoint.check_parts(state, self.parts)
        if state["architecture"] != self.architecture:
            raise ValueError(
                f"the run's network, {state['architecture']}, does not fit the data: "
                f"they need {self.architecture}"
            )
        if self.sharded:
            sharding.load_model(self.network, state["model"])
            sharding.load_optimizer(self.optimizer, state["optimizer"])
        else:
            self.network.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        if self.scheduler is not None and state.get("scheduler") is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        counted = "parts" in state
        for callback, kept in zip(self.callbacks, state.get("callbacks", ()), strict=counted):
            callback.load_state_dict(kept)
        self.objective.load_state_dict(state["objective"])
        if state["scaler"] is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.epoch, self.step = state["epoch"], state["step"]
        if self.accelerator.is_main_process:  # the totals of all processes are summed
            self.totals.copy_(state["totals"])
        self.records.restore(state["records"])
        checkpoint.set_rng_state(state["rng"])


def _name(part: Any) -> str:
    """Return the name of the class of a part, for the settings of a run."""
    return f"{type(part).__module__}.{type(part).__qualname__}"


def _the_data(
    data: Images | None,
    train: Loader | None,
    val: Loader | None,
    test: Loader | None,
    model: nn.Module | None,
) -> Images | Loaders:
    """Return the data of a run: a data set, or the user's loaders."""
    if data is not None and train is None:
        if val is not None or test is not None:
            raise ValueError("val and test are loaders that go with train; a data set has its own")
        return data
    if train is None or data is not None:
        raise ValueError("Trainer needs data or train, and not both")
    loaders = Loaders(train, val, test)
    if not loaders.classes:
        if model is None:
            raise ValueError(
                "train does not tell the number of classes (train.dataset.classes): pass a model"
            )
        loaders.classes = tuple(map(str, range(models.count_logits(model, loaders.shape))))
    return loaders


def _check_parts(
    config: Config | None, model: Any, optimizer: Any, scheduler: Any, scheduler_every: Every
) -> None:
    """Raise ValueError for parts that do not fit together; `config` is None for a resumed run."""
    if scheduler_every not in EVERY:
        raise ValueError(f"scheduler_every must be 'epoch' or 'step', got {scheduler_every!r}")
    if scheduler is not None and optimizer is None:
        raise ValueError("scheduler needs an optimizer of your own; config.schedule is for ours")
    if model is None and isinstance(optimizer, Optimizer):
        raise ValueError(
            "optimizer must be a function of the parameters where config names the network"
        )
    if config is None:
        return
    if optimizer is not None:
        for name in ("lr", "schedule", "milestones"):
            if getattr(config, name) is not None:
                raise ValueError(f"config.{name} is for the optimizer of pyadv: drop it, or yours")
    if model is not None:
        for name in ("model", "model_args", "weights"):
            if getattr(config, name):
                raise ValueError(f"config.{name} names a network: drop it, or model")


def _check_optimizer(optimizer: Any, model: nn.Module) -> None:
    if not isinstance(optimizer, Optimizer):
        raise ValueError(f"optimizer must be a torch Optimizer, got a {type(optimizer).__name__}")
    known = {id(p) for p in model.parameters()}
    if any(id(p) not in known for group in optimizer.param_groups for p in group["params"]):
        raise ValueError("optimizer must have the parameters of model alone; it has others")


def _scheduler(scheduler: Any, optimizer: Optimizer) -> LRScheduler | None:
    """Return the scheduler that is given, or the one that the given function makes."""
    made = scheduler is None or (hasattr(scheduler, "step") and not isinstance(scheduler, type))
    return scheduler if made else scheduler(optimizer)


def _check_scheduler(scheduler: Any, every: Every, optimizer: Optimizer) -> None:
    if isinstance(scheduler, ReduceLROnPlateau) and every == "step":
        raise ValueError(
            "scheduler_every must be 'epoch' for ReduceLROnPlateau, which reads the loss of an "
            "epoch, got 'step'"
        )
    if getattr(scheduler, "optimizer", optimizer) is not optimizer:
        raise ValueError(
            "scheduler must be a scheduler of the optimizer that is given: it has another one; a "
            "function of the optimizer makes one"
        )


class _Average(AveragedModel):
    """An exponential moving average of a network's weights and BatchNorm statistics.

    The step count stays on the host: PyTorch's own update would wait for the device.
    """

    def __init__(self, model: nn.Module, decay: float, device: torch.device) -> None:
        super().__init__(model, use_buffers=True)
        self.decay = decay
        self.to(device).eval()
        self.n_averaged = self.n_averaged.cpu()

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        ours, theirs = ([*m.parameters(), *m.buffers()] for m in (self.module, model))
        pairs = list(zip(ours, theirs, strict=True))
        if self.n_averaged > 0:
            floats = [(mine, now) for mine, now in pairs if mine.is_floating_point()]
            averages, current = map(list, zip(*floats, strict=True))
            torch._foreach_lerp_(averages, current, 1 - self.decay)
            pairs = [(mine, now) for mine, now in pairs if not mine.is_floating_point()]
        for mine, now in pairs:
            mine.copy_(now)
        self.n_averaged += 1
