"""RMS norm (1910.07467) and its gated form, computed in fp32. Plain PyTorch: Inductor fuses it, with no graph break."""

from __future__ import annotations

import torch
from torch import Tensor

from fla_swap.errors import KernelError
from fla_swap.kernels.common import check_shape


def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight over the last dimension.

    Args:
        x: [..., D]. weight: [D] or None. eps: added to the mean square.
    Returns:
        [..., D] in x's dtype, computed in fp32 (fp64 for fp64).
    """
    return _normalised(x, weight, eps).to(x.dtype)


def gated_rms_norm(
    x: Tensor,
    gate: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    *,
    activation: str = "silu",
) -> Tensor:
    """rms_norm(x) · act(gate) over the last dimension: the output norm of gated linear attention.

    Args:
        x, gate: [..., D]. weight: [D] or None. activation: "silu" or "sigmoid".
    Returns:
        [..., D] in x's dtype, computed in fp32 (fp64 for fp64) and rounded once.
    Raises:
        KernelError: unknown activation, or shapes that do not fit.
    """
    if activation not in ("silu", "sigmoid"):
        raise KernelError(f"activation must be 'silu' or 'sigmoid', got {activation!r}")
    check_shape("gate", gate, tuple(x.shape))
    normalised = _normalised(x, weight, eps)
    wide = gate.to(normalised.dtype)
    factor = torch.nn.functional.silu(wide) if activation == "silu" else wide.sigmoid()
    return (normalised * factor).to(x.dtype)


def _normalised(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    wide = x if x.dtype == torch.float64 else x.float()
    if weight is not None:
        check_shape("weight", weight, (x.shape[-1],))
        weight = weight.to(wide.dtype)
    return torch.nn.functional.rms_norm(wide, (x.shape[-1],), weight, eps)
