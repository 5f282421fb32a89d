"""The loop of gradient attacks and its parts, public for attacks of your own: see
docs/extending/attack.md."""

from pyadv.engine.attack import Attack, Plan, functional
from pyadv.engine.graphs import Graphs
from pyadv.engine.loop import input_gradient, judge, predict, search
from pyadv.engine.losses import Loss
from pyadv.engine.results import AttackResult, MinimumNormResult, Perturbed
from pyadv.engine.rules import (
    HalvingRule,
    MomentumRule,
    PlainRule,
    SparseRule,
    StepRule,
    back_to_best,
    step_in_place,
)
from pyadv.engine.settable import Settable, Setting
from pyadv.engine.starts import Noise
from pyadv.engine.state import Best, PerSample, State
from pyadv.engine.task import (
    GradientSettings,
    LoopSettings,
    Settings,
    Task,
    memory,
    radius,
    step_size,
)

__all__ = [
    "AttackResult",
    "Best",
    "Attack",
    "GradientSettings",
    "Graphs",
    "HalvingRule",
    "LoopSettings",
    "Loss",
    "MinimumNormResult",
    "MomentumRule",
    "Noise",
    "PerSample",
    "Perturbed",
    "Plan",
    "PlainRule",
    "Settable",
    "Setting",
    "Settings",
    "SparseRule",
    "State",
    "StepRule",
    "Task",
    "back_to_best",
    "functional",
    "input_gradient",
    "judge",
    "memory",
    "predict",
    "radius",
    "search",
    "step_in_place",
    "step_size",
]
