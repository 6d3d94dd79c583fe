"""The (gated) delta rule: chunked PyTorch and Triton (interpreted) against the float64 loop over time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from delta_checks import (
    BF16,
    BF16_GATE,
    BF16_GRADIENT,
    DEVICE,
    FP32,
    IMPLEMENTATIONS,
    NAMES,
    check,
    error,
    inputs,
    packing,
    run,
)

from fla_swap.errors import KernelError
from fla_swap.kernels.delta import ops
from fla_swap.kernels.delta.ops import delta_rule, delta_rule_step, gated_delta_rule, gated_delta_rule_step
from fla_swap.kernels.delta.reference import NUMERICS_CASES, gated_delta_rule_reference


def test_one_step_by_hand():
    """Decay first, then replace what the key reads by v: S = e^g·S₀ + β k (v − e^g S₀ᵀk)ᵀ, o = scale · Sᵀ q."""
    x = {
        "q": torch.tensor([[[[1.0, 2.0]]]]),
        "k": torch.tensor([[[[1.0, 0.0]]]]),
        "v": torch.tensor([[[[10.0]]]]),
        "g": torch.log(torch.tensor([[[0.5]]])),
        "beta": torch.tensor([[[0.25]]]),
        "initial_state": torch.tensor([[[[4.0], [8.0]]]]),
    }
    x = {name: tensor.to(DEVICE) for name, tensor in x.items()}
    for implementation in ("reference", *IMPLEMENTATIONS):
        o, final = gated_delta_rule(**x, scale=0.5, output_final_state=True, implementation=implementation)
        torch.testing.assert_close(final.cpu(), torch.tensor([[[[2 + 0.25 * (10 - 2)], [4.0]]]]))
        torch.testing.assert_close(o.cpu(), torch.tensor([[[[0.5 * (1 * 4 + 2 * 4)]]]]))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("T", [1, 63, 64, 65])
def test_lengths(implementation, T):
    check(implementation, inputs(T))


def test_long_wide_and_batched():
    x = inputs(140, B=2, H=2, HV=4, K=36, V=24)
    x["k"] = torch.nn.functional.normalize(x["k"], dim=-1)
    check("torch", x, qk_l2norm=False, scale=0.3)


@pytest.mark.parametrize("K, V", [(60, 100), (200, 8)])
def test_triton_tiles(K, V):
    """Head dims that are no power of two and need several 64-wide tiles; no normalisation inside."""
    x = inputs(65, HV=1, K=K, V=V)
    x["k"] = torch.nn.functional.normalize(x["k"], dim=-1)
    check("triton", x, qk_l2norm=False)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_identical_keys_with_beta_one(implementation):
    """Every token overwrites the last: the state holds the newest value alone, and o = scale · v."""
    x = inputs(70, H=1, HV=1)
    x["k"] = torch.nn.functional.normalize(torch.ones_like(x["k"]), dim=-1)
    x["q"], x["beta"], x["g"] = x["k"].clone(), torch.ones_like(x["beta"]), torch.zeros_like(x["g"])
    o, _ = gated_delta_rule(**x, scale=1.0, implementation=implementation)
    torch.testing.assert_close(o, x["v"], atol=1e-5, rtol=0)
    check(implementation, x, qk_l2norm=False)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_reflections(implementation):
    """β = 2 and unit keys, no decay: every step is a reflection: the state keeps its norm."""
    x = inputs(130 if implementation == "torch" else 65, HV=1)
    x["beta"], x["g"], x["v"] = torch.full_like(x["beta"], 2.0), torch.zeros_like(x["g"]), torch.zeros_like(x["v"])
    x["k"] = torch.nn.functional.normalize(x["k"], dim=-1)
    _, final = gated_delta_rule(**x, output_final_state=True, implementation=implementation)
    torch.testing.assert_close(final.norm(dim=2), x["initial_state"].norm(dim=2), rtol=1e-5, atol=0)
    x["v"] = inputs(x["v"].shape[1], HV=1)["v"]
    check(implementation, x, qk_l2norm=False)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_repeated_keys_with_beta_two(implementation):
    """The hardest inverse: entries of N at ±2 that never shrink.

    The rounding of ‖k‖² (1e-7) is the same in every step, so fp32 can be no better than 64 times that.
    """
    x = inputs(65, HV=1)
    x["k"] = torch.ones_like(x["k"])
    x["beta"], x["g"] = torch.full_like(x["beta"], 2.0), torch.zeros_like(x["g"])
    check(implementation, x, bars=(1e-4, 1e-4, 1e-4))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("pattern", ["all −10", "from 0 to −10"])
def test_extreme_gates(implementation, pattern):
    x = inputs(65, HV=1)
    uniform = torch.rand(x["g"].shape, generator=torch.Generator().manual_seed(3)).to(DEVICE) * 14 - 2
    x["g"] = torch.full_like(x["g"], -10.0) if pattern == "all −10" else -uniform.clamp(0, 10)
    check(implementation, x)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_packed_equals_separate(implementation):
    """Three sequences, one of them empty, and trailing padding that gives zeros and gets no gradient."""
    bounds, T = [0, 66, 66, 90], 95
    x = inputs(T, N=3)
    check(implementation, x, cu_seqlens=packing(*bounds, dtype=torch.int32))
    options = {"qk_l2norm": True, "implementation": implementation}
    packed = run(gated_delta_rule, x, cu_seqlens=packing(*bounds), **options)
    for name in ("o", "d_q", "d_k", "d_v", "d_g", "d_beta"):
        assert not packed[name][:, bounds[-1] :].any(), name
    torch.testing.assert_close(packed["final_state"][1], x["initial_state"][1])
    for n in (0, 2):
        piece = {name: y[:, bounds[n] : bounds[n + 1]] for name, y in x.items() if name != "initial_state"}
        piece["initial_state"] = x["initial_state"][n : n + 1]
        o, final = gated_delta_rule(**piece, output_final_state=True, **options)
        torch.testing.assert_close(packed["o"][:, bounds[n] : bounds[n + 1]], o)
        torch.testing.assert_close(packed["final_state"][n : n + 1], final)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_split_state_and_steps_equal_one_pass(implementation):
    x = inputs(70, B=2, H=1, HV=2)
    state = x.pop("initial_state")
    options = {"qk_l2norm": True, "implementation": implementation}
    whole, final = gated_delta_rule(**x, initial_state=state, output_final_state=True, **options)
    pieces, running = [], state.clone()
    for start, stop in ((0, 64), (64, 67)):
        piece = {name: y[:, start:stop] for name, y in x.items()}
        o, running = gated_delta_rule(**piece, initial_state=running, output_final_state=True, **options)
        pieces.append(o)
    address = running.data_ptr()
    for start, stop in ((67, 68), (68, 70)):
        pieces.append(gated_delta_rule_step(**{n: y[:, start:stop] for n, y in x.items()}, state=running, **options))
    assert running.data_ptr() == address
    torch.testing.assert_close(torch.cat(pieces, 1), whole)
    torch.testing.assert_close(running, final)


@pytest.mark.parametrize("implementation", ("reference", *IMPLEMENTATIONS))
def test_delta_rule_is_the_gated_one_without_decay(implementation):
    x = inputs(20)
    x.pop("g")
    zero = torch.zeros_like(x["beta"])
    options = {"qk_l2norm": True, "output_final_state": True}
    expected, final = gated_delta_rule(**x, g=zero, **options, implementation="torch")
    o, got = delta_rule(**x, **options, implementation=implementation)
    torch.testing.assert_close(o, expected)
    torch.testing.assert_close(got, final)
    state = x.pop("initial_state").clone()
    o = delta_rule_step(**x, state=state, qk_l2norm=True, implementation=implementation)
    torch.testing.assert_close(o, expected)
    torch.testing.assert_close(state, final)
    for leaf in x.values():
        leaf.requires_grad_()
    delta_rule(**x, implementation="torch" if implementation == "reference" else implementation)[0].sum().backward()
    gradients = [leaf.grad.clone() for leaf in x.values()]
    expected = torch.autograd.grad(gated_delta_rule_reference(**x, g=None)[0].sum(), list(x.values()))
    for got, reference in zip(gradients, expected, strict=True):
        assert error(got, reference.double()) < FP32


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16(implementation, round_to_nearest):
    x = inputs(100, K=32, V=32, dtype=torch.bfloat16)
    check(implementation, x, bars=(BF16, BF16_GRADIENT, BF16_GATE))
    o, final = gated_delta_rule(**x, output_final_state=True, qk_l2norm=True, implementation=implementation)
    assert (o.dtype, final.dtype) == (torch.bfloat16, torch.float32)


@pytest.fixture
def round_to_nearest(monkeypatch):
    """Triton's interpreter cuts fp32 off when it makes bf16; GPUs round to nearest even."""
    if DEVICE == "cuda":
        return
    interpreter = pytest.importorskip("triton.runtime.interpreter")

    def truncate(self, source, target):
        if target.scalar != interpreter.tl.bfloat16:
            return self.cast_impl(source, target)
        bits = source.data.astype(np.float32).view(np.uint32)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        return interpreter.TensorHandle(rounded, target.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_fp_trunc", truncate)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_autocast_changes_nothing(implementation):
    """Forward, backward and step inside an autocast region equal those outside it, bit for bit."""
    x = inputs(20, K=8, V=6)
    options = {"qk_l2norm": True, "implementation": implementation}
    expected = run(gated_delta_rule, x, **options)
    step = {name: y[:, :1] for name, y in x.items() if name != "initial_state"}
    states = [x["initial_state"].clone() for _ in range(2)]
    o = gated_delta_rule_step(**step, state=states[0], **options)
    with torch.autocast(DEVICE, torch.bfloat16):
        got = run(gated_delta_rule, x, **options)
        assert torch.equal(gated_delta_rule_step(**step, state=states[1], **options), o)
    assert torch.equal(*states)
    for name, reference in expected.items():
        assert torch.equal(got[name], reference), name


def test_float64_is_exact():
    x = {name: y.double() for name, y in inputs(70).items()}
    check("torch", x, bars=(1e-14, 1e-14, 1e-13))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_nothing_is_read_before_it_is_written(implementation):
    """torch.empty filled with NaN: packed, so that some chunk slots stay unused."""
    x, bounds = inputs(70, N=2), packing(0, 3, 68)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        check(implementation, x, cu_seqlens=bounds)
        outputs = ops._forward_op(*(x[name] for name in NAMES), bounds, 0.3, True, True, True, implementation)
        assert all(torch.isfinite(output).all() for output in outputs)  # unused slots too: opcheck compares them
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_non_contiguous_inputs_and_no_gradient_for_some(implementation):
    x = inputs(10, K=8, V=8)
    expected, _ = gated_delta_rule(**x, implementation="reference")
    odd = {name: torch.stack((y, y), -1)[..., 0] for name, y in x.items()}
    odd["v"].requires_grad_()
    o, _ = gated_delta_rule(**odd, implementation=implementation)
    torch.testing.assert_close(o, expected)
    o.sum().backward()
    assert odd["q"].grad is None
    x["v"].requires_grad_()
    gated_delta_rule(**x, implementation="reference")[0].sum().backward()
    torch.testing.assert_close(odd["v"].grad, x["v"].grad)


@pytest.mark.parametrize("packed", [False, True])
def test_opcheck(packed):
    x = inputs(66, K=8, V=6, N=2 if packed else None)
    tensors = [x[name].requires_grad_() for name in NAMES]
    bounds = packing(0, 5, 60) if packed else None
    torch.library.opcheck(ops._forward_op, (*tensors, bounds, 0.3, True, True, True, None))
    torch.library.opcheck(ops._forward_op, (*tensors[:3], None, tensors[4], None, None, 0.3, False, False, False, None))
    plain = [y.detach() for y in tensors]
    o, final, *kept = ops._forward_op(*plain, bounds, 0.3, True, True, True, None)
    torch.library.opcheck(ops._backward_op, (*plain, bounds, *kept, o, final, 0.3, True, None))
    if not packed:
        torch.library.opcheck(ops._step_op, (*plain, 0.3, True, None))


def test_fakes_agree_with_triton():
    x = inputs(66, K=8, V=6)
    plain = [x[name] for name in NAMES]
    arguments = (*plain, None, 0.3, True, True, True, "triton")
    torch.library.opcheck(ops._forward_op, arguments, test_utils=("test_schema", "test_faketensor"))
    o, final, *kept = ops._forward_op(*arguments)
    torch.library.opcheck(
        ops._backward_op, (*plain, None, *kept, o, final, 0.3, True, "triton"), test_utils=("test_faketensor",)
    )


def test_compiles_whole_without_more_than_two_compilations():
    """Cold, fullgraph, forward and backward; the second length makes T dynamic and the others reuse it."""
    torch.compiler.reset()
    frames = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def function(**x):
        o, final = gated_delta_rule(**x, output_final_state=True, qk_l2norm=True)
        return o.square().sum() + final.sum()

    compiled = torch.compile(function, fullgraph=True, backend=frames)
    for T in (70, 100, 33, 200):
        x = {name: y.requires_grad_() for name, y in inputs(T, B=2, K=8, V=6).items()}
        expected = torch.autograd.grad(function(**x), list(x.values()))
        got = torch.autograd.grad(compiled(**x), list(x.values()))
        torch.testing.assert_close(got, expected)
    assert frames.frame_count <= 2


def test_step_compiles_in_place():
    x = inputs(1, K=8, V=6)
    state = x.pop("initial_state")
    eager, compiled = state.clone(), state.clone()
    expected = gated_delta_rule_step(**x, state=eager)
    o = torch.compile(gated_delta_rule_step, fullgraph=True)(**x, state=compiled)
    torch.testing.assert_close(o, expected)
    torch.testing.assert_close(compiled, eager)
    assert not torch.equal(compiled, state)


def test_exports():
    class Module(torch.nn.Module):
        def forward(self, q, k, v, g, beta):
            return gated_delta_rule(q, k, v, g, beta, qk_l2norm=True)[0]

    x = inputs(70, K=8, V=6)
    arguments = tuple(x[name] for name in NAMES[:5])
    time = torch.export.Dim("time")
    program = torch.export.export(Module(), arguments, dynamic_shapes=[{1: time}] * 5, strict=False)
    other = tuple(inputs(33, K=8, V=6)[name] for name in NAMES[:5])
    torch.testing.assert_close(program.module()(*other), Module()(*other))


def test_numerics_cases_are_complete():
    assert [case["name"] for case in NUMERICS_CASES] == ["gated_delta_rule", "delta_rule", "kda"]
    for case in NUMERICS_CASES:
        x = case["make"](DEVICE, torch.float32, 5, 1, 8, 0)
        o, _ = case["op"](**x, **case["kwargs"])
        reference, _ = case["reference"](**{name: y.double() for name, y in x.items()}, **case["kwargs"])
        assert error(o.detach(), reference.detach()) < FP32


@pytest.mark.parametrize(
    "change, message",
    [
        ({"k": torch.zeros(1, 4, 1, 9)}, r"k must have shape \(1, 4, 1, 8\), got \(1, 4, 1, 9\)"),
        ({"beta": torch.zeros(1, 4, 1)}, r"beta must have shape \(1, 4, 2\), got \(1, 4, 1\)"),
        ({"v": torch.zeros(1, 4, 3, 6)}, r"beta must have shape|multiple"),
        ({"v": torch.zeros(1, 4, 2, 6, dtype=torch.bfloat16)}, "must share one floating dtype"),
        ({"initial_state": torch.zeros(2, 2, 8, 6)}, r"initial_state must have shape \(1, 2, 8, 6\)"),
        ({"cu_seqlens": torch.tensor([0.0, 4.0])}, "cu_seqlens must be int32 or int64"),
        ({"implementation": "cuda"}, "implementation must be one of"),
    ],
)
def test_bad_arguments_are_named(change, message):
    with pytest.raises(KernelError, match=message):
        gated_delta_rule(**(inputs(4, K=8, V=6) | change))


def test_step_refuses_a_state_it_cannot_update():
    x = inputs(1, K=8, V=6)
    state = x.pop("initial_state")
    with pytest.raises(KernelError, match=r"state must be torch.float32, got torch.bfloat16"):
        gated_delta_rule_step(**x, state=state.bfloat16())
    with pytest.raises(KernelError, match="contiguous"):
        gated_delta_rule_step(**x, state=torch.zeros(1, 2, 6, 8, device=DEVICE).mT)
