"""Chunked losses, short convolution and norms against plain float64 code, values and gradients."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fla_swap.errors import KernelError
from fla_swap.kernels.fused import linear_loss, reference
from fla_swap.kernels.fused.ops import (
    gated_rms_norm,
    linear_cross_entropy,
    linear_kl,
    rms_norm,
    short_conv,
    short_conv_step,
)


def error(out: torch.Tensor, ref: torch.Tensor) -> float:
    """RMS(ref − out) / RMS(ref)."""
    difference = (ref.double() - out.double()).square().mean().sqrt()
    return float(difference / ref.double().square().mean().sqrt().clamp_min(1e-12))


def evaluate(function, tensors, dtype, **kwargs):
    """Outputs and gradients of `function` on leaves of the given dtype (integers, masks and teachers as they are)."""
    leaves = {
        n: t.detach().to(dtype).requires_grad_(t.requires_grad) if t.is_floating_point() else t
        for n, t in tensors.items()
    }
    result = function(**leaves, **kwargs)
    outputs = [t for t in (result if isinstance(result, tuple) else (result,)) if t is not None]
    loss = sum(
        (o * torch.randn(o.shape, generator=torch.Generator().manual_seed(i)).to(o)).sum()
        for i, o in enumerate(outputs)
    )
    loss.backward()
    found = {f"output {i}": o.detach() for i, o in enumerate(outputs)}
    return found | {n: t.grad for n, t in leaves.items() if t.requires_grad}


def compare(op, oracle, tensors, bound, *, dtype=torch.float32, op_kwargs=None, **kwargs) -> None:
    expected = evaluate(oracle, tensors, torch.float64, **kwargs)
    found = evaluate(op, tensors, dtype, **kwargs, **(op_kwargs or {}))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.isfinite(found[name]).all(), name
        assert error(found[name], value) <= bound, name


@pytest.mark.parametrize("case", reference.NUMERICS_CASES, ids=lambda case: case["op"].__name__)
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.bfloat16, 0.008)])
def test_matches_float64(case, dtype, bound):
    tensors = case["make"]("cpu", dtype, 33, 2, 60, 0)
    compare(case["op"], case["reference"], tensors, bound, dtype=dtype, **case["kwargs"])


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_kl_with_everything(chunk):
    """Mask, temperature, biases and softcap together, whatever the chunk."""
    tensors = reference._make_kl("cpu", torch.float32, 10, 1, 16, 0)
    tensors["student_bias"] = torch.randn(1000, requires_grad=True)
    tensors["teacher_bias"] = torch.randn(1000)
    tensors["labels_mask"] = torch.rand(2, 10, generator=torch.Generator().manual_seed(0)) > 0.3
    options = {"temperature": 2.0, "softcap": 3.0}
    compare(linear_kl, reference.linear_kl_reference, tensors, 1e-5, op_kwargs={"chunk": chunk}, **options)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_cross_entropy_equals_torch(reduction):
    tensors = reference._make_cross_entropy("cpu", torch.float32, 10, 1, 16, 0)
    found = linear_cross_entropy(**tensors, chunk=3, reduction=reduction)
    logits = (tensors["hidden"] @ tensors["weight"].T).flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, tensors["labels"].flatten(), reduction=reduction)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_kl_of_a_model_with_itself_is_zero():
    tensors = reference._make_kl("cpu", torch.float32, 10, 1, 16, 0)
    hidden, weight = tensors["student_hidden"], tensors["student_weight"]
    loss = linear_kl(hidden, weight, hidden, weight)
    loss.backward()
    assert abs(loss.item()) < 1e-6
    assert hidden.grad.abs().max() < 1e-7


def test_no_token_counts():
    tensors = reference._make_kl("cpu", torch.float32, 4, 1, 16, 0)
    loss = linear_kl(**tensors, labels_mask=torch.zeros(2, 4, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0
    assert (tensors["student_hidden"].grad == 0).all()
    tensors = reference._make_cross_entropy("cpu", torch.float32, 4, 1, 16, 0)
    assert linear_cross_entropy(**tensors | {"labels": torch.full((2, 4), -100)}).item() == 0


def test_frozen_output_layer_gets_no_gradient_and_costs_none():
    """A frozen weight: the op is not asked for its gradient."""
    tensors = reference._make_kl("cpu", torch.float32, 4, 1, 16, 0)
    tensors["student_weight"].requires_grad_(False)
    linear_kl(**tensors).backward()
    assert tensors["student_weight"].grad is None
    assert tensors["student_hidden"].grad.abs().sum() > 0
    with torch.no_grad():
        assert not linear_kl(**tensors).requires_grad


class LargestTensor(TorchDispatchMode):
    """Records the most elements that any result has."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def test_the_logits_never_exist_whole():
    """512 tokens × 1000 classes in chunks of 32: no result inside is larger than a chunk's logits."""
    t = {n: x.detach().flatten(0, -2) for n, x in reference._make_kl("cpu", torch.float32, 256, 1, 8, 0).items()}
    student, teacher = (t["student_hidden"], t["student_weight"]), (t["teacher_hidden"], t["teacher_weight"])
    mode = LargestTensor()
    with mode:
        linear_loss.kl_with_gradients(*student, None, *teacher, None, torch.ones(512), 1.0, 30.0, 32, True, True, False)
        linear_loss.cross_entropy_with_gradients(
            *student, None, torch.arange(512), torch.ones(512), None, 32, True, True, False
        )
    assert mode.elements == 32 * 1000


