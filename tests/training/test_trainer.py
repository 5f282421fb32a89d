"""Training: exact resumption, signals, kills, divergence, and the files of the run folder."""

from __future__ import annotations

import dataclasses
import errno
import io
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from pyadv import training
from pyadv.data import ImageData
from pyadv.evaluation import evaluate
from pyadv.passes import view
from pyadv.training import (
    Config,
    Display,
    Diverged,
    FolderInUse,
    Interrupted,
    Trainer,
    checkpoint,
    load_model,
)

QUIET = Display(quiet=True)
FAST = {"epochs": 3, "batch_size": 32, "steps": 2, "lr": 0.05}  # 4 batches an epoch


def train(data: ImageData, folder: Path, **settings: Any):
    config = Config(**{**FAST, **settings})
    return training.train(config, folder, data=data, device="cpu", display=QUIET)


def resume(data: ImageData, folder: Path):
    return training.resume(folder, data=data, device="cpu", display=QUIET)


def stop_after(monkeypatch: pytest.MonkeyPatch, steps: int, number: int = signal.SIGINT) -> None:
    """Send this process a signal in the middle of step `steps`."""
    original, done = Trainer._count, []

    def count(self: Trainer, *args: Any) -> None:
        done.append(1)
        if len(done) == steps:
            signal.raise_signal(number)
        original(self, *args)

    monkeypatch.setattr(Trainer, "_count", count)


def differences(a: Any, b: Any, path: str = "") -> list[str]:
    """Return the paths at which two nested states differ, apart from wall-clock times."""
    if isinstance(a, dict):
        keys = (a.keys() | b.keys()) - {"seconds"}
        return [d for k in keys for d in differences(a.get(k), b.get(k), f"{path}/{k}")]
    if isinstance(a, (list, tuple)):
        if len(a) != len(b):
            return [f"{path}: lengths {len(a)}, {len(b)}"]
        return [
            d for i, p in enumerate(zip(a, b, strict=True)) for d in differences(*p, f"{path}/{i}")
        ]
    same = torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    return [] if same else [path]


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"method": "at", "augment": True}, 6),
        ({"method": "at", "val": 4}, 6),  # the last step of an epoch
        ({"method": "gairat", "begin_epoch": 2, "emr": 0.01}, 5),
        ({"method": "fat", "eps_warmup": 3}, 9),
        ({"method": "standard"}, 1),
        ({"method": "trades", "start": "normal_small"}, 7),
        ({"method": "mail-at", "begin_epoch": 2}, 6),
        ({"awp": 0.01, "norm_penalty": 0.01, "ema": 0.9}, 5),
    ],
)
def test_interrupted_and_resumed_equals_uninterrupted(
    small: ImageData,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
    steps: int,
) -> None:
    epoch, step = divmod(steps - 1, 3 if "val" in settings else 4)
    whole = train(small, tmp_path / "whole", **settings)
    with monkeypatch.context() as patch:
        stop_after(patch, steps)
        with pytest.raises(Interrupted, match=f"epoch {epoch + 1} after step {step + 1}"):
            train(small, tmp_path / "cut", **settings)
    torch.manual_seed(99)  # as in a new process, the generator has another state
    resumed = resume(small, tmp_path / "cut")

    states = [checkpoint.load(tmp_path / f / "checkpoint.pt") for f in ("whole", "cut")]
    assert not differences(*states)
    assert whole.to_dict() == resumed.to_dict()
    lines = [(tmp_path / f / "metrics.jsonl").read_text().splitlines() for f in ("whole", "cut")]
    assert not differences(*([json.loads(line) for line in part] for part in lines))


