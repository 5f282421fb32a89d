"""`python -m pyadv` and the `pyadv` command."""

from __future__ import annotations

import importlib.util
import sys


def main() -> None:
    """Run the command line; without the extra `train` only `pyadv info` is there."""
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
