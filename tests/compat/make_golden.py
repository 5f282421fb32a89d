"""Runs the authors' own files and writes their results to golden.json; the test runs the same cases
on `pyadv.compat`.

    python tests/compat/make_golden.py FOLDER

The files are not part of this repository, for their licences: get them where `SOURCES` says and put
each at FOLDER/<name>/<file>. They run unchanged, except that `.cuda()` stays on the CPU.

There are two kinds of cases. Those named after a function call it once. Those named "script ..." go
through the sequence of calls of a whole training script, with the names and arguments that it uses,
for a few optimiser steps; the parts of a script that pyadv does not replace are written out here.
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
from torch.utils.data import DataLoader, TensorDataset

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
    "GAIRAT/GAIR_RST/losses.py": "zjfheart/Geometry-aware-Instance-reweighted-Adversarial-Training "
    "16813b5b08449ed60af8835c8f1e3b1960ce2ff3",
    "FAT/earlystop.py": "zjfheart/Friendly-Adversarial-Training "
    "6e461e00a3a84e893989b9e6c8b8bf680fba8d09",
    "EMR/main-AT-EMR.py": "ziquanliu/Effective_Margin_Reg e4c91b426705d208ba1f286b6394c7fe7ce6490a",
}
ALPHA, EPS, STEPS = 0.005, 0.02, 5
Case = Callable[[SimpleNamespace], dict[str, Any]]  # takes the authors' functions or ours


def make_net(dtype: torch.dtype = torch.float64) -> nn.Module:
    """Return a network for 3x32x32 images and ten classes; the authors' code assumes both."""
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
        net[-1].weight *= 3  # makes the predictions confident
        for _ in range(5):
            net(make_batch(net)[0])  # moves the running statistics
    return net


def make_batch(net: nn.Module) -> tuple[Tensor, Tensor]:
    """Return 24 samples; every fourth label differs from the network's prediction."""
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
    """Return two numbers that identify a tensor: its norm, and its dot product with a vector that
    has no symmetries."""
    t = t.detach().double().flatten()
    return [t.norm().item(), (t * torch.cos(torch.arange(len(t)).double() ** 1.5)).sum().item()]


def prints_of(rows: Tensor) -> list[list[float]]:
    return [print_of(row) for row in rows]


def of_loss(call: Callable[..., Tensor], dtype: torch.dtype = torch.float64) -> Case:
    """Return a case: value, gradients and running statistics of
    `call(functions, net, x, y, optimizer)`."""

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
    """Return a case: the results of `call(functions, net, x, y)`, under these names."""

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


class SelfModed(nn.Module):
    """A network that sets its own mode in `forward`, as the networks of EMR's code do."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, _eval: bool = False) -> Tensor:
        self.train(not _eval)
        features = self.net[:-1](x)
        self.train()
        return self.net[-1](features)


Script = Callable[[SimpleNamespace, nn.Module, DataLoader, torch.optim.Optimizer], list[Any]]


def of_script(script: Script, self_moded: bool = False) -> Case:
    """Return a case: the results of a script's optimiser steps, and the network at the end."""

    def case(functions: SimpleNamespace) -> dict[str, Any]:
        net = make_net()
        x, y = make_batch(net)
        model = SelfModed(net) if self_moded else net
        loader = DataLoader(TensorDataset(x, y), batch_size=12)
        optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9, weight_decay=2e-4)
        _seed()
        returned = script(functions, model, loader, optimizer)
        return {
            "returned": returned,
            "weights": {name: print_of(p) for name, p in net.named_parameters()},
            "buffers": {name: print_of(b) for name, b in net.named_buffers()},
            **_generators(),
        }

    return case


def _steps(loader: DataLoader, optimizer: torch.optim.Optimizer, loss_of: Callable) -> list[float]:
    """Make three epochs of optimiser steps on `loss_of(epoch, data, target)`; return the losses."""
    losses = []
    for epoch in (1, 2, 3):
        for data, target in loader:
            optimizer.zero_grad()
            loss = loss_of(epoch, data, target)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses


def train_trades_script(f, model, loader, optimizer):
    """Follow TRADES' train_trades_cifar10.py."""

    def loss_of(epoch, data, target):
        return f.trades_loss(
            model=model, x_natural=data, y=target, optimizer=optimizer, step_size=ALPHA,
            epsilon=EPS, perturb_steps=STEPS, beta=6.0,
        )  # fmt: skip

    model.train()
    return _steps(loader, optimizer, loss_of)


def train_resnet_script(f, model, loader, optimizer):
    """Follow MART's train_resnet.py."""

    def loss_of(epoch, data, target):
        return f.mart_loss(
            model=model, x_natural=data, y=target, optimizer=optimizer, step_size=ALPHA,
            epsilon=EPS, perturb_steps=STEPS, beta=5.0,
        )  # fmt: skip

    model.train()
    return _steps(loader, optimizer, loss_of)


