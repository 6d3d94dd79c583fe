"""Held-out loss and perplexity, and how far each swapped layer is from the attention it replaced."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fla_swap.distillation.alignment import record_calls
from fla_swap.distillation.losses import CausalModel, cross_entropy
from fla_swap.errors import DataError


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerError:
    """`relative`: ‖y − y*‖ / ‖y*‖, y a layer's output on its inputs in the original model, y* its original's."""

    fqn: str
    relative: float


@torch.no_grad()
def held_out_loss(
    model: nn.Module, blocks: Any, *, batch_size: int = 8, device: torch.device | str | None = None
) -> float:
    """Mean next-token loss in nats a token over all blocks, T − 1 predictions a block; no state crosses blocks.

    Args:
        blocks: token ids [blocks, T] int64, or a dataset with `.blocks`.
        device: where to run; None is where the model is (it is not moved back).
    """
    blocks = as_blocks(blocks)
    if device is not None:
        model.to(device)  # type: ignore[call-overload]
    training = model.training
    model.eval()
    try:
        cut = CausalModel(model)
        where = cut.head.weight.device
        total = 0.0
        for rows in blocks.split(batch_size):
            rows = rows.to(where)
            loss = cross_entropy(cut.hidden(rows), cut.head, rows)
            total += float(loss) * rows.shape[0]
    finally:
        model.train(training)
    return total / blocks.shape[0]


def perplexity(loss: float) -> float:
    """exp of a loss in nats a token."""
    return math.exp(loss)


@torch.no_grad()
def layer_errors(model: nn.Module, blocks: Any, *, batch_size: int = 8) -> list[LayerError]:
    """The error of every swapped layer against its original, on the inputs it has in the original model."""
    blocks = as_blocks(blocks)
    training = model.training
    model.eval()
    wrong: dict[str, float] = {}
    size: dict[str, float] = {}
    try:
        device = next(model.parameters()).device
        for rows in blocks.split(batch_size):
            for call in record_calls(model, rows.to(device)):
                error = (call.run().float() - call.target.float()).square().sum()
                wrong[call.fqn] = wrong.get(call.fqn, 0.0) + float(error)
                size[call.fqn] = size.get(call.fqn, 0.0) + float(call.target.float().square().sum())
    finally:
        model.train(training)
    return [LayerError(fqn=n, relative=math.sqrt(wrong[n] / max(size[n], 1e-30))) for n in wrong]


def as_blocks(blocks: Any) -> Tensor:
    """Token ids [blocks, T] int64 from such a tensor or from a `TokenBlocks` dataset."""
    tensor = getattr(blocks, "blocks", blocks)
    if not isinstance(tensor, Tensor) or tensor.ndim != 2 or tensor.dtype != torch.int64 or tensor.shape[1] < 2:
        raise DataError(f"expected token blocks [blocks, T >= 2] int64, got {describe(tensor)}")
    if tensor.shape[0] == 0:
        raise DataError("there are no token blocks to evaluate")
    return tensor


def describe(value: Any) -> str:
    return f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
