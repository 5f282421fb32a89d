"""Ops on hostile arguments. A call must give what its reference gives, or a clear error, and leave
its inputs as they were."""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import inputs
import torch
from torch import Tensor

from fuzz import values
from fuzz.case import REFUSED, RIGHT, Draw, Finding, kept, require_clear, same_bits, show
from pyadv import ops, reference
from pyadv.tensors import compute_dtype

# Results that equal the reference bit for bit; those of the others round differently.
_BITS = {"linf_step", "linf_project", "linf_momentum_step", "square_step", "keep_rows_"}
_BITS |= {"keep_best_", "track", "keyed_uniform", "row_hash"}
_BITS |= {"affine_relu", "affine_relu_backward"}
_UNCHECKED = {"temperature", "exact", "center", "detach_weight"}  # types the schema refuses
# Units in the last place of the largest value; float64 has no wider form to say what is right.
_ROUNDING = {torch.float64: 16384}  # no wider arithmetic tells the exact result


@dataclass
class Call:
    """One call: positional and keyword arguments by name, and which of them it writes."""

    op: str
    args: dict[str, Any]
    writes: tuple[str, ...] = ()
    hostile: list[str] = field(default_factory=list)  # arguments that need not be legal

    @property
    def function(self) -> Callable[..., Any]:
        return getattr(ops, self.op)

    @property
    def names(self) -> list[str]:
        """What a clear error may name: an argument, besides words of the shared checks."""
        return [*inspect.signature(self.function).parameters, *self.args]


def case(draw: Draw) -> str:
    call = draw.choice(CALLS)(draw)
    _disguise(draw, call)
    _add_out(draw, call)
    if draw.chance(0.35):
        for _ in range(draw.choice((1, 1, 2))):
            name = draw.choice([n for n in call.args if n not in _UNCHECKED])
            value = values.wrong(draw, call.args[name])
            try:
                call.args[name] = value() if callable(value) and value is not float else value
            except (RuntimeError, TypeError):
                continue  # no such form of this tensor
            call.hostile.append(name)
    context = draw.choice((*("none",) * 6, *CONTEXTS))
    draw.note(op=call.op, hostile=call.hostile, context=context, **call.args)
    return check(call, context)


def check(call: Call, context: str = "none") -> str:
    """Run the call and its reference, and compare."""
    written = {n: call.args[n] for n in call.writes if isinstance(call.args.get(n), Tensor)}
    unchanged = kept({n: t for n, t in call.args.items() if n not in call.writes})
    expect = {n: _copy(t) if n in written else t for n, t in call.args.items()}
    rooms = {n: _around(t) for n, t in written.items()}
    try:
        with CONTEXTS.get(context, contextlib.nullcontext)():
            result = call.function(**call.args)
    except Exception as error:
        unchanged()
        if not call.hostile:
            raise Finding(f"refused a legal call: {type(error).__name__}: {error}") from error
        if call.op not in str(error):
            raise Finding(f"error does not name the op {call.op}: {error}") from error
        return require_clear(error, call.names)
    unchanged()
    for name, around in rooms.items():
        around(name)
    for name, t in (*written.items(), ("result", result)):
        given = t is call.args.get("out") or call.op in DIFFERENTIABLE
        if isinstance(t, Tensor) and t.requires_grad and not given:
            raise Finding(f"{name} requires grad")
    flat = [t for t in call.args.values() if isinstance(t, Tensor)]
    if any(t.is_meta or t.layout != torch.strided for t in flat):
        return REFUSED  # ran on shapes alone
    return _compare(call, result, expect, written)


