"""The training loop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from pyadv import evaluation
from pyadv._host_copy import start_host_copy
from pyadv.attacks import PGD
from pyadv.training import build, checkpoint
from pyadv.training.config import PRECISIONS, Config
from pyadv.training.display import Display, percent
from pyadv.training.records import Records
from pyadv.training.schedules import lr_factor
from pyadv.training.stop import StopSignal

_PROBE = 1000  # training images on which clean accuracy is measured after each epoch


class Interrupted(Exception):
    """A signal stopped the run; its state is saved."""


class Diverged(ArithmeticError):
    """The loss or the network's output is no longer finite."""


class Trainer:
    """A run in `folder`: it trains, records, saves after every epoch and on a signal, and resumes.

    A step is `objective(model, x, y, epoch=e, ids=ids)` and an SGD update. Learning rate, data
    order, augmentation and attack noise are functions of (config, epoch, step). A checkpoint
    therefore holds weights, momenta, the attack's draw counter and the states of torch's
    generators, and a resumed run gives the same bits as an uninterrupted one (in one process on
    the CPU).

    No step waits for the GPU: the training set is stored on it, and the totals that are shown and
    the loss that is checked may be a few steps old.

    Args:
        config: settings resolved for `data`.
        data: the data set, in memory or streamed.
        folder: the run folder, which must exist before the first save; receives checkpoint.pt,
            metrics.jsonl and, with held-out data, best.pt.
        device: "cpu", "cuda", "cuda:1"; by default CUDA if available, and the process's own card
            in a distributed run.
        display: shows progress.
        fresh: whether the run begins, with the weights that `config` names; False if `restore`
            follows, which needs none.
    """

    def __init__(
        self,
        config: Config,
        data: build.Images,
        folder: Path,
        *,
        device: str | None = None,
        display: Display | None = None,
        fresh: bool = True,
    ) -> None:
        place = build.device(device)
        if place.index is not None:
            torch.cuda.set_device(place)
        self.accelerator = Accelerator(
            cpu=place.type == "cpu", mixed_precision=PRECISIONS[config.precision]
        )
        self.config, self.folder = config, folder
        main = self.accelerator.is_main_process
        self.display = (display or Display()) if main else Display(quiet=True)
        torch.manual_seed(config.seed)
        self.architecture = build.architecture(config, data)
        model = build.network(config, self.architecture, fresh=fresh)
        if config.channels_last:
            model = model.to(memory_format=torch.channels_last)
        device = self.accelerator.device
        self.average = _Average(model, config.ema, device) if config.ema else None
        optimizer = torch.optim.SGD(
            model.parameters(),
            lr=config.lr,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
        )
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.network = self.accelerator.unwrap_model(self.model)
        self.objective = build.objective(config, self.network, data)

        self.chunk = build.chunk(data)
        kept, held = data.hold_out(config.val, config.seed)
        self.probe = data.samples("train", kept[:_PROBE])
        self.val = data.samples("train", held) if len(held) else None
        self.batches = build.batches(
            config,
            data,
            kept,
            device=self.accelerator.device,
            rank=self.accelerator.process_index,
            world=self.accelerator.num_processes,
        )
        self.epoch, self.step = 1, 0  # of the next step
        self.totals = self._no_totals()
        self.known: list[float] = []  # totals that have reached the host
        self.underway: dict[str, Callable[[], Tensor | None]] = {}  # copies from the device
        self.records = Records(folder, active=main)
        self._judge()  # refuses settings of the evaluation before any work

    # -- the loop ------------------------------------------------------------------------------

    def fit(self) -> None:
        """Train to the end.

        Raises:
            Interrupted: on SIGINT or SIGTERM, after saving.
            Diverged: if the loss is not finite.
            OSError: if a file cannot be written, with `errno` ENOSPC if the disk is full.
        """
        with StopSignal(self.accelerator) as stop:
            while self.epoch <= self.config.epochs:
                started = time.perf_counter()
                self._train_epoch(stop)
                self._end_epoch(time.perf_counter() - started)

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

    def _train_step(self, x: Tensor, y: Tensor, ids: Tensor) -> None:
        if self.config.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr
        self.model.train()
        loss = self._loss(x, y, ids)
        self.optimizer.zero_grad()
        self.accelerator.backward(loss)
        self.optimizer.step()
        if self.average is not None:
            self.average.update_parameters(self.network)
        self._count(loss.detach(), y)
        self.step += 1

    def _loss(self, x: Tensor, y: Tensor, ids: Tensor) -> Tensor:
        try:
            loss = self.objective(self.model, x, y, epoch=self.epoch, ids=ids)
        except ValueError as error:  # attacks raise it for logits that are NaN
            with torch.no_grad():
                if self.network(x).isfinite().all():
                    raise
            self._diverged("the network's output", error)
        value = self._arrived("loss", loss)
        if value is not None:
            self._check(value.item())
        return loss

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
        try:
            self.save("diverged.pt", self.totals)
            saved = f"state saved to {self.folder / 'diverged.pt'}"
        except OSError as error:
            saved = f"state not saved: {error}"
        raise Diverged(
            f"{what} is not finite at epoch {self.epoch}, step {self.step + 1} (learning rate "
            f"{self.lr:.3g}); {saved}. "
            "A lower lr or precision fp32 usually helps; checkpoint.pt holds an earlier state."
        ) from cause

    def _end_epoch(self, seconds: float) -> None:
        record = self._record(seconds)
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
        done = (self.epoch - 1) * len(self.batches) + self.step
        c = self.config
        progress = done / (c.epochs * len(self.batches))
        return c.lr * lr_factor(c.schedule, progress, c.milestones, c.factors)

    def _warm_up(self) -> None:
        """Set this epoch's eps and alpha, which grow over the first `eps_warmup` epochs.

        With a large radius from the start some networks learn nothing.
        """
        epochs = self.config.eps_warmup
        for attack in self.objective.attacks(self.epoch) if epochs else ():
            share = min(1.0, self.epoch / epochs)
            eps, alpha = share * self.config.eps, share * self.config.alpha
            attack.settings = replace(attack.settings, eps=eps, alpha=alpha)

    # -- metrics -------------------------------------------------------------------------------

    @property
    def result(self) -> nn.Module:
        """The network to evaluate: the average of the weights if the run has one."""
        return self.model if self.average is None else self.average.module

    def _no_totals(self) -> Tensor:
        """Return zeros for [samples, summed loss, correct on x_adv, histogram of kappa]."""
        size = 3 + self.config.steps + 1
        return torch.zeros(size, dtype=torch.float64, device=self.accelerator.device)

    def _count(self, loss: Tensor, y: Tensor) -> None:
        last = self.objective.last
        self.totals[0] += len(y)
        self.totals[1] += loss.double() * len(y)
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
            "train_clean": self._evaluate(self.probe, {})["clean"].accuracy,
            "train_robust": correct / n if attacked else None,
            "kappa": [int(k) for k in kappa] if attacked else None,
            "val_clean": None,
            "val_robust": None,
            "seconds": seconds,
        }
        if self.val is not None:
            report = self._evaluate(self.val, {"robust": self._judge()})
            record["val_clean"] = report["clean"].accuracy
            record["val_robust"] = report["robust"].accuracy
        return record

    def _evaluate(self, samples: tuple, attacks: dict[str, PGD]) -> evaluation.Report:
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

        All processes must call this together, unless `totals` are given: then none waits for
        another, which matters where they may disagree (on divergence, on the best epoch).
        """
        if totals is None:
            totals = self.accelerator.reduce(self.totals, "sum")
        if not self.accelerator.is_main_process:
            return
        scaler = self.accelerator.scaler
        state = {
            "config": self.config.to_dict(),
            "architecture": self.architecture,
            "epoch": self.epoch,
            "step": self.step,
            "model": self.network.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "objective": self.objective.state_dict(),
            "scaler": scaler.state_dict() if scaler is not None else None,
            "rng": checkpoint.rng_state(),
            "totals": totals.cpu(),
            "records": list(self.records),
        }
        checkpoint.save(self.folder / name, state)

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a state that `save` wrote. Raise ValueError if its data was another."""
        if state["architecture"] != self.architecture:
            raise ValueError(
                f"the run's network, {state['architecture']}, does not fit the data: "
                f"they need {self.architecture}"
            )
        self.network.load_state_dict(state["model"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.objective.load_state_dict(state["objective"])
        if state["scaler"] is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.epoch, self.step = state["epoch"], state["step"]
        if self.accelerator.is_main_process:  # the totals of all processes are summed
            self.totals.copy_(state["totals"])
        self.records.restore(state["records"])
        checkpoint.set_rng_state(state["rng"])


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
            torch._foreach_lerp_(*map(list, zip(*floats, strict=True)), 1 - self.decay)
            pairs = [(mine, now) for mine, now in pairs if not mine.is_floating_point()]
        for mine, now in pairs:
            mine.copy_(now)
        self.n_averaged += 1
