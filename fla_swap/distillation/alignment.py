"""Every swapped layer in parallel against the attention it replaced, on the inputs that the original model gives it.

One forward pass of the original model, without gradients, collects each layer's call and output; then the mixers run
on those calls with gradients. No error of one layer reaches the next. (RADLADS 2505.03005, HALO, KL-guided conversion.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fla_swap.errors import TrainingError
from fla_swap.swapping import original_attention, swapped_layers


class _MixerCalled(Exception):
    """A swapped layer arrived at its mixer; carries what it was going to be called with."""

    def __init__(self, hidden: Tensor, kwargs: dict[str, Any]):
        super().__init__()
        self.hidden, self.kwargs = hidden, kwargs


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerCall:
    """How one swapped layer was called in the original model, and what its original returned: `target` [B, T, D]."""

    fqn: str
    module: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    target: Tensor

    def run(self) -> Tensor:
        """The mixer's output [B, T, D] on the same call."""
        return attention_output(self.module, self.module(*self.args, **self.kwargs))

    def mix_arguments(self) -> tuple[Tensor, dict[str, Any]]:
        """The call in the mixer's own terms: hidden states and keyword arguments, read off a run that stops there."""

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            raise _MixerCalled(args[0], dict(kwargs))

        mixer: Any = self.module.mixer
        handle = mixer.register_forward_pre_hook(hook, with_kwargs=True)
        try:
            with torch.no_grad():
                self.run()
        except _MixerCalled as called:
            return called.hidden, called.kwargs
        finally:
            handle.remove()
        raise TrainingError(f"{self.fqn}: the swapped layer does not call its mixer")


def attention_output(module: Any, returned: Any) -> Tensor:
    """The attention's output in what a swapped layer returned, wherever its contract says it stands."""
    call = module.site.call
    return returned if call.outputs is None else returned[call.output_index]


def layers_of(model: nn.Module) -> list[tuple[str, Any]]:
    """The swapped layers; TrainingError when there is none or an original was not kept."""
    layers = list(swapped_layers(model))
    if not layers:
        raise TrainingError(f"{type(model).__name__} has no swapped layer: call fs.swap_(model, plan) first")
    lost = [fqn for fqn, module in layers if module.original is None]
    if lost:
        raise TrainingError(
            f"the original attention of {lost} was not kept (a model that was loaded again has none); distil in the "
            "same process as fs.swap_, or give a teacher and only stages of kind 'distil'"
        )
    return layers


@torch.no_grad()
def record_calls(model: nn.Module, input_ids: Tensor) -> list[LayerCall]:
    """Run the original model on token ids [B, T] and return each swapped layer's call and target, in model order."""
    calls: list[LayerCall] = []
    handles = []

    def listen(fqn: str, module: nn.Module) -> None:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            target = attention_output(module, output)
            calls.append(LayerCall(fqn=fqn, module=module, args=args, kwargs=dict(kwargs), target=target))

        handles.append(module.register_forward_hook(hook, with_kwargs=True))

    for fqn, module in layers_of(model):
        listen(fqn, module)
    training = model.training
    try:
        if training:
            model.eval()
        with original_attention(model):
            backbone(model)(input_ids=input_ids, use_cache=False)
    finally:
        if training:
            model.train()
        for handle in handles:
            handle.remove()
    return calls


def backbone(model: Any) -> nn.Module:
    """The model without its output head, where transformers knows it; otherwise the whole model."""
    base = getattr(model, "base_model", model)
    return base if isinstance(base, nn.Module) else model


def layer_loss(output: Tensor, target: Tensor) -> Tensor:
    """mean over tokens of ‖y − y*‖₂ / √D, divided by the root mean square of y* over the batch.

    output, target: [B, T, D]. The division makes layers whose outputs differ in size count alike; 1 is the loss of
    answering 0. The norm is not squared, so that the few tokens with huge outputs do not rule the mean.
    """
    target = target.float()
    distance = torch.linalg.vector_norm(output.float() - target, dim=-1).mean() * target.shape[-1] ** -0.5
    return distance / target.square().mean().sqrt().clamp_min(1e-12)


class Objective(nn.Module):
    """Wraps a swapped model so that `forward(input_ids)` is a loss, summed inside: DDP sees every gradient.

    The model stays in evaluation mode (no dropout: student and teacher must differ in their weights only), unless
    gradient checkpointing needs training mode; the mixers follow `train()`.
    """

    def __init__(self, model: nn.Module, *, keep_training_mode: bool = False):
        super().__init__()
        self.model, self.keep_training_mode = model, keep_training_mode

    def train(self, mode: bool = True) -> Objective:
        super().train(mode)
        if not self.keep_training_mode:
            self.model.eval()
            for _, module in swapped_layers(self.model):  # type: ignore[arg-type]
                module.mixer.train(mode)
        return self


class Alignment(Objective):
    """The mean of `layer_loss` over the swapped layers, each on its original's inputs."""

    def __init__(self, model: nn.Module):
        super().__init__(model)
        layers_of(model)

    def forward(self, input_ids: Tensor) -> Tensor:
        calls = record_calls(self.model, input_ids)
        return torch.stack([layer_loss(call.run(), call.target) for call in calls]).mean()
