"""Distances of samples to the decision boundary: estimates, upper bounds found by attacks, and
proven lower bounds."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pyadv.attacks import DeepFool, MinimumNormResult, TargetedFAB
from pyadv.attacks.progress import Lines, Progress
from pyadv.engine import checks
from pyadv.engine.attack import Model
from pyadv.engine.task import FloatOrTensor
from pyadv.evaluation.bisection import Bisection
from pyadv.evaluation.escaping import markdown, one_line
from pyadv.evaluation.lipschitz import LipschitzBound, NotCovered, lipschitz_bound
from pyadv.evaluation.normalized_margins import logits_and_margin
from pyadv.passes.borrow import Output, device_of, unwrap
from pyadv.tensors import compute_dtype

_QUANTILES = {"q05": 0.05, "q25": 0.25, "median": 0.5, "q75": 0.75, "q95": 0.95}


class NearestPoint(Protocol):
    """A search for the nearest adversarial point, such as `FAB`, `DeepFool` or `Bisection`."""

    def run(
        self,
        x: Tensor,
        y: Tensor,
        ids: Tensor | None = None,
        draw: int | None = None,
        model: Model | None = None,
    ) -> MinimumNormResult: ...

    def describe(self) -> str: ...


def margin_attacks(
    norm: str | float = "Linf",
    *,
    lo: FloatOrTensor | None = 0.0,
    hi: FloatOrTensor | None = 1.0,
    seed: int | None = 0,
    output: Output = None,
) -> dict[str, NearestPoint]:
    """Return the searches for the nearest adversarial point, by the name of their column.

    "DeepFool", in Linf and L2, costs least. "FAB-T" costs most and finds the nearest points.
    "bisection" searches for the radius at which an attack of fixed radius succeeds.
    """
    norm = checks.canonical_norm(norm)
    box = {"norm": norm, "lo": lo, "hi": hi, "output": output}
    return {
        **({} if norm == "L1" else {"DeepFool": DeepFool(**box)}),
        "FAB-T": TargetedFAB(seed=seed, **box),
        "bisection": Bisection(seed=seed, **box),
    }


@dataclass(frozen=True)
class Margins:
    """Distances of N samples to the decision boundary, in `norm` and units of x, on the CPU.

    Attributes:
        label, prediction: (N,) int64.
        effective: (N,) first-order estimate by `effective_margin`, negative where the prediction is
            not the label.
        distances: attack name -> (N,) distance of the nearest point it found: an upper bound; 0
            where the prediction is not the label, inf where nothing was found.
        certified: (N,) radius within which no point changes the class, a lower bound; None if there
            is no certificate.
        uncertified: why there is no certificate.
        x_adv: (N, ...) the nearest point that any attack found, x where there is none.
        queries, gradients: (N,) int64 forward and backward passes.
        descriptions: attack name -> one line that lets a reader repeat it.
    """

    norm: str
    label: Tensor
    prediction: Tensor
    effective: Tensor
    distances: dict[str, Tensor]
    certified: Tensor | None
    uncertified: str | None
    x_adv: Tensor = field(repr=False)
    queries: Tensor
    gradients: Tensor
    descriptions: dict[str, str]

    def __len__(self) -> int:
        return len(self.label)

    @property
    def correct(self) -> Tensor:
        """(N,) bool: the prediction is the label."""
        return self.prediction == self.label

    @property
    def nearest(self) -> Tensor:
        """(N,) the least of the distances, which is the best upper bound; inf without attacks."""
        none = torch.where(self.correct, torch.inf, torch.zeros_like(self.effective))
        return torch.stack([none, *self.distances.values()]).amin(0)

    @property
    def columns(self) -> dict[str, Tensor]:
        """All measures, by name."""
        certified = {} if self.certified is None else {"certified": self.certified}
        nearest = {"nearest": self.nearest} if len(self.distances) > 1 else {}
        return {**certified, "effective": self.effective, **self.distances, **nearest}

    def summary(self) -> dict[str, dict[str, float]]:
        """Return the quantiles of each column over the correctly classified samples, "q05" to "q95"
        with the "median", and "found", the share of those samples with a finite value. All are NaN
        if no sample is classified correctly."""
        return {name: _summary(values[self.correct]) for name, values in self.columns.items()}

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON; None stands for infinity and NaN, which JSON lacks."""
        summary = {
            name: {k: v if math.isfinite(v) else None for k, v in row.items()}
            for name, row in self.summary().items()
        }
        return {
            "n": len(self),
            "norm": self.norm,
            "accuracy": self.correct.double().mean().item(),
            "summary": summary,
            "uncertified": self.uncertified,
            "attacks": self.descriptions,
            "forward_passes_per_sample": self.queries.double().mean().item(),
            "backward_passes_per_sample": self.gradients.double().mean().item(),
        }

    def to_csv(self, path: str | Path) -> None:
        """Write one row per sample: id (its place in the data), label, prediction, all columns."""
        columns = self.columns
        values = (self.label, self.prediction, *columns.values())
        with open(path, "w", newline="", encoding="utf-8", errors="backslashreplace") as file:
            writer = csv.writer(file)
            writer.writerow(["id", "label", "prediction", *columns])
            for i, row in enumerate(zip(*(v.tolist() for v in values), strict=True)):
                writer.writerow([i, *(f"{v:.6g}" if isinstance(v, float) else v for v in row)])

    def to_markdown(self) -> str:
        """Return the quantiles as a table, and a list of the attacks."""
        head, *rows = self._table()
        rows = [[markdown(name), *cells] for name, *cells in rows]
        lines = [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]
        named = self.descriptions.items()
        attacks = [f"- {markdown(name)}: {markdown(text)}" for name, text in named]
        reason = map(markdown, self._reason())
        return "\n".join([f"{self._title()}.", "", *lines, "", *attacks, *reason])

    def __str__(self) -> str:
        lines = (
            f"{one_line(name):<12}{''.join(f'{c:>10}' for c in cells)}"
            for name, *cells in self._table()
        )
        return "\n".join([self._title(), *lines, *self._reason()])

    def _title(self) -> str:
        right = int(self.correct.sum())
        return f"{self.norm} margins of the {right:,} of {len(self):,} samples classified correctly"

    def _reason(self) -> list[str]:
        return [f"No certificate: {self.uncertified}."] if self.uncertified else []

    def _table(self) -> list[list[str]]:
        rows = [["", *_QUANTILES, "found"]]
        for name, row in self.summary().items():
            *quantiles, found = row.values()
            rows.append([name, *(f"{value:.4g}" for value in quantiles), f"{100 * found:.1f} %"])
        return rows


