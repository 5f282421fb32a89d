"""Distances of samples to the decision boundary: estimates, upper bounds found by attacks, and
proven lower bounds."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from pyadv.attacks import DeepFool, MinimumNormResult, TargetedFAB
from pyadv.attacks.processes import Processes, together
from pyadv.attacks.progress import Progress
from pyadv.engine import checks
from pyadv.engine.attack import Model
from pyadv.engine.task import FloatOrTensor
from pyadv.evaluation.bisection import Bisection, Place
from pyadv.evaluation.escaping import markdown, one_line
from pyadv.evaluation.lipschitz import LipschitzBound, NotCovered, lipschitz_bound
from pyadv.evaluation.normalized_margins import logits_and_margin
from pyadv.menus import Norm
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
    norm: Norm | float = "Linf",
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
    place: Place = {"lo": lo, "hi": hi, "output": output}
    searches: dict[str, NearestPoint] = {}
    if norm != "L1":
        searches["DeepFool"] = DeepFool(norm=norm, **place)
    searches["FAB-T"] = TargetedFAB(norm=norm, seed=seed, **place)
    searches["bisection"] = Bisection(norm=norm, seed=seed, **place)
    return searches


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

    norm: Norm
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
    norm: Norm | float = "Linf",
    attacks: Mapping[str, NearestPoint] | NearestPoint | None = None,
    certificate: bool = True,
    lo: FloatOrTensor | None = 0.0,
    hi: FloatOrTensor | None = 1.0,
    batch_size: int = 500,
    seed: int | None = 0,
    output: Output = None,
    progress: Progress | Literal["auto"] | None = "auto",
    group: Any = None,
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
        group: as in `evaluate`: processes that divide the samples among themselves.

    Raises:
        ValueError, TypeError: for an empty or mismatched (x, y), and for what the attacks refuse.
    """
    with together(model, group) as processes:
        norm = checks.canonical_norm(norm)
        checks.batch(x, y, None)
        checks.count("batch_size", batch_size, 1)
        if not len(x):
            raise ValueError(f"x must hold at least one sample, got shape {list(x.shape)}")
        searches: Mapping[str, NearestPoint]
        if attacks is None:
            searches = margin_attacks(norm, lo=lo, hi=hi, seed=seed, output=output)
        elif isinstance(attacks, Mapping):
            searches = attacks
        elif hasattr(attacks, "run"):
            searches = {type(attacks).__name__: attacks}
        else:
            raise TypeError(
                "attacks must be a mapping from names to searches such as FAB(...), or one search, "
                f"got {type(attacks).__name__}"
            )
        for name, attack in searches.items():
            measured = getattr(getattr(attack, "settings", attack), "norm", norm)
            if measured != norm:
                raise ValueError(f"attacks must measure in {norm}, but {name!r} does in {measured}")
        given = {"x": x, "y": y, "batch_size": batch_size, "norm": norm, "attacks": searches}
        processes.compare("samples and settings", given)
        model = unwrap(model)
        bound, uncertified = _bound(model, x, output) if certificate else (None, None)
        return _Measurement(
            model, x, y, norm, batch_size, output, bound, processes, processes.progress(progress)
        ).run(searches, uncertified)


class _Measurement:
    """The samples, and the nearest points known so far; tables are on the CPU."""

    def __init__(
        self,
        model: Model,
        x: Tensor,
        y: Tensor,
        norm: Norm,
        batch_size: int,
        output: Output,
        bound: LipschitzBound | None,
        processes: Processes,
        progress: Progress | None,
    ):
        self.model, self.x, self.y, self.norm = model, x, y, norm
        self.batch_size, self.output, self.bound = batch_size, output, bound
        self.processes, self.progress = processes, progress
        self.device, n = device_of(model, x), len(x)
        self.nearest = torch.full((n,), torch.inf, dtype=compute_dtype(x.dtype), device="cpu")

    def run(self, attacks: Mapping[str, NearestPoint], uncertified: str | None) -> Margins:
        """Measure everything."""
        label = self.y.cpu()
        parts = zip(*self.processes.each(self.looks()), strict=True)
        rows, prediction, effective, radius, passes = (torch.cat(part) for part in parts)
        order = rows.argsort()
        prediction, effective, passes = (t[order] for t in (prediction, effective, passes))
        certified = None
        if self.bound is not None:
            certified = radius[order]
            if self.norm == "Linf":
                certified = certified / math.sqrt(self.x[0].numel())
        right = prediction == label
        self.nearest[~right] = 0.0
        distances = {name: self.nearest.clone() for name in attacks}
        x_adv = self.x.detach().cpu().clone()
        queries, gradients = torch.ones_like(label), passes
        for name, attack in attacks.items():
            for rows, distance, points, forward, backward in self.processes.each(
                self.searches(name, attack, right.nonzero()[:, 0])
            ):
                distances[name][rows] = distance
                queries[rows] += forward
                gradients[rows] += backward
                nearer = distance < self.nearest[rows]
                self.nearest[rows[nearer]] = distance[nearer]
                x_adv[rows[nearer]] = points[nearer]
        return Margins(
            norm=self.norm,
            label=label,
            prediction=prediction,
            effective=effective,
            distances=distances,
            certified=certified,
            uncertified=uncertified,
            x_adv=x_adv,
            queries=queries,
            gradients=gradients,
            descriptions={name: attack.describe() for name, attack in attacks.items()},
        )

    def looks(self) -> Iterator[tuple[Tensor, ...]]:
        """Yield, for each batch: its rows, predictions, effective margins, certified L2 radii (none
        without a bound), backward passes."""
        for rows, x, y in self.batches("effective", torch.arange(len(self.x), device="cpu")):
            logits, effective = logits_and_margin(self.model, x, y, self.norm, self.output)
            none = effective.new_empty(0)
            radius = none if self.bound is None else self.bound.certified_radius(logits, y)
            passes = torch.full_like(rows, logits.shape[1] - 1)
            prediction = logits.argmax(1).cpu()
            self.nearest[rows[prediction != y.cpu()]] = 0.0
            yield rows, prediction, effective.cpu(), radius.cpu(), passes

    def searches(
        self, name: str, attack: NearestPoint, rows: Tensor
    ) -> Iterator[tuple[Tensor, ...]]:
        """Yield, for each batch: its rows, distances, points, forward and backward passes."""
        for part, x, y in self.batches(name, rows):
            found = attack.run(x, y, draw=0, model=self.model)
            distance = found.distances.cpu().to(self.nearest.dtype)
            yield part, distance, found.x_adv.cpu(), found.queries.cpu(), found.gradients.cpu()

    def batches(self, name: str, rows: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield the batches of this process: rows, x, y."""
        mine, done = self.processes.part(rows), 0
        for part in mine.split(self.batch_size):
            if not len(part):  # torch splits nothing into one empty part
                continue
            at = part.to(self.x.device)
            yield part, self.x[at].to(self.device), self.y[at].to(self.device)
            done += len(part)
            if self.progress:
                self.progress(name, done, len(mine), int(self.nearest.isinf().sum()))


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
