"""`python -m pyadv` and the `pyadv` command."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys


def main() -> None:
    """Run the command line; without the extra `train` there is only `pyadv info`."""
    _open_standard_streams()
    try:
        _run()
    finally:
        _close_standard_streams()


def _open_standard_streams() -> None:
    """Make stdin, stdout and stderr usable, whatever the caller left of them.

    A closed descriptor is opened on the null device: the next file that is opened would get its
    number, and warnings of C++ code would be written into it. Characters that an encoding lacks are
    replaced.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            # The lowest free number is this one, since those below are open.
            os.open(os.devnull, os.O_RDWR)
            os.set_inheritable(number, True)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, closefd=False))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace" if stream is sys.stdout else "backslashreplace")


def _close_standard_streams() -> None:
    """Flush stdout and stderr; what a closed pipe does not take goes to the null device.

    Otherwise the interpreter reports the pipe at its exit, after all work is done.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, stream.fileno())
                os.close(null)


def _run() -> None:
    if importlib.util.find_spec("typer") is not None:
        from pyadv.cli import main as run

        run()
    elif sys.argv[1:] == ["info"]:
        from pyadv import _native

        print(_native.report())
    else:
        sys.exit("pyadv: this command needs the extra `train`: pip install 'pyadv[train]'")


if __name__ == "__main__":
    main()