def measure_margins(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    norm: str | float = "Linf",
    attacks: Mapping[str, NearestPoint] | NearestPoint | None = None,
    certificate: bool = True,
    lo: FloatOrTensor | None = 0.0,
    hi: FloatOrTensor | None = 1.0,
    batch_size: int = 500,
    seed: int | None = 0,
    output: Output = None,
    progress: Progress | str | None = "auto",
) -> Margins:
    """Measure the distance of each sample to the decision boundary in several ways.

    The true distance is at least `certified` and at most each of `distances`; `effective` is an
    estimate that may err on either side. Where the attacks agree and the certificate is far below
    them, the certificate is loose; where one attack is far above the others, that attack is weak on
    this model.

    The model is evaluated in eval mode and gets its modes back; batches move to the device of its
    parameters. The result depends neither on `batch_size` nor on the order of the samples nor on
    the scale of the logits.

    Args:
        model: maps (B, ...) to logits (B, C), C >= 2.
        x: (N, ...) inputs in the box, N >= 1.
        y: (N,) int64 labels.
        norm: "Linf", "L2" or "L1".
        attacks: name -> search for the nearest point; `margin_attacks` by default, which costs
            a few thousand passes per sample; {} for none. Samples that are misclassified without an
            attack are not attacked.
        certificate: whether to compute one by `lipschitz_bound`. It bounds L2 distances; L1
            distances are no smaller, and Linf distances are at least 1 / sqrt(d) times as large for
            d numbers in x.
        lo, hi: the box of the default attacks; None for no bound.
        batch_size: samples per batch, >= 1.
        seed: seed of the default attacks.
        output: as in `PGD`; the default attacks use it too.
        progress: as in `evaluate`, by column; the last number counts the samples for which no
            adversarial point is known yet.

    Raises:
        ValueError, TypeError: for an empty or mismatched (x, y), and for what the attacks refuse.
    """
    norm = checks.canonical_norm(norm)
    checks.batch(x, y, None)
    checks.count("batch_size", batch_size, 1)
    if not len(x):
        raise ValueError(f"x must hold at least one sample, got shape {list(x.shape)}")
    if attacks is None:
        attacks = margin_attacks(norm, lo=lo, hi=hi, seed=seed, output=output)
    elif hasattr(attacks, "run"):
        attacks = {type(attacks).__name__: attacks}
    elif not isinstance(attacks, Mapping):
        raise TypeError(
            "attacks must be a mapping from names to searches such as FAB(...), or one search, got "
            f"{type(attacks).__name__}"
        )
    for name, attack in attacks.items():
        measured = getattr(getattr(attack, "settings", attack), "norm", norm)
        if measured != norm:
            raise ValueError(f"attacks must measure in {norm}, but {name!r} does in {measured}")
    progress = Lines() if progress == "auto" else progress
    model, device, label = unwrap(model), device_of(model, x), y.cpu()
    bound, uncertified = _bound(model, x, output) if certificate else (None, None)
    nearest = torch.full((len(x),), torch.inf, dtype=compute_dtype(x.dtype), device="cpu")

    def batches(name: str, chosen: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        done = 0
        for rows in chosen.split(batch_size):
            at = rows.to(x.device)
            yield rows, x[at].to(device), y[at].to(device)
            done += len(rows)
            if progress:
                progress(name, done, len(chosen), int(nearest.isinf().sum()))

    looks = []
    for rows, inputs, labels in batches("effective", torch.arange(len(x), device="cpu")):
        logits, effective = logits_and_margin(model, inputs, labels, norm, output)
        radius = effective if bound is None else bound.certified_radius(logits, labels)
        prediction = logits.argmax(1)
        nearest[rows[(prediction != labels).cpu()]] = 0.0
        looks.append([t.cpu() for t in (prediction, effective, radius)])
    prediction, effective, radius = (torch.cat(parts) for parts in zip(*looks, strict=True))
    if norm == "Linf":
        radius = radius / math.sqrt(x[0].numel())

    right = (prediction == label).nonzero()[:, 0]
    distances = {name: nearest.clone() for name in attacks}
    x_adv = x.detach().cpu().clone()
    queries = torch.ones_like(label)
    gradients = torch.full_like(label, logits.shape[1] - 1)
    for name, attack in attacks.items():
        for rows, inputs, labels in batches(name, right):
            found = attack.run(inputs, labels, draw=0, model=model)
            distance = found.distances.cpu().to(nearest.dtype)
            distances[name][rows] = distance
            queries[rows] += found.queries.cpu()
            gradients[rows] += found.gradients.cpu()
            nearer = distance < nearest[rows]
            nearest[rows[nearer]] = distance[nearer]
            x_adv[rows[nearer]] = found.x_adv.cpu()[nearer]
    return Margins(
        norm=norm,
        label=label,
        prediction=prediction,
        effective=effective,
        distances=distances,
        certified=None if bound is None else radius,
        uncertified=uncertified,
        x_adv=x_adv,
        queries=queries,
        gradients=gradients,
        descriptions={name: attack.describe() for name, attack in attacks.items()},
    )


def _bound(
    model: Model, x: Tensor, output: Output
) -> tuple[LipschitzBound, None] | tuple[None, str]:
    """Return the bound that certificates follow from, or the reason why there is none."""
    if not isinstance(model, nn.Module):
        return None, "the model is not an nn.Module"
    if output is not None:
        return None, "output= may change the logits in any way"
    try:
        return lipschitz_bound(model, x.shape[1:]), None
    except NotCovered as error:
        return None, str(error)


def _summary(values: Tensor) -> dict[str, float]:
    """Return quantiles that are values of the sample: infinity cannot be interpolated."""
    values = values.double().sort().values
    last = len(values) - 1
    row = {
        name: values[int(share * last)].item() if len(values) else math.nan
        for name, share in _QUANTILES.items()
    }
    found = values.isfinite().double().mean().item()  # NaN for none
    return {**row, "found": found}