def _compare(call: Call, result: Any, args: dict[str, Any], written: dict[str, Tensor]) -> str:
    args = {n: _plain(v) for n, v in args.items()}
    out = args.pop("out", None)
    try:
        expected = getattr(reference, call.op)(**args)
    except Exception as error:
        if call.hostile:  # taken by the op, which converts more than its reference
            return RIGHT
        raise Finding(f"the reference refuses what the op takes: {error}") from error
    pairs = []
    if out is not None:
        if result is not written["out"]:
            raise Finding("the result is not out")
    elif written:
        pairs = [(n, 0, written[n], args[n]) for n in written]
    flat = result if isinstance(result, tuple) else (result,)
    flat_expected = expected if isinstance(expected, tuple) else (expected,)
    if result is not None:
        both = zip(flat, flat_expected, strict=True)
        pairs += [(f"result {i}", i, *p) for i, p in enumerate(both)]
    wide, scale = None, _scale(args)
    for name, i, got, right in pairs:
        got, right = torch.atleast_1d(got.detach()), torch.atleast_1d(right.detach())
        if got.shape != right.shape or got.dtype != right.dtype:
            raise Finding(f"{name} is {show(got)}, and of the reference {show(right)}")
        if same_bits(got, right):
            continue
        if call.op in _BITS or not got.is_floating_point():
            raise Finding(f"{name} differs from the reference: {_difference(got, right)}")
        if wide is None:
            wide = _in_float64(call.op, args)
        if call.op not in _BITS and _no_set(args):
            continue
        if call.op not in _BITS and "x" in args:
            tame = _tame_rows([args[n] for n in ("x", "x_adv", "x_prev") if n in args])
            if "grad" in args:
                tame &= _steep_rows(args["grad"])
            got, right, wide_i = got[tame], right[tame], wide[i][tame]
        elif args.get("loss") == "kl":
            told = _told_apart(args["logits"], args["reference_logits"])
            got, right, wide_i = got[told], right[told], torch.atleast_1d(wide[i])[told]
        else:
            wide_i = torch.atleast_1d(wide[i])
        _require_near(name, got, right, wide_i, scale)
    return RIGHT


def _tame_rows(tensors: list[Tensor]) -> Tensor:
    """Rows of finite numbers whose differences do not overflow. The reference of an op on whole
    rows says nothing of others: only that nothing breaks."""
    tame = [t.double().abs() < torch.finfo(t.dtype).max / 4 for t in tensors]
    return torch.stack(tame).all(0).reshape(len(tensors[0]), -1).all(1)


def _steep_rows(grad: Tensor) -> Tensor:
    """Rows whose gradient is 0 or has an entry above the subnormal numbers: its reciprocal, by
    which kernels scale a row, does not overflow."""
    largest = grad.double().abs().reshape(len(grad), -1).amax(1)
    return ~((largest > 0) & (largest < torch.finfo(compute_dtype(grad.dtype)).tiny * 4))


def _scale(args: dict[str, Any]) -> float:
    """The largest finite magnitude among the inputs, whose rounding shows in the result."""
    flat = [v for a in args.values() for v in (a if isinstance(a, list) else [a])]
    tensors = [t.double() for t in flat if isinstance(t, Tensor) and t.is_floating_point()]
    largest = [t.where(t.isfinite(), 0).abs().max().item() for t in tensors if t.numel()]
    of_logits = any(name.startswith("logits") for name in args) or "like" in args
    return max([1.0 if of_logits else 1e-30, *largest])


def _in_float64(op: str, args: dict[str, Any]) -> tuple[Tensor, ...]:
    wide = {
        n: v.double() if isinstance(v, Tensor) and v.is_floating_point() and n != "u" else v
        for n, v in args.items()
    }
    wide |= {n: [w.double() for w in v] for n, v in args.items() if n == "weights"}
    result = getattr(reference, op)(**wide)
    return result if isinstance(result, tuple) else (result,)


def _require_near(name: str, got: Tensor, right: Tensor, exact: Tensor, scale: float) -> None:
    """Within four times the error of the reference in each row, plus some rounding of values of the
    size `scale`; with the same NaN and infinities."""
    if not got.numel():
        return
    special = ~(right.isfinite() & exact.isfinite())
    if not same_bits(got.where(~right.isfinite(), 0), right.where(~right.isfinite(), 0)):
        raise Finding(f"{name} has other NaN or infinities: {_difference(got, right)}")
    far = exact.abs() > 1e-6 * torch.finfo(got.dtype).max  # where factors of it have overflown
    special |= far.reshape(len(far), -1).any(1).view(-1, *(1,) * (got.dim() - 1))
    g, r, e = ((t.double().where(~special, 0.0)).reshape(len(t), -1) for t in (got, right, exact))
    rounding = _ROUNDING.get(got.dtype, 64) * torch.finfo(got.dtype).eps
    allowed = 4 * (r - e).abs().amax(1) + rounding * (e.abs().amax(1) + scale)
    error = (g - e).abs().amax(1)
    if bool((error > allowed).any()):
        row = int((error - allowed).argmax())
        raise Finding(
            f"{name} is off by {float(error[row]):.3e} in row {row}, allowed "
            f"{float(allowed[row]):.3e}: {_difference(got, right)}"
        )


