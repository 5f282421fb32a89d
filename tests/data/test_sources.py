"""Every reader reads files of its format and refuses others with a clear error."""

from __future__ import annotations

import gzip
import io
import lzma
import pickle
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from pyadv.data import load
from pyadv.data.make_embedded import SIZES, TARGET, make
from pyadv.data.sources import read_idx

FASHION = Path("/usr/share/datasets/fashion-mnist")  # the folder of the Debian package


def idx(values: np.ndarray) -> bytes:
    header = bytes([0, 0, 8, values.ndim])
    return header + np.array(values.shape, ">u4").tobytes() + values.astype(np.uint8).tobytes()


def write_idx_folder(folder: Path, suffix: str, compress) -> None:
    for stem, n in (("train", 7), ("t10k", 3)):
        images = np.arange(n * 20).reshape(n, 4, 5)
        (folder / f"{stem}-images-idx3-ubyte{suffix}").write_bytes(compress(idx(images)))
        (folder / f"{stem}-labels-idx1-ubyte{suffix}").write_bytes(compress(idx(np.arange(n) % 3)))


def test_embedded_set_is_whole() -> None:
    data = load()
    assert data.name == "fashion-mini" and len(data.classes) == 10 and data.shape == (1, 28, 28)
    assert len(data.train_y) == 10_000 and len(data.test_y) == 2_000
    assert data.train_y.bincount().min() > 900 and data.test_y.bincount().min() > 180
    assert data.train_x.min() == 0 and data.train_x.max() == 1
    assert data.train_x.mean().item() == pytest.approx(0.2863, abs=1e-3)
    assert data.classes[data.test_y[0]] == "ankle boot"
    assert sum(f.stat().st_size for f in TARGET.iterdir()) < 5e6
    assert (TARGET / "LICENSE").exists()


def test_embedded_set_is_made_by_its_script(tmp_path: Path) -> None:
    if not FASHION.is_dir():
        pytest.skip("dataset-fashion-mnist is not installed")
    for stem in ("train-labels-idx1-ubyte", "t10k-labels-idx1-ubyte"):
        (tmp_path / f"{stem}.gz").write_bytes((FASHION / f"{stem}.gz").read_bytes())
    full = read_idx(FASHION / "t10k-images-idx3-ubyte.gz")
    assert torch.equal(read_idx(TARGET / "t10k-images-idx3-ubyte.xz"), full[: SIZES["test"]])
    for stem in ("train", "t10k"):  # few images, because compressing all of them takes seconds
        small = gzip.compress(idx(np.zeros((5, 2, 2))))
        (tmp_path / f"{stem}-images-idx3-ubyte.gz").write_bytes(small)
    made = make(tmp_path, tmp_path / "out")
    labels = next(p for p in made if "train-labels" in p.name)
    assert labels.read_bytes() == (TARGET / labels.name).read_bytes()


@pytest.mark.parametrize(
    ("suffix", "compress"), [("", bytes), (".gz", gzip.compress), (".xz", lzma.compress)]
)
def test_idx_folder(tmp_path: Path, suffix: str, compress) -> None:
    write_idx_folder(tmp_path, suffix, compress)
    data = load(tmp_path)
    assert data.shape == (1, 4, 5) and data.classes == ("0", "1", "2")
    assert data.train_x[2, 0, 1, 3].item() == pytest.approx((2 * 20 + 8) / 255)
    assert data.test_y.tolist() == [0, 1, 2]


def test_broken_idx_files(tmp_path: Path) -> None:
    path = tmp_path / "x-ubyte"
    path.write_bytes(b"GIF89a")
    with pytest.raises(ValueError, match="is not an idx file"):
        read_idx(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="is not an idx file"):
        read_idx(path)
    path.write_bytes(idx(np.zeros((3, 2, 2)))[:-1])
    with pytest.raises(ValueError, match=r"header says shape \[3, 2, 2\], it holds 11 bytes"):
        read_idx(path)
    write_idx_folder(tmp_path, "", bytes)
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(FileNotFoundError, match="lacks t10k-labels-idx1-ubyte"):
        load(tmp_path)


