"""The code of the README, the home page, the quickstart, the tutorials and the page on frameworks
runs as it stands, on less data."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
import sys
import types
from pathlib import Path

import numpy as np
import pages
import pytest
import torch
from torch import nn

from pyadv.data import ImageData, load

pytestmark = pytest.mark.skipif(not (pages.ROOT / "docs").is_dir(), reason="not a checkout")


@pytest.fixture(scope="module")
def small() -> ImageData:
    """A few images of the embedded data."""
    data = load("fashion-mini")
    return ImageData(
        data.name,
        data.classes,
        data.train_x[:300],
        data.train_y[:300],
        data.test_x[:24],
        data.test_y[:24],
    )


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def little(small):
    """What makes a page quick: its data set is small."""
    return {"names": {"small": small}, "replace": {'load("fashion-mini")': "small"}}


class Net(nn.Module):
    """A classifier of colour images of any size, in place of a pretrained network."""

    def __init__(self, classes: int, wrap=None):
        super().__init__()
        self.wrap = wrap
        self.net = nn.Sequential(
            nn.Conv2d(3, 8, 8, stride=8), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten()
        )
        self.head = nn.Linear(128, classes)

    def forward(self, x):
        logits = self.head(self.net(x))
        return logits if self.wrap is None else self.wrap(logits)


def modules(monkeypatch, **names: dict) -> None:
    """Put modules with these attributes in place of packages."""
    for name, attributes in names.items():
        module = types.ModuleType(name.replace("__", "."))
        vars(module).update(attributes)
        monkeypatch.setitem(sys.modules, module.__name__, module)


@pytest.fixture(scope="module")
def masking(little, tmp_path_factory):
    """The tutorial on masking, run."""
    less = {"randperm(4000)": "randperm(300)", "n = 100": "n = 8", "slice(0, 20)": "slice(0, 2)"}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("masking"))
        pages.hasten_margins(patch)
        page = pages.run(
            "docs/tutorials/really-robust.md", little["names"], little["replace"] | less
        )
        assert Path("margins.png").is_file()
    return page


@pytest.fixture
def torchvision(monkeypatch):
    """torchvision.models with an untrained network, where there is no torchvision."""
    weights = types.SimpleNamespace(meta={"categories": [f"class {i}" for i in range(1000)]})
    models = {
        "ResNet18_Weights": types.SimpleNamespace(DEFAULT=weights),
        "resnet18": lambda weights: Net(len(weights.meta["categories"])),
    }
    modules(monkeypatch, torchvision={}, torchvision__models=models)


def test_the_home_page_and_the_readme_have_one_program(little):
    (program,) = pages.blocks("README.md")
    assert pages.blocks("docs/index.md") == [program]
    assert len([line for line in program.splitlines() if line]) <= 18
    assert len((pages.ROOT / "README.md").read_text().splitlines()) <= 75  # about a screen
    page = pages.run("README.md", **little)
    assert (page.x_adv - page.x).abs().max() <= 0.1 + 1e-6
    assert 0 <= page.report.worst.accuracy <= page.report["clean"].accuracy <= 1


def test_the_quickstart(little):
    page = pages.run("docs/quickstart.md", **little)
    assert (page.x_adv - page.x).abs().max() <= 0.1 + 1e-6
    assert page.report.worst.accuracy <= page.report["clean"].accuracy


def test_the_tutorial_on_torchvision(torchvision):
    page = pages.run("docs/tutorials/torchvision.md", replace={"steps=40": "steps=4"})
    assert len(page.report.worst.correct) == 8
    assert page.image.shape == (1, 3, 224, 224) and 0 <= page.image.min() <= page.image.max() <= 1


def test_the_tutorial_on_torchvision_with_torchvision(monkeypatch):
    models = pytest.importorskip("torchvision.models")
    resnet18 = models.resnet18
    monkeypatch.setattr(models, "resnet18", lambda weights: resnet18(weights=None))
    pages.run("docs/tutorials/torchvision.md", replace={"steps=40": "steps=4"})


def test_the_tutorial_on_training(little):
    less = {"epochs: int = 6": "epochs: int = 2", "x, y = data.test_x[:500]": "x, y = data.test_x"}
    less |= {"data.hold_out(500)": "data.hold_out(20)", "data.test_y[:500]": "data.test_y"}
    page = pages.run("docs/tutorials/train.md", little["names"], little["replace"] | less)
    assert [row["epoch"] for row in page.history] == [1, 2]
    assert Path("curves.png").is_file()


def test_the_tutorial_on_masking(masking):
    assert masking.margins.nearest.shape == (8,)


def test_the_gallery(masking, tmp_path, monkeypatch):
    """The gallery draws the tutorial's networks, and all attacks get the same images."""
    monkeypatch.syspath_prepend(str(pages.ROOT / "benchmarks"))
    gallery = importlib.import_module("gallery")
    monkeypatch.setattr(gallery, "RADII", (0.0, 0.1))
    drawn = {}
    monkeypatch.setattr(gallery.plots, "accuracy_against", lambda c, path: drawn.update({path: c}))
    # The networks of the test know too few images to show any.
    monkeypatch.setattr(gallery.plots, "worst_examples", lambda *images: None)
    monkeypatch.setattr(gallery, "take", lambda made, path: path.touch())
    out = tmp_path / "out"
    out.mkdir()
    gallery.draw(masking, out)
    against = drawn["eps.png"]["eps"]
    at = [points for name, points in against.items() if name.startswith("AT")]
    clean = (masking.robust(masking.x).argmax(1) == masking.y).float().mean().item()
    assert len(at) == 3 and all(points[0] == (0.0, pytest.approx(clean)) for points in at)
    assert drawn["masked.png"]["eps"]["AT: PGD-20"] == against["AT: PGD-20"]
    page = (pages.ROOT / "docs" / "gallery.md").read_text()
    shown = set(re.findall(r"images/gallery/(\S+)\)", page))
    elsewhere = {"training.png", "margins.png"}  # the tutorials draw them
    assert shown - elsewhere | {"home.png"} == {path.name for path in out.iterdir()}


