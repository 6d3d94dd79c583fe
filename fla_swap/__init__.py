"""fla_swap: find a Transformer's attention, prove it, swap it, distil it, compile it, run it.

Importing it teaches transformers' Auto classes to load converted models. It neither loads Triton nor touches CUDA; a
public name is imported when it is first used, so that `fla-swap --help` and the shell's completion answer at once.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

try:
    from fla_swap import registration as registration
except ModuleNotFoundError as error:  # operators and packages run without transformers
    if error.name != "transformers":
        raise

if TYPE_CHECKING:
    from fla_swap import mixers, ops
    from fla_swap.checkpoint import load, save
    from fla_swap.compilation import compile, uncompile
    from fla_swap.conversion import ConvertConfig, convert
    from fla_swap.distillation import (
        CalibrationConfig,
        DistillConfig,
        StageConfig,
        distill,
        held_out_loss,
        perplexity,
    )
    from fla_swap.errors import FlaSwapError
    from fla_swap.hybrid_config import HybridConfig
    from fla_swap.inspection import inspect, prove
    from fla_swap.model import HybridForCausalLM
    from fla_swap.packaging import Package, load_package, package
    from fla_swap.patterns.plugins import installed_recognisers
    from fla_swap.planning import Rule, load_plan, plan, save_plan
    from fla_swap.prompt_state import PromptState, load_state, state
    from fla_swap.reporting import report_html, report_table
    from fla_swap.rewriting import last_rewrites, rewrite
    from fla_swap.swapping import original_attention, restore_, swap_
    from fla_swap.types import AttentionReport, AttentionSite, NearMiss, SwapPlan

__version__ = "0.1.0"

__all__ = [
    "AttentionReport",
    "AttentionSite",
    "CalibrationConfig",
    "ConvertConfig",
    "DistillConfig",
    "FlaSwapError",
    "HybridConfig",
    "HybridForCausalLM",
    "NearMiss",
    "Package",
    "PromptState",
    "Rule",
    "StageConfig",
    "SwapPlan",
    "compile",
    "convert",
    "distill",
    "held_out_loss",
    "inspect",
    "installed_recognisers",
    "last_rewrites",
    "load",
    "load_package",
    "load_plan",
    "load_state",
    "mixers",
    "ops",
    "original_attention",
    "package",
    "perplexity",
    "plan",
    "prove",
    "report_html",
    "report_table",
    "restore_",
    "rewrite",
    "save",
    "save_plan",
    "state",
    "swap_",
    "uncompile",
]

# Where each public name comes from. A test compares this with the imports above, which type checkers read.
_SOURCES = {
    "checkpoint": ("load", "save"),
    "compilation": ("compile", "uncompile"),
    "conversion": ("ConvertConfig", "convert"),
    "distillation": (
        "CalibrationConfig",
        "DistillConfig",
        "StageConfig",
        "distill",
        "held_out_loss",
        "perplexity",
    ),
    "errors": ("FlaSwapError",),
    "hybrid_config": ("HybridConfig",),
    "inspection": ("inspect", "prove"),
    "model": ("HybridForCausalLM",),
    "packaging": ("Package", "load_package", "package"),
    "patterns.plugins": ("installed_recognisers",),
    "planning": ("Rule", "load_plan", "plan", "save_plan"),
    "prompt_state": ("PromptState", "load_state", "state"),
    "reporting": ("report_html", "report_table"),
    "rewriting": ("last_rewrites", "rewrite"),
    "swapping": ("original_attention", "restore_", "swap_"),
    "types": ("AttentionReport", "AttentionSite", "NearMiss", "SwapPlan"),
}
_SOURCE_OF = {name: module for module, names in _SOURCES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name in ("mixers", "ops"):
        return import_module(f"fla_swap.{name}")
    if name not in _SOURCE_OF:
        raise AttributeError(f"module 'fla_swap' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"fla_swap.{_SOURCE_OF[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
