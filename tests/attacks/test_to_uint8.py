"""to_uint8 rounds to the grid and stays within the ball."""

from __future__ import annotations

import pytest
import torch

from pyadv.attacks import to_uint8

P = {"Linf": torch.inf, "L2": 2, "L1": 1}


@pytest.fixture
def images(device):
    return torch.randint(0, 256, (16, 3, 6, 6), device=device, dtype=torch.uint8)


def distance(a, b, norm):
    return torch.linalg.vector_norm((a.double() - b.double()).flatten(1), P[norm], dim=1)


@pytest.mark.parametrize("norm, eps", [("Linf", 8 / 255), ("L2", 0.5), ("L1", 12.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_stays_in_the_ball(norm, eps, dtype, images):
    x = images.to(dtype) / 255
    direction = torch.randn_like(x)
    length = torch.linalg.vector_norm(direction.flatten(1), P[norm], dim=1)
    x_adv = (x + eps * direction / length[:, None, None, None]).clamp(0, 1)
    export = to_uint8(x_adv, x, eps, norm)
    assert export.dtype == torch.uint8 and export.device == x.device
    assert (distance(export, images, norm) <= 255 * eps + 1e-3).all()
    assert (export.double() - 255 * x_adv.double()).abs().max() < 1 + 1e-3


def test_truncation_would_leave_the_ball(images):
    """Truncation, as other libraries do it, moves by 9 levels for eps = 8 / 255; to_uint8 does
    not."""
    x = images.float() / 255
    x_adv = (x - 8 / 255).clamp(0, 1) - 1e-8 * (x > 0.1)
    assert distance((255 * x_adv).byte(), images, "Linf").max() == 9
    assert distance(to_uint8(x_adv, x, 8 / 255), images, "Linf").max() == 8


def test_clean_images_come_back(images):
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        x = images.to(dtype) / 255
        # bfloat16 cannot hold 256 levels, so the result equals its own rounding
        if dtype == torch.bfloat16:
            assert torch.equal(to_uint8(x, x, 0.0), (255 * x.double()).round().byte())
        else:
            assert torch.equal(to_uint8(x, x, 0.0), images)


def test_radius_between_levels_and_per_sample(images):
    x = images.float() / 255
    eps = torch.linspace(0, 10.5 / 255, 16, device=x.device)
    x_adv = (x + eps[:, None, None, None]).clamp(0, 1)
    steps = distance(to_uint8(x_adv, x, eps), images, "Linf")
    assert (steps <= (255 * eps.double() + 1e-3).floor()).all()
    assert steps[-1] == 10


@pytest.mark.parametrize("size", [0, 1])
def test_small_batches(size, images):
    x = images[:size].float() / 255
    assert torch.equal(to_uint8(x, x, 0.1, "L2"), images[:size])


def test_refuses(images):
    x = images.float() / 255
    with pytest.raises(ValueError, match="x must be an 8-bit image"):
        to_uint8(x, x * 0.5, 1.0)
    with pytest.raises(ValueError, match="x must be an 8-bit image"):
        to_uint8(x, 255 * x, 1.0)
    with pytest.raises(ValueError, match=r"x_adv must lie in \[0, 1\]"):
        to_uint8(x + 1, x, 2.0)
    with pytest.raises(ValueError, match=r"x_adv must lie in \[0, 1\]"):
        to_uint8(x * float("nan"), x, 2.0)
    for norm in P:
        with pytest.raises(ValueError, match=f"within eps of x in {norm}"):
            to_uint8(1 - x, x, 0.01, norm)
    with pytest.raises(ValueError, match="shape of x_adv"):
        to_uint8(x, x[:1], 0.1)
    with pytest.raises(ValueError, match="eps must be a finite number"):
        to_uint8(x, x, -1.0)
