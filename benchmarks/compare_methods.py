"""Compare the training methods at one budget, with several seeds and one way of measuring.

    python benchmarks/compare_methods.py [--seeds 3] [--epochs 6] [--train 3000] [--quick]
                                         [--resume] [--out DIR] [--runs DIR]

The strengths of the regularisers are chosen first, on held-out training images. Then each method is
trained with each seed and each network is measured. AutoAttack, which takes longest, comes last and
in parts. Results go to DIR/<run>.json at once and networks to RUNS; `--resume` continues from both.
`compare_methods_page.py` writes docs/methods-compared.md from DIR.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import harness
import torch
from torch import Tensor, nn

RESULTS = harness.HERE / "results" / "compare_methods"
BUDGET, INDEX = "budget.json", "runs.json"
AT = {"method": "at"}
STANDARD = {"method": "standard"}

# Settings of pyadv.training.Config among which robust accuracy on held-out images chooses.
GRIDS: dict[str, list[dict[str, float]]] = {
    "weight decay": [{"weight_decay": v} for v in (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)],
    "WEISSI": [{"norm_penalty": v} for v in (0.01, 0.03, 0.1, 0.3)],
    "EMR + standard": [
        {"emr": v, "emr_temperature": t} for v in (0.003, 0.03, 0.3, 3.0, 30.0) for t in (1.0, 40.0)
    ],
    "EMR + AT": [{"emr": v, "emr_temperature": t} for v in (0.03, 0.3, 3.0) for t in (1.0, 40.0)],
}
METHODS: dict[str, dict[str, Any]] = {
    "standard": STANDARD,
    "weight decay": STANDARD,
    "WEISSI": STANDARD,
    "EMR + standard": STANDARD,
    "AT": AT,
    "FAT": {"method": "fat"},
    "GAIRAT": {"method": "gairat"},
    "TRADES": {"method": "trades"},
    "MART": {"method": "mart"},
    "MAIL": {"method": "mail-at"},
    "EMR + AT": AT,
    "AWP": {"method": "at", "awp": 0.005},
}


@dataclass(frozen=True)
class Budget:
    """The budget of every method: training images, epochs, attack and test images."""

    seeds: int = 3
    epochs: int = 6
    train: int = 3000
    held_out: int = 500
    batch_size: int = 50
    lr: float = 0.1
    eps: float = 0.1
    eps_warmup: int = 2
    steps: int = 6
    tested: int = 400
    autoattacked: int = 120
    part: int = 40  # images that AutoAttack gets at a time
    probe: int = 100  # images on which margins are measured after each epoch
    square_queries: int = 5000


QUICK = Budget(
    seeds=2,
    epochs=1,
    train=100,
    held_out=20,
    tested=20,
    autoattacked=4,
    part=2,
    probe=5,
    square_queries=5,
)


class Comparison:
    """All runs of one budget, with results in `out` and networks in `runs`."""

    def __init__(self, budget: Budget, out: Path, runs: Path) -> None:
        from pyadv.data import load

        self.budget, self.out, self.runs = budget, out, runs
        data = load("fashion-mini")
        held = slice(budget.train, budget.train + budget.held_out)
        self.held_out = data.train_x[held], data.train_y[held]
        first = slice(0, budget.train)
        self.data = replace(data, train_x=data.train_x[first], train_y=data.train_y[first])

    def all(self) -> None:
        """Choose, train and measure everything that has no result yet."""
        begin = time.perf_counter()
        chosen = {name: self.choose(name) for name in GRIDS}
        rows = [
            (name, seed, {**settings, **chosen.get(name, {})})
            for seed in range(
                self.budget.seeds
            )  # outermost, so that an interrupted comparison has whole seeds
            for name, settings in METHODS.items()
        ]
        index = [{"name": n, "seed": s, "run": run_name(settings, s)} for n, s, settings in rows]
        write(self.out / INDEX, {"chosen": chosen, "runs": index})
        for images in (0, *range(self.budget.part, self.budget.autoattacked + 1, self.budget.part)):
            for name, seed, settings in rows:
                self.measure(settings, seed, images)
                seconds = time.perf_counter() - begin
                print(f"{seconds:6.0f} s  {name}, seed {seed}, AutoAttack on {images}", flush=True)

    def choose(self, name: str) -> dict[str, float]:
        """Return the strength in the grid that is most robust to PGD-20 on held-out images."""
        from pyadv.evaluation import evaluate, standard_attacks
        from pyadv.training import Diverged

        def robust(strength: dict[str, float]) -> float:
            try:
                run, model = self.trained({**METHODS[name], **strength}, seed=0)
            except Diverged as error:
                print(f"{name} {strength}: {error}", flush=True)
                return -1.0
            if "held_out" not in run:
                eps = self.budget.eps
                attacks = {"PGD-20": standard_attacks(eps)["PGD-20"]}
                report = evaluate(model(), *self.held_out, eps=eps, attacks=attacks, progress=None)
                run["held_out"] = {row.name: row.accuracy for row in report.rows}
                self.keep(run)
            print(f"{name} {strength}: {run['held_out']}", flush=True)
            return run["held_out"]["PGD-20"]

        return max(GRIDS[name], key=robust)

    def measure(self, settings: dict[str, Any], seed: int, autoattacked: int) -> None:
        """Measure accuracies and margins; AutoAttack runs on `autoattacked` images."""
        from pyadv.attacks import AutoAttack
        from pyadv.evaluation import evaluate

        b = self.budget
        run, model = self.trained(settings, seed)
        if "accuracy" not in run:
            x, y = self.data.test_x[: b.tested], self.data.test_y[: b.tested]
            report = evaluate(model(), x, y, eps=b.eps, progress=None)
            run["accuracy"] = {row.name: _bits(row.correct) for row in report.rows}
            run["accuracy"]["AutoAttack"] = ""
            run["margins"] = margins(model(), x, y)
            self.keep(run)
        new = slice(len(run["accuracy"]["AutoAttack"]), autoattacked)
        if new.start < new.stop:
            network = model()
            attack = AutoAttack(network, eps=b.eps, seed=0, progress=None)
            attack.plan["square"].steps = b.square_queries
            x, y = self.data.test_x[new], self.data.test_y[new]
            report = evaluate(network, x, y, eps=b.eps, attacks=attack, progress=None)
            run["accuracy"]["AutoAttack"] += _bits(report.worst.correct)
            self.keep(run)

    def trained(self, settings: dict[str, Any], seed: int) -> tuple[dict[str, Any], Any]:
        """Return the results of a run and a function that loads its network."""
        from pyadv.training import Config, Trainer, load_model

        name = run_name(settings, seed)
        path, folder = self.out / f"{name}.json", self.runs / name
        if not (path.exists() and (folder / "checkpoint.pt").exists()):
            b = self.budget
            config = Config(
                **{"weight_decay": 0.0, **settings},
                epochs=b.epochs,
                batch_size=b.batch_size,
                lr=b.lr,
                eps=b.eps,
                eps_warmup=b.eps_warmup,
                steps=b.steps,
                seed=seed,
            ).resolve(self.data)
            folder.mkdir(parents=True, exist_ok=True)
            probe = self.data.test_x[: b.probe], self.data.test_y[: b.probe]
            curve: list[dict[str, Any]] = []
            display = _measuring_display(lambda: margins(trainer.result, *probe), curve)
            trainer = Trainer(config, self.data, folder, display=display)
            trainer.fit()
            self.keep({"name": name, "config": config.to_dict(), "curve": curve})
        return json.loads(path.read_text()), lambda: load_model(folder).model

    def keep(self, run: dict[str, Any]) -> None:
        write(self.out / f"{run['name']}.json", run)


def _measuring_display(
    measure: Callable[[], dict[str, float | None]], curve: list[dict[str, Any]]
) -> Any:
    """Return a display that shows nothing and adds a measurement to `curve` after each epoch."""
    from pyadv.training import Display

    class Measuring(Display):
        def progress(self) -> Any:
            self.began = time.process_time()
            return super().progress()

        def epoch(self, record: dict[str, Any], epochs: int) -> None:
            cpu = time.process_time() - self.began
            known = {
                k: record[k] for k in ("epoch", "loss", "train_clean", "train_robust", "seconds")
            }
            curve.append({**known, "cpu_seconds": cpu, **measure()})

    return Measuring(quiet=True)


def margins(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, float | None]:
    """Return medians over all samples, where misclassified samples have a negative margin. A value
    is None if it is infinite, because the network has become constant.

    "weight_norm" is the Frobenius norm of dz/dx after the mean logit is subtracted, that is, the
    norm of the network's linearisation at x. "log_norm_product" is the penalty of WEISSI.
    """
    from pyadv import ops
    from pyadv.evaluation import effective_margin
    from pyadv.objectives import EMR
    from pyadv.objectives.step import Step

    rows = EMR(1.0, of="jacobian", center=True).per_sample(Step(model, x, y, epoch=1))
    with torch.no_grad():
        logit = ops.row_stats(model(x), y).margin
        product = ops.NormProduct(model, x.shape[1:])().item()
    values = {
        "logit_margin": logit,
        "margin_Linf": effective_margin(model, x, y, norm="Linf"),
        "margin_L2": effective_margin(model, x, y, norm="L2"),
        "weight_norm": rows.detach().sqrt(),
    }
    medians = {name: v.double().median().item() for name, v in values.items()}
    medians["log_norm_product"] = product
    return {name: v if math.isfinite(v) else None for name, v in medians.items()}


def run_name(settings: dict[str, Any], seed: int) -> str:
    """Return a name made of the settings, such as "at-emr-0.03-emr_temperature-1.0-seed0"."""
    rest = [f"{k}-{v}" for k, v in settings.items() if k != "method"]
    return "-".join([settings["method"], *rest, f"seed{seed}"])


def _bits(correct: Tensor) -> str:
    """Return a character per sample, so that methods can be compared sample by sample."""
    return "".join("01"[c] for c in correct.tolist())


def write(path: Path, content: dict[str, Any]) -> None:
    """Write JSON so that a reader finds the old file or the new one, never a part."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1) + "\n")
    part.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("seeds", "epochs", "train", "autoattacked"):
        parser.add_argument(f"--{name}", type=int, help=f"{getattr(Budget, name)} by default")
    parser.add_argument("--quick", action="store_true", help="a tiny budget, to see that all runs")
    parser.add_argument("--resume", action="store_true", help="go on with what is there")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    parser.add_argument("--runs", type=Path, default=Path("runs/compare_methods"))
    given = parser.parse_args()
    harness.use_checkout()
    torch.set_num_threads(1)

    wanted = {f.name: getattr(given, f.name, None) for f in fields(Budget)}
    budget = replace(
        QUICK if given.quick else Budget(), **{k: v for k, v in wanted.items() if v is not None}
    )
    file = given.out / BUDGET
    if file.exists():
        if not given.resume:
            parser.error(f"{given.out} has results; --resume, or choose another folder")
        content = json.loads(file.read_text())
        # A later call may ask for more images for AutoAttack.
        if {**content["budget"], "autoattacked": budget.autoattacked} != asdict(budget):
            parser.error(f"the results in {given.out} are of another budget, see {file}")
    else:
        given.out.mkdir(parents=True, exist_ok=True)
        content = {"environment": harness.environment(torch.device("cpu"))}
    write(file, {**content, "budget": asdict(budget)})
    Comparison(budget, given.out, given.runs).all()


if __name__ == "__main__":
    main()
