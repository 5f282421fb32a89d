"""A run from its settings to its folder:

config.json      every setting, resolved
checkpoint.pt    the whole state after the last epoch or at the interruption
best.pt          the same, of the epoch most robust on held-out images (with val > 0)
metrics.jsonl    one record per epoch; tensorboard/ has the same as curves
curves.png       loss and accuracy over the epochs
kappa.png        how many PGD steps the training samples survive
results.json     accuracy on the test set, clean and attacked
"""

from __future__ import annotations

from pathlib import Path

from pyadv import evaluation
from pyadv.data import ImageData, load
from pyadv.evaluation import Report
from pyadv.training import checkpoint
from pyadv.training.config import Config
from pyadv.training.display import Display
from pyadv.training.trainer import Trainer


def train(
    config: Config,
    folder: str | Path,
    *,
    data: ImageData | None = None,
    device: str | None = None,
    display: Display | None = None,
) -> Report:
    """Train as `config` says, in `folder`, and report accuracy on the test set.

    `data` is `load(config.data)` by default. Raises FileExistsError where `folder` holds a run
    already; what else can go wrong is in `Trainer.fit`.
    """
    folder = Path(folder)
    if (folder / "config.json").exists():
        raise FileExistsError(f"{folder} holds a run already; resume it, or choose another folder")
    data = data or load(config.data)
    config = config.resolve(data)
    trainer = Trainer(config, data, folder, device=device, display=display)
    if trainer.accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        config.save(folder / "config.json")
    trainer.accelerator.wait_for_everyone()
    return _complete(trainer, data)


def resume(
    folder: str | Path,
    *,
    data: ImageData | None = None,
    device: str | None = None,
    display: Display | None = None,
) -> Report:
    """Continue the run in `folder` from its checkpoint, exactly, and report as `train` does."""
    folder = Path(folder)
    state = checkpoint.load(folder / "checkpoint.pt")
    config = Config.from_dict(state["config"])
    data = data or load(config.data)
    trainer = Trainer(config, data, folder, device=device, display=display)
    trainer.restore(state)
    return _complete(trainer, data)


def _complete(trainer: Trainer, data: ImageData) -> Report:
    config, folder = trainer.config, trainer.folder
    trainer.display.message(_announcement(trainer, data))
    trainer.fit()
    with trainer.display.progress() as bar:
        task = bar.add_task("evaluating", total=len(data.test_y), text="")
        report = evaluation.evaluate(
            trainer.result,
            data.test_x,
            data.test_y,
            eps=config.eps,
            norm=config.norm,
            progress=lambda name, done, n, _: bar.update(task, completed=done, text=name),
        )
    if trainer.accelerator.is_main_process:
        report.save(folder / "results.json")
        _draw(trainer, folder)
    return report


def _announcement(trainer: Trainer, data: ImageData) -> str:
    config = trainer.config
    size = sum(p.numel() for p in trainer.model.parameters())
    begun = trainer.epoch > 1 or trainer.step > 0
    at = f", from epoch {trainer.epoch}, step {trainer.step + 1}" if begun else ""
    return (
        f"{config.method} on {data.name}, {config.model} ({size:,} parameters), {config.norm} eps "
        f"{config.eps:.4g}, alpha {config.alpha:.4g}, {config.steps} steps; {config.epochs} epochs "
        f"of {len(trainer.batches)} batches on {trainer.accelerator.device}{at} -> {trainer.folder}"
    )


def _draw(trainer: Trainer, folder: Path) -> None:
    try:
        from pyadv.training import plots
    except ImportError:
        trainer.display.message("no pictures: they need matplotlib (pip install matplotlib)")
        return
    records = list(trainer.records)
    plots.curves(records, folder / "curves.png")
    if records and records[-1]["kappa"] is not None:
        plots.kappa(records, folder / "kappa.png")
