"""Slot attention: `gsa` and `abc` against the float64 loop, on outputs, states and all gradients."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fla_swap.errors import KernelError
from fla_swap.kernels.decay import slot_softmax as softmax
from fla_swap.kernels.decay import slot_writes as writes
from fla_swap.kernels.decay.slot_softmax import slot_softmax
from fla_swap.kernels.decay.slot_writes import slot_writes
from fla_swap.kernels.decay.slots import abc, abc_step, gsa, gsa_step
from fla_swap.kernels.decay.slots_reference import abc_reference, gsa_reference

FP32_BAR, GATE_BAR = 1e-5, 1e-4
HEADS, GROUPS, KEY, VALUE, SLOTS = 2, 2, 20, 12, 6
BOTH = pytest.mark.parametrize("implementation", ["torch", "triton"])
OPERATORS = {"gsa": (gsa, gsa_reference), "abc": (abc, abc_reference)}
EITHER = pytest.mark.parametrize("name", OPERATORS)
Inputs = dict[str, Tensor]


def make(
    name: str, time: int, *, batch: int = 2, sequences: int | None = None, dtype: torch.dtype = torch.float32
) -> Inputs:
    """Random arguments that require gradients: tensors of the operator, and the parts of a state "A", "B", "lse"."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    shapes = {"q": (HEADS * GROUPS, KEY), "k": (HEADS, KEY), "v": (HEADS, VALUE)}
    made = {n: normal(batch, time, *shape).to(dtype) for n, shape in shapes.items()}
    if name == "gsa":
        made["g"] = F.logsigmoid(normal(batch, time, HEADS, SLOTS)) / 4
        made["s"] = -torch.expm1(made["g"])
    else:
        made["s"] = 2 * normal(batch, time, HEADS, SLOTS)
    rows = sequences or batch
    made |= {"A": normal(rows, HEADS, KEY, SLOTS), "B": normal(rows, HEADS, SLOTS, VALUE)}
    if name == "abc":
        made["lse"] = normal(rows, HEADS, SLOTS)
    return {n: x.requires_grad_() for n, x in made.items()}


def split(inputs: Inputs) -> tuple[Inputs, tuple[Tensor, ...] | None]:
    """(the operator's tensors, its state or None)."""
    state = tuple(inputs[n] for n in ("A", "B", "lse") if n in inputs)
    return {n: x for n, x in inputs.items() if n not in ("A", "B", "lse")}, state or None


def run(function, inputs: Inputs, **options) -> dict[str, Tensor]:
    """Output, final states and the gradient of every input under fixed random cotangents."""
    tensors, state = split(inputs)
    o, final = function(**tensors, initial_state=state, output_final_state=True, **options)
    generator = torch.Generator().manual_seed(99)
    results = (o, *final)
    cotangents = [torch.randn(x.shape, generator=generator).to(x.dtype) for x in results]
    gradients = torch.autograd.grad(results, list(inputs.values()), cotangents)
    found = dict(zip(("o", "A", "B", "lse"), results, strict=False))
    found |= {f"d {n}": x for n, x in zip(inputs, gradients, strict=True)}
    return {n: x.detach() for n, x in found.items()}


def exact(name: str, inputs: Inputs, **options) -> dict[str, Tensor]:
    return run(OPERATORS[name][1], {n: x.detach().double().requires_grad_() for n, x in inputs.items()}, **options)


def error(got: Tensor, reference: Tensor) -> float:
    """RMS(got − reference) / RMS(reference)."""
    wrong = (got.double() - reference.double()).square().mean().sqrt()
    return (wrong / reference.double().square().mean().sqrt()).item()


def assert_close(got: dict[str, Tensor], reference: dict[str, Tensor], bar: float = FP32_BAR) -> None:
    assert got.keys() == reference.keys()
    for n, x in got.items():
        assert x.shape == reference[n].shape
        assert error(x, reference[n]) <= (max(bar, GATE_BAR) if n in ("d g", "d s") else bar), n


@EITHER
@pytest.mark.parametrize("time", [1, 63, 64, 65, 200])
def test_torch_equals_the_float64_loop(name: str, time: int) -> None:
    inputs = make(name, time)
    assert_close(run(OPERATORS[name][0], inputs, implementation="torch"), exact(name, inputs))


@EITHER
@pytest.mark.parametrize("time", [1, 65])
def test_triton_equals_the_float64_loop(name: str, time: int) -> None:
    inputs = make(name, time, batch=1)
    assert_close(run(OPERATORS[name][0], inputs, implementation="triton"), exact(name, inputs))


@EITHER
def test_torch_in_float64_is_exact(name: str) -> None:
    inputs = {n: x.detach().double().requires_grad_() for n, x in make(name, 70).items()}
    assert_close(run(OPERATORS[name][0], inputs, implementation="torch"), exact(name, inputs), bar=1e-12)


