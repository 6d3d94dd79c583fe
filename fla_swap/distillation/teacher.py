"""The frozen teacher, and the module whose `forward` is the distillation loss."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from fla_swap.distillation.alignment import Objective
from fla_swap.distillation.losses import CausalModel, Head, cross_entropy, kl_divergence
from fla_swap.swapping import original_attention, restore_


class Teacher:
    """Gives the last hidden states of a frozen model; not a module, so that no optimizer, DDP or checkpoint sees it.

    `shared`: the model is the student itself, and runs with its original attention (while nothing but mixers trains).
    """

    def __init__(self, model: nn.Module, *, shared: bool = False):
        self.model, self.shared = model, shared
        if not shared:
            model.eval().requires_grad_(False)
        with self._original():
            self.cut = CausalModel(model)

    def _original(self):
        return original_attention(self.model) if self.shared else nullcontext()

    @torch.no_grad()
    def __call__(self, input_ids: Tensor) -> tuple[Tensor, Head]:
        """Token ids [B, T] → hidden states [B, T, D] and the head that turns them into logits."""
        with self._original():
            return self.cut.hidden(input_ids), self.cut.head


def copy_original(model: nn.Module) -> nn.Module:
    """A frozen copy of a swapped model with its original attention back in place; the model itself is left alone."""
    teacher = restore_(copy.deepcopy(model))
    return teacher.eval().requires_grad_(False)


class Distillation(Objective):
    """Wraps a student: `forward(input_ids)` returns kl_weight · KL(teacher ‖ student) + ce_weight · cross entropy.

    Nats a token; `teacher` may be None when kl_weight is 0. The logits of `chunk` tokens exist at one time.
    """

    def __init__(
        self,
        model: nn.Module,
        teacher: Teacher | None,
        *,
        kl_weight: float = 1.0,
        ce_weight: float = 0.0,
        chunk: int | None = None,
        keep_training_mode: bool = False,
    ):
        super().__init__(model, keep_training_mode=keep_training_mode)
        self.teacher, self.chunk = teacher, chunk
        self.kl_weight, self.ce_weight = kl_weight, ce_weight
        self.cut = CausalModel(model)

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden, head = self.cut.hidden(input_ids), self.cut.head
        loss = hidden.new_zeros((), dtype=torch.float32)
        if self.kl_weight and self.teacher is not None:
            target, target_head = self.teacher(input_ids)
            loss = loss + self.kl_weight * kl_divergence(hidden, head, target, target_head, chunk=self.chunk)
        if self.ce_weight:
            loss = loss + self.ce_weight * cross_entropy(hidden, head, input_ids, chunk=self.chunk)
        return loss
