"""Files from elsewhere do not run code: no pickle is executed, and every loader refuses one."""

from __future__ import annotations

import ast
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

import pyadv

PACKAGE = Path(pyadv.__file__).parent
FOLDERS = [PACKAGE, *(p for p in [PACKAGE.parent / "benchmarks"] if p.is_dir())]
# Calls that may run code from a file, and the keyword argument that makes them safe.
SAFE_WITH = {"torch.load": ("weights_only", True), "np.load": ("allow_pickle", False)}
UNSAFE = {
    *("pickle.load", "pickle.loads", "dill.load", "cloudpickle.load", "joblib.load"),
    *("marshal.load", "marshal.loads", "shelve.open", "yaml.load", "torch.jit.load"),
    *("torch.package.PackageImporter", "eval", "exec", "pd.read_pickle"),
}


def calls(tree: ast.AST) -> list[tuple[str, ast.Call]]:
    found = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [(ast.unparse(node.func), node) for node in found]


def unsafe_calls(text: str) -> list[str]:
    found = []
    for name, node in calls(ast.parse(text)):
        given = {keyword.arg: keyword.value for keyword in node.keywords}
        if name in SAFE_WITH:
            argument, value = SAFE_WITH[name]
            if getattr(given.get(argument), "value", None) is not value:
                found.append(f"{name} without {argument}={value} in line {node.lineno}")
        elif name in UNSAFE:
            found.append(f"{name} in line {node.lineno}")
    return found


@pytest.mark.parametrize(
    "text",
    [
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(file)",
        "pickle.loads(b'')",
        "eval('1')",
    ],
)
def test_unsafe_calls_are_recognised(text):
    assert unsafe_calls(text)


@pytest.mark.parametrize("text", ["torch.load(p, weights_only=True)", "model.eval()", "np.save(p)"])
def test_safe_calls_are_not(text):
    assert not unsafe_calls(text)


def test_no_source_file_can_execute_a_pickle():
    files = [path for folder in FOLDERS for path in folder.rglob("*.py")]
    assert len(files) > 50
    found = {path.name: unsafe_calls(path.read_text()) for path in files}
    # The fast view runs code that torch.fx has generated from the user's own model.
    assert [call.split()[0] for call in found.pop("rewrite.py")] == ["exec"]
    assert {name: lines for name, lines in found.items() if lines} == {}


def test_imported_loaders_keep_their_module_name():
    """`from torch import load` would hide a call from the test above."""
    for folder in FOLDERS:
        for path in folder.rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ImportFrom) and node.module in ("torch", "numpy", "pickle"):
                    assert not {"load", "loads"} & {alias.name for alias in node.names}, path


class Evil:
    """An object whose unpickling creates a file."""

    def __init__(self, ran: Path) -> None:
        self.ran = ran

    def __reduce__(self):
        return os.mkdir, (str(self.ran),)


@pytest.mark.parametrize("kind", ["checkpoint", "evaluation state", "attack"])
def test_states_and_checkpoints_do_not_run_code(tmp_path, kind):
    from pyadv import _state

    ran, path = tmp_path / "ran", tmp_path / "state.pt"
    torch.save({"kind": kind, "format": 1, "evil": Evil(ran)}, path, pickle_module=pickle)
    with pytest.raises(ValueError, match="cannot be read"):
        _state.load(path, kind, 1)
    assert not ran.exists()


def test_arrays_of_objects_do_not_run_code(tmp_path):
    from pyadv import data

    ran, path = tmp_path / "ran", tmp_path / "data.npz"
    x = np.array([Evil(ran)], dtype=object)
    np.savez(path, x=x, y=np.zeros(1, np.int64))
    with pytest.raises(ValueError, match="allow_pickle=False"):
        data.load(path)
    assert not ran.exists()


@pytest.mark.parametrize("module", ["os", "builtins", "numpy.core.multiarray"])
def test_pickled_batches_give_arrays_only(tmp_path, module):
    from pyadv.data import load

    names = {"os": "system", "builtins": "eval", "numpy.core.multiarray": "fromfile"}
    evil = f"c{module}\n{names[module]}\n(S'touch {tmp_path / 'ran'}'\ntR.".encode()
    for i in range(1, 6):
        (tmp_path / f"data_batch_{i}").write_bytes(evil)
    for name in ("test_batch", "batches.meta"):
        (tmp_path / name).write_bytes(evil)
    with pytest.raises(ValueError, match="is not part of a CIFAR batch") as error:
        load(tmp_path)
    assert isinstance(error.value.__cause__, pickle.UnpicklingError)
    assert not (tmp_path / "ran").exists()
