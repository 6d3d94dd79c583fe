"""`fs.rewrite`: rewrites of an exported program."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.utils._pytree import tree_leaves

from fla_swap.errors import RewriteError
from fla_swap.patterns.contractions import expand_contractions
from fla_swap.rewriting.exact import rewrite_graph
from fla_swap.rewriting.records import Rewrite
from fla_swap.rewriting.sites import rewrite_sites
from fla_swap.rewriting.twins import Traced
from fla_swap.types import SwapPlan

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
TOLERANCES = {torch.float64: 1e-10, torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 8e-2}


def rewrite(
    program: ExportedProgram,
    plan: SwapPlan | None = None,
    *,
    check: bool = False,
    example_inputs: Inputs | None = None,
) -> Rewrite:
    """Replace every attention of an exported program by an operator that computes the same function.

    Causal and bidirectional attention becomes `scaled_dot_product_attention` without a mask tensor; windows, chunks,
    softcap, sinks and ALiBi become `fla_swap.ops.window_attention`, FlexAttention too where its functions and blocks
    say no more. Only what is understood and proved is replaced: an attention whose mask depends on what it reads (a
    padding mask, say) stays, and `.skipped` says why.

    With a `plan`, mixers take the place of the planned sites instead, whether these have a module of their own or not:
    `.module()` is then a GraphModule whose `mixers.<layer>` are trained like any module; all other weights are shared.

    Args:
        program: from `torch.export.export`, before `run_decompositions`; sizes may be dynamic. It is not changed. The
            values of its buffers (a stored mask, slopes) are read now.
        plan: from `fs.plan`, of the same model.
        check: run the program before and after, and compare. With a plan, only where its mixers are "softmax".
        example_inputs: (args, kwargs) for the check; None takes the program's own.
    Raises:
        RewriteError: the outputs differ by more than their dtype's rounding, or there is nothing to check with; a
            planned site is not in the program, or the program computes something else there.
    """
    if plan is not None:
        result = rewrite_sites(program, plan)
        if check:
            compare(program, result, example_inputs)
        return result
    copy = _copied(program)
    traced = _traced(program, copy)
    if not traced.symbols():
        expand_contractions(copy, traced.weights)
    found = rewrite_graph(traced)
    if not found.records:
        note = "no attention was rewritten" if found.skipped else "no attention was found"
        return Rewrite(program=program, skipped=found.skipped, note=f"{note}: the program is unchanged")
    result = Rewrite(program=_program(program, copy), records=found.records, skipped=found.skipped)
    if check:
        compare(program, result, example_inputs)
    return result


def compare(program: ExportedProgram, result: Rewrite, inputs: Inputs | None) -> float:
    """Largest difference of the outputs, relative to the largest value. Raises RewriteError beyond rounding."""
    given = inputs if inputs is not None else program.example_inputs
    if given is None:
        raise RewriteError("check=True needs inputs: the program carries none, pass example_inputs=(args, kwargs)")
    args, kwargs = given
    with torch.no_grad():
        wanted = tree_leaves(program.module()(*args, **kwargs))
        found = tree_leaves(result.module()(*args, **kwargs))
    worst = 0.0
    for a, b in zip(wanted, found, strict=True):
        if not isinstance(a, Tensor) or not a.numel():
            continue
        error = float((a.double() - b.double()).abs().max() / a.double().abs().max().clamp(min=1e-30))
        worst = max(worst, error)
        if not error <= TOLERANCES.get(a.dtype, 0.0):
            raise RewriteError(f"an output of the rewritten program differs by {error:.1e} (relative, {a.dtype})")
    return worst


def _copied(program: ExportedProgram) -> fx.GraphModule:
    """The program's graph, node by node, sharing its submodules and weights."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    result = graph.graph_copy(program.graph, copies)
    output = graph.output(result)
    output.meta = dict(next(n for n in reversed(program.graph.nodes) if n.op == "output").meta)
    return fx.GraphModule(program.graph_module, graph)


def _traced(program: ExportedProgram, module: fx.GraphModule) -> Traced:
    weights: dict[str, str] = {}
    values: dict[str, Any] = {}
    data = set()
    for spec in program.graph_signature.input_specs:
        name = getattr(spec.arg, "name", None)
        if name is None:
            continue
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER) and spec.target is not None:
            weights[name] = spec.target
        if spec.kind is InputKind.BUFFER:
            values[name] = program.state_dict.get(str(spec.target), program.constants.get(str(spec.target)))
        elif spec.kind is InputKind.CONSTANT_TENSOR:
            values[name] = program.constants[str(spec.target)]
        elif spec.kind is InputKind.USER_INPUT:
            data.add(name)
    return Traced(module=module, weights=weights, values=values, data=frozenset(data))


def _program(program: ExportedProgram, module: fx.GraphModule) -> ExportedProgram:
    return ExportedProgram(
        root=module,
        graph=module.graph,
        graph_signature=program.graph_signature,
        state_dict=program.state_dict,
        range_constraints=program.range_constraints,
        module_call_graph=program.module_call_graph,
        example_inputs=program.example_inputs,
        constants=program.constants,
        verifiers=program.verifiers,
    )
