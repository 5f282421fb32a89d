"""Image folders and data sets of other libraries: what is read, streamed as it is in memory."""

from __future__ import annotations

import io
import json
import os
import random
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

import pyadv
from pyadv.data import ImageData, StreamedImages, load, streams, transformed_batches
from pyadv.data.reading import ResizedCrop, fit, to_tensor

Image = pytest.importorskip("PIL.Image")

SIZES = {"train": 5, "test": 3}  # images of each class


def write_folder(folder: Path, side: int = 8, classes: tuple[str, ...] = ("cat", "dog")) -> None:
    rng = np.random.default_rng(0)
    for split, n in SIZES.items():
        for name in classes:
            place = folder / split / name
            place.mkdir(parents=True)
            for i in range(n):
                pixels = rng.integers(0, 256, (side, side, 3), np.uint8)
                Image.fromarray(pixels).save(place / f"{i}.png")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pets")
    write_folder(path)
    return path


def test_a_folder_is_read_in_the_order_of_its_names(folder: Path) -> None:
    data = load(folder)
    assert isinstance(data, ImageData)  # it fits
    assert data.name == folder.name and data.classes == ("cat", "dog") and data.shape == (3, 8, 8)
    assert data.train_y.tolist() == [0] * 5 + [1] * 5 and data.test_y.tolist() == [0] * 3 + [1] * 3
    raw = np.asarray(Image.open(folder / "train" / "dog" / "1.png"))
    assert torch.equal(data.train_x[6], torch.from_numpy(raw.copy()).permute(2, 0, 1) / 255)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("start", [0, 2])
def test_streamed_batches_are_those_in_memory(folder: Path, workers: int, start: int) -> None:
    whole, stream = load(folder), load(folder, stream=True, workers=workers)
    assert isinstance(stream, StreamedImages)
    kept, held = stream.hold_out(2, seed=3)
    assert torch.equal(kept, whole.hold_out(2, seed=3)[0])
    settings = {"ids": kept, "seed": 5, "augment": True}
    state = torch.get_rng_state()
    batches = stream.batches(3, **settings)
    for epoch in (1, 2):
        pairs = zip(
            batches.epoch(epoch, start),
            whole.batches(3, **settings).epoch(epoch, start),
            strict=True,
        )
        for ours, theirs in pairs:
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert torch.equal(torch.get_rng_state(), state)  # torch's generator is left alone
    (loader,) = stream.samples("train", held)
    x, y = whole.samples("train", held)
    assert all(torch.equal(a, b) for a, b in zip(loader.all(), (x, y), strict=True))


def test_an_epoch_that_is_left_in_the_middle_can_begin_anew(folder: Path) -> None:
    batches = load(folder, stream=True, workers=2).batches(2, ids=torch.arange(10))
    whole = [ids.tolist() for *_, ids in batches.epoch(1)]
    for _, _, ids in batches.epoch(1):
        assert ids.tolist() == whole[0]
        break
    assert [ids.tolist() for *_, ids in batches.epoch(1)] == whole


def test_the_test_images_of_an_evaluation(folder: Path) -> None:
    whole, stream = load(folder), load(folder, stream=True, workers=0)
    for rows in (slice(4), slice(None), torch.tensor([5, 0])):
        x, y = stream.read("test", rows)
        assert torch.equal(x, whole.test_x[rows]) and torch.equal(y, whole.test_y[rows])
        assert all(torch.equal(a, b) for a, b in zip(whole.read("test", rows), (x, y), strict=True))
    assert len(stream.read("test")[1]) == 6


class Noise:
    """A transform that draws from every generator."""

    def __call__(self, x: Tensor) -> Tensor:
        draws = torch.rand(()).item() + random.random() + np.random.rand()
        return (x.float() / 255 * draws / 3).clamp(0, 1)


