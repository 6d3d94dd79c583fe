"""Teaches transformers' `AutoConfig` the model types. Light: the rest is imported when a model is loaded."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from fla_swap.hybrid_config import HybridConfig

MODEL_TYPE = "fla_swap"  # as `fla_swap.hybrid` writes it


class FlaSwapConfig(PreTrainedConfig):
    """What `model_type: "fla_swap"` on disk leads to: `from_dict` returns the hybrid subclass of the base's config."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        from fla_swap.checkpoint import hybrid_config

        return hybrid_config(config_dict, **kwargs)


AutoConfig.register(HybridConfig.model_type, HybridConfig, exist_ok=True)
AutoConfig.register(MODEL_TYPE, FlaSwapConfig, exist_ok=True)
