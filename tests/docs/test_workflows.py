"""The workflows run the commands of .ci/run, on every Python that the package names and the oldest
PyTorch."""

from __future__ import annotations

import re

import pages
import pytest

yaml = pytest.importorskip("yaml")
tomllib = pytest.importorskip("tomllib")
WORKFLOW = pages.ROOT / ".github" / "workflows" / "ci.yml"
pytestmark = pytest.mark.skipif(not WORKFLOW.is_file(), reason="not a checkout")


def test_the_commands_are_those_of_the_local_run():
    local = " ".join((pages.ROOT / ".ci" / "run").read_text().split())
    local = re.sub(r" --(outdir|site-dir) \S+| --quiet|>/dev/null", "", local).replace(
        '"$work"/dist/*', "dist/*"
    )
    jobs = yaml.safe_load(WORKFLOW.read_text())["jobs"]
    commands = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    assert len(commands) > 10
    (newest,) = jobs["tests"]["strategy"]["matrix"]["torch"]
    for command in commands:
        for version in ("${{ matrix.torch }}", newest):
            command = command.replace(f"torch=={version}", f"torch==${{TORCH:-{newest}}}")
        assert " ".join(command.split()).replace(" --quiet", "") in local, command


def test_every_supported_python_is_tested():
    project = tomllib.loads((pages.ROOT / "pyproject.toml").read_text())["project"]
    named = {
        c.rsplit(" ", 1)[1]
        for c in project["classifiers"]
        if re.fullmatch(r"Programming Language :: Python :: 3\.\d+", c)
    }
    jobs = yaml.safe_load(WORKFLOW.read_text())["jobs"]
    assert set(jobs["tests"]["strategy"]["matrix"]["python-version"]) == named
    assert project["requires-python"] == f">={min(named, key=lambda v: int(v[2:]))}"


def test_the_oldest_pytorch_is_tested_on_the_oldest_python():
    project = tomllib.loads((pages.ROOT / "pyproject.toml").read_text())["project"]
    (oldest,) = (d.partition(">=")[2] for d in project["dependencies"] if d.startswith("torch>="))
    python = project["requires-python"].removeprefix(">=")
    matrix = yaml.safe_load(WORKFLOW.read_text())["jobs"]["tests"]["strategy"]["matrix"]
    assert {"python-version": python, "torch": f"{oldest}.0"} in matrix["include"]


def test_tools_have_one_version():
    """ruff and clang-format format alike on every machine."""
    extras = (pages.ROOT / "pyproject.toml").read_text()
    for tool in ("ruff", "clang-format"):
        (version,) = set(re.findall(rf'"{tool}==([\d.]+)"', extras))
        for file in (".pre-commit-config.yaml", ".github/workflows/ci.yml", ".ci/run"):
            text = (pages.ROOT / file).read_text()
            assert set(re.findall(rf"\b{tool}==([\d.]+)", text)) == {version}, file
