"""Every error that fla_swap raises on purpose. Each message says what was found, where, and what to do."""

from __future__ import annotations

from typing import Any


class FlaSwapError(Exception):
    """Base class: catch this to catch everything that fla_swap raises on purpose."""


class ConfigError(FlaSwapError, ValueError):
    """A setting has a value that it cannot have."""


class CaptureError(FlaSwapError):
    """The model could not be exported to a graph."""


class RecogniserError(FlaSwapError, ValueError):
    """A recogniser that a user or an installed package brought is not one, or failed. Says whose it is."""


class NoValue(FlaSwapError):
    """A fact depends on the values of a weight that has none (on the meta device); `inspect` makes it a near miss."""

    def __init__(self, name: str):
        super().__init__(f"it depends on the values of {name!r}, which is on the meta device: load the weights first")


class NoAttentionFound(FlaSwapError):
    """`inspect(strict=True)` found no attention site. The report, with the near misses, is in `.report`."""

    def __init__(self, message: str, report: Any = None):
        super().__init__(message)
        self.report = report


class VerificationError(FlaSwapError):
    """The attention rebuilt from a site does not compute what the model computes."""


class PlanError(FlaSwapError, ValueError):
    """A plan names a layer that does not exist, a mixer that the site cannot take, or no layer at all."""


class MixerError(FlaSwapError, ValueError):
    """A mixer cannot take this configuration (head counts, dimensions, mask kind)."""


class SwapError(FlaSwapError):
    """A plan could not be installed into, or removed from, this model."""


class CheckpointError(FlaSwapError):
    """A saved model is truncated, inconsistent, or would overwrite another model."""


class DataError(FlaSwapError, ValueError):
    """Training or evaluation text is missing, empty, or too short."""


class TrainingError(FlaSwapError):
    """Training stopped: the loss is not finite, or the disk is full. Says which checkpoint to resume from."""


class KernelError(FlaSwapError, ValueError):
    """An operator got arguments of the wrong shape, dtype or device, or an implementation that cannot run here."""


class RewriteError(FlaSwapError):
    """A rewritten graph does not compute what the graph computed, or a plan's layer is not in the graph."""


def first_line(error: Exception) -> str:
    """The first line of an error's message, cut to a readable length: "" when it has none."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "")[:200]
