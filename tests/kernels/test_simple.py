"""One decay per head: every implementation against the float64 loop, on outputs, states and all gradients."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor

from fla_swap.errors import KernelError
from fla_swap.kernels.decay import simple_ops
from fla_swap.kernels.decay.reference import gla_reference
from fla_swap.kernels.decay.simple_ops import (
    linear_attention,
    linear_attention_step,
    retention,
    retention_decay,
    retention_step,
    simple_gla,
    simple_gla_step,
)

FP32_BAR, GATE_BAR = 1e-5, 1e-4
HEADS, VALUE_HEADS, KEY, VALUE = 1, 2, 20, 12
BOTH = pytest.mark.parametrize("implementation", ["torch", "triton"])
EVERY = pytest.mark.parametrize("name", ["linear_attention", "retention", "simple_gla"])
OPERATORS: dict[str, Callable[..., Any]] = {
    "linear_attention": linear_attention,
    "retention": retention,
    "simple_gla": simple_gla,
}
STEPS: dict[str, Callable[..., Any]] = {
    "linear_attention": linear_attention_step,
    "retention": retention_step,
    "simple_gla": simple_gla_step,
}


@pytest.fixture(autouse=True)
def narrow_kernels_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels for bf16 run in fp32 here, where errors show, and as on large chips. What else there is has tests of
    its own."""
    from fla_swap.kernels.decay import simple_torch, simple_triton

    monkeypatch.setattr(simple_triton, "has_large_memory", lambda device: True)
    monkeypatch.setattr(simple_ops, "_implementation", lambda n, _: simple_triton if n == "triton" else simple_torch)


