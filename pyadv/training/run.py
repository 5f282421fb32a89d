"""Start and resume a run. Its folder receives

config.json      every setting, resolved, and where the run comes from
checkpoint.pt    the whole state at the start, after each epoch, and at an interruption
best.pt          the whole state of the epoch most robust on held-out images (with val > 0)
metrics.jsonl    one record per epoch; tensorboard/ and other trackers show them as curves
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
from pyadv.data import Images, StreamedImages
from pyadv.evaluation import Report
from pyadv.training import build, checkpoint
from pyadv.training.config import Config
from pyadv.training.display import Display
from pyadv.training.lock import RunLock
from pyadv.training.trainer import Trainer


def train(
    config: Config | None,
    folder: str | Path,
    *,
    data: Images | None = None,
    device: str | None = None,
    display: Display | None = None,
    **parts: Any,
) -> Report | None:
    """Train as `config` says, in `folder`, and report accuracy on the test set.

    Args:
        config: settings; those left None follow from the data and the method.
        folder: the run folder, made if it does not exist.
        data: the data set, by default the one that `config` names.
        device: as for `Trainer`.
        display: shows progress, by default on stderr.
        parts: the user's own model, train, val, test, optimizer, scheduler, scheduler_every and
            callbacks, as for `Trainer`.

    Returns:
        The report; None for a run on the user's own loaders without `test` and `val`.

    Raises:
        FileExistsError: if `folder` holds a run; `resume` continues it.
        FolderInUse: if another process trains in `folder`.
        ValueError: if a setting is wrong, before any work.
        Interrupted, Diverged, OSError: see `Trainer.fit`.
    """
    folder, config = Path(folder), config or Config()
    _refuse_a_run(folder)
    data = _data(config, data, parts)
    trainer = Trainer(config, data, folder, device=device, display=display, **parts)
    main = trainer.accelerator.is_main_process
    if main:
        folder.mkdir(parents=True, exist_ok=True)
    with RunLock(folder, active=main):
        if main:
            _refuse_a_run(folder)  # another process may have begun one
            trainer.config.save(folder / "config.json", _provenance(trainer))
        trainer.save()  # from here on the run can be resumed, whatever happens
        trainer.accelerator.wait_for_everyone()
        return _complete(trainer, folder)


def resume(
    folder: str | Path,
    *,
    epochs: int | None = None,
    data: Images | None = None,
    device: str | None = None,
    display: Display | None = None,
    **parts: Any,
) -> Report | None:
    """Continue the run in `folder` from its last saved state, exactly, and report as `train` does.

    Args:
        folder: the run folder.
        epochs: a new number of epochs. The schedules of the rest of the run are then those of a run
            of that length.
        data: as for `train`, and so are `device`, `display` and `parts`. What was given to `train`
            must be given again.

    Raises:
        FileNotFoundError: if `folder` holds no checkpoint.
        FolderInUse: if another process trains in `folder`.
        ValueError: if the checkpoint cannot be read or does not fit `data`, if `parts` are
            others than those of `train`, or if more than `epochs` epochs have begun.
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
        checkpoint.check_parts(state, {"train": parts.get("train") is not None})
        config = Config.from_dict(state["config"])
        changed = epochs is not None and epochs != config.epochs
        if changed:
            begun = state["epoch"] if state["step"] else state["epoch"] - 1
            if epochs < max(1, begun):
                raise ValueError(
                    f"epochs must be >= {max(1, begun)}, which have begun, got {epochs}"
                )
            config.epochs = epochs
        data = _data(config, data, parts)
        if "model" in parts:
            config.model = None
        if state.get("parts", {}).get("optimizer") is not None:
            config.optimizer = Config.optimizer  # the name of the user's own, which no Config takes
        trainer = Trainer(
            config, data, folder, device=device, display=display, fresh=False, **parts
        )
        trainer.restore(state)
        if main:
            for part in folder.glob("*.partial"):  # from a process that was killed as it wrote
                part.unlink()
            if changed or not (folder / "config.json").exists():
                trainer.config.save(folder / "config.json", _provenance(trainer))
        if changed:
            trainer.save()  # a kill must not bring the old number back
        return _complete(trainer, folder)


def _data(config: Config, data: Images | None, parts: dict[str, Any]) -> Images | None:
    """Return the data set of a run, None for a run on the user's own loaders."""
    return build.data(config) if data is None and parts.get("train") is None else data


# Environment variables that number the processes of a distributed run, as Accelerate reads them.
_RANKS = ["RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK"]


def _refuse_a_run(folder: Path) -> None:
    # A run that stopped before its first checkpoint has nothing to lose: it starts anew.
    if any((folder / name).exists() for name in ("checkpoint.pt", "best.pt")):
        raise FileExistsError(f"{folder} holds a run already; resume it, or choose another folder")


def _complete(trainer: Trainer, folder: Path) -> Report | None:
    """Train to the end, evaluate, and write the report and the pictures."""
    config, data = trainer.config, trainer.data
    if isinstance(data, StreamedImages):
        trainer.display.message(data.residence)
    trainer.display.message(_announcement(trainer))
    if trainer.emr_derivative == "difference":
        trainer.display.message(
            "EMR by finite differences: autograd has no second derivative of this network"
            + (" where it is sharded" if trainer.sharded else "")
        )
    trainer.fit()
    report, samples = None, data.samples("test")
    if samples is not None:
        with trainer.display.progress() as bar:
            task = bar.add_task("evaluating", total=None, text="")
            report = evaluation.evaluate(
                trainer.result,
                *samples,
                eps=config.eps,
                norm=config.norm,
                chunk=trainer.chunk,
                progress=lambda name, done, n, _: bar.update(
                    task, completed=done, total=n, text=name
                ),
            )
    if trainer.accelerator.is_main_process:
        if report is not None:
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


def _announcement(trainer: Trainer) -> str:
    config = trainer.config
    size = sum(p.numel() for p in trainer.model.parameters())
    begun = trainer.epoch > 1 or trainer.step > 0
    at = f", from epoch {trainer.epoch}, step {trainer.step + 1}" if begun else ""
    return (
        f"{config.method} on {trainer.data.name}, {config.model} ({size:,} parameters), "
        f"{config.norm} eps {config.eps:.4g}, alpha {config.alpha:.4g}, {config.steps} steps; "
        f"{config.epochs} epochs of {len(trainer.batches)} batches on "
        f"{trainer.accelerator.device}{at} -> {trainer.folder}"
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
