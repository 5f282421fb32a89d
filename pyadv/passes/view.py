"""The fast view: a network that computes what the model does, for less. `speed="fast"` attacks it.

torch.fx reads the model as a graph of operations (`trace`), the graph is rewritten (`rewrite`), and
its layers hold weights that are folded, laid out and frozen for an attack (`layers`):

- BatchNorm goes into the weights of the convolution before it, or becomes one operation;
- a ReLU writes over its input where nothing else reads that;
- weights of wide networks lie in channels-last order, which the CPU's convolutions prefer;
- in wide networks on the CPU, 3x3 convolutions in float32 and their input gradients use Winograd's
  algorithm, with 4 times less multiplications (1.8 times at stride 2);
- on the CPU, the input gradient of a first layer, with its few channels, is a matrix product and a
  sum of patches, several times faster than oneDNN's.

On a GPU the graph is rewritten in another way (`fuse`, with layers of `fused`): all of it runs in
one dtype and in channels-last order, and what surrounds a convolution is part of its call or one
call of its own.

Here is decided which models get a view, how long it serves, and whether it agrees with the model.
"""

from __future__ import annotations

import contextlib
import logging
import math
import random
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from pyadv.menus import BatchNormMode, Speed
from pyadv.passes.borrow import (
    Output,
    borrowed,
    contents,
    footprint,
    gradients_on,
    has_hooks,
    is_atom,
    kept_generators,
    owned,
    pick_logits,
    tensors,
    unwrap,
)
from pyadv.passes.fuse import Part as FusedPart
from pyadv.passes.fuse import fuse
from pyadv.passes.fused import CONVOLUTIONS, Convolutions
from pyadv.passes.layers import WeightedLayer
from pyadv.passes.record import convolution_precision
from pyadv.passes.rewrite import Part, rewrite
from pyadv.passes.trace import Refused, trace

# The arithmetic of the view.
_DTYPES: dict[Speed, torch.dtype | None] = {"fast": None, "bfloat16": torch.bfloat16}
WIDE = 64  # output channels from which channels-last order pays

_ROWS_AT_FIRST = 8  # samples on which a new view is compared with the model
_ROWS = 2  # and on which it is compared at each refresh
_EVERY = 128  # samples attacked for which input gradients are compared once more
_PULL = 0.05  # how far samples are moved before the comparison, as a share of the way to others
_TF32 = 2**-10  # machine epsilon of the float32 products of a GPU
_LOG = logging.getLogger("pyadv")


@dataclass
class _Inputs:
    """What a comparison depends on besides the model and the samples."""

    shape: torch.Size  # of a sample
    dtype: torch.dtype
    device: torch.device
    autocast: torch.dtype | None
    output: list[Any]


class _NotFolded(Refused):
    """Says why a view cannot copy the weights of its model."""


