"""RobustBench's benchmark and zoo on pyadv, with a stand-in that has the form of RobustBench."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from objective_parts import make_batch, make_net

from pyadv.attacks.progress import Lines
from pyadv.integrations import robustbench

EVAL = '''
import torch
from autoattack import AutoAttack
from autoattack.state import EvaluationState
from robustbench.utils import clean_accuracy

DATA = {}


def benchmark(model, eps, device=None, batch_size=32, log_path=None, aa_state_path=None):
    """What RobustBench's function of this name does with AutoAttack."""
    x, y = DATA["x"], DATA["y"]
    accuracy = clean_accuracy(model, x, y)
    adversary = AutoAttack(
        model,
        norm="Linf",
        eps=eps,
        version="standard",
        device=device or torch.device("cpu"),
        log_path=log_path,
    )
    x_adv = adversary.run_standard_evaluation(x, y, bs=batch_size, state_path=aa_state_path)
    if aa_state_path is None:
        return accuracy, clean_accuracy(model, x_adv, y)
    state = EvaluationState.from_disk(aa_state_path)
    assert state.robust_flags is not None
    return accuracy, state.robust_flags.mean().item()
'''
UTILS = """
import torch
from pathlib import Path
from pyadv.models import SmallCNN

MODELS = {"cifar10": {"Linf": {"Small": SmallCNN}}, "cifar100": {"L2": {"Small": SmallCNN}}}


def clean_accuracy(model, x, y):
    with torch.no_grad():
        return (model(x).argmax(1) == y).float().mean().item()


def load_model(model_name, model_dir="./models", dataset="cifar10", threat_model="Linf"):
    model = MODELS[dataset][threat_model][model_name]()
    path = Path(model_dir) / dataset / threat_model / f"{model_name}.pt"
    model.load_state_dict(torch.load(path))
    return model
"""


def forget():
    for name in [m for m in sys.modules if m.split(".")[0] in ("robustbench", "autoattack")]:
        del sys.modules[name]


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A package robustbench that can be imported, in a folder that is the current one."""
    package = tmp_path / "site" / "robustbench"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("from .eval import benchmark\n")
    (package / "eval.py").write_text(EVAL)
    (package / "utils.py").write_text(UTILS)
    monkeypatch.syspath_prepend(package.parent)
    monkeypatch.chdir(tmp_path)
    forget()
    yield tmp_path
    forget()


@pytest.fixture
def trained():
    net, (x, y) = make_net(), make_batch(20)
    optimiser = torch.optim.Adam(net.parameters(), 0.05)
    for _ in range(15):
        optimiser.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimiser.step()
    return net.eval(), x, y


def test_the_documented_line(stand_in, trained):
    robustbench.install()
    from robustbench import benchmark

    net, x, y = trained
    importlib.import_module("robustbench.eval").DATA.update(x=x, y=y)
    clean, robust = benchmark(net, eps=0.4, log_path=stand_in / "log.txt")
    assert clean == 1.0 and robust < 0.5
    state = stand_in / "state.json"
    assert benchmark(net, eps=0.4, aa_state_path=state) == (clean, pytest.approx(robust))
    more = {"aa_state_path": state, "log_path": stand_in / "nothing.txt"}
    assert benchmark(net, eps=0.4, **more) == (clean, pytest.approx(robust))
    assert not (stand_in / "nothing.txt").exists()  # nothing was attacked again
    log = (stand_in / "log.txt").read_text()
    assert "clean" in log and "(100.00 %)" in log and f"({100 * robust:.2f} %)" in log
    assert log.count(" s\n") == len(log.splitlines())


def test_a_robustbench_that_is_imported_already(stand_in, trained):
    robustbench.install()
    imported = importlib.import_module("robustbench.eval")
    imported.AutoAttack = imported.EvaluationState = None
    robustbench.install()
    assert imported.AutoAttack is robustbench.AutoAttack
    assert imported.EvaluationState is robustbench.EvaluationState


def test_states(tmp_path, trained):
    net, x, y = trained
    path = tmp_path / "state.json"
    attack = robustbench.AutoAttack(net, eps=0.4, verbose=False)
    assert attack.seed == 0
    x_adv, predicted = attack.run_standard_evaluation(x, y, return_labels=True, state_path=path)
    found = robustbench.EvaluationState.from_disk(str(path))
    assert torch.equal(found.robust_flags.bool(), predicted == y)
    assert torch.equal(found.robust_flags.bool(), net(x_adv).argmax(1) == y)
    assert found.robust_accuracy == pytest.approx((predicted == y).float().mean().item())
    assert found.run_attacks == found.attacks_to_run == {"apgd-ce", "apgd-t", "fab-t", "square"}
    assert found.clean_accuracy == 1.0
    again = attack.run_standard_evaluation(x, y, state_path=path)
    assert torch.equal(again, x_adv)  # the examples found before are returned too


def test_a_state_of_the_authors(tmp_path, trained):
    net, x, y = trained
    content = {"_attacks_to_run": "{'square', 'apgd-ce'}", "path": "there", "_SAVE_TIMEOUT": 60}
    content |= {"_run_attacks": ["apgd-ce"], "_robust_flags": [True, False, True, True]}
    content |= {"_last_saved": "2024-01-01 00:00:00", "_clean_accuracy": 0.75}
    path = tmp_path / "state.json"
    path.write_text(json.dumps(content))
    found = robustbench.EvaluationState.from_disk(path)
    assert found.attacks_to_run == {"square", "apgd-ce"} and found.robust_accuracy == 0.75
    with pytest.raises(ValueError, match="written by the authors' AutoAttack"):
        robustbench.AutoAttack(net, eps=0.1).run_standard_evaluation(x, y, state_path=path)


def save(folder: Path, dataset: str, threat: str):
    from pyadv.models import SmallCNN

    torch.manual_seed(5)
    model = SmallCNN()
    path = folder / "models" / dataset / threat / "Small.pt"
    path.parent.mkdir(parents=True)
    torch.save(model.state_dict(), path)
    return model.eval()


def test_models_of_the_zoo(stand_in):
    x = torch.rand(2, 1, 28, 28)
    for name, place in (("Small", ("cifar10", "Linf")), ("cifar100/L2/Small", ("cifar100", "L2"))):
        expected = save(stand_in, *place)
        loaded = robustbench.load_model(name)
        assert not loaded.training and torch.equal(loaded(x), expected(x))
    with pytest.raises(ValueError, match="has no model Large for cifar10 and Linf"):
        robustbench.load_model("Large")
    with pytest.raises(ValueError, match="dataset must be one of"):
        robustbench.load_model("mnist/Small")
    with pytest.raises(ValueError, match=r"\[DATASET/\[THREAT/\]\]MODEL"):
        robustbench.load_model("a/b/c/d")


def test_the_command_line(stand_in):
    testing = pytest.importorskip("typer.testing")
    from pyadv.cli import app

    save(stand_in, "cifar10", "Linf")
    given = "evaluate robustbench:Small --data fashion-mini --eps 0.1 --n 20 --out report"
    result = testing.CliRunner().invoke(app, given.split())
    assert result.exit_code == 0, result.output
    assert "20 samples, Linf, eps 0.1" in result.output and "PGD-20" in result.output
    result = testing.CliRunner().invoke(app, given.replace("Small", "Large").split())
    assert result.exit_code == 1 and "has no model Large" in result.output


def test_without_robustbench(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="robustbench is not installed; pip install"):
        robustbench.load_model("Small")


def test_progress_lines(capsys):
    lines = Lines(samples=8)
    lines("clean", 8, 8, 6)
    lines("apgd-ce", 6, 6, 1)
    first, second = capsys.readouterr().err.splitlines()
    assert "6 (75.00 %)" in first and "1 (12.50 %)" in second and second.endswith(" s")
    Lines()("clean", 8, 8, 6)
    assert "%" not in capsys.readouterr().err
