"""Every operator under torch.compile: whole graphs, forward and backward, one for all lengths; opcheck; FLOPs; export.

The list is not written here: `fla_swap.bench.catalogue` has every sequence operator, `NUMERICS_CASES` the others, and a
public operator that is in neither fails the first test.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode

import fla_swap
import fla_swap.ops
from fla_swap.bench.catalogue import CASES, Shape
from fla_swap.bench.comparison import accepts, load_cases
from fla_swap.kernels.flops import FORMULAS, pairs

COMPOSED = ("rms_norm", "gated_rms_norm", "short_conv")
"""Written in plain PyTorch, for Inductor to fuse."""
NO_OPERATORS = {"WindowState", "new_window_state"}


@dataclass(frozen=True)
class Operator:
    name: str
    function: Callable[..., Any]
    inputs: Callable[[int], dict[str, Tensor]]
    options: dict[str, Any]


def of_catalogue(case, function) -> Operator:
    def inputs(time: int) -> dict[str, Tensor]:
        return case.inputs(Shape(batch=1, time=time, heads=2, width=8), "cpu", torch.float32)

    return Operator(case.name, function, inputs, {**case.options, "output_final_state": True})


def of_numerics(name, case) -> Operator:
    def inputs(time: int) -> dict[str, Tensor]:
        return case["make"]("cpu", torch.float32, time, 2, 8, 0)

    states = {"output_final_state": True} if accepts(case, "output_final_state") else {}
    return Operator(name, getattr(fla_swap.ops, name), inputs, {**states, **case["kwargs"]})


def operators() -> dict[str, Operator]:
    found = {case.name: of_catalogue(case, case.load()) for case in CASES if case.load() is not None}
    for case in load_cases().values():
        name = case["op"].__name__
        if name not in found and hasattr(fla_swap.ops, name):
            found[name] = of_numerics(name, case)
    return found


OPERATORS = operators()
STEPS = [name for name in OPERATORS if hasattr(fla_swap.ops, f"{name}_step")]
ALL = pytest.mark.parametrize("name", OPERATORS)


def test_no_public_operator_is_left_out():
    public = {name for name in fla_swap.ops.__all__ if not name.endswith("_step")} - NO_OPERATORS
    assert public == set(OPERATORS)


def total(result: Any) -> Tensor:
    """A number that depends on every floating-point output."""
    leaves = [x for x in tree_leaves(result) if isinstance(x, Tensor) and x.requires_grad]
    return sum((x * torch.arange(1, x.numel() + 1).reshape(x.shape).sin()).sum() for x in leaves)


def gradients(value: Tensor, inputs: dict[str, Tensor]) -> list[Tensor]:
    wanted = [x for x in inputs.values() if x.requires_grad]
    return list(torch.autograd.grad(value, wanted, allow_unused=True, materialize_grads=True))


@ALL
def test_compiles_whole_and_no_more_than_twice(name):
    """Cold, fullgraph, forward and backward; the second length makes T dynamic and the others reuse it."""
    operator = OPERATORS[name]
    torch.compiler.reset()
    frames = CompileCounterWithBackend("aot_eager")

    def function(inputs):
        return total(operator.function(**inputs, **operator.options))

    compiled = torch.compile(function, fullgraph=True, backend=frames)
    for time in (12, 21, 33):
        inputs = operator.inputs(time)
        wanted = function(inputs)
        got = compiled(inputs)
        torch.testing.assert_close(got, wanted)
        for left, right in zip(gradients(got, inputs), gradients(wanted, inputs), strict=True):
            torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5)
    assert frames.frame_count <= 2


@pytest.mark.parametrize("name", STEPS)
def test_a_compiled_step_updates_the_state_in_place(name):
    operator, step = OPERATORS[name], getattr(fla_swap.ops, f"{name}_step")
    torch.compiler.reset()
    inputs = {n: x.detach() for n, x in operator.inputs(1).items() if n != "initial_state"}
    options = {n: x for n, x in operator.options.items() if n != "output_final_state"}
    start = operator.function(**inputs, **operator.options)[1]
    assert all(x.is_contiguous() for x in tree_leaves(start))  # what a pass leaves, a step takes
    eager, compiled = (tree_map_only(Tensor, torch.clone, start) for _ in range(2))
    with torch.no_grad():
        wanted = step(**inputs, **options, state=eager)
        got = torch.compile(step, fullgraph=True, backend="aot_eager")(**inputs, **options, state=compiled)
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(tree_leaves(compiled), tree_leaves(eager))
    assert any(not torch.equal(a, b) for a, b in zip(tree_leaves(compiled), tree_leaves(start), strict=True))


class Recorder(TorchDispatchMode):
    """Keeps a call of each custom operator of fla_swap."""

    def __init__(self):
        super().__init__()
        self.calls: dict[Any, tuple[Any, Any]] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "fla_swap" and function not in self.calls:
            self.calls[function] = tree_map_only(Tensor, torch.clone, (args, kwargs or {}))
        return function(*args, **(kwargs or {}))


@ALL
def test_fakes_and_schemas_of_every_custom_operator(name):
    """Whatever custom operators a forward and backward pass calls: the schema is true, the fake gives the same."""
    operator = OPERATORS[name]
    inputs = operator.inputs(9)
    with Recorder() as recorder:
        gradients(total(operator.function(**inputs, **operator.options)), inputs)
    assert recorder.calls or name in COMPOSED
    for function, (args, kwargs) in recorder.calls.items():
        torch.library.opcheck(function, args, kwargs, test_utils=("test_schema", "test_faketensor"))


def counted(function) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


@pytest.mark.parametrize("name", [name for name in OPERATORS if name not in COMPOSED])
def test_operations_are_counted_forward_and_backward(name):
    operator = OPERATORS[name]
    inputs = operator.inputs(40)
    with torch.no_grad():
        forward = counted(lambda: operator.function(**inputs, **operator.options))
    both = counted(lambda: gradients(total(operator.function(**inputs, **operator.options)), inputs))
    assert both >= 2 * forward > 0


def test_every_custom_operator_has_a_formula():
    names = {n.removeprefix("fla_swap::") for n in torch._C._dispatch_get_all_op_names() if n.startswith("fla_swap::")}
    assert all(name.startswith("slot_") for name in names - set(FORMULAS))  # weights and softmax: no products


@pytest.mark.parametrize(
    "queries, keys, window", [(5, 5, None), (5, 5, 3), (3, 9, 4), (3, 9, 8), (2, 9, 50), (1, 1, 1)]
)
def test_pairs_of_a_window(queries, keys, window):
    seen = [min(keys - queries + 1 + i, window or keys) for i in range(queries)]
    assert pairs(queries, keys, window) == sum(seen)


def test_counting_starts_with_the_counter_not_before():
    """The counter imports Triton, so that importing the operators must not import it."""
    code = (
        "import sys, torch, fla_swap.ops as ops\n"
        "before = 'torch.utils.flop_counter' in sys.modules or 'triton' in sys.modules\n"
        "from torch.utils.flop_counter import FlopCounterMode\n"
        "with FlopCounterMode(display=False) as counter:\n"
        "    ops.gla(*torch.randn(3, 1, 64, 2, 8))\n"
        "print(before, counter.get_total_flops() == 64 * 2 * (4 * 8 * 8 + 64 * 16))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]


@pytest.mark.slow
def test_a_mixer_runs_as_a_compiled_library(tmp_path):
    """torch.export with a dynamic length, then AOTInductor: a package that needs no Python to run."""
    config = fla_swap.mixers.GLAConfig(hidden_size=32, num_heads=2, rope_base=10_000.0)
    mixer = Alone(fla_swap.mixers.GLA(config)).eval()
    with torch.no_grad():
        time = torch.export.Dim("time", min=2, max=512)
        program = torch.export.export(mixer, (torch.randn(1, 20, 32),), dynamic_shapes=({1: time},), strict=False)
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "mixer.pt2"))
        loaded = torch._inductor.aoti_load_package(path)
        for length in (20, 7, 100):
            x = torch.randn(1, length, 32)
            torch.testing.assert_close(loaded(x), mixer(x), rtol=1e-4, atol=1e-5)


class Alone(torch.nn.Module):
    """A mixer's output without its state."""

    def __init__(self, mixer):
        super().__init__()
        self.mixer = mixer

    def forward(self, x):
        return self.mixer(x)[0]
