"""A prompt without padding into an empty cache: attention is causal among its own tokens, and needs no mask.

Under `torch.compile` transformers always writes the mask out, T × L of a static cache, which keeps flash attention from
running. For such a prompt a name of our own stands in the config for "sdpa": the same attention, and a mask function
that leaves out the plain causal mask. What is no plain causal mask (a window, an overlay) is written out as before.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

NAME = "fla_swap_whole_prompt"


def whole_prompt_mask(
    *,
    q_length: int,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    **arguments: Any,
) -> Tensor | None:
    """As transformers' `sdpa_mask`; None for the causal mask of a whole prompt."""
    if mask_function is causal_mask_function and attention_mask is None and allow_is_causal_skip and q_length > 1:
        return None
    return sdpa_mask(
        q_length=q_length,
        mask_function=mask_function,
        attention_mask=attention_mask,
        allow_is_causal_skip=allow_is_causal_skip,
        **arguments,
    )


AttentionInterface.register(NAME, sdpa_attention_forward)
AttentionMaskInterface.register(NAME, whole_prompt_mask)


@contextmanager
def whole_prompt(model: Any) -> Iterator[bool]:
    """While this is open, the model takes its prompt as whole, unpadded and first; yields whether it does.

    It does when its attention is "sdpa" throughout.
    """
    config = model.config
    parts = [getattr(config, name, None) for name in getattr(config, "sub_configs", {})]
    able = {getattr(c, "_attn_implementation", None) for c in (config, *parts) if c is not None} == {"sdpa"}
    if able:
        config._attn_implementation = NAME
    try:
        yield able
    finally:
        if able:
            config._attn_implementation = "sdpa"
