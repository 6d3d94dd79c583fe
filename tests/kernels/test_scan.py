"""Scans over channels: every implementation against the float64 loop, on outputs, states and all gradients."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor

from fla_swap.errors import KernelError
from fla_swap.kernels.scan import hgrn as hgrn_module
from fla_swap.kernels.scan import reference, selective, triton_impl
from fla_swap.kernels.scan.ops import hgrn, hgrn_step, selective_scan, selective_scan_step

FP32_BAR, GATE_BAR = 1e-5, 1e-4
GATES = ("d g", "d dt", "d A", "d dt_bias")
BOTH = pytest.mark.parametrize("implementation", ["torch", "triton"])
RUNS = pytest.mark.parametrize(
    ("case", "implementation"),
    [("hgrn", "torch"), ("selective", "torch"), ("bare", "torch"), ("hgrn", "triton"), ("selective", "triton")],
)
EVERY = pytest.mark.parametrize("case", ["hgrn", "selective", "bare"])
CASES: dict[str, tuple[Callable, Callable, Callable, dict[str, Any]]] = {
    "hgrn": (hgrn, reference.hgrn_reference, reference.make_hgrn, {}),
    "selective": (
        selective_scan,
        reference.selective_scan_reference,
        reference.make_selective_scan(3),
        {"dt_softplus": True},
    ),
    "bare": (selective_scan, reference.selective_scan_reference, reference.make_selective_scan(2, bare=True), {}),
}
STEPS = {hgrn: hgrn_step, selective_scan: selective_scan_step}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter scans element by element: narrow tiles run the same code in a tenth of the time."""
    for name, steps, channels in (("HGRN", 8, 8), ("SELECTIVE", 8, 4), ("SELECTIVE_BACK", 4, 4)):
        tile = dataclasses.replace(getattr(triton_impl, name), steps=steps, channels=channels)
        monkeypatch.setattr(triton_impl, name, tile)


