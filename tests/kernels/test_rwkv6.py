"""RWKV6: every implementation against the float64 loop, on outputs, states and all gradients."""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportOptionalMemberAccess=false, reportOptionalSubscript=false
from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fla_swap.errors import KernelError
from fla_swap.kernels.decay import ops
from fla_swap.kernels.decay.reference import rwkv6_reference
from fla_swap.kernels.decay.rwkv6 import rwkv6, rwkv6_step

FP32_BAR, GATE_BAR = 1e-5, 1e-4
HEADS, KEY, VALUE = 2, 20, 12
BOTH = pytest.mark.parametrize("implementation", ["torch", "triton"])


def make(time: int, *, batch: int = 2, sequences: int | None = None, seed: int = 0, strong: float = 0.2):
    """Random arguments that require gradients; gates between 0 and −strong."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    made = {"q": normal(batch, time, HEADS, KEY), "k": normal(batch, time, HEADS, KEY)}
    made["v"] = normal(batch, time, HEADS, VALUE)
    made["g"] = -torch.rand(batch, time, HEADS, KEY, generator=generator) * strong
    made["u"] = normal(HEADS, KEY)
    made["initial_state"] = normal(sequences or batch, HEADS, KEY, VALUE)
    return {name: x.requires_grad_() for name, x in made.items()}


def run(function, inputs: dict[str, Tensor], **options) -> dict[str, Tensor]:
    """Output, final state and the gradient of every input under fixed random cotangents."""
    o, state = function(**inputs, output_final_state=True, **options)
    generator = torch.Generator().manual_seed(99)
    cotangents = [torch.randn(x.shape, generator=generator).to(x.dtype) for x in (o, state)]
    gradients = torch.autograd.grad((o, state), list(inputs.values()), cotangents)
    results = {"o": o, "state": state} | {f"d {n}": x for n, x in zip(inputs, gradients, strict=True)}
    return {name: x.detach() for name, x in results.items()}


def exact(inputs: dict[str, Tensor], **options) -> dict[str, Tensor]:
    return run(rwkv6_reference, {n: x.detach().double().requires_grad_() for n, x in inputs.items()}, **options)


def error(got: Tensor, reference: Tensor) -> float:
    """RMS(got − reference) / RMS(reference); where the reference is zero, RMS(got)."""
    size = reference.double().square().mean().sqrt()
    return ((got.double() - reference.double()).square().mean().sqrt() / (size if size > 0 else 1)).item()


def assert_close(got: dict[str, Tensor], reference: dict[str, Tensor]) -> None:
    assert got.keys() == reference.keys()
    for name, x in got.items():
        assert x.shape == reference[name].shape
        assert error(x, reference[name]) <= (GATE_BAR if name == "d g" else FP32_BAR), name


@pytest.mark.parametrize(
    ("time", "implementation"),
    [*((time, "torch") for time in (1, 2, 63, 64, 65, 150)), *((time, "triton") for time in (1, 65))],
)
def test_equals_the_float64_loop(time: int, implementation: str) -> None:
    inputs = make(time, batch=1)
    assert_close(run(rwkv6, inputs, implementation=implementation), exact(inputs))


@BOTH
@pytest.mark.parametrize("strong", ["mixed", "uniform"])
def test_extreme_gates(strong: str, implementation: str) -> None:
    """Gates of 0 and −10 a step and everything between, then −10 at every step."""
    inputs = make(70, batch=1)
    gates = -10 * (torch.rand_like(inputs["g"]) * 1.4 - 0.2).clamp(0, 1)
    inputs["g"] = (gates if strong == "mixed" else torch.full_like(gates, -10.0)).detach().requires_grad_()
    assert_close(run(rwkv6, inputs, implementation=implementation), exact(inputs))


@BOTH
def test_packed_sequences(implementation: str) -> None:
    """Sequences of 3, 0, 66 and 1 tokens, then padding."""
    inputs = make(75, batch=1, sequences=4)
    bounds = torch.tensor([0, 3, 3, 69, 70])
    assert_close(run(rwkv6, inputs, cu_seqlens=bounds, implementation=implementation), exact(inputs, cu_seqlens=bounds))


@BOTH
def test_grouped_value_heads(implementation: str) -> None:
    inputs = make(10, batch=1)
    inputs |= {n: inputs[n][:, :, :1].detach().requires_grad_() for n in ("q", "k", "g")}
    inputs["u"] = inputs["u"][:1].detach().requires_grad_()
    assert_close(run(rwkv6, inputs, implementation=implementation), exact(inputs))


@pytest.mark.parametrize("implementation", ["torch", "triton", "reference"])
def test_steps_equal_the_whole_and_update_the_state_in_place(implementation: str) -> None:
    inputs = {n: x.detach() for n, x in make(6).items()}
    whole, final = rwkv6(**inputs, output_final_state=True, implementation="torch")
    state, u = inputs.pop("initial_state").clone(), inputs.pop("u")
    outputs = [
        rwkv6_step(**{n: x[:, part] for n, x in inputs.items()}, u=u, state=state, implementation=implementation)
        for part in (slice(0, 1), slice(1, 2), slice(2, 6))
    ]
    assert error(torch.cat(outputs, 1), whole) <= FP32_BAR and error(state, final) <= FP32_BAR


def test_two_steps_by_hand() -> None:
    """K = V = 1, decay one half, all inputs one, bonus 3: outputs 3 and 1 + 3, states 1 and 1.5."""
    one = torch.ones(1, 2, 1, 1)
    gate = one * torch.tensor(0.5).log()
    o, state = rwkv6(one, one, one, gate, torch.full((1, 1), 3.0), scale=1.0, output_final_state=True)
    torch.testing.assert_close(o.flatten(), torch.tensor([3.0, 4.0]))
    torch.testing.assert_close(state.flatten(), torch.tensor([1.5]))


def test_opcheck() -> None:
    inputs = make(5)
    tensors = [inputs[n] if n else None for n in ("q", "k", "v", "g", "", "u", "initial_state")]
    torch.library.opcheck(ops.gla_fwd, (*tensors, None, 0.5, True, True, "torch"))
    fixed = [None if x is None else x.detach() for x in tensors]
    torch.library.opcheck(ops.gla_bwd, (*fixed, None, [], fixed[2], fixed[6], 0.5, "torch"))
    torch.library.opcheck(ops.gla_step_op, (*fixed, 0.5, "torch"))


def test_compiles_whole_and_once_for_all_lengths() -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(rwkv6, fullgraph=True, backend=counter)
    for time in (5, 9, 70):
        inputs = make(time)
        got = run(compiled, inputs)
        for name, x in run(rwkv6, inputs).items():
            torch.testing.assert_close(got[name], x, rtol=0, atol=0)
    assert counter.frame_count <= 2


def test_a_wrong_bonus_is_refused() -> None:
    inputs = make(4) | {"u": torch.zeros(3, KEY)}
    with pytest.raises(KernelError, match=r"u must have shape \(2, 20\), got \(3, 20\)"):
        rwkv6(**inputs)
