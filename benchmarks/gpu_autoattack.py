"""What does AutoAttack cost on a GPU, and does it reach the verdicts of the authors' package?

The standard ensemble on test images of CIFAR-10 and an adversarially trained ResNet-18, each
provider once. The facts beside pyadv's time are the seconds and the forward passes (in thousands of
samples) of each member. `differs` counts verdicts that are not pyautoattack's.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

import peers
import torch
from harness import Goal, Row
from torch import Tensor, nn

TITLE = "AutoAttack on a GPU"
LAYOUT = "list"
IMAGES = 512

_CASE = f"AutoAttack standard, ResNet-18, {IMAGES} images"
_JUDGE = "pyautoattack"
GOALS = [
    Goal("AutoAttack: 2.5 times pyautoattack", _CASE, _JUDGE, at_least=2.5),
    Goal(
        "AutoAttack in bfloat16: 6 times pyautoattack",
        _CASE,
        _JUDGE,
        at_least=6.0,
        ours="pyadv bfloat16",
    ),
    *(
        Goal(
            f"AutoAttack, {ours}: at most one verdict differs from pyautoattack's",
            _CASE,
            _JUDGE,
            at_most=1.0,
            ours=ours,
            fact="differs",
        )
        for ours in ("pyadv", "pyadv bfloat16")
    ),
]


def rows(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: float,
    versions: Mapping[str, str | None],
    quick: bool = False,
) -> Iterator[Row]:
    """Yield a row for each provider as it ends, so that a time limit keeps those before it.

    Args:
        model: The network, on the device of `x`.
        x: Images.
        y: Labels.
        eps: Radius of the Linf ball.
        versions: The peers that can be imported, with their versions.
        quick: Whether two steps per member suffice.
    """
    case = _CASE.replace(str(IMAGES), str(len(x)))
    judged = None
    if versions.get(_JUDGE) and not quick:
        attack = peers.autoattack(x, y, eps, len(x), seed=0)[_JUDGE](model)
        x_adv, seconds = _timed(attack, x)
        with torch.no_grad():
            judged = model(x_adv).argmax(1) == y
        yield _row(case, _JUDGE, judged, seconds, {"differs": 0.0}, peer=True)
    for name, speed in (("pyadv", "exact"), ("pyadv bfloat16", "bfloat16"), ("pyadv fast", "fast")):
        standing, seconds, facts = _ours(model, x, y, eps, speed, quick)
        if judged is not None:
            facts = {"differs": float((standing != judged).sum()), **facts}
        yield _row(case, name, standing, seconds, facts)


def _ours(
    model: nn.Module, x: Tensor, y: Tensor, eps: float, speed: str, quick: bool
) -> tuple[Tensor, float, dict[str, float]]:
    """Return the verdicts, the seconds and the facts about each member."""
    from pyadv.attacks import AutoAttack

    ended: dict[str, float] = {}

    def told(member: str, *_: Any) -> None:
        ended[member] = time.perf_counter()

    attack = AutoAttack(model, eps=eps, seed=0, speed=speed, progress=told)
    if quick:
        for planned in attack.plan.values():
            planned.steps = 2
    begin = time.perf_counter()
    found, seconds = _timed(lambda: attack.run(x, y, batch_size=len(x)), x)
    facts: dict[str, float] = {}
    for member, queries in zip(found.names, found.queries.sum(0).tolist(), strict=True):
        if member in ended:
            facts[f"{member} s"] = round(ended[member] - begin, 2)
            begin = ended[member]
        facts[f"{member} passes"] = round(queries / 1000, 1)
    with torch.no_grad():
        return model(found.x_adv).argmax(1) == y, seconds, facts


def _timed(call: Any, x: Tensor) -> tuple[Any, float]:
    """Return the result of a call and the seconds until the device has finished it."""
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    begin = time.perf_counter()
    result = call()
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    return result, time.perf_counter() - begin


def _row(
    case: str,
    provider: str,
    standing: Tensor,
    seconds: float,
    facts: dict[str, float],
    peer: bool = False,
) -> Row:
    robust = round(100 * standing.double().mean().item(), 2)
    return Row(
        case,
        provider,
        ours="pyadv",
        threads=1,
        images=len(standing),
        peer=peer,
        facts={"robust %": robust, **facts},
        times_us=[float(f"{1e6 * seconds:.5g}")],
    )