def mail_train_script(method):
    """Follow MAIL's train.py after its epochs without weights, which use `at_loss.py`."""

    def script(f, model, loader, optimizer):
        def loss_of(epoch, data, target):
            return f.mail_loss(
                model=model, x_natural=data, y=target, optimizer=optimizer, bias=-0.07, slope=5.0,
                step_size=ALPHA, epsilon=EPS, perturb_steps=STEPS, beta=5.0, method=method,
            )  # fmt: skip

        model.train()
        return _steps(loader, optimizer, loss_of)

    return script


def gairat_script(f, model, loader, optimizer):
    """Follow GAIRAT.py with weights from epoch 2 on, and its evaluation at the end."""

    def loss_of(epoch, data, target):
        x_adv, kappa = f.GA_PGD(
            model, data, target, EPS, ALPHA, STEPS, loss_fn="cent", category="Madry", rand_init=True
        )
        return _geometry_loss(f, model, optimizer, epoch, x_adv, target, target, kappa, -1.0)

    losses = _steps(loader, optimizer, loss_of)
    return [*losses, *_gairat_evaluation(f, model, loader)]


def gair_fat_script(f, model, loader, optimizer):
    """Follow GAIR_FAT.py with a tau so large that no sample is released. After the first release
    the authors' `GA_earlystop` compares samples with the labels of others."""

    def loss_of(epoch, data, target):
        x_adv, released, _, count, kappa = f.GA_earlystop(
            model, data, target, step_size=ALPHA, epsilon=EPS, perturb_steps=STEPS, tau=STEPS,
            type="fat", random=True, omega=0.001,
        )  # fmt: skip
        assert count == STEPS * len(data)
        return _geometry_loss(f, model, optimizer, epoch, x_adv, target, released, kappa, 0.0)

    losses = _steps(loader, optimizer, loss_of)
    return [*losses, *_gairat_evaluation(f, model, loader)]


def _geometry_loss(f, model, optimizer, epoch, x_adv, target, released, kappa, lam):
    model.train()
    optimizer.zero_grad()
    logit = model(x_adv)
    if epoch < 2:
        return F.cross_entropy(logit, released)
    loss = F.cross_entropy(logit, target, reduction="none")
    return loss.mul(f.GAIR(STEPS, kappa, lam, "Tanh")).mean()


def _gairat_evaluation(f, model, loader):
    clean = f.eval_clean(model, loader)
    robust = f.eval_robust(
        model, loader, perturb_steps=7, epsilon=EPS, step_size=EPS / 4, loss_fn="cent",
        category="Madry", random=True,
    )  # fmt: skip
    assert not model.training
    return [*clean, *robust]


def gair_rst_script(f, model, loader, optimizer):
    """Follow robust_self_training_GAIR.py; its lambda is 100 before the second epoch."""

    def loss_of(epoch, data, target):
        loss, *_ = f.GAIR_trades_loss(
            model=model, x_natural=data, y=target, optimizer=optimizer, step_size=ALPHA,
            epsilon=EPS, perturb_steps=STEPS, beta=6.0, distance="l_inf", adversarial=True,
            entropy_weight=0.0, Lambda=100.0 if epoch < 2 else 0.5,
        )  # fmt: skip
        return loss

    model.train()
    return _steps(loader, optimizer, loss_of)


def fat_script(start, loss_fn, script_loss):
    """Follow FAT.py, FAT_for_TRADES.py or FAT_for_MART.py; tau grows by one each epoch."""

    def script(f, model, loader, optimizer):
        counts = []

        def loss_of(epoch, data, target):
            x_adv, y, natural, count = f.earlystop(
                model, data, target, step_size=ALPHA, epsilon=EPS, perturb_steps=STEPS,
                tau=epoch - 1, randominit_type=start, loss_fn=loss_fn, rand_init=True, omega=0.001,
            )  # fmt: skip
            counts.append(count)
            model.train()
            optimizer.zero_grad()
            return script_loss(model, x_adv, natural, y)

        return [*_steps(loader, optimizer, loss_of), *counts]

    return script


def _at_term(model, x_adv, natural, y):
    return F.cross_entropy(model(x_adv), y)


def _trades_term(model, x_adv, natural, y):
    z = model(natural)
    kl = F.kl_div(model(x_adv).log_softmax(1), z.softmax(1), reduction="batchmean")
    return F.cross_entropy(z, y) + 6.0 * kl


def _mart_term(model, x_adv, natural, y):
    z_adv, z = model(x_adv), model(natural)
    p, q = z_adv.softmax(1), z.softmax(1)
    rival = p.scatter(1, y[:, None], 0.0).amax(1)
    boosted = F.cross_entropy(z_adv, y) - (1.0001 - rival + 1e-12).log().mean()
    kl = (q * (q.log() - (p + 1e-12).log())).sum(1)
    return boosted + 6.0 * (kl * (1.0000001 - q.gather(1, y[:, None])[:, 0])).mean()


