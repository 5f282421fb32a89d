"""Choose the defaults of FMN, and check what `classes="nearest"` costs.

    python benchmarks/choose_fmn.py [--data cifar.npz] [--norms Linf L2 L1 L0] [--classes]

The script trains small networks on the first 3000 training images and attacks training images that
they have not seen. It attacks neither the networks nor the images of the strength comparison
(strength.py). For each norm it tries step sizes `alpha` at the first gamma, then values of `gamma`
at the best step size, with 20, 100 and 450 steps. `--data` names a second set of colour images, as
`pyadv.data.load` reads it, on which two more networks are trained.

A sample's score is its distance over the smallest one that any run with the same network and norm
found, at most 10. Each line of the output gives the geometric mean of the scores at each number of
steps, and over all. With `--classes` the script compares the two ways to choose a class instead, by
scores, and by the passes of "nearest" over those of "runner-up".
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import harness
import problems
import torch
from torch import Tensor, nn

STEPS = (20, 100, 450)
ALPHAS = {
    "Linf": (3.0, 10.0, 30.0, 100.0),
    "L2": (1.0, 3.0, 10.0),
    "L1": (1.0, 3.0, 10.0),
    "L0": (3.0, 10.0, 30.0),
}
GAMMAS = (0.05, 0.02, 0.1)
NORMS = ("Linf", "L2", "L1", "L0")
WORST = 10.0  # score of samples that are not fooled
TRAINED, IMAGES = 3000, 16


@dataclass
class Victim:
    """A network, and images that it classifies correctly."""

    name: str
    model: nn.Module
    x: Tensor
    y: Tensor


def conv(width: int, activation: type[nn.Module], channels: int, side: int) -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(channels, width, 5, stride=2, padding=2), activation()),
        *(nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), activation()),
        *(nn.Flatten(), nn.Linear(2 * width * (side // 4) ** 2, 64), activation()),
        nn.Linear(64, 10),
    )


def mlp(width: int, activation: type[nn.Module], channels: int, side: int) -> nn.Module:
    hidden = nn.Linear(channels * side * side, width), activation()
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(width, 10))


# form, width, activation, what it is trained on: nothing, or a norm and a radius
GREY = (
    (conv, 8, nn.ReLU, None),
    (conv, 20, nn.SiLU, None),
    (conv, 12, nn.ReLU, ("Linf", 0.08)),
    (conv, 16, nn.GELU, ("L2", 1.0)),
    (mlp, 100, nn.Tanh, None),
    (mlp, 200, nn.ReLU, ("Linf", 0.05)),
)
COLOUR = ((conv, 16, nn.ReLU, None), (conv, 24, nn.ReLU, ("Linf", 4 / 255)))


def victims(source: str, forms: Iterable[tuple], first_seed: int) -> Iterable[Victim]:
    """Train the networks one after the other."""
    from pyadv.attacks import PGD
    from pyadv.data import load
    from pyadv.objectives import AT

    data = load(source)
    x, y = data.train_x[:TRAINED], data.train_y[:TRAINED]
    unseen, labels = data.train_x[-4 * IMAGES :], data.train_y[-4 * IMAGES :]
    for seed, (form, width, activation, ball) in enumerate(forms, first_seed):
        torch.manual_seed(seed)
        model = form(width, activation, x.shape[1], x.shape[2])
        name = f"{source} {form.__name__} {width} {activation.__name__}"
        objective: Callable = problems.standard
        if ball:
            norm, eps = ball
            name += f", AT in {norm} {eps:.3g}"
            objective = AT(PGD(norm=norm, eps=eps, alpha=eps / 2, steps=3, seed=seed))
        problems.fit(model, objective, x, y, epochs=3)
        with torch.no_grad():
            right = (model(unseen).argmax(1) == labels).nonzero()[:IMAGES, 0]
        yield Victim(name, model, unseen[right], labels[right])


Runs = dict[tuple[str, int, object], Tensor]  # (victim, steps, setting) -> distances


def scores(runs: Runs) -> dict[object, list[float]]:
    """Return for each setting the geometric mean of the scores at each number of steps, then over
    all of them."""
    best: dict[str, Tensor] = {}
    for (victim, _, _), distances in runs.items():
        best[victim] = torch.minimum(distances, best.get(victim, distances))
    logs: dict[object, dict[int, list[Tensor]]] = {}
    for (victim, steps, setting), distances in runs.items():
        score = (distances / best[victim]).nan_to_num(nan=WORST).clamp(max=WORST).log()
        logs.setdefault(setting, {}).setdefault(steps, []).append(score.mean())
    means = {k: [torch.stack(v).mean() for v in by.values()] for k, by in logs.items()}
    return {k: [m.exp().item() for m in (*v, torch.stack(v).mean())] for k, v in means.items()}


def table(runs: Runs) -> object:
    """Print the scores; return the best setting."""
    found = scores(runs)
    for setting, values in found.items():
        print(f"  {setting!s:32}", *(f"{v:7.3f}" for v in values), flush=True)
    return min(found, key=lambda setting: found[setting][-1])


def search(norm: str, chosen: list[Victim]) -> None:
    """Choose alpha, then gamma."""
    from pyadv.attacks import FMN

    runs: Runs = {}

    def run(alpha: float, gamma: float) -> None:
        for v in chosen:
            for steps in STEPS:
                attack = FMN(v.model, norm=norm, steps=steps, alpha=alpha, gamma=gamma)
                runs[v.name, steps, (alpha, gamma)] = attack.run(v.x, v.y).distances

    for alpha in ALPHAS[norm]:
        run(alpha, GAMMAS[0])
    print(f"{norm}: (alpha, gamma), scores at {STEPS} steps, over all", flush=True)
    alpha, _ = table(runs)
    for gamma in GAMMAS[1:]:
        run(alpha, gamma)
    print(f"{norm}: gamma", flush=True)
    print("  best:", table(runs), flush=True)


def compare_classes(chosen: list[Victim]) -> None:
    """Compare `classes="nearest"` with "runner-up" in all attacks that have both."""
    from pyadv.attacks import CW, DDN, FMN

    kinds = {norm: partial(FMN, norm=norm) for norm in NORMS}
    kinds |= {"DDN": partial(DDN), "CW": partial(CW, steps=100, searches=5, c=0.1)}
    for name, kind in kinds.items():
        runs: Runs = {}
        passes: dict[tuple[int, str], float] = {}
        for steps in (100,) if name == "CW" else STEPS:
            for v in chosen:
                for classes in ("runner-up", "nearest"):
                    found = kind(v.model, steps=steps, classes=classes).run(v.x, v.y)
                    runs[v.name, steps, classes] = found.distances
                    total = (found.queries + found.gradients).double().mean().item()
                    passes[steps, classes] = passes.get((steps, classes), 0) + total
        print(f"{name}: scores at each number of steps, over all", flush=True)
        table(runs)
        cost = {s: passes[s, "nearest"] / passes[s, "runner-up"] for s, _ in passes}
        print("  passes:", {s: round(c, 3) for s, c in cost.items()})
        for v in chosen:
            own = scores({k: d for k, d in runs.items() if k[0] == v.name})
            print(f"    {v.name:40}", {k: [round(x, 3) for x in s] for k, s in own.items()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="a second set, of colour images")
    parser.add_argument("--norms", nargs="+", choices=NORMS, default=NORMS)
    parser.add_argument("--classes", action="store_true", help="compare the choices of a class")
    given = parser.parse_args()
    harness.use_checkout()
    torch.set_num_threads(1)
    sets = [("fashion-mini", GREY, 100), *([(given.data, COLOUR, 200)] if given.data else [])]
    chosen = []
    for source, forms, seed in sets:
        for v in victims(source, forms, seed):
            print(f"{v.name}: {len(v.y)} images", flush=True)
            chosen.append(v)
    if given.classes:
        compare_classes(chosen)
        return
    for norm in given.norms:
        search(norm, chosen)


if __name__ == "__main__":
    main()