def _difference(got: Tensor, right: Tensor) -> str:
    got, right = got.flatten(), right.flatten()
    other = ~((got == right) | (got.isnan() & right.isnan()))
    at = other.nonzero()[:4, 0].tolist()
    return f"{int(other.sum())} of {got.numel()} elements, at {at}: " + ", ".join(
        f"{got[i].item()!r} for {right[i].item()!r}" for i in at
    )


def _plain(value: Any) -> Any:
    """As the reference takes it: no gradient, numbers as Python's."""
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value


def _copy(t: Tensor) -> Tensor:
    return t.detach().clone()


def _told_apart(logits: Tensor, reference_logits: Tensor) -> Tensor:
    """Return the rows whose probabilities differ by a normal number somewhere. The kernel's
    exponentials are 0 below, and its direction is then 0, too."""
    p, q = (t.double().softmax(1) for t in (logits, reference_logits))
    least = torch.finfo(torch.float64 if logits.dtype == torch.float64 else torch.float32).tiny
    apart = (p - q).abs().amax(1)
    return (apart == 0) | ~(apart < least)


def _no_set(args: dict[str, Any]) -> bool:
    """Return whether a radius or bound is NaN, a step infinite, or the box empty at infinity: the
    contract says nothing of the result then."""

    def any_of(name: str, bad: Callable[[Tensor], Tensor]) -> bool:
        value = args.get(name)
        if value is None:
            return False
        value = value if isinstance(value, Tensor) else float(value)
        return bool(bad(torch.as_tensor(value).double()).any())

    sizes = ("alpha", "eps", "lo", "hi", "momentum", "share", "overshoot", "value")
    return (
        any(any_of(n, torch.isnan) for n in sizes)
        or any_of("alpha", torch.isinf)
        or any_of("lo", lambda t: t == torch.inf)
        or any_of("hi", lambda t: t == -torch.inf)
    )


def _around(t: Tensor) -> Callable[[str], None]:
    """A check that nothing in t's storage has changed but the elements of t."""
    if t.layout != torch.strided or t.is_meta or t.is_neg() or t.is_quantized:
        return lambda name: None
    if any(n > 1 and not s for n, s in zip(t.shape, t.stride(), strict=True)):
        return lambda name: None  # elements share memory, so the op refuses to write
    with torch.inference_mode(False), torch.no_grad():
        whole = torch.empty(0, dtype=t.dtype).set_(t.untyped_storage())
        before = whole.clone()

    def check(name: str) -> None:
        with torch.inference_mode(False), torch.no_grad():
            now = torch.empty(0, dtype=t.dtype).set_(t.untyped_storage())
            before.as_strided(t.shape, t.stride(), t.storage_offset()).copy_(t.detach())
            if not same_bits(now, before):
                raise Finding(f"wrote beside the elements of {name}")

    return check


def _disguise(draw: Draw, call: Call) -> None:
    for name, value in call.args.items():
        if isinstance(value, Tensor) and draw.chance(0.08):
            # A leaf that requires grad may not be written in place, nor an inference tensor.
            if name in call.writes:
                continue
            if (call.op, name) == ("weighted_cross_entropy", "y"):
                continue  # soft labels are constants, and refused if they are none
            call.args[name] = values.disguised(draw, value)


