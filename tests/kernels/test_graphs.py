"""On a GPU: every operator in a CUDA graph, forward and backward, also packed with lengths that change between replays.

`python -m pytest -m gpu`.
"""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from fla_swap.bench.catalogue import CASES, Shape

pytestmark = pytest.mark.gpu

PRESENT = {case.name: case for case in CASES if case.load() is not None}
PACKED = [name for name, case in PRESENT.items() if "cu_seqlens" in inspect.signature(case.load()).parameters]
STEPS = [name for name, case in PRESENT.items() if case.step() is not None]
BOUNDS = ([0, 70, 70, 200, 290], [0, 1, 130, 131, 300], [0, 0, 0, 300, 300])
SHAPE = Shape(batch=1, time=300, heads=2, width=64)


def capture(function):
    """A graph of the function and where it leaves its results."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = function()
    return graph, results


def passes(case, inputs, **options):
    """Output and gradients of one forward and backward pass, as a function without arguments."""

    def run() -> list[Tensor]:
        o = case.load()(**inputs, **case.options, **options)[0]
        value = o.float().square().sum()
        return [
            o.detach(),
            *torch.autograd.grad(value, list(inputs.values()), allow_unused=True, materialize_grads=True),
        ]

    return run


def assert_same(got: list[Tensor], wanted: list[Tensor]) -> None:
    """Bitwise up to the order of atomic additions."""
    for left, right in zip(got, wanted, strict=True):
        assert torch.isfinite(left).all()
        torch.testing.assert_close(left, right, rtol=2e-2, atol=2e-2 * float(right.float().abs().max()) + 1e-6)


@pytest.mark.parametrize("name", PRESENT)
def test_a_replay_with_other_inputs_equals_an_eager_pass(name):
    case = PRESENT[name]
    inputs = case.inputs(SHAPE, "cuda", torch.bfloat16)
    graph, results = capture(passes(case, inputs))
    for seed in (1, 2):
        other = case.inputs(SHAPE, "cuda", torch.bfloat16, seed)
        with torch.no_grad():
            for n, x in inputs.items():
                x.copy_(other[n])
        graph.replay()
        assert_same(results, passes(case, other)())


@pytest.mark.parametrize("name", PACKED)
def test_one_graph_serves_packed_sequences_of_changing_lengths(name):
    case = PRESENT[name]
    inputs = case.inputs(SHAPE, "cuda", torch.bfloat16)
    bounds = torch.tensor(BOUNDS[0], device="cuda")
    graph, results = capture(passes(case, inputs, cu_seqlens=bounds))
    for lengths in (*BOUNDS[1:], BOUNDS[0]):
        bounds.copy_(torch.tensor(lengths))
        graph.replay()
        assert_same(results, passes(case, inputs, cu_seqlens=torch.tensor(lengths, device="cuda"))())


@pytest.mark.parametrize("name", STEPS)
def test_steps_in_a_graph_carry_the_state_on(name):
    case, shape = PRESENT[name], Shape(batch=2, time=1, heads=2, width=64)
    operator, step = case.load(), case.step()
    inputs = {n: x.detach() for n, x in case.inputs(shape, "cuda", torch.bfloat16).items()}
    start = operator(**inputs, **case.options, output_final_state=True)[1]
    state, eager = (tree_map_only(Tensor, torch.clone, start) for _ in range(2))
    with torch.no_grad():
        graph, o = capture(lambda: step(**inputs, **case.options, state=state))
        for own, fresh in zip(tree_leaves(state), tree_leaves(start), strict=True):
            own.copy_(fresh)
        for _ in range(3):
            graph.replay()
            wanted = step(**inputs, **case.options, state=eager)
            assert_same([o], [wanted])
    for own, right in zip(tree_leaves(state), tree_leaves(eager), strict=True):
        torch.testing.assert_close(own, right)
