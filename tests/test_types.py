"""A user's code under a type checker: right code passes with all strict flags, and a misspelt name
is refused. `.ci/run` checks the package itself."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import pyadv

pytest.importorskip("mypy")

RIGHT = """\
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import pyadv
from pyadv.attacks import APGD, PGD, AutoAttack
from pyadv.evaluation import evaluate
from pyadv.objectives import TRADES

x, y = torch.rand(64, 1, 28, 28), torch.randint(10, (64,))
model: nn.Module = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
objective = TRADES(PGD(eps=0.1, steps=7, loss="kl", bn="eval", speed="fast"), beta=6.0)
for images, labels in DataLoader(TensorDataset(x, y), batch_size=32):
    optimizer.zero_grad()
    loss: Tensor = objective(model, images, labels)
    loss.backward()
    optimizer.step()

attack = PGD(model, norm=2, eps=0.5, start="uniform", best="fooled", compact=True, graph="auto")
x_adv: Tensor = attack(x, y)
result = APGD(model, norm="L1", eps=12.0, loss=lambda z, y: -z[:, 0], start="none").run(x, y)
accuracy: float = result.robust_accuracy
found: Tensor = AutoAttack(model, eps=0.1, version="rand").run(x_adv, y).x_adv
report = pyadv.evaluate(model, x, y, eps=0.1, norm="Linf", attacks="autoattack")
print(result, accuracy, found.shape, report, report.worst, evaluate(model, x, y, eps=0.1))
"""

WRONG = """\
from pyadv.attacks import APGD, FMN, PGD, PGD0, AutoAttack, DeepFool, Square

PGD(norm="Linfty")
PGD(loss="cross-entropy")
PGD(start="keyd")
PGD(best="fool")
PGD(bn="batch")
PGD(speed="quick")
PGD(grad_mode="autogrd")
PGD(scale="units")
PGD(compact="always")
APGD(start="uniform")
APGD(best="last")
PGD0(start="uniform")
FMN(norm="L3")
FMN(classes="next")
DeepFool(norm="L1")
Square(draws="authors")
AutoAttack(print, version="fast")
"""


@pytest.fixture(scope="module")
def errors(tmp_path_factory) -> dict[str, set[int]]:
    """Return the lines with errors, by script."""
    folder = tmp_path_factory.mktemp("types")
    scripts = {"right.py": RIGHT, "wrong.py": WRONG}
    for name, text in scripts.items():
        (folder / name).write_text(text)
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", "--no-pretty"]
    # Errors inside an installed package are silent; here the package is in MYPYPATH. Torch leaves
    # Tensor.backward without annotations.
    command += ["--follow-imports=silent", "--untyped-calls-exclude=torch", *scripts]
    run = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "MYPYPATH": str(Path(pyadv.__file__).parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode in (0, 1), run.stdout + run.stderr
    print(run.stdout)  # pytest shows it if a test fails
    found: dict[str, set[int]] = {name: set() for name in scripts}
    for line in run.stdout.splitlines():
        file, _, rest = line.partition(":")
        number, _, message = rest.partition(": ")
        if message.startswith("error"):
            found[file].add(int(number))
    return found


@pytest.mark.slow
def test_a_users_script_passes_with_the_strict_flags(errors):
    assert not errors["right.py"]


@pytest.mark.slow
def test_a_misspelt_name_is_refused_in_every_menu(errors):
    calls = [n for n, line in enumerate(WRONG.splitlines(), 1) if line.endswith(")")]
    assert errors["wrong.py"] == set(calls)