def _add_out(draw: Draw, call: Call) -> None:
    """`out=` for the ops that have one: one of the inputs, a fresh tensor, or one that overlaps."""
    if "out" not in inspect.signature(call.function).parameters or not draw.chance(0.4):
        return
    first = next(iter(call.args.values()))
    tensors = [
        n
        for n, t in call.args.items()
        if isinstance(t, Tensor)
        and (t.shape, t.dtype) == (first.shape, first.dtype)
        and n not in ("lo", "hi", "eps", "alpha")
        and (call.op, n) != ("square_step", "x")  # which it refuses
    ]
    kind = draw.choice(("fresh", "fresh", "input", "input", "overlap", "expanded", "wrong"))
    call.writes = ("out",)
    if kind == "fresh":
        out = torch.full_like(first.detach(), 5.0)
        call.args["out"] = values.placed(draw, out, lambda: draw.choice((1, 2)))
    elif kind == "input":
        name = draw.choice(tensors)
        target = call.args[name]
        legal = not (target.requires_grad or target.is_inference() or target.is_neg())
        legal &= target.is_contiguous() or 0 not in target.stride()
        call.args["out"] = target
        call.writes += (name,)
        if not legal:
            call.hostile.append("out")
        else:
            call.args["out"] = target
    elif kind == "overlap" and first.numel() > 1:
        room = torch.zeros(first.numel() + 1, dtype=first.dtype)
        name = draw.choice(tensors)
        call.args[name] = room[:-1].view(first.shape).copy_(call.args[name].detach())
        call.args["out"] = room[1:].view(first.shape)
        call.writes += (name,)  # not looked at: it must be refused
        call.hostile.append("out")
    elif kind == "expanded":
        call.args["out"] = first.detach()[..., :1].clone().expand(first.shape)
        call.hostile.append("out")
    else:
        call.args["out"] = values.laid_out(draw, torch.zeros_like(first.detach()))
        call.hostile.append("out")


# What surrounds a call


@contextlib.contextmanager
def _default_dtype() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def _deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


CONTEXTS: dict[str, Callable[[], Any]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "float64 by default": _default_dtype,
    "meta by default": lambda: torch.device("meta"),
    "deterministic": _deterministic,
    "anomaly": lambda: torch.autograd.detect_anomaly(check_nan=False),
}


# Legal calls


def _batch(draw: Draw, count: int, size: tuple[int, ...] | None = None) -> list[Tensor]:
    dtype = draw.choice(inputs.DTYPES)
    size = values.shape(draw) if size is None else size
    tame = draw.chance(0.6)
    return [values.laid_out(draw, values.floats(draw, size, dtype, tame)) for _ in range(count)]


def _mask(draw: Draw, rows: int) -> Tensor | None:
    if draw.chance(0.5):
        return None
    return values.laid_out(draw, torch.rand(rows, generator=draw.generator()) < 0.6)


def _step(draw: Draw, op: str) -> Call:
    momentum, boundary = "momentum" in op, "boundary" in op
    x_adv, grad, x, x_prev = _batch(draw, 4)
    per_row = op not in _BITS
    args: dict[str, Any] = {"x_adv": x_adv}
    if momentum:
        args["x_prev"] = x_prev
    args |= {"grad": grad, "x": x}
    if boundary:
        args["value"] = values.parameter(draw, x, True, nonnegative=False)
        args["share"] = values.parameter(draw, x, True, top=1.0)
        args["overshoot"] = values.parameter(draw, x, True, top=1.05)
    else:
        args["alpha"] = values.parameter(draw, x, per_row)
        args["eps"] = values.parameter(draw, x, per_row)
    if momentum:
        args["momentum"] = values.parameter(draw, x, True, top=1.0)
    args["lo"], args["hi"] = values.bounds(draw, x)
    args["active"] = _mask(draw, x.shape[0])
    if op == "l1_step":
        args["keep"] = values.parameter(draw, x, True, top=1.0)
    return Call(op, args)


def _projection(draw: Draw, op: str) -> Call:
    x_adv, x = _batch(draw, 2)
    args: dict[str, Any] = {"x_adv": x_adv, "x": x}
    args["eps"] = values.parameter(draw, x, per_row=op != "linf_project")
    args["lo"], args["hi"] = values.bounds(draw, x)
    if op == "l2_project":
        args["exact"] = draw.chance(0.5)
    return Call(op, args)