@pytest.mark.parametrize("transform", ["resized-crop", "test_streams_noise:Noise"])
def test_transforms_depend_on_the_sample_and_the_epoch_alone(
    folder: Path, monkeypatch: pytest.MonkeyPatch, transform: str
) -> None:
    module = types.ModuleType("test_streams_noise")
    module.Noise = Noise
    monkeypatch.setitem(sys.modules, "test_streams_noise", module)
    random.seed(0)
    states = torch.get_rng_state(), random.getstate()

    def images(batch_size: int, workers: int, epoch: int, whole: bool = False) -> Tensor:
        data = load(folder) if whole else load(folder, stream=True, workers=workers)
        settings = {"ids": torch.arange(10), "transform": transform, "workers": workers}
        batches = transformed_batches(data, batch_size, **settings)
        found = {
            int(i): x for xs, _, ids in batches.epoch(epoch) for i, x in zip(ids, xs, strict=True)
        }
        return torch.stack([found[i] for i in range(10)])

    first = images(4, 0, 1)
    assert first.shape == (10, 3, 8, 8) and first.min() >= 0 and first.max() <= 1
    assert torch.equal(first, images(3, 2, 1))
    assert torch.equal(first, images(5, 0, 1, whole=True))
    assert not torch.equal(first, images(4, 0, 2))
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]


def test_images_of_other_sizes_are_cut_and_resized(tmp_path: Path) -> None:
    write_folder(tmp_path, 8)
    Image.new("L", (40, 24), 128).save(tmp_path / "train" / "cat" / "0.png")
    with pytest.raises(ValueError, match=r"sizes such as 8x8, 40x24: say with image_size"):
        load(tmp_path)
    data = load(tmp_path, image_size=16)
    assert data.shape == (3, 16, 16)
    torch.testing.assert_close(data.train_x[0], torch.full((3, 16, 16), 128 / 255))


def test_fit_takes_the_middle() -> None:
    x = torch.zeros(1, 16, 32, dtype=torch.uint8)
    x[:, 1:15, 9:23] = 200  # the middle 7/8 of the shorter side
    assert (fit(x, (3, 7, 7)) == 200).all()
    assert torch.equal(fit(x, (1, 16, 32)), x)


def test_a_jpeg_is_decoded_at_a_fraction_of_its_size(tmp_path: Path) -> None:
    write_folder(tmp_path, 8)
    smooth = np.linspace(0, 255, 512, dtype=np.uint8)[None].repeat(512, 0)
    Image.fromarray(smooth).save(tmp_path / "train" / "cat" / "0.jpg", quality=95)
    data = load(tmp_path, image_size=32, stream=True, workers=0)
    files = data.train
    assert files.item(0, whole=True)[0].shape[1] == 512
    assert files.item(0, whole=False)[0].shape[1] == 64
    whole, small = (fit(files.item(0, w)[0], data.shape).float() for w in (True, False))
    assert (whole - small).abs().max() <= 4


def test_grey_folders_have_one_channel(tmp_path: Path) -> None:
    for split in ("training", "validation"):
        (tmp_path / split / "a").mkdir(parents=True)
        Image.new("L", (6, 4), 51).save(tmp_path / split / "a" / "0.png")
    data = load(tmp_path)
    assert data.shape == (1, 4, 6) and data.classes == ("a",)


def test_a_folder_without_a_split_holds_a_fifth_out(tmp_path: Path) -> None:
    write_folder(tmp_path / "all", 8)
    data = load(tmp_path / "all" / "train")
    assert len(data.train_y) == 8 and len(data.test_y) == 2
    assert data.name == "train (random fifth held out)"
    again = load(tmp_path / "all" / "train", stream=True, workers=0)
    assert torch.equal(again.read("test")[0], data.test_x)


def test_folders_that_are_refused(tmp_path: Path) -> None:
    write_folder(tmp_path / "a", 8)
    (tmp_path / "a" / "test" / "bird").mkdir()
    with pytest.raises(ValueError, match=r"has the classes \['bird'\], which .*train does not"):
        load(tmp_path / "a")
    (tmp_path / "b" / "train" / "cat").mkdir(parents=True)
    with pytest.raises(ValueError, match="has train/, but none of test, val"):
        load(tmp_path / "b")
    (tmp_path / "b" / "val" / "cat").mkdir(parents=True)
    with pytest.raises(ValueError, match="holds no image files"):
        load(tmp_path / "b")
    with pytest.raises(ValueError, match="image_size is for .* fashion-mini is read whole"):
        load("fashion-mini", image_size=32)
    with pytest.raises(ValueError, match="workers must be >= 0"):
        load(tmp_path / "a" / "train", workers=-1)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_image_is_named(tmp_path: Path, workers: int) -> None:
    write_folder(tmp_path, 8)
    bad = tmp_path / "train" / "cat" / "3.png"
    bad.write_bytes(bad.read_bytes()[:60])
    data = load(tmp_path, stream=True, workers=workers, image_size=8)
    with pytest.raises(ValueError, match=r"cat/3.png cannot be read") as error:
        list(data.batches(10, ids=torch.arange(10)).epoch(1))
    assert "\n" not in str(error.value)


