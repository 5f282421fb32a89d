"""Are attacks on fast views as strong as on the model?

    python benchmarks/fast_strength.py [--quick] [--images 2000] [--device cpu|cuda]

PGD-10 attacks test images on the SmallCNN after four epochs of adversarial training, at every
speed, from the same starts. The network itself judges. On the CPU each view is measured in both
forms, the CPU's own and the one for a GPU, whose fused convolutions are replaced there by separate
functions of PyTorch (they round once more in 16 bits than cuDNN's do). float16, which `speed=` does
not offer, is measured by `fast_view`.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import harness
import problems
import torch
from torch import Tensor


class Result(NamedTuple):
    """How many of the images that the network classifies correctly an attack fools, in percent of
    all images, and how many verdicts are not those of the exact attack."""

    form: str
    speed: str
    success: float
    differs: int


@contextlib.contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Make views on the CPU as they are made on a GPU."""
    from pyadv.passes import fused

    fused.CONVOLUTIONS["cpu"] = fused.STAND_IN
    try:
        yield
    finally:
        del fused.CONVOLUTIONS["cpu"]


def measure(options: harness.Options, images: int) -> Iterator[Result]:
    """Yield the results of all forms and speeds, the exact attack first."""
    p = problems.small_cnn(options, images)
    with torch.no_grad():
        right = p.model(p.x).argmax(1) == p.y

    def result(form: str, speed: str) -> Result:
        fooled = ~_robust(p, speed, options.steps) & right
        share = 100 * fooled.double().mean().item()
        return Result(form, speed, share, int((fooled != exact).sum()))

    exact = ~_robust(p, "exact", options.steps) & right
    device = options.device.type
    yield result(device, "exact")
    forms: list[tuple[str, Callable[[], Any]]] = [(device, contextlib.nullcontext)]
    if device == "cpu":
        forms.append(("GPU, on the CPU", as_on_a_gpu))
    for form, place in forms:
        with place():
            for speed in ("fast", "bfloat16", "float16"):
                yield result(form, speed)


def _robust(p: problems.Problem, speed: str, steps: int) -> Tensor:
    """Return which images the model still classifies correctly after the attack."""
    from pyadv.attacks import PGD, fast_view
    from pyadv.passes import view

    view._views.clear()  # one of this form
    found = []
    for x, y in zip(p.x.split(250), p.y.split(250), strict=True):
        settings = {"eps": p.eps, "alpha": p.alpha, "steps": steps, "seed": 0}
        if speed == "float16":
            x_adv = PGD(fast_view(p.model, x, dtype=torch.float16), **settings).run(x, y, draw=0)
            with torch.no_grad():
                found.append(p.model(x_adv.x_adv).argmax(1) == y)
        else:
            found.append(PGD(p.model, speed=speed, **settings).run(x, y, draw=0).correct)
    return torch.cat(found)


def table(results: list[Result]) -> str:
    lines = ["| form | speed | success, % | verdicts that differ |", "|---|---|---|---|"]
    for r in results:
        lines.append(f"| {r.form} | `{r.speed}` | {r.success:.2f} | {r.differs} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny, to check that it runs")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args()
    harness.use_checkout()
    options = harness.Options(torch.device(given.device), torch.get_num_threads(), given.quick)
    images = 40 if given.quick else given.images
    print(f"{images} images, PGD-{options.steps}, torch {torch.__version__}")
    print(table(list(measure(options, images))))


if __name__ == "__main__":
    main()
