"""Attention with a polynomial similarity: `based` and `rebased` against the float64 sums over pairs of tokens."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from fla_swap.errors import KernelError
from fla_swap.kernels.feature import ops
from fla_swap.kernels.feature.maps import feature_count, hedgehog_features, key_features, query_features
from fla_swap.kernels.feature.normalised import normalised
from fla_swap.kernels.feature.ops import based, based_step, rebased, rebased_step
from fla_swap.kernels.feature.reference import based_reference, rebased_reference

FP32_BAR = 1e-5
HEADS, KEY, VALUE = 2, 6, 12
OPERATORS = {"based": (based, based_reference, based_step), "rebased": (rebased, rebased_reference, rebased_step)}
BOTH = pytest.mark.parametrize("implementation", ["torch", "triton"])
EITHER = pytest.mark.parametrize("name", OPERATORS)
Inputs = dict[str, Tensor]


def make(name: str, time: int, *, batch: int = 2, sequences: int | None = None, key: int = KEY) -> Inputs:
    """Random arguments that require gradients; the state "S", "z" is what five earlier tokens leave."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    rows = sequences or batch
    made = {n: normal(batch, time, HEADS, width) for n, width in {"q": key, "k": key, "v": VALUE}.items()}
    features = key_features(normal(rows, 5, HEADS, key), taylor=name == "based")
    made["S"] = torch.einsum("nthf,nthv->nhfv", features, normal(rows, 5, HEADS, VALUE)).contiguous()
    made["z"] = features.sum(1)
    return {n: x.requires_grad_() for n, x in made.items()}


def split(inputs: Inputs) -> tuple[Inputs, tuple[Tensor, Tensor]]:
    return {n: inputs[n] for n in ("q", "k", "v")}, (inputs["S"], inputs["z"])


def run(function, inputs: Inputs, **options) -> dict[str, Tensor]:
    """Output, final state and the gradient of every input under fixed random cotangents."""
    tensors, state = split(inputs)
    o, final = function(**tensors, initial_state=state, output_final_state=True, **options)
    generator = torch.Generator().manual_seed(99)
    results = (o, *final)
    cotangents = [torch.randn(x.shape, generator=generator).to(x.dtype) for x in results]
    gradients = torch.autograd.grad(results, list(inputs.values()), cotangents)
    found = dict(zip(("o", "S", "z"), results, strict=True))
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
        assert error(x, reference[n]) <= bar, n


@pytest.fixture
def short_segments(monkeypatch):
    """Segments of 128 tokens in the Triton kernels, so that short sequences have several."""
    from fla_swap.kernels.feature import triton_impl

    monkeypatch.setattr(triton_impl, "SEGMENT", 128)


@pytest.mark.parametrize("width", [1, 5, 6, 16])
@pytest.mark.parametrize("taylor", [True, False])
def test_features_multiply_to_the_similarity(width: int, taylor: bool) -> None:
    q, k = torch.randn(2, 7, width, dtype=torch.float64)
    s = 0.3 * (q * k).sum(-1)
    mapped_q, mapped_k = query_features(q, scale=0.3, taylor=taylor), key_features(k, taylor=taylor)
    torch.testing.assert_close((mapped_q * mapped_k).sum(-1), 1 + s + s * s / 2 if taylor else s * s)
    assert mapped_k.shape[-1] == feature_count(width, taylor=taylor)
    assert feature_count(16, taylor=True) == 153 and feature_count(16, taylor=False) == 136


@EITHER
@pytest.mark.parametrize("time", [1, 63, 64, 65, 200])
def test_torch_equals_the_sum_over_pairs(name: str, time: int) -> None:
    inputs = make(name, time)
    assert_close(run(OPERATORS[name][0], inputs, implementation="torch"), exact(name, inputs))


@EITHER
@pytest.mark.parametrize(("time", "key"), [(1, 6), (64, 16), (65, 5), (300, 16)])
def test_triton_equals_the_sum_over_pairs(name: str, time: int, key: int, short_segments) -> None:
    inputs = make(name, time, batch=1, key=key)
    assert_close(run(OPERATORS[name][0], inputs, implementation="triton"), exact(name, inputs))