def own(monkeypatch: pytest.MonkeyPatch, value: Any) -> str:
    module = types.ModuleType("own_data")
    module.make = lambda: value
    monkeypatch.setitem(sys.modules, "own_data", module)
    return "own_data:make"


X, Y = torch.randint(256, (10, 3, 4, 4), dtype=torch.uint8), torch.arange(10) % 4


class Pairs:
    """A data set of PIL images, as torchvision has them."""

    classes = ["a", "b", "c", "d"]

    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, i: int) -> tuple[Any, int]:
        return Image.fromarray(X[i].permute(1, 2, 0).numpy()), int(Y[i])


ROWS = [
    {"image": x.permute(1, 2, 0).numpy(), "label": y} for x, y in zip(X, Y.tolist(), strict=True)
]


@pytest.mark.parametrize(
    "sets",
    [
        (TensorDataset(X, Y), TensorDataset(X[:4], Y[:4])),
        {"train": TensorDataset(X / 255, Y), "val": TensorDataset(X[:4], Y[:4])},
        (Pairs(), Pairs()),
        (ROWS, ROWS[:4]),
        ImageData("mine", ("0", "1", "2", "3"), X / 255, Y, X[:4] / 255, Y[:4]),
    ],
)
def test_data_of_ones_own(monkeypatch: pytest.MonkeyPatch, sets: Any) -> None:
    data = load(own(monkeypatch, sets))
    torch.testing.assert_close(data.train_x, X / 255)
    assert torch.equal(data.train_y, Y) and torch.equal(data.test_y[:4], Y[:4])
    assert len(data.classes) == 4


def test_transformed_labels_are_counted_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    class Doubled(Pairs):
        classes, targets = None, Y

        def target_transform(self, y: int) -> int:
            return 2 * y

        def __getitem__(self, i: int) -> tuple[Any, int]:
            x, y = super().__getitem__(i)
            return x, self.target_transform(y)

    data = load(own(monkeypatch, (Doubled(), Doubled())))
    assert len(data.classes) == 7 and torch.equal(data.test_y, 2 * Y)


class Counted(Pairs):
    """A data set that tells neither its classes nor its labels, and counts what it reads."""

    classes, reads = None, 0

    def __getitem__(self, i: int) -> tuple[Any, int]:
        self.reads += 1
        return super().__getitem__(i)


@pytest.mark.parametrize(("pair", "stream", "reads"), [(1, None, 11), (0, None, 11), (0, True, 11)])
def test_no_sample_is_read_twice_to_count_the_classes(
    monkeypatch: pytest.MonkeyPatch, pair: bool, stream: bool | None, reads: int
) -> None:
    """The first sample, which tells the shape, is read once more."""
    sets = (Counted(), Counted()) if pair else Counted()
    data = load(own(monkeypatch, sets), stream=stream, workers=0)
    assert data.classes == ("0", "1", "2", "3")
    assert [s.reads for s in (sets if pair else (sets,))] == [reads] * (1 + pair)


def test_one_set_of_ones_own_is_split(monkeypatch: pytest.MonkeyPatch) -> None:
    data = load(own(monkeypatch, Pairs()))
    assert len(data.train_y) == 8 and len(data.test_y) == 2 and data.classes == ("a", "b", "c", "d")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (iter([]), "must be a data set with __len__ and __getitem__"),
        ({"train": ROWS}, r"must have the splits train and test \(or val\), it has train"),
        ([{"picture": 1}] * 3, "must have one of image, img"),
        ((TensorDataset(X * 1.0, Y), ROWS), r"must lie in \[0, 1\].*leave the normalisation"),
        ((TensorDataset(X.long(), Y), ROWS), "must be uint8 or floating"),
        ([(x, y - 1) for x, y in zip(X, Y, strict=True)], r"label of .* \[0, 100,000\), got -1"),
        ((TensorDataset(X, Y - 1),) * 2, r"the label of .* must lie in \[0, 3\), got -1"),
        ((TensorDataset(X, Y * 100_000),) * 2, r"labels must lie in \[0, 100,000\), saw 300000"),
        ((TensorDataset(X, Y * 100_000), ROWS), r"must lie in \[0, 100,000\), got [123]00000"),
    ],
)
def test_data_of_ones_own_that_is_refused(
    monkeypatch: pytest.MonkeyPatch, value: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load(own(monkeypatch, value))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_package:data", "there is no module 'no_such_package'"),
        ("pyadv.data:load", None),
        ("pyadv.data:sources", "must be callable, got a module"),
        ("pyadv.data:to_images", "must be callable without arguments"),
        ("fashion-mimi", "did you mean 'fashion-mini'"),
    ],
)
def test_names_of_data(name: str, message: str | None) -> None:
    if message is None:
        assert load(name).name == "fashion-mini"
        return
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load(name)


