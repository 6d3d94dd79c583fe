"""`fs.rewrite(program, plan)`: mixers in the place of attention on a graph, also of one that has no module of its own.

A planned site is found again by the names of the weights that q, k, v and the output go through, and what stands
between the hidden states and the output is held against the attention rebuilt from the site first: at two lengths where
the program takes more than one.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from fla_swap.errors import FlaSwapError, NoValue, RewriteError
from fla_swap.mixers import TokenMixer, mixer_class
from fla_swap.mixers.softmax import Softmax
from fla_swap.patterns.base import Refused
from fla_swap.patterns.catalogue import Catalogue, catalogue
from fla_swap.patterns.graph import CAST, LAYOUT, CapturedGraph, modules_of, source_of
from fla_swap.patterns.mask import length_hints
from fla_swap.patterns.output import find_output
from fla_swap.patterns.path import walk_path
from fla_swap.patterns.projection import Linear
from fla_swap.rewriting.cores import CoreRefused, candidates, read_core, sizes
from fla_swap.rewriting.exact import FAR, LONGEST, PROVABLE, TOLERANCE, erase_dead, query_symbols
from fla_swap.rewriting.records import Rewrite, RewriteRecord
from fla_swap.rewriting.twins import Traced, Twin, bounds, default_sizes, static_twin, symbolic_twin
from fla_swap.types import AttentionSite, LayerPlan, SwapPlan

aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class Region:
    """One attention with its projections: from `hidden` [B, T, D] (or [T, B, D]) to `out`, and the weights' names."""

    anchor: fx.Node
    hidden: fx.Node
    out: fx.Node
    names: tuple[str | None, ...]


def rewrite_sites(program: ExportedProgram, plan: SwapPlan) -> Rewrite:
    """Replace the planned sites in a copy of the program; the weights stay shared. See `fs.rewrite`."""
    module: fx.GraphModule = program.module()  # type: ignore[assignment]
    twin = _twin(module)
    patterns = catalogue()
    regions, reasons = _regions(twin.graph, patterns)
    weights = {**program.constants, **program.state_dict}
    found = [(layer, _region_of(layer.site, regions, reasons)) for layer in plan.layers]
    far = _far(module, twin, found, patterns) if found else None
    proved: list[tuple[LayerPlan, Region, int]] = []
    for layer, region in found:
        _prove(layer.site, region, twin.graph, weights)
        checked = region
        if far is not None:
            checked = _moved(region, twin, far)
            _prove(layer.site, checked, far.graph, weights)
        window, length = layer.site.mask.window, _tokens(layer.site, checked)
        if far is not None and window is not None and window >= length:
            reason = f"at {length} tokens, the most that it can be proved on here, its window of {window} hides nothing"
            raise RewriteError(f"{layer.site.fqn}: {reason}; export with a fixed number of tokens")
        proved.append((layer, region, length))
    records = [_install(module, layer, region, twin, weights, length) for layer, region, length in proved]
    module.graph.lint()
    module.recompile()
    return Rewrite(program=module, records=tuple(records))


def _far(
    module: fx.GraphModule, twin: Twin, found: Sequence[tuple[LayerPlan, Region]], patterns: Catalogue
) -> Twin | None:
    """The graph at a second length, beyond every window and constant of the masks as far as a proof can be run there;
    None where the program takes one length only."""
    cores = [read_core(region.anchor, twin.graph, patterns) for _, region in found]
    lengths = {symbol for core in cores for symbol in query_symbols(twin.original[core.q])}
    if not lengths:
        return None
    windows = [layer.site.mask.window or 0 for layer, _ in found]
    hints = {h for core in cores for h in length_hints(core.terms, twin.graph, core.length) if h <= LONGEST}
    affordable = int((PROVABLE / (2 * max(layer.site.heads for layer, _ in found))) ** 0.5)
    wanted = min(max(FAR, *windows, *hints) + 3, affordable)
    traced, chosen = _traced(module), {}
    for symbol in traced.symbols():
        low, high = bounds(traced, symbol)
        chosen[symbol] = min(high, max(low, wanted if symbol in lengths else 2))
    return symbolic_twin(traced, chosen)


def _moved(region: Region, twin: Twin, far: Twin) -> Region:
    """The same region in another twin of the program."""
    back = {original: copy for copy, original in far.original.items()}
    anchor, hidden, out = (back[twin.original[n]] for n in (region.anchor, region.hidden, region.out))
    return Region(anchor=anchor, hidden=hidden, out=out, names=region.names)


def _tokens(site: AttentionSite, region: Region) -> int:
    return sizes(region.hidden)[0 if site.call.time_first else 1]


def _twin(module: fx.GraphModule) -> Twin:
    traced = _traced(module)
    chosen = default_sizes(traced)
    return symbolic_twin(traced, chosen) if chosen else static_twin(traced)


def _traced(module: fx.GraphModule) -> Traced:
    """Weights are attributes of the unlifted module; every input counts as what the model reads."""
    weights: dict[str, str] = {}
    for node in module.graph.nodes:
        if node.op == "get_attr":
            value = operator.attrgetter(str(node.target))(module)
            if isinstance(value, Tensor):
                weights[node.name] = str(node.target)
                node.meta.setdefault("val", value)
    data = frozenset(n.name for n in module.graph.nodes if n.op == "placeholder")
    return Traced(module=module, weights=weights, values={}, data=data)


def _regions(graph: CapturedGraph, patterns: Catalogue) -> tuple[list[Region], list[str]]:
    """Every attention with its projections, in the graph's order; and why others are none."""
    regions, reasons = [], []
    for anchor in candidates(graph, patterns):
        try:
            regions.append(_region(anchor, graph, patterns))
        except CoreRefused as refused:
            reasons.append(f"{anchor.name} ({source_of(anchor)}): {refused}")
    return regions, reasons


