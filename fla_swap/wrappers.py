"""Modules around a model: compiled ones (`torch.compile`), and those that pass all their arguments on."""

from __future__ import annotations

import inspect
from collections.abc import Collection
from typing import Any

from torch import nn


def uncompiled(model: nn.Module) -> nn.Module:
    """The module that `torch.compile` was given, or the model itself."""
    inner = model._modules.get("_orig_mod")
    return model if inner is None else uncompiled(inner)


def receiver(model: nn.Module, names: Collection[str]) -> nn.Module | None:
    """The model, or the one that it wraps and passes all its keywords on to, whose forward takes one of `names`."""
    own = inspect.signature(model.forward).parameters
    if any(name in own for name in names):
        return model
    if not any(p.kind is p.VAR_KEYWORD for p in own.values()):
        return None
    return next((found for m in model.children() if (found := receiver(m, names)) is not None), None)


def config_of(model: nn.Module) -> Any:
    """The config of the model, or of the first that it wraps; None where there is none."""
    config = getattr(model, "config", None)
    if config is not None:
        return config
    if not any(p.kind is p.VAR_KEYWORD for p in inspect.signature(model.forward).parameters.values()):
        return None
    return next((found for m in model.children() if (found := config_of(m)) is not None), None)
