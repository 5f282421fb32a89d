"""Two processes give the report of one, also after one was killed; an error in one ends both."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import two_processes as problem
from torch import Tensor

import pyadv

Found = tuple[dict[str, Any], dict[str, Any]]


def run_two(part: str, folder: Path) -> Found:
    """Run a part in two processes; return what each found."""
    tests, root = Path(problem.__file__).parent, Path(pyadv.__file__).parents[1]
    code = (
        "import pathlib, two_processes; "
        f"two_processes.main({part!r}, {{}}, pathlib.Path({str(folder)!r}))"
    )
    paths = os.pathsep.join(map(str, (tests, root)))
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code.format(rank)],
            env={**os.environ, "PYTHONPATH": paths},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=120)[1] for process in started]
    found = [folder / f"{part}-{rank}.pt" for rank in range(2)]
    assert all(file.exists() for file in found), errors
    return tuple(torch.load(file, weights_only=False) for file in found)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with problem.few_steps[0], problem.few_steps[1]:
        yield tmp_path_factory.mktemp("two")


@pytest.fixture(scope="module")
def found(folder: Path) -> Found:
    return run_two("first", folder)


def same(a: Any, b: Any) -> bool:
    """Return whether two results are equal, tensors bit for bit."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(*map(_bits, (a, b)))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b or (a != a and b != b)


def _bits(t: Tensor) -> Tensor:
    return t.nan_to_num(nan=-123.0) if t.is_floating_point() else t


@pytest.mark.parametrize("case", problem.CASES)
def test_two_processes_give_the_report_of_one(found: Found, case: str) -> None:
    alone = problem.CASES[case]()
    assert not isinstance(found[0][case], str), found[0][case]
    assert same(found[0][case], alone)
    assert same(found[1][case], alone)


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("other_samples", "ValueError: the samples, which each process must get whole"),
        ("other_weights", "ValueError: the parameters of the model must be the same in all 2"),
        ("other_radius", "ValueError: the settings of an evaluation must be the same in all 2"),
        ("bad_argument", ("ProcessFailed: the evaluation stopped", "ValueError: attacks must be")),
        ("failing_model", ("process 1 (RuntimeError: this card is broken)", "RuntimeError: this")),
        ("sharded", "ValueError: group must be None or False for a model that FSDP shards"),
        ("interrupted", ("process 1 (KeyboardInterrupt)", "KeyboardInterrupt")),
        ("interrupted_between", ("process 1 (KeyboardInterrupt)", "KeyboardInterrupt")),
        ("fewer_batches", "ValueError: the samples, which each process must get whole"),
    ],
)
def test_an_error_in_one_process_ends_both(found: Found, case: str, words: Any) -> None:
    for result, text in zip(
        found, (words, words) if isinstance(words, str) else words, strict=True
    ):
        assert isinstance(result[case], str) and text in result[case]
    if case == "other_radius":
        assert "PGD-20.settings.alpha: 0.02 in process 0, 0.0225 in process 1; " in found[1][case]


def test_processes_work_alone_if_told_to(found: Found) -> None:
    assert found[0]["by_itself"]["summary"]["n"] == 13
    assert found[1]["by_itself"]["summary"]["n"] == 12


def test_official_signatures_work_alone(found: Found) -> None:
    x_adv = [rank["shards"] for rank in found]
    assert [len(t) for t in x_adv] == [7, 6]


def test_buffers_are_those_of_the_first_process(found: Found) -> None:
    alone = problem.pgd20()
    assert same(found[0]["other_buffers"], alone) and same(found[1]["other_buffers"], alone)


def test_a_run_goes_on_with_another_number_of_processes(found: Found, folder: Path) -> None:
    """Two, of which one is killed -> two and one; two killed twice -> one; one -> two."""
    assert "killed" not in found[1]
    assert "ProcessFailed: process 0 of 2 lost the connection" in found[0]["killed"]
    names = {file.name for file in folder.glob("killed.state*")}
    assert names == {"killed.state", "killed.state.process1"}
    for new in ("two", "again", "now"):
        for name in names:
            shutil.copy(folder / name, folder / name.replace("killed", new))

    def stop(*now: object) -> None:
        if now[0] == "apgd-t":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        problem.auto_attack(folder / "one.state", stop)
    alone, seen = problem.auto_attack(), []
    result = problem.auto_attack(folder / "now.state", lambda *now: seen.append(now))
    assert same(result, alone)
    # The batch that was not saved: process 1 had the last of its 5 samples in it.
    assert seen[0][:3] == ("apgd-ce", 1, 1) and all(name != "apgd-ce" for name, *_ in seen[1:])
    assert {file.name for file in folder.glob("now.state*")} == {"now.state"}

    second = run_two("second", folder)
    for case in ("from one", "from two"):
        assert same(second[0][case], alone) and same(second[1][case], alone), second[0][case]
    assert "ProcessFailed: process 1 of 2 lost the connection" in second[1]["killed again"]
    assert {file.name for file in folder.glob("two.state*")} == {"two.state"}
    last = []
    assert same(problem.auto_attack(folder / "again.state", lambda *now: last.append(now)), alone)
    assert len(last) <= len(seen)
