"""Attacks with the interface of torchattacks: `atk = PGD(model, eps=8/255); x_adv = atk(images,
labels)`, with its modes, `set_normalization_used`, `save` and `load`.

Attacks that move by gradients return torchattacks' numbers: they draw starts from torch's generator
as it does, and differentiate the plain losses. The noise of APGD, FAB, Square and of the transfer
attacks is pyadv's: it depends on the seed and the sample. docs/differences.md lists the deliberate
differences. A class that pyadv does not have can be imported, and says when it is constructed which
of ours is nearest.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from pyadv import _state, attacks
from pyadv._names import did_you_mean
from pyadv.attacks.square import SquareRule
from pyadv.compat._missing import missing_classes
from pyadv.engine import checks
from pyadv.engine.attack import Attack as NativeAttack
from pyadv.engine.losses import ranked_targets
from pyadv.engine.starts import SMALL, Start
from pyadv.menus import LossName, Norm
from pyadv.models import Normalized
from pyadv.passes.borrow import borrowed, pick_logits

Model = Callable[..., Any]
TargetMap = Callable[[Tensor, Tensor | None], Tensor]
Report = tuple[float | list[float], ...]  # what `save` returns

_ALL_CLASSES = 10**6  # more classes than a model has


class _Closed(type):
    """The metaclass of attacks: an attribute that neither the class nor its `__init__` defines
    cannot be set, so that a misspelt setting is not ignored."""

    def __call__(cls, *args: Any, **settings: Any) -> Any:
        made = super().__call__(*args, **settings)
        made.__dict__["_known"] = frozenset(vars(made))
        return made


class Attack(metaclass=_Closed):
    """The base of all attacks here.

    A subclass says with `_native` how its attributes make one of pyadv's attacks. Attributes are
    read at each call, so `atk.eps = 4/255` takes effect. A subclass of one's own may instead
    override `forward(inputs, labels)`.

    Args:
        name: what `attack` and `repr` say.
        model: maps inputs to logits.

    Attributes:
        device: where inputs are moved to; that of the model's parameters. None leaves inputs where
            they are.
        supported_mode: ["default"], or ["default", "targeted"].
        attack_mode: "default", "targeted(label)", "targeted(custom)", "targeted(random)" or
            "targeted(least-likely)".
        targeted: whether labels are classes to reach.
    """

    def __init__(self, name: str, model: Model):
        self.attack = name
        self.model, self.model_name = model, type(model).__name__
        parameters = model.parameters() if isinstance(model, nn.Module) else iter(())
        self.device = next((p.device for p in parameters), None)
        self.attack_mode, self.supported_mode, self.targeted = "default", ["default"], False
        self.normalization_used: dict[str, Tensor] | None = None
        self._target_map_function: TargetMap | None = None
        self._training = (False, False, False)  # of the model, its BatchNorm and Dropout layers
        self._network = model  # takes inputs in [0, 1]
        self._made: tuple[Any, NativeAttack] | None = None

    def __setattr__(self, name: str, value: Any) -> None:
        known = self.__dict__.get("_known")
        if known is not None and name not in known and not hasattr(type(self), name):
            hint = did_you_mean(name, [k for k in known if k[0] != "_"])
            raise AttributeError(f"{type(self).__name__} has no setting {name}{hint}")
        object.__setattr__(self, name, value)

    def __call__(self, inputs: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return adversarial examples. Inputs lie in [0, 1], or are normalised as
        `set_normalization_used` says."""
        inputs = self._moved(inputs)
        if self.normalization_used is not None:
            return self.normalize(self._attacked(self.inverse_normalize(inputs), labels))
        return self._attacked(inputs, labels)

    def _attacked(self, inputs: Tensor, labels: Tensor | None) -> Tensor:
        with self._modes():
            return self.forward(inputs, None if labels is None else self._moved(labels)).detach()

    def forward(self, inputs: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return adversarial examples for inputs in [0, 1]."""
        if labels is None:
            raise TypeError(f"{self.attack} needs labels, got None")
        y = self.get_target_label(inputs, labels) if self.targeted else labels
        return self._find(self._attack(), inputs, y)

    def _attack(self) -> NativeAttack:
        """Return pyadv's attack with the attributes of now; it is kept until one of them changes,
        because it holds the recordings of CUDA graphs."""
        own = {"_known", "_made"}
        now = {k: v for k, v in vars(self).items() if k not in own}
        if self._made is None or not _same(self._made[0], now):
            attack = self._native()
            if self._training[0]:
                attack.settings = replace(attack.settings, bn="as_is")
            self._made = now, attack
        return self._made[1]

    def _native(self) -> NativeAttack:
        raise NotImplementedError

    def _find(self, attack: NativeAttack, inputs: Tensor, labels: Tensor) -> Tensor:
        """Return what pyadv's attack finds; each call has the same noise."""
        return attack.perturb(inputs, labels, draw=0).x_adv

    def _common(self, *names: str) -> dict[str, Any]:
        """Return settings of one name here and in pyadv, and those that all gradient attacks have:
        the plain losses and whether labels are targets."""
        shared = {"targeted": self.targeted, "grad_mode": "autograd", "scale": "exact"}
        return {name: getattr(self, name) for name in names} | shared

    # --- the model

    def set_model(self, model: Model) -> None:
        """Attack this model from now on."""
        self.model, self.model_name = model, type(model).__name__
        self._network = model
        if self.normalization_used is not None:
            self._normalise_network()

    def set_device(self, device: str | torch.device) -> None:
        """Move inputs and labels to this device from now on."""
        self.device = torch.device(device)

    def set_model_training_mode(
        self,
        model_training: bool = False,
        batchnorm_training: bool = False,
        dropout_training: bool = False,
    ) -> None:
        """Choose the modes during the attack: eval mode, or with `model_training` train mode, in
        which BatchNorm and Dropout layers stay in eval mode unless their arguments are True. In
        train mode, BatchNorm layers update their running statistics."""
        self._training = (model_training, batchnorm_training, dropout_training)

    @contextlib.contextmanager
    def _modes(self) -> Iterator[None]:
        """Set the modes of `set_model_training_mode`, and put every module's own mode back."""
        whole, batch_norm, dropout = self._training
        if not (whole and isinstance(self.model, nn.Module)):
            yield  # pyadv's attacks set eval mode themselves
            return
        before = [(m, m.training) for m in self.model.modules()]
        try:
            for module, _ in before:
                name = type(module).__name__
                still = ("BatchNorm" in name and not batch_norm) or (
                    "Dropout" in name and not dropout
                )
                module.training = not still
            yield
        finally:
            for module, mode in before:
                module.training = mode

    def get_logits(self, inputs: Tensor) -> Tensor:
        """Return the model's logits, by a differentiable pass in its present mode, for inputs in
        [0, 1]."""
        return pick_logits(self._network(inputs), None)

    @torch.no_grad()
    def get_output_with_eval_nograd(self, inputs: Tensor) -> Tensor:
        """Return the model's logits in eval mode, for inputs in [0, 1]."""
        with borrowed(self._network):
            return self.get_logits(inputs)

    # --- normalisation

    def set_normalization_used(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Say that inputs are normalised by these values, one per channel. eps stays in units of
        [0, 1], and so do alpha and the box."""
        self.normalization_used = {
            name: torch.as_tensor(v, dtype=torch.float32).reshape(1, -1, 1, 1)
            for name, v in (("mean", mean), ("std", std))
        }
        self._normalise_network()

    def _normalise_network(self) -> None:
        used = self._normalization
        model: Any = self.model  # any callable will do
        mean, std = (used[k].flatten().tolist() for k in ("mean", "std"))
        network = Normalized(model, mean, std)
        for name in ("mean", "std"):  # not network.to(...), which would move the model
            setattr(network, name, getattr(network, name).to(self.device or "cpu"))
        self._network = network

    @property
    def _normalization(self) -> dict[str, Tensor]:
        if self.normalization_used is None:
            raise ValueError("no normalisation is set; call set_normalization_used(mean, std)")
        return self.normalization_used

    def normalize(self, inputs: Tensor) -> Tensor:
        """Return (inputs - mean) / std."""
        used = {k: v.to(inputs.device) for k, v in self._normalization.items()}
        return (inputs - used["mean"]) / used["std"]

    def inverse_normalize(self, inputs: Tensor) -> Tensor:
        """Return inputs * std + mean."""
        used = {k: v.to(inputs.device) for k, v in self._normalization.items()}
        return inputs * used["std"] + used["mean"]

    # --- modes

    def get_mode(self) -> str:
        """Return the attack mode."""
        return self.attack_mode

    def set_mode_default(self, quiet: bool = False) -> None:
        """Treat labels as the classes to leave, from now on."""
        self.attack_mode, self.targeted = "default", False
        self._target_map_function = None
        if not quiet:
            print("Attack mode is changed to 'default.'")

    def set_mode_targeted_by_function(
        self, target_map_function: TargetMap, quiet: bool = False
    ) -> None:
        """Attack towards `target_map_function(inputs, labels)`, e.g. (labels + 1) % 10."""
        self._set_mode_targeted("targeted(custom)", target_map_function, quiet)

    def set_mode_targeted_random(self, quiet: bool = False) -> None:
        """Attack towards a random class other than the label, from torch's generator."""
        self._set_mode_targeted("targeted(random)", self.get_random_target_label, quiet)

    def set_mode_targeted_least_likely(self, kth_min: int = 1, quiet: bool = False) -> None:
        """Attack towards the class with the k-th smallest logit, of those other than the label."""
        checks.count("kth_min", kth_min, 1)

        def least_likely(inputs: Tensor, labels: Tensor | None) -> Tensor:
            return self.get_least_likely_label(inputs, labels, kth_min)

        self._set_mode_targeted("targeted(least-likely)", least_likely, quiet)

    def set_mode_targeted_by_label(self, quiet: bool = False) -> None:
        """Treat labels as the classes to reach, from now on."""

        def given(inputs: Tensor, labels: Tensor | None) -> Tensor:
            if labels is None:
                raise TypeError(f"{self.attack} needs labels, got None")
            return labels

        self._set_mode_targeted("targeted(label)", given, quiet)

    def _set_mode_targeted(self, mode: str, function: TargetMap, quiet: bool) -> None:
        if "targeted" not in self.supported_mode:
            raise ValueError(f"Targeted mode is not supported by {self.attack}.")
        self.attack_mode, self.targeted, self._target_map_function = mode, True, function
        if not quiet:
            print(f"Attack mode is changed to '{mode}'.")

    def get_target_label(self, inputs: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the classes that the targeted mode leads to."""
        if self._target_map_function is None:
            raise ValueError("choose a targeted mode first, by one of set_mode_targeted_...")
        return self._target_map_function(inputs, labels)

    def get_random_target_label(self, inputs: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return a random class other than the label, or than the predicted class."""
        logits = self.get_output_with_eval_nograd(inputs)
        labels = logits.argmax(1) if labels is None else labels
        drawn = torch.rand(len(labels)).to(labels.device)
        other = (drawn * (logits.shape[1] - 1)).long()
        return other + (other >= labels)

    def get_least_likely_label(
        self, inputs: Tensor, labels: Tensor | None = None, kth_min: int = 1
    ) -> Tensor:
        """Return the class with the k-th smallest logit, of those other than the label, or than the
        predicted class."""
        logits = self.get_output_with_eval_nograd(inputs)
        labels = logits.argmax(1) if labels is None else labels
        others = logits.shape[1] - 1
        if kth_min > others:
            raise ValueError(f"kth_min must be at most {others}, the other classes, got {kth_min}")
        return ranked_targets(-logits, labels, kth_min)[kth_min - 1]

    # --- adversarial sets

    def save(
        self,
        data_loader: Iterable[Sequence[Tensor]],
        save_path: str | Path | None = None,
        verbose: bool = True,
        return_verbose: bool = False,
        save_predictions: bool = False,
        save_clean_inputs: bool = False,
        save_type: str = "float",
    ) -> Report | None:
        """Attack all batches, and write the adversarial set to a file that `load` reads, and that
        of torchattacks too. Inputs are stored in [0, 1].

        Args:
            data_loader: batches (inputs, labels).
            save_path: the file; None writes none.
            verbose: print progress.
            return_verbose: return (robust accuracy in percent, mean L2 distance of the samples that
                were broken in units of [0, 1], seconds of the last batch).
            save_predictions: also store the predicted classes of the adversarial inputs.
            save_clean_inputs: also store the inputs.
            save_type: "float", or "int" for 8-bit integers, to which values are rounded.
        """
        checks.choice("save_type", save_type, ("float", "int"))
        found: dict[str, list[Tensor]] = {"adv_inputs": [], "labels": []}
        found |= {"preds": []} if save_predictions else {}
        found |= {"clean_inputs": []} if save_clean_inputs else {}
        correct, distances, report = 0, [], None
        batches = len(data_loader) if isinstance(data_loader, Sized) else None
        for i, (inputs, labels) in enumerate(data_loader):
            start = time.time()
            clean, labels = self._moved(inputs), self._moved(labels)
            adversarial = self(clean, labels)
            plain = [self._plain(t) for t in (adversarial, clean)]
            predicted = self.get_output_with_eval_nograd(plain[0]).argmax(1)
            right = predicted == labels
            correct += int(right.sum())
            distances.append((plain[0] - plain[1])[~right].flatten(1).norm(dim=1).cpu())
            values = {"adv_inputs": plain[0], "labels": labels}
            values |= {"preds": predicted, "clean_inputs": plain[1]}
            for name, parts in found.items():
                parts.append(values[name].detach().cpu())
            seen = sum(map(len, found["labels"]))
            l2 = torch.cat(distances).mean().item()
            report = (100 * correct / seen, l2, time.time() - start)
            if verbose:
                share = "" if batches is None else f"{100 * (i + 1) / batches:.2f} % / "
                end = "\n" if i + 1 == batches else "\r"
                print(f"- Save progress: {share}{self._progress_words(*report)}", end=end)
        if report is None:
            raise ValueError("data_loader must give at least one batch, got none")
        if save_path is not None:
            joined: dict[str, Any] = {name: torch.cat(parts) for name, parts in found.items()}
            for name in joined.keys() & {"adv_inputs", "clean_inputs"}:
                joined[name] = self.to_type(joined[name], save_type)
            joined["save_type"] = save_type
            _state.write(Path(save_path), lambda file: torch.save(joined, file))
        return report if return_verbose else None

    def _plain(self, inputs: Tensor) -> Tensor:
        return inputs if self.normalization_used is None else self.inverse_normalize(inputs)

    def _progress_words(self, accuracy: float, l2: float, seconds: float) -> str:
        return f"Robust accuracy: {accuracy:.2f} % / L2: {l2:.5f} ({seconds:.3f} s/it)"

    @staticmethod
    def load(
        load_path: str | Path,
        batch_size: int = 128,
        shuffle: bool = False,
        normalize: dict[str, Sequence[float]] | None = None,
        load_predictions: bool = False,
        load_clean_inputs: bool = False,
    ) -> DataLoader[Any]:
        """Return a loader of (adversarial inputs, labels, and on request predictions and clean
        inputs) from a file that `save` or torchattacks wrote.

        Args:
            normalize: {"mean": ..., "std": ...} to normalise the inputs by, one value per channel.
        """
        stored = torch.load(load_path, map_location="cpu", weights_only=True)
        keys = ["adv_inputs", "labels"]
        keys += ["preds"] if load_predictions else []
        keys += ["clean_inputs"] if load_clean_inputs else []
        for key in keys:
            if key not in stored:
                raise ValueError(f"{load_path} holds no {key}, only {', '.join(sorted(stored))}")
        for key in {"adv_inputs", "clean_inputs"}.intersection(keys):
            stored[key] = Attack.to_type(stored[key], "float")
            if normalize is not None:
                mean, std = (
                    torch.as_tensor(normalize[k], dtype=torch.float32).reshape(1, -1, 1, 1)
                    for k in ("mean", "std")
                )
                stored[key] = (stored[key] - mean) / std
        print(f"Data is loaded in the following order: [{', '.join(keys)}]")
        return DataLoader(TensorDataset(*(stored[k] for k in keys)), batch_size, shuffle)

    @staticmethod
    def to_type(inputs: Tensor, type: str) -> Tensor:
        """Return inputs as 8-bit integers ("int", rounded) or as floats in [0, 1] ("float")."""
        checks.choice("type", type, ("float", "int"))
        if type == "int" and inputs.is_floating_point():
            return (inputs * 255).round().to(torch.uint8)
        if type == "float" and not inputs.is_floating_point():
            return inputs.float() / 255
        return inputs

    def _moved(self, t: Tensor) -> Tensor:
        return t if self.device is None else t.to(self.device)

    def __repr__(self) -> str:
        hidden = {"model", "attack", "supported_mode", "attack_mode", "normalization_used"}
        shown = {k: v for k, v in vars(self).items() if k[0] != "_" and k not in hidden}
        shown["attack_mode"] = self.attack_mode
        shown["normalization_used"] = self.normalization_used is not None
        return f"{self.attack}({', '.join(f'{k}={v}' for k, v in shown.items())})"


def _same(before: dict[str, Any], now: dict[str, Any]) -> bool:
    """Return whether two sets of attributes are equal; tensors must be the same objects."""
    if before.keys() != now.keys():
        return False
    plain = (bool, int, float, str, list, tuple)
    return all(
        v is before[k] or (isinstance(v, plain) and type(v) is type(before[k]) and v == before[k])
        for k, v in now.items()
    )


# --- attacks without gradients


class VANILA(Attack):
    """No attack: the inputs come back."""

    def __init__(self, model: Model):
        super().__init__("VANILA", model)

    def forward(self, inputs: Tensor, labels: Tensor | None = None) -> Tensor:
        return inputs.clone()


class GN(Attack):
    """Gaussian noise of standard deviation `std`, clipped to [0, 1]."""

    def __init__(self, model: Model, std: float = 0.1):
        super().__init__("GN", model)
        self.std = std

    def forward(self, inputs: Tensor, labels: Tensor | None = None) -> Tensor:
        return (inputs + self.std * torch.randn_like(inputs)).clamp(0, 1)


# --- signed gradients


class _Targetable(Attack):
    """The base of attacks with targeted modes."""

    def __init__(self, name: str, model: Model):
        super().__init__(name, model)
        self.supported_mode = ["default", "targeted"]


class _Iterated(_Targetable):
    """The base of attacks that make `steps` steps of size `alpha` in a ball of radius `eps`."""

    norm = "Linf"

    def __init__(self, name: str, model: Model, eps: float, alpha: float, steps: int):
        super().__init__(name, model)
        self.eps, self.alpha, self.steps = eps, alpha, steps

    def _native(self) -> NativeAttack:
        settings = self._common("norm", "eps", "alpha", "steps")
        return attacks.PGD(self._network, start=self._start(), **settings)

    def _start(self) -> Start:
        return "none"


class PGD(_Iterated):
    """PGD in Linf, from a uniform start."""

    def __init__(
        self,
        model: Model,
        eps: float = 8 / 255,
        alpha: float = 2 / 255,
        steps: int = 10,
        random_start: bool = True,
    ):
        super().__init__("PGD", model, eps, alpha, steps)
        self.random_start = random_start

    def _start(self) -> Start:
        return "uniform" if self.random_start else "none"


class EOTPGD(PGD):
    """PGD with the sum of `eot_iter` gradients at each iterate, for models that are random."""

    def __init__(
        self,
        model: Model,
        eps: float = 8 / 255,
        alpha: float = 2 / 255,
        steps: int = 10,
        eot_iter: int = 2,
        random_start: bool = True,
    ):
        super().__init__(model, eps, alpha, steps, random_start)
        self.attack, self.eot_iter = "EOTPGD", eot_iter

    def _native(self) -> NativeAttack:
        settings = self._common("norm", "eps", "alpha", "steps")
        return attacks.PGD(self._network, start=self._start(), eot=self.eot_iter, **settings)


class FGSM(_Targetable):
    """FGSM: one step of size eps from the inputs."""

    def __init__(self, model: Model, eps: float = 8 / 255):
        super().__init__("FGSM", model)
        self.eps = eps

    def _native(self) -> NativeAttack:
        return attacks.FGSM(self._network, **self._common("eps"))


class BIM(_Iterated):
    """Basic iterative method: PGD from the inputs. `steps=0` means the paper's number of steps,
    min(255 eps + 4, 1.25 * 255 eps)."""

    def __init__(self, model: Model, eps: float = 8 / 255, alpha: float = 2 / 255, steps: int = 10):
        steps = steps or int(min(eps * 255 + 4, 1.25 * eps * 255))
        super().__init__("BIM", model, eps, alpha, steps)


class RFGSM(_Iterated):
    """R+FGSM: PGD from a random corner of the ball of radius alpha."""

    def __init__(self, model: Model, eps: float = 8 / 255, alpha: float = 2 / 255, steps: int = 10):
        super().__init__("RFGSM", model, eps, alpha, steps)

    def _start(self) -> Start:
        return lambda x: (x + self.alpha * torch.randn_like(x).sign()).clamp(0, 1)


class FFGSM(_Targetable):
    """One step of size alpha from a uniform start (fast adversarial training)."""

    def __init__(self, model: Model, eps: float = 8 / 255, alpha: float = 10 / 255):
        super().__init__("FFGSM", model)
        self.eps, self.alpha = eps, alpha

    def _native(self) -> NativeAttack:
        settings = self._common("eps", "alpha")
        return attacks.PGD(self._network, steps=1, start=self._start, **settings)

    def _start(self, x: Tensor) -> Tensor:
        # torchattacks draws normal numbers first, and discards them
        return (x + torch.randn_like(x).uniform_(-self.eps, self.eps)).clamp(0, 1)


class TPGD(_Iterated):
    """The attack of TRADES: PGD on the divergence from the prediction at the inputs. It needs no
    labels."""

    def __init__(self, model: Model, eps: float = 8 / 255, alpha: float = 2 / 255, steps: int = 10):
        super().__init__("TPGD", model, eps, alpha, steps)
        self.supported_mode = ["default"]

    def forward(self, inputs: Tensor, labels: Tensor | None = None) -> Tensor:
        unused = torch.zeros(len(inputs), dtype=torch.int64, device=inputs.device)
        return super().forward(inputs, unused)

    def _native(self) -> NativeAttack:
        settings = self._common("eps", "alpha", "steps")
        return attacks.PGD(self._network, loss="kl", start=self._start(), **settings)

    def _start(self) -> Start:
        return lambda x: (x + SMALL * torch.randn_like(x)).clamp(0, 1)


class PGDL2(_Iterated):
    """PGD in L2. The start has a normal direction and a length uniform in [0, eps].

    Args:
        eps_for_division: ignored; a gradient that is exactly zero does not move.
    """

    norm = "L2"

    def __init__(
        self,
        model: Model,
        eps: float = 1.0,
        alpha: float = 0.2,
        steps: int = 10,
        random_start: bool = True,
        eps_for_division: float = 1e-10,
    ):
        super().__init__("PGDL2", model, eps, alpha, steps)
        self.random_start, self.eps_for_division = random_start, eps_for_division

    def _start(self) -> Start:
        return self._in_the_ball if self.random_start else "none"

    def _in_the_ball(self, x: Tensor) -> Tensor:
        delta = torch.empty_like(x).normal_()
        norms = delta.flatten(1).norm(dim=1).reshape(-1, *(1,) * (x.dim() - 1))
        share = torch.zeros_like(norms).uniform_(0, 1)
        return (x + delta * (share / norms * self.eps)).clamp(0, 1)


class _Smoothed(nn.Module):
    """A network that returns the logarithm of its mean probabilities over noisy copies."""

    def __init__(self, network: Model, noise_type: str, noise_sd: float, copies: int):
        super().__init__()
        self.network, self.noise_type = network, noise_type
        self.noise_sd, self.copies = noise_sd, copies

    def forward(self, x: Tensor) -> Tensor:
        many = x.repeat_interleave(self.copies, 0)
        like = many.flatten(1).float()
        if self.noise_type == "guassian":
            noise = torch.randn_like(like)
        else:
            noise = (torch.rand_like(like) - 0.5) * 2
        logits = pick_logits(self.network(many + (noise * self.noise_sd).view(many.shape)), None)
        shares = logits.softmax(1).view(len(x), self.copies, logits.shape[1]).mean(1)
        return shares.clamp(min=1e-20).log()


class PGDRS(_Iterated):
    """PGD on a smoothed classifier: the mean probability over noisy copies of the iterate.

    Args:
        noise_type: "guassian" (torchattacks' spelling; "gaussian" is understood) or "uniform".
        noise_sd: standard deviation, or the largest size of uniform noise.
        noise_batch_size: copies of each sample.
        batch_max: most copies in one batch; a larger batch is attacked in parts.
    """

    def __init__(
        self,
        model: Model,
        eps: float = 8 / 255,
        alpha: float = 2 / 255,
        steps: int = 10,
        noise_type: str = "guassian",
        noise_sd: float = 0.5,
        noise_batch_size: int = 5,
        batch_max: int = 2048,
    ):
        super().__init__("PGDRS", model, eps, alpha, steps)
        noise_type = "guassian" if noise_type == "gaussian" else noise_type
        checks.choice("noise_type", noise_type, ("guassian", "uniform"))
        self.noise_type, self.noise_sd = noise_type, noise_sd
        self.noise_batch_size, self.batch_max = noise_batch_size, batch_max

    def forward(self, inputs: Tensor, labels: Tensor | None = None) -> Tensor:
        if labels is None or len(inputs) * self.noise_batch_size <= self.batch_max:
            return super().forward(inputs, labels)
        size = max(self.batch_max // self.noise_batch_size, 1)
        parts = zip(inputs.split(size), labels.split(size), strict=True)
        return torch.cat([super(PGDRS, self).forward(*part) for part in parts])

    def _native(self) -> NativeAttack:
        network = _Smoothed(self._network, self.noise_type, self.noise_sd, self.noise_batch_size)
        return attacks.PGD(network, start="none", **self._common("norm", "eps", "alpha", "steps"))


class PGDRSL2(PGDRS):
    """`PGDRS` in L2.

    Args:
        eps_for_division: ignored, as in `PGDL2`.
    """

    norm = "L2"

    def __init__(
        self,
        model: Model,
        eps: float = 1.0,
        alpha: float = 0.2,
        steps: int = 10,
        noise_type: str = "guassian",
        noise_sd: float = 0.5,
        noise_batch_size: int = 5,
        batch_max: int = 2048,
        eps_for_division: float = 1e-10,
    ):
        super().__init__(
            model, eps, alpha, steps, noise_type, noise_sd, noise_batch_size, batch_max
        )
        self.attack, self.eps_for_division = "PGDRSL2", eps_for_division


# --- momentum and transfer


class MIFGSM(_Iterated):
    """MI-FGSM: steps along the decaying sum of the gradients."""

    def __init__(
        self,
        model: Model,
        eps: float = 8 / 255,
        alpha: float = 2 / 255,
        steps: int = 10,
        decay: float = 1.0,
    ):
        super().__init__("MIFGSM", model, eps, alpha, steps)
        self.decay = decay

    def _native(self) -> NativeAttack:
        settings = self._common("eps", "alpha", "steps", "decay")
        return attacks.TransferFGSM(
            self._network, start=self._start(), **self._altered(), **settings
        )

    def _altered(self) -> dict[str, Any]:
        """Return the settings of `TransferFGSM` that make the attack."""
        return {}


class NIFGSM(MIFGSM):
    """NI-FGSM: the gradient is that of the point where momentum leads."""

    def __init__(
        self,
        model: Model,
        eps: float = 8 / 255,
        alpha: float = 2 / 255,
        steps: int = 10,
        decay: float = 1.0,
    ):
        super().__init__(model, eps, alpha, steps, decay)
        self.attack = "NIFGSM"

    def _altered(self) -> dict[str, Any]:
        return {"nesterov": True}


class SINIFGSM(MIFGSM):
    """SI-NI-FGSM: NI-FGSM with the mean gradient of `m` scales."""

    def __init__(
        self,
        model: Model,
        eps: float = 8 / 255,
        alpha: float = 2 / 255,
        steps: int = 10,
        decay: float = 1.0,
        m: int = 5,
    ):
        super().__init__(model, eps, alpha, steps, decay)
        self.attack, self.m = "SINIFGSM", m

    def _altered(self) -> dict[str, Any]:
        return {"nesterov": True, "scales": self.m}


class VMIFGSM(MIFGSM):
    """VMI-FGSM: the gradient is tuned by `N` points at most beta * eps away."""

    def __init__(
        self,
        model: Model,
        eps: float = 8 / 255,
        alpha: float = 2 / 255,
        steps: int = 10,
        decay: float = 1.0,
        N: int = 5,
        beta: float = 3 / 2,
    ):
        super().__init__(model, eps, alpha, steps, decay)
        self.attack, self.N, self.beta = "VMIFGSM", N, beta

    def _altered(self) -> dict[str, Any]:
        return {"neighbours": self.N, "neighbourhood": self.beta}


class VNIFGSM(VMIFGSM):
    """VNI-FGSM: `VMIFGSM` with the gradient of the point where momentum leads."""

    def __init__(
        self,
        model: Model,
        eps: float = 8 / 255,
        alpha: float = 2 / 255,
        steps: int = 10,
        decay: float = 1.0,
        N: int = 5,
        beta: float = 3 / 2,
    ):
        super().__init__(model, eps, alpha, steps, decay, N, beta)
        self.attack = "VNIFGSM"

    def _altered(self) -> dict[str, Any]:
        return {"nesterov": True, **super()._altered()}


class DIFGSM(MIFGSM):
    """DI-FGSM: inputs are shrunk to `resize_rate` and padded, with probability `diversity_prob`."""

    def __init__(
        self,
        model: Model,
        eps: float = 8 / 255,
        alpha: float = 2 / 255,
        steps: int = 10,
        decay: float = 0.0,
        resize_rate: float = 0.9,
        diversity_prob: float = 0.5,
        random_start: bool = False,
    ):
        super().__init__(model, eps, alpha, steps, decay)
        checks.share("resize_rate", resize_rate)
        self.attack, self.resize_rate = "DIFGSM", resize_rate
        self.diversity_prob, self.random_start = diversity_prob, random_start

    def _altered(self) -> dict[str, Any]:
        return {"diversity": self.diversity_prob, "resize": self.resize_rate}

    def _start(self) -> Start:
        return "uniform" if self.random_start else "none"


class TIFGSM(DIFGSM):
    """TI-FGSM: `DIFGSM` with gradients convolved by a kernel.

    Args:
        kernel_name: "gaussian", "linear" or "uniform".
        len_kernel: its length.
        nsig: standard deviations from the middle of the Gaussian to its end.
    """

    def __init__(
        self,
        model: Model,
        eps: float = 8 / 255,
        alpha: float = 2 / 255,
        steps: int = 10,
        decay: float = 0.0,
        kernel_name: str = "gaussian",
        len_kernel: int = 15,
        nsig: float = 3,
        resize_rate: float = 0.9,
        diversity_prob: float = 0.5,
        random_start: bool = False,
    ):
        super().__init__(model, eps, alpha, steps, decay, resize_rate, diversity_prob, random_start)
        checks.choice("kernel_name", kernel_name, ("gaussian", "linear", "uniform"))
        self.attack, self.kernel_name = "TIFGSM", kernel_name
        self.len_kernel, self.nsig = len_kernel, nsig

    def _altered(self) -> dict[str, Any]:
        kernel = {"kernel": self.len_kernel, "kernel_shape": self.kernel_name}
        return {**super()._altered(), **kernel, "kernel_sigmas": float(self.nsig)}


# --- AutoAttack and its parts


class APGD(Attack):
    """Auto-PGD with noise that depends on `seed` alone: each call returns the same examples.
    Torch's generator is left alone; torchattacks seeds it at each call.

    Args:
        loss: "ce" or "dlr".
        verbose: ignored.
    """

    def __init__(
        self,
        model: Model,
        norm: Norm = "Linf",
        eps: float = 8 / 255,
        steps: int = 10,
        n_restarts: int = 1,
        seed: int = 0,
        loss: LossName = "ce",
        eot_iter: int = 1,
        rho: float = 0.75,
        verbose: bool = False,
    ):
        super().__init__("APGD", model)
        self.norm, self.eps, self.steps, self.n_restarts = norm, eps, steps, n_restarts
        self.seed, self.loss, self.eot_iter, self.thr_decr = seed, loss, eot_iter, rho
        self.verbose = verbose

    def _native(self) -> NativeAttack:
        return attacks.APGD(self._network, loss=self.loss, **self._searched())

    def _searched(self) -> dict[str, Any]:
        return {
            "norm": self.norm,
            "eps": self.eps,
            "steps": self.steps,
            "restarts": self.n_restarts,
            "seed": self.seed,
            "eot": self.eot_iter,
            "rho": self.thr_decr,
            "grad_mode": "autograd",
        }


class APGDT(APGD):
    """Targeted Auto-PGD: towards the `n_classes - 1` classes that the model ranks highest after the
    label."""

    def __init__(
        self,
        model: Model,
        norm: Norm = "Linf",
        eps: float = 8 / 255,
        steps: int = 10,
        n_restarts: int = 1,
        seed: int = 0,
        eot_iter: int = 1,
        rho: float = 0.75,
        verbose: bool = False,
        n_classes: int = 10,
    ):
        super().__init__(
            model, norm, eps, steps, n_restarts, seed, eot_iter=eot_iter, rho=rho, verbose=verbose
        )
        self.attack, self.n_target_classes = "APGDT", n_classes - 1

    def _native(self) -> NativeAttack:
        return attacks.TargetedAPGD(
            self._network, targets=self.n_target_classes, **self._searched()
        )


class FAB(Attack):
    """FAB: the nearest point that fools the model, where it lies within eps; elsewhere the input.

    Args:
        multi_targeted: towards the `n_classes - 1` classes that the model ranks highest after the
            label, one after the other.
        verbose: ignored.
    """

    def __init__(
        self,
        model: Model,
        norm: Norm = "Linf",
        eps: float | None = 8 / 255,
        steps: int = 10,
        n_restarts: int = 1,
        alpha_max: float = 0.1,
        eta: float = 1.05,
        beta: float = 0.9,
        verbose: bool = False,
        seed: int = 0,
        multi_targeted: bool = False,
        n_classes: int = 10,
    ):
        super().__init__("FAB", model)
        self.norm, self.steps, self.n_restarts = norm, steps, n_restarts
        self.eps = {"Linf": 0.3, "L2": 1.0, "L1": 5.0}[norm] if eps is None else eps
        self.alpha_max, self.eta, self.beta, self.seed = alpha_max, eta, beta, seed
        self.multi_targeted, self.n_target_classes = multi_targeted, n_classes - 1
        self.verbose = verbose

    def _native(self) -> NativeAttack:
        names = ("norm", "eps", "steps", "alpha_max", "eta", "beta", "seed")
        settings = {name: getattr(self, name) for name in names}
        settings["restarts"] = self.n_restarts
        if self.multi_targeted:
            return attacks.TargetedFAB(self._network, targets=self.n_target_classes, **settings)
        return attacks.FAB(self._network, **settings)

    def _find(self, attack: NativeAttack, inputs: Tensor, labels: Tensor) -> Tensor:
        result = attack.run(inputs, labels, draw=0)
        keep = result.correct.reshape(-1, *(1,) * (inputs.dim() - 1))
        return torch.where(keep, inputs, result.x_adv)


class _RescaledSquareRule(SquareRule):
    """Square's rule with a schedule that takes any number of queries for 10,000."""

    def kind(self, k: int, steps: int) -> int:
        return super().kind(int(k * 10_000 / steps), steps)


class Square(_Targetable):
    """Square: random search without gradients, on images.

    Args:
        loss: "margin"; torchattacks' "ce" is not supported.
        resc_schedule: stretch the schedule of the squares' size, made for 10,000 queries, to
            `n_queries`.
        verbose: ignored.
    """

    def __init__(
        self,
        model: Model,
        norm: Norm = "Linf",
        eps: float = 8 / 255,
        n_queries: int = 5000,
        n_restarts: int = 1,
        p_init: float = 0.8,
        loss: str = "margin",
        resc_schedule: bool = True,
        seed: int = 0,
        verbose: bool = False,
    ):
        super().__init__("Square", model)
        checks.choice("loss", loss, ("margin",))
        self.norm, self.eps, self.n_queries, self.n_restarts = norm, eps, n_queries, n_restarts
        self.p_init, self.loss, self.rescale_schedule = p_init, loss, resc_schedule
        self.seed, self.verbose = seed, verbose

    def _native(self) -> NativeAttack:
        attack = attacks.Square(
            self._network,
            norm=self.norm,
            eps=self.eps,
            queries=self.n_queries,
            p=self.p_init,
            restarts=self.n_restarts,
            targeted=self.targeted,
            seed=self.seed,
        )
        if self.rescale_schedule:
            rule = _RescaledSquareRule(self.p_init)
            attack.settings = replace(attack.settings, rule=rule)
        return attack


class AutoAttack(Attack):
    """AutoAttack with 100 steps; torchattacks makes 10.

    Args:
        version: "standard", "plus" or "rand".
        n_classes: ignored; the logits have the number of classes.
        seed: None means 0, so that each call returns the same examples.
        verbose: print progress to stderr.
    """

    def __init__(
        self,
        model: Model,
        norm: Norm = "Linf",
        eps: float = 8 / 255,
        version: Literal["standard", "plus", "rand"] = "standard",
        n_classes: int = 10,
        seed: int | None = None,
        verbose: bool = False,
    ):
        super().__init__("AutoAttack", model)
        checks.choice("version", version, ("standard", "plus", "rand"))
        self.norm, self.eps, self.version = norm, eps, version
        self.n_classes, self.seed, self.verbose = n_classes, seed, verbose

    def forward(self, inputs: Tensor, labels: Tensor | None = None) -> Tensor:
        if labels is None:
            raise TypeError("AutoAttack needs labels, got None")
        if self._training[0]:
            raise ValueError("AutoAttack runs in eval mode; undo set_model_training_mode")
        return self._ensemble()(inputs, labels)

    def _ensemble(self) -> attacks.AutoAttack:
        return attacks.AutoAttack(
            self._network,
            norm=self.norm,
            eps=self.eps,
            version=self.version,
            seed=self.seed or 0,
            progress="auto" if self.verbose else None,
        )


# --- minimum norm


class CW(_Targetable):
    """Carlini and Wagner's L2 attack with one weight `c`; each sample ends by itself.

    Args:
        kappa: the margin that counts as a success.
    """

    def __init__(
        self, model: Model, c: float = 1, kappa: float = 0, steps: int = 50, lr: float = 0.01
    ):
        super().__init__("CW", model)
        self.c, self.kappa, self.steps, self.lr = c, kappa, steps, lr

    def _native(self) -> NativeAttack:
        return attacks.CW(
            self._network,
            steps=self.steps,
            searches=1,
            confidence=self.kappa,
            lr=self.lr,
            c=self.c,
            classes="runner-up",
            targeted=self.targeted,
        )


class DeepFool(Attack):
    """DeepFool in L2: from boundary to boundary, over all classes."""

    def __init__(self, model: Model, steps: int = 50, overshoot: float = 0.02):
        super().__init__("DeepFool", model)
        self.steps, self.overshoot = steps, overshoot

    def _native(self) -> NativeAttack:
        return attacks.DeepFool(
            self._network, steps=self.steps, overshoot=self.overshoot, classes=_ALL_CLASSES
        )


# --- several attacks


class MultiAttack(Attack):
    """Several attacks on one model, each on the samples that those before it left standing. Samples
    that no attack has broken come back as they were.

    Args:
        attacks: two or more, on the same model.
        verbose: print the share of samples broken after each attack.
    """

    def __init__(self, attacks: Sequence[Attack], verbose: bool = False):
        if len(attacks) < 2:
            raise ValueError(f"attacks must be two or more, got {len(attacks)}")
        if any(a.model is not attacks[0].model for a in attacks):
            raise ValueError("attacks must be on the same model")
        super().__init__("MultiAttack", attacks[0].model)
        self.attacks, self.verbose = list(attacks), verbose
        self._standing: list[int] = []  # samples, and how many stood after each attack

    def __call__(self, inputs: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return adversarial examples; each attack knows by itself whether inputs are
        normalised."""
        if labels is None:
            raise TypeError("MultiAttack needs labels, got None")
        inputs, labels = self._moved(inputs), self._moved(labels)
        found, rest = inputs.clone(), torch.arange(len(inputs), device=inputs.device)
        standing = [len(inputs)]
        for attack in self.attacks:
            if len(rest):
                adversarial = attack(inputs[rest], labels[rest])
                predicted = self.get_output_with_eval_nograd(self._plain(adversarial)).argmax(1)
                broken = predicted != labels[rest]
                found[rest[broken]] = adversarial[broken]
                rest = rest[~broken]
            standing.append(len(rest))
        if len(self._standing) != len(standing):  # the first call, or other attacks
            self._standing = [0] * len(standing)
        self._standing = [a + b for a, b in zip(self._standing, standing, strict=True)]
        if self.verbose:
            print(_broken_words(standing))
        return found

    def save(self, *args: Any, **settings: Any) -> Report | None:
        """Save an adversarial set, as `Attack.save`. `return_verbose` gives (robust accuracy,
        the percentages that were broken after each attack, L2, seconds)."""
        self._standing = []
        report = super().save(*args, **settings)
        if report is None:
            return None
        accuracy, l2, seconds = report
        return accuracy, _broken(self._standing), l2, seconds

    def _progress_words(self, accuracy: float, l2: float, seconds: float) -> str:
        own = super()._progress_words(accuracy, l2, seconds)
        return f"{_broken_words(self._standing)} / {own}"

    def set_model(self, model: Model) -> None:
        """Attack this model from now on."""
        super().set_model(model)
        for attack in self.attacks:
            attack.set_model(model)

    def set_device(self, device: str | torch.device) -> None:
        """Move inputs and labels to this device from now on."""
        super().set_device(device)
        for attack in self.attacks:
            attack.set_device(device)

    def set_normalization_used(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Say that inputs are normalised by these values, one per channel."""
        super().set_normalization_used(mean, std)
        for attack in self.attacks:
            attack.set_normalization_used(mean, std)

    def set_model_training_mode(self, *modes: bool, **named: bool) -> None:
        """Choose the modes during the attacks, as `Attack.set_model_training_mode`."""
        super().set_model_training_mode(*modes, **named)
        for attack in self.attacks:
            attack.set_model_training_mode(*modes, **named)


def _broken(standing: list[int]) -> list[float]:
    return [100 * (1 - n / max(standing[0], 1)) for n in standing[1:]]


def _broken_words(standing: list[int]) -> str:
    shares = " | ".join(f"{share:.2f} %" for share in _broken(standing))
    return f"Attack success rate: {shares}"


# --- what pyadv does not have

_NEAREST = {
    "UPGD": "pyadv.attacks.MIFGSM, which takes a loss, a start and eot",
    "Jitter": 'pyadv.attacks.PGD(loss="margin")',
    "SPSA": "Square, which needs no gradients either",
    "PIFGSM": "TIFGSM",
    "PIFGSMPP": "TIFGSM",
    "EADL1": 'pyadv.attacks.FMN(norm="L1")',
    "EADEN": 'pyadv.attacks.FMN(norm="L1")',
    "JSMA": "pyadv.attacks.SigmaZero, an attack in L0",
    "SparseFool": "pyadv.attacks.SigmaZero, an attack in L0",
    "OnePixel": "pyadv.attacks.SigmaZero, an attack in L0",
    "Pixle": "pyadv.attacks.SigmaZero, an attack in L0",
    "LGV": "VMIFGSM, which needs no further training of the model",
}

__all__ = [
    "VANILA",
    "GN",
    "FGSM",
    "BIM",
    "RFGSM",
    "PGD",
    "EOTPGD",
    "FFGSM",
    "TPGD",
    "MIFGSM",
    "APGD",
    "APGDT",
    "DIFGSM",
    "TIFGSM",
    "NIFGSM",
    "PGDRS",
    "SINIFGSM",
    "VMIFGSM",
    "VNIFGSM",
    "CW",
    "PGDL2",
    "DeepFool",
    "PGDRSL2",
    "FAB",
    "AutoAttack",
    "Square",
    "MultiAttack",
]
__wrapper__ = ["MultiAttack"]


__getattr__ = missing_classes(__name__, _NEAREST)