@EITHER
def test_torch_in_float64_is_exact(name: str) -> None:
    inputs = {n: x.detach().double().requires_grad_() for n, x in make(name, 70).items()}
    assert_close(run(OPERATORS[name][0], inputs, implementation="torch"), exact(name, inputs), bar=1e-12)


@EITHER
@BOTH
def test_without_a_state(name: str, implementation: str, short_segments) -> None:
    """Several segments, no state before the first nor after the last."""
    operator, reference, _ = OPERATORS[name]
    tensors, _ = split(make(name, 290, batch=1))
    o, state = operator(**tensors, eps=1e-3, implementation=implementation)
    assert state is None
    wide = {n: x.detach().double().requires_grad_() for n, x in tensors.items()}
    expected, _ = reference(**wide, eps=1e-3)
    assert error(o, expected) <= FP32_BAR
    got = torch.autograd.grad(o.square().sum(), list(tensors.values()))
    for a, b in zip(got, torch.autograd.grad(expected.square().sum(), list(wide.values())), strict=True):
        assert error(a, b) <= FP32_BAR


@BOTH
@EITHER
def test_packed_equals_separate(name: str, implementation: str, short_segments) -> None:
    """Sequences of 3, 0, 140 and 1 tokens, then padding that must not leak; the empty one keeps its state."""
    bounds = (0, 3, 3, 143, 144)
    inputs = make(name, 150, batch=1, sequences=4)
    with torch.no_grad():
        for n in ("q", "k", "v"):
            inputs[n][:, 144:] = float("nan")
    packed = run(
        OPERATORS[name][0], inputs, cu_seqlens=torch.tensor(bounds, dtype=torch.int32), implementation=implementation
    )
    assert not packed["o"][:, 144:].any() and not any(packed[f"d {n}"][:, 144:].any() for n in ("q", "k", "v"))
    tensors, state = split({n: x.detach() for n, x in inputs.items()})
    for n, (start, stop) in enumerate(itertools.pairwise(bounds)):
        if start == stop:
            assert torch.equal(packed["S"][n], inputs["S"][n]) and torch.equal(packed["z"][n], inputs["z"][n])
            continue
        part = {m: x[:, start:stop] for m, x in tensors.items()}
        own = tuple(x[n : n + 1] for x in state)
        alone, final = OPERATORS[name][0](**part, initial_state=own, output_final_state=True, implementation="torch")
        assert error(packed["o"][:, start:stop], alone) <= FP32_BAR
        assert error(packed["S"][n], final[0][0]) <= FP32_BAR and error(packed["z"][n], final[1][0]) <= FP32_BAR


@BOTH
@EITHER
def test_two_halves_with_the_state_handed_over_equal_the_whole(name: str, implementation: str) -> None:
    tensors, _ = split({n: x.detach() for n, x in make(name, 80, batch=1).items()})
    options = {"output_final_state": True, "implementation": implementation}
    whole, final = OPERATORS[name][0](**tensors, **options)
    state, pieces = None, []
    for part in (slice(0, 37), slice(37, 80)):
        o, state = OPERATORS[name][0](**{n: x[:, part] for n, x in tensors.items()}, initial_state=state, **options)
        pieces.append(o)
    assert error(torch.cat(pieces, 1), whole) <= FP32_BAR
    assert all(error(a, b) <= FP32_BAR for a, b in zip(state, final, strict=True))


@EITHER
@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_steps_equal_the_whole_and_update_the_state_in_place(name: str, implementation: str) -> None:
    tensors, state = split({n: x.detach() for n, x in make(name, 6).items()})
    operator, _, step = OPERATORS[name]
    whole, final = operator(**tensors, initial_state=state, output_final_state=True)
    own = tuple(x.clone() for x in state)
    parts = (slice(0, 1), slice(1, 2), slice(2, 6))
    pieces = [
        step(**{n: x[:, part] for n, x in tensors.items()}, state=own, implementation=implementation) for part in parts
    ]
    assert error(torch.cat(pieces, 1), whole) <= FP32_BAR
    assert all(error(a, b) <= FP32_BAR for a, b in zip(own, final, strict=True))


