"""Checks and conversions of arguments that all ops share, with their error messages."""

from __future__ import annotations

import numbers
from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor

Choice = TypeVar("Choice", bound=str)

_FLOATING = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_scalars: dict[float, Tensor] = {}
_words: dict[int, Tensor] = {}
# Inside a dispatch mode (fake tensors, tracing) tensors must not be cached and have no real
# address.
_in_mode = torch._C._len_torch_dispatch_stack


def check_floating(op: str, **tensors: Any) -> None:
    """Raise TypeError unless every argument is a dense floating-point tensor."""
    for name, t in tensors.items():
        if not isinstance(t, Tensor):
            raise TypeError(f"{op}: {name} must be a Tensor, got {type(t).__name__}")
        if t.dtype not in _FLOATING:
            raise TypeError(
                f"{op}: {name} must be float16, bfloat16, float32 or float64, got {t.dtype}"
            )
        check_strided(op, name, t)


def check_strided(op: str, name: str, t: Tensor) -> None:
    """Raise TypeError unless the tensor is dense."""
    if t.layout != torch.strided:
        raise TypeError(f"{op}: {name} must be a dense tensor, got one of layout {t.layout}")


def check_like(op: str, first: str, like: Tensor, **tensors: Any) -> None:
    """Raise unless every tensor has the shape, dtype and device of `like`, which is the argument
    named `first`."""
    check_floating(op, **{first: like})
    shape = like.shape
    if not shape:
        raise ValueError(f"{op}: {first} must have a batch dimension, got a 0-dim tensor")
    for name, t in tensors.items():
        if not isinstance(t, Tensor):
            raise TypeError(f"{op}: {name} must be a Tensor, got {type(t).__name__}")
        if t.shape != shape:
            raise ValueError(
                f"{op}: {name} must have the shape of {first}, "
                f"got {list(t.shape)} and {list(like.shape)}"
            )
        if t.dtype != like.dtype:
            raise TypeError(
                f"{op}: {name} must have the dtype of {first}, got {t.dtype} and {like.dtype}"
            )
        check_strided(op, name, t)
        check_device(op, name, t, like)


def check_device(op: str, name: str, t: Tensor, like: Tensor) -> None:
    """Raise ValueError unless the tensor is on the device of `like`."""
    if t.device != like.device:
        raise ValueError(f"{op}: {name} must be on {like.device}, got a tensor on {t.device}")


def check_rows(op: str, name: str, t: Tensor, like: Tensor, dtype: torch.dtype) -> None:
    """Raise unless `t` is a tensor with one value of `dtype` for each row of `like`."""
    if not isinstance(t, Tensor) or t.dtype != dtype:
        got = t.dtype if isinstance(t, Tensor) else type(t).__name__
        raise TypeError(f"{op}: {name} must be a {dtype} tensor, got {got}")
    if not like.shape:
        raise ValueError(f"{op}: {name} must have a batch dimension, got a 0-dim tensor")
    if t.shape != like.shape[:1]:
        raise ValueError(
            f"{op}: {name} must have shape [{like.shape[0]}], one value per row, "
            f"got {list(t.shape)}"
        )
    check_strided(op, name, t)
    check_device(op, name, t, like)


def check_bool(op: str, name: str, value: bool) -> None:
    """Raise TypeError unless the value is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be a bool, got {type(value).__name__}")


def check_choice(op: str, name: str, value: Any, choices: tuple[Choice, ...]) -> Choice:
    """Return the value. Raise ValueError unless it is one of the strings in `choices`."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{op}: {name} must be one of {', '.join(choices)}, got {value!r}")
    return value