def test_kl_under_autocast_uses_its_dtype():
    tensors = reference._make_kl("cpu", torch.float32, 10, 1, 64, 0)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_kl(**tensors)
    weight = tensors["student_weight"]
    (gradient,) = torch.autograd.grad(loss, weight)
    assert loss.dtype == torch.float32
    assert gradient.dtype == torch.float32
    exact = reference.linear_kl_reference(**tensors)
    (expected,) = torch.autograd.grad(exact, weight)
    assert error(loss.detach(), exact.detach()) < 0.005
    assert error(gradient, expected) < 0.008


def test_losses_compile_without_graph_break():
    torch._dynamo.reset()
    tensors = reference._make_kl("cpu", torch.float32, 10, 1, 16, 0)
    labels = torch.arange(20).view(2, 10)

    def loss(hidden, weight, teacher_hidden, teacher_weight):
        kl = linear_kl(hidden, weight, teacher_hidden, teacher_weight, chunk=6)
        return kl + linear_cross_entropy(hidden, weight, labels, chunk=6)

    arguments = [
        tensors["student_hidden"],
        tensors["student_weight"],
        tensors["teacher_hidden"],
        tensors["teacher_weight"],
    ]
    gradients = []
    for function in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True)):
        value = function(*arguments)
        gradients.append((value, *torch.autograd.grad(value, arguments[:2])))
    for got, expected in zip(gradients[1], gradients[0], strict=True):
        torch.testing.assert_close(got, expected)


def test_opcheck():
    t = reference._make_kl("cpu", torch.float32, 5, 1, 8, 0)
    flat = [t[n].detach().reshape(-1, 8).requires_grad_(t[n].requires_grad) for n in t if "hidden" in n]
    counts = torch.ones(10)
    torch.library.opcheck(
        torch.ops.fla_swap.linear_kl.default,
        (
            *(flat[0], t["student_weight"], None, flat[1], t["teacher_weight"], None),
            *(counts, 1.0, None, 4, True, True, False),
        ),
    )
    torch.library.opcheck(
        torch.ops.fla_swap.linear_cross_entropy.default,
        (flat[0], t["student_weight"], None, torch.arange(10), counts, None, 4, True, True, False),
    )