class FastView:
    """A model in evaluation mode, with copies of the weights that it had at the last `refresh`.

    It has input gradients of first order; parameters get none.

    Args:
        model: the model.
        dtype: of the arithmetic; None: the model's.
        fused: the device's fused convolutions, if the view is to use them.
    """

    def __init__(
        self, model: nn.Module, dtype: torch.dtype | None, fused: Convolutions | None = None
    ):
        self._dtype, self.fused = dtype, fused is not None
        self._parts: Sequence[Part | FusedPart]
        if fused is None:
            self.module, self._parts = rewrite(*trace(model))
        else:
            self.module, self._parts = fuse(*trace(model), fused, dtype)
        self.comparisons = 0
        self.attacked = 0  # samples, since input gradients were compared last
        widths = [p.out_channels for p in self._parts if isinstance(p, WeightedLayer)]
        wide = max(widths, default=0) >= WIDE
        self._layout = torch.channels_last if wide else torch.contiguous_format
        self.refresh()

    def __call__(self, x: Tensor) -> Any:
        if self.fused:  # its layers convert; autocast would do it around every operation
            with torch.autocast(x.device.type, enabled=False):
                return _in_dtype_of(x, self.module(x), self._dtype)
        if self._dtype is None:
            return self.module(x)
        with torch.autocast(x.device.type, self._dtype):
            return self.module(x)

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the parameters and statistics that the model has now, into the same memory.

        Raises:
            Refused: if they cannot be copied.
        """
        try:
            for part in self._parts:
                part.refresh(self._dtype, self._layout)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, TypeError) as error:  # raised by tensor subclasses, above all
            why = f"its weights cannot be folded ({type(error).__name__}: {error})"
            raise _NotFolded(why) from error


def _in_dtype_of(x: Tensor, result: Any, dtype: torch.dtype | None) -> Any:
    """Return what a model returns, with its tensors of this dtype in that of the input x."""
    if dtype is None or not x.is_floating_point():
        return result
    return tree_map_only(Tensor, lambda t: t.to(x.dtype) if t.dtype == dtype else t, result)


@dataclass
class _Served:
    """The view of a model, and what it was last found to agree with."""

    view: FastView
    model: list[Any]  # the model's footprint
    inputs: _Inputs


@dataclass
class _Refusal:
    """Why a model has no view, and what it was when that was found out."""

    why: str
    moved: frozenset[tuple[int, str]]  # attributes that its forward pass changes: not compared
    model: list[Any]
    inputs: _Inputs


_Dtype: TypeAlias = torch.dtype | None
_views: weakref.WeakKeyDictionary[nn.Module, dict[_Dtype, _Served]] = weakref.WeakKeyDictionary()
_refused: weakref.WeakKeyDictionary[nn.Module, dict[_Dtype, _Refusal]] = weakref.WeakKeyDictionary()


def fast_view(
    model: Callable[..., Any],
    x: Tensor,
    *,
    dtype: torch.dtype | None = None,
    output: Output = None,
) -> Callable[..., Any]:
    """Return a callable that computes what `model` does on inputs like x, and its input gradients.

    It has the weights of now; after the model has changed call its `refresh()`, or this function
    again. The model is not changed, and the generators of PyTorch, Python and NumPy are left as
    they were. The model itself is returned where it cannot have a view: it is compiled or scripted,
    has hooks or a `forward` of the instance, branches on values, draws random numbers, changes its
    own attributes, calls an autograd.Function, or switches gradients or autocast in its forward
    pass. The logger "pyadv" says which, at level INFO. Such a model is read again when what
    `footprint` sees of it changes. One thread at a time makes or refreshes a view. Other threads
    may run models meanwhile, except compiled ones, but must not draw random numbers.

    What is compared: a new view with the model on 8 samples of x; after each refresh on 2, in
    logits at every refresh and in input gradients once for every 128 samples attacked. On a GPU,
    which would have to be waited for, only a new footprint or kind of input is compared. The
    samples differ from call to call, by a fixed sequence, and each of their elements is moved up to
    5 % of the way to another sample's mean colour, so that equal pixels of flat regions do not
    leave it to rounding which of them is the largest. With u the machine epsilon of `dtype` or of
    the logits (2^-10 where a GPU multiplies in TF32), compared are

    - the logits: no entry may be farther from the model's than sqrt(u) of their largest, 3e-4 in
      float32 and 0.09 in bfloat16; 5e-6 is usual in float32;
    - the input gradient of a random combination of logits. For half of the samples its distance
      from the model's may be u^(1/4) of the L2 norm (0.02 in float32), for each of them 0.3: a
      single ReLU or maximum that rounding decides otherwise moves a gradient by a few percent.
      Arithmetic as coarse as TF32 decides many of them otherwise: there 0.4 and 0.9 are allowed,
      in 16 bits 0.9. A view in 16 bits is therefore compared once in the model's own dtype, too.

    What is guaranteed: these bounds on those samples at that moment. If a view deviates on a share
    p of the samples, n comparisons miss it with probability (1 - p)^(2 n); they do not see
    deviations below the bounds, or of second derivatives. The logger warns of a view that no longer
    agrees although the footprint is the same.

    Args:
        model: in evaluation mode; maps x to logits (B, C), or see `output`.
        x: (B, ...) an input; from an empty one nothing can be learned.
        dtype: torch.bfloat16 or torch.float16: on the CPU for convolutions and linear layers
            (autocast), on a GPU for all operations, with logits in the dtype of x.
        output: how to find the logits in what the model returns, as in `PGD`.

    Raises:
        ValueError: for a model in training mode, where BatchNorm is not an affine map.
    """
    model = unwrap(model)
    if not isinstance(model, nn.Module) or hasattr(model, "_orig_mod") or not len(x):
        return model
    modules = list(model.modules())
    if any(isinstance(m, torch.jit.ScriptModule) for m in modules):
        return model
    if any(m.training for m in modules):
        raise ValueError("fast_view: model must be in evaluation mode; call model.eval()")
    replaced = [m for m in modules if "forward" in vars(m)]
    if dtype is not None and replaced == [model] and hasattr(model, "_original_forward"):
        replaced = []  # Accelerate's autocast around the whole model: the view has its own
    if has_hooks(model) or replaced:
        return model
    kind = x.device.type
    if dtype is None and kind in CONVOLUTIONS and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)  # in which the model computes, too
    known, refused = _views.setdefault(model, {}), _refused.setdefault(model, {})
    inputs = _inputs(x, output)
    refusal = refused.get(dtype)
    if refusal and refusal.inputs == inputs and refusal.model == _seen(model, refusal.moved):
        return model  # reading it again would take long
    now, served = _seen(model), known.get(dtype)
    if served is not None and (served.model != now or served.inputs.device != x.device):
        served = None  # the model has changed
    try:
        with gradients_on(), kept_generators(x.device) as drawn:
            view = _agreeing(served, model, x, dtype, inputs, output, drawn)
    except Refused as error:
        why, moved = str(error), error.moved
        known.pop(dtype, None)
        refused[dtype] = _Refusal(why, moved, _seen(model, moved), inputs)
        _LOG.info("%s is attacked as it is, without a fast view: %s", type(model).__name__, why)
        return model
    known[dtype] = _Served(view, now, inputs)
    return view


def _agreeing(
    served: _Served | None,
    model: nn.Module,
    x: Tensor,
    dtype: torch.dtype | None,
    inputs: _Inputs,
    output: Output,
    drawn: Callable[[], bool],
) -> FastView:
    """Return the view in service, refreshed, if it still agrees with the model; else a new one.

    Raises:
        Refused: if a new view cannot be made, or does not agree.
    """
    stale: str | None = None
    if served is not None:
        served.view.refresh()
        if x.is_cuda and served.inputs == inputs:
            return served.view
        stale = _difference(served.view, model, x, dtype, output, drawn)
        if not stale:
            return served.view
    view, why = _new_view(model, x, dtype, output, drawn)
    if why:
        if stale:
            _LOG.warning(
                "the fast view of %s agreed with the model before and does not any more (%s). "
                "Attacks on it so far may have been weaker than on the model; from now on the "
                "model itself is attacked",
                type(model).__name__,
                why,
            )
        raise Refused(why)
    return view


def _new_view(
    model: nn.Module,
    x: Tensor,
    dtype: torch.dtype | None,
    output: Output,
    drawn: Callable[[], bool],
) -> tuple[FastView, str | None]:
    """Return a view, and how it differs from the model.

    If the fused form differs or fails, for instance in an operation that does not take 16 bits, the
    plain form is tried.
    """
    fused = CONVOLUTIONS.get(x.device.type)
    if fused is not None:
        try:
            view, why = _compared(model, x, dtype, output, drawn, fused)
            if not why:
                return view, None
        except _NotFolded as error:
            why = str(error)
        _LOG.info("the view of %s is not fused: %s", type(model).__name__, why)
    return _compared(model, x, dtype, output, drawn, None)


def _compared(
    model: nn.Module,
    x: Tensor,
    dtype: torch.dtype | None,
    output: Output,
    drawn: Callable[[], bool],
    fused: Convolutions | None,
) -> tuple[FastView, str | None]:
    """Return a view of this form, and how it differs from the model."""
    if dtype is not None:  # too much of a gradient is rounding in 16 bits to tell much of the graph
        with torch.autocast(x.device.type, enabled=False):
            own = getattr(model, "_original_forward", model)  # without Accelerate's autocast
            view = FastView(model, None, fused)
            why = _difference(view, own, x, None, output, drawn)
        if why:
            return view, why
    view = FastView(model, dtype, fused)
    return view, _difference(view, model, x, dtype, output, drawn)


@contextlib.contextmanager
def attacked(
    model: Callable[..., Any], x: Tensor, speed: Speed, bn: BatchNormMode, output: Output
) -> Iterator[Callable[..., Any]]:
    """Give what stands for the model during an attack: the model itself, or its view."""
    if speed == "exact" or bn != "eval":
        yield model
        return
    with torch.inference_mode(False), borrowed(unwrap(model)):
        yield fast_view(model, x, dtype=_DTYPES[speed], output=output)


def _inputs(x: Tensor, output: Output) -> _Inputs:
    kind = x.device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    return _Inputs(x.shape[1:], x.dtype, x.device, autocast, _marks(contents(output), set()))


def _seen(model: nn.Module, without: frozenset[tuple[int, str]] = frozenset()) -> list[Any]:
    """Return the model's footprint in a form that keeps nothing alive."""
    own = {id(t) for t in tensors(model)}  # views read them when they run
    return _marks(footprint(model, without), own)


