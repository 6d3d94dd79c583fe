"""What the tests of the delta family share: inputs, and the comparison with the float64 loop over time."""

from __future__ import annotations

import torch
from torch import Tensor

from fla_swap.kernels.delta.ops import gated_delta_rule, kda
from fla_swap.kernels.delta.reference import gated_delta_rule_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # on a CPU, Triton runs in its interpreter
IMPLEMENTATIONS = ("torch", "triton")
NAMES = ("q", "k", "v", "g", "beta", "initial_state")
FP32, FP32_GATE = 1e-5, 1e-4
BF16, BF16_GRADIENT, BF16_GATE = 5e-3, 8e-3, 2e-2


def inputs(
    T: int,
    B: int = 1,
    H: int = 1,
    HV: int = 2,
    K: int = 20,
    V: int = 12,
    N: int | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    channels: bool = False,
) -> dict[str, Tensor]:
    """Unnormalised q and k (to be used with qk_l2norm), β from 0 to 2, decays down to e^−0.5 a step.

    channels: one decay per key channel, for `kda`.
    """
    r = torch.Generator().manual_seed(seed)
    x = {
        "q": torch.randn(B, T, H, K, generator=r),
        "k": torch.randn(B, T, H, K, generator=r),
        "v": torch.randn(B, T, HV, V, generator=r),
        "g": torch.rand(B, T, HV, *((K,) if channels else ()), generator=r) * -0.5,
        "beta": torch.rand(B, T, HV, generator=r) * 2,
    }
    x = {name: tensor.to(dtype) for name, tensor in x.items()}
    x["initial_state"] = torch.randn(N or B, HV, K, V, generator=r) * 0.3
    return {name: tensor.to(DEVICE) for name, tensor in x.items()}


def packing(*bounds: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor(bounds, dtype=dtype, device=DEVICE)


def error(got: Tensor, reference: Tensor) -> float:
    """RMS(reference − got) / RMS(reference); RMS(got) where the reference is zero."""
    assert torch.isfinite(got).all()
    wrong, size = (got.double() - reference).square().mean().sqrt(), reference.square().mean().sqrt()
    return (wrong / size if size else wrong).item()


def run(function, x: dict[str, Tensor], **options) -> dict[str, Tensor]:
    """Output, final state and all gradients under fixed random cotangents."""
    x = {name: tensor.detach().clone().requires_grad_() for name, tensor in x.items()}
    o, final = function(**x, output_final_state=True, **options)
    r = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(y.shape, generator=r).bfloat16().to(y) for y in (o, final)]
    torch.autograd.backward([o, final], cotangents)
    out = {"o": o.detach(), "final_state": final.detach()}
    return out | {f"d_{name}": tensor.grad for name, tensor in x.items()}


def check(implementation: str, x: dict[str, Tensor], *, bars=(FP32, FP32, FP32_GATE), **options) -> None:
    options = {"qk_l2norm": True} | options
    expected = run(gated_delta_rule_reference, {name: tensor.double() for name, tensor in x.items()}, **options)
    operator = kda if x["g"].ndim == 4 else gated_delta_rule
    got = run(operator, x, implementation=implementation, **options)
    for name, reference in expected.items():
        bar = bars[2] if name == "d_g" else bars[1] if name.startswith("d_") else bars[0]
        assert error(got[name], reference) <= bar, name
