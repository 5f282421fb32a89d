"""What each stage of gpu_setting.py does, in a process of its own.

Every function takes a `Setting` and leaves its results in the folder `out`.
"""

from __future__ import annotations

import io
import itertools
import json
import lzma
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness

METHODS: dict[str, dict[str, Any]] = {
    "at": {"method": "at"},
    "gairat": {"method": "gairat"},
    "at-emr": {"method": "at", "emr": 3 / 128},
    "fat": {"method": "fat"},
    "trades": {"method": "trades"},
    "mail-at": {"method": "mail-at"},
    "trades-emr": {"method": "trades", "emr": 3 / 128},
}
RECORD_SECONDS = 180.0  # of training in the stage `record`
_COMMON = {"precision": "bf16", "channels_last": True, "schedule": "cyclic", "model": "resnet-18"}
_FAST = {"method": "at", "ema": 0.995, "lr": 0.2}


@dataclass(frozen=True)
class Setting:
    """Where a stage finds its data and leaves its results. `dry` asks for a tiny run on the CPU."""

    out: Path
    runs: Path
    data: Path | None = None
    dry: bool = False

    @property
    def device(self) -> str:
        """The device of all stages, as a string."""
        return "cpu" if self.dry else "cuda"


def run(name: str, setting: Setting) -> None:
    """Run one stage or one of its parts, by name."""
    if name in METHODS:
        train(setting, name, {**METHODS[name], "epochs": 15})
    else:
        PARTS[name](setting)


