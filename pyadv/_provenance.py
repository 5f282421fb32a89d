"""Where a file of results comes from: the fields that every artefact holds under "provenance"."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from pyadv._version import __version__

_GIT_SECONDS = 10.0


def provenance(
    *,
    command: str | None = None,
    seed: int | None = None,
    device: torch.device | str | None = None,
    processes: int = 1,
) -> dict[str, Any]:
    """Return what a reader needs to make the results again, as plain values for JSON.

    Args:
        command: the command line; that of this process by default.
        seed: the seed of the work, if it has one.
        device: where the work ran; a card is named by its model.
        processes: how many processes shared the work.

    Returns:
        "pyadv", "torch", "python": versions; "commit": git's name for the sources of pyadv, None
        if they are not in a repository; "project_commit": the same for the working folder; a "+"
        at the end stands for files that were changed, or touched, since; "command", "seed",
        "processes"; "hardware": system, processor, cores that this process may use, device;
        "date": in UTC.
    """
    return {
        "pyadv": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": _commit(Path(__file__).parent, Path(__file__).name),
        "project_commit": _commit(Path(".")),
        "command": shlex.join(sys.orig_argv) if command is None else command,
        "seed": seed,
        "processes": processes,
        "hardware": {
            "system": platform.platform(),
            "processor": processor(),
            "cores": cores(),
            "device": _device(device),
        },
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _commit(folder: Path, tracked: str | None = None) -> str | None:
    """Return the commit of the repository that holds the folder, None if there is none.

    Args:
        tracked: a file in the folder that must belong to the repository; an installed package may
            lie within somebody else's.
    """
    if tracked is not None and _git(folder, "ls-files", "--error-unmatch", tracked) is None:
        return None
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None:
        return None
    # These compare what the file system knows of the files, and read those alone that were written
    # in the second of the last commit. Reading runs filters that the repository names, so they are
    # switched off.
    named = (_git(folder, "config", "--name-only", "--get-regexp", r"^filter\.") or "").split("\n")
    off = [part for name in named if name for part in ("-c", f"{name}=")]
    staged = _git(folder, *off, "diff-index", "--cached", "--name-only", "HEAD")
    touched = _git(folder, *off, "diff-files", "--name-only")
    return commit if staged == touched == "" else f"{commit}+"


def _git(folder: Path, *arguments: str) -> str | None:
    """Return what git prints, None if it fails. It runs no program that the repository names."""
    command = ["git", "-C", str(folder), "-c", "core.fsmonitor=false", *arguments]
    env = os.environ | {"GIT_OPTIONAL_LOCKS": "0"}
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=_GIT_SECONDS,
            env=env,
        )
    except (OSError, subprocess.SubprocessError, ValueError):
        return None
    return done.stdout.decode(errors="replace").strip() if done.returncode == 0 else None


def processor() -> str:
    """Return the model of the processor."""
    try:
        text = Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:
        text = ""
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.processor() or platform.machine()


def cores() -> int:
    """Return the number of cores that this process may use."""
    has = hasattr(os, "sched_getaffinity")
    return len(os.sched_getaffinity(0)) if has else os.cpu_count() or 1


def _device(device: torch.device | str | None) -> str | None:
    if device is None:
        return None
    device = torch.device(device)
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