def parameter(
    op: str, name: str, value: float | Tensor, x: Tensor, *, nonnegative: bool = False
) -> Tensor:
    """Return a float or tensor parameter as the tensor that the schema of the op takes.

    A float becomes a 0-dim tensor. A 1-D tensor holds one value per sample; any other tensor must
    broadcast to x. Values of tensors are not checked, because reading them would wait for the
    device.
    """
    if (
        not torch.compiler.is_compiling()  # a compiled graph must not depend on the cache
        and type(value) is float
        and value in _scalars
        and (value >= 0 or not nonnegative)
    ):
        return scalar(value, x)
    if isinstance(value, Tensor):
        if value.dtype.is_complex or value.dtype == torch.bool or value.is_quantized:
            raise TypeError(f"{op}: {name} must be real, got {value.dtype}")
        check_strided(op, name, value)
        if value.dim() or not value.is_cpu:  # a scalar on the CPU serves every device
            check_device(op, name, value, x)
        shape = value.shape
        if value.dim() == 1:
            if shape[0] not in (1, x.shape[0]):
                raise ValueError(
                    f"{op}: a 1-D {name} holds one value per sample; expected {x.shape[0]}, "
                    f"got {shape[0]} (per channel is shape [1, C, 1, 1])"
                )
        elif value.dim() > x.dim() or any(
            s not in (1, n) for s, n in zip(reversed(shape), reversed(x.shape), strict=False)
        ):
            raise ValueError(
                f"{op}: {name} of shape {list(shape)} does not broadcast to {list(x.shape)}"
            )
        return value.detach()
    if not isinstance(value, (int, float)):
        raise TypeError(f"{op}: {name} must be a float or a Tensor, got {type(value).__name__}")
    if value != value or (nonnegative and value < 0):
        rule = "a number >= 0" if nonnegative else "a number"
        raise ValueError(f"{op}: {name} must be {rule}, got {value}")
    try:
        return scalar(float(value), x)
    except OverflowError:
        raise ValueError(f"{op}: {name} must fit a float, got an int beyond 1e308") from None


def row_parameter(
    op: str,
    name: str,
    value: float | Tensor,
    x: Tensor,
    *,
    nonnegative: bool = False,
    fraction: bool = False,
) -> Tensor:
    """Return a parameter of an op that treats rows as a whole: a float, or a tensor of one element
    or of one element per sample."""
    if fraction and isinstance(value, (int, float)) and not 0 <= value <= 1:
        raise ValueError(f"{op}: {name} must be in [0, 1], got {value}")
    t = parameter(op, name, value, x, nonnegative=nonnegative)
    if t.dim() > 1 and t.numel() != 1 and (t.dim() != x.dim() or t.numel() != t.shape[0]):
        raise ValueError(
            f"{op}: {name} must be a number or hold one per sample (shape [{x.shape[0]}]), "
            f"got shape {list(t.shape)}"
        )
    return t


def scalar(value: float, x: Tensor) -> Tensor:
    """Return a 0-dim float64 tensor on the CPU, where kernels read it without waiting for a GPU."""
    return _constant(_scalars, value, torch.float64, x)


def word(op: str, name: str, value: int | Tensor, x: Tensor, least: int, end: int) -> Tensor:
    """Return an int in [least, end) as a 0-dim int64 tensor with the same 64 bits, or the given
    0-dim int64 tensor if it is on the CPU or on the device of x."""
    if isinstance(value, Tensor):
        if value.dtype != torch.int64 or value.dim():
            raise TypeError(
                f"{op}: {name} must be an int or a 0-dim torch.int64 tensor, "
                f"got {value.dtype} of shape {list(value.shape)}"
            )
        check_strided(op, name, value)
        if not value.is_cpu:
            check_device(op, name, value, x)
        return value
    # `int` comes first: it is the usual case and spares torch.compile tracing an abstract class.
    if isinstance(value, bool) or not isinstance(value, (int, numbers.Integral)):
        raise TypeError(f"{op}: {name} must be an int or a Tensor, got {type(value).__name__}")
    value = int(value)
    if not least <= value < end:
        raise ValueError(f"{op}: {name} must be in [{least}, {end}), got {value}")
    return _constant(_words, value - 2**64 if value >= 2**63 else value, torch.int64, x)


