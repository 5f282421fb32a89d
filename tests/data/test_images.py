"""ImageData refuses invalid data and converts pixels to one layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pyadv.data import ImageData, to_images


def dataset(**changes: Any) -> ImageData:
    parts = {
        "name": "toy",
        "classes": ("a", "b", "c"),
        "train_x": torch.rand(6, 1, 4, 5),
        "train_y": torch.tensor([0, 1, 2, 0, 1, 2]),
        "test_x": torch.rand(3, 1, 4, 5),
        "test_y": torch.tensor([0, 1, 2]),
    }
    return ImageData(**{**parts, **changes})


def with_pixel(value: float) -> torch.Tensor:
    x = torch.rand(6, 1, 4, 5)
    x[3, 0, 1, 2] = value
    return x


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_x": with_pixel(float("nan"))}, r"train_x must lie in \[0, 1\], saw NaN"),
        ({"train_x": with_pixel(1.5)}, r"train_x must lie in \[0, 1\], saw .*1\.5"),
        ({"train_x": with_pixel(-0.1)}, r"train_x must lie in \[0, 1\], saw \[-0\.1"),
        ({"train_x": torch.rand(6, 4, 5)}, r"train_x must be a non-empty \(N, C, H, W\)"),
        ({"train_x": torch.rand(6, 1, 4, 5).double()}, "train_x must be float32"),
        ({"train_x": torch.rand(6, 1, 5, 5)}, r"one shape, got \(1, 5, 5\) and \(1, 4, 5\)"),
        ({"test_x": torch.rand(0, 1, 4, 5), "test_y": torch.zeros(0, dtype=int)}, "non-empty"),
        ({"test_y": torch.tensor([0, 1, 3])}, r"test_x must lie in \[0, 3\), saw \[0, 3\]"),
        ({"test_y": torch.tensor([0, 1, -1])}, r"test_x must lie in \[0, 3\), saw \[-1, 1\]"),
        ({"test_y": torch.tensor([0, 1])}, r"test_x must be int64 of shape \(3,\)"),
        ({"test_y": torch.tensor([0.0, 1.0, 2.0])}, "test_x must be int64"),
    ],
)
def test_bad_data_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataset(**changes)


def test_hold_out_splits_the_training_set_once() -> None:
    data = dataset(train_x=torch.rand(6, 1, 4, 5))
    kept, held = data.hold_out(2, seed=1)
    assert len(kept) == 4 and len(held) == 2
    assert torch.equal(torch.cat([kept, held]).sort().values, torch.arange(6))
    x, y = data.samples("train", held)
    assert torch.equal(x, data.train_x[held]) and torch.equal(y, data.train_y[held])
    assert torch.equal(kept, data.hold_out(2, seed=1)[0])
    assert len(data.hold_out(0)[0]) == 6
    with pytest.raises(ValueError, match=r"val must lie in \[0, 6\)"):
        data.hold_out(6)


def test_layouts_agree() -> None:
    nchw = torch.randint(256, (2, 3, 4, 5), dtype=torch.uint8)
    nhwc = nchw.permute(0, 2, 3, 1)
    assert torch.equal(to_images("x", nchw), to_images("x", nhwc))
    assert torch.equal(to_images("x", nchw), nchw.float() / 255)
    assert to_images("x", nchw[:, 0]).shape == (2, 1, 4, 5)
    assert to_images("x", nhwc).is_contiguous()


def test_floating_pixels_stay() -> None:
    x = torch.rand(2, 1, 4, 5, dtype=torch.float64)
    assert torch.equal(to_images("x", x), x.float())


@pytest.mark.parametrize("shape", [(2, 3, 8, 3), (2, 1, 8, 1), (2, 1, 8, 3)])
def test_ambiguous_layout_must_be_named(shape: tuple[int, ...]) -> None:
    x = torch.rand(shape)
    with pytest.raises(ValueError, match="both axis 1 and axis 3 .* pass layout="):
        to_images("x", x)
    assert to_images("x", x, "NHWC").shape == (2, shape[3], shape[1], 8)
    assert to_images("x", x, "NCHW").shape == shape


def test_impossible_layouts() -> None:
    with pytest.raises(ValueError, match="neither axis 1 nor axis 3"):
        to_images("x", torch.rand(2, 4, 8, 5))
    with pytest.raises(ValueError, match=r"must be \(N, H, W\), NCHW or NHWC"):
        to_images("x", torch.rand(2, 4))
    with pytest.raises(ValueError, match=r"uint8 or floating in \[0, 1\], got torch.int64"):
        to_images("x", torch.ones(2, 3, 4, 5, dtype=torch.int64))
    with pytest.raises(ValueError, match="layout must be"):
        to_images("x", torch.rand(2, 3, 4, 5), "CHW")
