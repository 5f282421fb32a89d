"""The folder that an evaluation writes:

report.json       every number, and where it comes from
report.md         the numbers as text, with the pictures
*.png             accuracy against eps and steps, worst examples, margins
adversarial.npz   x_adv, with the samples' index, y, prediction, and the attack that found it
margins.csv       the margins of each sample

While the evaluation runs, the folder holds its states, and `unfinished.json` says of what.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypedDict

import numpy as np
import torch
from torch import Tensor

from pyadv import _state
from pyadv._provenance import provenance
from pyadv._version import __version__
from pyadv.attacks import PGD
from pyadv.attacks.ensemble import state_files
from pyadv.attacks.processes import Processes, together
from pyadv.attacks.progress import Progress
from pyadv.engine import checks
from pyadv.engine.loop import predict
from pyadv.evaluation.curves import Curves, accuracy_curves
from pyadv.evaluation.escaping import code, markdown
from pyadv.evaluation.evaluate import evaluate, is_suite
from pyadv.evaluation.margins import Margins, measure_margins
from pyadv.evaluation.masking import check_masking
from pyadv.evaluation.masking_report import MaskingReport
from pyadv.evaluation.report import Report
from pyadv.menus import Norm
from pyadv.passes.borrow import device_of, unwrap


class Examples(TypedDict):
    """The content of adversarial.npz, one row per sample that an attack broke."""

    index: np.ndarray
    x_adv: np.ndarray
    y: np.ndarray
    prediction: np.ndarray
    attack: np.ndarray


class _Common(TypedDict):
    """Arguments that all measurements have."""

    norm: Norm | float
    seed: int
    batch_size: int
    progress: Progress | Literal["auto"] | None
    group: Processes


_EXAMPLES = 8  # in the picture


@dataclass(frozen=True)
class Document:
    """The measurements of one model.

    Attributes:
        title: a line that names model and data.
        command: the command that made it.
        reports: suite -> accuracy.
        curves: accuracy against radius and steps.
        masking: the checks for gradient masking, if they ran.
        margins: distances to the decision boundary, if they were measured.
        states: the files that would let the measurement continue after an interruption.
        left_out: what a budget left out, one sentence for each part.
        provenance: where the numbers come from; see `pyadv._provenance`.
    """

    title: str
    command: str
    reports: Mapping[str, Report]
    curves: Curves = field(default_factory=dict)
    masking: MaskingReport | None = None
    margins: Margins | None = None
    states: tuple[Path, ...] = ()
    left_out: tuple[str, ...] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {
            "title": self.title,
            "command": self.command,
            "left_out": list(self.left_out),
            "accuracy": {name: report.to_dict() for name, report in self.reports.items()},
            "curves": {name: [list(p) for p in points] for name, points in self.curves.items()},
            "masking": None if self.masking is None else self.masking.to_dict(),
            "margins": None if self.margins is None else self.margins.to_dict(),
        }

    def write(
        self,
        folder: Path,
        model: Callable[..., Any],
        x: Tensor,
        y: Tensor,
        classes: Sequence[str],
    ) -> list[str]:
        """Write everything into `folder`, which is created. Return what could not be written, and
        why.

        Args:
            folder: where to write.
            model: the model, for the logits of the examples that are drawn.
            x, y: the samples, (N, C, H, W) and (N,).
            classes: names of the classes.
        """
        folder.mkdir(parents=True, exist_ok=True)
        content = {**self.to_dict(), "provenance": dict(self.provenance)}
        _write(folder / "report.json", json.dumps(content, indent=2))
        missing: list[str] = []
        pictures: dict[str, str] = {}
        examples = self._examples(x, y)
        np.savez_compressed(folder / "adversarial.npz", **examples)
        if self.margins is not None:
            self.margins.to_csv(folder / "margins.csv")
        try:
            self._draw(folder, model, x, examples, classes, pictures)
        except ImportError:
            missing.append("no pictures: they need matplotlib (pip install matplotlib)")
        finally:  # a picture that fails must not take the report with it
            _write(folder / "report.md", self.to_markdown(pictures))
        return missing

    def remove_states(self) -> None:
        """Remove the files that would let the measurement continue, once its results are safe."""
        for state in self.states:
            for file in state_files(state):
                file.unlink(missing_ok=True)
        for folder in {state.parent for state in self.states}:  # last: what is left can be claimed
            (folder / _UNFINISHED).unlink(missing_ok=True)

    def to_markdown(self, pictures: Mapping[str, str]) -> str:
        """Return the document as Markdown; `pictures` maps captions to file names."""
        lines = [f"# {markdown(self.title)}", "", f"{code(self.command)}, pyadv {__version__}", ""]
        lines += [line for text in self.left_out for line in (markdown(text), "")]
        for name, report in self.reports.items():
            lines += [f"## Accuracy: {name}", "", report.to_markdown(), ""]
        if self.masking is not None:
            lines += ["## Is it really robust?", "", self.masking.to_markdown(), ""]
        if self.margins is not None:
            lines += ["## Margins", "", self.margins.to_markdown(), ""]
        for caption, file in pictures.items():
            lines += [f"## {caption}", "", f"![{caption}]({file})", ""]
        return "\n".join(lines)

    def _examples(self, x: Tensor, y: Tensor) -> Examples:
        """Return the first example found for each sample that an attack broke, from the strongest
        suite (the last one of equals)."""
        report = min(reversed([*self.reports.values()]), key=lambda r: r.worst.accuracy)
        rows, x_adv = report.findings.examples()
        found = report.findings
        return {
            "index": rows.numpy(),
            "x_adv": x_adv.numpy() if len(rows) else np.zeros((0, *x.shape[1:]), np.float32),
            "y": y[rows].numpy(),
            "prediction": found.prediction[rows].numpy(),
            "attack": np.array([found.names[k] for k in found.broken_by[rows].tolist()], str),
        }

    def _draw(
        self,
        folder: Path,
        model: Callable[..., Any],
        x: Tensor,
        examples: Examples,
        classes: Sequence[str],
        drawn: dict[str, str],
    ) -> None:
        """Draw the pictures and enter each that is there into `drawn`, caption -> file name."""
        from pyadv.evaluation import plots

        if self.curves:
            plots.accuracy_against(self.curves, folder / "curves.png")
            drawn["Accuracy against the attack"] = "curves.png"
        if len(examples["index"]) and x.dim() == 4:
            chosen = _most_wrong(model, examples)
            rows = torch.from_numpy(examples["index"][chosen])
            plots.worst_examples(
                x[rows],
                torch.from_numpy(examples["x_adv"][chosen]),
                torch.from_numpy(examples["y"][chosen]),
                torch.from_numpy(examples["prediction"][chosen]),
                classes,
                folder / "examples.png",
            )
            drawn["Worst examples"] = "examples.png"
        if self.margins is not None and self.margins.correct.any():
            plots.margin_distributions(self.margins, folder / "margins.png")
            drawn["Distribution of the margins"] = "margins.png"


SUITE_PARTS: dict[str, tuple[str, ...]] = {
    "pgd20": ("pgd20",),
    "pgdplus": ("pgdplus",),
    "autoattack": ("autoattack",),
    "masking": ("pgd20", "masking"),
    "margins": ("pgd20", "margins"),
    "all": ("pgd20", "autoattack", "masking", "margins"),
}
_CURVE_SAMPLES = 500
# For the suite "all" on the command line: about three minutes on two cores for the embedded model.
BUDGET: dict[str, int] = {"pgd20": 2000, "autoattack": 100, "masking": 500, "margins": 100}
_UNFINISHED = "unfinished.json"


def shares(suite: str, n: int, budget: Mapping[str, int] | None = None) -> dict[str, int]:
    """Return how many of n samples each part of a suite gets, the curves included."""
    checks.choice("suite", suite, tuple(SUITE_PARTS))
    budget = {} if budget is None else budget
    counts = {part: min(n, budget.get(part, n)) for part in SUITE_PARTS[suite]}
    return counts | {"curves": min(n, _CURVE_SAMPLES)}


def report_folder(parent: Path, name: str, settings: Mapping[str, Any]) -> Path:
    """Return the folder for an evaluation called `name`: NAME, or NAME-2, NAME-3, ... if there is
    one. An interrupted evaluation with the same settings continues in its folder. The folder is
    made, with a note of the settings that `Document.remove_states` removes.

    Args:
        parent: where the folders of evaluations are.
        name: of model and suite; characters that may not be part of a file name are replaced.
        settings: plain values that tell this evaluation from others.
    """
    name = re.sub(r"[^\w.+-]+", "_", name).strip("._") or "report"
    folder, numbers = parent / name, itertools.count(2)
    while not claim(folder, settings):
        folder = parent / f"{name}-{next(numbers)}"
    return folder


def claim(folder: Path, settings: Mapping[str, Any]) -> bool:
    """Make the folder and note the settings of an evaluation in it. Return whether the folder was
    free: new, empty, or left by an interrupted evaluation with the same settings."""
    note = folder / _UNFINISHED
    found = {file.name for file in folder.iterdir()} if folder.is_dir() else set()
    if note.name in found:
        try:
            free = json.loads(note.read_text(encoding="utf-8")) == settings
        except (OSError, ValueError):
            free = False
        return free
    if found or (folder.exists() and not folder.is_dir()):
        return False  # a report, or files of somebody else
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(settings, indent=2) + "\n"
    _state.write(note, lambda file: file.write(text.encode("utf-8", "backslashreplace")))
    return True


def release(folder: Path) -> None:
    """Remove a folder that `claim` made if nothing was written to it."""
    if {file.name for file in folder.iterdir()} == {_UNFINISHED}:
        (folder / _UNFINISHED).unlink()
        folder.rmdir()


def run_suite(
    suite: str,
    model: Callable[..., Any],
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    norm: Norm | float = "Linf",
    batch_size: int = 500,
    seed: int = 0,
    surrogate: Callable[..., Any] | None = None,
    state: str | Path | None = None,
    state_name: str | None = None,
    progress: Progress | Literal["auto"] | None = "auto",
    group: Any = None,
    title: str = "Evaluation",
    command: str = "",
    budget: Mapping[str, int] | None = None,
) -> Document:
    """Measure what `pyadv evaluate --suite` measures.

    Args:
        suite: "pgd20", "pgdplus" or "autoattack" (see `evaluate`), "masking" (`check_masking`),
            "margins" (`measure_margins`), "all". Each also measures accuracy against eps and steps
            on the first 500 samples.
        surrogate: another model, for the transfer check.
        state: a folder for the findings of an interrupted call. The files stay there until
            `remove_states()` of the result is called.
        title, command: title of the document, and the command line in it.
        budget: part of the suite -> the most samples it gets, the first ones; all by default.
            `left_out` of the result says what it left out. `BUDGET` is that of the command line for
            "all".

    The other arguments and errors are those of `evaluate`.
    """
    counts = shares(suite, len(x), budget)
    parts = SUITE_PARTS[suite]
    files = {} if state is None else {k: Path(state) / f"{k}.state" for k in (*parts, "curves")}
    kept_name = None if state is None else state_name
    masking: MaskingReport | None = None
    margins: Margins | None = None
    with together(model, group, () if surrogate is None else (surrogate,)) as processes:
        common: _Common = {
            "norm": norm,
            "seed": seed,
            "batch_size": batch_size,
            "progress": progress,
            "group": processes,
        }
        few = {part: (x[:k], y[:k]) for part, k in counts.items()}
        reports: dict[str, Report] = {
            name: evaluate(
                model,
                *few[name],
                eps=eps,
                attacks=name,
                state=files.get(name),
                state_name=kept_name,
                **common,
            )
            for name in parts
            if is_suite(name)
        }
        curves = accuracy_curves(
            model,
            *few["curves"],
            eps=eps,
            state=files.get("curves"),
            state_name=kept_name,
            **common,
        )
        if "masking" in parts:
            masking = check_masking(model, *few["masking"], eps=eps, surrogate=surrogate, **common)
        if "margins" in parts:
            margins = measure_margins(model, *few["margins"], **common)
        place = device_of(unwrap(model), x)
        made = provenance(
            command=command or None, seed=seed, device=place, processes=processes.count
        )
    states = tuple(files.values())
    left_out = tuple(
        f"{part} has the first {counts[part]:,} of {len(x):,} samples."
        for part in parts
        if counts[part] < len(x)
    )
    return Document(title, command, reports, curves, masking, margins, states, left_out, made)


def _write(path: Path, text: str) -> None:
    """Write a line of text; what a file name holds that is no text is written as an escape."""
    path.write_text(text + "\n", encoding="utf-8", errors="backslashreplace")


def _most_wrong(model: Callable[..., Any], examples: Examples) -> np.ndarray:
    """Return which examples the model is most sure of, the surest first."""
    settings, gaps = PGD().settings, []
    x_adv, y = torch.from_numpy(examples["x_adv"]), torch.from_numpy(examples["y"])
    device = device_of(model, x_adv)
    for part, labels in zip(x_adv.split(500), y.split(500), strict=True):
        z = predict(model, part.to(device), settings).float().cpu()
        gaps.append(z.amax(1) - z.gather(1, labels[:, None])[:, 0])
    return torch.cat(gaps).argsort(descending=True)[:_EXAMPLES].numpy()