def _square(draw: Draw) -> Call:
    size = (
        draw.choice((1, 2, 5)),
        draw.choice((1, 3)),
        draw.choice((1, 4, 9)),
        draw.choice((3, 8)),
    )
    x_adv, x_best, x = _batch(draw, 3, size)
    u = torch.rand(size[0], 2 + size[1], generator=draw.generator())
    side = draw.randint(1, min(size[2:]))
    args = {"x_adv": x_adv, "x_best": x_best, "x": x, "u": values.laid_out(draw, u), "side": side}
    args["eps"] = values.parameter(draw, x)
    args["lo"], args["hi"] = values.bounds(draw, x)
    return Call("square_step", args | {"active": _mask(draw, size[0])})


def _keep_rows(draw: Draw) -> Call:
    x, grad, x_best, grad_best = _batch(draw, 4)
    mask = torch.rand(x.shape[0], generator=draw.generator()) < 0.5
    args = {"mask": mask, "x": x, "grad": grad, "x_best": x_best.contiguous().clone()}
    args["grad_best"] = values.placed(draw, grad_best, lambda: draw.choice((1, 2)))
    args["grad_best"] = args["grad_best"].clone() if draw.chance(0.5) else args["grad_best"]
    return _writing("keep_rows_", args, ("x_best", "grad_best"))


def _keep_best(draw: Draw) -> Call:
    x, grad, x_best, grad_best = _batch(draw, 4)
    dtype = draw.choice(inputs.DTYPES)
    loss, loss_best = (values.floats(draw, x.shape[:1], dtype) for _ in range(2))
    if draw.chance(0.5):
        grad = grad_best = None
    args = {"loss": values.laid_out(draw, loss), "x": x, "grad": grad, "loss_best": loss_best}
    args |= {"x_best": x_best, "grad_best": grad_best}
    return _writing("keep_best_", args, ("loss_best", "x_best", "grad_best"))


def _track(draw: Draw) -> Call:
    n, g = draw.choice((0, 1, 7, 64, 1001)), draw.generator()
    args = {
        "correct": values.laid_out(draw, torch.rand(n, generator=g) < 0.5),
        "kappa": torch.randint(0, 9, (n,), generator=g),
        "active": torch.rand(n, generator=g) < 0.7,
        "patience": torch.randint(0, 3, (n,), generator=g),
    }
    return _writing("track", args, ("kappa", "active", "patience"))


def _writing(op: str, args: dict[str, Any], writes: tuple[str, ...]) -> Call:
    """What is written needs memory of its own."""
    for name in writes:
        t = args[name]
        if t is not None and not t.is_contiguous():
            args[name] = t.clone(memory_format=torch.contiguous_format)
    return Call(op, args, writes)


def _logits(draw: Draw, count: int, least: int = 2) -> tuple[list[Tensor], Tensor]:
    rows, classes = draw.choice((0, 1, 2, 5, 9)), draw.choice((2, 3, 4, 5, 10, 16, 17, 100, 1000))
    size, dtype = (rows, max(classes, least)), draw.choice(inputs.DTYPES)
    scale = draw.choice((1.0, 1.0, 5.0, 30.0, 1000.0))
    # Rows that are not finite have rules of their own, which the ops' tests hold.
    z = [values.floats(draw, size, dtype, tame=True) * scale for _ in range(count)]
    y = torch.randint(size[1], (rows,), generator=draw.generator())
    if rows and draw.chance(0.1):
        y[0] = draw.choice((-1, size[1], -(2**62), 2**62, -100))
    return [values.laid_out(draw, t) for t in z], values.laid_out(draw, y)


def _attack_loss(draw: Draw) -> Call:
    loss = draw.choice(ops.losses.ATTACK_LOSSES)
    (logits, natural), y = _logits(draw, 2, 4)
    args = {"logits": logits, "y": y, "loss": loss, "reference_logits": None, "target": None}
    args["scale"] = draw.choice(("unit", "exact"))
    if loss == "kl":
        args["reference_logits"] = natural
    if loss.endswith("_targeted"):
        args["target"] = torch.randint(logits.shape[1], y.shape, generator=draw.generator())
    return Call("attack_loss", args)


