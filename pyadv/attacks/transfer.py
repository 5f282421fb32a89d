"""Transfer attacks: their examples are meant to fool other models than the one they are made on.
They are MI-FGSM along a gradient that is averaged over altered inputs."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from pyadv.attacks.fgsm import MIFGSM
from pyadv.engine import checks
from pyadv.engine.attack import functional
from pyadv.engine.loop import input_gradient
from pyadv.engine.rules import MomentumRule
from pyadv.engine.state import State
from pyadv.engine.task import Model, memory
from pyadv.passes.borrow import pick_logits
from pyadv.tensors import broadcastable, compute_dtype, per_row, widen

Kernel: TypeAlias = Literal["gaussian", "linear", "uniform"]
KERNELS: tuple[Kernel, ...] = get_args(Kernel)
_NEIGHBOUR, _RESIZE, _MIX = range(3)  # kinds of noise


@dataclass(frozen=True, eq=False)
class _Shared:
    """A tensor that all samples share. The engine selects rows of tensors, but not of this.
    It is compared by value, so it has no hash."""

    tensor: Tensor

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Shared) and torch.equal(self.tensor, other.tensor)


@dataclass
class TransferRule(MomentumRule):
    """The rule of `TransferFGSM`, whose arguments its fields are. It steps like MI-FGSM, along the
    mean gradient of the altered inputs."""

    nesterov: bool = False
    diversity: float = 0.0
    resize: float = 0.9
    kernel: int = 0
    kernel_shape: Kernel = "gaussian"
    kernel_sigmas: float = 3.0
    scales: int = 1
    images: _Shared | None = None
    mixes: int = 1
    mix_share: float = 0.0
    neighbours: int = 0
    neighbourhood: float = 1.5
    number: Tensor = memory()  # of the first draw of this step
    window: _Shared = memory()  # (kernel,) weights
    variance: Tensor = memory()  # mean gradient of the neighbours minus that of the iterate

    @property
    def draws_noise(self) -> bool:
        return self.diversity > 0 or self.images is not None or self.neighbours > 0

    @property
    def copies(self) -> int:
        """The number of gradients that are averaged at each point."""
        return self.scales * (self.mixes if self.images is not None else 1)

    def begin(self, state: State) -> TransferRule:
        x = state.x
        if (self.diversity or self.kernel) and x.dim() != 4:
            raise ValueError(
                "TransferFGSM needs images (B, C, H, W) for diversity and kernel, got x of shape "
                f"{list(x.shape)}"
            )
        self._check_images(x)
        begun = replace(
            super().begin(state),
            number=torch.zeros((), dtype=torch.int64, device=x.device),
            window=_Shared(self._window(widen(x))),
        )
        return replace(begun, variance=torch.zeros_like(widen(x))) if self.neighbours else begun

    def _check_images(self, x: Tensor) -> None:
        if self.images is None:
            return
        images = self.images.tensor
        if images.shape[1:] != x.shape[1:] or images.device != x.device:
            raise ValueError(
                f"images must have shape (N, {', '.join(map(str, x.shape[1:]))}) on {x.device}, as "
                f"x has, got {list(images.shape)} on {images.device}"
            )

    def _window(self, like: Tensor) -> Tensor:
        """Return the weights of the kernel along one side, whose sum is 1."""
        end = self.kernel_sigmas if self.kernel_shape == "gaussian" else (self.kernel - 1) / 2
        t = torch.linspace(-end, end, self.kernel, dtype=like.dtype, device=like.device)
        if self.kernel_shape == "gaussian":
            weights = torch.exp(-t.square() / 2)
        elif self.kernel_shape == "linear":
            weights = 1 - t.abs() * 2 / (self.kernel + 1)
        else:
            weights = torch.ones_like(t)
        return weights / weights.sum()

    def schedule(self, state: State, k: int) -> None:
        draws = self.copies * (1 + self.neighbours)
        self.number.fill_(1 + k * draws)

    def direction(
        self,
        state: State,
        kind: Hashable,
        logits: Tensor,
        leaf: Tensor,
        gradient: Callable[[], tuple[Tensor, int]],
    ) -> tuple[Tensor, int]:
        """Return the gradient to accumulate, and how many backward passes it took."""
        x_adv = leaf.detach()
        if self.nesterov or self.diversity or self.copies > 1 or self.images is not None:
            point = x_adv
            if self.nesterov:
                ahead = self.decay * broadcastable(state.settings.alpha, self.total) * self.total
                point = (widen(x_adv) + ahead).to(x_adv.dtype)
            grad, passes = self._gradient(state, point, 0), self.copies
        else:
            grad, passes = gradient()
            grad = widen(grad)
        total = grad
        if self.neighbours:
            total = grad + self.variance
            around = torch.zeros_like(grad)
            for j in range(1, self.neighbours + 1):
                u = state.noise.uniform(grad, self.number + j * self.copies, _NEIGHBOUR)
                radius = self.neighbourhood * broadcastable(state.settings.eps, grad)
                point = (widen(x_adv) + (2 * u - 1) * radius).to(x_adv.dtype)
                around += self._gradient(state, point, j * self.copies)
            difference = around / self.neighbours - grad
            self.variance.copy_(torch.where(difference.isfinite(), difference, 0.0))
            passes += self.neighbours * self.copies
        if self.kernel:
            total = _smoothed(total, self.window.tensor)
        return total.to(leaf.dtype), passes

    def _gradient(self, state: State, point: Tensor, first: int) -> Tensor:
        """Return the mean of the gradients at `point` over the altered copies of it. `first` is the
        number of their first draw within the step."""
        s = state.settings
        total, draw = torch.zeros_like(widen(point)), first
        for _ in range(self.copies // self.scales):
            for scale in range(self.scales):
                leaf = point.clone().requires_grad_()
                altered = self._altered(state, leaf, scale, self.number + draw)
                logits = pick_logits(state.model(altered), s.output, len(altered))
                _, grad_logits, _ = s.loss.at(logits, state.y, state.reference_logits, state.target)
                total += input_gradient(logits, leaf, grad_logits)
                draw += 1
        state.queries += self.copies * state.active
        return total / self.copies

    def _altered(self, state: State, x: Tensor, scale: int, number: Tensor) -> Tensor:
        if self.images is not None:
            images = self.images.tensor
            # The scales of one mixture share its image.
            u = _column(state, number - scale, 1, _MIX)[:, 0]
            x = x + self.mix_share * images[(u * len(images)).long()].to(x.dtype)
        if scale:
            x = x / 2**scale
        if self.diversity:
            u = _column(state, number, 4, _RESIZE)
            resized = _resized_and_padded(widen(x), self.resize, *u[:, :3].T).to(x.dtype)
            x = torch.where(per_row(u[:, 3] < self.diversity, x), resized, x)
        return x


def _column(state: State, number: Tensor, width: int, kind: int) -> Tensor:
    """Return (B, width) uniform numbers, a row for each sample."""
    x = state.x
    like = torch.empty(len(x), width, dtype=compute_dtype(x.dtype), device=x.device)
    return state.noise.uniform(like, number, kind)


def _smoothed(images: Tensor, window: Tensor) -> Tensor:
    """Return images (B, C, H, W) convolved with the square kernel window x window."""
    before = (len(window) - 1) // 2
    after = len(window) - 1 - before
    planes = F.pad(images.reshape(-1, 1, *images.shape[2:]), (before, after, before, after))
    planes = F.conv2d(planes, window.view(1, 1, -1, 1))
    return F.conv2d(planes, window.view(1, 1, 1, -1)).view(images.shape)


def _resized_and_padded(
    images: Tensor, least: float, size: Tensor, top: Tensor, left: Tensor
) -> Tensor:
    """Return images (B, C, H, W) shrunk to a random size and padded with zeros to their old size.

    Args:
        least: the smallest size, as a share of the old one.
        size, top, left: (B,) uniform numbers in [0, 1) that choose size and place of each sample.
    """
    matrices = []
    for n, place in zip(images.shape[2:], (top, left), strict=True):
        low = max(int(n * least), 1)
        pixels = low + (size * (n - low)).floor()
        matrices.append(_interpolation(n, pixels, (place * (n - pixels + 1)).floor()))
    down, across = matrices
    return torch.einsum("bij,bcjk,blk->bcil", down, images, across)


def _interpolation(n: int, pixels: Tensor, first: Tensor) -> Tensor:
    """Return (B, n, n): the matrices that shrink a line of n pixels to `pixels` (B,) pixels by
    linear interpolation, and put it at place `first` (B,) of n pixels that are otherwise 0."""
    at = torch.arange(n, device=pixels.device, dtype=pixels.dtype)
    place = at - first[:, None]
    inside = (place >= 0) & (place < pixels[:, None])
    source = ((place + 0.5) * (n / pixels[:, None]) - 0.5).clamp(0, n - 1)
    weights = (1 - (source[..., None] - at).abs()).clamp(min=0)
    return torch.where(inside[..., None], weights, 0.0)


class TransferFGSM(MIFGSM):
    """MI-FGSM along a gradient that is averaged or smoothed, so that the examples also fool models
    that were not attacked. All settings below compose; without them this is `MIFGSM`. `DIFGSM`,
    `TIFGSM`, `NIFGSM`, `SINIFGSM`, `VMIFGSM`, `VNIFGSM` and `Admix` have those of the papers.

    Takes what `MIFGSM` takes except `eot`, and

    Args:
        nesterov: take the gradient at the point that momentum leads to.
        diversity: the probability with which an input is shrunk and padded, each sample by itself.
        resize: the smallest size then, as a share of the image's, in (0, 1).
        kernel: length of the kernel that smooths the gradient, as a mean over translations of the
            input; 0 for none.
        kernel_shape: "gaussian", "linear" or "uniform".
        kernel_sigmas: standard deviations from the middle of the Gaussian kernel to its end.
        scales: average the gradients of x, x/2, x/4, ... (so many).
        images: (N, ...) images to mix in, of shape and device of x; None for none.
        mixes: how many images to mix in, one after the other; the gradients are averaged.
        mix_share: the factor of the image that is added to x.
        neighbours: how many points around the iterate tune the gradient at the next one; 0 for
            none.
        neighbourhood: how far away they are at most, in units of eps.

    The gradients of copies are averaged, so `scale` is "exact" with `scales`, `images` and
    `neighbours`. Each copy costs one forward and one backward pass, which `queries` and `gradients`
    count.

    Raises:
        ValueError, TypeError: at construction for settings, at the call for x, y and the model's
            logits.
    """

    def __init__(
        self,
        model: Model | None = None,
        *,
        nesterov: bool = False,
        diversity: float = 0.0,
        resize: float = 0.9,
        kernel: int = 0,
        kernel_shape: Kernel = "gaussian",
        kernel_sigmas: float = 3.0,
        scales: int = 1,
        images: Tensor | None = None,
        mixes: int = 3,
        mix_share: float = 0.2,
        neighbours: int = 0,
        neighbourhood: float = 1.5,
        **settings: Any,
    ):
        checks.share("diversity", diversity, zero=True, one=True)
        checks.share("resize", resize)
        checks.count("kernel", kernel, 0)
        checks.choice("kernel_shape", kernel_shape, KERNELS)
        checks.size("kernel_sigmas", kernel_sigmas, tensor=False)
        checks.count("scales", scales, 1)
        checks.count("mixes", mixes, 1)
        checks.size("mix_share", mix_share, tensor=False)
        checks.count("neighbours", neighbours, 0)
        checks.size("neighbourhood", neighbourhood, tensor=False)
        if images is not None and not (isinstance(images, Tensor) and len(images)):
            raise ValueError(f"images must be a tensor of one image or more, got {images!r}")
        if settings.get("eot", 1) != 1:
            raise ValueError(
                "eot must be 1: scales, images and neighbours say which gradients are averaged, "
                f"got {settings['eot']!r}"
            )
        if scales > 1 or images is not None or neighbours:
            if settings.get("scale") == "unit":
                raise ValueError(
                    'scale must be "exact" with scales, images or neighbours, because a mean needs '
                    'gradients of one scale, got "unit"'
                )
            settings["scale"] = "exact"
        super().__init__(model, **settings)
        rule = TransferRule(
            self._rule.decay,
            nesterov=nesterov,
            diversity=diversity,
            resize=resize,
            kernel=kernel,
            kernel_shape=kernel_shape,
            kernel_sigmas=kernel_sigmas,
            scales=scales,
            images=None if images is None else _Shared(images.detach()),
            mixes=mixes,
            mix_share=mix_share,
            neighbours=neighbours,
            neighbourhood=neighbourhood,
        )
        self.settings = replace(self.settings, rule=rule)

    def _search_words(self) -> list[str]:
        r = self._rule
        return [
            *super()._search_words(),
            f"decay {r.decay:g}",
            *(["Nesterov"] if r.nesterov else []),
            *([f"diversity {r.diversity:g} from {r.resize:g}"] if r.diversity else []),
            *([f"{r.kernel_shape} kernel {r.kernel}"] if r.kernel else []),
            *([f"{r.scales} scales"] if r.scales > 1 else []),
            *([f"{r.mixes} mixes of {r.mix_share:g}"] if r.images is not None else []),
            *([f"{r.neighbours} neighbours at {r.neighbourhood:g} eps"] if r.neighbours else []),
        ]


class DIFGSM(TransferFGSM):
    """DI-FGSM, whose gradients are those of shrunk and padded inputs. `decay=0` is the paper's
    DI2-FGSM, the default its M-DI2-FGSM.

    Takes what `TransferFGSM` takes.

    Source: Xie et al., "Improving Transferability of Adversarial Examples with Input Diversity"
    (CVPR 2019). There a batch shares the size and the place; here each sample has its own.
    """

    def __init__(self, model: Model | None = None, *, diversity: float = 0.5, **settings: Any):
        super().__init__(model, diversity=diversity, **settings)


class TIFGSM(TransferFGSM):
    """TI-FGSM, whose gradients are convolved with a kernel. With `diversity=0.7` it is the paper's
    TI-DIM.

    Takes what `TransferFGSM` takes.

    Source: Dong et al., "Evading Defenses to Transferable Adversarial Examples by
    Translation-Invariant Attacks" (CVPR 2019).
    """

    def __init__(self, model: Model | None = None, *, kernel: int = 15, **settings: Any):
        super().__init__(model, kernel=kernel, **settings)


class NIFGSM(TransferFGSM):
    """NI-FGSM: MI-FGSM with Nesterov's accelerated gradient.

    Takes what `TransferFGSM` takes.

    Source: Lin et al., "Nesterov Accelerated Gradient and Scale Invariance for Adversarial Attacks"
    (ICLR 2020), algorithm 1 without scales.
    """

    def __init__(self, model: Model | None = None, *, nesterov: bool = True, **settings: Any):
        super().__init__(model, nesterov=nesterov, **settings)


class SINIFGSM(NIFGSM):
    """SI-NI-FGSM: NI-FGSM with the mean gradient of several scales of the input.

    Takes what `TransferFGSM` takes.

    Source: Lin et al. (ICLR 2020), algorithm 1.
    """

    def __init__(self, model: Model | None = None, *, scales: int = 5, **settings: Any):
        super().__init__(model, scales=scales, **settings)


class VMIFGSM(TransferFGSM):
    """VMI-FGSM: MI-FGSM whose gradient is tuned by its variance around the last iterate.

    Takes what `TransferFGSM` takes.

    Source: Wang and He, "Enhancing the Transferability of Adversarial Attacks through Variance
    Tuning" (CVPR 2021), algorithm 1.
    """

    def __init__(self, model: Model | None = None, *, neighbours: int = 20, **settings: Any):
        super().__init__(model, neighbours=neighbours, **settings)


class VNIFGSM(VMIFGSM):
    """VNI-FGSM: NI-FGSM whose gradient is tuned by its variance around the last iterate.

    Takes what `TransferFGSM` takes.

    Source: Wang and He (CVPR 2021).
    """

    def __init__(self, model: Model | None = None, *, nesterov: bool = True, **settings: Any):
        super().__init__(model, nesterov=nesterov, **settings)


class Admix(TransferFGSM):
    """Admix: MI-FGSM with the mean gradient of inputs into which other images are mixed, at several
    scales.

    Takes what `TransferFGSM` takes. `images` must be given: in the authors' code they are the other
    samples of the batch, so that the result of a sample depends on its batch.

    Source: Wang et al., "Admix: Enhancing the Transferability of Adversarial Attacks" (ICCV 2021),
    algorithm 1.
    """

    def __init__(
        self,
        model: Model | None = None,
        *,
        images: Tensor | None = None,
        scales: int = 5,
        **settings: Any,
    ):
        if images is None:
            raise ValueError("Admix needs images (N, ...) to mix in, got images=None")
        super().__init__(model, images=images, scales=scales, **settings)


transfer_fgsm = functional("transfer_fgsm", TransferFGSM)
