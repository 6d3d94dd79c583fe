"""fla_swap: find a Transformer's attention, prove it, swap it, distil it, compile it, run it.

Importing it teaches transformers' Auto classes to load converted models. It neither loads Triton nor touches CUDA.
"""

from __future__ import annotations

from fla_swap import mixers, ops
from fla_swap.checkpoint import load, save
from fla_swap.compilation import compile
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
from fla_swap.inspection import inspect
from fla_swap.planning import Rule, load_plan, plan, save_plan
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
    "NearMiss",
    "Rule",
    "StageConfig",
    "SwapPlan",
    "compile",
    "convert",
    "distill",
    "held_out_loss",
    "inspect",
    "load",
    "load_plan",
    "mixers",
    "ops",
    "original_attention",
    "perplexity",
    "plan",
    "restore_",
    "save",
    "save_plan",
    "swap_",
]