@BOTH
@EITHER
def test_packed_equals_separate(name: str, implementation: str) -> None:
    """A short, an empty, a longer and a single one, then padding that must not leak; the empty one keeps its state."""
    bounds = (0, 3, 3, 69, 70) if implementation == "torch" else (0, 3, 3, 9, 10)
    operator = OPERATORS[name][0]
    inputs = make(name, bounds[-1] + 5, batch=1, sequences=4)
    packed = run(operator, inputs, cu_seqlens=torch.tensor(bounds, dtype=torch.int32), implementation=implementation)
    assert_close(packed, exact(name, inputs, cu_seqlens=torch.tensor(bounds)))
    assert not packed["o"][:, bounds[-1] :].any() and not any(
        packed[f"d {n}"][:, bounds[-1] :].any() for n in ("q", "k", "v", "s")
    )
    tensors, state = split({n: x.detach() for n, x in inputs.items()})
    for n, (start, stop) in enumerate(itertools.pairwise(bounds)):
        if start == stop:
            assert torch.equal(packed["A"][n], inputs["A"][n]) and torch.equal(packed["B"][n], inputs["B"][n])
            continue
        part = {m: x[:, start:stop] for m, x in tensors.items()}
        alone, _ = operator(**part, initial_state=tuple(x[n : n + 1] for x in state), implementation="torch")
        assert error(packed["o"][:, start:stop], alone) <= FP32_BAR


@BOTH
@EITHER
def test_two_halves_with_the_state_handed_over_equal_the_whole(name: str, implementation: str) -> None:
    operator = OPERATORS[name][0]
    tensors, _ = split({n: x.detach() for n, x in make(name, 80, batch=1).items()})
    options = {"output_final_state": True, "implementation": implementation}
    whole, final = operator(**tensors, **options)
    state, pieces = None, []
    for part in (slice(0, 37), slice(37, 80)):
        o, state = operator(**{n: x[:, part] for n, x in tensors.items()}, initial_state=state, **options)
        pieces.append(o)
    assert error(torch.cat(pieces, 1), whole) <= FP32_BAR
    assert all(error(a, b) <= FP32_BAR for a, b in zip(state, final, strict=True))


@EITHER
@pytest.mark.parametrize("implementation", ["torch", "triton", "reference"])
def test_steps_equal_the_whole_and_update_the_state_in_place(name: str, implementation: str) -> None:
    """Query heads share a state: each step reads it for all of them and writes once."""
    tensors, state = split({n: x.detach() for n, x in make(name, 6).items()})
    whole, final = OPERATORS[name][0](**tensors, initial_state=state, output_final_state=True)
    own = tuple(x.clone() for x in state)
    step = {"gsa": gsa_step, "abc": abc_step}[name]
    parts = (slice(0, 1), slice(1, 2), slice(2, 6))
    pieces = [
        step(**{n: x[:, part] for n, x in tensors.items()}, state=own, implementation=implementation) for part in parts
    ]
    assert error(torch.cat(pieces, 1), whole) <= FP32_BAR
    assert all(error(a, b) <= FP32_BAR for a, b in zip(own, final, strict=True))


def test_two_steps_by_hand() -> None:
    """One slot of width one: gsa's output is the slot's value; abc's the mean of the values under weights e^s."""
    one = torch.ones(1, 2, 1, 1)
    v = torch.tensor([2.0, 8.0]).view(1, 2, 1, 1)
    o, _ = gsa(one, one, v, one * 0.5, one * torch.tensor(0.5).log())
    torch.testing.assert_close(o.flatten(), torch.tensor([1.0, 4.5]))
    s = torch.tensor([0.0, 3.0]).log().nan_to_num(neginf=0.0).view(1, 2, 1, 1)
    o, state = abc(one, one, v, s, output_final_state=True)
    torch.testing.assert_close(o.flatten(), torch.tensor([2.0, (2 + 3 * 8) / 4]))
    torch.testing.assert_close(state[2].flatten().exp(), torch.tensor([4.0]))


@BOTH
def test_extreme_gates(implementation: str) -> None:
    """Gates of 0 and −10 a step and everything between; logits of ±60."""
    time = 70 if implementation == "torch" else 20
    inputs = make("gsa", time, batch=1)
    uniform = torch.rand(inputs["g"].shape, generator=torch.Generator().manual_seed(1)) * 1.4 - 0.2
    inputs["g"] = (-10 * uniform.clamp(0, 1)).requires_grad_()
    assert_close(run(gsa, inputs, implementation=implementation), exact("gsa", inputs))
    inputs = make("abc", time, batch=1)
    inputs["s"] = (120 * (uniform.clamp(0, 1) - 0.5)).requires_grad_()
    assert_close(run(abc, inputs, implementation=implementation), exact("abc", inputs))


