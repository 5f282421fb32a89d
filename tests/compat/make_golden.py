"""Runs the authors' own files and writes what they compute to golden.json; the test runs the same
cases on `pyadv.compat`.

    python tests/compat/make_golden.py FOLDER

The files are not part of this repository, for their licences: get them where `SOURCES` says and put
each at FOLDER/<name>/<file>. They run as they are, except that `.cuda()` stays on the CPU.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import sys
import textwrap
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

GOLDEN = Path(__file__).with_name("golden.json")
SOURCES = {  # folder/file: repository and commit
    "TRADES/trades.py": "yaodongyu/TRADES 9d308f1cd6079b2b437587dd779788030b193440",
    "MART/mart.py": "YisenWang/MART 2514b7e1b0372f9442eda28ce7157a57b0428015",
    "MAIL/mail_loss.py": "QizhouWang/MAIL 23a8951c5db4e97eecb2b0793067cf1525fc91be",
    "GAIRAT/GAIR.py": "zjfheart/Geometry-aware-Instance-reweighted-Adversarial-Training "
    "2f3cfab9012ec2ce6060ffc66c3662c662ea6a20",
    "GAIRAT/attack_generator.py": "zjfheart/Geometry-aware-Instance-reweighted-Adversarial-Training"
    " b62caa90cf54a02b2d694c93ecb7e7480f09ae59",
    "GAIRAT/earlystop.py": "zjfheart/Geometry-aware-Instance-reweighted-Adversarial-Training "
    "b62caa90cf54a02b2d694c93ecb7e7480f09ae59",
    "FAT/earlystop.py": "zjfheart/Friendly-Adversarial-Training "
    "6e461e00a3a84e893989b9e6c8b8bf680fba8d09",
    "EMR/main-AT-EMR.py": "ziquanliu/Effective_Margin_Reg e4c91b426705d208ba1f286b6394c7fe7ce6490a",
}
ALPHA, EPS, STEPS = 0.005, 0.02, 5
Case = Callable[[SimpleNamespace], dict[str, Any]]  # of the functions, the authors' or ours


def make_net(dtype: torch.dtype = torch.float64) -> nn.Module:
    """3x32x32 and ten classes, because the authors' code knows no others."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3, stride=2, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 10),
    ).to(dtype)
    with torch.no_grad():
        net[-1].weight *= 3  # of a network that is sure of something
        for _ in range(5):
            net(make_batch(net)[0])  # statistics
    return net


def make_batch(net: nn.Module) -> tuple[Tensor, Tensor]:
    """Of 24 samples, every fourth with a label that is not the network's."""
    generator = torch.Generator().manual_seed(1)
    coarse = torch.rand(24, 3, 4, 4, generator=generator)
    x = F.interpolate(coarse, scale_factor=8, mode="bilinear").to(next(net.parameters()).dtype)
    was = net.training
    with torch.no_grad():
        y = net.eval()(x).argmax(1)
    net.train(was)
    y[::4] = (y[::4] + 1) % 10
    return x, y


def print_of(t: Tensor) -> list[float]:
    """Two numbers that two different tensors do not share: the length, and the dot product with a
    vector without symmetries."""
    t = t.detach().double().flatten()
    return [t.norm().item(), (t * torch.cos(torch.arange(len(t)).double() ** 1.5)).sum().item()]


def prints_of(rows: Tensor) -> list[list[float]]:
    return [print_of(row) for row in rows]


def of_loss(call: Callable[..., Tensor], dtype: torch.dtype = torch.float64) -> Case:
    """Value, gradients and running statistics of `call(functions, net, x, y, optimizer)`."""

    def case(functions: SimpleNamespace) -> dict[str, Any]:
        net = make_net(dtype)
        x, y = make_batch(net)
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        _seed()
        loss = call(functions, net, x, y, optimizer)
        parameters = dict(net.named_parameters())
        gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        return {
            "loss": loss.item(),
            "gradients": {
                name: print_of(torch.zeros(1) if g is None else g)
                for name, g in zip(parameters, gradients, strict=True)
            },
            "buffers": {name: print_of(b) for name, b in net.named_buffers()},
            **_generators(),
        }

    return case


def of_attack(call: Callable[..., tuple[Any, ...]], names: tuple[str, ...]) -> Case:
    """What `call(functions, net, x, y)` returns, under these names."""

    def case(functions: SimpleNamespace) -> dict[str, Any]:
        net = make_net()
        x, y = make_batch(net)
        _seed()
        values = dict(zip(names, call(functions, net, x, y), strict=True))
        for name, value in values.items():
            if isinstance(value, Tensor):
                values[name] = prints_of(value) if value.dim() > 1 else value.tolist()
        return {**values, **_generators()}

    return case


def _seed() -> None:
    torch.manual_seed(3)
    np.random.seed(3)


def _generators() -> dict[str, float]:
    """Where they are, by what they give next."""
    return {"torch": torch.rand(1).item(), "numpy": float(np.random.rand())}