def write(path: Path, content: dict[str, Any]) -> None:
    """Write JSON so that a reader finds the old file or the new one, never a part."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1) + "\n")
    part.replace(path)


def build(setting: Setting) -> None:
    """Compile the kernels for the card."""
    import pyadv
    from pyadv import _native

    status = pyadv.build()
    print(_native.report())
    if not setting.dry and status.cuda.path is None:
        sys.exit(f"no CUDA kernels: {status.cuda.reason}")


def every_kernel(setting: Setting) -> None:
    """Run every kernel once at small odd sizes and compare it with its reference, for the
    sanitizer."""
    _kernels(setting, quick=True)


def large_kernels(setting: Setting) -> None:
    """Run every kernel once at the sizes of the table, for the counters."""
    _kernels(setting, quick=setting.dry)


def _kernels(setting: Setting, quick: bool) -> None:
    import gpu_kernels
    import torch

    wrong, device = [], torch.device(setting.device)

    def check(name: str, result: Any, expected: Any, dtype: torch.dtype = torch.float32) -> None:
        loose = 1e-4 if dtype == torch.float32 else 2e-2
        difference = harness.close(expected, loose, loose / 10)(result)
        print(name, difference or "")
        if difference:
            wrong.append(name)

    for kernel in gpu_kernels.kernels(quick):
        ours, theirs = gpu_kernels.calls(kernel, device)
        check(kernel.name, ours(), theirs(), kernel.dtype)
    for name, call, expected, _ in gpu_kernels.norm_calls(device, quick):
        check(name, call(), expected)
    if setting.device == "cuda":
        torch.cuda.synchronize()
    if wrong:
        sys.exit("wrong: " + ", ".join(wrong))


def autoattack(setting: Setting) -> None:
    """Compare AutoAttack with the authors' package, on the network of `record` or, before there is
    one, on a network trained for three epochs."""
    import gpu_autoattack
    import peers
    import torch

    from pyadv.training import load_model

    data = load_data(setting)
    name = "record" if (setting.out / "record.json").exists() else "brief"
    if name == "brief":
        _trainer(setting, name, {**_FAST, "epochs": 3}, data).fit()
    run = load_model(setting.runs / name)
    device = torch.device(setting.device)
    n = 4 if setting.dry else gpu_autoattack.IMAGES
    x, y = data.test_x[:n].to(device), data.test_y[:n].to(device)
    versions = peers.installed()
    environment = {**harness.environment(device), "peers": versions, "clock": "wall"}
    environment["network"] = f"{run.config.model}, {run.config.epochs} epochs on {data.name}"
    begin, rows = time.perf_counter(), []
    with peers.quiet():
        for row in gpu_autoattack.rows(
            run.model.to(device), x, y, run.config.eps, versions, quick=setting.dry
        ):
            rows.append(row)
            environment["seconds"] = round(time.perf_counter() - begin, 1)
            harness.save(setting.out / "gpu_autoattack.json", environment, rows)


def record(setting: Setting) -> None:
    """Train for as many epochs as fill three minutes; then measure how strong the attack is at
    every speed on the trained network, over all test images, and where the time of a step goes."""
    import torch

    from pyadv.attacks import PGD
    from pyadv.training import load_model

    epochs = _epochs_that_fit(setting, "record", _FAST, RECORD_SECONDS)
    trainer, data, found = train(setting, "record", {**_FAST, "epochs": epochs})
    model = load_model(trainer.folder).model.to(setting.device)
    eps, correct = found["eps"], {}
    for speed in ("exact", "fast", "bfloat16"):
        attack = PGD(model, eps=eps, alpha=eps / 4, steps=10, seed=0, speed=speed)
        pairs = zip(data.test_x.split(500), data.test_y.split(500), strict=True)
        parts = [
            attack.run(x.to(setting.device), y.to(setting.device), draw=0).correct for x, y in pairs
        ]
        correct[speed] = torch.cat(parts)
    found["PGD-10"] = {k: v.double().mean().item() for k, v in correct.items()}
    found["otherwise"] = {k: int((v != correct["exact"]).sum()) for k, v in correct.items()}
    write(setting.out / "record.json", found)
    found["profile"] = _profile(trainer)  # last, because it trains on
    write(setting.out / "record.json", found)


def _epochs_that_fit(setting: Setting, name: str, settings: dict[str, Any], seconds: float) -> int:
    """Return how many epochs take about `seconds`, from the time of 20 steps. An interrupted run
    keeps the number it began with, because the learning rate depends on it."""
    known = setting.runs / name / "epochs.json"
    if known.exists():
        return json.loads(known.read_text())["epochs"]
    trainer = _trainer(setting, f"{name}-timing", {**settings, "epochs": 1}, load_data(setting))
    step = _seconds_of_steps(trainer, 2 if setting.dry else 20)
    fit = max(1, min(60, round(seconds / (step * len(trainer.batches)))))
    known.parent.mkdir(parents=True, exist_ok=True)
    write(known, {"epochs": 1 if setting.dry else fit, "seconds of a step": step})
    return 1 if setting.dry else fit


def _seconds_of_steps(trainer: Any, steps: int) -> float:
    """Return the mean time of a training step, after steps that warm up and record graphs."""
    import torch

    trainer.epoch, batches = 1, itertools.cycle(trainer.batches.epoch(1))
    for n in range(steps + 5):
        if n == 5:
            if trainer.accelerator.device.type == "cuda":
                torch.cuda.synchronize()
            begin = time.perf_counter()
        trainer._train_step(*next(batches))
    if trainer.accelerator.device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - begin) / steps


def _profile(trainer: Any, steps: int = 5) -> dict[str, Any]:
    """Return where the time of a training step goes: kernels of the card, or ops on the CPU."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    on_gpu = trainer.accelerator.device.type == "cuda"
    trainer.epoch, batches = 1, itertools.cycle(trainer.batches.epoch(1))
    for _ in range(3):  # a trainer that was only restored has not recorded its attack yet
        trainer._train_step(*next(batches))
    activity, kind = (ProfilerActivity.CPU, "cpu")
    if on_gpu:
        activity, kind = (ProfilerActivity.CUDA, "device")
        torch.cuda.synchronize()
    with profile(activities=[activity]) as seen:
        begin = time.perf_counter()
        for _ in range(steps):
            trainer._train_step(*next(batches))
        if on_gpu:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - begin
    times = {e.key: getattr(e, f"self_{kind}_time_total") / 1e6 for e in seen.key_averages()}
    most = sorted(times, key=times.get, reverse=True)[:12]
    return {
        "seconds of a step": seconds / steps,
        "busy": sum(times.values()) / seconds,
        "shares": {key: times[key] / sum(times.values()) for key in most},
    }


def _trainer(setting: Setting, name: str, settings: dict[str, Any], data: Any) -> Any:
    """Return a trainer in runs/`name` that continues from its checkpoint, if there is one."""
    from pyadv.training import Config, Display, Trainer, checkpoint

    tiny = {"epochs": 1, "steps": 2, "model": "small-cnn", "batch_size": 16} if setting.dry else {}
    config = Config(**{**_COMMON, **settings, **tiny}).resolve(data)
    folder = setting.runs / name
    folder.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(config, data, folder, device=setting.device, display=Display())
    if (folder / "checkpoint.pt").exists():
        trainer.restore(checkpoint.load(folder / "checkpoint.pt"))
    return trainer


