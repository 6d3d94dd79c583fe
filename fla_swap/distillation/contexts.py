"""What a run changes for its time only: dtype, gradient flags, gradient checkpointing, the meaning of Ctrl-C."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fla_swap.distillation.config import StageConfig
from fla_swap.distillation.trainer import StageCallback
from fla_swap.swapping import swapped_layers


@contextlib.contextmanager
def full_precision(model: nn.Module) -> Iterator[None]:
    """Hold the weights in float32 while they train, and give them their own dtype back afterwards.

    The original attention, which is in neither `parameters()` nor `buffers()` but follows `.float()`, is included.
    """
    dtypes = {n: t.dtype for n, t in all_tensors(model) if t.is_floating_point()}
    narrow = any(d in (torch.bfloat16, torch.float16) for d in dtypes.values())
    if narrow:
        model.float()
    try:
        yield
    finally:
        if narrow:
            for name, tensor in all_tensors(model):
                if name in dtypes:
                    tensor.data = tensor.data.to(dtypes[name])


def all_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers by every name they have, those of the swapped layers' originals after them."""
    originals = [(f"{fqn}.original", layer.original) for fqn, layer in swapped_layers(model)]
    for prefix, module in [("", model), *originals]:
        if module is not None:
            yield from module.named_parameters(prefix, remove_duplicate=False)
            yield from module.named_buffers(prefix, remove_duplicate=False)


@contextlib.contextmanager
def unchanged_flags(model: nn.Module) -> Iterator[None]:
    """Put `requires_grad` back as it was."""
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    try:
        yield
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(flags[name])
            parameter.grad = None


@contextlib.contextmanager
def checkpointed_gradients(model: Any, stage: StageConfig) -> Iterator[None]:
    if stage.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    try:
        yield
    finally:
        if stage.gradient_checkpointing:
            model.gradient_checkpointing_disable()


@contextlib.contextmanager
def stopping_at_ctrl_c(callback: StageCallback) -> Iterator[None]:
    """The first Ctrl-C ends the stage at the next step's border, with a checkpoint; the second one at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: Any) -> None:
        if callback.interrupted:
            raise KeyboardInterrupt
        callback.interrupted = True

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
