"""The pictures' colours differ for colour-blind readers, and their lines in grey print."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

pytest.importorskip("matplotlib")
from matplotlib.colors import to_rgb

from pyadv import _plot_style as style

# Machado, Oliveira and Fernandes (2009), severity 1, on linear RGB.
KINDS = {
    "all colours": np.eye(3),
    "protanopia": np.array(
        [
            [0.152286, 1.052583, -0.204868],
            [0.114503, 0.786281, 0.099216],
            [-0.003882, -0.048116, 1.051998],
        ]
    ),
    "deuteranopia": np.array(
        [
            [0.367322, 0.860646, -0.227968],
            [0.280085, 0.672501, 0.047413],
            [-0.011820, 0.042940, 0.968881],
        ]
    ),
    "tritanopia": np.array(
        [
            [1.255528, -0.076749, -0.178779],
            [-0.078411, 0.930809, 0.147602],
            [0.004733, 0.691367, 0.303900],
        ]
    ),
}
XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def lab(colour: str, kind: str) -> np.ndarray:
    """Return the colour that a reader sees, in CIE L*a*b*."""
    rgb = np.array(to_rgb(colour))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    seen = (KINDS[kind] @ linear).clip(0, 1)
    t = XYZ @ seen / np.array([0.9505, 1.0, 1.089])
    f = np.where(t > 0.008856, np.cbrt(t), 7.787 * t + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("kind", KINDS)
def test_colours_differ_for_every_reader(kind):
    names = ("BLUE", "RED", "GREEN", "PURPLE", "GOLD", "GREY")
    for a, b in itertools.combinations(names, 2):
        distance = np.linalg.norm(lab(getattr(style, a), kind) - lab(getattr(style, b), kind))
        assert distance > 16, (a, b, distance)


def test_lines_differ_without_colours():
    lines = [style.line(i) for i in range(6)]
    for key in ("color", "linestyle", "marker"):
        assert len({line[key] for line in lines}) == 6
    assert style.line(6) == lines[0]