def _region(anchor: fx.Node, graph: CapturedGraph, patterns: Catalogue) -> Region:
    core = read_core(anchor, graph, patterns)
    graph = graph.sized(length=core.length)
    linears: list[Linear] = []
    for start in (core.q, core.k, core.v):
        path = walk_path(start, patterns.path, graph)
        if isinstance(path, Refused):
            raise CoreRefused(path.reason, path.node)
        assert path.linear is not None
        linears.append(path.linear)
    output = find_output(core.out, graph)
    if isinstance(output, Refused):
        raise CoreRefused(output.reason, output.node)
    chains = [[n for n in graph.peel(linear.x, LAYOUT | CAST) if len(sizes(n)) == 3] for linear in linears]
    shared = [n for n in chains[0] if all(n in chain for chain in chains[1:])]
    if not shared:
        raise CoreRefused("q, k and v do not read the same hidden states", anchor)
    names = [linear.weight.name for linear in linears]
    names.append(output.linear.weight.name if output.linear is not None else None)  # type: ignore[arg-type]
    return Region(anchor=anchor, hidden=shared[0], out=output.out, names=tuple(names))


def _region_of(site: AttentionSite, regions: list[Region], reasons: list[str]) -> Region:
    """The one region with the site's weights; of several with the same weights, the one with the site's anchor."""
    names = tuple(p.weight.name if p is not None else None for p in (site.q, site.k, site.v, site.o))
    found = [r for r in regions if r.names == names]
    if len(found) > 1:
        found = [r for r in found if r.anchor.name == site.anchor]
    if len(found) == 1:
        return found[0]
    near = "".join(f"; {r}" for r in reasons[:3])
    raise RewriteError(
        f"{site.fqn}: no attention of this program goes through {names}; those that do not fit: "
        f"{[r.names for r in regions][:3]}{near}"
    )


def _prove(site: AttentionSite, region: Region, graph: CapturedGraph, weights: Mapping[str, Tensor]) -> None:
    """Region and site compute the same on random hidden states, in fp32. Raises RewriteError."""
    dims = sizes(region.hidden)
    time = dims[0] if site.call.time_first else dims[1]
    if dims[0] * dims[1] * time * site.heads > PROVABLE:
        raise RewriteError(f"{site.fqn}: {time} tokens are too many to prove the site with; export with dynamic sizes")
    hidden = torch.randn(dims, generator=torch.Generator().manual_seed(0))
    wide = {n: w.detach().float().cpu() if w.is_floating_point() else w for n, w in weights.items() if _is_tensor(w)}
    try:
        mixer = Softmax.from_attention(site, wide).eval()
        with torch.no_grad():
            wanted = graph.run(region.out, {region.hidden: hidden})
            found = _mixed(mixer, hidden, site).reshape(wanted.shape)
    except (FlaSwapError, NoValue, KeyError, RuntimeError, ValueError) as error:
        raise RewriteError(f"{site.fqn}: the site cannot be held against the program: {error}") from error
    difference = float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30))
    if not difference <= TOLERANCE:
        raise RewriteError(
            f"{site.fqn}: what the program computes between {region.hidden.name} and {region.out.name} differs from "
            f"the planned site by {difference:.1e} (relative, fp32)"
        )


def _is_tensor(value: object) -> bool:
    return isinstance(value, Tensor)


def _mixed(mixer: TokenMixer, hidden: Tensor, site: AttentionSite) -> Tensor:
    if site.call.time_first:
        return mixer(hidden.transpose(0, 1))[0].transpose(0, 1)
    return mixer(hidden)[0]


def _install(
    module: fx.GraphModule, layer: LayerPlan, region: Region, twin: Twin, weights: Mapping[str, Tensor], checked: int
) -> RewriteRecord:
    site = layer.site
    mixer = mixer_class(layer.mixer).from_attention(site, weights, layer.options)
    name = f"mixers.{site.layer}"
    module.add_submodule(name, mixer)
    hidden, out, anchor = (twin.original[n] for n in (region.hidden, region.out, region.anchor))
    graph = module.graph
    with graph.inserting_before(out):
        given = graph.call_function(aten.transpose.int, (hidden, 0, 1)) if site.call.time_first else hidden
        mixed = graph.call_function(operator.getitem, (graph.call_module(name, (given,)), 0))
        if site.call.time_first:
            mixed = graph.call_function(aten.transpose.int, (mixed, 0, 1))
        if len(sizes(region.out)) == 2:
            mixed = graph.call_function(aten.flatten.using_ints, (mixed, 0, 1))
    mixed.meta["val"] = out.meta.get("val")
    modules, source, label = modules_of(anchor), source_of(anchor), anchor.name
    out.replace_all_uses_with(mixed)
    erased = tuple(erase_dead(graph, [out]))
    _forget(module, [n for n in region.names if n is not None])
    return RewriteRecord(
        anchor=label,
        module=modules[-1] if modules else "",
        nodes=erased,
        replacement=name,
        facts={"site": site.fqn, "layer": site.layer, "mixer": layer.mixer},
        source=source,
        checked_length=checked,
    )


def _forget(module: fx.GraphModule, names: list[str]) -> None:
    """Drop the projections that nothing reads any more: they are in the mixer now."""
    used = {str(n.target) for n in module.graph.nodes if n.op == "get_attr"}
    for name in dict.fromkeys(names):
        if name not in used:
            owner: nn.Module = module.get_submodule(name.rpartition(".")[0])
            delattr(owner, name.rpartition(".")[2])