def write_pickle(path: Path, value: object) -> None:
    path.write_bytes(pickle.dumps(value, protocol=2))


def cifar_batch(n: int, key: bytes, start: int = 0) -> dict:
    data = np.random.default_rng(start).integers(0, 256, (n, 3072), dtype=np.uint8)
    return {b"data": data, key: [(start + i) % 3 for i in range(n)]}


def test_cifar_folders(tmp_path: Path) -> None:
    ten, hundred = tmp_path / "ten", tmp_path / "hundred"
    ten.mkdir(), hundred.mkdir()
    for i in range(1, 6):
        write_pickle(ten / f"data_batch_{i}", cifar_batch(2, b"labels", i))
    write_pickle(ten / "test_batch", cifar_batch(3, b"labels"))
    write_pickle(ten / "batches.meta", {b"label_names": [b"plane", b"car", b"bird"]})
    write_pickle(hundred / "train", cifar_batch(4, b"fine_labels"))
    write_pickle(hundred / "test", cifar_batch(2, b"fine_labels"))
    write_pickle(hundred / "meta", {b"fine_label_names": ["apple", "bear", "crab"]})

    data = load(ten)
    assert data.name == "cifar10" and data.classes == ("plane", "car", "bird")
    assert data.train_x.shape == (10, 3, 32, 32) and data.train_y.tolist()[:4] == [1, 2, 2, 0]
    raw = cifar_batch(2, b"labels", 1)[b"data"]
    assert data.train_x[0, 2, 3, 4].item() == pytest.approx(raw[0, 2 * 1024 + 3 * 32 + 4] / 255)
    assert load(hundred).classes == ("apple", "bear", "crab")


def test_pickles_cannot_run_code(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self):
            return print, ("run",)

    for i in range(1, 6):
        write_pickle(tmp_path / f"data_batch_{i}", {b"data": Evil()})
    write_pickle(tmp_path / "batches.meta", {b"label_names": [b"plane"]})
    with pytest.raises(ValueError, match="data_batch_1 .*print is not part of a CIFAR batch"):
        load(tmp_path)


def cifar_folder(folder: Path) -> None:
    for i in range(1, 6):
        write_pickle(folder / f"data_batch_{i}", cifar_batch(2, b"labels", i))
    write_pickle(folder / "test_batch", cifar_batch(3, b"labels"))
    write_pickle(folder / "batches.meta", {b"label_names": [b"plane", b"car", b"bird"]})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps(cifar_batch(2, b"labels"))[:-100], "may be damaged"),
        (b"", "may be damaged"),
        (pickle.dumps([1, 2]), "may be damaged"),
        (pickle.dumps({b"data": np.zeros((2, 3072), np.uint8)}), "it lacks labels"),
        (pickle.dumps({**cifar_batch(2, b"labels"), b"labels": [0]}), "as many, got 2 and 1"),
        (pickle.dumps({**cifar_batch(2, b"labels"), b"labels": [0, 2**62]}), "saw .*461168601842"),
        (pickle.dumps({**cifar_batch(2, b"labels"), b"labels": [0, 2**64]}), "class numbers"),
        (pickle.dumps({**cifar_batch(2, b"labels"), b"labels": ["a", "b"]}), "class numbers"),
        (pickle.dumps({**cifar_batch(2, b"labels"), b"data": b"short"}), "data_batch_3 cannot be"),
    ],
)
def test_broken_cifar_batches(tmp_path: Path, content: bytes, message: str) -> None:
    cifar_folder(tmp_path)
    (tmp_path / "data_batch_3").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load(tmp_path)
    (tmp_path / "data_batch_3").unlink()
    with pytest.raises(FileNotFoundError, match="data_batch_3"):
        load(tmp_path)