def cases() -> dict[str, Case]:
    found: dict[str, Case] = {}
    for distance in ("l_inf", "l_2", "none"):
        found[f"trades {distance}"] = of_loss(
            lambda f, n, x, y, o, d=distance: f.trades_loss(
                n, x, y, o, ALPHA, 5 * EPS if d == "l_2" else EPS, STEPS, 6.0, d
            )
        )
    found["mart"] = of_loss(lambda f, n, x, y, o: f.mart_loss(n, x, y, o, ALPHA, EPS, STEPS, 5.0))
    for method in ("at", "trades", "mart"):
        found[f"mail {method}"] = of_loss(
            lambda f, n, x, y, o, m=method: f.mail_loss(
                n, x, y, o, -0.07, 5.0, ALPHA, EPS, STEPS, 5.0, method=m
            )
        )
    # In float32, without steps: the loss of given examples.
    single = {
        "trades": lambda f, n, x, y, o: f.trades_loss(n, x, y, o, ALPHA, EPS, 0, 6.0),
        "mart": lambda f, n, x, y, o: f.mart_loss(n, x, y, o, ALPHA, EPS, 0, 5.0),
        "mail": lambda f, n, x, y, o: f.mail_loss(n, x, y, o, -0.07, 5.0, ALPHA, EPS, 0, 5.0),
    }
    found |= {f"float32 {name}": of_loss(call, torch.float32) for name, call in single.items()}
    for temperature in (0.1, 1.0, 40.0):
        found[f"emr {temperature}"] = of_loss(
            lambda f, n, x, y, o, t=temperature: f.emr_penalty(n, x, t)
        )
    for func, steps in itertools.product(("Tanh", "Sigmoid", "Discrete"), (7, 10)):
        found[f"GAIR {func} {steps}"] = of_attack(
            lambda f, n, x, y, a=func, k=steps: (f.GAIR(k, torch.arange(k + 1.0), -1.0, a),),
            ("weights",),
        )
    attacks = [("cent", "Madry"), ("cw", "Madry"), ("cent", "trades"), ("kl", "trades")]
    for loss, category in attacks:
        # The authors' "kl" goes backward through the clean pass at every step: it needs parameters
        # without gradient, or raises at the second.
        found[f"GA_PGD {loss} {category}"] = of_attack(
            lambda f, n, x, y, a=loss, c=category: f.GA_PGD(
                n.requires_grad_(a != "kl"), x, y, EPS, ALPHA, STEPS, a, c, True
            ),
            ("x_adv", "kappa"),
        )
    returned = ("x_adv", "target", "natural", "count")
    for tau, (loss, start), omega in itertools.product(
        (0, 2),
        (("cent", "uniform_randominit"), ("kl", "normal_distribution_randominit")),
        (0, 0.01),
    ):
        found[f"earlystop {loss} tau {tau} omega {omega}"] = of_attack(
            lambda f, n, x, y, t=tau, a=loss, s=start, w=omega: f.earlystop(
                n, x, y, ALPHA, EPS, STEPS, t, s, a, True, w
            ),
            returned,
        )
    # Up to the first release: from there on the authors' code judges by other samples' labels.
    for kind in ("fat", "fat_for_trades"):
        found[f"GA_earlystop {kind}"] = of_attack(
            lambda f, n, x, y, k=kind: f.GA_earlystop(
                n, x, y, ALPHA, EPS, STEPS, STEPS, k, True, 0.01
            ),
            (*returned, "kappa"),
        )
    found["PM"] = of_attack(lambda f, n, x, y: (f.PM(n(x), y),), ("margin",))
    return found


def official(folder: Path) -> SimpleNamespace:
    """The authors' functions, run from their files."""
    models = types.ModuleType("models")  # from which they import torch under these names
    models.torch, models.nn, models.F = torch, nn, F
    found: dict[str, Any] = {}
    with mock.patch.dict(sys.modules, {"models": models}):
        for name in SOURCES:
            if not name.startswith("EMR"):
                module: dict[str, Any] = {}
                exec(compile((folder / name).read_text(), name, "exec"), module)
                found |= {k: v for k, v in module.items() if isinstance(v, types.FunctionType)}
    return SimpleNamespace(**found, emr_penalty=_official_emr(folder / "EMR/main-AT-EMR.py"))


def _official_emr(script: Path) -> Callable[[nn.Module, Tensor, float], Tensor]:
    """The lines of its training loop that make the penalty."""
    lines = script.read_text().splitlines()
    first = next(i for i, s in enumerate(lines) if "output_eval = model(" in s)
    last = next(i for i, s in enumerate(lines) if "logit_grad_l2_norm = " in s)
    code = textwrap.dedent("\n".join(s for s in lines[first : last + 1] if s.strip()))

    def emr_penalty(net: nn.Module, x_adv: Tensor, temperature: float) -> Tensor:
        def model(x: Tensor, _eval: bool) -> Tensor:  # whose forward sets the mode
            net.train(not _eval)
            logits = net(x)
            net.train()
            return logits

        names = {"model": model, "torch": torch, "F": F, "adv_data": x_adv.requires_grad_()}
        names["args"] = SimpleNamespace(EMR_softmax_temp=temperature)
        exec(code, names)
        return names["logit_grad_l2_norm"]

    return emr_penalty


@contextlib.contextmanager
def _on_the_cpu() -> Iterator[None]:
    with (
        mock.patch.object(Tensor, "cuda", lambda self: self),
        mock.patch.object(nn.Module, "cuda", lambda self: self),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield


def main() -> None:
    torch.set_num_threads(1)
    functions = official(Path(sys.argv[1]))
    with _on_the_cpu():
        numbers = {name: case(functions) for name, case in cases().items()}
    head = {"torch": torch.__version__, "sources": SOURCES}
    rows = ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in numbers.items())
    GOLDEN.write_text(f'{{"made by": {json.dumps(head, indent=1)},\n"cases": {{\n{rows}\n}}}}\n')


if __name__ == "__main__":
    main()
