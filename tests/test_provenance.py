"""Where artefacts come from."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pyadv import _provenance
from pyadv._provenance import provenance
from pyadv._version import __version__


def git(folder: Path, *arguments: str) -> str:
    names = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    command = ["git", "-C", str(folder), *names, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_fields(monkeypatch: pytest.MonkeyPatch) -> None:
    found = json.loads(json.dumps(provenance(seed=3, device="cpu", processes=2)))
    assert found["pyadv"] == __version__ and found["torch"] == torch.__version__
    assert (found["seed"], found["processes"], found["hardware"]["device"]) == (3, 2, "cpu")
    assert found["date"].endswith("+00:00") and found["hardware"]["cores"] >= 1
    assert sys.orig_argv[-1] in found["command"]
    assert provenance(command="pyadv x")["command"] == "pyadv x"


def test_commits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert provenance()["project_commit"] is None
    git(tmp_path, "init", "-q")
    (tmp_path / "a.txt").write_text("a")
    git(tmp_path, "add", "a.txt")
    git(tmp_path, "commit", "-qm", "a")
    head = git(tmp_path, "rev-parse", "HEAD")
    assert provenance()["project_commit"] == head
    (tmp_path / "a.txt").write_text("b")
    assert provenance()["project_commit"] == head + "+"
    # A package that is installed inside somebody else's repository has no commit of its own.
    (tmp_path / "_provenance.py").write_text("")
    monkeypatch.setattr(_provenance, "__file__", str(tmp_path / "_provenance.py"))
    assert provenance()["commit"] is None
    git(tmp_path, "add", "_provenance.py")
    git(tmp_path, "commit", "-qam", "b")
    assert provenance()["commit"] == git(tmp_path, "rev-parse", "HEAD")
    monkeypatch.setenv("PATH", "")
    assert provenance()["commit"] is None


def test_no_program_of_the_repository_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, marker = tmp_path / "theirs", tmp_path / "ran"
    folder.mkdir()
    git(folder, "init", "-q")
    (folder / "a.txt").write_text("a")
    git(folder, "add", "a.txt")
    git(folder, "commit", "-qm", "a")
    git(folder, "config", "filter.evil.clean", f"touch {marker}; cat")
    (folder / ".gitattributes").write_text("*.txt filter=evil\n")
    (folder / "a.txt").write_text("b")
    monkeypatch.chdir(folder)
    assert provenance()["project_commit"].endswith("+") and not marker.exists()


def test_a_folder_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()
    monkeypatch.chdir(folder)
    folder.rmdir()
    assert provenance()["project_commit"] is None
