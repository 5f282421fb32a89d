"""The names of the questions; each is a module beside this file."""

from __future__ import annotations

QUESTIONS = ("ops", "attacks", "fast", "training", "evaluation", "startup", "scaling", "anatomy")
OWN_PAGES = ("strength",)  # asked by name; each has a page of its own
GPU_QUESTIONS = ("gpu_kernels", "gpu_attacks")  # asked by name, see gpu_suite.py
# Questions whose rows the page shows: gpu_autoattack needs a trained network, so gpu_suite.py asks.
SHOWN = (*QUESTIONS, "gpu_attacks", "gpu_autoattack", "gpu_kernels")
