"""Work that is killed while it writes can be resumed, and ends as if nothing had happened."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fuzz import kills

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@pytest.mark.parametrize(("name", "stride"), [("training", 11), ("evaluation", 9)])
def test_a_few_kills(name: str, stride: int, tmp_path: Path) -> None:
    """`python -m tests.fuzz.kills --all` tries all points."""
    assert kills.search(kills.JOBS[name](), tmp_path, kills.every(stride), None) >= 5


def test_lost_work_is_found(tmp_path: Path) -> None:
    """Work that writes its file in place loses it when it is killed within the write."""

    def work(folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        if not (folder / "state").exists():
            (folder / "state").write_text("all of it")

    job = kills.Job("careless", work, lambda folder: (folder / "state").read_text())
    with pytest.raises(AssertionError, match=r"killed at point 1 \(write_text: half\).* differ"):
        kills.search(job, tmp_path, kills.every(1), None)


def test_a_failure_of_the_work_is_told(tmp_path: Path) -> None:
    job = kills.Job("broken", lambda folder: 1 / 0, lambda folder: None)
    with pytest.raises(AssertionError, match="broken, killed at None: (.|\n)*ZeroDivisionError"):
        kills.search(job, tmp_path, kills.every(1), None)
