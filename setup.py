"""Put the C++ sources and the benchmarks into the package and, if PyTorch is installed, compile
the sources ahead of time.

`pip install .` builds in isolation, without PyTorch. It installs the sources, and the first use
compiles them. `pip install --no-build-isolation .` compiles now, against the installed PyTorch,
unless PYADV_NATIVE=0 is set. PYADV_CUDA=auto|0|1 decides about the CUDA kernels.
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
    """Load pyadv/_build.py by its path, because importing pyadv itself would need PyTorch."""
    spec = importlib.util.spec_from_file_location("pyadv_build", ROOT / "pyadv" / "_build.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class ShipSources(build_py):
    """A build_py that also copies csrc to pyadv/_csrc and benchmarks to pyadv/_benchmarks, for
    compiling at the first use and for `pyadv bench`. An editable install finds both in the
    checkout."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            only_code = shutil.ignore_patterns("results", "__pycache__")
            for name in ("csrc", "benchmarks"):
                target = Path(self.build_lib, "pyadv", f"_{name}")
                shutil.rmtree(target, ignore_errors=True)  # deleted files must not stay
                shutil.copytree(ROOT / name, target, ignore=only_code)


class CompileAhead(build_ext):
    """A build_ext that compiles with ninja instead of Python's own compiler flags. Objects stay in
    build/native, so that an editable build compiles only what has changed."""

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
    # An extension without sources only tells setuptools that the wheel holds binaries.
    ext_modules=[Extension("pyadv._C", [])] if ahead else [],
    cmdclass={"build_py": ShipSources, "build_ext": CompileAhead},
)
