"""How strong are the attacks, against those of other libraries at equal budgets?

Five networks, trained on the embedded images within minutes: the SmallCNN after standard,
adversarial and GAIRAT training, a small ResNet after standard training, and an adversarially
trained network of two linear layers. Each attack gets the same test images, all of which the
network classifies correctly. The same wrapper counts passes for every library, and the network
itself judges each result: a point outside the box or the radius counts as no success.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import problems
import strength_peers
import torch
from harness import Options, Row
from problems import Counted
from strength_peers import Maker, Makers
from torch import Tensor, nn

TITLE = "The strength of attacks"
NORMS = ("Linf", "L2", "L1", "L0")
FIXED, NEAREST = "within a radius", "the nearest point"
STANDARD = {"Linf": 0.05, "L2": 0.9, "L1": 6.0, "L0": 10}
ROBUST = {"Linf": 0.12, "L2": 1.7, "L1": 8.0, "L0": 12}
OURS = "pyadv"
_SLACK = 1e-3  # share of the radius by which rounding may exceed it
_CLEAR = {FIXED: 9.0, NEAREST: 0.01}  # differences that the page calls a loss: points, and a share


class Budget(NamedTuple):
    """The number of images, and of the steps of each attack."""

    images: int = 12
    steps: int = 40  # within a radius
    queries: int = 200
    targets: int = 3
    nearest: int = 100
    fab: int = 30  # each step takes a gradient per class
    searches: int = 3
    search_steps: int = 50


QUICK = Budget(2, 2, 3, 2, 2, 2, 2, 2)


class Victim(NamedTuple):
    """A network, the images it is attacked on, and the radii."""

    name: str
    model: nn.Module
    x: Tensor
    y: Tensor
    radii: dict[str, float]


@dataclass
class Contest:
    """All attacks on one network in one norm, of one kind."""

    victim: Victim
    norm: str
    kind: str
    makers: Makers

    @property
    def name(self) -> str:
        radius = f" {self.victim.radii[self.norm]:g}" if self.kind == FIXED else ""
        return f"{self.victim.name}, {self.norm}{radius}, {self.kind}"


class TinyResNet(nn.Module):
    """Three residual blocks of 8 to 32 channels."""

    def __init__(self) -> None:
        from pyadv.models.resnet import BasicBlock

        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, stride=2, padding=1)
        self.blocks = nn.Sequential(
            BasicBlock(8, 8, 1), BasicBlock(8, 16, 2), BasicBlock(16, 32, 2)
        )
        self.linear = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.blocks(self.stem(x).relu()).mean((2, 3)))


def two_layers() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 150), nn.ReLU(), nn.Linear(150, 10))


@functools.cache
def _trained(form: str, method: str, seed: int, epochs: int, images: int | None) -> nn.Module:
    from pyadv.attacks import PGD
    from pyadv.data import load
    from pyadv.models import SmallCNN
    from pyadv.objectives import AT, GAIRAT

    forms = {"SmallCNN": SmallCNN, "ResNet": TinyResNet, "MLP": two_layers}
    torch.manual_seed(seed)
    model = forms[form]()
    pgd = PGD(eps=0.1, alpha=0.05, steps=4, seed=seed)
    objectives: dict[str, Any] = {
        "standard": lambda: problems.standard,
        "AT": lambda: AT(pgd),
        "GAIRAT": lambda: GAIRAT(pgd, begin_epoch=2),
    }
    data = load("fashion-mini")
    objective = objectives[method]()
    return problems.fit(model, objective, data.train_x[:images], data.train_y[:images], epochs)


def victims(budget: Budget, quick: bool) -> Iterator[Victim]:
    """Train the networks one after the other, deterministically."""
    from pyadv.data import load

    data = load("fashion-mini")
    forms = [
        ("SmallCNN", "standard", STANDARD),
        ("SmallCNN", "AT", ROBUST),
        ("SmallCNN", "GAIRAT", ROBUST),
        ("ResNet", "standard", STANDARD),
        ("MLP", "AT", ROBUST),
    ]
    for seed, (form, method, radii) in enumerate(forms):
        epochs, images = (1, 300) if quick else (3, 5000)
        model = _trained(form, method, seed, epochs, images)
        with torch.no_grad():
            right = (model(data.test_x[:500]).argmax(1) == data.test_y[:500]).nonzero()[:, 0]
        right = right[: budget.images]
        yield Victim(f"{form} {method}", model, data.test_x[right], data.test_y[right], radii)


def cases(options: Options) -> Iterable[Contest]:
    budget = QUICK if options.quick else Budget()
    for victim in victims(budget, options.quick):
        for norm in NORMS:
            radius = victim.radii[norm]
            ours = _fixed(norm, radius, budget)
            theirs = {}
            if norm != "L0":
                theirs = strength_peers.fixed(
                    norm, radius, budget.steps, budget.queries, budget.targets
                )
            yield Contest(victim, norm, FIXED, _entrants(ours, theirs, options))
            ours = _nearest(norm, budget)
            theirs = strength_peers.nearest(
                norm, budget.nearest, budget.fab, budget.searches, budget.search_steps
            )
            yield Contest(victim, norm, NEAREST, _entrants(ours, theirs, options))


def _entrants(ours: dict[str, Maker], theirs: Makers, options: Options) -> Makers:
    """Return the makers by method, ours first, of the libraries that are there."""
    methods = dict.fromkeys((*ours, *theirs))
    return {
        m: {
            **({OURS: ours[m]} if m in ours else {}),
            **{k: v for k, v in theirs.get(m, {}).items() if k in options.peers},
        }
        for m in methods
    }


def _fixed(norm: str, eps: float, b: Budget) -> dict[str, Maker]:
    """Return pyadv's attacks within a radius."""
    from pyadv.attacks import APGD, MIFGSM, PGD, PGD0, Square, TargetedAPGD

    common = dict(eps=eps, seed=0)
    if norm == "L0":
        return {"PGD0": _ours(PGD0, steps=b.steps, **common)}
    common["norm"] = norm
    found = {
        "PGD": _ours(PGD, alpha=eps / 10, steps=b.steps, best="fooled", **common),
        "APGD": _ours(APGD, steps=b.steps, **common),
        "APGD-T": _ours(TargetedAPGD, steps=b.steps, targets=b.targets, **common),
        "Square": _ours(Square, queries=b.queries, **common),
    }
    if norm == "Linf":
        found["MI-FGSM"] = _ours(MIFGSM, eps=eps, alpha=eps / 10, steps=b.steps, best="fooled")
    return found