def _cross_entropy(draw: Draw) -> Call:
    (logits, soft), y = _logits(draw, 2)
    args = {"logits": logits, "y": y, "weight": None, "ignore_index": None}
    if draw.chance(0.3):
        args["y"] = soft.float().softmax(1).to(logits.dtype)
    elif draw.chance(0.5):
        args["ignore_index"] = draw.choice((-1, 0, -100))
    if draw.chance(0.5):
        args["weight"] = values.floats(draw, y.shape, draw.choice(inputs.DTYPES), tame=True)
    return Call("weighted_cross_entropy", args)


def _divergence(draw: Draw) -> Call:
    (logits_adv, logits), y = _logits(draw, 2)
    kind = draw.choice(("trades_kl", "mart_bce", "mart_kl"))
    if kind == "trades_kl":
        return Call(kind, {"logits_adv": logits_adv, "logits": logits})
    if kind == "mart_bce":
        return Call(kind, {"logits_adv": logits_adv, "y": y, "exact": draw.chance(0.5)})
    args = {"logits_adv": logits_adv, "logits": logits, "y": y, "exact": draw.chance(0.5)}
    return Call(kind, args | {"detach_weight": draw.chance(0.5)})


def _of_logits(draw: Draw) -> Call:
    (logits, logits_adv), y = _logits(draw, 2)
    kind = draw.choice(("softmax_cotangent", "row_stats", "probabilistic_margin"))
    if kind == "softmax_cotangent":
        args = {"logits": logits, "temperature": draw.choice((0.01, 1.0, 40.0, 3))}
        return Call(kind, args | {"center": draw.chance(0.5)})
    if kind == "row_stats":
        return Call(kind, {"logits": logits, "y": y})
    args = {"logits": logits, "y": y, "logits_adv": logits_adv}
    return Call(kind, args | {"kind": draw.choice(("nat", "adv", "dif", "dif_conf"))})


def _weights(draw: Draw) -> Call:
    n, g = draw.choice((0, 1, 6, 129)), draw.generator()
    if draw.chance(0.5):
        steps = draw.choice((1, 2, 7, 10))
        kappa = values.laid_out(draw, torch.randint(0, steps + 1, (n,), generator=g))
        args = {"kappa": kappa, "steps": steps}
        args["lam"] = draw.choice((-1.0, 0, 3.5, math.inf, -math.inf, torch.tensor(-1.0), 1e30))
        args["kind"] = draw.choice(("tanh", "sigmoid", "discrete"))
        args["normalize"] = draw.choice(("mean", "sum", "none"))
        args["slope"] = draw.choice((None, 0.0, 5.0, 2))
        return Call("gairat_weights", args | {"int_half": draw.chance(0.5)})
    margin = values.floats(draw, (n,), draw.choice(inputs.DTYPES), tame=True) * 2 - 1
    args = {"margin": values.laid_out(draw, margin), "slope": draw.choice((10.0, -3, 0.0))}
    args["bias"] = draw.choice((-0.5, 0, torch.tensor(0.25)))
    return Call("mail_weights", args | {"normalize": draw.choice(("mean", "x3", "none"))})


def _norms(draw: Draw) -> Call:
    dtype, kind = draw.choice(inputs.DTYPES), draw.choice(("frobenius", "frobenius", "spectral"))
    dims = (2, 4) if kind == "spectral" else (1, 2, 4)
    sizes = [values.shape(draw, dims) for _ in range(draw.choice((1, 2, 5)))]
    if kind == "spectral":  # torch has no largest of none
        sizes = [s for s in sizes if math.prod(s)] or [(2, 3)]
    weights = [values.laid_out(draw, values.floats(draw, s, dtype, tame=True)) for s in sizes]
    op = draw.choice(("norms", "log_norm_product"))
    return Call(op, {"weights": weights, "kind": kind})


