"""The layout of the package: imports run one way, and private modules stay private."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import pyadv

ROOT = Path(pyadv.__file__).parent

# Each package imports from those before it and from itself. Modules of one tuple may import each
# other. `tensors`, `menus` and the private modules directly in pyadv/ are below everything.
LAYERS = (
    ("tensors", "menus"),
    ("reference",),
    ("ops",),
    ("passes",),
    ("engine",),
    ("attacks",),
    ("objectives",),
    ("models", "data"),
    ("evaluation",),
    ("training",),
    ("compat", "integrations"),
    ("cli",),
)
LEVEL = {name: i for i, names in enumerate(LAYERS) for name in names}
MODULES = sorted(ROOT.rglob("*.py"))


def names(module: Path) -> tuple[str, ...]:
    """Return the parts of a module's dotted name, without pyadv."""
    parts = module.relative_to(ROOT).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


def imported(module: Path) -> Iterator[tuple[str, ...]]:
    """Yield every module of pyadv that `module` imports, also inside functions."""
    for node in ast.walk(ast.parse(module.read_text())):
        found = []
        if isinstance(node, ast.Import):
            found = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            found = [f"{node.module}.{a.name}" for a in node.names]
        for name in found:
            first, *rest = name.split(".")
            if first != "pyadv":
                continue
            while rest and not exists(rest):  # the imported name may be one in a module
                rest.pop()
            yield tuple(rest)


def exists(parts: list[str]) -> bool:
    path = ROOT.joinpath(*parts)
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


@pytest.mark.parametrize("module", MODULES, ids=lambda m: str(m.relative_to(ROOT)))
def test_imports_run_one_way(module):
    here = names(module)
    if len(here) <= 1 and here[:1] not in [(n,) for n in LEVEL]:
        return  # pyadv/__init__.py, __main__.py and the private modules beside it
    for target in imported(module):
        if not target:
            assert here[0] in ("cli", "training", "evaluation"), f"{here} imports pyadv itself"
            continue
        private = [p for p in target[1:] if p.startswith("_")]
        if private and target[0] != here[0]:
            raise AssertionError(f"{'.'.join(here)} imports the private {'.'.join(target)}")
        if target[0].startswith("_"):
            continue
        up = LEVEL[target[0]] > LEVEL[here[0]]
        assert not up, f"{'.'.join(here)} imports {'.'.join(target)}, which is above it"


def test_every_package_has_a_level():
    packages = {p.parent.name for p in ROOT.glob("*/__init__.py")} - {"_csrc", "_benchmarks"}
    assert packages <= LEVEL.keys()
    assert {"engine", "passes"} <= packages


def test_the_checker_sees_a_wrong_import(tmp_path):
    module = tmp_path / "wrong.py"
    module.write_text("def f():\n    from pyadv.attacks.pgd import PGD\n    import pyadv._native\n")
    assert list(imported(module)) == [("attacks", "pgd"), ("_native",)]


def test_the_core_imports_no_extra():
    """Accelerate, typer, matplotlib and torchvision are optional, and above `objectives`."""
    extras = {"accelerate", "typer", "rich", "matplotlib", "torchvision", "tensorboard", "scipy"}
    for module in MODULES:
        here = names(module)
        if not here or LEVEL.get(here[0], 0) > LEVEL["objectives"] or here[0] == "_plot_style":
            continue
        for node in ast.walk(ast.parse(module.read_text())):
            roots = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            roots += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            used = {r.split(".")[0] for r in roots} & extras
            assert not used, f"{'.'.join(here)} imports {used}"


def test_only_integrations_import_what_they_are_for():
    frameworks = {"lightning", "pytorch_lightning", "huggingface_hub"}
    frameworks |= {"torchmetrics", "robustbench", "foolbox", "torchattacks", "eagerpy"}
    seen = set()
    for module in MODULES:
        for node in ast.walk(ast.parse(module.read_text())):
            roots = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            roots += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            used = {r.split(".")[0] for r in roots} & frameworks
            assert not used or names(module)[0] == "integrations", f"{module} imports {used}"
            seen |= used
    assert {"lightning", "huggingface_hub", "torchmetrics"} <= seen  # the test sees imports


def test_a_family_of_ops_has_one_name_on_every_layer():
    root = ROOT.parent
    families = {path.stem for path in (root / "csrc" / "cpu").glob("*.cpp")}
    assert {"steps", "activation", "convolution"} <= families
    for layer, beside in (
        ("csrc/common/{}.h", {"exp", "macros", "math", "rules", "types"}),
        ("csrc/glue/{}.h", {"rules", "tensors"}),
        ("pyadv/reference/{}.py", {"__init__", "hyperplane"}),
        ("pyadv/ops/{}.py", {"__init__", "arguments", "norm_product", "registry"}),
        ("tests/ops/test_{}.py", {"arguments", "compile"}),
        ("docs/ops/{}.md", {"index"}),
    ):
        before, after = layer.split("{}")
        found = {str(p.relative_to(root)) for p in root.glob(layer.format("*"))}
        names = {path.removeprefix(before).removesuffix(after) for path in found}
        assert names == families | beside, layer
    cuda = {path.stem for path in (root / "csrc" / "cuda").glob("*.cu")}
    assert cuda == families - {"convolution"}  # a GPU has its own libraries for that