def test_a_crash_costs_at_most_the_epoch(
    small: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(small, tmp_path / "whole")
    save = Trainer.save

    def crash(self: Trainer) -> None:
        """Fail after the record of epoch 2 is written and before its checkpoint is."""
        if self.epoch > 2:
            raise Crash
        save(self)

    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr(Trainer, "save", crash)
        train(small, tmp_path / "cut")
    assert len((tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()) == 2
    resume(small, tmp_path / "cut")
    epochs = (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in epochs] == [1, 2, 3]
    states = [checkpoint.load(tmp_path / f / "checkpoint.pt") for f in ("whole", "cut")]
    assert not differences(*states)


class Crash(BaseException):
    """What no part of the library catches."""


def crash(*_: Any, **__: Any) -> None:
    raise Crash


def test_a_kill_in_the_first_epoch_can_be_resumed(
    small: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(small, tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr(Trainer, "_count", crash)
        train(small, tmp_path / "cut")
    with pytest.raises(FileExistsError, match="holds a run already; resume it"):
        train(small, tmp_path / "cut")
    resume(small, tmp_path / "cut")
    states = [checkpoint.load(tmp_path / f / "checkpoint.pt") for f in ("whole", "cut")]
    assert not differences(*states)


def test_a_kill_before_the_first_checkpoint_can_start_again(
    small: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr(Trainer, "save", crash)
        train(small, tmp_path / "run")
    with pytest.raises(FileNotFoundError, match="no checkpoint at .* start it again"):
        resume(small, tmp_path / "run")
    train(small, tmp_path / "run", epochs=1)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["epochs"] == 1


@pytest.mark.parametrize("written", [0, 1])
def test_best_is_not_lost_between_the_two_files(
    small: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: int
) -> None:
    """Whether the process dies before or after it wrote the first file, both agree later."""
    train(small, tmp_path / "whole", val=20, epochs=2)
    whole = [checkpoint.load(tmp_path / "whole" / f) for f in ("best.pt", "checkpoint.pt")]
    best = whole[0]["records"][-1]["epoch"]
    folder, left, save = tmp_path / "cut", [], checkpoint.save

    def interrupted(path: Path, state: dict[str, Any]) -> None:
        if len(state["records"]) == best and len(left) == written:
            raise Crash
        if len(state["records"]) == best:
            left.append(path.name)
        save(path, state)

    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr(checkpoint, "save", interrupted)
        train(small, folder, val=20, epochs=2)
    assert left == ["best.pt"][:written]
    if written:  # the best network is there even if nobody resumes
        assert not differences(whole[0], checkpoint.load(folder / "best.pt"))
        # Resuming must not compute the epoch again: another device could find another result.
        assert checkpoint.newest_state(folder)["epoch"] == best + 1
    resume(small, folder)
    states = [checkpoint.load(folder / f) for f in ("best.pt", "checkpoint.pt")]
    assert not differences(whole, states)


def test_a_strange_best_is_not_resumed_from(small: ImageData, tmp_path: Path) -> None:
    train(small, tmp_path / "other", val=20, seed=1, epochs=2)
    train(small, tmp_path / "run", val=20, epochs=1)
    for other in ((tmp_path / "other" / "checkpoint.pt").read_bytes(), b"damaged"):
        (tmp_path / "run" / "best.pt").write_bytes(other)
        assert checkpoint.newest_state(tmp_path / "run")["config"]["seed"] == 0


def test_a_folder_in_use_is_refused(
    small: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def second(self: Trainer, *_: Any) -> None:
        (tmp_path / "run" / "checkpoint.pt").unlink()  # as if it were not written yet
        for start in (train, resume):
            with pytest.raises((FolderInUse, FileNotFoundError)) as caught:
                start(small, tmp_path / "run")
            seen.append(caught.type)
            self.save()
        raise Crash

    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr(Trainer, "_count", second)
        train(small, tmp_path / "run")
    assert seen == [FolderInUse, FolderInUse]
    assert not (tmp_path / "run" / "run.lock").exists()


def test_a_full_disk_keeps_the_run(
    small: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(small, tmp_path / "whole")

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch, pytest.raises(OSError, match="cannot write .* it needs"):
        start = Trainer._train_epoch

        def fill(self: Trainer, stop: Any) -> None:
            start(self, stop)
            if self.epoch == 2:
                patch.setattr(os, "fsync", full)

        patch.setattr(Trainer, "_train_epoch", fill)
        train(small, tmp_path / "cut")
    assert not list((tmp_path / "cut").glob("*.partial"))
    resume(small, tmp_path / "cut")
    states = [checkpoint.load(tmp_path / f / "checkpoint.pt") for f in ("whole", "cut")]
    assert not differences(*states)

    with monkeypatch.context() as patch:
        patch.setattr(
            Trainer, "save", lambda self, name="", *_: full() if name == "diverged.pt" else None
        )
        with pytest.raises(Diverged, match="not finite .*state not saved: .*No space left"):
            train(small, tmp_path / "broken", lr=1e30, schedule="constant")


@pytest.mark.parametrize("error", [BrokenPipeError(), ValueError("closed file"), OSError(5, "EIO")])
def test_a_console_that_fails_does_not_stop_a_run(
    small: ImageData, tmp_path: Path, error: Exception
) -> None:
    class Closed(io.StringIO):
        encoding = "utf-8"

        def write(self, text: str) -> int:
            raise error

    display = Display(Console(file=Closed(), force_terminal=True))
    config = Config(**FAST)
    training.train(config, tmp_path / "run", data=small, device="cpu", display=display)
    assert (tmp_path / "run" / "results.json").exists()


def test_files_are_written_before_anything_is_shown(
    small: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Display, "epoch", crash)
    with pytest.raises(Crash):
        train(small, tmp_path / "run", val=20)
    assert checkpoint.load(tmp_path / "run" / "checkpoint.pt")["epoch"] == 2
    assert (tmp_path / "run" / "best.pt").exists()


def test_settings_of_the_evaluation_are_checked_before_work(
    small: ImageData, tmp_path: Path
) -> None:
    """Standard training has no attack that could refuse them."""
    for settings, message in (({"eps": 8.0}, "eps"), ({"norm": "L3"}, "norm")):
        with pytest.raises(ValueError, match=message):
            train(small, tmp_path / "run", method="standard", **settings)
    assert not (tmp_path / "run").exists()


def test_resume_needs_the_data_of_the_run(small: ImageData, tmp_path: Path) -> None:
    train(small, tmp_path / "run", epochs=1)
    other = dataclasses.replace(
        small, train_x=small.train_x[..., :24], test_x=small.test_x[..., :24]
    )
    with pytest.raises(ValueError, match="does not fit the data: they need .*28, 24"):
        resume(other, tmp_path / "run")


def test_signal_handlers_come_back(
    small: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    with monkeypatch.context() as patch:
        stop_after(patch, 2, signal.SIGTERM)
        with pytest.raises(Interrupted):
            train(small, tmp_path / "run")
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before


def test_run_folder(small: ImageData, tmp_path: Path) -> None:
    report = train(small, tmp_path / "run", method="gairat", val=20)
    folder = tmp_path / "run"
    for picture in ("curves.png", "kappa.png"):
        assert (folder / picture).read_bytes().startswith(b"\x89PNG")
    results = json.loads((folder / "results.json").read_text())
    assert results.pop("provenance")["processes"] == 1 and results == report.to_dict()
    assert json.loads((folder / "config.json").read_text())["eps"] == 0.1
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        assert sum(record["kappa"]) == 80 and len(record["kappa"]) == FAST["steps"] + 1
        assert all(0 <= record[k] <= 1 for k in ("train_clean", "train_robust", "val_robust"))
    best = checkpoint.load(folder / "best.pt")
    robust = [r["val_robust"] for r in records]
    assert best["records"][-1]["epoch"] == 1 + robust.index(max(robust))

    run = load_model(folder)
    again = evaluate(run.model, small.test_x, small.test_y, eps=run.config.eps)
    assert again.to_dict() == report.to_dict()
    with pytest.raises(FileExistsError, match="holds a run already"):
        train(small, folder)


def test_standard_training_has_no_kappa(small: ImageData, tmp_path: Path) -> None:
    train(small, tmp_path / "run", method="standard", epochs=1)
    assert not (tmp_path / "run" / "kappa.png").exists()
    (line,) = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["kappa"] is None and json.loads(line)["train_robust"] is None


def test_divergence_stops_the_run(small: ImageData, tmp_path: Path) -> None:
    with pytest.raises(Diverged, match=r"not finite at epoch 1, step \d .*A lower lr"):
        train(small, tmp_path / "run", lr=1e30, schedule="constant")
    broken = checkpoint.load(tmp_path / "run" / "diverged.pt")
    assert broken["epoch"] == 1
    kept = checkpoint.load(tmp_path / "run" / "checkpoint.pt")
    assert (kept["epoch"], kept["step"]) == (1, 0)


def test_eps_grows_over_the_warm_up(
    small: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, original = [], Trainer._end_epoch

    def end_epoch(self: Trainer, seconds: float) -> None:
        seen.append((self.objective.attack.settings.eps, self.objective.attack.settings.alpha))
        original(self, seconds)

    monkeypatch.setattr(Trainer, "_end_epoch", end_epoch)
    train(small, tmp_path / "run", eps=0.2, eps_warmup=2)
    assert seen == [(0.1, 0.1), (0.2, 0.2), (0.2, 0.2)]  # one step, of size eps


def test_samples_are_known_to_the_objective_by_their_index(
    small: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = Config(**FAST, val=30).resolve(small)
    trainer = Trainer(config, small, tmp_path, device="cpu", display=QUIET)
    seen, call = [], type(trainer.objective).__call__

    def spy(self: Any, model: Any, x: torch.Tensor, *args: Any, ids: torch.Tensor, **more: Any):
        assert model.training and more["epoch"] == trainer.epoch
        assert torch.equal(x, small.train_x[ids])
        seen.extend(ids.tolist())
        return call(self, model, x, *args, ids=ids, **more)

    monkeypatch.setattr(type(trainer.objective), "__call__", spy)
    trainer.fit()
    held = {tuple(v.flatten().tolist()) for v in trainer.val[0]}
    assert len(seen) == 3 * 70 and len(set(seen)) == 70
    assert not held & {tuple(small.train_x[i].flatten().tolist()) for i in set(seen)}


def test_the_average_is_what_is_evaluated(small: ImageData, tmp_path: Path) -> None:
    settings = {"method": "standard", "schedule": "constant", "epochs": 2}
    report = train(small, tmp_path / "run", ema=0.5, **settings)
    state = checkpoint.load(tmp_path / "run" / "checkpoint.pt")
    train(small, tmp_path / "plain", **settings)
    plain = checkpoint.load(tmp_path / "plain" / "checkpoint.pt")
    assert not differences(state["model"], plain["model"])  # averaging does not change training
    run = load_model(tmp_path / "run")
    averaged = run.model.state_dict()
    assert any(not torch.equal(w, averaged[name]) for name, w in state["model"].items())
    again = evaluate(run.model, small.test_x, small.test_y, eps=run.config.eps)
    assert again.to_dict() == report.to_dict()


def test_the_average_over_steps(small: ImageData, tmp_path: Path) -> None:
    """It starts at the first step's weights; then decay * average + (1 - decay) * weights."""
    config = Config(**{**FAST, "epochs": 1}, method="standard", ema=0.75).resolve(small)
    trainer = Trainer(config, small, tmp_path, device="cpu", display=QUIET)
    expected = None
    for x, y, ids in trainer.batches.epoch(1, 0):
        trainer._train_step(x, y, ids)
        weights = [p.detach().clone() for p in trainer.network.parameters()]
        if expected is None:
            expected = weights
        else:
            expected = [0.75 * e + 0.25 * w for e, w in zip(expected, weights, strict=True)]
    for e, p in zip(expected, trainer.result.parameters(), strict=True):
        torch.testing.assert_close(p.detach(), e)


def test_bf16_attacks_a_view_in_bf16(small: ImageData, tmp_path: Path) -> None:
    """Accelerate's autocast around the network's forward does not prevent it."""
    config = Config(**{**FAST, "epochs": 1}, precision="bf16", channels_last=True).resolve(small)
    (tmp_path / "run").mkdir()
    trainer = Trainer(config, small, tmp_path / "run", device="cpu", display=QUIET)
    trainer.fit()
    assert "forward" in vars(trainer.network)
    assert list(view._views[trainer.network]) == [torch.bfloat16]


def test_bf16_trains(small: ImageData, tmp_path: Path) -> None:
    train(small, tmp_path / "run", precision="bf16", epochs=1)
    state = checkpoint.load(tmp_path / "run" / "checkpoint.pt")
    assert all(v.dtype == torch.float32 for v in state["model"].values())
    (record,) = state["records"]
    assert 0 < record["loss"] < 5


def test_what_arrives_late_changes_nothing(
    small: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, losses and totals reach the host a few steps late."""
    train(small, tmp_path / "at once", epochs=2)

    def late_copy(t: torch.Tensor) -> Callable[[], torch.Tensor | None]:
        copy, vain = t.clone(), iter(range(2))
        return lambda: copy if next(vain, None) is None else None

    monkeypatch.setattr("pyadv.training.trainer.start_host_copy", late_copy)
    train(small, tmp_path / "late", epochs=2)
    one, other = (checkpoint.load(tmp_path / n / "checkpoint.pt") for n in ("at once", "late"))
    assert not differences(one, other)
    with pytest.raises(Diverged, match="not finite"):
        train(small, tmp_path / "broken", lr=1e30, schedule="constant")


def test_channels_last_trains(small: ImageData, tmp_path: Path) -> None:
    train(small, tmp_path / "plain", epochs=1)
    train(small, tmp_path / "last", epochs=1, channels_last=True)
    one, other = (checkpoint.load(tmp_path / n / "checkpoint.pt") for n in ("plain", "last"))
    for name, value in one["model"].items():
        torch.testing.assert_close(other["model"][name], value, rtol=0.05, atol=0.05)


@pytest.mark.slow
def test_adversarial_training_pays(subset: Callable[[int, int], ImageData], tmp_path: Path) -> None:
    """On 2,000 images AT beats standard training under PGD by far more than noise."""
    data, robust = subset(2000, 500), {}
    for method in ("standard", "at"):
        config = Config(method=method, epochs=8)
        report = training.train(config, tmp_path / method, data=data, device="cpu", display=QUIET)
        robust[method] = report["PGD-20"].accuracy
    assert robust["at"] > robust["standard"] + 0.3
