"""Accuracy on clean and on attacked inputs, in batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from pyadv.attacks import PGD
from pyadv.evaluation.report import Report, Row

Progress = Callable[[str, int, int], None]


def standard_attacks(eps: float, norm: str | float = "Linf", *, seed: int = 0) -> dict[str, PGD]:
    """The attacks that papers on adversarial training tabulate, by the name of their row.

    - "PGD-20": 20 steps of eps / 4 on the cross-entropy from a random start (the setting of
      GAIRAT, Zhang et al. 2021).
    - "margin PGD": 40 steps of eps / 4 on max_{j != y} z_j - z_y from a random start. FAT and
      GAIRAT call PGD on this loss "CW"; it is not the attack of Carlini and Wagner (2017). It
      breaks models whose cross-entropy gradient misleads, reweighted training among them.
    """
    settings = {"norm": norm, "eps": eps, "alpha": eps / 4, "seed": seed}
    return {
        "PGD-20": PGD(steps=20, loss="ce", **settings),
        "margin PGD": PGD(steps=40, loss="margin", **settings),
    }


def describe(attack: PGD) -> str:
    """One line that lets a reader repeat the attack."""
    s = attack.settings
    restarts = f", {attack.restarts} restarts" if attack.restarts > 1 else ""
    alpha = "a size per sample" if isinstance(s.alpha, Tensor) else f"{s.alpha:.4g}"
    loss, start = (
        v if isinstance(v, str) else getattr(v, "__name__", type(v).__name__)
        for v in (s.loss.loss, s.start)
    )
    return f"{s.steps} steps of {alpha}, loss {loss}, {start} start{restarts}"


def evaluate(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    norm: str | float = "Linf",
    attacks: Mapping[str, PGD] | None = None,
    batch_size: int = 500,
    seed: int = 0,
    progress: Progress | None = None,
) -> Report:
    """Accuracy of `model` on `x`, clean and under each attack.

    The model is evaluated in eval mode and gets its modes back; batches move to the device of its
    parameters. Random starts are keyed by the sample's index, so the result does not depend on
    `batch_size`.

    Args:
        model: maps (B, ...) to logits (B, C).
        x: (N, ...) inputs in [0, 1], N >= 1.
        y: (N,) int64 labels.
        eps: radius of the ball, in units of x.
        norm: "Linf", "L2" or "L1".
        attacks: row name -> attack; `standard_attacks(eps, norm, seed=seed)` by default.
        batch_size: samples per batch, >= 1.
        seed: of the random starts of the default attacks.
        progress: called as progress(row name, samples done, N) after each batch.

    Raises:
        ValueError: for an empty or mismatched (x, y) or batch_size; and whatever the attack
            refuses (labels out of range, NaN, inputs outside the box).
    """
    n = len(x)
    if n == 0 or y.shape != (n,):
        raise ValueError(
            f"y must be (N,) for N = {n} >= 1 samples of x, got shape {tuple(y.shape)}"
        )
    if batch_size < 1:
        raise ValueError(f"batch_size must be >= 1, got {batch_size}")
    if attacks is None:
        attacks = standard_attacks(eps, norm, seed=seed)
    # No steps from no start: the clean prediction, under the same rules and by the same code.
    clean = PGD(norm=norm, eps=eps, steps=0, start="none")
    rows = [
        Row(name, description, _correct(model, attack, name, x, y, batch_size, progress))
        for name, attack, description in (
            ("clean", clean, "no attack"),
            *((name, attack, describe(attack)) for name, attack in attacks.items()),
        )
    ]
    return Report(n, clean.settings.norm, float(eps), tuple(rows))


def _correct(
    model: nn.Module,
    attack: PGD,
    name: str,
    x: Tensor,
    y: Tensor,
    batch_size: int,
    progress: Progress | None,
) -> Tensor:
    """(N,) bool on the CPU: which samples are still correct after the attack."""
    parameter = next(iter(model.parameters()), x)
    draw, correct = attack.draw, []
    ids = torch.arange(len(x), device=parameter.device)
    for i in range(0, len(x), batch_size):
        rows = slice(i, i + batch_size)
        batch = x[rows].to(parameter.device), y[rows].to(parameter.device)
        correct.append(attack.run(*batch, ids=ids[rows], draw=draw, model=model).correct.cpu())
        if progress:
            progress(name, min(i + batch_size, len(x)), len(x))
    return torch.cat(correct)
