"""Start and resume a run. Its folder receives

config.json      every setting, resolved, and where the run comes from
checkpoint.pt    the whole state at the start, after each epoch, and at an interruption
best.pt          the whole state of the epoch most robust on held-out images (with val > 0)
metrics.jsonl    one record per epoch; tensorboard/ shows them as curves
curves.png       loss and accuracy over the epochs
kappa.png        how many PGD steps the training samples survive
results.json     accuracy on the test set, clean and attacked
run.lock         the process that trains, while it does
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from accelerate.utils import get_int_from_env

from pyadv import evaluation
from pyadv._provenance import provenance
from pyadv.data import ImageData, load
from pyadv.evaluation import Report
from pyadv.training import checkpoint
from pyadv.training.config import Config
from pyadv.training.display import Display
from pyadv.training.lock import RunLock
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

    Args:
        config: settings; those left None follow from the data and the method.
        folder: the run folder, made if it does not exist.
        data: the data set, by default `load(config.data)`.
        device: as for `Trainer`.
        display: shows progress, by default on stderr.

    Raises:
        FileExistsError: if `folder` holds a run; `resume` continues it.
        FolderInUse: if another process trains in `folder`.
        ValueError: if a setting is wrong, before any work.
        Interrupted, Diverged, OSError: see `Trainer.fit`.
    """
    folder = Path(folder)
    _refuse_a_run(folder)
    data = data or load(config.data)
    config = config.resolve(data)
    trainer = Trainer(config, data, folder, device=device, display=display)
    main = trainer.accelerator.is_main_process
    if main:
        folder.mkdir(parents=True, exist_ok=True)
    with RunLock(folder, active=main):
        if main:
            _refuse_a_run(folder)  # another process may have begun one
            config.save(folder / "config.json", _provenance(trainer))
        trainer.save()  # from here on the run can be resumed, whatever happens
        trainer.accelerator.wait_for_everyone()
        return _complete(trainer, data)


def resume(
    folder: str | Path,
    *,
    data: ImageData | None = None,
    device: str | None = None,
    display: Display | None = None,
) -> Report:
    """Continue the run in `folder` from its last saved state, exactly, and report as `train` does.

    Raises:
        FileNotFoundError: if `folder` holds no checkpoint.
        FolderInUse: if another process trains in `folder`.
        ValueError: if the checkpoint cannot be read or does not fit `data`.
        Interrupted, Diverged, OSError: see `Trainer.fit`.
    """
    folder = Path(folder)
    if not (folder / "checkpoint.pt").exists():
        begun = (folder / "config.json").exists()
        hint = ": that run stopped before its first step, start it again" if begun else ""
        raise FileNotFoundError(f"no checkpoint at {folder / 'checkpoint.pt'}{hint}")
    main = get_int_from_env(_RANKS, 0) == 0
    with RunLock(folder, active=main):
        state = checkpoint.newest_state(folder)
        config = Config.from_dict(state["config"])
        data = data or load(config.data)
        trainer = Trainer(config, data, folder, device=device, display=display)
        trainer.restore(state)
        if main:
            for part in folder.glob("*.partial"):  # from a process that was killed as it wrote
                part.unlink()
            if not (folder / "config.json").exists():
                config.save(folder / "config.json", _provenance(trainer))
        return _complete(trainer, data)


# Environment variables that number the processes of a distributed run, as Accelerate reads them.
_RANKS = ["RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK"]


def _refuse_a_run(folder: Path) -> None:
    # A run that stopped before its first checkpoint has nothing to lose: it starts anew.
    if any((folder / name).exists() for name in ("checkpoint.pt", "best.pt")):
        raise FileExistsError(f"{folder} holds a run already; resume it, or choose another folder")


def _complete(trainer: Trainer, data: ImageData) -> Report:
    """Train to the end, evaluate, and write the report and the pictures."""
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
        report.save(folder / "results.json", _provenance(trainer))
        _draw(trainer, folder)
    return report


def _provenance(trainer: Trainer) -> dict[str, Any]:
    accelerator = trainer.accelerator
    return provenance(
        seed=trainer.config.seed,
        device=accelerator.device,
        processes=accelerator.num_processes,
    )


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
    try:
        plots.curves(records, folder / "curves.png")
        if records and records[-1]["kappa"] is not None:
            plots.kappa(records, folder / "kappa.png")
    except OSError as error:
        trainer.display.message(f"no pictures: {error}")
