"""Cases with known mistakes: the tests of the runner see that it reports each one."""

from __future__ import annotations

import ctypes
import time

import torch

from fuzz.case import REFUSED, RIGHT, Draw, Finding, require_clear


def _right() -> str:
    return RIGHT


def _refused() -> str:
    return require_clear(ValueError("step: eps must be >= 0"), ["eps"])


def _finding() -> str:
    raise Finding("known to be wrong")


def _unclear() -> str:
    return require_clear(RuntimeError("The size of tensor a (3) must match"), ["eps"])


def _unexpected() -> str:
    return str(torch.ones(2) @ torch.ones(3))


def _crash() -> str:
    ctypes.string_at(0)
    return REFUSED


def _hang() -> str:
    time.sleep(600)
    return RIGHT


KINDS = (_right, _refused, _finding, _unclear, _unexpected, _crash, _hang, _right)


def case(draw: Draw) -> str:
    draw.note(kind=KINDS[draw.number].__name__)
    return KINDS[draw.number]()