def make(case: str, time: int, width: int = 5, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Random arguments of 2·width channels, B = 2, that require gradients."""
    return CASES[case][2]("cpu", dtype, time, 2, width, 0)


def packed(inputs: dict[str, Tensor], sequences: int) -> dict[str, Tensor]:
    """The first row alone, as packed input; an initial state for every sequence."""
    made = {n: x[:1] if x.ndim == 3 and n != "initial_state" else x for n, x in inputs.items()}
    generator = torch.Generator().manual_seed(5)
    made["initial_state"] = torch.randn(sequences, *inputs["initial_state"].shape[1:], generator=generator)
    return {n: x.detach().clone().requires_grad_() for n, x in made.items()}


def run(function: Callable, inputs: dict[str, Tensor], **options) -> dict[str, Tensor]:
    """Output, final state and the gradient of every input under fixed random cotangents."""
    o, state = function(**inputs, output_final_state=True, **options)
    generator = torch.Generator().manual_seed(99)
    cotangents = [torch.randn(x.shape, generator=generator).to(x.dtype) for x in (o, state)]
    gradients = torch.autograd.grad((o, state), list(inputs.values()), cotangents)
    results = {"o": o, "state": state} | {f"d {n}": x for n, x in zip(inputs, gradients, strict=True)}
    return {name: x.detach() for name, x in results.items()}


def got(case: str, inputs: dict[str, Tensor], **options) -> dict[str, Tensor]:
    operator, _, _, static = CASES[case]
    return run(operator, inputs, **static, **options)


def exact(case: str, inputs: dict[str, Tensor], **options) -> dict[str, Tensor]:
    _, loop, _, static = CASES[case]
    return run(loop, {n: x.detach().double().requires_grad_() for n, x in inputs.items()}, **static, **options)


def error(result: Tensor, wanted: Tensor) -> float:
    """RMS(result − wanted) / RMS(wanted)."""
    wrong = (result.double() - wanted.double()).square().mean().sqrt()
    return (wrong / wanted.double().square().mean().sqrt()).item()


def assert_close(
    results: dict[str, Tensor], wanted: dict[str, Tensor], bar: float = FP32_BAR, gate: float = GATE_BAR
) -> None:
    assert results.keys() == wanted.keys()
    for name, x in results.items():
        assert x.shape == wanted[name].shape
        assert error(x, wanted[name]) <= (gate if name in GATES else bar), name


@EVERY
@pytest.mark.parametrize("time", [1, 63, 64, 65, 200])
def test_torch_equals_the_float64_loop(case: str, time: int) -> None:
    inputs = make(case, time)
    assert_close(got(case, inputs, implementation="torch"), exact(case, inputs))


@pytest.mark.parametrize(("case", "time"), [("hgrn", 1), ("hgrn", 63), ("hgrn", 65), ("selective", 1), ("bare", 9)])
def test_triton_equals_the_float64_loop(case: str, time: int) -> None:
    """Lengths around the tiles'; `test_triton_in_segments` is longer."""
    inputs = make(case, time)
    assert_close(got(case, inputs, implementation="triton"), exact(case, inputs))


@pytest.mark.parametrize("case", ["hgrn", "bare"])
def test_triton_with_whole_tiles_of_channels(case: str) -> None:
    """Two blocks of channels, rows, channels and states that divide: no mask."""
    inputs = make(case, 16, width=8)
    assert_close(got(case, inputs, implementation="triton"), exact(case, inputs))


@pytest.mark.parametrize("case", ["hgrn", "selective"])
def test_triton_in_segments(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few channels: time is cut, and what every segment does to a state is composed."""
    monkeypatch.setattr(triton_impl, "SHORTEST_SEGMENT", 8)
    inputs = make(case, 30, width=2)
    assert triton_impl.stretches(inputs["x"], None, triton_impl.HGRN).segments == 4
    assert_close(got(case, inputs, implementation="triton"), exact(case, inputs))
    inputs, bounds = packed(inputs, 4), torch.tensor([0, 3, 3, 22, 29])
    options = {"cu_seqlens": bounds}
    assert_close(got(case, inputs, implementation="triton", **options), exact(case, inputs, **options))


def test_segments_of_packed_sequences() -> None:
    """They begin at the sequences' starts and at multiples of 16; unused slots are marked."""
    table = triton_impl.segment_table(torch.tensor([0, 3, 3, 40, 48]), 50, 16)
    wanted = [[0, 0, 0], [2, 0, 0], [2, 1, 1], [2, 2, 2], [3, 0, 2]]
    assert table.tolist() == wanted + [[-1, -1, -1]] * 3


@BOTH
def test_many_states(implementation: str) -> None:
    inputs = reference.make_selective_scan(20)("cpu", torch.float32, 6, 1, 4, 0)
    options = {"dt_softplus": True, "implementation": implementation}
    wanted = run(
        reference.selective_scan_reference,
        {n: x.detach().double().requires_grad_() for n, x in inputs.items()},
        dt_softplus=True,
    )
    assert_close(run(selective_scan, inputs, **options), wanted)


@EVERY
def test_torch_in_float64_is_exact(case: str) -> None:
    inputs = {n: x.detach().double().requires_grad_() for n, x in make(case, 70).items()}
    assert_close(got(case, inputs, implementation="torch"), exact(case, inputs), bar=1e-13, gate=1e-12)


@EVERY
@pytest.mark.parametrize(
    ("implementation", "dtype"), [("torch", "bfloat16"), ("triton", "bfloat16"), ("torch", "float16")]
)
def test_half_precision_within_the_bars(case: str, implementation: str, dtype: str) -> None:
    inputs = make(case, 30, dtype=getattr(torch, dtype))
    results, wanted = got(case, inputs, implementation=implementation), exact(case, inputs)
    assert results["o"].dtype == results["d x"].dtype == getattr(torch, dtype)
    assert results["state"].dtype == torch.float32
    assert_close(results, wanted, bar=8e-3, gate=2e-2)
    assert error(results["o"], wanted["o"]) <= 5e-3 and error(results["state"], wanted["state"]) <= 5e-3


@RUNS
def test_autocast_changes_nothing(case: str, implementation: str) -> None:
    inputs = make(case, 5)
    wanted = got(case, inputs, implementation=implementation)
    with torch.autocast("cpu", torch.bfloat16):
        results = got(case, inputs, implementation=implementation)
    assert all(torch.equal(results[name], x) for name, x in wanted.items())


@BOTH
def test_extreme_gates(implementation: str) -> None:
    """Decays of 0 and −10 a step, of all before (−64), and everything between; steps of 0 and 1,000."""
    inputs = make("hgrn", 50, width=2)
    g = -10 * (torch.rand(inputs["g"].shape) * 1.4 - 0.2).clamp(0, 1)
    g[:, 30] = -64
    inputs["g"] = g.requires_grad_()
    assert_close(got("hgrn", inputs, implementation=implementation), exact("hgrn", inputs))
    inputs = make("bare", 30, width=2)
    dt = 10 * (torch.rand(inputs["dt"].shape) * 1.4 - 0.2).clamp(0, 1)
    dt[:, 20] = 1000
    inputs["dt"] = dt.requires_grad_()
    assert_close(got("bare", inputs, implementation=implementation), exact("bare", inputs))


@BOTH
def test_small_steps_keep_their_digits(implementation: str) -> None:
    """softplus(−14) is about 8e-7: 1 + exp(−14) in fp32 would lose half of its digits."""
    inputs = make("selective", 9)
    inputs["dt"] = (inputs["dt"].detach() - 14).requires_grad_()
    inputs["initial_state"] = torch.zeros_like(inputs["initial_state"]).requires_grad_()
    assert_close(got("selective", inputs, implementation=implementation), exact("selective", inputs))


@RUNS
def test_packed_equals_separate(case: str, implementation: str) -> None:
    """Empty sequences (at both ends too), borders inside tiles, trailing padding; int32 bounds."""
    operator, _, _, static = CASES[case]
    inputs = packed(make(case, 45, width=2), 6)
    bounds = [0, 0, 5, 5, 38, 40, 40]
    options = {"cu_seqlens": torch.tensor(bounds, dtype=torch.int32), "implementation": implementation}
    results = got(case, inputs, **options)
    assert_close(results, exact(case, inputs, cu_seqlens=options["cu_seqlens"]))
    assert not results["o"][:, 40:].any() and not results["d x"][:, 40:].any()
    assert torch.equal(results["state"][2], inputs["initial_state"][2])
    for n, (a, b) in enumerate(itertools.pairwise(bounds)):
        if a < b:
            alone = {k: x[:, a:b] if x.ndim == 3 and k != "initial_state" else x for k, x in inputs.items()}
            alone["initial_state"] = inputs["initial_state"][n : n + 1]
            o, state = operator(**alone, output_final_state=True, implementation=implementation, **static)
            torch.testing.assert_close(results["o"][:, a:b], o)
            torch.testing.assert_close(results["state"][n : n + 1], state)


@RUNS
def test_split_state_equals_whole(case: str, implementation: str) -> None:
    operator, _, _, static = CASES[case]
    inputs = {n: x.detach() for n, x in make(case, 40).items()}
    options = {"output_final_state": True, "implementation": implementation, **static}
    whole, final = operator(**inputs, **options)
    state, pieces = inputs.pop("initial_state"), []
    for part in (slice(0, 23), slice(23, 24), slice(24, 40)):
        piece = {n: x[:, part] if x.ndim == 3 else x for n, x in inputs.items()}
        o, state = operator(**piece, initial_state=state, **options)
        pieces.append(o)
    assert error(torch.cat(pieces, 1), whole) <= FP32_BAR and error(state, final) <= FP32_BAR


@pytest.mark.parametrize("implementation", ["reference", "torch", "triton"])
@EVERY
def test_steps_update_the_state_in_place(case: str, implementation: str) -> None:
    operator, _, _, static = CASES[case]
    inputs = {n: x.detach() for n, x in make(case, 6).items()}
    whole, final = operator(**inputs, output_final_state=True, implementation="torch", **static)
    state = inputs.pop("initial_state").clone()
    address = state.data_ptr()
    outputs = [
        STEPS[operator](
            **{n: x[:, part] if x.ndim == 3 else x for n, x in inputs.items()},
            state=state,
            implementation=implementation,
            **static,
        )
        for part in (slice(0, 1), slice(1, 2), slice(2, 6))
    ]
    assert state.data_ptr() == address
    assert error(torch.cat(outputs, 1), whole) <= FP32_BAR and error(state, final) <= FP32_BAR


@RUNS
def test_inputs_need_not_be_contiguous(case: str, implementation: str) -> None:
    inputs = make(case, 3)
    strided = {n: x.detach().mT.contiguous().mT.requires_grad_() if x.ndim > 1 else x for n, x in inputs.items()}
    assert not strided["x"].is_contiguous()
    wanted = got(case, inputs, implementation=implementation)
    for name, x in got(case, strided, implementation=implementation).items():
        torch.testing.assert_close(x, wanted[name])


def test_three_steps_by_hand() -> None:
    """Decay one half and inputs of one: the state is 1, 1.5, 1.75. So with δ = 1, A = −ln 2; then D and gate."""
    one = torch.ones(1, 3, 1)
    h, state = hgrn(one, one * torch.tensor(0.5).log(), output_final_state=True)
    torch.testing.assert_close(h.flatten(), torch.tensor([1.0, 1.5, 1.75]))
    torch.testing.assert_close(state, torch.tensor([[1.75]]))
    A = torch.tensor([[0.5]]).log()
    y, state = selective_scan(
        one, one, A, one, 2 * one, D=torch.tensor([10.0]), z=0 * one + 100, output_final_state=True
    )
    torch.testing.assert_close(y.flatten(), torch.tensor([1200.0, 1300.0, 1350.0]))
    torch.testing.assert_close(state, torch.tensor([[[1.75]]]))


@contextlib.contextmanager
def nan_in_fresh_memory() -> Iterator[None]:
    """`torch.empty` and its kin return NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@RUNS
@pytest.mark.parametrize("together", [False, True])
def test_nothing_is_read_before_it_is_written(case: str, implementation: str, together: bool) -> None:
    inputs = make(case, 30, width=2)
    inputs = packed(inputs, 3) if together else inputs
    options = {"cu_seqlens": torch.tensor([0, 5, 5, 26])} if together else {}
    with nan_in_fresh_memory():
        assert torch.empty(3).isnan().all()
        results = got(case, inputs, implementation=implementation, **options)
    assert_close(results, exact(case, inputs, **options))


def test_opcheck() -> None:
    x, g, state = make("hgrn", 5).values()
    torch.library.opcheck(hgrn_module.hgrn_fwd, (x, g, state, None, "torch"))
    torch.library.opcheck(hgrn_module.hgrn_fwd, (x, g, None, None, "torch"))
    fixed = [t.detach() for t in (g, x, state)]
    torch.library.opcheck(hgrn_module.hgrn_bwd, (*fixed, None, fixed[1], fixed[2], "torch"))
    torch.library.opcheck(hgrn_module.hgrn_step_op, (*(t.detach() for t in (x, g, state)), "torch"))


@pytest.mark.parametrize("bare", [False, True])
def test_opcheck_of_the_selective_scan(bare: bool) -> None:
    inputs = make("bare" if bare else "selective", 5)
    names = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_state")
    tensors = [inputs.get(name) for name in names]
    torch.library.opcheck(selective.selective_scan_fwd, (*tensors, None, True, True, "torch"))
    fixed = [None if t is None else t.detach() for t in tensors]
    _, final, saved = selective.selective_scan_fwd(*fixed, None, True, True, "torch")
    torch.library.opcheck(selective.selective_scan_bwd, (*fixed, None, saved, fixed[0], final, True, "torch"))
    torch.library.opcheck(selective.selective_scan_step_op, (*fixed, True, "torch"))


def test_what_is_kept_is_as_the_fake_says() -> None:
    inputs = [x.detach() for x in make("selective", 70).values()]
    for implementation in ("torch", "triton"):
        *_, saved = selective.selective_scan_fwd(*inputs, None, True, True, implementation)
        assert saved.shape == (2 * 2 * 3 * 10,)


@EVERY
def test_compiles_whole_and_once_for_all_lengths(case: str) -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    operator, _, _, static = CASES[case]
    compiled = torch.compile(operator, fullgraph=True, backend=counter)
    for time in (5, 9, 70, 131):
        inputs = make(case, time)
        results = run(compiled, inputs, **static)
        for name, x in got(case, inputs).items():
            torch.testing.assert_close(results[name], x, rtol=0, atol=0)
    assert counter.frame_count <= 2


@EVERY
def test_exports(case: str) -> None:
    operator, _, _, static = CASES[case]

    class Layer(torch.nn.Module):
        def forward(self, inputs: dict[str, Tensor]) -> Tensor:
            return operator(**inputs, **static)[0]

    inputs = {n: x.detach() for n, x in make(case, 7).items()}
    exported = torch.export.export(Layer(), (inputs,))
    torch.testing.assert_close(exported.module()(inputs), operator(**inputs, **static)[0])


@pytest.mark.parametrize(
    ("case", "change", "message"),
    [
        ("hgrn", {"g": torch.zeros(2, 4, 3)}, r"g must have shape \(2, 4, 10\), got \(2, 4, 3\)"),
        ("hgrn", {"x": torch.zeros(2, 4)}, r"x must have shape \(B, T, D\), got \(2, 4\)"),
        ("hgrn", {"initial_state": torch.zeros(1, 10)}, r"state must have shape \(2, 10\), got \(1, 10\)"),
        ("hgrn", {"cu_seqlens": torch.tensor([0, 4])}, "needs batch size 1, got 2"),
        ("hgrn", {"implementation": "cuda"}, "implementation must be one of"),
        ("selective", {"C": torch.zeros(2, 4, 5)}, r"C must have shape \(2, 4, 3\), got \(2, 4, 5\)"),
        ("selective", {"A": torch.zeros(4, 3)}, r"A must have shape \(10, any\), got \(4, 3\)"),
        ("selective", {"D": torch.zeros(10, 1)}, r"D must have shape \(10\), got \(10, 1\)"),
        ("selective", {"dt": torch.zeros(2, 4, 10, dtype=torch.int64)}, "dt must be floating point, got torch.int64"),
        ("hgrn", {"x": torch.zeros(2, 4, 10).double(), "implementation": "triton"}, "takes fp32, bf16 or fp16"),
    ],
)
def test_errors_say_what_was_found(case: str, change: dict[str, Any], message: str) -> None:
    operator, _, _, static = CASES[case]
    inputs = {n: x.detach() for n, x in make(case, 4).items()} | change
    with pytest.raises(KernelError, match=message):
        operator(**inputs, **static)
