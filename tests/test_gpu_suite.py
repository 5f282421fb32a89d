"""Tests of the suite for a card, on the CPU at tiny sizes."""

from __future__ import annotations

import importlib
import io
import json
import lzma
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
pytestmark = pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="not a checkout")
pytest.importorskip("accelerate")


@pytest.fixture
def suite(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("gpu_suite")


def run(out: Path, *more: str) -> str:
    command = [sys.executable, BENCHMARKS / "gpu_suite.py", "--dry", "--out", out / "results"]
    done = subprocess.run(
        [*map(str, command), "--runs", str(out / "runs"), *more],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    log = out / "results" / "log.txt"
    assert done.returncode == 0, (
        done.stdout + done.stderr + (log.read_text() if log.exists() else "")
    )
    return done.stdout


def test_stages_leave_results_and_are_not_done_twice(tmp_path):
    assert run(tmp_path, "--only", "kernels", "at").count("done,") == 2
    out = tmp_path / "results"
    status = json.loads((out / "status.json").read_text())
    assert {k: v["state"] for k, v in status.items()} == {"kernels": "done", "at": "done"}
    text = (out / "summary.md").read_text()
    for words in ("A dry run", "attack_loss kl, 3x7", "bandwidth (time of copy_)", "| at | 1 |"):
        assert words in text
    found = json.loads((out / "at.json").read_text())
    assert {"PGD-20", "margin PGD", "AutoAttack"} < set(found["accuracy"])
    assert set(found["seconds"]) == {
        *("data", "set up", "first epoch", "other epochs", "evaluation", "AutoAttack")
    }
    assert run(tmp_path, "--only", "kernels").count("kernels: done before") == 1


@pytest.mark.slow
def test_all_other_stages(tmp_path, suite):
    """Methods differ only in their settings, so the one with all settings stands for the rest."""
    names = [name for name in suite.STAGES if name not in suite.METHODS] + ["trades-emr"]
    names.remove("kernels")  # tested above
    said = run(tmp_path, "--only", *names)
    assert all(f"{name}: done," in said for name in names)


def test_what_fails_or_takes_too_long_is_told_and_the_next_goes_on(tmp_path, suite, monkeypatch):
    given = suite.arguments(["--out", str(tmp_path), "--dry"])
    python = [sys.executable, "-c"]
    commands = {
        "good": [[*python, "print('said this')"]],
        "bad": [[*python, "raise SystemExit(3)"], [*python, "print('and this')"]],
        "slow": [[*python, "import time\ntime.sleep(60)"], [*python, "print('not this')"]],
        "absent": [["no-such-program"]],
    }
    stages = {k: suite.Stage(0.02, lambda s, c=c: c) for k, c in commands.items()}
    monkeypatch.setattr(suite, "STAGES", stages)
    here = suite.Suite(given)
    states = [here.run(name, 1.2) for name in stages]
    assert states == ["done", "failed", "stopped", "failed"]
    assert [v["state"] for v in here.status.values()] == states
    log = (tmp_path / "log.txt").read_text()
    for words in ("said this", "exit status 3", "and this", "stopped", "cannot run no-such"):
        assert words in log
    assert "not this" not in log.replace("print('not this')", "")


def test_first_stages_in_order_of_worth(tmp_path, suite, monkeypatch, capsys):
    ran = []
    monkeypatch.setattr(suite.Suite, "run", lambda self, name, seconds: _note(self, ran, name))
    monkeypatch.setattr(suite.gpu_report, "summary", lambda *_: None)
    monkeypatch.setattr(suite.harness, "use_checkout", lambda: None)
    command = ["gpu_suite.py", "--out", str(tmp_path), "--minutes", "8"]
    for more, expected in (
        (["--first"], ["build", "tests", "attacks", "autoattack", "record", "kernels"]),
        ([], ["reference", "training", "sanitizer", "counters", *suite.METHODS]),
    ):
        ran.clear()
        monkeypatch.setattr(sys, "argv", [*command, *more])
        with pytest.raises(SystemExit) as ended:
            suite.main()
        assert ended.value.code == 0 and ran == expected


def _note(suite, ran: list[str], name: str) -> str:
    ran.append(name)
    status = {**suite.status, name: {"state": "done", "seconds": 1.0}}
    suite.status_file.write_text(json.dumps(status))
    return "done"


def test_libraries_from_a_folder_come_after_the_installed_ones(tmp_path):
    """`--site` adds libraries and does not replace PyTorch by a second one."""
    for name in ("torch", "torchattacks"):
        (tmp_path / f"{name}.py").write_text(f"{name.upper()} = True\n")
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import harness; from pathlib import Path\n"
        "harness.use_site(Path(sys.argv[2]))\n"
        "import torch, torchattacks\n"
        "print(hasattr(torch, 'TORCH'), hasattr(torchattacks, 'TORCHATTACKS'))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(BENCHMARKS), str(tmp_path)], capture_output=True, text=True
    )
    assert done.stdout.split() == ["False", "True"], done.stderr


def test_commands_name_the_folder_of_libraries(tmp_path, suite):
    given = suite.arguments(["--out", str(tmp_path), "--site", str(tmp_path)])
    here = suite.Suite(given)
    for command in (here.ask("gpu_attacks"), here.within("autoattack")):
        assert command[command.index("--site") + 1] == str(tmp_path)
    without = suite.Suite(suite.arguments(["--out", str(tmp_path)]))
    assert "none" in without.ask("gpu_attacks")


def test_the_reference_stage_turns_the_kernels_off(tmp_path, suite):
    here = suite.Suite(suite.arguments(["--out", str(tmp_path)]))
    for command, plain in zip(suite._reference(here), suite._tests(here), strict=True):
        assert command == ["env", "PYADV_CUDA=0", *plain]


def test_epochs_fill_the_time(tmp_path, suite, monkeypatch):
    stages = suite.gpu_stages
    trainer = type("Trainer", (), {"batches": range(100)})()
    monkeypatch.setattr(stages, "_trainer", lambda *_: trainer)
    monkeypatch.setattr(stages, "load_data", lambda _: None)
    monkeypatch.setattr(stages, "_seconds_of_steps", lambda *_: 0.05)
    setting = stages.Setting(tmp_path, tmp_path)
    assert stages._epochs_that_fit(setting, "record", {}, 180.0) == 36
    # A continued run keeps its number, whatever a step takes now.
    monkeypatch.setattr(stages, "_seconds_of_steps", lambda *_: 5.0)
    assert stages._epochs_that_fit(setting, "record", {}, 180.0) == 36
    assert stages._epochs_that_fit(setting, "other", {}, 180.0) == 1


def test_jpeg_archives(tmp_path, suite):
    images = pytest.importorskip("PIL.Image")
    files, y = [], np.arange(5) % 3
    for i in range(5):
        file = io.BytesIO()
        images.fromarray(np.full((8, 8, 3), 50 * i, np.uint8)).save(file, "JPEG")
        files.append(file.getvalue())
    archive = io.BytesIO()
    jpeg = np.frombuffer(b"".join(files), np.uint8)
    np.savez(archive, jpeg=jpeg, lengths=[len(f) for f in files], labels=y, n_train=4)
    path = tmp_path / "few-jpeg.npz.xz"
    path.write_bytes(lzma.compress(archive.getvalue()))
    setting = suite.Setting(tmp_path, tmp_path, path)
    data = [suite.gpu_stages.load_data(setting) for _ in range(2)][1]
    assert data.name == "few-jpeg (JPEG copy)" and data.shape == (3, 8, 8)
    assert len(data.train_y) == 4 and data.test_y.tolist() == [1]
    assert data.train_x.mean((1, 2, 3)).mul(255).round().tolist() == [0, 50, 100, 150]


def test_every_kernel_is_measured_and_sanitized(suite):
    class Log(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            if op.namespace == "pyadv":
                seen.add(op._opname.removesuffix("_out"))
            return op(*args, **(kwargs or {}))

    seen, kernels = set(), importlib.import_module("gpu_kernels")
    options = suite.harness.Options(torch.device("cpu"), 1, quick=True)
    with Log():
        for case in kernels.cases(options):
            assert case.check(case.providers["pyadv"].call()) is None, case.name
    names = torch._C._dispatch_get_all_op_names()
    names = {n.removeprefix("pyadv::") for n in names if n.startswith("pyadv::")}
    missing = {n.removesuffix("_out") for n in names} - seen
    assert missing == {"winograd", "winograd_weight"}  # only the CPU has them


def test_counters_are_read(tmp_path, suite):
    head = '"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"'
    row = '"0","void pyadv::cuda::track_kernel(TrackArgs)","{}","{}","{}"'
    rows = [row.format(name, "%", n) for n, name in enumerate(suite.COUNTERS)]
    (tmp_path / "ncu.csv").write_text("\n".join(["==PROF== connected", head, *rows]) + "\n")
    *_, line = suite.gpu_report.counted(tmp_path / "ncu.csv")
    assert line.startswith("| void pyadv::cuda::track_kernel(TrackArgs) | 0 % | 1 % |")
