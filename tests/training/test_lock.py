"""A run folder belongs to one process; the lock of a dead one is taken over."""

from __future__ import annotations

import errno
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyadv.training import FolderInUse, lock
from pyadv.training.lock import RunLock

HOLDER = """
import sys, time
from pathlib import Path
from pyadv.training import lock
if sys.argv[2] == "none":
    lock.fcntl = None
with lock.RunLock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture(params=["flock", "none", "refused"])
def locks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """File systems with file locks, systems without flock, and file systems that refuse it."""
    if request.param == "none":
        monkeypatch.setattr(lock, "fcntl", None)
    elif request.param == "refused":

        def refuse(*_: object) -> None:
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

        monkeypatch.setattr(lock.fcntl, "flock", refuse)
    return request.param


@pytest.fixture
def holder(tmp_path: Path, locks: str) -> Iterator[subprocess.Popen]:
    """Another process that holds `tmp_path`."""
    kind = "flock" if locks == "flock" else "none"
    command = [sys.executable, "-c", HOLDER, str(tmp_path), kind]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_second_process_is_told_who_holds_the_folder(
    tmp_path: Path, holder: subprocess.Popen
) -> None:
    words = rf"{re.escape(str(tmp_path))} is in use by process {holder.pid} on "
    words += (
        rf"{re.escape(socket.gethostname())} since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d: wait for it"
    )
    with pytest.raises(FolderInUse, match=words), RunLock(tmp_path):
        pass
    holder.kill()
    holder.wait()
    with RunLock(tmp_path):  # the dead process left its file
        pass
    assert not list(tmp_path.iterdir())


def test_one_process_locks_once(tmp_path: Path, locks: str) -> None:
    for _ in range(2):
        with RunLock(tmp_path), pytest.raises(FolderInUse, match=f"process {os.getpid()} "):
            RunLock(tmp_path).__enter__()
    with RunLock(tmp_path), RunLock(tmp_path, active=False):
        pass
    assert not list(tmp_path.iterdir())


def owner(**changes: object) -> dict[str, object]:
    return {**lock._this_process(), **changes}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            json.dumps(owner(host="elsewhere")),
            "on elsewhere since .* if it is dead, delete .*owner",
        ),
        ("", "in use by another process: if none runs there, delete .*run.owner"),
        ("[1]", "in use by another process"),
        (json.dumps(owner(pid=0)), "in use by process 0 "),
    ],
    ids=["another host", "empty", "no mapping", "no process"],
)
def test_owners_that_may_be_alive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str, message: str
) -> None:
    monkeypatch.setattr(lock, "fcntl", None)
    (tmp_path / "run.owner").write_text(content)
    with pytest.raises(FolderInUse, match=message), RunLock(tmp_path):
        pass
    assert (tmp_path / "run.owner").read_text() == content


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_a_process_number_is_used_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "fcntl", None)
    (tmp_path / "run.owner").write_text(json.dumps(owner(started="1")))
    with RunLock(tmp_path):
        assert json.loads((tmp_path / "run.owner").read_text())["started"] != "1"


def test_links_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("mine")
    (tmp_path / "run.lock").symlink_to(tmp_path / "target")
    with pytest.raises(OSError), RunLock(tmp_path):
        pass
    assert (tmp_path / "target").read_text() == "mine"
