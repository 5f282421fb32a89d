"""The command line trains, resumes and evaluates; a mistake gives one clear line."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from pyadv import __version__
from pyadv.cli import app
from pyadv.data import load
from pyadv.training import Config, checkpoint
from pyadv.training.lock import RunLock

FAST = ["--epochs", "2", "--batch-size", "32", "--steps", "2", "--device", "cpu"]


def pyadv(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "120"})
    assert result.exit_code == code, result.output
    return result.output


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the file of a small data set."""
    full = load()
    path = tmp_path_factory.mktemp("data") / "few.npz"
    arrays = {"x_train": full.train_x[:80], "y_train": full.train_y[:80]}
    arrays |= {"x_test": full.test_x[:30], "y_test": full.test_y[:30]}
    np.savez(path, **{name: value.numpy() for name, value in arrays.items()})
    return path


@pytest.fixture(scope="module")
def run(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a finished run."""
    folder = tmp_path_factory.mktemp("runs") / "one"
    output = pyadv("train", "--data", source, "--eps", "8/255", *FAST, "--out", folder)
    for row in ("clean", "PGD-20", "margin PGD", "worst case", "30 samples, Linf, eps 0.03137"):
        assert row in output
    return folder


def test_train_writes_what_it_was_told(run: Path) -> None:
    config = json.loads((run / "config.json").read_text())
    assert config["eps"] == config["alpha"] == pytest.approx(8 / 255)  # there are two steps
    assert config["epochs"] == 2 and config["method"] == "at" and config["model"] == "small-cnn"


def test_evaluate(run: Path, source: Path, tmp_path: Path) -> None:
    output = pyadv("evaluate", run, "--n", "20", "--bs", "7", "--device", "cpu")
    assert "20 samples, Linf, eps 0.03137" in output and "clean" in output
    report = json.loads((run / "evaluation" / "one-pgd20" / "report.json").read_text())
    assert report["accuracy"]["pgd20"]["n"] == 20 and report["masking"] is None
    out = tmp_path / "l2"
    pyadv("evaluate", run / "checkpoint.pt", "--norm", "l2", "--eps", "0.5", "--out", out)
    accuracy = json.loads((out / "report.json").read_text())["accuracy"]["pgd20"]
    assert accuracy["norm"] == "L2" and [r["name"] for r in accuracy["rows"]][0] == "clean"


def test_evaluate_a_model_of_ones_own(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.py").write_text(
        "from pyadv.models import SmallCNN\n"
        "class zoo:\n"
        "    def small(): return SmallCNN()\n"
        "    def nothing(): return lambda x: x\n"
    )
    monkeypatch.chdir(tmp_path)
    arguments = ("--data", source, "--eps", "0.1", "--n", "8", "--device", "cpu")
    output = pyadv("evaluate", "mine:zoo.small", *arguments)
    folder = tmp_path / "evaluation" / "mine.zoo.small-pgd20"
    assert "written to evaluation/mine" in output and (folder / "report.md").exists()
    assert "" not in sys.path[:1]
    for target, message in (
        ("mine:zoo.nothing", "must return a torch.nn.Module, got a function"),
        ("mine:zoo.absent", "model 'mine:zoo.absent': mine has no 'zoo.absent'"),
        ("no_such_module:f", "there is no module 'no_such_module'"),
    ):
        assert message in pyadv("evaluate", target, *arguments, code=1)
    assert "give --data, --eps" in pyadv("evaluate", "mine:zoo.small", code=1)


def test_resume_of_a_finished_run_reports_again(run: Path) -> None:
    before, settings = (json.loads((run / f"{f}.json").read_text()) for f in ("results", "config"))
    pyadv("train", "--resume", run, "--device", "cpu")
    after = json.loads((run / "results.json").read_text())
    for made in (before.pop("provenance"), after.pop("provenance"), settings["provenance"]):
        assert made["pyadv"] == __version__ and made["seed"] == 0
    assert after == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--method", "foo"], "pyadv: method must be one of standard, at, trades, mart"),
        (["train", "--data", "nowhere"], "pyadv: data: 'nowhere' is neither a path nor one of"),
        (["train", "--data", "~nouser/x"], "pyadv: data: '~nouser/x' is neither a path nor one of"),
        (["train", "--lr", "inf"], "pyadv: lr must be finite and > 0, got inf"),
        (["train", "--model", "vgg"], "pyadv: model must be one of small-cnn"),
        (["train", "--device", "gpu"], "pyadv: device must be one of cpu.*, got 'gpu'"),
        (["train", "--device", "cuda:99"], "pyadv: device must be one of cpu.*, got 'cuda:99'"),
        (["train", "--precision", "fp8"], "pyadv: precision must be one of fp32, bf16, fp16"),
        (["train", "--norm", "L2"], "pyadv: eps must be given for norm L2"),
        (
            ["train", "--recipe", "best"],
            "recipe must be one of at-awp.* or a .toml file, got 'best'",
        ),
        (["train", "--beta", "6"], "pyadv: beta is for the methods trades, "),
        (["train", "--resume", "x", "--recipe", "a"], "--resume takes its .* drop recipe"),
        (["train", "--resume", "x", "--lr", "1"], "--resume takes its settings .* drop lr"),
        (["train", "--resume", "x"], "pyadv: no checkpoint at x/checkpoint.pt"),
        (["evaluate", "x.pt"], "pyadv: no checkpoint at x.pt"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str, tmp_path: Path) -> None:
    out = [] if arguments[0] == "evaluate" or "--resume" in arguments else ["--out", tmp_path / "r"]
    output = pyadv(*arguments, *out, code=1)
    assert re.search(message, output) and output.count("\n") == 1
    assert not (tmp_path / "r").exists()


def test_mistakes_about_a_run(run: Path, tmp_path: Path) -> None:
    assert "holds a run already" in pyadv("train", "--out", run, code=1)
    assert "--norm L2 needs --eps" in pyadv("evaluate", run, "--norm", "L2", code=1)
    x = np.zeros((10, 3, 32, 32), np.uint8)
    np.savez(tmp_path / "colour.npz", x=x, y=np.arange(10))
    output = pyadv("evaluate", run, "--data", tmp_path / "colour.npz", code=1)
    assert "has (3, 32, 32) images of 10 classes, the network takes (1, 28, 28)" in output
    assert "--n must be >= 1" in pyadv("evaluate", run, "--n", "0", code=1)
    suites = "suite must be one of pgd20, pgdplus, autoattack, masking, margins, all, got 'aa'"
    assert suites in pyadv("evaluate", run, "--suite", "aa", code=1)
    assert "is not a number or a fraction" in pyadv("train", "--eps", "8/0", code=2)


def test_help_states_the_defaults_that_hold() -> None:
    """The help repeats the defaults of the settings, since importing them would make it slow."""
    text = re.sub(r"\s+", " ", re.sub(r"[│╭╮╰╯─]", " ", pyadv("train", "--help")))
    defaults = {f.name: f.default for f in dataclasses.fields(Config)}
    stated = re.findall(
        r"--([a-z-]+) (?:--no-[a-z-]+ )?(?:<\w+>|[A-Z]+) [^\[\]]*?\[([^\]]+)\]", text
    )
    checked = 0
    for name, value in stated:
        default = defaults.get(name.replace("-", "_"))
        if default is not None:
            assert value == str(default) or float(value) == default, name
            checked += 1
    assert checked >= 9
    options = {o.replace("-", "_") for o in re.findall(r"--([a-z][a-z-]+)", text)}
    assert set(defaults) - options == {
        "milestones",
        "factors",
        "momentum",
        "emr_milestones",
    }  # for Python and recipes


def test_train_by_a_recipe(source: Path, tmp_path: Path) -> None:
    out = ["--data", source, *FAST, "--out"]
    pyadv("train", "--recipe", "trades-fashion-mini", "--beta", "3", *out, tmp_path / "one")
    config = json.loads((tmp_path / "one" / "config.json").read_text())
    assert (config["method"], config["beta"], config["attack_loss"]) == ("trades", 3, "kl")
    assert config["epochs"] == 2 and config["eps"] == 0.1

    mine = tmp_path / "mine.toml"
    mine.write_text('eps = "8/255"\nepoch = 3\nsteps = 2\nlearning = 1\n')
    output = pyadv("train", "--recipe", mine, *out, tmp_path / "two", code=1)
    assert f"recipe {mine}: config has unknown settings ['epoch', 'learning']" in output


def test_recipes() -> None:
    lines = pyadv("recipes").splitlines()
    assert lines[0].split() == ["NAME", "METHOD", "MODEL", "DATA", "SOURCE"]
    (trades,) = [line for line in lines if line.startswith("trades-wrn34-10-cifar10 ")]
    assert trades.split()[1:4] == ["trades", "wrn-34-10", "cifar10"] and "ICML 2019" in trades
    assert "beta = 6\n" in pyadv("recipes", "trades-wrn34-10-cifar10")
    assert "recipe must be one of" in pyadv("recipes", "none", code=1)


def test_info() -> None:
    assert "backend" in pyadv("info")


def test_ctrl_c_says_how_to_go_on(source: Path, tmp_path: Path) -> None:
    """A signal stops another process."""
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "pyadv", "train", "--data", source, *FAST, "--out", folder]
    command += ["--epochs", "100000", "--schedule", "constant"]
    process = subprocess.Popen(
        [str(c) for c in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    for line in process.stdout:
        if line.startswith("epoch"):
            break
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 130
    assert re.search(rf"stopped in epoch \d+ after step \d+; .*train --resume {folder}", output)
    assert checkpoint.load(folder / "checkpoint.pt")["epoch"] >= 2


def test_ctrl_c_outside_of_training_says_how_to_go_on(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    folder, arguments = tmp_path / "run", ["train", "--data", source, *FAST, "--out"]
    with monkeypatch.context() as patch:
        patch.setattr("pyadv.training.run._draw", interrupt)
        output = pyadv(*arguments, folder, code=130)
        assert f"interrupted; continue with: pyadv train --resume {folder}\n" in output
        patch.setattr("pyadv.training.build.load", interrupt)
        output = pyadv(*arguments, tmp_path / "other", code=130)
        assert output == "interrupted\n"
    pyadv("train", "--resume", folder, "--device", "cpu")


def test_a_full_disk_is_one_line(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    output = pyadv("train", "--data", source, *FAST, "--out", tmp_path / "run", code=1)
    words = r"pyadv: cannot write .*config.json: no space left on device; it needs [\d,]+ bytes and"
    assert re.fullmatch(words + ".* are free in .*\n", output)
    assert not list((tmp_path / "run").iterdir())


def test_a_run_in_use_is_one_line(run: Path) -> None:
    with RunLock(run):
        output = pyadv("train", "--resume", run, code=1)
    assert output.startswith(f"pyadv: {run} is in use by process {os.getpid()} on ")
    assert output.count("\n") == 1


ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize(
    "redirection", ["<&- >&- 2>&-", ">/dev/full 2>/dev/full", "2>err | true", "2>err >out"]
)
def test_no_output_stream_takes_the_training_down(
    source: Path, tmp_path: Path, redirection: str
) -> None:
    """Streams that are closed or full, a reader that has gone, an encoding without "–"."""
    options = shlex.join(["--data", str(source), *FAST, "--epochs", "1", "--out", "run"])
    command = f"{shlex.quote(sys.executable)} -m pyadv train {options} {redirection}"
    script = ["bash", "-c", command + '; exit "${PIPESTATUS[0]}"']
    env = {**os.environ, **(ASCII if "out" in redirection else {})}
    env["PYTHONPATH"] = str(Path(__file__).parents[1])
    done = subprocess.run(script, cwd=tmp_path, env=env, capture_output=True, timeout=300)
    assert done.returncode == 0 and done.stdout == done.stderr == b""
    rows = json.loads((tmp_path / "run" / "results.json").read_text())["rows"]
    assert rows[0]["name"] == "clean"
    assert checkpoint.load(tmp_path / "run" / "checkpoint.pt")["epoch"] == 2
    assert sorted(p.name for p in (tmp_path / "run").glob("*.png")) == ["curves.png", "kappa.png"]
    for name in ("err", "out"):
        if (tmp_path / name).exists():
            text = (tmp_path / name).read_bytes().decode("ascii")
            assert "Error" not in text and "Exception" not in text
    if "out" in redirection:
        assert re.search(r"clean +\W +\d+\.\d+ \(\d+\.\d+-\d", (tmp_path / "out").read_text())


def test_recipes_in_ascii(tmp_path: Path) -> None:
    """Sources of recipes hold letters that ASCII lacks."""
    (tmp_path / "mine.toml").write_bytes('source = "Müller"\n'.encode())
    code = (
        "import sys; from pyadv.__main__ import main; sys.argv = ['pyadv', 'recipes', "
        "'mine.toml']; main()"
    )
    env = {**os.environ, **ASCII, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"") and b'source = "M' in done.stdout


def test_version_and_completion() -> None:
    assert pyadv("--version") == f"pyadv {__version__}\n"
    assert "--show-completion" in pyadv("--help")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate", "x", "--suite", "autoatack"], "suite must be .*did you mean 'autoattack'?"),
        (["train", "--method", "trade"], "method must be .*did you mean 'trades'?"),
        (["train", "--schedule", "cosin"], "schedule must be .*did you mean 'cosine'?"),
        (["train", "--norm", "Lin"], "norm must be .*did you mean 'Linf'?"),
        (["train", "--device", "cup"], "device must be .*did you mean 'cpu'?"),
        (
            ["train", "--recipe", "at-fashion-min"],
            "recipe must be .*did you mean 'at-fashion-mini'?",
        ),
        (["train", "--start", "keyd"], "start must be .*did you mean 'keyed'?"),
        (["train", "--speed", "fsat"], "speed must be .*did you mean 'fast'?"),
        (["train", "--attack-loss", "margn"], "loss must be .*did you mean 'margin'?"),
    ],
)
def test_misspelt_values_are_told_the_nearest(
    arguments: list[str], message: str, tmp_path: Path
) -> None:
    out = [] if arguments[0] == "evaluate" else ["--out", tmp_path / "r"]
    output = pyadv(*arguments, *out, code=1)
    assert re.search(message, output) and output.count("\n") == 1
