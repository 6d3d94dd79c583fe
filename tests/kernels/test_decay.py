"""Gated decay: every implementation against the float64 loop, on outputs, states and all gradients."""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportOptionalMemberAccess=false, reportOptionalSubscript=false
from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from fla_swap.errors import KernelError
from fla_swap.kernels.decay import ops
from fla_swap.kernels.decay.ops import gla, gla_step
from fla_swap.kernels.decay.reference import gla_reference

FP32_BAR, GATE_BAR = 1e-5, 1e-4
HEADS, KEY, VALUE = 2, 20, 12
BOTH = pytest.mark.parametrize("implementation", ["torch", "triton"])


def make(
    time: int,
    gates: tuple[str, ...] = ("g", "gv"),
    *,
    batch: int = 2,
    sequences: int | None = None,
    key: int = KEY,
    value: int = VALUE,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Random arguments that require gradients; gates forget over roughly ten steps."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    widths = {"q": key, "k": key, "v": value, "g": key, "gv": value}
    made = {name: normal(batch, time, HEADS, widths[name]).to(dtype) for name in ("q", "k", "v")}
    made |= {name: -torch.rand(batch, time, HEADS, widths[name], generator=generator) / 5 for name in gates}
    made["initial_state"] = normal(sequences or batch, HEADS, key, value)
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
    return run(gla_reference, {n: x.detach().double().requires_grad_() for n, x in inputs.items()}, **options)


def error(got: Tensor, reference: Tensor) -> float:
    """RMS(got − reference) / RMS(reference)."""
    wrong = (got.double() - reference.double()).square().mean().sqrt()
    return (wrong / reference.double().square().mean().sqrt()).item()


def assert_close(
    got: dict[str, Tensor], reference: dict[str, Tensor], bar: float = FP32_BAR, gate: float = GATE_BAR
) -> None:
    assert got.keys() == reference.keys()
    for name, x in got.items():
        assert x.shape == reference[name].shape
        assert error(x, reference[name]) <= (gate if name in ("d g", "d gv") else bar), name


@pytest.mark.parametrize("gates", [("g", "gv"), ("g",), ("gv",), ()])
@pytest.mark.parametrize("time", [1, 63, 64, 65, 200])
def test_torch_equals_the_float64_loop(time: int, gates: tuple[str, ...]) -> None:
    inputs = make(time, gates)
    assert_close(run(gla, inputs, implementation="torch"), exact(inputs))


@pytest.mark.parametrize(
    ("time", "gates"), [(1, ("g", "gv")), (63, ("g",)), (64, ("g", "gv")), (65, ("g", "gv")), (65, ()), (65, ("gv",))]
)
def test_triton_equals_the_float64_loop(time: int, gates: tuple[str, ...]) -> None:
    inputs = make(time, gates, batch=1)
    assert_close(run(gla, inputs, implementation="triton"), exact(inputs))


@BOTH
def test_head_width_over_one_block(implementation: str) -> None:
    inputs = make(40, batch=1, key=100, value=72)
    assert_close(run(gla, inputs, implementation=implementation), exact(inputs))


def test_torch_in_float64_is_exact() -> None:
    inputs = {n: x.detach().double().requires_grad_() for n, x in make(70).items()}
    assert_close(run(gla, inputs, implementation="torch"), exact(inputs), bar=1e-13, gate=1e-12)


def test_bf16_within_the_bars() -> None:
    inputs = make(150, dtype=torch.bfloat16)
    got, reference = run(gla, inputs, implementation="torch"), exact(inputs)
    assert got["o"].dtype == got["d q"].dtype == torch.bfloat16
    assert got["state"].dtype == got["d g"].dtype == torch.float32
    assert_close(got, reference, bar=8e-3, gate=2e-2)
    assert error(got["o"], reference["o"]) <= 5e-3 and error(got["state"], reference["state"]) <= 5e-3


@BOTH
def test_autocast_changes_nothing(implementation: str) -> None:
    """Forward, backward and step inside an autocast region equal those outside it, bit for bit."""
    inputs = make(5, batch=1)
    expected = run(gla, inputs, implementation=implementation)
    plain = {name: x.detach() for name, x in inputs.items()}
    states = [plain.pop("initial_state").clone()]
    states.append(states[0].clone())
    o = gla_step(**plain, state=states[0], implementation=implementation)
    with torch.autocast("cpu", torch.bfloat16):
        got = run(gla, inputs, implementation=implementation)
        assert torch.equal(gla_step(**plain, state=states[1], implementation=implementation), o)
    assert torch.equal(*states)
    for name, reference in expected.items():
        assert torch.equal(got[name], reference), name


@BOTH
def test_extreme_gates(implementation: str) -> None:
    """Gates of 0 and −10 a step and everything between: no overflow, and still within the fp32 bars."""
    inputs = make(70, batch=1)
    for name in ("g", "gv"):
        inputs[name] = (-10 * (torch.rand_like(inputs[name]) * 1.4 - 0.2).clamp(0, 1)).detach().requires_grad_()
    assert_close(run(gla, inputs, implementation=implementation), exact(inputs))


@BOTH
def test_uniformly_strong_gates_keep_accurate_gate_gradients(implementation: str) -> None:
    """All gates at −10: the true gradients are 1e-5 of the terms that a careless sum would cancel."""
    inputs = make(70, batch=1)
    for name in ("g", "gv"):
        inputs[name] = torch.full_like(inputs[name], -10.0).requires_grad_()
    assert_close(run(gla, inputs, implementation=implementation), exact(inputs))


@BOTH
@pytest.mark.parametrize("gate", ["g", "gv"])
def test_a_document_start_forgets_everything(gate: str, implementation: str) -> None:
    """Gates of −1e4 among mild and strong ones: what lies before them is gone, what lies after is exact."""
    inputs = make(70, (gate,), batch=1)
    values = torch.tensor([-1e4, -30.0, -10.0, -0.1, 0.0])
    chosen = values[torch.randint(5, inputs[gate].shape, generator=torch.Generator().manual_seed(3))]
    chosen[:, 20:40] = -0.1
    chosen[:, 30] = -1e4
    inputs[gate] = chosen.requires_grad_()
    assert_close(run(gla, inputs, implementation=implementation), exact(inputs))


@pytest.mark.parametrize("packed", [False, True])
def test_time_cut_into_segments(packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One chunk a segment: states are carried between programs. Packed with an empty sequence and padding."""
    from fla_swap.kernels.decay import triton_plan

    monkeypatch.setattr(triton_plan, "SHORTEST", 1)
    inputs = make(100, ("g",), batch=1, sequences=3 if packed else 1, key=8, value=8)
    options = {"cu_seqlens": torch.tensor([0, 70, 70, 96])} if packed else {}
    assert_close(run(gla, inputs, implementation="triton", **options), exact(inputs, **options))


@BOTH
def test_packed_equals_separate(implementation: str) -> None:
    """Sequences of 3, 0, 66 and 1 tokens, then padding full of NaN that must not leak."""
    bounds = (0, 3, 3, 69, 70)
    inputs = make(75, batch=1, sequences=4)
    with torch.no_grad():
        for name in ("q", "k", "v", "g", "gv"):
            inputs[name][:, 70:] = float("nan")
    options = {"implementation": implementation}
    o, state = gla(**inputs, output_final_state=True, cu_seqlens=torch.tensor(bounds, dtype=torch.int32), **options)
    generator = torch.Generator().manual_seed(5)
    do, dstate = torch.randn(o.shape, generator=generator), torch.randn(state.shape, generator=generator)
    gradients = torch.autograd.grad((o, state), list(inputs.values()), (do, dstate))
    got = dict(zip(inputs, gradients, strict=True))
    assert not o[:, 70:].any()
    assert not any(got[name][:, 70:].any() for name in ("q", "k", "v", "g", "gv"))
    for n in range(4):
        start, stop = bounds[n], bounds[n + 1]
        if start == stop:
            torch.testing.assert_close(state[n], inputs["initial_state"][n])
            torch.testing.assert_close(got["initial_state"][n], dstate[n])
            continue
        part = {name: x[:, start:stop] for name, x in inputs.items() if name != "initial_state"}
        part = {n_: x.detach().requires_grad_() for n_, x in part.items()}
        part["initial_state"] = inputs["initial_state"][n : n + 1].detach().requires_grad_()
        alone, alone_state = gla(**part, output_final_state=True, implementation="torch")
        expected = torch.autograd.grad(
            (alone, alone_state), list(part.values()), (do[:, start:stop], dstate[n : n + 1])
        )
        assert error(o[:, start:stop], alone) <= FP32_BAR and error(state[n : n + 1], alone_state) <= FP32_BAR
        for name, gradient in zip(part, expected, strict=True):
            mine = got[name][n : n + 1] if name == "initial_state" else got[name][:, start:stop]
            assert error(mine, gradient) <= GATE_BAR, name


@BOTH
def test_two_halves_with_the_state_handed_over_equal_the_whole(implementation: str) -> None:
    inputs = {n: x.detach() for n, x in make(100, batch=1).items()}
    whole, final = gla(**inputs, output_final_state=True, implementation=implementation)
    state = inputs.pop("initial_state")
    pieces = []
    for part in (slice(0, 37), slice(37, 100)):
        piece = {n: x[:, part] for n, x in inputs.items()}
        o, state = gla(**piece, initial_state=state, output_final_state=True, implementation=implementation)
        pieces.append(o)
    assert error(torch.cat(pieces, 1), whole) <= FP32_BAR and error(state, final) <= FP32_BAR


@pytest.mark.parametrize("implementation", ["torch", "triton", "reference"])
def test_steps_equal_the_whole_and_update_the_state_in_place(implementation: str) -> None:
    inputs = {n: x.detach() for n, x in make(6).items()}
    whole, final = gla(**inputs, output_final_state=True, implementation="torch")
    state = inputs.pop("initial_state").clone()
    address = state.data_ptr()
    outputs = [
        gla_step(**{n: x[:, part] for n, x in inputs.items()}, state=state, implementation=implementation)
        for part in (slice(0, 1), slice(1, 2), slice(2, 6))
    ]
    assert state.data_ptr() == address
    assert error(torch.cat(outputs, 1), whole) <= FP32_BAR and error(state, final) <= FP32_BAR


@BOTH
def test_grouped_value_heads(implementation: str) -> None:
    """One query and key head for each pair of value heads equals repeating them."""
    inputs = make(10, batch=1)
    inputs["q"], inputs["k"], inputs["g"] = (inputs[n][:, :, :1].detach().requires_grad_() for n in ("q", "k", "g"))
    assert_close(run(gla, inputs, implementation=implementation), exact(inputs))


@BOTH
def test_inputs_need_not_be_contiguous(implementation: str) -> None:
    inputs = make(3, batch=1)
    strided = {n: x.detach().mT.contiguous().mT.requires_grad_() for n, x in inputs.items()}
    assert not strided["q"].is_contiguous()
    expected = run(gla, inputs, implementation=implementation)
    for name, x in run(gla, strided, implementation=implementation).items():
        torch.testing.assert_close(x, expected[name])


def test_three_steps_by_hand() -> None:
    """K = V = 1, decay one half, all inputs one: the state is 1, 1.5, 1.75."""
    one = torch.ones(1, 3, 1, 1)
    o, state = gla(one, one, one, one * torch.tensor(0.5).log(), scale=2.0, output_final_state=True)
    torch.testing.assert_close(o.flatten(), torch.tensor([2.0, 3.0, 3.5]))
    torch.testing.assert_close(state.flatten(), torch.tensor([1.75]))


@contextlib.contextmanager
def nan_in_fresh_memory() -> Iterator[None]:
    """`torch.empty` and its kin return NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@BOTH
@pytest.mark.parametrize("packed", [False, True])
def test_nothing_is_read_before_it_is_written(implementation: str, packed: bool) -> None:
    inputs = make(70, batch=1, sequences=3 if packed else 1)
    options = {"cu_seqlens": torch.tensor([0, 5, 5, 68]) if packed else None}
    with nan_in_fresh_memory():
        assert torch.empty(3).isnan().all()
        got = run(gla, inputs, implementation=implementation, **options)
    assert_close(got, exact(inputs, **options))


def test_opcheck() -> None:
    inputs = make(5)
    tensors = [inputs[n] for n in ("q", "k", "v", "g", "gv", "initial_state")]
    torch.library.opcheck(ops.gla_fwd, (*tensors[:5], None, tensors[5], None, 0.5, True, True, "torch"))
    torch.library.opcheck(ops.gla_fwd, (*tensors[:3], None, None, None, None, None, 0.5, False, True, "torch"))
    fixed = [x.detach() for x in tensors]
    torch.library.opcheck(ops.gla_bwd, (*fixed[:5], None, fixed[5], None, [], fixed[2], fixed[5], 0.5, "torch"))
    torch.library.opcheck(ops.gla_step_op, (*fixed[:5], None, fixed[5], 0.5, "torch"))


def test_compiles_whole_and_once_for_all_lengths() -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(gla, fullgraph=True, backend=counter)
    for time in (5, 9, 70, 131):
        inputs = make(time, ("g",))
        got = run(compiled, inputs)
        for name, x in run(gla, inputs).items():
            torch.testing.assert_close(got[name], x, rtol=0, atol=0)
    assert counter.frame_count <= 2


def test_a_compiled_step_updates_the_state_in_place() -> None:
    inputs = {n: x.detach() for n, x in make(1).items()}
    state = inputs.pop("initial_state")
    expected = state.clone()
    compiled = torch.compile(lambda state: gla_step(**inputs, state=state) * 2, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        o = compiled(state)
    torch.testing.assert_close(o, gla_step(**inputs, state=expected) * 2)
    torch.testing.assert_close(state, expected)


def test_exports() -> None:
    class Layer(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
            return gla(q, k, v, g)[0]

    inputs = {n: x.detach() for n, x in make(7, ("g",)).items() if n != "initial_state"}
    exported = torch.export.export(Layer(), (), inputs)
    torch.testing.assert_close(exported.module()(**inputs), gla(**inputs)[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(2, 4, 2, 3)}, r"k must have shape \(2, 4, 2, 20\), got \(2, 4, 2, 3\)"),
        ({"v": torch.zeros(2, 4, 3, 12)}, "v must have a multiple of q's 2 heads, got 3"),
        ({"g": torch.zeros(2, 4, 2)}, r"g must have shape \(2, 4, 2, 20\), got \(2, 4, 2\)"),
        ({"initial_state": torch.zeros(1, 2, 20, 12)}, r"state must have shape \(2, 2, 20, 12\), got \(1, 2, 20, 12\)"),
        ({"v": torch.zeros(2, 4, 2, 12, dtype=torch.bfloat16)}, "v must have q's dtype torch.float32"),
        ({"cu_seqlens": torch.tensor([0, 4])}, "needs batch size 1, got 2"),
        ({"implementation": "cuda"}, "implementation must be one of"),
    ],
)
def test_errors_say_what_was_found(change: dict[str, object], message: str) -> None:
    inputs = {n: x.detach() for n, x in make(4).items()} | change
    with pytest.raises(KernelError, match=message):
        gla(**inputs)
