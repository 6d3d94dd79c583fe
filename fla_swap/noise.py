"""The random numbers on which attention is proved: weights and hidden states that hide no error."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

SIZES = (1.0, 3.0, 1e-2, 1.0, 1e-3)


def random_tokens(shape: Sequence[int], seed: int) -> Tensor:
    """fp32 [..., D] on the CPU: some tokens are small, so that the eps of a norm matters, some large for a softcap."""
    values = torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed))
    return values * torch.tensor(SIZES)[torch.arange(values[..., 0].numel()) % 5].reshape(values.shape[:-1])[..., None]


def random_weight(parameter: Tensor, generator: torch.Generator) -> Tensor:
    """fp32 values for a parameter, on its device: matrices scaled by their width, vectors moved by .3 from where they
    are (from 0 where they are not finite): fresh biases, unit norms and zeros would hide errors."""
    noise = torch.randn(parameter.shape, generator=generator).to(parameter.device)
    if parameter.dim() >= 2:
        return noise * 2.0 / math.sqrt(max(parameter.shape))
    base = parameter.detach().float()
    return base.clamp(-2, 2) + 0.3 * noise if bool(base.isfinite().all()) else 0.3 * noise