def _constant(cache: dict[Any, Tensor], value: float, dtype: torch.dtype, x: Tensor) -> Tensor:
    if torch.compiler.is_compiling():
        # torch.compile makes no CUDA graph of a graph that reads a scalar on the CPU.
        return torch.tensor(value, dtype=dtype, device=x.device)
    if _in_mode():
        return torch.tensor(value, dtype=dtype, device="cpu")
    cached = cache.get(value)
    if cached is None:
        if len(cache) >= 4096:
            cache.clear()
        with torch.inference_mode(False):
            # Without `device` the tensor would be made on the user's default device, where kernels
            # cannot read it.
            cached = cache[value] = torch.tensor(value, dtype=dtype, device="cpu")
    return cached


def box_parameters(
    op: str, x: Tensor, lo: float | Tensor | None, hi: float | Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Return the bounds of the box as tensors, or None for a bound that is missing."""
    bounds = (
        None if lo is None else parameter(op, "lo", lo, x),
        None if hi is None else parameter(op, "hi", hi, x),
    )
    if isinstance(lo, (int, float)) and isinstance(hi, (int, float)) and lo > hi:
        raise ValueError(f"{op}: lo must not be above hi, got lo={lo} and hi={hi}")
    return bounds


def run_out(
    op: torch._ops.OpOverload,
    op_out: torch._ops.OpOverload,
    args: tuple[Any, ...],
    out: Tensor | None,
) -> Tensor:
    """Call the op, or its `out=` form if `out` is given, after checking that `out` can be
    written."""
    if out is None:
        return op(*args)
    name = op._opname
    if out is not args[0]:
        check_like(name, "the first tensor", args[0], out=out)
    refuse_overlap(name, "out", out, args, same_allowed=True)
    with torch.no_grad():  # `out` may be a leaf that requires grad; the result never does
        op_out(*args, out)
    torch.autograd.graph.increment_version(out)
    return out


def refuse_overlap(
    op: str, name: str, t: Tensor, others: Iterable[Any], *, same_allowed: bool = False
) -> None:
    """Raise ValueError if `op` cannot write into `t` safely.

    The elements of `t` must not share memory with each other or with the tensors in `others`. With
    `same_allowed`, `t` may be one of these tensors itself.
    """
    if torch.compiler.is_compiling() or _in_mode():
        return
    if not t.is_contiguous() and _is_expanded(t):
        raise ValueError(
            f"{op}: {name} must have its own memory for each element, got shape "
            f"{list(t.shape)} with strides {list(t.stride())}"
        )
    if t.is_inference() and not torch.is_inference_mode_enabled():
        raise ValueError(
            f"{op}: {name} was made in inference mode and can only be written in that mode"
        )
    if t.is_neg():
        raise ValueError(f"{op}: {name} must not be a lazily negated view, which cannot be written")
    for other in others:
        if not isinstance(other, Tensor) or (other is t and same_allowed):
            continue
        # Scalars on the CPU are read before the kernel writes.
        if (other.dim() or not other.is_cpu) and _overlaps(t, other, same_allowed):
            rule = " without being the same tensor" if same_allowed else ""
            raise ValueError(f"{op}: {name} shares memory with an input{rule}")


def _is_expanded(t: Tensor) -> bool:
    return any(s == 0 and n > 1 for n, s in zip(t.shape, t.stride(), strict=True))


def _overlaps(a: Tensor, b: Tensor, same_allowed: bool) -> bool:
    alias = torch._C._is_alias_of(a, b)  # type: ignore[attr-defined]  # not in PyTorch's stubs
    if not alias or not a.numel() or not b.numel():
        return False
    first_a, first_b = a.data_ptr(), b.data_ptr()
    if first_a == first_b and a.shape == b.shape and a.stride() == b.stride():
        return not same_allowed
    return first_a <= _last_byte(b, first_b) and first_b <= _last_byte(a, first_a)


def _last_byte(t: Tensor, first: int) -> int:
    reach = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
    return first + (reach + 1) * t.element_size() - 1
