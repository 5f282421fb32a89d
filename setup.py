"""Ships the C++ sources and the benchmarks in the package and, where PyTorch is there, compiles
the sources ahead of time.

`pip install .` builds in isolation, without PyTorch: it installs sources, the first use compiles
them. `pip install --no-build-isolation .` compiles now, against the installed PyTorch;
PYADV_NATIVE=0 in the environment keeps it from that, and PYADV_CUDA=auto|0|1 decides about CUDA.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


def load_build():
    """pyadv/_build.py by its path: importing pyadv itself would need PyTorch."""
    spec = importlib.util.spec_from_file_location("pyadv_build", ROOT / "pyadv" / "_build.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class ShipSources(build_py):
    """Adds csrc to the package as pyadv/_csrc, and what `pyadv bench` runs as pyadv/_benchmarks; an
    editable install finds both in the checkout."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            only_code = shutil.ignore_patterns("results", "__pycache__")
            for name in ("csrc", "benchmarks"):
                target = Path(self.build_lib, "pyadv", f"_{name}")
                shutil.rmtree(target, ignore_errors=True)  # a file that was deleted must not linger
                shutil.copytree(ROOT / name, target, ignore=only_code)


class CompileAhead(build_ext):
    """Compiles with ninja, not with the compiler flags that Python itself was built with. The
    objects stay in build/native, so that an editable build compiles only what has changed."""

    built: list[Path]

    def run(self) -> None:
        package = ROOT / "pyadv" if self.inplace else Path(self.build_lib, "pyadv").absolute()
        package.mkdir(parents=True, exist_ok=True)
        self.built = load_build().build_ahead(ROOT / "csrc", package, ROOT / "build" / "native")

    def get_outputs(self) -> list[str]:
        return [str(path) for path in self.built]

    def get_output_mapping(self) -> dict[str, str]:
        return {}

    def get_source_files(self) -> list[str]:
        return [str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*")]


ahead = os.environ.get("PYADV_NATIVE") != "0" and importlib.util.find_spec("torch") is not None
if not ahead:
    print("pyadv: sources only; the first use compiles them", file=sys.stderr)

setup(
    # An extension without sources: it only tells setuptools that the wheel holds binaries.
    ext_modules=[Extension("pyadv._C", [])] if ahead else [],
    cmdclass={"build_py": ShipSources, "build_ext": CompileAhead},
)