def emr_script(trades):
    """Follow main-AT-EMR.py or main-TRADES-EMR.py. Their attack runs in train mode, the default of
    their networks, and moves the running statistics; the penalty runs in eval mode."""

    def script(f, model, loader, optimizer):
        def loss_of(epoch, data, target):
            x_adv = (data + torch.empty(data.shape).uniform_(-EPS, EPS)).clamp(0, 1)
            model.eval()
            for _ in range(STEPS):
                x_adv.requires_grad_()
                loss = F.cross_entropy(model(x_adv), target)
                (grad,) = torch.autograd.grad(loss, x_adv)
                moved = x_adv.detach() + ALPHA * grad.sign()
                x_adv = torch.max(torch.min(moved, data + EPS), data - EPS).clamp(0, 1)
            model.train()
            if trades:
                loss = F.cross_entropy(model(data, _eval=False), target)
                kl = F.kl_div(
                    model(x_adv).log_softmax(1), model(data).softmax(1), reduction="batchmean"
                )
                loss = loss + 6.0 * kl
            else:
                loss = F.cross_entropy(model(x_adv, _eval=False), target)
            optimizer.zero_grad()
            return loss + 3.0 * f.emr_penalty(model, x_adv, 0.1)

        return _steps(loader, optimizer, loss_of)

    return script


def _seed() -> None:
    torch.manual_seed(3)
    np.random.seed(3)


def _generators() -> dict[str, float]:
    """Return the next number of each generator, which identifies its state."""
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
    # Float32 without attack steps: the loss of given examples.
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
        # The authors' "kl" goes backward through the clean pass at every step, which raises at the
        # second one unless the parameters need no gradient.
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
    # Without a release: after one, the authors' code judges by other samples' labels.
    for kind in ("fat", "fat_for_trades"):
        found[f"GA_earlystop {kind}"] = of_attack(
            lambda f, n, x, y, k=kind: f.GA_earlystop(
                n, x, y, ALPHA, EPS, STEPS, STEPS, k, True, 0.01
            ),
            (*returned, "kappa"),
        )
    found["PM"] = of_attack(lambda f, n, x, y: (f.PM(n(x), y),), ("margin",))
    found["GAIR_trades_loss"] = of_loss(
        lambda f, n, x, y, o: f.GAIR_trades_loss(
            n, x, y, o, ALPHA, EPS, STEPS, 6.0, True, "l_inf", 0.0, 0.5
        )[0]
    )
    return found | scripts()


def scripts() -> dict[str, Case]:
    found = {
        "TRADES train_trades_cifar10.py": of_script(train_trades_script),
        "MART train_resnet.py": of_script(train_resnet_script),
        "GAIRAT GAIRAT.py": of_script(gairat_script),
        "GAIRAT GAIR_FAT.py": of_script(gair_fat_script),
        "GAIRAT robust_self_training_GAIR.py": of_script(gair_rst_script),
        "EMR main-AT-EMR.py": of_script(emr_script(False), self_moded=True),
        "EMR main-TRADES-EMR.py": of_script(emr_script(True), self_moded=True),
    }
    for method in ("at_mail", "trades_mail", "mart_mail"):
        found[f"MAIL train.py {method}"] = of_script(mail_train_script(method))
    fat = {
        "FAT.py": ("uniform_randominit", "cent", _at_term),
        "FAT_for_TRADES.py": ("normal_distribution_randominit", "kl", _trades_term),
        "FAT_for_MART.py": ("normal_distribution_randominit", "cent", _mart_term),
    }
    found |= {f"FAT {name}": of_script(fat_script(*parts)) for name, parts in fat.items()}
    return {f"script {name}": case for name, case in found.items()}


def official(folder: Path) -> SimpleNamespace:
    """Return the authors' functions, from their files."""
    models = types.ModuleType("models")  # the authors import torch from there, under these names
    models.torch, models.nn, models.F = torch, nn, F
    found: dict[str, Any] = {}
    with mock.patch.dict(sys.modules, {"models": models}):
        for name in SOURCES:
            if not name.startswith("EMR"):
                module: dict[str, Any] = {}
                exec(compile((folder / name).read_text(), name, "exec"), module)
                own = {k: v for k, v in module.items() if isinstance(v, types.FunctionType)}
                found = own | found  # GAIR_RST/losses.py has copies of others
    return SimpleNamespace(**found, emr_penalty=_official_emr(folder / "EMR/main-AT-EMR.py"))


def _official_emr(script: Path) -> Callable[[nn.Module, Tensor, float], Tensor]:
    """Return the lines of its training loop that compute the penalty, as a function."""
    lines = script.read_text().splitlines()
    first = next(i for i, s in enumerate(lines) if "output_eval = model(" in s)
    last = next(i for i, s in enumerate(lines) if "logit_grad_l2_norm = " in s)
    code = textwrap.dedent("\n".join(s for s in lines[first : last + 1] if s.strip()))

    def emr_penalty(net: nn.Module, x_adv: Tensor, temperature: float) -> Tensor:
        def model(x: Tensor, _eval: bool) -> Tensor:  # its forward sets the mode
            net.train(not _eval)
            logits = net(x)
            net.train()
            return logits

        forward = net if isinstance(net, SelfModed) else model
        names = {"model": forward, "torch": torch, "F": F}
        names["adv_data"] = x_adv.requires_grad_()
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