def test_the_page_on_frameworks(monkeypatch):
    torch.manual_seed(0)
    config = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.25, 0.3)}
    data = types.SimpleNamespace(resolve_model_data_config=lambda net: config)
    answer = types.SimpleNamespace(
        from_pretrained=lambda name: Net(1000, lambda z: types.SimpleNamespace(logits=z))
    )
    modules(
        monkeypatch,
        timm={"create_model": lambda name, pretrained: Net(1000), "data": data},
        transformers={"AutoModelForImageClassification": answer},
    )
    x, y = torch.rand(8, 3, 32, 32), torch.arange(8)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=4)
    page = pages.run("docs/frameworks.md", {"images": x, "labels": y, "loader": loader})
    difference = (page.normalised_adv * page.std + page.mean - x).abs().max()
    assert 0 < difference <= 4 / 255 + 1e-6
    assert page.result.logits.shape == (8, 100) and page.success.shape == (2, 8)


def test_the_commands_run(small, tmp_path):
    """Each `pyadv ...` of the README and the quickstart runs, on a few images. `pip` does not."""
    testing = pytest.importorskip("typer.testing")
    from pyadv import cli

    arrays = {f"{k}_{split}": f"{split}_{k}" for k in "xy" for split in ("train", "test")}
    source = tmp_path / "small.npz"
    np.savez(source, **{name: getattr(small, field).numpy() for name, field in arrays.items()})
    shell = [*pages.blocks("README.md", "bash"), *pages.blocks("docs/quickstart.md", "bash")]
    lines = dict.fromkeys("\n".join(shell).replace("&&", "\n").splitlines())
    commands = [words for words in (shlex.split(line, comments=True) for line in lines) if words]
    for words in commands:
        if words[0] == "pip":
            assert words[1] == "install"
            continue
        assert words[0] == "pyadv"
        less = {"train": ["--data", str(source), "--epochs", "1"], "evaluate": ["--n", "4"]}
        done = testing.CliRunner().invoke(cli.app, [*words[1:], *less[words[1]]])
        assert done.exit_code == 0, done.output
    assert [words[1] for words in commands if words[0] == "pyadv"] == ["train", "train", "evaluate"]


def test_blocks_have_a_language():
    """A block without one is not highlighted."""
    for path in [pages.ROOT / "README.md", *(pages.ROOT / "docs").rglob("*.md")]:
        fences = re.findall(r"^```(.*)$", path.read_text(), re.MULTILINE)
        assert all(fences[::2]) and not any(fences[1::2]), path


def test_blocks_begin_with_their_imports():
    for path in [pages.ROOT / "README.md", *(pages.ROOT / "docs").rglob("*.md")]:
        for code in pages.blocks(str(path.relative_to(pages.ROOT))):
            imports = [isinstance(n, (ast.Import, ast.ImportFrom)) for n in ast.parse(code).body]
            assert imports == sorted(imports, reverse=True), f"{path}: {code}"
