"""What must hold for every mixer, as functions of its class: each raises AssertionError, or returns what it measured.

Written once for the table (`bench.mixers`) and for the tests.
"""

from __future__ import annotations

from collections.abc import Callable

from fla_swap.bench.layer_checks import (
    Kind,
    NotApplicable,
    chunks,
    compiled,
    gradients,
    looped,
    operator,
    packed,
    padding,
)
from fla_swap.bench.model_checks import calibrated, compiled_model, generate, saved, scratch, swap, training

CHECKS: dict[str, Callable[[Kind], str]] = {
    "operator = loop": operator,
    "layer": chunks,
    "padding, documents": padding,
    "packed = separate": packed,
    "gradients": gradients,
    "swap": swap,
    "calibrate": calibrated,
    "from scratch": scratch,
    "generate": generate,
    "save, load": saved,
    "compile: layer": compiled,
    "compile: model": compiled_model,
    "training": training,
}
SLOW = ("compile: model",)
"""What tests run only when asked for slow ones."""

__all__ = ["CHECKS", "SLOW", "Kind", "NotApplicable", "compiled", "compiled_model", "looped"]