@pytest.mark.parametrize("suffix", [".gz", ".xz", ""])
def test_truncated_idx_files(tmp_path: Path, suffix: str) -> None:
    compress = {".gz": gzip.compress, ".xz": lzma.compress, "": bytes}[suffix]
    write_idx_folder(tmp_path, suffix, compress)
    path = tmp_path / f"train-images-idx3-ubyte{suffix}"
    whole = path.read_bytes()
    for content in (whole[:-20], whole[: len(whole) // 2], b"no such format"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="train-images-idx3-ubyte"):
            load(tmp_path)


def test_idx_files_that_do_not_fit_together(tmp_path: Path) -> None:
    write_idx_folder(tmp_path, "", bytes)
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(idx(np.arange(4)))
    with pytest.raises(ValueError, match="t10k-images.* and .*t10k-labels.* as many, got 3 and 4"):
        load(tmp_path)


HUGE = 2**62


@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize(
    ("largest", "dtype", "message"),
    [
        (HUGE, np.int64, rf"labels must lie in \[0, 100,000\), saw {HUGE}: number the classes"),
        (100_000, np.int64, r"labels must lie in \[0, 100,000\), saw 100000"),
        (2**64 - 1, np.uint64, "labels must be class numbers, got 18446744073709551615"),
        (-1, np.int64, r"must lie in \[0, 5\), saw \[-1, 4\]"),
    ],
)
def test_labels_that_are_no_class_numbers(
    tmp_path: Path, split: bool, largest: int, dtype: type, message: str
) -> None:
    """Labels that are not class numbers are refused: class names up to 2^62 would fill the
    memory."""
    x, y = np.zeros((10, 4, 4), np.uint8), np.array([0, 1, 2, 3, 4] * 2, dtype)
    y[0] = largest
    arrays = {"x_train": x, "y_train": y, "x_test": x[:2], "y_test": y[1:3]}
    np.savez(tmp_path / "a.npz", **(arrays if split else {"x": x, "y": y}))
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "a.npz")


def test_as_many_classes_as_the_largest_label_says(tmp_path: Path) -> None:
    x, y = np.zeros((10, 4, 4), np.uint8), np.arange(10)
    y[3] = 99_999
    np.savez(tmp_path / "a.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    assert len(load(tmp_path / "a.npz").classes) == 100_000


def npz(path: Path, **changes: np.ndarray) -> Path:
    x, y = np.zeros((10, 4, 4), np.uint8), np.arange(10)
    np.savez(path, **{"x_train": x, "y_train": y, "x_test": x, "y_test": y, **changes})
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"y_train": np.arange(9)}, "training images of .* and labels must be as many.* 10 and 9"),
        ({"x_test": np.zeros((7, 4, 4), np.uint8)}, "test images of .*as many, got 7 and 10"),
        ({"x_train": np.zeros((10, 4, 4), complex)}, "x of a.npz must be uint8 or floating"),
        ({"x_train": np.zeros((10, 4, 4), bool)}, "x of a.npz must be uint8 or floating"),
        ({"x_train": np.zeros((10, 4, 4), "U1")}, "x of a.npz must be uint8 or floating"),
        ({"x_train": np.zeros((10, 4, 4), object)}, "cannot be read"),
        ({"x_train": np.uint8(1)}, "must be"),
        ({"x_train": np.full((10, 4, 4), np.inf)}, r"must lie in \[0, 1\]"),
    ],
)
def test_npz_files_with_wrong_arrays(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(npz(tmp_path / "a.npz", **changes))


def test_npz_without_a_split_must_fit(tmp_path: Path) -> None:
    for x, y, message in (
        (np.zeros((10, 4, 4), np.uint8), np.arange(9), "as many, got 10 and 9"),
        (np.uint8(1), np.arange(9), "must be arrays"),
    ):
        np.savez(tmp_path / "a.npz", x=x, y=y)
        with pytest.raises(ValueError, match=message):
            load(tmp_path / "a.npz")


@pytest.mark.parametrize("dtype", [">f4", "<f4", "f2", "f8", "longdouble"])
def test_every_kind_of_float_is_read(tmp_path: Path, dtype: str) -> None:
    data = load(npz(tmp_path / "a.npz", x_train=np.full((10, 4, 4), 0.5, dtype)))
    assert data.train_x.dtype == torch.float32 and (data.train_x == 0.5).all()


def test_damaged_npz_files(tmp_path: Path) -> None:
    whole = npz(tmp_path / "a.npz").read_bytes()
    array = io.BytesIO()
    np.save(array, np.zeros(3))
    for content in (whole[:-30], whole[:200], b"", b"text", array.getvalue()):
        (tmp_path / "a.npz").write_bytes(content)
        with pytest.raises(ValueError, match="a.npz cannot be read"):
            load(tmp_path / "a.npz")


def test_npz_with_a_split(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (10, 6, 7, 3), dtype=np.uint8)
    y = rng.integers(0, 4, (10, 1))  # the shape in which Keras stores CIFAR labels
    np.savez(tmp_path / "a.npz", x_train=x[:6], y_train=y[:6], x_test=x[6:], y_test=y[6:])
    data = load(tmp_path / "a.npz")
    assert data.name == "a" and data.shape == (3, 6, 7)
    assert np.array_equal((data.test_x.permute(0, 2, 3, 1) * 255).round().numpy(), x[6:])
    assert data.train_y.tolist() == y[:6, 0].tolist()


def test_npz_without_a_split_holds_a_fifth_out(tmp_path: Path) -> None:
    x = (np.arange(10 * 16).reshape(10, 4, 4) / 160).astype(np.float32)
    np.savez(tmp_path / "b.npz", x=x, y=np.arange(10) % 2)
    first, again = load(tmp_path / "b.npz"), load(tmp_path / "b.npz")
    assert first.name == "b (random fifth held out)"
    assert len(first.train_y) == 8 and len(first.test_y) == 2
    assert torch.equal(first.test_x, again.test_x)
    pixels = torch.cat([first.train_x, first.test_x])[:, 0, 0, 0]
    assert pixels.sort()[0].tolist() == pytest.approx(x[:, 0, 0].tolist())


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": np.zeros(3)}, r"must hold .* it holds \['images'\]"),
        ({"x": np.zeros((5, 4, 4)), "y": np.zeros(5)}, "y of c.npz must be integer"),
        ({"x": np.full((5, 4, 4), 255.0), "y": np.zeros(5, int)}, "store uint8, or divide by 255"),
        ({"x": np.zeros((5, 3, 4, 3)), "y": np.zeros(5, int)}, "pass layout="),
    ],
)
def test_bad_npz(tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    np.savez(tmp_path / "c.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "c.npz")


def test_unknown_sources(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="'cifar11' is neither a path nor one of fashion"):
        load("cifar11")
    with pytest.raises(ValueError, match="is no .npz file, and no folder of idx files"):
        load(tmp_path)
    with pytest.raises(FileNotFoundError, match="'~nouser/x.npz' is neither a path nor one of"):
        load("~nouser/x.npz")


def test_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    npz(tmp_path / "a.npz")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load("~/a.npz").name == "a"


def test_torchvision_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(ImportError, match=r"pip install 'pyadv\[vision\]'"):
        load("cifar10")


def test_torchvision_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchvision's data sets have two kinds of arguments; the stand-ins have the same two."""

    class CIFAR10:
        classes = ("plane", "car")

        def __init__(self, root: str, train: bool, download: bool) -> None:
            n = 4 if train else 2
            self.data = np.full((n, 32, 32, 3), 51, np.uint8)
            self.targets = [i % 2 for i in range(n)]

    class SVHN:
        def __init__(self, root: str, split: str, download: bool) -> None:
            n = 4 if split == "train" else 2
            self.data = np.full((n, 3, 32, 32), 51, np.uint8)
            self.labels = np.arange(n) % 2

    module = types.ModuleType("torchvision")
    module.datasets = types.SimpleNamespace(CIFAR10=CIFAR10, SVHN=SVHN)
    monkeypatch.setitem(sys.modules, "torchvision", module)
    for name, classes in (("cifar10", ("plane", "car")), ("svhn", ("0", "1"))):
        data = load(name)
        assert data.name == name and data.classes == classes and data.shape == (3, 32, 32)
        assert data.train_x[0, 0, 0, 0].item() == pytest.approx(0.2)
        assert data.train_y.tolist() == [0, 1, 0, 1] and len(data.test_y) == 2