def _nearest(norm: str, b: Budget) -> dict[str, Maker]:
    """Return pyadv's attacks that look for the nearest point."""
    from pyadv.attacks import CW, DDN, FAB, FMN, DeepFool, SigmaZero

    found = {"FMN": _ours(FMN, norm=norm, steps=b.nearest)}
    if norm == "L0":
        return {**found, "sigma-zero": _ours(SigmaZero, steps=b.nearest)}
    found["FAB"] = _ours(FAB, norm=norm, steps=b.fab, seed=0)
    if norm == "L2":
        found["DDN"] = _ours(DDN, steps=b.nearest)
        found["CW"] = _ours(CW, searches=b.searches, steps=b.search_steps, c=0.1)
        found["SuperDeepFool"] = _ours(DeepFool, variant="super")
    if norm != "L1":
        found["DeepFool"] = _ours(DeepFool, norm=norm)
    return found


def _ours(kind: Callable[..., Any], **settings: Any) -> Maker:
    return lambda model, x, y: kind(model, **settings)(x, y)


# -- measuring ------------------------------------------------------------------------------------


def measure(contest: Contest, options: Options) -> list[Row]:
    """Run each attack once. A row's facts are `robust`, the percentage of images that withstand, or
    `ratio`, the median of the distances over the smallest that any attack found, `found`, the
    percentage of images with a point, and `median`, the median distance."""
    victim, found, rows = contest.victim, {}, []
    for method, libraries in contest.makers.items():
        for library, maker in libraries.items():
            row = Row(contest.name, f"{library} {method}", f"{OURS} {method}", options.threads)
            row.group, row.images = f"{contest.norm}, {contest.kind}", len(victim.y)
            row.peer = library != OURS
            rows.append(row)
            counted, begin = Counted(victim.model).eval(), time.process_time()
            torch.manual_seed(0)
            try:
                x_adv = maker(counted, victim.x.clone(), victim.y.clone()).detach()
            except Exception as error:  # a peer may raise anything
                row.refused = f"{type(error).__name__}: {error}".splitlines()[0]
                continue
            row.times_us = [1e6 * max(time.process_time() - begin, 1e-6)]
            row.forwards, row.backwards = counted.forwards, counted.backwards
            found[row.provider] = _distances(victim, x_adv, contest.norm)
    if not found:
        return rows
    best = torch.stack(list(found.values())).amin(0)
    for row in rows:
        if row.provider in found:
            row.facts = _facts(contest, found[row.provider], best)
    return rows


def _distances(victim: Victim, x_adv: Tensor, norm: str) -> Tensor:
    """Return (B,): the distance of points that fool the network, inf for others and for points
    outside the box."""
    offset = (x_adv.to(victim.x.dtype) - victim.x).flatten(1)
    inside = (x_adv >= -1e-6).flatten(1).all(1) & (x_adv <= 1 + 1e-6).flatten(1).all(1)
    with torch.no_grad():
        fooled = victim.model(x_adv.to(victim.x.dtype)).argmax(1) != victim.y
    distances = torch.linalg.vector_norm(offset, strength_peers.P[norm], dim=1)
    return torch.where(fooled & inside, distances, torch.inf)


def _facts(contest: Contest, distances: Tensor, best: Tensor) -> dict[str, float]:
    if contest.kind == FIXED:
        radius = contest.victim.radii[contest.norm] * (1 + _SLACK)
        return {"robust": _rounded(100 * (distances > radius).double().mean().item())}
    known = best.isfinite()
    ratios = (distances / best)[known]
    return {
        "ratio": _rounded(min(ratios.nanmedian().item(), 99.0)) if known.any() else 99.0,
        "median": _rounded(min(distances.nanmedian().item(), 1e6)),
        "found": _rounded(100 * distances.isfinite().double().mean().item()),
    }


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


