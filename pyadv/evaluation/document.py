"""The folder that an evaluation writes:

report.json       every number
report.md         the numbers as text, with the pictures
*.png             accuracy against eps and steps, worst examples, margins
adversarial.npz   x_adv, with the samples' index, y, prediction, and the attack that found it
margins.csv       the margins of each sample
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyadv._version import __version__
from pyadv.attacks import PGD
from pyadv.attacks.ensemble import state_files
from pyadv.attacks.processes import together
from pyadv.attacks.progress import Progress
from pyadv.engine.loop import predict
from pyadv.evaluation.curves import Curves, accuracy_curves
from pyadv.evaluation.escaping import code, markdown
from pyadv.evaluation.evaluate import AUTOATTACKS, SUITES, evaluate
from pyadv.evaluation.margins import Margins, measure_margins
from pyadv.evaluation.masking import check_masking
from pyadv.evaluation.masking_report import MaskingReport
from pyadv.evaluation.report import Report
from pyadv.passes.borrow import device_of

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
    """

    title: str
    command: str
    reports: Mapping[str, Report]
    curves: Curves = field(default_factory=dict)
    masking: MaskingReport | None = None
    margins: Margins | None = None
    states: tuple[Path, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return {
            "title": self.title,
            "command": self.command,
            "versions": {
                "pyadv": __version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
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
        _write(folder / "report.json", json.dumps(self.to_dict(), indent=2))
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
                file.unlink()

    def to_markdown(self, pictures: Mapping[str, str]) -> str:
        """Return the document as Markdown; `pictures` maps captions to file names."""
        lines = [f"# {markdown(self.title)}", "", f"{code(self.command)}, pyadv {__version__}", ""]
        for name, report in self.reports.items():
            lines += [f"## Accuracy: {name}", "", report.to_markdown(), ""]
        if self.masking is not None:
            lines += ["## Is it really robust?", "", self.masking.to_markdown(), ""]
        if self.margins is not None:
            lines += ["## Margins", "", self.margins.to_markdown(), ""]
        for caption, file in pictures.items():
            lines += [f"## {caption}", "", f"![{caption}]({file})", ""]
        return "\n".join(lines)

    def _examples(self, x: Tensor, y: Tensor) -> dict[str, np.ndarray]:
        """Return the first example found for each sample that an attack broke, from the strongest
        suite (the last one of equals)."""
        report = min(reversed(self.reports.values()), key=lambda r: r.worst.accuracy)
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
        examples: Mapping[str, np.ndarray],
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


def run_suite(
    suite: str,
    model: Callable[..., Any],
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    norm: str | float = "Linf",
    batch_size: int = 500,
    seed: int = 0,
    surrogate: Callable[..., Any] | None = None,
    state: str | Path | None = None,
    state_name: str | None = None,
    progress: Progress | str | None = "auto",
    group: Any = None,
    title: str = "Evaluation",
    command: str = "",
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

    The other arguments and errors are those of `evaluate`.
    """
    if suite not in SUITE_PARTS:
        raise ValueError(f"suite must be one of {', '.join(SUITE_PARTS)}, got {suite!r}")
    parts = SUITE_PARTS[suite]
    files = {} if state is None else {k: Path(state) / f"{k}.state" for k in (*parts, "curves")}
    kept = {name: {"state": file, "state_name": state_name} for name, file in files.items()}
    masking = margins = None
    with together(model, group, () if surrogate is None else (surrogate,)) as processes:
        common = {"norm": norm, "seed": seed, "batch_size": batch_size, "progress": progress}
        common["group"] = processes
        reports = {
            name: evaluate(model, x, y, eps=eps, attacks=name, **kept.get(name, {}), **common)
            for name in parts
            if name in SUITES | AUTOATTACKS
        }
        few = x[:_CURVE_SAMPLES], y[:_CURVE_SAMPLES]
        curves = accuracy_curves(model, *few, eps=eps, **kept.get("curves", {}), **common)
        if "masking" in parts:
            masking = check_masking(model, x, y, eps=eps, surrogate=surrogate, **common)
        if "margins" in parts:
            margins = measure_margins(model, x, y, **common)
    states = tuple(files.values())
    return Document(title, command, reports, curves, masking, margins, states)


def _write(path: Path, text: str) -> None:
    """Write a line of text; what a file name holds that is no text is written as an escape."""
    path.write_text(text + "\n", encoding="utf-8", errors="backslashreplace")


def _most_wrong(model: Callable[..., Any], examples: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return which examples the model is most sure of, the surest first."""
    settings, gaps = PGD().settings, []
    x_adv, y = (torch.from_numpy(examples[name]) for name in ("x_adv", "y"))
    device = device_of(model, x_adv)
    for part, labels in zip(x_adv.split(500), y.split(500), strict=True):
        z = predict(model, part.to(device), settings).float().cpu()
        gaps.append(z.amax(1) - z.gather(1, labels[:, None])[:, 0])
    return torch.cat(gaps).argsort(descending=True)[:_EXAMPLES].numpy()
