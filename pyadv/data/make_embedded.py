"""Make the embedded data set from the full Fashion-MNIST idx files.

`python -m pyadv.data.make_embedded DIR` reads the four `*-ubyte.gz` files of the distribution in
DIR, keeps the first images of each split and writes idx files, compressed with xz, beside this
module. On these images xz alone is smaller than xz after PNG-like row prediction or in
pixel-major order, so the bytes have no further encoding.
"""

from __future__ import annotations

import argparse
import lzma
from pathlib import Path

import numpy as np

from pyadv.data.sources import find_idx, read_idx

SIZES = {"train": 10_000, "test": 2_000}
TARGET = Path(__file__).parent / "fashion_mini"


def make(source: Path, target: Path = TARGET) -> list[Path]:
    """Write the four files of the embedded set from the idx files in `source`; return their
    paths."""
    target.mkdir(parents=True, exist_ok=True)
    written = []
    for split, n in SIZES.items():
        for kind in ("images", "labels"):
            path = find_idx(source, split, kind)
            values = read_idx(path)[:n].numpy()
            header = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">u4").tobytes()
            out = target / (path.name.removesuffix(path.suffix) + ".xz")
            out.write_bytes(
                lzma.compress(header + values.tobytes(), preset=9 | lzma.PRESET_EXTREME)
            )
            written.append(out)
    return written


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="folder of the Fashion-MNIST idx files")
    for path in make(parser.parse_args().source):
        print(f"{path}: {path.stat().st_size:,} bytes")