@BOTH
@EITHER
def test_steps_skip_keys_that_do_not_count(name: str, implementation: str) -> None:
    """The state afterwards is that of the tokens that count alone."""
    tensors, state = split({n: x.detach() for n, x in make(name, 5, batch=1).items()})
    operator, _, step = OPERATORS[name]
    valid = torch.tensor([[True, False, True, False, True]])
    own = tuple(x.clone() for x in state)
    o = step(**tensors, state=own, valid=valid, implementation=implementation)
    alone = {n: x[valid][None] for n, x in tensors.items()}
    expected, final = operator(**alone, initial_state=state, output_final_state=True, implementation="torch")
    assert error(o[valid][None], expected) <= FP32_BAR
    assert all(error(a, b) <= FP32_BAR for a, b in zip(own, final, strict=True))


def test_the_state_of_a_step_must_be_contiguous() -> None:
    tensors, (state, sums) = split({n: x.detach() for n, x in make("based", 1).items()})
    with pytest.raises(KernelError, match="contiguous"):
        based_step(**tensors, state=(state.mT.contiguous().mT, sums), implementation="triton")


@BOTH
@EITHER
def test_keys_that_do_not_count_are_not_there(name: str, implementation: str, short_segments) -> None:
    """Output and gradients equal those of the tokens that count alone."""
    operator = OPERATORS[name][0]
    tensors, state = split(make(name, 140, batch=1))
    state = tuple(x.detach() for x in state)
    valid = torch.rand(1, 140, generator=torch.Generator().manual_seed(5)) > 0.3
    o, final = operator(
        **tensors, initial_state=state, output_final_state=True, valid=valid, implementation=implementation
    )
    alone = {n: x.detach()[valid][None].requires_grad_() for n, x in tensors.items()}
    expected, last = operator(**alone, initial_state=state, output_final_state=True, implementation="torch")
    assert error(o[valid][None], expected) <= FP32_BAR and error(final[0], last[0]) <= FP32_BAR
    assert error(final[1], last[1]) <= FP32_BAR
    readout = torch.randn(o.shape, generator=torch.Generator().manual_seed(6)) * valid[..., None, None]
    got = torch.autograd.grad((o * readout).sum() + final[0].sum(), list(tensors.values()))
    wanted = torch.autograd.grad((expected * readout[valid][None]).sum() + last[0].sum(), list(alone.values()))
    for a, b in zip(got, wanted, strict=True):
        assert error(a[valid][None], b) <= FP32_BAR
    assert not got[1][~valid].any() and not got[2][~valid].any()


@EITHER
def test_denominators_and_their_gradients(name: str) -> None:
    """They are the sums of the similarities; both implementations pass gradients on."""
    tensors, _ = split(make(name, 9, batch=1))
    found = []
    for implementation in ("torch", "triton"):
        options = {"scale": 0.3, "eps": 0.5, "implementation": implementation}
        o, den, _ = ops.attend(**tensors, **options, taylor=name == "based")
        gradients = torch.autograd.grad(den.square().sum() + o.sum(), list(tensors.values()))
        found.append((den, *gradients))
    s = 0.3 * torch.einsum("bthk,bshk->bhts", tensors["q"], tensors["k"])
    weights = (1 + s + s * s / 2 if name == "based" else s * s).tril()
    torch.testing.assert_close(found[0][0], weights.sum(-1).transpose(1, 2))
    torch.testing.assert_close(*found)


def test_two_tokens_by_hand() -> None:
    """q = k = 1, scale 1: the similarities of Based are 2.5, those of Rebased 1, so the output is the mean."""
    one = torch.ones(1, 2, 1, 1)
    v = torch.tensor([2.0, 8.0]).view(1, 2, 1, 1)
    o, (S, z) = based(one, one, v, scale=1.0, eps=0.0, output_final_state=True)
    torch.testing.assert_close(o.flatten(), torch.tensor([2.0, 5.0]))
    torch.testing.assert_close((S.flatten(), z.flatten()), (torch.full((3,), 10.0), torch.full((3,), 2.0)))
    o, _ = rebased(one, 2 * one, v, scale=0.5, eps=1.0)
    torch.testing.assert_close(o.flatten(), torch.tensor([1.0, 10 / 3]))