def make(
    time: int,
    name: str = "simple_gla",
    *,
    batch: int = 1,
    sequences: int | None = None,
    heads: int = HEADS,
    value_heads: int = VALUE_HEADS,
    key: int = KEY,
    value: int = VALUE,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """Random arguments that require gradients; two value heads share a query and key head."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    made: dict[str, Any] = {n: normal(batch, time, heads, key).to(dtype) for n in ("q", "k")}
    made["v"] = normal(batch, time, value_heads, value).to(dtype)
    if name == "simple_gla":
        made["g"] = -torch.rand(batch, time, value_heads, generator=generator) / 5
    if name == "retention":
        made["decay"] = -torch.rand(value_heads, generator=generator) / 5
    made["initial_state"] = normal(sequences or batch, value_heads, key, value)
    return {n: x.requires_grad_() for n, x in made.items()}


def oracle(**inputs: Any) -> tuple[Tensor, Tensor | None]:
    """The loop over time, with the gate of each head repeated for every key channel."""
    decay, g = inputs.pop("decay", None), inputs.pop("g", None)
    shape = inputs["v"].shape[:3]
    g = decay.expand(shape) if decay is not None else g
    if g is not None:
        inputs["g"] = g.unsqueeze(-1).expand(*shape, inputs["q"].shape[3])
    return gla_reference(**inputs)


def run(function: Callable[..., Any], inputs: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
    """Output, final state and the gradient of every input under fixed random cotangents."""
    o, state = function(**inputs, output_final_state=True, **options)
    generator = torch.Generator().manual_seed(99)
    cotangents = [torch.randn(x.shape, generator=generator).to(x.dtype) for x in (o, state)]
    gradients = torch.autograd.grad((o, state), list(inputs.values()), cotangents)
    results = {"o": o, "state": state} | {f"d {n}": x for n, x in zip(inputs, gradients, strict=True)}
    return {name: x.detach() for name, x in results.items()}


def exact(inputs: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
    return run(oracle, {n: x.detach().double().requires_grad_() for n, x in inputs.items()}, **options)


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
        assert error(x, reference[name]) <= (gate if name in ("d g", "d decay") else bar), name


@EVERY
@BOTH
@pytest.mark.parametrize("time", [1, 63, 64, 65])
def test_equals_the_float64_loop(time: int, name: str, implementation: str) -> None:
    inputs = make(time, name)
    if time == 1 and name != "linear_attention":
        inputs["initial_state"] = inputs["initial_state"].detach().abs().requires_grad_()
    assert_close(run(OPERATORS[name], inputs, implementation=implementation), exact(inputs))


@EVERY
def test_torch_on_many_chunks_and_batches(name: str) -> None:
    inputs = make(300, name, batch=2, heads=2, value_heads=4)
    assert_close(run(OPERATORS[name], inputs, implementation="torch"), exact(inputs))


@pytest.mark.parametrize("programs", [1, 1000], ids=["whole", "segments"])
@EVERY
def test_whole_sequences_and_segments(name: str, programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With few heads a sequence is cut into segments; the gate gradient starts anew every 256 tokens."""
    from fla_swap.kernels.decay import simple_triton

    monkeypatch.setattr(simple_triton, "PROGRAMS", programs)
    inputs = make(520, name, value_heads=1)
    assert_close(run(OPERATORS[name], inputs, implementation="triton"), exact(inputs))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("programs", [1, 1000], ids=["whole", "segments"])
@EVERY
def test_states_in_blocks_of_columns(name: str, programs: int, packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wide heads, and all heads on chips with little shared memory: three passes give the gradients."""
    from fla_swap.kernels.decay import simple_triton

    monkeypatch.setattr(simple_triton, "has_large_memory", lambda device: False)
    monkeypatch.setattr(simple_triton, "PROGRAMS", programs)
    inputs = make(270, name, value_heads=1, sequences=2 if packed else 1)
    options = {"cu_seqlens": torch.tensor([0, 3, 269])} if packed else {}
    assert_close(run(OPERATORS[name], inputs, implementation="triton", **options), exact(inputs, **options))


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_triton_as_shipped(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    inputs = make(70, name, dtype=dtype)
    bars = (FP32_BAR, GATE_BAR) if dtype == torch.float32 else (8e-3, 2e-2)
    assert_close(run(OPERATORS[name], inputs, implementation="triton"), exact(inputs), *bars)


@BOTH
def test_head_width_over_one_block(implementation: str) -> None:
    inputs = make(40, key=100, value=72)
    assert_close(run(simple_gla, inputs, implementation=implementation), exact(inputs))


@EVERY
def test_torch_in_float64_is_exact(name: str) -> None:
    inputs = {n: x.detach().double().requires_grad_() for n, x in make(70, name).items()}
    assert_close(run(OPERATORS[name], inputs, implementation="torch"), exact(inputs), bar=1e-13, gate=1e-12)


def test_bf16_within_the_bars() -> None:
    inputs = make(150, dtype=torch.bfloat16)
    got, reference = run(simple_gla, inputs, implementation="torch"), exact(inputs)
    assert got["o"].dtype == got["d q"].dtype == torch.bfloat16
    assert got["state"].dtype == got["d g"].dtype == torch.float32
    assert_close(got, reference, bar=8e-3, gate=2e-2)
    assert error(got["o"], reference["o"]) <= 5e-3 and error(got["state"], reference["state"]) <= 5e-3


@BOTH
def test_autocast_changes_nothing(implementation: str) -> None:
    inputs = make(5)
    expected = run(simple_gla, inputs, implementation=implementation)
    with torch.autocast("cpu", torch.bfloat16):
        got = run(simple_gla, inputs, implementation=implementation)
    for name, reference in expected.items():
        assert torch.equal(got[name], reference), name


@BOTH
@pytest.mark.parametrize("kind", ["mixed", "strongest"])
def test_extreme_gates(kind: str, implementation: str) -> None:
    """Gates from 0 to −10 a step, or all −10: nothing overflows, and small gradients do not drown in large ones."""
    inputs = make(70)
    mixed = -10 * (torch.rand_like(inputs["g"]) * 1.4 - 0.2).clamp(0, 1)
    inputs["g"] = (mixed if kind == "mixed" else torch.full_like(mixed, -10.0)).detach().requires_grad_()
    assert_close(run(simple_gla, inputs, implementation=implementation), exact(inputs))


@BOTH
@pytest.mark.parametrize("decay", [0.0, -10.0])
def test_extreme_decays(decay: float, implementation: str) -> None:
    inputs = make(70, "retention")
    inputs["decay"] = torch.full_like(inputs["decay"], decay).requires_grad_()
    assert_close(run(retention, inputs, implementation=implementation), exact(inputs))


@BOTH
@EVERY
def test_packed_equals_separate(name: str, implementation: str) -> None:
    """Sequences of 3, 0, 66 and 1 tokens, then padding full of NaN that must not leak."""
    bounds = (0, 3, 3, 69, 70)
    inputs = make(75, name, sequences=4)
    with torch.no_grad():
        for n in {"q", "k", "v", "g"} & inputs.keys():
            inputs[n][:, 70:] = float("nan")
    packed = torch.tensor(bounds, dtype=torch.int32)
    got = run(OPERATORS[name], inputs, cu_seqlens=packed, implementation=implementation)
    clean = {n: x.detach().nan_to_num().requires_grad_() for n, x in inputs.items()}
    reference = exact(clean, cu_seqlens=packed)
    assert not any(x[:, 70:].any() for n, x in got.items() if n in ("o", "d q", "d k", "d v", "d g"))
    assert_close(got, reference)
    torch.testing.assert_close(got["state"][1], inputs["initial_state"].detach()[1])


def test_packed_sequences_in_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    from fla_swap.kernels.decay import simple_triton

    monkeypatch.setattr(simple_triton, "PROGRAMS", 1000)
    bounds = torch.tensor([0, 3, 3, 263, 530])
    inputs = make(540, value_heads=1, sequences=4, key=8, value=8)
    got = run(simple_gla, inputs, cu_seqlens=bounds, implementation="triton")
    assert not any(got[n][:, 530:].any() for n in ("o", "d q", "d k", "d v", "d g"))
    assert_close(got, exact(inputs, cu_seqlens=bounds))


@BOTH
def test_two_halves_with_the_state_handed_over_equal_the_whole(implementation: str) -> None:
    inputs = {n: x.detach() for n, x in make(100).items()}
    whole, final = simple_gla(**inputs, output_final_state=True, implementation=implementation)
    state = inputs.pop("initial_state")
    pieces = []
    for part in (slice(0, 37), slice(37, 100)):
        piece = {n: x[:, part] for n, x in inputs.items()}
        o, state = simple_gla(**piece, initial_state=state, output_final_state=True, implementation=implementation)
        pieces.append(o)
    assert final is not None and state is not None
    assert error(torch.cat(pieces, 1), whole) <= FP32_BAR and error(state, final) <= FP32_BAR


@EVERY
@pytest.mark.parametrize("implementation", ["torch", "triton", "reference"])
def test_steps_equal_the_whole_and_update_the_state_in_place(name: str, implementation: str) -> None:
    inputs = {n: x.detach() for n, x in make(6, name, batch=2).items()}
    whole, final = OPERATORS[name](**inputs, output_final_state=True, implementation="torch")
    state = inputs.pop("initial_state").clone()
    address, outputs = state.data_ptr(), []
    for part in (slice(0, 1), slice(1, 2), slice(2, 6)):
        piece = {n: x if n == "decay" else x[:, part] for n, x in inputs.items()}
        outputs.append(STEPS[name](**piece, state=state, implementation=implementation))
    assert state.data_ptr() == address
    assert error(torch.cat(outputs, 1), whole) <= FP32_BAR and error(state, final) <= FP32_BAR


@BOTH
def test_inputs_need_not_be_contiguous(implementation: str) -> None:
    inputs = make(3, batch=2, heads=2)
    strided = {n: x.detach().mT.contiguous().mT.requires_grad_() for n, x in inputs.items()}
    assert not strided["q"].is_contiguous()
    expected = run(simple_gla, inputs, implementation=implementation)
    for name, x in run(simple_gla, strided, implementation=implementation).items():
        torch.testing.assert_close(x, expected[name])


def test_three_steps_by_hand() -> None:
    """K = V = 1, decay one half, all inputs one: the state is 1, 1.5, 1.75; without decay 1, 2, 3."""
    one, half = torch.ones(1, 3, 1, 1), torch.tensor([0.5]).log()
    o, state = retention(one, one, one, decay=half, scale=2.0, output_final_state=True)
    assert state is not None
    torch.testing.assert_close(o.flatten(), torch.tensor([2.0, 3.0, 3.5]))
    torch.testing.assert_close(state.flatten(), torch.tensor([1.75]))
    torch.testing.assert_close(linear_attention(one, one, one)[0].flatten(), torch.tensor([1.0, 2.0, 3.0]))


def test_decays_of_the_retention_paper() -> None:
    q, k, v, state = (make(9)[n].detach() for n in ("q", "k", "v", "initial_state"))
    assert retention_decay(2, "cpu").exp().tolist() == pytest.approx([1 - 2**-5, 1 - 2**-6])
    default = retention(q, k, v, initial_state=state)[0]
    torch.testing.assert_close(default, oracle(q=q, k=k, v=v, decay=retention_decay(2, "cpu"), initial_state=state)[0])


@BOTH
def test_a_decay_without_gradient_costs_none(implementation: str) -> None:
    inputs = make(70, "retention")
    inputs["decay"] = inputs["decay"].detach()
    wanted = [x for x in inputs.values() if x.requires_grad]
    got = torch.autograd.grad(retention(**inputs, implementation=implementation)[0].sum(), wanted)
    expected = torch.autograd.grad(oracle(**inputs)[0].sum(), wanted)
    assert all(error(x, y) <= FP32_BAR for x, y in zip(got, expected, strict=True))


@BOTH
@pytest.mark.parametrize("packed", [False, True])
def test_nothing_is_read_before_it_is_written(implementation: str, packed: bool) -> None:
    inputs = make(70, sequences=3 if packed else 1)
    options = {"cu_seqlens": torch.tensor([0, 5, 5, 68]) if packed else None}
    torch.use_deterministic_algorithms(True, warn_only=True)  # fresh memory is NaN
    try:
        assert torch.empty(3).isnan().all()
        got = run(simple_gla, inputs, implementation=implementation, **options)
    finally:
        torch.use_deterministic_algorithms(False)
    assert_close(got, exact(inputs, **options))


def test_opcheck() -> None:
    inputs = make(5)
    q, k, v, g, state = (inputs[n] for n in ("q", "k", "v", "g", "initial_state"))
    decay = make(5, "retention")["decay"]
    for gate, start in itertools.product((None, decay, g), (None, state)):
        torch.library.opcheck(simple_ops.simple_gla_fwd, (q, k, v, gate, start, None, 0.5, start is not None, "torch"))
    fixed = [x.detach() for x in (q, k, v, g, state)]
    torch.library.opcheck(simple_ops.simple_gla_bwd, (*fixed, None, fixed[2], fixed[4], 0.5, True, "torch"))
    torch.library.opcheck(simple_ops.simple_gla_step_op, (*fixed, 0.5, "torch"))


@EVERY
def test_compiles_whole_and_once_for_all_lengths(name: str) -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(OPERATORS[name], fullgraph=True, backend=counter)
    for time in (5, 9, 70, 131):
        inputs = make(time, name)
        got = run(compiled, inputs)
        for quantity, x in run(OPERATORS[name], inputs).items():
            torch.testing.assert_close(got[quantity], x, rtol=0, atol=0)
    assert counter.frame_count <= 2


def test_a_compiled_step_updates_the_state_in_place() -> None:
    inputs = {n: x.detach() for n, x in make(1).items()}
    state = inputs.pop("initial_state")
    expected = state.clone()
    compiled = torch.compile(
        lambda state: simple_gla_step(**inputs, state=state) * 2, fullgraph=True, backend="aot_eager"
    )
    with torch.no_grad():
        o = compiled(state)
    torch.testing.assert_close(o, simple_gla_step(**inputs, state=expected) * 2)
    torch.testing.assert_close(state, expected)


def test_exports() -> None:
    class Layer(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
            return simple_gla(q, k, v, g)[0]

    inputs = {n: x.detach() for n, x in make(7).items() if n != "initial_state"}
    exported = torch.export.export(Layer(), (), inputs)
    torch.testing.assert_close(exported.module()(**inputs), simple_gla(**inputs)[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(2, 4, 1, 3)}, r"k must have shape \(2, 4, 1, 20\), got \(2, 4, 1, 3\)"),
        ({"g": torch.zeros(2, 4, 1)}, r"g must have shape \(2, 4, 2\), got \(2, 4, 1\)"),
        ({"initial_state": torch.zeros(1, 2, 20, 12)}, r"state must have shape \(2, 2, 20, 12\), got \(1, 2, 20, 12\)"),
        ({"v": torch.zeros(2, 4, 2, 12, dtype=torch.bfloat16)}, "v must have q's dtype torch.float32"),
        ({"cu_seqlens": torch.tensor([0, 4])}, "needs batch size 1, got 2"),
        ({"scale": 0.0}, "scale must not be zero"),
    ],
)
def test_errors_say_what_was_found(change: dict[str, Any], message: str) -> None:
    inputs = {n: x.detach() for n, x in make(4, batch=2).items()} | change
    with pytest.raises(KernelError, match=message):
        simple_gla(**inputs)


def test_a_decay_of_another_shape_is_refused() -> None:
    q, k, v = (make(4)[n] for n in ("q", "k", "v"))
    with pytest.raises(KernelError, match=r"decay must have shape \(2\), got \(3,\)"):
        retention(q, k, v, decay=torch.zeros(3))