def test_what_fits_is_decided_by_size(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "free_memory", lambda: 16 * 3 * 64 * 4 * 4 - 1)
    data = load(folder, workers=3)
    assert isinstance(data, StreamedImages)
    assert data.residence == (
        f"{folder.name} is streamed by 3 workers: 0.0 GB as float32 are more than a quarter of "
        "the free memory"
    )
    monkeypatch.setattr(streams, "free_memory", lambda: 16 * 3 * 64 * 4 * 4)
    assert isinstance(load(folder), ImageData)
    assert isinstance(load(folder, stream=True), StreamedImages)


def test_free_memory_is_a_number_of_bytes() -> None:
    assert streams.free_memory() is None or streams.free_memory() > 2**20
    assert streams.usual_workers() >= 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("crop", "must be resized-crop, v2:NAME or package.module:name"),
        ("pyadv.data:no_such", "has no 'no_such'"),
        ("pyadv.data:fit", "has no 'fit'"),
        ("pyadv.training.config:Config.save", "must be a function of an image, or be callable"),
        (
            "pyadv.data.reading:ResizedCrop",
            "a function of an image, or be callable without",
        ),
        ("pyadv.training.schedules:SCHEDULES", "must be callable, got a tuple"),
    ],
)
def test_transforms_that_are_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        streams.find_transform(name, (3, 8, 8))


def test_transforms_and_what_makes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("own_transforms")

    def mirrored(x: Tensor) -> Tensor:
        return x.flip(2)

    def broken() -> Any:
        raise TypeError("inside")

    module.mirrored, module.made, module.broken = mirrored, lambda: mirrored, broken
    monkeypatch.setitem(sys.modules, "own_transforms", module)
    for name in ("mirrored", "made"):
        assert streams.find_transform(f"own_transforms:{name}", (3, 8, 8)) is mirrored
    with pytest.raises(TypeError, match="inside"):
        streams.find_transform("own_transforms:broken", (3, 8, 8))


def test_transforms_of_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    v2 = types.ModuleType("torchvision.transforms.v2")

    class Flip:
        def __call__(self, x: Tensor) -> Tensor:
            return x.flip(2)

    class Crop:
        def __init__(self, size: int) -> None: ...

    v2.Flip, v2.Crop = Flip, Crop
    parent = types.ModuleType("torchvision")
    parent.transforms = types.ModuleType("torchvision.transforms")
    parent.transforms.v2 = v2
    for name, module in (("torchvision", parent), ("torchvision.transforms", parent.transforms)):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, "torchvision.transforms.v2", v2)
    assert isinstance(streams.find_transform("v2:Flip", (3, 8, 8)), Flip)
    with pytest.raises(ValueError, match="needs arguments"):
        streams.find_transform("v2:Crop", (3, 8, 8))
    with pytest.raises(ValueError, match="v2 has no 'Flop'"):
        streams.find_transform("v2:Flop", (3, 8, 8))
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setitem(sys.modules, "torchvision.transforms", None)
    with pytest.raises(ImportError, match="pip install torchvision"):
        streams.find_transform("v2:Flip", (3, 8, 8))


def test_resized_crop_covers_what_it_should() -> None:
    torch.manual_seed(0)
    x = torch.arange(64, dtype=torch.uint8).expand(3, 48, 64)
    crops = [ResizedCrop((8, 8))(x) for _ in range(60)]
    assert all(crop.shape == (3, 8, 8) and crop.dtype == torch.uint8 for crop in crops)
    widths = [(c.float().amax() - c.float().amin()).item() for c in crops]
    assert min(widths) < 25 and max(widths) > 45
    mirrored = sum((c[0, 0, 0] > c[0, 0, -1]).item() for c in crops)
    assert 15 <= mirrored <= 45