@pytest.mark.parametrize("taps", [1, 2, 4])
def test_conv_equals_conv1d(taps):
    x, weight, bias = torch.randn(2, 20, 6), torch.randn(6, taps), torch.randn(6)
    y, _ = short_conv(x, weight, bias)
    padded = torch.nn.functional.pad(x.mT, (taps - 1, 0))
    expected = torch.nn.functional.conv1d(padded, weight[:, None], bias, groups=6).mT
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("cut", [1, 2, 9])
def test_conv_split_state_equals_one_call(cut):
    x, weight = torch.randn(2, 12, 6), torch.randn(6, 4)
    options = {"activation": "silu", "output_final_state": True}
    whole, whole_state = short_conv(x, weight, **options)
    first, state = short_conv(x[:, :cut], weight, **options)
    second, final = short_conv(x[:, cut:], weight, initial_state=state, **options)
    torch.testing.assert_close(torch.cat((first, second), 1), whole)
    torch.testing.assert_close(final, whole_state)
    torch.testing.assert_close(whole_state, x[:, -3:].mT)


@pytest.mark.parametrize("steps", [1, 3, 6])
def test_conv_steps_equal_the_full_sequence(steps):
    x, weight, bias = torch.randn(2, 12, 6), torch.randn(6, 4), torch.randn(6)
    whole, whole_state = short_conv(x, weight, bias, activation="silu", output_final_state=True)
    state = torch.zeros(2, 6, 3)
    address = state.data_ptr()
    parts = [
        short_conv_step(x[:, i : i + steps], weight, bias, state=state, activation="silu") for i in range(0, 12, steps)
    ]
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    torch.testing.assert_close(state, whole_state)
    assert state.data_ptr() == address


@pytest.mark.parametrize("with_state", [False, True])
def test_conv_never_sees_across_documents(with_state):
    """Packed documents (one empty, one shorter than the filter, padding at the end) equal the loop over each."""
    tensors = reference._make_conv("cpu", torch.float32, 15, 1, 6, 0)
    tensors["x"] = tensors["x"].detach()[:1].requires_grad_()
    tensors["initial_state"] = torch.randn(4, 6, 3, requires_grad=True)
    if not with_state:
        del tensors["initial_state"]
    options = {"activation": "silu", "output_final_state": True, "cu_seqlens": torch.tensor([0, 2, 2, 9, 12])}
    compare(short_conv, reference.short_conv_reference, tensors, 1e-5, **options)
    y, _ = short_conv(**tensors, **options)
    assert (y[:, 12:] == 0).all()


def test_conv_and_norms_compile_without_graph_break():
    torch._dynamo.reset()
    x, weight, state = torch.randn(2, 5, 8), torch.randn(8, 4), torch.zeros(2, 8, 3)

    def block(x, weight, state):
        y, _ = short_conv(x, weight, activation="silu")
        z = short_conv_step(x[:, :1], weight, state=state)
        return gated_rms_norm(y, rms_norm(x, weight[:, 0])) + z

    expected = block(x, weight, state.clone())
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, weight, state), expected)
    torch.testing.assert_close(state[:, :, -1], x[:, 0])


def test_gated_norm_with_sigmoid():
    tensors = reference._make_gated_norm("cpu", torch.float32, 5, 2, 12, 0)
    compare(gated_rms_norm, reference.gated_rms_norm_reference, tensors, 1e-5, activation="sigmoid", eps=1e-3)


def test_wrong_arguments_are_named():
    x = torch.randn(1, 4, 8)
    with pytest.raises(KernelError, match=r"weight must have shape \(8, any\), got \(6, 4\)"):
        short_conv(x, torch.randn(6, 4))
    with pytest.raises(KernelError, match="activation must be None or 'silu', got 'relu'"):
        short_conv(x, torch.randn(8, 4), activation="relu")
    with pytest.raises(KernelError, match="activation must be 'silu' or 'sigmoid', got 'swish'"):
        gated_rms_norm(x, x, activation="swish")
    with pytest.raises(KernelError, match=r"teacher_weight must have shape \(9, 8\), got \(7, 8\)"):
        linear_kl(x, torch.randn(9, 8), x, torch.randn(7, 8))
    with pytest.raises(KernelError, match=r"labels must have shape \(1, 4\), got \(4,\)"):
        linear_cross_entropy(x, torch.randn(9, 8), torch.zeros(4, dtype=torch.long))
