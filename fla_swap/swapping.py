"""nn.Module × SwapPlan → hybrid, in place; and back."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn
from transformers import PreTrainedModel

from fla_swap.errors import FlaSwapError, SwapError
from fla_swap.hybrid import SwappedAttention, become_hybrid, become_plain, install
from fla_swap.mixers import mixer_class
from fla_swap.types import AttentionSite, LayerPlan, Projection, SwapPlan, WeightRef
from fla_swap.wrappers import uncompiled


def swap_(model: nn.Module, plan: SwapPlan, *, keep_originals: bool = True) -> nn.Module:
    """Replace the planned attention layers by mixers that start from their weights. In place; returns the model.

    All or nothing: everything is checked and built before the first layer changes. A transformers model also gets a
    subclass of its own class, so that `save_pretrained` and `from_pretrained` know about the swap. In a compiled model
    (`torch.compile`) the module inside is swapped; it is compiled again when it is called next.

    Args:
        keep_originals: keep the replaced modules (outside `parameters()` and `state_dict()`), for `restore_` and as
            the teacher of alignment. False frees their memory.
    Raises:
        SwapError: the plan is for another model, a layer cannot be built, or the model is swapped/compiled already.
    """
    given, model = model, uncompiled(model)
    _refuse_compiled(model)
    swapped = [fqn for fqn, _ in swapped_layers(model)]
    if swapped:
        raise SwapError(f"this model is swapped already (first layer {swapped[0]}); restore_ it before another plan")
    if not plan.layers:
        raise SwapError("the plan swaps no layer")
    weights = {**dict(model.named_buffers(remove_duplicate=False)), **dict(_parameters(model))}
    built = [(layer.site.fqn, _build(model, layer, weights, keep_originals)) for layer in plan.layers]
    if isinstance(model, PreTrainedModel):
        become_hybrid(model, plan)
        _forget_static_cache(model)
    for fqn, module in built:
        install(model, fqn, module)
    _set_nested_tensors(model, [fqn for fqn, _ in built], allowed=False)
    return given


def restore_(model: nn.Module) -> nn.Module:
    """Undo `swap_`: the same module objects stand in their places again, and the model has its own class.

    Raises:
        SwapError: nothing is swapped, or the originals are gone (loaded from disk, or `keep_originals=False`).
    """
    given, model = model, uncompiled(model)
    _refuse_compiled(model)
    layers = swapped_layers(model)
    if not layers:
        raise SwapError("this model is not swapped")
    gone = [fqn for fqn, layer in layers if layer.original is None]
    if gone:
        raise SwapError(
            f"the original attention of {gone[0]} is gone (the model was loaded from disk, or swapped with "
            "keep_originals=False); load the original model instead"
        )
    for fqn, layer in layers:
        assert layer.original is not None
        install(model, fqn, layer.original)
    _set_nested_tensors(model, [fqn for fqn, _ in layers], allowed=True)
    if isinstance(model, PreTrainedModel):
        become_plain(model)
        _forget_static_cache(model)
    return given


def _refuse_compiled(model: nn.Module) -> None:
    """Its decode steps hold graphs and caches of the layers as they are."""
    if getattr(type(model), "is_compiled_for_decoding", False):
        raise SwapError("this model is compiled (fs.compile); fs.uncompile(model) first, and compile again afterwards")


def swapped_layers(model: nn.Module) -> list[tuple[str, SwappedAttention]]:
    """(fqn, module) of every swapped layer, in model order; `.mixer` is the new, `.original` the old attention."""
    return [(fqn, module) for fqn, module in uncompiled(model).named_modules() if isinstance(module, SwappedAttention)]


@contextmanager
def original_attention(model: nn.Module) -> Iterator[nn.Module]:
    """While this is open, the swapped layers run their original attention: the teacher, in the same weights.

    Raises:
        SwapError: nothing is swapped, or the originals are gone.
    """
    layers = swapped_layers(model)
    if not layers or any(layer.original is None for _, layer in layers):
        raise SwapError("the original attention is not there: the model is not swapped, or its originals are gone")
    try:
        for _, layer in layers:
            layer.use_original = True
        yield model
    finally:
        for _, layer in layers:
            layer.use_original = False


def drop_originals(model: nn.Module) -> None:
    """Free the replaced attention modules; `restore_` and `original_attention` are not possible any more."""
    for _, layer in swapped_layers(model):
        layer.drop_original()


def _parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)


def _build(model: nn.Module, layer: LayerPlan, weights: Mapping[str, Tensor], keep_original: bool) -> SwappedAttention:
    site = layer.site
    _check_place(site)
    try:
        original = model.get_submodule(site.fqn)
    except AttributeError as error:
        raise SwapError(f"the plan is for another model: this one has no module {site.fqn!r}") from error
    if not site.fqn:
        raise SwapError("the attention is the whole model: there is nothing to put a mixer into; swap in what holds it")
    _check_weights(site, weights)
    try:
        mixer = mixer_class(layer.mixer).from_attention(site, weights, layer.options)
    except (FlaSwapError, RuntimeError) as error:
        raise SwapError(f"{site.fqn}: cannot build {layer.mixer!r} from this layer: {error}") from error
    lost = sorted({n for n, _ in mixer.named_buffers()} - set(mixer.state_dict()))
    assert not lost, f"{layer.mixer}: buffers {lost} are not saved, and would be lost on loading"
    return SwappedAttention(site, mixer, original, keep_original=keep_original)


def _check_place(site: AttentionSite) -> None:
    if site.place != "module":
        raise SwapError(
            f"{site.fqn} has no module of its own ({site.source}): only fs.rewrite can put a mixer there; "
            "plan without it"
        )
    if site.kind != "self" and site.recurrence is None:
        raise SwapError(f"{site.fqn} is a {site.kind}-attention, which keeps no state that a mixer could replace")


def _check_weights(site: AttentionSite, weights: Mapping[str, Tensor]) -> None:
    """Every projection of the site exists in this model and has the shape that the plan states."""
    width = site.heads * site.v_head_dim
    heads = (site.heads, site.kv_heads)
    if site.recurrence is not None:
        heads = (site.recurrence.qk_heads, site.recurrence.qk_heads)
    expected: dict[str, tuple[Projection, int, int]] = {
        "q": (site.q, heads[0] * site.head_dim, site.hidden_size),
        "k": (site.k, heads[1] * site.head_dim, site.hidden_size),
        "v": (site.v, site.kv_heads * site.v_head_dim, site.hidden_size),
    }
    if site.o is not None:
        expected["o"] = (site.o, site.output_size or site.hidden_size, width)
    if site.gate is not None:
        expected["gate"] = (site.gate.projection, site.heads if site.gate.per_head else width, site.hidden_size)
    for name, (projection, rows, columns) in expected.items():
        found = _shape(projection.weight, weights, site.fqn)
        if found != (rows, columns):
            raise SwapError(
                f"the plan is for another model: {name} of {site.fqn} ({projection.weight.name}) is {list(found)} "
                f"here, the plan says {[rows, columns]}"
            )
        for adapter in projection.adapters:
            up, down = (_shape(ref, weights, site.fqn) for ref in (adapter.up, adapter.down))
            if up[0] != rows or down[1] != columns or up[1] != down[0]:
                raise SwapError(
                    f"the plan is for another model: the adapter of {name} of {site.fqn} ({adapter.up.name}) is "
                    f"{list(up)} × {list(down)} here, the plan says {[rows, columns]}"
                )


def _shape(ref: WeightRef, weights: Mapping[str, Tensor], fqn: str) -> tuple[int, int]:
    """[out, in] of a stored matrix in this model."""
    if ref.more:
        shapes = [_shape(part, weights, fqn) for part in (dataclasses.replace(ref, more=()), *ref.more)]
        return sum(out for out, _ in shapes), shapes[0][1]
    if ref.name not in weights:
        raise SwapError(f"the plan is for another model: {fqn} has no weight {ref.name!r} here")
    shape = tuple(weights[ref.name].shape)
    if ref.dims is not None and sorted(sum(ref.dims, ())) == list(range(len(shape))):
        shape = tuple(math.prod(shape[d] for d in dims) for dims in ref.dims)
    if len(shape) != 2:
        raise SwapError(f"{fqn}: weight {ref.name!r} is not a matrix but {list(shape)}")
    out, inner = shape[::-1] if ref.transposed else shape
    if ref.rows is not None:
        if any(stop > out for _, stop in ref.rows):
            raise SwapError(f"the plan is for another model: {ref.name} has {out} rows, the plan reads {ref.rows}")
        out = sum(stop - start for start, stop in ref.rows)
    return out, inner


def _forget_static_cache(model: PreTrainedModel) -> None:
    """Drop what `generate` may keep from earlier calls: a static cache and a compiled step of the other structure."""
    for name in ("_cache", "_compiled_call"):
        if name in vars(model):
            delattr(model, name)


def _set_nested_tensors(model: nn.Module, fqns: list[str], *, allowed: bool) -> None:
    """Whether what holds these layers (`nn.TransformerEncoder`) may hand them padded batches as nested tensors.

    With them it reads the weights of its layers itself, which a swapped layer has not. `allowed` puts back what was.
    """
    for fqn in fqns:
        parts = fqn.split(".")
        for depth in range(len(parts)):
            holder = vars(model.get_submodule(".".join(parts[:depth])))
            if not allowed and holder.get("use_nested_tensor"):
                holder["use_nested_tensor"] = _WITHHELD
            elif allowed and holder.get("use_nested_tensor") is _WITHHELD:
                holder["use_nested_tensor"] = True


_WITHHELD = 0
"""False, told apart from a user's own False."""