def _noise(draw: Draw) -> Call:
    (like,) = _batch(draw, 1)
    if draw.chance(0.3):
        return Call("row_hash", {"x": like})
    ids = torch.randint(-(2**62), 2**62, like.shape[:1], generator=draw.generator())
    args = {"like": like, "ids": values.laid_out(draw, ids)}
    args["seed"] = draw.choice((0, -1, 2**63, 2**64 - 1, -(2**63), torch.tensor(5)))
    args["stream"] = draw.choice((0, 1, 2**32 - 1, torch.tensor(7), torch.tensor(-1)))
    return Call(draw.choice(("keyed_uniform", "keyed_normal")), args)


def _row_square_sum(draw: Draw) -> Call:
    (g,) = _batch(draw, 1)
    return Call("row_square_sum", {"g": g})


def _convolution(draw: Draw) -> Call:
    n, c, b = (draw.choice((1, 2, 3, 31, 32, 33)) for _ in range(3))
    b, stride = min(b, 3), draw.choice((1, 2))
    height, width = (draw.choice((3, 4, 5, 8, 9, 13)) for _ in range(2))
    padding = 1 if stride == 2 else draw.choice((0, 1, 2))
    g = draw.generator()
    plain = torch.randn(n, c, 3, 3, generator=g)
    if draw.chance(0.2):
        args = {"weight": values.laid_out(draw, plain), "transposed": draw.chance(0.5)}
        return Call("winograd_weight", args | {"stride": stride})
    if draw.chance(0.5):
        x = values.laid_out(draw, torch.randn(b, c, height, width, generator=g))
        args = {"x": x, "weight": reference.winograd_weight(plain, False, stride), "bias": None}
        if draw.chance(0.5):
            args["bias"] = torch.randn(n, generator=g)
        args |= {"outputs": n, "padding": padding, "stride": stride, "added": None}
        return Call("winograd_conv2d", args | {"relu": draw.chance(0.5)})
    size = [(d + 2 * padding - 3) // stride + 1 for d in (height, width)]
    grad = values.laid_out(draw, torch.randn(b, n, *size, generator=g))
    args = {"grad": grad, "weight": reference.winograd_weight(plain, True, stride)}
    args |= {"shape": (b, c, height, width), "padding": padding, "stride": stride}
    mask = torch.randn(b, c, height, width, generator=g) if draw.chance(0.5) else None
    return Call("winograd_conv2d_input", args | {"mask": mask})


def _affine_relu(draw: Draw) -> Call:
    x, added, grad, other = _batch(draw, 4)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32

    def channels() -> Tensor | None:
        if x.dim() < 2 or draw.chance(0.5):
            return None
        return values.laid_out(draw, torch.randn(x.shape[1], generator=draw.generator()).to(wide))

    args: dict[str, Any] = {"scale": channels(), "slope": draw.choice((0.0, 0.1, 1.0))}
    args["added"] = added if draw.chance(0.5) else None
    if draw.chance(0.5):
        args["other"] = other if draw.chance(0.5) else None
        return Call("affine_relu_backward", {"y": x, "grad": grad, **args})
    args["keep_sum"] = args["added"] is not None and draw.chance(0.5)
    return Call("affine_relu", {"x": x, "shift": channels(), **args})


def _of(make: Callable[[Draw, str], Call], op: str) -> Callable[[Draw], Call]:
    return lambda draw: make(draw, op)


STEPS = ("linf_step", "l2_step", "l1_step", "linf_momentum_step", "l2_momentum_step")
STEPS += ("linf_boundary_step", "l2_boundary_step")
PROJECTIONS = ("linf_project", "l2_project", "l1_project")
DIFFERENTIABLE = {"weighted_cross_entropy", "trades_kl", "mart_bce", "mart_kl", "row_square_sum"}
DIFFERENTIABLE |= {"norms", "log_norm_product"}
CALLS: tuple[Callable[[Draw], Call], ...] = (
    *(_of(_step, op) for op in STEPS),
    *(_of(_projection, op) for op in PROJECTIONS),
    *(_square, _keep_rows, _keep_best, _track, _attack_loss, _attack_loss, _cross_entropy),
    *(_divergence, _divergence, _of_logits, _of_logits, _weights, _weights, _norms, _noise),
    *(_noise, _row_square_sum, _convolution, _affine_relu),
)
