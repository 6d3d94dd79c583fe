"""Short causal depthwise convolution with a state, in front of q, k and v in most linear attention layers.

Plain PyTorch: a sum of shifted products, which Inductor fuses into one pass. Legend: B batch, T time, D channels, W
taps, N sequences. Tap W − 1 is the current token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fla_swap.errors import KernelError
from fla_swap.kernels.common import check_cu_seqlens, check_shape


def short_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """y_t = act(bias + Σ_w weight[:, w] · x_{t − (W − 1) + w}).

    Args:
        x: [B, T, D]. weight: [D, W]. bias: [D].
        activation: None or "silu".
        initial_state: [N, D, W − 1], the inputs before the first token, oldest first; None is zeros.
        cu_seqlens: [N+1] int32 or int64, packed sequences (B = 1); rows after the last one give zeros.
    Returns:
        y [B, T, D] in x's dtype (computed in fp32, fp64 for fp64), and the last W − 1 inputs [N, D, W − 1] in x's dtype
        (None unless `output_final_state`).
    Raises:
        KernelError: unknown activation, or shapes that do not fit.
    """
    batch, _, width = x.shape
    check_cu_seqlens(cu_seqlens, batch, x.device)
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    taps = _check_taps(x, weight, bias, activation)
    if initial_state is not None:
        check_shape("initial_state", initial_state, (sequences, width, taps - 1))
    if cu_seqlens is not None:
        return _packed(x, weight, bias, activation, initial_state, output_final_state, cu_seqlens)
    if initial_state is None:
        padded = torch.nn.functional.pad(x, (0, 0, taps - 1, 0))
    else:
        padded = torch.cat((initial_state.mT.to(x.dtype), x), 1)
    y = _finish(_shifted_sum(padded, weight, x.shape[1]), bias, activation).to(x.dtype)
    if not output_final_state:
        return y, None
    return y, padded[:, padded.shape[1] - (taps - 1) :].mT.contiguous()


def short_conv_step(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    state: Tensor,
    activation: str | None = None,
) -> Tensor:
    """Decode: y [N, T, D] of the next T tokens (from 1 to a handful); `state` [N, D, W − 1] is updated in place."""
    taps = _check_taps(x, weight, bias, activation)
    check_shape("state", state, (x.shape[0], x.shape[2], taps - 1))
    padded = torch.cat((state.mT.to(x.dtype), x), 1)
    y = _finish(_shifted_sum(padded, weight, x.shape[1]), bias, activation).to(x.dtype)
    state.copy_(padded[:, padded.shape[1] - (taps - 1) :].mT)
    return y


def _check_taps(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> int:
    if activation not in (None, "silu"):
        raise KernelError(f"activation must be None or 'silu', got {activation!r}")
    if x.ndim != 3:
        raise KernelError(f"x must have shape (B, T, D), got {tuple(x.shape)}")
    check_shape("weight", weight, (x.shape[2], None))
    if bias is not None:
        check_shape("bias", bias, (x.shape[2],))
    return weight.shape[1]


def _shifted_sum(padded: Tensor, weight: Tensor, steps: int) -> Tensor:
    """Σ_w weight[:, w] · padded[:, t + w], in fp32: [B, T, D]."""
    wide = padded if padded.dtype == torch.float64 else padded.float()
    taps = weight.to(wide.dtype)
    total = wide[:, :steps] * taps[:, 0]
    for w in range(1, weight.shape[1]):
        total = total + wide[:, w : w + steps] * taps[:, w]
    return total


def _finish(total: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    if bias is not None:
        total = total + bias.to(total.dtype)
    return total if activation is None else torch.nn.functional.silu(total)


def _packed(x, weight, bias, activation, initial_state, output_final_state, cu_seqlens):
    """Every sequence gets W − 1 rows in front (its state, or zeros), so that no tap crosses a border."""
    bounds = cu_seqlens.to(torch.int64)
    sequences, total, history = bounds.shape[0] - 1, x.shape[1], weight.shape[1] - 1
    token = torch.arange(total, device=x.device)
    number = torch.searchsorted(bounds, token, right=True)
    inside = token + history * number.clamp(max=sequences)
    grown = bounds + history * torch.arange(sequences + 1, device=x.device)
    rows = x.new_zeros(total + sequences * history, x.shape[2]).index_copy(0, inside, x[0])
    if initial_state is not None:
        before = grown[:-1, None] + torch.arange(history, device=x.device)
        past = initial_state.mT.to(x.dtype).flatten(0, 1)
        rows = rows.index_copy(0, before.flatten(), past)
    padded = torch.nn.functional.pad(rows, (0, 0, history, 0))[None]
    y = _finish(_shifted_sum(padded, weight, rows.shape[0])[:, inside], bias, activation)
    y = y.masked_fill((number > sequences)[:, None], 0.0).to(x.dtype)
    if not output_final_state:
        return y, None
    last = grown[1:, None] - history + torch.arange(history, device=x.device)
    return y, rows[last].mT.contiguous()
