"""Adds the op `shrink` to a copy of this repository: docs/extending/op.md, as a program.

    python examples/op/add.py FOLDER

The op's new files lie beside this one, at their places in the tree. LINES holds what existing files
gain.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent.parent
COPIED = ("csrc", "pyadv", "tests", "benchmarks", "docs", "mkdocs.yml", "pyproject.toml")

# (file, an existing line, lines that follow it)
LINES = (
    (
        "pyadv/reference/__init__.py",
        "from pyadv.reference.geometry import track",
        "from pyadv.reference.shrink import shrink",
    ),
    ("pyadv/reference/__init__.py", "__all__ = [", '    "shrink",'),
    (
        "pyadv/ops/__init__.py",
        "from pyadv.ops.projections import l1_project, l2_project, linf_project",
        "from pyadv.ops.shrink import shrink",
    ),
    ("pyadv/ops/__init__.py", "__all__ = [", '    "shrink",'),
    ("csrc/ops_cpu.cpp", '#include "glue/projections.h"', '#include "glue/shrink.h"'),
    (
        "csrc/ops_cpu.cpp",
        "  pyadv::register_projections(m);",
        "  pyadv::register_shrink(m);",
    ),
    ("csrc/cpu/kernels.h", '#include "common/norms.h"', '#include "common/shrink.h"'),
    (
        "csrc/cpu/kernels.h",
        "void l1_project(const ProjectionArgs& args, int64_t begin, int64_t end);",
        "void shrink(const ShrinkArgs& args, int64_t begin, int64_t end);",
    ),
    ("csrc/ops_cuda.cpp", '#include "glue/projections.h"', '#include "glue/shrink.h"'),
    (
        "csrc/ops_cuda.cpp",
        "  pyadv::register_projections(m);",
        "  pyadv::register_shrink(m);",
    ),
    ("csrc/cuda/kernels.h", '#include "common/norms.h"', '#include "common/shrink.h"'),
    (
        "csrc/cuda/kernels.h",
        "int l1_project(const ProjectionArgs& args, void* stream);",
        "int shrink(const ShrinkArgs& args, void* stream);",
    ),
    (
        "benchmarks/ops.py",
        "    yield from _noise(one, options)",
        """\
    x = torch.randn(one, device=options.device)
    yield _against_reference("Shrink", _case("shrink", one), "shrink", (x, 0.5), 2 * x.nbytes)""",
    ),
    (
        "benchmarks/gpu_kernels.py",
        "            make = functools.partial(Kernel, shape=shape, dtype=dtype)",
        '            yield make("Shrink", "shrink", moved=2, share=0.9)',
    ),
    (
        "benchmarks/gpu_kernels.py",
        '    arguments = {"row_hash": (x,), "keyed_uniform": (x, ids, 0, 0), '
        '"keyed_normal": (x, ids, 0, 0)}',
        '    arguments["shrink"] = (x, 0.5)',
    ),
    (
        "docs/ops/index.md",
        "| [projections](projections.md) | `linf_project`, `l2_project`, `l1_project` |",
        "| [shrink](shrink.md) | `shrink` |",
    ),
    (
        "mkdocs.yml",
        "      - Projections: ops/projections.md",
        "      - Shrink: ops/shrink.md",
    ),
)


def new_files() -> list[Path]:
    """Return the op's own files, relative to the root of the tree."""
    found = (path.relative_to(HERE) for path in HERE.rglob("*") if path.is_file())
    return sorted(path for path in found if len(path.parts) > 1 and "__pycache__" not in path.parts)


def add(folder: Path) -> None:
    """Copy the repository's sources to `folder` and add the op there.

    Raises:
        ValueError: a line that the op's lines follow is not in its file exactly once.
    """
    ignored = shutil.ignore_patterns("__pycache__", "*.so", "results", "images")
    for name in COPIED:
        source = REPOSITORY / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=ignored)
        else:
            shutil.copy2(source, folder / name)
    for path in new_files():
        shutil.copy2(HERE / path, folder / path)
    for name, after, added in LINES:
        lines = (folder / name).read_text().splitlines()
        if lines.count(after) != 1:
            raise ValueError(f"{name} must hold this line once, not {lines.count(after)}: {after}")
        lines.insert(lines.index(after) + 1, added)
        (folder / name).write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    add(Path(sys.argv[1]))