def _marks(values: list[Any], own: set[int]) -> list[Any]:
    return [v if is_atom(v) or v is ... else _Mark(v, id(v) not in own) for v in values]


class _Mark:
    """The identity of an object, without keeping it alive, and the version of a tensor."""

    __slots__ = ("ref", "version")

    def __init__(self, value: Any, versioned: bool):
        try:
            self.ref: Any = weakref.ref(value)  # one object as long as both live
        except TypeError:
            self.ref = id(value)
        counts = versioned and isinstance(value, Tensor) and not value.is_inference()
        self.version = value._version if counts else None

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Mark) or self.version != other.version:
            return False
        return self.ref == other.ref if type(self.ref) is int else self.ref is other.ref


def _difference(
    view: FastView,
    model: Callable[..., Any],
    x: Tensor,
    dtype: torch.dtype | None,
    output: Output,
    drawn: Callable[[], bool],
) -> str | None:
    """Return how the view differs from the model; None if it agrees."""
    new = view.comparisons == 0
    view.attacked += len(x)
    gradients = new or view.attacked >= _EVERY
    if gradients:
        view.attacked = 0
    draw = random.Random(view.comparisons)
    view.comparisons += 1
    rows = draw.sample(range(len(x)), min(len(x), _ROWS_AT_FIRST if new else _ROWS))
    generator = torch.Generator().manual_seed(draw.getrandbits(63))
    points = _moved_inside(owned(x)[rows], generator)
    compared: list[tuple[_Look, _Look]] = []
    try:
        # A new view in both ways: a model may look at whether gradients are asked for.
        for asked in (True, False) if new else (gradients,):
            with torch.set_grad_enabled(asked):
                state = generator.get_state()
                ours = _Look(view, points, output, state)
                compared.append((ours, _Look(model, points, output, state)))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # the user's code, on fewer rows or in a form not foreseen
        return f"it fails on {len(rows)} samples ({type(error).__name__}: {error})".splitlines()[0]
    if drawn():
        return "it draws random numbers"
    for ours, theirs in compared:
        unit = max(torch.finfo(t).eps for t in (theirs.logits.dtype, dtype or theirs.logits.dtype))
        if x.is_cuda and convolution_precision() != "ieee":
            unit = max(unit, _TF32)
        if not _near(ours.logits, theirs.logits, math.sqrt(unit)):
            return "the logits of its graph differ"
        if (ours.gradient is None) != (theirs.gradient is None):
            return "its graph has an input gradient where the model has none, or the reverse"
        if ours.gradient is None or theirs.gradient is None:
            continue
        if not _along(ours.gradient, theirs.gradient, unit):
            return "the input gradient of its graph differs"
    return None


