"""Losses from hidden states and the weights of the output layer, in chunks of tokens: the logits never exist whole.

Legend: M tokens, D hidden width, V vocabulary, C tokens in a chunk. The gradients are computed in the forward pass,
chunk by chunk (Liger, 2410.10989; cut cross-entropy, 2411.09009), so the backward pass only scales them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fla_swap.errors import KernelError
from fla_swap.kernels.common import check_shape

_CHUNK_ELEMENTS = {"cpu": 1 << 24, "cuda": 1 << 26}
"""Default elements of one chunk's logits: fp32 of 64 MiB on a CPU, 256 MiB on a GPU; about four such buffers live."""


def linear_kl(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    labels_mask: Tensor | None = None,
    temperature: float = 1.0,
    chunk: int | None = None,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    softcap: float | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Forward KL(teacher ‖ student) of the next-token distributions, averaged over tokens, in nats.

    Args:
        student_hidden: [..., D]. student_weight: [V, D]. student_bias: [V].
        teacher_hidden: [..., Dt], the same leading shape. teacher_weight: [V, Dt]. teacher_bias: [V]. No gradient.
        labels_mask: bool [...], the tokens that count; None counts all. With none, the loss is 0.
        temperature: both logits are divided by it; the loss is not multiplied by its square.
        chunk: tokens per chunk; None picks it from V (fp32 logits of 64 MiB on a CPU, 256 MiB on a GPU).
        softcap: logits z become softcap · tanh(z / softcap), in student and teacher, before the temperature.
        reduction: "mean" over the tokens that count, or "sum".
    Returns:
        Scalar, fp32 (fp64 for fp64 inputs). Products run in the hidden states' dtype (autocast's where it is on) with
        fp32 results; softmax in fp32. Gradients reach student_hidden, student_weight and student_bias.
    Raises:
        KernelError: shapes that do not fit, or an unknown reduction.
    """
    tokens, vocabulary = student_hidden.shape[:-1], student_weight.shape[0]
    check_shape("student_weight", student_weight, (None, student_hidden.shape[-1]))
    check_shape("teacher_weight", teacher_weight, (vocabulary, teacher_hidden.shape[-1]))
    check_shape("teacher_hidden", teacher_hidden, (*tokens, None))
    if labels_mask is not None:
        check_shape("labels_mask", labels_mask, tuple(tokens))
    _check_common(vocabulary, temperature, reduction, (student_bias, teacher_bias))
    hidden, weight = _matched(student_hidden, student_weight)
    teacher, teacher_matrix = _matched(teacher_hidden.detach(), teacher_weight.detach())
    counts = _counts(labels_mask, tokens, hidden)
    loss, *_ = _kl_op(
        hidden.flatten(0, -2),
        weight,
        student_bias,
        teacher.flatten(0, -2),
        teacher_matrix,
        None if teacher_bias is None else teacher_bias.detach(),
        counts,
        float(temperature),
        softcap,
        _chunk(chunk, vocabulary, hidden.device),
        _wants(hidden),
        _wants(weight),
        _wants(student_bias),
    )
    return loss if reduction == "sum" else loss / counts.sum().clamp_min(1)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    chunk: int | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Cross entropy of `labels` under softmax(hidden · weightᵀ + bias), averaged over tokens, in nats.

    Args:
        hidden: [..., D]. weight: [V, D]. bias: [V].
        labels: int [...], the class of each token (not shifted here); `ignore_index` does not count.
        chunk, softcap, reduction: as in `linear_kl`.
    Returns:
        Scalar, fp32 (fp64 for fp64 inputs); 0 when no token counts.
    Raises:
        KernelError: shapes that do not fit, or an unknown reduction.
    """
    check_shape("weight", weight, (None, hidden.shape[-1]))
    check_shape("labels", labels, tuple(hidden.shape[:-1]))
    _check_common(weight.shape[0], 1.0, reduction, (bias,))
    hidden, weight = _matched(hidden, weight)
    labels = labels.flatten()
    counts = _counts(labels != ignore_index, labels.shape, hidden)
    loss, *_ = _cross_entropy_op(
        hidden.flatten(0, -2),
        weight,
        bias,
        labels.masked_fill(labels == ignore_index, 0),
        counts,
        softcap,
        _chunk(chunk, weight.shape[0], hidden.device),
        _wants(hidden),
        _wants(weight),
        _wants(bias),
    )
    return loss if reduction == "sum" else loss / counts.sum().clamp_min(1)