# -- showing --------------------------------------------------------------------------------------


def text(rows: list[Row]) -> str:
    """Return a table for each norm and kind of attack, and where pyadv loses."""
    parts = []
    for group in dict.fromkeys(r.group for r in rows):
        parts.append(_table(group, [r for r in rows if r.group == group]))
    parts.append("**Where pyadv loses**\n\n" + _losses(rows))
    refused = dict.fromkeys(f"- {r.provider}: {r.refused}" for r in rows if r.refused)
    if refused:
        parts.append("Attacks that raised an error:\n\n" + "\n".join(refused) + "\n")
    return "\n".join(parts)


def _table(group: str, rows: list[Row]) -> str:
    cases = list(dict.fromkeys(r.case for r in rows))
    heads = [case.removesuffix(f", {group.split(', ')[1]}") for case in cases]
    lines = [f"**{group}**\n", _line(["attack", *heads, "forward", "backward"])]
    lines.append(_line(["---"] * (len(cases) + 3)))
    for provider in dict.fromkeys(r.provider for r in rows):
        own = {r.case: r for r in rows if r.provider == provider and not r.refused}
        if not own:
            continue
        name = f"**{provider}**" if provider.startswith(f"{OURS} ") else provider
        images = sum(r.images for r in own.values())
        passes = [sum(getattr(r, k) or 0 for r in own.values()) for k in ("forwards", "backwards")]
        cells = [_cell(own[c].facts) if c in own else "" for c in cases]
        lines.append(_line([name, *cells, *(f"{p / images:.0f}" for p in passes)]))
    return "\n".join(lines) + "\n"


def _cell(facts: dict[str, float]) -> str:
    if "robust" in facts:
        return f"{facts['robust']:.0f}"
    missing = "" if facts["found"] == 100 else f" ({facts['found']:.0f} %)"
    return f"{facts['ratio']:.3f}{missing}"


def _losses(rows: list[Row]) -> str:
    """Return a line for each case and method where a peer's attack of the same name is stronger,
    and for each case where the strongest peer is stronger than all of pyadv."""
    lines = []
    for case in dict.fromkeys(r.case for r in rows):
        here = [r for r in rows if r.case == case and r.facts]
        kind = FIXED if here and "robust" in here[0].facts else NEAREST
        ours = [r for r in here if not r.peer]
        peers = [r for r in here if r.peer]
        for mine in ours:
            same = [r for r in peers if r.ours == mine.provider]
            lines += _loss(case, mine, same, kind)
        if ours and peers:
            best = min(ours, key=_weakness)
            strongest = min(peers, key=_weakness)
            if strongest.ours != best.provider:
                lines += _loss(case, best, [strongest], kind)
    return "\n".join(dict.fromkeys(lines)) + "\n" if lines else "Nowhere.\n"


def _loss(case: str, mine: Row, peers: list[Row], kind: str) -> list[str]:
    if not peers:
        return []
    best = min(peers, key=_weakness)
    if _weakness(mine) <= _weakness(best) + _CLEAR[kind]:
        return []
    return [f"- {case}: {best.provider} {_cell(best.facts)}, {mine.provider} {_cell(mine.facts)}"]


def _weakness(row: Row) -> float:
    facts = row.facts
    return facts["robust"] if "robust" in facts else facts["ratio"] + (100 - facts["found"])


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def page(environment: dict[str, Any], rows: list[Row]) -> str:
    """Return docs/strength.md."""
    b = Budget()
    peers = ", ".join(f"{k} {v}" for k, v in environment.get("peers", {}).items() if v) or "none"
    return f"""# {TITLE}

{__doc__.strip()}

`python benchmarks/run.py strength` measured this in {environment["seconds"]:.0f} s at
{environment["commit"]}, torch {environment["torch"]}, {environment["date"]}; `python
benchmarks/render.py` writes the page. Peers: {peers}.

- {b.images} images per network. PGD, MI-FGSM, APGD and PGD0 take {b.steps} steps, APGD-T {b.steps}
  for each of {b.targets} targets, Square {b.queries} queries, attacks for the nearest point
  {b.nearest} steps, FAB {b.fab} (each takes a gradient per class), CW and EAD {b.searches} searches
  of {b.search_steps} steps, DeepFool at most 50.
  All other settings are each library's defaults; PGD's step is a tenth of the radius.
- "{FIXED.capitalize()}" shows the robust accuracy in percent: lower is stronger, and one image is
  {100 / b.images:.1f} points.
- "{NEAREST.capitalize()}" shows the median, over images, of the distance divided by the smallest
  that any attack of the table found: 1.000 is the best. The percentage of images for which a
  point was found stands in brackets where it is not 100.
- The last columns count forward and backward passes per image, as means over the networks. pyadv's
  attacks take samples that are done out of the batch, which saves passes.
- With {b.images} images, differences of one image and of one percent are noise; a loss below is
  larger than that.

{text(rows)}"""
