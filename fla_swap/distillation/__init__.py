"""Distillation: calibrate the start, align each layer to its original, then learn what the original predicts.

`distill` composes the stages; it needs `fla_swap.swapping` for the original attention, and is the only stage that does.
"""

from __future__ import annotations

from fla_swap.distillation.calibration import LayerCalibration, calibrate
from fla_swap.distillation.config import CalibrationConfig, DistillConfig, StageConfig
from fla_swap.distillation.evaluation import LayerError, held_out_loss, layer_errors, perplexity
from fla_swap.distillation.progress import BarProgress, LogProgress, ProgressEvent
from fla_swap.distillation.run import DistillResult, distill

__all__ = [
    "BarProgress",
    "CalibrationConfig",
    "DistillConfig",
    "DistillResult",
    "LayerCalibration",
    "LayerError",
    "LogProgress",
    "ProgressEvent",
    "StageConfig",
    "calibrate",
    "distill",
    "held_out_loss",
    "layer_errors",
    "perplexity",
]