def _moved_inside(x: Tensor, generator: torch.Generator) -> Tensor:
    """Return x with each element moved towards its row's neighbour, by random shares.

    Of images it is the neighbour's mean colour. Flat regions become uneven, and no element leaves
    the range of its feature.
    """
    if not x.is_floating_point():
        return x
    share = _PULL * torch.rand(x.shape, generator=generator, device="cpu").to(x)
    other = x.roll(1, 0)
    if x.dim() > 2:
        other = other.mean(tuple(range(2, x.dim())), keepdim=True)
    return x + share * (other - x)


class _Look:
    """A network's logits at some points and, where gradients are on, the input gradient of a random
    combination of them."""

    def __init__(self, network: Callable[..., Any], x: Tensor, output: Output, state: Tensor):
        leaf = x.clone().requires_grad_(x.is_floating_point())
        logits = pick_logits(network(leaf), output)
        self.logits, self.gradient = logits.detach(), None
        if logits.requires_grad:
            generator = torch.Generator()
            generator.set_state(state)
            weights = torch.randn(logits.shape, generator=generator, device="cpu").to(logits)
            (self.gradient,) = torch.autograd.grad(logits, leaf, weights, allow_unused=True)


def _near(ours: Tensor, theirs: Tensor, tolerance: float) -> bool:
    """Return whether no entry is off by more than the tolerance times the largest finite entry."""
    if ours.shape != theirs.shape:
        return False
    a, b = ours.double(), theirs.double()
    off = torch.where(a == b, 0, (a - b).abs()).max()  # entries of -inf agree with themselves
    return bool(off <= tolerance * torch.where(b.isfinite(), b.abs(), 0).max())


def _along(ours: Tensor, theirs: Tensor, unit: float) -> bool:
    """Return whether input gradients agree, see `fast_view`."""
    half, each = (unit**0.25, 0.3) if unit < _TF32 / 4 else (0.4, 0.9)
    if unit > _TF32:
        half = each
    a, b = ours.double().flatten(1), theirs.double().flatten(1)
    off = torch.linalg.vector_norm(a - b, dim=1)
    size = torch.linalg.vector_norm(b, dim=1)
    near, close = off <= each * size, off <= half * size
    return bool(near.all() and 2 * int(close.sum()) >= len(close))
