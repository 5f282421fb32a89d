"""python -m tests.fuzz [areas] [--seed S] [--cases N | --minutes M]; see `runner`."""

import sys
from pathlib import Path

# The package is `fuzz`, as in pytest, and finds the other helpers of the tests.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fuzz.runner import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