@BOTH
def test_running_weights_are_a_softmax_over_time(implementation: str) -> None:
    """The weight of token j after token t is weight_j · exp(g_{j+1} + … + g_t); documents start anew."""
    s = 3 * torch.randn(1, 70, 1, 3, generator=torch.Generator().manual_seed(2))
    starts = torch.zeros(1, 70, dtype=torch.bool)
    starts[0, 40] = True
    weight, g, last = slot_writes(s, starts=starts, implementation=implementation)
    for begin, end in ((0, 40), (40, 70)):
        after = g[0, begin:end].flip(0).cumsum(0).flip(0) - g[0, begin:end]
        torch.testing.assert_close(weight[0, begin:end] * after.exp(), s[0, begin:end].softmax(0))
    assert (g[0, [0, 40]] == writes.RESET).all()
    torch.testing.assert_close(last, s[:, 40:].logsumexp(1))


@BOTH
def test_gradients_stop_at_the_start_of_a_document(implementation: str) -> None:
    s = torch.randn(1, 70, 1, 3, generator=torch.Generator().manual_seed(3)).requires_grad_()
    starts = torch.arange(70)[None] == 40
    weight, g, last = slot_writes(s, starts=starts, implementation=implementation)
    generator = torch.Generator().manual_seed(4)
    dw, dg = (torch.randn(weight.shape, generator=generator) for _ in range(2))
    dg[:, [0, 40]] = 0
    gradient = torch.autograd.grad((weight, g, last), s, (dw, dg, torch.ones_like(last)))[0]
    pieces = []
    for begin, end in ((0, 40), (40, 70)):
        part = s.detach()[:, begin:end].requires_grad_()
        own, own_g, own_last = slot_writes(part, implementation="torch")
        ones = torch.ones_like(own_last) if end == 70 else torch.zeros_like(own_last)
        pieces.append(torch.autograd.grad((own, own_g, own_last), part, (dw[:, begin:end], dg[:, begin:end], ones))[0])
    torch.testing.assert_close(gradient, torch.cat(pieces, 1))


@pytest.mark.parametrize(("name", "implementation"), [("gsa", "torch"), ("abc", "torch"), ("abc", "triton")])
def test_nothing_is_read_before_it_is_written(name: str, implementation: str) -> None:
    inputs = make(name, 12, batch=1, sequences=3)
    options = {"cu_seqlens": torch.tensor([0, 5, 5, 10])}
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        got = run(OPERATORS[name][0], inputs, implementation=implementation, **options)
    finally:
        torch.use_deterministic_algorithms(False)
    assert_close(got, exact(name, inputs, **options))


@BOTH
def test_softmax_over_the_slots(implementation: str) -> None:
    """Equal to PyTorch's, gradient too; the largest scores do not overflow."""
    scores = (30 * torch.randn(1, 41, 2, 7, generator=torch.Generator().manual_seed(7))).requires_grad_()
    grad = torch.randn(scores.shape, generator=torch.Generator().manual_seed(8))
    expected = scores.softmax(-1)
    p = slot_softmax(scores, implementation)
    torch.testing.assert_close(p, expected)
    wanted = torch.autograd.grad(expected, scores, grad)
    torch.testing.assert_close(torch.autograd.grad(p, scores, grad), wanted)


def test_opcheck() -> None:
    torch.library.opcheck(softmax.slot_softmax_fwd, (torch.randn(1, 2, 1, 3, requires_grad=True), "torch"))
    s, initial = torch.randn(2, 5, 2, 3, requires_grad=True), torch.randn(2, 2, 3, requires_grad=True)
    starts = torch.zeros(2, 5, dtype=torch.bool)
    torch.library.opcheck(writes.slot_writes_fwd, (s, initial, starts, None, "torch"))
    torch.library.opcheck(writes.slot_writes_fwd, (s[:1], None, None, torch.tensor([0, 2, 5]), "torch"))
    fixed, last = s.detach(), initial.detach()
    torch.library.opcheck(writes.slot_writes_bwd, (fixed, -fixed.abs(), starts, None, fixed, fixed, last, "torch"))


@EITHER
def test_compiles_whole_and_once_for_all_lengths(name: str) -> None:
    torch._dynamo.reset()
    operator = OPERATORS[name][0]
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(operator, fullgraph=True, backend=counter)
    for time in (5, 9, 70):
        inputs = make(name, time)
        got = run(compiled, inputs)
        for n, x in run(operator, inputs).items():
            torch.testing.assert_close(got[n], x)
    assert counter.frame_count <= 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 4, 3, KEY)}, "q's 3 heads must be a multiple of k's 2"),
        ({"g": torch.zeros(2, 4, 2, 5)}, r"g must have shape \(2, 4, 2, 6\), got \(2, 4, 2, 5\)"),
        ({"v": torch.zeros(2, 4, 2, 12, dtype=torch.bfloat16)}, "v must have q's dtype torch.float32"),
        ({"initial_state": (torch.zeros(2, 2, 3, 6), torch.zeros(2, 2, 6, 12))}, r"the keys' state must .*\(2, 2, 20"),
        ({"cu_seqlens": torch.tensor([0, 4])}, "needs batch size 1, got 2"),
        ({"implementation": "cuda"}, "implementation must be one of"),
    ],
)
def test_wrong_arguments_are_named(change: dict, message: str) -> None:
    tensors, _ = split(make("gsa", 4))
    with pytest.raises(KernelError, match=message):
        gsa(**(tensors | change))
