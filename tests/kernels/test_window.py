"""Windowed attention: PyTorch and Triton (interpreted) against the float64 loop, values and gradients."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from fla_swap.errors import KernelError
from fla_swap.kernels.window.ops import (
    WindowState,
    new_window_state,
    window_attention,
    window_attention_lse,
    window_attention_step,
)

IMPLEMENTATIONS = ("torch", "triton")


def error(out: torch.Tensor, ref: torch.Tensor) -> float:
    """RMS(ref − out) / RMS(ref); a reference that vanishes (one key: no gradient to q) is measured against .1."""
    difference = (ref.double() - out.double()).square().mean().sqrt()
    return float(difference / ref.double().square().mean().sqrt().clamp_min(0.1))


def inputs(B=1, T=65, H=2, HK=1, K=16, V=16, seed=0, extras=(), dtype=torch.float32) -> dict[str, torch.Tensor]:
    """Random tensors, exact in `dtype`; `extras` may name sinks and alibi."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"q": (B, T, H, K), "k": (B, T, HK, K), "v": (B, T, HK, V), "sinks": (H,), "alibi": (H,)}
    names = ("q", "k", "v", *extras)
    return {name: torch.randn(shapes[name], generator=generator, dtype=torch.float64).to(dtype) for name in names}


def both(tensors, *, bound=1e-5, gradient_bound=1e-5, implementation="torch", **kwargs) -> None:
    """Compare the output and every gradient with the float64 reference."""
    results = []
    for dtype, choice in ((torch.float64, "reference"), (tensors["q"].dtype, implementation)):
        leaves = {name: x.to(dtype).requires_grad_() for name, x in tensors.items()}
        o, _ = window_attention(**leaves, **kwargs, implementation=choice)
        weight = torch.randn(o.shape, generator=torch.Generator().manual_seed(1)).to(tensors["q"].dtype).to(dtype)
        o.backward(weight)
        results.append({"o": o.detach(), **{name: x.grad for name, x in leaves.items()}})
    reference, found = results
    for name, expected in reference.items():
        assert torch.isfinite(found[name]).all(), name
        assert error(found[name], expected) <= (bound if name == "o" else gradient_bound), name


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("T", [1, 63, 64, 65])
def test_matches_reference_with_grouped_heads(implementation, T):
    both(inputs(T=T), window=24, implementation=implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("window", [1, 40, None])
def test_softcap_sinks_and_alibi(implementation, window):
    tensors = inputs(T=70, H=2, HK=2, K=12, V=20, extras=("sinks", "alibi"))
    tensors["alibi"] = tensors["alibi"].abs() * 0.1
    both(tensors, window=window, softcap=3.0, scale=0.5, implementation=implementation)


def test_long_sequence_in_torch():
    both(inputs(T=150, H=2, HK=1, K=60, V=64), window=100)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16(implementation):
    tensors = inputs(T=65, dtype=torch.bfloat16)
    both(tensors, window=24, implementation=implementation, bound=0.005, gradient_bound=0.008)


@pytest.fixture
def large_chip(monkeypatch):
    """Tile sizes of a chip with much shared memory, whose kernels load the tiles they go through by descriptor."""
    from fla_swap.kernels.window import triton_impl

    monkeypatch.setattr(triton_impl, "has_large_memory", lambda device: True)


@pytest.mark.parametrize(
    "T, widths, options",
    [
        (1, (16, 16), {"window": 24}),
        (300, (72, 40), {"window": 100}),
        (300, (16, 16), {"window": None, "softcap": 3.0}),
        (200, (12, 20), {"window": 70}),  # rows of no whole 16 bytes: by address
        (260, (128, 128), {"window": 129, "cu_seqlens": torch.tensor([0, 5, 150, 150, 256])}),
        (200, (64, 64), {"window": 90, "valid": torch.arange(200)[None] >= 70}),
    ],
)
def test_tiles_of_a_large_chip(large_chip, T, widths, options):
    """Tiles inside the band, on its edges, at the ends of documents and of the sequence."""
    tensors = inputs(T=T, K=widths[0], V=widths[1], extras=("sinks",), dtype=torch.float16)
    both(tensors, implementation="triton", bound=0.001, gradient_bound=0.001, **options)


@pytest.mark.parametrize("implementation, seeds", [("torch", 6), ("triton", 1)])
def test_sinks_gradient_in_bfloat16(implementation, seeds):
    """A sum over all tokens whose terms nearly cancel: it must not come from the rounded output."""
    for seed in range(seeds):
        x = inputs(T=64, K=64, V=64, seed=seed, extras=("sinks",), dtype=torch.bfloat16)
        weight = torch.randn(1, 64, 2, 64, generator=torch.Generator().manual_seed(seed + 50)).bfloat16()
        found = []
        for dtype, choice in ((torch.float64, "reference"), (torch.bfloat16, implementation)):
            leaves = {name: t.to(dtype).requires_grad_() for name, t in x.items()}
            o, _ = window_attention(**leaves, window=100, softcap=5.0, implementation=choice)
            (gradient,) = torch.autograd.grad(o, leaves["sinks"], weight.to(dtype))
            found.append(gradient)
        reference, got = found
        assert (got.double() - reference).norm() <= 0.008 * reference.norm()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_autocast_changes_nothing(implementation):
    x = inputs(T=20, K=8, V=8, extras=("sinks",))
    results = []
    for enabled in (False, True):
        leaves = {name: t.clone().requires_grad_() for name, t in x.items()}
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            o, _ = window_attention(**leaves, window=7, implementation=implementation)
            o.backward(torch.ones_like(o))
        results.append((o, *(t.grad for t in leaves.values())))
    for got, expected in zip(*results, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_negative_scale(implementation):
    both(inputs(T=40), window=9, scale=-8.0, implementation=implementation)


def test_full_causal_equals_sdpa():
    x = inputs(B=2, T=130, H=4, HK=2)
    q, k, v = (x[name].transpose(1, 2) for name in "qkv")
    expected = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)
    o, _ = window_attention(**x, window=None)
    torch.testing.assert_close(o, expected, atol=2e-6, rtol=1e-5)


def test_softcap_that_is_never_reached_changes_nothing():
    x = inputs(T=40)
    plain, _ = window_attention(**x, window=8)
    capped, _ = window_attention(**x, window=8, softcap=1e4)
    torch.testing.assert_close(capped, plain, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("implementation", ["reference", *IMPLEMENTATIONS])
@pytest.mark.parametrize("cut", [3, 10, 25])
def test_split_state_equals_one_call(implementation, cut):
    """Prefill, continue from the state, and the second state equals the state of one call."""
    x = inputs(B=2, T=30, K=8, V=8, extras=("sinks",))
    sinks = x.pop("sinks")
    options = {"window": 10, "sinks": sinks, "output_final_state": True, "implementation": implementation}
    whole, whole_state = window_attention(**x, **options)
    first, state = window_attention(**{n: t[:, :cut] for n, t in x.items()}, **options)
    second, final = window_attention(**{n: t[:, cut:] for n, t in x.items()}, initial_state=state, **options)
    torch.testing.assert_close(torch.cat((first, second), 1), whole, atol=1e-6, rtol=1e-5)
    for name, got, expected in zip(WindowState._fields, final, whole_state, strict=True):
        assert torch.equal(got, expected), name


def test_gradient_flows_through_the_state():
    x = inputs(T=20, K=8, V=8)
    options = {"window": 10, "output_final_state": True}
    grads = []
    for cut in (None, 12):
        leaves = {name: t.clone().requires_grad_() for name, t in x.items()}
        if cut is None:
            o, _ = window_attention(**leaves, **options)
        else:
            _, state = window_attention(**{n: t[:, :cut] for n, t in leaves.items()}, **options)
            o, _ = window_attention(**{n: t[:, cut:] for n, t in leaves.items()}, **options, initial_state=state)
        o[:, -8:].square().sum().backward()
        grads.append(leaves)
    for name in "qkv":
        torch.testing.assert_close(grads[1][name].grad, grads[0][name].grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("steps", [1, 3, 12])
def test_steps_equal_the_full_sequence(implementation, steps):
    """Decode in place; the longest step exceeds the window."""
    x = inputs(B=2, T=36, H=4, HK=2, K=8, V=12, extras=("sinks", "alibi"))
    extra = {"sinks": x.pop("sinks"), "alibi": x.pop("alibi").abs() * 0.1, "window": 10, "softcap": 5.0}
    whole, whole_state = window_attention(**x, **extra, output_final_state=True)
    state = new_window_state(2, 10, kv_heads=2, key_dim=8, value_dim=12, dtype=torch.float32)
    addresses = [tensor.data_ptr() for tensor in state]
    extra["implementation"] = implementation
    parts = [
        window_attention_step(**{n: t[:, i : i + steps] for n, t in x.items()}, **extra, state=state)
        for i in range(0, 36, steps)
    ]
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=2e-6, rtol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(state, whole_state, strict=True))
    assert [tensor.data_ptr() for tensor in state] == addresses


@pytest.mark.parametrize("implementation", ["reference", *IMPLEMENTATIONS])
def test_packed_equals_separate(implementation):
    """Three documents, the second empty, and padding after the last; each continues from a state of its own."""
    x = inputs(T=40, K=8, V=8)
    cu_seqlens = torch.tensor([0, 17, 17, 33])
    options = {"window": 10, "output_final_state": True, "implementation": implementation}
    earlier = inputs(B=3, T=7, K=8, V=8, seed=3)
    _, before = window_attention(**earlier, **options)
    for initial in (None, before):
        packed, state = window_attention(**x, **options, cu_seqlens=cu_seqlens, initial_state=initial)
        assert (packed[:, 33:] == 0).all()
        for n, (begin, end) in enumerate(((0, 17), (17, 17), (17, 33))):
            row = None if initial is None else WindowState(*(t[n : n + 1] for t in initial))
            if begin == end:
                assert initial is None or all(torch.equal(a[n : n + 1], b) for a, b in zip(state, row, strict=True))
                continue
            part = {name: t[:, begin:end] for name, t in x.items()}
            expected, expected_state = window_attention(**part, **options, initial_state=row)
            torch.testing.assert_close(packed[:, begin:end], expected, atol=1e-6, rtol=1e-5)
            assert all(torch.equal(a[n : n + 1], b) for a, b in zip(state, expected_state, strict=True))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_packed_gradients(implementation):
    both(inputs(T=40, K=8, V=8), window=10, cu_seqlens=torch.tensor([0, 17, 17, 33]), implementation=implementation)


@pytest.mark.parametrize("implementation", ["reference", *IMPLEMENTATIONS])
def test_left_padding_equals_the_short_sequence(implementation):
    """Padded rows are zero, the rest and the decode after it are those of the unpadded sequence."""
    x = inputs(B=1, T=30, K=8, V=8, extras=("sinks",))
    sinks = x.pop("sinks")
    options = {"window": 10, "sinks": sinks}
    whole, _ = window_attention(**x, **options)
    padding = 5
    padded = {n: torch.cat((torch.full_like(t[:, :padding], 9.0), t), 1) for n, t in x.items()}
    valid = torch.arange(padding + 30)[None] >= padding
    o, state = window_attention(
        **{n: t[:, :34] for n, t in padded.items()},
        **options,
        valid=valid[:, :34],
        output_final_state=True,
        implementation=implementation,
    )
    assert (o[:, :padding] == 0).all()
    torch.testing.assert_close(o[:, padding:], whole[:, :29], atol=1e-6, rtol=1e-5)
    if implementation != "reference":
        options["implementation"] = implementation
    last = window_attention_step(**{n: t[:, 29:] for n, t in x.items()}, **options, state=state)
    torch.testing.assert_close(last, whole[:, 29:], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_left_padding_gradients(implementation):
    x = inputs(B=2, T=40, K=8, V=8, extras=("sinks",))
    valid = torch.arange(40)[None] >= torch.tensor([[6], [0]])
    both(x, window=10, valid=valid, implementation=implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_steps_skip_tokens_that_do_not_count(implementation):
    """Padded rows inside a decode step give zeros and leave no key behind."""
    x = inputs(B=2, T=14, K=8, V=8)
    valid = torch.ones(2, 14, dtype=torch.bool)
    valid[0, :5] = valid[1, 6] = False
    whole, whole_state = window_attention(**x, window=4, valid=valid, output_final_state=True)
    state = new_window_state(2, 4, kv_heads=1, key_dim=8, value_dim=8, dtype=torch.float32)
    parts = [
        window_attention_step(
            **{n: t[:, i : i + 2] for n, t in x.items()},
            window=4,
            state=state,
            valid=valid[:, i : i + 2],
            implementation=implementation,
        )
        for i in range(0, 14, 2)
    ]
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-6, rtol=1e-5)
    assert torch.equal(state.valid, whole_state.valid)
    assert (whole[0, :5] == 0).all() and (whole[1, 6] == 0).all()


def test_short_prompt_shorter_than_the_window():
    x = inputs(T=4, K=8, V=8)
    _, state = window_attention(**x, window=10, output_final_state=True)
    assert state.count.tolist() == [4]
    assert state.valid.tolist() == [[True] * 4 + [False] * 6]
    assert torch.equal(state.k[0, 0, :4], x["k"][0, :, 0])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_nothing_uninitialised_is_read(implementation):
    """Memory from torch.empty is filled with NaN: it must not reach any result."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        both(inputs(T=40, H=2, HK=1, K=12, V=12), window=10, implementation=implementation)
    finally:
        torch.use_deterministic_algorithms(False)


def test_opcheck():
    x = {n: t.requires_grad_() for n, t in inputs(B=2, T=20, K=8, V=8, extras=("sinks", "alibi")).items()}
    valid = torch.arange(20)[None] >= torch.tensor([[6], [0]])
    arguments = (x["q"], x["k"], x["v"], x["sinks"], x["alibi"], valid, None, 7, 5.0, 0.3, None)
    torch.library.opcheck(torch.ops.fla_swap.window_attention_fwd.default, arguments)
    state = new_window_state(2, 7, kv_heads=1, key_dim=8, value_dim=8, dtype=torch.float32)
    step = [x[n].detach()[:, :2] for n in "qkv"]
    torch.library.opcheck(
        torch.ops.fla_swap.window_attention_step.default,
        (*step, *state, x["sinks"].detach(), None, None, None, 0.3, None),
    )


def test_compiles_without_graph_break_and_without_recompiling():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def loss(q, k, v):
        o, state = window_attention(q, k, v, window=8, output_final_state=True)
        return o.square().sum() + state.k.sum()

    compiled = torch.compile(loss, backend=counter, fullgraph=True)
    for T in (12, 20, 31, 40):
        x = {n: t.requires_grad_() for n, t in inputs(T=T, K=8, V=8).items()}
        got = compiled(**x)
        got.backward()
        found = {n: t.grad.clone() for n, t in x.items()}
        for t in x.values():
            t.grad = None
        expected = loss(**x)
        expected.backward()
        torch.testing.assert_close(got, expected)
        for n, t in x.items():
            torch.testing.assert_close(found[n], t.grad, atol=1e-5, rtol=1e-5)
    assert counter.frame_count <= 2


def test_step_compiles_and_updates_in_place():
    torch._dynamo.reset()
    x = inputs(B=2, T=1, K=8, V=8)
    states = [new_window_state(2, 6, kv_heads=1, key_dim=8, value_dim=8, dtype=torch.float32) for _ in "ab"]

    def step(q, k, v, state):
        return window_attention_step(q, k, v, window=6, state=state)

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    for _ in range(8):
        torch.testing.assert_close(compiled(**x, state=states[0]), step(**x, state=states[1]))
    assert states[0].count.tolist() == [8, 8]
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


def test_wrong_arguments_are_named():
    x = inputs(T=4)
    with pytest.raises(KernelError, match="window must be at least 1"):
        window_attention(**x, window=0)
    with pytest.raises(KernelError, match="no reference implementation"):
        window_attention_lse(**x, window=2, implementation="reference")
    with pytest.raises(KernelError, match="window=None keeps no constant-size state"):
        window_attention(**x, window=None, output_final_state=True)
    with pytest.raises(KernelError, match=r"sinks must have shape \(2\), got \(3,\)"):
        window_attention(**x, window=2, sinks=torch.zeros(3))
    with pytest.raises(KernelError, match="2 heads must be a multiple of k's 3"):
        window_attention(x["q"], x["k"].expand(1, 4, 3, 16), x["v"].expand(1, 4, 3, 16), window=2)
    state = new_window_state(1, 3, kv_heads=1, key_dim=16, value_dim=16, dtype=torch.float32)
    with pytest.raises(KernelError, match=r"state.k must have shape \(1, 1, 2, 16\), got \(1, 1, 3, 16\)"):
        window_attention_step(**x, window=2, state=state)