@pytest.mark.parametrize("image", ["text", torch.zeros(4, 8, 8), torch.zeros(3, 0, 8), np.zeros(3)])
def test_what_is_no_image(image: Any) -> None:
    with pytest.raises(ValueError, match="an image must be"):
        to_tensor(image)


def test_sets_of_hugging_face(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c", "d"])}
    )
    columns = {"image": [Pairs()[i][0] for i in range(10)], "label": Y.tolist()}
    split = datasets.Dataset.from_dict(columns, features=features)
    datasets.DatasetDict(train=split, validation=split).save_to_disk(str(tmp_path / "hf"))
    data = load(tmp_path / "hf")
    torch.testing.assert_close(data.train_x, X / 255)
    assert data.classes == ("a", "b", "c", "d") and torch.equal(data.test_y, Y)


def test_sets_of_hugging_face_by_their_interface(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Set:
        column_names = ["image", "label"]
        features = {"image": None, "label": types.SimpleNamespace(names=["a", "b", "c", "d"])}

        def __len__(self) -> int:
            return len(X)

        def __getitem__(self, key: Any) -> Any:
            return Y.tolist() if key == "label" else {"image": Pairs()[key][0], "label": Y[key]}

    stub = types.ModuleType("datasets")
    stub.load_from_disk = lambda path: {"train": Set(), "validation": Set()}
    monkeypatch.setitem(sys.modules, "datasets", stub)
    (tmp_path / "dataset_dict.json").write_text("{}")
    data = load(tmp_path, stream=True, workers=0)
    x, y = data.read("test")
    assert data.classes == ("a", "b", "c", "d") and torch.equal(y, Y)
    torch.testing.assert_close(x, X / 255)


def test_hugging_face_is_optional(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "dataset_dict.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match="pip install datasets"):
        load(tmp_path)


def test_other_sets_of_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    class Flowers(Pairs):
        def __init__(self, root: str, split: str = "train", download: bool = False) -> None:
            if split not in ("train", "val"):
                raise ValueError(f"no split {split}")
            assert root == "data" and download

    module = types.ModuleType("torchvision.datasets")
    module.Flowers, module.number = Flowers, 3
    parent = types.ModuleType("torchvision")
    parent.datasets = module
    monkeypatch.setitem(sys.modules, "torchvision", parent)
    monkeypatch.setitem(sys.modules, "torchvision.datasets", module)
    data = load("torchvision:Flowers")
    torch.testing.assert_close(data.train_x, X / 255)
    assert data.classes == ("a", "b", "c", "d")
    for name in ("number", "Flours"):
        with pytest.raises(ValueError, match="must be a data set of torchvision with training"):
            load(f"torchvision:{name}")


MEMORY = """
import json, multiprocessing, os, sys, torch
from PIL import Image
from pyadv.data import load

def peak(pid):  # MB; ru_maxrss would count the process that started this one
    status = open(f"/proc/{pid}/status").read()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024

torch.set_num_threads(1)
before, seen = peak(os.getpid()), 0
data = load(sys.argv[1], stream=True, workers=1)
batches = data.batches(16, ids=torch.arange(len(data.train)), augment=True)
for x, y, ids in batches.epoch(1):
    seen += len(x)
(worker,) = multiprocessing.active_children()
grown = {"main": peak(os.getpid()) - before, "worker": peak(worker.pid) - before}
print(json.dumps({"seen": seen, "set": data.nbytes / 2**20, **grown}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_memory_does_not_grow_with_the_data_set(tmp_path: Path) -> None:
    """A thousand JPEGs of 224 x 224 are 575 MB as float32, 144 MB as uint8. Blocks of more than a
    megabyte go back to the system when they are freed: glibc would keep some of them in its heap,
    and the peak would be a matter of luck.
    """
    noise = np.random.default_rng(0).integers(0, 256, (14, 14, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).resize((224, 224)).save(buffer, "JPEG")
    for split, n in (("train", 1000), ("val", 1)):
        (tmp_path / split / "a").mkdir(parents=True)
        for i in range(n):
            (tmp_path / split / "a" / f"{i}.jpg").write_bytes(buffer.getvalue())
    env = {"PYTHONPATH": str(Path(pyadv.__file__).parents[1]), "MALLOC_MMAP_THRESHOLD_": "1000000"}
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **env, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    print(found)
    assert found["seen"] == 1000 and found["set"] > 570
    assert found["main"] < 100  # MB: float32 copies of a batch of 9 MB, and uint8 ones waiting
    assert found["worker"] < 100


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
