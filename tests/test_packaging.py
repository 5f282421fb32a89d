"""The builds of pip: a wheel of sources, a compiled wheel, an editable install."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from pyadv import _build
from pyadv._version import __version__

ROOT = Path(_build.__file__).parent.parent
# find_spec("pip") would make setuptools give distutils back to the standard library, and
# torch.compile would then fail in every later test.
HAS_PIP = any(importlib.metadata.distributions(name="pip"))
pytestmark = [
    pytest.mark.build,
    pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="not a checkout"),
    pytest.mark.skipif(not HAS_PIP, reason="needs pip"),
]


def small_tree(folder: Path) -> Path:
    """Copy the checkout with a small csrc, so that compiling takes a second."""
    copy_tree(folder, "csrc")
    (folder / "csrc" / "cpu").mkdir(parents=True)
    (folder / "csrc" / "ops_cpu.cpp").write_text("int one();\nint two() { return one(); }\n")
    (folder / "csrc" / "cpu" / "one.cpp").write_text("int one() { return 1; }\n")
    shutil.copy(ROOT / "csrc" / "module.cpp", folder / "csrc")
    return folder


def copy_tree(folder: Path, *without: str) -> None:
    made = (".*", "build", "dist", "*.egg-info", "__pycache__", "*.so", *without)
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*made))


def pip(*arguments: object, cwd: Path, **env: str) -> None:
    command = [sys.executable, "-m", "pip", *map(str, arguments), "--no-deps", "-v"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYADV_")}
    environment |= {"PYADV_CUDA": "0", **env}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def wheel_of(tree: Path, target: Path, **env: str) -> zipfile.ZipFile:
    pip("wheel", "--no-build-isolation", "-w", target, tree, cwd=target.parent, **env)
    (path,) = target.glob("*.whl")
    return zipfile.ZipFile(path)


def use(folder: Path, cache: Path, *, native: str = "1") -> str:
    """Return where the kernels of the pyadv in `folder` come from when there is no compiler."""
    code = (
        f"import sys; sys.path.insert(0, {str(folder)!r})\n"
        "import pyadv\nfrom pyadv import _native\n"
        f"assert pyadv.__file__.startswith({str(folder)!r}), pyadv.__file__\n"
        "print(_native.load().cpu.source)"
    )
    env = os.environ | {"CXX": "/nonexistent", "PYADV_NATIVE": native, "PYADV_CUDA": "0"}
    env |= {"PYADV_CACHE_DIR": str(cache)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=cache.parent,
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an unpacked wheel that was compiled ahead of time, beside its source tree."""
    folder = tmp_path_factory.mktemp("compiled")
    with wheel_of(small_tree(folder / "checkout"), folder / "wheels") as wheel:
        assert "py3-none-any" not in wheel.filename
        wheel.extractall(folder / "site")
    return folder / "site"


def test_wheel_of_sources_holds_everything(tmp_path):
    """PYADV_NATIVE=0 stands for a build in isolation, where PyTorch is missing."""
    tree = tmp_path / "checkout"
    copy_tree(tree)
    with wheel_of(tree, tmp_path / "wheels", PYADV_NATIVE="0") as wheel:
        names = set(wheel.namelist())
        assert wheel.filename.endswith(f"pyadv-{__version__}-py3-none-any.whl")
    sources = {p.relative_to(tree) for p in (tree / "csrc").rglob("*") if p.is_file()}
    shipped = {name for name in names if name.startswith("pyadv/_csrc/")}
    assert shipped == {f"pyadv/_{name.as_posix()}" for name in sources}
    scripts = {f"pyadv/_benchmarks/{p.name}" for p in (tree / "benchmarks").glob("*.py")}
    assert scripts and scripts <= names and not any("_benchmarks/results" in name for name in names)
    package = (p for p in (tree / "pyadv").rglob("*") if p.is_file())
    assert {p.relative_to(tree).as_posix() for p in package} <= names
    assert not [name for name in names if name.startswith(("tests", "benchmarks"))]
    assert any(name.endswith("/licenses/LICENSE") for name in names)


def test_compiled_wheel_needs_no_compiler(site, tmp_path):
    assert use(site, tmp_path / "cache") == "prebuilt"
    assert not (tmp_path / "cache").exists()


def test_compiled_wheel_of_other_sources_is_not_loaded(site, tmp_path):
    changed = shutil.copytree(site, tmp_path / "site")
    (changed / "pyadv/_csrc/cpu/one.cpp").write_text("int one() { return 2; }\n")
    assert use(changed, tmp_path / "cache", native="auto") == "None"


@pytest.mark.parametrize("how", ["truncated", "changed", "no fingerprint"])
def test_compiled_library_that_is_damaged_is_not_loaded(site, tmp_path, how):
    damaged = shutil.copytree(site, tmp_path / "site")
    library = damaged / "pyadv" / "_ops.so"
    content = library.read_bytes()
    if how == "truncated":
        library.write_bytes(content[: len(content) // 2])
    elif how == "changed":
        library.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    else:
        _build.manifest_path(library).unlink()
    assert use(damaged, tmp_path / "cache", native="auto") == "None"


def test_build_info_says_what_was_compiled(site):
    code = "import json, pyadv._C; print(json.dumps(pyadv._C.build_info()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=site, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = _build.plan_cpu(site.parent / "checkout" / "csrc", _build.this_torch()).info
    assert json.loads(done.stdout) == {"cpu": expected}


def test_a_compile_error_stops_an_ahead_build(tmp_path):
    tree = small_tree(tmp_path / "checkout")
    (tree / "csrc" / "ops_cpu.cpp").write_text("int broken(\n")
    with pytest.raises(AssertionError, match=r"ops_cpu\.cpp:1:\d+: error: "):
        wheel_of(tree, tmp_path / "wheels")


def test_editable_build_lands_in_the_checkout(tmp_path):
    tree = small_tree(tmp_path / "checkout")
    pip("install", "--no-build-isolation", "-e", tree, "--target", tmp_path / "site", cwd=tmp_path)
    built = {path.name.split(".")[0] for path in (tree / "pyadv").glob("*.so")}
    assert built == {"_ops", "_C"}
    assert not (tree / "pyadv" / "_csrc").exists()
    assert use(tree, tmp_path / "cache") == "prebuilt"


def test_module_without_typer(tmp_path):
    """`python -m pyadv info` needs no extra; the other commands name the extra they need."""
    (tmp_path / "run.py").write_text(
        "import importlib.util, sys\n"
        "find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name: None if name == 'typer' else find(name)\n"
        "from pyadv.__main__ import main\n"
        "main()\n"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYADV_NATIVE": "0"}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(tmp_path / "run.py"), *arguments]
        return subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)

    assert "backend" in run("info").stdout
    refused = run("train")
    assert refused.returncode != 0
    assert "pyadv[train]" in refused.stderr
