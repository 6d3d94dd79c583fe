"""KDA: the delta rule with a decay per key channel, chunked PyTorch and Triton (interpreted) against the loop."""

from __future__ import annotations

import pytest
import torch
from delta_checks import BF16, BF16_GATE, BF16_GRADIENT, DEVICE, IMPLEMENTATIONS, NAMES, check, inputs, packing, run

from fla_swap.errors import KernelError
from fla_swap.kernels.delta import ops
from fla_swap.kernels.delta.ops import gated_delta_rule, kda, kda_step


def test_one_step_by_hand():
    """S = diag(e^g) S₀ + β k (v − (diag(e^g) S₀)ᵀ k)ᵀ, o = scale · Sᵀ q."""
    x = {
        "q": torch.tensor([[[[1.0, 2.0]]]]),
        "k": torch.tensor([[[[1.0, 0.0]]]]),
        "v": torch.tensor([[[[10.0]]]]),
        "g": torch.log(torch.tensor([[[[0.5, 0.25]]]])),
        "beta": torch.tensor([[[0.25]]]),
        "initial_state": torch.tensor([[[[4.0], [8.0]]]]),
    }
    x = {name: tensor.to(DEVICE) for name, tensor in x.items()}
    for implementation in ("reference", *IMPLEMENTATIONS):
        o, final = kda(**x, scale=0.5, output_final_state=True, implementation=implementation)
        torch.testing.assert_close(final.cpu(), torch.tensor([[[[2 + 0.25 * (10 - 2)], [2.0]]]]))
        torch.testing.assert_close(o.cpu(), torch.tensor([[[[0.5 * (1 * 4 + 2 * 2)]]]]))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("T", [1, 63, 64, 65])
def test_lengths(implementation, T):
    check(implementation, inputs(T, channels=True))


def test_long_wide_and_batched():
    x = inputs(140, B=2, H=2, HV=4, K=36, V=24, channels=True)
    x["k"] = torch.nn.functional.normalize(x["k"], dim=-1)
    check("torch", x, qk_l2norm=False, scale=0.3)


def test_triton_tiles():
    """Head dims that are no power of two and need two tiles; no normalisation inside."""
    x = inputs(65, HV=1, K=100, V=72, channels=True)
    x["k"] = torch.nn.functional.normalize(x["k"], dim=-1)
    check("triton", x, qk_l2norm=False)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("pattern", ["all −10", "from 0 to −10"])
def test_extreme_gates(implementation, pattern):
    x = inputs(65, HV=1, channels=True)
    uniform = torch.rand(x["g"].shape, generator=torch.Generator().manual_seed(3)).to(DEVICE) * 14 - 2
    x["g"] = torch.full_like(x["g"], -10.0) if pattern == "all −10" else -uniform.clamp(0, 10)
    check(implementation, x)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_equal_channels_are_a_gate_per_head(implementation):
    x = inputs(70)
    expected = run(gated_delta_rule, x, qk_l2norm=True, implementation=implementation)
    x["g"] = x["g"].unsqueeze(-1).repeat(1, 1, 1, x["q"].shape[-1])
    got = run(kda, x, qk_l2norm=True, implementation=implementation)
    got["d_g"] = got["d_g"].sum(-1)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, atol=2e-5, rtol=2e-5, msg=name)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_packed(implementation):
    """Three sequences, one of them empty, and trailing padding that gives zeros and gets no gradient."""
    bounds = [0, 66, 66, 90]
    x = inputs(95, N=3, channels=True)
    check(implementation, x, cu_seqlens=packing(*bounds, dtype=torch.int32))
    packed = run(kda, x, cu_seqlens=packing(*bounds), qk_l2norm=True, implementation=implementation)
    for name in ("o", "d_q", "d_k", "d_v", "d_g", "d_beta"):
        assert not packed[name][:, bounds[-1] :].any(), name


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_split_state_and_steps_equal_one_pass(implementation):
    x = inputs(70, B=2, H=1, HV=2, channels=True)
    state = x.pop("initial_state")
    options = {"qk_l2norm": True, "implementation": implementation}
    whole, final = kda(**x, initial_state=state, output_final_state=True, **options)
    first = {name: y[:, :67] for name, y in x.items()}
    o, running = kda(**first, initial_state=state, output_final_state=True, **options)
    pieces, address = [o], running.data_ptr()
    for start, stop in ((67, 68), (68, 70)):
        pieces.append(kda_step(**{n: y[:, start:stop] for n, y in x.items()}, state=running, **options))
    assert running.data_ptr() == address
    torch.testing.assert_close(torch.cat(pieces, 1), whole)
    torch.testing.assert_close(running, final)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_nothing_is_read_before_it_is_written(implementation):
    """torch.empty filled with NaN: packed, so that some chunk slots stay unused."""
    x, bounds = inputs(70, N=2, channels=True), packing(0, 3, 68)
    torch.use_deterministic_algorithms(True)
    try:
        check(implementation, x, cu_seqlens=bounds)
        outputs = ops._forward_op(*(x[name] for name in NAMES), bounds, 0.3, True, True, True, implementation)
        assert all(torch.isfinite(output).all() for output in outputs)
    finally:
        torch.use_deterministic_algorithms(False)


def test_float64_is_exact():
    x = {name: y.double() for name, y in inputs(70, channels=True).items()}
    check("torch", x, bars=(1e-14, 1e-14, 1e-13))


def test_bfloat16():
    x = inputs(100, K=32, V=32, dtype=torch.bfloat16, channels=True)
    check("torch", x, bars=(BF16, BF16_GRADIENT, BF16_GATE))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_opcheck(implementation):
    x = inputs(66, K=8, V=6, channels=True)
    tensors = [x[name].requires_grad_() for name in NAMES]
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic") if implementation == "torch" else (
        "test_schema",
        "test_faketensor",
    )  # fmt: skip
    arguments = (*tensors, None, 0.3, True, True, True, implementation)
    torch.library.opcheck(ops._forward_op, arguments, test_utils=checks)
    plain = [y.detach() for y in tensors]
    o, final, *kept = ops._forward_op(*plain, None, 0.3, True, True, True, implementation)
    arguments = (*plain, None, *kept, o, final, 0.3, True, implementation)
    torch.library.opcheck(ops._backward_op, arguments, test_utils=("test_schema", "test_faketensor"))


def test_wrong_gates_are_named():
    x = inputs(4, K=8, V=6)
    with pytest.raises(KernelError, match=r"g must have shape \(1, 4, 2, 8\), got \(1, 4, 2\)"):
        kda(**x)
    x = inputs(4, K=8, V=6, channels=True)
    with pytest.raises(KernelError, match=r"g must have shape \(1, 4, 2\), got \(1, 4, 2, 8\)"):
        gated_delta_rule(**x)
