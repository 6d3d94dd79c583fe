"""Losses on next-token distributions, from hidden states: the logits of a whole batch never exist at one time.

Legend for shapes: B batch, T time, D hidden size, N tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fla_swap.errors import TrainingError
from fla_swap.kernels.fused.linear_loss import linear_cross_entropy, linear_kl


@dataclass(frozen=True, kw_only=True)
class Head:
    """The map from hidden states to logits: `cap(scale · (h Wᵀ + b))`, `cap(x) = softcap · tanh(x / softcap)`.

    weight [V, D]; bias [V] or None.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    @property
    def scaled_bias(self) -> Tensor | None:
        return self.bias if self.bias is None or self.scale == 1 else self.bias * self.scale

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [N, D] → float logits [N, V] (float64 stays float64)."""
        logits = F.linear(
            hidden, self.weight.to(hidden.dtype), None if self.bias is None else self.bias.to(hidden.dtype)
        )
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


class _Reached(Exception):
    """The forward pass arrived at the output head; carries the head's input."""

    def __init__(self, hidden: Tensor):
        super().__init__()
        self.hidden = hidden


class CausalModel:
    """A causal language model cut in front of its output head, which a probe has shown to be `Head`.

    Raises TrainingError, naming the model's class, when it has no output head or computes its logits in another way.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        find = getattr(model, "get_output_embeddings", None)
        self.head_module: Any = find() if find is not None else None
        if getattr(self.head_module, "weight", None) is None:
            raise TrainingError(f"{type(model).__name__} has no output head (get_output_embeddings): not a causal LM")
        self.scale, self.softcap, self.direct = self._probe()

    @property
    def head(self) -> Head:
        bias = getattr(self.head_module, "bias", None)
        return Head(weight=self.head_module.weight, bias=bias, scale=self.scale, softcap=self.softcap)

    def hidden(self, input_ids: Tensor) -> Tensor:
        """Token ids [B, T] → what goes into the output head [B, T, D]."""
        if self.direct:
            return self._base()(input_ids=input_ids, use_cache=False)[0]
        return self._stopped(input_ids)

    def _base(self) -> nn.Module:
        return self.model.base_model  # type: ignore[return-value]

    def _stopped(self, input_ids: Tensor) -> Tensor:
        def stop(module: nn.Module, args: tuple[Any, ...]) -> None:
            raise _Reached(args[0])

        handle = self.head_module.register_forward_pre_hook(stop)
        try:
            self.model(input_ids=input_ids, use_cache=False)
        except _Reached as reached:
            return reached.hidden
        finally:
            handle.remove()
        raise TrainingError(f"{type(self.model).__name__}: the forward pass does not call its output head")

    @torch.no_grad()
    def _probe(self) -> tuple[float, float | None, bool]:
        weight = self.head_module.weight
        training = self.model.training
        ids = torch.arange(min(16, weight.shape[0]), device=weight.device)[None]
        self.model.eval()
        try:
            logits = self.model(input_ids=ids, use_cache=False).logits[0].float()
            hidden = self._stopped(ids)
            base = getattr(self.model, "base_model", self.model)
            direct = base is not self.model and torch.equal(base(input_ids=ids, use_cache=False)[0], hidden)
        finally:
            self.model.train(training)
        for scale, softcap in candidates(getattr(self.model, "config", None)):
            head = Head(weight=weight, bias=getattr(self.head_module, "bias", None), scale=scale, softcap=softcap)
            error = (head.logits(hidden[0]).float() - logits).abs().max()
            if error <= (1e-4 if weight.dtype in (torch.float32, torch.float64) else 2e-2) * logits.abs().max():
                return scale, softcap, direct
        raise TrainingError(
            f"{type(self.model).__name__}: its logits are not a linear map of the last hidden states, with the scale "
            "and softcap of its config; such a head cannot be distilled from hidden states"
        )


def candidates(config: Any) -> list[tuple[float, float | None]]:
    """Every (scale, softcap) that a config's well-known fields can mean, the plain head first."""
    scales = [1.0]
    if isinstance(value := getattr(config, "logit_scale", None), int | float) and value:
        scales.append(float(value))
    if isinstance(value := getattr(config, "logits_scaling", None), int | float) and value:
        scales.append(1 / float(value))
    softcap = getattr(config, "final_logit_softcapping", None)
    caps = [None] if softcap is None else [None, float(softcap)]
    return [(scale, cap) for cap in caps for scale in scales]


def kl_divergence(
    student: Tensor, student_head: Head, teacher: Tensor, teacher_head: Head, *, chunk: int | None = None
) -> Tensor:
    """Mean KL(teacher ‖ student) of the next-token distributions, nats a token, temperature 1 (1503.02531).

    Args:
        student, teacher: hidden states [..., D] of the same tokens (their widths may differ). Only the student's, and
            its head's weight and bias, get gradients.
        chunk: tokens whose logits exist at one time; None chooses.
    """
    if student_head.softcap != teacher_head.softcap:
        raise TrainingError(
            f"the student caps its logits at {student_head.softcap}, the teacher at {teacher_head.softcap}: "
            "both must have the same final softcap"
        )
    return linear_kl(
        student * student_head.scale if student_head.scale != 1 else student,
        student_head.weight,
        teacher * teacher_head.scale if teacher_head.scale != 1 else teacher,
        teacher_head.weight,
        student_bias=student_head.scaled_bias,
        teacher_bias=teacher_head.scaled_bias,
        softcap=student_head.softcap,
        chunk=chunk,
    )


def cross_entropy(hidden: Tensor, head: Head, labels: Tensor, *, chunk: int | None = None) -> Tensor:
    """Mean next-token cross entropy, nats a token: hidden [B, T, D] and token ids [B, T]; T − 1 predictions a row."""
    return linear_cross_entropy(
        hidden[:, :-1] * head.scale if head.scale != 1 else hidden[:, :-1],
        head.weight,
        labels[:, 1:],
        bias=head.scaled_bias,
        softcap=head.softcap,
        chunk=chunk,
    )