def test_normalised_attention_forgets_with_its_gate() -> None:
    """A decay of exp(−64) in front of a token is a new document."""
    generator = torch.Generator().manual_seed(1)
    q, k = (torch.rand(1, 9, 2, 4, generator=generator) for _ in range(2))
    v, g = torch.randn(1, 9, 2, 3, generator=generator), torch.zeros(1, 9, 2)
    g[:, 5] = -64.0
    o, _, _ = normalised(q, k, v, g)
    torch.testing.assert_close(o[:, 5:], normalised(q[:, 5:], k[:, 5:], v[:, 5:])[0])


def test_hedgehog_features_are_two_distributions() -> None:
    x, weight = torch.randn(2, 3, 2, 5), torch.randn(2, 4, 5)
    mapped = hedgehog_features(x, weight)
    z = torch.stack([x[:, :, h] @ weight[h].T for h in range(2)], 2)
    torch.testing.assert_close(mapped, torch.cat((z.softmax(-1), (-z).softmax(-1)), -1))


@BOTH
@EITHER
def test_nothing_is_read_before_it_is_written(name: str, implementation: str, short_segments) -> None:
    inputs = make(name, 150, batch=1, sequences=3)
    options = {"cu_seqlens": torch.tensor([0, 5, 5, 148])}
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        got = run(OPERATORS[name][0], inputs, implementation=implementation, **options)
    finally:
        torch.use_deterministic_algorithms(False)
    assert_close(got, exact(name, inputs, **options))


@EITHER
def test_inputs_need_not_be_contiguous_and_autocast_changes_nothing(name: str) -> None:
    inputs = make(name, 5, batch=1)
    strided = {n: x.detach().mT.contiguous().mT.requires_grad_() for n, x in inputs.items()}
    expected = run(OPERATORS[name][0], inputs, implementation="triton")
    with torch.autocast("cpu", torch.bfloat16):
        got = run(OPERATORS[name][0], strided, implementation="triton")
    for n, x in got.items():
        torch.testing.assert_close(x, expected[n])


def test_opcheck() -> None:
    inputs = make("based", 2, batch=1, key=2)
    tensors = [inputs[n] for n in ("q", "k", "v", "S", "z")]
    torch.library.opcheck(ops.feature_fwd, (*tensors, None, torch.ones(1, 2, dtype=torch.bool), 0.5, 1e-6, True, True))
    torch.library.opcheck(ops.feature_fwd, (*tensors[:3], None, None, None, None, 0.5, 1e-6, True, False))
    q, k, v, S, z = (x.detach() for x in tensors)
    den = v[..., 0].abs() + 1
    torch.library.opcheck(ops.feature_bwd, (q, k, v, S, z, None, None, v, den, v, den, S, z, 0.5, 1e-6, True))


def test_compiles_whole_and_once_for_all_lengths() -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(based, fullgraph=True, backend=counter)
    for time in (5, 9, 20):
        inputs = make("based", time, batch=1)
        got = run(compiled, inputs)
        for n, x in run(based, inputs).items():
            torch.testing.assert_close(got[n], x)
    assert counter.frame_count <= 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(2, 4, 2, 3)}, r"k must have shape \(2, 4, 2, 6\), got \(2, 4, 2, 3\)"),
        ({"v": torch.zeros(2, 4, 2, 12, dtype=torch.bfloat16)}, "v must have q's dtype torch.float32"),
        ({"initial_state": (torch.zeros(2, 2, 3, 12), torch.zeros(2, 2, 28))}, r"the state must .*\(2, 2, 28, 12\)"),
        ({"cu_seqlens": torch.tensor([0, 4])}, "needs batch size 1, got 2"),
    ],
)
def test_wrong_arguments_are_named(change: dict, message: str) -> None:
    tensors, _ = split(make("based", 4))
    with pytest.raises(KernelError, match=message):
        based(**(tensors | change))


def test_the_triton_kernels_say_how_wide_they_go() -> None:
    q = torch.zeros(1, 4, 2, 17)
    with pytest.raises(KernelError, match=r"K up to 16 \(153 features\), got 17"):
        based(q, q, q, implementation="triton")
