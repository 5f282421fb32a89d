"""Networks by name: those that the robustness literature trains, timm's, and the user's own."""

from __future__ import annotations

from pyadv.models.normalized import Normalized
from pyadv.models.registry import (
    MODELS,
    Logits,
    check_restorable,
    count_logits,
    create,
    returning_logits,
)
from pyadv.models.resnet import PreActResNet18, ResNet18
from pyadv.models.small_cnn import SmallCNN
from pyadv.models.weights import load_weights
from pyadv.models.wide_resnet import WideResNet

__all__ = [
    "MODELS",
    "Logits",
    "Normalized",
    "PreActResNet18",
    "ResNet18",
    "SmallCNN",
    "WideResNet",
    "check_restorable",
    "count_logits",
    "create",
    "load_weights",
    "returning_logits",
]