def _check_common(vocabulary: int, temperature: float, reduction: str, biases: tuple[Tensor | None, ...]) -> None:
    for bias in biases:
        if bias is not None:
            check_shape("bias", bias, (vocabulary,))
    if temperature <= 0:
        raise KernelError(f"temperature must be positive, got {temperature}")
    if reduction not in ("mean", "sum"):
        raise KernelError(f"reduction must be 'mean' or 'sum', got {reduction!r}")


def _chunk(requested: int | None, vocabulary: int, device: torch.device) -> int:
    if requested is None:
        elements = _CHUNK_ELEMENTS.get(device.type, _CHUNK_ELEMENTS["cuda"])
        return max(16, min(4096, elements // vocabulary))
    if requested < 1:
        raise KernelError(f"chunk must be at least 1 token, got {requested}")
    return requested


def _wants(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.requires_grad and torch.is_grad_enabled()


def _matched(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Both in autocast's dtype where it is on, otherwise in the hidden states' dtype."""
    dtype = hidden.dtype
    if torch.is_autocast_enabled(hidden.device.type) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(hidden.device.type)
    return hidden.to(dtype), weight.to(dtype)


def _counts(mask: Tensor | None, tokens: tuple[int, ...] | torch.Size, hidden: Tensor) -> Tensor:
    """1 where a token counts, 0 elsewhere: [M] in the dtype of the loss."""
    dtype = _loss_dtype(hidden)
    if mask is None:
        return torch.ones(math.prod(tokens), dtype=dtype, device=hidden.device)
    return mask.flatten().to(dtype)


def _loss_dtype(hidden: Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b with an fp32 (fp64) result; 16-bit operands keep their dtype on a GPU and are widened on a CPU."""
    if a.dtype in (torch.float32, torch.float64):
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


class _Gradients:
    """The loss and the gradients of the output layer, summed over chunks of tokens."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        softcap: float | None,
        wanted: tuple[bool, bool, bool],
    ):
        dtype = _loss_dtype(hidden)
        widen = not hidden.is_cuda
        self.source = hidden
        self.hidden = hidden
        self.weight = weight.to(dtype) if widen else weight
        self.bias, self.softcap = bias, softcap
        self.loss = hidden.new_zeros((), dtype=dtype)
        to_hidden, to_weight, to_bias = wanted
        self.needed = any(wanted)
        self.to_hidden = torch.empty_like(hidden) if to_hidden else None
        self.to_weight = torch.zeros_like(weight, dtype=dtype) if to_weight else None
        self.to_bias = weight.new_zeros(weight.shape[0], dtype=dtype) if to_bias else None
        self.dtypes = (hidden.dtype, weight.dtype, weight.dtype if bias is None else bias.dtype)

    def logits(self, rows: slice) -> tuple[Tensor, Tensor | None]:
        """fp32 logits [C, V] of a chunk, and tanh(z / softcap) when there is a softcap."""
        return _logits(self._operand(rows), self.weight, self.bias, self.softcap)

    def add(self, rows: slice, loss: Tensor, dlogits: Tensor | None, squashed: Tensor | None) -> None:
        """Add a chunk's loss, and the gradients that follow from its dloss/dlogits (which is overwritten)."""
        self.loss += loss
        if dlogits is None:
            return
        if squashed is not None:
            dlogits.mul_(1.0 - squashed.square())
        if self.to_bias is not None:
            self.to_bias += dlogits.sum(0)
        dlogits = dlogits.to(self.weight.dtype)
        if self.to_hidden is not None:
            self.to_hidden[rows] = _product(dlogits, self.weight).to(self.to_hidden.dtype)
        if self.to_weight is not None:
            self.to_weight += _product(dlogits.mT, self._operand(rows))

    def results(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        gradients = (self.to_hidden, self.to_weight, self.to_bias)
        empty = self.source.new_empty
        dense = [
            empty(0, dtype=dtype) if gradient is None else gradient.to(dtype)
            for gradient, dtype in zip(gradients, self.dtypes, strict=True)
        ]
        return self.loss, dense[0], dense[1], dense[2]

    def _operand(self, rows: slice) -> Tensor:
        return self.hidden[rows].to(self.weight.dtype)


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None) -> tuple[Tensor, Tensor | None]:
    logits = _product(hidden, weight.mT)
    if bias is not None:
        logits += bias.to(logits.dtype)
    if softcap is None:
        return logits, None
    squashed = logits.div_(softcap).tanh_()
    return squashed * softcap, squashed


def _slices(total: int, chunk: int) -> list[slice]:
    return [slice(begin, min(begin + chunk, total)) for begin in range(0, total, chunk)]


def kl_with_gradients(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    counts: Tensor,
    temperature: float,
    softcap: float | None,
    chunk: int,
    to_hidden: bool,
    to_weight: bool,
    to_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Summed loss and its gradients to hidden [M, D], weight [V, D] and bias [V] (empty where not asked for)."""
    with torch.autocast(hidden.device.type, enabled=False):
        total = _Gradients(hidden, weight, bias, softcap, (to_hidden, to_weight, to_bias))
        dtype = total.weight.dtype
        teacher_matrix = teacher_weight.to(dtype if not hidden.is_cuda else teacher_weight.dtype)
        for rows in _slices(hidden.shape[0], chunk):
            target, _ = _logits(teacher_hidden[rows].to(teacher_matrix.dtype), teacher_matrix, teacher_bias, softcap)
            target = target.div_(temperature).log_softmax(-1)
            logits, squashed = total.logits(rows)
            student = logits.div_(temperature).log_softmax(-1)
            del logits
            probability = target.exp()
            per_token = target.sub_(student).mul_(probability).sum(-1)
            del target
            dlogits = None
            if total.needed:
                dlogits = student.exp_().sub_(probability).mul_(counts[rows, None] / temperature)
            del probability
            total.add(rows, (per_token * counts[rows]).sum(), dlogits, squashed)
        return total.results()


def cross_entropy_with_gradients(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    counts: Tensor,
    softcap: float | None,
    chunk: int,
    to_hidden: bool,
    to_weight: bool,
    to_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Summed loss and its gradients, as `linear_kl`; labels int [M], all inside the vocabulary."""
    with torch.autocast(hidden.device.type, enabled=False):
        total = _Gradients(hidden, weight, bias, softcap, (to_hidden, to_weight, to_bias))
        for rows in _slices(hidden.shape[0], chunk):
            logits, squashed = total.logits(rows)
            student = logits.log_softmax(-1)
            del logits
            label = labels[rows, None].long()
            loss = -(student.gather(1, label)[:, 0] * counts[rows]).sum()
            dlogits = None
            if total.needed:
                dlogits = student.exp_().mul_(counts[rows, None])
                dlogits.scatter_add_(1, label, -counts[rows, None])
            total.add(rows, loss, dlogits, squashed)
        return total.results()


_kl_op = torch.library.custom_op("fla_swap::linear_kl", kl_with_gradients, mutates_args=())
_cross_entropy_op = torch.library.custom_op(
    "fla_swap::linear_cross_entropy", cross_entropy_with_gradients, mutates_args=()
)


def _fake_results(hidden: Tensor, weight: Tensor, bias: Tensor | None, wanted: tuple[bool, bool, bool]):
    loss = hidden.new_empty((), dtype=_loss_dtype(hidden))
    empty = (hidden.new_empty(0), weight.new_empty(0), (weight if bias is None else bias).new_empty(0))
    full = (hidden, weight, weight if bias is None else bias)
    dense = [f.new_empty(f.shape) if w else e for f, e, w in zip(full, empty, wanted, strict=True)]
    return loss, dense[0], dense[1], dense[2]


@_kl_op.register_fake
def _(h, w, b, th, tw, tb, counts, temperature, softcap, chunk, to_hidden, to_weight, to_bias):
    return _fake_results(h, w, b, (to_hidden, to_weight, to_bias))


@_cross_entropy_op.register_fake
def _(h, w, b, labels, counts, softcap, chunk, to_hidden, to_weight, to_bias):
    return _fake_results(h, w, b, (to_hidden, to_weight, to_bias))


def _setup(ctx, inputs, output):
    ctx.inputs = len(inputs)
    ctx.wanted = inputs[-3:]
    ctx.save_for_backward(*output[1:])


def _backward(ctx, grad, *_unused):
    """The gradients were computed in the forward pass: scale them."""
    scaled = [
        gradient * grad.to(gradient.dtype) if wanted else None
        for gradient, wanted in zip(ctx.saved_tensors, ctx.wanted, strict=True)
    ]
    return (*scaled, *[None] * (ctx.inputs - 3))


_kl_op.register_autograd(_backward, setup_context=_setup)
_cross_entropy_op.register_autograd(_backward, setup_context=_setup)