def train(setting: Setting, name: str, settings: dict[str, Any]) -> tuple[Any, Any, dict[str, Any]]:
    """Train and measure one network. Training continues from a checkpoint, and results are written
    before AutoAttack, which takes longest.

    Returns:
        The trainer after its last epoch, the data and the results.
    """
    import torch

    from pyadv.attacks import AutoAttack
    from pyadv.evaluation import effective_margin, evaluate
    from pyadv.training import load_model

    begin = time.perf_counter()
    data = load_data(setting)
    spent = {"data": time.perf_counter() - begin}
    trainer = _trainer(setting, name, settings, data)
    config, folder = trainer.config, trainer.folder
    spent["set up"] = time.perf_counter() - begin - sum(spent.values())
    trainer.fit()
    records = list(trainer.records)
    epochs = sum(r["seconds"] for r in records)
    spent |= {"first epoch": records[0]["seconds"], "other epochs": epochs - records[0]["seconds"]}
    model = load_model(folder).model.to(setting.device)  # in float32, whatever it was trained in
    found: dict[str, Any] = {
        "environment": harness.environment(torch.device(setting.device)),
        "data": data.name,
        "config": config.to_dict(),
        "eps": config.eps,
        "graphs": str(getattr(trainer.objective.attack, "graphs", "")),
        "curve": records,
        "seconds": spent,
    }
    write(setting.out / f"{name}.json", found)
    x, y = data.test_x, data.test_y
    began = time.perf_counter()
    report = evaluate(model, x, y, eps=config.eps, progress=None)
    found["accuracy"] = {row.name: row.accuracy for row in report.rows}
    part = slice(0, 4 if setting.dry else 1000)
    margin = effective_margin(model, x[part].to(setting.device), y[part].to(setting.device))
    found["effective margin, median"] = margin.double().median().item()
    spent["evaluation"] = time.perf_counter() - began
    write(setting.out / f"{name}.json", found)
    began = time.perf_counter()
    attack = AutoAttack(model, eps=config.eps, seed=0, progress=None)
    if setting.dry:
        for planned in attack.plan.values():
            planned.steps = 2
    report = evaluate(model, x[part], y[part], eps=config.eps, attacks=attack, progress=None)
    found["accuracy"]["AutoAttack"] = report.worst.accuracy
    found["AutoAttack on"] = len(y[part])
    spent["AutoAttack"] = time.perf_counter() - began
    write(setting.out / f"{name}.json", found)
    return trainer, data, found


def load_data(setting: Setting) -> Any:
    """Return the images to train on; JPEG archives are decoded once, into `runs`."""
    from dataclasses import replace

    from pyadv import data

    if setting.dry:
        small = data.load("fashion-mini")
        few = {k: getattr(small, k)[:64] for k in ("train_x", "train_y", "test_x", "test_y")}
        return replace(small, **few)
    if setting.data is None:
        sys.exit("training needs --data")
    if setting.data.suffix != ".xz":
        return data.load(setting.data)
    decoded = setting.runs / "decoded.npz"
    if not decoded.exists():
        _decode(setting.data, decoded)
    name = setting.data.name.split(".")[0]
    return replace(data.load(decoded, layout="NHWC"), name=f"{name} (JPEG copy)")


def _decode(path: Path, target: Path) -> None:
    """Decode an archive of JPEG files into an .npz of images."""
    import numpy as np
    from PIL import Image

    files = np.load(io.BytesIO(lzma.decompress(path.read_bytes())), allow_pickle=False)
    ends = np.cumsum(files["lengths"], dtype=np.int64)
    begins = ends - files["lengths"]
    jpeg = files["jpeg"].tobytes()
    x = np.stack(
        [
            np.asarray(Image.open(io.BytesIO(jpeg[a:b])).convert("RGB"))
            for a, b in zip(begins.tolist(), ends.tolist(), strict=True)
        ]
    )
    y, n = files["labels"].astype(np.int64), int(files["n_train"])
    np.savez(target, x_train=x[:n], y_train=y[:n], x_test=x[n:], y_test=y[n:])


PARTS: dict[str, Callable[[Setting], Any]] = {
    f.__name__: f for f in (build, every_kernel, large_kernels, autoattack, record)
}
