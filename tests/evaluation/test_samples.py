"""The forms in which evaluate takes samples, and what it says of others."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from pyadv.attacks import FMN, PGD, AutoAttack
from pyadv.evaluation import evaluate

X = torch.rand(7, 1, 2, 2, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1, 1, 0, 2, 1, 0])


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(4, 3))


class Numbers(Dataset):
    """A data set with labels that are Python's, as torchvision's are."""

    def __init__(self, x: Any = X):
        self.x = x

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> tuple[Any, int]:
        return self.x[i], int(Y[i])


class Stream(IterableDataset):
    def __iter__(self):
        return iter({"pixel_values": x, "label": int(y)} for x, y in zip(X, Y, strict=True))


class OneShot(IterableDataset):
    """A data set whose only iterator is shared by all who ask for one."""

    def __init__(self) -> None:
        self.left = iter(zip(X, Y.tolist(), strict=True))

    def __iter__(self):
        return self.left


def dicts(y: Tensor = Y, **more: Tensor) -> list[dict[str, Any]]:
    return [{"pixel_values": X, "label": y, "path": ["a"] * 7, **more}]


FORMS = {
    "tensors": lambda: (X, Y),
    "int32 labels": lambda: (X, Y.int()),
    "arrays": lambda: (X.numpy(), Y.numpy().astype(np.uint8)),
    "list of labels": lambda: (X, Y.tolist()),
    "loader": lambda: (DataLoader(TensorDataset(X, Y), 3), None),
    "loader of int32": lambda: (DataLoader(TensorDataset(X, Y.int()), 3), None),
    "dicts": lambda: (dicts(), None),
    "dataset": lambda: (TensorDataset(X, Y), None),
    "dataset of numbers": lambda: (Numbers(), None),
    "stream": lambda: (Stream(), None),
    "stream that is read once": lambda: (OneShot(), None),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_forms_are_the_same_samples(net: nn.Module, form: str) -> None:
    data, y = FORMS[form]()
    attacks = {"pgd": PGD(eps=0.1, steps=2, seed=0)}
    common = {"eps": 0.1, "attacks": attacks, "progress": None, "batch_size": 3}
    report, expected = evaluate(net, data, y, **common), evaluate(net, X, Y, **common)
    assert report.to_dict() == expected.to_dict()
    assert torch.equal(report.findings.keys, expected.findings.keys)


@pytest.mark.parametrize(
    ("data", "y", "settings", "message"),
    [
        (X, Y, {"eps": [0.1, 0.2]}, "eps must be one number, .*got a list; call evaluate once"),
        (X, Y, {"eps": torch.ones(7)}, "eps must be one number, .*got a Tensor"),
        (X, Y, {"eps": "0.1"}, "eps must be one number, .*got a str$"),
        (X, Y, {"attacks": "pdg20"}, "attacks must be one of .*got 'pdg20'; did you mean 'pgd20'?"),
        (X, Y, {"norm": "Lin"}, "norm must be Linf, L2 or L1 .*did you mean 'Linf'"),
        (X, Y.float(), {}, "y must be an int64 tensor, got torch.float32"),
        (X, "labels", {}, "y must be an int64 tensor, got str"),
        (X, [[1], [1, 2]], {}, r"y must be integer labels \(N,\), got \(list, list\)"),
        (X, None, {}, r"y must be \(N,\) for N = 7 >= 1 samples of data, got None"),
        (dicts(other=Y), None, {}, "one integer tensor .*'other': int64 \\[7\\]}"),
        (dicts(y=Y.float()), None, {}, "one floating .*'label': float32 \\[7\\], 'path': list}"),
        (
            [X],
            None,
            {},
            r"data must be a tensor with y, batches .*got batches float32 \[7, 1, 2, 2\]",
        ),
        ([(X, "a")], None, {}, r"got batches \(float32 \[7, 1, 2, 2\], str\)"),
        ({"x": X, "y": Y}, None, {}, r"data must be .*got \{'x': float32 \[7, 1, 2, 2\], 'y'"),
        ("cifar10", None, {}, "data must be a tensor with y, .*got str"),
        (3, None, {}, "data must be a tensor with y, .*got int"),
        (Numbers([object()] * 7), None, {}, r"samples \(object, int\); give it a transform"),
        (Numbers([]), None, {}, "data must hold at least one sample, got none"),
    ],
)
def test_other_forms_are_refused(
    net: nn.Module, data: Any, y: Any, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        evaluate(net, data, y, **{"eps": 0.1, "progress": None, **settings})


def test_attacks_and_results_print_as_a_few_lines(net: nn.Module) -> None:
    attack = PGD(net, eps=0.1, steps=4, seed=3)
    assert str(attack).splitlines() == [
        "PGD: Linf 0.1, 4 steps of 0.0625, loss ce, keyed start",
        "model Sequential, seed 3, draw 0",
    ]
    result = attack.run(X, Y)
    left = int(result.correct.sum())
    assert str(result).splitlines() == [
        "AttackResult: 7 samples of shape (1, 2, 2), float32 on cpu",
        f"not broken: {left} ({100 * left / 7:.2f} %)",
        "passes per sample: 5.0 forward, 4.0 backward",
    ]
    assert "draw 1" in repr(attack)
    nearest = str(FMN(net, norm="L2", steps=5).run(X, Y))
    assert nearest.startswith("MinimumNormResult: 7 samples") and "median" in nearest
    assert str(attack.perturb(X, Y)).startswith("Perturbed: 7 samples")
    attacks = {"one": PGD(eps=0.1, steps=2, seed=0), "two": PGD(eps=0.1, steps=3, seed=0)}
    ensemble = AutoAttack(net, eps=0.1, version="custom", attacks=attacks, progress=None)
    assert str(ensemble).splitlines()[0] == "AutoAttack (custom), Linf 0.1"
    assert len(str(ensemble).splitlines()) == 3
    lines = str(ensemble.run(X, Y)).splitlines()
    assert lines[0].startswith("EnsembleResult: 7 samples") and "broken by one " in lines[2]
    assert len(lines) == 4
