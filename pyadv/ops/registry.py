"""Registration of ops: schema, default kernel (the reference), fake and gradient.

The compiled library only adds CPU and CUDA kernels to the schemas defined here, so an op exists
with or without it, and `torch.compile` sees the same op in both cases.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyadv import _native

_LIBRARY = torch.library.Library("pyadv", "DEF")
_native_was_tried = False


def register(
    schema: str,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
) -> torch._ops.OpOverload:
    """Define `pyadv::<schema>` and return the op.

    `reference` takes the arguments of the schema in order. The result of an op without `backward`
    never requires grad.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    op = getattr(torch.ops.pyadv, name).default
    _LIBRARY.impl(name, _default_kernel(op, reference), "CompositeExplicitAutograd")
    torch.library.register_fake(f"pyadv::{name}", fake, lib=_LIBRARY)
    if backward is None:
        _LIBRARY.impl(name, torch.library.fallthrough_kernel, "Autograd")
    else:
        torch.library.register_autograd(
            f"pyadv::{name}", backward, setup_context=setup_context, lib=_LIBRARY
        )
    return op


def register_out(
    schema: str, reference: Callable[..., Tensor], fake: Callable[..., Tensor]
) -> tuple[torch._ops.OpOverload, torch._ops.OpOverload]:
    """Define an op that returns one new tensor, and its `_out` form, which writes into `out`."""
    name, _, rest = schema.partition("(")
    arguments = rest.rpartition(") ->")[0]

    def write(*args: Any) -> None:
        args[-1].copy_(reference(*args[:-1]))

    out_schema = f"{name}_out({arguments}, Tensor(a!) out) -> ()"
    return register(schema, reference, fake), register(out_schema, write, no_output)


def no_output(*args: Any) -> None:
    """Return nothing: the fake of an op that only writes into its arguments."""


def like_first(first: Tensor, *args: Any) -> Tensor:
    """Return the fake result of an op whose result has the form of its first argument."""
    return torch.empty_like(first)


def refuse_double_backward(name: str) -> dict[str, Callable[..., Any]]:
    """Return the gradient registration of `<name>_backward`, which raises and names the reference
    as the function to use instead."""

    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(
            f"pyadv.ops.{name} has no second derivative; use pyadv.reference.{name}, "
            "which is plain PyTorch and can be differentiated any number of times"
        )

    return {"backward": backward, "setup_context": lambda ctx, inputs, output: None}


def has_kernel(name: str, device: torch.device) -> bool:
    """Return whether the op has a native kernel for the device; otherwise the reference runs."""
    _native.load()
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"pyadv::{name}", device.type.upper())


def _default_kernel(op: torch._ops.OpOverload, reference: Callable[..., Any]) -> Callable[..., Any]:
    """Return the kernel that runs where no native kernel is registered.

    The first call of any op loads the native kernels and dispatches again, so that later calls go
    straight to them. If there are none for the device, the reference runs.
    """

    @functools.wraps(reference)
    def kernel(*args: Any) -> Any:
        global _native_was_tried
        if not _native_was_tried:
            _native.load()
            _native_was_tried = True
            return op(*args)
        with torch.no_grad():
            return reference(*args)

    return kernel
